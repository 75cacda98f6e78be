# SPDX-License-Identifier: Apache-2.0
"""Parser of safetensors headers from untrusted bytes: checks every rule of the format and reports every violation.

A file consists of 8 bytes with the header's length (little-endian), the header (a JSON object), and the data. The header
maps every tensor name to ``{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}``, with offsets in bytes from the
start of the data, and may have ``"__metadata__"``, an object of strings. The tensors cover the data exactly, without holes,
overlaps or remaining bytes (https://github.com/huggingface/safetensors#format).

Everything that the safetensors library rejects is rejected. In addition: duplicate names (the library takes the last),
unknown fields, and implausible numbers of tensors or dimensions, and names that no layer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

from vllm_npu_quant.checkpoint.files import opened
from vllm_npu_quant.checkpoint.json_files import collector_paused, load_pairs
from vllm_npu_quant.checkpoint.text import looks_like, near, shown, shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = [
    "DTYPE_BITS",
    "HEADER_MAX_BYTES",
    "MAX_DIMS",
    "MAX_NAME",
    "MAX_PARTS",
    "MAX_TENSORS",
    "Header",
    "HeaderBudget",
    "TensorInfo",
    "header_length",
    "parse_header",
    "read_header",
]

#: Bits per element of every dtype of the format (safetensors 0.8).
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)

#: Size limit of the header's JSON in bytes, that of the safetensors library.
HEADER_MAX_BYTES = 100_000_000

#: Limit on the tensors of one file.
MAX_TENSORS = 250_000

#: Limits on all headers of a checkpoint together. The largest known have 280,000 tensors (384 experts in 61 layers, three
#: projections, up to four tensors each), and 45 MB of headers.
ALL_HEADERS_MAX_BYTES = 200_000_000
ALL_MAX_TENSORS = 1_200_000

#: Limits on a tensor's name: characters, and components between dots. Real names have below 100, and below 15.
MAX_NAME = 512
MAX_PARTS = 32

#: Limit on the values of one header's JSON: eight for each tensor.
MAX_ITEMS = 8 * MAX_TENSORS

#: Limit on a tensor's dimensions, that of NumPy 1.
MAX_DIMS = 32

#: Elements and bits are counted in unsigned 64-bit integers.
_MAX_COUNT = 2**64 - 1

#: Limit on the findings per file; the rest are counted.
MAX_FINDINGS = 100

#: Bytes of the first read of a file, enough for most headers.
_FIRST_READ = 256 * 1024

_AGAIN = "Download the file again."
_DTYPES = {name: name for name in DTYPE_BITS}
_FIELDS = ("dtype", "shape", "data_offsets")


class TensorInfo(NamedTuple):
    """Metadata of one tensor. A NamedTuple, because large checkpoints have 136,000 and dataclasses take four times as long.

    Attributes:
        name: name of the tensor.
        dtype: safetensors dtype ("BF16", "I8", ...), a key of DTYPE_BITS.
        shape: shape in elements (two "F4" elements share a byte).
        file: name of the file.
        begin: offset of the first byte from the start of the file.
        end: offset after the last byte from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes * 8 // DTYPE_BITS[self.dtype]


@dataclass(frozen=True)
class Header:
    """The parsed header of one file.

    Attributes:
        file: name of the file.
        tensors: the tensors with valid entries, in the order of the header. If ``findings`` has an error, do not read their
            values.
        metadata: the strings of ``__metadata__``.
        findings: all violations, at most MAX_FINDINGS.
        size: bytes of the file.
    """

    file: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    findings: tuple[Finding, ...]
    size: int


@dataclass
class HeaderBudget:
    """The rest of the limits on all headers of one checkpoint. Several threads may read headers.

    Attributes:
        nbytes: bytes of JSON.
        tensors: number of tensors.
    """

    nbytes: int = ALL_HEADERS_MAX_BYTES
    tensors: int = ALL_MAX_TENSORS
    _lock: Lock = field(default_factory=Lock, repr=False)

    def take(self, file: str, *, nbytes: int = 0, tensors: int = 0) -> None:
        """Note the part that the header of a file takes.

        Raises:
            NpuQuantError: bad-header if less is left.
        """
        with self._lock:
            self.nbytes -= nbytes
            self.tensors -= tensors
            if self.nbytes >= 0 and self.tensors >= 0:
                return
        report = _Report(shown_name(file, 1000))
        expected = f"at most {ALL_HEADERS_MAX_BYTES:,} bytes and {ALL_MAX_TENSORS:,} tensors"
        message = "the headers of all weight files together are larger than those of any checkpoint"
        report.say(message, expected=expected, fix="Check the folder.")
        raise NpuQuantError(report)


class _Report(list[Finding]):
    """Findings about one file; those beyond MAX_FINDINGS are counted."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.left_out = 0

    @property
    def full(self) -> bool:
        return len(self) >= MAX_FINDINGS - 1

    def say(
        self,
        message: str,
        *,
        layer: str = "",
        expected: str = "",
        found: str = "",
        fix: str = _AGAIN,
        nearest: tuple[str, ...] = (),
    ) -> None:
        if not self.full:
            layer = layer and shown_name(layer)
            self.append(Finding("bad-header", message, layer, self.file, expected, found, nearest, fix))
        else:
            self.left_out += 1

    def done(self) -> tuple[Finding, ...]:
        if self.left_out:
            text = f"{self.left_out:,} more faults of this header are not listed"
            self.append(Finding("bad-header", text, file=self.file, fix=_AGAIN))
        return tuple(self)


def header_length(prefix: bytes, *, file: str, file_size: int) -> int:
    """Length in bytes of the header's JSON, from a prefix of at least 8 bytes.

    The JSON occupies bytes 8 to 8 + length, so that a header can be fetched over HTTP by range.

    Raises:
        NpuQuantError: bad-header for a file that is too short, or a length that exceeds the file or HEADER_MAX_BYTES.
    """
    report = _Report(shown_name(file, 1000))
    if file_size < 8 or len(prefix) < 8:
        found = "an empty file" if not file_size else f"{min(len(prefix), file_size)} bytes"
        report.say("the file ends before the length of its header", expected="8 bytes and more", found=found)
        raise NpuQuantError(report)
    length = int.from_bytes(prefix[:8], "little")
    what, fix = looks_like(prefix)
    if what and length > min(HEADER_MAX_BYTES, file_size - 8):
        report.say("this is not a safetensors file", expected="the length of a header", found=what, fix=fix)
    elif length > HEADER_MAX_BYTES:
        expected = f"a header of at most {HEADER_MAX_BYTES:,} bytes"
        report.say("the header is longer than the limit", expected=expected, found=f"{length:,} bytes")
    elif length > file_size - 8:
        message = "the file ends inside its header"
        report.say(message, expected=f"{length + 8:,} bytes and more", found=f"{file_size:,} bytes")
    if report:
        raise NpuQuantError(report)
    return length


@collector_paused()
def parse_header(content: bytes, *, file: str, file_size: int, budget: HeaderBudget | None = None) -> Header:
    """Check a header and list its tensors.

    Args:
        content: the start of the file, at least up to the end of the header.
        file: name of the file, for TensorInfo.file and messages.
        file_size: bytes of the whole file, which the tensors must cover exactly.
        budget: that of the checkpoint, from which the tensors are taken.

    Returns:
        The tensors and all findings; faults of the file are not raised.

    Raises:
        ValueError: ``content`` ends before the header although the file does not.
    """
    try:
        length = header_length(content, file=file, file_size=file_size)
        if len(content) < length + 8:
            raise ValueError(f"parse_header needs the first {length + 8} bytes of {file}, not only {len(content)}")
        pairs = _load(content[8 : length + 8], file)
    except NpuQuantError as error:
        return Header(file, {}, {}, error.findings, file_size)
    report = _Report(shown_name(file, 1000))
    entries: dict[str, Any] = dict(pairs)
    if len(entries) != len(pairs):
        _report_duplicates(pairs, report)
    metadata = _metadata(entries.pop("__metadata__", None), report)
    if len(entries) > MAX_TENSORS:
        message = "the file holds more tensors than any checkpoint needs"
        report.say(message, expected=f"at most {MAX_TENSORS:,}", found=f"{len(entries):,}")
        return Header(file, {}, metadata, report.done(), file_size)
    try:
        (budget or HeaderBudget()).take(file, tensors=len(entries))
    except NpuQuantError as error:
        return Header(file, {}, {}, error.findings, file_size)
    tensors, ranges, all_ranges = _tensors(entries, file, length + 8, report)
    _check_coverage(ranges, all_ranges, length + 8, file_size, report)
    return Header(file, tensors, metadata, report.done(), file_size)


def read_header(path: str | Path, *, file: str = "", budget: HeaderBudget | None = None) -> Header:
    """Check the header of a local file and list its tensors.

    Args:
        path: the file.
        file: name of the file in TensorInfo.file and messages; the last component of ``path`` if empty.
        budget: that of the checkpoint, from which the header is taken.

    Returns:
        The tensors and all findings; a file that cannot be read is a finding (unreadable-file).
    """
    path = Path(path)
    file = file or path.name
    budget = budget or HeaderBudget()
    size = 0
    try:
        with opened(path, file=file) as (stream, size):
            content = stream.read(_FIRST_READ)
            length = header_length(content, file=file, file_size=size)
            budget.take(file, nbytes=length)
            while len(content) < length + 8:
                more = stream.read(length + 8 - len(content))
                if not more:  # the file was truncated in the meantime
                    size = len(content)
                    break
                content += more
    except NpuQuantError as error:
        return Header(file, {}, {}, error.findings, size)
    return parse_header(content, file=file, file_size=size, budget=budget)


def _load(content: bytes, file: str) -> tuple[tuple[str, Any], ...]:
    """The pairs of the header's JSON object."""
    report = _Report(shown_name(file, 1000))
    try:
        pairs = load_pairs(content, file=file, max_items=MAX_ITEMS)
        if type(pairs) is tuple:
            return pairs
        report.say("the header is not a JSON object", expected='{"name": {...}, ...}', found=shown(pairs))
    except NpuQuantError as error:
        for finding in error.findings:
            message = finding.message.replace("the file", "the header")
            report.say(message, expected=finding.expected, found=finding.found)
    except RecursionError:
        report.say("objects and arrays of the header are nested too deeply", expected="3 levels")
    raise NpuQuantError(report.done())


def _report_duplicates(pairs: tuple[tuple[str, Any], ...], report: _Report) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            report.say("the header lists this name twice", layer=name, expected="every tensor once")
        seen.add(name)


def _metadata(value: Any, report: _Report) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not tuple:
        report.say("__metadata__ is not an object", expected='{"name": "text", ...}', found=shown(value))
        return {}
    for key, text in value:
        if type(text) is not str:
            report.say(f"__metadata__ holds something else than text: {shown_name(key)}", found=shown(text))
    metadata = {key: text for key, text in value if type(text) is str}
    if len({key for key, _ in value}) != len(value):
        report.say("__metadata__ has a key twice", expected="every key once")
    return metadata


def _tensors(
    entries: dict[str, Any], file: str, data_begin: int, report: _Report
) -> tuple[dict[str, TensorInfo], list[tuple[int, int, str]], bool]:
    """The tensors with valid entries; the byte ranges (begin, end, name) of the data; whether every tensor has a range."""
    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    all_ranges = True
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name, pairs in entries.items():
        fields = dict(pairs) if type(pairs) is tuple else {}
        claimed = _range(fields.get("data_offsets"))
        if claimed is None:
            all_ranges = False
            _explain(name, pairs, fields, claimed, report)
            continue
        begin, end = claimed
        ranges.append((begin, end, name))
        dtype: Any = fields.get("dtype")
        bits = DTYPE_BITS.get(dtype, 0) if type(dtype) is str else 0
        count = _count(fields.get("shape"))
        if len(name) > MAX_NAME or name.count(".") >= MAX_PARTS:
            report.say(
                "the name of this tensor is longer than any real one",
                layer=name[:60] + "...",
                expected=f"at most {MAX_NAME} characters and {MAX_PARTS} components",
                found=f"{len(name):,} characters, {name.count('.') + 1:,} components",
                fix="Check where the file comes from.",
            )
            continue
        if len(pairs) != 3 or len(fields) != 3 or not bits or count is None or count * bits != (end - begin) * 8:
            _explain(name, pairs, fields, claimed, report)
            continue
        shape = tuple(fields["shape"])
        shape = shapes.setdefault(shape, shape)
        tensors[name] = TensorInfo(name, _DTYPES[dtype], shape, file, begin + data_begin, end + data_begin)
    return tensors, ranges, all_ranges


def _range(offsets: Any) -> tuple[int, int] | None:
    """The two numbers of data_offsets; None if they are not a range."""
    if type(offsets) is not list or len(offsets) != 2:
        return None
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= _MAX_COUNT:
        return None
    return begin, end


def _count(shape: Any) -> int | None:
    """Number of elements of a shape; None if it is not a shape or exceeds _MAX_COUNT."""
    if type(shape) is not list or len(shape) > MAX_DIMS:
        return None
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_COUNT:
            return None
        count *= size
        if count > _MAX_COUNT:  # like the library, even if a later size is 0
            return None
    return count


def _explain(name: str, pairs: Any, fields: dict[str, Any], claimed: tuple[int, int] | None, report: _Report) -> None:
    """Report everything that is wrong with the entry of one tensor."""
    if report.full:  # do not spend time on messages that are not listed
        report.left_out += 1
        return
    if type(pairs) is not tuple:
        expected = '{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}'
        report.say("the entry of this tensor is not an object", layer=name, expected=expected, found=shown(pairs))
        return
    names = "dtype, shape, data_offsets"
    listed = ", ".join(shown_name(key, 40) for key, _ in pairs[:8])
    if len(fields) != len(pairs):
        report.say("the entry of this tensor has a field twice", layer=name, expected=names, found=listed)
    if missing := [key for key in _FIELDS if key not in fields]:
        message = f"the entry of this tensor has no {' and no '.join(missing)}"
        report.say(message, layer=name, expected=names, found=listed)
    if fields.keys() - _FIELDS:
        message = "the entry of this tensor has a field that the format does not know"
        fix = "The file was written for another reader: export the checkpoint again."
        report.say(message, layer=name, expected=names, found=listed, fix=fix)

    dtype, shape = fields.get("dtype"), fields.get("shape")
    bits = DTYPE_BITS.get(dtype, 0) if type(dtype) is str else 0
    if "dtype" in fields and not bits:
        close = near(dtype, DTYPE_BITS) if type(dtype) is str else ()
        report.say("unknown dtype", layer=name, expected=", ".join(DTYPE_BITS), found=shown(dtype), nearest=close)
    count = _count(shape)
    if "shape" in fields and count is None:
        expected = f"at most {MAX_DIMS} integers of 0 or more, with a product below 2^64"
        report.say("shape is not a list of sizes", layer=name, expected=expected, found=shown(shape))
    if "data_offsets" in fields and claimed is None:
        expected = "[begin, end] with 0 <= begin <= end < 2^64"
        report.say("data_offsets are not a range", layer=name, expected=expected, found=shown(fields["data_offsets"]))
    if claimed and bits and count is not None and count * bits != (claimed[1] - claimed[0]) * 8:
        expected = f"{dtype} {shown(shape)} takes {count * bits / 8:,.10g} bytes"
        if count * bits % 8:
            expected += ", which have to be whole ones"
        found = f"{claimed[1] - claimed[0]:,} bytes"
        report.say("data_offsets do not fit the dtype and shape", layer=name, expected=expected, found=found)


def _check_coverage(
    ranges: list[tuple[int, int, str]], all_ranges: bool, data_begin: int, file_size: int, report: _Report
) -> None:
    """Report overlaps, holes and a wrong file size; ``all_ranges`` is whether every tensor has a range."""
    ranges.sort()
    at = 0
    before = ""
    for begin, end, name in ranges:
        if begin > at and all_ranges:
            found = f"no tensor has the bytes {at:,} to {begin:,} of the data"
            report.say("there is a hole before this tensor", layer=name, expected=f"begin {at:,}", found=found)
        elif begin < at:
            found = f"it begins at byte {begin:,} of the data, and {shown_name(before)} ends at {at:,}"
            report.say("this tensor overlaps another one", layer=name, expected=f"begin {at:,}", found=found)
        if end >= at:
            at, before = end, name
    expected, found = f"{data_begin + at:,} bytes", f"{file_size:,} bytes"
    if data_begin + at > file_size:
        cut = sum(data_begin + end > file_size for _, end, _ in ranges)
        found += f", which cuts off {cut:,} of {len(ranges):,} tensors"
        report.say("the file is truncated", expected=expected, found=found)
    elif data_begin + at < file_size and all_ranges:
        report.say("the file is longer than its tensors", expected=expected, found=found)
