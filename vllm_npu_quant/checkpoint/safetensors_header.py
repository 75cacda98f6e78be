# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, from untrusted bytes: every rule of the format, every violation reported.

A file is 8 bytes with the header's length (little-endian), the header (a JSON object), and the data. The header maps
every tensor name to ``{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}``, with offsets in bytes from the
start of the data, and may hold ``"__metadata__"``, an object of strings. The data is covered exactly: no holes, no
overlaps, no bytes left (https://github.com/huggingface/safetensors#format).

What the safetensors library refuses is refused here. Beyond that: names that stand twice (the library takes the last),
fields that the format does not know, and more tensors or dimensions than a checkpoint can have.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_npu_quant.checkpoint.json_files import load_pairs
from vllm_npu_quant.checkpoint.text import looks_like, shown, shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError, nearest_names

__all__ = [
    "DTYPE_BITS",
    "HEADER_MAX_BYTES",
    "MAX_DIMS",
    "MAX_TENSORS",
    "Header",
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

#: Limit of the header's JSON, in bytes: the one of the safetensors library.
HEADER_MAX_BYTES = 100_000_000

#: Limit of the tensors in one file. All 163 files of DeepSeek-R1 together hold 136,000 when quantized.
MAX_TENSORS = 1_000_000

#: Limit of a tensor's dimensions, the one of NumPy 1.
MAX_DIMS = 32

#: The format counts elements and bits in unsigned 64-bit integers.
_MAX_COUNT = 2**64 - 1

#: Findings listed per file; more of them are counted.
MAX_FINDINGS = 100

_AGAIN = "Download the file again."
_DTYPES = {name: name for name in DTYPE_BITS}
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name.
        dtype: its dtype as safetensors writes it ("BF16", "I8", ...): a key of DTYPE_BITS.
        shape: its shape, in elements (for "F4" two elements share a byte).
        file: the name of the file that holds it.
        begin: its first byte, counted from the start of the file.
        end: the byte after its last one, counted from the start of the file.
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
        """Elements."""
        return self.nbytes * 8 // DTYPE_BITS[self.dtype]


@dataclass(frozen=True)
class Header:
    """What the header of one file says.

    Attributes:
        file: the name of the file.
        tensors: every tensor that is described without fault, in the order of the header. Where ``findings`` has an
            error, use none of them for reading.
        metadata: the free-form strings of ``__metadata__``.
        findings: what is wrong, at most MAX_FINDINGS.
        size: bytes of the file.
    """

    file: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    findings: tuple[Finding, ...]
    size: int


class _Report(list[Finding]):
    """Findings about one file; those beyond MAX_FINDINGS are only counted."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.left_out = 0

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
        if len(self) < MAX_FINDINGS - 1:
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
    """The length in bytes of the header's JSON, from the file's first 8 bytes or more.

    The JSON fills the bytes from 8 to 8 + length: to read a header over HTTP, fetch a prefix, ask here, fetch the rest.

    Raises:
        NpuQuantError: bad-header, for a file that is too short or a length that cannot be true.
    """
    report = _Report(shown_name(file, 1000))
    if file_size < 8 or len(prefix) < 8:
        found = "an empty file" if not file_size else f"{min(len(prefix), file_size)} bytes"
        report.say("the file ends before the length of its header", expected="8 bytes and more", found=found)
        raise NpuQuantError(report)
    length = int.from_bytes(prefix[:8], "little")
    what, fix = looks_like(prefix)
    if length > HEADER_MAX_BYTES:
        report.say(
            "this is not a safetensors file" if what else "the header is longer than the limit",
            expected=f"a header of at most {HEADER_MAX_BYTES:,} bytes",
            found=what or f"{length:,} bytes",
            fix=fix or _AGAIN,
        )
    elif length > file_size - 8:
        message = "the file ends inside its header"
        report.say(message, expected=f"{length + 8:,} bytes and more", found=f"{file_size:,} bytes")
    if report:
        raise NpuQuantError(report)
    return length


def parse_header(content: bytes, *, file: str, file_size: int) -> Header:
    """Check a header and list its tensors.

    Args:
        content: the start of the file, at least up to the end of the header.
        file: the name of the file, for TensorInfo.file and messages.
        file_size: bytes of the whole file, which the tensors have to cover exactly.

    Returns:
        The tensors and everything that is wrong. Nothing about the file's content is raised.

    Raises:
        ValueError: ``content`` is shorter than the header although the file is not.
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
    tensors, ranges = _tensors(entries, file, length + 8, report)
    _check_coverage(ranges, length + 8, file_size, report)
    return Header(file, tensors, metadata, report.done(), file_size)


def read_header(path: str | Path, *, file: str = "") -> Header:
    """Check the header of a local file and list its tensors, named after ``file`` or else the file's name.

    Returns:
        The tensors and everything that is wrong; a file that cannot be read is a finding, too (unreadable-file).
    """
    path = Path(path)
    file = file or path.name
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait forever
            raise IsADirectoryError(0, "not a file")
        with open(path, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            # The first read is large enough for the header of most files, since every read costs a trip to the disk.
            content = stream.read(_FIRST_READ)
            length = header_length(content, file=file, file_size=size)
            while len(content) < length + 8:
                more = stream.read(length + 8 - len(content))
                if not more:
                    size = len(content)
                    break
                content += more
        return parse_header(content, file=file, file_size=size)
    except NpuQuantError as error:
        return Header(file, {}, {}, error.findings, 0)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "the file name is not valid"
        fix = "Check the path and its permissions."
        message = "the file cannot be read"
        if path.is_symlink() and not path.exists():
            message, fix = "the file is a link to a file that does not exist", "Repeat the download."
            reason = f"a link to {shown_name(os.readlink(path))}"
        finding = Finding("unreadable-file", message, file=shown_name(file, 1000), found=reason, fix=fix)
        return Header(file, {}, {}, (finding,), 0)


#: Bytes of the first read of a file.
_FIRST_READ = 256 * 1024


def _load(content: bytes, file: str) -> tuple[tuple[str, Any], ...]:
    """The pairs of the header's JSON object."""
    report = _Report(shown_name(file, 1000))
    try:
        pairs = load_pairs(content, file=file)
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
) -> tuple[dict[str, TensorInfo], list[tuple[int, int, str]]]:
    """The tensors, and the byte ranges (begin, end, name) of the data that entries claim, faulty ones included."""
    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name, pairs in entries.items():
        if type(pairs) is not tuple:
            report.say("the entry of this tensor is not an object", layer=name, found=shown(pairs))
            continue
        fields = dict(pairs)
        if len(pairs) != 3 or fields.keys() != _FIELDS:
            _report_fields(name, pairs, fields, report)
        dtype = _DTYPES.get(value) if type(value := fields.get("dtype")) is str else None
        if dtype is None and "dtype" in fields:
            near = nearest_names(value, DTYPE_BITS) if type(value) is str and len(value) < 32 else ()
            expected = "one of " + ", ".join(DTYPE_BITS)
            report.say("unknown dtype", layer=name, expected=expected, found=shown(value), nearest=near)
        bits = _bits(name, dtype, fields["shape"], report) if "shape" in fields else None
        offsets = fields.get("data_offsets")
        if type(offsets) is not list or len(offsets) != 2 or not all(type(x) is int and x >= 0 for x in offsets):
            if "data_offsets" in fields:
                expected = "[begin, end], two integers of 0 or more"
                report.say("data_offsets are not a range", layer=name, expected=expected, found=shown(offsets))
            continue
        begin, end = offsets
        if end < begin or end > _MAX_COUNT:
            report.say("data_offsets are not a range", layer=name, expected="begin <= end < 2^64", found=shown(offsets))
            continue
        ranges.append((begin, end, name))
        if bits is None or dtype is None:
            continue
        if (end - begin) * 8 != bits:
            expected = f"{bits // 8:,} bytes for {dtype} {fields['shape']}"
            if bits % 8:
                expected = f"a whole number of bytes; {dtype} {fields['shape']} takes {bits} bits"
            message = "data_offsets do not fit the shape and dtype"
            report.say(message, layer=name, expected=expected, found=f"{end - begin:,} bytes")
            continue
        if len(pairs) == 3:
            shape = tuple(fields["shape"])
            shape = shapes.setdefault(shape, shape)
            tensors[name] = TensorInfo(name, dtype, shape, file, begin + data_begin, end + data_begin)
    return tensors, ranges


def _report_fields(name: str, pairs: tuple, fields: dict[str, Any], report: _Report) -> None:
    expected = "dtype, shape and data_offsets"
    if len(fields) != len(pairs):
        report.say("the entry of this tensor has a field twice", layer=name, expected=expected)
    missing = sorted(_FIELDS - fields.keys())
    if missing:
        message = f"the entry of this tensor has no {' and no '.join(missing)}"
        report.say(
            message, layer=name, expected=expected, found=", ".join(shown_name(key, 40) for key in list(fields)[:8])
        )
    unknown = sorted(fields.keys() - _FIELDS)
    if unknown:
        found = ", ".join(shown_name(key, 40) for key in unknown[:8])
        fix = "The file was written for another reader: export the checkpoint again."
        report.say(
            "the entry of this tensor has a field that the format does not know",
            layer=name,
            expected=expected,
            found=found,
            fix=fix,
        )


def _bits(name: str, dtype: str | None, shape: Any, report: _Report) -> int | None:
    """Bits of a tensor's data; None where that cannot be said, and then it has been reported."""
    if type(shape) is not list or len(shape) > MAX_DIMS:
        report.say("shape is not a list of sizes", layer=name, expected=f"at most {MAX_DIMS} sizes", found=shown(shape))
        return None
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_COUNT:
            report.say("shape is not a list of sizes", layer=name, expected="integers of 0 or more", found=shown(shape))
            return None
        count *= size
        if count > _MAX_COUNT:  # before a later 0, as in the library
            report.say("the shape has more elements than can be counted", layer=name, found=shown(shape))
            return None
    if dtype is None:
        return None
    bits = count * DTYPE_BITS[dtype]
    if bits > _MAX_COUNT:
        report.say("the shape has more elements than can be counted", layer=name, found=shown(shape))
        return None
    return bits


def _check_coverage(ranges: list[tuple[int, int, str]], data_begin: int, file_size: int, report: _Report) -> None:
    """Report holes, overlaps, and a file that is longer or shorter than its tensors."""
    ranges.sort()
    at = 0
    beyond = 0
    before = ""
    data_size = file_size - data_begin
    for begin, end, name in ranges:
        if begin > at:
            found = f"nothing is said of bytes {at:,} to {begin:,} of the data"
            report.say("there is a hole before this tensor", layer=name, found=found)
        elif begin < at:
            found = f"bytes {begin:,} to {end:,}, where {shown_name(before)} reaches to {at:,}" if before else ""
            report.say("this tensor overlaps another", layer=name, found=found)
        beyond += end > data_size
        if end >= at:
            at, before = end, name
    if at > data_size:
        counted = f"; {beyond:,} of {len(ranges):,} tensors are cut off"
        report.say(
            "the file is truncated", expected=f"{data_begin + at:,} bytes", found=f"{file_size:,} bytes" + counted
        )
    elif at < data_size:
        message = "the file is longer than its tensors"
        report.say(message, expected=f"{data_begin + at:,} bytes", found=f"{file_size:,} bytes")
