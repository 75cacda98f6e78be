# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_dequant_swiglu_quant."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import FLOATS, HALVES

__all__ = ["DequantSwigluQuant"]


@dataclass(eq=False)
class DequantSwigluQuant(Arguments):
    """The arguments of npu_dequant_swiglu_quant.

    Attributes:
        x: int32, float16 or bfloat16 [M, 2H].
        weight_scale: float32 [G, 2H]; without group_index [2H] or [1, 2H].
        activation_scale: float32 [M] or [M, 1], required for int32 x.
        bias: [2H], int32 or a float; only without group_index.
        quant_scale: float [G, H]; without group_index [H] or [1, H]. Static: float32, also one number per group.
        quant_offset: like quant_scale; only static and without group_index.
        group_index: int64 [G], COUNTS of rows; rows past their sum are garbage in both outputs.
        quant_mode: 0 static, 1 dynamic.
    """

    operator = "npu_dequant_swiglu_quant"

    x: torch.Tensor
    _: KW_ONLY
    weight_scale: torch.Tensor | None = None
    activation_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    quant_scale: torch.Tensor | None = None
    quant_offset: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    activate_left: bool = False
    quant_mode: int = 0
    dst_type: int | None = None
    round_mode: int | None = None
    activate_dim: int | None = None
    swiglu_mode: int = 0
    clamp_limit: float = 7.0
    glu_alpha: float = 1.702
    glu_bias: float = 1.0

    @property
    def groups(self) -> int:
        return 1 if self.group_index is None else self.group_index.shape[0]

    def check(self) -> None:
        self.require_dim("x", 2)
        self.require_dtype("x", torch.int32, *HALVES)
        columns = self.x.shape[1]
        self.require(columns % 2 == 0, "x", "an even last dimension")
        self.require_value("quant_mode", 0, 1)
        self.require_value("swiglu_mode", 0, 1, 2)
        self.require_value("dst_type", None, 1)
        self.require_value("round_mode", None, 0)
        self.require_value("activate_dim", None, -1, 1)
        if self.group_index is not None:
            self.require_dtype("group_index", torch.int64)
            self.require_dim("group_index", 1)
            self.require(self.groups > 0, "group_index", "at least one group")
            self.require_absent("group_index is given", "bias", "quant_offset")
            # aclnnDequantSwigluQuant limits the activated half; the tile of a row has to fit on the chip.
            self.require(columns // 2 <= 10496, "x", "at most 2 * 10496 columns with group_index")
        self._check_dequantization()
        self._check_quantization()

    def _grouped_shapes(self, size: int) -> list[tuple[int, ...]]:
        return [(size,), (1, size)] if self.group_index is None else [(self.groups, size)]

    def _check_dequantization(self) -> None:
        if self.x.dtype != torch.int32:
            self.require_absent("x is a float", "weight_scale", "activation_scale", "bias")
            return
        rows, columns = self.x.shape
        self.given("activation_scale", "a tensor, for int32 x")
        self.require_dtype("activation_scale", torch.float32)
        self.require_shape("activation_scale", (rows,), (rows, 1))
        self.require_dtype("weight_scale", torch.float32)
        self.require_shape("weight_scale", *self._grouped_shapes(columns))
        self.require_dtype("bias", torch.int32, torch.float32, *HALVES)
        self.require_shape("bias", (columns,))

    def _check_quantization(self) -> None:
        shapes = self._grouped_shapes(self.x.shape[1] // 2)
        if self.quant_mode == 0:
            self.given("quant_scale", "a tensor, for static quantization")
            self.require_dtype("quant_scale", torch.float32)
            shapes += [(self.groups, 1), (self.groups,)]
        else:
            self.require_absent("quantization is dynamic", "quant_offset")
        self.require_dtype("quant_scale", *FLOATS)
        self.require_shape("quant_scale", *shapes)
        if self.quant_offset is not None:
            self.require_dtype("quant_offset", *FLOATS)
            self.require_shape("quant_offset", self.given("quant_scale").shape)

    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.x.shape
        out = self.x.new_empty((rows, columns // 2), dtype=torch.int8)
        return out, self.x.new_empty((rows,), dtype=torch.float32)
