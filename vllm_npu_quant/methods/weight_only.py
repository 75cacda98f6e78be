# SPDX-License-Identifier: Apache-2.0
"""Integer weights, activations in the model's dtype."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext, to_nz

__all__ = ["WeightOnlyLinear"]


class WeightOnlyLinear(NpuLinearMethod):
    """``y = x @ ((w_q + antiquant_offset) * antiquant_scale).T + bias`` (npu_weight_quant_batchmatmul).

    The operator adds its offset, so it is minus the zero point; scale and offset have the activation's dtype.
    """

    def __init__(self) -> None:
        self.group_size = 0

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        weight = linear.weight
        outputs = weight.outputs
        # The operator wants group_size < K: one group that covers all inputs is a channel.
        self.group_size = weight.group_size if weight.scale.shape[1] > 1 else 0
        tensors = {
            "weight": to_nz(weight.values.t().contiguous()),
            "weight_scale": weight.scale.expand(outputs, -1).t().contiguous().to(context.act_dtype),
        }
        if weight.zero is not None:
            tensors["weight_offset"] = (-weight.zero).expand(outputs, -1).t().contiguous().to(context.act_dtype)
        return tensors

    def bias_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if act_dtype == torch.bfloat16 else act_dtype

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        y = torch.ops.npu.npu_weight_quant_batchmatmul(
            tokens,
            layer.weight,
            antiquant_scale=layer.weight_scale,
            antiquant_offset=getattr(layer, "weight_offset", None),
            bias=bias,
            antiquant_group_size=self.group_size,
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])
