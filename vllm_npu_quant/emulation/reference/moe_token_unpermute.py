# SPDX-License-Identifier: Apache-2.0
"""npu_moe_token_unpermute: the outputs of the experts, weighted and added up for every token."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.rules.moe_token_unpermute import MoeTokenUnpermute

__all__ = ["npu_moe_token_unpermute"]


def npu_moe_token_unpermute(call: MoeTokenUnpermute) -> torch.Tensor:
    """out[i] = sum_j probs[i, j] * permuted[sorted_indices[i * K + j]], summed in float32; probs None: K = 1, weight 1.

    The rows are read whatever their weight: 0 * NaN is NaN. Indices past the rows add nothing; negative ones are refused.

    Returns:
        [N, H], the dtype of the rows.

    Source: op-plugin torch_npu-npu_moe_token_unpermute.md.
    """
    count = call.permuted_tokens.shape[0]
    source = call.sorted_indices.to(torch.int64).view(-1, call.choices)
    lowest = int(source.min()) if source.numel() else 0
    call.require(lowest >= 0, "sorted_indices", "no negative index", lowest)
    picked = call.permuted_tokens[source.clamp(max=count - 1)].to(torch.float32)
    picked = picked.masked_fill((source >= count).unsqueeze(-1), 0.0)
    if call.probs is not None:
        picked = picked * call.probs.to(torch.float32).unsqueeze(-1)
    return picked.sum(dim=1).to(call.permuted_tokens.dtype)
