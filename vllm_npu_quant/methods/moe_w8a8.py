# SPDX-License-Identifier: Apache-2.0
"""Experts with int8 weights and int8 activations."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.int4 import row_blocks
from vllm_npu_quant.methods.base import to_nz
from vllm_npu_quant.methods.moe import Experts, GroupedMethod, GroupedSizes, Input, check_plain, expert_bias

__all__ = ["W8A8DynamicExperts", "place_int8"]

#: FRACTAL_NZ tiles of int8 are 16 x 32. With a float32 scale, the operator gives bfloat16 for FRACTAL_NZ weights only.
NZ_INPUTS = 16
#: npu_dequant_swiglu_quant takes an inner dimension that 64 divides.
OUTPUTS_MULTIPLE = 64


def place_int8(target: torch.Tensor, first: int, weight: CanonicalWeight) -> None:
    """Write a weight [N, K] transposed into columns ``first`` and following of int8 [at least K, ...], block by block."""
    for start, stop in row_blocks(weight.outputs, weight.inputs):
        target[: weight.inputs, first + start : first + stop].copy_(weight.rows(start, stop).t())


def _check_static(linear: CanonicalLinear, *, whole_inputs: bool) -> None:
    """Whether the integers of a statically quantized layer are all there is to it, once its input has a scale per token.

    Its quant_bias is then the correction for the input's offset, ``-offset * sum_k w``; what is more is a bias.

    Args:
        whole_inputs: whether the weight has all inputs that quant_bias counts. w2 of a tensor-parallel rank does not.

    Raises:
        NpuQuantError: unsupported-scheme for a bias.
    """
    static, weight = linear.static, linear.weight
    assert static is not None
    if static.quant_bias is None or not (whole_inputs or float(static.offset) == 0):
        return
    sums = torch.cat(
        [weight.rows(*block).sum(1, dtype=torch.int64) for block in row_blocks(weight.outputs, weight.inputs)]
    )
    if bool((static.quant_bias + static.offset.to(torch.int64) * sums).count_nonzero()):
        raise NpuQuantError([expert_bias()])


class W8A8DynamicExperts(GroupedMethod):
    """``y = (x_q . w_q) * weight_scale * x_scale``: int8 per output channel, int8 per token (npu_grouped_matmul).

    Layers with static activation scales come here too, and their input scales are not used: the routing operator knows one
    scale for all experts.
    """

    takes = Input.INT8
    inputs_multiple = NZ_INPUTS
    outputs_multiple = OUTPUTS_MULTIPLE
    gives_int32 = True

    def prepare(self, experts: Experts, sizes: GroupedSizes, act_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        stacked = experts.zeros(sizes.inputs, experts.shards * sizes.outputs, dtype=torch.int8)
        scale = experts.zeros(experts.shards, sizes.outputs, dtype=torch.float32)
        for expert, shard, linear in experts:
            weight = check_plain(linear, "npu_grouped_matmul of int8 by int8", symmetric=True)
            if linear.static is not None:
                _check_static(linear, whole_inputs=experts.shards == 2)
            place_int8(stacked[expert], shard * sizes.outputs, weight)
            scale[expert, shard, : weight.outputs] = weight.scale.reshape(-1)
        return {"weight": stacked, "weight_scale": scale.flatten(1)}

    def finish(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "weight": to_nz(tensors["weight"])}

    def matmul(
        self, layer: Any, x: torch.Tensor, x_scale: torch.Tensor | None, counts: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        scaled = dtype != torch.int32
        (y,) = torch.ops.npu.npu_grouped_matmul(
            [x],
            [self.tensor(layer, "weight")],
            scale=[self.tensor(layer, "weight_scale")] if scaled else None,
            per_token_scale=[x_scale] if scaled and x_scale is not None else None,
            group_list=counts,
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=dtype,
        )
        return y
