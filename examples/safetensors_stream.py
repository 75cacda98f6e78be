# SPDX-License-Identifier: Apache-2.0
"""Writing a safetensors file one tensor at a time.

``safetensors.torch.save_file`` wants every tensor in memory at once. Here the header is written from the shapes alone
and each tensor goes to its place when it is there, so that a model of any size needs the memory of its largest tensor.
The file is byte for byte the one that ``save_file`` writes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

__all__ = ["SafetensorsStream", "TensorSpec"]

#: Widest alignment first: the order in which the safetensors library lays tensors out, names breaking ties.
_DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_NAME = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a file that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsStream:
    """A safetensors file that is open for writing; a context manager.

    Args:
        path: the file; it is overwritten.
        tensors: everything that will be in it, in any order.
        metadata: the ``__metadata__`` strings, if any.

    Raises:
        ValueError: from ``write`` for a tensor that was not announced, was written already or has another dtype or
            shape, and on leaving the context if an announced tensor was never written.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        ordered = sorted(tensors, key=lambda spec: (_RANK[spec.dtype], spec.name))
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        offset = 0
        for spec in ordered:
            if spec.name in self._places:
                raise ValueError(f"{path.name}: two tensors are named {spec.name}")
            end = offset + spec.nbytes
            header[spec.name] = {"dtype": _NAME[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            self._places[spec.name] = (spec, offset)
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(self._places)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._start + offset)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put ``tensor`` in the place that was announced for ``name``."""
        if name not in self._missing:
            reason = "written twice" if name in self._places else "not announced"
            raise ValueError(f"{self.path.name}: {name} was {reason}")
        spec, offset = self._places[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"{self.path.name}: {name} was announced as {spec.dtype} {list(spec.shape)} "
                f"and is {tensor.dtype} {list(tensor.shape)}"
            )
        self._file.seek(self._start + offset)
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self.path.name}: never written: {', '.join(sorted(self._missing)[:5])}")
