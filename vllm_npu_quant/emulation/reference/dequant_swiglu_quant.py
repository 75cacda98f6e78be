# SPDX-License-Identifier: Apache-2.0
"""npu_dequant_swiglu_quant: the step between the two products of experts, in one pass."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import INT8, fill_garbage, garbage, quantize_rows, round_to_int
from vllm_npu_quant.emulation.reference.swiglu import silu
from vllm_npu_quant.emulation.rules.dequant_swiglu_quant import DequantSwigluQuant

__all__ = ["npu_dequant_swiglu_quant"]


def npu_dequant_swiglu_quant(call: DequantSwigluQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize, SwiGLU, quantize. By DEFAULT the RIGHT half is activated (activate_left=False).

        x':  (x + bias_int32) * weight_scale[g] * activation_scale (+ bias_float) for int32 x; x itself for floats
        swiglu_mode 0: y = silu(a) * b           (a, b) = (right, left); (left, right) with activate_left
        swiglu_mode 1: a = even columns, b = odd columns;  swiglu_mode 2: halves as above;  both:
            y = min(a, limit) * sigmoid(alpha * min(a, limit)) * (clamp(b, -limit, limit) + glu_bias)
        quant_mode 1, dynamic: z = y * quant_scale[g];  scale = max|z| / 127;  out = rint(z * (127 / max|z|))
        quant_mode 0, static:  out = saturate(rint(y / quant_scale[g] + quant_offset)): it DIVIDES here

    Returns:
        out: int8 [M, H].
        scale: float32 [M]; garbage for static quantization.

    Source: op-plugin torch_npu-npu_dequant_swiglu_quant.md; ops-nn quant/dequant_swiglu_quant/op_kernel. (The document
    also asks for H that 64 divides with group_index; smaller models are accepted here.)
    """
    rows = call.x.shape[0]
    group = _groups_of_rows(call)
    y = _activated(call, _dequantized(call, group))
    if call.quant_mode == 0:
        y = y / _of_rows(call.given("quant_scale"), group)
        if call.quant_offset is not None:
            y = y + call.quant_offset.to(torch.float32)
        return _padded(round_to_int(y, INT8).to(torch.int8), rows), garbage((rows,), torch.float32)
    out, scale = quantize_rows(y if call.quant_scale is None else y * _of_rows(call.quant_scale, group), INT8)
    return _padded(out, rows), _padded(scale, rows)


def _groups_of_rows(call: DequantSwigluQuant) -> torch.Tensor | None:
    """The group of every row that a group covers, int64; None without groups."""
    if call.group_index is None:
        return None
    sizes = call.group_index.tolist()
    call.require(min(sizes) >= 0, "group_index", "groups of no negative size", sizes)
    call.require(sum(sizes) <= call.x.shape[0], "group_index", f"at most {call.x.shape[0]} rows in all groups", sizes)
    return torch.repeat_interleave(torch.arange(len(sizes)), call.group_index)


def _of_rows(parameter: torch.Tensor, group: torch.Tensor | None) -> torch.Tensor:
    """A parameter in float32 as it applies to the rows: [covered rows, ...] if there are groups."""
    parameter = parameter.to(torch.float32)
    return parameter if group is None else parameter[group].view(group.shape[0], parameter[0].numel())


def _dequantized(call: DequantSwigluQuant, group: torch.Tensor | None) -> torch.Tensor:
    covered = call.x.shape[0] if group is None else group.shape[0]
    values, bias = call.x[:covered], call.bias
    if bias is not None and bias.dtype == torch.int32:
        values = values + bias
    values = values.to(torch.float32)
    if call.weight_scale is not None:
        values = values * _of_rows(call.weight_scale, group)
    if call.activation_scale is not None:
        values = values * call.activation_scale.view(-1, 1)[:covered]
    if bias is not None and bias.dtype != torch.int32:
        values = values + bias.to(torch.float32)
    return values


def _activated(call: DequantSwigluQuant, x: torch.Tensor) -> torch.Tensor:
    if call.swiglu_mode == 1:
        gate, up = x[..., 0::2], x[..., 1::2]
    else:
        left, right = x.chunk(2, dim=-1)
        gate, up = (left, right) if call.activate_left else (right, left)
    if call.swiglu_mode == 0:
        return silu(gate) * up
    gate = gate.clamp(max=call.clamp_limit)
    return gate * torch.sigmoid(call.glu_alpha * gate) * (up.clamp(-call.clamp_limit, call.clamp_limit) + call.glu_bias)


def _padded(values: torch.Tensor, rows: int) -> torch.Tensor:
    """``values`` with garbage rows after them."""
    out = values.new_empty((rows, *values.shape[1:]))
    out[: values.shape[0]] = values
    fill_garbage(out[values.shape[0] :])
    return out
