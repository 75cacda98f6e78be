# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_moe_init_routing_v2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import FLOATS

__all__ = ["MoeInitRoutingV2"]


@dataclass(eq=False)
class MoeInitRoutingV2(Arguments):
    """The arguments of npu_moe_init_routing_v2.

    Attributes:
        x: float16, bfloat16, float32 or (not quantized) int8 [N, H].
        expert_idx: int32 [N, K].
        scale: float32; quant_mode -1: [N], copied along with the rows; 0: [1]; 1: None, [experts in range, H] or
            [1, H].
        offset: float32 [1], for quant_mode 0.
        active_num: -1, 0 or at least N * K: all rows. (Less is not emulated.)
        drop_pad_mode: 0; or 1: every expert gets expert_capacity rows, further pairs are dropped, gaps are zero.
        expert_tokens_num_type: 0: running totals, 1: counts, 2: pairs of expert and count, the non-empty ones first.
        quant_mode: -1 none, 0 static, 1 dynamic.
        row_idx_type: 0: where each pair went (-1: nowhere); 1: which pair is in each row.
    """

    operator = "npu_moe_init_routing_v2"

    x: torch.Tensor
    expert_idx: torch.Tensor
    _: KW_ONLY
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    active_num: int = -1
    expert_capacity: int = -1
    expert_num: int = -1
    drop_pad_mode: int = 0
    expert_tokens_num_type: int = 0
    expert_tokens_num_flag: bool = False
    quant_mode: int = -1
    active_expert_range: Sequence[int] = ()
    row_idx_type: int = 0
    x_dtype: int | None = None

    @property
    def experts(self) -> tuple[int, int]:
        """The range of experts that count: first, end."""
        start, end = self.active_expert_range or (0, self.expert_num)
        return start, end

    def check(self) -> None:
        self.require_absent("only Ascend 950 has it", "x_dtype")
        self.require_value("quant_mode", -1, 0, 1)
        self.require_dtype("x", *((*FLOATS, torch.int8) if self.quant_mode == -1 else FLOATS))
        self.require_dim("x", 2)
        self.require_dtype("expert_idx", torch.int32)
        self.require_dim("expert_idx", 2)
        self.require_shape("expert_idx", (self.x.shape[0], self.expert_idx.shape[1]))
        self.require(1 <= self.expert_num <= 10240, "expert_num", "1 to 10240")
        self.require_value("drop_pad_mode", 0, 1)
        self.require_value("expert_tokens_num_type", 0, 1, 2)
        self.require_value("row_idx_type", 0, 1)
        given = list(self.active_expert_range)
        self.require(len(given) in (0, 2), "active_expert_range", "[] or [start, end]", given)
        start, end = self.experts
        within = 0 <= start < end <= self.expert_num
        self.require(within, "active_expert_range", f"a range within [0, {self.expert_num}]", given)
        self._check_rows()
        self._check_quantization()

    def _check_rows(self) -> None:
        tokens, pairs = self.x.shape[0], self.expert_idx.shape[0] * self.expert_idx.shape[1]
        if self.drop_pad_mode == 1:
            capacity = 1 <= self.expert_capacity <= tokens
            self.require(capacity, "expert_capacity", f"1 to {tokens}, since drop_pad_mode is 1")
            whole, given = self.experts == (0, self.expert_num), list(self.active_expert_range)
            self.require(whole, "active_expert_range", "all experts, since drop_pad_mode is 1", given)
            self.require_value("row_idx_type (drop_pad_mode 1)", 0)
            self.require_value("expert_tokens_num_type (drop_pad_mode 1)", 1)
        else:
            # The device's treatment of rows that active_num cuts off is not documented.
            everything = self.active_num in (-1, 0) or self.active_num >= pairs
            self.require(everything, "active_num", f"-1, 0, or all of {pairs} rows")

    def _check_quantization(self) -> None:
        (tokens, width), (start, end) = self.x.shape, self.experts
        shapes: dict[int, list[tuple[int, ...]]] = {-1: [(tokens,)], 0: [(1,)], 1: [(end - start, width), (1, width)]}
        self.require_dtype("scale", torch.float32)
        self.require_shape("scale", *shapes[self.quant_mode])
        if self.quant_mode == 0:
            self.given("scale", "a tensor, for static quantization")
            self.given("offset", "a tensor, for static quantization")
            self.require_dtype("offset", torch.float32)
            self.require_shape("offset", (1,))
        else:
            self.require_absent("only static quantization has one", "offset")

    def empty(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x, (start, end) = self.x, self.experts
        pairs = self.expert_idx.shape[0] * self.expert_idx.shape[1]
        shape: tuple[int, ...] = (pairs, x.shape[1])
        rows = pairs
        if self.drop_pad_mode == 1:
            shape = (self.expert_num, self.expert_capacity, x.shape[1])
            rows = self.expert_num * self.expert_capacity
        tokens: tuple[int, ...] = ()
        if self.expert_tokens_num_flag:
            tokens = (self.expert_num, 2) if self.expert_tokens_num_type == 2 else (end - start,)
        return (
            x.new_empty(shape, dtype=x.dtype if self.quant_mode == -1 else torch.int8),
            x.new_empty((pairs,), dtype=torch.int32),
            x.new_empty(tokens, dtype=torch.int64),
            x.new_empty(() if self.quant_mode == 0 else (rows,), dtype=torch.float32),
        )
