# SPDX-License-Identifier: Apache-2.0
"""Experts with int4 weights and quantized activations."""

from __future__ import annotations

from math import lcm
from typing import Any

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalWeight
from vllm_npu_quant.layouts.int4 import INT4_PER_INT32, pack_pairs
from vllm_npu_quant.methods.moe import Experts, GroupedMethod, GroupedSizes, Input, check_plain
from vllm_npu_quant.methods.moe_weight_only import place_int4
from vllm_npu_quant.methods.w4a8 import GROUP_SIZE, MAX_DEPTH, as_int64_bits, grouped_scale, odd_groups, unit_sums

__all__ = ["W4A4DynamicExperts", "W4A8DynamicExperts"]


def _group_of(weight: CanonicalWeight, operator: str) -> int:
    """Inputs per group; 0 for one scale per channel.

    Raises:
        NpuQuantError: operator-limit for odd groups.
    """
    group = weight.group_size if weight.scale.shape[1] > 1 else 0
    if group % 2:
        raise NpuQuantError([odd_groups(operator, group)])
    return group


class _Int4Weight(GroupedMethod):
    """Common part of the int4 methods: weight int32 [E, K, shards * N/8], scales int64 [E, G, shards * N] of float32 bits."""

    outputs_multiple = INT4_PER_INT32
    inputs_multiple = INT4_PER_INT32

    def place(
        self,
        tensors: dict[str, torch.Tensor],
        where: tuple[int, int],
        weight: CanonicalWeight,
        experts: Experts,
        sizes: GroupedSizes,
        unit: int,
    ) -> None:
        """Write one shard of one expert into ``tensors``, which is filled with zeros at the first call.

        Args:
            where: expert and shard.
            unit: inputs per scale of the operator.
        """
        expert, shard = where
        groups = sizes.inputs // unit
        if not tensors:
            width = experts.shards * sizes.outputs
            tensors["weight"] = experts.zeros(sizes.inputs, width // INT4_PER_INT32, dtype=torch.int32)
            tensors["weight_scale"] = experts.zeros(groups, experts.shards, sizes.outputs, dtype=torch.int64)
        place_int4(tensors["weight"][expert], shard, sizes, weight)
        scale = as_int64_bits(grouped_scale(weight, sizes.inputs, unit))
        tensors["weight_scale"][expert, :, shard, : weight.outputs] = scale


class W4A8DynamicExperts(_Int4Weight):
    """``y = sum_g (x_q[g] . w_q[g]) * weight_scale[g] * x_scale``: int4 weights, int8 per token (npu_grouped_matmul).

    One scale per channel, or groups of a multiple of 256: the int8 x int4 operator, with inputs padded to a multiple of 256.
    It overwrites its int8 input, which is not used afterwards. Its argument ``8 * sum_k(w)`` is computed from this rank's
    weights, so that ranks which sum their results count it once.

    Other even group sizes: two calls of the int4 x int4 operator, on int4 halves of the activation,
    ``x = 16 * high + low + 8`` with both in [-8, 7].
    """

    takes = Input.INT8

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix)
        self.by_halves = False
        self.halves_dtype = torch.float16

    def depth_multiple(self, group_size: int) -> int:
        return super().depth_multiple(group_size) if group_size % GROUP_SIZE else lcm(GROUP_SIZE, group_size or 1)

    def prepare(self, experts: Experts, sizes: GroupedSizes, act_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        assist = experts.zeros(experts.shards, sizes.outputs, dtype=torch.float32)
        largest = 0.0
        for expert, shard, linear in experts:
            weight = check_plain(linear, "the int8 x int4 operator", symmetric=True)
            group = _group_of(weight, "the int8 x int4 operator")
            self.by_halves = bool(group % GROUP_SIZE)
            if not self.by_halves and sizes.inputs > MAX_DEPTH:
                raise NpuQuantError([_too_deep(sizes.inputs)])
            unit = group if self.by_halves else GROUP_SIZE if group else sizes.inputs
            self.place(tensors, (expert, shard), weight, experts, sizes, unit)
            sums = 8 * unit_sums(weight, sizes.inputs, unit).to(torch.float64).sum(dim=1)
            assist[expert, shard, : weight.outputs] = sums.to(torch.float32)
            if self.by_halves:
                magnitudes = unit_sums(weight, sizes.inputs, unit, magnitudes=True).sum(dim=1)
                largest = max(largest, 8 * float(magnitudes.max()))
        # float16 is more precise for the products of the halves, but must hold the largest possible one.
        self.halves_dtype = torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16
        return {**tensors, "weight_scale": tensors["weight_scale"].flatten(2), "scale_bias": assist.flatten(1)}

    def matmul(
        self, layer: Any, x: torch.Tensor, x_scale: torch.Tensor | None, counts: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        if x_scale is None:
            raise ValueError("W4A8 needs a scale per token")
        if self.by_halves:
            return self._by_halves(layer, x, x_scale, counts, dtype)
        (y,) = torch.ops.npu.npu_grouped_matmul(
            [x],
            [self.tensor(layer, "weight")],
            bias=[self.tensor(layer, "scale_bias")],
            scale=[self.tensor(layer, "weight_scale")],
            per_token_scale=[x_scale],
            group_list=counts,
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=dtype,
        )
        return y

    def _by_halves(
        self, layer: Any, x: torch.Tensor, x_scale: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        halves = []
        for half in (x >> 4, (x & 15) - 8):
            (product,) = torch.ops.npu.npu_grouped_matmul(
                [pack_pairs(half).view(torch.int32)],
                [self.tensor(layer, "weight")],
                scale=[self.tensor(layer, "weight_scale")],
                group_list=counts,
                split_item=2,
                group_type=0,
                group_list_type=1,
                output_dtype=self.halves_dtype,
            )
            halves.append(product.to(torch.float32))
        high, low = halves
        assist = self.tensor(layer, "scale_bias")
        rows = torch.arange(x.shape[0], device=x.device)
        expert = torch.searchsorted(counts.cumsum(0), rows, right=True).clamp(max=assist.shape[0] - 1)
        return ((16 * high + low + assist[expert]) * x_scale.unsqueeze(1)).to(dtype)


class W4A4DynamicExperts(_Int4Weight):
    """``y = sum_g (x_q[g] . w_q[g]) * weight_scale[g] * x_scale``: int4 weights, int4 per token (npu_grouped_matmul)."""

    takes = Input.INT4

    def prepare(self, experts: Experts, sizes: GroupedSizes, act_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for expert, shard, linear in experts:
            weight = check_plain(linear, "the int4 x int4 operator", symmetric=True)
            unit = _group_of(weight, "the int4 x int4 operator") or sizes.inputs
            self.place(tensors, (expert, shard), weight, experts, sizes, unit)
        scale = tensors["weight_scale"].flatten(2)
        return {**tensors, "weight_scale": scale if scale.shape[1] > 1 else scale.squeeze(1)}

    def matmul(
        self, layer: Any, x: torch.Tensor, x_scale: torch.Tensor | None, counts: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        (y,) = torch.ops.npu.npu_grouped_matmul(
            [x],
            [self.tensor(layer, "weight")],
            scale=[self.tensor(layer, "weight_scale")],
            per_token_scale=None if x_scale is None else [x_scale],
            group_list=counts,
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=dtype,
        )
        return y


def _too_deep(depth: int) -> Finding:
    return Finding(
        "operator-limit",
        "npu_grouped_matmul of int8 by int4 takes at most 18432 inputs",
        expected=f"K <= {MAX_DEPTH}",
        found=f"K = {depth}",
        fix="use a larger tensor-parallel size",
    )
