# SPDX-License-Identifier: Apache-2.0
"""Routed experts of a MoE layer: two grouped matrix products and the chain of operators around them.

    routing     npu_moe_init_routing_v2   sorts tokens by expert; quantizes per token if w13 takes int8
    w13         npu_grouped_matmul        gate and up, concatenated
    activation  npu_dequant_swiglu_quant  or npu_swiglu, and the quantization for w2
    w2          npu_grouped_matmul        down
    combine     npu_moe_token_unpermute   weighted sum over a token's experts

CANN versions without npu_moe_init_routing_v2 use npu_moe_init_routing and npu_moe_compute_expert_tokens, followed by
npu_dynamic_quant.

npu_grouped_matmul_swiglu_quant, which fuses product and activation, is not used: its kernel converts to int8 through
float16 and rounds twice (grouped_matmul_swiglu_quant_utils.h of ops-transformer), so that integers may differ by 1.

w13 and w2 have independent methods, so that a layer may combine any two schemes. As in vllm-ascend, the combine operator is
npu_moe_token_unpermute rather than the less accurate npu_moe_finalize_routing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import lcm
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods.base import bad_zero_points, permuted_inputs, transformed_inputs
from vllm_npu_quant.serving.decide import expert_bias

__all__ = ["Experts", "FusedExperts", "GroupedMethod", "GroupedSizes", "Input", "Placement", "operators_of"]


#: Limit of npu_dequant_swiglu_quant on the outputs of the gate, if it is called with the rows of each expert.
MAX_GROUPED_SWIGLU = 10496


class Input(Enum):
    """Input type of a grouped method."""

    #: The model's dtype.
    FLOAT = "float"
    #: int8 with a scale per token.
    INT8 = "int8"
    #: int4 with a scale per token, eight per int32.
    INT4 = "int4"


@dataclass(frozen=True)
class Experts:
    """The weights of one product, for all experts of this rank.

    Attributes:
        count: E, the experts of this rank.
        shards: weights per expert: 2 for w13 (gate and up, whose outputs are concatenated), 1 for w2.
        outputs, inputs: N of one shard, and K.
        device: device of the tensors.
        canonical: returns the shards of one expert; not cached, so call it once per expert.
    """

    count: int
    shards: int
    outputs: int
    inputs: int
    device: torch.device
    canonical: Callable[[int], Sequence[CanonicalLinear]]

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros of shape [E, *shape]."""
        return torch.zeros(self.count, *shape, dtype=dtype, device=self.device)

    def __iter__(self) -> Iterator[tuple[int, int, CanonicalLinear]]:
        """Yield (expert, shard, canonical weight) for one expert after the other."""
        for expert in range(self.count):
            for shard, linear in enumerate(self.canonical(expert)):
                yield expert, shard, linear


@dataclass(frozen=True)
class GroupedSizes:
    """Sizes of the prepared weight: those of the layer, padded to the operators' multiples.

    Attributes:
        inputs: rows of each expert's weight.
        outputs: columns of one shard.
    """

    inputs: int
    outputs: int


class GroupedMethod(ABC):
    """Arithmetic of one grouped product. ``prefix`` ("w13_", "w2_") is prepended to the names of its tensors.

    Prepared tensors, with W = shards * N columns; each method has a subset:

    - weight: int8 [E, K, W] (FRACTAL_NZ), int32 [E, K, W/8] with eight int4 per element, or the model's dtype [E, K, W].
    - weight_scale: float32 [E, W] for W8A8; int64 [E, G, W] with float32 bits for int4 weights and quantized activations
      ([E, W] for W4A4 per channel); the model's dtype [E, W] or [E, G, W] for weight-only.
    - weight_offset: as weight_scale, for weight-only with zero points; the operator adds it.
    - scale_bias: float32 [E, W], ``8 * sum_k(w)``, for W4A8.
    """

    takes: ClassVar[Input]
    #: Inputs and outputs of the prepared weight are multiples of these.
    inputs_multiple: ClassVar[int] = 1
    outputs_multiple: ClassVar[int] = 1
    #: Whether ``matmul`` can return int32, to be scaled by the activation operator.
    gives_int32: ClassVar[bool] = False

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def depth_multiple(self, group_size: int) -> int:
        """The multiple to which the inputs of the prepared weight are padded.

        Args:
            group_size: inputs per scale; 0 for one scale per channel.
        """
        return lcm(self.inputs_multiple, group_size or 1)

    @abstractmethod
    def prepare(self, experts: Experts, sizes: GroupedSizes, act_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Convert canonical numbers to the tensors of ``matmul``, named without the prefix.

        Raises:
            NpuQuantError: for values that the scheme does not allow.
        """

    def finish(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Casts to the NPU's memory formats, once the checkpoint's tensors are gone: a cast needs room for a copy."""
        return tensors

    @abstractmethod
    def matmul(
        self, layer: Any, x: torch.Tensor, x_scale: torch.Tensor | None, counts: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply sorted rows by the weights of their experts.

        Args:
            layer: an object with the prepared tensors as attributes.
            x: [M, K] of the type ``takes``; it may be overwritten.
            x_scale: float32 [M] if x is quantized, else None.
            counts: int64 [E], the rows of each expert; their sum is at most M.
            dtype: dtype of the result.

        Returns:
            [M, shards * N]; rows after those of the last expert are undefined.
        """

    def tensor(self, layer: Any, name: str) -> Any:
        """A prepared tensor, or None if the layer does not have it."""
        return getattr(layer, self.prefix + name, None)


@dataclass(frozen=True)
class Placement:
    """Placement of the experts of this rank.

    Attributes:
        count: experts of the routing operator: all of the layer; with ``to_local``, those of this rank and one more that
            stands for all others.
        first, last: the range of this rank's experts, last excluded.
        to_local: int32, the local number of each expert of the whole layer, or ``last`` for experts of other ranks, if this
            rank's experts are not a range; None if they are.
    """

    count: int
    first: int
    last: int
    to_local: torch.Tensor | None = None

    @classmethod
    def of(cls, count: int, expert_map: torch.Tensor | None) -> Placement:
        """Build from vLLM's expert map: int [count], the local number of each expert, or -1; None if all are local."""
        if expert_map is None:
            return cls(count, 0, count)
        mapped = expert_map.tolist()
        local = [expert for expert, number in enumerate(mapped) if number >= 0]
        if local and [mapped[expert] for expert in local] == list(range(len(local))):
            first, last = local[0], local[-1] + 1
            if last - first == len(local):
                return cls(count, first, last)
        to_local = torch.where(expert_map < 0, len(local), expert_map).to(torch.int32)
        return cls(len(local) + 1, 0, len(local), to_local)

    @property
    def whole(self) -> bool:
        """Whether every expert is on this rank."""
        return self.to_local is None and (self.first, self.last) == (0, self.count)


class FusedExperts:
    """The chain of operators of one MoE layer.

    ``y[t] = sum_j topk_weights[t, j] * down(silu(gate(x[t])) * up(x[t]))`` with the weights of expert ``topk_ids[t, j]``,
    over this rank's experts and its part of the inner dimension; ranks sum their results.
    """

    def __init__(self, w13: GroupedMethod, w2: GroupedMethod, hidden: int, inner: int, groups: tuple[int, int]) -> None:
        """
        Args:
            w13, w2: the methods of the two products.
            hidden: outputs of the layer.
            inner: outputs of gate, and of up, on this rank.
            groups: inputs per scale of w13 and w2; 0 for one scale per channel.
        """
        self.w13 = w13
        self.w2 = w2
        self.hidden = hidden
        self.routed = _routed if has_routing_v2() else _routed_by_v1
        inner = _up(inner, lcm(w13.outputs_multiple, w2.depth_multiple(groups[1])))
        self.w13_sizes = GroupedSizes(_up(hidden, w13.depth_multiple(groups[0])), inner)
        self.w2_sizes = GroupedSizes(inner, _up(hidden, w2.outputs_multiple))

    def apply(
        self,
        layer: Any,
        placement: Placement,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the layer's output on this rank, [T, hidden], not reduced over ranks.

        Args:
            layer: an object with the prepared tensors as attributes.
            placement: the experts of this rank.
            x: [T, hidden] in float16 or bfloat16.
            topk_weights: [T, k]; None if they are already multiplied into x (k = 1).
            topk_ids: [T, k], expert numbers of the whole layer.
        """
        tokens, k = topk_ids.shape
        if tokens == 0:
            return x.new_empty((0, self.hidden))
        missing = self.w13_sizes.inputs - self.hidden
        padded = (F.pad(x, (0, missing)) if missing else x).contiguous()
        rows, row_index, counts, row_scale = self.routed(padded, topk_ids.to(torch.int32), placement, self.w13.takes)
        inner, inner_scale = self.inner(layer, rows, row_scale, counts, x.dtype)
        y = self.down(layer, inner, inner_scale, counts, x.dtype)
        weights = topk_weights
        if not placement.whole:
            row_index, weights = _without_absent(y, row_index, counts, weights, (tokens, k))
        return torch.ops.npu.npu_moe_token_unpermute(y, row_index, probs=weights)

    def inner(
        self,
        layer: Any,
        rows: torch.Tensor,
        row_scale: torch.Tensor | None,
        counts: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """silu(gate) * up of sorted rows in w2's input type: [M, inner], and float32 [M] or None.

        Args:
            rows: [M, hidden or padded] in ``dtype``, or in int8 with ``row_scale``.
            row_scale: float32 [M]; ignored unless w13 takes int8.
            counts: int64 [E], the rows of each expert.
            dtype: the model's dtype.
        """
        missing = self.w13_sizes.inputs - rows.shape[1]
        if missing:
            rows = F.pad(rows, (0, missing))
        if self.w13.takes is Input.INT8 and rows.dtype != torch.int8:
            rows, row_scale = torch.ops.npu.npu_dynamic_quant(rows)
        elif self.w13.takes is Input.INT4:
            rows, row_scale = torch.ops.npu.npu_dynamic_quant(rows, dst_type=torch.quint4x2)
        elif self.w13.takes is Input.FLOAT:
            row_scale = None
        return self._activated(layer, rows, row_scale, counts, dtype)

    def down(
        self,
        layer: Any,
        inner: torch.Tensor,
        inner_scale: torch.Tensor | None,
        counts: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The second product, of the results of ``inner``: [M, hidden]."""
        y = self.w2.matmul(layer, inner, inner_scale, counts, dtype)
        return y[:, : self.hidden].contiguous() if y.shape[1] > self.hidden else y

    def _activated(
        self,
        layer: Any,
        rows: torch.Tensor,
        row_scale: torch.Tensor | None,
        counts: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """silu(gate) * up in w2's input type: [M, inner], and float32 [M] or None."""
        if self.w2.takes is Input.INT8:
            if self.w13.gives_int32 and self.w13_sizes.outputs <= MAX_GROUPED_SWIGLU:
                product = self.w13.matmul(layer, rows, None, counts, torch.int32)
                return torch.ops.npu.npu_dequant_swiglu_quant(
                    product,
                    weight_scale=self.w13.tensor(layer, "weight_scale"),
                    activation_scale=row_scale,
                    group_index=counts,
                    activate_left=True,
                    quant_mode=1,
                )
            product = self.w13.matmul(layer, rows, row_scale, counts, dtype)
            return torch.ops.npu.npu_dequant_swiglu_quant(product, activate_left=True, quant_mode=1)
        inner = torch.ops.npu.npu_swiglu(self.w13.matmul(layer, rows, row_scale, counts, dtype))
        if self.w2.takes is Input.INT4:
            return torch.ops.npu.npu_dynamic_quant(inner, dst_type=torch.quint4x2)
        return inner, None


def has_routing_v2() -> bool:
    """Whether this host has npu_moe_init_routing_v2; older versions of torch_npu and CANN do not."""
    return hasattr(torch.ops.npu, "npu_moe_init_routing_v2")


#: (rows sorted by expert; int32 [T * k], the row index of choice j of token i at i * k + j, -1 if its expert is on another
#: rank; int64 [E], the rows of each expert of this rank; float32 [T * k], the scales of int8 rows, or None).
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _routed(x: torch.Tensor, ids: torch.Tensor, placement: Placement, takes: Input) -> Routed:
    """Sort rows by expert with npu_moe_init_routing_v2.

    Args:
        x: [T, K].
        ids: int32 [T, k], expert numbers of the whole layer.
        placement: the experts of this rank.
        takes: w13's input type; for int8 the rows are quantized.
    """
    if placement.to_local is not None:
        ids = placement.to_local[ids.to(torch.int64)]
    rows, row_index, counts, row_scale = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        ids.contiguous(),
        active_num=0,  # all rows; an explicit number would become a constant of a captured graph
        expert_num=placement.count,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=1 if takes is Input.INT8 else -1,
        active_expert_range=[placement.first, placement.last],
        row_idx_type=0,
    )
    return rows, row_index, counts.to(torch.int64), row_scale if takes is Input.INT8 else None


def _routed_by_v1(x: torch.Tensor, ids: torch.Tensor, placement: Placement, takes: Input) -> Routed:
    """Sort rows by expert with npu_moe_init_routing; arguments as for ``_routed``.

    The operator does not quantize, has no expert range, numbers rows column-major and returns cumulative counts.
    """
    tokens, k = ids.shape
    here = placement.last - placement.first
    if placement.to_local is not None:
        ids = placement.to_local[ids.to(torch.int64)]
    elif not placement.whole:
        # Rows for experts of other ranks are sorted last and are not read.
        absent = (ids < placement.first) | (ids >= placement.last)
        ids = torch.where(absent, here, ids - placement.first)
    numbers = torch.arange(tokens * k, dtype=torch.int32, device=x.device).view(k, tokens).t().contiguous()
    rows, by_column, experts = torch.ops.npu.npu_moe_init_routing(x, numbers, ids.contiguous(), tokens)
    totals = torch.ops.npu.npu_moe_compute_expert_tokens(experts, here).to(torch.int64)
    row_index = by_column.view(k, tokens).t().flatten()
    if not placement.whole:
        row_index = torch.where(row_index < totals[-1], row_index, -1)
    return rows, row_index, torch.diff(totals, prepend=totals.new_zeros(1)), None


def operators_of(w13: GroupedMethod, w2: GroupedMethod) -> tuple[str, ...]:
    """Names of the torch_npu operators that the chain calls, in order, if npu_moe_init_routing_v2 is available."""
    quantizes = ("npu_dynamic_quant",)
    return (
        "npu_moe_init_routing_v2",
        *(quantizes if w13.takes is Input.INT4 else ()),
        "npu_grouped_matmul",
        "npu_dequant_swiglu_quant" if w2.takes is Input.INT8 else "npu_swiglu",
        *(quantizes if w2.takes is Input.INT4 else ()),
        "npu_grouped_matmul",
        "npu_moe_token_unpermute",
    )


def _without_absent(
    y: torch.Tensor,
    row_index: torch.Tensor,
    counts: torch.Tensor,
    weights: torch.Tensor | None,
    shape: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices and weights in which experts of other ranks read row 0 with weight 0.

    Row 0 may belong to another token. If this rank received no rows, it is uninitialized and is zeroed: 0 * NaN is NaN.
    """
    y[:1].masked_fill_(counts.sum() == 0, 0)
    mask = (row_index >= 0).view(shape).to(torch.float32)
    return row_index.clamp(min=0), mask if weights is None else weights * mask


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def check_plain(linear: CanonicalLinear, operator: str, *, symmetric: bool = False) -> CanonicalWeight:
    """The weight of an expert, checked to have nothing that the chain does not support.

    Raises:
        NpuQuantError: for an input permutation, an input transform, or a bias; with ``symmetric``, for zero points.
    """
    if linear.input_permutation is not None:
        raise NpuQuantError([permuted_inputs(operator)])
    if linear.transform is not None:
        raise NpuQuantError([transformed_inputs(operator)])
    if linear.bias is not None:
        raise NpuQuantError([expert_bias()])
    if symmetric and linear.weight.zero is not None:
        raise NpuQuantError([bad_zero_points(operator)])
    return linear.weight
