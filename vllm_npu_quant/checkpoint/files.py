# SPDX-License-Identifier: Apache-2.0
"""Opening of untrusted files: only regular files, every failure an NpuQuantError."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vllm_npu_quant.checkpoint.text import near, shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["listed", "opened"]


def listed(folder: Path) -> list[str]:
    """The names in a folder; none if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


@contextmanager
def opened(path: Path, *, file: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading, unbuffered, as ``(stream, size in bytes)``; ``file`` is its name in messages.

    Symbolic links are followed, as huggingface_hub's cache requires.

    Raises:
        NpuQuantError: unreadable-file for a file that is missing, unreadable or not regular, and for read errors within the
            context.
    """
    try:
        os.fsencode(path)
        if "\0" in str(path):
            raise ValueError
    except ValueError:
        raise _unreadable(
            file, "the file cannot be read", "a name that no file can have", fix="Check the path."
        ) from None
    try:
        with open(path, "rb", buffering=0, opener=_open) as stream:
            info = os.fstat(stream.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise _unreadable(file, "this is not a file", "a pipe or device", fix="Check the path.")
            yield stream, info.st_size  # type: ignore[misc]  # typeshed does not declare FileIO as a BinaryIO
    except FileNotFoundError:
        raise _missing(path, file) from None
    except IsADirectoryError:
        raise _unreadable(file, "this is not a file", "a folder", fix="Check the path.") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _unreadable(file, "the file cannot be read", reason, fix="Check the path and its permissions.") from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would block otherwise


def _missing(path: Path, file: str) -> NpuQuantError:
    """Error for a missing file, with similar names in its folder."""
    with suppress(OSError):
        if path.is_symlink():  # left in huggingface_hub's cache by an interrupted download
            target = f"a link to {shown_name(os.readlink(path))}"
            return _unreadable(
                file, "the file is a link to a file that does not exist", target, fix="Download it again."
            )
    close = near(path.name, sorted(listed(path.parent)))
    return _unreadable(file, "the file does not exist", nearest=close, fix="Check the path, or download the file.")


def _unreadable(file: str, message: str, found: str = "", *, nearest: tuple[str, ...] = (), fix: str) -> NpuQuantError:
    return NpuQuantError(
        [Finding("unreadable-file", message, file=shown_name(file, 1000), found=found, nearest=nearest, fix=fix)]
    )
