# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_quant_matmul."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from enum import Enum

import torch

from vllm_npu_quant.emulation.checks import Arguments, dtype_name
from vllm_npu_quant.emulation.numerics import DTYPE_OF_CODE, HALVES, INT4_PER_INT32

__all__ = ["GROUP_SIZE", "Form", "QuantMatmul"]

MAX_INNER_SIZE = 65535
GROUP_SIZE = 256


class Form(Enum):
    """Operand types of a product."""

    INT8 = "int8 x int8"
    INT4 = "int4 x int4"
    INT4_GROUPED = "int4 x int4, a scale for every 256 inputs"
    INT8_INT4 = "int8 x int4, a scale for every 256 inputs"


@dataclass(eq=False)
class QuantMatmul(Arguments):
    """The arguments of npu_quant_matmul.

    Attributes:
        x1: int8 [..., M, K] (2 to 6 dimensions), or int4 packed in int32 [M, K/8].
        x2: int8 [..., K, N]; or int4 packed in int32: contiguous [K, N/8], or [N, K/8] transposed. int8 may be a
            transposed view too.
        scale: [1] or [N], float32, bfloat16 or int64 (npu_trans_quant_param); float32 [K/256, N] (int4 groups); int64
            [K/256, N] holding float32 bits (int8 x int4).
        offset: float32 [1] or [N], for an int8 output; with an int64 scale the offset inside the scale counts. float16
            like the scale (int4 groups). float32 [N] (int8 x int4).
        pertoken_scale: float32 [M]; [M, 1] with groups.
        bias: int32, or float32, float16 or bfloat16 if the table of ``_check_combination`` allows it; [N], or
            [batch, 1, N] for a 3-D output.
        output_dtype: None or torch.int8, torch.float16, torch.bfloat16, torch.int32.
        group_sizes: None; [0, 0, 256] or [1, 1, 256] with groups.
    """

    operator = "npu_quant_matmul"

    x1: torch.Tensor
    x2: torch.Tensor
    scale: torch.Tensor
    _: KW_ONLY
    offset: torch.Tensor | None = None
    pertoken_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    output_dtype: int | None = None
    x1_dtype: int | None = None
    x2_dtype: int | None = None
    pertoken_scale_dtype: int | None = None
    scale_dtype: int | None = None
    group_sizes: list[int] | None = None
    y_scale: torch.Tensor | None = None

    @property
    def form(self) -> Form:
        if self.x1.dtype == torch.int8 and self.x2.dtype == torch.int32:
            return Form.INT8_INT4
        if any(self.group_sizes or ()) or self.scale.dim() == 2:
            return Form.INT4_GROUPED
        return Form.INT8 if self.x1.dtype == torch.int8 else Form.INT4

    @property
    def out_dtype(self) -> torch.dtype:
        dtype = torch.int8 if self.output_dtype is None else DTYPE_OF_CODE.get(self.output_dtype)
        if dtype not in (torch.int8, torch.int32, *HALVES):
            self.refuse("output_dtype", "None, int8, float16, bfloat16 or int32", dtype or self.output_dtype)
        return dtype

    @property
    def depth(self) -> int:
        """K."""
        return self.x1.shape[-1] * (INT4_PER_INT32 if self.x1.dtype == torch.int32 else 1)

    @property
    def packed_along_n(self) -> bool:
        """Whether an int4 weight is packed along N ([K, N/8]); else it is the transposed view [K/8, N] of [N, K/8]."""
        return self.x2.dtype == torch.int32 and self.x2.is_contiguous() and self.x2.shape[0] == self.depth

    @property
    def width(self) -> int:
        """N."""
        return self.x2.shape[-1] * (INT4_PER_INT32 if self.packed_along_n else 1)

    @property
    def out_shape(self) -> list[int]:
        if self.form is not Form.INT8:
            return [self.x1.shape[0], self.width]
        batch = self.x1.shape[:-2]
        try:
            return [*torch.broadcast_shapes(batch, self.x2.shape[:-2]), self.x1.shape[-2], self.width]
        except RuntimeError:
            self.refuse("x2", f"leading dimensions that broadcast with {list(batch)}")

    def check(self) -> None:
        reserved = ("x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "y_scale")
        self.require_absent("only Ascend 950 has it", *reserved)
        _ = self.out_dtype
        self.require_dtype("x1", torch.int8, torch.int32)
        self.require_dtype("x2", torch.int32 if self.x1.dtype == torch.int32 else torch.int8, torch.int32)
        self.require_dim("x1", 2, 6)
        self.require_dim("x2", 2, 6)
        for argument, tensor in (("x1", self.x1), ("x2", self.x2)):
            self.require(tensor.numel() > 0, argument, "a tensor with elements")
            self.require_plain_or_transposed(argument, "contiguous memory, or the last two dims swapped")
            inner = tensor.shape[-1] if tensor.is_contiguous() else tensor.shape[-2]
            self.require(inner <= MAX_INNER_SIZE, argument, f"at most {MAX_INNER_SIZE} in the innermost dimension")
        # The Meta kernel takes a float16 scale; no kernel of the device does.
        self.require_dtype("scale", torch.float32, torch.bfloat16, torch.int64)
        if self.form is Form.INT8_INT4:
            self._check_int8_int4()
        elif self.form is Form.INT4_GROUPED:
            self._check_int4_grouped()
        else:
            self._check_channels()

    def _check_channels(self) -> None:
        """INT8 and INT4: scales per tensor or per channel."""
        if self.form is Form.INT8:
            self.require(self.x2.shape[-2] == self.depth, "x2", f"{self.depth} rows, the depth of x1")
        else:
            self._check_int4_operands()
        shape, width = self.out_shape, self.width
        self.require_shape("scale", (1,), (width,))
        self.require_dtype("pertoken_scale", torch.float32)
        self.require_shape("pertoken_scale", (self.x1.shape[-2],))
        self.require_shape("bias", *([(width,)] if len(shape) != 3 else [(width,), (shape[0], 1, width)]))
        self.require_dtype("offset", torch.float32)
        self.require_shape("offset", (1,), (width,))
        self._check_combination()

    def _check_combination(self) -> None:
        """The dtype table of op-plugin's document and aclnnQuantMatmulV5.md (A2/A3, T-C, T-T, K-C and K-T rows)."""
        i32, i64, f16, bf16, f32 = torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32
        per_token, out = self.pertoken_scale is not None, self.out_dtype
        scales: dict[tuple[torch.dtype, bool], tuple[torch.dtype, ...]]
        biases: dict[tuple[torch.dtype, bool], tuple[torch.dtype, ...]]
        scales = {(f16, False): (f32, i64), (f16, True): (f32,), (bf16, True): (f32, bf16)}
        biases = {(f16, False): (i32,), (f16, True): (i32, f16, f32), (bf16, True): (i32, bf16, f32)}
        if self.form is Form.INT8:
            scales |= {(torch.int8, False): (f32, i64), (bf16, False): (f32, bf16), (i32, False): (f32, bf16)}
            biases |= {(torch.int8, False): (i32,), (bf16, False): (i32, bf16, f32), (i32, False): (i32,)}
        key = (out, per_token)
        if key not in scales:
            wanted = " or ".join(sorted({dtype_name(dtype) for dtype, has in scales if has == per_token}))
            which = "with" if per_token else "without"
            self.refuse("output_dtype", f"{wanted} ({self.form.value} {which} pertoken_scale)", out)
        self.require_dtype(f"scale (for a {dtype_name(out)} output)", *scales[key])
        self.require_dtype(f"bias (for a {dtype_name(out)} output)", *biases[key])
        if out is not torch.int8 and self.offset is not None:
            self.refuse("offset", "None unless the output is int8")

    def _check_int4_operands(self) -> None:
        self.require_dim("x1", 2)
        self.require_dim("x2", 2)
        self.require_contiguous("x1")
        transposed = self.x2.t().is_contiguous() and self.x2.shape[0] * INT4_PER_INT32 == self.depth
        expected = f"contiguous [{self.depth}, N/8], or [N, {self.x1.shape[-1]}] transposed"
        self.require(self.packed_along_n or transposed, "x2", expected)

    def _check_int4_grouped(self) -> None:
        self.require_dtype("x1 (scale is 2-D or group_sizes is set)", torch.int32)
        if self.group_sizes is None or list(self.group_sizes) not in ([0, 0, GROUP_SIZE], [1, 1, GROUP_SIZE]):
            self.refuse("group_sizes", f"[0, 0, {GROUP_SIZE}] or [1, 1, {GROUP_SIZE}]")
        self._check_int4_operands()
        transposed = f"[N, {self.depth // 8}] transposed: the grouped kernel reads no other"
        self.require(not self.packed_along_n, "x2", transposed)
        self.require(self.depth % 1024 == 0, "x1", "a depth that 1024 divides")
        self.require(self.width % 256 == 0, "x2", "a width that 256 divides")
        self.require_dtype("scale", torch.float32)
        self._check_groups("a tensor, since scale is 2-D")
        self.require_dtype("offset", torch.float16)
        self.require_shape("offset", self.scale.shape)
        self._check_grouped_output("scale is 2-D")

    def _check_int8_int4(self) -> None:
        self.require_dim("x1", 2)
        self.require_dim("x2", 2)
        self.require_contiguous("x1")
        self.require_contiguous("x2", "contiguous [K, N/8]")
        self.require(self.x2.shape[0] == self.depth, "x2", f"{self.depth} rows, the depth of x1")
        divides = self.depth % GROUP_SIZE == 0 and self.depth < 29576
        self.require(divides, "x1", "a depth below 29576 that 256 divides")
        if self.group_sizes is not None and list(self.group_sizes) != [0, 0, GROUP_SIZE]:
            self.refuse("group_sizes", f"None or [0, 0, {GROUP_SIZE}]")
        self.require_dtype("scale (int8 x int4)", torch.int64)
        self._check_groups("a tensor, for int8 x int4")
        self.require_dtype("offset", torch.float32)
        self.require_shape("offset", (self.width,))
        self._check_grouped_output("int8 x int4")

    def _check_groups(self, required: str) -> None:
        self.require_shape("scale", (self.depth // GROUP_SIZE, self.width))
        self.given("offset", required)
        self.given("pertoken_scale", required)
        self.require_dtype("pertoken_scale", torch.float32)
        self.require_shape("pertoken_scale", (self.x1.shape[0], 1))

    def _check_grouped_output(self, reason: str) -> None:
        self.require_absent(reason, "bias")
        self.require(self.out_dtype in HALVES, "output_dtype", "float16 or bfloat16", self.out_dtype)

    def empty(self) -> torch.Tensor:
        return self.x1.new_empty(self.out_shape, dtype=self.out_dtype)
