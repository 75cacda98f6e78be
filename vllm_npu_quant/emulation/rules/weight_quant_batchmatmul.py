# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_weight_quant_batchmatmul."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import HALVES, INT4_PER_INT32

__all__ = ["WeightQuantBatchmatmul"]

MAX_INNER_SIZE = 65535


@dataclass(eq=False)
class WeightQuantBatchmatmul(Arguments):
    """The arguments of npu_weight_quant_batchmatmul.

    Attributes:
        x: float16 or bfloat16 [M, K], contiguous or transposed.
        weight: int8 [K, N], contiguous or transposed; or int4 packed in int32, [K, N/8], or [N, K/8] transposed.
        antiquant_scale: the dtype of x. [1] or [1, 1]: per tensor; [N] or [1, N]: per channel; [ceil(K / g), N] with
            antiquant_group_size = g: per group along K, the last group may be short.
        antiquant_offset: None, or like antiquant_scale.
        quant_scale: None, or float32 or int64 (npu_trans_quant_param) [1], [N] or [1, N].
        quant_offset: None, or float32 like quant_scale; with an int64 quant_scale the offset inside it counts.
        bias: None; float32 (bfloat16 x) or float16 (float16 x), [N] or [1, N], contiguous.
        antiquant_group_size: 0, or a multiple of 32 in [32, K - 1]: never K.
        inner_precise: 0 or 1; the emulation computes both alike.
    """

    operator = "npu_weight_quant_batchmatmul"

    x: torch.Tensor
    weight: torch.Tensor
    antiquant_scale: torch.Tensor
    antiquant_offset: torch.Tensor | None = None
    quant_scale: torch.Tensor | None = None
    quant_offset: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    antiquant_group_size: int = 0
    inner_precise: int = 0
    weight_dtype: int | None = None

    @property
    def packed_along_n(self) -> bool | None:
        """Whether an int4 weight is [K, N/8], or the transposed view [K/8, N]; None for int8."""
        # A view [1, N] of [N, 1] is contiguous too and is read as [K, N/8]: the device refuses such a weight.
        return self.weight.is_contiguous() if self.weight.dtype == torch.int32 else None

    @property
    def width(self) -> int:
        """N."""
        return self.weight.shape[1] * (INT4_PER_INT32 if self.packed_along_n else 1)

    @property
    def out_dtype(self) -> torch.dtype:
        return self.x.dtype if self.quant_scale is None else torch.int8

    def check(self) -> None:
        self.require_absent("only Ascend 950 has it", "weight_dtype")
        self.require_value("inner_precise", 0, 1)
        self.require_dtype("x", *HALVES)
        self.require_dim("x", 2)
        self.require_dtype("weight", torch.int8, torch.int32)
        self.require_dim("weight", 2)
        for argument, tensor in (("x", self.x), ("weight", self.weight)):
            self.require(tensor.numel() > 0, argument, "a tensor with elements")
            self.require_plain_or_transposed(argument)
        depth, rows = self.x.shape[1], self.weight.shape[0]
        if self.packed_along_n is None:
            self.require(rows == depth, "weight", f"{depth} rows, the depth of x")
        elif self.packed_along_n:
            self.require(rows == depth, "weight", f"[{depth}, N/8] (int4 packed along N)")
        else:
            self.require(rows * INT4_PER_INT32 == depth, "weight", f"[N, {depth}/8] transposed")
        for argument, size in (("x", depth), ("weight", self.width)):
            self.require(size <= MAX_INNER_SIZE, argument, f"K and N of at most {MAX_INNER_SIZE}", size)
        self._check_dequantization()
        self._check_requantization()

    def _check_dequantization(self) -> None:
        depth, width, size = self.x.shape[1], self.width, self.antiquant_group_size
        # The int64 form of antiquant_scale (float16 x, transposed int8 weight, M <= 96) is not emulated.
        self.require_dtype("antiquant_scale", self.x.dtype)
        if size:
            multiple = size % 32 == 0 and 32 <= size <= depth - 1
            self.require(multiple, "antiquant_group_size", f"0, or a multiple of 32 in [32, K - 1 = {depth - 1}]")
            self.require_shape("antiquant_scale", ((depth + size - 1) // size, width))
        else:
            self.require_shape("antiquant_scale", (1,), (1, 1), (width,), (1, width))
        self.require_dtype("antiquant_offset", self.x.dtype)
        self.require_shape("antiquant_offset", self.antiquant_scale.shape)
        self.require_dtype("bias", torch.float32 if self.x.dtype == torch.bfloat16 else torch.float16)
        self.require_shape("bias", (width,), (1, width))
        self.require_contiguous("bias")

    def _check_requantization(self) -> None:
        self.require_dtype("quant_scale", torch.float32, torch.int64)
        self.require_shape("quant_scale", (1,), (self.width,), (1, self.width))
        if self.quant_offset is not None:
            if self.quant_scale is None:
                self.refuse("quant_offset", "None, since there is no quant_scale")
            self.require_dtype("quant_offset", torch.float32)
            self.require_shape("quant_offset", self.quant_scale.shape)

    def empty(self) -> torch.Tensor:
        return self.x.new_empty((self.x.shape[0], self.width), dtype=self.out_dtype)
