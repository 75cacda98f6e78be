# SPDX-License-Identifier: Apache-2.0
"""int8 activations with int8 weights that have scales per group of inputs, or zero points."""

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
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.methods import base, operators
from vllm_npu_quant.methods.w8a8 import W8A8DynamicGroupedLinear, W8A8DynamicLinear

#: float32 rounding of the sums, and the output's own.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def quantized_tokens(x: torch.Tensor) -> np.ndarray:
    """The tokens as int8 per token means them, float64."""
    values = x.float().numpy()
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    return np.rint(values / scale).astype(np.float64) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(33, 70, 32), (5, 7, 3), (64, 128, 64), (16, 96, 0), (8, 100, 100), (1, 1, 1)]
)
def test_it_is_the_scheme(outputs: int, inputs: int, group: int, asymmetric: bool, dtype: torch.dtype) -> None:
    weight = random_weight(outputs, inputs, 8, group, asymmetric=asymmetric)
    x, bias = random_input(9, inputs, dtype), torch.linspace(-1, 1, outputs)
    found = run(W8A8DynamicGroupedLinear(), CanonicalLinear(weight), x, bias)
    expected = quantized_tokens(x) @ dequantized(weight).T + bias.to(dtype).double().numpy()
    assert found.dtype == dtype
    assert relative_error(found, expected) < ROUNDING[dtype]


def test_one_group_is_the_plain_scheme() -> None:
    weight, x = random_weight(48, 64, 8), random_input(5, 64, torch.bfloat16)
    plain = run(W8A8DynamicLinear(), CanonicalLinear(weight), x)
    assert torch.equal(run(W8A8DynamicGroupedLinear(), CanonicalLinear(weight), x), plain)


def test_products_are_made_for_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight(40, 96, 8, 32, asymmetric=True), random_input(7, 96, torch.bfloat16)
    whole = run(W8A8DynamicGroupedLinear(), CanonicalLinear(weight), x)
    monkeypatch.setattr(operators, "GROUP_PRODUCTS", 4 * 3 * 40 * 2)
    assert torch.equal(run(W8A8DynamicGroupedLinear(), CanonicalLinear(weight), x), whole)


def test_many_outputs_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight(200, 64, 8, 32, asymmetric=True), random_input(3, 64, torch.bfloat16)
    whole = run(W8A8DynamicGroupedLinear(), CanonicalLinear(weight), x)
    monkeypatch.setattr(base.split_outputs, "__defaults__", (80, 64))
    layer = prepared(W8A8DynamicGroupedLinear(), CanonicalLinear(weight), x.dtype)
    assert layer.weight_1.shape == (2, 32, 64)
    assert torch.equal(run(W8A8DynamicGroupedLinear(), CanonicalLinear(weight), x), whole)


@pytest.mark.parametrize("group", [32, 16])
def test_ranks_of_a_row_parallel_layer_sum_up(group: int) -> None:
    """Every rank has token scales of its own, so the sum is near the whole layer, not equal to it."""
    weight, x = random_weight(24, 96, 8, 32), random_input(6, 96, torch.bfloat16)
    parts = [
        run(
            W8A8DynamicGroupedLinear(),
            inputs_of(CanonicalLinear(weight), low, low + 48, group=16),
            x[:, low : low + 48],
        )
        for low in (0, 48)
    ]
    both = (parts[0].float() + parts[1].float()).double()
    halves = [quantized_tokens(x[:, low : low + 48]) @ dequantized(weight)[:, low : low + 48].T for low in (0, 48)]
    assert relative_error(both, sum(halves)) < ROUNDING[torch.bfloat16]


def test_permuted_inputs_are_refused() -> None:
    linear = CanonicalLinear(random_weight(8, 64, 8, 32), input_permutation=torch.arange(64).flip(0))
    with pytest.raises(NpuQuantError) as caught:
        prepared(W8A8DynamicGroupedLinear(), linear, torch.bfloat16)
    assert caught.value.codes == ("unsupported-scheme",)
