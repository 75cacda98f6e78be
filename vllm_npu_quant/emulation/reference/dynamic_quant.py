# SPDX-License-Identifier: Apache-2.0
"""npu_dynamic_quant and npu_dynamic_quant_asymmetric: quantization of every row (token) with a scale of its own."""

from __future__ import annotations

import itertools

import torch

from vllm_npu_quant.emulation.numerics import pack_int4, quantize_rows, round_to_int
from vllm_npu_quant.emulation.rules.dynamic_quant import DynamicQuant, DynamicQuantAsymmetric

__all__ = ["npu_dynamic_quant", "npu_dynamic_quant_asymmetric"]


def npu_dynamic_quant(call: DynamicQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantization of rows.

        x' = x * smooth_scales;  scale = max|x'| / MAX;  y = rint(x' * (MAX / max|x'|))      MAX = 127 (int8), 7 (int4)

    A row of zeros gives y = 0 and scale = 0, no epsilon: MAX / 0 is infinite, 0 * inf is NaN, and NaN is cast to 0.

    Returns:
        y: int8 [..., H], or int32 [..., H/8].
        scale: float32 [...], to multiply y with.

    Source: op-plugin torch_npu-npu_dynamic_quant.md; ops-nn quant/dynamic_quant/op_kernel. Kernels multiply by the
    reciprocal, golden.py divides; they may differ by 1 in y, and by 1 ulp in the scale.
    """
    y, scale = quantize_rows(_smoothed(call), call.limits)
    return (pack_int4(y) if call.packed else y), scale


def npu_dynamic_quant_asymmetric(call: DynamicQuantAsymmetric) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric quantization of rows; x is about (y - offset) * scale.

        x' = x * smooth_scales;  scale = max((max x' - min x') / (HIGH - LOW), 1e-12);  offset = HIGH - max x' / scale
        y = saturate(rint(x' / scale + offset))                  HIGH - LOW = 255, HIGH = 127 (int8); 15 and 7 (int4)

    The offset is a float32 that is not rounded.

    Returns:
        y: int8 [..., H], or int32 [..., H/8].
        scale, offset: float32 [...].

    Source: op-plugin torch_npu-npu_dynamic_quant_asymmetric.md; ops-nn quant/dynamic_quant/op_kernel.
    """
    x, (low, high) = _smoothed(call), call.limits
    top, bottom = x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True)
    scale = ((top - bottom) / float(high - low)).clamp(min=1e-12)
    offset = float(high) - top / scale
    y = round_to_int(x / scale + offset, call.limits).to(torch.int8)
    return (pack_int4(y) if call.packed else y), scale.squeeze(-1), offset.squeeze(-1)


def _smoothed(call: DynamicQuant) -> torch.Tensor:
    """``input * smooth_scales`` in float32.

    With group_index (running totals of rows), row r takes the scales of the first group whose total exceeds r.
    """
    x = call.input.to(torch.float32)
    if call.smooth_scales is None:
        return x
    scales = call.smooth_scales.to(torch.float32)
    if call.group_index is None:
        return x * scales
    rows = x.reshape(-1, x.shape[-1])
    ends = call.group_index.tolist()
    increasing = all(first <= second for first, second in itertools.pairwise(ends))
    expected = f"running totals that end in the {rows.shape[0]} rows"
    call.require(increasing and ends[-1] == rows.shape[0], "group_index", expected, ends)
    numbers = torch.arange(rows.shape[0], dtype=torch.int32)
    group = torch.searchsorted(call.group_index.contiguous(), numbers, right=True)
    return (rows * scales[group]).view(x.shape)
