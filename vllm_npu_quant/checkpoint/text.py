# SPDX-License-Identifier: Apache-2.0
"""Untrusted values in messages, shortened and without control characters; recognition of file types."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_npu_quant.errors import nearest_names

__all__ = ["looks_like", "near", "shown", "shown_name"]


def shown(value: object, limit: int = 80) -> str:
    """Format a value for a message, as JSON if that is short, in at most ``limit`` characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, tuple)):
        return f"an object of {len(value)} entries"
    if isinstance(value, list):
        if len(value) > 8 or any(isinstance(item, (dict, list, tuple)) for item in value):
            return f"an array of {len(value)} entries"
        text = "[" + ", ".join(shown(item, limit) for item in value) + "]"
    elif isinstance(value, str):
        text = ascii(value[:limit])
        if len(value) > limit:
            text += "..."
    else:
        text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown_name(name: str, limit: int = 200) -> str:
    """Format the name of a tensor, key or file for a message: unchanged if printable and short, else as by ``shown``."""
    return name if name and name.isprintable() and len(name) <= limit else shown(name, limit)


def looks_like(prefix: bytes) -> tuple[str, str]:
    """Recognize a file type by its first bytes: (description, fix), or two empty strings."""
    head = prefix[:256].lstrip().lower()
    if prefix.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the file", "Run `git lfs pull` in the folder, or download the file again."
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, perhaps an error page", "Download the file again, with access to the model."
    if prefix.startswith(b"GGUF"):
        return "a GGUF file", "Use a safetensors export of the model."
    if prefix.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "a PyTorch pickle", "Convert the checkpoint to safetensors."
    if prefix.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        return "a compressed file", "Decompress it."
    if prefix[:256] and not prefix[:4096].strip(b"\0"):
        return "zeros", "The download was not finished: download the file again."
    return "", ""


def near(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names most similar to ``name``, best first, formatted for a message."""
    return tuple(shown_name(other) for other in nearest_names(name, names))
