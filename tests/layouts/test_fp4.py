# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4 weights: the codes, both kinds of scales, the exact integers, and requantization to int8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layouts.memory import peak_of
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.small_floats import MXFP4, NVFP4, block_float_spec
from vllm_npu_quant.layouts import fp4, load_object
from vllm_npu_quant.layouts.canonical import CanonicalWeight
from vllm_npu_quant.layouts.tables import LAYOUTS, tensors_of
from vllm_npu_quant.spec import LayerSpec, Layout, WeightSpec

#: OCP Microscaling Formats 1.0, section 5.3.3: bit 3 is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

SPECS = {
    layout: block_float_spec("", layout, weight, 4)
    for layout, weight in (
        (Layout.MXFP4, MXFP4),
        (Layout.CT_MXFP4, MXFP4),
        (Layout.NVFP4, NVFP4),
        (Layout.CT_NVFP4, NVFP4),
    )
}


@dataclass
class Numbers:
    """Codes uint8 [N, K], one per element; the factor of each element, float32 [N, K]; and the tensors that are stored."""

    codes: np.ndarray
    factors: np.ndarray
    stored: dict[str, torch.Tensor]

    @property
    def weight(self) -> np.ndarray:
        return E2M1[self.codes] * self.factors


def numbers_of(layout: Layout, outputs: int, groups: int, seed: int) -> Numbers:
    """Random numbers of one checkpoint layer, stored as its producer does: the even input in the low nibble."""
    rng = np.random.default_rng(seed)
    size = SPECS[layout].weight.group_size
    codes = rng.integers(0, 16, (outputs, groups * size), dtype=np.uint8)
    packed = torch.from_numpy(codes[:, 0::2] | (codes[:, 1::2] << 4))
    weight = "weight_packed" if layout in (Layout.CT_MXFP4, Layout.CT_NVFP4) else "weight"
    if SPECS[layout].weight.group_size == 32:
        scale = rng.integers(100, 140, (outputs, groups), dtype=np.uint8)
        factors = np.exp2(scale.astype(np.float64) - 127).astype(np.float32)
        stored = {weight: packed, "weight_scale": torch.from_numpy(scale)}
    else:
        scale = torch.from_numpy(rng.uniform(1, 448, (outputs, groups)).astype(np.float32)).to(torch.float8_e4m3fn)
        factor = np.float32(rng.uniform(1e-4, 1e-2))
        if layout is Layout.NVFP4:
            factors = scale.float().numpy() * factor
            stored = {weight: packed, "weight_scale": scale, "weight_scale_2": torch.tensor(factor)}
        else:
            factors = scale.float().numpy() / (1 / factor)
            stored = {weight: packed, "weight_scale": scale, "weight_global_scale": torch.tensor([1 / factor])}
    return Numbers(codes, factors.repeat(size, axis=1), stored)


def canonical(layout: Layout, stored: dict[str, torch.Tensor], spec: LayerSpec | None = None) -> CanonicalWeight:
    """What the table of layouts makes of the stored tensors, on one rank."""
    spec = spec or SPECS[layout]
    outputs = next(iter(stored.values())).shape[0]
    tensors: dict[str, Any] = {}
    for tensor in tensors_of(spec):
        value = stored[tensor.name]
        if tensor.rearrange:
            value = load_object(tensor.rearrange)(value, spec, outputs)
        tensors[tensor.name] = value.to(getattr(torch, tensor.load_dtype))
    return load_object(LAYOUTS[layout].to_canonical)(tensors, spec).weight


def test_every_code_has_its_value() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    values = fp4.twice_e2m1(packed).reshape(256, 2)
    assert values.dtype == torch.int8
    for byte, (low, high) in enumerate(values.tolist()):
        assert (low, high) == (2 * E2M1[byte & 15], 2 * E2M1[byte >> 4])


@given(st.sampled_from(list(SPECS)), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_weights_mean_what_the_checkpoint_means(layout: Layout, outputs: int, groups: int, seed: int) -> None:
    numbers = numbers_of(layout, outputs, groups, seed)
    weight = canonical(layout, numbers.stored)
    assert (weight.outputs, weight.inputs) == numbers.codes.shape
    np.testing.assert_array_equal(weight.dequantize().numpy(), numbers.weight)
    half = outputs // 2
    np.testing.assert_array_equal(weight.dequantized_rows(half, outputs).numpy(), numbers.weight[half:])


@given(st.sampled_from(list(SPECS)), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_the_exact_integers_are_twice_the_values(layout: Layout, outputs: int, groups: int, seed: int) -> None:
    numbers = numbers_of(layout, outputs, groups, seed)
    exact = canonical(layout, numbers.stored).exact
    assert exact is not None
    assert exact.float_rows is None
    assert exact.bits == 8
    assert exact.scale.shape == (outputs, groups)
    assert exact.group_size == (SPECS[layout].weight.group_size if groups > 1 else 0)
    np.testing.assert_array_equal(exact.values.numpy(), 2 * E2M1[numbers.codes])
    np.testing.assert_array_equal(exact.dequantize().numpy(), numbers.weight)
    if SPECS[layout].weight.group_size == 32:
        assert torch.equal(exact.scale.to(torch.bfloat16).float(), exact.scale), "the operator takes scales in bfloat16"


@given(st.sampled_from(list(SPECS)), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_requantized_integers_are_the_nearest(layout: Layout, outputs: int, groups: int, seed: int) -> None:
    numbers = numbers_of(layout, outputs, groups, seed)
    weight = canonical(layout, numbers.stored)
    wanted = numbers.weight.astype(np.float64)
    values, channel = weight.values.numpy().astype(np.float64), weight.scale.numpy().astype(np.float64)
    assert weight.scale.shape == (outputs, 1)
    assert weight.group_size == 0
    largest = np.abs(wanted).max(1, keepdims=True)
    assert np.allclose(channel * 127, np.where(largest > 0, largest, 127), rtol=1e-6)
    assert (np.abs(values * channel - wanted) <= channel * 0.5001).all()
    assert (np.abs(values).max(1)[largest[:, 0] > 0] == 127).all()


def test_a_rank_may_have_smaller_groups() -> None:
    """A part of 48 inputs has groups of 16, whose scales repeat."""
    numbers = numbers_of(Layout.MXFP4, 4, 3, 0)
    spec = replace(SPECS[Layout.MXFP4], weight=replace(MXFP4, group_size=16))
    stored = {
        "weight": numbers.stored["weight"][:, 24:].contiguous(),
        "weight_scale": numbers.stored["weight_scale"].repeat_interleave(2, dim=1)[:, 3:].contiguous(),
    }
    weight = canonical(Layout.MXFP4, stored, spec)
    np.testing.assert_array_equal(weight.dequantize().numpy(), numbers.weight[:, 48:])
    assert weight.exact.group_size == 16


#: Layout -> changed tensors.
BROKEN = {
    "a scale of 255, which is NaN": (Layout.MXFP4, {"weight_scale": torch.full((2, 1), 255, dtype=torch.uint8)}),
    "a NaN scale": (Layout.NVFP4, {"weight_scale": torch.full((2, 1), float("nan")).to(torch.float8_e4m3fn)}),
    "an infinite factor": (Layout.NVFP4, {"weight_scale_2": torch.tensor(float("inf"))}),
    "a divisor of 0": (Layout.CT_NVFP4, {"weight_global_scale": torch.zeros(1)}),
    "an infinite divisor": (Layout.CT_NVFP4, {"weight_global_scale": torch.tensor([float("inf")])}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_values_are_refused(case: str) -> None:
    layout, changed = BROKEN[case]
    stored = numbers_of(layout, 2, 1, 0).stored | changed
    with pytest.raises(NpuQuantError, match="the scale holds NaN or infinity") as caught:
        canonical(layout, stored)
    assert caught.value.codes == ("bad-value",)


def test_weights_beyond_float32_are_refused() -> None:
    stored = {"weight": torch.full((1, 16), 0x77, dtype=torch.uint8), "weight_scale": torch.tensor([[254]]).byte()}
    with pytest.raises(NpuQuantError, match="the weight holds numbers beyond float32"):
        canonical(Layout.MXFP4, stored)


def test_a_layer_of_zeros_stays_one() -> None:
    stored = {"weight": torch.zeros(2, 16, dtype=torch.uint8), "weight_scale": torch.zeros(2, 1, dtype=torch.uint8)}
    weight = canonical(Layout.MXFP4, stored)
    assert not weight.values.any()
    assert not weight.dequantize().any()
    assert bool((weight.scale == 1).all())


def test_requantization_holds_no_float_copy_of_the_layer() -> None:
    stored = {
        "weight": torch.randint(0, 256, (4096, 2048), dtype=torch.uint8),  # 8 MiB
        "weight_scale": torch.randint(110, 130, (4096, 128), dtype=torch.uint8),
    }
    before = peak_of(lambda: None)
    weight = canonical(Layout.MXFP4, stored)
    used = peak_of(lambda: weight.rows(0, 4096))
    assert used - before < 48 << 20  # the integers, 16 MiB, and blocks; the layer as float32 would be 64 MiB


DECOMPRESSED = [("mxfp4-pack-quantized", Layout.CT_MXFP4), ("nvfp4-pack-quantized", Layout.CT_NVFP4)]


@pytest.mark.parametrize(("packing", "layout"), DECOMPRESSED)
def test_the_librarys_own_decompressor_agrees(packing: str, layout: Layout) -> None:
    """compressed-tensors decompresses to bfloat16."""
    base = pytest.importorskip("compressed_tensors.compressors.base")
    scheme = pytest.importorskip("compressed_tensors.quantization").preset_name_to_scheme(packing[:5], ["Linear"])
    numbers = numbers_of(layout, 24, 6, 1)
    theirs = base.BaseCompressor.load_from_registry(packing).decompress(dict(numbers.stored), scheme)["weight"]
    ours = canonical(layout, numbers.stored).dequantize()
    assert theirs.shape == ours.shape
    # NVFP4's factors are rounded to bfloat16 there, MXFP4's are powers of two.
    tolerance = 0 if layout is Layout.CT_MXFP4 else 2**-7
    torch.testing.assert_close(theirs.float(), ours, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("weight", "stored_error"), [(MXFP4, 0.115), (NVFP4, 0.095)])
def test_int8_adds_far_less_than_the_format_has(weight: WeightSpec, stored_error: float) -> None:
    """Normal weights, rounded to the nearest; the format's own error is that of the literature."""
    original = np.random.default_rng(0).standard_normal((128, 1024)).astype(np.float32)
    size = weight.group_size
    groups = original.reshape(128, -1, size)
    largest = np.abs(groups).max(axis=2)
    if size == 32:
        scale = np.exp2(np.floor(np.log2(largest)) - 2)
        stored: dict[str, torch.Tensor] = {"weight_scale": torch.from_numpy((np.log2(scale) + 127).astype(np.uint8))}
        layout = Layout.MXFP4
    else:
        factor = np.float32(largest.max() / (6 * 448))
        eighths = torch.from_numpy(largest / 6 / factor).to(torch.float8_e4m3fn)
        scale, layout = eighths.float().numpy() * factor, Layout.NVFP4
        stored = {"weight_scale": eighths, "weight_scale_2": torch.tensor(factor)}
    codes = np.abs((groups / scale[..., None])[..., None] - E2M1).argmin(axis=-1).astype(np.uint8).reshape(128, 1024)
    canon = canonical(layout, {"weight": torch.from_numpy(codes[:, 0::2] | (codes[:, 1::2] << 4)), **stored})
    exact = canon.dequantize().numpy()
    served = canon.values.numpy() * canon.scale.numpy()
    own = np.linalg.norm(exact - original) / np.linalg.norm(original)
    added = np.linalg.norm(served - exact) / np.linalg.norm(exact)
    assert own == pytest.approx(stored_error, rel=0.05)
    assert added < 0.01
