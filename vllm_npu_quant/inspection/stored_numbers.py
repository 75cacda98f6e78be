# SPDX-License-Identifier: Apache-2.0
"""A layer's stored numbers in one form for all layouts, summarized in NumPy: what the value rules look at.

Integers are told by ``code = q + 2^(bits - 1)``, from 0 to ``2^bits - 1``, in whichever way they are stored; zero points are
counted from the middle, so that ``w = (q - zero) * scale``. The order of the outputs inside a packed word is that of the
file: integers and zero points of one output stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.formats.common import FLOAT_DTYPES
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.layouts.tables import Axis, Dim, Role, TensorSpec, tensors_of
from vllm_npu_quant.spec import Layout, NumberKind

__all__ = ["Integers", "StoredNumbers"]

#: Stored elements per block.
BLOCK = 1 << 21

#: Layouts whose zero points are stored minus one.
_MINUS_ONE = frozenset({Layout.GPTQ, Layout.GPTQ_ACT_ORDER})
_OUTPUTS = frozenset({Axis.OUT, Axis.ROWS})


@dataclass(frozen=True)
class Integers:
    """A summary of a layer's integers.

    Attributes:
        bits: bits of an integer.
        counts: int64 [2^bits], how often each code occurs.
        largest: int16 [N], the largest |q| of each output.
        sums: int64 [N], the sum of the q of each output; None unless it was asked for.
    """

    bits: int
    counts: np.ndarray
    largest: np.ndarray
    sums: np.ndarray | None

    @cached_property
    def values(self) -> np.ndarray:
        """float64 [2^bits]: q of each code."""
        return np.arange(self.counts.size) - self.counts.size / 2

    @cached_property
    def mean(self) -> float:
        return float(self.counts @ self.values / self.counts.sum())

    @cached_property
    def deviation(self) -> float:
        return float((self.counts @ (self.values - self.mean) ** 2 / self.counts.sum()) ** 0.5)

    def share(self, low: float, high: float) -> float:
        """The share of integers with ``low <= |q| <= high``."""
        wanted = (np.abs(self.values) >= low) & (np.abs(self.values) <= high)
        return float(self.counts[wanted].sum() / self.counts.sum())


class StoredNumbers:
    """The numbers of one checkpoint layer; each is read when it is asked for, once.

    Args:
        checkpoint: local files.
        layer: the layer's name. entry: what it stores.
    """

    def __init__(self, checkpoint: Checkpoint, layer: str, entry: LayerEntry) -> None:
        self.entry = entry
        self._checkpoint = checkpoint
        self._tensors: dict[str, tuple[TensorSpec, TensorInfo]] = {}
        specs = tensors_of(entry.spec, entry.tensors)
        for spec in specs:
            info = checkpoint.tensors.get(f"{layer}.{spec.name}")
            fits = info is not None and info.numel and info.dtype in spec.dtypes and len(info.shape) <= len(spec.dims)
            if info is not None and fits and spec.loaded:
                self._tensors[spec.name] = spec, info
        self._weight = self._tensors.get(specs[0].name) if specs else None
        # How the layouts of extensions store their integers, the tables do not tell.
        self._known = isinstance(entry.spec.layout, Layout)

    @property
    def file(self) -> str:
        """The file of the weight, or of another tensor of the layer."""
        return next((info.file for _, info in self._tensors.values()), "")

    @property
    def symmetric(self) -> bool:
        return self.entry.spec.weight is not None and self.entry.spec.weight.symmetric

    @property
    def computes_static(self) -> bool:
        """Whether the layer's input is quantized with the stored scale."""
        activation = self.entry.spec.activation
        return activation is not None and not activation.dynamic and activation.kind is NumberKind.INT

    @cached_property
    def inputs(self) -> int:
        """K; 0 if the weight does not say it."""
        whole = self._elements(Axis.IN)
        for name in ("weight_shape", "g_idx", "weight_g_idx"):  # the last words of a packed weight may not be full
            if name in self._tensors:
                _, info = self._tensors[name]
                said = info.numel
                if name == "weight_shape":
                    said = int(self._checkpoint.read(info.name).reshape(-1)[-1])
                return said if 0 < said <= whole else whole
        return whole

    @cached_property
    def outputs(self) -> int:
        """N; 0 if the weight does not say it."""
        return self._elements(Axis.OUT)

    def _elements(self, axis: Axis) -> int:
        if self._weight is None:
            return 0
        spec, info = self._weight
        place = spec.axis_of(axis)
        return 0 if place is None or len(info.shape) != len(spec.dims) else spec.dims[place].elements(info.shape[place])

    @property
    def packed_zeros(self) -> bool:
        """Whether zero points are stored as integers in words, of which a symmetric weight has the middle only."""
        return self._packed_zeros is not None

    @cached_property
    def _packed_zeros(self) -> tuple[TensorSpec, TensorInfo] | None:
        for spec, info in self._tensors.values() if self._known else ():
            axes = {dim.axis for dim in spec.dims}
            if info.dtype == "I32" and axes & _OUTPUTS and axes & {Axis.GROUP, Axis.ALL_GROUPS}:
                return spec, info
        return None

    @cached_property
    def integers(self) -> Integers | None:
        """None for weights that are no integers, and where their tensor is not there as the layout has it."""
        weight = self.entry.spec.weight
        if weight is None or weight.kind is not NumberKind.INT or not 2 <= weight.bits <= 8 or self._weight is None:
            return None
        spec, info = self._weight
        if info.dtype not in ("I8", "I32") or len(spec.dims) != 2 or not self.outputs * self.inputs or not self._known:
            return None
        summary = _Summary(spec, weight.bits, self.outputs, self.inputs, with_sums="quant_bias" in self._tensors)
        return summary.of(info.shape, lambda elements: self._checkpoint.blocks(info.name, elements))

    @cached_property
    def scale(self) -> np.ndarray | None:
        """The weight's scales, float32, two levels multiplied; None if there is none."""
        found = [self.floats(spec.name) for spec, _ in self._tensors.values() if _is_scale(spec)]
        with np.errstate(over="ignore", invalid="ignore"):
            if "deq_scale" in self._tensors:
                step, whole = self.floats("input_scale"), self.floats("deq_scale")
                return whole / step.reshape(-1)[:1] if whole is not None and step is not None and step.all() else None
            first, *second = found or [None]
            if first is None or not second or second[0] is None or first.shape[:1] != second[0].shape[:1]:
                return first
            return first.reshape(len(first), -1)[:, :1] * second[0]

    @cached_property
    def zero(self) -> np.ndarray | None:
        """The weight's zero points, counted from the middle of the integers' range; None if none are stored."""
        weight = self.entry.spec.weight
        if self._packed_zeros is not None and weight is not None:
            spec, info = self._packed_zeros
            words = np.asarray(self._checkpoint.read(info.name)).view(np.uint32)
            minus_one = self.entry.spec.layout in _MINUS_ONE
            if minus_one and weight.bits != 3:  # producers subtract from whole words, and 0 borrows from its neighbour
                words = words + np.uint32(sum(1 << shift for shift in range(0, 32, weight.bits)))
            codes = np.concatenate([part.reshape(-1) for part in _fields(words, spec, weight.bits, self.outputs)])
            if minus_one and weight.bits == 3:
                codes = codes + np.uint8(1) & np.uint8(7)
            return codes.astype(np.float32) - (1 << (weight.bits - 1))
        found = [(spec, info) for spec, info in self._tensors.values() if spec.role is Role.ZERO]
        for spec, info in found[-1:]:  # the offsets of a first level are 0
            values = self.floats(spec.name)
            return values if values is not None else self._checkpoint.read(info.name).astype(np.float32)
        return None

    def floats(self, name: str) -> np.ndarray | None:
        """A float tensor of the layer as float32, or float32 bits widened to int64; None if it is not there."""
        if name not in self._tensors:
            return None
        _, info = self._tensors[name]
        if info.dtype == "I64" and name.endswith("scale"):
            return (np.asarray(self._checkpoint.read(info.name)) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        if info.dtype not in FLOAT_DTYPES and not info.dtype.startswith("F8_"):
            return None
        return self._checkpoint.read(info.name, float32=True)

    def stored(self, name: str) -> np.ndarray | None:
        """An integer tensor of the layer; None if it is not there."""
        return self._checkpoint.read(self._tensors[name][1].name) if name in self._tensors else None


def _is_scale(spec: TensorSpec) -> bool:
    return spec.role is Role.SCALE and any(dim.axis in _OUTPUTS for dim in spec.dims)


@dataclass(frozen=True)
class _Summary:
    """Makes ``Integers`` of a weight tensor; its sizes say which places of the last words are filled up."""

    spec: TensorSpec
    bits: int
    outputs: int
    inputs: int
    with_sums: bool

    def of(self, shape: tuple[int, ...], blocks: Callable[[int], Iterable[np.ndarray]]) -> Integers:
        """Summarize a weight in blocks of the first dimension.

        Args:
            shape: the stored one. blocks: the stored numbers in order, in vectors of at most so many.
        """
        out = self.spec.axis_of(Axis.OUT) or 0
        dims, half = self.spec.dims, 1 << (self.bits - 1)
        counts = np.zeros(1 << self.bits, np.int64)
        largest, sums = np.zeros(self.outputs, np.int16), np.zeros(self.outputs, np.int64)
        step = max(BLOCK // max(shape[1], 1) // dims[0].words, 1) * dims[0].words
        start = 0
        for vector in blocks(step * shape[1]):
            block = np.ascontiguousarray(vector).reshape(-1, shape[1])
            before = dims[0].elements(start)
            length = (self.outputs if dims[out].pack > 1 else self.inputs) - (before if dims[0].pack > 1 else 0)
            for place, codes in enumerate(_fields(block.view(f"u{block.itemsize}"), self.spec, self.bits, length)):
                inner = 1 - out
                if not codes.size:
                    continue
                counts += _counts(codes)[: counts.size]
                first = (before if out == 0 else 0) + (place if dims[out].pack > 1 else 0)
                rows = slice(first, first + (codes.shape[out] - 1) * dims[out].pack + 1, dims[out].pack)
                reach = np.maximum(codes.max(inner).astype(np.int16) - half, half - codes.min(inner).astype(np.int16))
                np.maximum(largest[rows], reach, out=largest[rows])
                if self.with_sums:
                    sums[rows] += codes.sum(inner, dtype=np.int64) - half * codes.shape[inner]
            start += len(block)
        return Integers(self.bits, counts, largest, sums if self.with_sums else None)


def _counts(codes: np.ndarray) -> np.ndarray:
    """int64 [256]: how often each byte occurs. Pairs are counted, as ``bincount`` makes 8 bytes of each number."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    even = flat.size // 2 * 2
    pairs = np.bincount(flat[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1) + np.bincount(flat[even:], minlength=256)


def _fields(block: np.ndarray, spec: TensorSpec, bits: int, length: int) -> Iterator[np.ndarray]:
    """The codes of a block of unsigned words or bytes as uint8, one array for each place in a word.

    Bytes hold two's complement, words codes. Integers of a dense stream of 3 bits lie in three words together, and each in
    two of them at most.

    Args:
        length: how many integers of the packed dimension are the layer's; the others fill up the last word.
    """
    axis = next((index for index, dim in enumerate(spec.dims) if dim.pack > 1), None)
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    if axis is None:  # one a byte; what is too wide is told elsewhere
        yield block + np.uint8(half) & np.uint8(mask)
        return
    dim, width = spec.dims[axis], 8 * block.itemsize
    kept = [slice(None)] * 2
    for place, codes in enumerate(_places(block, axis, dim, bits)):
        kept[axis] = slice(max(-(-(length - place) // dim.pack), 0))
        yield codes[tuple(kept)] & np.uint8(mask) ^ np.uint8(half if width == 8 else 0)


def _places(block: np.ndarray, axis: int, dim: Dim, bits: int) -> Iterator[np.ndarray]:
    """The words shifted to the right, so that the integers of one place after the other are the lowest bits; uint8."""
    width = 8 * block.itemsize
    if dim.pack * bits == width:
        parts = block.view(np.uint8).reshape(*block.shape, block.itemsize)
        for byte in range(block.itemsize):
            for shift in range(0, 8, bits):
                yield parts[..., byte] >> np.uint8(shift)
        return
    streams = [block[first :: dim.words] if axis == 0 else block[:, first :: dim.words] for first in range(dim.words)]
    for place in range(dim.pack):
        word, shift = divmod(place * bits, width)
        codes = streams[word] >> np.uint32(shift)
        if shift + bits > width:
            above = streams[word + 1]
            codes = codes[: above.shape[0], : above.shape[1]] | above << np.uint32(width - shift)
        yield codes.astype(np.uint8)
