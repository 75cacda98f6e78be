# SPDX-License-Identifier: Apache-2.0
"""Grouped methods and the chain around them, against the formula written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.methods.layers import DTYPES, random_input, relative_error
from tests.methods.moe_layers import FLOAT, SCHEMES, W4A8, W4A16_GROUP, W8A8, MoeLayer, Scheme, routing
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, InputTransform
from vllm_npu_quant.methods import moe
from vllm_npu_quant.methods.moe import Input, Placement
from vllm_npu_quant.methods.moe_int4 import W4A4DynamicExperts, W4A8DynamicExperts
from vllm_npu_quant.methods.moe_w8a8 import W8A8DynamicExperts
from vllm_npu_quant.methods.moe_weight_only import WeightOnlyExperts


def names(schemes: tuple[Scheme, ...]) -> list[str]:
    return [scheme.name for scheme in schemes]


def limit(*schemes: Scheme) -> float:
    """The relative error that roundings of the model's dtype, and activations on the edge of two integers, leave."""
    return 0.06 if any(scheme.method.takes is Input.INT4 for scheme in schemes) else 0.012  # type: ignore[attr-defined]


def compare(layer: MoeLayer, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
    found = layer.run(x, weights, ids)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert relative_error(found, layer.expected(x, weights, ids)) < limit(layer.w13, layer.w2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inner"), [(96, 48), (33, 17), (128, 200)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_every_scheme_is_the_formula(scheme: Scheme, hidden: int, inner: int, dtype: torch.dtype) -> None:
    layer = MoeLayer.random(scheme, scheme, hidden, inner, 5)
    compare(layer, random_input(9, hidden, dtype), *routing(9, 2, 5))


@pytest.mark.parametrize("w2", SCHEMES, ids=names(SCHEMES))
@pytest.mark.parametrize("w13", [W8A8, FLOAT, W4A8, W4A16_GROUP, SCHEMES[-2]], ids=lambda scheme: scheme.name)
def test_any_mix_of_w13_and_w2(w13: Scheme, w2: Scheme) -> None:
    layer = MoeLayer.random(w13, w2, 96, 80, 4)
    compare(layer, random_input(7, 96, torch.bfloat16), *routing(7, 2, 4))


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 7, 61])
@pytest.mark.parametrize("scheme", [W8A8, W4A16_GROUP], ids=lambda scheme: scheme.name)
def test_numbers_of_tokens_and_choices(scheme: Scheme, tokens: int, k: int) -> None:
    layer = MoeLayer.random(scheme, scheme, 64, 32, 8)
    compare(layer, random_input(tokens, 64, torch.bfloat16), *routing(tokens, k, 8))


def test_many_tokens() -> None:
    layer = MoeLayer.random(W8A8, W8A8, 64, 32, 8)
    compare(layer, random_input(1000, 64, torch.bfloat16), *routing(1000, 2, 8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_no_tokens(scheme: Scheme) -> None:
    layer = MoeLayer.random(scheme, scheme, 64, 32, 3)
    weights, ids = routing(0, 2, 3)
    assert layer.run(torch.empty(0, 64).bfloat16(), weights, ids).shape == (0, 64)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_all_tokens_on_one_expert(scheme: Scheme) -> None:
    layer = MoeLayer.random(scheme, scheme, 64, 32, 6)
    ids = torch.full((9, 1), 4, dtype=torch.int32)
    compare(layer, random_input(9, 64, torch.bfloat16), torch.ones(9, 1), ids)


def test_equal_weights_and_the_same_expert_twice() -> None:
    layer = MoeLayer.random(W8A8, W8A8, 64, 32, 4)
    ids = torch.tensor([[2, 2], [0, 3], [3, 3]], dtype=torch.int32)
    compare(layer, random_input(3, 64, torch.bfloat16), torch.full((3, 2), 0.5), ids)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_a_token_of_zeros_gives_zeros(scheme: Scheme) -> None:
    layer = MoeLayer.random(scheme, scheme, 64, 32, 4)
    weights, ids = routing(3, 2, 4)
    x = random_input(3, 64, torch.bfloat16)
    x[1] = 0
    y = layer.run(x, weights, ids)
    assert bool((y[1] == 0).all())
    assert bool((y[0] != 0).any())


def test_router_weights_that_were_applied_to_the_input() -> None:
    layer = MoeLayer.random(W8A8, W8A8, 64, 32, 4)
    _, ids = routing(5, 1, 4)
    x = random_input(5, 64, torch.bfloat16)
    assert relative_error(layer.run(x, None, ids), layer.expected(x, torch.ones(5, 1), ids)) < 0.012


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_tensor_parallel_ranks_add_up(scheme: Scheme, ranks: int) -> None:
    """What does not depend on the input (8 * sum_k(w) of W4A8) must be in the sum once."""
    inner = 96 if scheme.group == 48 else 128
    layer = MoeLayer.random(scheme, scheme, 64, inner, 4)
    weights, ids = routing(11, 2, 4)
    x = random_input(11, 64, torch.bfloat16)
    part = inner // ranks
    total = sum(
        layer.inner_part(rank * part, (rank + 1) * part).run(x, weights, ids).to(torch.float64) for rank in range(ranks)
    )
    # Each rank scales its own part of the inner activation, more finely than the whole.
    expected = layer.expected(x, weights, ids)
    assert relative_error(total, expected) < (0.25 if scheme.method is W4A4DynamicExperts else 0.02)


@pytest.mark.parametrize(
    "maps",
    [
        [[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]],
        [[0, -1, 1, -1, 2, -1], [-1, 0, -1, 1, -1, 2]],
        [[2, 1, 0, -1, -1, -1], [-1, -1, -1, 0, 1, 2]],
        [[0, -1, -1, -1, -1, -1], [-1, 0, 1, 2, -1, 3], [-1, -1, -1, -1, 0, -1]],
    ],
    ids=["halves", "holes", "reversed", "uneven"],
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_expert_parallel_ranks_add_up(scheme: Scheme, maps: list[list[int]]) -> None:
    layer = MoeLayer.random(scheme, scheme, 64, 32, 6)
    weights, ids = routing(13, 2, 6)
    x = random_input(13, 64, torch.bfloat16)
    total = torch.zeros(13, 64, dtype=torch.float64)
    for expert_map in maps:
        local = sorted((number, expert) for expert, number in enumerate(expert_map) if number >= 0)
        rank = layer.some_experts([expert for _, expert in local])
        y = rank.run(x, weights, ids, torch.tensor(expert_map, dtype=torch.int32), 6)
        assert bool(torch.isfinite(y).all())
        total += y.to(torch.float64)
    assert relative_error(total, layer.expected(x, weights, ids)) < limit(scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_a_rank_without_a_token_gives_zeros(scheme: Scheme) -> None:
    """Its rows were never written: nothing of them may reach the output."""
    layer = MoeLayer.random(scheme, scheme, 64, 32, 4).some_experts([2, 3])
    _, ids = routing(5, 2, 2)
    y = layer.run(random_input(5, 64, torch.bfloat16), torch.full((5, 2), 0.5), ids, torch.tensor([-1, -1, 0, 1]), 4)
    assert torch.equal(y, torch.zeros_like(y))


class Called(TorchDispatchMode):
    """Notes the torch_npu operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            self.names.append(func._schema.name.removeprefix("npu::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "expert_map",
    [None, [-1, -1, -1, 0, 1, 2], [0, -1, 1, -1, 2, -1], [-1, -1, -1, -1, -1, 0]],
    ids=["whole", "range", "holes", "one"],
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=names(SCHEMES))
def test_routing_without_v2_gives_the_same(
    scheme: Scheme, expert_map: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MoeLayer.random(scheme, scheme, 64, 32, 6)
    placed = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)
    if expert_map is not None:
        layer = layer.some_experts([expert for expert, number in enumerate(expert_map) if number >= 0])
    given = random_input(13, 64, torch.bfloat16), *routing(13, 3, 6), placed, 6
    with Called() as newer:
        wanted = layer.run(*given)
    monkeypatch.setattr(moe, "has_routing_v2", lambda: False)
    with Called() as older:
        found = layer.run(*given)
    assert torch.equal(found, wanted)
    assert "npu_moe_init_routing_v2" in newer.names
    assert "npu_moe_init_routing_v2" not in older.names
    routers = [name for name in older.names if name.startswith("npu_moe")]
    assert routers == ["npu_moe_init_routing", "npu_moe_compute_expert_tokens", "npu_moe_token_unpermute"]


@pytest.mark.parametrize("scheme", [W8A8, W4A8, FLOAT], ids=lambda scheme: scheme.name)
def test_routing_without_v2_where_a_rank_has_no_token(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "has_routing_v2", lambda: False)
    layer = MoeLayer.random(scheme, scheme, 64, 32, 4).some_experts([2, 3])
    _, ids = routing(5, 2, 2)
    y = layer.run(random_input(5, 64, torch.bfloat16), torch.full((5, 2), 0.5), ids, torch.tensor([-1, -1, 0, 1]), 4)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("w2", SCHEMES, ids=names(SCHEMES))
@pytest.mark.parametrize("w13", SCHEMES, ids=names(SCHEMES))
def test_the_operators_that_a_layer_says_it_calls(w13: Scheme, w2: Scheme) -> None:
    layer = MoeLayer.random(w13, w2, 96, 96, 2)
    chain, tensors = layer.prepared(torch.bfloat16)
    weights, ids = routing(5, 2, 2)
    with Called() as called:
        chain.apply(tensors, Placement.of(2, None), random_input(5, 96, torch.bfloat16), weights, ids)
    halves = [method for method in (chain.w13, chain.w2) if getattr(method, "by_halves", False)]
    # W4A8 by halves multiplies twice.
    wanted = list(moe.operators_of(chain.w13, chain.w2))
    assert len(called.names) == len(wanted) + len(halves)
    assert list(dict.fromkeys(called.names)) == list(dict.fromkeys(wanted))


def test_placement() -> None:
    assert Placement.of(4, None).whole
    assert Placement.of(4, torch.tensor([0, 1, 2, 3])).whole
    half = Placement.of(4, torch.tensor([-1, -1, 0, 1]))
    assert (half.count, half.first, half.last, half.to_local) == (4, 2, 4, None)
    holes = Placement.of(4, torch.tensor([0, -1, 1, -1]))
    assert (holes.count, holes.first, holes.last) == (3, 0, 2)
    assert holes.to_local is not None
    assert holes.to_local.tolist() == [0, 2, 1, 2]


def test_inner_sizes_are_filled_up_for_the_operators() -> None:
    """npu_dequant_swiglu_quant wants 64 to divide the inner size; the weights of both products grow together."""
    chain, tensors = MoeLayer.random(W8A8, W8A8, 96, 48, 2).prepared(torch.bfloat16)
    assert tensors.w13_weight.shape == (2, 96, 128)
    assert tensors.w2_weight.shape == (2, 64, 128)
    assert tensors.w13_weight_scale.shape == (2, 128)
    assert (chain.w13_sizes.outputs, chain.w2_sizes.inputs) == (64, 64)
    assert not bool(tensors.w13_weight[:, :, 48:64].any())


def test_packed_weights_stay_packed() -> None:
    """The int8 x int4 operator wants 256 to divide its inputs; the outputs of w13 grow with them."""
    layer = MoeLayer.random(W4A16_GROUP, W4A8, 96, 64, 3)
    _, tensors = layer.prepared(torch.bfloat16)
    assert tensors.w13_weight.shape == (3, 96, 2 * 256 // 8)
    assert tensors.w13_weight.dtype == torch.int32
    assert tensors.w13_weight_scale.shape == tensors.w13_weight_offset.shape == (3, 3, 512)
    assert tensors.w2_weight.shape == (3, 256, 96 // 8)
    assert tensors.w2_weight_scale.shape == (3, 1, 96)
    assert tensors.w2_weight_scale.dtype == torch.int64
    assert tensors.w2_scale_bias.shape == (3, 96)


def test_zero_points_of_some_experts_only() -> None:
    scheme = Scheme("w4a16-asym", WeightOnlyExperts, 4, asymmetric=True)
    layer = MoeLayer.random(scheme, scheme, 64, 32, 4)
    for expert in (0, 2):
        for linear in layer.experts[expert]:
            linear.weight.zero = None
    compare(layer, random_input(9, 64, torch.bfloat16), *routing(9, 2, 4))


def test_w4a8_groups_of_256() -> None:
    scheme = Scheme("w4a8-g256", W4A8DynamicExperts, 4, 256)
    layer = MoeLayer.random(scheme, scheme, 512, 256, 3)
    chain, tensors = layer.prepared(torch.bfloat16)
    assert not chain.w13.by_halves  # type: ignore[attr-defined]
    assert tensors.w13_weight_scale.shape == (3, 2, 512)
    compare(layer, random_input(5, 512, torch.bfloat16), *routing(5, 2, 3))


@pytest.mark.parametrize("method", [W8A8DynamicExperts, W4A8DynamicExperts, W4A4DynamicExperts])
def test_zero_points_are_refused_where_the_operator_has_none(method: type) -> None:
    bits = 8 if method is W8A8DynamicExperts else 4
    scheme = Scheme("asymmetric", method, bits, asymmetric=True)
    with pytest.raises(NpuQuantError, match="symmetric weights only") as caught:
        MoeLayer.random(scheme, scheme, 64, 32, 2).prepared(torch.bfloat16)
    assert caught.value.codes == ("bad-value",)


@pytest.mark.parametrize("scheme", SCHEMES[:-1], ids=names(SCHEMES[:-1]))
@pytest.mark.parametrize(
    ("what", "code"),
    [("permutation", "unsupported-scheme"), ("transform", "unsupported-scheme"), ("bias", "unsupported-scheme")],
)
def test_what_the_chain_has_no_place_for_is_refused(scheme: Scheme, what: str, code: str) -> None:
    layer = MoeLayer.random(scheme, scheme, 64, 32, 2)
    plain = layer.experts[1][1]
    changed = {
        "permutation": CanonicalLinear(plain.weight, input_permutation=torch.arange(64)),
        "transform": CanonicalLinear(plain.weight, transform=InputTransform(left=torch.eye(8))),
        "bias": CanonicalLinear(plain.weight, bias=torch.zeros(32)),
    }[what]
    layer.experts[1] = (layer.experts[1][0], changed, layer.experts[1][2])
    with pytest.raises(NpuQuantError) as caught:
        layer.prepared(torch.bfloat16)
    assert caught.value.codes == (code,)
    assert caught.value.findings[0].fix


@pytest.mark.parametrize("method", [W4A8DynamicExperts, W4A4DynamicExperts])
def test_odd_groups_are_refused(method: type) -> None:
    scheme = Scheme("odd", method, 4, 21)
    with pytest.raises(NpuQuantError, match="even") as caught:
        MoeLayer.random(scheme, scheme, 63, 42, 2).prepared(torch.bfloat16)
    assert caught.value.codes == ("operator-limit",)


def test_more_inputs_than_the_int8_int4_operator_takes() -> None:
    layer = MoeLayer.random(W4A8, FLOAT, 18440, 8, 1)
    with pytest.raises(NpuQuantError, match="18432") as caught:
        layer.prepared(torch.bfloat16)
    assert caught.value.codes == ("operator-limit",)


def test_w4a8_does_not_touch_the_callers_input() -> None:
    layer = MoeLayer.random(W4A8, W4A8, 64, 32, 3)
    x = random_input(4, 64, torch.bfloat16)
    before = x.clone()
    layer.run(x, *routing(4, 2, 3))
    assert torch.equal(x, before)


def test_w8a8_is_exact_in_its_integers() -> None:
    """One expert, integers as activations: only the last rounding to bfloat16 is left."""
    layer = MoeLayer.random(W8A8, FLOAT, 64, 32, 1)
    chain, tensors = layer.prepared(torch.float16)
    x = torch.from_numpy(np.random.default_rng(0).integers(-127, 128, (3, 64)).astype(np.int8))
    product = chain.w13.matmul(tensors, x, None, torch.tensor([3]), torch.int32)
    gate, up, _ = (
        linear.weight.values.numpy().astype(np.int64) for linear in layer.experts[0][:2] + layer.experts[0][:1]
    )
    wanted = np.concatenate((x.numpy().astype(np.int64) @ gate.T, x.numpy().astype(np.int64) @ up.T), axis=1)
    width = chain.w13_sizes.outputs
    found = np.concatenate((product[:, :32].numpy(), product[:, width : width + 32].numpy()), axis=1)
    np.testing.assert_array_equal(found, wanted)
