# SPDX-License-Identifier: Apache-2.0
"""Which format a checkpoint folder holds, and which file says so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_npu_quant.checkpoint import read_json
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = [
    "Detection",
    "contradiction",
    "description_name",
    "detect",
    "detect_files",
    "embedded_description",
    "is_description_file",
    "quantization_config",
]

_MAX_CONFIG_BYTES = 256 << 20

#: Files that describe the quantization where config.json does not, and the format whose producers write them.
_BESIDE = {"quant_config.json": "awq", "quantize_config.json": "gptq"}

#: quant_method values under which msModelSlim's description is embedded in config.json.
MODELSLIM_METHODS = frozenset({"modelslim", "ascend", ""})


_DESCRIPTION = re.compile(r"quant_model_description(_[a-z0-9_]{1,40})?\.json")


def is_description_file(name: str) -> bool:
    """Whether a file name is one of the names that msModelSlim gives its description."""
    return _DESCRIPTION.fullmatch(name) is not None


@dataclass(frozen=True)
class Detection:
    """What a folder is.

    Attributes:
        format: the format's name ("modelslim"), or "" for an unquantized checkpoint.
        file: the file that decided.
        config: that file's JSON object, or the part of it that describes the quantization.
        asks: whether vLLM has to be told the format, since config.json does not mention it.
        model: the whole config.json; empty where there is none.
    """

    format: str
    file: str
    config: Mapping[str, Any]
    asks: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)


def description_name(names: Iterable[str]) -> str | None:
    """The one description file among these file names; None where there is none.

    Raises:
        NpuQuantError: contradictory-evidence where there are several: each would quantize the weights differently.
    """
    found = sorted(name for name in names if is_description_file(name))
    if len(found) > 1:
        raise NpuQuantError(
            [
                Finding(
                    "contradictory-evidence",
                    "the checkpoint holds several ModelSlim descriptions",
                    expected="one quant_model_description*.json",
                    found=", ".join(found),
                    fix="remove the descriptions that do not belong to the weight files",
                )
            ]
        )
    return found[0] if found else None


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization part of a config.json: its own, or that of its text model."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                value = holder.get(key)
                if isinstance(value, Mapping) and value:
                    return value
    return None


def embedded_description(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is msModelSlim's description itself."""
    method = str(config.get("quant_method") or "").lower()
    if method not in MODELSLIM_METHODS:
        return False
    return method != "" or any(str(key).endswith(".weight") for key in config)


def contradiction(other: str, description: str, *, fix: str = "") -> Finding:
    """The finding for a checkpoint with a ModelSlim description that something else contradicts.

    Args:
        other: what names another format.
        description: the description's file name.
    """
    return Finding(
        "contradictory-evidence",
        f"this is a ModelSlim checkpoint by its {description}, and another format by its {other}"[:400],
        file=f"config.json, {description}",
        expected="one format",
        found=f"{other} and {description}"[:400],
        fix=fix or "remove the one that does not belong to the weight files, or name the format with quantization=",
    )


def detect(folder: str | os.PathLike[str]) -> Detection:
    """Find out what a checkpoint folder holds.

    Raises:
        NpuQuantError: unreadable-file, or contradictory-evidence where config.json and a description file disagree.
    """
    folder = Path(folder)
    return detect_files(
        [path.name for path in folder.iterdir()], lambda name: read_json(folder / name, max_bytes=_MAX_CONFIG_BYTES)
    )


def detect_files(names: Iterable[str], read: Callable[[str], Mapping[str, Any]]) -> Detection:
    """The same for files that are reached another way: ``names`` are the folder's, ``read`` gives a JSON file's object."""
    names = frozenset(names)
    description = description_name(names)
    model = read("config.json") if "config.json" in names else {}
    quantization = quantization_config(model)
    if quantization is not None:
        method = str(quantization.get("quant_method") or "").lower().replace("_", "-")
        if embedded_description(quantization):
            listed = any(str(key).endswith(".weight") for key in quantization)
            if listed or description is None:
                return Detection("modelslim", "config.json", quantization, model=model)
        elif description is not None:
            raise NpuQuantError([contradiction(f"quantization_config of {method[:80]!r}", description)])
        else:
            return Detection(method, "config.json", quantization, model=model)
    if description is not None:
        return Detection("modelslim", description, read(description), model=model)
    for name, method in _BESIDE.items():
        if name in names:
            config = read(name)
            return Detection(str(config.get("quant_method") or method).lower(), name, config, asks=True, model=model)
    return Detection("", "", {}, model=model)
