# SPDX-License-Identifier: Apache-2.0
"""Description of a checkpoint's layers, for vLLM's config classes and the offline commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.checkpoint.text import shown, shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.common import FLOAT_DTYPES, is_quantized_weight
from vllm_npu_quant.formats.declaration import find_format
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described
from vllm_npu_quant.formats.detect import Detection, contradiction, detect_files, file_beside
from vllm_npu_quant.formats.foreign import find_by_tensors, unserved, unserved_tensor
from vllm_npu_quant.formats.leftovers import refuse_leftovers
from vllm_npu_quant.formats.names import repeated_prefix

__all__ = ["describe_checkpoint", "detect_checkpoint"]


def detect_checkpoint(checkpoint: Checkpoint) -> Detection:
    """Detect the format of a checkpoint, by its headers where its files contradict each other.

    Raises:
        NpuQuantError: unreadable-file, or contradictory-evidence.
    """
    detection = detect_files(checkpoint.names, checkpoint.read_json)
    return detection if detection.rival is None else _decide(checkpoint, detection, detection.rival)


def _decide(checkpoint: Checkpoint, beside: Detection, named: Detection) -> Detection:
    """Decide between a file beside config.json and config.json's own part: the one that fits all stored tensors.

    Raises:
        NpuQuantError: contradictory-evidence if both fit, or none does.
    """
    fitting = [one for one in (beside, named) if _fits(checkpoint, one)]
    if len(fitting) == 1:
        loser = named if fitting[0] is beside else beside
        return replace(fitting[0], rival=loser)
    found = file_beside(checkpoint.names)
    what = f"quantization_config of {shown(named.config.get('quant_method') or named.format)}"
    raise NpuQuantError([contradiction(what, found)] if found is not None else [])


def _fits(checkpoint: Checkpoint, detection: Detection) -> bool:
    """Whether a format reads a checkpoint without errors, and finds quantized layers."""
    declaration = find_format(detection.format)
    if declaration is None:
        return False
    described = declaration.read(detection.config, checkpoint.tensors, detection.file, checkpoint)
    findings = (*described.findings, *check_checkpoint(described, checkpoint))
    return described.is_quantized and not any(finding.severity is Severity.ERROR for finding in findings)


def describe_checkpoint(checkpoint: Checkpoint, detection: Detection) -> Described:
    """The layers of an opened checkpoint. Problems are in its ``findings``.

    Raises:
        NpuQuantError: unknown-scheme or unsupported-scheme for a format that is not served; index-mismatch or
            duplicate-tensor for a folder that holds two sets of weights.
    """
    if not detection.format:
        return _describe_float(checkpoint, detection)
    declaration = find_format(detection.format)
    if declaration is None:
        raise NpuQuantError([unserved(detection.config, detection.file)])
    refuse_leftovers(checkpoint, detection.file)
    described = declaration.read(detection.config, checkpoint.tensors, detection.file, checkpoint)
    if any(finding.severity is Severity.ERROR for finding in described.findings):
        foreign = find_by_tensors(checkpoint.tensors)
        if foreign is not None:  # what the format's reader says of these tensors misleads
            raise NpuQuantError([unserved_tensor(*foreign, checkpoint.tensors)])
    described.findings += tuple(_notes(checkpoint, detection, described))
    return described


def _notes(checkpoint: Checkpoint, detection: Detection, described: Described) -> Iterable[Finding]:
    """Findings about the checkpoint as a whole."""
    if detection.rival is not None:
        yield _leftover(detection, detection.rival)
    if detection.asks:
        yield _asks(described.format, detection)
    if described.stored_as_float and not described.is_quantized:
        yield Finding(
            "bad-config",
            "the config names a quantization, and no weight is stored quantized: the whole model is float, and runs as float",
            file=detection.file,
            expected="weights that the producer has converted",
            found=f"{len(described.stored_as_float):,} float layers, such as {shown_name(min(described.stored_as_float))}",
            fix="export the checkpoint again with its weights converted, or remove the quantization config",
            severity=Severity.WARNING,
        )
    repeated = repeated_prefix(checkpoint.tensors)
    if repeated is not None:
        yield repeated


def _leftover(detection: Detection, rival: Detection) -> Finding:
    method = shown(rival.config.get("quant_method") or rival.format)
    what = f"quantization_config ({method})" if rival.file == "config.json" else rival.file
    return Finding(
        "contradictory-evidence",
        f"{what} does not fit the weight files and is not used; {detection.file} does",
        file=rival.file,
        expected="one format",
        found=f"{detection.format} by {detection.file}",
        fix=f"remove {what}{' from config.json' if rival.file == 'config.json' else ''}: it was left over",
        severity=Severity.WARNING,
    )


def _asks(name: str, detection: Detection) -> Finding:
    where = "where vLLM looks for it" if detection.file == "config.json" else ""
    copy = "move quantization_config to the top of config.json"
    if detection.file != "config.json":
        copy = f"copy {detection.file} into config.json as quantization_config"
    return Finding(
        "bad-config",
        f"config.json does not mention the quantization{' ' if where else ''}{where}, so vLLM has to be told: "
        f"quantization={name}",
        file=detection.file,
        fix=f"pass --quantization {name}, or {copy}",
        severity=Severity.INFO,
    )


def _describe_float(checkpoint: Checkpoint, detection: Detection) -> Described:
    """A checkpoint whose configs name no format."""
    quantized = {
        name.rpartition(".")[0]: tensor
        for name, tensor in checkpoint.tensors.items()
        if is_quantized_weight(name, tensor)
    }
    layers = dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.tensors)
    findings = [_not_an_object(key) for key in _not_objects(detection.model)]
    foreign = find_by_tensors(checkpoint.tensors)
    if foreign is not None and (quantized or checkpoint.tensors[foreign[1]].dtype not in FLOAT_DTYPES):
        findings.append(unserved_tensor(*foreign, checkpoint.tensors))
    elif quantized:
        findings.append(_undeclared(next(iter(quantized.values())), detection.config))
    elif detection.config:
        findings.append(_no_method(detection.config))
    repeated = repeated_prefix(checkpoint.tensors)
    return Described(
        format="float",
        source="config.json",
        layers={layer: FLOAT_ENTRY for layer in layers if layer not in quantized},
        findings=(*findings, *([repeated] if repeated is not None else [])),
    )


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


def _undeclared(tensor: TensorInfo, config: Mapping[str, Any]) -> Finding:
    """The finding for quantized weights that no config describes, or one that does not say of which format it is."""
    missing = "config.json names no quantization"
    fix = "copy the producer's config.json, or its quantization_config, into the folder"
    if config:
        missing = "the quantization config has no quant_method"
        fix = 'add "quant_method" to it ("gptq", "awq", ...), as the producer\'s tool writes it, or pass --quantization'
    return Finding(
        "bad-config",
        f"{missing}, and a weight is stored in a quantized dtype",
        layer=tensor.name.rpartition(".")[0],
        file=tensor.file,
        expected="quantization_config in config.json, with a quant_method",
        found=f"{tensor.name} is {tensor.dtype}",
        fix=fix,
    )


def _no_method(config: Mapping[str, Any]) -> Finding:
    """The finding for a quantization_config without a quant_method over float weights."""
    return Finding(
        "bad-config",
        "the quantization config has no quant_method, and the weights are float: they run as float",
        file="config.json",
        found=", ".join(shown(key, 40) for key in list(config)[:6]),
        fix="remove it, or copy the producer's weights into the folder",
        severity=Severity.WARNING,
    )
