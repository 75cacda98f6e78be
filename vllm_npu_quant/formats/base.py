# SPDX-License-Identifier: Apache-2.0
"""What every format offers: the spec of each layer of the checkpoint, by the checkpoint's own layer names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.spec import FLOAT, LayerSpec

__all__ = ["ExpertsEntry", "LayerEntry", "QuantFormat"]


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
    """

    count: int
    gate: LayerEntry
    up: LayerEntry
    down: LayerEntry
    names: tuple[str, str, str]


@dataclass
class QuantFormat(ABC):
    """A checkpoint's quantization as its config tells it. Small, and picklable without torch or vllm.

    Attributes:
        source: the file that decided.
        findings: what the config's own validation had to say.
        norm_biases: names of the RMSNorm layers that carry a bias.
    """

    source: str = ""
    findings: tuple[Finding, ...] = ()
    norm_biases: frozenset[str] = field(default_factory=frozenset)

    name = ""

    @abstractmethod
    def find(self, layer: str) -> LayerEntry | None:
        """The entry of a checkpoint layer ("model.layers.0.mlp.up_proj"), or None where the checkpoint has no such layer.

        Formats that work by rules answer None for a layer that no weight file holds; where the files are not known, for
        vLLM's fused names.
        """

    @abstractmethod
    def find_experts(self, layer: str) -> ExpertsEntry | None:
        """The entry of a MoE layer's experts ("model.layers.3.mlp.experts"), or None where the config has none."""

    @abstractmethod
    def layer_names(self) -> Iterable[str]:
        """The checkpoint's layer names, MoE experts as one name; empty where they are not known."""

    @abstractmethod
    def stored_layers(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, LayerEntry]]:
        """Every checkpoint layer, single experts included, with its entry.

        Args:
            tensors: the stored tensors by name; formats that work by rules find their layers there.
        """

    def biased_layers(self) -> frozenset[str]:
        """Quantized layers whose own bias the checkpoint stores."""
        return frozenset()

    def dropped_tensors(self) -> tuple[str, ...]:
        """Last name components of tensors that are not loaded on purpose (each has a finding)."""
        return ()
