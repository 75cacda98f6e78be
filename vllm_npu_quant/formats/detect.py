# SPDX-License-Identifier: Apache-2.0
"""Detection of a checkpoint's format, and of the file that describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_npu_quant.checkpoint.text import shown, shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.formats.declaration import Format, formats, plain_method
from vllm_npu_quant.formats.foreign import foreign_file

__all__ = ["Detection", "contradiction", "detect_files", "file_beside", "quantization_part"]

#: Parts of a config.json that may hold the quantization of the language model; vLLM looks at the first two.
_HOLDERS = ((), ("text_config",), ("llm_config",), ("language_config",), ("thinker_config",))
_HOLDERS_OF_VLLM = _HOLDERS[:2]
_KEYS = ("quantization_config", "compression_config")

#: Mistral's own config, which describes consolidated*.safetensors.
MISTRAL_CONFIG = "params.json"


@dataclass(frozen=True)
class Detection:
    """The detected format of a folder.

    Attributes:
        format: the format's name, or a ``quant_method`` that no format has; "" if no config names a format.
        file: the file that decided.
        config: that file's JSON object, or the part of it that describes the quantization; with the format "", a
            ``quantization_config`` that does not say of which format it is.
        asks: whether the user has to name the format to vLLM, since config.json does not where vLLM looks.
        model: the whole config.json; empty if there is none.
        rival: what a file of another format says, if only the weight files can tell which of the two is right.
    """

    format: str
    file: str
    config: Mapping[str, Any]
    asks: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    rival: Detection | None = None


def quantization_part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool] | None:
    """The quantization part of a config.json, its own or that of its language model, and whether vLLM looks there."""
    for path in _HOLDERS:
        for holder in (_part(config, path), _part(config, (*path, "text_config"))):
            for key in _KEYS:
                value = holder.get(key)
                if isinstance(value, Mapping) and value:
                    return value, path in _HOLDERS_OF_VLLM
    return None


def _part(config: Mapping[str, Any], path: Iterable[str]) -> Mapping[str, Any]:
    for key in path:
        value = config.get(key)
        config = value if isinstance(value, Mapping) else {}
    return config


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
        NpuQuantError: unreadable-file, also for a folder that holds an adapter; contradictory-evidence if there are several
            files of one format.
    """
    names = frozenset(names)
    _refuse_adapter(names, read)
    beside = file_beside(names)
    decisive = beside if beside is not None and beside[0].decisive else None
    model = read("config.json") if "config.json" in names else {}
    part = quantization_part(model)
    named = None
    if part is not None:
        quantization, seen = part
        declaration = next((one for one in formats() if one.serves(quantization)), None)
        # A format that is only recognized by its fields has to be named to a vLLM without this plugin, not to this one.
        name = declaration.name if declaration is not None else plain_method(quantization.get("quant_method"))
        named = Detection(name, "config.json", quantization, asks=not seen, model=model)
        complete = declaration is not None and declaration.is_complete(quantization)
        if decisive is None and name:
            return named
        if decisive is not None and declaration is decisive[0] and complete:
            return named
    if beside is not None:
        declaration, file = beside
        config = read(file)
        # Producers of one format write the file names of another, with their own quant_method.
        name = (
            declaration.name if declaration.decisive else plain_method(config.get("quant_method")) or declaration.name
        )
        rival = named if named is not None and named.format not in ("", name) else None
        asks = not (declaration.decisive or declaration.read_by_vllm)
        return Detection(name, file, config, asks=asks, model=model, rival=rival)
    return named or _foreign_beside(names, read, model)


def _foreign_beside(
    names: frozenset[str], read: Callable[[str], Mapping[str, Any]], model: Mapping[str, Any]
) -> Detection:
    """The detection of a checkpoint whose config.json names no quantization, by files of formats that are not served."""
    file = foreign_file(names)
    if file is not None:
        config = read(file)
        return Detection(plain_method(config.get("quant_method")) or file, file, config, model=model)
    if MISTRAL_CONFIG in names and "config.json" not in names:
        quantization = read(MISTRAL_CONFIG).get("quantization")
        if isinstance(quantization, Mapping) and quantization:
            return Detection("mistral", MISTRAL_CONFIG, {**quantization, "quant_method": "mistral"})
    quantization = model.get("quantization")  # MLX's key
    if isinstance(quantization, Mapping) and quantization:
        return Detection("", "config.json", quantization, model=model)
    return Detection("", "", {}, model=model)


def _refuse_adapter(names: frozenset[str], read: Callable[[str], Mapping[str, Any]]) -> None:
    """Refuse a folder that holds an adapter (LoRA) and no model.

    Raises:
        NpuQuantError: unreadable-file.
    """
    if "adapter_config.json" not in names or not {"config.json", MISTRAL_CONFIG}.isdisjoint(names):
        return
    config = read("adapter_config.json")
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    model = shown_name(base) if isinstance(base, str) and base else "the model that it was trained on"
    raise NpuQuantError(
        [
            Finding(
                "unreadable-file",
                "the folder holds an adapter (LoRA), not a model",
                file="adapter_config.json",
                expected="config.json and the weights of a model",
                found=f"peft_type: {shown(kind)}, base_model_name_or_path: {shown(base)}",
                fix=f"serve {model}, and pass this folder with --enable-lora --lora-modules NAME=FOLDER; or merge the two",
            )
        ]
    )
