# SPDX-License-Identifier: Apache-2.0
"""W4A16 and W8A16 against x @ dequantized.T in float64, over odd shapes, groups, zero points and ranks."""

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
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods import base
from vllm_npu_quant.methods.base import PrepareContext
from vllm_npu_quant.methods.weight_only import WeightOnlyLinear, fit_groups

#: The dequantized weight and the output are rounded to the activation's dtype.
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 1e-3}

SHAPES = [
    # N, K, group
    (1, 64, 32),
    (5, 33, 32),
    (7, 40, 0),
    (9, 96, 32),
    (17, 100, 64),
    (48, 128, 128),  # one group: a channel
    (48, 100, 128),  # the only group is short
    (64, 256, 64),
    (72, 288, 96),
    (40, 144, 48),  # filled up to groups of 64
    (24, 160, 20),  # filled up to groups of 32
    (16, 37, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_it_computes_with_the_dequantized_weight(
    outputs: int, inputs: int, group: int, bits: int, asymmetric: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(outputs, inputs, bits, group, asymmetric=asymmetric)
    x = random_input(3, inputs, dtype)
    bias = torch.linspace(2, 3, outputs)
    expected = x.double().numpy() @ dequantized(weight).T
    assert relative_error(run(WeightOnlyLinear(), CanonicalLinear(weight), x), expected) < LIMIT[dtype]
    with_bias = run(WeightOnlyLinear(), CanonicalLinear(weight), x, bias)
    assert relative_error(with_bias, expected + bias.double().numpy()) < LIMIT[dtype]


def test_leading_dimensions_are_kept() -> None:
    weight = random_weight(10, 64, 4, 32)
    x = random_input(6, 64, torch.bfloat16)
    flat = run(WeightOnlyLinear(), CanonicalLinear(weight), x)
    assert torch.equal(run(WeightOnlyLinear(), CanonicalLinear(weight), x.reshape(2, 3, 64)), flat.reshape(2, 3, 10))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_prepared_integers_are_the_checkpoint_s(bits: int) -> None:
    weight = random_weight(24, 64, bits, 32, asymmetric=True)
    layer = prepared(WeightOnlyLinear(), CanonicalLinear(weight), torch.float16)
    stored = layer.weight.numpy()
    if bits == 4:
        assert stored.shape == (64, 3)
        nibbles = np.stack([(stored >> shift) & 15 for shift in range(0, 32, 4)], axis=-1).reshape(64, 24)
        stored = np.where(nibbles > 7, nibbles - 16, nibbles)
    np.testing.assert_array_equal(stored, weight.values.numpy().T)
    np.testing.assert_array_equal(layer.weight_offset.numpy(), -weight.zero.numpy().T)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32, 48])
def test_permuted_inputs(group: int, bits: int) -> None:
    weight = random_weight(12, 96, bits, group, asymmetric=True)
    permutation = torch.from_numpy(np.random.default_rng(3).permutation(96))
    x = random_input(4, 96, torch.bfloat16)
    expected = x.double().numpy()[:, permutation.numpy()] @ dequantized(weight).T
    found = run(WeightOnlyLinear(), CanonicalLinear(weight, input_permutation=permutation), x)
    assert relative_error(found, expected) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize("bits", [4, 8])
def test_many_outputs_run_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.split_outputs, "__defaults__", (100, 64))
    weight = random_weight(205, 64, bits, 32, asymmetric=True)
    x = random_input(2, 64, torch.bfloat16)
    bias = torch.linspace(-1, 1, 205)
    method = WeightOnlyLinear()
    found = run(method, CanonicalLinear(weight), x, bias)
    assert len(method.pieces) == 4
    expected = x.double().numpy() @ dequantized(weight).T + bias.double().numpy()
    assert relative_error(found, expected) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize("parts", [2, 3, 4, 6])
@pytest.mark.parametrize("group", [0, 32, 128, 96])
def test_ranks_of_a_row_parallel_layer_sum_up(group: int, parts: int) -> None:
    """Parts that cut groups: the adapter repeats the scales for the common divisor of group and part."""
    weight = random_weight(16, 576, 4, group, asymmetric=True)
    x = random_input(3, 576, torch.float16)
    part = 576 // parts
    common = int(np.gcd(part, group)) if group else 0
    total = torch.zeros(3, 16)
    for rank in range(parts):
        linear = inputs_of(CanonicalLinear(weight), rank * part, (rank + 1) * part, common)
        total += run(WeightOnlyLinear(), linear, x[:, rank * part : (rank + 1) * part]).float()
    assert relative_error(total, x.double().numpy() @ dequantized(weight).T) < LIMIT[torch.float16]


def test_groups_that_a_rank_cuts_are_joined_again() -> None:
    """Groups of 128 in parts of 688: a common divisor of 16, of which every rank makes groups of 128 with few zeros."""
    weight = random_weight(8, 688 * 4, 4, 128)
    for rank in range(4):
        part = inputs_of(CanonicalLinear(weight), rank * 688, (rank + 1) * 688, 16).weight
        grouping = fit_groups(part)
        assert grouping is not None
        assert grouping.size == 128
        assert grouping.depth <= 688 + 128


def test_equal_groups_are_a_channel() -> None:
    weight = random_weight(8, 100, 4, 10)
    weight.scale = weight.scale[:, :1].expand(8, 10).contiguous()
    method = WeightOnlyLinear()
    x = random_input(3, 100, torch.float16)
    found = run(method, CanonicalLinear(weight), x)
    assert method.group_size == 0
    assert relative_error(found, x.double().numpy() @ dequantized(weight).T) < LIMIT[torch.float16]


def with_tiny_scales(weight: CanonicalWeight) -> CanonicalWeight:
    weight.scale = weight.scale * 1e-9
    return weight


def with_fractional_zeros(weight: CanonicalWeight) -> CanonicalWeight:
    weight.zero = torch.full_like(weight.scale, 1.2345678)
    return weight


def with_infinite_scale(weight: CanonicalWeight) -> CanonicalWeight:
    weight.scale[0, 0] = float("inf")
    return weight


REFUSED = [
    ("small groups", lambda: random_weight(8, 96, 4, 8), "operator-limit", "re-export with a larger group size"),
    ("deep", lambda: random_weight(1, 65536, 4), "operator-limit", "larger tensor-parallel size"),
    ("tiny scales", lambda: with_tiny_scales(random_weight(8, 64, 4)), "operator-limit", "--dtype bfloat16"),
    ("infinite scale", lambda: with_infinite_scale(random_weight(8, 64, 4)), "operator-limit", "finite"),
    ("zeros", lambda: with_fractional_zeros(random_weight(8, 64, 4, 32)), "bad-value", "integer zero points"),
]


@pytest.mark.parametrize(("make", "code", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_the_operator_cannot_take_is_refused_at_load(make, code: str, text: str) -> None:
    with pytest.raises(NpuQuantError) as caught:
        WeightOnlyLinear().prepare(CanonicalLinear(make()), PrepareContext(torch.float16))
    assert caught.value.codes == (code,)
    assert text in str(caught.value)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_apply_compiles_without_a_graph_break(bits: int, asymmetric: bool) -> None:
    weight = random_weight(20, 144, bits, 48, asymmetric=asymmetric)
    method = WeightOnlyLinear()
    layer = prepared(method, CanonicalLinear(weight), torch.bfloat16)
    bias = torch.ones(20)
    x = random_input(4, 144, torch.bfloat16)
    compiled = torch.compile(lambda x: method.apply(layer, x, bias), fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(x), method.apply(layer, x, bias))
