# SPDX-License-Identifier: Apache-2.0
"""The operators around the experts of a MoE layer: gating, sorting tokens by expert, and putting them back.

Two conventions of row numbers meet here. npu_moe_gating_top_k_softmax and npu_moe_init_routing number the pairs of
token i and choice j column-major, j * tokens + i; npu_moe_init_routing_v2 and npu_moe_token_permute row-major,
i * topk + j.

Sources: op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-<operator>.md (with NumPy code for most), test_npu_moe_*.py;
ops-transformer moe/*/docs and op_kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.emulation.checks import (
    refuse,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_shape,
    require_value,
)
from vllm_npu_quant.emulation.numerics import INT8, fill_garbage, round_to_int
from vllm_npu_quant.emulation.quantize import quantize_rows

__all__ = [
    "npu_moe_compute_expert_tokens",
    "npu_moe_compute_expert_tokens_fake",
    "npu_moe_finalize_routing",
    "npu_moe_finalize_routing_fake",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_fake",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_gating_top_k_softmax_fake",
    "npu_moe_init_routing",
    "npu_moe_init_routing_fake",
    "npu_moe_init_routing_v2",
    "npu_moe_init_routing_v2_fake",
    "npu_moe_re_routing",
    "npu_moe_re_routing_fake",
    "npu_moe_token_permute",
    "npu_moe_token_permute_fake",
    "npu_moe_token_unpermute",
    "npu_moe_token_unpermute_fake",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _garbage(shape: tuple[int, ...] | list[int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    fill_garbage(out)
    return out


def _top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last dimension, falling; of equal ones the lower index first."""
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()


# --------------------------------------------------------------------------------------------------------------- gating


def _check_gating_top_k_softmax(x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1) -> None:
    name = "npu_moe_gating_top_k_softmax"
    require_dtype(name, "x", x, *FLOATS)
    require_dim(name, "x", x, 2, 3)
    require(1 <= k <= x.shape[-1] and k <= 1024, name, "k", f"a number of 1 to {x.shape[-1]}", k)
    if finished is not None:
        require_dtype(name, "finished", finished, torch.bool)
        require_shape(name, "finished", finished, x.shape[:-1])


def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over the experts, then the k largest; nothing is normalized again.

    Args:
        x: float16, bfloat16 or float32 [N, E] or [B, S, E] (N = B * S below).
        finished: bool [N] or [B, S]; finished tokens get expert E, which no group takes.
        k: 1 to E.

    Returns:
        y: the dtype of x [..., k], falling; of equal scores the lower expert first.
        expert_idx: int32 [..., k].
        row_idx: int32 [..., k]: j * N + i for choice j of token i (COLUMN-major).

    Source: op-plugin test_npu_moe_gating_top_k_softmax.py.
    """
    _check_gating_top_k_softmax(x, finished, k)
    values, experts = _top_k(torch.softmax(x.to(torch.float32), dim=-1), k)
    if finished is not None:
        experts = experts.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    tokens = experts.numel() // k
    rows = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().contiguous()
    return values.to(x.dtype), experts.to(torch.int32), rows.view(experts.shape)


def npu_moe_gating_top_k_softmax_fake(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_gating_top_k_softmax(x, finished, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)


def _check_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> None:
    name = "npu_moe_gating_top_k"
    require_absent(name, "hash routing is not emulated", input_ids=input_ids, tid2eid=tid2eid)
    require_dtype(name, "x", x, *FLOATS)
    require_dim(name, "x", x, 2)
    experts = x.shape[1]
    require(experts <= 2048, name, "x", "at most 2048 experts", x)
    for argument, value in (("group_select_mode", group_select_mode), ("renorm", renorm), ("norm_type", norm_type)):
        require_value(name, argument, value, 0, 1)
    require(
        group_count >= 1 and experts % group_count == 0, name, "group_count", f"a divisor of {experts}", group_count
    )
    size = experts // group_count
    require(group_count == 1 or size > 2, name, "group_count", "groups of more than 2 experts", group_count)
    require(1 <= k_group <= group_count, name, "k_group", f"1 to group_count = {group_count}", k_group)
    require(1 <= k <= k_group * size, name, "k", f"1 to {k_group * size}, the experts of k_group groups", k)
    if bias is not None:
        require_dtype(name, "bias", bias, x.dtype)
        require_shape(name, "bias", bias, (experts,))


def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grouped top-k: the bias decides who is selected, the weights are the scores without it.

        scores = softmax(x) (norm_type 0) or sigmoid(x) (1);  choice = scores + bias
        a group's score: max (group_select_mode 0), or the sum of its two largest (1), of choice
        experts = top k of choice within the k_group best groups;  y = scores[experts]
        norm_type 1 or renorm 1: y / (sum(y) + eps);  always: y * routed_scaling_factor

    Args:
        x: float16, bfloat16 or float32 [N, E], E at most 2048.
        bias: the dtype of x [E].
        group_count: divides E, with more than 2 experts in a group (or 1).
        input_ids, tid2eid: not emulated.

    Returns:
        y: the dtype of x [N, k]. expert_idx: int32 [N, k]. out: float32 [N, E], the scores; garbage without out_flag.

    Source: op-plugin torch_npu-npu_moe_gating_top_k.md (NumPy code), test_npu_moe_gating_top_k.py.
    """
    _check_gating_top_k(
        x,
        k,
        bias=bias,
        input_ids=input_ids,
        tid2eid=tid2eid,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
    )
    x32 = x.to(torch.float32)
    scores = torch.softmax(x32, dim=-1) if norm_type == 0 else torch.sigmoid(x32)
    choice = scores if bias is None else scores + bias.to(torch.float32)
    if group_count > 1:
        members = choice.view(x.shape[0], group_count, -1)
        if group_select_mode == 0:
            group_scores = members.amax(dim=-1)
        else:
            group_scores = members.topk(2, dim=-1).values.sum(dim=-1)
        _, groups = _top_k(group_scores, k_group)
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, groups, True)
        choice = members.masked_fill(~kept[..., None], float("-inf")).view(x.shape)
    _, experts = _top_k(choice, k)
    y = scores.gather(1, experts)
    if norm_type == 1 or renorm == 1:
        y = y / (y.sum(dim=-1, keepdim=True) + eps)
    y = (y * routed_scaling_factor).to(x.dtype)
    return y, experts.to(torch.int32), scores if out_flag else _garbage(list(x.shape), torch.float32)


def npu_moe_gating_top_k_fake(
    x: torch.Tensor, k: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_gating_top_k(x, k, **options)
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(x.shape, dtype=torch.float32)


# ----------------------------------------------------------------------------------- init_routing and its counterparts


def _check_init_routing(x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int) -> None:
    name = "npu_moe_init_routing"
    require_dtype(name, "x", x, *FLOATS)
    require_dim(name, "x", x, 2)
    for argument, tensor in (("row_idx", row_idx), ("expert_idx", expert_idx)):
        require_dtype(name, argument, tensor, torch.int32)
        require_dim(name, argument, tensor, 2)
        require_shape(name, argument, tensor, (x.shape[0], row_idx.shape[1]))
    require(active_num >= 0, name, "active_num", "0 or greater", active_num)


def npu_moe_init_routing(
    x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs of token and expert by expert, stably, and copy the tokens in that order.

    With (experts, rows) = stable sort of expert_idx, row_idx by expert: expanded_x[p] = x[rows[p] % N],
    expanded_row_idx[rows[p]] = p, expanded_expert_idx[p] = experts[p].

    Args:
        x: float16, bfloat16 or float32 [N, H].
        row_idx: int32 [N, K], the third output of npu_moe_gating_top_k_softmax (column-major numbers).
        expert_idx: int32 [N, K].
        active_num: at most this many tokens' worth of rows are returned.

    Returns:
        expanded_x: [min(N, active_num) * K, H]. expanded_row_idx, expanded_expert_idx: int32 [N * K].

    Source: op-plugin torch_npu-npu_moe_init_routing.md, test_npu_moe_init_routing.py.
    """
    _check_init_routing(x, row_idx, expert_idx, active_num)
    tokens, choices = row_idx.shape
    experts, order = torch.sort(expert_idx.flatten(), stable=True)
    rows = row_idx.flatten()[order].to(torch.int64)
    position = _garbage((rows.numel(),), torch.int32)
    position[rows] = torch.arange(rows.numel(), dtype=torch.int32)
    taken = rows[: min(tokens, active_num) * choices]
    return x[taken % tokens], position, experts


def npu_moe_init_routing_fake(
    x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_init_routing(x, row_idx, expert_idx, active_num)
    tokens, choices = row_idx.shape
    rows = x.new_empty((min(tokens, active_num) * choices, x.shape[1]))
    return rows, row_idx.new_empty((tokens * choices,)), row_idx.new_empty((tokens * choices,))


def _check_compute_expert_tokens(sorted_experts: torch.Tensor, num_expert: int) -> None:
    name = "npu_moe_compute_expert_tokens"
    require_dtype(name, "sorted_expert_for_source_row", sorted_experts, torch.int32)
    require_dim(name, "sorted_expert_for_source_row", sorted_experts, 1)
    require(num_expert >= 1, name, "num_expert", "1 or greater", num_expert)


def npu_moe_compute_expert_tokens(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    """Running totals of the rows of every expert: int32 [num_expert], out[e] = number of rows with an expert <= e.

    Args:
        sorted_expert_for_source_row: int32 [N * K], sorted: the third output of npu_moe_init_routing.

    Source: op-plugin torch_npu-npu_moe_compute_expert_tokens.md.
    """
    _check_compute_expert_tokens(sorted_expert_for_source_row, num_expert)
    experts = torch.arange(num_expert, dtype=torch.int32)
    return torch.searchsorted(sorted_expert_for_source_row.contiguous(), experts, right=True, out_int32=True)


def npu_moe_compute_expert_tokens_fake(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    _check_compute_expert_tokens(sorted_expert_for_source_row, num_expert)
    return sorted_expert_for_source_row.new_empty((num_expert,))


def _check_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[int, int]:
    """The range of experts."""
    name = "npu_moe_init_routing_v2"
    require_absent(name, "only Ascend 950 has it", x_dtype=x_dtype)
    require_value(name, "quant_mode", quant_mode, -1, 0, 1)
    require_dtype(name, "x", x, *((*FLOATS, torch.int8) if quant_mode == -1 else FLOATS))
    require_dim(name, "x", x, 2)
    require_dtype(name, "expert_idx", expert_idx, torch.int32)
    require_dim(name, "expert_idx", expert_idx, 2)
    tokens, width = x.shape
    require_shape(name, "expert_idx", expert_idx, (tokens, expert_idx.shape[1]))
    require(1 <= expert_num <= 10240, name, "expert_num", "1 to 10240", expert_num)
    require_value(name, "drop_pad_mode", drop_pad_mode, 0, 1)
    require_value(name, "expert_tokens_num_type", expert_tokens_num_type, 0, 1, 2)
    require_value(name, "row_idx_type", row_idx_type, 0, 1)
    given = list(active_expert_range)
    start, end = given if len(given) == 2 else (0, expert_num)
    require(len(given) in (0, 2), name, "active_expert_range", "[] or [start, end]", given)
    within = 0 <= start < end <= expert_num
    require(within, name, "active_expert_range", f"a range within [0, {expert_num}]", given)
    if drop_pad_mode == 1:
        capacity = 1 <= expert_capacity <= tokens
        require(capacity, name, "expert_capacity", f"1 to {tokens}, since drop_pad_mode is 1", expert_capacity)
        whole = (start, end) == (0, expert_num)
        require(whole, name, "active_expert_range", "all experts, since drop_pad_mode is 1", given)
        require_value(name, "row_idx_type (drop_pad_mode 1)", row_idx_type, 0)
        require_value(name, "expert_tokens_num_type (drop_pad_mode 1)", expert_tokens_num_type, 1)
    else:
        # Where the device puts the rows that active_num cuts off is not documented.
        everything = active_num in (-1, 0) or active_num >= tokens * expert_idx.shape[1]
        require(everything, name, "active_num", f"-1, 0, or all of {tokens * expert_idx.shape[1]} rows", active_num)
    if scale is not None:
        require_dtype(name, "scale", scale, torch.float32)
        shapes: dict[int, list[tuple[int, ...]]] = {-1: [(tokens,)], 0: [(1,)], 1: [(end - start, width), (1, width)]}
        require_shape(name, "scale", scale, *shapes[quant_mode])
    if quant_mode == 0:
        if scale is None or offset is None:
            refuse(name, "scale" if scale is None else "offset", "a tensor, for static quantization", None)
        require_dtype(name, "offset", offset, torch.float32)
        require_shape(name, "offset", offset, (1,))
    else:
        require_absent(name, "only static quantization has one", offset=offset)
    return start, end


def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs i * K + j of token i and choice j by expert, stably; copy, and quantize, the tokens in that order.

    Only experts in active_expert_range count; the V rows of other experts' pairs are left out.

        quant_mode -1: rows as they are;  0: saturate(rint(x * scale[0] + offset[0]))
        quant_mode 1:  z = x * scale[e - start] (or scale[0]);  max|z| / 127 and rint(z * (127 / max|z|)), by row

    Args:
        x: float16, bfloat16, float32 or (not quantized) int8 [N, H].
        expert_idx: int32 [N, K].
        scale: float32; quant_mode -1: [N], copied along with the rows; 0: [1]; 1: None, [experts in range, H] or
            [1, H].
        offset: float32 [1], for quant_mode 0.
        active_num: -1, 0 or at least N * K: all rows. (Less is not emulated.)
        drop_pad_mode: 0; or 1: every expert gets expert_capacity rows, further pairs are dropped, gaps are zero.
        expert_tokens_num_type: 0: running totals, 1: counts, 2: pairs of expert and count, the non-empty ones first.
        row_idx_type: 0: where each pair went (-1: nowhere); 1: which pair is in each row.

    Returns:
        expanded_x: [N * K, H], or [E, capacity, H] with drop_pad_mode; rows past the pairs in range are garbage.
        expanded_row_idx: int32 [N * K]; row_idx_type 1: the tail is garbage.
        expert_tokens: int64 [experts in range] (type 2: [E, 2]); before dropping. Garbage without dimensions unless
            expert_tokens_num_flag.
        expanded_scale: float32 [rows]; garbage without dimensions for quant_mode 0.

    Source: op-plugin torch_npu-npu_moe_init_routing_v2.md (NumPy code); ops-transformer moe/moe_init_routing_v3.
    """
    start, end = _check_init_routing_v2(
        x,
        expert_idx,
        scale=scale,
        offset=offset,
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        expert_tokens_num_flag=expert_tokens_num_flag,
        quant_mode=quant_mode,
        active_expert_range=active_expert_range,
        row_idx_type=row_idx_type,
        x_dtype=x_dtype,
    )
    flat = expert_idx.flatten().to(torch.int64)
    active = (flat >= start) & (flat < end)
    # Pairs out of range go last; among them the order does not show.
    experts, pairs = torch.sort(torch.where(active, flat, end), stable=True)
    valid = int(active.sum())
    experts, pairs = experts[:valid], pairs[:valid]
    counts = torch.bincount(experts - start, minlength=end - start)

    if drop_pad_mode == 1:
        first = torch.cumsum(counts, 0) - counts
        place = torch.arange(valid) - first[experts]
        kept = place < expert_capacity
        experts, pairs = experts[kept], pairs[kept]
        positions, total = experts * expert_capacity + place[kept], expert_num * expert_capacity
    else:
        positions, total = torch.arange(valid), flat.numel()

    row_idx = torch.full((flat.numel(),), -1, dtype=torch.int32)
    row_idx[pairs] = positions.to(torch.int32)
    if row_idx_type == 1:
        row_idx = _garbage((flat.numel(),), torch.int32)
        row_idx[:valid] = pairs.to(torch.int32)

    rows, row_scale = _quantized(
        x[pairs // expert_idx.shape[1]], experts - start, pairs, quant_mode, scale, offset, expert_idx
    )
    expanded = _garbage((total, x.shape[1]), rows.dtype)
    expanded_scale = _garbage(() if quant_mode == 0 else (total,), torch.float32)
    if drop_pad_mode == 1:
        expanded.zero_()
        if row_scale is not None:
            expanded_scale.zero_()
    expanded[positions] = rows
    if row_scale is not None:
        expanded_scale[positions] = row_scale
    if drop_pad_mode == 1:
        expanded = expanded.view(expert_num, expert_capacity, -1)

    tokens = _garbage((), torch.int64)
    if expert_tokens_num_flag:
        tokens = _expert_tokens(counts, start, expert_num, expert_tokens_num_type)
    return expanded, row_idx, tokens, expanded_scale


def _quantized(
    rows: torch.Tensor,
    experts: torch.Tensor,
    pairs: torch.Tensor,
    quant_mode: int,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    expert_idx: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows in their final dtype, and the scale that goes with each, if any."""
    if quant_mode == -1:
        return rows, None if scale is None else scale[pairs // expert_idx.shape[1]]
    values = rows.to(torch.float32)
    if quant_mode == 0:
        assert scale is not None
        assert offset is not None
        return round_to_int(values * scale + offset, INT8).to(torch.int8), None
    if scale is not None:
        values = values * (scale if scale.shape[0] == 1 else scale[experts])
    return quantize_rows(values, INT8)


def _expert_tokens(counts: torch.Tensor, start: int, expert_num: int, kind: int) -> torch.Tensor:
    if kind == 0:
        return counts.cumsum(0)
    if kind == 1:
        return counts
    pairs = counts.new_zeros((expert_num, 2))
    busy = counts.nonzero().squeeze(1)
    pairs[: busy.numel(), 0] = busy + start
    pairs[: busy.numel(), 1] = counts[busy]
    return pairs


def npu_moe_init_routing_v2_fake(
    x: torch.Tensor, expert_idx: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    start, end = _check_init_routing_v2(x, expert_idx, **options)
    expert_num, quant_mode = options["expert_num"], options.get("quant_mode", -1)
    pairs = expert_idx.shape[0] * expert_idx.shape[1]
    shape: tuple[int, ...] = (pairs, x.shape[1])
    if options.get("drop_pad_mode", 0) == 1:
        shape = (expert_num, options["expert_capacity"], x.shape[1])
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    tokens: tuple[int, ...] = ()
    if options.get("expert_tokens_num_flag", False):
        tokens = (expert_num, 2) if options.get("expert_tokens_num_type", 0) == 2 else (end - start,)
    return (
        x.new_empty(shape, dtype=x.dtype if quant_mode == -1 else torch.int8),
        x.new_empty((pairs,), dtype=torch.int32),
        x.new_empty(tokens, dtype=torch.int64),
        x.new_empty(() if quant_mode == 0 else (rows,), dtype=torch.float32),
    )


def _check_finalize_routing(
    rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    source: torch.Tensor,
    experts: torch.Tensor | None,
    drop_pad_mode: int | None,
    k: int | None,
) -> tuple[int, int]:
    """(tokens, choices)."""
    name = "npu_moe_finalize_routing"
    require_value(name, "drop_pad_mode", drop_pad_mode, 0, 1, 2, 3)
    require_dtype(name, "expanded_permuted_rows", rows, *FLOATS)
    require_dim(name, "expanded_permuted_rows", rows, 3 if drop_pad_mode in (1, 3) else 2)
    require_dtype(name, "expanded_src_to_dst_row", source, torch.int32)
    require_dim(name, "expanded_src_to_dst_row", source, 1)
    if scales is not None:
        require_dtype(name, "scales", scales, rows.dtype)
        require_dim(name, "scales", scales, 2)
        choices = scales.shape[1]
    else:
        require(k is not None and k >= 1, name, "k", "1 or greater, since scales is None", k)
        choices = k or 1
    tokens = source.shape[0] // choices
    if scales is not None:
        require_shape(name, "scales", scales, (tokens, choices))
    require_shape(name, "expanded_src_to_dst_row", source, (tokens * choices,))
    width = rows.shape[-1]
    for argument, tensor in (("skip1", skip1), ("skip2", skip2)):
        if tensor is not None:
            require_dtype(name, argument, tensor, rows.dtype)
            require_shape(name, argument, tensor, (tokens, width))
    require(skip2 is None or skip1 is not None, name, "skip2", "None, since skip1 is None", skip2)
    if experts is not None:
        require_dtype(name, "export_for_source_row", experts, torch.int32)
        require_shape(name, "export_for_source_row", experts, (tokens, choices))
    if bias is not None:
        require_dtype(name, "bias", bias, rows.dtype)
        require_dim(name, "bias", bias, 2)
        require_shape(name, "bias", bias, (bias.shape[0], width))
        if experts is None:
            refuse(name, "export_for_source_row", "a tensor, since bias is given", None)
    return tokens, choices


def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> torch.Tensor:
    """Add up what the experts made of every token:

        out[i] = skip1[i] + skip2[i] + sum_j scales[i, j] * (rows[source(i, j)] + bias[expert[i, j]])

    summed in float32. source(i, j) is expanded_src_to_dst_row[j * N + i] for drop_pad_mode 0 and 1
    (npu_moe_init_routing), [i * K + j] for 2 and 3 (npu_moe_init_routing_v2). -1 means no row; its bias still counts.

    Args:
        expanded_permuted_rows: float16, bfloat16 or float32 [N * K, H]; [E, C, H] for drop_pad_mode 1 and 3.
        skip1, skip2: [N, H]; bias: [E, H]; scales: [N, K]; all of the same dtype, or None. Without scales the weights
            are 1, and K is the argument k.
        expanded_src_to_dst_row: int32 [N * K].
        export_for_source_row: int32 [N, K], the experts (the schema's spelling).

    Returns:
        [N, H], the dtype of the rows.

    Source: op-plugin torch_npu-npu_moe_finalize_routing.md (NumPy code).
    """
    tokens, choices = _check_finalize_routing(
        expanded_permuted_rows,
        skip1,
        skip2,
        bias,
        scales,
        expanded_src_to_dst_row,
        export_for_source_row,
        drop_pad_mode,
        k,
    )
    rows = expanded_permuted_rows.reshape(-1, expanded_permuted_rows.shape[-1])
    source = expanded_src_to_dst_row.to(torch.int64)
    if drop_pad_mode in (0, 1):
        source = source.view(choices, tokens).t()
    else:
        source = source.view(tokens, choices)
    picked = rows[source.clamp(min=0)].to(torch.float32).masked_fill((source < 0).unsqueeze(-1), 0.0)
    if bias is not None:
        assert export_for_source_row is not None
        picked = picked + bias.to(torch.float32)[export_for_source_row.to(torch.int64)]
    if scales is not None:
        picked = picked * scales.to(torch.float32).unsqueeze(-1)
    out = picked.sum(dim=1)
    for skip in (skip1, skip2):
        if skip is not None:
            out = out + skip.to(torch.float32)
    return out.to(rows.dtype)


def npu_moe_finalize_routing_fake(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> torch.Tensor:
    tokens, _ = _check_finalize_routing(
        expanded_permuted_rows,
        skip1,
        skip2,
        bias,
        scales,
        expanded_src_to_dst_row,
        export_for_source_row,
        drop_pad_mode,
        k,
    )
    return expanded_permuted_rows.new_empty((tokens, expanded_permuted_rows.shape[-1]))


# -------------------------------------------------------------------------------------------- permute and unpermute


def _check_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> int:
    """The number of rows in the output."""
    name = "npu_moe_token_permute"
    # int8 tokens are for Ascend 950 only: permute first, quantize then.
    require_dtype(name, "tokens", tokens, *FLOATS)
    require_dim(name, "tokens", tokens, 2)
    require_dtype(name, "indices", indices, torch.int32, torch.int64)
    require_dim(name, "indices", indices, 1, 2)
    require_shape(name, "indices", indices, (tokens.shape[0], *indices.shape[1:]))
    require_value(name, "padded_mode", padded_mode, False)
    pairs = indices.numel()
    if not num_out_tokens:
        return pairs
    if num_out_tokens > 0:
        return min(num_out_tokens, pairs)
    require(-num_out_tokens <= pairs, name, "num_out_tokens", f"-{pairs} or greater", num_out_tokens)
    return pairs + num_out_tokens


def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the tokens in the order of their experts: permuted[sorted_indices[i]] = tokens[i // K].

    Args:
        tokens: float16, bfloat16 or float32 [N, H].
        indices: int32 or int64 [N, K] or [N]: the experts of every token.
        num_out_tokens: None or 0: all rows; positive: the first so many; negative: all but the last so many.

    Returns:
        permuted: [rows, H].
        sorted_indices: int32 [N * K], argsort(argsort(indices)): the position of every pair (a GATHER index).

    Source: op-plugin torch_npu-npu_moe_token_permute.md.
    """
    count = _check_token_permute(tokens, indices, num_out_tokens, padded_mode)
    choices = 1 if indices.dim() == 1 else indices.shape[1]
    order = torch.argsort(indices.flatten(), stable=True)
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(order.numel(), dtype=torch.int32)
    return tokens[order[:count] // choices], position


def npu_moe_token_permute_fake(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    count = _check_token_permute(tokens, indices, num_out_tokens, padded_mode)
    return tokens.new_empty((count, tokens.shape[1])), indices.new_empty((indices.numel(),), dtype=torch.int32)


def _check_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> int:
    """K."""
    name = "npu_moe_token_unpermute"
    require_dtype(name, "permuted_tokens", permuted_tokens, *FLOATS)
    require_dim(name, "permuted_tokens", permuted_tokens, 2)
    require_dtype(name, "sorted_indices", sorted_indices, torch.int32)
    require_dim(name, "sorted_indices", sorted_indices, 1)
    require_value(name, "padded_mode", padded_mode, False)
    require_absent(name, "padded_mode is False", restore_shape=restore_shape)
    if probs is None:
        return 1
    require_dtype(name, "probs", probs, *FLOATS)
    require_dim(name, "probs", probs, 2)
    choices = probs.shape[1]
    require(1 <= choices <= 512, name, "probs", "1 to 512 columns", probs)
    require_shape(name, "sorted_indices", sorted_indices, (probs.shape[0] * choices,))
    return choices


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    """out[i] = sum_j probs[i, j] * permuted[sorted_indices[i * K + j]], summed in float32; probs None: K = 1, weight 1.

    The rows are read whatever their weight: 0 * NaN is NaN. Indices past the rows, which npu_moe_token_permute gives
    for the rows that num_out_tokens cuts off, add nothing; negative ones are refused.

    Args:
        permuted_tokens: float16, bfloat16 or float32 [rows, H].
        sorted_indices: int32 [N * K]: the second output of npu_moe_token_permute, or (without -1) of
            npu_moe_init_routing_v2 with row_idx_type 0.
        probs: None, or float16, bfloat16 or float32 [N, K].

    Returns:
        [N, H], the dtype of the rows.

    Source: op-plugin torch_npu-npu_moe_token_unpermute.md.
    """
    choices = _check_token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    count = permuted_tokens.shape[0]
    source = sorted_indices.to(torch.int64).view(-1, choices)
    lowest = int(source.min()) if source.numel() else 0
    require(lowest >= 0, "npu_moe_token_unpermute", "sorted_indices", "no negative index", lowest)
    picked = permuted_tokens[source.clamp(max=count - 1)].to(torch.float32)
    picked = picked.masked_fill((source >= count).unsqueeze(-1), 0.0)
    if probs is not None:
        picked = picked * probs.to(torch.float32).unsqueeze(-1)
    return picked.sum(dim=1).to(permuted_tokens.dtype)


def npu_moe_token_unpermute_fake(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    choices = _check_token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return permuted_tokens.new_empty((sorted_indices.shape[0] // choices, permuted_tokens.shape[1]))


# ----------------------------------------------------------------------------------------------------------- re-routing


def _check_re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    *,
    per_token_scales: torch.Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> None:
    name = "npu_moe_re_routing"
    require_absent(name, "only Ascend 950 has it", tokens_dtype=tokens_dtype)
    require_dtype(name, "tokens", tokens, torch.float16, torch.bfloat16, torch.int8)
    require_dim(name, "tokens", tokens, 2)
    require(tokens.shape[1] < 16384, name, "tokens", "fewer than 16384 columns", tokens)
    require_dtype(name, "expert_token_num_per_rank", expert_token_num_per_rank, torch.int32, torch.int64)
    require_dim(name, "expert_token_num_per_rank", expert_token_num_per_rank, 2)
    require_value(name, "expert_token_num_type", expert_token_num_type, 1)
    require_value(name, "idx_type", idx_type, 0)
    if per_token_scales is not None:
        require_dtype(name, "per_token_scales", per_token_scales, torch.float32)
        require_shape(name, "per_token_scales", per_token_scales, (tokens.shape[0],))


def npu_moe_re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    *,
    per_token_scales: torch.Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """After an all-to-all, rows lie by rank and within it by expert; put them by expert and within it by rank.

    Args:
        tokens: float16, bfloat16 or int8 [A, H].
        expert_token_num_per_rank: int32 or int64 [ranks, experts]: how many rows came from each rank for each expert;
            their sum is A.
        per_token_scales: None or float32 [A].

    Returns:
        (tokens, scales, index, counts): out[p] = tokens[index[p]]; index int32 [A]; scales float32 [A], garbage if none
        were given; counts [experts], rows of every expert.

    Source: op-plugin torch_npu-npu_moe_re_routing.md.
    """
    name = "npu_moe_re_routing"
    _check_re_routing(
        tokens,
        expert_token_num_per_rank,
        per_token_scales=per_token_scales,
        expert_token_num_type=expert_token_num_type,
        idx_type=idx_type,
        tokens_dtype=tokens_dtype,
    )
    ranks, experts = expert_token_num_per_rank.shape
    sizes = expert_token_num_per_rank.flatten().to(torch.int64)
    total = int(sizes.sum())
    negative = int(sizes.min()) < 0
    require(
        not negative and total == tokens.shape[0],
        name,
        "expert_token_num_per_rank",
        f"counts that add up to {tokens.shape[0]} rows",
        expert_token_num_per_rank.tolist(),
    )
    expert_of_row = torch.repeat_interleave(torch.arange(experts).repeat(ranks), sizes)
    index = torch.argsort(expert_of_row, stable=True)
    if per_token_scales is None:
        scales = _garbage((tokens.shape[0],), torch.float32)
    else:
        scales = per_token_scales[index]
    counts = expert_token_num_per_rank.sum(dim=0, dtype=expert_token_num_per_rank.dtype)
    return tokens[index], scales, index.to(torch.int32), counts


def npu_moe_re_routing_fake(
    tokens: torch.Tensor, expert_token_num_per_rank: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_re_routing(tokens, expert_token_num_per_rank, **options)
    rows = tokens.shape[0]
    return (
        tokens.new_empty(tokens.shape),
        tokens.new_empty((rows,), dtype=torch.float32),
        tokens.new_empty((rows,), dtype=torch.int32),
        expert_token_num_per_rank.new_empty((expert_token_num_per_rank.shape[1],)),
    )
