# SPDX-License-Identifier: Apache-2.0
"""Strict reading of untrusted JSON files: bounded size, depth and number of values; no duplicate keys.

The JSON files of a checkpoint decide how its weights are read, so files that parsers read differently are rejected. Every
error is an NpuQuantError that names the file and a fix.
"""

from __future__ import annotations

import gc
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from vllm_npu_quant.checkpoint.files import opened
from vllm_npu_quant.checkpoint.text import looks_like, shown, shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = [
    "CONFIG_MAX_BYTES",
    "DESCRIPTION_MAX_BYTES",
    "INDEX_MAX_BYTES",
    "MAX_DEPTH",
    "MAX_ITEMS",
    "check_depth",
    "collector_paused",
    "json_limit",
    "load_pairs",
    "parse_json",
    "read_json",
]

#: Size limit of config.json and similar files, in bytes.
CONFIG_MAX_BYTES = 16 * 2**20

#: Size limit of quant_model_description.json, in bytes. DeepSeek-R1's has about 10 MB.
DESCRIPTION_MAX_BYTES = 256 * 2**20

#: Size limit of *.safetensors.index.json, in bytes.
INDEX_MAX_BYTES = 256 * 2**20

#: Limit on nested objects and arrays; the outermost has depth 1.
MAX_DEPTH = 100

#: The same for files that another parser reads: Python's fails at about 1000.
FOREIGN_MAX_DEPTH = 500

#: Limit on the number of values of one file. It bounds the memory: a Python object takes up to 100 bytes for two bytes of
#: the file. The largest known files, descriptions and indexes, hold 280,000 values.
MAX_ITEMS = 1_200_000

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

_AGAIN = "Copy or download the file again."


#: Path of a value as a linked list: (path of its parent, its key or index). Converted to text for messages only.
_Keys: TypeAlias = "tuple[_Keys, str | int] | None"


class _NotJsonError(ValueError):
    """A value that Python's parser accepts but JSON does not allow."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector, which dominates the time while many objects are created and none is freed."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def json_limit(name: str) -> int:
    """Size limit in bytes of a checkpoint's JSON file with this name."""
    if name.endswith(".index.json"):
        return INDEX_MAX_BYTES
    if name.startswith("quant_model_description"):
        return DESCRIPTION_MAX_BYTES
    return CONFIG_MAX_BYTES


def read_json(
    path: str | Path, *, max_bytes: int = CONFIG_MAX_BYTES, max_depth: int = MAX_DEPTH, file: str = ""
) -> dict:
    """Read a JSON file that holds one object.

    Args:
        path: the file.
        max_bytes: size limit; CONFIG_MAX_BYTES, DESCRIPTION_MAX_BYTES or INDEX_MAX_BYTES.
        max_depth: limit on nested objects and arrays; the outermost has depth 1.
        file: name of the file in messages; ``path`` if empty.

    Raises:
        NpuQuantError: unreadable-file if the file is missing, too large, nested too deeply, not UTF-8, not JSON or not an
            object; bad-config if an object has a duplicate key. NaN and Infinity are read as Python reads them: published
            config.json files have them (Mamba2's time_step_limit).
    """
    file = shown_name(file or str(path), 1000)
    with opened(Path(path), file=file) as (stream, size):
        if size > max_bytes:
            raise _too_large(file, max_bytes, size)
        content = b"".join(iter(lambda: stream.read(min(size + 1, max_bytes + 1)), b""))
    return parse_json(content, max_bytes=max_bytes, max_depth=max_depth, file=file)


@collector_paused()
def parse_json(content: bytes, *, file: str, max_bytes: int = CONFIG_MAX_BYTES, max_depth: int = MAX_DEPTH) -> dict:
    """Parse ``content``, which holds one object; arguments and errors as for ``read_json``."""
    if len(content) > max_bytes:
        raise _too_large(file, max_bytes, len(content))
    duplicates: list[tuple[_Keys, bool]] = []
    try:
        pairs = load_pairs(content, file=file)
        if type(pairs) is not tuple:
            kind = "an array" if type(pairs) is list else shown(pairs)
            raise _unreadable(file, "the file does not hold a JSON object", expected='{"name": value, ...}', found=kind)
        result = _object(pairs, None, max_depth, duplicates)
    except RecursionError:
        raise _too_deep(file, max_depth) from None
    if duplicates:
        keys, same = duplicates[0]
        key = ".".join(_path(keys))
        more = f" (and {len(duplicates) - 1} more keys)" if len(duplicates) > 1 else ""
        raise NpuQuantError(
            [
                Finding(
                    "bad-config",
                    f"a key stands twice in one object: {shown_name(key)}{more}",
                    file=file,
                    expected="every key once, since readers differ in which value they take",
                    found="the same value both times" if same else "two different values",
                    fix="Remove one of the two, or export the checkpoint again.",
                )
            ]
        )
    return result


def check_depth(path: Path, *, file: str, max_depth: int = FOREIGN_MAX_DEPTH) -> None:
    """Refuse a JSON file whose nesting would exhaust the stack of a recursive parser. Nothing else of it is checked.

    Raises:
        NpuQuantError: unreadable-file.
    """
    with opened(path, file=file) as (stream, _):
        content = stream.read(CONFIG_MAX_BYTES)
    brackets = _STRING.sub(b"", content).translate(None, _NO_BRACKETS)
    if len(brackets) > max_depth and max(accumulate(1 if char in b"[{" else -1 for char in brackets)) > max_depth:
        raise _too_deep(file, max_depth)


def load_pairs(content: bytes, *, file: str, max_items: int = MAX_ITEMS) -> Any:
    """Parse strict JSON; objects are returned as tuples of (key, value) pairs, which keep duplicate keys.

    The tuples are created by C code, which takes a quarter of the time of a hook written in Python.

    Raises:
        NpuQuantError: unreadable-file.
        RecursionError: the nesting exceeds the limit of Python's parser.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        what, fix = looks_like(content[:4096])
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            what, fix = "UTF-16 text", "Save the file as UTF-8."
        found = what or f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise _unreadable(file, "the file is not UTF-8 text", expected="JSON in UTF-8", found=found, fix=fix) from None
    if text.startswith("\ufeff"):
        raise _unreadable(
            file,
            "the file starts with a byte order mark",
            expected="JSON in UTF-8 without a mark",
            fix="Save the file as UTF-8 without a byte order mark.",
        )
    items = content.count(b",") + content.count(b"[") + content.count(b"{")
    if items > max_items:
        raise _unreadable(
            file,
            "the file holds more values than any checkpoint needs",
            expected=f"at most {max_items:,}",
            found=f"about {items:,}",
            fix="Check that this is the right file.",
        )
    # Converting long integers takes quadratic time. Newer Python versions reject more than 4300 digits themselves.
    if not getattr(sys, "get_int_max_str_digits", int)() and re.search(rb"[0-9]{4301}", content):
        raise _long_number(file)
    try:
        pairs = (_DECODER_MINUS_ZERO if "-0" in text else _DECODER).decode(text)
        if "\\ud" in text or "\\uD" in text:  # a lone surrogate cannot be encoded again
            json.dumps(pairs, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        what, fix = looks_like(content[:4096])
        around = text[max(0, error.pos - 20) : error.pos + 20]
        found = what or (
            shown(around) if around.strip() else "the end of the file" if text.strip() else "an empty file"
        )
        where = f"line {error.lineno}, column {error.colno}"
        raise _unreadable(file, f"the file is not JSON: {error.msg} ({where})", found=found, fix=fix) from None
    except UnicodeEncodeError:
        raise _unreadable(file, "a string of the file is not valid Unicode", found="half of a surrogate pair") from None
    except _NotJsonError as error:
        raise _unreadable(file, f"the file is not JSON: {error}", expected="finite numbers") from None
    except ValueError:  # more digits than Python's limit
        raise _long_number(file) from None
    return pairs


def _object(pairs: tuple, keys: _Keys, depth: int, duplicates: list[tuple[_Keys, bool]]) -> dict[str, Any]:
    """Convert an object's pairs to a dict, recursively.

    Args:
        pairs: (key, value) pairs.
        keys: path of the object.
        depth: allowed levels.
        duplicates: receives (path, whether the values are equal) of duplicate keys.

    Raises:
        RecursionError: the object has more than ``depth`` levels.
    """
    if depth < 1:
        raise RecursionError
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                duplicates.append(((keys, key), seen[key] == value))
            seen[key] = value
    for key, value in result.items():
        if type(value) is tuple:
            result[key] = _object(value, (keys, key), depth - 1, duplicates)
        elif type(value) is list:
            result[key] = _array(value, (keys, key), depth - 1, duplicates)
    return result


def _array(values: list, keys: _Keys, depth: int, duplicates: list[tuple[_Keys, bool]]) -> list[Any]:
    """Convert the objects of an array to dicts, in place; arguments and errors as for ``_object``."""
    if depth < 1:
        raise RecursionError
    for index, value in enumerate(values):
        if type(value) is tuple:
            values[index] = _object(value, (keys, index), depth - 1, duplicates)
        elif type(value) is list:
            values[index] = _array(value, (keys, index), depth - 1, duplicates)
    return values


def _path(keys: _Keys) -> list[str]:
    path = []
    while keys is not None:
        keys, key = keys
        path.append(shown_name(str(key), 60))
    return path[::-1]


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _NotJsonError(f"the number {shown(text)} is too large")
    return value


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_float=_finite)

#: For files with "-0", which Python alone parses as an integer. Slower, since it calls a Python function per integer.
_DECODER_MINUS_ZERO = json.JSONDecoder(object_pairs_hook=tuple, parse_float=_finite, parse_int=_integer)


def _unreadable(file: str, message: str, *, expected: str = "", found: str = "", fix: str = "") -> NpuQuantError:
    return NpuQuantError(
        [Finding("unreadable-file", message, file=file, expected=expected, found=found, fix=fix or _AGAIN)]
    )


def _too_deep(file: str, max_depth: int) -> NpuQuantError:
    return _unreadable(
        file,
        "objects and arrays are nested too deeply",
        expected=f"at most {max_depth} levels",
        fix="Check that this is the right file.",
    )


def _long_number(file: str) -> NpuQuantError:
    return _unreadable(file, "the file holds an absurd number", found="an integer of more than 4300 digits")


def _too_large(file: str, max_bytes: int, size: int) -> NpuQuantError:
    return _unreadable(
        file,
        "the file is larger than the limit for its kind",
        expected=f"at most {max_bytes:,} bytes",
        found=f"{size:,} bytes",
        fix="Check that this is the right file.",
    )
