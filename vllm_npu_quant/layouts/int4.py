# SPDX-License-Identifier: Apache-2.0
"""4-bit integers in wider elements: two to a byte, eight to an int32.

The nibble order is the NPU's (npu_convert_weight_to_int4pack) and msModelSlim's: the element with the even index in the low
nibble, two's complement. Eight of them in an int32 are its four bytes in memory order, so packing to int32 is packing to
bytes and reading them as int32; that holds on little-endian hosts, which all hosts of NPUs are.
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

#: Elements that a block of rows may have while a weight is rearranged: 4 MiB of int8 and a few temporaries of it.
BLOCK_ELEMENTS = 1 << 22
#: Rows of such a block: a copy that transposes more of them at a time is four times slower, for want of cache lines.
BLOCK_ROWS = 256


def pack_pairs(values: torch.Tensor) -> torch.Tensor:
    """Pack pairs of the last dimension into bytes: int8 [..., 2n] in [-8, 7] to int8 [..., n]."""
    return (values[..., 0::2] & 15) | (values[..., 1::2] << 4)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_pairs``: int8 [..., n] to int8 [..., 2n]."""
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1).flatten(-2)


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """Pack pairs of rows into bytes: int8 [2n, k] in [-8, 7] to int8 [n, k], the even row in the low nibble."""
    return (values[0::2] & 15) | (values[1::2] << 4)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_rows``: int8 [n, k] to int8 [2n, k]."""
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=1).flatten(0, 1)


def row_blocks(rows: int, columns: int, multiple: int = INT4_PER_INT32) -> list[tuple[int, int]]:
    """Cut a matrix into blocks of rows [start, stop), each but the last a multiple of ``multiple`` high."""
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
    """Rows [start, stop) of a weight [N, K] as the operators take it: [K, N/8] int32, eight outputs in an element.

    Works block of rows by block of rows; besides the result it holds a few MiB.

    Args:
        rows: gives rows [a, b) as int8 [b - a, K] with values in [-8, 7].
        start, stop: the outputs wanted; their number is rounded up to a multiple of 8 with zeros.
        inputs: K.
        positions: int64 [K], the row of the result where each input goes; None for its own.
        depth: rows of the result, the others being zero; None for K.
        pairs: gives rows [a, b) as ``pack_pairs`` packs them, int8 [b - a, K/2], where they are stored so; half the time.

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
    """Rows [start, stop) of a weight [N, K] packed along K: eight inputs in an element.

    Args:
        rows, start, stop, inputs: as for ``transposed_int4``.
        depth: inputs of the result, a multiple of 8; those after K are zeros. None for K rounded up.

    Returns:
        int32 [N', depth / 8], the number of outputs N' rounded up to a multiple of 8 with zeros.
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
    """Rows [start, stop) of a weight [N, K] as int8 [depth, stop - start]; arguments as for ``transposed_int4``."""
    first = rows(start, min(start + 1, stop))
    turned = torch.zeros(depth or inputs, stop - start, dtype=torch.int8, device=first.device)
    for low, high in row_blocks(stop - start, inputs):
        _place(turned[:, low:high], rows(start + low, start + high), positions)
    return turned


def _place(target: torch.Tensor, block: torch.Tensor, positions: torch.Tensor | None) -> None:
    """Write a block [n, K] into columns of the transposed result [depth, n]."""
    if positions is None:
        target[: block.shape[1]].copy_(block.t())
    else:
        target.index_copy_(0, positions, block.t().contiguous())
