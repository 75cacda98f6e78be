# SPDX-License-Identifier: Apache-2.0
"""Custom operators in the namespace ``npu_quant``: sequences of torch_npu operators that are opaque to graph compilers.

- vllm-ascend fuses npu_add_rms_norm with a following npu_dynamic_quant, and its pattern ignores keyword arguments: an int4
  call would become an int8 call. A custom operator does not match the pattern.
- npu_grouped_matmul overwrites an int8 input if the weight is int4, which its schema does not declare. Custom operators
  create that input themselves.
- Some steps depend on the number of tokens, which must not become a constant of a graph.

They run wherever their parts run: on an NPU through torch_npu, elsewhere through the emulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch.nn import functional as F

from vllm_npu_quant.layouts.int4 import INT4_PER_INT32, pack_pairs

__all__ = ["NAMESPACE"]

NAMESPACE = "npu_quant"

#: Tokens per call of npu_kronecker_quant, the same limit as in vllm-ascend.
KRONECKER_TOKENS = 32768

#: Bytes of int32 products that int8_matmul_by_groups holds at a time: one per group, token and output.
GROUP_PRODUCTS = 64 << 20

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as an operator with this schema for every device; ``fake`` is its fake kernel."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return function

    return define


def _packed_like(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    packed = x.new_empty((x.shape[0], x.shape[1] // INT4_PER_INT32), dtype=torch.int32)
    return packed, x.new_empty((x.shape[0],), dtype=torch.float32)


@_operator("dynamic_quant_int4(Tensor x) -> (Tensor, Tensor)", _packed_like)
def dynamic_quant_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to int4 per token: ``x_scale = max|x| / 7``.

    Args:
        x: [M, K] in float16 or bfloat16, K a multiple of 8.

    Returns:
        int32 [M, K/8], eight integers per element; float32 [M].
    """
    return torch.ops.npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)


@_operator("clipped_quant_int4(Tensor x, float clip) -> (Tensor, Tensor)", _packed_like)
def clipped_quant_int4(x: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to int4 per token with a clip: ``x_scale = clip * max|x| / 7``; larger inputs saturate at -7 and 7."""
    limit = x.abs().amax(dim=1, keepdim=True) * clip
    return torch.ops.npu.npu_dynamic_quant(torch.clamp(x, -limit, limit), dst_type=torch.quint4x2)


def _kronecker_fake(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _packed_like(x)


@_operator("kronecker_quant_int4(Tensor x, Tensor left, Tensor right, float clip) -> (Tensor, Tensor)", _kronecker_fake)
def kronecker_quant_int4(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``left @ x @ right`` for every token and quantize to int4 with ``x_scale = clip * max / 7``
    (npu_kronecker_quant).

    Args:
        x: [T, L * M].
        left: [L, L], L at most 256.
        right: [M, M], M at most 256 and a multiple of 8.
        clip: factor of the largest magnitude.

    Returns:
        int32 [T, L * M / 8], float32 [T].
    """
    matrices = x.view(-1, left.shape[0], right.shape[0])
    parts = [
        torch.ops.npu.npu_kronecker_quant(part, left, right, clip_ratio=clip, dst_dtype=torch.int32)
        for part in torch.split(matrices, KRONECKER_TOKENS)
    ]
    packed = parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])
    scale = parts[0][1] if len(parts) == 1 else torch.cat([part[1] for part in parts])
    return packed.view(x.shape[0], -1), scale.view(-1)


def _all_rows(x: torch.Tensor) -> torch.Tensor:
    """Group list of a single group with all rows."""
    return torch.full((1,), x.shape[0], dtype=torch.int64, device=x.device)


def _int8_int4_fake(
    x: torch.Tensor, weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], assists: Sequence[torch.Tensor]
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[-1] * INT4_PER_INT32))


@_operator("int8_int4_linear(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] assists) -> Tensor", _int8_int4_fake)
def int8_int4_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], assists: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Multiply int8 per token by int4 with one scale per channel or per 256 inputs (npu_grouped_matmul of one group).

    Args:
        x: [M, K] in float16 or bfloat16; quantized here.
        weights: parts along the inputs, each int32 [1, k, N/8] with k a multiple of 256; together at least K inputs, those
            after K are zero.
        scales: for each part int64 [1, 1, N] or [1, k/256, N] of float32 bits.
        assists: for each part float32 [1, N], 8 * sum_k(w).

    Returns:
        [M, N] in x's dtype.
    """
    quantized, x_scale = torch.ops.npu.npu_dynamic_quant(x)
    quantized = F.pad(quantized, (0, sum(weight.shape[1] for weight in weights) - x.shape[1]))
    rows = _all_rows(x)

    def products() -> Iterator[torch.Tensor]:
        first = 0
        for weight, scale, assist in zip(weights, scales, assists, strict=True):
            part = quantized if len(weights) == 1 else quantized[:, first : first + weight.shape[1]].contiguous()
            first += weight.shape[1]
            yield from torch.ops.npu.npu_grouped_matmul(
                [part],
                [weight],
                bias=[assist],
                scale=[scale],
                per_token_scale=[x_scale],
                group_list=rows,
                split_item=2,
                group_type=0,
                group_list_type=1,
                output_dtype=x.dtype,
            )

    return reduce(lambda total, product: total.to(torch.float32) + product, products()).to(x.dtype)


def _groups_fake(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]), dtype=dtype)


@_operator(
    "int8_matmul_by_groups(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? zero, ScalarType dtype) -> Tensor",
    _groups_fake,
)
def int8_matmul_by_groups(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply int8 per token by int8 with a scale and an optional zero point per group.

        y = sum_g (x[g] @ weight[g] - zero[g] * sum_k x[g]) * scale[g] * x_scale

    One npu_quant_matmul, with the groups as its batch, computes the products as exact int32, for as many tokens at a time
    as GROUP_PRODUCTS allows.

    Args:
        x: int8 [M, K].
        x_scale: float32 [M].
        weight: int8 [G, k, N] with G * k at least K; inputs after K are zero.
        scale: float32 [G, N].
        zero: float32 [G, N], or None.
        dtype: dtype of the result.

    Returns:
        [M, N] in ``dtype``.
    """
    groups, size, outputs = weight.shape
    by_groups = F.pad(x, (0, groups * size - x.shape[1])).view(x.shape[0], groups, size).transpose(0, 1)
    at_once = max(GROUP_PRODUCTS // (4 * groups * outputs), 1)
    result = x.new_empty((x.shape[0], outputs), dtype=dtype)
    for start in range(0, x.shape[0], at_once):
        stop = min(start + at_once, x.shape[0])
        part = by_groups[:, start:stop].contiguous()
        # The scale is a required argument, but ignored for int32 outputs.
        products = torch.ops.npu.npu_quant_matmul(part, weight, scale.view(-1)[:1], output_dtype=torch.int32)
        if zero is not None:
            products = products - part.sum(dim=2, keepdim=True, dtype=torch.int32) * zero.unsqueeze(1)
        sums = (products * scale.unsqueeze(1)).sum(dim=0)
        result[start:stop] = (sums * x_scale[start:stop].unsqueeze(1)).to(dtype)
    return result


def _halves_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, assist: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[-1] * INT4_PER_INT32))


@_operator(
    "int8_int4_linear_by_halves(Tensor x, Tensor weight, Tensor scale, Tensor assist, ScalarType dtype) -> Tensor",
    _halves_fake,
)
def int8_int4_linear_by_halves(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, assist: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply int8 per token by int4 with groups of any even size.

    The int8 x int4 operator supports groups of 256 only, the int4 x int4 operator all even sizes. The activation is split
    into int4 halves, ``x = 16 * high + low + 8`` with both in [-8, 7]; one call multiplies both, as twice the rows.

        y = (16 * (high @ w) + low @ w + 8 * sum_k(w)) * x_scale

    Args:
        x: [M, K] in float16 or bfloat16; quantized here.
        weight: int32 [1, k, N/8] with k at least K; inputs after K are zero.
        scale: int64 [1, G, N] of float32 bits.
        assist: float32 [N], 8 * sum_k(w).
        dtype: dtype of the two products, float16 or bfloat16.

    Returns:
        [M, N] in x's dtype.
    """
    quantized, x_scale = torch.ops.npu.npu_dynamic_quant(x)
    quantized = F.pad(quantized, (0, weight.shape[1] - x.shape[1]))
    halves = torch.cat((pack_pairs(quantized >> 4), pack_pairs((quantized & 15) - 8))).view(torch.int32)
    (out,) = torch.ops.npu.npu_grouped_matmul(
        [halves],
        [weight],
        scale=[scale],
        group_list=_all_rows(halves),
        split_item=2,
        group_type=0,
        group_list_type=1,
        output_dtype=dtype,
    )
    high, low = out.to(torch.float32).chunk(2)
    return ((16 * high + low + assist) * x_scale.unsqueeze(1)).to(x.dtype)


def _int4_fake(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[-1] * INT4_PER_INT32), dtype=dtype)


@_operator(
    "int4_int4_matmul(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor", _int4_fake
)
def int4_int4_matmul(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply int4 per token by int4 with groups of any even size (npu_grouped_matmul of one group).

    Args:
        x: int32 [M, K/8].
        x_scale: float32 [M].
        weight: int32 [1, K, N/8].
        scale: int64 [1, G, N] of float32 bits.
        dtype: dtype of the result.

    Returns:
        [M, N] in ``dtype``.
    """
    (out,) = torch.ops.npu.npu_grouped_matmul(
        [x],
        [weight],
        scale=[scale],
        per_token_scale=[x_scale],
        group_list=_all_rows(x),
        split_item=2,
        group_type=0,
        group_list_type=1,
        output_dtype=dtype,
    )
    return out
