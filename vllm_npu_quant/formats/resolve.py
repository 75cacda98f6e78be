# SPDX-License-Identifier: Apache-2.0
"""Resolution of a layer of vLLM's model to the checkpoint layers that it holds.

vLLM fuses checkpoint layers (q/k/v into qkv_proj) and renames them. Models declare how: ``packed_modules_mapping`` and
``hf_to_vllm_mapper``. A generic table of fused families is used without a model, for model classes that declare nothing, and
for the number of shards that a checkpoint layer fills. There is no table per model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

from vllm_npu_quant.errors import Finding, NpuQuantError, nearest_names
from vllm_npu_quant.formats.described import Described, ExpertsEntry, LayerEntry
from vllm_npu_quant.serving.dispatch import describe
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout

__all__ = ["FUSED_FAMILIES", "LayerResolver", "ResolvedExperts", "ResolvedLayer", "variants"]

#: Layouts whose scales are repeated at load if fused shards have different groups, and which always store zero points.
_REGROUPED = frozenset({Layout.GPTQ, Layout.GPTQ_V2, Layout.AWQ_GEMM})

#: Fused layers of vLLM's models: their checkpoint layers in the order of the fused weight's rows, and how many of vLLM's
#: shards each of them fills.
FUSED_FAMILIES: dict[str, dict[str, int]] = {
    "qkv_proj": {"q_proj": 1, "k_proj": 1, "v_proj": 1},
    "gate_up_proj": {"gate_proj": 1, "up_proj": 1},
    "fused_qkv_a_proj": {"q_a_proj": 1, "kv_a_proj_with_mqa": 1},
    "in_proj_qkvz": {"in_proj_qkv": 3, "in_proj_z": 1},
    "in_proj_ba": {"in_proj_b": 1, "in_proj_a": 1},
    "w13": {"w1": 1, "w3": 1},
}

#: Spellings of one layer that exports and vLLM's models use side by side: a multimodal wrapper around the language model,
#: and vLLM's name for the decoder block of a multi-token-prediction layer.
_VARIANTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\."), "language_model.model."),
    (re.compile(r"^model\."), "model.language_model."),
    (re.compile(r"^lm_head$"), "language_model.lm_head"),
    (re.compile(r"\.mtp_block\."), "."),
)


def variants(name: str) -> Iterator[str]:
    """Other spellings of a layer's name that exports and vLLM's models use for the same layer."""
    for pattern, replacement in _VARIANTS:
        if pattern.search(name):
            yield pattern.sub(replacement, name, count=1)


@dataclass(frozen=True)
class ResolvedLayer:
    """One layer of vLLM's model.

    Attributes:
        prefix: its name in vLLM's model.
        spec: the quantization that holds for all its shards.
        shards: the names of the checkpoint layers it holds, in row order.
        entries: their entries.
        fills: how many of vLLM's shards each of them fills; empty for one each. A single layer fills all of them.
    """

    prefix: str
    spec: LayerSpec
    shards: tuple[str, ...]
    entries: tuple[LayerEntry, ...]
    fills: tuple[int, ...] = ()

    def listed_tensors(self) -> frozenset[str]:
        """Optional tensors that at least one shard has."""
        return frozenset().union(*(entry.tensors for entry in self.entries))

    def owners(self, count: int) -> tuple[int, ...]:
        """The checkpoint layer of each of vLLM's ``count`` shards, as an index into ``shards``.

        Raises:
            NpuQuantError: undescribed-layer if the checkpoint layers fill more or fewer shards.
        """
        if len(self.shards) == 1:
            return (0,) * count
        fills = self.fills or (1,) * len(self.shards)
        if sum(fills) != count:
            finding = Finding(
                "undescribed-layer",
                "vLLM's fused layer has another number of shards than the checkpoint layers that are known to fill it",
                layer=self.prefix,
                expected=f"{count} shards",
                found=", ".join(f"{name}: {fill}" for name, fill in zip(self.shards, fills, strict=True)),
                fix="export these layers as float, or report the model's name",
            )
            raise NpuQuantError([finding])
        return tuple(owner for owner, fill in enumerate(fills) for _ in range(fill))


@dataclass(frozen=True)
class ResolvedExperts:
    """The routed experts of one MoE layer: w13 (gate and up, fused) and w2 (down) are two independent specs."""

    prefix: str
    layer: str
    entry: ExpertsEntry

    @property
    def w13(self) -> LayerEntry:
        return self.entry.gate

    @property
    def w2(self) -> LayerEntry:
        return self.entry.down


def joint_spec(specs: Sequence[LayerSpec]) -> LayerSpec | None:
    """One spec that holds the numbers of all these layers, or None.

    Weight-only layers may differ in their group sizes, since a scale repeated for a common divisor changes nothing, and in
    symmetry, since a symmetric layer is an asymmetric one with zero points in the middle. The adapter repeats the scales.
    """
    kinds = list(dict.fromkeys(specs))
    if len(kinds) == 1:
        return kinds[0]
    weights = []
    for spec in kinds:
        weight = spec.weight
        if weight is None or spec.activation is not None or spec.layout not in _REGROUPED:
            return None
        weights.append(weight)
    size = gcd(*(weight.group_size for weight in weights))
    symmetric = all(weight.symmetric for weight in weights)
    joint = {
        replace(
            spec,
            weight=replace(
                weight,
                granularity=Granularity.GROUP if size else Granularity.CHANNEL,
                group_size=size,
                symmetric=symmetric,
            ),
        )
        for spec, weight in zip(kinds, weights, strict=True)
    }
    return joint.pop() if len(joint) == 1 else None


@dataclass
class LayerResolver:
    """Finds the checkpoint layers behind a vLLM layer name.

    Attributes:
        described: the checkpoint's layers.
        packed: the model's ``packed_modules_mapping``; overrides the generic families.
        aliases: vLLM layer name -> checkpoint layer name, from the model's name mapper.
    """

    described: Described
    packed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def add_mapper(self, rename: Callable[[str], str | None]) -> None:
        """Note the vLLM names that ``rename`` gives to the checkpoint's tensors. Idempotent.

        Args:
            rename: maps a checkpoint tensor name to vLLM's, None for one that is not loaded.
        """
        for layer in self.described.layer_names():
            renamed = rename(layer + ".weight")
            if renamed is not None and renamed.endswith(".weight") and renamed != layer + ".weight":
                self.aliases[renamed.removesuffix(".weight")] = layer

    def shard_names(self, prefix: str) -> tuple[str, ...]:
        """The names of a fused layer's shards under its own parent; the layer itself if it is not a fused family."""
        parent, dot, last = prefix.rpartition(".")
        shards = tuple(self.packed.get(last) or FUSED_FAMILIES.get(last) or ())
        return tuple(parent + dot + shard for shard in shards) if shards and shards != (last,) else (prefix,)

    def resolve(self, prefix: str) -> ResolvedLayer:
        """The checkpoint layers behind ``prefix`` and their common spec.

        Raises:
            NpuQuantError: undescribed-layer if the config describes none of the names that were tried, or not all shards;
                fused-shards-disagree if shards have different specs.
        """
        own = self._find(prefix, self.described.find)
        if own is not None:
            name, entry = own
            return ResolvedLayer(prefix, entry.spec, (name,), (entry,))
        wanted = self.shard_names(prefix)
        found = [self._find(name, self.described.find) for name in wanted] if wanted != (prefix,) else [None]
        missing = [name for name, hit in zip(wanted, found, strict=True) if hit is None]
        if missing:
            raise NpuQuantError([self._undescribed(prefix, missing, partly=len(missing) < len(wanted))])
        hits = [hit for hit in found if hit is not None]
        family = FUSED_FAMILIES.get(prefix.rpartition(".")[2], {})
        return self._joined(prefix, hits, tuple(family.get(name.rpartition(".")[2], 1) for name in wanted))

    def resolve_as(self, prefix: str, fills: Mapping[str, int]) -> ResolvedLayer:
        """The layer that these checkpoint layers fill.

        Args:
            prefix: its name in vLLM's model.
            fills: names of checkpoint layers, in row order -> how many of vLLM's shards each fills; a single one fills all.

        Raises:
            NpuQuantError: undescribed-layer if there is none, or the config describes not all; fused-shards-disagree.
        """
        found = [(name, self.described.find(name)) for name in fills]
        missing = [name for name, entry in found if entry is None]
        if missing or not fills:
            raise NpuQuantError([self._undescribed(prefix, missing or [prefix], partly=bool(fills))])
        hits = [(name, entry) for name, entry in found if entry is not None]
        return self._joined(prefix, hits, tuple(fills.values()))

    def _joined(self, prefix: str, hits: Sequence[tuple[str, LayerEntry]], fills: tuple[int, ...]) -> ResolvedLayer:
        """One layer that several checkpoint layers fill."""
        spec = joint_spec([entry.spec for _, entry in hits])
        if spec is None:
            raise NpuQuantError([self._disagree(prefix, [(name, entry.spec) for name, entry in hits])])
        names, entries = zip(*hits, strict=True)
        return ResolvedLayer(prefix, spec, names, entries, fills)

    def describes(self, prefix: str) -> bool:
        """Whether the config has an entry for the layer, or for any of its shards."""
        names = dict.fromkeys((prefix, *self.shard_names(prefix)))
        return any(self._find(name, self.described.find) is not None for name in names)

    def resolve_experts(self, prefix: str) -> ResolvedExperts:
        """The routed experts behind ``prefix`` ("model.layers.3.mlp.experts").

        Raises:
            NpuQuantError: undescribed-layer, or fused-shards-disagree if gate and up differ.
        """
        hit = self._find(prefix, self.described.find_experts)
        if hit is None:
            # In the checkpoint's spelling for other layers' experts; if it has none, in both known spellings.
            others = filter(None, map(self.described.find_experts, self.described.layer_names()))
            names = sorted({entry.names[0] for entry in others if entry.count}) or ["gate_proj", "w1"]
            raise NpuQuantError([self._undescribed(prefix, [f"{prefix}.0.{name}" for name in names], partly=False)])
        return self.resolve_experts_as(prefix, *hit)

    def resolve_experts_as(self, prefix: str, name: str, entry: ExpertsEntry) -> ResolvedExperts:
        """The experts ``prefix`` that the checkpoint's experts ``name`` fill.

        Raises:
            NpuQuantError: fused-shards-disagree if gate and up differ.
        """
        if entry.gate.spec != entry.up.spec:
            schemes = [
                (f"{name}.*.{part}", part_entry.spec)
                for part, part_entry in ((entry.names[0], entry.gate), (entry.names[1], entry.up))
            ]
            raise NpuQuantError([self._disagree(prefix, schemes)])
        return ResolvedExperts(prefix, name, entry)

    def spellings(self, name: str) -> Iterable[str]:
        """The names under which the checkpoint may know a layer, the likeliest first."""
        yield self.aliases.get(name, name)
        yield name
        yield from variants(name)

    def _find(self, name: str, find: Callable[[str], Any]) -> tuple[str, Any] | None:
        for spelling in self.spellings(name):
            entry = find(spelling)
            if entry is not None:
                return spelling, entry
        return None

    def _undescribed(self, prefix: str, missing: Sequence[str], *, partly: bool) -> Finding:
        tried = list(dict.fromkeys(spelling for name in missing for spelling in self.spellings(name)))
        what = "only some shards of the fused layer are described" if partly else "the layer is not described"
        return Finding(
            "undescribed-layer",
            what,
            layer=prefix,
            file=self.described.source,
            expected="an entry for " + ", ".join(tried),
            found="none",
            nearest=nearest_names(missing[0], self.described.layer_names()),
            fix="check that the config and the weights are of the same model; a layer that is not quantized must be "
            "listed as float",
        )

    def _disagree(self, prefix: str, schemes: Sequence[tuple[str, LayerSpec]]) -> Finding:
        floats = [name for name, spec in schemes if spec.is_float]
        quantized = [name for name, spec in schemes if not spec.is_float]
        fix = "re-export the checkpoint with one scheme for these layers"
        if floats:
            fix = f"{fix}: quantize {_listed(floats)} too, or leave {_listed(quantized)} out of quantization"
        return Finding(
            "fused-shards-disagree",
            "vLLM runs these layers as one, and the checkpoint quantizes them differently",
            layer=prefix,
            file=self.described.source,
            expected="one scheme",
            found=", ".join(f"{name}: {describe(spec)}" for name, spec in schemes),
            fix=fix,
        )


def _listed(layers: Sequence[str]) -> str:
    """The last components of layers' names."""
    return " and ".join(layer.rpartition(".")[2] for layer in layers)
