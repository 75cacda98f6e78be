# SPDX-License-Identifier: Apache-2.0
"""Index of a checkpoint's layers by their stored tensors: each stored layer is looked up once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from vllm_npu_quant.errors import FindingLimit, NpuQuantError
from vllm_npu_quant.formats.common import silent_finding
from vllm_npu_quant.formats.described import Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.experts import (
    are_ungated,
    collect_experts,
    split_number,
    ungated_finding,
)
from vllm_npu_quant.formats.stacked import is_quantized, stacked_entry, stacked_finding, stacked_in

__all__ = ["add_layers", "index_by_rules", "index_layers", "is_embedding", "stored_layers_of"]


def is_embedding(layer: str) -> bool:
    """Whether a layer is an embedding table by its name: not a Linear, although its weight has two dimensions too."""
    last = layer.rpartition(".")[2]
    return "embed" in last or last in ("wte", "wpe")


def stored_layers_of(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The stored tensors by layer: layer name -> last name component -> tensor."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        layers.setdefault(layer, {})[last] = tensor
    return layers


def index_layers(
    described: Described,
    stored: Mapping[str, Mapping[str, StoredTensor]],
    decide: Callable[[str, Mapping[str, StoredTensor]], LayerEntry | None],
    found: FindingLimit,
) -> None:
    """Fill ``described`` with every stored layer; the experts of a MoE layer become one entry. Linear in the tensors.

    Args:
        described: whose layers, experts, fused_floats and biased are filled. stored: as ``stored_layers_of`` gives it.
        decide: the entry of one layer, from its name and its tensors; None if it is no layer (a lone parameter), or if a
            finding says why it has no entry.
        found: collects findings about the experts.
    """
    fused_floats: set[str] = set()
    stacks: dict[str, dict[str, StoredTensor]] = {}

    def decided_layers() -> Iterator[tuple[str, LayerEntry]]:
        same: dict[LayerEntry, LayerEntry] = {}  # one object per distinct entry keeps the pickle small
        for layer, tensors in stored.items():
            moe = stacked_in(layer, tensors)
            if moe and is_quantized(tensors):
                below = layer.removeprefix(moe.removesuffix("experts")).removeprefix("experts")
                named = {f"{below}.{name}".strip("."): tensor for name, tensor in tensors.items()}
                stacks.setdefault(moe, {}).update(named)
                continue
            if moe:
                fused_floats.add(moe)
            entry = decide(layer, tensors)
            if entry is not None:
                yield layer, same.setdefault(entry, entry)

    add_layers(described, decided_layers(), found)
    described.fused_floats = frozenset(fused_floats - stacks.keys())
    refused = {}
    for moe, named in stacks.items():
        experts, findings = stacked_entry(moe, named, decide, described.source)
        found.extend(findings)
        if experts is None:
            refused[moe] = named
        else:
            described.experts[moe] = experts
    if refused:
        found.add(stacked_finding(refused, described.source))


def index_by_rules(
    described: Described,
    stored: Mapping[str, Mapping[str, StoredTensor]],
    decide: Callable[[str, Mapping[str, StoredTensor]], LayerEntry | None],
    not_excluded: Sequence[str],
    found: FindingLimit,
) -> None:
    """``index_layers`` for configs that name layers by rules, whose matching may refuse a name or take too much work.

    Args:
        not_excluded: filled by ``decide``: layers that are stored as float although no rule excludes them.
    """
    try:
        index_layers(described, stored, decide, found)
    except NpuQuantError as error:
        found.extend(error.findings)
    described.stored_as_float = frozenset(not_excluded)
    note = silent_finding(not_excluded, described.source)
    if note is not None:
        found.add(note)


def add_layers(described: Described, entries: Iterable[tuple[str, LayerEntry]], found: FindingLimit) -> None:
    """Fill ``described`` with these layers; the experts of a MoE layer become one entry.

    Args:
        described: whose layers, experts and biased are filled.
        entries: the layers' names and entries; equal entries are one object.
        found: collects findings about the experts.
    """
    by_experts: dict[str, dict[str, dict[str, LayerEntry]]] = {}
    biased = []
    # The projections of an expert usually follow each other, so its name is split once.
    before = ""
    expert: tuple[str, str] | None = None
    for layer, entry in entries:
        parent, _, projection = layer.rpartition(".")
        if parent != before:
            before, expert = parent, split_number(parent)
        if expert is not None and projection:
            by_experts.setdefault(expert[0], {}).setdefault(projection, {})[expert[1]] = entry
            continue
        described.layers[layer] = entry
        if "bias" in entry.tensors and not entry.spec.is_float:
            biased.append(layer)
    if by_experts and are_ungated(by_experts.values()):
        found.add(ungated_finding(list(by_experts), described.source))
        by_experts.clear()
    for layer, projections in by_experts.items():
        experts, findings = collect_experts(layer, projections, described.source)
        found.extend(findings)
        if experts is not None:
            described.experts[layer] = experts
    described.biased = frozenset(biased)
