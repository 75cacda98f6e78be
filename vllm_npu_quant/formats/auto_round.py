# SPDX-License-Identifier: Apache-2.0
"""AutoRound checkpoints (``quant_method: auto-round``).

``packing_format`` names the layout of the weights: GPTQ's with zero points minus one (auto_round:auto_gptq), GPTQ's with
zero points as they are (auto_round, auto_round:gptqmodel), AWQ's (auto_round:auto_awq), compressed-tensors' MXFP8, MXFP4 and
NVFP4 (auto_round:llm_compressor), or FP8 in blocks or per output.
Layers under ``block_name_to_quantize`` have the scheme of the config; ``extra_config`` overrides fields of single layers by
name, and of others by regular expressions found anywhere in their names, the first that matches; 16 bits mean float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, StrictStr, field_validator, model_validator

from vllm_npu_quant.errors import Finding, FindingLimit
from vllm_npu_quant.formats.common import MAX_RULES, Bool, ConfigModel, Int, Work
from vllm_npu_quant.formats.declaration import Format, Sample
from vllm_npu_quant.formats.described import Described, StoredTensor
from vllm_npu_quant.formats.fp8 import fp8_spec, fp8_weight
from vllm_npu_quant.formats.packed import (
    BITS,
    FLOAT_BITS,
    MAX_PROBLEMS,
    Configured,
    GroupSize,
    index_packed,
    integer_spec,
    merge_spellings,
    parse_config,
    producer_of,
    unsupported,
)
from vllm_npu_quant.formats.patterns import PatternSet
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.formats.small_floats import MXFP4, MXFP8, NVFP4, block_float_spec
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, WeightSpec

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = ["FORMAT", "AutoRoundConfig", "read"]

#: packing_format -> layout of integer weights.
_PACKINGS = {
    "auto_round:auto_gptq": Layout.GPTQ,
    "auto_round:gptq": Layout.GPTQ,
    "auto": Layout.GPTQ,
    "auto_round": Layout.GPTQ_V2,
    "auto_round:gptqmodel": Layout.GPTQ_V2,
    "auto_round:auto_awq": Layout.AWQ_GEMM,
    "auto_round:awq": Layout.AWQ_GEMM,
}

#: Characters that make a key of extra_config a regular expression.
_SPECIAL = frozenset("*+?^$()[]{}|\\")

#: Names of E4M3 in data_type.
_FP8_TYPES = ("fp", "fp8", "fp8_e4m3")
#: (beginning of data_type, bits) -> name, layout and weight of floats with scales per block of inputs.
_BLOCK_FLOATS = {
    ("mx_fp", 8): ("MXFP8", Layout.MXFP8, MXFP8),
    ("mx_fp", 4): ("MXFP4", Layout.CT_MXFP4, MXFP4),
    ("nv_fp", 4): ("NVFP4", Layout.CT_NVFP4, NVFP4),
}


class LayerScheme(ConfigModel):
    """Fields of one layer's scheme; None if they are inherited."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bits: Int | None = None
    group_size: GroupSize | tuple[Int, Int] | None = None
    sym: Bool | None = None
    data_type: StrictStr | None = None
    act_bits: Int | None = None
    super_bits: Int | None = None
    rotation_config: Any = None

    @property
    def is_float(self) -> bool:
        """Whether the bits mean float."""
        return (self.bits or 0) >= FLOAT_BITS

    def over(self, base: LayerScheme) -> LayerScheme:
        """This scheme, with unset fields taken from another."""
        own = {name: value for name in LayerScheme.model_fields if (value := getattr(self, name)) is not None}
        return base.model_copy(update=own)


class AutoRoundConfig(ConfigModel):
    """``quantization_config`` of an AutoRound checkpoint. Unknown fields are accepted and reported."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "auto-round"
    bits: Int
    group_size: GroupSize | tuple[Int, Int]
    sym: Bool = True
    data_type: StrictStr = "int"
    act_bits: Int | None = None
    act_data_type: Any = None
    act_group_size: Any = None
    act_sym: Any = None
    act_dynamic: Any = None
    super_bits: Int | None = None
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


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe the layers of an AutoRound checkpoint. Raises nothing: problems are in ``findings``.

    Args:
        config: config.json's ``quantization_config``.
        tensors: the stored tensors, by name.
        source: the file that holds ``config``.
        checkpoint: not used.
    """
    described, found = Described("auto-round", source), FindingLimit()
    parsed = parse_config(AutoRoundConfig, config, source, found)
    if parsed is not None:
        # AutoRound treats every key that is not a layer's name as a regular expression.
        names = {name.rpartition(".")[0] for name in tensors} | {"lm_head"}
        keys = [key for key in parsed.extra_config if key not in names or not _SPECIAL.isdisjoint(key)]
        patterns = PatternSet(keys, mode="search", file=source, where="extra_config")
        problems = [*islice(_problems(parsed, source), MAX_PROBLEMS), *patterns.findings]
        found.extend(problems)
        if not problems:
            index_packed(described, tensors, _configured(parsed, patterns, Work(source)), found)
    described.findings = tuple(found.close())
    return described


def _configured(config: AutoRoundConfig, patterns: PatternSet, work: Work) -> Callable[[str], Configured]:
    base = config.base()
    spec = _spec(base, config)
    blocks = frozenset(config.block_name_to_quantize)

    def configured(layer: str) -> Configured:
        work.spend((layer.count(".") + 1) * (len(layer) // 256 + 1))
        override = _named(layer, config.extra_config)
        if override is None:
            hit = patterns.first(layer)
            override = None if hit is None else config.extra_config[patterns.patterns[hit]]
        if override is None:
            return Configured(spec, excluded=base.is_float or not _in_blocks(layer, blocks))
        scheme = override.over(base)
        if scheme.is_float:
            return Configured(spec, excluded=True, explicit=True)
        return Configured(_spec(scheme, config))

    return configured


def _named(layer: str, schemes: Mapping[str, LayerScheme]) -> LayerScheme | None:
    """The scheme under a layer's name, or under its last components: keys may omit a multimodal model's prefix."""
    name = layer
    while name:
        if name in schemes:
            return schemes[name]
        name = name.partition(".")[2]
    return None


def _in_blocks(layer: str, blocks: frozenset[str]) -> bool:
    """Whether a layer belongs to one of the blocks; all but the head do if there are none."""
    if not blocks:
        return layer.rpartition(".")[2] != "lm_head"
    module = layer
    while module:
        if module in blocks:
            return True
        module = module.rpartition(".")[0]
    return False


def _spec(scheme: LayerScheme, config: AutoRoundConfig) -> LayerSpec:
    """The spec of a layer with this scheme, whose fields are set."""
    if isinstance(scheme.group_size, tuple):
        weight = fp8_weight(Granularity.BLOCK, scheme.group_size)
        return fp8_spec("FP8_BLOCK_DYNAMIC", weight, Layout.FP8_INV, static=False)
    if scheme.data_type in _FP8_TYPES:
        static = config.act_dynamic is False
        name = "FP8_CHANNEL_STATIC" if static else "FP8_CHANNEL_DYNAMIC"
        return fp8_spec(name, fp8_weight(Granularity.CHANNEL), Layout.FP8, static=static)
    blocks = _block_floats(scheme)
    if blocks is not None:
        quantized = scheme.act_bits is not None and scheme.act_bits < FLOAT_BITS
        return block_float_spec(*blocks, scheme.act_bits if quantized else None)
    layout = _PACKINGS.get(config.packing_format, Layout.GPTQ)
    return integer_spec("AutoRound", layout, scheme.bits or config.bits, scheme.group_size or -1, bool(scheme.sym))


def _block_floats(scheme: LayerScheme) -> tuple[str, Layout, WeightSpec] | None:
    """Name, layout and weight of a scheme of floats with scales per block of inputs; None for other schemes."""
    return _BLOCK_FLOATS.get(((scheme.data_type or "")[:5], scheme.bits or 0))


def _problems(config: AutoRoundConfig, source: str) -> Iterator[Finding]:
    base = config.base()
    schemes = [
        ("", base),
        *((f"extra_config {key[:60]!r}: ", own.over(base)) for key, own in config.extra_config.items()),
    ]
    for where, scheme in schemes:
        refused = None if scheme.is_float else _unsupported_part(scheme, config.packing_format)
        if refused is not None:
            feature, expected, value = refused
            yield unsupported(f"{where}AutoRound with {feature}", expected, value, source)


def _unsupported_part(scheme: LayerScheme, packing: str) -> tuple[str, str, str] | None:
    """The unsupported part of a scheme as (feature, what is supported, config value), or None."""
    if scheme.rotation_config:
        return "rotated activations", "no rotation_config", "rotation_config"
    if scheme.super_bits:
        return "scales that are quantized, too", "no super_bits", f"super_bits: {scheme.super_bits}"
    if scheme.data_type in _FP8_TYPES and scheme.bits == 8:
        return _unsupported_fp8(scheme)
    blocks = _block_floats(scheme)
    if blocks is not None:
        return _unsupported_blocks(scheme, *blocks)
    if scheme.data_type != "int" or isinstance(scheme.group_size, tuple):
        value = f"data_type: {scheme.data_type}, group_size: {scheme.group_size}"
        return f"data_type {scheme.data_type!r:.40}", "data_type int, FP8, mx_fp or nv_fp", value
    if scheme.act_bits is not None and scheme.act_bits < FLOAT_BITS:
        expected = "the format llm_compressor, which quantizes activations, too"
        return f"{scheme.act_bits}-bit activations", expected, f"act_bits: {scheme.act_bits}"
    if packing not in _PACKINGS:
        return f"packing_format {packing[:40]!r}", "packing_format: " + ", ".join(_PACKINGS), packing
    supported = (4,) if _PACKINGS[packing] is Layout.AWQ_GEMM else BITS
    if scheme.bits not in supported:
        expected = " or ".join(map(str, supported)) + f" bits for packing_format {packing}"
        return f"{scheme.bits} bits", expected, f"bits: {scheme.bits}"
    return None


def _unsupported_blocks(
    scheme: LayerScheme, name: str, layout: Layout, weight: WeightSpec
) -> tuple[str, str, str] | None:
    """``_unsupported_part`` for floats with scales per block of inputs."""
    if scheme.group_size != weight.group_size or scheme.sym is False:
        expected = f"group_size: {weight.group_size}, sym: true"
        return f"{name} in other groups", expected, f"group_size: {scheme.group_size}, sym: {scheme.sym}"
    if scheme.act_bits not in (None, 4, 8) and (scheme.act_bits or 0) < FLOAT_BITS:
        return f"{scheme.act_bits}-bit activations", "act_bits: 4, 8 or 16", f"act_bits: {scheme.act_bits}"
    return None


def _unsupported_fp8(scheme: LayerScheme) -> tuple[str, str, str] | None:
    """``_unsupported_part`` for FP8 weights."""
    if isinstance(scheme.group_size, tuple) and min(scheme.group_size) > 0:
        return None
    if scheme.act_bits != 8:
        return "FP8 weights with float inputs", "act_bits: 8", f"act_bits: {scheme.act_bits}"
    if scheme.group_size != -1:
        return "FP8 weights in groups", "group_size -1 or [128, 128]", f"group_size: {scheme.group_size}"
    return None


def _samples() -> Iterator[Sample]:
    integers = {"quant_method": "auto-round", "group_size": 128, "data_type": "int", "sym": True}
    gptq = {**integers, "packing_format": "auto_round:auto_gptq"}
    awq = {**integers, "bits": 4, "sym": False, "packing_format": "auto_round:auto_awq"}
    fp8 = {**integers, "bits": 8, "data_type": "fp", "act_bits": 8, "packing_format": "auto_round:fp8"}
    mxfp = {**fp8, "data_type": "mx_fp", "group_size": 32, "packing_format": "auto_round:llm_compressor"}
    schemes: list[tuple[str, dict[str, Any]]] = [
        *((f"{bits} bits, auto_gptq packing", {**gptq, "bits": bits}) for bits in BITS),
        ("4 bits, auto_awq packing", awq),
        ("FP8 per channel", {**fp8, "group_size": -1}),
        ("FP8 per block", {**fp8, "group_size": [128, 128]}),
        ("MXFP8", mxfp),
        ("MXFP4", {**mxfp, "bits": 4, "act_bits": 4}),
        ("NVFP4", {**mxfp, "bits": 4, "act_bits": 4, "data_type": "nv_fp", "group_size": 16}),
    ]
    for label, config in schemes:
        parsed = AutoRoundConfig.model_validate(config)
        listed = ["qzeros"] if config is awq else []
        yield Sample(label, config, sample_tensors(_spec(parsed.base(), parsed), listed))


def _has_fields(config: Mapping[str, Any]) -> bool:
    marks = {"autoround_version", "auto_round_version", "packing_format"}
    return "bits" in config and not marks.isdisjoint(config)


FORMAT = Format(
    name="auto-round",
    read=read,
    method_name="npu_auto_round",
    quant_methods=frozenset({"auto-round", "autoround", "intel/auto-round", "inc"}),
    has_fields=_has_fields,
    producer=producer_of,
    samples=_samples,
)
