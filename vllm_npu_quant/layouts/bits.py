# SPDX-License-Identifier: Apache-2.0
"""Integers packed into words: lowest bits first, as GPTQ and dense compressed-tensors store them, or in another order."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch

__all__ = ["bytes_of", "pack", "take_packed", "unpack"]


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """int32 [...] to uint8 [..., 4], lowest byte first: memory order on little-endian hosts, as all NPU hosts are."""
    # view() rejects the arbitrary stride that a dimension of length 1 may have.
    plain = torch.empty(words.shape, dtype=torch.int32, device=words.device).copy_(words)
    return plain.view(torch.uint8).unflatten(-1, (-1, 4))


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 [W, C] to uint8 [W * 32 / bits, C]; consecutive values lie along the first dimension.

    Args:
        words: the bit stream; for 3 bits it is padded with zeros to a multiple of 3 words.
        bits: 2, 3, 4 or 8.
    """
    if bits == 3:
        return _unpack_3_bits(words)
    as_bytes = bytes_of(words).movedim(-1, 1)
    if bits == 8:
        return as_bytes.flatten(0, 1)
    mask = (1 << bits) - 1
    parts = torch.stack([(as_bytes >> shift) & mask for shift in range(0, 8, bits)], dim=2)
    return parts.flatten(0, 2)


def _unpack_3_bits(words: torch.Tensor) -> torch.Tensor:
    stream = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[0] % 3)).unflatten(0, (-1, 3))
    values = []
    for first in range(0, 96, 3):
        word, shift = divmod(first, 32)
        value = stream[:, word] >> shift
        if shift > 29:
            kept = 32 - shift
            value = (value & ((1 << kept) - 1)) | (stream[:, word + 1] << kept)
        values.append((value & 7).to(torch.uint8))
    return torch.stack(values, dim=1).flatten(0, 1)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ``unpack``: integers [n, C] in [0, 2^bits - 1] to int32 [n * bits / 32, C].

    Args:
        values: n is a multiple of 32 / gcd(32, bits).
        bits: 2, 3, 4 or 8.
    """
    run = 32 // gcd(32, bits)
    stream = values.to(torch.int64).unflatten(0, (-1, run))
    words = torch.zeros(stream.shape[0], run * bits // 32, *values.shape[1:], dtype=torch.int64, device=values.device)
    for i in range(run):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= stream[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= stream[:, i] >> (32 - shift)
    words &= 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(0, 1)


def take_packed(words: torch.Tensor, dim: int, order: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Numbers out of words that hold several of them along one dimension, packed like before, without unpacking all.

    Args:
        words: integers of any width.
        dim: the dimension along which ``len(places)`` numbers share a word.
        order: int64 [n], the wanted numbers; n is a multiple of ``len(places)``.
        places: the place of each number in its word, counted from the lowest bits.

    Returns:
        The words of the wanted numbers in this order.
    """
    count = len(places)
    bits = 8 * words.element_size() // count
    mask = (1 << bits) - 1
    shifts = bits * torch.tensor(places, dtype=words.dtype, device=words.device)
    along = [-1 if axis == dim else 1 for axis in range(words.dim())]
    taken = torch.zeros_like(words.narrow(dim, 0, 1)).repeat_interleave(len(order) // count, dim)
    for number in range(count):
        wanted = order[number::count]
        held = words.index_select(dim, wanted // count)
        # The shift to the right keeps the sign; the mask takes it off.
        values = (held >> shifts[wanted % count].view(along)) & mask
        taken |= values << int(shifts[number])
    return taken
