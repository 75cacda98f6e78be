# SPDX-License-Identifier: Apache-2.0
"""npu_moe_init_routing and npu_moe_compute_expert_tokens: tokens sorted by expert, before npu_moe_init_routing_v2."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import garbage
from vllm_npu_quant.emulation.rules.moe_init_routing import MoeComputeExpertTokens, MoeInitRouting

__all__ = ["npu_moe_compute_expert_tokens", "npu_moe_init_routing"]


def npu_moe_init_routing(call: MoeInitRouting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs of token and expert by expert, stably, and copy the tokens in that order.

    With (experts, rows) = stable sort of expert_idx, row_idx by expert: expanded_x[p] = x[rows[p] % N],
    expanded_row_idx[rows[p]] = p, expanded_expert_idx[p] = experts[p].

    Returns:
        expanded_x: [min(N, active_num) * K, H]. expanded_row_idx, expanded_expert_idx: int32 [N * K].

    Source: op-plugin torch_npu-npu_moe_init_routing.md, test_npu_moe_init_routing.py.
    """
    tokens, choices = call.row_idx.shape
    experts, order = torch.sort(call.expert_idx.flatten(), stable=True)
    rows = call.row_idx.flatten()[order].to(torch.int64)
    position = garbage((rows.numel(),), torch.int32)
    position[rows] = torch.arange(rows.numel(), dtype=torch.int32)
    taken = rows[: min(tokens, call.active_num) * choices]
    return call.x[taken % tokens], position, experts


def npu_moe_compute_expert_tokens(call: MoeComputeExpertTokens) -> torch.Tensor:
    """Running totals of the rows of every expert: int32 [num_expert], out[e] = number of rows with an expert <= e.

    Source: op-plugin torch_npu-npu_moe_compute_expert_tokens.md.
    """
    experts = torch.arange(call.num_expert, dtype=torch.int32)
    return torch.searchsorted(call.sorted_expert_for_source_row.contiguous(), experts, right=True, out_int32=True)
