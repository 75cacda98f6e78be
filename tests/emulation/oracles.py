# SPDX-License-Identifier: Apache-2.0
"""What the operators should compute, a second time: NumPy, from the documented formulas, no code of the package.

Every oracle takes the operator's arguments with tensors replaced by ``Array`` (exact values in float64 or int64, and
the name of the dtype) and returns one ``Expected`` for every output tensor. Where a result is an integer, the oracle
follows the documented float32 steps, and the comparison is for equality. Where it is a float, the oracle computes in
float64, and ``mismatch`` allows half a unit in the last place of the output's dtype (one rounding) plus ``slack``, a
bound on what the float32 steps before that rounding may lose.
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
    """An output.

    Attributes:
        slack: the absolute error allowed; for floats on top of half a ulp; for integers 0, or 1 where the exact value
            lies so close to a tie that float32 steps decide.
        written: False where the device writes nothing, and the emulation must leave garbage (NaN, bytes of 0x7f).
    """

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
        good = np.abs(actual.values - expected.values) <= expected.slack
        garbage_value = {"int32": 0x7F7F7F7F, "int64": 0x7F7F7F7F7F7F7F7F}.get(expected.dtype, 0x7F)
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


def npu_format_cast(x: Array, acl_format: int):
    return [Expected(x.values, x.dtype)]


# ----------------------------------------------------------------------------------------------------------- activation


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def npu_swiglu(x: Array, dim: int = -1):
    first, second = np.split(x.values, 2, axis=dim)
    y = silu(first) * second
    return [Expected(y, x.dtype, 16 * EPS32 * np.abs(y))]


def doubtful(
    function: Callable[[np.ndarray], np.ndarray], values: np.ndarray, error: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A rising integer function of values, and 1 where values that are off by ``error`` give another result."""
    return function(values), (function(values - error) != function(values + error)).astype(np.int64)


def _int8(values: np.ndarray) -> np.ndarray:
    return to_int(values, -128, 127)


def _dynamic_rows(values: np.ndarray, error: Any, dtype: str = "int8") -> tuple[Expected, np.ndarray, np.ndarray]:
    """(int8 rows, scales max / 127, relative error of the scales) of float64 rows with the given absolute error."""
    top = np.abs(values).max(axis=-1, keepdims=True)
    safe = np.where(top == 0, 1.0, top)
    relative = np.broadcast_to(error, values.shape).max(axis=-1, keepdims=True) / safe + 4 * EPS32
    scaled = values * 127 / safe
    integers, slack = doubtful(
        _int8, scaled, np.abs(scaled) * relative + np.broadcast_to(error, values.shape) * 127 / safe
    )
    return Expected(integers, dtype, slack), top[..., 0] / 127, relative[..., 0]


def _covered(group_index: np.ndarray, counts: bool) -> np.ndarray:
    """The group of every row that is in one."""
    sizes = group_index if counts else np.diff(group_index, prepend=0)
    return np.repeat(np.arange(len(sizes)), sizes)


def _rows(values: np.ndarray, total: int) -> np.ndarray:
    """Zero rows after ``values``, which are not written."""
    return np.concatenate([values, np.zeros((total - len(values), *values.shape[1:]), dtype=values.dtype)])


def _variant(x: np.ndarray, left: bool, mode: int, limit: float, alpha: float, shift: float) -> np.ndarray:
    if mode == 1:
        gate, up = x[:, ::2], x[:, 1::2]
    else:
        first, second = np.split(x, 2, axis=1)
        gate, up = (first, second) if left else (second, first)
    if mode == 0:
        return silu(gate) * up
    gate = np.minimum(gate, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (np.clip(up, -limit, limit) + shift)


def npu_dequant_swiglu_quant(
    x: Array,
    *,
    weight_scale=None,
    activation_scale=None,
    bias=None,
    quant_scale=None,
    quant_offset=None,
    group_index=None,
    activate_left=False,
    quant_mode=0,
    swiglu_mode=0,
    clamp_limit=7.0,
    glu_alpha=1.702,
    glu_bias=1.0,
    dst_type=None,
):
    total = x.shape[0]
    group = np.zeros(total, dtype=int) if group_index is None else _covered(group_index.values, True)
    values = x.values[: len(group)].astype(np.float64)
    if bias is not None and bias.dtype == "int32":
        values = values + bias.values
    if weight_scale is not None:
        values = values * np.atleast_2d(weight_scale.values)[group]
    if activation_scale is not None:
        values = values * activation_scale.values.reshape(-1, 1)[: len(group)]
    if bias is not None and bias.dtype != "int32":
        values = values + bias.values
    y = _variant(values, activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias)
    # silu passes relative errors of its input on, times 1 + |x|.
    spread = 1 + np.abs(values).reshape(len(group), 2, -1).max(axis=1) if swiglu_mode != 1 else 1 + np.abs(values).max()
    error = 16 * EPS32 * spread * (np.abs(y) + np.abs(values).max() * EPS32)
    written = np.arange(total) < len(group)
    if quant_mode == 0:
        factor = quant_scale.values.reshape(
            -1, quant_scale.values.size // (1 if group_index is None else group_index.values.size)
        )
        z, error = y / factor[group], error / np.abs(factor[group])
        if quant_offset is not None:
            z = z + quant_offset.values
        integers, slack = doubtful(_int8, z, error + 4 * EPS32 * np.abs(z))
        out = Expected(_rows(integers, total), "int8", _rows(slack, total), written[:, None])
        return [out, Expected(np.zeros(total), "float32", 0, np.zeros(total, dtype=bool))]
    if quant_scale is not None:
        factor = np.atleast_2d(quant_scale.values)[group]
        y, error = y * factor, error * np.abs(factor)
    rows, scale, relative = _dynamic_rows(y, error)
    out = Expected(_rows(rows.values, total), "int8", _rows(rows.slack, total), written[:, None])
    return [out, Expected(_rows(scale, total), "float32", _rows(scale * relative, total), written)]


# -------------------------------------------------------------------------------------------------------------- routing


def npu_moe_init_routing(x, row_idx, expert_idx, active_num):
    tokens, choices = row_idx.shape
    pairs = sorted(zip(expert_idx.values.ravel(), row_idx.values.ravel(), strict=True), key=lambda pair: pair[0])
    position = np.zeros(len(pairs), dtype=np.int64)
    for index, (_, row) in enumerate(pairs):
        position[row] = index
    taken = [row % tokens for _, row in pairs][: min(tokens, active_num) * choices]
    experts = np.array([expert for expert, _ in pairs])
    return [Expected(x.values[taken], x.dtype), Expected(position, "int32"), Expected(experts, "int32")]


def npu_moe_compute_expert_tokens(experts, num_expert):
    return [Expected(np.array([int((experts.values <= e).sum()) for e in range(num_expert)]), "int32")]


def npu_moe_init_routing_v2(
    x,
    expert_idx,
    *,
    scale=None,
    offset=None,
    active_num=-1,
    expert_capacity=-1,
    expert_num=-1,
    drop_pad_mode=0,
    expert_tokens_num_type=0,
    expert_tokens_num_flag=False,
    quant_mode=-1,
    active_expert_range=(),
    row_idx_type=0,
):
    start, end = active_expert_range or (0, expert_num)
    tokens, choices = expert_idx.shape
    flat = expert_idx.values.ravel()
    by_expert = [[pair for pair, e in enumerate(flat) if e == expert] for expert in range(start, end)]
    counts = np.array([len(pairs) for pairs in by_expert])
    slots: list[tuple[int, int] | None] = []  # pair and expert of every output row
    for expert, pairs in enumerate(by_expert, start):
        rows: list[tuple[int, int] | None] = [(pair, expert) for pair in pairs]
        if drop_pad_mode == 1:
            rows = (rows + [None] * expert_capacity)[:expert_capacity]
        slots += rows
    total = expert_num * expert_capacity if drop_pad_mode == 1 else tokens * choices
    written = np.arange(total) < len(slots)
    used = np.array([slot is not None for slot in slots])
    filled = [slot for slot in slots if slot is not None]

    row_idx, known = np.full(tokens * choices, -1), np.ones(tokens * choices, dtype=bool)
    for index, slot in enumerate(slots):
        if slot is not None:
            row_idx[slot[0]] = index
    if row_idx_type == 1:
        row_idx, known = np.zeros(tokens * choices, dtype=int), np.arange(tokens * choices) < len(slots)
        row_idx[: len(slots)] = [pair for pair, _ in filled]

    values = x.values[[pair // choices for pair, _ in filled]]
    dtype, slack, row_scale, scale_slack = x.dtype, 0, None, 0.0
    if quant_mode == -1 and scale is not None:
        row_scale = scale.values[[pair // choices for pair, _ in filled]]
    elif quant_mode == 0:
        values, dtype = to_int(f32(values) * f32(scale.values) + f32(offset.values), -128, 127), "int8"
    elif quant_mode == 1:
        values = f32(values)
        if scale is not None:
            experts = [0 if scale.shape[0] == 1 else expert - start for _, expert in filled]
            values = values * f32(scale.values)[experts]
        values, row_scale = quantized_rows(values, 127)
        dtype = "int8"

    def spread(rows):
        out = np.zeros((total, *rows.shape[1:]), dtype=rows.dtype)
        out[: len(slots)][used] = rows
        return out

    expanded = spread(values)
    shape = (expert_num, expert_capacity, x.shape[1]) if drop_pad_mode == 1 else (total, x.shape[1])
    mask = np.broadcast_to(written[:, None], expanded.shape).reshape(shape)
    count = Expected(np.zeros(()), "int64", 0, np.zeros((), dtype=bool))
    if expert_tokens_num_flag:
        if expert_tokens_num_type == 2:
            pairs = [(expert, n) for expert, n in enumerate(counts, start) if n]
            count = Expected(np.array(pairs + [(0, 0)] * (expert_num - len(pairs))).reshape(-1, 2), "int64")
        else:
            count = Expected(counts.cumsum() if expert_tokens_num_type == 0 else counts, "int64")
    if row_scale is None:
        size = () if quant_mode == 0 else (total,)
        out_scale = Expected(np.zeros(size), "float32", 0, np.zeros(size, dtype=bool))
    else:
        out_scale = Expected(spread(np.asarray(row_scale, dtype=np.float64)), "float32", scale_slack, written)
    return [
        Expected(expanded.reshape(shape), dtype, slack, mask),
        Expected(row_idx, "int32", 0, known),
        count,
        out_scale,
    ]


def npu_moe_token_unpermute(permuted, indices, probs=None):
    choices = 1 if probs is None else probs.shape[1]
    weights = np.ones((indices.shape[0], 1)) if probs is None else probs.values
    rows = np.concatenate([permuted.values, np.zeros((1, permuted.shape[1]))])
    picked = rows[np.minimum(indices.values, len(permuted.values))].reshape(-1, choices, permuted.shape[1])
    terms = picked * weights[..., None]
    slack = 8 * EPS32 * np.abs(terms).sum(axis=1) if choices > 1 or probs is not None else 0
    return [Expected(terms.sum(axis=1), permuted.dtype, slack)]


#: Operator name -> oracle, as in the table of cases.
ORACLES: dict[str, Callable[..., list[Expected]]] = {
    name: function for name, function in globals().items() if name.startswith("npu_")
}
