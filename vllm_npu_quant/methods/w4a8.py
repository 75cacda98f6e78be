# SPDX-License-Identifier: Apache-2.0
"""int4 weights, int8 activations."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch.nn import functional as F

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.int4 import INT4_PER_INT32, row_blocks, transposed_int4
from vllm_npu_quant.methods import operators  # noqa: F401  # defines torch.ops.npu_quant.*
from vllm_npu_quant.methods.base import (
    MAX_INPUTS,
    PrepareContext,
    as_shaped,
    bad_zero_points,
    numbered,
    permuted_inputs,
    split_outputs,
    too_many_inputs,
)
from vllm_npu_quant.methods.transforms import TransformingLinear

__all__ = ["GROUP_SIZE", "MAX_DEPTH", "W4A8DynamicLinear", "as_int64_bits", "grouped_scale", "zero_filled"]

#: Limits of the int8 x int4 operator (aclnnGroupedMatmulV5): one scale per channel or per 256 inputs; a multiple of 256
#: inputs, at most 18432.
GROUP_SIZE = 256
MAX_DEPTH = 18432


def as_int64_bits(scale: torch.Tensor) -> torch.Tensor:
    """Encode float32 for the int4 operators: its bits in the low 32 bits of int64, the high 32 bits 0."""
    return scale.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def zero_filled(weight: CanonicalWeight, multiple: int) -> int:
    """K rounded up to whole groups and to a multiple of ``multiple``; the weights of inputs after K are zero."""
    step = multiple
    if weight.group_size:
        step = step * weight.group_size // gcd(step, weight.group_size)
    return -(-weight.inputs // step) * step


def grouped_scale(weight: CanonicalWeight, depth: int, group: int) -> torch.Tensor:
    """Scales for groups of ``group`` inputs, float32 [depth / group, N]; ``group`` divides the weight's group size."""
    own = weight.group_size or depth
    scale = weight.scale.expand(weight.outputs, -1).to(torch.float32)
    if own != group:
        scale = scale.repeat_interleave(own // group, dim=1)
    groups = depth // group
    # Padding groups: the scale is never read.
    return F.pad(scale, (0, max(groups - scale.shape[1], 0)))[:, :groups].t()


def unit_sums(weight: CanonicalWeight, depth: int, unit: int, *, magnitudes: bool = False) -> torch.Tensor:
    """``sum_k(w)`` over each run of ``unit`` inputs of each row, float32 [N, depth / unit].

    Args:
        weight: the canonical weight.
        depth: K after padding.
        unit: inputs per sum; it divides the group size.
        magnitudes: sum ``|w|`` instead.
    """
    sums = torch.empty(weight.outputs, depth // unit, dtype=torch.float32, device=weight.scale.device)
    for start, stop in row_blocks(weight.outputs, weight.inputs):
        block = weight.rows(start, stop)
        block = F.pad(block.abs() if magnitudes else block, (0, depth - weight.inputs))
        sums[start:stop] = block.view(stop - start, -1, unit).sum(dim=2, dtype=torch.int32)
    return sums * grouped_scale(weight, depth, unit).t()


class W4A8DynamicLinear(TransformingLinear):
    """int4 weight, int8 activation with a dynamic scale per token.

    ``y[m, n] = sum_g (x_q[m, g] . w_q[n, g]) * weight_scale[n, g] * x_scale[m] + bias[n]`` with
    ``x_scale[m] = max|x[m]| / 127`` (npu_dynamic_quant, npu_grouped_matmul with one group of rows).

    One scale per channel, or groups of a multiple of 256: the int8 x int4 operator, with inputs padded to a multiple of 256,
    in parts of at most 18432. Its argument ``8 * sum_k(w)`` is computed from this rank's weights, because the stored one is
    valid for some numbers of ranks only. Other even group sizes: int4 halves of the activation. Both keep the weight packed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, int]] = []
        self.parts: list[tuple[int, int]] = []
        self.by_halves = False
        self.halves_dtype = torch.float16

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        """See the base class.

        Raises:
            NpuQuantError: bad-value for zero points; operator-limit for odd group sizes or too many inputs.
        """
        weight = linear.weight
        if weight.zero is not None:
            raise NpuQuantError([bad_zero_points("the int8 x int4 operator")])
        if linear.input_permutation is not None:
            raise NpuQuantError([permuted_inputs("the int8 x int4 operator")])
        group = weight.group_size
        if group % 2:
            raise NpuQuantError([odd_groups("the int8 x int4 operator", group)])
        self.outputs = weight.outputs
        self.pieces = split_outputs(weight.outputs)
        self.by_halves = bool(group % GROUP_SIZE)
        depth = zero_filled(weight, INT4_PER_INT32 if self.by_halves else GROUP_SIZE)
        if depth > MAX_INPUTS:
            raise NpuQuantError([too_many_inputs("npu_grouped_matmul", depth)])
        self.parts = [(0, depth)] if self.by_halves else split_outputs(depth, MAX_DEPTH, GROUP_SIZE)
        unit = group if self.by_halves else GROUP_SIZE
        scale = grouped_scale(weight, depth, unit if group else depth)
        totals = unit_sums(weight, depth, unit)
        if self.by_halves:
            # float16 is more precise for the products of the halves, but must hold the largest possible one.
            largest = 8 * unit_sums(weight, depth, unit, magnitudes=True).sum(dim=1).max()
            self.halves_dtype = torch.float16 if float(largest) < torch.finfo(torch.float16).max else torch.bfloat16
        tensors = self.prepare_input(linear, context)
        for number, (start, stop) in enumerate(self.pieces):
            packed = transposed_int4(weight.rows, start, stop, weight.inputs, depth=depth, pairs=weight.pairs)
            fill = packed.shape[1] * INT4_PER_INT32 - (stop - start)
            for part, (low, high) in enumerate(self.parts):
                first, last = (low * scale.shape[0] // depth, -(-high * scale.shape[0] // depth))
                own = F.pad(scale[first:last, start:stop], (0, fill))
                assist = 8 * totals[start:stop, low // unit : high // unit].to(torch.float64).sum(dim=1)
                assist = F.pad(assist.to(torch.float32), (0, fill))
                place = number * len(self.parts) + part
                tensors[numbered("weight", place)] = packed[low:high].unsqueeze(0).contiguous()
                tensors[numbered("scale", place)] = as_int64_bits(own).unsqueeze(0)
                tensors[numbered("assist", place)] = assist if self.by_halves else assist.unsqueeze(0)
        return tensors

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = self.input_tokens(layer, x)
        results = []
        for number, (start, stop) in enumerate(self.pieces):
            places = range(number * len(self.parts), (number + 1) * len(self.parts))
            weights, scales, assists = (
                [getattr(layer, numbered(name, place)) for place in places] for name in ("weight", "scale", "assist")
            )
            if self.by_halves:
                result = torch.ops.npu_quant.int8_int4_linear_by_halves(
                    tokens, weights[0], scales[0], assists[0], self.halves_dtype
                )
            else:
                result = torch.ops.npu_quant.int8_int4_linear(tokens, weights, scales, assists)
            results.append(result[:, : stop - start].contiguous())
        y = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
        y = as_shaped(y, x)
        return y if bias is None else y + bias


def odd_groups(operator: str, group: int) -> Finding:
    """Finding for an odd group size, which no int4 operator supports."""
    return Finding(
        "operator-limit",
        f"{operator} takes groups of an even number of inputs",
        expected="an even group size",
        found=f"groups of {group}",
        fix="use a tensor-parallel size that cuts the layer at whole groups, or re-export with an even group size",
    )
