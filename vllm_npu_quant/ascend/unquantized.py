# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's methods for float layers."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["linear", "moe"]

#: Where the method of float experts is: since 0.30, and before.
_EXPERTS = ("vllm_ascend.ops.fused_moe.routed_experts", "vllm_ascend.ops.fused_moe.fused_moe")


def linear() -> Any:
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    return AscendUnquantizedLinearMethod()


def moe(layer: Any, tid2eid: Any) -> Any:
    """
    Raises:
        NpuQuantError: where this vllm-ascend has its method in a place that is not known.
    """
    for module in _EXPERTS:
        try:
            method = import_module(module).AscendUnquantizedFusedMoEMethod
        except (ImportError, AttributeError):
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
