# SPDX-License-Identifier: Apache-2.0
"""The fused first half of a quantized MoE layer: grouped matmul, SwiGLU, quantization.

Sources: op-plugin torch_npu-npu_grouped_matmul_swiglu_quant.md and _v2.md; ops-transformer
gmm/grouped_matmul_swiglu_quant(_v2)/docs and op_kernel. Rows that no group covers are garbage.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.emulation.activation import silu
from vllm_npu_quant.emulation.checks import (
    is_plain_or_transposed,
    refuse,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_shape,
    require_value,
)
from vllm_npu_quant.emulation.grouped import group_bounds, scaled_groups
from vllm_npu_quant.emulation.matmul import (
    FRACTAL_NZ,
    IntMatmul,
    fast_int_matmul,
    float_bits,
    npu_format_of,
    split_int8_matmul,
    unpack_weight,
)
from vllm_npu_quant.emulation.numerics import INT4_PER_INT32, INT8, fill_garbage, int_matmul, round_to_int, unpack_int4

__all__ = [
    "npu_grouped_matmul_swiglu_quant",
    "npu_grouped_matmul_swiglu_quant_fake",
    "npu_grouped_matmul_swiglu_quant_fast",
    "npu_grouped_matmul_swiglu_quant_v2",
    "npu_grouped_matmul_swiglu_quant_v2_fake",
    "npu_grouped_matmul_swiglu_quant_v2_fast",
]


def _check_operands(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    assist: torch.Tensor | None,
    assist_argument: str,
) -> int:
    """The rules that both versions share; the width N of the weight."""
    require_dim(name, "x", x, 2)
    require(x.is_contiguous(), name, "x", "contiguous memory", x)
    require_dim(name, "weight", weight, 3)
    experts, int4_x, int4_weight = weight.shape[0], x.dtype == torch.int32, weight.dtype == torch.int32
    depth = x.shape[1] * (INT4_PER_INT32 if int4_x else 1)
    width = weight.shape[2] * (INT4_PER_INT32 if int4_weight else 1)
    require_dtype(name, "weight", weight, torch.int32 if int4_x else torch.int8, torch.int32)
    require(weight.shape[1] == depth, name, "weight", f"{depth} rows, the depth of x", weight)
    if int4_weight:
        require(weight.is_contiguous(), name, "weight", "contiguous [E, K, N/8]", weight)
        require(depth < 20000, name, "x", "a depth below 20000", x)
    else:
        require(is_plain_or_transposed(weight), name, "weight", "contiguous or transposed memory", weight)
        require(depth < 65536, name, "x", "a depth below 65536", x)
    require(width % 2 == 0 and width <= 10240, name, "weight", "an even width of at most 10240", weight)
    require_dtype(name, "group_list", group_list, torch.int64)
    require_shape(name, "group_list", group_list, (experts,))
    require_dtype(name, "x_scale", x_scale, torch.float32)
    require_shape(name, "x_scale", x_scale, (x.shape[0],))
    if int4_weight:
        require_dtype(name, "weight_scale", weight_scale, torch.int64)
        groups = weight_scale.shape[1] if weight_scale.dim() == 3 else 1
        require_shape(name, "weight_scale", weight_scale, (experts, width), (experts, groups, width))
        divides = depth % groups == 0
        require(divides, name, "weight_scale", f"a number of groups that divides {depth}", weight_scale)
    else:
        require_dtype(name, "weight_scale", weight_scale, torch.float32, torch.float16, torch.bfloat16)
        require_shape(name, "weight_scale", weight_scale, (experts, width))
    if int4_weight and not int4_x:
        if assist is None:
            refuse(name, assist_argument, "a tensor, for int8 x int4", None)
        require_dtype(name, assist_argument, assist, torch.float32)
        require_shape(name, assist_argument, assist, (experts, width))
    elif assist is not None:
        refuse(name, assist_argument, "None unless int8 x int4", assist)
    return width


def _dequantized_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    assist: torch.Tensor | None,
    matmul: IntMatmul,
) -> torch.Tensor:
    """float32 rows of one expert. The kernel multiplies by the token's scale first, then by the channel's."""
    if assist is not None:
        scale = float_bits(weight_scale).view(-1, weight_scale.shape[-1])
        return split_int8_matmul(x, unpack_weight(weight, True), scale, assist, matmul) * x_scale[:, None]
    if weight.dtype == torch.int32:
        scale = float_bits(weight_scale).view(-1, weight_scale.shape[-1])
        return scaled_groups(unpack_int4(x), unpack_weight(weight, True), scale, matmul) * x_scale[:, None]
    return matmul(x, weight).to(torch.float32) * x_scale[:, None] * weight_scale.to(torch.float32)


def _quantized_twice(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows divided by their scale max / 127, rounded to float16 and then to int8: the kernel's double rounding."""
    scale = values.abs().amax(dim=-1) / 127.0
    return round_to_int((values / scale[:, None]).to(torch.float16).to(torch.float32), INT8).to(torch.int8), scale


def _grouped_swiglu_quant(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int,
    assist: torch.Tensor | None,
    smooth_scale: torch.Tensor | None,
    width: int,
    matmul: IntMatmul,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty((x.shape[0], width // 2), dtype=torch.int8)
    scale = torch.empty(x.shape[0])
    end = 0
    for expert, start, end in group_bounds(name, group_list, group_list_type, x.shape[0]):
        rows = slice(start, end)
        product = _dequantized_product(
            x[rows],
            weight[expert],
            weight_scale[expert],
            x_scale[rows],
            None if assist is None else assist[expert],
            matmul,
        )
        gate, up = product.chunk(2, dim=-1)
        values = silu(gate) * up
        if smooth_scale is not None:
            values = values * smooth_scale[expert]
        out[rows], scale[rows] = _quantized_twice(values)
    fill_garbage(out[end:])
    fill_garbage(scale[end:])
    return out, scale


def _check_swiglu_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> int:
    name = "npu_grouped_matmul_swiglu_quant"
    require_absent(name, "reserved", offset=offset)
    require_dtype(name, "x", x, torch.int8)
    return _check_operands(name, x, weight, weight_scale, x_scale, group_list, bias, "bias")


def npu_grouped_matmul_swiglu_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    matmul: IntMatmul = int_matmul,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the rows of every expert:

        c = int32(x @ w) * x_scale * weight_scale;  s = silu(LEFT half of c) * right half
        scale = max|s| / 127;  out = int8(float16(s / scale)), rounded half to even twice

    int8 x int4 as in npu_grouped_matmul, with bias = 8 * sum_k(w * weight_scale).

    Args:
        x: int8 [M, K].
        weight: int8 [E, K, N], or int4 packed in int32 [E, K, N/8]. It must be in FRACTAL_NZ (npu_format_cast(w, 29)):
            the kernel reads the memory as such without looking.
        group_list: int64 [E], RUNNING TOTALS of rows; the rest of the outputs is garbage.
        weight_scale: float32, float16 or bfloat16 [E, N]; int4: int64 [E, N] or [E, G, N] holding float32 bits.
        x_scale: float32 [M].
        bias: int4: float32 [E, N].

    Returns:
        out: int8 [M, N/2]. scale: float32 [M]. offset: an unused float32 without dimensions.
    """
    name = "npu_grouped_matmul_swiglu_quant"
    width = _check_swiglu_quant(x, weight, group_list, weight_scale, x_scale, bias=bias, offset=offset)
    require(npu_format_of(weight) == FRACTAL_NZ, name, "weight", "FRACTAL_NZ (npu_format_cast(w, 29))", weight)
    unused = torch.empty(())
    fill_garbage(unused)
    out, scale = _grouped_swiglu_quant(name, x, weight, weight_scale, x_scale, group_list, 0, bias, None, width, matmul)
    return out, scale, unused


def npu_grouped_matmul_swiglu_quant_fast(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return npu_grouped_matmul_swiglu_quant(*args, **kwargs, matmul=fast_int_matmul)


def npu_grouped_matmul_swiglu_quant_fake(
    x: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = _check_swiglu_quant(x, *args, **kwargs)
    out, scale = _empty_outputs(x, width)
    return out, scale, x.new_empty((), dtype=torch.float32)


def _empty_outputs(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((x.shape[0], width // 2), dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)


def _check_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    smooth_scale: torch.Tensor | None = None,
    weight_assist_matrix: list[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    **only_on_950: Any,
) -> int:
    name = "npu_grouped_matmul_swiglu_quant_v2"
    require_absent(name, "reserved", bias=bias)
    require_absent(name, "only Ascend 950 has it", **only_on_950)
    for argument, tensors in (("weight", weight), ("weight_scale", weight_scale)):
        require(len(tensors) == 1, name, argument, "one tensor", len(tensors))
    require_dtype(name, "x", x, torch.int8, torch.int32)
    require_value(name, "dequant_dtype", dequant_dtype, 6)
    require_value(name, "quant_mode", quant_mode, 0)
    require_value(name, "quant_dtype", quant_dtype, 1)
    require_value(name, "group_list_type", group_list_type, 0, 1)
    require_value(name, "dequant_mode", dequant_mode, 1 if weight_scale[0].dim() == 3 else 0)
    assist = weight_assist_matrix[0] if weight_assist_matrix else None
    width = _check_operands(name, x, weight[0], weight_scale[0], x_scale, group_list, assist, "weight_assist_matrix")
    if smooth_scale is not None:
        require(x.dtype == torch.int32, name, "smooth_scale", "None unless int4 x int4", smooth_scale)
        experts = weight[0].shape[0]
        require_dtype(name, "smooth_scale", smooth_scale, torch.float32)
        require_shape(name, "smooth_scale", smooth_scale, (experts, width // 2), (experts,))
    return width


def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    smooth_scale: torch.Tensor | None = None,
    weight_assist_matrix: list[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
    matmul: IntMatmul = int_matmul,
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_grouped_matmul_swiglu_quant with lists, other kinds of group_list, and int4 x int4.

    Args:
        x: int8 [M, K], or int4 packed in int32 [M, K/8].
        weight: [int8 [E, K, N]], or int4 packed in int32 [[E, K, N/8]]; ND or FRACTAL_NZ.
        weight_scale: [float32, float16 or bfloat16 [E, N]]; int4: [int64 [E, N]] or, with dequant_mode 1, [[E, G, N]].
        x_scale: float32 [M].
        group_list: int64 [E]; group_list_type 0: running totals, 1: counts.
        smooth_scale: int4 x int4: float32 [E, N/2] or [E], multiplied before the quantization.
        weight_assist_matrix: int8 x int4: [float32 [E, N]] = 8 * sum_k(w * weight_scale).
        dequant_dtype: torch.float32 (6). (torch_npu 2.10 has the default 0: pass it.)

    Returns:
        out: int8 [M, N/2]. scale: float32 [M].
    """
    width = _check_swiglu_quant_v2(
        x,
        weight,
        weight_scale,
        x_scale,
        group_list,
        smooth_scale=smooth_scale,
        weight_assist_matrix=weight_assist_matrix,
        bias=bias,
        dequant_mode=dequant_mode,
        dequant_dtype=dequant_dtype,
        quant_mode=quant_mode,
        quant_dtype=quant_dtype,
        group_list_type=group_list_type,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
        weight_scale_dtype=weight_scale_dtype,
        x_scale_dtype=x_scale_dtype,
    )
    assist = weight_assist_matrix[0] if weight_assist_matrix else None
    return _grouped_swiglu_quant(
        "npu_grouped_matmul_swiglu_quant_v2",
        x,
        weight[0],
        weight_scale[0],
        x_scale,
        group_list,
        group_list_type or 0,
        assist,
        smooth_scale,
        width,
        matmul,
    )


def npu_grouped_matmul_swiglu_quant_v2_fast(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return npu_grouped_matmul_swiglu_quant_v2(*args, **kwargs, matmul=fast_int_matmul)


def npu_grouped_matmul_swiglu_quant_v2_fake(
    x: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_outputs(x, _check_swiglu_quant_v2(x, *args, **kwargs))
