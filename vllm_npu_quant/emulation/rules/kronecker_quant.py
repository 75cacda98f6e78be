# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_kronecker_quant."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import HALVES, INT4_PER_INT32

__all__ = ["KroneckerQuant"]


@dataclass(eq=False)
class KroneckerQuant(Arguments):
    """The arguments of npu_kronecker_quant.

    Attributes:
        x: float16 or bfloat16 [K, M, N] (K tokens); M and N at most 256, 8 divides N.
        kronecker_p1: the same dtype [M, M]. kronecker_p2: the same dtype [N, N].
        clip_ratio: None (1.0) or a number in (0, 1].
        dst_dtype: None or torch.int32.
    """

    operator = "npu_kronecker_quant"

    x: torch.Tensor
    kronecker_p1: torch.Tensor
    kronecker_p2: torch.Tensor
    clip_ratio: float | None = None
    dst_dtype: int | None = None
    dst_type_max: float | None = None

    def check(self) -> None:
        self.require_dtype("x", *HALVES)
        self.require_dim("x", 3)
        tokens, rows, columns = self.x.shape
        self.require(1 <= tokens <= 262144, "x", "a first dimension of 1 to 262144")
        self.require(rows <= 256 and columns <= 256, "x", "last dimensions of at most 256")
        self.require(columns % INT4_PER_INT32 == 0, "x", "a last dimension that 8 divides")
        for argument, size in (("kronecker_p1", rows), ("kronecker_p2", columns)):
            self.require_dtype(argument, self.x.dtype)
            self.require_shape(argument, (size, size))
        in_range = self.clip_ratio is None or 0 < self.clip_ratio <= 1
        self.require(in_range, "clip_ratio", "None or a number in (0, 1]")
        self.require_value("dst_dtype", None, 3)
        self.require(not self.dst_type_max, "dst_type_max", "None or 0.0")

    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, rows, columns = self.x.shape
        packed = self.x.new_empty((tokens, rows, columns // INT4_PER_INT32), dtype=torch.int32)
        return packed, self.x.new_empty((tokens,), dtype=torch.float32)
