# SPDX-License-Identifier: Apache-2.0
"""The result of reading a checkpoint's quantization: one class for all formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.spec import FLOAT, LayerSpec

__all__ = ["FLOAT_ENTRY", "FUSED_FLOAT", "Described", "ExpertsEntry", "LayerEntry", "StoredTensor"]


class StoredTensor(Protocol):
    """The part of ``checkpoint.TensorInfo`` that a check needs."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> str: ...


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the checkpoint.

    Attributes:
        spec: its quantization.
        tensors: names of the optional tensors of its layout that the checkpoint holds.
    """

    spec: LayerSpec
    tensors: frozenset[str] = frozenset()


FLOAT_ENTRY = LayerEntry(FLOAT)


@dataclass(frozen=True)
class ExpertsEntry:
    """All routed experts of one MoE layer.

    Attributes:
        count: the number of experts that the checkpoint describes.
        gate, up, down: the entries, equal for all experts.
        names: the checkpoint's names of the three projections.
        stacked: whether the tensors of all experts are stored as one (``formats.stacked``).
    """

    count: int
    gate: LayerEntry
    up: LayerEntry
    down: LayerEntry
    names: tuple[str, str, str]
    stacked: bool = False


#: Float experts that are stored in tensors of all experts; their number is not used.
FUSED_FLOAT = ExpertsEntry(0, FLOAT_ENTRY, FLOAT_ENTRY, FLOAT_ENTRY, ("gate_up_proj", "gate_up_proj", "down_proj"))


@dataclass
class Described:
    """A checkpoint's layers as its format describes them, by the checkpoint's own names.

    A format is a function that returns one of these. It raises nothing; problems are in ``findings``. The object is
    small and can be pickled without torch or vllm: vLLM sends it to every worker.

    Attributes:
        format: the name of the format.
        source: the file that describes the quantization.
        layers: entry of every layer outside of routed experts.
        experts: entry of every MoE layer's experts, by the name that ends in ".experts".
        fused_floats: MoE layers whose float experts are stored in tensors of all experts.
        biased: quantized layers whose own bias is stored.
        norm_biases: RMSNorm layers that carry a bias.
        stored_as_float: layers that are stored as float although the config does not exclude them.
        dropped: last name components, one or two, of tensors that are not loaded on purpose; each has a finding.
        findings: problems and notes.
    """

    format: str = ""
    source: str = ""
    layers: dict[str, LayerEntry] = field(default_factory=dict)
    experts: dict[str, ExpertsEntry] = field(default_factory=dict)
    fused_floats: frozenset[str] = frozenset()
    biased: frozenset[str] = frozenset()
    norm_biases: frozenset[str] = frozenset()
    stored_as_float: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether a layer is quantized."""
        experts = (entry for one in self.experts.values() for entry in (one.gate, one.up, one.down))
        return any(not entry.spec.is_float for entry in (*self.layers.values(), *experts))

    def find(self, layer: str) -> LayerEntry | None:
        """The entry of a checkpoint layer ("model.layers.0.mlp.up_proj"); None if the checkpoint has no such layer."""
        return self.layers.get(layer)

    def find_experts(self, layer: str) -> ExpertsEntry | None:
        """The entry of a MoE layer's experts ("model.layers.3.mlp.experts"); None if the checkpoint has none."""
        return FUSED_FLOAT if layer in self.fused_floats else self.experts.get(layer)

    def layer_names(self) -> Iterable[str]:
        """The checkpoint's layer names; the experts of a MoE layer are one name."""
        yield from self.layers
        yield from self.experts

    def stored_layers(self, *, stacked: bool = True) -> Iterator[tuple[str, LayerEntry]]:
        """Every checkpoint layer, single experts included, with its entry; ``stacked``: with experts stored as one tensor."""
        yield from self.layers.items()
        for layer, experts in self.experts.items():
            if experts.stacked and not stacked:
                continue
            for name, entry in zip(experts.names, (experts.gate, experts.up, experts.down), strict=True):
                for number in range(experts.count):
                    yield f"{layer}.{number}.{name}", entry
