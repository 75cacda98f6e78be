# SPDX-License-Identifier: Apache-2.0
"""Experts with int8 weights and int8 activations."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalWeight, StaticActivation
from vllm_npu_quant.layouts.int4 import row_blocks
from vllm_npu_quant.methods.base import to_nz
from vllm_npu_quant.methods.moe import Experts, GroupedMethod, GroupedSizes, Input, check_plain
from vllm_npu_quant.serving.decide import expert_bias

__all__ = ["W8A8DynamicExperts", "place_int8"]

#: FRACTAL_NZ tiles of int8 are 16 x 32. With a float32 scale, the operator supports bfloat16 only for FRACTAL_NZ weights.
NZ_INPUTS = 16
#: npu_dequant_swiglu_quant requires an inner dimension that is a multiple of 64.
OUTPUTS_MULTIPLE = 64


def place_int8(target: torch.Tensor, first: int, weight: CanonicalWeight) -> None:
    """Write a weight [N, K] transposed into N columns of ``target``, beginning at ``first``, in blocks of rows.

    Args:
        target: int8 [at least K, at least first + N].
    """
    for start, stop in row_blocks(weight.outputs, weight.inputs):
        target[: weight.inputs, first + start : first + stop].copy_(weight.rows(start, stop).t())


def _check_no_bias(static: StaticActivation, weight: CanonicalWeight, *, whole_inputs: bool) -> None:
    """Check that quant_bias is only the zero-point correction, ``-offset * sum_k w``.

    Any remainder is a bias of the expert, which the chain does not support.

    Args:
        whole_inputs: whether the weight has all inputs that quant_bias covers. w2 of a tensor-parallel rank has not; it is
            checked only if the offset is 0.

    Raises:
        NpuQuantError: unsupported-scheme for a bias.
    """
    if static.quant_bias is None or not (whole_inputs or float(static.offset) == 0):
        return
    sums = torch.cat(
        [weight.rows(*block).sum(1, dtype=torch.int64) for block in row_blocks(weight.outputs, weight.inputs)]
    )
    if bool((static.quant_bias + static.offset.to(torch.int64) * sums).count_nonzero()):
        raise NpuQuantError([expert_bias()])


class W8A8DynamicExperts(GroupedMethod):
    """``y = (x_q . w_q) * weight_scale * x_scale``: int8 per output channel, int8 per token (npu_grouped_matmul).

    It also serves layers with static activation scales, whose input scales are not used: the routing operator takes one
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
                _check_no_bias(linear.static, weight, whole_inputs=experts.shards == 2)
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
