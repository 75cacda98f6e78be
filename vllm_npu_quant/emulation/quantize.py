# SPDX-License-Identifier: Apache-2.0
"""Operators that turn floating-point tensors into integers.

Sources are named as in Huawei's repositories: op-plugin (the Python interface, its documents and its NumPy tests) and
ops-nn (the kernels and their golden.py). Everything is computed in float32, whatever the input's dtype.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.checks import (
    form,
    refuse,
    remember,
    require,
    require_dim,
    require_dtype,
    require_shape,
    require_value,
)
from vllm_npu_quant.emulation.numerics import (
    DTYPE_OF_CODE,
    INT4,
    INT4_PER_INT32,
    INT8,
    keep_19_bits,
    pack_int4,
    pack_quant_param,
    round_to_int,
    unpack_int4,
)

__all__ = [
    "npu_anti_quant",
    "npu_anti_quant_fake",
    "npu_dynamic_quant",
    "npu_dynamic_quant_asymmetric",
    "npu_dynamic_quant_asymmetric_fake",
    "npu_dynamic_quant_fake",
    "npu_dynamic_quant_fast",
    "npu_kronecker_quant",
    "npu_kronecker_quant_fake",
    "npu_quantize",
    "npu_quantize_fake",
    "npu_trans_quant_param",
    "npu_trans_quant_param_fake",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)

#: dtype codes of npu_quantize: (output dtype, limits). int8 = 1, qint8 = 12, quint8 = 13, qint32 = 14, quint4x2 = 16.
_MULTIPLYING = {1: (torch.int8, INT8), 12: (torch.int8, INT8), 16: (torch.int32, INT4)}
_DIVIDING = {
    12: (torch.int8, INT8),
    13: (torch.uint8, (0, 255)),
    3: (torch.int32, (-(2**31), 2**31 - 1)),
    14: (torch.int32, (-(2**31), 2**31 - 1)),
}
_PACKED_INT4 = 16


def _check_quantize(
    x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, dtype: int, axis: int, div_mode: bool
) -> tuple[int, torch.dtype, tuple[int, int]]:
    """The axis that the scales run along (not negative), the output's dtype and the limits of the integers."""
    name = "npu_quantize"
    require_dtype(name, "input", x, *FLOATS)
    require_dim(name, "input", x, 1, 8)
    table = _DIVIDING if div_mode else _MULTIPLYING
    if dtype not in table:
        names = "qint8, quint8, int32" if div_mode else "int8, qint8, quint4x2"
        refuse(name, "dtype", f"{names} with div_mode={div_mode}", dtype)
    if div_mode:
        require(-x.dim() <= axis < x.dim(), name, "axis", f"a dimension of {list(x.shape)}", axis)
        axis = axis % x.dim()
        require_dtype(name, "scales", scales, torch.float32, torch.bfloat16)
        if zero_points is not None:
            require_dtype(name, "zero_points", zero_points, torch.int8, torch.uint8, torch.int32, torch.bfloat16)
            require_shape(name, "zero_points", zero_points, scales.shape)
        require_shape(name, "scales", scales, (1,), (x.shape[axis],))
    else:
        # The interface keeps only axis=-2; every other value means the last dimension.
        require(axis >= -2, name, "axis", "-2 or greater", axis)
        require(axis != -2 or x.dim() >= 2, name, "axis", "-1 for a 1-D input", axis)
        axis = x.dim() + (axis if axis == -2 else -1)
        require_dtype(name, "scales", scales, x.dtype)
        if zero_points is not None:
            require_dtype(name, "zero_points", zero_points, x.dtype)
            require_shape(name, "zero_points", zero_points, scales.shape)
        ones = [1] * x.dim()
        along = list(ones)
        along[axis] = x.shape[axis]
        require_shape(name, "scales", scales, (1,), (x.shape[axis],), ones, along)
    if dtype == _PACKED_INT4:
        require(x.shape[-1] % INT4_PER_INT32 == 0, name, "input", "a last dimension that 8 divides for quint4x2", x)
    return axis, *table[dtype]


def npu_quantize(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """Static quantization; note that ``div_mode=False`` MULTIPLIES by the scales.

        div_mode=True:  y = saturate(rint(x / scales + zero_points))
        div_mode=False: y = saturate(rint(x * scales + zero_points))

    Args:
        input: float16, bfloat16 or float32, 1 to 8 dimensions.
        scales: div_mode=True: float32 or bfloat16, [1] or [input.shape[axis]]. div_mode=False: the input's dtype; [1],
            [size of the axis], or the input's number of dimensions with 1 everywhere but at the axis.
        zero_points: None, or the shape of ``scales``. div_mode=True: int8, uint8, int32 or bfloat16. div_mode=False:
            the input's dtype.
        dtype: div_mode=True: torch.qint8, torch.quint8 or torch.int32 (qint32). div_mode=False: torch.qint8 or int8, or
            torch.quint4x2 (eight integers of the last dimension in one int32).
        axis: div_mode=True: the scales' dimension. div_mode=False: -2 means rows, every other value the last dimension.

    Source: op-plugin torch_npu-npu_quantize.md, QuantizeKernelNpuOpApi.cpp; ops-nn quant/ascend_quant_v2 and
    quant/quantize.
    """
    axis, out_dtype, limits = _check_quantize(input, scales, zero_points, dtype, axis, div_mode)

    def along_axis(tensor: torch.Tensor) -> torch.Tensor:
        shape = [1] * input.dim()
        shape[axis] = tensor.numel()
        return tensor.to(torch.float32).reshape(shape)

    x = input.to(torch.float32)
    x = x / along_axis(scales) if div_mode else x * along_axis(scales)
    if zero_points is not None:
        x = x + along_axis(zero_points)
    if limits[1] > 2**24:
        x = x.to(torch.float64)  # 2**31 - 1 has no float32
    y = round_to_int(x, limits)
    return pack_int4(y.to(torch.int8)) if dtype == _PACKED_INT4 else y.to(out_dtype)


def npu_quantize_fake(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    _, out_dtype, _ = _check_quantize(input, scales, zero_points, dtype, axis, div_mode)
    return _empty_quantized(input, out_dtype, packed=dtype == _PACKED_INT4)


def _empty_quantized(x: torch.Tensor, dtype: torch.dtype, *, packed: bool) -> torch.Tensor:
    shape = [*x.shape[:-1], x.shape[-1] // INT4_PER_INT32] if packed else x.shape
    return x.new_empty(shape, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------


def check_dynamic_quant(
    name: str,
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> bool:
    """Shared rules of npu_dynamic_quant and npu_dynamic_quant_asymmetric; True if the output is packed int4."""
    # The Meta kernel takes float32 and 1-D inputs; the device does not.
    require_dtype(name, "input", x, *HALVES)
    require_dim(name, "input", x, 2, 8)
    require_value(name, "quant_mode", quant_mode, "pertoken")
    require_value(name, "dst_type_max", dst_type_max, 0.0)
    if dst_type not in (None, 1, _PACKED_INT4):
        refuse(name, "dst_type", "None, torch.int8 or torch.quint4x2", dst_type)
    packed = dst_type == _PACKED_INT4
    if packed:
        require(x.shape[-1] % INT4_PER_INT32 == 0, name, "input", "a last dimension that 8 divides for quint4x2", x)
    if smooth_scales is not None:
        require_dtype(name, "smooth_scales", smooth_scales, x.dtype)
        if group_index is None:
            require_shape(name, "smooth_scales", smooth_scales, (x.shape[-1],))
    if group_index is not None:
        if smooth_scales is None:
            refuse(name, "smooth_scales", "a tensor, since group_index is given", None)
        require_dtype(name, "group_index", group_index, torch.int32)
        require_dim(name, "group_index", group_index, 1)
        require_shape(name, "smooth_scales", smooth_scales, (group_index.shape[0], x.shape[-1]))
        require(group_index.shape[0] <= 1024, name, "group_index", "at most 1024 groups", group_index)
    return packed


def smoothed(
    name: str, x: torch.Tensor, smooth_scales: torch.Tensor | None, group_index: torch.Tensor | None
) -> torch.Tensor:
    """``x * smooth_scales`` in float32. With group_index (running totals of rows), row r takes the scales of the first
    group whose total exceeds r."""
    x32 = x.to(torch.float32)
    if smooth_scales is None:
        return x32
    scales = smooth_scales.to(torch.float32)
    if group_index is None:
        return x32 * scales
    rows = x32.reshape(-1, x.shape[-1])
    ends = group_index.tolist()
    increasing = all(first <= second for first, second in itertools.pairwise(ends))
    require(
        increasing and ends[-1] == rows.shape[0],
        name,
        "group_index",
        f"running totals that end in the {rows.shape[0]} rows",
        ends,
    )
    group = torch.searchsorted(group_index.contiguous(), torch.arange(rows.shape[0], dtype=torch.int32), right=True)
    return (rows * scales[group]).view(x.shape)


def npu_dynamic_quant(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantization of every row (token) with a scale of its own.

        x' = x * smooth_scales;  scale = max|x'| / MAX;  y = rint(x' * (MAX / max|x'|))      MAX = 127 (int8), 7 (int4)

    A row of zeros gives y = 0 and scale = 0, no epsilon: MAX / 0 is infinite, 0 * inf is NaN, and NaN is cast to 0.

    Args:
        input: float16 or bfloat16, 2 to 8 dimensions [..., H].
        smooth_scales: None, or the input's dtype: [H]; with group_index [G, H].
        group_index: int32 [G], running totals of rows; the last is the number of rows.
        dst_type: None or torch.int8; torch.quint4x2 packs eight int4 of the last dimension into one int32.

    Returns:
        y: int8 [..., H], or int32 [..., H/8].
        scale: float32 [...], to multiply y with.

    Source: op-plugin torch_npu-npu_dynamic_quant.md; ops-nn quant/dynamic_quant/op_kernel. Kernels multiply by the
    reciprocal, golden.py divides; they may differ by 1 in y, and by 1 ulp in the scale.
    """
    packed = check_dynamic_quant(
        "npu_dynamic_quant", input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max
    )
    limits = INT4 if packed else INT8
    x = smoothed("npu_dynamic_quant", input, smooth_scales, group_index)
    y, scale = quantize_rows(x, limits)
    return (pack_int4(y) if packed else y), scale


def quantize_rows(x: torch.Tensor, limits: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantization of float32 rows: (int8 integers, float32 scale = max|row| / MAX)."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    # A Python number over a tensor would be the number times the rounded reciprocal.
    factor = torch.full_like(largest, limits[1]) / largest
    y = round_to_int(x * factor, limits).to(torch.int8)
    return y, (largest / float(limits[1])).squeeze(-1)


#: The native kernel, if there is one, for the calls without smoothing that passed their check.
_quantizers: dict[Any, tuple[native.DynamicQuant | None]] = {}


def npu_dynamic_quant_fast(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_dynamic_quant in one pass over the rows, the same numbers; with smoothing or to int4, the reference."""
    if smooth_scales is None and group_index is None:
        key = (form(input), dst_type, quant_mode, dst_type_max)
        known = _quantizers.get(key)
        if known is None:
            packed = check_dynamic_quant("npu_dynamic_quant", input, None, None, dst_type, quant_mode, dst_type_max)
            plain = not packed and input.is_contiguous() and input.numel() > 0 and native.available()
            known = remember(_quantizers, key, (native.DynamicQuant(input) if plain else None,))
        (quantizer,) = known
        if quantizer is not None:
            calls.remember_dynamic_quant("npu_dynamic_quant", quantizer)
            return quantizer(input)
    return npu_dynamic_quant(
        input,
        smooth_scales=smooth_scales,
        group_index=group_index,
        dst_type=dst_type,
        quant_mode=quant_mode,
        dst_type_max=dst_type_max,
    )


def npu_dynamic_quant_fake(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = check_dynamic_quant(
        "npu_dynamic_quant", input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max
    )
    y = _empty_quantized(input, torch.int32 if packed else torch.int8, packed=packed)
    return y, input.new_empty(input.shape[:-1], dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------


def npu_dynamic_quant_asymmetric(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric quantization of every row (token); x is about (y - offset) * scale.

        x' = x * smooth_scales;  scale = max((max x' - min x') / (HIGH - LOW), 1e-12);  offset = HIGH - max x' / scale
        y = saturate(rint(x' / scale + offset))                  HIGH - LOW = 255, HIGH = 127 (int8); 15 and 7 (int4)

    The offset is a float32 that is not rounded.

    Args:
        See npu_dynamic_quant.

    Returns:
        y: int8 [..., H], or int32 [..., H/8].
        scale, offset: float32 [...].

    Source: op-plugin torch_npu-npu_dynamic_quant_asymmetric.md; ops-nn quant/dynamic_quant/op_kernel.
    """
    name = "npu_dynamic_quant_asymmetric"
    packed = check_dynamic_quant(name, input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max)
    limits = INT4 if packed else INT8
    x = smoothed(name, input, smooth_scales, group_index)
    top, bottom = x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True)
    scale = ((top - bottom) / float(limits[1] - limits[0])).clamp(min=1e-12)
    offset = float(limits[1]) - top / scale
    y = round_to_int(x / scale + offset, limits).to(torch.int8)
    return (pack_int4(y) if packed else y), scale.squeeze(-1), offset.squeeze(-1)


def npu_dynamic_quant_asymmetric_fake(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    name = "npu_dynamic_quant_asymmetric"
    packed = check_dynamic_quant(name, input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max)
    y = _empty_quantized(input, torch.int32 if packed else torch.int8, packed=packed)
    scale, offset = (input.new_empty(input.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y, scale, offset


# ---------------------------------------------------------------------------------------------------------------------


def _check_kronecker_quant(
    x: torch.Tensor,
    kronecker_p1: torch.Tensor,
    kronecker_p2: torch.Tensor,
    clip_ratio: float | None = None,
    dst_dtype: int | None = None,
    dst_type_max: float | None = None,
) -> None:
    name = "npu_kronecker_quant"
    require_dtype(name, "x", x, *HALVES)
    require_dim(name, "x", x, 3)
    rows, columns = x.shape[1:]
    require(1 <= x.shape[0] <= 262144, name, "x", "a first dimension of 1 to 262144", x)
    require(rows <= 256 and columns <= 256, name, "x", "last dimensions of at most 256", x)
    require(columns % INT4_PER_INT32 == 0, name, "x", "a last dimension that 8 divides", x)
    for argument, tensor, size in (("kronecker_p1", kronecker_p1, rows), ("kronecker_p2", kronecker_p2, columns)):
        require_dtype(name, argument, tensor, x.dtype)
        require_shape(name, argument, tensor, (size, size))
    require(clip_ratio is None or 0 < clip_ratio <= 1, name, "clip_ratio", "None or a number in (0, 1]", clip_ratio)
    require_value(name, "dst_dtype", dst_dtype, None, 3)
    require(not dst_type_max, name, "dst_type_max", "None or 0.0", dst_type_max)


def npu_kronecker_quant(
    x: torch.Tensor,
    kronecker_p1: torch.Tensor,
    kronecker_p2: torch.Tensor,
    clip_ratio: float | None = None,
    dst_dtype: int | None = None,
    dst_type_max: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlatQuant's transform and int4 quantization of every token.

        x' = round(x @ p2);  x'' = p1 @ x';  scale = max|x''| / (7 / clip_ratio);  y = saturate(rint(x'' / scale))

    x' is rounded to the input's dtype; x'' stays float32. (op-plugin's golden truncates y, and its test is skipped; the
    kernel rounds.) A token of zeros gives y = 0 and scale = 0.

    Args:
        x: float16 or bfloat16 [K, M, N] (K tokens); M and N at most 256, 8 divides N.
        kronecker_p1: the same dtype [M, M]. kronecker_p2: the same dtype [N, N].
        clip_ratio: None (1.0) or a number in (0, 1].
        dst_dtype: None or torch.int32.

    Returns:
        out: int32 [K, M, N/8], eight int4 in each.
        quant_scale: float32 [K].

    Source: op-plugin torch_npu-npu_kronecker_quant.md; ops-nn matmul/flat_quant.
    """
    _check_kronecker_quant(x, kronecker_p1, kronecker_p2, clip_ratio, dst_dtype, dst_type_max)
    right = torch.matmul(x.to(torch.float32), kronecker_p2.to(torch.float32)).to(x.dtype)
    both = torch.matmul(kronecker_p1.to(torch.float32), right.to(torch.float32))
    largest = both.abs().amax(dim=(1, 2))
    scale = largest / (7.0 / (1.0 if clip_ratio is None else clip_ratio))
    return pack_int4(round_to_int(both / scale[:, None, None], INT4).to(torch.int8)), scale


def npu_kronecker_quant_fake(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _check_kronecker_quant(x, *args, **kwargs)
    return _empty_quantized(x, torch.int32, packed=True), x.new_empty((x.shape[0],), dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------


def _check_anti_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> tuple[list[int], torch.dtype]:
    """The output's shape and dtype."""
    name = "npu_anti_quant"
    require_dtype(name, "x", x, torch.int8, torch.int32)
    require_dim(name, "x", x, 1, 8)
    shape = list(x.shape)
    if x.dtype == torch.int32:
        shape[-1] *= INT4_PER_INT32
    require_dtype(name, "scale", scale, torch.float32, torch.bfloat16)
    require_shape(name, "scale", scale, (1,), (shape[-1],))
    if offset is not None:
        require_dtype(name, "offset", offset, scale.dtype)
        require_shape(name, "offset", offset, scale.shape)
    require_value(name, "src_dtype", src_dtype, None, 1 if x.dtype == torch.int8 else _PACKED_INT4)
    out_dtype = torch.float16 if dst_dtype is None else DTYPE_OF_CODE.get(dst_dtype)
    if out_dtype not in HALVES:
        refuse(name, "dst_dtype", "None, float16 or bfloat16", out_dtype or dst_dtype)
    return shape, out_dtype


def npu_anti_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> torch.Tensor:
    """(x + offset) * scale in float32, one rounding to the output's dtype.

    Args:
        x: int8 [..., N], or int4 packed in int32 [..., N/8].
        scale: float32 or bfloat16, [1] or [N].
        offset: None, or like scale.
        dst_dtype: None (float16), torch.float16 or torch.bfloat16.
        src_dtype: None, or what x holds: torch.int8, torch.quint4x2.

    Source: op-plugin torch_npu-npu_anti_quant.md.
    """
    _, out_dtype = _check_anti_quant(x, scale, offset=offset, dst_dtype=dst_dtype, src_dtype=src_dtype)
    values = (unpack_int4(x) if x.dtype == torch.int32 else x).to(torch.float32)
    if offset is not None:
        values = values + offset.to(torch.float32)
    return (values * scale.to(torch.float32)).to(out_dtype)


def npu_anti_quant_fake(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    shape, out_dtype = _check_anti_quant(x, *args, **kwargs)
    return x.new_empty(shape, dtype=out_dtype)


# ---------------------------------------------------------------------------------------------------------------------


def _check_trans_quant_param(scale: torch.Tensor, offset: torch.Tensor | None, round_mode: int | None) -> list[int]:
    """The shape of the output."""
    name = "npu_trans_quant_param"
    require_value(name, "round_mode", round_mode, 0, 1, None)
    require_dtype(name, "scale", scale, torch.float32)
    require(scale.dim() == 1 or (scale.dim() == 2 and scale.shape[0] == 1), name, "scale", "shape [n] or [1, n]", scale)
    require(scale.is_contiguous(), name, "scale", "a contiguous tensor", scale)
    require(scale.shape[-1] > 0, name, "scale", "at least one element", scale)
    shape = list(scale.shape)
    if offset is not None:
        require_dtype(name, "offset", offset, torch.float32)
        require(offset.is_contiguous(), name, "offset", "a contiguous tensor", offset)
        require_dim(name, "offset", offset, scale.dim())
        if scale.dim() == 2 or (scale.shape[0] != 1 and offset.shape[0] != 1):
            require_shape(name, "offset", offset, scale.shape)
        shape[-1] = max(scale.shape[-1], offset.shape[-1])
    return shape


def npu_trans_quant_param(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0
) -> torch.Tensor:
    """Pack a float32 scale, and an offset, into the int64 that the matrix unit's fix-pipe reads.

        bits 0..31: the scale's bits with the low 13 cleared;  bit 46: 1;  bits 37..45: clamp(rint(offset), -256, 255)

    Args:
        scale: float32 [n] or [1, n], contiguous.
        offset: None or float32 of as many dimensions; 1-D scale and offset of size 1 are broadcast against each other.
        round_mode: 0 truncates the scale to 19 bits; 1 rounds half to even, and denormals become zero.

    Returns:
        int64 of the broadcast shape.

    Source: op-plugin torch_npu-npu_trans_quant_param.md; ops-nn quant/trans_quant_param_v2/op_kernel.
    """
    shape = _check_trans_quant_param(scale, offset, round_mode)
    if round_mode == 1:
        bits = _round_to_19_bits(scale)
    else:
        bits = keep_19_bits(scale).view(torch.int32)
    return pack_quant_param(bits, offset).expand(shape).contiguous()


def _round_to_19_bits(scale: torch.Tensor) -> torch.Tensor:
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    exponent = magnitude & 0x7F800000
    rounded = (magnitude + 0xFFF + ((magnitude >> 13) & 1)) & ~0x1FFF
    rounded = torch.where(exponent == 0x7F800000, magnitude & ~0x1FFF, rounded)
    return (sign | torch.where(exponent == 0, 0, rounded)).to(torch.int32)


def npu_trans_quant_param_fake(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0
) -> torch.Tensor:
    return scale.new_empty(_check_trans_quant_param(scale, offset, round_mode), dtype=torch.int64)
