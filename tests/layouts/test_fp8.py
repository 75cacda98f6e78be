# SPDX-License-Identifier: Apache-2.0
"""FP8 weights: the codes, the scales of tensors, channels and blocks, and requantization to int8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures_index import fixture
from tests.layouts.memory import peak_of
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.fp8 import fp8_spec, fp8_weight
from vllm_npu_quant.formats.small_floats import MXFP8, block_float_spec
from vllm_npu_quant.layouts import floats, fp8
from vllm_npu_quant.layouts.compressed_tensors import one_scale_per_row
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout


def e4m3(code: int) -> float:
    """The value of a code, from the specification (OCP 8-bit floating point, E4M3)."""
    sign = -1.0 if code & 128 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


CODES = [code for code in range(256) if code & 127 != 127]


def test_every_code_has_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = fp8.decode_e4m3(codes)
    assert [values[code].item() for code in CODES] == [e4m3(code) for code in CODES]
    assert torch.equal(values[CODES], codes.view(torch.float8_e4m3fn).float()[CODES])
    assert values[127] == values[255] == 0


def test_codes_are_viewed_and_not_copied() -> None:
    stored = torch.randn(3, 5).to(torch.float8_e4m3fn)
    codes = fp8.as_bytes(stored, spec_of(Granularity.TENSOR), 3)
    assert codes.dtype == torch.uint8
    assert codes.data_ptr() == stored.data_ptr()


def spec_of(granularity: Granularity, block: tuple[int, int] = (0, 0)) -> LayerSpec:
    return fp8_spec("FP8", fp8_weight(granularity, block), Layout.FP8, static=False)


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Granularity, tuple[int, int]]:
    """Codes [N, K], the stored scale, and what shares one."""
    outputs, inputs = draw(st.integers(1, 21)), draw(st.integers(1, 33))
    granularity = draw(st.sampled_from([Granularity.TENSOR, Granularity.CHANNEL, Granularity.BLOCK]))
    block = (0, 0)
    shape: tuple[int, ...] = draw(st.sampled_from([(), (1,)]))
    if granularity is Granularity.CHANNEL:
        shape = draw(st.sampled_from([(outputs,), (outputs, 1)]))
    elif granularity is Granularity.BLOCK:
        block = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        shape = (-(-outputs // block[0]), -(-inputs // block[1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    codes = rng.choice(np.array(CODES, dtype=np.uint8), (outputs, inputs))
    scale = np.asarray(rng.uniform(1e-4, 1e-2, shape), dtype=np.float32)
    return codes, scale, granularity, block


def meant(codes: np.ndarray, scale: np.ndarray, granularity: Granularity, block: tuple[int, int]) -> np.ndarray:
    """The weight in float32, element by element: the code's value times its scale, one rounding."""
    out = np.empty(codes.shape, np.float32)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            if granularity is Granularity.TENSOR:
                factor = scale.reshape(-1)[0]
            elif granularity is Granularity.CHANNEL:
                factor = scale.reshape(-1)[n]
            else:
                factor = scale[n // block[0], k // block[1]]
            out[n, k] = np.float32(e4m3(int(codes[n, k]))) * factor
    return out


def canonical(codes: np.ndarray, scale: np.ndarray, spec: LayerSpec):
    stored = torch.from_numpy(scale)
    return fp8.to_canonical(
        {"weight": torch.from_numpy(codes), "weight_scale": one_scale_per_row(stored, spec, codes.shape[0])}, spec
    ).weight


@given(layers())
@settings(max_examples=150, deadline=None)
def test_weights_mean_what_the_checkpoint_means(case) -> None:
    codes, scale, granularity, block = case
    wanted = meant(*case)
    weight = canonical(codes, scale, spec_of(granularity, block))
    assert np.array_equal(weight.dequantize().numpy(), wanted)
    half = codes.shape[0] // 2
    assert np.array_equal(weight.dequantized_rows(half, codes.shape[0]).numpy(), wanted[half:])


@given(layers())
@settings(max_examples=150, deadline=None)
def test_requantized_integers_are_the_nearest(case) -> None:
    codes, scale, granularity, block = case
    wanted = meant(*case).astype(np.float64)
    weight = canonical(codes, scale, spec_of(granularity, block))
    values, channel = weight.values.numpy().astype(np.float64), weight.scale.numpy().astype(np.float64)
    assert weight.values.dtype == torch.int8
    assert weight.zero is None
    assert weight.group_size == 0
    assert weight.scale.shape == (codes.shape[0], 1)
    largest = np.abs(wanted).max(1, keepdims=True)
    assert np.allclose(channel * 127, np.where(largest > 0, largest, 127), rtol=1e-6)
    assert np.abs(values).max() <= 127
    # Half a step, and the rounding of the scale.
    assert (np.abs(values * channel - wanted) <= channel * 0.5001).all()
    # The largest of a row is met exactly.
    rows = largest[:, 0] > 0
    assert (np.abs(values).max(1)[rows] == 127).all()


def test_requantization_does_not_depend_on_the_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    codes = rng.choice(np.array(CODES, dtype=np.uint8), (37, 50))
    scale = rng.uniform(1e-4, 1e-2, (5, 4)).astype(np.float32)
    spec = spec_of(Granularity.BLOCK, (8, 16))
    whole = canonical(codes, scale, spec)
    monkeypatch.setattr(floats, "_BLOCK_ELEMENTS", 100)
    parts = canonical(codes, scale, spec)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.values, parts.values)
    assert torch.equal(whole.values[5:30], parts.rows(5, 30))


def test_requantization_holds_no_float_copy_of_the_layer() -> None:
    codes = torch.randint(0, 120, (4096, 4096), dtype=torch.uint8)  # 16 MiB
    scale = torch.rand(4096, 32)
    before = peak_of(lambda: None)
    weight = fp8.float_weight(codes, scale, 128).requantized()
    used = peak_of(lambda: weight.rows(0, 4096))
    assert used - before < 48 << 20  # the integers, 16 MiB, and blocks; the layer as float32 would be 64 MiB


BROKEN = {
    "NaN codes": ({"weight": torch.tensor([[1, 255]], dtype=torch.uint8)}, "the FP8 weight holds NaN"),
    "a scale that is no number": ({"weight_scale": torch.tensor([[float("inf")]])}, "the scale holds NaN or infinity"),
    "scales beyond float32": (
        {"weight": torch.full((1, 2), 126, dtype=torch.uint8), "weight_scale": torch.tensor([[3e38]])},
        "the weight holds numbers beyond float32",
    ),
    "offsets": ({"weight_offset": torch.ones(1, 1)}, "weight_offset holds nonzero offsets"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_values_are_refused(case: str) -> None:
    changed, message = BROKEN[case]
    tensors = {"weight": torch.zeros(1, 2, dtype=torch.uint8), "weight_scale": torch.ones(1, 1), **changed}
    with pytest.raises(NpuQuantError, match=message) as caught:
        fp8.to_canonical(tensors, spec_of(Granularity.CHANNEL))
    assert caught.value.codes == ("bad-value",)
    assert all(finding.fix for finding in caught.value.findings)


def test_power_of_two_scales_have_their_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = floats.decode_e8m0(codes)
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert values[255] == float("inf"), "NaN, which is refused with infinity"


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_mxfp8_means_what_the_checkpoint_means(outputs: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.array(CODES, dtype=np.uint8), (outputs, 32 * groups))
    scale = rng.integers(110, 140, (outputs, groups), dtype=np.uint8)
    wanted = np.array([[e4m3(int(code)) for code in row] for row in codes], np.float32)
    wanted *= np.exp2(scale.astype(np.float64) - 127).repeat(32, axis=1).astype(np.float32)
    spec = block_float_spec("MXFP8", Layout.MXFP8, MXFP8, 8)
    tensors = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scale)}
    weight = fp8.to_canonical(tensors, spec).weight
    assert np.array_equal(weight.dequantize().numpy(), wanted)
    assert weight.exact is None
    served = weight.values.numpy() * weight.scale.numpy()
    assert (np.abs(served - wanted) <= 0.5001 * weight.scale.numpy()).all()
    with pytest.raises(NpuQuantError, match="the scale holds NaN or infinity"):
        fp8.to_canonical(tensors | {"weight_scale": torch.full((outputs, groups), 255, dtype=torch.uint8)}, spec)


def test_the_inverse_spelling_is_the_same_scale() -> None:
    codes, scale = torch.randint(0, 120, (4, 8), dtype=torch.uint8), torch.rand(4, 1)
    spec = spec_of(Granularity.CHANNEL)
    one = fp8.to_canonical({"weight": codes, "weight_scale": scale}, spec).weight
    other = fp8.to_canonical({"weight": codes, "weight_scale_inv": scale}, spec).weight
    assert torch.equal(one.dequantize(), other.dequantize())


def test_the_error_of_a_real_checkpoint_is_that_of_int8() -> None:
    """Requantizing adds less than E4M3 itself has: half of 1/16 per element against half of 1/127 of a row's largest."""
    checkpoint = Checkpoint.open(fixture("ct-qwen3-fp8-block"))
    layer = "model.layers.0.mlp.gate_proj"
    codes = np.array(checkpoint.read(f"{layer}.weight"))
    scale = checkpoint.read(f"{layer}.weight_scale", float32=True)
    weight = canonical(codes, np.array(scale), spec_of(Granularity.BLOCK, (128, 128)))
    exact = weight.dequantize()
    served = weight.values.float() * weight.scale
    assert float((served - exact).norm() / exact.norm()) < 0.012
