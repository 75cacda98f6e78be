# SPDX-License-Identifier: Apache-2.0
"""npu_moe_init_routing_v2: tokens sorted by expert, and quantized."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import INT8, garbage, quantize_rows, round_to_int
from vllm_npu_quant.emulation.rules.moe_init_routing_v2 import MoeInitRoutingV2

__all__ = ["npu_moe_init_routing_v2"]


def npu_moe_init_routing_v2(call: MoeInitRoutingV2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs i * K + j of token i and choice j by expert, stably; copy, and quantize, the tokens in that order.

    Only experts in active_expert_range count; the V rows of other experts' pairs are left out.

        quant_mode -1: rows as they are;  0: saturate(rint(x * scale[0] + offset[0]))
        quant_mode 1:  z = x * scale[e - start] (or scale[0]);  max|z| / 127 and rint(z * (127 / max|z|)), by row

    Returns:
        expanded_x: [N * K, H], or [E, capacity, H] with drop_pad_mode; rows past the pairs in range are garbage.
        expanded_row_idx: int32 [N * K]; row_idx_type 1: the tail is garbage.
        expert_tokens: int64 [experts in range] (type 2: [E, 2]); before dropping. Garbage without dimensions unless
            expert_tokens_num_flag.
        expanded_scale: float32 [rows]; garbage without dimensions for quant_mode 0.

    Source: op-plugin torch_npu-npu_moe_init_routing_v2.md (NumPy code); ops-transformer moe/moe_init_routing_v3.
    """
    start, end = call.experts
    flat = call.expert_idx.flatten().to(torch.int64)
    active = (flat >= start) & (flat < end)
    # Pairs out of range go last; their order has no effect.
    experts, pairs = torch.sort(torch.where(active, flat, end), stable=True)
    valid = int(active.sum())
    experts, pairs = experts[:valid], pairs[:valid]
    counts = torch.bincount(experts - start, minlength=end - start)
    positions, total = torch.arange(valid), flat.numel()
    if call.drop_pad_mode == 1:
        place = positions - (torch.cumsum(counts, 0) - counts)[experts]
        kept = place < call.expert_capacity
        experts, pairs = experts[kept], pairs[kept]
        positions, total = experts * call.expert_capacity + place[kept], call.expert_num * call.expert_capacity

    if call.row_idx_type == 1:
        row_idx = garbage((flat.numel(),), torch.int32)
        row_idx[:valid] = pairs.to(torch.int32)
    else:
        row_idx = torch.full((flat.numel(),), -1, dtype=torch.int32)
        row_idx[pairs] = positions.to(torch.int32)
    expanded, scale = _expanded(call, experts - start, pairs // call.expert_idx.shape[1], positions, total)
    return expanded, row_idx, _expert_tokens(call, counts), scale


def _expanded(
    call: MoeInitRoutingV2, experts: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ``tokens`` at their positions among ``total`` rows, and their scales."""
    rows, row_scale = _quantized(call, experts, tokens)
    expanded = garbage((total, call.x.shape[1]), rows.dtype)
    scale = garbage(() if call.quant_mode == 0 else (total,), torch.float32)
    if call.drop_pad_mode == 1:
        expanded.zero_()
    expanded[positions] = rows
    if row_scale is not None:
        if call.drop_pad_mode == 1:
            scale.zero_()
        scale[positions] = row_scale
    if call.drop_pad_mode == 1:
        expanded = expanded.view(call.expert_num, call.expert_capacity, -1)
    return expanded, scale


def _quantized(
    call: MoeInitRoutingV2, experts: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of ``tokens`` in their final dtype, and the scale that goes with each, if any."""
    rows, scale = call.x[tokens], call.scale
    if call.quant_mode == -1:
        return rows, None if scale is None else scale[tokens]
    values = rows.to(torch.float32)
    if call.quant_mode == 0:
        return round_to_int(values * call.given("scale") + call.given("offset"), INT8).to(torch.int8), None
    if scale is not None:
        values = values * (scale if scale.shape[0] == 1 else scale[experts])
    return quantize_rows(values, INT8)


def _expert_tokens(call: MoeInitRoutingV2, counts: torch.Tensor) -> torch.Tensor:
    if not call.expert_tokens_num_flag:
        return garbage((), torch.int64)
    if call.expert_tokens_num_type == 0:
        return counts.cumsum(0)
    if call.expert_tokens_num_type == 1:
        return counts
    pairs = counts.new_zeros((call.expert_num, 2))
    busy = counts.nonzero().squeeze(1)
    pairs[: busy.numel(), 0] = busy + call.experts[0]
    pairs[: busy.numel(), 1] = counts[busy]
    return pairs
