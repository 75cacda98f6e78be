# SPDX-License-Identifier: Apache-2.0
"""AutoRound checkpoints (``quant_method: auto-round``).

``packing_format`` says whose layout the weights have: GPTQ's with zero points minus one (auto_round:auto_gptq), GPTQ's with
zero points as they are (auto_round, auto_round:gptqmodel), AWQ's (auto_round:auto_awq), or FP8 in blocks or per output.
Layers under ``block_name_to_quantize`` have the scheme of the config; ``extra_config`` overrides fields of single layers by
name, and of others by regular expressions found anywhere in their names, the first that matches; 16 bits mean float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.base import LayerEntry
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.formats.fp8 import FP8_DTYPES, fp8_spec, fp8_weight
from vllm_npu_quant.formats.gptq import BITS
from vllm_npu_quant.formats.packed import (
    MAX_RULES,
    GroupSize,
    PackedFormat,
    Ruling,
    float_ruling,
    integer_spec,
    merge_spellings,
    parse_config,
    refused_value,
)
from vllm_npu_quant.formats.patterns import PatternSet
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout

__all__ = ["AutoRoundConfig", "AutoRoundFormat"]

#: packing_format -> layout of integer weights.
PACKINGS = {
    "auto_round:auto_gptq": Layout.GPTQ,
    "auto_round:gptq": Layout.GPTQ,
    "auto": Layout.GPTQ,
    "auto_round": Layout.GPTQ_V2,
    "auto_round:gptqmodel": Layout.GPTQ_V2,
    "auto_round:auto_awq": Layout.AWQ_GEMM,
    "auto_round:awq": Layout.AWQ_GEMM,
}

#: What makes a key of extra_config a regular expression and not a name.
_SPECIAL = frozenset("*+?^$()[]{}|\\")

#: Names of E4M3 in data_type.
_FP8_TYPES = ("fp", "fp8", "fp8_e4m3")

#: Activations of this many bits and more are not quantized.
_FLOAT_BITS = 16


class LayerScheme(BaseModel):
    """Fields of one layer's scheme; None where they are inherited."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bits: StrictInt | None = None
    group_size: GroupSize | tuple[StrictInt, StrictInt] | None = None
    sym: StrictBool | None = None
    data_type: StrictStr | None = None
    act_bits: StrictInt | None = None
    super_bits: StrictInt | None = None
    rotation_config: Any = None

    def over(self, base: LayerScheme) -> LayerScheme:
        """This scheme, with what it leaves open taken from another."""
        own = {name: value for name in LayerScheme.model_fields if (value := getattr(self, name)) is not None}
        return base.model_copy(update=own)


class AutoRoundConfig(BaseModel):
    """``quantization_config`` of an AutoRound checkpoint. Fields that producers add are accepted, and reported where they
    are not known."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "auto-round"
    bits: StrictInt
    group_size: GroupSize | tuple[StrictInt, StrictInt]
    sym: StrictBool = True
    data_type: StrictStr = "int"
    act_bits: StrictInt | None = None
    act_data_type: Any = None
    act_group_size: Any = None
    act_sym: Any = None
    act_dynamic: Any = None
    super_bits: StrictInt | None = None
    super_group_size: Any = None
    rotation_config: Any = None
    weight_block_size: Any = None
    fmt: StrictStr | None = None
    activation_scheme: StrictStr | None = None
    packing_format: StrictStr = "auto_round:auto_gptq"
    block_name_to_quantize: tuple[str, ...] = ()
    extra_config: dict[StrictStr, LayerScheme] = Field(default_factory=dict, max_length=MAX_RULES)

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, config: Any) -> Any:
        names = config.get("block_name_to_quantize") if isinstance(config, Mapping) else None
        if names is None and isinstance(config, Mapping):
            names = config.get("to_quant_block_names")
        merged = merge_spellings(config, {"bits": (), "group_size": ()}, lower=("packing_format", "data_type"))
        merged["block_name_to_quantize"] = names
        for name in ("extra_config", "packing_format"):
            if merged.get(name, 0) is None:
                del merged[name]
        return merged

    @field_validator("block_name_to_quantize", mode="before")
    @classmethod
    def _block_names(cls, names: Any) -> Any:
        """The modules in "a,b", ["a", "b"], or [["a.0", "a.1"], ["b.0"]]."""
        if names is None:
            return ()
        if isinstance(names, str):
            names = names.split(",")
        if not isinstance(names, (list, tuple)) or len(names) > MAX_RULES:
            raise ValueError("block_name_to_quantize is a name, a list of names, or a list of lists of names")
        flat = [part for name in names for part in (name if isinstance(name, (list, tuple)) else [name])]
        if len(flat) > MAX_RULES or not all(isinstance(part, str) for part in flat):
            raise ValueError("block_name_to_quantize holds names, or lists of names")
        return tuple(dict.fromkeys(part.strip().strip(".") for part in flat))

    def base(self) -> LayerScheme:
        """The scheme that extra_config overrides."""
        return LayerScheme(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            data_type=self.data_type,
            act_bits=self.act_bits,
            super_bits=self.super_bits,
            rotation_config=self.rotation_config,
        )


@dataclass
class AutoRoundFormat(PackedFormat):
    """The layers of an AutoRound checkpoint.

    Attributes:
        config: the validated config, without its rules once the stored layers are known; None where it is not valid.
        patterns: the keys of extra_config that are regular expressions.
    """

    config: AutoRoundConfig | None = None
    patterns: PatternSet | None = None

    name = "auto-round"

    def __post_init__(self) -> None:
        self._regexes: list[str] = []
        self._blocks: frozenset[str] | None = None

    def _use_patterns(self, keys: Iterable[str]) -> None:
        self._regexes = list(keys)
        self.patterns = PatternSet(self._regexes, mode="search", file=self.source, where="extra_config")

    def scheme(self, layer: str) -> tuple[LayerScheme, bool] | None:
        """A layer's scheme, and whether extra_config names the layer; None where the layer is outside of all blocks."""
        assert self.config is not None
        config = self.config
        named = config.extra_config.get(layer)
        if named is None:
            # Keys may leave out what a multimodal model puts in front.
            dot = layer.find(".")
            while named is None and dot >= 0:
                named = config.extra_config.get(layer[dot + 1 :])
                dot = layer.find(".", dot + 1)
        if named is None and self.patterns is not None:
            hit = self.patterns.first(layer)
            named = None if hit is None else config.extra_config[self._regexes[hit]]
        if named is not None:
            return named.over(config.base()), True
        return (config.base(), False) if self._in_blocks(layer) else None

    def _in_blocks(self, layer: str) -> bool:
        assert self.config is not None
        if self._blocks is None:
            self._blocks = frozenset(self.config.block_name_to_quantize)
        if not self._blocks:
            return layer.rpartition(".")[2] != "lm_head"
        module = layer
        while module:
            if module in self._blocks:
                return True
            module = module.rpartition(".")[0]
        return False

    def ruling(self, layer: str) -> Ruling:
        assert self.config is not None
        found = self.scheme(layer)
        if found is None:
            return float_ruling(self._spec(self.config.base()))
        scheme, firm = found
        if (scheme.bits or 0) >= _FLOAT_BITS:
            return float_ruling(self._spec(self.config.base()), firm=firm)
        return Ruling(self._spec(scheme), firm)

    def _spec(self, scheme: LayerScheme) -> LayerSpec:
        assert self.config is not None
        assert scheme.bits is not None
        if isinstance(scheme.group_size, tuple):
            weight = fp8_weight(Granularity.BLOCK, scheme.group_size)
            return fp8_spec("FP8_BLOCK_DYNAMIC", weight, Layout.FP8_INV, static=False)
        if scheme.data_type in _FP8_TYPES:
            weight = fp8_weight(Granularity.CHANNEL)
            return fp8_spec(self._fp8_name(), weight, Layout.FP8, static=self._static)
        layout = PACKINGS.get(self.config.packing_format, Layout.GPTQ)
        return integer_spec("AutoRound", layout, scheme.bits, scheme.group_size or -1, bool(scheme.sym))

    def _fp8_name(self) -> str:
        assert self.config is not None
        if isinstance(self.config.group_size, tuple):
            return "FP8_BLOCK_DYNAMIC"
        return "FP8_CHANNEL_STATIC" if self._static else "FP8_CHANNEL_DYNAMIC"

    @property
    def _static(self) -> bool:
        return self.config is not None and self.config.act_dynamic is False

    def unpacked(
        self, layer: str, named: Mapping[str, StoredTensor], silent: list[str], found: FindingLimit
    ) -> LayerEntry | None:
        weight = named.get("weight")
        spec = self.ruling(layer).spec
        if weight is None or weight.dtype not in FP8_DTYPES or spec.layout not in (Layout.FP8, Layout.FP8_INV):
            return super().unpacked(layer, named, silent, found)
        known = {tensor.name for tensor in LAYOUTS[spec.layout].tensors if tensor.optional}
        return LayerEntry(spec, frozenset(known & set(named)))

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        source: str = "config.json",
        tensors: Mapping[str, StoredTensor] | None = None,
    ) -> AutoRoundFormat:
        """Validate a quantization_config and look up the stored layers.

        Args:
            config: the JSON object.
            source: the file it is in, for messages.
            tensors: dtypes and shapes of the checkpoint's tensors, where they are known.

        Returns:
            The format; ``findings`` holds everything that is wrong. Nothing is raised.
        """
        found = FindingLimit()
        parsed = parse_config(AutoRoundConfig, config, source, found)
        result = cls(source=source, config=parsed)
        if parsed is None:
            result.findings = tuple(found.close())
            return result
        stored = {name.rpartition(".")[0] for name in tensors} if tensors is not None else None
        # AutoRound takes every key that is no layer's name for a regular expression.
        result._use_patterns(
            key
            for key in parsed.extra_config
            if not _SPECIAL.isdisjoint(key) or (stored is not None and key not in stored and key != "lm_head")
        )
        problems = [*_problems(parsed, source), *(result.patterns.findings if result.patterns else ())]
        return result._finish(tensors, problems, found)

    def _finish(
        self, tensors: Mapping[str, StoredTensor] | None, problems: list[Finding], found: FindingLimit
    ) -> AutoRoundFormat:
        assert self.config is not None
        if self.config.packing_format == "auto_round:gptqmodel":
            self.file_tensors = frozenset({"g_idx"})
        elif PACKINGS.get(self.config.packing_format) is Layout.AWQ_GEMM:
            self.file_tensors = frozenset({"qzeros"})
        for finding in problems:
            found.add(finding)
        if tensors is not None and not problems:
            self.index_stored(tensors, found)
            self.patterns = None
            self._regexes = []
            self.config = self.config.model_copy(update={"extra_config": {}})
        self.findings = tuple(found.close())
        return self


def _problems(config: AutoRoundConfig, source: str) -> list[Finding]:
    findings = []
    base = config.base()
    schemes = [("", base), *((key, own.over(base)) for key, own in config.extra_config.items())]
    packing = config.packing_format
    for where, scheme in schemes:
        if (scheme.bits or 0) >= _FLOAT_BITS:
            continue
        findings += [
            refused_value(
                f"{f'extra_config {where[:60]!r}: ' if where else ''}AutoRound with {what}", wanted, value, source
            )
            for what, wanted, value in _refusals(scheme, packing)
        ]
        if len(findings) > 20:
            break
    return findings[:20]


def _refusals(scheme: LayerScheme, packing: str) -> list[tuple[str, str, str]]:
    """What of a scheme is not served: its name, what is, and the config's value."""
    if scheme.rotation_config:
        return [("rotated activations", "no rotation_config", "rotation_config")]
    if scheme.super_bits:
        return [("scales that are quantized, too", "no super_bits", f"super_bits: {scheme.super_bits}")]
    if scheme.data_type in _FP8_TYPES and scheme.bits == 8:
        if isinstance(scheme.group_size, tuple) and min(scheme.group_size) > 0:
            return []
        if scheme.act_bits != 8:
            return [("FP8 weights with float inputs", "act_bits: 8", f"act_bits: {scheme.act_bits}")]
        if scheme.group_size == -1:
            return []
        wanted = "group_size -1 or [128, 128]"
        return [("FP8 weights in groups", wanted, f"group_size: {scheme.group_size}")]
    if scheme.data_type != "int" or isinstance(scheme.group_size, tuple):
        value = f"data_type: {scheme.data_type}, group_size: {scheme.group_size}"
        return [(f"data_type {scheme.data_type!r:.40}", "data_type int, or FP8 in blocks", value)]
    if scheme.act_bits is not None and scheme.act_bits < _FLOAT_BITS:
        wanted = "the format llm_compressor, which quantizes activations, too"
        return [(f"{scheme.act_bits}-bit activations", wanted, f"act_bits: {scheme.act_bits}")]
    if packing not in PACKINGS:
        return [(f"packing_format {packing[:40]!r}", "packing_format: " + ", ".join(PACKINGS), packing)]
    served = (4,) if PACKINGS[packing] is Layout.AWQ_GEMM else BITS
    if scheme.bits not in served:
        wanted = " or ".join(map(str, served)) + f" bits for packing_format {packing}"
        return [(f"{scheme.bits} bits", wanted, f"bits: {scheme.bits}")]
    return []
