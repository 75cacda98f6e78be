# SPDX-License-Identifier: Apache-2.0
"""``inspect``: summary of a checkpoint and of its layers as they are served."""

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
    """The result of ``inspect``.

    Attributes:
        model: the name given by the user.
        architecture: the model class in config.json.
        dtype: the dtype in config.json.
        format: the quantization format; "" for a float checkpoint.
        decided_by: the file that determines the format.
        producer: the producer and its version, if a file names them.
        files: number of weight files.
        nbytes: bytes of all tensors.
        tensors: number of tensors.
        schemes: layers grouped by kind and scheme.
        layers: every layer.
        ignored: names of weight files that vLLM would not load, and the reason.
        errors, warnings: number of findings about config and files; ``check`` returns them.
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
    """Summarize a checkpoint from its config files and the headers of its weight files.

    Args:
        model: a folder, a hub id, or an opened model.
        revision: branch, tag or commit of a hub id.
        follow_links: whether to follow links out of the folder; otherwise they are findings.

    Raises:
        NpuQuantError: the checkpoint cannot be read, or its format is not known.
    """
    opened = model if isinstance(model, Model) else open_model(model, revision=revision, follow_links=follow_links)
    described = opened.require_described()
    if not opened.checkpoint.files:
        raise NpuQuantError(opened.checkpoint.findings)
    findings = [*opened.findings, *described.findings, *check_checkpoint(described, opened.checkpoint)]
    layers = layers_of(opened)
    architectures = opened.config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return Overview(
        model=opened.name,
        architecture=first[:80] if isinstance(first, str) else "",
        dtype=dtype_of(opened),
        format="" if described.format == "float" else described.format,
        decided_by="" if opened.detection is None else opened.detection.file,
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
    """The dtype in config.json ("bfloat16"); empty if there is none."""
    for config in (model.text_config, model.config):
        for key in ("dtype", "torch_dtype"):
            value = config.get(key)
            if isinstance(value, str) and value:
                return value.removeprefix("torch.")[:20]
    return ""


def producer_of(model: Model) -> str:
    """The producer and its version, if a file names them; else empty."""
    detection = model.detection
    declaration = find_format(model.described.format) if model.described is not None else None
    return declaration.producer(detection.config) if declaration is not None and detection is not None else ""
