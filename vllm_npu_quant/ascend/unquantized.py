# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's methods for float layers."""

from __future__ import annotations

import inspect
from typing import Any

from vllm_npu_quant.ascend import host
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["linear", "moe"]

#: Modules of the method for float experts: since 0.30, and before.
_EXPERTS = ("vllm_ascend.ops.fused_moe.routed_experts", "vllm_ascend.ops.fused_moe.fused_moe")


def linear() -> Any:
    """vllm-ascend's method for float Linear layers."""
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    return AscendUnquantizedLinearMethod()


def moe(layer: Any, tid2eid: Any) -> Any:
    """vllm-ascend's method for float experts.

    Args:
        layer: the MoE layer. tid2eid: vllm-ascend's table of experts by token id, or None.

    Raises:
        NpuQuantError: unsupported-scheme, if this vllm-ascend has its method in an unknown place.
    """
    for module in _EXPERTS:
        method = host.attribute(module, "AscendUnquantizedFusedMoEMethod")
        if method is None:
            continue
        if "tid2eid" in inspect.signature(method.__init__).parameters:
            return method(layer.moe_config, tid2eid=tid2eid)
        return method(layer.moe_config)
    raise NpuQuantError(
        [
            Finding(
                "unsupported-scheme",
                "vllm-ascend's method for float experts was not found",
                layer=getattr(layer, "layer_name", ""),
                expected=f"AscendUnquantizedFusedMoEMethod in {' or '.join(_EXPERTS)}",
                found="another version of vllm-ascend",
                fix="use vllm-ascend 0.23 or 0.30",
            )
        ]
    )
