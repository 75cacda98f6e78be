# SPDX-License-Identifier: Apache-2.0
"""int8 weights, int8 activations."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, StaticActivation, row_sums
from vllm_npu_quant.layouts.int4 import transposed_int8
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

__all__ = ["W8A8DynamicAsymmetricLinear", "W8A8DynamicGroupedLinear", "W8A8DynamicLinear", "W8A8StaticLinear"]


class _Int8Linear(TransformingLinear):
    """Common part of the int8 methods: the weight as int8 [K, N] in pieces of at most 65535 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, int]] = []

    def prepare_weight(self, linear: CanonicalLinear, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Prepare the pieces and their scales, one per channel."""
        if linear.weight.zero is not None:
            raise NpuQuantError([bad_zero_points("npu_quant_matmul")])
        tensors = self.prepare_pieces(linear, linear.weight.inputs)
        self.tiled = tuple(tensors)
        for number, (start, stop) in enumerate(self.pieces):
            tensors[numbered("weight_scale", number)] = scale[start:stop].contiguous()
        return tensors

    def prepare_pieces(self, linear: CanonicalLinear, depth: int) -> dict[str, torch.Tensor]:
        """Prepare the pieces as int8 [depth, n]; inputs after K are zero."""
        weight = linear.weight
        if weight.inputs > MAX_INPUTS:
            raise NpuQuantError([too_many_inputs("npu_quant_matmul", weight.inputs)])
        if linear.input_permutation is not None:
            raise NpuQuantError([permuted_inputs("npu_quant_matmul")])
        self.outputs = weight.outputs
        self.pieces = split_outputs(weight.outputs)
        return {
            numbered("weight", number): transposed_int8(weight.rows, start, stop, weight.inputs, depth=depth)
            for number, (start, stop) in enumerate(self.pieces)
        }

    def matmul(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """Call npu_quant_matmul for each piece; x int8 [M, K] -> [M, N]."""
        parts = []
        for number, (start, stop) in enumerate(self.pieces):
            if bias is not None:
                options["bias"] = bias if len(self.pieces) == 1 else bias[start:stop]
            weight, scale = (getattr(layer, numbered(name, number)) for name in ("weight", "weight_scale"))
            parts.append(torch.ops.npu.npu_quant_matmul(x, weight, scale, **options))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class W8A8DynamicLinear(_Int8Linear):
    """int8 weight per channel, int8 activation with a dynamic scale per token.

    ``y[m, n] = (x_q[m] . w_q[n]) * weight_scale[n] * x_scale[m] + bias[n]`` with ``x_scale[m] = max|x[m]| / 127``
    (npu_dynamic_quant, npu_quant_matmul).
    """

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        outputs = linear.weight.outputs
        return {
            **self.prepare_weight(linear, linear.weight.scale.reshape(-1).expand(outputs).to(torch.float32)),
            **self.prepare_input(linear, context),
        }

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = self.input_tokens(layer, x)
        quantized, token_scale = torch.ops.npu.npu_dynamic_quant(tokens)
        y = self.matmul(layer, quantized, bias, pertoken_scale=token_scale, output_dtype=x.dtype)
        return as_shaped(y, x)


class W8A8DynamicAsymmetricLinear(_Int8Linear):
    """int8 weight per channel, int8 activation with a dynamic scale and offset per token.

    ``x[m] = (x_q[m] - offset[m]) * x_scale[m]``, so ``y[m, n] = (x_q[m] . w_q[n] - offset[m] * sum_k w_q[n, k])
    * weight_scale[n] * x_scale[m] + bias[n]`` (npu_dynamic_quant_asymmetric, npu_quant_matmul). The product is int32 and the
    offset's term is subtracted in float32, because both may be much larger than the difference. Ranks of a row-parallel
    layer have their own offsets and sums.
    """

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        weight = linear.weight
        scale = weight.scale.reshape(-1).expand(weight.outputs).to(torch.float32)
        return {
            **self.prepare_weight(linear, scale),
            **self.prepare_input(linear, context),
            "scales": scale.contiguous(),
            "row_sums": row_sums(weight).float(),
        }

    def bias_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = self.input_tokens(layer, x)
        quantized, token_scale, offset = torch.ops.npu.npu_dynamic_quant_asymmetric(tokens)
        product = self.matmul(layer, quantized, None, output_dtype=torch.int32)
        y = (product - offset.unsqueeze(-1) * layer.row_sums) * (token_scale.unsqueeze(-1) * layer.scales)
        y = (y if bias is None else y + bias).to(x.dtype)
        return as_shaped(y, x)


class W8A8DynamicGroupedLinear(_Int8Linear):
    """int8 weight with scales per group or with zero points, int8 activation with a dynamic scale per token.

    ``y[m, n] = sum_g (x_q[m, g] . w_q[n, g] - zero[n, g] * sum_k x_q[m, g, k]) * weight_scale[n, g] * x_scale[m] + bias[n]``
    with ``x_scale[m] = max|x[m]| / 127``. A2 and A3 have no int8 x int8 operator with groups, so the products of each group
    are computed as exact int32 (npu_dynamic_quant, npu_quant_matmul with the groups as its batch), and scaled and summed in
    float32.
    """

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        weight = linear.weight
        group = weight.group_size or weight.inputs
        groups = -(-weight.inputs // group)
        tensors = self.prepare_input(linear, context) | self.prepare_pieces(linear, groups * group)
        for number, (start, stop) in enumerate(self.pieces):
            name = numbered("weight", number)
            tensors[name] = tensors[name].view(groups, group, stop - start)
            for place, numbers in (("weight_scale", weight.scale), ("weight_zero", weight.zero)):
                if numbers is not None:
                    own = numbers.expand(weight.outputs, groups)[start:stop].t().to(torch.float32)
                    tensors[numbered(place, number)] = own.contiguous()
        return tensors

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        quantized, token_scale = torch.ops.npu.npu_dynamic_quant(self.input_tokens(layer, x))
        parts = [
            torch.ops.npu_quant.int8_matmul_by_groups(
                quantized,
                token_scale,
                getattr(layer, numbered("weight", number)),
                getattr(layer, numbered("weight_scale", number)),
                getattr(layer, numbered("weight_zero", number), None),
                x.dtype,
            )
            for number in range(len(self.pieces))
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        y = as_shaped(y, x)
        return y if bias is None else y + bias


class W8A8StaticLinear(_Int8Linear):
    """int8 weight per channel, int8 activation with a static scale and offset.

    ``y = (clamp(round(x / input_scale + input_offset), -128, 127) @ w_q + quant_bias) * deq_scale`` (npu_quantize,
    npu_quant_matmul). ``quant_bias`` includes the layer's bias and the zero-point correction; see ``_constant`` for
    row-parallel layers. For float16 outputs the operator uses 19 bits of ``deq_scale``, which is converted once at load.
    """

    folds_bias = True

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        static = linear.static
        if static is None:
            raise NpuQuantError(
                [
                    Finding(
                        "missing-tensor", "a static activation scheme needs input_scale and deq_scale", fix="re-export"
                    )
                ]
            )
        inputs = linear.weight.inputs
        # npu_quantize multiplies by a reciprocal scale per input, in the input's dtype. Rounding the reciprocal changes the
        # quantization step by up to 0.4 %, so the output scale is computed from the rounded step.
        reciprocal = (1.0 / static.scale).to(context.act_dtype)
        used_step = 1.0 / reciprocal.to(torch.float32)
        scale = static.deq_scale.to(torch.float32) * (used_step / static.scale)
        if context.act_dtype == torch.float16:
            scale = torch.ops.npu.npu_trans_quant_param(scale)
        tensors = self.prepare_weight(linear, scale) | self.prepare_input(linear, context)
        tensors["input_scale_reciprocal"] = reciprocal.expand(inputs).contiguous()
        tensors["input_offset"] = static.offset.to(context.act_dtype).expand(inputs).contiguous()
        constant = _constant(linear.weight, static, used_step, context.adds_constants)
        if constant is not None:
            tensors["quant_bias"] = constant
        return tensors

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = self.input_tokens(layer, x)
        quantized = torch.ops.npu.npu_quantize(
            tokens, layer.input_scale_reciprocal, layer.input_offset, torch.qint8, -1, False
        )
        y = self.matmul(layer, quantized, getattr(layer, "quant_bias", None), output_dtype=x.dtype)
        return as_shaped(y, x)


def _constant(
    weight: CanonicalWeight, static: StaticActivation, used_step: torch.Tensor, adds_constants: bool
) -> torch.Tensor | None:
    """Constant that this rank adds to its products, int32 [N]; None if it adds nothing.

    Its unit is the output scale, which is computed from the rounded step of npu_quantize. The zero-point correction is a sum
    of integers and does not depend on the unit; the bias is a real number and is converted to the new unit.

    A stored ``quant_bias`` without ``correction`` is the sum of both, ``bias - offset * sum_k w`` over the inputs of all
    ranks, so a rank of a row-parallel layer cannot separate the bias. The conversion is linear, so it is split: one rank
    converts ``quant_bias``, every rank converts ``offset * sum_k w`` of its own inputs, and the sum converts the bias. Each
    rank rounds once, so the bias is exact to half a unit per rank.

    Args:
        weight: the canonical weight of this rank.
        static: the static activation quantization.
        used_step: float32 [1], the quantization step after rounding.
        adds_constants: see ``PrepareContext``.
    """
    bias = static.quant_bias if adds_constants else None
    constant = bias
    if static.correction is not None:
        constant = static.correction if bias is None else bias + static.correction
    elif static.quant_bias is not None and bool(static.offset.count_nonzero()):
        own = static.offset * row_sums(weight)
        bias = own if bias is None else bias + own
    if bias is None:
        return constant
    change = (bias * ((static.scale - used_step) / used_step)).round().to(torch.int32)
    if constant is None:
        return change if bool(change.count_nonzero()) else None
    return constant + change
