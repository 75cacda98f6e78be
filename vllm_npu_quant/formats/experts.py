# SPDX-License-Identifier: Apache-2.0
"""Routed experts: the thousands of layers of a MoE, as one entry per MoE layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from vllm_npu_quant.errors import Finding, Severity
from vllm_npu_quant.formats.described import Described, ExpertsEntry, LayerEntry
from vllm_npu_quant.serving.dispatch import describe

__all__ = [
    "EXPERT_NAMES",
    "are_ungated",
    "collect_experts",
    "expert_count",
    "holds_fused_floats",
    "quantized_router",
    "routers_of",
    "split_expert",
    "split_number",
    "ungated_finding",
]

#: The projections of an expert: gate, up, down, in the two spellings that checkpoints use.
EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

#: The projections of an expert without a gate (Nemotron-H).
_UNGATED_NAMES = frozenset({"up_proj", "down_proj"})


def holds_fused_floats(layer: str, last_names: Iterable[str]) -> bool:
    """Whether a layer's tensors are those of float experts, stored together: [E, ...] as newer model classes have them."""
    return layer.endswith(".experts") and {"gate_up_proj", "down_proj"} <= set(last_names)


def are_ungated(projections: Iterable[Iterable[str]]) -> bool:
    """Whether a checkpoint's experts have no gate. Where one MoE layer has a gate, all have, and it is missing elsewhere.

    Args:
        projections: names of the projections of each MoE layer.
    """
    return all(set(names) == _UNGATED_NAMES for names in projections)


def ungated_finding(layers: Sequence[str], source: str) -> Finding:
    """The finding for quantized experts without a gate. vLLM 0.32 itself builds them for GPUs only."""
    return Finding(
        "unsupported-scheme",
        "experts without a gate projection, whose activation is relu squared, are not served"
        + (f" ({len(layers):,} MoE layers)" if len(layers) > 1 else ""),
        layer=layers[0],
        file=source,
        expected=" or ".join(" ".join(family) for family in EXPERT_NAMES),
        found=" ".join(sorted(_UNGATED_NAMES)),
        fix="use a model whose experts have a gate: vLLM builds others for CUDA, ROCm and XPU only",
    )


def expert_count(layer: str, expected: str, count: int, source: str) -> Finding:
    """The finding for a MoE layer whose number of stored experts is not the expected one."""
    return Finding(
        "wrong-shape",
        "the model and the checkpoint have different numbers of experts",
        layer=layer,
        file=source,
        expected=expected,
        found=f"{count} experts",
        fix="download the checkpoint again, or use the config.json that its producer wrote",
    )


#: Names that the router of a MoE layer has beside its experts.
_ROUTERS = ("gate", "router", "gate.wg", "router.layer", "shared_expert_gate")


def routers_of(described: Described) -> list[str]:
    """The quantized routers of a checkpoint's MoE layers, by their usual names."""
    blocks = [layer.rpartition(".")[0] for layer in (*described.experts, *described.fused_floats)]
    entries = {name: described.find(name) for block in blocks for name in (f"{block}.{last}" for last in _ROUTERS)}
    return [name for name, entry in entries.items() if entry is not None and not entry.spec.is_float]


def quantized_router(layers: Sequence[str], source: str, severity: Severity) -> Finding:
    """The finding for layers of MoE blocks, mostly routers, that vLLM keeps float and a checkpoint stores quantized.

    Args:
        layers: their names. source: the file to name.
        severity: an error for layers that the class of the model keeps float, else a warning: some classes do not.
    """
    keeps = "vLLM's class of this model keeps" if severity is Severity.ERROR else "vLLM's classes of many models keep"
    more = f" ({len(layers):,} layers)" if len(layers) > 1 else ""
    return Finding(
        "unsupported-scheme",
        f"the layer is stored quantized, and {keeps} it float{more}",
        layer=layers[0],
        file=source,
        expected=f"{layers[0]}.weight in a float dtype",
        found="a quantized layer",
        fix="re-export the checkpoint with the routers of MoE layers left out of quantization",
        severity=severity,
    )


_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")


def split_number(expert: str) -> tuple[str, str] | None:
    """("model.layers.3.mlp.experts", "17") for an expert, None for any other name."""
    parent, _, number = expert.rpartition(".")
    return (parent, number) if parent.endswith(".experts") and _NUMBER.fullmatch(number) else None


def split_expert(layer: str) -> tuple[str, str, str] | None:
    """("model.layers.3.mlp.experts", "17", "gate_proj") for an expert's layer, None for any other."""
    expert, _, projection = layer.rpartition(".")
    found = split_number(expert) if projection else None
    return None if found is None else (*found, projection)


def collect_experts(
    layer: str, projections: Mapping[str, Mapping[str, LayerEntry]], source: str
) -> tuple[ExpertsEntry | None, list[Finding]]:
    """One entry for all experts of a MoE layer.

    Args:
        layer: its name, ending in ".experts".
        projections: projection name -> expert number -> entry.
        source: the file to name in findings.

    Returns:
        The entry, or None if the experts are incomplete, and the findings: undescribed-layer for missing experts or
        projections, fused-shards-disagree if experts differ.
    """
    names = next((family for family in EXPERT_NAMES if set(family) == set(projections)), None)
    if names is None:
        return None, [_unexpected_projections(layer, projections, source)]
    numbers = [set(map(int, projections[name])) for name in names]
    count = max(map(max, numbers)) + 1
    # The largest index is untrusted; iterate over the listed experts only.
    absent = [
        f"{layer}.{number}.{name}"
        for name, present in zip(names, numbers, strict=True)
        if len(present) != count
        for number in range(min(count, len(present) + 4))
        if number not in present
    ]
    if absent:
        finding = Finding(
            "undescribed-layer",
            "experts are left out",
            layer=layer,
            file=source,
            expected=f"experts 0 to {count - 1} with {', '.join(names)}",
            found="no " + ", ".join(absent[:6]),
            fix="re-export the checkpoint, or download it again",
        )
        return None, [finding]
    members = [_members(projections[name]) for name in names]
    findings = [
        _disagreement(f"{layer}.*.{name}", by_entry, source)
        for name, by_entry in zip(names, members, strict=True)
        if len(by_entry) > 1
    ]
    gate, up, down = (next(iter(by_entry)) for by_entry in members)
    return ExpertsEntry(count, gate, up, down, names), findings


def _members(entries: Mapping[str, LayerEntry]) -> dict[LayerEntry, list[str]]:
    """The numbers of the experts with each entry."""
    # Entries are usually interned; compare by identity first.
    if len(set(map(id, entries.values()))) == 1:
        return {next(iter(entries.values())): list(entries)}
    by_entry: dict[LayerEntry, list[str]] = {}
    for number, entry in entries.items():
        by_entry.setdefault(entry, []).append(number)
    return by_entry


def _unexpected_projections(layer: str, projections: Iterable[str], source: str) -> Finding:
    found = set(projections)
    meant = [family for family in EXPERT_NAMES if not found.isdisjoint(family)]
    incomplete = len(meant) == 1 and found < set(meant[0])
    return Finding(
        "undescribed-layer",
        "a projection of the experts is left out" if incomplete else "the experts' projections have unexpected names",
        layer=layer,
        file=source,
        expected=" or ".join(" ".join(family) for family in (meant if len(meant) == 1 else EXPERT_NAMES)),
        found=" ".join(sorted(found))[:200],
        fix="check that the checkpoint is complete",
    )


def _disagreement(layer: str, by_entry: Mapping[LayerEntry, list[str]], source: str) -> Finding:
    return Finding(
        "fused-shards-disagree",
        "the experts of one layer are quantized differently",
        layer=layer,
        file=source,
        expected="one scheme for all experts",
        found="; ".join(
            f"{describe(entry.spec)} for experts {', '.join(members[:4])}" + (" ..." if len(members) > 4 else "")
            for entry, members in by_entry.items()
        ),
        fix="re-export the checkpoint with one scheme for the experts of a layer",
    )
