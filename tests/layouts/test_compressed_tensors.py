# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' tensors: packing both ways, scales per row, static activations, and the library's own answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.fixtures_index import fixture, shared
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.compressed_tensors import read
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, row_sums
from vllm_npu_quant.layouts.compressed_tensors import (
    act_order_to_canonical,
    group_of_inputs,
    int_to_canonical,
    one_scale_per_row,
    packed_to_canonical,
    static_to_canonical,
    unpack_inputs,
    unpack_outputs,
    unpacked_zero_points,
)
from vllm_npu_quant.layouts.fp8 import as_bytes
from vllm_npu_quant.layouts.fp8 import to_canonical as fp8_to_canonical
from vllm_npu_quant.layouts.tables import LAYOUTS, tensors_of
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

BITS = st.integers(1, 8)
PLAIN = WeightSpec(8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """[n, k] integers in two's complement, packed along k: from the documented layout, one integer at a time."""
    per_word = 32 // bits
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns // per_word)), dtype=np.uint32)
    for n in range(rows):
        for k in range(columns):
            code = int(values[n, k]) + 2 ** (bits - 1)
            words[n, k // per_word] |= np.uint32(code << (bits * (k % per_word)))
    return words.view(np.int32)


@st.composite
def integers(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(BITS)
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 41))
    seed = draw(st.integers(0, 2**31))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(low, high, (rows, columns)).astype(np.int8), bits


@given(integers())
@settings(max_examples=150, deadline=None)
def test_unpacking_undoes_packing(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    packed = torch.from_numpy(pack(values, bits))
    unpacked = unpack_inputs(packed, bits)
    assert unpacked.dtype == torch.int8
    assert unpacked.shape[1] == packed.shape[1] * (32 // bits)
    assert np.array_equal(unpacked.numpy()[:, : values.shape[1]], values)
    along_outputs = unpack_outputs(packed.t().contiguous(), bits)
    assert np.array_equal(along_outputs.numpy()[: values.shape[1]], values.T)


@given(integers())
@settings(max_examples=60, deadline=None)
def test_the_library_packs_the_same_way(case: tuple[np.ndarray, int]) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    values, bits = case
    packed = helpers.pack_to_int32(torch.from_numpy(values), bits)
    assert np.array_equal(packed.numpy(), pack(values, bits))
    assert torch.equal(unpack_inputs(packed, bits)[:, : values.shape[1]], torch.from_numpy(values))
    along_outputs = helpers.pack_to_int32(torch.from_numpy(values), bits, packed_dim=0)
    spec = LayerSpec("", Layout.CT_PACKED, WeightSpec(bits))
    unpacked = unpacked_zero_points(along_outputs, spec, values.shape[0])
    assert torch.equal(unpacked, torch.from_numpy(values))


def spec(granularity: Granularity, group_size: int = 0, block_rows: int = 0, bits: int = 8) -> LayerSpec:
    return LayerSpec("", Layout.CT_INT, WeightSpec(bits, NumberKind.INT, granularity, group_size, True, block_rows))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_per_tensor_is_repeated(shape: tuple[int, ...]) -> None:
    scale = one_scale_per_row(torch.full(shape, 0.5), spec(Granularity.TENSOR), 5)
    assert scale.tolist() == [[0.5]] * 5


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_scale_per_channel_has_a_second_dimension(shape: tuple[int, ...]) -> None:
    scale = one_scale_per_row(torch.arange(3.0).reshape(shape), spec(Granularity.CHANNEL), 3)
    assert scale.tolist() == [[0.0], [1.0], [2.0]]


def test_a_scale_per_group_stays() -> None:
    stored = torch.arange(6.0).reshape(3, 2)
    assert one_scale_per_row(stored, spec(Granularity.GROUP, 4), 3) is stored


@pytest.mark.parametrize("outputs", [1, 3, 4, 5, 8, 11])
def test_a_scale_per_block_is_repeated_for_the_rows_of_its_block(outputs: int) -> None:
    stored = torch.arange(-(-outputs // 4) * 2.0).reshape(-1, 2)
    scale = one_scale_per_row(stored, spec(Granularity.BLOCK, 16, 4), outputs)
    assert scale.tolist() == [stored[row // 4].tolist() for row in range(outputs)]


def test_a_power_of_two_scale_becomes_float32() -> None:
    stored = torch.tensor([[127, 130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    scale = one_scale_per_row(stored, spec(Granularity.BLOCK, 16, 2), 2)
    assert scale.dtype == torch.float32
    assert scale.tolist() == [[1.0, 8.0]] * 2


def test_packed_weights_of_an_odd_depth() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (3, 21)).astype(np.int8)
    tensors = {
        "weight_packed": torch.from_numpy(pack(values, 4)),
        "weight_scale": torch.ones(3, 3),
        "weight_shape": torch.tensor([3, 21]),
    }
    weight = packed_to_canonical(tensors, spec(Granularity.GROUP, 8, bits=4)).weight
    assert (weight.outputs, weight.inputs, weight.group_size, weight.bits) == (3, 21, 8, 4)
    assert np.array_equal(weight.values.numpy(), values)
    assert np.array_equal(weight.rows(1, 2).numpy(), values[1:2])


def test_one_group_is_a_channel() -> None:
    tensors = {"weight": torch.zeros(3, 8, dtype=torch.int8), "weight_scale": torch.ones(3, 1)}
    assert int_to_canonical(tensors, spec(Granularity.GROUP, 128)).weight.group_size == 0


BROKEN = {
    "a scale that is no number": (
        {"weight_scale": torch.tensor([[float("nan")], [1.0]])},
        "weight_scale holds numbers that are not finite",
    ),
    "zero points in a symmetric scheme": (
        {"weight_zero_point": torch.tensor([[0], [1]], dtype=torch.int8)},
        "the config calls the weight symmetric",
    ),
    "integers that need more bits": (
        {"weight": torch.tensor([[8, 0], [0, 0]], dtype=torch.int8)},
        "weight holds integers that 4 bits do not hold",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_values_are_refused(case: str) -> None:
    changed, message = BROKEN[case]
    tensors = {"weight": torch.zeros(2, 2, dtype=torch.int8), "weight_scale": torch.ones(2, 1), **changed}
    with pytest.raises(NpuQuantError, match=message) as caught:
        int_to_canonical(tensors, spec(Granularity.CHANNEL, bits=4))
    assert caught.value.codes == ("bad-value",)
    assert all(finding.fix and finding.expected and finding.found for finding in caught.value.findings)


def test_a_shape_that_contradicts_the_packed_weight_is_refused() -> None:
    tensors = {
        "weight_packed": torch.zeros(2, 4, dtype=torch.int32),
        "weight_scale": torch.ones(2, 1),
        "weight_shape": torch.tensor([2, 9]),
    }
    with pytest.raises(NpuQuantError, match="weight_shape and weight_packed disagree") as caught:
        packed_to_canonical(tensors, spec(Granularity.CHANNEL, bits=4))
    assert caught.value.codes == ("wrong-shape",)


STATIC = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False)


def static_tensors(outputs: int, inputs: int, *, zero: int, bias: bool, shards: int = 1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng((outputs, inputs))
    tensors = {
        "weight": torch.from_numpy(rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)),
        "weight_scale": torch.from_numpy(rng.uniform(1e-3, 2e-3, (outputs, 1)).astype(np.float32)),
        "input_scale": torch.full((shards,), 0.03125),
        "input_zero_point": torch.full((shards,), float(zero)),
    }
    return tensors | ({"bias": torch.from_numpy(rng.standard_normal(outputs).astype(np.float32))} if bias else {})


def static(tensors: dict[str, torch.Tensor], *, symmetric: bool = False) -> CanonicalLinear:
    activation = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=symmetric)
    return static_to_canonical(tensors, LayerSpec("W8A8_STATIC", Layout.CT_STATIC, PLAIN, activation))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zero", [-128, -6, 0, 127])
def test_static_terms_follow_the_formula(zero: int, bias: bool) -> None:
    tensors = static_tensors(7, 33, zero=zero, bias=bias)
    linear = static(tensors)
    assert linear.static is not None
    weight = tensors["weight"].numpy().astype(np.int64)
    deq_scale = (tensors["input_scale"] * tensors["weight_scale"][:, 0]).numpy()
    assert linear.static.correction is not None
    assert np.array_equal(linear.static.correction.numpy(), -zero * weight.sum(1))
    assert np.array_equal(linear.static.deq_scale.numpy(), deq_scale)
    if bias:
        assert linear.static.quant_bias is not None
        assert np.array_equal(linear.static.quant_bias.numpy(), np.rint(tensors["bias"].numpy() / deq_scale))
    else:
        assert linear.static.quant_bias is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_static_terms_of_ranks_sum_to_the_layers(ranks: int) -> None:
    """Every rank of a row-parallel layer adds the correction of its own inputs; one adds the bias. Exact in integers."""
    tensors = static_tensors(5, 36, zero=-77, bias=True)
    whole = static(tensors).static
    assert whole is not None
    assert whole.correction is not None
    total = np.zeros(5, np.int64)
    for rank in range(ranks):
        part = {**tensors, "weight": tensors["weight"].chunk(ranks, dim=1)[rank].contiguous()}
        mine = static(part).static
        assert mine is not None
        assert mine.correction is not None
        assert torch.equal(mine.deq_scale, whole.deq_scale)
        total += mine.correction.numpy()
    assert np.array_equal(total, whole.correction.numpy())


def test_a_bias_of_a_row_without_weights_is_kept() -> None:
    """Producers write the smallest scale for a row of zeros; the bias in units of it would leave int32."""
    tensors = static_tensors(3, 8, zero=5, bias=True)
    tensors["weight"][1] = 0
    tensors["weight_scale"][1] = 1e-12
    tensors["bias"] = torch.tensor([0.5, -3.0, 0.0])
    got = static(tensors).static
    assert got is not None
    assert got.quant_bias is not None
    assert torch.allclose(got.quant_bias * got.deq_scale, tensors["bias"], atol=1e-4)
    tensors["weight"][1, 0] = 1
    with pytest.raises(NpuQuantError, match="output 1 has a bias that is out of proportion"):
        static(tensors)


STATIC_BROKEN = {
    "different scales": ({"input_scale": torch.tensor([0.5, 0.25])}, "fused-shards-disagree", "different input_scale"),
    "different zero points": (
        {"input_zero_point": torch.tensor([1.0, 2.0])},
        "fused-shards-disagree",
        "different input_zero_point",
    ),
    "a scale of 0": ({"input_scale": torch.zeros(2)}, "bad-value", "input_scale must be positive"),
    "a scale that is no number": ({"input_scale": torch.full((2,), float("nan"))}, "bad-value", "must be positive"),
}


@pytest.mark.parametrize("case", STATIC_BROKEN)
def test_static_scales_that_cannot_be_served_are_refused(case: str) -> None:
    changed, code, message = STATIC_BROKEN[case]
    with pytest.raises(NpuQuantError, match=message) as caught:
        static({**static_tensors(4, 8, zero=3, bias=False, shards=2), **changed})
    assert code in caught.value.codes
    assert all(finding.fix for finding in caught.value.findings)


def test_a_zero_point_of_a_symmetric_activation_is_refused() -> None:
    tensors = static_tensors(4, 8, zero=3, bias=False)
    with pytest.raises(NpuQuantError, match="calls the activation symmetric"):
        static(tensors, symmetric=True)
    tensors["input_zero_point"].zero_()
    static(tensors, symmetric=True)
    del tensors["input_zero_point"]
    static(tensors, symmetric=True)


def test_row_sums_do_not_wrap() -> None:
    weight = CanonicalWeight.of(torch.full((3, 70_000), -128, dtype=torch.int8), torch.ones(3, 1))
    assert row_sums(weight).tolist() == [-128 * 70_000] * 3


# The library's own answer, for whole checkpoints.

DENSE = [
    "ct-qwen3-w8a8-dynamic",
    "ct-qwen3-w8a8-static",
    "ct-qwen3-w8a8-static-asym",
    "ct-qwen3-w4a16-channel",
    "ct-qwen3-w4a16-g128",
    "ct-qwen3-w4a16-g128-asym",
    "ct-qwen3-w4a16-g32-asym",
    "ct-qwen3-w8a16-channel",
    "ct-qwen3-w4a8-int8-channel",
    "ct-qwen3-w4a8-int8-g128",
    "ct-qwen3-w4a4-int",
    "ct-qwen3-fp8-dynamic",
    "ct-qwen3-fp8-block",
    "ct-qwen3moe-w8a8-dynamic",
    "ct-qwen3moe-w4a16-g128",
    "ct-qwen3moe-w4a8-int8-channel",
    "ct-qwen3moe-fp8-dynamic",
    "ct-dsv3-w8a8-dynamic",
]
IN_REPOSITORY = {"ct-qwen3-w8a8-dynamic", "ct-qwen3-w4a16-g128-asym", "ct-qwen3-fp8-block"}
FUNCTIONS = {
    "int_to_canonical": int_to_canonical,
    "packed_to_canonical": packed_to_canonical,
    "static_to_canonical": static_to_canonical,
    "to_canonical": fp8_to_canonical,
}
REARRANGE = {
    "one_scale_per_row": one_scale_per_row,
    "unpacked_zero_points": unpacked_zero_points,
    "as_bytes": as_bytes,
}


def folder_of(name: str) -> Path:
    return fixture(name) if name in IN_REPOSITORY else shared(name)


def canonical_layers(folder: Path) -> dict[str, tuple[CanonicalLinear, dict[str, torch.Tensor]]]:
    """Every quantized layer of a folder, loaded as the table of layouts says, unsharded; and its stored tensors."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    checkpoint = Checkpoint.open(folder)
    stored = load_file(folder / "model.safetensors")
    described = read(config, checkpoint.tensors)
    layers = {}
    for layer, entry in described.stored_layers():
        if entry.spec.is_float:
            continue
        parts = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0] == layer}
        outputs = (parts.get("weight_packed", parts.get("weight"))).shape[0]
        loaded = {}
        for tensor in tensors_of(entry.spec, entry.tensors):
            value = parts[tensor.name]
            if tensor.rearrange:
                value = REARRANGE[tensor.rearrange.rpartition(":")[2]](value, entry.spec, outputs)
            loaded[tensor.name] = value.to(getattr(torch, tensor.load_dtype))
        function = FUNCTIONS[LAYOUTS[entry.spec.layout].to_canonical.rpartition(":")[2]]
        layers[layer] = (function(loaded, entry.spec), parts)
    return layers


@pytest.mark.parametrize("name", DENSE)
def test_weights_are_the_librarys_own(name: str) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    folder = folder_of(name)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = base.BaseCompressor.get_value_from_registry(scheme.format)
    layers = canonical_layers(folder)
    assert len(layers) >= 14
    for layer, (linear, parts) in layers.items():
        # In float32, so that the library multiplies without rounding the product to bfloat16.
        state = {key: value.float() if key == "weight_scale" else value for key, value in parts.items()}
        wanted = compressor.decompress(state, scheme)["weight"]
        assert wanted.dtype == torch.float32
        assert torch.equal(linear.weight.dequantize(), wanted), layer


# Activation order: groups that are not runs of neighbours (files of 2024; the library no longer writes them).


@st.composite
def act_order_layers(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], LayerSpec, np.ndarray]:
    """A packed layer whose inputs belong to groups in any order, and its weight from the formula."""
    group, groups = draw(st.sampled_from([8, 32, 64])), draw(st.integers(1, 4))
    outputs, inputs = draw(st.integers(1, 5)), group * groups
    symmetric = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    values = rng.integers(-8, 8, (outputs, inputs)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (outputs, groups)).astype(np.float32)
    zero = np.zeros_like(values[:, :groups]) if symmetric else rng.integers(-8, 8, (outputs, groups)).astype(np.int8)
    g_idx = rng.permutation(np.arange(inputs) // group).astype(np.int32)
    weight = WeightSpec(4, NumberKind.INT, Granularity.GROUP, group, symmetric)
    tensors = {
        "weight_packed": torch.from_numpy(pack(values, 4)),
        "weight_scale": torch.from_numpy(scale),
        "weight_shape": torch.tensor([outputs, inputs]),
        "weight_g_idx": torch.from_numpy(g_idx),
        "weight_zero_point": torch.from_numpy(zero),
    }
    wanted = (values.astype(np.float32) - zero[:, g_idx]) * scale[:, g_idx]
    return tensors, LayerSpec("W4A16", Layout.CT_PACKED_ACT_ORDER, weight), wanted


@given(act_order_layers())
@settings(max_examples=80, deadline=None)
def test_activation_order_only_permutes_the_inputs(case) -> None:
    tensors, layer, wanted = case
    linear = act_order_to_canonical(tensors, layer)
    weight = linear.weight.dequantize().numpy()
    order = linear.input_permutation
    if order is None:
        assert np.array_equal(weight, wanted)
        return
    kept = (order >= 0).numpy()
    assert sorted(order[order >= 0].tolist()) == list(range(wanted.shape[1]))
    assert np.array_equal(weight[:, kept], wanted[:, order.numpy()[kept]])


def test_a_g_idx_that_says_nothing_is_the_order_of_the_inputs() -> None:
    layer = LayerSpec("", Layout.CT_PACKED_ACT_ORDER, WeightSpec(4, NumberKind.INT, Granularity.GROUP, 4))
    unused = torch.full((8,), -1, dtype=torch.int32)
    assert group_of_inputs(unused, layer, 1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    used = torch.tensor([1, 0], dtype=torch.int32)
    assert group_of_inputs(used, layer, 1) is used
