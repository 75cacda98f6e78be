# SPDX-License-Identifier: Apache-2.0
"""Description of a checkpoint's layers, for vLLM's config classes and the offline commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.errors import Finding, Severity
from vllm_npu_quant.formats.declaration import require_format
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described
from vllm_npu_quant.formats.detect import Detection, detect_files

__all__ = ["describe_checkpoint", "detect_checkpoint"]


def detect_checkpoint(checkpoint: Checkpoint) -> Detection:
    """Detect the format of a checkpoint.

    Raises:
        NpuQuantError: unreadable-file, or contradictory-evidence.
    """
    return detect_files(checkpoint.names, checkpoint.read_json)


def describe_checkpoint(checkpoint: Checkpoint, detection: Detection) -> Described:
    """The layers of an opened checkpoint. Problems are in its ``findings``.

    Raises:
        NpuQuantError: unknown-scheme for a format that is not served.
    """
    if not detection.format:
        return _describe_float(checkpoint, detection)
    declaration = require_format(detection.format, detection.file)
    described = declaration.read(detection.config, checkpoint.tensors, detection.file, checkpoint)
    if detection.asks:
        name = declaration.name
        described.findings += (
            Finding(
                "bad-config",
                f"config.json does not mention the quantization, so vLLM has to be told: quantization={name}",
                file=detection.file,
                fix=f"pass --quantization {name}, or copy {detection.file} into config.json as quantization_config",
                severity=Severity.INFO,
            ),
        )
    return described


def _describe_float(checkpoint: Checkpoint, detection: Detection) -> Described:
    """A checkpoint whose configs name no quantization."""
    quantized = {
        name.rpartition(".")[0]: tensor for name, tensor in checkpoint.tensors.items() if _is_quantized(tensor)
    }
    layers = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.tensors)
    findings = [_not_an_object(key) for key in _not_objects(detection.model)]
    if quantized:
        findings.append(_undeclared(next(iter(quantized.values()))))
    return Described(
        format="float",
        source="config.json",
        layers={layer: FLOAT_ENTRY for layer in layers if layer not in quantized},
        findings=tuple(findings),
    )


def _is_quantized(tensor: TensorInfo) -> bool:
    """Whether a tensor is a weight in a dtype that only quantized checkpoints have."""
    last = tensor.name.rpartition(".")[2]
    if last == "weight":
        return tensor.dtype in ("I8", "U8", "I32") or tensor.dtype.startswith(("F8_", "F4"))
    return last in ("qweight", "weight_packed")


def _not_objects(model: Mapping[str, Any]) -> Iterable[str]:
    """The fields of a config.json that describe a quantization and are neither objects nor null."""
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


def _undeclared(tensor: TensorInfo) -> Finding:
    return Finding(
        "bad-config",
        "config.json names no quantization, and a weight is stored in a quantized dtype",
        layer=tensor.name.rpartition(".")[0],
        file=tensor.file,
        expected="quantization_config in config.json",
        found=f"{tensor.name} is {tensor.dtype}",
        fix="copy the producer's config.json, or its quantization_config, into the folder",
    )
