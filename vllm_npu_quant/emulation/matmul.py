# SPDX-License-Identifier: Apache-2.0
"""Quantized matrix products and the operators that prepare their weights.

Sources are named as in Huawei's repositories: op-plugin (interface, documents, tests) and ops-nn (kernels, aclnn
documents, golden.py). The argument rules are those of Atlas A2 and A3 (Ascend 910B, 910_93).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.checks import (
    form,
    is_plain_or_transposed,
    refuse,
    remember,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_shape,
    require_value,
)
from vllm_npu_quant.emulation.numerics import (
    DTYPE_OF_CODE,
    INT4_PER_INT32,
    INT8,
    int_matmul,
    keep_19_bits,
    pack_int4,
    round_to_int,
    signed_9_bits,
    split_quant_param,
    unpack_int4,
)

__all__ = [
    "fast_int_matmul",
    "get_npu_format",
    "get_npu_format_fake",
    "npu_convert_weight_to_int4pack",
    "npu_convert_weight_to_int4pack_fake",
    "npu_format_cast",
    "npu_format_cast_fake",
    "npu_quant_matmul",
    "npu_quant_matmul_fake",
    "npu_quant_matmul_fast",
    "npu_weight_quant_batchmatmul",
    "npu_weight_quant_batchmatmul_fake",
    "npu_weight_quant_batchmatmul_fast",
]

HALVES = (torch.float16, torch.bfloat16)
MAX_INNER_SIZE = 65535
IntMatmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FloatMatmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


# --------------------------------------------------------------------------------------------------- npu_quant_matmul


class _Form(Enum):
    INT8 = "int8 x int8"
    INT4 = "int4 x int4"
    INT4_GROUPED = "int4 x int4, a scale for every 256 inputs"
    INT8_INT4 = "int8 x int4, a scale for every 256 inputs"


@dataclass(frozen=True)
class _QuantMatmul:
    """What the arguments of one call amount to."""

    form: _Form
    out_dtype: torch.dtype
    out_shape: list[int]
    #: Whether an int4 weight is packed along N ([K, N/8]); else it is the transposed view [K/8, N] of [N, K/8].
    packed_along_n: bool = False


GROUP_SIZE = 256


def _check_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    **only_on_950: Any,
) -> _QuantMatmul:
    name = "npu_quant_matmul"
    require_absent(name, "only Ascend 950 has it", **only_on_950)
    out_dtype = torch.int8 if output_dtype is None else DTYPE_OF_CODE.get(output_dtype)
    if out_dtype not in (torch.int8, torch.int32, *HALVES):
        refuse(name, "output_dtype", "None, int8, float16, bfloat16 or int32", out_dtype or output_dtype)
    require_dtype(name, "x1", x1, torch.int8, torch.int32)
    require_dtype(name, "x2", x2, torch.int32 if x1.dtype == torch.int32 else torch.int8, torch.int32)
    require_dim(name, "x1", x1, 2, 6)
    require_dim(name, "x2", x2, 2, 6)
    for argument, tensor in (("x1", x1), ("x2", x2)):
        require(tensor.numel() > 0, name, argument, "a tensor with elements", tensor)
        require(
            is_plain_or_transposed(tensor), name, argument, "contiguous memory, or the last two dims swapped", tensor
        )
        inner = tensor.shape[-1] if tensor.is_contiguous() else tensor.shape[-2]
        require(inner <= MAX_INNER_SIZE, name, argument, f"at most {MAX_INNER_SIZE} in the innermost dimension", tensor)
    # The Meta kernel takes a float16 scale; no kernel of the device does.
    require_dtype(name, "scale", scale, torch.float32, torch.bfloat16, torch.int64)

    grouped = group_sizes is not None and any(group_sizes)
    if x1.dtype == torch.int8 and x2.dtype == torch.int32:
        return _check_int8_int4(x1, x2, scale, offset, pertoken_scale, bias, out_dtype, group_sizes)
    if grouped or scale.dim() == 2:
        return _check_int4_grouped(x1, x2, scale, offset, pertoken_scale, bias, out_dtype, group_sizes)

    packed_along_n = False
    if x1.dtype == torch.int8:
        form, depth, width = _Form.INT8, x1.shape[-1], x2.shape[-1]
        require(x2.shape[-2] == depth, name, "x2", f"{depth} rows, the depth of x1", x2)
        batch = _broadcast_batch(name, x1, x2)
    else:
        form, batch = _Form.INT4, []
        packed_along_n, depth, width = _check_int4_operands(name, x1, x2)
    out_shape = [*batch, x1.shape[-2], width]

    require_shape(name, "scale", scale, (1,), (width,))
    if pertoken_scale is not None:
        require_dtype(name, "pertoken_scale", pertoken_scale, torch.float32)
        require_shape(name, "pertoken_scale", pertoken_scale, (x1.shape[-2],))
    if bias is not None:
        shapes = [(width,)] if len(out_shape) != 3 else [(width,), (out_shape[0], 1, width)]
        require_shape(name, "bias", bias, *shapes)
    if offset is not None:
        require_dtype(name, "offset", offset, torch.float32)
        require_shape(name, "offset", offset, (1,), (width,))
    _check_combination(form, scale, offset, pertoken_scale, bias, out_dtype)
    return _QuantMatmul(form, out_dtype, out_shape, packed_along_n)


def _check_combination(
    form: _Form,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """The dtype table of op-plugin's document and aclnnQuantMatmulV5.md (A2/A3, T-C, T-T, K-C and K-T rows)."""
    name = "npu_quant_matmul"
    i32, i64, f16, bf16, f32 = torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32
    per_token = pertoken_scale is not None
    scales: dict[tuple[torch.dtype, bool], tuple[torch.dtype, ...]]
    biases: dict[tuple[torch.dtype, bool], tuple[torch.dtype, ...]]
    scales = {(f16, False): (f32, i64), (f16, True): (f32,), (bf16, True): (f32, bf16)}
    biases = {(f16, False): (i32,), (f16, True): (i32, f16, f32), (bf16, True): (i32, bf16, f32)}
    if form is _Form.INT8:
        scales |= {(torch.int8, False): (f32, i64), (bf16, False): (f32, bf16), (i32, False): (f32, bf16)}
        biases |= {(torch.int8, False): (i32,), (bf16, False): (i32, bf16, f32), (i32, False): (i32,)}
    key = (out_dtype, per_token)
    if key not in scales:
        wanted = sorted({str(dtype).removeprefix("torch.") for dtype, has in scales if has == per_token})
        which = "with" if per_token else "without"
        refuse(name, "output_dtype", f"{' or '.join(wanted)} ({form.value} {which} pertoken_scale)", out_dtype)
    if scale.dtype not in scales[key]:
        require_dtype(name, f"scale (for a {str(out_dtype).removeprefix('torch.')} output)", scale, *scales[key])
    if bias is not None:
        require_dtype(name, f"bias (for a {str(out_dtype).removeprefix('torch.')} output)", bias, *biases[key])
    if offset is not None and out_dtype is not torch.int8:
        refuse(name, "offset", "None unless the output is int8", offset)


def _broadcast_batch(name: str, x1: torch.Tensor, x2: torch.Tensor) -> list[int]:
    try:
        return list(torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2]))
    except RuntimeError:
        refuse(name, "x2", f"leading dimensions that broadcast with {list(x1.shape[:-2])}", x2)


def _check_int4_operands(name: str, x1: torch.Tensor, x2: torch.Tensor) -> tuple[bool, int, int]:
    """(packed along N, K, N) of int4 operands packed in int32."""
    require_dim(name, "x1", x1, 2)
    require_dim(name, "x2", x2, 2)
    require(x1.is_contiguous(), name, "x1", "contiguous memory", x1)
    depth = x1.shape[-1] * INT4_PER_INT32
    if x2.is_contiguous() and x2.shape[0] == depth:
        return True, depth, x2.shape[1] * INT4_PER_INT32
    if x2.t().is_contiguous() and x2.shape[0] * INT4_PER_INT32 == depth:
        return False, depth, x2.shape[1]
    refuse(name, "x2", f"contiguous [{depth}, N/8], or [N, {x1.shape[-1]}] transposed", x2)


def _check_int4_grouped(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    group_sizes: list[int] | None,
) -> _QuantMatmul:
    name = "npu_quant_matmul"
    require_dtype(name, "x1 (scale is 2-D or group_sizes is set)", x1, torch.int32)
    if group_sizes is None or list(group_sizes) not in ([0, 0, GROUP_SIZE], [1, 1, GROUP_SIZE]):
        refuse(name, "group_sizes", f"[0, 0, {GROUP_SIZE}] or [1, 1, {GROUP_SIZE}]", group_sizes)
    packed_along_n, depth, width = _check_int4_operands(name, x1, x2)
    require(not packed_along_n, name, "x2", f"[N, {depth // 8}] transposed: the grouped kernel reads no other", x2)
    require(depth % 1024 == 0, name, "x1", "a depth that 1024 divides", x1)
    require(width % 256 == 0, name, "x2", "a width that 256 divides", x2)
    groups = depth // GROUP_SIZE
    require_dtype(name, "scale", scale, torch.float32)
    require_shape(name, "scale", scale, (groups, width))
    if offset is None or pertoken_scale is None:
        missing = "offset" if offset is None else "pertoken_scale"
        refuse(name, missing, "a tensor, since scale is 2-D", None)
    require_dtype(name, "offset", offset, torch.float16)
    require_shape(name, "offset", offset, scale.shape)
    require_dtype(name, "pertoken_scale", pertoken_scale, torch.float32)
    require_shape(name, "pertoken_scale", pertoken_scale, (x1.shape[0], 1))
    require_absent(name, "scale is 2-D", bias=bias)
    require(out_dtype in HALVES, name, "output_dtype", "float16 or bfloat16", out_dtype)
    return _QuantMatmul(_Form.INT4_GROUPED, out_dtype, [x1.shape[0], width])


def _check_int8_int4(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    group_sizes: list[int] | None,
) -> _QuantMatmul:
    name = "npu_quant_matmul"
    require_dim(name, "x1", x1, 2)
    require_dim(name, "x2", x2, 2)
    require(x1.is_contiguous(), name, "x1", "contiguous memory", x1)
    require(x2.is_contiguous(), name, "x2", "contiguous [K, N/8]", x2)
    depth, width = x1.shape[1], x2.shape[1] * INT4_PER_INT32
    require(x2.shape[0] == depth, name, "x2", f"{depth} rows, the depth of x1", x2)
    require(depth % GROUP_SIZE == 0 and depth < 29576, name, "x1", "a depth below 29576 that 256 divides", x1)
    if group_sizes is not None and list(group_sizes) != [0, 0, GROUP_SIZE]:
        refuse(name, "group_sizes", f"None or [0, 0, {GROUP_SIZE}]", group_sizes)
    require_dtype(name, "scale (int8 x int4)", scale, torch.int64)
    require_shape(name, "scale", scale, (depth // GROUP_SIZE, width))
    if offset is None or pertoken_scale is None:
        missing = "offset" if offset is None else "pertoken_scale"
        refuse(name, missing, "a tensor, for int8 x int4", None)
    require_dtype(name, "pertoken_scale", pertoken_scale, torch.float32)
    require_shape(name, "pertoken_scale", pertoken_scale, (x1.shape[0], 1))
    require_dtype(name, "offset", offset, torch.float32)
    require_shape(name, "offset", offset, (width,))
    require_absent(name, "int8 x int4", bias=bias)
    require(out_dtype in HALVES, name, "output_dtype", "float16 or bfloat16", out_dtype)
    return _QuantMatmul(_Form.INT8_INT4, out_dtype, [x1.shape[0], width], packed_along_n=True)


def unpack_weight(weight: torch.Tensor, packed_along_n: bool) -> torch.Tensor:
    """int8 [..., K, N] of an int4 weight: contiguous [..., K, N/8], or the transposed view [..., K/8, N]."""
    if packed_along_n:
        return unpack_int4(weight)
    return unpack_int4(weight.transpose(-1, -2)).transpose(-1, -2)


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: torch.Tensor | None = None,
    matmul: IntMatmul = int_matmul,
) -> torch.Tensor:
    """Integer matrix product, dequantized. With acc = int32(x1 @ x2), exact:

        static, float16 out:  (acc + bias_int32) * s19                             s19: the scale cut to 19 bits
        static, int8 out:     saturate(clamp(rint((acc + bias_int32) * s19), -256, 255) + offset9)
        static, bfloat16 out: (acc + bias_int32) * scale, or acc * scale + bias_float
        per token:            (acc + bias_int32) * scale * pertoken_scale, or acc * scale * pertoken_scale + bias_float
        int32 out:            acc + bias_int32; the scale must be given and is not read
        int4 x int4, groups:  pertoken_scale * sum_g scale_g * (x1_g @ x2_g - rowsum(x1_g) * offset_g)
        int8 x int4, groups:  (16 * (hi @ w*s) + lo @ w*s + offset) * pertoken_scale with x1 = 16 * hi + lo + 8;
                              sums over groups are kept in float16

    Everything after acc is float32 with one rounding to the output's dtype. In the last form the offset must be
    8 * sum_k w[k] * s[k] (computed off line), or the result is wrong.

    Args:
        x1: int8 [..., M, K] (2 to 6 dimensions), or int4 packed in int32 [M, K/8].
        x2: int8 [..., K, N]; or int4 packed in int32: contiguous [K, N/8], or [N, K/8] transposed. Transposed views are
            taken for int8 too.
        scale: [1] or [N], float32, bfloat16 or int64 (npu_trans_quant_param); float32 [K/256, N] (int4 groups); int64
            [K/256, N] holding float32 bits (int8 x int4).
        offset: float32 [1] or [N], for an int8 output; with an int64 scale the offset inside the scale counts. float16
            like the scale (int4 groups). float32 [N] (int8 x int4).
        pertoken_scale: float32 [M]; [M, 1] with groups.
        bias: int32, or float32, float16 or bfloat16 where the table of ``_check_combination`` says so; [N], or
            [batch, 1, N] for a 3-D output.
        output_dtype: None or torch.int8, torch.float16, torch.bfloat16, torch.int32.
        group_sizes: None; [0, 0, 256] or [1, 1, 256] with groups.

    Source: op-plugin torch_npu-npu_quant_matmul.md, QuantMatmulKernelNpuOpApi.cpp; ops-nn aclnnQuantMatmulV5.md,
    quant_batch_matmul_v3/tests/assets golden (compute_requant, compute_pertoken); op-plugin test_npu_grouped_matmul.py
    (the float16 sums of int8 x int4).
    """
    plan = _check_quant_matmul(
        x1,
        x2,
        scale,
        offset=offset,
        pertoken_scale=pertoken_scale,
        bias=bias,
        output_dtype=output_dtype,
        group_sizes=group_sizes,
        x1_dtype=x1_dtype,
        x2_dtype=x2_dtype,
        pertoken_scale_dtype=pertoken_scale_dtype,
        scale_dtype=scale_dtype,
        y_scale=y_scale,
    )
    return _quant_matmul(plan, x1, x2, scale, offset, pertoken_scale, bias, matmul)


_products: dict[Any, tuple[_QuantMatmul, native.Product | None]] = {}


def npu_quant_matmul_fast(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """npu_quant_matmul with the integer product and the scaling in one kernel: the same numbers, bit for bit."""
    key = (form(x1), form(x2), form(scale), form(offset), form(pertoken_scale), form(bias), output_dtype)
    known = None if options else _products.get(key)
    if known is None:
        plan = _check_quant_matmul(
            x1,
            x2,
            scale,
            offset=offset,
            pertoken_scale=pertoken_scale,
            bias=bias,
            output_dtype=output_dtype,
            **options,
        )
        plain = plan.form is _Form.INT8 and len(plan.out_shape) == 2 and plan.out_dtype is not torch.int8
        kernel = plain and x1.is_contiguous() and x2.is_contiguous() and native.available()
        known = plan, native.Product(native.Kind.INT8, x1, x2, plan.out_dtype, scale) if kernel else None
        if not options:
            remember(_products, key, known)
    plan, product = known
    if product is None:
        return _quant_matmul(plan, x1, x2, scale, offset, pertoken_scale, bias, fast_int_matmul)
    if plan.out_dtype is torch.float16 and pertoken_scale is None:
        factor = split_quant_param(scale)[0] if scale.dtype == torch.int64 else keep_19_bits(scale)
    else:
        factor = scale.float().contiguous()
        calls.remember_product(
            "npu_quant_matmul",
            product,
            {
                "x": ("x1", x1),
                "weight": ("x2", x2),
                "scale": ("scale", scale),
                "token_scale": ("pertoken_scale", pertoken_scale),
                "bias": ("bias", bias),
            },
            rows=x1.shape[0],
        )
    return product(
        x1,
        x2,
        scale=factor,
        token_scale=None if pertoken_scale is None else pertoken_scale.contiguous(),
        bias=None if bias is None else native.bias(bias),
    )


def npu_quant_matmul_fake(x1: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    plan = _check_quant_matmul(x1, *args, **kwargs)
    return x1.new_empty(plan.out_shape, dtype=plan.out_dtype)


def _quant_matmul(
    plan: _QuantMatmul,
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    matmul: IntMatmul,
) -> torch.Tensor:
    if plan.form is _Form.INT4_GROUPED or plan.form is _Form.INT8_INT4:
        assert offset is not None
        assert pertoken_scale is not None
        if plan.form is _Form.INT8_INT4:
            total = split_int8_matmul(x1, unpack_weight(x2, True), float_bits(scale), offset, matmul)
        else:
            weight = unpack_weight(x2, plan.packed_along_n)
            total = _grouped_int4_matmul(unpack_int4(x1), weight, scale, offset.to(torch.float32), matmul)
        return (total * pertoken_scale).to(plan.out_dtype)

    if plan.form is _Form.INT4:
        x1, x2 = unpack_int4(x1), unpack_weight(x2, plan.packed_along_n)
    acc = matmul(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        acc = acc + bias
    if plan.out_dtype is torch.int32:
        return acc

    through_fixpipe = pertoken_scale is None and plan.out_dtype in (torch.float16, torch.int8)
    out = acc.to(torch.float32)
    if through_fixpipe:
        if scale.dtype == torch.int64:
            factor, offset9 = split_quant_param(scale)
        else:
            factor = keep_19_bits(scale)
            offset9 = torch.zeros(1) if offset is None else signed_9_bits(offset)
        out = out * factor
        if plan.out_dtype is torch.int8:
            return round_to_int(signed_9_bits(out) + offset9, INT8).to(torch.int8)
    else:
        out = out * scale.to(torch.float32)
        if pertoken_scale is not None:
            out = out * pertoken_scale.unsqueeze(-1)
        if bias is not None and bias.dtype != torch.int32:
            out = out + bias.to(torch.float32)
    return out.to(plan.out_dtype)


def float_bits(scale: torch.Tensor) -> torch.Tensor:
    """The float32 whose bits are the low words of an int64 tensor."""
    return scale.to(torch.int32).view(torch.float32)


def _grouped_int4_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, matmul: IntMatmul
) -> torch.Tensor:
    """sum_g scale_g * (x_g @ w_g - rowsum(x_g) * offset_g) in float32: weights (w - offset) * scale, MINUS here."""
    total = torch.zeros(x.shape[0], weight.shape[1])
    for group in range(scale.shape[0]):
        part = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        rows = x[:, part].contiguous()
        product = matmul(rows, weight[part]).to(torch.float32)
        row_sum = rows.to(torch.int32).sum(dim=1, keepdim=True).to(torch.float32)
        total += (product - row_sum * offset[group]) * scale[group]
    return total


def split_int8_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, matmul: IntMatmul
) -> torch.Tensor:
    """int8 x int4 on a unit that multiplies int4 by int4: float32 16 * (hi @ w*s) + lo @ w*s + offset.

    x = 16 * hi + (lo + 8) with hi = x // 16 and lo = (x & 15) - 8, both in [-8, 7]. The products of every group are
    scaled in float32, rounded to float16 and added up in float16.

    Args:
        x: int8 [M, K]. weight: int8 [K, N] in [-8, 7]. scale: float32 [G, N] with G dividing K. offset: float32 [N].
    """
    halves = torch.cat((x >> 4, (x & 15) - 8))
    size = x.shape[1] // scale.shape[0]
    total = torch.zeros(halves.shape[0], weight.shape[1], dtype=torch.float16)
    for group in range(scale.shape[0]):
        part = slice(group * size, (group + 1) * size)
        product = matmul(halves[:, part].contiguous(), weight[part]).to(torch.float32) * scale[group]
        total = total + product.to(torch.float16)
    high, low = total.to(torch.float32).chunk(2)
    return high * 16.0 + low + offset


#: Up to here a float32 sum of products of 8-bit numbers is exact: 1024 * 128 * 128 = 2**24.
EXACT_DEPTH = 1024
#: From here on the CPU's own int8 product is faster than a kernel that widens to 16 bits.
MANY_ROWS = 64


def fast_int_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``int_matmul`` by the fastest exact way that this host has."""
    if right.dim() != 2 or not right.numel():
        return int_matmul(left, right)
    rows = left.reshape(-1, left.shape[-1]).contiguous()
    own = has_int8_dot() and int8_dot_is_exact()
    if native.available() and right.is_contiguous() and not (own and rows.shape[0] >= MANY_ROWS):
        product = native.product(native.Kind.INT8, rows, right, torch.int32)
    elif own:
        product = torch._int_mm(rows, right)
    else:
        product = float_int_matmul(rows, right)
    return product.view(*left.shape[:-1], right.shape[-1])


def float_int_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``int_matmul`` of two matrices through float32, by parts of the depth in which every sum is exact."""
    product = None
    for start in range(0, left.shape[1], EXACT_DEPTH):
        part = slice(start, start + EXACT_DEPTH)
        piece = torch.mm(left[:, part].to(torch.float32), right[part].to(torch.float32)).to(torch.int32)
        product = piece if product is None else product.add_(piece)
    assert product is not None
    return product


@functools.cache
def has_int8_dot() -> bool:
    """Whether the CPU multiplies bytes into 32-bit sums; without, torch._int_mm is a plain loop."""
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_vnni_supported())
    return True


@functools.cache
def int8_dot_is_exact() -> bool:
    """Whether torch._int_mm is exact on this CPU, tried once with extreme values."""
    generator = torch.Generator().manual_seed(0)
    for rows, depth, width in ((1, 64, 32), (3, 257, 17), (33, 512, 96)):
        for pool in ([-128, 127], [127], [-128], [-128, -1, 0, 1, 127]):
            values = torch.tensor(pool, dtype=torch.int8)
            left = values[torch.randint(len(pool), (rows, depth), generator=generator)]
            right = values[torch.randint(len(pool), (depth, width), generator=generator)]
            exact = int_matmul(left, right)
            try:
                products = (torch._int_mm(left, right), torch._int_mm(left, right.t().contiguous().t()))
            except RuntimeError:
                return False
            if not all(torch.equal(product, exact) for product in products):
                return False
    return True


# --------------------------------------------------------------------------------------- npu_weight_quant_batchmatmul


@dataclass(frozen=True)
class _WeightQuantMatmul:
    depth: int
    width: int
    #: True or False for int4 weights, as in _QuantMatmul; None for int8.
    packed_along_n: bool | None
    out_dtype: torch.dtype


def _check_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> _WeightQuantMatmul:
    name = "npu_weight_quant_batchmatmul"
    require_absent(name, "only Ascend 950 has it", weight_dtype=weight_dtype)
    require_value(name, "inner_precise", inner_precise, 0, 1)
    require_dtype(name, "x", x, *HALVES)
    require_dim(name, "x", x, 2)
    require_dtype(name, "weight", weight, torch.int8, torch.int32)
    require_dim(name, "weight", weight, 2)
    for argument, tensor in (("x", x), ("weight", weight)):
        require(tensor.numel() > 0, name, argument, "a tensor with elements", tensor)
        require(is_plain_or_transposed(tensor), name, argument, "contiguous or transposed memory", tensor)

    depth = x.shape[1]
    packed_along_n: bool | None = None
    if weight.dtype == torch.int8:
        require(weight.shape[0] == depth, name, "weight", f"{depth} rows, the depth of x", weight)
        width = weight.shape[1]
    elif weight.is_contiguous():
        # A view [1, N] of [N, 1] is contiguous too and is read as [K, N/8]: the device refuses such a weight.
        require(weight.shape[0] == depth, name, "weight", f"[{depth}, N/8] (int4 packed along N)", weight)
        packed_along_n, width = True, weight.shape[1] * INT4_PER_INT32
    else:
        require(weight.shape[0] * INT4_PER_INT32 == depth, name, "weight", f"[N, {depth}/8] transposed", weight)
        packed_along_n, width = False, weight.shape[1]
    for argument, size in (("x", depth), ("weight", width)):
        require(size <= MAX_INNER_SIZE, name, argument, f"K and N of at most {MAX_INNER_SIZE}", size)

    # The int64 form of antiquant_scale (float16 x, transposed int8 weight, M <= 96) is not emulated.
    require_dtype(name, "antiquant_scale", antiquant_scale, x.dtype)
    if antiquant_group_size:
        require(
            antiquant_group_size % 32 == 0 and 32 <= antiquant_group_size <= depth - 1,
            name,
            "antiquant_group_size",
            f"0, or a multiple of 32 in [32, K - 1 = {depth - 1}]",
            antiquant_group_size,
        )
        groups = (depth + antiquant_group_size - 1) // antiquant_group_size
        require_shape(name, "antiquant_scale", antiquant_scale, (groups, width))
    else:
        require_shape(name, "antiquant_scale", antiquant_scale, (1,), (1, 1), (width,), (1, width))
    if antiquant_offset is not None:
        require_dtype(name, "antiquant_offset", antiquant_offset, x.dtype)
        require_shape(name, "antiquant_offset", antiquant_offset, antiquant_scale.shape)
    if bias is not None:
        require_dtype(name, "bias", bias, torch.float32 if x.dtype == torch.bfloat16 else torch.float16)
        require_shape(name, "bias", bias, (width,), (1, width))
        require(bias.is_contiguous(), name, "bias", "contiguous memory", bias)
    if quant_scale is not None:
        require_dtype(name, "quant_scale", quant_scale, torch.float32, torch.int64)
        require_shape(name, "quant_scale", quant_scale, (1,), (width,), (1, width))
    if quant_offset is not None:
        if quant_scale is None:
            refuse(name, "quant_offset", "None, since there is no quant_scale", quant_offset)
        require_dtype(name, "quant_offset", quant_offset, torch.float32)
        require_shape(name, "quant_offset", quant_offset, quant_scale.shape)
    return _WeightQuantMatmul(depth, width, packed_along_n, x.dtype if quant_scale is None else torch.int8)


def dequantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype, group_size: int = 0
) -> torch.Tensor:
    """(weight + offset) * scale with the roundings of the device, in ``dtype``.

    float16: the addition and the multiplication are rounded to float16 one after the other. bfloat16: both are float32,
    then one rounding to bfloat16.

    Args:
        weight: int8 [K, N].
        scale, offset: ``dtype``, [N] or [1]; with group_size [ceil(K / group_size), N], the last group may be short.
    """
    step = torch.float16 if dtype == torch.float16 else torch.float32
    values = weight.to(step)
    depth, width = weight.shape
    scale, offset = scale.to(step), None if offset is None else offset.to(step)
    if group_size and depth % group_size == 0:
        values = values.reshape(-1, group_size, width)
        scale, offset = scale.unsqueeze(1), None if offset is None else offset.unsqueeze(1)
    elif group_size:
        scale = scale.repeat_interleave(group_size, dim=0)[:depth]
        offset = None if offset is None else offset.repeat_interleave(group_size, dim=0)[:depth]
    if offset is not None:
        values = values.add_(offset)
    return values.mul_(scale).to(dtype).view(depth, width)


def float_matmul(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """left @ right + bias, summed in float32 and not rounded."""
    out = torch.matmul(left.to(torch.float32), right.to(torch.float32))
    return out if bias is None else out + bias.to(torch.float32)


def fast_float_matmul(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``float_matmul``, but bfloat16 without a bias goes through the CPU's own product, which rounds once."""
    if bias is None and left.dtype == torch.bfloat16:
        return torch.matmul(left, right)
    return float_matmul(left, right, bias)


def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
    *,
    matmul: FloatMatmul = float_matmul,
) -> torch.Tensor:
    """y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias. The offset is ADDED: pass minus the zero point.

    The weight is dequantized with the roundings of ``dequantize_weight``; products are summed in float32, the bias is
    added in float32, then one rounding to the dtype of x. (For small M the device may split x into integer parts, which
    gives slightly different numbers.) With quant_scale: saturate(clamp(rint(y * s19), -256, 255) + offset9) as int8.

    Args:
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

    Source: op-plugin torch_npu-npu_weight_quant_batchmatmul.md and its C++ checks; ops-nn
    weight_quant_batch_matmul_v2/op_kernel, tests/assets/wqbmmv2_kernel_golden.py.
    """
    plan = _check_weight_quant_batchmatmul(
        x,
        weight,
        antiquant_scale,
        antiquant_offset,
        quant_scale,
        quant_offset,
        bias,
        antiquant_group_size,
        inner_precise,
        weight_dtype,
    )
    integers = weight if plan.packed_along_n is None else unpack_weight(weight, plan.packed_along_n)
    values = dequantize_weight(integers, antiquant_scale, antiquant_offset, x.dtype, antiquant_group_size)
    # A requantized output is not rounded to the dtype of x in between.
    out = (matmul if quant_scale is None else float_matmul)(x, values, bias)
    if quant_scale is None:
        return out.to(x.dtype)
    if quant_scale.dtype == torch.int64:
        factor, offset9 = split_quant_param(quant_scale)
    else:
        factor = keep_19_bits(quant_scale)
        offset9 = torch.zeros(1) if quant_offset is None else signed_9_bits(quant_offset)
    return round_to_int(signed_9_bits(out * factor) + offset9, INT8).to(torch.int8)


_weight_only_products: dict[Any, native.Product] = {}


def npu_weight_quant_batchmatmul_fast(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    *options: Any,
    **more: Any,
) -> torch.Tensor:
    """npu_weight_quant_batchmatmul that dequantizes in the product: the same up to the order of float32 sums."""
    if options or more or quant_scale is not None or quant_offset is not None:
        operands = (x, weight, antiquant_scale, antiquant_offset, quant_scale, quant_offset, bias, antiquant_group_size)
        return npu_weight_quant_batchmatmul(*operands, *options, **more, matmul=fast_float_matmul)
    key = (form(x), form(weight), form(antiquant_scale), form(antiquant_offset), form(bias), antiquant_group_size)
    product = _weight_only_products.get(key)
    if product is None:
        operands = (x, weight, antiquant_scale, antiquant_offset, None, None, bias, antiquant_group_size)
        if not (x.is_contiguous() and weight.is_contiguous() and native.available()):
            return npu_weight_quant_batchmatmul(*operands, matmul=fast_float_matmul)
        plan = _check_weight_quant_batchmatmul(*operands)
        kind, group_size = native.Kind.WEIGHT_ONLY, antiquant_group_size
        product = native.Product(kind, x, weight, plan.out_dtype, antiquant_scale, group_size)
        remember(_weight_only_products, key, product)
    calls.remember_product(
        "npu_weight_quant_batchmatmul",
        product,
        {
            "x": ("x", x),
            "weight": ("weight", weight),
            "antiquant_scale": ("antiquant_scale", antiquant_scale),
            "antiquant_offset": ("antiquant_offset", antiquant_offset),
            "bias": ("bias", bias),
        },
        rows=x.shape[0],
    )
    return product(
        x,
        weight,
        antiquant_scale=antiquant_scale.contiguous(),
        antiquant_offset=None if antiquant_offset is None else antiquant_offset.contiguous(),
        bias=None if bias is None else native.bias(bias),
    )


def npu_weight_quant_batchmatmul_fake(
    x: torch.Tensor, weight: torch.Tensor, antiquant_scale: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    plan = _check_weight_quant_batchmatmul(x, weight, antiquant_scale, *args, **kwargs)
    return x.new_empty((x.shape[0], plan.width), dtype=plan.out_dtype)


# ------------------------------------------------------------------------------------- npu_convert_weight_to_int4pack


def _check_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int) -> None:
    name = "npu_convert_weight_to_int4pack"
    require_value(name, "inner_k_tiles", inner_k_tiles, 0)
    require_dtype(name, "weight", weight, torch.int32)
    # For 3-D weights the device returns the shape of the first matrix.
    require_dim(name, "weight", weight, 2)
    require(weight.is_contiguous(), name, "weight", "contiguous memory", weight)
    require(weight.shape[1] % INT4_PER_INT32 == 0, name, "weight", "a last dimension that 8 divides", weight)


def npu_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """Pack eight integers of the last dimension into one int32, the first in the lowest four bits.

    Values outside of [-8, 7] lose their high bits without a word.

    Args:
        weight: int32 [K, N], contiguous, 8 divides N. (Flatten the experts of a MoE weight into the rows.)

    Returns:
        int32 [K, N/8].

    Source: op-plugin ConvertWeightToINT4PackKernelNpuOpApi.cpp.
    """
    _check_convert_weight_to_int4pack(weight, inner_k_tiles)
    return pack_int4(weight)


def npu_convert_weight_to_int4pack_fake(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    _check_convert_weight_to_int4pack(weight, inner_k_tiles)
    return weight.new_empty((weight.shape[0], weight.shape[1] // INT4_PER_INT32))


# ---------------------------------------------------------------------------------------------------- storage formats

ND = 2
FRACTAL_NZ = 29


def npu_format_of(tensor: torch.Tensor) -> int:
    # The format belongs to the storage, as on the device: a Parameter or a detached alias made of the tensor keeps it.
    return getattr(tensor.untyped_storage(), "_npu_format", ND)


def _check_format_cast(x: torch.Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> None:
    name = "npu_format_cast"
    require_value(name, "acl_format", acl_format, ND, FRACTAL_NZ)
    require_absent(name, "only Ascend 950 has it", customize_dtype=customize_dtype, input_dtype=input_dtype)
    if acl_format == FRACTAL_NZ:
        require_dtype(name, "input", x, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32)
        require(x.dim() >= 2, name, "input", "at least 2 dimensions for FRACTAL_NZ (29)", x)


def npu_format_cast(
    input: torch.Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> torch.Tensor:
    """Change the storage format: 29 (FRACTAL_NZ) or back to 2 (ND). Shape, strides and values stay.

    On the device only the order in memory changes, and operators keep taking the logical shape; here the memory is
    copied as it is, and the format is remembered for ``get_npu_format``. A tensor that has the format already is
    returned itself.

    Args:
        input: int8, int32, float16, bfloat16 or float32, at least 2 dimensions for format 29.

    Source: Ascend/pytorch torch_npu/csrc/framework/FormatHelper.cpp, aten/common/FormatCastKernelNpu.cpp.
    """
    _check_format_cast(input, acl_format, customize_dtype, input_dtype)
    if npu_format_of(input) == acl_format:
        return input
    out = input.clone(memory_format=torch.preserve_format)
    out.untyped_storage()._npu_format = acl_format  # type: ignore[attr-defined]
    return out


def npu_format_cast_fake(
    input: torch.Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> torch.Tensor:
    _check_format_cast(input, acl_format, customize_dtype, input_dtype)
    return torch.empty_like(input)


def get_npu_format(input: torch.Tensor) -> int:
    """The storage format: 29 after npu_format_cast(x, 29), else 2."""
    return npu_format_of(input)


def get_npu_format_fake(input: torch.Tensor) -> int:
    return ND
