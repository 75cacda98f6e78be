# SPDX-License-Identifier: Apache-2.0
"""Packed integers read from their documentation, in NumPy, sharing nothing with the package."""

from __future__ import annotations

import numpy as np

__all__ = ["awq_columns", "bit_stream", "dequantized_awq", "dequantized_gptq"]


def bit_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [W, C] to integers [W * 32 // bits, C]: value i of a column is bits i * bits and following of its words, the
    lowest bit of the first word first."""
    columns = np.ascontiguousarray(words.T).view(np.uint8)
    stream = np.unpackbits(columns, axis=1, bitorder="little")
    values = stream[:, : stream.shape[1] // bits * bits].reshape(words.shape[1], -1, bits)
    return (values.astype(np.int64) @ (1 << np.arange(bits))).T


def awq_columns(words: np.ndarray) -> np.ndarray:
    """int32 [R, C] to integers [R, 8 * C]: nibble i of a word is its column 0, 2, 4, 6, 1, 3, 5, 7 number i."""
    out = np.zeros((words.shape[0], 8 * words.shape[1]), dtype=np.int64)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        out[:, column::8] = (words.astype(np.int64) >> (4 * nibble)) & 15
    return out


def dequantized_awq(qweight: np.ndarray, scales: np.ndarray, qzeros: np.ndarray | None, group: int) -> np.ndarray:
    """float64 [N, K]; ``group`` -1 for one scale per output."""
    q, scale = awq_columns(qweight), scales.astype(np.float64)
    zero = awq_columns(qzeros) if qzeros is not None else np.full(scale.shape, 8)
    g = np.zeros(q.shape[0], dtype=int) if group <= 0 else np.arange(q.shape[0]) // group
    return ((q - zero[g]) * scale[g]).T


def dequantized_gptq(
    qweight: np.ndarray,
    scales: np.ndarray,
    qzeros: np.ndarray,
    bits: int,
    group: int,
    *,
    v2: bool = False,
    g_idx: np.ndarray | None = None,
) -> np.ndarray:
    """float64 [N, K]. In the first format a constant was subtracted from whole words: 1 in each value."""
    q, scale = bit_stream(qweight, bits), scales.astype(np.float64)
    if v2:
        zero = bit_stream(qzeros.T, bits).T
    elif bits == 3:
        zero = (bit_stream(qzeros.T, 3).T + 1) % 8
    else:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = (qzeros.view(np.uint32).astype(np.uint64) + ones) % 2**32
        zero = bit_stream(words.astype(np.uint32).view(np.int32).T, bits).T
    zero = zero[:, : scale.shape[1]]
    if g_idx is None:
        g_idx = np.zeros(q.shape[0], dtype=int) if group <= 0 else np.arange(q.shape[0]) // group
    q = q[: len(g_idx)]
    return ((q - zero[g_idx]) * scale[g_idx]).T
