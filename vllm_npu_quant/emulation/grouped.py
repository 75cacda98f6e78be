# SPDX-License-Identifier: Apache-2.0
"""Matrix products of groups of rows, each with a weight of its own: the experts of a MoE layer.

Sources: op-plugin torch_npu-npu_grouped_matmul.md and test_npu_grouped_matmul.py; ops-transformer (kernels, aclnn
documents) gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md. The argument rules are those of Atlas A2 and A3.

The rows that no group covers are not written by the device; here they are filled with garbage (NaN, bytes of 0x7f).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.checks import (
    dtype_name,
    form,
    forms,
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
from vllm_npu_quant.emulation.matmul import (
    FRACTAL_NZ,
    IntMatmul,
    dequantize_weight,
    fast_float_matmul,
    fast_int_matmul,
    float_bits,
    float_matmul,
    npu_format_of,
    split_int8_matmul,
    unpack_weight,
)
from vllm_npu_quant.emulation.numerics import (
    DTYPE_OF_CODE,
    INT4_PER_INT32,
    INT8,
    fill_garbage,
    int_matmul,
    round_to_int,
    signed_9_bits,
    split_quant_param,
    unpack_int4,
)

__all__ = [
    "npu_grouped_matmul",
    "npu_grouped_matmul_fake",
    "npu_grouped_matmul_fast",
    "npu_grouped_matmul_list",
    "npu_grouped_matmul_list_fake",
    "npu_grouped_matmul_list_fast",
]

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
INNER_LIMIT = 65536
W4A8_GROUP_SIZE = 256
Tensors = Sequence[torch.Tensor]


class _Form(Enum):
    FLOAT = "unquantized"
    INT8 = "int8 x int8"
    WEIGHT_ONLY = "float x int8 or int4"
    INT8_INT4 = "int8 x int4"
    INT4 = "int4 x int4"


@dataclass(frozen=True)
class _Plan:
    form: _Form
    out_dtype: torch.dtype
    width: int
    experts: int
    #: Whether an int4 weight is packed along N; None if it is not int4.
    packed_along_n: bool | None
    #: Only kernels for FRACTAL_NZ weights take these dtypes.
    needs_nz: bool = False


@dataclass(frozen=True)
class _Call:
    """The arguments of one call that the dtype tables look at; an absent list is None."""

    name: str
    x: Tensors
    weight: Tensors
    #: Whether weight is one 3-D tensor.
    stacked: bool
    experts: int
    depth: int
    width: int
    bias: list[torch.Tensor] | None
    scale: list[torch.Tensor] | None
    antiquant_scale: list[torch.Tensor] | None
    antiquant_offset: list[torch.Tensor] | None
    per_token_scale: list[torch.Tensor] | None
    group_list_type: int
    act_type: int
    out_dtype: torch.dtype | None

    def per_expert(self, *shape: int) -> tuple[int, ...]:
        """The shape of a parameter: with a leading E for a 3-D weight, else one tensor per expert."""
        return (self.experts, *shape) if self.stacked else shape


@dataclass(frozen=True)
class _Operands:
    """Everything that belongs to one expert."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    antiquant_scale: torch.Tensor | None
    antiquant_offset: torch.Tensor | None


def _given(tensors: Tensors | None) -> list[torch.Tensor] | None:
    """None for an absent list; the interface treats an empty one alike."""
    return list(tensors) if tensors else None


def _check_grouped_matmul(
    name: str,
    x: Tensors,
    weight: Tensors,
    *,
    bias: Tensors | None = None,
    scale: Tensors | None = None,
    offset: Tensors | None = None,
    antiquant_scale: Tensors | None = None,
    antiquant_offset: Tensors | None = None,
    per_token_scale: Tensors | None = None,
    group_list: torch.Tensor | list[int] | None = None,
    activation_input: Tensors | None = None,
    activation_quant_scale: Tensors | None = None,
    activation_quant_offset: Tensors | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    out_dtype: torch.dtype | None = None,
    **only_on_950: Any,
) -> _Plan:
    """The rules that both overloads share. ``group_type`` is 0 or -1 here."""
    require_absent(name, "only Ascend 950 has it", **only_on_950)
    require_absent(
        name,
        "reserved",
        offset=_given(offset),
        activation_input=_given(activation_input),
        activation_quant_scale=_given(activation_quant_scale),
        activation_quant_offset=_given(activation_quant_offset),
    )
    require(1 <= len(x) <= 128, name, "x", "1 to 128 tensors", len(x))
    require(1 <= len(weight) <= 128, name, "weight", "1 to 128 tensors", len(weight))
    require_value(name, "split_item", split_item, 0, 1, 2, 3)
    stacked = len(weight) == 1 and weight[0].dim() == 3
    experts = weight[0].shape[0] if stacked else len(weight)
    if group_type == -1:
        require(len(x) == len(weight), name, "x", f"as many tensors as weight, {len(weight)}", len(x))
        require(not stacked, name, "weight", "2-D tensors for group_type -1", weight)
        require_absent(name, "group_type is -1", group_list=group_list)
        require_value(name, "split_item", split_item, 0, 1)
    else:
        require(len(x) in (1, experts), name, "x", f"1 or {experts} tensors", len(x))

    for tensor in x:
        require_dtype(name, "x", tensor, x[0].dtype)
        require_dim(name, "x", tensor, 2, 6 if group_type == -1 else 2)
        require(tensor.is_contiguous(), name, "x", "contiguous memory", tensor)
        require(tensor.shape[-1] < INNER_LIMIT, name, "x", f"fewer than {INNER_LIMIT} columns", tensor)
    for tensor in weight:
        require_dtype(name, "weight", tensor, weight[0].dtype)
        require_dim(name, "weight", tensor, 3 if stacked else 2)
        require(
            is_plain_or_transposed(tensor), name, "weight", "contiguous memory, or the last two dims swapped", tensor
        )
        inner = tensor.shape[-1] if tensor.is_contiguous() else tensor.shape[-2]
        require(inner < INNER_LIMIT, name, "weight", f"fewer than {INNER_LIMIT} in the innermost dimension", tensor)

    form, packed_along_n = _form(name, x[0], weight[0])
    depth, width = _sizes(form, x[0], weight[0], packed_along_n)
    for index, tensor in enumerate(weight):
        rows = x[index if len(x) > 1 else 0]
        same = _sizes(form, rows, tensor, packed_along_n)
        weight_depth = tensor.shape[-2] * (INT4_PER_INT32 if packed_along_n is False else 1)
        require(weight_depth == same[0], name, "weight", f"{same[0]} rows, the depth of x", tensor)
        if group_type != -1:
            require(same == (depth, width), name, "weight", "equal sizes in all tensors", tensor)
    if group_list is not None:
        if isinstance(group_list, torch.Tensor):
            require_dtype(name, "group_list", group_list, torch.int64)
            pairs = group_list_type == 2
            require_shape(name, "group_list", group_list, (experts, 2) if pairs else (experts,))
            require(
                experts <= (1024 if stacked else 128),
                name,
                "group_list",
                "at most 1024 groups (128 of a list)",
                experts,
            )
            require(not pairs or form is _Form.INT8, name, "group_list_type", "0 or 1 unless int8 x int8", 2)
        else:
            require(len(group_list) == experts, name, "group_list", f"{experts} numbers", group_list)
    elif len(x) == 1 and group_type != -1:
        refuse(name, "group_list", "a tensor, since x is one tensor", None)

    call = _Call(
        name,
        x,
        weight,
        stacked,
        experts,
        depth,
        width,
        _given(bias),
        _given(scale),
        _given(antiquant_scale),
        _given(antiquant_offset),
        _given(per_token_scale),
        group_list_type or 0,
        act_type or 0,
        out_dtype,
    )
    out_dtype, needs_nz = _CHECKS[form](call)
    return _Plan(form, out_dtype, width, experts, packed_along_n, needs_nz)


def _form(name: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[_Form, bool | None]:
    packed_along_n = weight.is_contiguous() if weight.dtype == torch.int32 else None
    forms = {
        (torch.int8, torch.int8): _Form.INT8,
        (torch.int8, torch.int32): _Form.INT8_INT4,
        (torch.int32, torch.int32): _Form.INT4,
    }
    for dtype in FLOATS:
        forms[dtype, dtype] = _Form.FLOAT
    for dtype in HALVES:
        forms[dtype, torch.int8] = forms[dtype, torch.int32] = _Form.WEIGHT_ONLY
    form = forms.get((x.dtype, weight.dtype))
    if form is None:
        refuse(name, "weight", f"a dtype that goes with {dtype_name(x.dtype)} x", weight)
    return form, packed_along_n


def _sizes(form: _Form, x: torch.Tensor, weight: torch.Tensor, packed_along_n: bool | None) -> tuple[int, int]:
    depth = x.shape[-1] * (INT4_PER_INT32 if form is _Form.INT4 else 1)
    return depth, weight.shape[-1] * (INT4_PER_INT32 if packed_along_n else 1)


def _check_list(
    name: str, argument: str, tensors: Tensors, dtypes: tuple[torch.dtype, ...], count: int, *shapes: tuple[int, ...]
) -> None:
    require(len(tensors) == count, name, argument, f"{count} tensors", len(tensors))
    for tensor in tensors:
        require_dtype(name, argument, tensor, *dtypes)
        require_shape(name, argument, tensor, *shapes)


def _check_float(call: _Call) -> tuple[torch.dtype, bool]:
    require_absent(
        call.name,
        "x and weight are not quantized",
        scale=call.scale,
        antiquant_scale=call.antiquant_scale,
        antiquant_offset=call.antiquant_offset,
        per_token_scale=call.per_token_scale,
    )
    _check_float_output(call)
    return call.x[0].dtype, False


def _check_float_output(call: _Call) -> None:
    """Output, activation and bias of a float x."""
    dtype = call.x[0].dtype
    require_value(call.name, "act_type", call.act_type, 0)
    allowed = call.out_dtype in (None, dtype)
    require(allowed, call.name, "output_dtype", f"None or {dtype_name(dtype)}", call.out_dtype)
    if call.bias is None:
        return
    count = len(call.weight)
    require(len(call.bias) == count, call.name, "bias", f"{count} tensors", len(call.bias))
    wanted = torch.float16 if dtype == torch.float16 else torch.float32
    for tensor, matrix in zip(call.bias, call.weight, strict=True):
        require_dtype(call.name, "bias", tensor, wanted)
        require_shape(call.name, "bias", tensor, call.per_expert(_width(matrix)))


def _width(weight: torch.Tensor) -> int:
    packed = weight.dtype == torch.int32 and weight.is_contiguous()
    return weight.shape[-1] * (INT4_PER_INT32 if packed else 1)


def _check_int8(call: _Call) -> tuple[torch.dtype, bool]:
    """The A8W8 table of aclnnGroupedMatmulV5.md."""
    name, scale, bias, per_token_scale = call.name, call.scale, call.bias, call.per_token_scale
    require_absent(name, "int8 x int8", antiquant_scale=call.antiquant_scale, antiquant_offset=call.antiquant_offset)
    out_dtype = torch.int8 if call.out_dtype is None else call.out_dtype
    count, shape = len(call.weight), call.per_expert(call.width)
    bias_dtypes: tuple[torch.dtype, ...] = (torch.int32,)
    needs_nz = False
    if out_dtype is torch.int32:
        require_absent(name, "the output is int32", scale=scale, per_token_scale=per_token_scale)
    else:
        scales = {
            torch.int8: (torch.int64,),
            torch.float16: (torch.float32,),
            torch.bfloat16: (torch.bfloat16, torch.float32),
        }
        if out_dtype not in scales:
            refuse(name, "output_dtype", "int8, int32, float16 or bfloat16", out_dtype)
        if scale is None:
            refuse(name, "scale", f"a list, for a {dtype_name(out_dtype)} output", None)
        _check_list(name, f"scale (for a {dtype_name(out_dtype)} output)", scale, scales[out_dtype], count, shape)
        if out_dtype is torch.bfloat16:
            wide_scale = scale[0].dtype == torch.float32
            needs_nz = wide_scale or (bias is not None and bias[0].dtype == torch.bfloat16)
            bias_dtypes = (torch.bfloat16,) if wide_scale else (torch.int32, torch.bfloat16)
    if out_dtype is torch.int8:
        require_absent(name, "the output is int8", per_token_scale=per_token_scale)
    if per_token_scale is not None:
        _check_list(name, "per_token_scale", per_token_scale, (torch.float32,), 1, (call.x[0].shape[0],))
    if bias is not None:
        _check_list(name, f"bias (for a {dtype_name(out_dtype)} output)", bias, bias_dtypes, count, shape)
    require_value(name, "act_type", call.act_type, *((0, 1, 2, 4, 5) if per_token_scale is not None else (0,)))
    return out_dtype, needs_nz


def _check_weight_only(call: _Call) -> tuple[torch.dtype, bool]:
    name, dtype, scales, offsets = call.name, call.x[0].dtype, call.antiquant_scale, call.antiquant_offset
    require_absent(name, "x is not quantized", scale=call.scale, per_token_scale=call.per_token_scale)
    _check_float_output(call)
    count = len(call.weight)
    if scales is None:
        refuse(name, "antiquant_scale", "a list, for a quantized weight", None)
    require(len(scales) == count, name, "antiquant_scale", f"{count} tensors", len(scales))
    lengths: list[int] = []  # in a graph they may be symbols, which have no hash
    for index, (tensor, matrix) in enumerate(zip(scales, call.weight, strict=True)):
        depth = call.x[index if len(call.x) > 1 else 0].shape[-1]
        channel = call.per_expert(_width(matrix))
        require_dtype(name, "antiquant_scale", tensor, dtype)
        if matrix.dtype == torch.int8 or tensor.dim() == len(channel):
            # Only int4 weights have scales per group.
            require_shape(name, "antiquant_scale", tensor, channel)
            continue
        groups = tensor.shape[-2] if tensor.dim() >= 2 else 0
        require_shape(name, "antiquant_scale", tensor, channel, call.per_expert(groups, _width(matrix)))
        require(depth % groups == 0, name, "antiquant_scale", f"a number of groups that divides {depth}", tensor)
        lengths.append(depth // groups)
    require(
        all(length == lengths[0] for length in lengths),
        name,
        "antiquant_scale",
        "groups of one length in all tensors",
        lengths,
    )
    if (
        offsets is None
    ):  # "antiquantOffset must not be nullptr in antiquant"; newer versions of CANN let int4 go without
        refuse(name, "antiquant_offset", "a list, of zeros where the weight is symmetric", None)
    require(len(offsets) == count, name, "antiquant_offset", f"{count} tensors", len(offsets))
    for shift, factor in zip(offsets, scales, strict=True):
        require_dtype(name, "antiquant_offset", shift, dtype)
        require_shape(name, "antiquant_offset", shift, factor.shape)
    return dtype, False


def _check_packed_operands(call: _Call) -> torch.dtype:
    """Rules that int8 x int4 and int4 x int4 share; the output's dtype."""
    require_absent(
        call.name, "x is quantized", antiquant_scale=call.antiquant_scale, antiquant_offset=call.antiquant_offset
    )
    require(len(call.x) == 1, call.name, "x", "one tensor", len(call.x))
    require(call.stacked, call.name, "weight", "one 3-D tensor", call.weight)
    require(call.weight[0].is_contiguous(), call.name, "weight", "contiguous [E, K, N/8]", call.weight[0])
    require_value(call.name, "act_type", call.act_type, 0)
    if call.out_dtype not in HALVES:
        refuse(call.name, "output_dtype", "float16 or bfloat16", call.out_dtype)
    return call.out_dtype


def _check_int8_int4(call: _Call) -> tuple[torch.dtype, bool]:
    out_dtype = _check_packed_operands(call)
    name, scale, bias, per_token_scale = call.name, call.scale, call.bias, call.per_token_scale
    # The kernel does not look at group_list_type and reads counts.
    require_value(name, "group_list_type", call.group_list_type, 1)
    require(call.depth <= 18432, name, "x", "a depth of at most 18432", call.x[0])
    if scale is None or bias is None or per_token_scale is None:
        missing = "scale" if scale is None else "bias" if bias is None else "per_token_scale"
        refuse(name, missing, "a list, for int8 x int4", None)
    require(call.depth % W4A8_GROUP_SIZE == 0, name, "x", f"K that {W4A8_GROUP_SIZE} divides", call.x[0])
    shapes = [(call.experts, groups, call.width) for groups in (1, call.depth // W4A8_GROUP_SIZE)]
    _check_list(name, "scale", scale, (torch.int64,), 1, *shapes)
    _check_list(name, "bias", bias, (torch.float32,), 1, (call.experts, call.width))
    rows = call.x[0].shape[0]
    _check_list(name, "per_token_scale", per_token_scale, (torch.float32,), 1, (rows,), (rows, 1))
    return out_dtype, False


def _check_int4(call: _Call) -> tuple[torch.dtype, bool]:
    out_dtype = _check_packed_operands(call)
    name, scale, per_token_scale = call.name, call.scale, call.per_token_scale
    require_absent(name, "int4 x int4", bias=call.bias)
    if scale is None:
        refuse(name, "scale", "a list, for int4 x int4", None)
    groups = scale[0].shape[1] if scale[0].dim() == 3 else 1
    shapes = (call.experts, call.width), (call.experts, groups, call.width)
    _check_list(name, "scale", scale, (torch.int64,), 1, *shapes)
    even = call.depth % groups == 0 and (call.depth // groups) % 2 == 0
    require(even, name, "scale", f"groups of an even length that divides {call.depth}", scale[0])
    if per_token_scale is not None:
        _check_list(name, "per_token_scale", per_token_scale, (torch.float32,), 1, (call.x[0].shape[0],))
    return out_dtype, False


_CHECKS = {
    _Form.FLOAT: _check_float,
    _Form.INT8: _check_int8,
    _Form.WEIGHT_ONLY: _check_weight_only,
    _Form.INT8_INT4: _check_int8_int4,
    _Form.INT4: _check_int4,
}


def group_bounds(name: str, group_list: torch.Tensor, group_list_type: int, rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of every group that is not empty, in the order of the rows.

    Args:
        group_list: [E] running totals (type 0) or counts (type 1); [E, 2] pairs of expert and count (type 2), those
            with a count first.
        rows: the number of rows; the groups may cover fewer.
    """
    numbers = group_list.tolist()
    if group_list_type == 2:
        counts = [count for _, count in numbers]
    elif group_list_type == 1:
        counts = numbers
    else:
        counts = [end - start for start, end in zip([0, *numbers], numbers, strict=False)]
    require(min(counts, default=0) >= 0, name, "group_list", "groups of no negative size", numbers)
    if group_list_type == 2:
        first_empty = counts.index(0) if 0 in counts else len(counts)
        require(not any(counts[first_empty:]), name, "group_list", "pairs with a count before those without", numbers)
        known = all(0 <= expert < len(numbers) for expert, _ in numbers[:first_empty])
        require(known, name, "group_list", f"experts below {len(numbers)}", numbers)
    total = sum(counts)
    require(total <= rows, name, "group_list", f"at most {rows} rows in all groups", numbers)
    bounds, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            bounds.append((numbers[expert][0] if group_list_type == 2 else expert, start, start + count))
            start += count
    return bounds


def activate(values: torch.Tensor, act_type: int) -> torch.Tensor:
    """The activation of a float32 tensor: 0 none, 1 relu, 2 gelu (tanh), 4 fast gelu, 5 silu."""
    if act_type == 1:
        return torch.relu(values)
    if act_type == 2:
        return torch.nn.functional.gelu(values, approximate="tanh")
    if act_type == 4:
        return values * torch.sigmoid(1.702 * values)
    if act_type == 5:
        return values * torch.sigmoid(values)
    return values


def _pick(tensors: Tensors | None, expert: int, stacked: bool) -> torch.Tensor | None:
    if not tensors:
        return None
    return tensors[0][expert] if stacked else tensors[expert]


def _product(
    plan: _Plan,
    rows: torch.Tensor,
    operands: _Operands,
    per_token_scale: torch.Tensor | None,
    act_type: int,
    matmul: IntMatmul,
) -> torch.Tensor:
    """The output rows of one expert, in the output's dtype."""
    weight, bias, scale = operands.weight, operands.bias, operands.scale
    if plan.form is _Form.WEIGHT_ONLY:
        assert operands.antiquant_scale is not None
        integers = weight if plan.packed_along_n is None else unpack_weight(weight, plan.packed_along_n)
        factor = operands.antiquant_scale
        group_size = integers.shape[0] // factor.shape[0] if factor.dim() == 2 else 0
        weight = dequantize_weight(integers, factor, operands.antiquant_offset, rows.dtype, group_size)
    if plan.form in (_Form.FLOAT, _Form.WEIGHT_ONLY):
        multiply = float_matmul if matmul is int_matmul else fast_float_matmul
        return multiply(rows, weight, bias).to(plan.out_dtype)

    if plan.form is _Form.INT8_INT4:
        assert scale is not None
        assert bias is not None
        assert per_token_scale is not None
        out = split_int8_matmul(rows, unpack_weight(weight, True), float_bits(scale), bias, matmul)
        return (out * per_token_scale.view(-1, 1)).to(plan.out_dtype)
    if plan.form is _Form.INT4:
        assert scale is not None
        factors = float_bits(scale).view(-1, plan.width)
        out = scaled_groups(unpack_int4(rows), unpack_weight(weight, True), factors, matmul)
        return (out if per_token_scale is None else out * per_token_scale[:, None]).to(plan.out_dtype)

    acc = matmul(rows, weight)
    if bias is not None and bias.dtype == torch.int32:
        acc = acc + bias
    if scale is None:
        return acc
    if plan.out_dtype is torch.int8:
        factor, offset = split_quant_param(scale)
        return round_to_int(signed_9_bits(acc.to(torch.float32) * factor) + offset, INT8).to(torch.int8)
    out = acc.to(torch.float32) * scale.to(torch.float32)
    if per_token_scale is not None:
        out = out * per_token_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        out = out + bias.to(torch.float32)
    return activate(out, act_type).to(plan.out_dtype)


def scaled_groups(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, matmul: IntMatmul) -> torch.Tensor:
    """sum_g (x_g @ w_g) * scale_g in float32."""
    size = x.shape[1] // scale.shape[0]
    total = torch.zeros(x.shape[0], weight.shape[1])
    for group, factor in enumerate(scale):
        part = slice(group * size, (group + 1) * size)
        total += matmul(x[:, part].contiguous(), weight[part]).to(torch.float32) * factor
    return total


def _grouped_matmul(
    name: str,
    plan: _Plan,
    x: Tensors,
    weight: Tensors,
    bounds: list[tuple[int, int, int]] | None,
    act_type: int,
    matmul: IntMatmul,
    *,
    bias: Tensors | None,
    scale: Tensors | None,
    antiquant_scale: Tensors | None,
    antiquant_offset: Tensors | None,
    per_token_scale: Tensors | None,
) -> list[torch.Tensor]:
    """One tensor per group if ``bounds`` is None or x is a list, else one tensor for all rows of x."""
    if plan.needs_nz:
        _require_nz(name, weight)
    stacked = weight[0].dim() == 3

    def operands(expert: int) -> _Operands:
        picked = [_pick(tensors, expert, stacked) for tensors in (bias, scale, antiquant_scale, antiquant_offset)]
        matrix = weight[0][expert] if stacked else weight[expert]
        return _Operands(matrix, *picked)

    if bounds is None:
        outputs = []
        for expert, tensor in enumerate(x):
            out = _product(plan, tensor.reshape(-1, tensor.shape[-1]), operands(expert), None, act_type, matmul)
            outputs.append(out.view(*tensor.shape[:-1], out.shape[-1]))
        return outputs

    rows = x[0]
    out = rows.new_empty((rows.shape[0], plan.width), dtype=plan.out_dtype)
    for expert, start, end in bounds:
        scales = per_token_scale[0][start:end] if per_token_scale else None
        out[start:end] = _product(plan, rows[start:end], operands(expert), scales, act_type, matmul)
    _leave_garbage(plan, rows, out, bounds)
    return [out]


def _require_nz(name: str, weight: Tensors) -> None:
    nz = all(npu_format_of(tensor) == FRACTAL_NZ for tensor in weight)
    require(nz, name, "weight", "FRACTAL_NZ (npu_format_cast(w, 29)): no other kernel takes these dtypes", weight)


def _leave_garbage(plan: _Plan, x: torch.Tensor, out: torch.Tensor, bounds: list[tuple[int, int, int]]) -> None:
    """Garbage where the device writes none, or what it does not keep."""
    covered = bounds[-1][2] if bounds else 0
    if covered < x.shape[0]:
        fill_garbage(out[covered:])
    if plan.form is _Form.INT8_INT4:
        # The device splits x into halves in place.
        fill_garbage(x)


_KINDS = {
    _Form.INT8: native.Kind.INT8,
    _Form.WEIGHT_ONLY: native.Kind.WEIGHT_ONLY,
    _Form.INT8_INT4: native.Kind.INT8_INT4,
    _Form.INT4: native.Kind.INT4,
}


def _kernel(
    plan: _Plan, x: Tensors, weight: Tensors, scale: Tensors | None, antiquant_scale: Tensors | None
) -> native.Product | None:
    """The native kernel that computes all groups in one call, if there is one."""
    if (
        len(weight) != 1
        or weight[0].dim() != 3
        or not weight[0].is_contiguous()
        or len(x) != 1
        or not weight[0].numel()
    ):
        return None
    if plan.form not in _KINDS or plan.out_dtype is torch.int8 or not native.available():
        return None
    factors = antiquant_scale if plan.form is _Form.WEIGHT_ONLY else scale
    factor = factors[0] if factors else None
    groups = factor.shape[1] if factor is not None and factor.dim() == 3 else 1
    group_size = weight[0].shape[1] // groups
    return native.Product(_KINDS[plan.form], x[0], weight[0], plan.out_dtype, factor, group_size)


def _float_scale(plan: _Plan, scale: torch.Tensor, bounds: list[tuple[int, int, int]]) -> torch.Tensor:
    """The scales in float32, contiguous, of the experts that have rows; what it holds for the others is not read."""
    if plan.form is _Form.INT8 and scale.dtype == torch.float32:
        return scale.contiguous()
    as_float = torch.Tensor.float if plan.form is _Form.INT8 else float_bits
    if 2 * len(bounds) >= scale.shape[0]:
        return as_float(scale).contiguous()
    chosen = torch.empty(*scale.shape)
    for expert, _, _ in bounds:
        chosen[expert] = as_float(scale[expert])
    return chosen


def _tensor_group_type(name: str, group_type: int | None) -> int:
    # The document prints a default of -1; the registered default is None, which the operator refuses.
    if group_type not in (-1, 0):
        refuse(name, "group_type", "0 (rows) or -1 (no groups); 2 is not emulated", group_type)
    return group_type


def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    offset: list[torch.Tensor] | None = None,
    antiquant_scale: list[torch.Tensor] | None = None,
    antiquant_offset: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    activation_input: list[torch.Tensor] | None = None,
    activation_quant_scale: list[torch.Tensor] | None = None,
    activation_quant_offset: list[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[torch.Tensor]:
    """Grouped matrix product. For the rows r of expert e, with acc = int32(x[r] @ w[e]), exact:

        float x, same weight:      x @ w + bias
        float x, int8/int4 weight: x @ ((w + antiquant_offset) * antiquant_scale) + bias    (as in matmul.py)
        int8 x int8, int32 out:    acc + bias_int32
        int8 x int8, int8 out:     saturate(clamp(rint((acc + bias_int32) * s19), -256, 255) + offset9)
        int8 x int8:               act(((acc + bias_int32) * scale) * per_token_scale), or + bias_bfloat16 after scaling
        int8 x int4:               the last form of npu_quant_matmul; bias = 8 * sum_k(w * scale); x IS OVERWRITTEN
        int4 x int4:               sum_g (x_g @ w_g) * scale_g * per_token_scale

    Args:
        x: one tensor [M, K], or one per expert; int4 is packed in int32 [M, K/8].
        weight: one 3-D tensor [E, K, N] or a list of [K, N]; transposed views are taken. int4 is packed in int32:
            contiguous [.., K, N/8], or (weight-only) [.., N, K/8] transposed. int8 x int4 and int4 x int4 take one
            contiguous 3-D tensor only.
        bias: float x: float16 (float16 x) or float32; int8 x int8: int32, or bfloat16 with a FRACTAL_NZ weight and
            a bfloat16 output; int8 x int4: float32 [E, N], required. [[E, N]], or a list of [N].
        scale: int8 output: int64; float16 output: float32; bfloat16 output: bfloat16 (float32 with a FRACTAL_NZ
            weight); int32 output: None. [[E, N]], or a list of [N]. int8 x int4: int64 [[E, 1, N]] or [[E, K/256, N]],
            int4 x int4: int64 [[E, N]] or [[E, G, N]], both holding float32 bits.
        antiquant_scale, antiquant_offset: the dtype of x; [[E, N]] or, int4 only, [[E, G, N]] where G divides K; for a
            list of weights [N] or [G, N] each. (aclnnGroupedMatmulV5.md allows offsets only per channel; op-plugin's
            document has no such rule and frameworks pass them per group, so they are taken.)
        per_token_scale: [float32 [M]]; int8 x int4 also [M, 1].
        group_list: int64 [E] (group_list_type 0: running totals, 1: counts), [E, 2] (2: pairs of expert and count, int8
            x int8 only). The groups may cover fewer rows than x has: the rest of the output is garbage.
        split_item: 0, 1: one output per group (group_type -1); 2, 3: one output.
        group_type: 0, or -1: x[i] @ weight[i]. Must be given: the default None is refused.
        act_type: with per_token_scale: 0 none, 1 relu, 2 gelu (tanh), 4 fast gelu, 5 silu.
        output_dtype: None means the dtype of x.
    """
    options: dict[str, Any] = {
        "bias": bias,
        "scale": scale,
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
        "per_token_scale": per_token_scale,
    }
    plan = _check_tensor_overload(
        x,
        weight,
        offset=offset,
        group_list=group_list,
        activation_input=activation_input,
        activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
        split_item=split_item,
        group_type=group_type,
        group_list_type=group_list_type,
        act_type=act_type,
        output_dtype=output_dtype,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
        scale_dtype=scale_dtype,
        per_token_scale_dtype=per_token_scale_dtype,
        **options,
    )
    return _all_groups(plan, x, weight, group_list, group_type, group_list_type, act_type, int_matmul, **options)


def _all_groups(
    plan: _Plan,
    x: Tensors,
    weight: Tensors,
    group_list: torch.Tensor | None,
    group_type: int | None,
    group_list_type: int | None,
    act_type: int | None,
    matmul: IntMatmul,
    **options: Any,
) -> list[torch.Tensor]:
    name = "npu_grouped_matmul"
    bounds = None
    if len(x) == 1 and group_list is not None:
        bounds = group_bounds(name, group_list, group_list_type or 0, x[0].shape[0])
    outputs = _grouped_matmul(name, plan, x, weight, bounds, act_type or 0, matmul, **options)
    return outputs if group_type == -1 or len(outputs) == 1 else [torch.cat(outputs)]


def _check_tensor_overload(
    x: Tensors,
    weight: Tensors,
    *,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **options: Any,
) -> _Plan:
    name = "npu_grouped_matmul"
    group_type = _tensor_group_type(name, group_type)
    require_value(name, "group_list_type", group_list_type, 0, 1, 2, None)
    if group_type == 0:
        require_value(name, "split_item", split_item, 2, 3)
    out_dtype = None if output_dtype is None else DTYPE_OF_CODE.get(output_dtype)
    if output_dtype is not None and out_dtype not in (torch.int8, torch.int32, *FLOATS):
        refuse(name, "output_dtype", "None, int8, int32, float16, bfloat16 or float32", out_dtype or output_dtype)
    plan = _check_grouped_matmul(
        name,
        x,
        weight,
        group_list=group_list,
        split_item=split_item,
        group_type=group_type,
        group_list_type=group_list_type,
        out_dtype=out_dtype,
        **options,
    )
    quantized_x = plan.form in (_Form.INT8, _Form.INT8_INT4, _Form.INT4)
    require(not quantized_x or group_type == 0, name, "group_type", f"0 for {plan.form.value}", group_type)
    require(not quantized_x or len(x) == 1, name, "x", f"one tensor for {plan.form.value}", len(x))
    return plan


_plans: dict[Any, tuple[_Plan, native.Product | None]] = {}


def npu_grouped_matmul_fast(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    antiquant_scale: list[torch.Tensor] | None = None,
    antiquant_offset: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: int | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    """npu_grouped_matmul with all groups in one kernel; float products are the same up to the order of float32 sums."""
    key = (
        forms(x),
        forms(weight),
        forms(bias),
        forms(scale),
        forms(antiquant_scale),
        forms(antiquant_offset),
        forms(per_token_scale),
        form(group_list),
        split_item,
        group_type,
        group_list_type,
        act_type,
        output_dtype,
    )
    known = None if options else _plans.get(key)
    if known is None:
        plan = _check_tensor_overload(
            x,
            weight,
            bias=bias,
            scale=scale,
            antiquant_scale=antiquant_scale,
            antiquant_offset=antiquant_offset,
            per_token_scale=per_token_scale,
            group_list=group_list,
            split_item=split_item,
            group_type=group_type,
            group_list_type=group_list_type,
            act_type=act_type,
            output_dtype=output_dtype,
            **options,
        )
        one_call = group_type == 0 and group_list is not None and not act_type
        known = plan, _kernel(plan, x, weight, scale, antiquant_scale) if one_call else None
        if not options:
            remember(_plans, key, known)
    plan, product = known
    if product is None or group_list is None:
        return _all_groups(
            plan,
            x,
            weight,
            group_list,
            group_type,
            group_list_type,
            act_type,
            fast_int_matmul,
            bias=bias,
            scale=scale,
            antiquant_scale=antiquant_scale,
            antiquant_offset=antiquant_offset,
            per_token_scale=per_token_scale,
        )
    name, rows, factor = "npu_grouped_matmul", x[0], scale[0] if scale else None
    if plan.needs_nz:
        _require_nz(name, weight)
    bounds = group_bounds(name, group_list, group_list_type or 0, rows.shape[0])
    lists = {
        "x": ("x", x),
        "weight": ("weight", weight),
        "scale": ("scale", scale),
        "bias": ("bias", bias),
        "token_scale": ("per_token_scale", per_token_scale),
        "antiquant_scale": ("antiquant_scale", antiquant_scale),
        "antiquant_offset": ("antiquant_offset", antiquant_offset),
    }
    calls.remember_product(
        name,
        product,
        {operand: (argument, given[0]) for operand, (argument, given) in lists.items() if given},
        rows=rows.shape[0],
        group_list=group_list,
        group_list_type=group_list_type or 0,
        spoils_x=plan.form is _Form.INT8_INT4,
        nz_weight=weight[0] if plan.needs_nz else None,
    )
    if factor is not None:
        factor = _float_scale(plan, factor, bounds)
    out = product(
        rows,
        weight[0],
        groups=bounds,
        scale=factor,
        bias=native.bias(bias[0]) if bias else None,
        token_scale=per_token_scale[0].contiguous() if per_token_scale else None,
        antiquant_scale=antiquant_scale[0].contiguous() if antiquant_scale else None,
        antiquant_offset=antiquant_offset[0].contiguous() if antiquant_offset else None,
    )
    _leave_garbage(plan, rows, out, bounds)
    return [out]


def npu_grouped_matmul_fake(x: list[torch.Tensor], weight: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    plan = _check_tensor_overload(x, weight, **options)
    if options.get("group_type") == 0:
        rows = sum(tensor.shape[0] for tensor in x)
        return [x[0].new_empty((rows, plan.width), dtype=plan.out_dtype)]
    return _empty_pairs(plan, x, weight)


def _empty_pairs(plan: _Plan, x: Tensors, weight: Tensors) -> list[torch.Tensor]:
    factor = INT4_PER_INT32 if plan.packed_along_n else 1
    return [
        rows.new_empty((*rows.shape[:-1], matrix.shape[-1] * factor), dtype=plan.out_dtype)
        for rows, matrix in zip(x, weight, strict=True)
    ]


# --------------------------------------------------------------------------------------------- npu_grouped_matmul.List


def npu_grouped_matmul_list(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    offset: list[torch.Tensor] | None = None,
    antiquant_scale: list[torch.Tensor] | None = None,
    antiquant_offset: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: list[int] | None = None,
    activation_input: list[torch.Tensor] | None = None,
    activation_quant_scale: list[torch.Tensor] | None = None,
    activation_quant_offset: list[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: torch.dtype | None = None,
    matmul: IntMatmul = int_matmul,
) -> list[torch.Tensor]:
    """The older overload: group_list is a list of running totals, and weight a list of matrices.

    float x with a float or int8 weight, or int8 x int8 with an int64 scale and an int8 output; the arithmetic is that
    of npu_grouped_matmul.

    Args:
        x: one tensor [M, K], or one per weight.
        weight: a list of [K, N]; at most 128.
        group_list: running totals of rows, the last is M; None if x is a list.
        split_item: 0, 1: one output per group; 2, 3: one output.
        group_type: None. output_dtype: None, or what follows from x (the real Meta kernel fails on any torch.dtype).
    """
    options: dict[str, Any] = {
        "bias": bias,
        "scale": scale,
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
        "per_token_scale": per_token_scale,
    }
    plan, ends = _check_list_overload(
        x,
        weight,
        offset=offset,
        group_list=group_list,
        activation_input=activation_input,
        activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
        split_item=split_item,
        group_type=group_type,
        group_list_type=group_list_type,
        act_type=act_type,
        output_dtype=output_dtype,
        **options,
    )
    name = "npu_grouped_matmul.List"
    parts = list(x)
    if ends is not None and len(x) == 1:
        parts = [x[0][start:end] for start, end in zip([0, *ends], ends, strict=False)]
    outputs = _grouped_matmul(name, plan, parts, weight, None, 0, matmul, **options)
    return outputs if split_item in (0, 1) else [torch.cat(outputs)]


def _check_list_overload(
    x: Tensors,
    weight: Tensors,
    *,
    group_list: list[int] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    per_token_scale: Tensors | None = None,
    output_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[_Plan, list[int] | None]:
    name = "npu_grouped_matmul.List"
    require_value(name, "group_type", group_type, None)
    require_value(name, "group_list_type", group_list_type, 0, None)
    require_value(name, "act_type", act_type, 0, None)
    require_absent(name, "group_list is a list", per_token_scale=_given(per_token_scale))
    independent = len(x) > 1 and split_item in (0, 1)
    for tensor in weight:
        require_dim(name, "weight", tensor, 2)
        require_dtype(name, "weight", tensor, torch.int8, *FLOATS)
    plan = _check_grouped_matmul(
        name,
        x,
        weight,
        group_list=None if independent else group_list,
        split_item=split_item,
        group_type=-1 if independent else 0,
        group_list_type=0,
        out_dtype=output_dtype,
        **options,
    )
    if plan.form is _Form.INT8:
        require(plan.out_dtype is torch.int8, name, "output_dtype", "int8", plan.out_dtype)
    if group_list is not None:
        sizes = [end - start for start, end in zip([0, *group_list], group_list, strict=False)]
        require(all(size >= 0 for size in sizes), name, "group_list", "running totals", group_list)
        if len(x) == 1:
            rows = x[0].shape[0]
            require(group_list[-1] == rows, name, "group_list", f"running totals that end in {rows}", group_list)
        else:
            require(
                sizes == [t.shape[0] for t in x], name, "group_list", "the running totals of the rows in x", group_list
            )
    return plan, None if group_list is None else list(group_list)


def npu_grouped_matmul_list_fast(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
    """npu_grouped_matmul.List with ``fast_int_matmul`` and ``fast_float_matmul``."""
    return npu_grouped_matmul_list(*args, **kwargs, matmul=fast_int_matmul)


def npu_grouped_matmul_list_fake(
    x: list[torch.Tensor], weight: list[torch.Tensor], **options: Any
) -> list[torch.Tensor]:
    plan, ends = _check_list_overload(x, weight, **options)
    if options.get("split_item", 0) in (0, 1):
        if len(x) > 1 or ends is None:
            return _empty_pairs(plan, x, weight)
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return [
            x[0].new_empty((size, w.shape[-1]), dtype=plan.out_dtype) for size, w in zip(sizes, weight, strict=True)
        ]
    rows = sum(tensor.shape[0] for tensor in x)
    return [x[0].new_empty((rows, plan.width), dtype=plan.out_dtype)]
