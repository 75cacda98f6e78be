# SPDX-License-Identifier: Apache-2.0
"""What the operators should compute, a second time: NumPy, from the documented formulas, sharing no code with the package.

Every oracle takes the operator's arguments with tensors replaced by ``Array`` (exact values in float64 or int64, and the
name of the dtype) and returns one ``Expected`` for every output tensor. Where a result is an integer, the oracle follows
the documented float32 steps, and the comparison is for equality. Where it is a float, the oracle computes in float64, and
``mismatch`` allows half a unit in the last place of the output's dtype (one rounding) plus ``slack``, a bound on what the
float32 steps before that rounding may lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Relative error of one float32 operation.
EPS32 = 2.0**-24
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
MIN_EXPONENT = {"bfloat16": -126, "float16": -14, "float32": -126}
FLOATS = tuple(MANTISSA_BITS)


@dataclass(frozen=True)
class Array:
    values: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


@dataclass(frozen=True)
class Expected:
    """An output. ``slack``: absolute error allowed on top of half a ulp. ``written``: False where the device writes nothing,
    and the emulation must leave garbage (NaN, or bytes of 0x7f)."""

    values: np.ndarray
    dtype: str
    slack: Any = 0.0
    written: Any = True


def f32(values: Any) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


def ulp(dtype: str, values: np.ndarray) -> np.ndarray:
    """The distance of neighbouring numbers of ``dtype`` at ``values``."""
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent - 1, MIN_EXPONENT[dtype]) - MANTISSA_BITS[dtype])


def rounded(dtype: str, values: Any) -> np.ndarray:
    """Round to a dtype, half to even; the result stays float64."""
    values = np.asarray(values, dtype=np.float64)
    if dtype == "float32":
        return values.astype(np.float32).astype(np.float64)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float64)
    unit = ulp(dtype, values)
    return np.rint(values / unit) * unit


def mismatch(actual: Array, expected: Expected) -> str | None:
    """What is wrong with an output, or None."""
    if actual.dtype != expected.dtype:
        return f"dtype {actual.dtype}, expected {expected.dtype}"
    if actual.shape != np.shape(expected.values):
        return f"shape {actual.shape}, expected {np.shape(expected.values)}"
    written = np.broadcast_to(expected.written, actual.shape)
    if expected.dtype in FLOATS:
        wanted = np.asarray(expected.values, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            error = np.abs(actual.values - wanted)
        finite = np.isfinite(wanted)
        tolerance = 0.5 * ulp(expected.dtype, np.where(finite, wanted, 0.0)) + expected.slack
        good = np.where(
            finite, error <= tolerance, (actual.values == wanted) | (np.isnan(actual.values) & np.isnan(wanted))
        )
        garbage = np.isnan(actual.values)
    else:
        good = actual.values == expected.values
        garbage_value = {"int8": 0x7F, "uint8": 0x7F, "int32": 0x7F7F7F7F, "int64": 0x7F7F7F7F7F7F7F7F}[expected.dtype]
        garbage = actual.values == garbage_value
    bad = np.where(written, ~good, ~garbage)
    if not bad.any():
        return None
    where = tuple(int(index) for index in np.argwhere(bad)[0])
    wanted_text = np.asarray(expected.values)[where] if np.broadcast_to(written, actual.shape)[where] else "garbage"
    return (
        f"{int(bad.sum())} of {bad.size} elements; first at {where}: {actual.values[where]!r}, expected {wanted_text!r}"
    )


# ------------------------------------------------------------------------------------------------------------- integers


def to_int(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Half to even, saturate, NaN to 0; int64."""
    with np.errstate(invalid="ignore"):
        result = np.clip(np.rint(values.astype(np.float64)), low, high)
    return np.where(np.isnan(values), 0.0, result).astype(np.int64)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n/8] int32 to [..., n] in [-8, 7]; element i in bits 4i to 4i + 3."""
    unsigned = np.asarray(packed).astype(np.int64) & 0xFFFFFFFF
    parts = [(unsigned >> (4 * i)) & 0xF for i in range(8)]
    stacked = np.stack(parts, axis=-1).reshape(*packed.shape[:-1], 8 * packed.shape[-1])
    return np.where(stacked > 7, stacked - 16, stacked)


def packed_nibbles(values: np.ndarray) -> np.ndarray:
    groups = values.reshape(*values.shape[:-1], -1, 8).astype(np.int64) & 0xF
    total = sum(groups[..., i] << (4 * i) for i in range(8))
    return np.where(total >= 2**31, total - 2**32, total)


def cut_to_19_bits(values: np.ndarray) -> np.ndarray:
    bits = f32(values).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


def low_word_as_float(values: np.ndarray) -> np.ndarray:
    return (values & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


# ------------------------------------------------------------------------------------------------------------- quantize

_INT_OF_CODE = {
    1: ("int8", -128, 127),
    12: ("int8", -128, 127),
    13: ("uint8", 0, 255),
    14: ("int32", -(2**31), 2**31 - 1),
    3: ("int32", -(2**31), 2**31 - 1),
    16: ("int32", -8, 7),
}


def npu_quantize(x: Array, scales: Array, zero_points: Array | None, dtype: int, axis: int = 1, div_mode: bool = True):
    if not div_mode:
        axis = -2 if axis == -2 else -1
    shape = np.ones(x.values.ndim, dtype=int)
    shape[axis] = -1
    scale = f32(scales.values).reshape(shape)
    y = f32(x.values) / scale if div_mode else f32(x.values) * scale
    if zero_points is not None:
        y = y + f32(zero_points.values).reshape(shape)
    name, low, high = _INT_OF_CODE[dtype]
    integers = to_int(y, low, high)
    return [Expected(packed_nibbles(integers) if dtype == 16 else integers, name)]


def quantized_rows(x: np.ndarray, largest_integer: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 rows to (integers, float32 scales); a row of zeros to zeros and 0."""
    top = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = x * (np.float32(largest_integer) / top)
    return to_int(y, -largest_integer - 1, largest_integer), (top / np.float32(largest_integer))[..., 0]


def _smooth(x: Array, smooth_scales: Array | None, group_index: Array | None) -> np.ndarray:
    values = f32(x.values)
    if smooth_scales is None:
        return values
    if group_index is None:
        return values * f32(smooth_scales.values)
    rows = values.reshape(-1, values.shape[-1]).copy()
    start = 0
    for scales, end in zip(f32(smooth_scales.values), group_index.values, strict=True):
        rows[start:end] *= scales
        start = end
    return rows.reshape(values.shape)


def npu_dynamic_quant(x: Array, *, smooth_scales=None, group_index=None, dst_type=None):
    four_bits = dst_type == 16
    y, scale = quantized_rows(_smooth(x, smooth_scales, group_index), 7 if four_bits else 127)
    return [
        Expected(packed_nibbles(y) if four_bits else y, "int32" if four_bits else "int8"),
        Expected(scale, "float32"),
    ]


def npu_trans_quant_param(scale: Array, offset: Array | None = None, round_mode: int = 0):
    bits = f32(scale.values).view(np.uint32).astype(np.int64)
    if round_mode == 1:
        exponent = (bits >> 23) & 0xFF
        below, kept = bits & 0x1FFF, bits >> 13
        up = (below > 0x1000) | ((below == 0x1000) & (kept & 1 == 1))
        bits = np.where(exponent == 0, bits & 0x80000000, (kept + up) << 13)
    word = (bits & 0xFFFFE000) | (1 << 46)
    if offset is not None:
        word = word | ((to_int(f32(offset.values), -256, 255) & 0x1FF) << 37)
    return [Expected(word, "int64")]


# --------------------------------------------------------------------------------------------------------------- matmul


def _requantized(values: np.ndarray, factor: np.ndarray, offset: Any) -> np.ndarray:
    """int8 of a float32 tensor through the fix-pipe: 9 bits, offset, 8 bits."""
    return np.clip(to_int(values * factor, -256, 255) + offset, -128, 127)


def _fixpipe(scale: Array, offset: Array | None) -> tuple[np.ndarray, np.ndarray]:
    if scale.dtype == "int64":
        raw = (scale.values >> 37) & 0x1FF
        return cut_to_19_bits(low_word_as_float(scale.values)), np.where(raw > 255, raw - 512, raw)
    return cut_to_19_bits(scale.values), (np.int64(0) if offset is None else to_int(f32(offset.values), -256, 255))


def npu_quant_matmul(
    x1: Array,
    x2: Array,
    scale: Array,
    *,
    offset=None,
    pertoken_scale=None,
    bias=None,
    output_dtype=None,
    group_sizes=None,
):
    dtype = {None: "int8", 1: "int8", 3: "int32", 5: "float16", 15: "bfloat16"}[output_dtype]
    left, right = x1.values, x2.values
    if x1.dtype == "int32":
        left = nibbles(left)
    if x2.dtype == "int32":
        along_n = right.shape[0] == left.shape[-1]
        right = nibbles(right) if along_n else nibbles(right.T).T
    if x1.dtype == "int8" and x2.dtype == "int32":
        return _int8_int4(left, right, low_word_as_float(scale.values), offset.values, pertoken_scale.values, dtype)
    if scale.values.ndim == 2:
        return _grouped_int4(left, right, scale.values, offset.values, pertoken_scale.values, dtype)

    acc = left @ right
    if bias is not None and bias.dtype == "int32":
        acc = acc + bias.values
    if dtype == "int32":
        return [Expected(acc, dtype)]
    if pertoken_scale is None and dtype in ("float16", "int8"):
        factor, offset9 = _fixpipe(scale, offset)
        if dtype == "int8":
            return [Expected(_requantized(f32(acc), factor, offset9), dtype)]
        out = acc * factor.astype(np.float64)
    else:
        out = acc * scale.values.astype(np.float64)
    if pertoken_scale is not None:
        out = out * pertoken_scale.values[:, None]
    slack = 4 * EPS32 * np.abs(out)
    if bias is not None and bias.dtype != "int32":
        out = out + bias.values
        slack = slack + EPS32 * np.abs(out)
    return [Expected(out, dtype, slack)]


def _grouped_int4(left, right, scale, offset, pertoken_scale, dtype):
    """pertoken * sum over groups of 256 inputs of scale * x @ (w - offset)."""
    depth = left.shape[1]
    group = np.arange(depth) // 256
    weight = (right - offset[group]) * scale[group]
    out = (left @ weight) * pertoken_scale
    slack = 64 * EPS32 * (np.abs(left) @ (np.abs(right) + np.abs(offset[group])) * np.abs(scale).max() * pertoken_scale)
    return [Expected(out, dtype, slack)]


def _int8_int4(x, weight, scale, offset, pertoken_scale, dtype):
    """The product on int4 units, with the partial sums of the groups kept in float16."""
    high, low = x // 16, x % 16 - 8
    size = x.shape[1] // scale.shape[0]
    sums = []
    for half in (high, low):
        total = np.zeros((x.shape[0], weight.shape[1]), dtype=np.float16)
        for index, row in enumerate(scale):
            part = slice(index * size, (index + 1) * size)
            total = total + (f32(half[:, part] @ weight[part]) * row).astype(np.float16)
        sums.append(total.astype(np.float64))
    out = (16 * sums[0] + sums[1] + offset) * pertoken_scale
    slack = 4 * EPS32 * (16 * np.abs(sums[0]) + np.abs(sums[1]) + np.abs(offset)) * pertoken_scale
    return [Expected(out, dtype, slack)]


def dequantized(weight: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, dtype: str) -> np.ndarray:
    """float16: two roundings to float16. bfloat16: float32 steps and one rounding."""
    step = dtype if dtype == "float16" else "float32"
    shifted = weight if offset is None else rounded(step, weight + offset)
    return rounded(dtype, rounded(step, shifted * scale))


def npu_weight_quant_batchmatmul(
    x: Array,
    weight: Array,
    antiquant_scale: Array,
    antiquant_offset=None,
    quant_scale=None,
    quant_offset=None,
    bias=None,
    antiquant_group_size=0,
    inner_precise=0,
):
    integers = weight.values
    depth = x.values.shape[1]
    if weight.dtype == "int32":
        integers = nibbles(integers) if integers.shape[0] == depth else nibbles(integers.T).T
    scale, offset = antiquant_scale.values, None if antiquant_offset is None else antiquant_offset.values
    if antiquant_group_size:
        group = np.arange(depth) // antiquant_group_size
        scale = scale[group]
        offset = None if offset is None else offset[group]
    values = dequantized(integers, scale, offset, x.dtype)
    out = x.values @ values
    slack = depth * EPS32 * (np.abs(x.values) @ np.abs(values))
    if bias is not None:
        out = out + bias.values
        slack = slack + EPS32 * np.abs(out)
    if quant_scale is None:
        return [Expected(out, x.dtype, slack)]
    factor, offset9 = _fixpipe(quant_scale, quant_offset)
    return [Expected(_requantized(f32(out), factor, offset9), "int8")]


def npu_convert_weight_to_int4pack(weight: Array, inner_k_tiles: int = 0):
    return [Expected(packed_nibbles(weight.values), "int32")]


def npu_dynamic_quant_asymmetric(x: Array, *, smooth_scales=None, group_index=None, dst_type=None):
    four_bits = dst_type == 16
    high, low = (7, -8) if four_bits else (127, -128)
    values = _smooth(x, smooth_scales, group_index)
    top, bottom = values.max(axis=-1, keepdims=True), values.min(axis=-1, keepdims=True)
    scale = np.maximum((top - bottom) / np.float32(high - low), np.float32(1e-12))
    offset = np.float32(high) - top / scale
    y = to_int(values / scale + offset, low, high)
    return [
        Expected(packed_nibbles(y) if four_bits else y, "int32" if four_bits else "int8"),
        Expected(scale[..., 0], "float32"),
        Expected(offset[..., 0], "float32"),
    ]


def npu_kronecker_quant(x: Array, p1: Array, p2: Array, clip_ratio=None, dst_dtype=None):
    """The cases keep every sum exact in float32, so that float64 gives the same integers."""
    both = p1.values @ rounded(x.dtype, x.values @ p2.values)
    top = np.abs(f32(both)).max(axis=(1, 2))
    scale = top / np.float32(7.0 / (1.0 if clip_ratio is None else clip_ratio))
    with np.errstate(invalid="ignore"):
        y = to_int(f32(both) / scale[:, None, None], -8, 7)
    return [Expected(packed_nibbles(y), "int32"), Expected(scale, "float32")]


def npu_anti_quant(x: Array, scale: Array, *, offset=None, dst_dtype=None, src_dtype=None):
    values = nibbles(x.values) if x.dtype == "int32" else x.values
    shifted = values if offset is None else values + offset.values
    out = shifted * scale.values
    slack = 2 * EPS32 * (np.abs(out) + np.abs(scale.values) * np.abs(values))
    return [Expected(out, {None: "float16", 5: "float16", 15: "bfloat16"}[dst_dtype], slack)]


# -------------------------------------------------------------------------------------------------------------- grouped


def groups_of(group_list: np.ndarray, group_list_type: int) -> list[tuple[int, int, int]]:
    """(expert, start, end) for every group."""
    if group_list_type == 0:
        ends = [int(end) for end in group_list]
        return [(i, start, end) for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    pairs = [(int(e), int(n)) for e, n in (group_list if group_list_type == 2 else enumerate(group_list))]
    bounds, start = [], 0
    for expert, count in pairs:
        bounds.append((expert, start, start + count))
        start += count
    return bounds


def _activated(values: np.ndarray, act_type: int) -> np.ndarray:
    if act_type == 1:
        return np.maximum(values, 0.0)
    if act_type == 2:
        return 0.5 * values * (1 + np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)))
    if act_type == 4:
        return values / (1 + np.exp(-1.702 * values))
    return silu(values) if act_type == 5 else values


def _expert_product(x, weight, dtype, *, x_dtype, weight_dtype, bias, scale, shift, factor, per_token, act_type):
    """(values, slack) of one expert's rows; the parameters are Arrays of this expert or None."""
    if weight_dtype == "int32":
        rows = 8 * x.shape[1] if x_dtype == "int32" else x.shape[1]
        weight = nibbles(weight) if weight.shape[0] == rows else nibbles(weight.T).T
    if x_dtype == "int32":
        x = nibbles(x)
    if x_dtype not in ("int8", "int32"):
        if weight_dtype in ("int8", "int32"):
            repeat = 1 if factor.ndim == 1 else weight.shape[0] // factor.shape[0]
            wide = factor if factor.ndim == 1 else np.repeat(factor, repeat, axis=0)
            offset = shift if shift is None or shift.ndim == 1 else np.repeat(shift, repeat, axis=0)
            weight = dequantized(weight, wide, offset, x_dtype)
        out = x @ weight
        slack = x.shape[1] * EPS32 * (np.abs(x) @ np.abs(weight))
        if bias is not None:
            out = out + bias.values
        return out, slack + EPS32 * np.abs(out)
    if x_dtype == "int8" and weight_dtype == "int32":
        ones = np.ones((x.shape[0], 1)) if per_token is None else per_token.reshape(-1, 1)
        (expected,) = _int8_int4(x, weight, low_word_as_float(scale.values), bias.values, ones, dtype)
        return expected.values, expected.slack
    if x_dtype == "int32":
        factors = low_word_as_float(scale.values).astype(np.float64).reshape(-1, weight.shape[1])
        wide = np.repeat(factors, weight.shape[0] // factors.shape[0], axis=0)
        out = x @ (weight * wide)
        slack = 16 * EPS32 * (np.abs(x) @ np.abs(weight * wide))
        if per_token is not None:
            out, slack = out * per_token[:, None], slack * per_token[:, None]
        return out, slack + 2 * EPS32 * np.abs(out)
    acc = x @ weight
    if bias is not None and bias.dtype == "int32":
        acc = acc + bias.values
    if scale is None:
        return acc, 0
    if dtype == "int8":
        multiplier, offset9 = _fixpipe(scale, None)
        return _requantized(f32(acc), multiplier, offset9), 0
    out = acc * scale.values
    if per_token is not None:
        out = out * per_token[:, None]
    slack = 4 * EPS32 * np.abs(out)
    if bias is not None and bias.dtype != "int32":
        out = out + bias.values
        slack = slack + EPS32 * np.abs(out)
    # Activations have a slope of at most 1.2, and are themselves computed in float32.
    act = _activated(out, act_type)
    return act, slack if act_type == 0 else 1.2 * slack + 8 * EPS32 * (np.abs(out) + np.abs(act))


def _grouped(x, weight, bounds, dtype, act_type, *, bias, scale, antiquant_scale, antiquant_offset, per_token_scale):
    stacked = weight[0].values.ndim == 3

    def part(arrays, expert):
        if not arrays:
            return None
        return Array(arrays[0].values[expert], arrays[0].dtype) if stacked else arrays[expert]

    outputs = []
    for expert, start, end in bounds:
        rows = x[0].values[start:end] if len(x) == 1 else x[expert].values
        matrix = part(weight, expert)
        factor, shift = part(antiquant_scale, expert), part(antiquant_offset, expert)
        outputs.append(
            _expert_product(
                rows,
                matrix.values,
                dtype,
                x_dtype=x[0].dtype,
                weight_dtype=matrix.dtype,
                bias=part(bias, expert),
                scale=part(scale, expert),
                factor=None if factor is None else factor.values,
                shift=None if shift is None else shift.values,
                per_token=per_token_scale[0].values[start:end] if per_token_scale else None,
                act_type=act_type,
            )
        )
    return outputs


def _together(parts, rows: int, dtype: str) -> Expected:
    """One output of all groups; what they do not cover is not written."""
    width = parts[0][0].shape[1]
    values, slack = np.zeros((rows, width)), np.zeros((rows, width))
    end = 0
    for value, error in parts:
        values[end : end + len(value)], slack[end : end + len(value)] = value, error
        end += len(value)
    return Expected(values, dtype, slack, np.arange(rows)[:, None] < end)


def npu_grouped_matmul(
    x,
    weight,
    *,
    bias=None,
    scale=None,
    antiquant_scale=None,
    antiquant_offset=None,
    per_token_scale=None,
    group_list=None,
    split_item=0,
    group_type=None,
    group_list_type=0,
    act_type=0,
    output_dtype=None,
):
    dtype = {None: x[0].dtype, 1: "int8", 3: "int32", 5: "float16", 6: "float32", 15: "bfloat16"}[output_dtype]
    options = {
        "bias": bias,
        "scale": scale,
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
        "per_token_scale": per_token_scale,
    }
    if group_type == -1 or len(x) > 1:
        bounds = [(i, 0, 0) for i in range(len(x))]
    else:
        bounds = groups_of(group_list.values, group_list_type)
    parts = _grouped(x, weight, bounds, dtype, act_type, **options)
    if group_type == -1:
        return [Expected(value, dtype, slack) for value, slack in parts]
    return [_together(parts, sum(len(rows.values) for rows in x), dtype)]


def npu_grouped_matmul_list(x, weight, *, group_list=None, split_item=0, bias=None, scale=None, **antiquant):
    dtype = x[0].dtype
    bounds = groups_of(np.array(group_list), 0) if len(x) == 1 else [(i, 0, 0) for i in range(len(x))]
    options = {"antiquant_scale": None, "antiquant_offset": None, **antiquant, "per_token_scale": None}
    parts = _grouped(x, weight, bounds, dtype, 0, bias=bias, scale=scale, **options)
    if split_item in (0, 1):
        return [Expected(value, dtype, slack) for value, slack in parts]
    return [_together(parts, sum(len(rows.values) for rows in x), dtype)]


def npu_format_cast(x: Array, acl_format: int):
    return [Expected(x.values, x.dtype)]


# ----------------------------------------------------------------------------------------------------- norms, activation


def _rstd(x: np.ndarray, gamma: np.ndarray, epsilon: float) -> np.ndarray:
    axes = tuple(range(-gamma.ndim, 0))
    return 1.0 / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + epsilon)


def npu_rms_norm(x: Array, gamma: Array, epsilon: float = 1e-6):
    rstd = _rstd(x.values, gamma.values, epsilon)
    y = x.values * rstd * gamma.values
    return [Expected(y, x.dtype, 16 * EPS32 * np.abs(y)), Expected(rstd, "float32", 16 * EPS32 * rstd)]


def added_and_normalized(x1: Array, x2: Array, gamma: Array, epsilon: float):
    """(y as the sum of a value and its slack, rstd, x) with the rounding to the input's dtype before gamma."""
    x = rounded(x1.dtype, rounded("float32", x1.values + x2.values))
    rstd = _rstd(x, gamma.values, epsilon)
    normalized = x * rstd
    before = rounded(x1.dtype, normalized)
    # Where float32 error can push a value over a rounding boundary, the neighbour is right too.
    error = 16 * EPS32 * np.abs(normalized)
    doubtful = rounded(x1.dtype, normalized - error) != rounded(x1.dtype, normalized + error)
    slack = np.where(doubtful, ulp(x1.dtype, normalized), 2 * EPS32 * np.abs(before)) * np.abs(gamma.values)
    return before * gamma.values, slack, rstd, x


def npu_add_rms_norm(x1: Array, x2: Array, gamma: Array, epsilon: float = 1e-6):
    y, slack, rstd, x = added_and_normalized(x1, x2, gamma, epsilon)
    return [Expected(y, x1.dtype, slack), Expected(rstd, "float32", 16 * EPS32 * rstd), Expected(x, x1.dtype)]


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def npu_swiglu(x: Array, dim: int = -1):
    first, second = np.split(x.values, 2, axis=dim)
    y = silu(first) * second
    return [Expected(y, x.dtype, 16 * EPS32 * np.abs(y))]


#: Operator name -> oracle, as in the table of cases.
ORACLES: dict[str, Callable[..., list[Expected]]] = {
    name: function for name, function in globals().items() if name.startswith("npu_")
} | {"npu_grouped_matmul.List": npu_grouped_matmul_list}
