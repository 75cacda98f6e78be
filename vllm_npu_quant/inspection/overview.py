# SPDX-License-Identifier: Apache-2.0
"""``inspect``: what a checkpoint is, and what each of its layers becomes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_npu_quant.errors import NpuQuantError, Severity
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.declaration import find_format
from vllm_npu_quant.inspection.layers import Layer, Scheme, layers_of, schemes_of
from vllm_npu_quant.inspection.model import Model, open_model

__all__ = ["Overview", "inspect"]


@dataclass(frozen=True)
class Overview:
    """What a checkpoint is.

    Attributes:
        model: as the user named it.
        architecture: the model class that config.json names.
        dtype: the dtype that config.json names.
        format: the quantization format, "" for a float checkpoint. decided_by: the file that says so.
        producer: the tool that made the checkpoint and its version, where a file says it.
        files: number of weight files. nbytes: bytes of all tensors. tensors: number of tensors.
        schemes: layers by kind and scheme.
        layers: every layer.
        ignored: names of files with weights that vLLM would not load, and why.
        errors, warnings: findings about config and files; ``check`` tells them.
    """

    model: str
    architecture: str
    dtype: str
    format: str
    decided_by: str
    producer: str
    files: int
    nbytes: int
    tensors: int
    schemes: tuple[Scheme, ...]
    layers: tuple[Layer, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    errors: int = 0
    warnings: int = 0


def inspect(
    model: str | os.PathLike[str] | Model, *, revision: str | None = None, follow_links: bool = False
) -> Overview:
    """What a checkpoint is, from its config files and the headers of its weight files.

    Args:
        model: a folder, a hub id, or an opened model.
        revision: branch, tag or commit of a hub id.
        follow_links: whether links that lead out of the folder are followed; else they are findings.

    Raises:
        NpuQuantError: where the checkpoint cannot be read, or its format is not known.
    """
    opened = model if isinstance(model, Model) else open_model(model, revision=revision, follow_links=follow_links)
    described = opened.require_described()
    if not opened.checkpoint.files:
        raise NpuQuantError(opened.checkpoint.findings)
    findings = [*opened.findings, *described.findings, *check_checkpoint(described, opened.checkpoint)]
    layers = layers_of(opened)
    architectures = opened.config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    detection = opened.detection
    assert detection is not None
    return Overview(
        model=opened.name,
        architecture=first[:80] if isinstance(first, str) else "",
        dtype=dtype_of(opened),
        format="" if described.format == "float" else described.format,
        decided_by=detection.file,
        producer=producer_of(opened),
        files=len(opened.checkpoint.files),
        nbytes=opened.checkpoint.total_bytes,
        tensors=len(opened.checkpoint.tensors),
        schemes=tuple(schemes_of(layers)),
        layers=tuple(layers),
        ignored=dict(opened.checkpoint.ignored),
        errors=sum(finding.severity is Severity.ERROR for finding in findings),
        warnings=sum(finding.severity is Severity.WARNING for finding in findings),
    )


def dtype_of(model: Model) -> str:
    """The dtype that config.json names ("bfloat16"); empty where it names none."""
    for config in (model.text_config, model.config):
        for key in ("dtype", "torch_dtype"):
            value = config.get(key)
            if isinstance(value, str) and value:
                return value.removeprefix("torch.")[:20]
    return ""


def producer_of(model: Model) -> str:
    """The tool that made the checkpoint, and its version, where a file says it."""
    detection = model.detection
    declaration = find_format(model.described.format) if model.described is not None else None
    return declaration.producer(detection.config) if declaration is not None and detection is not None else ""
