# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints (``quant_method: gptq``) of AutoGPTQ, GPTQModel, optimum and AutoRound.

2, 3, 4 and 8 bits, symmetric or not, per group or channel, zero points stored minus one (``checkpoint_format: gptq``, also
where nothing is said) or as they are (``gptq_v2``), with or without activation order (``desc_act``). ``dynamic`` changes
the scheme of layers by regular expressions: "-:" leaves a layer alone, "+:" or nothing in front overrides fields; the first
that matches at the start of a layer's name counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.formats.experts import split_expert
from vllm_npu_quant.formats.packed import (
    MAX_RULES,
    GroupSize,
    PackedFormat,
    Reader,
    Ruling,
    float_ruling,
    integer_spec,
    is_float_by_convention,
    merge_spellings,
    parse_config,
    refused_value,
)
from vllm_npu_quant.formats.patterns import PatternSet
from vllm_npu_quant.spec import LayerSpec, Layout

__all__ = ["BITS", "GptqConfig", "GptqFormat", "compare_files", "flat_names", "gptq_layout"]

#: Bits per weight that the operators hold.
BITS = (2, 3, 4, 8)

_LAYOUTS = {
    (False, False): Layout.GPTQ,
    (True, False): Layout.GPTQ_V2,
    (False, True): Layout.GPTQ_ACT_ORDER,
    (True, True): Layout.GPTQ_V2_ACT_ORDER,
}
_PLAIN = {Layout.GPTQ_ACT_ORDER: Layout.GPTQ, Layout.GPTQ_V2_ACT_ORDER: Layout.GPTQ_V2}

#: Values that two files of one checkpoint must agree on.
_COMPARED = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")


def gptq_layout(*, v2: bool, act_order: bool = False) -> Layout:
    return _LAYOUTS[v2, act_order]


class Override(BaseModel):
    """What ``dynamic`` changes for a layer. Other fields are about how the producer quantized it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bits: StrictInt | None = None
    group_size: GroupSize | None = None
    sym: StrictBool | None = None
    desc_act: StrictBool | None = None


class GptqConfig(BaseModel):
    """``quantization_config`` of a GPTQ checkpoint, or its quantize_config.json. Fields that producers add are accepted, and
    reported where they are not known."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "gptq"
    bits: StrictInt
    group_size: GroupSize
    desc_act: StrictBool = False
    static_groups: StrictBool = False
    sym: StrictBool | None = None
    checkpoint_format: StrictStr = "gptq"
    is_marlin_format: StrictBool | None = None
    pack_dtype: StrictStr = "int32"
    data_type: StrictStr = "int"
    lm_head: StrictBool = False
    dynamic: dict[StrictStr, Override] = Field(default_factory=dict, max_length=MAX_RULES)
    modules_in_block_to_quantize: tuple[Any, ...] | None = Field(default=None, max_length=MAX_RULES)
    block_name_to_quantize: Any = None
    rotation: Any = None
    adapter: Any = None

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, config: Any) -> Any:
        merged = merge_spellings(
            config,
            {"bits": ("w_bit",), "group_size": ("q_group_size",), "checkpoint_format": ("format",)},
            lower=("checkpoint_format", "pack_dtype", "data_type"),
        )
        if merged.get("dynamic", 0) is None:
            del merged["dynamic"]
        return merged

    def spec(self, override: Override | None = None) -> LayerSpec:
        """The spec of a layer."""
        change = override or Override()
        bits = self.bits if change.bits is None else change.bits
        group = self.group_size if change.group_size is None else change.group_size
        sym = self.sym if change.sym is None else change.sym
        desc_act = self.desc_act if change.desc_act is None else change.desc_act
        # Where the producer fixed the groups before it reordered, or there is one group only, g_idx is in order.
        act_order = desc_act and not self.static_groups and group > 0
        layout = gptq_layout(v2=self.checkpoint_format == "gptq_v2", act_order=act_order)
        return integer_spec("GPTQ", layout, bits, group, bool(sym))


@dataclass
class GptqFormat(PackedFormat):
    """The layers of a GPTQ checkpoint.

    Attributes:
        config: the validated config, without its rules once the stored layers are known; None where it is not valid.
        patterns: the regular expressions of ``dynamic``, in its order.
    """

    config: GptqConfig | None = None
    patterns: PatternSet | None = None

    name = "gptq"

    def __post_init__(self) -> None:
        self._read: Reader | None = None
        self._overrides: list[tuple[bool, Override]] | None = None

    def ruling(self, layer: str) -> Ruling:
        assert self.config is not None
        config = self.config
        hit = self.patterns.first(layer) if self.patterns is not None else None
        if hit is not None:
            if self._overrides is None:
                self._overrides = [(key.startswith("-:"), value) for key, value in config.dynamic.items()]
            skipped, override = self._overrides[hit]
            if skipped or (override.bits or 0) >= 16:
                return float_ruling(config.spec(), firm=True)
            return Ruling(config.spec(override), firm=True)
        spec = config.spec()
        if layer.rpartition(".")[2] == "lm_head":
            return Ruling(spec, firm=True) if config.lm_head else float_ruling(spec)
        modules = config.modules_in_block_to_quantize
        if modules and not any(name in layer for name in flat_names(modules)):
            return float_ruling(spec)
        return float_ruling(spec) if is_float_by_convention(layer) else Ruling(spec)

    def refine(self, layer: str, spec: LayerSpec, named: Mapping[str, StoredTensor]) -> LayerSpec:
        """Without activation order where g_idx is in order: many producers write desc_act true and reorder nothing."""
        plain = _PLAIN.get(spec.layout)
        if plain is None or self._read is None or "g_idx" not in named or split_expert(layer) is not None:
            return spec
        try:
            g_idx = self._read(f"{layer}.g_idx")
        except NpuQuantError:
            return spec  # the files' own check reports what is wrong with them
        group = spec.weight.group_size if spec.weight is not None else 0
        if g_idx.ndim == 1 and group and (g_idx == [k // group for k in range(g_idx.size)]).all():
            return LayerSpec(spec.scheme, plain, spec.weight)
        return spec

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        source: str = "config.json",
        tensors: Mapping[str, StoredTensor] | None = None,
        read: Reader | None = None,
    ) -> GptqFormat:
        """Validate a quantization_config and look up the stored layers.

        Args:
            config: the JSON object.
            source: the file it is in, for messages.
            tensors: dtypes and shapes of the checkpoint's tensors, where they are known.
            read: gives the values of a stored tensor; used for g_idx of layers with activation order.

        Returns:
            The format; ``findings`` holds everything that is wrong. Nothing is raised.
        """
        found = FindingLimit()
        parsed = parse_config(GptqConfig, config, source, found)
        result = cls(source=source, file_tensors=frozenset({"g_idx"}), config=parsed)
        if parsed is not None:
            result.patterns = PatternSet(
                [key[2:] if key[:2] in ("-:", "+:") else key for key in parsed.dynamic], file=source, where="dynamic"
            )
            problems = [*_problems(parsed, source), *result.patterns.findings]
            for finding in problems:
                found.add(finding)
            if tensors is not None and not problems:
                result._read = read
                result.index_stored(tensors, found)
                result._read = result._overrides = result.patterns = None
                result.config = parsed.model_copy(update={"dynamic": {}, "modules_in_block_to_quantize": None})
        result.findings = tuple(found.close())
        return result


def flat_names(names: Iterable[Any]) -> list[str]:
    """The texts in a list of lists of texts."""
    flat: list[str] = []
    for name in names:
        if isinstance(name, str):
            flat.append(name)
        elif isinstance(name, (list, tuple)):
            flat += [inner for inner in name if isinstance(inner, str)]
    return flat


def compare_files(config: Mapping[str, Any], other: Mapping[str, Any], files: tuple[str, str]) -> list[Finding]:
    """Findings where config.json and quantize_config.json of one checkpoint disagree about the stored numbers."""
    try:
        both = [
            merge_spellings(
                each,
                {"bits": ("w_bit",), "group_size": ("q_group_size",), "checkpoint_format": ("format",)},
                lower=("checkpoint_format",),
            )
            for each in (config, other)
        ]
    except ValueError:
        return []  # validation reports it
    return [
        Finding(
            "contradictory-evidence",
            f"two files of the checkpoint disagree about {name}",
            file=", ".join(files),
            expected="one value",
            found=f"{both[0][name]!s:.40} and {both[1][name]!s:.40}",
            fix=f"correct or remove {files[1]}",
        )
        for name in _COMPARED
        if both[0].get(name) is not None and both[1].get(name) is not None and both[0][name] != both[1][name]
    ]


def _problems(config: GptqConfig, source: str) -> list[Finding]:
    findings = []
    for where, bits in [
        ("", config.bits),
        *((f"dynamic {key[:60]!r}: ", rule.bits) for key, rule in config.dynamic.items()),
    ]:
        if bits is not None and bits not in BITS and not (where and bits >= 16):
            expected = "2, 3, 4 or 8 bits"
            findings.append(refused_value(f"{where}GPTQ with {bits} bits", expected, f"bits: {bits}", source))
    if config.is_marlin_format or config.checkpoint_format not in ("gptq", "gptq_v2"):
        found = "marlin" if config.is_marlin_format else config.checkpoint_format
        expected = "checkpoint_format: gptq or gptq_v2"
        findings.append(refused_value(f"checkpoint_format {found[:40]!r}", expected, found, source))
    for name, expected in (("pack_dtype", "int32"), ("data_type", "int")):
        value = getattr(config, name)
        if value != expected:
            findings.append(refused_value(f"GPTQ with {name} {value[:40]!r}", f"{name}: {expected}", value, source))
    if config.rotation:
        findings.append(refused_value("GPTQModel's rotation of activations", "no rotation", config.rotation, source))
    if config.adapter:
        findings.append(refused_value("an adapter beside GPTQ weights", "no adapter", "adapter", source))
    return findings[:20]
