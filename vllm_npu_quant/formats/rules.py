# SPDX-License-Identifier: Apache-2.0
"""What the rule-based formats share (compressed-tensors, FP8, AWQ, GPTQ, AutoRound): their configs name layers by rules,
and the stored tensors say which layers there are.

With the tensors' headers at hand, every stored layer is looked up once and the answers are kept: a compact index, as the
formats that describe every tensor have. Without them (a hub id whose files are not on this host yet), the rule answers for
any name that vLLM asks about.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.base import ExpertsEntry, LayerEntry, QuantFormat
from vllm_npu_quant.formats.check import StoredTensor
from vllm_npu_quant.formats.experts import EXPERT_NAMES, FUSED_FLOAT, collect_experts, holds_fused_floats, split_expert
from vllm_npu_quant.formats.resolve import FUSED_FAMILIES

__all__ = ["FLOAT_DTYPES", "LayerIndex", "RuleFormat", "index_layers", "is_embedding", "stored_layers_of"]

#: safetensors dtypes of weights that are not quantized.
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


def is_embedding(layer: str) -> bool:
    """Whether a layer is an embedding table by its name: no Linear, although its weight has two dimensions, too."""
    last = layer.rpartition(".")[2]
    return "embed" in last or last in ("wte", "wpe")


def stored_layers_of(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The stored tensors by layer: layer name -> last name component -> tensor."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        layers.setdefault(layer, {})[last] = tensor
    return layers


@dataclass
class LayerIndex:
    """The layers of a checkpoint.

    Attributes:
        layers: entry of every layer outside of routed experts.
        experts: entry of every MoE layer's experts, by the name that ends in ".experts".
        fused_floats: MoE layers whose float experts are stored as two tensors.
        biased: quantized layers whose own bias is stored.
        findings: what is wrong with the experts.
    """

    layers: dict[str, LayerEntry] = field(default_factory=dict)
    experts: dict[str, ExpertsEntry] = field(default_factory=dict)
    fused_floats: frozenset[str] = frozenset()
    biased: frozenset[str] = frozenset()
    findings: list[Finding] = field(default_factory=list)


def index_layers(
    stored: Mapping[str, Mapping[str, StoredTensor]],
    decide: Callable[[str, Mapping[str, StoredTensor]], LayerEntry | None],
    source: str,
) -> LayerIndex:
    """Look up every stored layer, and collapse experts. Linear in the number of tensors.

    Args:
        stored: what ``stored_layers_of`` gives.
        decide: the entry of one layer, from its name and its tensors; None where it is no layer (a lone parameter). Its
            findings are the caller's.
        source: the file to name in findings.
    """
    index = LayerIndex()
    same: dict[LayerEntry, LayerEntry] = {}  # one object per distinct entry keeps the pickle small
    by_experts: dict[str, dict[str, dict[str, LayerEntry]]] = {}
    biased, fused_floats = [], []
    for layer, tensors in stored.items():
        decided = decide(layer, tensors)
        if decided is None:
            if holds_fused_floats(layer, tensors) and all(part.dtype in FLOAT_DTYPES for part in tensors.values()):
                fused_floats.append(layer)
            continue
        entry = same.setdefault(decided, decided)
        expert = split_expert(layer)
        if expert is not None:
            parent, number, projection = expert
            by_experts.setdefault(parent, {}).setdefault(projection, {})[number] = entry
            continue
        index.layers[layer] = entry
        if "bias" in entry.tensors and not entry.spec.is_float:
            biased.append(layer)
    for layer, projections in by_experts.items():
        experts, findings = collect_experts(layer, projections, source)
        index.findings += findings
        if experts is not None:
            index.experts[layer] = experts
    index.biased, index.fused_floats = frozenset(biased), frozenset(fused_floats)
    return index


@dataclass
class RuleFormat(QuantFormat):
    """A format whose config holds rules.

    Attributes:
        index: the stored layers; None where the weight files are not known.
    """

    index: LayerIndex | None = None

    @abstractmethod
    def rule(self, layer: str) -> LayerEntry | None:
        """What the config alone says about a layer; None for a layer that it does not speak of (an embedding)."""

    def find(self, layer: str) -> LayerEntry | None:
        if self.index is not None:
            return self.index.layers.get(layer)
        if layer.rpartition(".")[2] in FUSED_FAMILIES:
            return None
        return self.rule(layer)

    def find_experts(self, layer: str) -> ExpertsEntry | None:
        if self.index is not None:
            return FUSED_FLOAT if layer in self.index.fused_floats else self.index.experts.get(layer)
        # Their number is not known, nor which of the two families of names the checkpoint has.
        names = EXPERT_NAMES[0]
        entries = [self.rule(f"{layer}.0.{name}") for name in names]
        gate, up, down = entries
        if gate is None or up is None or down is None:
            return None
        return ExpertsEntry(0, gate, up, down, names)

    def layer_names(self) -> Iterable[str]:
        if self.index is not None:
            yield from self.index.layers
            yield from self.index.experts

    def stored_layers(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, LayerEntry]]:
        if self.index is None:
            return
        yield from self.index.layers.items()
        for layer, experts in self.index.experts.items():
            for name, entry in zip(experts.names, (experts.gate, experts.up, experts.down), strict=True):
                for number in range(experts.count):
                    yield f"{layer}.{number}.{name}", entry

    def biased_layers(self) -> frozenset[str]:
        return self.index.biased if self.index is not None else frozenset()
