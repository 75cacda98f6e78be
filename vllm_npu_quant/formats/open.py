# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to its format object: the one place where formats are constructed.

vLLM's config classes and the offline commands both come here, so that they cannot disagree about a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo, find_local
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity, nearest_names
from vllm_npu_quant.formats.base import FLOAT_ENTRY, ExpertsEntry, LayerEntry, QuantFormat
from vllm_npu_quant.formats.detect import Detection, detect_files

__all__ = ["FORMATS", "FloatFormat", "build_format", "describe_folder", "open_format"]

#: The formats that are served, and the quant_method values of config.json that stand for each.
FORMATS: dict[str, frozenset[str]] = {
    "modelslim": frozenset({"modelslim", "ascend"}),
    "compressed-tensors": frozenset({"compressed-tensors"}),
    "fp8": frozenset({"fp8"}),
    "awq": frozenset({"awq"}),
    "gptq": frozenset({"gptq"}),
    "auto-round": frozenset({"auto-round", "intel/auto-round"}),
}


@dataclass
class FloatFormat(QuantFormat):
    """A checkpoint that is not quantized.

    Attributes:
        layers: the names of its layers.
    """

    layers: frozenset[str] = field(default_factory=frozenset)

    name = "float"

    def find(self, layer: str) -> LayerEntry | None:
        return FLOAT_ENTRY if layer in self.layers else None

    def find_experts(self, layer: str) -> ExpertsEntry | None:
        return None

    def layer_names(self) -> Iterable[str]:
        return self.layers

    def stored_layers(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, LayerEntry]]:
        for layer in self.layers:
            yield layer, FLOAT_ENTRY


def build_format(
    name: str,
    config: Mapping[str, Any],
    checkpoint: Checkpoint | None = None,
    *,
    source: str = "config.json",
    beside: Mapping[str, Any] | None = None,
) -> QuantFormat:
    """The format object of a checkpoint. What is wrong is in its ``findings``.

    Args:
        name: a key of FORMATS.
        config: config.json's quantization_config; for modelslim, the description.
        checkpoint: the headers of its weight files, where they are known.
        source: the file that ``config`` is from.
        beside: for gptq, the object of quantize_config.json beside config.json, which is compared.

    Raises:
        NpuQuantError: unknown-scheme for a name that is not in FORMATS.
    """
    tensors = checkpoint.tensors if checkpoint is not None else None
    if name == "modelslim":
        from vllm_npu_quant.formats.modelslim import ModelSlimFormat

        return ModelSlimFormat.from_description(config, source, tensors)
    if name == "compressed-tensors":
        from vllm_npu_quant.formats.compressed_tensors import CompressedTensorsFormat

        return CompressedTensorsFormat.from_config(config, source, tensors)
    if name == "fp8":
        from vllm_npu_quant.formats.fp8 import Fp8Format

        return Fp8Format.from_config(config, source, tensors)
    if name == "awq":
        from vllm_npu_quant.formats.awq import AwqFormat

        return AwqFormat.from_config(config, source, tensors)
    if name == "gptq":
        from vllm_npu_quant.formats.gptq import GptqFormat, compare_files

        read = checkpoint.read if checkpoint is not None and checkpoint.has_values else None
        found = GptqFormat.from_config(config, source, tensors, read)
        if beside is not None:
            found.findings += tuple(compare_files(config, beside, (source, "quantize_config.json")))
        return found
    if name == "auto-round":
        from vllm_npu_quant.formats.auto_round import AutoRoundFormat

        return AutoRoundFormat.from_config(config, source, tensors)
    raise NpuQuantError(
        [
            Finding(
                "unknown-scheme",
                "this quantization format is not served",
                file=source,
                expected="one of " + ", ".join(FORMATS),
                found=f"quant_method: {name[:60]!r}",
                nearest=nearest_names(name[:60], FORMATS),
                fix="export the checkpoint with msModelSlim, llm-compressor, AutoRound, AutoAWQ or GPTQModel",
            )
        ]
    )


def served_name(method: str) -> str:
    """The key of FORMATS for a config.json's quant_method; the method itself where none serves it."""
    plain = method.lower().replace("_", "-")
    return next((name for name, methods in FORMATS.items() if plain in methods), plain)


def describe_folder(checkpoint: Checkpoint) -> Detection:
    """Which format a checkpoint says it has.

    Raises:
        NpuQuantError: unreadable-file, or contradictory-evidence.
    """
    return detect_files(checkpoint.names, checkpoint.read_json)


def open_format(model: str | os.PathLike[str], *, revision: str | None = None) -> tuple[QuantFormat, Checkpoint]:
    """The format and the headers of a local folder, or of a hub id in the local cache. Imports no torch.

    Raises:
        NpuQuantError: where there is no such folder, its config cannot be read, or its format is not known. What is wrong
            inside is in ``findings`` of the two.
    """
    folder = find_local(os.fspath(model), revision=revision)
    checkpoint = Checkpoint.open(folder if folder is not None else Path(model))
    return format_of(checkpoint, describe_folder(checkpoint)), checkpoint


def format_of(checkpoint: Checkpoint, detection: Detection) -> QuantFormat:
    """The format object of an opened checkpoint; errors as in ``build_format``."""
    if not detection.format:
        quantized = {
            name.rpartition(".")[0]: tensor for name, tensor in checkpoint.tensors.items() if _is_quantized(tensor)
        }
        layers = frozenset(name.rpartition(".")[0] for name in checkpoint.tensors) - quantized.keys()
        findings = [_not_an_object(key) for key in _not_objects(detection.model)]
        if quantized:
            first = next(iter(quantized.values()))
            findings.append(_undeclared(first.name, first.dtype, first.file))
        return FloatFormat(source="config.json", findings=tuple(findings), layers=layers)
    name = served_name(detection.format)
    beside = None
    if name == "gptq" and detection.file == "config.json" and "quantize_config.json" in checkpoint.names:
        beside = checkpoint.read_json("quantize_config.json")
    found = build_format(name, detection.config, checkpoint, source=detection.file, beside=beside)
    if detection.asks:
        found.findings += (
            Finding(
                "bad-config",
                f"config.json does not mention the quantization, so vLLM has to be told: quantization={name}",
                file=detection.file,
                fix=f"pass --quantization {name}, or copy {detection.file} into config.json as quantization_config",
                severity=Severity.INFO,
            ),
        )
    return found


def _is_quantized(tensor: TensorInfo) -> bool:
    """Whether a tensor is a weight in a dtype that only quantized checkpoints have."""
    last = tensor.name.rpartition(".")[2]
    if last == "weight":
        return tensor.dtype in ("I8", "U8", "I32") or tensor.dtype.startswith(("F8_", "F4"))
    return last in ("qweight", "weight_packed")


def _not_objects(model: Mapping[str, Any]) -> list[str]:
    """The fields of a config.json that describe a quantization, and are neither objects nor null."""
    keys = ("quantization_config", "compression_config")
    return [key for key in keys if model.get(key) is not None and not isinstance(model[key], Mapping)]


def _not_an_object(key: str) -> Finding:
    return Finding(
        "bad-config",
        f"{key} is not an object",
        file="config.json",
        expected='{"quant_method": ..., ...}',
        fix="copy the producer's config.json into the folder",
    )


def _undeclared(tensor: str, dtype: str, file: str) -> Finding:
    return Finding(
        "bad-config",
        "config.json names no quantization, and a weight is stored in a quantized dtype",
        layer=tensor.rpartition(".")[0],
        file=file,
        expected="quantization_config in config.json",
        found=f"{tensor} is {dtype}",
        fix="copy the producer's config.json, or its quantization_config, into the folder",
    )
