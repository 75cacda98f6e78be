# SPDX-License-Identifier: Apache-2.0
"""Weight-only schemes: integer weights, activations in the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

import torch
from torch.nn import functional as F

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.int4 import INT4_PER_INT32, transposed_int4, transposed_int8
from vllm_npu_quant.methods.base import (
    MAX_INPUTS,
    NpuLinearMethod,
    PrepareContext,
    as_shaped,
    numbered,
    split_outputs,
    tokens_of,
    too_many_inputs,
    transformed_inputs,
)

__all__ = ["Grouping", "WeightOnlyLinear", "antiquant_parameters", "fit_groups"]

#: antiquant_group_size must be a multiple of this and smaller than K.
GROUP_MULTIPLE = 32


@dataclass(frozen=True)
class Grouping:
    """Mapping of a weight's groups to groups that the operator supports.

    Attributes:
        size: inputs per group of the operator; 0 for one scale per channel.
        depth: inputs of the rearranged weight.
        columns: int64, for each group of the operator the index of the weight's group whose scale it uses; None for the
            identity.
        positions: int64 [K], the position of each input among ``depth``; None if no input moves. Other positions are zero.
    """

    size: int
    depth: int
    columns: torch.Tensor | None = None
    positions: torch.Tensor | None = None


def fit_groups(weight: CanonicalWeight) -> Grouping | None:
    """Rearrange a weight's groups so that the size of each is a multiple of 32, without changing values. None if that more
    than doubles the memory.

    - A single group that covers all inputs is a channel.
    - A tensor-parallel rank may begin and end inside a group; its group size is then a common divisor of group and part, and
      scales repeat. Such runs are merged again, with zeros before the first.
    - Otherwise every group is padded with zeros to the next multiple of 32.
    """
    group, inputs = weight.group_size, weight.inputs
    groups = weight.scale.shape[1]
    if groups <= 1:
        return Grouping(0, inputs)
    if group % GROUP_MULTIPLE == 0 and group < inputs:
        return Grouping(group, inputs)
    device = weight.scale.device
    changes = _changes(weight)
    if not changes:
        return Grouping(0, inputs, torch.zeros(1, dtype=torch.int64, device=device))
    whole = group * GROUP_MULTIPLE // gcd(group, GROUP_MULTIPLE)
    if all((change - changes[0]) % whole == 0 for change in changes):
        size = reduce(gcd, (change - changes[0] for change in changes[1:]), 0) or whole
        front = -changes[0] % size
        depth = front + inputs
        if size < depth <= 2 * inputs:
            first = torch.arange(-(-depth // size), device=device) * size - front
            positions = torch.arange(front, depth, device=device) if front else None
            return Grouping(size, depth, first.clamp(min=0) // group, positions)
    size = -(-group // GROUP_MULTIPLE) * GROUP_MULTIPLE
    depth = groups * size
    if size > 2 * group:
        return None
    place = torch.arange(inputs, device=device)
    return Grouping(size, depth, None, place // group * size + place % group)


def _changes(weight: CanonicalWeight) -> list[int]:
    """Indices of the inputs at which the scale or zero point changes."""
    differ = (weight.scale[:, 1:] != weight.scale[:, :-1]).any(dim=0)
    if weight.zero is not None:
        differ = differ | (weight.zero[:, 1:] != weight.zero[:, :-1]).any(dim=0)
    return [(int(i) + 1) * weight.group_size for i in differ.nonzero().flatten()]


def antiquant_parameters(
    weight: CanonicalWeight, columns: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """antiquant_scale and antiquant_offset, [G, N] in the activation's dtype; no offset if all zero points are 0.

    Args:
        weight: the canonical weight.
        columns: see ``Grouping``.
        dtype: the activation's dtype.

    Raises:
        NpuQuantError: operator-limit for scales, bad-value for zero points, that the dtype cannot represent.
    """
    scale, zero = weight.scale, weight.zero
    if columns is not None:
        scale = scale[:, columns]
        zero = None if zero is None else zero[:, columns]
    rounded = scale.to(dtype)
    findings = []
    # Rounding of the last bits is expected; scales outside the range of float16 are not.
    error = torch.linalg.vector_norm(rounded.to(torch.float32) - scale)
    if not bool(error <= 2**-7 * torch.linalg.vector_norm(scale)):
        findings.append(_bad_scale(scale, dtype))
    offset = None if zero is None else (-zero).to(dtype)
    if offset is not None and zero is not None and not torch.equal(offset.to(torch.float32), -zero):
        findings.append(_bad_zero(dtype))
    if findings:
        raise NpuQuantError(findings)
    rounded = rounded.expand(weight.outputs, -1).t()
    return rounded, None if offset is None else offset.expand(weight.outputs, -1).t()


class WeightOnlyLinear(NpuLinearMethod):
    """``y = x @ ((w_q + antiquant_offset) * antiquant_scale).T + bias`` (npu_weight_quant_batchmatmul).

    The operator adds its offset, which is therefore minus the zero point; scale and offset have the activation's dtype.

    int8 weights are [K, N], in FRACTAL_NZ if their sizes allow it. Weights of 4 bits and less are int32 [K, N/8] in the plain
    layout: the operator supports packed FRACTAL_NZ weights only for groups of 64 or 128, and only in graphs. Their outputs
    are padded to a multiple of 8, and the padding is dropped from the result.
    """

    def __init__(self) -> None:
        self.group_size = 0
        self.pieces: list[tuple[int, int]] = []
        # Presence of optional tensors; Module.__getattr__ is slow for missing names.
        self.gathers_columns = self.has_offset = False
        self.filled = False

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        """See the base class.

        Raises:
            NpuQuantError: operator-limit for more than 65535 inputs, for groups that cannot be padded to a multiple of 32
                within twice the memory, and for scales that float16 cannot represent; bad-value for zero points that the
                activation's dtype cannot represent.
        """
        weight = linear.weight
        if linear.transform is not None:
            raise NpuQuantError([transformed_inputs("weight-only schemes")])
        packed = weight.bits <= 4
        grouping = fit_groups(weight)
        if grouping is None:
            raise NpuQuantError([_bad_group(weight.group_size)])
        if grouping.depth > MAX_INPUTS:
            raise NpuQuantError([too_many_inputs("npu_weight_quant_batchmatmul", grouping.depth)])
        scale, offset = antiquant_parameters(weight, grouping.columns, context.act_dtype)
        self.outputs = weight.outputs
        self.group_size = grouping.size
        self.pieces = split_outputs(weight.outputs)
        self.tiled = () if packed else tuple(numbered("weight", number) for number in range(len(self.pieces)))
        tensors: dict[str, torch.Tensor] = {}
        for number, (start, stop) in enumerate(self.pieces):
            arranged = (weight.rows, start, stop, weight.inputs, grouping.positions, grouping.depth)
            if packed:
                tensors[numbered("weight", number)] = transposed_int4(*arranged, pairs=weight.pairs)
            else:
                tensors[numbered("weight", number)] = transposed_int8(*arranged)
            fill = -(stop - start) % INT4_PER_INT32 if packed else 0
            # Padding outputs have weight 0 and scale 0.
            tensors[numbered("weight_scale", number)] = F.pad(scale[:, start:stop], (0, fill)).contiguous()
            if offset is not None:
                tensors[numbered("weight_offset", number)] = F.pad(offset[:, start:stop], (0, fill)).contiguous()
        self.has_offset = offset is not None
        gather = self._gather(linear, grouping)
        self.gathers_columns = gather is not None
        if gather is not None:
            tensors["input_index"] = gather
        return tensors

    def _gather(self, linear: CanonicalLinear, grouping: Grouping) -> torch.Tensor | None:
        """Index for gathering x, int64 [depth]: for each row of the prepared weight, the column of x that multiplies it. The
        index of padding rows is the column after the last, which ``compute`` fills with zeros. None if x is used as it is."""
        index = linear.input_permutation
        if index is None and grouping.positions is None:
            return None
        inputs, device = linear.weight.inputs, linear.weight.scale.device
        index = torch.arange(inputs, device=device) if index is None else index
        zeros = int((index >= 0).sum())
        index = torch.where(index < 0, zeros, index)
        if grouping.positions is not None:
            places = torch.full((grouping.depth,), zeros, dtype=torch.int64, device=device)
            index = places.index_copy_(0, grouping.positions, index)
        self.filled = bool((index == zeros).any())
        return index

    def bias_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if act_dtype == torch.bfloat16 else act_dtype

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = tokens_of(x)
        if self.gathers_columns:
            tokens = (F.pad(tokens, (0, 1)) if self.filled else tokens).index_select(1, layer.input_index)
        parts = []
        for number, (start, stop) in enumerate(self.pieces):
            weight_scale = getattr(layer, numbered("weight_scale", number))
            fill = weight_scale.shape[1] - (stop - start)
            part_bias = bias
            if bias is not None and (fill or len(self.pieces) > 1):
                part_bias = F.pad(bias[start:stop], (0, fill))
            # Positional arguments: matching keywords takes torch several microseconds.
            part = torch.ops.npu.npu_weight_quant_batchmatmul.default(
                tokens,
                getattr(layer, numbered("weight", number)),
                weight_scale,
                getattr(layer, numbered("weight_offset", number)) if self.has_offset else None,
                None,
                None,
                part_bias,
                self.group_size,
            )
            parts.append(part[:, : stop - start].contiguous() if fill else part)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return as_shaped(y, x)


def _bad_group(group: int) -> Finding:
    return Finding(
        "operator-limit",
        "npu_weight_quant_batchmatmul takes groups of a multiple of 32 inputs, and filling these up with zeros would more "
        "than double the weight",
        expected="a group size of at least 16, or one scale per channel",
        found=f"groups of {group}",
        fix="use a tensor-parallel size that cuts the layer at whole groups, or re-export with a larger group size",
    )


def _bad_scale(scale: torch.Tensor, dtype: torch.dtype) -> Finding:
    return Finding(
        "operator-limit",
        "npu_weight_quant_batchmatmul takes scales in the model's dtype, which does not hold these",
        expected=f"finite scales in the range of {str(dtype).removeprefix('torch.')}",
        found=f"scales from {float(scale.min()):g} to {float(scale.max()):g}",
        fix="run with --dtype bfloat16",
    )


def _bad_zero(dtype: torch.dtype) -> Finding:
    return Finding(
        "bad-value",
        "npu_weight_quant_batchmatmul takes zero points in the model's dtype, which does not hold these",
        expected=f"integers that {str(dtype).removeprefix('torch.')} holds",
        found="zero points that would be rounded",
        fix="re-export the checkpoint with integer zero points",
    )
