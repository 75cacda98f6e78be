# SPDX-License-Identifier: Apache-2.0
"""Packing of 4-bit integers: two per byte, eight per int32.

The nibble order is that of the NPU (npu_convert_weight_to_int4pack) and of msModelSlim: the element with the even index in
the low nibble, two's complement. Packing to int32 is packing to bytes and viewing them as int32, which holds on
little-endian hosts, as all NPU hosts are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = [
    "INT4_PER_INT32",
    "pack_pairs",
    "pack_rows",
    "packed_rows",
    "row_blocks",
    "transposed_int4",
    "transposed_int8",
    "unpack_pairs",
    "unpack_rows",
]

INT4_PER_INT32 = 8

#: Elements per block of rows while a weight is rearranged: 4 MiB of int8 and a few temporaries of that size.
BLOCK_ELEMENTS = 1 << 22
#: Rows per block: transposing copies of more rows exceed the cache and are four times slower.
BLOCK_ROWS = 256


def pack_pairs(values: torch.Tensor) -> torch.Tensor:
    """Pack pairs of the last dimension into bytes: int8 [..., 2n] in [-8, 7] to int8 [..., n]."""
    return (values[..., 0::2] & 15) | (values[..., 1::2] << 4)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``pack_pairs``: int8 [..., n] to int8 [..., 2n]."""
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1).flatten(-2)


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """Pack pairs of rows into bytes: int8 [2n, k] in [-8, 7] to int8 [n, k], the even row in the low nibble."""
    return (values[0::2] & 15) | (values[1::2] << 4)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``pack_rows``: int8 [n, k] to int8 [2n, k]."""
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=1).flatten(0, 1)


def row_blocks(rows: int, columns: int, multiple: int = INT4_PER_INT32) -> list[tuple[int, int]]:
    """Split a matrix into blocks of rows [start, stop); the height of all but the last is a multiple of ``multiple``."""
    height = max(min(BLOCK_ELEMENTS // max(columns, 1), BLOCK_ROWS) // multiple, 1) * multiple
    return [(start, min(start + height, rows)) for start in range(0, rows, height)]


def transposed_int4(
    rows: Callable[[int, int], torch.Tensor],
    start: int,
    stop: int,
    inputs: int,
    positions: torch.Tensor | None = None,
    depth: int | None = None,
    pairs: Callable[[int, int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Transpose and pack rows [start, stop) of a weight [N, K] for the operators: int32 [K, N/8], eight outputs per element.

    Works in blocks of rows; temporaries take a few MiB.

    Args:
        rows: returns rows [a, b) as int8 [b - a, K] with values in [-8, 7].
        start, stop: the range of outputs; their number is padded with zeros to a multiple of 8.
        inputs: K.
        positions: int64 [K], the row of the result for each input; None for the identity.
        depth: rows of the result, at least K; rows without an input are zero. None for K.
        pairs: returns rows [a, b) packed as by ``pack_pairs``, int8 [b - a, K/2], if available; takes half the time.

    Returns:
        int32 [depth, ceil((stop - start) / 8)].
    """
    width = -(-(stop - start) // INT4_PER_INT32)
    first = rows(start, min(start + 1, stop))
    packed = torch.zeros(depth or inputs, width, dtype=torch.int32, device=first.device)
    as_bytes = packed.view(torch.int8)
    for low, high in row_blocks(stop - start, inputs):
        block = (pairs or rows)(start + low, start + high)
        if (high - low) % 2:
            block = torch.nn.functional.pad(block, (0, 0, 0, 1))
        target = as_bytes[:, low // 2 : (high + 1) // 2]
        if pairs is None:
            _place(target, pack_rows(block), positions)
            continue
        above, below = block[0::2], block[1::2]
        halves = (above & 15) | (below << 4), ((above >> 4) & 15) | (below & -16)
        for odd, half in enumerate(halves):
            if positions is None:
                target[odd:inputs:2].copy_(half.t())
            else:
                _place(target, half, positions[odd::2])
    return packed


def packed_rows(
    rows: Callable[[int, int], torch.Tensor], start: int, stop: int, inputs: int, depth: int | None = None
) -> torch.Tensor:
    """Pack rows [start, stop) of a weight [N, K] along K: eight inputs per element.

    Args:
        rows, start, stop, inputs: as for ``transposed_int4``.
        depth: inputs of the result, a multiple of 8; those after K are zero. None for K rounded up.

    Returns:
        int32 [N', depth / 8]; outputs are padded with zeros to N', a multiple of 8.
    """
    depth = depth or -(-inputs // INT4_PER_INT32) * INT4_PER_INT32
    height = -(-(stop - start) // INT4_PER_INT32) * INT4_PER_INT32
    first = rows(start, min(start + 1, stop))
    packed = torch.zeros(height, depth // INT4_PER_INT32, dtype=torch.int32, device=first.device)
    as_bytes = packed.view(torch.int8)
    for low, high in row_blocks(stop - start, inputs):
        block = rows(start + low, start + high)
        if inputs % 2:
            block = torch.nn.functional.pad(block, (0, 1))
        as_bytes[low:high, : (inputs + 1) // 2] = pack_pairs(block)
    return packed


def transposed_int8(
    rows: Callable[[int, int], torch.Tensor],
    start: int,
    stop: int,
    inputs: int,
    positions: torch.Tensor | None = None,
    depth: int | None = None,
) -> torch.Tensor:
    """Transpose rows [start, stop) of a weight [N, K]: int8 [depth, stop - start]; arguments as for ``transposed_int4``."""
    first = rows(start, min(start + 1, stop))
    result = torch.zeros(depth or inputs, stop - start, dtype=torch.int8, device=first.device)
    for low, high in row_blocks(stop - start, inputs):
        _place(result[:, low:high], rows(start + low, start + high), positions)
    return result


def _place(target: torch.Tensor, block: torch.Tensor, positions: torch.Tensor | None) -> None:
    """Write a block of rows [n, K] into columns [depth, n] of the transposed result."""
    if positions is None:
        target[: block.shape[1]].copy_(block.t())
    else:
        target.index_copy_(0, positions, block.t().contiguous())
