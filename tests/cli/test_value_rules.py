# SPDX-License-Identifier: Apache-2.0
"""Values that no producer writes: what the rules read of every layout, what they find, and what they leave alone."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.broken import Folder
from tests.fixtures_index import fixtures, shared_checkpoints
from tests.layouts.test_every_layout import WAYS, Numbers, Stored
from vllm_npu_quant.checkpoint import Checkpoint, open_checkpoint
from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.inspection import check
from vllm_npu_quant.inspection.stored_numbers import StoredNumbers
from vllm_npu_quant.inspection.value_rules import LAYER_RULES, ValueRules
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

LAYER = "model.layers.0.mlp.up_proj"
EVERY = [(layout, bits) for layout, way in WAYS.items() for bits in way.bits if bits > 1]
EVERY_WITH_ZEROS = [
    (layout, bits, symmetric)
    for layout, bits in EVERY
    for symmetric in (True, False)
    if symmetric or WAYS[layout].asymmetric
]
#: What stores whole words of 3 bits and of 5 bits fills up the last ones.
OUTPUTS, INPUTS, GROUP = 96, 480, 96


def quantized(layout: Layout, bits: int, *, symmetric: bool = True, signed: bool = False) -> Numbers:
    """Normally distributed weights, rounded as producers round them: from the extremes of each group."""
    way = WAYS[layout]
    rng = np.random.default_rng(bits)
    group = GROUP if way.grouped else INPUTS
    weight = rng.normal(0, 0.02, (OUTPUTS, INPUTS // group, group))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        extreme = np.take_along_axis(weight, np.abs(weight).argmax(2)[..., None], 2)
        scale = extreme / low if signed else np.abs(extreme) / max(high, 1)
        zero = np.zeros_like(scale)
    else:
        scale = (weight.max(2, keepdims=True) - weight.min(2, keepdims=True)) / (high - low)
        zero = np.clip(low - np.rint(weight.min(2, keepdims=True) / scale), low, high)
    values = np.clip(np.rint(weight / scale) + zero, low, high).astype(np.int64).reshape(OUTPUTS, INPUTS)
    g_idx = np.arange(INPUTS) // group
    numbers = Numbers(
        bits,
        group if way.grouped else 0,
        values,
        scale[..., 0].astype(np.float32),
        zero[..., 0].astype(np.int64),
        g_idx,
    )
    if way.ordered:
        order = rng.permutation(INPUTS)
        numbers = dataclasses.replace(numbers, values=values[:, order], g_idx=g_idx[order])
    return numbers


def stored_numbers(
    folder: Path, layout: Layout, numbers: Numbers, *, symmetric: bool, **changes: np.ndarray
) -> tuple[Checkpoint, LayerEntry]:
    """A file with one layer, opened, and what it stores."""
    stored: Stored = WAYS[layout].store(numbers)
    if layout is Layout.MODELSLIM_STATIC:
        stored["quant_bias"] = (-3 * numbers.values.sum(1)).astype(np.int32)
    stored |= changes
    save_file(
        {f"{LAYER}.{name}": np.ascontiguousarray(value) for name, value in stored.items()}, folder / "model.safetensors"
    )
    granularity = Granularity.GROUP if numbers.group else Granularity.CHANNEL
    static = layout in (Layout.MODELSLIM_STATIC, Layout.CT_STATIC)
    spec = LayerSpec(
        "",
        layout,
        WeightSpec(numbers.bits, NumberKind.INT, granularity, numbers.group, symmetric),
        ActivationSpec(8, False, Granularity.TENSOR, symmetric=False) if static else None,
    )
    return open_checkpoint(folder), LayerEntry(spec, frozenset(stored))


def problems(folder: Path, layout: Layout, numbers: Numbers, *, symmetric: bool, **changes: np.ndarray) -> set[str]:
    """The names of the rules that find something."""
    opened, entry = stored_numbers(folder, layout, numbers, symmetric=symmetric, **changes)
    read = StoredNumbers(opened, LAYER, entry)
    return {rule.__name__ for rule in LAYER_RULES if rule(read) is not None}


@pytest.mark.parametrize(("layout", "bits", "symmetric"), EVERY_WITH_ZEROS)
def test_the_numbers_of_every_layout_are_read(layout: Layout, bits: int, symmetric: bool, tmp_path: Path) -> None:
    numbers = quantized(layout, bits, symmetric=symmetric)
    opened, entry = stored_numbers(tmp_path, layout, numbers, symmetric=symmetric)
    read = StoredNumbers(opened, LAYER, entry)
    integers = read.integers
    assert integers is not None
    np.testing.assert_array_equal(
        integers.counts, np.bincount((numbers.values + numbers.middle).reshape(-1), minlength=1 << bits)
    )
    # Packed outputs may lie in another order.
    np.testing.assert_array_equal(np.sort(integers.largest), np.sort(np.abs(numbers.values).max(1)))
    if layout is Layout.MODELSLIM_STATIC:
        np.testing.assert_array_equal(integers.sums, numbers.values.sum(1))
    assert read.scale is not None
    np.testing.assert_allclose(np.sort(read.scale.reshape(-1)), np.sort(numbers.scale.reshape(-1)), rtol=1e-6)
    if read.zero is not None:
        np.testing.assert_array_equal(np.sort(read.zero.reshape(-1)), np.sort(numbers.zero.reshape(-1)))
    else:
        assert not numbers.zero.any()
    assert read.inputs == INPUTS


@pytest.mark.parametrize(("layout", "bits", "symmetric"), EVERY_WITH_ZEROS)
def test_quantized_weights_break_no_rule(layout: Layout, bits: int, symmetric: bool, tmp_path: Path) -> None:
    numbers = quantized(layout, bits, symmetric=symmetric)
    assert problems(tmp_path, layout, numbers, symmetric=symmetric) == set()


@pytest.mark.parametrize(("layout", "bits"), [(layout, bits) for layout, bits in EVERY if WAYS[layout].grouped])
def test_scales_may_have_the_sign_of_the_extreme(layout: Layout, bits: int, tmp_path: Path) -> None:
    numbers = quantized(layout, bits, signed=True)
    assert problems(tmp_path, layout, numbers, symmetric=True) == set()


def scale_of(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Numbers], Numbers]:
    return lambda numbers: dataclasses.replace(numbers, scale=change(numbers.scale.copy()))


def values_of(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Numbers], Numbers]:
    return lambda numbers: dataclasses.replace(numbers, values=change(numbers.values.copy(), numbers.middle))


def first_row(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(scale: np.ndarray) -> np.ndarray:
        scale[0] *= np.float32(factor)
        return scale

    return change


#: What is changed -> (the change, the rule that finds it, the bits for which it can).
MUTATIONS: dict[str, tuple[Callable[[Numbers], Numbers], str, tuple[int, ...]]] = {
    "a negative scale in one channel": (scale_of(first_row(-1)), "negative_scales", (2, 3, 4, 5, 6, 8)),
    "negative scales everywhere": (scale_of(lambda scale: -scale), "negative_scales", (2, 3, 4, 5, 6, 8)),
    "a scale a million times its neighbours'": (scale_of(first_row(1e6)), "outlying_scale", (2, 3, 4, 5, 6, 8)),
    "float16's bytes as bfloat16": (scale_of(lambda scale: scale * np.float32(1e-22)), "scale_level", (4, 8)),
    "bfloat16's bytes as float16": (scale_of(lambda scale: 0.8 + 0.1 * scale), "scale_level", (8,)),
    "0 everywhere": (values_of(lambda values, _: 0 * values), "one_integer", (2, 3, 4, 5, 6, 8)),
    "one constant": (values_of(lambda values, _: 0 * values + 1), "one_integer", (2, 3, 4, 5, 6, 8)),
    "integers of half the bits": (values_of(lambda values, middle: values // 16), "unused_range", (8,)),
    "integers of 2 bits in 4": (values_of(lambda values, middle: values // 4), "unused_range", (4,)),
    "the sign bit turned": (
        values_of(lambda values, middle: (values % (2 * middle)) - middle),
        "wrapped_around",
        (4, 5, 6, 8),
    ),
}


@pytest.mark.parametrize(
    ("layout", "bits", "name"),
    [(layout, bits, name) for name in MUTATIONS for layout, bits in EVERY if bits in MUTATIONS[name][2]],
)
def test_what_no_producer_writes_is_found_in_every_layout(layout: Layout, bits: int, name: str, tmp_path: Path) -> None:
    change, rule, _ = MUTATIONS[name]
    assert rule in problems(tmp_path, layout, change(quantized(layout, bits)), symmetric=True)


ASYMMETRIC = [(layout, bits) for layout, bits in EVERY if WAYS[layout].asymmetric and bits in (3, 4)]


@pytest.mark.parametrize(("layout", "bits"), ASYMMETRIC)
def test_zero_points(layout: Layout, bits: int, tmp_path: Path) -> None:
    numbers = quantized(layout, bits, symmetric=False)
    edge = dataclasses.replace(numbers, zero=np.full_like(numbers.zero, -numbers.middle))
    assert problems(tmp_path, layout, edge, symmetric=False) >= {"zeros_at_the_edge", "weights_off_centre"}
    assert ("zeros_in_symmetric" in problems(tmp_path, layout, numbers, symmetric=True)) == (
        layout
        in (
            Layout.AWQ_GEMM,
            *(way for way in WAYS if way.value.startswith(("gptq", "ct_packed")) and "plain" not in way.value),
        )
    )


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize(("layout", "bits"), ASYMMETRIC)
def test_zero_points_that_are_off_by_one(layout: Layout, bits: int, shift: int, tmp_path: Path) -> None:
    """GPTQ's two formats taken for each other, and whatever else moves all zero points by one."""
    numbers = quantized(layout, bits, symmetric=False)
    for zero, expected in ((numbers.zero, 0), (np.clip(numbers.zero + shift, -numbers.middle, numbers.middle - 1), 1)):
        opened, entry = stored_numbers(tmp_path, layout, dataclasses.replace(numbers, zero=zero), symmetric=False)
        rules = ValueRules("config.json")
        rules.layer(opened, LAYER, entry)
        assert len([finding for finding in rules.findings() if "off by one" in finding.message]) == expected


# ----------------------------------------------------------------------------------------------------- static activations


STATIC: dict[str, tuple[dict[str, np.ndarray], set[str]]] = {
    "as it should be": ({}, set()),
    "quant_bias is 0": ({"quant_bias": np.zeros(OUTPUTS, np.int32)}, {"folded_bias"}),
    "quant_bias of another layer": (
        {"quant_bias": np.random.default_rng(1).integers(-3000, 3000, OUTPUTS).astype(np.int32)},
        {"folded_bias"},
    ),
    "the offset of no int8": ({"input_offset": np.array([500], np.float32)}, {"static_offset", "folded_bias"}),
    "a broken offset": ({"input_offset": np.array([2.5], np.float32)}, {"static_offset", "folded_bias"}),
    "another offset": ({"input_offset": np.array([-40], np.float32)}, {"folded_bias"}),
    "a negative input scale": (
        {"input_scale": np.array([-0.25], np.float32)},
        {"static_scale", "negative_scales", "product_of_scales"},
    ),
    "an input scale a thousand times too large": ({"input_scale": np.array([250], np.float32)}, {"product_of_scales"}),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_activations(name: str, tmp_path: Path) -> None:
    changes, expected = STATIC[name]
    numbers = quantized(Layout.MODELSLIM_STATIC, 8)
    assert problems(tmp_path, Layout.MODELSLIM_STATIC, numbers, symmetric=True, **changes) == expected


def test_a_negative_deq_scale(tmp_path: Path) -> None:
    numbers = quantized(Layout.MODELSLIM_STATIC, 8)
    negative = -WAYS[Layout.MODELSLIM_STATIC].store(numbers)["deq_scale"].astype(np.uint32).view(np.float32)
    found = problems(tmp_path, Layout.MODELSLIM_STATIC, numbers, symmetric=True, deq_scale=negative)
    assert found >= {"negative_scales", "product_of_scales"}


def test_a_bias_may_be_folded_in(tmp_path: Path) -> None:
    """Stored beside it, or not: then it is told by the correction that has to be in the sum."""
    numbers = quantized(Layout.MODELSLIM_STATIC, 8)
    bias = np.random.default_rng(2).normal(0, 1, OUTPUTS).astype(np.float32)
    scale = (np.float32(0.25) * numbers.scale[:, 0]).astype(np.float32)
    folded = np.rint(bias / scale - 3.0 * numbers.values.sum(1)).astype(np.int32)
    stored = {"quant_bias": folded, "bias": bias}
    assert problems(tmp_path, Layout.MODELSLIM_STATIC, numbers, symmetric=True, **stored) == set()
    assert problems(tmp_path, Layout.MODELSLIM_STATIC, numbers, symmetric=True, quant_bias=folded) == set()
    wrong = {"quant_bias": folded, "bias": -bias}
    assert problems(tmp_path, Layout.MODELSLIM_STATIC, numbers, symmetric=True, **wrong) == {"folded_bias"}
    few = (-3 * numbers.values.sum(1)).astype(np.int32)
    few[:3] += 1000
    assert problems(tmp_path, Layout.MODELSLIM_STATIC, numbers, symmetric=True, quant_bias=few) == {"folded_bias"}


# ---------------------------------------------------------------------------------------------------------- whole folders


def findings(folder: Folder) -> list[Finding]:
    report = check(folder.path, values=True)
    return [finding for finding in report.findings if finding.code != "requantized"]


def test_an_input_scale_that_no_norm_can_fill(tmp_path: Path) -> None:
    folder = Folder("msmodelslim-qwen3-w8a8", tmp_path / "model")
    for shard in "qkv":
        name = f"model.layers.1.self_attn.{shard}_proj.input_scale"
        (scale,) = struct.unpack("<f", folder.tensors[name][2])
        folder.poke(name, struct.pack("<f", 1000 * scale))
    (finding,) = [finding for finding in findings(folder) if "norm" in finding.message]
    assert finding.code == "unlikely-value"
    assert finding.layer.startswith("model.layers.1.self_attn.")


def test_shards_of_one_input_have_one_scale(tmp_path: Path) -> None:
    folder = Folder("msmodelslim-qwen3-w8a8", tmp_path / "model")
    folder.poke("model.layers.0.self_attn.k_proj.input_scale", struct.pack("<f", 0.03))
    (finding,) = [finding for finding in findings(folder) if finding.code == "fused-shards-disagree"]
    assert finding.layer == "model.layers.0.self_attn.q_proj"
    assert not check(folder.path, values=True).passed()


def relabelled(folder: Folder, dtype: str, wanted: Callable[[str], bool]) -> None:
    """Give tensors the other 16-bit float's name and leave their bytes."""
    for name, (own, shape, data) in folder.tensors.items():
        if own in ("BF16", "F16") and wanted(name):
            folder.tensors[name] = dtype, shape, data
    folder.save()


@pytest.mark.parametrize(
    ("source", "dtype"), [("msmodelslim-qwen3fp16-w8a8", "BF16"), ("msmodelslim-qwen3-w8a8-dynamic", "F16")]
)
@pytest.mark.parametrize("kind", ["norm", "embed_tokens"])
def test_floats_with_the_bytes_of_another_dtype(source: str, dtype: str, kind: str, tmp_path: Path) -> None:
    folder = Folder(source, tmp_path / "model")
    relabelled(folder, dtype, lambda name: kind in name)
    found = [finding for finding in findings(folder) if finding.code == "unlikely-value"]
    assert len(found) == 1
    assert kind in found[0].layer


def test_gptq_formats_taken_for_each_other(tmp_path: Path) -> None:
    for source, taken in (
        ("gptq-qwen3-gptqmodel-w4g128-asym", "gptq_v2"),
        ("gptq-qwen3-gptqmodel-w4g32-sym-descact", "gptq_v2"),
    ):
        folder = Folder(source, tmp_path / source)
        assert findings(folder) == []
        folder.quantization(checkpoint_format=taken, format=taken)
        (finding,) = [finding for finding in findings(folder) if "zero points" in finding.message]
        assert "checkpoint_format" in finding.fix


def test_a_broken_rule_is_told_once(tmp_path: Path) -> None:
    """With the worst layer and how many there are."""
    folder = Folder("msmodelslim-qwen3-w8a8-dynamic", tmp_path / "model")
    for name, (dtype, shape, data) in folder.tensors.items():
        if dtype == "I8":
            folder.tensors[name] = dtype, shape, (np.frombuffer(data, np.uint8) ^ 128).tobytes()
    folder.save()
    (finding,) = findings(folder)
    assert "sign bit" in finding.message
    assert "(14 layers)" in finding.message
    assert json.loads(json.dumps(finding.severity.value)) == "warning"


@pytest.mark.parametrize(
    "folder",
    sorted({path.name: path for path in (*shared_checkpoints(), *fixtures())}.values()),
    ids=lambda path: path.name,
)
def test_real_checkpoints_break_no_rule(folder: Path) -> None:
    report = check(folder, values=True)
    assert not [finding.render() for finding in report.findings if finding.code in ("unlikely-value", "bad-value")]
    assert "fused-shards-disagree" not in {finding.code for finding in report.findings}
