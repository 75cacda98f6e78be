# SPDX-License-Identifier: Apache-2.0
"""A model by its folder or its hub id: the config files and the headers of the weight files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_npu_quant.checkpoint import Checkpoint, open_checkpoint
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.detect import Detection
from vllm_npu_quant.formats.open import describe_checkpoint, detect_checkpoint
from vllm_npu_quant.serving.decide import Host

__all__ = ["Model", "open_model"]


@dataclass
class Model:
    """An opened model.

    Attributes:
        name: as the user named it.
        checkpoint: the weight files' headers.
        detection: which format, and which file says so; None where that could not be found out.
        described: its layers; None likewise.
        findings: what kept the format from being found out.
    """

    name: str
    checkpoint: Checkpoint
    detection: Detection | None = None
    described: Described | None = None
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json; empty where there is none."""
        return self.detection.model if self.detection is not None else {}

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the language model."""
        for key in ("text_config", "llm_config", "language_config"):
            value = self.config.get(key)
            if isinstance(value, Mapping) and value:
                return value
        thinker = self.config.get("thinker_config")
        if isinstance(thinker, Mapping) and isinstance(thinker.get("text_config"), Mapping):
            return thinker["text_config"]
        return self.config

    def size(self, *names: str) -> int:
        """A positive integer of the language model's config under any of these names; 0 where there is none."""
        for name in names:
            value = self.text_config.get(name)
            if type(value) is int and 0 < value < 1 << 40:
                return value
        return 0

    @property
    def tied_embeddings(self) -> bool:
        """Whether the language model's head is its embedding."""
        return True in (self.config.get("tie_word_embeddings"), self.text_config.get("tie_word_embeddings"))

    @cached_property
    def host(self) -> Host:
        """The facts of the serving decision besides the layers: settings, read once, and the kind of attention."""
        return Host.read(latent_attention=bool(self.size("kv_lora_rank")))

    def require_described(self) -> Described:
        """The format.

        Raises:
            NpuQuantError: what kept it from being found out.
        """
        if self.described is None:
            raise NpuQuantError(self.findings)
        return self.described


def open_model(model: str | os.PathLike[str], *, revision: str | None = None, follow_links: bool = False) -> Model:
    """Open a folder, or a model of a hub: its config files and the headers of its weight files, no weight.

    A hub's files are taken from the local cache where they are all there; else configs are downloaded to the cache and
    headers are read by range requests.

    Args:
        model: a folder or a hub id.
        revision: branch, tag or commit of a hub id.
        follow_links: whether links that lead out of the folder are followed; else they are findings.

    Raises:
        NpuQuantError: unreadable-file, where there is no such folder and no such model. Everything else is in ``findings``.
    """
    name = os.fspath(model)
    if not name:
        finding = Finding("unreadable-file", "the model has no name", fix="name a folder, or a model of the hub")
        raise NpuQuantError([finding])
    checkpoint = open_checkpoint(name, revision=revision, follow_links=follow_links)
    opened = Model(name, checkpoint)
    try:
        opened.detection = detect_checkpoint(checkpoint)
        opened.described = describe_checkpoint(checkpoint, opened.detection)
    except NpuQuantError as error:
        opened.findings = error.findings
    if opened.described is not None and "config.json" not in checkpoint.names and not checkpoint.findings:
        opened.findings += (
            Finding(
                "unreadable-file",
                "the folder has no config.json, which vLLM needs",
                file="config.json",
                expected="config.json beside the weights",
                fix="copy it from the model that the checkpoint was made from",
                severity=Severity.WARNING,
            ),
        )
    return opened
