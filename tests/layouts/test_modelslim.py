# SPDX-License-Identifier: Apache-2.0
"""ModelSlim's stored tensors to canonical numbers, against packers written from the producer's description."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures_index import fixture
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.modelslim import (
    decode_int64_scale,
    int_to_canonical,
    one_per_shard,
    static_to_canonical,
    two_level_to_canonical,
)
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, WeightSpec

SIZES = [(2, 2, 1), (6, 10, 5), (16, 96, 32), (34, 100, 20)]


def integers(outputs: int, inputs: int, bits: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng((seed, outputs, inputs, bits))
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs)).astype(np.int8)


def pairs(even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """msModelSlim: the even element in the low nibble."""
    return ((odd.astype(np.int16) << 4) | (even.astype(np.int16) & 15)).astype(np.uint8).view(np.int8)


def packed(values: np.ndarray, layout: Layout) -> torch.Tensor:
    if layout in (Layout.MODELSLIM_PACKED_N, Layout.MODELSLIM_TWO_LEVEL_PACKED):
        return torch.from_numpy(pairs(values[0::2], values[1::2]))
    if layout is Layout.MODELSLIM_PACKED_K:
        return torch.from_numpy(pairs(values[:, 0::2], values[:, 1::2]))
    return torch.from_numpy(values)


def spec_of(layout: Layout, bits: int, group: int = 0) -> LayerSpec:
    granularity = Granularity.GROUP if group else Granularity.CHANNEL
    return LayerSpec("scheme", layout, WeightSpec(bits, granularity=granularity, group_size=group))


def scales(outputs: int, groups: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng((seed, outputs, groups)).uniform(0.001, 0.1, (outputs, groups)).astype(np.float32)


def assert_is(linear: CanonicalLinear, values: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> None:
    """Integers equal, in any block of rows; the dequantized weight by the formula."""
    weight = linear.weight
    outputs, inputs = values.shape
    assert (weight.outputs, weight.inputs) == (outputs, inputs)
    np.testing.assert_array_equal(weight.values.numpy(), values)
    for start, stop in ((0, 1), (outputs // 3, outputs // 3 + 1), (1, outputs), (outputs - 1, outputs)):
        np.testing.assert_array_equal(weight.rows(start, stop).numpy(), values[start:stop])
    group = -(-inputs // scale.shape[1])
    wide = scale.astype(np.float64).repeat(group, axis=1)[:, :inputs]
    shift = 0 if zero is None else zero.astype(np.float64).repeat(group, axis=1)[:, :inputs]
    np.testing.assert_allclose(weight.dequantize().numpy(), (values - shift) * wide, rtol=1e-6, atol=1e-9)
    assert (weight.zero is None) == (zero is None)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("layout", "bits"),
    [
        (Layout.MODELSLIM_INT, 8),
        (Layout.MODELSLIM_INT, 4),
        (Layout.MODELSLIM_PACKED_N, 4),
        (Layout.MODELSLIM_PACKED_K, 4),
    ],
)
@pytest.mark.parametrize(("outputs", "inputs", "group"), SIZES)
def test_integers(
    outputs: int, inputs: int, group: int, layout: Layout, bits: int, grouped: bool, asymmetric: bool
) -> None:
    values = integers(outputs, inputs, bits)
    groups = inputs // group if grouped else 1
    scale = scales(outputs, groups)
    zero = integers(outputs, groups, bits, seed=2).astype(np.float32) if asymmetric else np.zeros_like(scale)
    if asymmetric:
        zero[0, 0] = 1
    tensors = {
        "weight": packed(values, layout),
        "weight_scale": torch.from_numpy(scale),
        "weight_offset": torch.from_numpy(zero),
        "bias": torch.ones(outputs),
    }
    linear = int_to_canonical(tensors, spec_of(layout, bits, group if grouped else 0))
    assert_is(linear, values, scale, zero if asymmetric else None)
    assert linear.weight.group_size == (group if groups > 1 else 0)
    assert torch.equal(linear.bias, torch.ones(outputs))


@pytest.mark.parametrize("layout", [Layout.MODELSLIM_TWO_LEVEL, Layout.MODELSLIM_TWO_LEVEL_PACKED])
@pytest.mark.parametrize(("outputs", "inputs", "group"), SIZES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_two_levels_are_multiplied(outputs: int, inputs: int, group: int, asymmetric: bool, layout: Layout) -> None:
    values = integers(outputs, inputs, 4)
    first, second = scales(outputs, 1), scales(outputs, inputs // group, seed=3)
    zero = np.full((outputs, inputs // group), 3 if asymmetric else 0)
    tensors = {
        "weight": packed(values, layout),
        "weight_scale": torch.from_numpy(first),
        "weight_offset": torch.zeros(outputs, 1),
        "weight_scale_second": torch.from_numpy(second),
        "weight_offset_second": torch.from_numpy(zero),
    }
    linear = two_level_to_canonical(tensors, spec_of(layout, 4, group))
    assert_is(linear, values, first * second, zero if asymmetric else None)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 999))
def test_any_bytes_unpack_to_what_packs_to_them(rows: int, columns: int, seed: int) -> None:
    stored = np.random.default_rng(seed).integers(-128, 128, (rows, columns)).astype(np.int8)
    for layout, outputs in ((Layout.MODELSLIM_PACKED_N, 2 * rows), (Layout.MODELSLIM_PACKED_K, rows)):
        one = torch.ones(outputs, 1)
        tensors = {"weight": torch.from_numpy(stored), "weight_scale": one, "weight_offset": 0 * one}
        values = int_to_canonical(tensors, spec_of(layout, 4)).weight.values.numpy()
        assert values.min() >= -8
        assert values.max() <= 7
        np.testing.assert_array_equal(packed(values, layout).numpy(), stored)


def static_tensors(outputs: int = 6, inputs: int = 10, shards: int = 1) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.from_numpy(integers(outputs, inputs, 8)),
        "input_scale": torch.full((shards,), 0.02),
        "input_offset": torch.full((shards,), -3.0),
        "quant_bias": torch.arange(outputs, dtype=torch.int32),
        "deq_scale": torch.from_numpy(scales(outputs, 1))[:, 0],
    }


def test_static_layers_without_weight_scale_have_a_weight_too() -> None:
    """deq_scale is input_scale * weight_scale."""
    tensors = static_tensors(shards=3)
    linear = static_to_canonical(tensors, spec_of(Layout.MODELSLIM_STATIC, 8))
    expected = (tensors["deq_scale"] / 0.02).numpy()[:, None]
    np.testing.assert_allclose(linear.weight.scale.numpy(), expected, rtol=1e-6)
    assert linear.static is not None
    assert (float(linear.static.scale), float(linear.static.offset)) == (pytest.approx(0.02), -3.0)
    assert torch.equal(linear.static.quant_bias, tensors["quant_bias"])


def matrices(shards: int = 1, **names: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, size in names.items():
        matrix = torch.randn(size, size, generator=generator)
        found[name] = one_per_shard(matrix, spec_of(Layout.MODELSLIM_INT, 4), 0).repeat(shards, 1, 1)
    return found


def int4_tensors(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.from_numpy(integers(4, 8, 4)),
        "weight_scale": torch.ones(4, 1),
        "weight_offset": torch.zeros(4, 1),
        **more,
    }


@pytest.mark.parametrize(
    ("names", "left", "right"),
    [
        ({"left_trans": 2, "right_trans": 4}, "left_trans", "right_trans"),
        ({"left_trans": 2}, "left_trans", None),
        ({"heads_rotation": 4}, "heads_rotation", None),
        ({"kronecker_rotation_m": 2, "kronecker_rotation_n": 4}, "kronecker_rotation_m", "kronecker_rotation_n"),
    ],
)
def test_input_transforms(names: dict[str, int], left: str, right: str | None) -> None:
    tensors = int4_tensors(**matrices(3, **names))
    if "left_trans" in names:
        tensors["clip_ratio"] = torch.full((3,), 0.75)
    transform = int_to_canonical(tensors, spec_of(Layout.MODELSLIM_INT, 4)).transform
    assert torch.equal(transform.left, tensors[left][0])
    assert transform.right is None if right is None else torch.equal(transform.right, tensors[right][0])
    assert transform.clip == (0.75 if "left_trans" in names else 1.0)
    assert int_to_canonical(int4_tensors(), spec_of(Layout.MODELSLIM_INT, 4)).transform is None


def changed(tensors: dict[str, torch.Tensor], **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors, **changes}


def unequal(size: int) -> torch.Tensor:
    return torch.arange(2 * size * size, dtype=torch.float32).view(2, size, size)


BROKEN = {
    "integers of 8 bits": (
        int_to_canonical,
        Layout.MODELSLIM_INT,
        lambda: int4_tensors(weight=torch.tensor([[100, -8], [0, 7]], dtype=torch.int8)),
        "bad-value",
        "more than 4 bits",
    ),
    "an offset of the first level": (
        two_level_to_canonical,
        Layout.MODELSLIM_TWO_LEVEL,
        lambda: int4_tensors(weight_offset=torch.ones(4, 1)),
        "bad-value",
        "symmetric weights",
    ),
    "left matrices of shards": (
        int_to_canonical,
        Layout.MODELSLIM_INT,
        lambda: int4_tensors(left_trans=unequal(2), clip_ratio=torch.ones(2)),
        "fused-shards-disagree",
        "different left_trans",
    ),
    "clip ratios of shards": (
        int_to_canonical,
        Layout.MODELSLIM_INT,
        lambda: int4_tensors(**matrices(2, left_trans=2), clip_ratio=torch.tensor([0.9, 0.8])),
        "fused-shards-disagree",
        "0.9, 0.8",
    ),
    "a clip ratio above 1": (
        int_to_canonical,
        Layout.MODELSLIM_INT,
        lambda: int4_tensors(**matrices(1, left_trans=2), clip_ratio=torch.tensor([4.0])),
        "bad-value",
        "between 0 and 1",
    ),
    "a matrix with infinities": (
        int_to_canonical,
        Layout.MODELSLIM_INT,
        lambda: int4_tensors(heads_rotation=torch.full((1, 4, 4), float("inf"))),
        "bad-value",
        "heads_rotation must be finite",
    ),
    "input scales of shards": (
        static_to_canonical,
        Layout.MODELSLIM_STATIC,
        lambda: changed(static_tensors(shards=2), input_scale=torch.tensor([0.1, 0.2])),
        "fused-shards-disagree",
        "0.1, 0.2",
    ),
    "an input scale of 0": (
        static_to_canonical,
        Layout.MODELSLIM_STATIC,
        lambda: changed(static_tensors(), input_scale=torch.zeros(1)),
        "bad-value",
        "must be positive",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_values_are_refused(name: str) -> None:
    function, layout, tensors, code, text = BROKEN[name]
    with pytest.raises(NpuQuantError) as caught:
        function(tensors(), spec_of(layout, 8 if layout is Layout.MODELSLIM_STATIC else 4))
    assert caught.value.codes == (code,)
    assert text in str(caught.value)


def test_int64_scales_are_the_bits_of_float32() -> None:
    scale = np.array([1.5, 0.001, -2.0], dtype=np.float32)
    stored = torch.from_numpy(scale.view(np.uint32).astype(np.int64))
    assert decode_int64_scale(stored).tolist() == scale.tolist()


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_scale_bias_of_a_real_checkpoint_follows_from_its_weights(part: str) -> None:
    """msModelSlim stores 8 * sum_k(w), of 16 slices of the inputs in row-parallel layers. It is not loaded: what is computed
    from the weights is the same, and holds for every number of ranks."""
    stored = Checkpoint.open(fixture("msmodelslim-qwen3-w4a8-dynamic"))
    layer = f"model.layers.0.{part}"
    names = ("weight", "weight_scale", "weight_offset", "scale_bias")
    tensors = {name: torch.from_numpy(stored.read(f"{layer}.{name}").copy()) for name in names}
    scale_bias = tensors.pop("scale_bias").numpy()
    weight = int_to_canonical(tensors, spec_of(Layout.MODELSLIM_PACKED_N, 4)).weight
    slices = weight.dequantize().double().numpy().reshape(weight.outputs, scale_bias.shape[1], -1)
    assert scale_bias.shape[1] == (16 if part in ("self_attn.o_proj", "mlp.down_proj") else 1)
    np.testing.assert_allclose(scale_bias, 8 * slices.sum(axis=2), rtol=1e-3, atol=1e-4)
