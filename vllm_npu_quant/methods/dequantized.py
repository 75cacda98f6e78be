# SPDX-License-Identifier: Apache-2.0
"""Quantized weights that are dequantized at load."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.int4 import row_blocks
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext, transformed_inputs

__all__ = ["DequantizedLinear"]


class DequantizedLinear(NpuLinearMethod):
    """``y = x @ w.T + bias`` with w in the model's dtype, dequantized at load in blocks of rows.

    For layers whose weight must be float, and for number formats that the chip does not support. An input permutation is
    inverted, so that the weight has the model's input order.
    """

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        weight = linear.weight
        if linear.transform is not None:
            raise NpuQuantError([transformed_inputs("a weight that is dequantized at load")])
        order = linear.input_permutation
        kept = None if order is None else (order >= 0).nonzero().flatten()  # without padding inputs
        self.outputs = weight.outputs
        inputs = weight.inputs if kept is None else kept.numel()
        device = weight.scale.device
        floats = torch.empty(weight.outputs, inputs, dtype=context.act_dtype, device=device)
        for start, stop in row_blocks(weight.outputs, weight.inputs):
            block = weight.dequantized_rows(start, stop).to(context.act_dtype)
            if order is None or kept is None:
                floats[start:stop] = block
            else:
                floats[start:stop].index_copy_(1, order[kept], block[:, kept])
        return {"weight": floats}

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)
