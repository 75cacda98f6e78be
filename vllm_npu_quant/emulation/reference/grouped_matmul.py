# SPDX-License-Identifier: Apache-2.0
"""npu_grouped_matmul: products of groups of rows, each with a weight of its own, such as the experts of a MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_npu_quant.emulation.numerics import (
    INT8,
    FloatMatmul,
    IntMatmul,
    dequantize_weight,
    fill_garbage,
    float_bits,
    float_matmul,
    int_matmul,
    round_to_int,
    scaled_groups,
    signed_9_bits,
    split_int8_matmul,
    split_quant_param,
    unpack_int4,
    unpack_weight,
)
from vllm_npu_quant.emulation.rules.grouped_matmul import Form, GroupedMatmul, Tensors

__all__ = ["Bounds", "group_bounds", "leave_garbage", "npu_grouped_matmul"]

#: (expert, first row, end) of groups of rows.
Bounds = list[tuple[int, int, int]]


def npu_grouped_matmul(
    call: GroupedMatmul, int_matmul: IntMatmul = int_matmul, float_matmul: FloatMatmul = float_matmul
) -> list[torch.Tensor]:
    """Grouped matrix product. For the rows r of expert e, with acc = int32(x[r] @ w[e]), exact:

        float x, same weight:      x @ w + bias
        float x, int8/int4 weight: x @ ((w + antiquant_offset) * antiquant_scale) + bias   (npu_weight_quant_batchmatmul)
        int8 x int8, int32 out:    acc + bias_int32
        int8 x int8, int8 out:     saturate(clamp(rint((acc + bias_int32) * s19), -256, 255) + offset9)
        int8 x int8:               act(((acc + bias_int32) * scale) * per_token_scale), or + bias_bfloat16 after scaling
        int8 x int4:               the last form of npu_quant_matmul; bias = 8 * sum_k(w * scale); x IS OVERWRITTEN
        int4 x int4:               sum_g (x_g @ w_g) * scale_g * per_token_scale

    Returns:
        One tensor for all rows; for group_type -1, one for each of x.

    Source: op-plugin torch_npu-npu_grouped_matmul.md and test_npu_grouped_matmul.py; ops-transformer (kernels, aclnn
    documents) gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md.
    """
    if call.needs_nz:
        call.require_nz()
    products = _Products(call, int_matmul, float_matmul)
    if len(call.x) > 1 or call.group_list is None:
        outputs = []
        for expert, tensor in enumerate(call.x):
            out = products.of(expert, tensor.reshape(-1, tensor.shape[-1]), None)
            outputs.append(out.view(*tensor.shape[:-1], out.shape[-1]))
        return outputs if call.group_type == -1 else [torch.cat(outputs)]
    x, bounds = call.x[0], group_bounds(call)
    out = x.new_empty((x.shape[0], call.width), dtype=call.out_dtype)
    for expert, start, end in bounds:
        token_scale = call.per_token_scale[0][start:end] if call.per_token_scale else None
        out[start:end] = products.of(expert, x[start:end], token_scale)
    leave_garbage(call, out, bounds)
    return [out]


def group_bounds(call: GroupedMatmul) -> Bounds:
    """The groups that are not empty, in the order of the rows of ``x[0]``; they may cover fewer rows than it has.

    Raises:
        RuntimeError: group_list is not valid.
    """
    numbers, rows = call.given("group_list").tolist(), call.x[0].shape[0]
    pairs = call.group_list_type == 2
    if pairs:
        counts = [count for _, count in numbers]
    elif call.group_list_type == 1:
        counts = numbers
    else:
        counts = [end - start for start, end in zip([0, *numbers], numbers, strict=False)]
    call.require(min(counts, default=0) >= 0, "group_list", "groups of no negative size", numbers)
    if pairs:
        first_empty = counts.index(0) if 0 in counts else len(counts)
        ordered = not any(counts[first_empty:])
        call.require(ordered, "group_list", "pairs with a count before those without", numbers)
        known = all(0 <= expert < len(numbers) for expert, _ in numbers[:first_empty])
        call.require(known, "group_list", f"experts below {len(numbers)}", numbers)
    call.require(sum(counts) <= rows, "group_list", f"at most {rows} rows in all groups", numbers)
    bounds, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            bounds.append((numbers[expert][0] if pairs else expert, start, start + count))
            start += count
    return bounds


def leave_garbage(call: GroupedMatmul, out: torch.Tensor, bounds: Bounds) -> None:
    """Fill with garbage the rows of ``out`` that the device does not write, and the x that it does not keep."""
    covered = bounds[-1][2] if bounds else 0
    if covered < out.shape[0]:
        fill_garbage(out[covered:])
    if call.form is Form.INT8_INT4:
        # The device splits x into halves in place.
        fill_garbage(call.x[0])


@dataclass
class _Products:
    """The products of single experts."""

    call: GroupedMatmul
    int_matmul: IntMatmul
    float_matmul: FloatMatmul

    def of(self, expert: int, rows: torch.Tensor, token_scale: torch.Tensor | None) -> torch.Tensor:
        """The output rows of one expert, in the output's dtype."""
        compute = {
            Form.FLOAT: self._float,
            Form.WEIGHT_ONLY: self._weight_only,
            Form.INT8: self._int8,
            Form.INT8_INT4: self._int8_int4,
            Form.INT4: self._int4,
        }
        return compute[self.call.form](expert, rows, token_scale).to(self.call.out_dtype)

    def _of(self, tensors: Tensors | None, expert: int) -> torch.Tensor | None:
        """An operand's part for an expert."""
        if not tensors:
            return None
        return tensors[0][expert] if self.call.stacked else tensors[expert]

    def _needed(self, argument: str, expert: int) -> torch.Tensor:
        tensors = self.call.given(argument)
        return tensors[0][expert] if self.call.stacked else tensors[expert]

    def _float(self, expert: int, rows: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        return self.float_matmul(rows, self._needed("weight", expert), self._of(self.call.bias, expert))

    def _weight_only(self, expert: int, rows: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        packed_along_n, weight = self.call.packed_along_n, self._needed("weight", expert)
        integers = weight if packed_along_n is None else unpack_weight(weight, packed_along_n)
        scale, offset = self._needed("antiquant_scale", expert), self._of(self.call.antiquant_offset, expert)
        group_size = integers.shape[0] // scale.shape[0] if scale.dim() == 2 else 0
        values = dequantize_weight(integers, scale, offset, rows.dtype, group_size)
        return self.float_matmul(rows, values, self._of(self.call.bias, expert))

    def _int8(self, expert: int, rows: torch.Tensor, token_scale: torch.Tensor | None) -> torch.Tensor:
        bias, scale = self._of(self.call.bias, expert), self._of(self.call.scale, expert)
        acc = self.int_matmul(rows, self._needed("weight", expert))
        if bias is not None and bias.dtype == torch.int32:
            acc = acc + bias
        if scale is None:
            return acc
        if self.call.out_dtype is torch.int8:
            factor, offset = split_quant_param(scale)
            return round_to_int(signed_9_bits(acc.to(torch.float32) * factor) + offset, INT8)
        out = acc.to(torch.float32) * scale.to(torch.float32)
        if token_scale is not None:
            out = out * token_scale[:, None]
        if bias is not None and bias.dtype != torch.int32:
            out = out + bias.to(torch.float32)
        return _activated(out, self.call.act_type)

    def _int8_int4(self, expert: int, rows: torch.Tensor, token_scale: torch.Tensor | None) -> torch.Tensor:
        weight, scale = unpack_weight(self._needed("weight", expert), True), float_bits(self._needed("scale", expert))
        out = split_int8_matmul(rows, weight, scale, self._needed("bias", expert), self.int_matmul)
        return out if token_scale is None else out * token_scale.view(-1, 1)

    def _int4(self, expert: int, rows: torch.Tensor, token_scale: torch.Tensor | None) -> torch.Tensor:
        weight = unpack_weight(self._needed("weight", expert), True)
        scale = float_bits(self._needed("scale", expert)).view(-1, self.call.width)
        out = scaled_groups(unpack_int4(rows), weight, scale, self.int_matmul)
        return out if token_scale is None else out * token_scale[:, None]


def _activated(values: torch.Tensor, act_type: int | None) -> torch.Tensor:
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
