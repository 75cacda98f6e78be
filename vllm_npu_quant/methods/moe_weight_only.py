# SPDX-License-Identifier: Apache-2.0
"""Experts with activations in the model's dtype: weight-only schemes, and float experts beside quantized ones."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.layouts.canonical import CanonicalWeight
from vllm_npu_quant.layouts.int4 import INT4_PER_INT32, row_blocks, transposed_int4
from vllm_npu_quant.methods.moe import Experts, GroupedMethod, GroupedSizes, Input, check_plain
from vllm_npu_quant.methods.moe_w8a8 import place_int8
from vllm_npu_quant.methods.weight_only import antiquant_parameters

__all__ = ["FloatExperts", "WeightOnlyExperts", "place_int4"]


def place_int4(target: torch.Tensor, shard: int, sizes: GroupedSizes, weight: CanonicalWeight) -> None:
    """Pack a 4-bit weight [N, K], transposed, into the columns of one shard of ``target``, int32 [depth, shards * N/8]."""
    width = sizes.outputs // INT4_PER_INT32
    packed = transposed_int4(weight.rows, 0, weight.outputs, weight.inputs, pairs=weight.pairs)
    first = shard * width
    target[: weight.inputs, first : first + packed.shape[1]].copy_(packed)


class _FloatInput(GroupedMethod):
    """Common part of the methods without activation quantization."""

    takes = Input.FLOAT

    def matmul(
        self, layer: Any, x: torch.Tensor, x_scale: torch.Tensor | None, counts: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        scale, offset = self.tensor(layer, "weight_scale"), self.tensor(layer, "weight_offset")
        (y,) = torch.ops.npu.npu_grouped_matmul(
            [x],
            [self.tensor(layer, "weight")],
            antiquant_scale=None if scale is None else [scale],
            antiquant_offset=None if offset is None else [offset],
            group_list=counts,
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=dtype,
        )
        return y


class WeightOnlyExperts(_FloatInput):
    """``y = x @ ((w_q + antiquant_offset) * antiquant_scale)`` (npu_grouped_matmul).

    The operator adds its offset, which is therefore minus the zero point; scale and offset have the activation's dtype. int8
    weights have one scale per channel. Weights of 4 bits and less are packed eight per int32 along the outputs and have
    scales per channel or per group. CANN rejects a call without offsets, so symmetric weights get zeros. Its documentation
    allows offsets per channel only; vllm-ascend and SGLang pass them per group, as is done here.
    """

    outputs_multiple = INT4_PER_INT32

    def prepare(self, experts: Experts, sizes: GroupedSizes, act_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for expert, shard, linear in experts:
            weight = check_plain(linear, "npu_grouped_matmul with float inputs")
            group = weight.group_size if weight.scale.shape[1] > 1 else 0
            packed = weight.bits <= 4
            groups = sizes.inputs // group if group else 1
            shape = (groups, experts.shards, sizes.outputs)
            if not tensors:
                width = experts.shards * sizes.outputs
                tensors["weight"] = (
                    experts.zeros(sizes.inputs, width // INT4_PER_INT32, dtype=torch.int32)
                    if packed
                    else experts.zeros(sizes.inputs, width, dtype=torch.int8)
                )
                tensors["weight_scale"] = experts.zeros(*shape, dtype=act_dtype)
                tensors["weight_offset"] = experts.zeros(*shape, dtype=act_dtype)
            if packed:
                place_int4(tensors["weight"][expert], shard, sizes, weight)
            else:
                place_int8(tensors["weight"][expert], shard * sizes.outputs, weight)
            scale, offset = antiquant_parameters(weight, None, act_dtype)
            place = (expert, slice(scale.shape[0]), shard, slice(weight.outputs))
            tensors["weight_scale"][place] = scale
            if offset is not None:
                tensors["weight_offset"][place] = offset
        for name in ("weight_scale", "weight_offset"):
            flat = tensors[name].flatten(2)
            tensors[name] = flat if flat.shape[1] > 1 else flat.squeeze(1)
        return tensors


class FloatExperts(_FloatInput):
    """``y = x @ w`` in the model's dtype: for float experts, and for weights that no grouped operator takes as stored."""

    def depth_multiple(self, group_size: int) -> int:
        return self.inputs_multiple

    def prepare(self, experts: Experts, sizes: GroupedSizes, act_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        stacked = experts.zeros(sizes.inputs, experts.shards * sizes.outputs, dtype=act_dtype)
        for expert, shard, linear in experts:
            weight = check_plain(linear, "experts in the model's dtype")
            first = shard * sizes.outputs
            for start, stop in row_blocks(weight.outputs, weight.inputs):
                block = weight.dequantized_rows(start, stop).to(act_dtype)
                stacked[expert, : weight.inputs, first + start : first + stop].copy_(block.t())
        return {"weight": stacked}
