# SPDX-License-Identifier: Apache-2.0
"""Folders that hold the weight files of two checkpoints: vLLM would load the wrong ones, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.checkpoint.text import shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.formats.common import is_quantized_weight
from vllm_npu_quant.formats.described import StoredTensor

__all__ = ["is_consolidated", "refuse_leftovers"]


def refuse_leftovers(checkpoint: Checkpoint, source: str) -> None:
    """Refuse a quantized checkpoint beside whose files others lie that vLLM loads instead or as well.

    Args:
        checkpoint: the opened checkpoint.
        source: the file that describes the quantization.

    Raises:
        NpuQuantError: index-mismatch or duplicate-tensor, with the files to remove.
    """
    finding = _consolidated(checkpoint, source) or _not_in_the_index(checkpoint) or _loaded_twice(checkpoint)
    if finding is not None:
        # Those of this code tell parts of the same fault.
        checkpoint.findings = tuple(one for one in checkpoint.findings if one.code != finding.code)
        raise NpuQuantError([finding])


def _consolidated(checkpoint: Checkpoint, source: str) -> Finding | None:
    """The finding for Mistral's consolidated files, which vLLM prefers, beside the set that the config describes."""
    first = next(filter(is_consolidated, checkpoint.files), None)
    others = [name for name in checkpoint.ignored if name.endswith(".safetensors") and not is_consolidated(name)]
    if first is None or not others:
        return None
    index = next((name for name in checkpoint.indexes if name.startswith("model.")), None)
    theirs = [name for name in checkpoint.names if name.startswith("consolidated") or name == "params.json"]
    return Finding(
        "duplicate-tensor",
        f"the folder holds two sets of weights; vLLM loads Mistral's consolidated*.safetensors, and {source} describes the "
        "Hugging Face set",
        file=shown_name(first),
        expected="the files that the quantization config describes",
        found=f"also {_listed(others)}",
        fix=f"to serve the Hugging Face set, remove {_listed(theirs)}"
        # Without an index vLLM would load the files of both.
        + ("; or start vLLM with --load-format safetensors --config-format hf" if index is not None else ""),
    )


def is_consolidated(name: str) -> bool:
    """Whether a file is one of Mistral's, which vLLM prefers."""
    return name.startswith("consolidated") and name.endswith(".safetensors")


def _not_in_the_index(checkpoint: Checkpoint) -> Finding | None:
    """The finding for quantized files that the index of a float model leaves out."""
    if _holds_quantized(checkpoint.tensors):
        return None
    left_out = [name for name in checkpoint.ignored if name.endswith(".safetensors") and name not in checkpoint.leaving]
    quantized = [name for name in left_out if _holds_quantized(checkpoint.header(name).tensors)]
    if not quantized:
        return None
    index = next((name for name in checkpoint.indexes if name.startswith("model.")), "the index")
    return Finding(
        "index-mismatch",
        f"{shown_name(index)} names the files of a float model, which vLLM loads; the quantized weights beside them are "
        "left out",
        file=shown_name(index),
        expected=f"quantized weights: {_listed(quantized)}",
        found=f"float weights: {_listed(checkpoint.files)}",
        fix=f"remove the float model's files: {_listed([index, *checkpoint.files])}",
    )


def _loaded_twice(checkpoint: Checkpoint) -> Finding | None:
    """The finding for files of a float model that hold tensors of the quantized files beside them, without an index."""
    if not any(finding.code == "duplicate-tensor" for finding in checkpoint.findings):
        return None
    headers = {name: checkpoint.header(name).tensors for name in checkpoint.files if name not in checkpoint.leaving}
    quantized = {name: tensors for name, tensors in headers.items() if _holds_quantized(tensors)}
    names = {tensor for tensors in quantized.values() for tensor in tensors}
    floats = [name for name in headers if name not in quantized and not names.isdisjoint(headers[name])]
    if not quantized or not floats:
        return None
    return Finding(
        "duplicate-tensor",
        "the folder holds the files of a float model and quantized ones, and vLLM would load both",
        file=_listed(floats),
        expected=f"quantized weights only: {_listed(quantized)}",
        found=f"float weights: {_listed(floats)}",
        fix=f"remove the float model's files: {_listed(floats)}",
    )


def _holds_quantized(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(is_quantized_weight(name, tensor) for name, tensor in tensors.items())


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(shown_name, names[:8])) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
