# SPDX-License-Identifier: Apache-2.0
"""Which format a checkpoint folder holds, and which file says so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_npu_quant.checkpoint import read_json
from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.formats.modelslim import is_description_file

__all__ = ["Detection", "description_name", "detect", "embedded_description", "quantization_config"]

_MAX_CONFIG_BYTES = 256 << 20

#: quant_method values under which msModelSlim's description is embedded in config.json.
MODELSLIM_METHODS = frozenset({"modelslim", "ascend", ""})


@dataclass(frozen=True)
class Detection:
    """What a folder is.

    Attributes:
        format: the format's name ("modelslim"), or "" for an unquantized checkpoint.
        file: the file that decided.
        config: that file's JSON object, or the part of it that describes the quantization.
    """

    format: str
    file: str
    config: Mapping[str, Any]


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


def detect(folder: str | os.PathLike[str]) -> Detection:
    """Find out what a checkpoint folder holds.

    Raises:
        NpuQuantError: unreadable-file, or contradictory-evidence where config.json and a description file disagree.
    """
    folder = Path(folder)
    description = description_name(path.name for path in folder.iterdir())
    config_file = folder / "config.json"
    config = read_json(config_file, max_bytes=_MAX_CONFIG_BYTES) if config_file.is_file() else {}
    quantization = quantization_config(config)
    if quantization is not None:
        method = str(quantization.get("quant_method") or "").lower().replace("_", "-")
        if embedded_description(quantization):
            listed = any(str(key).endswith(".weight") for key in quantization)
            if listed or description is None:
                return Detection("modelslim", "config.json", quantization)
        elif description is not None:
            raise NpuQuantError(
                [
                    Finding(
                        "contradictory-evidence",
                        "config.json and a ModelSlim description name two formats",
                        file=f"config.json, {description}",
                        expected="one of them",
                        found=f"quantization_config of {method!r} and {description}",
                        fix="remove the one that does not belong to the weight files",
                    )
                ]
            )
        else:
            return Detection(method, "config.json", quantization)
    if description is not None:
        return Detection("modelslim", description, read_json(folder / description, max_bytes=_MAX_CONFIG_BYTES))
    return Detection("", "", {})
