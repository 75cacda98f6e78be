# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_dynamic_quant and npu_dynamic_quant_asymmetric."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import HALVES, INT4, INT4_PER_INT32, INT8, PACKED_INT4

__all__ = ["DynamicQuant", "DynamicQuantAsymmetric"]


@dataclass(eq=False)
class DynamicQuant(Arguments):
    """The arguments of npu_dynamic_quant.

    Attributes:
        input: float16 or bfloat16, 2 to 8 dimensions [..., H].
        smooth_scales: None, or the input's dtype: [H]; with group_index [G, H].
        group_index: int32 [G], running totals of rows; the last is the number of rows.
        dst_type: None or torch.int8; torch.quint4x2 packs eight int4 of the last dimension into one int32.
    """

    operator = "npu_dynamic_quant"

    input: torch.Tensor
    _: KW_ONLY
    smooth_scales: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    dst_type: int | None = None
    quant_mode: str = "pertoken"
    dst_type_max: float = 0.0

    @property
    def packed(self) -> bool:
        return self.dst_type == PACKED_INT4

    @property
    def limits(self) -> tuple[int, int]:
        return INT4 if self.packed else INT8

    def check(self) -> None:
        # The Meta kernel takes float32 and 1-D inputs; the device does not.
        self.require_dtype("input", *HALVES)
        self.require_dim("input", 2, 8)
        self.require_value("quant_mode", "pertoken")
        self.require_value("dst_type_max", 0.0)
        self.require(self.dst_type in (None, 1, PACKED_INT4), "dst_type", "None, torch.int8 or torch.quint4x2")
        width = self.input.shape[-1]
        if self.packed:
            self.require(width % INT4_PER_INT32 == 0, "input", "a last dimension that 8 divides for quint4x2")
        self.require_dtype("smooth_scales", self.input.dtype)
        if self.group_index is None:
            self.require_shape("smooth_scales", (width,))
            return
        self.given("smooth_scales", "a tensor, since group_index is given")
        self.require_dtype("group_index", torch.int32)
        self.require_dim("group_index", 1)
        groups = self.group_index.shape[0]
        self.require_shape("smooth_scales", (groups, width))
        self.require(groups <= 1024, "group_index", "at most 1024 groups")

    def empty(self) -> tuple[torch.Tensor, ...]:
        return self._empty_y(), self._empty_parameter()

    def _empty_y(self) -> torch.Tensor:
        if not self.packed:
            return self.input.new_empty(self.input.shape, dtype=torch.int8)
        shape = (*self.input.shape[:-1], self.input.shape[-1] // INT4_PER_INT32)
        return self.input.new_empty(shape, dtype=torch.int32)

    def _empty_parameter(self) -> torch.Tensor:
        return self.input.new_empty(self.input.shape[:-1], dtype=torch.float32)


class DynamicQuantAsymmetric(DynamicQuant):
    """The arguments of npu_dynamic_quant_asymmetric: those of npu_dynamic_quant."""

    operator = "npu_dynamic_quant_asymmetric"

    def empty(self) -> tuple[torch.Tensor, ...]:
        return self._empty_y(), self._empty_parameter(), self._empty_parameter()
