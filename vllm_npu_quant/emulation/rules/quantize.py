# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import FLOATS, INT4, INT4_PER_INT32, INT8, PACKED_INT4

__all__ = ["Quantize"]

_INT32: Final = (-(2**31), 2**31 - 1)
#: dtype code -> (dtype of the output, limits). int8 = 1, int32 = 3, qint8 = 12, quint8 = 13, qint32 = 14.
_MULTIPLYING = {1: (torch.int8, INT8), 12: (torch.int8, INT8), PACKED_INT4: (torch.int32, INT4)}
_DIVIDING = {
    12: (torch.int8, INT8),
    13: (torch.uint8, (0, 255)),
    3: (torch.int32, _INT32),
    14: (torch.int32, _INT32),
}


@dataclass(eq=False)
class Quantize(Arguments):
    """The arguments of npu_quantize.

    Attributes:
        input: float16, bfloat16 or float32, 1 to 8 dimensions.
        scales: div_mode=True: float32 or bfloat16, [1] or [input.shape[axis]]. div_mode=False: the input's dtype; [1],
            [size of the axis], or the input's number of dimensions with 1 everywhere but at the axis.
        zero_points: None, or the shape of ``scales``. div_mode=True: int8, uint8, int32 or bfloat16. div_mode=False:
            the input's dtype.
        dtype: div_mode=True: torch.qint8, torch.quint8 or torch.int32 (qint32). div_mode=False: torch.qint8 or int8, or
            torch.quint4x2 (eight integers of the last dimension in one int32).
        axis: div_mode=True: the scales' dimension. div_mode=False: -2 means rows, every other value the last dimension.
    """

    operator = "npu_quantize"

    input: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    dtype: int
    axis: int = 1
    div_mode: bool = True

    @property
    def packed(self) -> bool:
        return self.dtype == PACKED_INT4

    @property
    def dim(self) -> int:
        """The dimension that the scales run along, not negative."""
        if self.div_mode:
            return self.axis % self.input.dim()
        # The interface keeps only axis=-2; every other value means the last dimension.
        return self.input.dim() + (self.axis if self.axis == -2 else -1)

    @property
    def output(self) -> tuple[torch.dtype, tuple[int, int]]:
        """The output's dtype, and the limits of its integers."""
        table = _DIVIDING if self.div_mode else _MULTIPLYING
        if self.dtype not in table:
            names = "qint8, quint8, int32" if self.div_mode else "int8, qint8, quint4x2"
            self.refuse("dtype", f"{names} with div_mode={self.div_mode}")
        return table[self.dtype]

    def check(self) -> None:
        x, axis = self.input, self.axis
        self.require_dtype("input", *FLOATS)
        self.require_dim("input", 1, 8)
        _ = self.output
        if self.div_mode:
            self.require(-x.dim() <= axis < x.dim(), "axis", f"a dimension of {list(x.shape)}")
            self.require_dtype("scales", torch.float32, torch.bfloat16)
            self.require_dtype("zero_points", torch.int8, torch.uint8, torch.int32, torch.bfloat16)
            self.require_shape("zero_points", self.scales.shape)
            self.require_shape("scales", (1,), (x.shape[self.dim],))
        else:
            self.require(axis >= -2, "axis", "-2 or greater")
            self.require(axis != -2 or x.dim() >= 2, "axis", "-1 for a 1-D input")
            self.require_dtype("scales", x.dtype)
            self.require_dtype("zero_points", x.dtype)
            self.require_shape("zero_points", self.scales.shape)
            ones = [1] * x.dim()
            along = list(ones)
            along[self.dim] = x.shape[self.dim]
            self.require_shape("scales", (1,), (x.shape[self.dim],), ones, along)
        if self.packed:
            self.require(x.shape[-1] % INT4_PER_INT32 == 0, "input", "a last dimension that 8 divides for quint4x2")

    def empty(self) -> torch.Tensor:
        shape = list(self.input.shape)
        if self.packed:
            shape[-1] //= INT4_PER_INT32
        return self.input.new_empty(shape, dtype=self.output[0])
