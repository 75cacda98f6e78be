# SPDX-License-Identifier: Apache-2.0
"""The RMSNorm bias that asymmetric smoothing leaves in ModelSlim checkpoints.

vLLM's RMSNorm has no bias, and its loaders silently drop one. vLLM's official hook for out-of-tree operators replaces
RMSNorm by this class. It behaves like RMSNorm unless the active quantization lists norm biases; then every norm gets a bias
parameter, because a norm does not know its name, and after loading those that received none drop it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

__all__ = ["BiasedRMSNorm", "register_norm"]


class NormBiasMethod(QuantizeMethodBase):
    """Drop the bias of a norm that received none. vLLM calls it for every module after loading."""

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        bias = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
        bias.weight_loader = self.load  # type: ignore[attr-defined]
        layer.register_parameter("bias", bias)

    def load(self, param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        default_weight_loader(param, loaded_weight)
        self.loaded = True

    def __init__(self) -> None:
        self.loaded = False

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not self.loaded and layer.bias is not None:
            layer.register_parameter("bias", None)

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("a norm is not run through its quantization method")


class BiasedRMSNorm(RMSNorm):
    """RMSNorm with an optional bias: ``y = x / rms(x) * weight + bias``, after the residual was added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        config = get_current_vllm_config_or_none()
        quant_config = getattr(config, "quant_config", None) if config is not None else None
        described = getattr(quant_config, "described", None)
        if self.has_weight and getattr(described, "norm_biases", None):
            self.quant_method = NormBiasMethod()
            self.quant_method.create_weights(self)

    def forward_native(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        result = super().forward_native(x, residual)
        if self.bias is None:
            return result
        if residual is None:
            return result + self.bias
        out, residual = result
        return out + self.bias, residual


def register_norm() -> None:
    """Replace RMSNorm by BiasedRMSNorm, once. Another package's replacement is kept."""
    if "RMSNorm" not in op_registry_oot:
        CustomOp.register_oot(name="RMSNorm")(BiasedRMSNorm)
