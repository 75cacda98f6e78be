# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_swiglu."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import FLOATS

__all__ = ["Swiglu"]


@dataclass(eq=False)
class Swiglu(Arguments):
    """The arguments of npu_swiglu.

    Attributes:
        input: float16, bfloat16 or float32; the size of ``dim`` is even.
    """

    operator = "npu_swiglu"

    input: torch.Tensor
    dim: int = -1

    def check(self) -> None:
        x, dim = self.input, self.dim
        self.require_dtype("input", *FLOATS)
        self.require(x.dim() >= 1 and -x.dim() <= dim < x.dim(), "dim", f"a dimension of {list(x.shape)}")
        self.require(x.shape[dim] % 2 == 0, "input", f"an even size in dimension {dim}")

    def empty(self) -> torch.Tensor:
        shape = list(self.input.shape)
        shape[self.dim] //= 2
        return self.input.new_empty(shape)
