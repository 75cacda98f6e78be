# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_moe_token_unpermute."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import FLOATS

__all__ = ["MoeTokenUnpermute"]


@dataclass(eq=False)
class MoeTokenUnpermute(Arguments):
    """The arguments of npu_moe_token_unpermute.

    Attributes:
        permuted_tokens: float16, bfloat16 or float32 [rows, H].
        sorted_indices: int32 [N * K]: the position of every pair, such as npu_moe_init_routing_v2 with row_idx_type 0
            gives them (without -1).
        probs: None, or float16, bfloat16 or float32 [N, K].
    """

    operator = "npu_moe_token_unpermute"

    permuted_tokens: torch.Tensor
    sorted_indices: torch.Tensor
    probs: torch.Tensor | None = None
    padded_mode: bool = False
    restore_shape: list[int] | None = None

    @property
    def choices(self) -> int:
        """K."""
        return 1 if self.probs is None else self.probs.shape[1]

    def check(self) -> None:
        self.require_dtype("permuted_tokens", *FLOATS)
        self.require_dim("permuted_tokens", 2)
        self.require_dtype("sorted_indices", torch.int32)
        self.require_dim("sorted_indices", 1)
        self.require_value("padded_mode", False)
        self.require_absent("padded_mode is False", "restore_shape")
        if self.probs is not None:
            self.require_dtype("probs", *FLOATS)
            self.require_dim("probs", 2)
            self.require(1 <= self.choices <= 512, "probs", "1 to 512 columns")
            self.require_shape("sorted_indices", (self.probs.shape[0] * self.choices,))

    def empty(self) -> torch.Tensor:
        tokens = self.sorted_indices.shape[0] // self.choices
        return self.permuted_tokens.new_empty((tokens, self.permuted_tokens.shape[1]))
