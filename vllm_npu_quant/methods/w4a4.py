# SPDX-License-Identifier: Apache-2.0
"""int4 weights, int4 activations."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.int4 import INT4_PER_INT32, packed_rows, transposed_int4
from vllm_npu_quant.methods import operators  # noqa: F401  # defines torch.ops.npu_quant.*
from vllm_npu_quant.methods.base import (
    MAX_INPUTS,
    PrepareContext,
    as_shaped,
    bad_zero_points,
    numbered,
    permuted_inputs,
    split_outputs,
    tokens_of,
    too_many_inputs,
)
from vllm_npu_quant.methods.transforms import LEFT, RIGHT, TransformingLinear
from vllm_npu_quant.methods.w4a8 import as_int64_bits, grouped_scale, odd_groups, zero_filled

__all__ = ["W4A4DynamicLinear"]

#: Limit of npu_kronecker_quant on the size of either matrix.
MAX_KRONECKER = 256


class W4A4DynamicLinear(TransformingLinear):
    """int4 weight, int4 activation with a dynamic scale per token.

    ``y[m, n] = sum_g (x_q[m, g] . w_q[n, g]) * weight_scale[n, g] * x_scale[m] + bias[n]`` with
    ``x_scale[m] = clip * max|x[m]| / 7``. With an input transform (FlatQuant, online rotations), one operator transforms and
    quantizes if it supports the sizes of the matrices.

    One scale per channel: npu_quant_matmul on int4, the weight as [N, K/8] transposed. Groups of an even size:
    npu_grouped_matmul with one group of rows, the weight as [K, N/8].
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.grouped = False
        self.kronecker = False
        self.pieces: list[tuple[int, int]] = []

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        """See the base class.

        Raises:
            NpuQuantError: bad-value for zero points; operator-limit for odd group sizes or too many inputs; cannot-shard if
                the result of a transform over all ranks cannot be split at this rank's bounds.
        """
        weight = linear.weight
        if weight.zero is not None:
            raise NpuQuantError([bad_zero_points("the int4 x int4 operator")])
        if linear.input_permutation is not None:
            raise NpuQuantError([permuted_inputs("the int4 x int4 operator")])
        if weight.group_size % 2:
            raise NpuQuantError([odd_groups("the int4 x int4 operator", weight.group_size)])
        self.depth = zero_filled(weight, INT4_PER_INT32)
        if self.depth > MAX_INPUTS:
            raise NpuQuantError([too_many_inputs("the int4 x int4 operator", self.depth)])
        self.outputs = weight.outputs
        self.grouped = weight.group_size > 0
        self.pieces = split_outputs(weight.outputs)
        tensors = self._prepare_transform(linear, context)
        scale = grouped_scale(weight, self.depth, weight.group_size or self.depth)
        for number, (start, stop) in enumerate(self.pieces):
            fill = -(stop - start) % INT4_PER_INT32
            own = F.pad(scale[:, start:stop], (0, fill))
            if self.grouped:
                packed = transposed_int4(weight.rows, start, stop, weight.inputs, depth=self.depth, pairs=weight.pairs)
                tensors[numbered("weight", number)] = packed.unsqueeze(0)
                tensors[numbered("scale", number)] = as_int64_bits(own).unsqueeze(0)
            else:
                packed = packed_rows(weight.rows, start, stop, weight.inputs, self.depth)
                tensors[numbered("weight", number)] = packed.t()
                tensors[numbered("scale", number)] = own.flatten().contiguous()
        return tensors

    def _prepare_transform(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        matrices = self.prepare_input(linear, context)
        plan = self.transform
        if plan is None:
            return matrices
        if plan.gathers and (plan.start % INT4_PER_INT32 or plan.stop % INT4_PER_INT32):
            raise NpuQuantError([_cut(plan.stop - plan.start)])
        sizes = max(plan.left, plan.right) <= MAX_KRONECKER and plan.right % INT4_PER_INT32 == 0
        self.kronecker = sizes and self.depth == linear.weight.inputs
        if self.kronecker:
            device = linear.weight.scale.device
            for name, size in ((LEFT, plan.left), (RIGHT, plan.right)):
                if name not in matrices:
                    matrices[name] = torch.eye(size, dtype=context.act_dtype, device=device)
        return matrices

    def _quantized(self, layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform and quantize the input: int32 [M, K/8] and float32 [M], K of this rank."""
        plan = self.transform
        if plan is not None and self.kronecker:
            packed, scale = torch.ops.npu_quant.kronecker_quant_int4(
                tokens_of(x), getattr(layer, LEFT), getattr(layer, RIGHT), plan.clip
            )
            if plan.gathers:
                packed = packed[:, plan.start // INT4_PER_INT32 : plan.stop // INT4_PER_INT32].contiguous()
            return packed, scale
        tokens = self.input_tokens(layer, x)
        if self.depth > tokens.shape[1]:
            tokens = F.pad(tokens, (0, self.depth - tokens.shape[1]))
        if plan is not None and plan.clip != 1.0:
            return torch.ops.npu_quant.clipped_quant_int4(tokens, plan.clip)
        return torch.ops.npu_quant.dynamic_quant_int4(tokens)

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        quantized, token_scale = self._quantized(layer, x)
        results = []
        for number, (start, stop) in enumerate(self.pieces):
            weight = getattr(layer, numbered("weight", number))
            scale = getattr(layer, numbered("scale", number))
            if self.grouped:
                result = torch.ops.npu_quant.int4_int4_matmul(quantized, token_scale, weight, scale, x.dtype)
            else:
                result = torch.ops.npu.npu_quant_matmul(
                    quantized, weight, scale, pertoken_scale=token_scale, output_dtype=x.dtype
                )
            results.append(result[:, : stop - start].contiguous())
        y = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
        y = as_shaped(y, x)
        return y if bias is None else y + bias


def _cut(inputs: int) -> Finding:
    return Finding(
        "cannot-shard",
        "int4 activations are packed eight to a word, and a rank would get a part of one",
        expected="inputs per rank divisible by 8",
        found=str(inputs),
        fix="use a smaller tensor-parallel size",
    )
