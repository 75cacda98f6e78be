# SPDX-License-Identifier: Apache-2.0
"""Experts that are stored in tensors of all experts of a MoE layer: [E, ...].

Float ones are vLLM's business. Quantized ones are served where each expert's part is a tensor of a known layout. That holds
for FP8 weights ``gate_up_proj`` and ``down_proj`` with their scales (Qwen3-VL-MoE, Llama-4): gate and up are the two halves
of the outputs, and the weights have inputs before outputs, or outputs before inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.check import check_layer
from vllm_npu_quant.formats.common import FLOAT_DTYPES
from vllm_npu_quant.formats.described import ExpertsEntry, LayerEntry, StoredTensor
from vllm_npu_quant.formats.experts import EXPERT_NAMES
from vllm_npu_quant.layouts.tables import rows_per_scale_of

__all__ = ["STACKED_TENSORS", "Part", "expert_parts", "is_quantized", "stacked_entry", "stacked_finding", "stacked_in"]

#: Names of one projection of all experts of a MoE layer: a layer's, or the beginning of a tensor's.
_PROJECTIONS = ("gate_up_proj", "input_linear", "output_linear", "w13", *EXPERT_NAMES[0], *EXPERT_NAMES[1])

#: The served stacked tensors, named below the MoE layer: their projection, and the name of one expert's part.
STACKED_TENSORS = {
    projection + suffix: (projection, name)
    for projection in ("gate_up_proj", "down_proj")
    for suffix, name in {"": "weight", "_scale": "weight_scale", "_scale_inv": "weight_scale_inv"}.items()
}


@dataclass(frozen=True)
class Part:
    """The header of one expert's part of a stacked tensor, as if it were stored by itself: [outputs, inputs]."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def stacked_in(layer: str, tensors: Mapping[str, StoredTensor]) -> str:
    """The MoE layer whose experts' tensors a stored layer holds, one expert after the other. Empty if it has none.

    Args:
        layer: its name: "model.layers.3.mlp.experts" (gate_up_proj) or "model.layers.3.moe.gate_proj" (weight).
        tensors: its tensors by the last component of their names.
    """
    parent, _, last = layer.rpartition(".")
    if last in _PROJECTIONS:
        weight = tensors.get("weight") or tensors.get("weight_packed") or tensors.get("qweight")
        if weight is not None and len(weight.shape) == 3 and _of_all_experts(tensors, weight.shape[0]):
            return parent if parent.endswith(".experts") else f"{parent}.experts"
    elif last == "experts" and any(len(tensors[name].shape) > 2 for name in tensors if name.startswith(_PROJECTIONS)):
        return layer
    return ""


def _of_all_experts(tensors: Mapping[str, StoredTensor], count: int) -> bool:
    """Whether each tensor has a part for every expert."""
    return all(tensor.shape[:1] == (count,) for tensor in tensors.values())


def is_quantized(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether stacked tensors are quantized: by their dtypes, or by a scale among them."""
    return any(tensor.dtype not in FLOAT_DTYPES or "scale" in name for name, tensor in tensors.items())


def expert_parts(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, Part]]:
    """The headers of one expert's tensors: projection -> name -> header. Empty where they are not parts of the stored ones.

    Args:
        tensors: the stored tensors, named below the MoE layer.
    """
    both, down = tensors.get("gate_up_proj"), tensors.get("down_proj")
    shapes = {(len(tensor.shape), *tensor.shape[:1]) for tensor in tensors.values()}
    if both is None or down is None or not tensors.keys() <= STACKED_TENSORS.keys() or shapes != {(3, both.shape[0])}:
        return {}
    # Only one of the two can hold.
    inputs_first = both.shape[1:] == (down.shape[2], 2 * down.shape[1])
    if not inputs_first and both.shape[1:] != (2 * down.shape[2], down.shape[1]):
        return {}
    parts: dict[str, dict[str, Part]] = {name: {} for name in EXPERT_NAMES[0]}
    for stored, tensor in tensors.items():
        projection, name = STACKED_TENSORS[stored]
        outputs, inputs = tensor.shape[:0:-1] if inputs_first else tensor.shape[1:]
        if projection == "gate_up_proj" and outputs % 2:
            return {}
        for part in ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",):
            rows = outputs if part == "down_proj" else outputs // 2
            parts[part][name] = Part(tensor.dtype, (rows, inputs), tensor.file)
    return parts


def stacked_entry(
    layer: str,
    tensors: Mapping[str, StoredTensor],
    decide: Callable[[str, Mapping[str, StoredTensor]], LayerEntry | None],
    source: str,
) -> tuple[ExpertsEntry | None, list[Finding]]:
    """The entry of a MoE layer with stacked experts, and findings about their tensors; None if they are not served.

    Args:
        layer: the MoE layer. tensors: its tensors, named below it.
        decide: the entry of one layer, from its name and its tensors.
        source: the file to name in findings.
    """
    parts = expert_parts(tensors)
    entries = {}
    findings: list[Finding] = []
    for name, headers in parts.items():
        own = f"{layer}.0.{name}"
        entry = decide(own, headers)
        rows = headers["weight"].shape[0]
        # A block of rows that gate and up share has no scale of its own in either.
        if entry is None or entry.spec.is_float or rows % min(rows_per_scale_of(entry.spec, rows), rows or 1):
            return None, []
        entries[name] = entry
        findings += check_layer(
            own, entry, {f"{own}.{last}": part for last, part in headers.items()}, source, near=False
        )
    if not entries:
        return None, []
    gate, up, down = entries.values()
    count = tensors["down_proj"].shape[0]
    return ExpertsEntry(count, gate, up, down, EXPERT_NAMES[0], stacked=True), findings


def stacked_finding(layers: Mapping[str, Mapping[str, StoredTensor]], source: str) -> Finding:
    """The finding for quantized experts in tensors of all experts that are not served.

    Args:
        layers: MoE layer -> its tensors, named below it. source: the file to name.
    """
    layer, tensors = next(iter(layers.items()))
    count = f" ({len(layers):,} MoE layers)" if len(layers) > 1 else ""
    return Finding(
        "unsupported-scheme",
        f"these quantized experts are stored in tensors of all experts, which cannot be taken apart{count}",
        layer=layer,
        file=next(iter(tensors.values())).file or source,
        expected="a tensor per expert, or FP8 gate_up_proj and down_proj [E, ...] with scales of three dimensions",
        found=", ".join(_shown(tensors)),
        fix="use an export with one tensor per expert: llm-compressor, AutoRound, GPTQModel and msModelSlim write them",
    )


def _shown(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for name, tensor in list(tensors.items())[:6]:
        yield f"{name} {tensor.dtype} {list(tensor.shape)}"
