# SPDX-License-Identifier: Apache-2.0
"""Record of the parts of a parameter that have received data.

vLLM's loaders cut checkpoint tensors for tensor and expert parallelism and copy the parts into parameters. They do not
report whether every part arrived, and some copy less than a full part without an error. So the copies are observed: while a
loader runs, every in-place write to the parameter's memory is recorded as a box of indices, and after loading the boxes must
cover the parameter. The cost does not depend on the number of elements, and no sentinel values are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Box", "Coverage", "WriteWitness", "box_of"]

#: Half-open index ranges, one per dimension.
Box = tuple[tuple[int, int], ...]

_WRITES = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})


def box_of(part: torch.Tensor, whole: torch.Tensor) -> Box | None:
    """The box of ``whole`` (contiguous) that the view ``part`` covers; None if it is not a box.

    A part of fewer dimensions comes from indexing; its missing dimensions have length 1.
    """
    offset = part.storage_offset() - whole.storage_offset()
    sizes = {stride: size for stride, size in zip(part.stride(), part.shape, strict=True) if size > 1}
    box = []
    covered = 1
    for length, stride in zip(whole.shape, whole.stride(), strict=True):
        # A dimension of length 1 has an arbitrary stride.
        start, offset = divmod(offset, stride) if length > 1 else (0, offset)
        size = sizes.get(stride, 1) if length > 1 else 1
        if start < 0 or start + size > length:
            return None
        box.append((start, start + size))
        covered *= size
    return tuple(box) if covered == part.numel() and offset == 0 else None


class Coverage:
    """The boxes of one parameter that were written."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.boxes: set[Box] = set()

    def add(self, box: Box) -> None:
        self.boxes.add(box)

    @property
    def started(self) -> bool:
        return bool(self.boxes)

    def missing(self) -> list[Box]:
        """The boxes that were not written, merged along the first dimension; empty when the parameter is filled."""
        full: Box = tuple((0, length) for length in self.shape)
        if full in self.boxes or prod(self.shape) == 0:
            return []
        if not self.boxes:
            return [full]
        cuts = [
            sorted({0, length, *(edge for box in self.boxes for edge in box[axis])})
            for axis, length in enumerate(self.shape)
        ]
        places = [{edge: i for i, edge in enumerate(axis)} for axis in cuts]
        filled: set[tuple[int, ...]] = set()
        for box in self.boxes:
            spans = (range(places[axis][start], places[axis][stop]) for axis, (start, stop) in enumerate(box))
            filled.update(product(*spans))
        holes = [
            tuple((cuts[axis][i], cuts[axis][i + 1]) for axis, i in enumerate(cell))
            for cell in product(*(range(len(axis) - 1) for axis in cuts))
            if cell not in filled
        ]
        return _merge(holes)


def _merge(boxes: Iterable[Box]) -> list[Box]:
    """Join boxes that follow each other along the first dimension."""
    merged: list[Box] = []
    for box in sorted(boxes, key=lambda box: (box[1:], box[0])):
        if merged and merged[-1][1:] == box[1:] and merged[-1][0][1] == box[0][0]:
            merged[-1] = ((merged[-1][0][0], box[0][1]), *box[1:])
        else:
            merged.append(box)
    return sorted(merged)


class WriteWitness(TorchDispatchMode):
    """Record every in-place write to a parameter's memory in its coverage, while active."""

    def __init__(self, param: torch.Tensor, coverage: Coverage) -> None:
        super().__init__()
        self.whole = param.data
        self.storage = param.data.untyped_storage().data_ptr()
        self.coverage = coverage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _WRITES:
            target = args[0]
            if target.untyped_storage().data_ptr() == self.storage:
                box = box_of(target, self.whole)
                if box is not None:
                    self.coverage.add(box)
        return result
