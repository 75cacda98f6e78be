# SPDX-License-Identifier: Apache-2.0
"""SwiGLU and its fusions with dequantization and quantization."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.emulation.checks import (
    refuse,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_shape,
    require_value,
)
from vllm_npu_quant.emulation.numerics import INT8, fill_garbage, round_to_int
from vllm_npu_quant.emulation.quantize import quantize_rows

__all__ = [
    "npu_dequant_swiglu_quant",
    "npu_dequant_swiglu_quant_fake",
    "npu_swiglu",
    "npu_swiglu_fake",
    "npu_swiglu_quant",
    "npu_swiglu_quant_fake",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) in float32, as the vector unit computes it."""
    return x / (1.0 + torch.exp(-x))


def _check_swiglu(x: torch.Tensor, dim: int) -> list[int]:
    require_dtype("npu_swiglu", "input", x, *FLOATS)
    require(x.dim() >= 1 and -x.dim() <= dim < x.dim(), "npu_swiglu", "dim", f"a dimension of {list(x.shape)}", dim)
    require(x.shape[dim] % 2 == 0, "npu_swiglu", "input", f"an even size in dimension {dim}", x)
    shape = list(x.shape)
    shape[dim] = x.shape[dim] // 2
    return shape


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) * second half along ``dim``: float32 inside, one rounding.

    Args:
        input: float16, bfloat16 or float32; the size of ``dim`` is even.

    Returns:
        The input's dtype and shape, with half the size in ``dim``.

    Source: op-plugin test_npu_swi_glu.py.
    """
    _check_swiglu(input, dim)
    gate, up = input.to(torch.float32).chunk(2, dim=dim)
    return (silu(gate) * up).to(input.dtype)


def npu_swiglu_fake(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return input.new_empty(_check_swiglu(input, dim))


def rows_of_groups(name: str, group_index: torch.Tensor, rows: int, *, counts: bool) -> torch.Tensor:
    """The group of every row that a group covers: int64 [covered rows].

    Args:
        group_index: [G] rows of every group (``counts``) or their running totals; they may cover fewer than ``rows``.
    """
    sizes = group_index.to(torch.int64)
    if not counts:
        sizes = torch.diff(sizes, prepend=sizes.new_zeros(1))
    numbers = sizes.tolist()
    argument = "group_index"
    require(min(numbers) >= 0, name, argument, "groups of no negative size", group_index.tolist())
    require(sum(numbers) <= rows, name, argument, f"at most {rows} rows in all groups", group_index.tolist())
    return torch.repeat_interleave(torch.arange(len(numbers)), sizes)


def _padded(values: torch.Tensor, rows: int) -> torch.Tensor:
    """``values`` with garbage rows after them."""
    out = values.new_empty((rows, *values.shape[1:]))
    out[: values.shape[0]] = values
    fill_garbage(out[values.shape[0] :])
    return out


def _garbage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    fill_garbage(out)
    return out


def _check_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> None:
    name = "npu_dequant_swiglu_quant"
    require_dim(name, "x", x, 2)
    require_dtype(name, "x", x, torch.int32, torch.float16, torch.bfloat16)
    rows, columns = x.shape
    require(columns % 2 == 0, name, "x", "an even last dimension", x)
    require_value(name, "quant_mode", quant_mode, 0, 1)
    require_value(name, "swiglu_mode", swiglu_mode, 0, 1, 2)
    require_value(name, "dst_type", dst_type, None, 1)
    require_value(name, "round_mode", round_mode, None, 0)
    require_value(name, "activate_dim", activate_dim, None, -1, 1)
    groups = 1
    if group_index is not None:
        require_dtype(name, "group_index", group_index, torch.int64)
        require_dim(name, "group_index", group_index, 1)
        groups = group_index.shape[0]
        require(groups > 0, name, "group_index", "at least one group", group_index)
        require_absent(name, "group_index is given", bias=bias, quant_offset=quant_offset)
        # aclnnDequantSwigluQuant limits the activated half; the tile of a row has to fit on the chip.
        require(columns // 2 <= 10496, name, "x", "at most 2 * 10496 columns with group_index", x)

    def grouped_shapes(size: int) -> list[tuple[int, ...]]:
        return [(groups, size)] if group_index is not None else [(size,), (1, size)]

    if x.dtype == torch.int32:
        if activation_scale is None:
            refuse(name, "activation_scale", "a tensor, for int32 x", None)
        require_dtype(name, "activation_scale", activation_scale, torch.float32)
        require_shape(name, "activation_scale", activation_scale, (rows,), (rows, 1))
        if weight_scale is not None:
            require_dtype(name, "weight_scale", weight_scale, torch.float32)
            require_shape(name, "weight_scale", weight_scale, *grouped_shapes(columns))
        if bias is not None:
            require_dtype(name, "bias", bias, torch.int32, torch.float32, torch.float16, torch.bfloat16)
            require_shape(name, "bias", bias, (columns,))
    else:
        require_absent(name, "x is a float", weight_scale=weight_scale, activation_scale=activation_scale, bias=bias)
    if quant_mode == 0:
        if quant_scale is None:
            refuse(name, "quant_scale", "a tensor, for static quantization", None)
        require_dtype(name, "quant_scale", quant_scale, torch.float32)
    else:
        require_absent(name, "quantization is dynamic", quant_offset=quant_offset)
    if quant_scale is not None:
        require_dtype(name, "quant_scale", quant_scale, *FLOATS)
        shapes = grouped_shapes(columns // 2)
        if quant_mode == 0:
            shapes += [(groups, 1), (groups,)]
        require_shape(name, "quant_scale", quant_scale, *shapes)
    if quant_offset is not None:
        assert quant_scale is not None
        require_dtype(name, "quant_offset", quant_offset, *FLOATS)
        require_shape(name, "quant_offset", quant_offset, quant_scale.shape)


def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize, SwiGLU, quantize. NB: by DEFAULT the RIGHT half is activated (activate_left=False).

        x':  (x + bias_int32) * weight_scale[g] * activation_scale (+ bias_float) for int32 x; x itself for floats
        swiglu_mode 0: y = silu(a) * b           (a, b) = (right, left); (left, right) with activate_left
        swiglu_mode 1: a = even columns, b = odd columns;  swiglu_mode 2: halves as above;  both:
            y = min(a, limit) * sigmoid(alpha * min(a, limit)) * (clamp(b, -limit, limit) + glu_bias)
        quant_mode 1, dynamic: z = y * quant_scale[g];  scale = max|z| / 127;  out = rint(z * (127 / max|z|))
        quant_mode 0, static:  out = saturate(rint(y / quant_scale[g] + quant_offset)): it DIVIDES here

    Args:
        x: int32, float16 or bfloat16 [M, 2H].
        weight_scale: float32 [G, 2H]; without group_index [2H] or [1, 2H]. activation_scale: float32 [M] or [M, 1],
            required for int32 x.
        bias: [2H], int32 or a float; only without group_index.
        quant_scale: float [G, H]; without group_index [H] or [1, H]. Static: float32, also one number per group.
        quant_offset: like quant_scale; only static and without group_index.
        group_index: int64 [G], COUNTS of rows; rows past their sum are garbage in both outputs.

    Returns:
        out: int8 [M, H].
        scale: float32 [M]; garbage for static quantization.

    Source: op-plugin torch_npu-npu_dequant_swiglu_quant.md; ops-nn quant/dequant_swiglu_quant/op_kernel. (The document
    also asks for H that 64 divides with group_index; smaller models are let through here.)
    """
    name = "npu_dequant_swiglu_quant"
    _check_dequant_swiglu_quant(
        x,
        weight_scale=weight_scale,
        activation_scale=activation_scale,
        bias=bias,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=quant_mode,
        dst_type=dst_type,
        round_mode=round_mode,
        activate_dim=activate_dim,
        swiglu_mode=swiglu_mode,
        clamp_limit=clamp_limit,
        glu_alpha=glu_alpha,
        glu_bias=glu_bias,
    )
    rows = x.shape[0]
    group = None if group_index is None else rows_of_groups(name, group_index, rows, counts=True)
    covered = rows if group is None else group.shape[0]

    def of_rows(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(torch.float32)
        return tensor if group is None else tensor[group].view(covered, tensor[0].numel())

    values = x[:covered]
    if bias is not None and bias.dtype == torch.int32:
        values = values + bias
    values = values.to(torch.float32)
    if weight_scale is not None:
        values = values * of_rows(weight_scale)
    if activation_scale is not None:
        values = values * activation_scale.view(-1, 1)[:covered]
    if bias is not None and bias.dtype != torch.int32:
        values = values + bias.to(torch.float32)
    y = _swiglu_variant(values, activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias)

    if quant_mode == 0:
        assert quant_scale is not None
        y = y / of_rows(quant_scale)
        if quant_offset is not None:
            y = y + quant_offset.to(torch.float32)
        out = round_to_int(y, INT8).to(torch.int8)
        return _padded(out, rows), _garbage((rows,), torch.float32)
    out, scale = quantize_rows(y if quant_scale is None else y * of_rows(quant_scale), INT8)
    return _padded(out, rows), _padded(scale, rows)


def _swiglu_variant(
    x: torch.Tensor, activate_left: bool, swiglu_mode: int, limit: float, alpha: float, shift: float
) -> torch.Tensor:
    if swiglu_mode == 1:
        gate, up = x[..., 0::2], x[..., 1::2]
    else:
        left, right = x.chunk(2, dim=-1)
        gate, up = (left, right) if activate_left else (right, left)
    if swiglu_mode == 0:
        return silu(gate) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + shift)


def npu_dequant_swiglu_quant_fake(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _check_dequant_swiglu_quant(x, **options)
    rows, columns = x.shape
    return x.new_empty((rows, columns // 2), dtype=torch.int8), x.new_empty((rows,), dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------


def _check_swiglu_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> None:
    name = "npu_swiglu_quant"
    require_dtype(name, "x", x, *FLOATS)
    require_dim(name, "x", x, 2, 8)
    require(x.shape[-1] % 2 == 0 and x.shape[-1] <= 8192, name, "x", "an even last dimension of at most 8192", x)
    require_value(name, "quant_mode", quant_mode, 0, 1)
    require_value(name, "group_list_type", group_list_type, 0, 1)
    require_value(name, "dst_type", dst_type, None, torch.int8)
    groups = 1
    if group_index is not None:
        require_dtype(name, "group_index", group_index, torch.int32)
        require_dim(name, "group_index", group_index, 1)
        groups = group_index.shape[0]
        require(groups > 0, name, "group_index", "at least one group", group_index)
    if quant_mode == 0 and smooth_scales is None:
        refuse(name, "smooth_scales", "a tensor, for static quantization", None)
    if quant_mode == 1:
        require_absent(name, "quantization is dynamic", offsets=offsets)
    if smooth_scales is not None:
        require_dtype(name, "smooth_scales", smooth_scales, torch.float32)
        require_shape(name, "smooth_scales", smooth_scales, (groups, x.shape[-1] // 2), (groups,))
    if offsets is not None:
        assert smooth_scales is not None
        require_dtype(name, "offsets", offsets, torch.float32)
        require_shape(name, "offsets", offsets, smooth_scales.shape)


def npu_swiglu_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU, then quantization. NB: by DEFAULT the RIGHT half is activated, and the scale is 127 / max.

        y = silu(right) * left, or silu(left) * right with activate_left;  z = y * smooth_scales[g]
        quant_mode 1, dynamic: scale = 127 / max|z|;  out = rint(z * scale): DIVIDE by the scale to dequantize
        quant_mode 0, static:  out = saturate(rint(z + offsets[g]))

    Args:
        x: float16, bfloat16 or float32 [..., 2N].
        smooth_scales: float32 [G, N] or [G] (G = 1 without group_index). offsets: alike, static only.
        group_index: int32 [G]; group_list_type 0: running totals of rows, 1: counts. Rows past them are garbage.

    Returns:
        out: int8 [..., N].
        scale: float32 [...]; infinite for a row of zeros, garbage for static quantization.

    Source: op-plugin torch_npu-npu_swiglu_quant.md; ops-nn quant/swi_glu_quant/op_kernel/swi_glu_quant.h.
    """
    name = "npu_swiglu_quant"
    _check_swiglu_quant(
        x,
        smooth_scales=smooth_scales,
        offsets=offsets,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=quant_mode,
        group_list_type=group_list_type,
        dst_type=dst_type,
    )
    shape, width = x.shape[:-1], x.shape[-1] // 2
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if group_index is None:
        group = torch.zeros(rows, dtype=torch.int64)
    else:
        group = rows_of_groups(name, group_index, rows, counts=group_list_type == 1)

    def of_rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[group].view(group.shape[0], -1)

    left, right = flat[: group.shape[0]].to(torch.float32).chunk(2, dim=-1)
    y = silu(left) * right if activate_left else silu(right) * left
    if smooth_scales is not None:
        y = y * of_rows(smooth_scales)
    if quant_mode == 0:
        out = round_to_int(y if offsets is None else y + of_rows(offsets), INT8).to(torch.int8)
        scale = _garbage((rows,), torch.float32)
    else:
        multiplier = 127.0 / y.abs().amax(dim=-1)
        out = round_to_int(y * multiplier[:, None], INT8).to(torch.int8)
        scale = _padded(multiplier, rows)
    return _padded(out, rows).view(*shape, width), scale.view(shape)


def npu_swiglu_quant_fake(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _check_swiglu_quant(x, **options)
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8)
    return out, x.new_empty(x.shape[:-1], dtype=torch.float32)
