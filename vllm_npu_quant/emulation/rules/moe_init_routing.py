# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_moe_init_routing and npu_moe_compute_expert_tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import FLOATS

__all__ = ["MoeComputeExpertTokens", "MoeInitRouting"]


@dataclass(eq=False)
class MoeInitRouting(Arguments):
    """The arguments of npu_moe_init_routing.

    Attributes:
        x: float16, bfloat16 or float32 [N, H].
        row_idx: int32 [N, K]: the numbers of the pairs, column-major: j * N + i for choice j of token i.
        expert_idx: int32 [N, K].
        active_num: at most this many tokens' worth of rows are returned.
    """

    operator = "npu_moe_init_routing"

    x: torch.Tensor
    row_idx: torch.Tensor
    expert_idx: torch.Tensor
    active_num: int

    def check(self) -> None:
        self.require_dtype("x", *FLOATS)
        self.require_dim("x", 2)
        for argument in ("row_idx", "expert_idx"):
            self.require_dtype(argument, torch.int32)
            self.require_dim(argument, 2)
            self.require_shape(argument, (self.x.shape[0], self.row_idx.shape[1]))
        self.require(self.active_num >= 0, "active_num", "0 or greater")

    def empty(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, choices = self.row_idx.shape
        rows = self.x.new_empty((min(tokens, self.active_num) * choices, self.x.shape[1]))
        return rows, self.row_idx.new_empty((tokens * choices,)), self.row_idx.new_empty((tokens * choices,))


@dataclass(eq=False)
class MoeComputeExpertTokens(Arguments):
    """The arguments of npu_moe_compute_expert_tokens.

    Attributes:
        sorted_expert_for_source_row: int32 [N * K], sorted: the third output of npu_moe_init_routing.
    """

    operator = "npu_moe_compute_expert_tokens"

    sorted_expert_for_source_row: torch.Tensor
    num_expert: int

    def check(self) -> None:
        self.require_dtype("sorted_expert_for_source_row", torch.int32)
        self.require_dim("sorted_expert_for_source_row", 1)
        self.require(self.num_expert >= 1, "num_expert", "1 or greater")

    def empty(self) -> torch.Tensor:
        return self.sorted_expert_for_source_row.new_empty((self.num_expert,))
