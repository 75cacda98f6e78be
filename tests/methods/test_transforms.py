# SPDX-License-Identifier: Apache-2.0
"""FlatQuant's matrices and online rotations: ``x' = L.T @ x @ R`` per token, then the scheme on x'."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.methods.layers import dequantized, inputs_of, random_input, random_weight, relative_error
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, InputTransform
from vllm_npu_quant.methods import operators
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext
from vllm_npu_quant.methods.dequantized import DequantizedLinear
from vllm_npu_quant.methods.w4a4 import W4A4DynamicLinear
from vllm_npu_quant.methods.w4a8 import W4A8DynamicLinear
from vllm_npu_quant.methods.w8a8 import W8A8DynamicLinear
from vllm_npu_quant.methods.weight_only import WeightOnlyLinear


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.linalg.qr(np.random.default_rng((seed, size)).standard_normal((size, size)))[0]).float()


def blocks(size: int, block: int) -> torch.Tensor:
    """A rotation of ``block`` neighbours each, as msModelSlim makes it for at most size / block ranks."""
    return torch.block_diag(*[orthogonal(block)] * (size // block))


def apply_exactly(x: torch.Tensor, transform: InputTransform, left: int) -> np.ndarray:
    """L.T @ x @ R in float64."""
    tokens = x.double().numpy().reshape(x.shape[0], left, -1)
    if transform.right is not None:
        tokens = tokens @ transform.right.double().numpy()
    if transform.left is not None:
        tokens = transform.left.double().numpy().T @ tokens
    return tokens.reshape(x.shape[0], -1)


def run(method: NpuLinearMethod, linear: CanonicalLinear, x: torch.Tensor, context: PrepareContext) -> torch.Tensor:
    return method.apply(SimpleNamespace(**method.prepare(linear, context)), x)


# L, M, whether there is an L and an R. 18944 inputs (Qwen2.5-7B) make 128 x 148, which 8 does not divide.
SHAPES = [(4, 16, True, True), (4, 64, True, False), (8, 24, False, True), (16, 20, True, True), (4, 12, True, False)]
#: Relative error that the quantization of a normally distributed activation may make, with its transform in bfloat16.
ERROR = {W4A4DynamicLinear: 0.2, W4A8DynamicLinear: 0.02, W8A8DynamicLinear: 0.02}


def transform_of(left: int, right: int, has_left: bool, has_right: bool, clip: float = 1.0) -> InputTransform:
    return InputTransform(orthogonal(left) if has_left else None, orthogonal(right, 1) if has_right else None, clip)


@pytest.mark.parametrize("method", ERROR)
@pytest.mark.parametrize(("left", "right", "has_left", "has_right"), SHAPES)
def test_the_weight_belongs_to_the_transformed_input(
    left: int, right: int, has_left: bool, has_right: bool, method: type
) -> None:
    inputs = left * right
    weight = random_weight(24, inputs, 8 if method is W8A8DynamicLinear else 4)
    transform = transform_of(left, right, has_left, has_right)
    x = random_input(64, inputs, torch.bfloat16)
    found = run(method(), CanonicalLinear(weight, transform=transform), x, PrepareContext(torch.bfloat16))
    expected = apply_exactly(x, transform, left) @ dequantized(weight).T
    assert relative_error(found, expected) < ERROR[method]


@pytest.mark.parametrize("clip", [1.0, 0.9, 0.5])
@pytest.mark.parametrize(("left", "right", "has_left", "has_right"), SHAPES)
def test_flatquant_is_the_scheme(left: int, right: int, has_left: bool, has_right: bool, clip: float) -> None:
    """x_scale = clip * max|x'| / 7. Larger inputs saturate: at -8 in npu_kronecker_quant, and at -7 in the producer's own
    model, and here where the operator does not take the sizes."""
    inputs = left * right
    weight = random_weight(24, inputs, 4)
    transform = transform_of(left, right, has_left, has_right, clip)
    x = random_input(64, inputs, torch.float16)
    method = W4A4DynamicLinear()
    found = run(method, CanonicalLinear(weight, transform=transform), x, PrepareContext(torch.float16))
    assert method.kronecker == (right % 8 == 0)
    moved = apply_exactly(x, transform, left)
    scale = clip * np.abs(moved).max(1, keepdims=True) / 7
    simulated = (np.clip(np.rint(moved / scale), -8 if method.kronecker else -7, 7) * scale) @ dequantized(weight).T
    exact = moved @ dequantized(weight).T
    # Roundings of x' to float16 move single inputs to the next integer.
    assert relative_error(found, simulated) < 0.03
    own, theirs = (np.linalg.norm(y - exact) for y in (found.double().numpy(), simulated))
    assert own < 1.1 * theirs


def test_more_tokens_than_the_operator_takes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(16, 64, 4)
    linear = CanonicalLinear(weight, transform=transform_of(4, 16, True, True, 0.9))
    x = random_input(11, 64, torch.bfloat16)
    whole = run(W4A4DynamicLinear(), linear, x, PrepareContext(torch.bfloat16))
    monkeypatch.setattr(operators, "KRONECKER_TOKENS", 4)
    assert torch.equal(run(W4A4DynamicLinear(), linear, x, PrepareContext(torch.bfloat16)), whole)


def ranks(
    method: type, linear: CanonicalLinear, x: torch.Tensor, count: int, group: int = 0
) -> tuple[torch.Tensor, list[NpuLinearMethod]]:
    """The sum of a row-parallel layer's ranks, each with its part of the inputs or, where it asks for them, all."""
    whole = linear.weight.inputs
    part = whole // count
    total, methods = torch.zeros(x.shape[0], linear.weight.outputs), []
    for rank in range(count):
        own = inputs_of(linear, rank * part, (rank + 1) * part, group)
        own.transform = linear.transform
        instance = method()
        layer = SimpleNamespace(**instance.prepare(own, PrepareContext(x.dtype, rank == 0, rank * part, whole)))
        total += instance.apply(layer, x if instance.gathers_inputs else x[:, rank * part : (rank + 1) * part]).float()
        methods.append(instance)
    return total, methods


@pytest.mark.parametrize("method", ERROR)
@pytest.mark.parametrize(("transform", "gathers"), [
    (InputTransform(left=blocks(8, 2)), False),
    (InputTransform(left=blocks(8, 2), right=orthogonal(32)), False),
    (InputTransform(right=orthogonal(32)), False),
    (InputTransform(left=orthogonal(8)), True),
    (InputTransform(left=orthogonal(8), right=orthogonal(32)), True),
    (InputTransform(right=orthogonal(256)), True),
])  # fmt: skip
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_of_a_row_parallel_layer(transform: InputTransform, gathers: bool, count: int, method: type) -> None:
    """Rotations that are block diagonal at the ranks' borders stay on the rank; others want the inputs of all ranks."""
    weight = random_weight(24, 256, 8 if method is W8A8DynamicLinear else 4)
    linear = CanonicalLinear(weight, transform=transform)
    x = random_input(32, 256, torch.bfloat16)
    found, methods = ranks(method, linear, x, count)
    assert [instance.gathers_inputs for instance in methods] == [gathers] * count
    left = 1 if transform.left is None and transform.right is not None and transform.right.shape[0] == 256 else 8
    assert relative_error(found, apply_exactly(x, transform, left) @ dequantized(weight).T) < ERROR[method]


def test_flatquant_of_two_ranks_is_that_of_one() -> None:
    """The scale of a token is that of all its inputs, on every rank; only the roundings of the partial sums differ."""
    weight = random_weight(24, 256, 4)
    linear = CanonicalLinear(weight, transform=InputTransform(orthogonal(8), orthogonal(32), 0.95))
    x = random_input(16, 256, torch.bfloat16)
    one = run(W4A4DynamicLinear(), linear, x, PrepareContext(torch.bfloat16))
    two, _ = ranks(W4A4DynamicLinear, linear, x, 2)
    assert relative_error(two, one.double().numpy()) < 2.0**-7


def test_matrices_that_do_not_fit() -> None:
    linear = CanonicalLinear(random_weight(8, 64, 4), transform=InputTransform(orthogonal(4), orthogonal(32)))
    with pytest.raises(NpuQuantError) as caught:
        W4A4DynamicLinear().prepare(linear, PrepareContext(torch.bfloat16))
    assert caught.value.codes == ("wrong-shape",)
    assert "L * M = 64" in str(caught.value)


def test_words_that_a_rank_would_cut() -> None:
    linear = CanonicalLinear(random_weight(8, 24, 4), transform=InputTransform(orthogonal(2)))
    with pytest.raises(NpuQuantError) as caught:
        ranks(W4A4DynamicLinear, linear, random_input(1, 24, torch.bfloat16), 2)
    assert caught.value.codes == ("cannot-shard",)


@pytest.mark.parametrize("method", [WeightOnlyLinear, DequantizedLinear])
def test_methods_without_a_place_for_it_refuse(method: type) -> None:
    linear = CanonicalLinear(random_weight(8, 64, 4), transform=InputTransform(orthogonal(4)))
    with pytest.raises(NpuQuantError) as caught:
        method().prepare(linear, PrepareContext(torch.bfloat16))
    assert caught.value.codes == ("unsupported-scheme",)
    assert "export these layers without it" in str(caught.value)


@pytest.mark.parametrize("method", ERROR)
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_apply_compiles_without_a_graph_break(method: type, clip: float) -> None:
    weight = random_weight(16, 48, 8 if method is W8A8DynamicLinear else 4)
    for transform in (transform_of(3, 16, True, True, clip), transform_of(4, 12, True, True, clip)):
        instance = method()
        linear = CanonicalLinear(weight, transform=transform)
        layer = SimpleNamespace(**instance.prepare(linear, PrepareContext(torch.bfloat16)))
        compiled = torch.compile(
            lambda x, instance=instance, layer=layer: instance.apply(layer, x),
            fullgraph=True,
            backend="eager",
            dynamic=True,
        )
        x = random_input(5, 48, torch.bfloat16)
        assert torch.equal(compiled(x), instance.apply(layer, x))
