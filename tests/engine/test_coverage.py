# SPDX-License-Identifier: Apache-2.0
"""Load verification: the boxes that loaders write must cover a parameter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_npu_quant.engine.coverage import Coverage, WriteWitness, box_of


def witness(param: torch.Tensor) -> tuple[Coverage, WriteWitness]:
    coverage = Coverage(param.shape)
    return coverage, WriteWitness(param, coverage)


def test_nothing_written_is_everything_missing() -> None:
    assert Coverage((3, 5)).missing() == [((0, 3), (0, 5))]
    assert not Coverage((3, 5)).started


def test_a_full_copy_fills() -> None:
    param = torch.empty(33, 17)
    coverage, seen = witness(param)
    with seen:
        param.data.copy_(torch.ones(33, 17))
    assert coverage.missing() == []


def test_shards_along_rows_and_the_gap_between_them() -> None:
    param = torch.empty(12, 7, dtype=torch.int8)
    coverage, seen = witness(param)
    with seen:
        param.data.narrow(0, 0, 4).copy_(torch.zeros(4, 7, dtype=torch.int8))
        param.data.narrow(0, 9, 3).copy_(torch.zeros(3, 7, dtype=torch.int8))
    assert coverage.missing() == [((4, 9), (0, 7))]


def test_a_part_of_the_columns_is_not_the_whole() -> None:
    param = torch.empty(4, 6)
    coverage, seen = witness(param)
    with seen:
        param.data[:, :5].copy_(torch.zeros(4, 5))
    assert coverage.missing() == [((0, 4), (5, 6))]


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 1), (1, 5), (1, 1), (2, 1, 3), (4, 2, 1)])
def test_dimensions_of_length_one(shape: tuple[int, ...]) -> None:
    param = torch.empty(shape)
    coverage, seen = witness(param)
    with seen:
        for row in range(shape[0]):
            param.data[row].fill_(1.0)
    assert coverage.missing() == []
    assert len(coverage.boxes) == shape[0]


def test_experts_that_are_half_loaded() -> None:
    param = torch.empty(3, 8, 4)
    coverage, seen = witness(param)
    with seen:
        for expert in (0, 2):
            param.data[expert].narrow(0, 0, 4).copy_(torch.zeros(4, 4))
            param.data[expert].narrow(0, 4, 4).copy_(torch.zeros(4, 4))
        param.data[1].narrow(0, 4, 2).copy_(torch.zeros(2, 4))
    assert coverage.missing() == [((1, 2), (0, 4), (0, 4)), ((1, 2), (6, 8), (0, 4))]


def test_other_tensors_and_reads_do_not_count() -> None:
    param, other = torch.zeros(4), torch.zeros(4)
    coverage, seen = witness(param)
    with seen:
        other.copy_(param)
        _ = param.data + 1
    assert not coverage.started


def test_writes_through_a_view_that_is_no_box_do_not_count() -> None:
    param = torch.zeros(6, 6)
    assert box_of(param.t(), param) is None or box_of(param.t(), param) == ((0, 6), (0, 6))
    assert box_of(param.flatten()[::5], param) is None
    assert box_of(param[::2], param) is None


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_missing_is_what_a_mask_says(shape: list[int], data: st.DataObject) -> None:
    param = torch.zeros(shape)
    mask = np.zeros(shape, dtype=bool)
    coverage, seen = witness(param)
    for _ in range(data.draw(st.integers(0, 4))):
        part, where = param.data, []
        for axis, length in enumerate(shape):
            start = data.draw(st.integers(0, length - 1))
            size = data.draw(st.integers(1, length - start))
            part = part.narrow(axis, start, size)
            where.append(slice(start, start + size))
        with seen:
            part.copy_(torch.ones(part.shape))
        mask[tuple(where)] = True
    holes = np.zeros(shape, dtype=int)
    for box in coverage.missing():
        holes[tuple(slice(start, stop) for start, stop in box)] += 1
    np.testing.assert_array_equal(holes, (~mask).astype(int))
