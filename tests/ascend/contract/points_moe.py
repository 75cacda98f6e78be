# SPDX-License-Identifier: Apache-2.0
"""Experts inside vllm-ascend: its layers, routing, dispatch and combine with our products, every scheme.

The oracle is the formula in NumPy (tests/methods/moe_layers.py). vllm-ascend's dataclasses, its all-gather dispatcher and
``fused_experts`` are the real ones; only MC2's collective operators are replaced, by a dispatcher that records what it was
asked for. Run as points.py is.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.ascend.contract.world import World
from tests.methods.layers import random_input, relative_error
from tests.methods.moe_layers import FLOAT, SCHEMES, W4A8, W4A16_GROUP, W8A8, MoeLayer, Scheme, routing
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.methods.moe import Input, Placement

by_name = {"argvalues": SCHEMES, "ids": [scheme.name for scheme in SCHEMES]}


def limit(*schemes: Scheme) -> float:
    # vllm-ascend sums a token's experts with weights in the model's dtype.
    return 0.06 if any(scheme.method.takes is Input.INT4 for scheme in schemes) else 0.02  # type: ignore[attr-defined]


class Served:
    """A layer of random experts with what vllm-ascend hangs on it."""

    def __init__(self, layer: MoeLayer, count: int, expert_map: torch.Tensor | None = None) -> None:
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        from vllm_npu_quant.ascend.moe import AscendExperts

        self.chain, tensors = layer.prepared(torch.bfloat16)
        self.placement = Placement.of(count, expert_map)
        self.served = AscendExperts(self.chain, self.placement)
        self.count = count
        self.layer = types.SimpleNamespace(
            **vars(tensors),
            layer_name="experts",
            activation=MoEActivation.SILU,
            ascend_expert_map=expert_map,
            global_redundant_expert_num=0,
            ascend_mc2_mask=None,
            ascend_pertoken_scale=None,
            apply_router_weight_on_input=False,
        )

    def arguments(self, weights: torch.Tensor, ids: torch.Tensor) -> tuple[Any, Any, dict[str, Any]]:
        """(topk_weights, topk_ids, the rest) as this release gives them."""
        from vllm_npu_quant.ascend.moe import contract

        found = contract()
        if found is not None and found.asks_method:
            return weights, ids, {}
        given = {
            "router_logits": torch.zeros(ids.shape[0], self.count),
            "pertoken_scale": None,
            "top_k": ids.shape[1],
            "renormalize": True,
            "use_grouped_topk": False,
            "num_experts": self.count,
            "expert_map": self.layer.ascend_expert_map,
            "topk_group": None,
            "num_expert_group": None,
            "custom_routing_function": lambda **_: (weights, ids),
            "scoring_func": "softmax",
            "routed_scaling_factor": 1.0,
            "e_score_correction_bias": None,
            "activation": self.layer.activation,
            "apply_router_weight_on_input": False,
            "enable_force_load_balance": False,
            "log2phy": None,
            "global_redundant_expert_num": 0,
            "mc2_mask": None,
        }
        return None, None, given

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Any:
        asked_weights, asked_ids, given = self.arguments(weights, ids)
        return self.served.apply(self.layer, x, asked_weights, asked_ids, given)


@contextmanager
def communication(host: World, method: Any, kind: str = "ALLGATHER") -> Iterator[None]:
    from vllm.forward_context import set_forward_context
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType

    with set_forward_context(None, host.config, num_tokens=8):
        _EXTRA_CTX.moe_comm_type = MoECommType[kind]
        _EXTRA_CTX.moe_comm_method = method
        yield


def all_gather(moe: tuple[Any, Any], host: World, count: int, local: int, k: int = 2) -> Any:
    """vllm-ascend's all-gather communication for layers of another size than the loaded model's."""
    from vllm_ascend.ops.fused_moe.moe_comm_method import AllGatherCommImpl
    from vllm_ascend.ops.fused_moe.token_dispatcher import TokenDispatcherWithAllGather

    made = AllGatherCommImpl(host.experts(moe[1].model.layers[0].mlp).moe_config)
    made.token_dispatcher = TokenDispatcherWithAllGather(top_k=k, num_experts=count, num_local_experts=local)
    return made


@pytest.mark.parametrize("scheme", **by_name)
def test_every_scheme_through_all_gather(host: World, moe: tuple[Any, Any], scheme: Scheme) -> None:
    layer = MoeLayer.random(scheme, scheme, 96, 48, 5)
    x, (weights, ids) = random_input(9, 96, torch.bfloat16), routing(9, 2, 5)
    with communication(host, all_gather(moe, host, 5, 5)):
        result = Served(layer, 5).run(x, weights, ids)
    assert type(result).__name__ == "FusedExpertsResult"
    assert result.routed_out.dtype == x.dtype
    assert relative_error(result.routed_out, layer.expected(x, weights, ids)) < limit(scheme)


@pytest.mark.parametrize(("w13", "w2"), [(W8A8, W4A16_GROUP), (W4A16_GROUP, W8A8), (FLOAT, W4A8), (W4A8, FLOAT)])
def test_any_two_schemes_through_all_gather(
    host: World,
    moe: tuple[Any, Any],
    w13: Scheme,
    w2: Scheme,
) -> None:
    layer = MoeLayer.random(w13, w2, 33, 80, 4)
    x, (weights, ids) = random_input(7, 33, torch.bfloat16), routing(7, 2, 4)
    with communication(host, all_gather(moe, host, 4, 4)):
        result = Served(layer, 4).run(x, weights, ids)
    assert relative_error(result.routed_out, layer.expected(x, weights, ids)) < limit(w13, w2)


@pytest.mark.parametrize("scheme", **by_name)
def test_expert_parallel_ranks_add_up(
    host: World,
    moe: tuple[Any, Any],
    scheme: Scheme,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_ascend.ops.fused_moe import token_dispatcher

    layer = MoeLayer.random(scheme, scheme, 64, 32, 6)
    x, (weights, ids) = random_input(13, 64, torch.bfloat16), routing(13, 2, 6)
    total = torch.zeros(13, 64, dtype=torch.float64)
    for rank in (0, 1):
        own = range(3 * rank, 3 * rank + 3)
        expert_map = torch.tensor([own.index(e) if e in own else -1 for e in range(6)], dtype=torch.int32)
        monkeypatch.setattr(token_dispatcher, "get_ep_group", lambda r=rank: types.SimpleNamespace(rank_in_group=r))
        with communication(host, all_gather(moe, host, 6, 3)):
            part = Served(layer.some_experts(list(own)), 6, expert_map).run(x, weights, ids).routed_out
        total += part.to(torch.float64)
    assert relative_error(total, layer.expected(x, weights, ids)) < limit(scheme)


class RecordingDispatcher:
    """MC2's dispatch and combine, on one rank: groups as sums, tokens in int8 where the quant parameters say so."""

    moe_all_to_all_group_name = "group"

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def token_dispatch(self, token_dispatch_input: Any) -> Any:
        from vllm_npu_quant.ascend.host import attribute
        from vllm_npu_quant.ascend.moe import _BUILDERS

        self.asked.append(token_dispatch_input)
        quant, ids = token_dispatch_input.quant, token_dispatch_input.topk_ids
        order = ids.flatten().sort(stable=True).indices
        rows = token_dispatch_input.hidden_states[order // ids.shape[1]]
        scale = None
        if quant.dispatch_with_quant:
            rows, scale = torch.ops.npu.npu_dynamic_quant(rows)
        groups = torch.bincount(ids.flatten().long(), minlength=self.count).cumsum(0)
        module = _BUILDERS[0].rpartition(".")[0] + ".token_dispatcher"
        output = attribute(module, "MoETokenDispatchOutput") or attribute(_BUILDERS[1], "MoETokenDispatchOutput")
        return output(
            hidden_states=rows,
            dynamic_scale=scale,
            group_list=groups,
            group_list_type=0,
            combine_metadata=(order, token_dispatch_input.topk_weights),
        )

    count = 5

    def token_combine(self, hidden_states: torch.Tensor, combine_metadata: Any, bias: Any = None) -> torch.Tensor:
        order, weights = combine_metadata
        rows = torch.empty_like(hidden_states)
        rows[order] = hidden_states
        return (rows.view(*weights.shape, -1).float() * weights.unsqueeze(-1).float()).sum(1).to(hidden_states.dtype)


def mc2(moe: tuple[Any, Any], host: World, name: str = "MC2CommImpl") -> Any:
    from vllm_ascend.ops.fused_moe import moe_comm_method

    made = object.__new__(getattr(moe_comm_method, name))
    made.moe_config = host.experts(moe[1].model.layers[0].mlp).moe_config
    made.token_dispatcher = RecordingDispatcher()
    made.use_fusion_ops = True
    made.lora_context = None
    return made


@pytest.mark.parametrize("scheme", **by_name)
def test_every_scheme_through_mc2(host: World, moe: tuple[Any, Any], scheme: Scheme) -> None:
    layer = MoeLayer.random(scheme, scheme, 96, 48, 5)
    x, (weights, ids) = random_input(9, 96, torch.bfloat16), routing(9, 2, 5)
    method = mc2(moe, host)
    with communication(host, method, "MC2"):
        result = Served(layer, 5).run(x, weights, ids)
    assert relative_error(result.routed_out, layer.expected(x, weights, ids)) < limit(scheme)
    (asked,) = method.token_dispatcher.asked
    takes_int8 = scheme.method.takes is Input.INT8  # type: ignore[attr-defined]
    assert asked.quant.dispatch_with_quant is takes_int8
    assert asked.quant.quant_type.name == ("W8A8" if takes_int8 else "W4A16")
    assert asked.topk_ids.dtype == torch.int32
    assert asked.routing.pertoken_scale is None


def test_asymmetric_weights_go_through_vllm_ascends_own_w4a16_path(
    host: World,
    moe: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where fused_experts has its own products (0.23); they are ours, with the same operators."""
    if host.asks_method:
        pytest.skip("this release asks the quantization method for the products")
    from vllm_ascend.ops.fused_moe import moe_comm_method

    called = []
    original = moe_comm_method.unified_apply_mlp
    monkeypatch.setattr(moe_comm_method, "unified_apply_mlp", lambda **given: called.append(given) or original(**given))
    layer = MoeLayer.random(W4A16_GROUP, W4A16_GROUP, 64, 32, 5)
    x, (weights, ids) = random_input(9, 64, torch.bfloat16), routing(9, 2, 5)
    served = Served(layer, 5)
    with communication(host, all_gather(moe, host, 5, 5)):
        theirs = served.run(x, weights, ids).routed_out
        assert len(called) == 1
        assert called[0]["mlp_compute_input"].weights.w1_offset is served.layer.w13_weight_offset
        monkeypatch.setattr(served.served, "_as_theirs", lambda layer: False)
        ours = served.run(x, weights, ids).routed_out
    assert len(called) == 1
    assert torch.equal(theirs, ours)


def test_fused_mc2_is_refused_when_it_is_met(host: World, moe: tuple[Any, Any]) -> None:
    layer = MoeLayer.random(W8A8, W8A8, 64, 32, 5)
    x, (weights, ids) = random_input(9, 64, torch.bfloat16), routing(9, 2, 5)
    with (
        communication(host, mc2(moe, host, "FusedMC2CommImpl"), "FUSED_MC2"),
        pytest.raises(NpuQuantError, match="FusedMC2CommImpl"),
    ):
        Served(layer, 5).run(x, weights, ids)


@pytest.mark.parametrize("scheme", [W8A8, W4A16_GROUP, W4A8], ids=lambda scheme: scheme.name)
def test_an_unknown_release_gets_the_whole_chain(
    host: World,
    moe: tuple[Any, Any],
    scheme: Scheme,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch_npu's operators alone, in all-gather expert parallelism; any other communication is refused."""
    from vllm_npu_quant.ascend import moe as adapter

    layer = MoeLayer.random(scheme, scheme, 64, 32, 6)
    x, (weights, ids) = random_input(13, 64, torch.bfloat16), routing(13, 2, 6)
    total = torch.zeros(13, 64, dtype=torch.float64)
    for rank in (0, 1):
        own = range(3 * rank, 3 * rank + 3)
        expert_map = torch.tensor([own.index(e) if e in own else -1 for e in range(6)], dtype=torch.int32)
        served = Served(layer.some_experts(list(own)), 6, expert_map)
        asked_weights, asked_ids, given = served.arguments(weights, ids)
        with monkeypatch.context() as patch:
            patch.setattr(adapter, "contract", lambda: None)
            with communication(host, all_gather(moe, host, 6, 3)):
                part = served.served.apply(served.layer, x, asked_weights, asked_ids, given)
            with communication(host, mc2(moe, host), "MC2"), pytest.raises(NpuQuantError, match="MC2"):
                served.served.apply(served.layer, x, asked_weights, asked_ids, given)
        total += part.routed_out.to(torch.float64)
    assert relative_error(total, layer.expected(x, weights, ids)) < limit(scheme)


def test_the_contract_is_found_by_signature(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A required argument that nobody here knows means another contract."""
    from vllm_npu_quant.ascend import moe as adapter

    found = adapter.contract.__wrapped__()
    assert found is not None
    assert found.asks_method is host.asks_method
    real = adapter.host.attribute

    def changed(*, hidden_states: Any, something_new: Any) -> None: ...

    monkeypatch.setattr(
        adapter.host,
        "attribute",
        lambda module, name: changed if name == "build_fused_experts_input" else real(module, name),
    )
    assert adapter.contract.__wrapped__() is None


def test_lora_on_experts_is_refused(host: World, moe: tuple[Any, Any]) -> None:
    layer = MoeLayer.random(W8A8, W8A8, 64, 32, 5)
    x, (weights, ids) = random_input(9, 64, torch.bfloat16), routing(9, 2, 5)
    served = Served(layer, 5)
    served.layer._ascend_moe_lora_context = object()
    with communication(host, all_gather(moe, host, 5, 5)), pytest.raises(NpuQuantError, match="LoRA"):
        served.run(x, weights, ids)


def test_loaded_model_through_vllm_ascends_whole_forward(host: World, moe: tuple[Any, Any]) -> None:
    """prepare, routing, dispatch, products, combine, finalize: bit by bit what our chain computes."""
    experts = host.experts(moe[1].model.layers[0].mlp)
    x = torch.randn(6, experts.moe_config.hidden_dim, dtype=torch.bfloat16)
    weights, ids = routing(6, experts.moe_config.experts_per_token, experts.moe_config.num_experts)
    weights = weights.to(torch.bfloat16)
    got = host.forward_experts(experts, x, weights, ids)
    assert torch.equal(got, experts.quant_method.compute(experts, x, weights, ids))
