# SPDX-License-Identifier: Apache-2.0
"""config.json's sizes against the stored tensors: vLLM stops at a difference with an assertion or a shape error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_npu_quant.errors import Finding, Severity
from vllm_npu_quant.formats.common import FLOAT_DTYPES
from vllm_npu_quant.inspection.model import Model

__all__ = ["size_findings"]

#: Last components of the names of embeddings, and of the layers above them that have the model's width.
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in"})
_HEAD = "lm_head"
#: Components of the names of a multimodal model's other parts, which have sizes of their own.
_OTHER_PARTS = (
    "vision",
    "visual",
    "audio",
    "speech",
    "tts",
    "talker",
    "code",
    "image",
    "mtp",
    "draft",
    "encoder",
    "vq",
)


def size_findings(model: Model) -> list[Finding]:
    """Findings for a vocab_size or hidden_size of config.json that the embedding or the head contradicts.

    A size counts as declared if any field of its kind has it, so that embeddings of a width of their own (ALBERT, OPT) and
    second vocabularies pass.
    """
    found: list[Finding] = []
    rows, width = model.size("vocab_size"), model.size("hidden_size", "n_embd", "d_model")
    for name, shape, file in _tables(model):
        if found:
            break  # the others say the same
        if rows and shape[0] not in _declared(model, "vocab"):
            padded = shape[0] > rows
            found.append(
                Finding(
                    "wrong-shape",
                    "config.json's vocab_size is smaller than the stored table: some model classes drop the rest, the others "
                    "stop"
                    if padded
                    else "config.json's vocab_size is larger than the stored table",
                    layer=name,
                    file=file,
                    expected=f"{rows:,} rows (vocab_size)",
                    found=f"{shape[0]:,} rows",
                    fix="correct vocab_size in config.json, or copy the config.json that belongs to the weights",
                    severity=Severity.WARNING if padded else Severity.ERROR,
                )
            )
        if width and shape[1] not in _declared(model, "hidden", "embd", "embed", "d_model", "dim"):
            found.append(
                Finding(
                    "wrong-shape",
                    "config.json's hidden_size is not that of the stored table",
                    layer=name,
                    file=file,
                    expected=f"{width:,} columns (hidden_size)",
                    found=f"{shape[1]:,} columns",
                    fix="correct hidden_size in config.json, or copy the config.json that belongs to the weights",
                )
            )
    return found


def _tables(model: Model) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and file of the language model's float embedding and head."""
    for name, tensor in model.checkpoint.tensors.items():
        layer, _, last = name.rpartition(".")
        kind = layer.rpartition(".")[2]
        if last != "weight" or (kind not in _EMBEDDINGS and kind != _HEAD) or len(tensor.shape) != 2:
            continue
        if tensor.dtype not in FLOAT_DTYPES or any(part in layer for part in _OTHER_PARTS) or ".layers." in layer:
            continue
        if kind == _HEAD and model.tied_embeddings:
            continue  # it is not loaded
        yield layer, tensor.shape, tensor.file


def _declared(model: Model, *kinds: str) -> set[int]:
    """The sizes in the fields of config.json whose names contain one of these words."""
    holders: tuple[Mapping[str, Any], ...] = (model.config, model.text_config)
    return {
        value
        for holder in holders
        for key, value in holder.items()
        if type(value) is int and any(kind in key for kind in kinds)
    }
