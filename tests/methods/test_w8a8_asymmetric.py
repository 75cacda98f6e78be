# SPDX-License-Identifier: Apache-2.0
"""int8 with a scale and an offset per token, against the formula in float64; and the weights that are dequantized."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.layers import (
    DTYPES,
    dequantized,
    inputs_of,
    prepared,
    random_input,
    random_weight,
    relative_error,
    run,
)
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.fp8 import fp8_spec, fp8_weight
from vllm_npu_quant.layouts import fp8
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods.dequantized import DequantizedLinear
from vllm_npu_quant.methods.w8a8 import W8A8DynamicAsymmetricLinear, W8A8DynamicLinear
from vllm_npu_quant.spec import Granularity, Layout

SHAPES = [(1, 33), (17, 63), (48, 96), (64, 256)]


def skewed(tokens: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs that are mostly positive, as after an activation: what asymmetric quantization is for."""
    return (random_input(tokens, inputs, torch.float32).abs() * 3 - 0.2).to(dtype)


def oracle(x: torch.Tensor, weight: CanonicalWeight, bias: np.ndarray | None) -> np.ndarray:
    """The scheme in float64: x_q in [-128, 127] between the token's least and largest value."""
    tokens = x.double().numpy()
    low, high = tokens.min(1, keepdims=True), tokens.max(1, keepdims=True)
    scale = np.maximum((high - low) / 255, 1e-12)
    offset = 127 - high / scale
    quantized = np.clip(np.rint(tokens / scale + offset), -128, 127)
    y = ((quantized - offset) * scale) @ dequantized(weight).T
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_asymmetric_is_the_scheme(outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype) -> None:
    weight = random_weight(outputs, inputs, 8)
    x = skewed(9, inputs, dtype)
    bias = torch.linspace(-1, 1, outputs) if with_bias else None
    y = run(W8A8DynamicAsymmetricLinear(), CanonicalLinear(weight), x, bias)
    wanted = oracle(x, weight, None if bias is None else bias.numpy())
    assert y.dtype == dtype
    assert relative_error(y, wanted) < 0.01


def test_it_is_nearer_than_symmetric_where_inputs_are_skewed() -> None:
    weight = random_weight(64, 256, 8)
    x = skewed(64, 256, torch.bfloat16)
    exact = x.double().numpy() @ dequantized(weight).T
    asymmetric = relative_error(run(W8A8DynamicAsymmetricLinear(), CanonicalLinear(weight), x), exact)
    symmetric = relative_error(run(W8A8DynamicLinear(), CanonicalLinear(weight), x), exact)
    assert asymmetric < 0.8 * symmetric


def test_a_constant_token_is_exact() -> None:
    """All inputs equal: the scale is the smallest there is, and the offset enormous."""
    weight = random_weight(16, 64, 8)
    x = torch.full((2, 64), 0.75, dtype=torch.bfloat16)
    y = run(W8A8DynamicAsymmetricLinear(), CanonicalLinear(weight), x)
    assert relative_error(y, x.double().numpy() @ dequantized(weight).T) < 0.01


def test_a_large_mean_cancels_in_float32_and_not_in_the_models_dtype() -> None:
    """The offset's term is a hundred times the result here: in bfloat16 nothing would be left of it."""
    rng = np.random.default_rng(5)
    values = torch.from_numpy(rng.integers(100, 128, (8, 512)).astype(np.int8))
    weight = CanonicalWeight.of(values, torch.full((8, 1), 0.01))
    x = (torch.from_numpy(rng.standard_normal((4, 512)).astype(np.float32)) * 0.1 + 5).to(torch.bfloat16)
    y = run(W8A8DynamicAsymmetricLinear(), CanonicalLinear(weight), x)
    assert relative_error(y, x.double().numpy() @ dequantized(weight).T) < 0.004


def test_ranks_sum_to_the_whole() -> None:
    weight = random_weight(24, 128, 8)
    x = skewed(7, 128, torch.float16)
    linear = CanonicalLinear(weight)
    total = sum(
        run(
            W8A8DynamicAsymmetricLinear(),
            inputs_of(linear, start, start + 64),
            x[:, start : start + 64].contiguous(),
        ).double()
        for start in (0, 64)
    )
    assert relative_error(total, x.double().numpy() @ dequantized(weight).T) < 0.01


def test_zero_points_of_the_weight_are_refused() -> None:
    weight = random_weight(8, 32, 8, asymmetric=True)
    with pytest.raises(NpuQuantError, match="symmetric weights only"):
        run(W8A8DynamicAsymmetricLinear(), CanonicalLinear(weight), skewed(1, 32, torch.bfloat16))


# Dequantized at load.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "group", "asymmetric"), [(8, 0, False), (8, 32, True), (4, 0, True), (4, 16, False), (4, 24, True)]
)
def test_dequantized_is_the_float_layer(bits: int, group: int, asymmetric: bool, dtype: torch.dtype) -> None:
    weight = random_weight(17, 72, bits, group, asymmetric=asymmetric)
    layer = prepared(DequantizedLinear(), CanonicalLinear(weight), dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, torch.from_numpy(dequantized(weight).astype(np.float32)).to(dtype))
    x = random_input(5, 72, dtype)
    y = run(DequantizedLinear(), CanonicalLinear(weight), x, torch.ones(17))
    assert relative_error(y, x.double().numpy() @ dequantized(weight).T + 1) < 0.01


def test_dequantized_puts_permuted_inputs_back() -> None:
    weight = random_weight(9, 40, 4, 8)
    order = torch.from_numpy(np.random.default_rng(0).permutation(40))
    layer = prepared(DequantizedLinear(), CanonicalLinear(weight, input_permutation=order), torch.float16)
    wanted = np.empty((9, 40))
    wanted[:, order.numpy()] = dequantized(weight)
    assert torch.equal(layer.weight, torch.from_numpy(wanted.astype(np.float32)).half())


def test_fp8_dequantizes_to_what_the_checkpoint_means() -> None:
    rng = np.random.default_rng(1)
    stored = torch.from_numpy(rng.standard_normal((20, 40)).astype(np.float32)).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(rng.uniform(0.5, 2, (20, 3)).astype(np.float32))
    spec = fp8_spec("FP8", fp8_weight(Granularity.BLOCK, (1, 16)), Layout.FP8, static=False)
    linear = fp8.to_canonical({"weight": stored.view(torch.uint8), "weight_scale": scale}, spec)
    layer = prepared(DequantizedLinear(), linear, torch.bfloat16)
    wanted = stored.float() * scale.repeat_interleave(16, dim=1)[:, :40]
    assert torch.equal(layer.weight, wanted.bfloat16())
