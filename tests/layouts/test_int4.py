# SPDX-License-Identifier: Apache-2.0
"""Packing of 4-bit integers, against NumPy written from the nibble order alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_npu_quant.layouts import int4


def random_int4(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((seed, *shape)).integers(-8, 8, shape).astype(np.int8))


def packed_by_numpy(values: np.ndarray) -> np.ndarray:
    """[K, N] to int32 [K, ceil(N/8)]: element i of the last dimension in bits 4i to 4i + 3."""
    depth, width = values.shape
    words = np.zeros((depth, -(-width // 8)), dtype=np.uint32)
    for n in range(width):
        words[:, n // 8] |= (values[:, n].astype(np.int64) & 15).astype(np.uint32) << np.uint32(4 * (n % 8))
    return words.view(np.int32)


@given(rows=st.integers(1, 9), pairs=st.integers(1, 17), seed=st.integers(0, 99))
def test_pairs_survive_a_round_trip(rows: int, pairs: int, seed: int) -> None:
    values = random_int4(rows, 2 * pairs, seed=seed)
    assert torch.equal(int4.unpack_pairs(int4.pack_pairs(values)), values)
    rowwise = values.t().contiguous()
    assert torch.equal(int4.unpack_rows(int4.pack_rows(rowwise)), rowwise)


@given(rows=st.integers(1, 9), columns=st.integers(1, 17), seed=st.integers(0, 99))
def test_bytes_survive_a_round_trip(rows: int, columns: int, seed: int) -> None:
    packed = torch.from_numpy(np.random.default_rng(seed).integers(-128, 128, (rows, columns)).astype(np.int8))
    assert torch.equal(int4.pack_pairs(int4.unpack_pairs(packed)), packed)
    assert torch.equal(int4.pack_rows(int4.unpack_rows(packed)), packed)


def test_the_even_element_is_in_the_low_nibble() -> None:
    values = torch.tensor([[1, -2, 7, -8]], dtype=torch.int8)
    assert int4.pack_pairs(values).tolist() == [[-31, -121]]  # 0xE1, 0x87
    assert int4.pack_rows(values.t()).tolist() == [[-31], [-121]]


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 3), (8, 5), (9, 33), (31, 64), (64, 31)])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_transposed_weights(outputs: int, inputs: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "BLOCK_ELEMENTS", block)
    values = random_int4(outputs, inputs)
    rows = lambda start, stop: values[start:stop]  # noqa: E731
    packed = int4.transposed_int4(rows, 0, outputs, inputs)
    np.testing.assert_array_equal(packed.numpy(), packed_by_numpy(values.numpy().T))
    if inputs % 2 == 0:
        pairs = lambda start, stop: int4.pack_pairs(values[start:stop])  # noqa: E731
        assert torch.equal(int4.transposed_int4(rows, 0, outputs, inputs, pairs=pairs), packed)
    assert torch.equal(int4.transposed_int8(rows, 0, outputs, inputs), values.t())


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_a_part_of_the_outputs_with_inputs_moved(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "BLOCK_ELEMENTS", block)
    values = random_int4(40, 12)
    positions = torch.tensor([15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11])
    wide = np.zeros((16, 19), dtype=np.int8)
    wide[positions.numpy()] = values.numpy()[8:27].T
    rows = lambda start, stop: values[start:stop]  # noqa: E731
    packed = int4.transposed_int4(rows, 8, 27, 12, positions, 16)
    np.testing.assert_array_equal(packed.numpy(), packed_by_numpy(wide))
    pairs = lambda start, stop: int4.pack_pairs(values[start:stop])  # noqa: E731
    assert torch.equal(int4.transposed_int4(rows, 8, 27, 12, positions, 16, pairs), packed)
    deep = int4.transposed_int4(rows, 8, 27, 12, None, 16, pairs)
    np.testing.assert_array_equal(deep.numpy(), packed_by_numpy(np.pad(values.numpy()[8:27].T, ((0, 4), (0, 0)))))
    np.testing.assert_array_equal(int4.transposed_int8(rows, 8, 27, 12, positions, 16).numpy(), wide)


def test_a_large_weight_is_rearranged_in_blocks() -> None:
    """No block is larger than the limit, and all rows come once and in order."""
    blocks = int4.row_blocks(100_003, 8192)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == 100_003
    assert all(a[1] == b[0] for a, b in pairwise(blocks))
    assert all((stop - start) * 8192 <= int4.BLOCK_ELEMENTS and start % 8 == 0 for start, stop in blocks)
