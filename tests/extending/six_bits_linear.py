# SPDX-License-Identifier: Apache-2.0
"""The method class of six_bits.py."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext, as_shaped, tokens_of


class W6A16Linear(NpuLinearMethod):
    """``y = x @ (q * scale) + bias`` by npu_weight_quant_batchmatmul, with 6-bit integers in int8."""

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        self.outputs = linear.weight.outputs
        self.tiled = ("weight",)
        return {
            "weight": linear.weight.values.t().contiguous(),
            "weight_scale": linear.weight.scale.t().to(context.act_dtype).contiguous(),
        }

    def bias_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if act_dtype is torch.bfloat16 else act_dtype

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = torch.ops.npu.npu_weight_quant_batchmatmul(tokens_of(x), layer.weight, layer.weight_scale, bias=bias)
        return as_shaped(y, x)
