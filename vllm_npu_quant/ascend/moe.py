# SPDX-License-Identifier: Apache-2.0
"""The routed experts of a MoE layer inside vllm-ascend: its routing and its communication, this project's products.

    prepare    vllm-ascend   tokens padded, split or gathered
    routing    vllm-ascend   its select_experts, or done already
    dispatch   vllm-ascend   all-gather, all-to-all or MC2; int8 tokens with their scales if w13 takes int8
    products   this project  w13, activation, w2: any two schemes
    combine    vllm-ascend
    finalize   vllm-ascend   reduced over ranks

dispatch, products and combine are one call of vllm-ascend's, ``moe_comm_method.fused_experts``, whose contract changes from
release to release. It is probed by signature, never by version:

- It takes a ``quant_method`` and asks it for the products (0.30).
- It calls its own method ``_apply_mlp`` for them (0.23): a stand-in for ``self`` replaces that one. Weight-only experts with
  zero points go through vllm-ascend's own W4A16 path, which computes the same.
- Anything else: this project's whole chain with torch_npu's operators, which is correct if every rank holds all tokens, that
  is with tensor parallelism and all-gather expert parallelism, and refused with any other communication.

Read in the sources of these releases, and run with their code on a host without an NPU (tests/ascend).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from vllm_npu_quant.ascend import host
from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.methods.moe import FusedExperts, Input, Placement

__all__ = ["AscendExperts", "Contract", "contract", "findings"]

#: Modules of build_fused_experts_input: since 0.27, and before.
_BUILDERS = ("vllm_ascend.ops.fused_moe.dataclass.fused_experts", "vllm_ascend.ops.fused_moe.moe_runtime_args")


@dataclass(frozen=True)
class Contract:
    """Interface of the installed vllm-ascend's ``fused_experts``.

    Attributes:
        build: its build_fused_experts_input. takes: the names of that function's arguments.
        asks_method: whether fused_experts asks a quantization method for the products.
        base: the class of the communication methods.
    """

    build: Callable[..., Any]
    takes: frozenset[str]
    asks_method: bool
    base: Any


#: Arguments of build_fused_experts_input that may be required and are available here.
_KNOWN = frozenset({"hidden_states", "topk_weights", "topk_ids", "layer", "quant_type", "dynamic_eplb", "w1", "w2"})


@lru_cache(maxsize=1)
def contract() -> Contract | None:
    """The contract of the installed vllm-ascend, or None if it is not a known one."""
    build = next(filter(None, (host.attribute(module, "build_fused_experts_input") for module in _BUILDERS)), None)
    base = host.attribute("vllm_ascend.ops.fused_moe.moe_comm_method", "MoECommMethod")
    quant_type = host.attribute("vllm_ascend.quantization.quant_type", "QuantType")
    if build is None or base is None or not {"W8A8", "W4A16"} <= set(getattr(quant_type, "__members__", ())):
        return None
    parameters = inspect.signature(build).parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    called = set(inspect.signature(base.fused_experts).parameters)
    asks_method = "quant_method" in called
    if (
        not required <= _KNOWN
        or "fused_experts_input" not in called
        or not (asks_method or hasattr(base, "_apply_mlp"))
    ):
        return None
    return Contract(build, frozenset(parameter.name for parameter in parameters), asks_method, base)


def findings() -> list[Finding]:
    """vllm-ascend's settings that are incompatible with quantized experts; before any weight is read."""
    config = host.ascend_config()
    found = []
    eplb = getattr(config, "eplb_config", None)
    if getattr(eplb, "dynamic_eplb", False) or getattr(eplb, "expert_map_path", None):
        found.append(host.refused("eplb_config", "expert load balancing, which moves experts' weights by their names"))
    if getattr(config, "enable_fused_mc2", 0):
        found.append(
            host.refused("enable_fused_mc2", "a fused operator that reads the weights of vllm-ascend's own schemes")
        )
    return found


class AscendExperts:
    """One MoE layer's experts inside vllm-ascend."""

    def __init__(self, chain: FusedExperts, placement: Placement, tid2eid: Any = None) -> None:
        self.chain = chain
        self.placement = placement
        self.tid2eid = tid2eid

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor | None,
        given: dict[str, Any],
    ) -> Any:
        """Compute the experts, as vllm-ascend's MoE layer asks of its quantization method.

        Args:
            layer: holds the prepared tensors, and since 0.27 values that earlier releases pass in ``given``.
            x: [T, hidden].
            topk_weights, topk_ids: [T, k], if vllm-ascend has routed.
            given: its other arguments; among them the router's logits if the routing is left to us.

        Returns:
            vllm-ascend's FusedExpertsResult.

        Raises:
            NpuQuantError: if these experts do not support the communication.
        """
        if topk_weights is None or topk_ids is None:
            topk_weights, topk_ids = self._routed(layer, x, given)
        if getattr(layer, "_ascend_moe_lora_context", None) is not None:
            raise NpuQuantError([_no_lora(layer)])
        known = contract()
        context = import_module("vllm_ascend.ascend_forward_context")._EXTRA_CTX
        communication = context.moe_comm_method
        if known is None or not isinstance(communication, known.base):
            return self._alone(layer, x, topk_weights, topk_ids, given, context)
        own = type(communication).fused_experts is known.base.fused_experts
        if not own:
            raise NpuQuantError([_no_communication(layer, type(communication).__name__)])
        values = self._values(layer, x, topk_weights, topk_ids, given)
        asked = known.build(**{name: value for name, value in values.items() if name in known.takes})
        products = _Products(self.chain, layer, x.dtype)
        if known.asks_method:
            return communication.fused_experts(fused_experts_input=asked, quant_method=products)
        if self._as_theirs(layer):
            return communication.fused_experts(fused_experts_input=asked)
        return type(communication).fused_experts(_OwnProducts(communication, products), fused_experts_input=asked)

    def _routed(self, layer: Any, x: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Route as vllm-ascend's own methods do, if it leaves the routing to the quantization method."""
        from vllm_ascend.ops.fused_moe.experts_selector import select_experts

        logits = given["router_logits"]
        flash = self._gate_beside(layer)
        if flash is not None:
            weights, ids = flash.topk_weights, flash.topk_ids
        else:
            names = set(inspect.signature(select_experts).parameters) & set(given)
            asked = {name: given[name] for name in names - {"hidden_states", "router_logits", "num_experts"}}
            weights, ids = select_experts(
                hidden_states=x,
                router_logits=logits,
                num_experts=logits.shape[1],
                tid2eid=self.tid2eid,
                **asked,
            )
        if given.get("enable_force_load_balance"):
            # A profile run: spread the tokens over all experts, as with real prompts.
            spread = torch.rand(ids.shape[0], logits.shape[1], device=ids.device).argsort(dim=1)
            ids = spread[:, : ids.shape[1]].to(ids.dtype)
        return weights.to(x.dtype), ids.to(torch.int32)

    def _gate_beside(self, layer: Any) -> Any:
        """vllm-ascend's record of a routing that ran beside the shared experts, if that is enabled."""
        if not getattr(layer, "multistream_overlap_gate", False):
            return None
        return import_module("vllm_ascend.flash_common3_context").get_flash_common3_context()

    def _values(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of build_fused_experts_input that differ from vllm-ascend's defaults."""
        from vllm_ascend.quantization.quant_type import QuantType

        w13, w2 = self.chain.w13, self.chain.w2
        # These control how tokens are dispatched; the products are this project's own.
        takes_int8 = w13.takes is Input.INT8

        def said(name: str, attribute: str, default: Any) -> Any:
            return given[name] if name in given else getattr(layer, attribute, default)

        return {
            "hidden_states": x,
            "topk_weights": topk_weights,
            "topk_ids": topk_ids.to(torch.int32),
            "layer": layer,
            "quant_type": QuantType.W8A8 if takes_int8 else QuantType.W4A16,
            "dynamic_eplb": False,
            "expert_map": said("expert_map", "ascend_expert_map", None),
            "global_redundant_expert_num": said("global_redundant_expert_num", "global_redundant_expert_num", 0),
            "mc2_mask": said("mc2_mask", "ascend_mc2_mask", None),
            "apply_router_weight_on_input": said("apply_router_weight_on_input", "apply_router_weight_on_input", False),
            "log2phy": given.get("log2phy"),
            "pertoken_scale": said("pertoken_scale", "ascend_pertoken_scale", None),
            "activation": said("activation", "activation", "silu"),
            "w1": w13.tensor(layer, "weight"),
            "w2": w2.tensor(layer, "weight"),
            "w1_scale": w13.tensor(layer, "weight_scale"),
            "w2_scale": w2.tensor(layer, "weight_scale"),
            "w1_offset": w13.tensor(layer, "weight_offset"),
            "w2_offset": w2.tensor(layer, "weight_offset"),
            "swiglu_limit": 0.0,
        }

    def _as_theirs(self, layer: Any) -> bool:
        """Whether vllm-ascend's W4A16 path computes these products: float inputs, offsets in both, no padded rows."""
        products = (self.chain.w13, self.chain.w2)
        plain = (self.chain.w13_sizes.inputs, self.chain.w2_sizes.outputs) == (self.chain.hidden, self.chain.hidden)
        return plain and all(
            product.takes is Input.FLOAT and product.tensor(layer, "weight_offset") is not None for product in products
        )

    def _alone(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        given: dict[str, Any],
        context: Any,
    ) -> Any:
        """Run this project's whole chain, for an unknown vllm-ascend."""
        kind = getattr(context, "moe_comm_type", None)
        if kind is not None and kind.name != "ALLGATHER":
            raise NpuQuantError([_no_communication(layer, kind.name)])
        weights: torch.Tensor | None = topk_weights
        if given.get("apply_router_weight_on_input", getattr(layer, "apply_router_weight_on_input", False)):
            x, weights = x * topk_weights.to(x.dtype), None
        result = host.attribute("vllm_ascend.ops.fused_moe.moe_comm_method", "FusedExpertsResult")
        y = self.chain.apply(layer, self.placement, x, weights, topk_ids)
        return y if result is None else result(routed_out=y)


class _Products:
    """The products that vllm-ascend asks of a quantization method between dispatch and combine."""

    def __init__(self, chain: FusedExperts, layer: Any, dtype: torch.dtype) -> None:
        self.chain = chain
        self.layer = layer
        self.dtype = dtype

    def supports_fused_activation(self, activation: Any) -> bool:
        return True  # silu; another one was refused when the layer was made

    def apply_gmm1_act_quant(self, given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """gate, up, silu(gate) * up, quantized if w2 needs it: [M, inner] and its scale [M], or None."""
        counts = _counts(given.group_list, given.group_list_type)
        return self.chain.inner(self.layer, given.hidden_states, given.dynamic_scale, counts, self.dtype)

    def apply_gmm2(self, given: Any, inner: torch.Tensor, inner_scale: torch.Tensor | None) -> torch.Tensor:
        """down: [M, hidden]."""
        counts = _counts(given.group_list, given.group_list_type)
        y = self.chain.down(self.layer, inner, inner_scale, counts, self.dtype)
        return y if given.topk_scales is None else y * given.topk_scales


class _OwnProducts:
    """A communication method of vllm-ascend that has our products; everything else is its own."""

    def __init__(self, communication: Any, products: _Products) -> None:
        self._communication = communication
        self._products = products

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communication, name)

    def _apply_mlp(self, given: Any) -> tuple[torch.Tensor, None]:
        """Return the products, and no event: the shared experts then do not wait for w2."""
        inner, scale = self._products.apply_gmm1_act_quant(given)
        return self._products.apply_gmm2(given, inner, scale), None


def _counts(group_list: torch.Tensor, group_list_type: int) -> torch.Tensor:
    """The rows of each expert, int64 [E].

    Args:
        group_list: [E]. group_list_type: vllm-ascend's name for its content: 0 for cumulative sums, 1 for counts.

    Raises:
        NpuQuantError: unsupported-scheme, for any other type; 2 stands for pairs of an expert and its count.
    """
    if group_list_type not in (0, 1):
        raise NpuQuantError(
            [
                Finding(
                    "unsupported-scheme",
                    "vllm-ascend's MoE communication gives the tokens of each expert in an unknown form",
                    expected="group_list_type 0 (sums) or 1 (counts)",
                    found=f"group_list_type {group_list_type}",
                    fix="use vllm-ascend 0.23 or 0.30, or run without --enable-expert-parallel",
                )
            ]
        )
    if group_list_type == 0:
        group_list = torch.cat([group_list[:1], group_list[1:] - group_list[:-1]])
    return group_list.to(torch.int64)


def _no_communication(layer: Any, name: str) -> Finding:
    return Finding(
        "unsupported-scheme",
        "these experts cannot take part in vllm-ascend's MoE communication",
        layer=getattr(layer, "layer_name", ""),
        expected="all-gather, or one whose products a quantization method gives",
        found=name,
        fix="run without --enable-expert-parallel",
    )


def _no_lora(layer: Any) -> Finding:
    return Finding(
        "unsupported-scheme",
        "LoRA adapters of quantized experts are not served",
        layer=getattr(layer, "layer_name", ""),
        expected="adapters without the routed experts",
        found="an adapter that wraps this MoE layer",
        fix="leave the experts out of the adapter",
    )
