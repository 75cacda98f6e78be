# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's methods for float layers. Read in its source, not run: no NPU was at hand."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["linear", "moe"]


def linear() -> Any:
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    return AscendUnquantizedLinearMethod()


def moe(layer: Any, tid2eid: Any) -> Any:
    from vllm_ascend.ops.fused_moe.fused_moe import AscendUnquantizedFusedMoEMethod

    if "tid2eid" in inspect.signature(AscendUnquantizedFusedMoEMethod.__init__).parameters:
        return AscendUnquantizedFusedMoEMethod(layer.moe_config, tid2eid=tid2eid)
    return AscendUnquantizedFusedMoEMethod(layer.moe_config)
