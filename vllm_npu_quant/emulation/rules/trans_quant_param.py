# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_trans_quant_param."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments

__all__ = ["TransQuantParam"]


@dataclass(eq=False)
class TransQuantParam(Arguments):
    """The arguments of npu_trans_quant_param.

    Attributes:
        scale: float32 [n] or [1, n], contiguous.
        offset: None or float32 of as many dimensions; 1-D scale and offset of size 1 are broadcast against each other.
        round_mode: 0 truncates the scale to 19 bits; 1 rounds half to even, and denormals become zero.
    """

    operator = "npu_trans_quant_param"

    scale: torch.Tensor
    offset: torch.Tensor | None = None
    round_mode: int | None = 0

    @property
    def shape(self) -> list[int]:
        """The shape of the output."""
        shape = list(self.scale.shape)
        if self.offset is not None:
            shape[-1] = max(self.scale.shape[-1], self.offset.shape[-1])
        return shape

    def check(self) -> None:
        scale, offset = self.scale, self.offset
        self.require_value("round_mode", 0, 1, None)
        self.require_dtype("scale", torch.float32)
        row = scale.dim() == 1 or (scale.dim() == 2 and scale.shape[0] == 1)
        self.require(row, "scale", "shape [n] or [1, n]")
        self.require_contiguous("scale", "a contiguous tensor")
        self.require(scale.shape[-1] > 0, "scale", "at least one element")
        if offset is not None:
            self.require_dtype("offset", torch.float32)
            self.require_contiguous("offset", "a contiguous tensor")
            self.require_dim("offset", scale.dim())
            if scale.dim() == 2 or (scale.shape[0] != 1 and offset.shape[0] != 1):
                self.require_shape("offset", scale.shape)

    def empty(self) -> torch.Tensor:
        return self.scale.new_empty(self.shape, dtype=torch.int64)
