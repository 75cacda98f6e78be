# SPDX-License-Identifier: Apache-2.0
"""Activation order: sorting of inputs whose groups are not contiguous.

With activation order (``desc_act``), GPTQ quantizes inputs by decreasing importance and forms groups in that order, so that
group ``g_idx[k]`` of input k is arbitrary. Operators require contiguous groups. The inputs are therefore sorted by group
once at load, and x is gathered by the same permutation before the matmul. The result is the same.

A rank of a row-parallel layer has a part of the inputs, with a few members of each group. These runs have unequal lengths
and are padded with zero inputs to a multiple of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["MAX_GROWTH", "Arrangement", "arrange", "starts_new_groups_in_order"]

#: Operators require group sizes that are multiples of this.
GROUP_MULTIPLE = 32

#: Upper bound on the size of a rank's padded part, relative to the unpadded part.
MAX_GROWTH = 2.5


@dataclass(frozen=True)
class Arrangement:
    """Order of inputs sorted by group.

    Attributes:
        permutation: int64 [K'], the input at each position, -1 for a zero; None if no input moves.
        group_size: inputs per group after sorting; 0 if one group covers all inputs.
        columns: int64 [G'], for each new group the index of the stored group whose scale it uses.
    """

    permutation: torch.Tensor | None
    group_size: int
    columns: torch.Tensor


def starts_new_groups_in_order(g_idx: torch.Tensor) -> int:
    """Inputs per group if ``g_idx`` is ``k // group_size``; 0 if it is not.

    Args:
        g_idx: integers [K] of a whole layer.
    """
    size = int((g_idx == g_idx[0]).sum())
    wanted = torch.arange(g_idx.numel(), dtype=g_idx.dtype, device=g_idx.device) // size
    return size if torch.equal(g_idx, wanted) else 0


def arrange(g_idx: torch.Tensor, group_size: int, groups: int) -> Arrangement:
    """Sort inputs by group.

    Args:
        g_idx: int64 [K], the group of each input; inputs of one group keep their order.
        group_size: stored inputs per group.
        groups: number of stored groups.

    Raises:
        NpuQuantError: bad-value for a group that does not exist; cannot-shard if padding exceeds MAX_GROWTH.
    """
    inputs = g_idx.numel()
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise NpuQuantError([_no_such_group(g_idx, groups)])
    order = torch.argsort(g_idx, stable=True)
    counts = torch.bincount(g_idx, minlength=groups)
    present = counts.nonzero().flatten()
    lengths = counts[present].tolist()
    identity = torch.equal(order, torch.arange(inputs, device=order.device))
    permutation = None if identity else order
    if len(lengths) == 1:
        return Arrangement(permutation, 0, present)
    if all(length == group_size for length in lengths[:-1]) and lengths[-1] <= group_size:
        return Arrangement(permutation, group_size, present)
    size = reduce(gcd, lengths)
    if size % GROUP_MULTIPLE == 0:
        return Arrangement(permutation, size, present.repeat_interleave(counts[present] // size))
    filled = [-(-length // GROUP_MULTIPLE) * GROUP_MULTIPLE for length in lengths]
    if sum(filled) > MAX_GROWTH * inputs:
        raise NpuQuantError([_too_large(group_size, inputs, sum(filled))])
    size = reduce(gcd, filled)
    padded = torch.tensor(filled, device=g_idx.device)
    # Input order[i] has index (i - first of its group) in its group, whose padded run begins at ``start``.
    first = torch.cumsum(counts[present], 0) - counts[present]
    start = torch.cumsum(padded, 0) - padded
    place = torch.arange(inputs, device=g_idx.device) + (start - first).repeat_interleave(counts[present])
    permutation = torch.full((sum(filled),), -1, dtype=torch.int64, device=g_idx.device)
    permutation[place] = order
    return Arrangement(permutation, size, present.repeat_interleave(padded // size))


def _no_such_group(g_idx: torch.Tensor, groups: int) -> Finding:
    return Finding(
        "bad-value",
        "g_idx names a group that has no scale",
        expected=f"0 to {groups - 1}",
        found=f"{int(g_idx.min())} to {int(g_idx.max())}",
        fix="re-export the checkpoint, or download it again",
    )


def _too_large(group_size: int, inputs: int, filled: int) -> Finding:
    return Finding(
        "cannot-shard",
        "with activation order, a rank has too few inputs of each group: filling the groups up to 32 would take "
        f"{filled / inputs:.1f} times the memory",
        expected=f"at most {MAX_GROWTH} times",
        found=f"{inputs} inputs of this rank become {filled}",
        fix=f"use --tensor-parallel-size {max(group_size // 31, 1)} or less, which always works for groups of "
        f"{group_size}, or a checkpoint without desc_act",
    )
