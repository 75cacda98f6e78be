# SPDX-License-Identifier: Apache-2.0
"""Feature checks for hosts and versions of vLLM: one named function for each difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.methods.moe import FusedExperts, Placement

__all__ = [
    "ascend_experts",
    "ascend_norm_bias",
    "called_module",
    "default_load_check",
    "float_experts_crash",
    "host_findings",
    "is_moe",
    "lacks_fp8_of",
    "nz_wanted",
    "on_npu",
    "unquantized_linear",
    "unquantized_moe",
]


def on_npu() -> bool:
    return current_platform.device_type == "npu"


def lacks_fp8_of(method: str) -> bool:
    """Whether a quantization method is vLLM's own and calls FP8 operators, of which vLLM's CPU build has stubs.

    Other platforms and other plugins may bring them.
    """
    if not current_platform.is_cpu() or current_platform.supports_fp8():
        return False
    return get_quantization_config(method).__module__.startswith("vllm.")


def is_moe(layer: nn.Module) -> bool:
    """Whether a layer holds a MoE's routed experts (``FusedMoE`` before vLLM 0.27, ``RoutedExperts`` since)."""
    return isinstance(layer, RoutedExperts)


def called_module(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """The module that a model calls for the routed experts ``name``: since vLLM 0.27 the runner that holds them.

    Args:
        name: of the experts, a key of ``modules``. modules: the model's, by name.

    Returns:
        Its name, and itself.
    """
    parent = name.rpartition(".")[0]
    if "Runner" in type(modules[parent]).__name__:
        return parent, modules[parent]
    return name, modules[name]


def default_load_check(loader: Any) -> bool:
    """Whether vLLM's loader has a check of loaded weights, and the user did not switch it on or off.

    The default loader has one; loaders of other formats may not.
    """
    return hasattr(loader, "track_weights_loading") and getattr(loader, "enable_weights_track", False) is None


def ascend_norm_bias(module: nn.Module) -> bool | None:
    """Whether a norm of vllm-ascend received a bias (its ``bias_loaded``); None for any other module."""
    loaded = getattr(module, "bias_loaded", None)
    return None if loaded is None else bool(loaded)


def unquantized_linear() -> QuantizeMethodBase:
    """The method for a float Linear: never None, which vllm-ascend does not accept."""
    if on_npu():
        from vllm_npu_quant.ascend import unquantized

        return unquantized.linear()
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    return UnquantizedLinearMethod()


def float_experts_crash(layer: Any) -> bool:
    """Whether vLLM's own method for float experts cannot serve this layer and ours can: its CPU kernel ignores the expert
    map of an expert-parallel run, and reads past the weights."""
    if on_npu() or not layer.moe_config.moe_parallel_config.use_ep:
        return False
    return getattr(layer.activation, "value", layer.activation) == "silu"


def unquantized_moe(layer: Any, tid2eid: Any) -> QuantizeMethodBase:
    """The method for float experts."""
    if on_npu():
        from vllm_npu_quant.ascend import unquantized

        return unquantized.moe(layer, tid2eid)
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    return UnquantizedFusedMoEMethod(layer.moe_config)


def host_findings(*, experts: bool = False) -> list[Finding]:
    """Host settings that are incompatible with quantized layers, or with quantized experts."""
    if not on_npu():
        return []
    from vllm_npu_quant.ascend import host, moe

    return moe.findings() if experts else host.findings()


def nz_wanted() -> bool:
    """Whether weights may be cast to the NPU's own memory layout if an operator takes both."""
    if not on_npu():
        return True
    from vllm_npu_quant.ascend import host

    return host.nz_wanted()


def ascend_experts(chain: FusedExperts, placement: Placement, tid2eid: Any) -> Any:
    """The experts of a layer as vllm-ascend's layers call them; None for vLLM's own layers."""
    if not on_npu():
        return None
    from vllm_npu_quant.ascend.moe import AscendExperts

    return AscendExperts(chain, placement, tid2eid)
