# SPDX-License-Identifier: Apache-2.0
"""Detection of a checkpoint's format, and of the file that describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.formats.declaration import Format, formats, plain_method

__all__ = ["Detection", "contradiction", "detect_files", "file_beside", "quantization_config"]


@dataclass(frozen=True)
class Detection:
    """The detected format of a folder.

    Attributes:
        format: the format's name, or a ``quant_method`` that no format has; "" for an unquantized checkpoint.
        file: the file that decided.
        config: that file's JSON object, or the part of it that describes the quantization.
        asks: whether the user has to name the format to vLLM, since config.json does not.
        model: the whole config.json; empty if there is none.
    """

    format: str
    file: str
    config: Mapping[str, Any]
    asks: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization part of a config.json: its own, or that of its text model."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                value = holder.get(key)
                if isinstance(value, Mapping) and value:
                    return value
    return None


def file_beside(names: Iterable[str]) -> tuple[Format, str] | None:
    """The file beside config.json that describes the quantization, and its format; a decisive one before others.

    Raises:
        NpuQuantError: contradictory-evidence if there are several of one format.
    """
    names = frozenset(names)
    found = [(one, file) for one in formats() if (file := one.file_beside(names)) is not None]
    return min(found, key=lambda pair: not pair[0].decisive, default=None)


def contradiction(other: str, beside: tuple[Format, str], *, fix: str = "") -> Finding:
    """The finding for a checkpoint whose decisive file is contradicted.

    Args:
        other: the source that names another format.
        beside: the format and the file's name.
    """
    declaration, file = beside
    return Finding(
        "contradictory-evidence",
        f"this is a {declaration.title or declaration.name} checkpoint by its {file}, and another format by its {other}"[
            :400
        ],
        file=f"config.json, {file}",
        expected="one format",
        found=f"{other} and {file}"[:400],
        fix=fix or "remove the one that does not belong to the weight files, or name the format with quantization=",
    )


def detect_files(names: Iterable[str], read: Callable[[str], Mapping[str, Any]]) -> Detection:
    """Detect the format of a checkpoint.

    Args:
        names: the names of its files.
        read: returns the object of one of its JSON files.

    Raises:
        NpuQuantError: unreadable-file, or contradictory-evidence if config.json and a decisive file disagree.
    """
    names = frozenset(names)
    beside = file_beside(names)
    decisive = beside if beside is not None and beside[0].decisive else None
    model = read("config.json") if "config.json" in names else {}
    quantization = quantization_config(model)
    if quantization is not None:
        declaration = next((one for one in formats() if one.serves(quantization)), None)
        method = plain_method(quantization.get("quant_method"))
        if decisive is None or (declaration is decisive[0] and declaration.is_complete(quantization)):
            name = declaration.name if declaration is not None else method
            return Detection(name, "config.json", quantization, model=model)
        if declaration is not decisive[0]:
            raise NpuQuantError([contradiction(f"quantization_config of {method[:80]!r}", decisive)])
    if beside is None:
        return Detection("", "", {}, model=model)
    declaration, file = beside
    config = read(file)
    # Producers of one format write the file names of another, with their own quant_method.
    name = declaration.name if declaration.decisive else plain_method(config.get("quant_method")) or declaration.name
    asks = not (declaration.decisive or declaration.read_by_vllm)
    return Detection(name, file, config, asks=asks, model=model)
