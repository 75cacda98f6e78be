# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints (llm-compressor and others): ``quantization_config`` with groups of layers by rules.

The models here are our own: the library needs seconds and hundreds of megabytes to import. They read what all its releases
wrote; ``quantization_status`` is not trusted (old releases wrote "frozen" for compressed weights), the stored tensors are.

A rule ("target", "ignore") is a layer's name, a regular expression after "re:", or a class name of the producer's model.
For a layer that several targets match, a name wins over an expression and an expression over a class, each in alphabetical
order, as in ``compressed_tensors.utils.match``. Headers know no classes: "Linear" is every layer with a weight of two
dimensions that is not an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, StrictStr, field_validator, model_validator

from vllm_npu_quant.checkpoint.text import shown, shown_name
from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError
from vllm_npu_quant.formats.common import (
    FLOAT_DTYPES,
    KV_CACHE_TENSORS,
    KV_OUTPUTS,
    MAX_RULES,
    Bool,
    ConfigModel,
    Int,
    config_text,
    kv_cache_finding,
    kv_cache_tensors,
    layer_entry,
    parse_config,
    unknown_fields_finding,
)
from vllm_npu_quant.formats.declaration import Format, Sample
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.fp8 import fp8_spec, fp8_weight
from vllm_npu_quant.formats.index import index_by_rules, is_embedding, stored_layers_of
from vllm_npu_quant.formats.patterns import MatchingTime, PatternSet
from vllm_npu_quant.formats.resolve import variants
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.formats.small_floats import MXFP4, MXFP8, NVFP4, block_float_spec
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = ["FORMAT", "CompressedTensorsConfig", "Match", "QuantizationArgs", "QuantizationScheme", "Targets", "read"]

_MAX_GROUPS = 10_000

_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_CHIPS_WITHOUT = "Ascend A2, A3 and 310P have no {what} instructions; Ascend 950 (A5) has"

#: Formats that are refused by name, and why.
_REFUSED_FORMATS = {
    "marlin-24": "the weights are packed for the 2:4 sparse instructions of NVIDIA GPUs",
    "sparse-24-bitmask": "weights of 2:4 sparsity are not decompressed",
    "sparse-bitmask": "sparse weights are not decompressed",
}
_PACKED, _INT, _FLOAT, _NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
#: Formats of floats with scales per block of inputs: their name, layout and weight.
_BLOCK_FLOATS = {
    "mxfp8-quantized": ("MXFP8", Layout.MXFP8, MXFP8),
    "mxfp4-pack-quantized": ("MXFP4", Layout.CT_MXFP4, MXFP4),
    "nvfp4-pack-quantized": ("NVFP4", Layout.CT_NVFP4, NVFP4),
}
_SERVED_FORMATS = (_PACKED, _INT, _FLOAT, _NAIVE, *_BLOCK_FLOATS)

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})")
#: The first release that packs integers as a stream of bits, without padding.
_DENSE_SINCE = (0, 18)
#: Formats that do not determine the layout: each group has its own, or the weights were not compressed.
_NO_FORMAT = ("mixed-precision", "dense", "fakequant")


class _Model(ConfigModel):
    """Unknown fields are accepted if they are empty; others may change the meaning of the weights."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="after")
    def _no_unknown(self) -> _Model:
        unknown = sorted(
            name for name, value in (self.model_extra or {}).items() if value not in (None, {}, [], "", False)
        )
        if unknown:
            names = ", ".join(shown_name(name, 60) for name in unknown[:8])
            raise ValueError(f"unknown fields {names}, whose effect would be lost")
        return self


class QuantizationArgs(_Model):
    """Quantization of one tensor: weights, input_activations, output_activations or the KV cache."""

    num_bits: Int = Field(default=8, ge=1, le=16)
    type: Literal["int", "float"] = "int"
    symmetric: Bool = True
    group_size: Int | None = Field(default=None, ge=-1, le=1 << 20)
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"] | None = None
    block_structure: tuple[Int, Int] | None = None
    dynamic: Bool | Literal["local"] = False
    actorder: Literal["group", "weight"] | None = None
    scale_dtype: StrictStr | None = None
    zp_dtype: StrictStr | None = None
    observer: StrictStr | None = None
    observer_kwargs: dict[str, Any] | None = None

    @field_validator("type", "strategy", "dynamic", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("actorder", mode="before")
    @classmethod
    def _actorder(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return "group" if value else None
        if isinstance(value, str):
            return {"dynamic": "group", "static": "weight"}.get(value.lower(), value.lower())
        return value

    @field_validator("block_structure", mode="before")
    @classmethod
    def _block(cls, value: Any) -> Any:
        if isinstance(value, str):
            sizes = value.split("x")
            if len(sizes) == 2 and all(size.isascii() and size.isdigit() and len(size) < 8 for size in sizes):
                return tuple(int(size) for size in sizes)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> QuantizationArgs:
        if self.block_structure is not None and not all(0 < size <= 1 << 20 for size in self.block_structure):
            raise ValueError("block_structure needs two sizes above 0")
        if self.strategy is None and self.group_size == 0:
            raise ValueError("group_size 0 stands for nothing; -1 is one group per output")
        grouped = self.granularity in ("group", "tensor_group")
        if grouped and (self.group_size is None or self.group_size <= 0):
            raise ValueError(f"strategy {self.granularity!r} needs a group_size above 0")
        if not grouped and self.group_size is not None and self.group_size > 0:
            raise ValueError(f"group_size {self.group_size} contradicts strategy {self.granularity!r}")
        if (self.granularity == "block") != (self.block_structure is not None):
            raise ValueError("strategy 'block' and block_structure belong together")
        if self.granularity == "token" and self.dynamic is not True:
            raise ValueError("strategy 'token' needs dynamic: true")
        if self.actorder == "group" and not grouped:
            raise ValueError("actorder 'group' needs strategy 'group'")
        return self

    @property
    def granularity(self) -> str:
        """The strategy, which old configs imply by group_size."""
        if self.strategy is not None:
            return self.strategy
        if self.group_size is None:
            return "tensor"
        return "group" if self.group_size > 0 else "channel"

    def describe(self) -> str:
        group = f" of {self.group_size}" if self.granularity == "group" else ""
        mode = "dynamic " if self.dynamic else ""
        sign = "symmetric" if self.symmetric else "asymmetric"
        return f"{mode}{self.num_bits}-bit {self.type} per {self.granularity}{group}, {sign}"


class QuantizationScheme(_Model):
    """A group of layers with one scheme."""

    targets: tuple[StrictStr, ...] = Field(max_length=MAX_RULES)
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    output_activations: QuantizationArgs | None = None
    format: StrictStr | None = None


def _args(num_bits: int, strategy: str, **fields: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "strategy": strategy, **fields}


_PER_TOKEN_8 = _args(8, "token", dynamic=True)
_FP8_PER_TOKEN = _args(8, "token", dynamic=True, type="float")
_MXFP8, _MXFP4 = (_args(bits, "group", group_size=32, type="float") for bits in (8, 4))
_NVFP4 = _args(4, "tensor_group", group_size=16, type="float")
#: Names of schemes that may replace a group's arguments: {"W8A8": ["Linear"]}.
_PRESETS: dict[str, dict[str, Any]] = {
    "W8A16": {"weights": _args(8, "group", group_size=128)},
    "W4A16": {"weights": _args(4, "group", group_size=128)},
    "W4A16_ASYM": {"weights": _args(4, "group", group_size=128, symmetric=False)},
    "W8A8": {"weights": _args(8, "channel"), "input_activations": _PER_TOKEN_8},
    "INT8": {"weights": _args(8, "channel"), "input_activations": _PER_TOKEN_8},
    "W4A8": {"weights": _args(4, "group", group_size=128), "input_activations": _PER_TOKEN_8},
    "FP8": {"weights": _args(8, "tensor", type="float"), "input_activations": _args(8, "tensor", type="float")},
    "FP8_DYNAMIC": {"weights": _args(8, "channel", type="float"), "input_activations": _FP8_PER_TOKEN},
    "FP8_BLOCK": {
        "weights": _args(8, "block", block_structure=[128, 128], type="float"),
        "input_activations": _args(8, "group", group_size=128, dynamic=True, type="float"),
    },
    "MXFP8A16": {"weights": _MXFP8},
    "MXFP8": {"weights": _MXFP8, "input_activations": {**_MXFP8, "dynamic": True}},
    "MXFP4A16": {"weights": _MXFP4},
    "MXFP4": {"weights": _MXFP4, "input_activations": {**_MXFP4, "dynamic": True}},
    "NVFP4A16": {"weights": _NVFP4},
    "NVFP4": {"weights": _NVFP4, "input_activations": {**_NVFP4, "dynamic": "local"}},
}


class CompressedTensorsConfig(ConfigModel):
    """The quantization_config. Unknown fields are reported, and ignored as by the library."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "compressed-tensors"
    config_groups: dict[StrictStr, QuantizationScheme] = Field(default_factory=dict, max_length=_MAX_GROUPS)
    format: StrictStr | None = None
    ignore: tuple[StrictStr, ...] = Field(default=(), max_length=MAX_RULES)
    kv_cache_scheme: QuantizationArgs | None = None
    quantization_status: StrictStr | None = None
    global_compression_ratio: float | None = None
    sparsity_config: dict[str, Any] | None = None
    moe_sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    version: StrictStr | None = None
    run_compressed: Any = None
    total_num_heads: Int | None = None
    total_num_kv_heads: Int | None = None
    provider: StrictStr | None = None

    @field_validator("config_groups", mode="before")
    @classmethod
    def _presets(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        groups = {}
        for name, group in value.items():
            if isinstance(group, list) and isinstance(name, str):
                if name.upper() not in _PRESETS:
                    raise ValueError(f"no scheme is called {shown(name)}; known are {', '.join(_PRESETS)}")
                group = {"targets": group, **_PRESETS[name.upper()]}
            groups[name] = group
        return groups

    @field_validator("kv_cache_scheme", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == {} else value


class Match(str, Enum):
    """Kinds of a rule's match with a layer."""

    NAME = "name"
    PATTERN = "pattern"
    CLASS = "class"
    IGNORED = "ignored"
    NONE = "none"


class Targets:
    """The rules of a config: names, expressions and classes, each with the number of its group.

    Attributes:
        findings: refused expressions.
    """

    def __init__(self, groups: Sequence[Sequence[str]], ignore: Sequence[str], source: str = "") -> None:
        """
        Args:
            groups: the targets of each group, in the config's order; of two groups with the same target the later one wins.
            ignore: the rules of layers that stay float.
            source: the file to name in findings.
        """
        target_groups: dict[str, int] = {}
        for number, targets in enumerate(groups):
            target_groups.update(dict.fromkeys(targets, number))
        self.names = {target: number for target, number in target_groups.items() if not target.startswith("re:")}
        expressions = sorted(target for target in target_groups if target.startswith("re:"))
        self.expression_groups = [target_groups[target] for target in expressions]
        time_left = MatchingTime()
        self.expressions = PatternSet(
            [text[3:] for text in expressions], file=source, where="targets", time_left=time_left
        )
        self.linear = next((self.names[name] for name in _linear_classes(self.names)), None)
        self.embedding = self.names.get("Embedding")
        self.ignored = frozenset(rule for rule in ignore if not rule.startswith("re:"))
        self.ignored_expressions = PatternSet(
            [rule[3:] for rule in ignore if rule.startswith("re:")], file=source, where="ignore", time_left=time_left
        )
        self.ignores_linear = bool(self.ignored & {"Linear", "Module"})

    @property
    def findings(self) -> tuple[Finding, ...]:
        return (*self.expressions.findings, *self.ignored_expressions.findings)

    def match(self, layer: str, *, linear: bool = True) -> tuple[int | None, Match]:
        """The group of a layer, None for a float one, and the kind of the rule that matched.

        Args:
            layer: its name in the checkpoint.
            linear: whether it is a Linear of the producer's model, as far as is known.
        """
        if layer in self.ignored or (linear and self.ignores_linear) or self.ignored_expressions.any(layer):
            return None, Match.IGNORED
        found = self._named(layer)
        if found is not None:
            return found
        by_class = self.linear if linear else self.embedding if is_embedding(layer) else None
        if by_class is not None:
            return by_class, Match.CLASS
        # Rules have the names of the producer's modules, which a multimodal model's tensors may spell differently.
        others = (self._named(other) for other in variants(layer))
        return next((other for other in others if other is not None), (None, Match.NONE))

    def _named(self, layer: str) -> tuple[int, Match] | None:
        """The group that a name or an expression gives a layer."""
        if layer in self.names:
            return self.names[layer], Match.NAME
        found = self.expressions.first(layer)
        return None if found is None else (self.expression_groups[found], Match.PATTERN)


def _linear_classes(names: Mapping[str, int]) -> list[str]:
    """The targets that mean Linear layers, the likeliest first: the class, its parent, or a subclass by its name."""
    exact = [name for name in ("Linear", "Module") if name in names]
    return exact or sorted(name for name in names if _CLASS_NAME.fullmatch(name) and name.endswith("Linear"))


@dataclass(frozen=True)
class _Group:
    """The meaning of a group's arguments.

    Attributes:
        spec: the quantization of its layers; None if it has no weights, or is refused.
        needs: optional tensors of the layout that the arguments call for.
    """

    spec: LayerSpec | None = None
    needs: frozenset[str] = frozenset()


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe the layers of a compressed-tensors checkpoint. Raises nothing: problems are in ``findings``.

    Args:
        config: the ``quantization_config``.
        tensors: the stored tensors by name.
        source: the name of the config's file, for findings.
        checkpoint: not used.
    """
    found = FindingLimit()
    described = Described("compressed-tensors", source)
    parsed = parse_config(CompressedTensorsConfig, config, source, found)
    if parsed is not None:
        found.extend(_refused_parts(parsed, source))
        _describe_layers(described, parsed, tensors, found)
    described.findings = tuple(found.close())
    return described


def _describe_layers(
    described: Described, config: CompressedTensorsConfig, tensors: Mapping[str, StoredTensor], found: FindingLimit
) -> None:
    """Fill ``described`` with the stored layers, and with those that the config names."""
    source = described.source
    schemes = config.config_groups.values()
    groups = [_read_group(name, group, config.format, source, found) for name, group in config.config_groups.items()]
    # A group without weights (attention, the outputs of k_proj) does not take a layer from the group that has them.
    targets = Targets([group.targets if group.weights is not None else () for group in schemes], config.ignore, source)
    found.extend(targets.findings)
    stored = stored_layers_of(tensors)
    for name in targets.names:
        # A layer that the config names and that is not stored: its tensors are reported missing.
        if "." in name or name == "lm_head":
            stored.setdefault(name, {})
    layers = _Layers(groups, targets, _packs_dense(config.version), source, found)
    index_by_rules(described, stored, layers.entry, layers.stored_as_float, found)
    if layers.not_compressed:
        found.add(_not_compressed(layers.not_compressed, source))
    scheme = config.kv_cache_scheme
    outputs = any(group.output_activations is not None and group.weights is None for group in schemes)
    if layers.kv_cache or scheme is not None or outputs:
        described.dropped = (*KV_CACHE_TENSORS, *KV_OUTPUTS)
        what = ", ".join(sorted(layers.kv_cache)) or "kv_cache_scheme"
        found.add(kv_cache_finding(f"{what}: {scheme.describe()}" if scheme is not None else what, source))


#: Locations at which the producer has multiplied the stored weights by the transform; nothing remains to do at run time.
_FUSED_LOCATIONS = ("weight_input", "weight_output")


def _online_transforms(config: Mapping[str, Any]) -> list[str]:
    """The transforms that the model would have to apply, as "name at location", in the config's order.

    SpinQuant's R1 and R2 are listed although they are fused: vLLM and the library ignore them, too. An unknown form counts
    as one that has to be applied.
    """
    groups = config.get("config_groups", config)
    if not isinstance(groups, Mapping):
        return [shown(groups)]
    online: list[str] = []
    for name, scheme in groups.items():
        apply = scheme.get("apply") if isinstance(scheme, Mapping) else None
        for use in apply if isinstance(apply, list) and apply else [None]:
            location = use.get("location") if isinstance(use, Mapping) else None
            if location not in _FUSED_LOCATIONS:
                online.append(
                    f"{shown_name(str(name), 60)} at {shown(location) if location is not None else 'no location'}"
                )
    return list(dict.fromkeys(online))


def _refused_parts(config: CompressedTensorsConfig, source: str) -> list[Finding]:
    """Findings for the parts of a config that change the meaning of weights and are not served."""
    findings = []
    online = _online_transforms(config.transform_config or {})
    if online:
        findings.append(
            Finding(
                "unsupported-scheme",
                "transforms that are applied while the model runs (transform_config) are not served",
                file=source,
                expected="transforms at weight_input and weight_output only, which the producer fused into the weights",
                found=", ".join(online[:4]),
                fix="export the checkpoint without transforms, or with transforms that are fused into the weights",
            )
        )
    sparsity = config.sparsity_config or {}
    if sparsity.get("format", "dense") != "dense":
        findings.append(
            Finding(
                "unsupported-scheme",
                "sparse weights (sparsity_config) are not decompressed",
                file=source,
                expected="no sparsity_config, or format: dense",
                found=f"format {shown(sparsity.get('format'))}",
                fix="export the checkpoint without sparse compression",
            )
        )
    if config.moe_sparsity_config:
        findings.append(
            Finding(
                "unsupported-scheme",
                "MoE layers from which experts were removed (moe_sparsity_config) are not served",
                file=source,
                expected="no moe_sparsity_config",
                found=f"method {shown(config.moe_sparsity_config.get('method'))}",
                fix="export the model with all of its experts, or with the same number in every layer and in config.json",
            )
        )
    if not config.config_groups and config.kv_cache_scheme is None:
        findings.append(
            Finding(
                "bad-config",
                "the config quantizes nothing",
                file=source,
                expected="config_groups with at least one group",
                found="no group",
                fix="remove quantization_config from config.json if the weights are float",
            )
        )
    unknown = unknown_fields_finding(config.model_extra, source)
    return findings + ([unknown] if unknown is not None else [])


class _Refused(Exception):
    """A group that is not served: the message, and fields of its finding."""

    def __init__(self, message: str, *, code: str = "unsupported-scheme", expected: str = "", found: str = "") -> None:
        super().__init__(message)
        self.code, self.expected, self.found = code, expected, found


def _read_group(
    name: str, scheme: QuantizationScheme, config_format: str | None, source: str, found: FindingLimit
) -> _Group:
    """Interpret a group's arguments; without a spec, after a finding, if they are refused."""
    try:
        return _group_of(scheme, scheme.format or config_format or "")
    except _Refused as refused:
        found.add(
            Finding(
                refused.code,
                str(refused),
                layer=f"config_groups.{shown_name(name, 80)}",
                file=source,
                expected=refused.expected,
                found=refused.found or ", ".join(shown_name(target, 80) for target in scheme.targets[:4]),
                fix="export the checkpoint with a scheme that is served, or leave these layers float",
            )
        )
        return _Group()


def _group_of(scheme: QuantizationScheme, packing: str) -> _Group:
    """Interpret a group's arguments. ``packing`` is its format."""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None:
        _check_attention(scheme)
        return _Group()
    if scheme.output_activations is not None:
        raise _Refused("quantized outputs are not served", found=scheme.output_activations.describe())
    _check_format(packing, weights)
    if weights.dynamic:
        raise _Refused("weights cannot be dynamic", code="bad-config", found=weights.describe())
    if packing in _BLOCK_FLOATS:
        return _block_float_group(packing, weights, inputs)
    return _float_group(packing, weights, inputs) if weights.type == "float" else _int_group(packing, weights, inputs)


def _check_attention(scheme: QuantizationScheme) -> None:
    """Refuse a group that quantizes inputs or outputs only, unless it targets attention: the KV cache stays float."""
    attention = ("Attention", "Attn", "attn", "attn$", "k_proj", "v_proj", "proj$")
    activations = scheme.input_activations is not None or scheme.output_activations is not None
    if activations and not all(target.endswith(attention) for target in scheme.targets):
        raise _Refused("quantized activations without quantized weights are not served")


def _check_format(packing: str, weights: QuantizationArgs) -> None:
    """Refuse a format whose weights are not read."""
    if packing in _REFUSED_FORMATS:
        raise _Refused(f"{packing}: {_REFUSED_FORMATS[packing]}", found=weights.describe())
    if packing in _SERVED_FORMATS:
        return
    known = (*_SERVED_FORMATS, *_REFUSED_FORMATS, *_NO_FORMAT)
    if packing and packing not in known:
        raise _Refused(f"no such format: {shown_name(packing, 80)}", code="unknown-scheme", expected=", ".join(known))
    if packing in ("dense", "fakequant"):
        raise _Refused(
            "the weights were saved as floats (fake quantization), not compressed",
            expected=f"format {', '.join(_SERVED_FORMATS)}",
            found=f"format {packing}",
        )
    raise _Refused("the group has no format", code="bad-config", expected=", ".join(_SERVED_FORMATS))


def _float_group(packing: str, weights: QuantizationArgs, inputs: QuantizationArgs | None) -> _Group:
    """A group with FP8 weights."""
    granularity = {"tensor": Granularity.TENSOR, "channel": Granularity.CHANNEL, "block": Granularity.BLOCK}.get(
        weights.granularity
    )
    if granularity is None or weights.num_bits != 8 or not weights.symmetric:
        raise _Refused(
            "FP8 weights are served per tensor, channel or block, symmetric",
            expected="8-bit float per tensor, channel or block",
            found=weights.describe(),
        )
    if packing not in (_FLOAT, _NAIVE):
        raise _Refused(f"FP8 weights cannot have format {packing}", code="bad-config", expected=_FLOAT)
    if inputs is not None and (inputs.type != "float" or inputs.num_bits != 8):
        raise _Refused("FP8 weights are served with FP8 or float inputs", found=inputs.describe())
    static = None if inputs is None else not inputs.dynamic
    kind = {None: "W8A16", True: "STATIC", False: "DYNAMIC"}[static]
    name = f"FP8{'' if granularity is Granularity.TENSOR else '_' + granularity.value.upper()}_{kind}"
    spec = fp8_spec(name, fp8_weight(granularity, weights.block_structure or (0, 0)), Layout.FP8, static=static)
    return _Group(spec, frozenset({"input_scale"}) if static else frozenset())


def _block_float_group(packing: str, weights: QuantizationArgs, inputs: QuantizationArgs | None) -> _Group:
    """A group with MXFP8, MXFP4 or NVFP4 weights."""
    name, layout, weight = _BLOCK_FLOATS[packing]
    stored = (weights.type, weights.num_bits, weights.group_size, weights.symmetric)
    if stored != ("float", weight.bits, weight.group_size, True):
        raise _Refused(
            f"{packing} holds {name} weights, and the config says something else",
            code="bad-config",
            expected=f"{weight.bits}-bit float per group of {weight.group_size}, symmetric",
            found=weights.describe(),
        )
    if inputs is not None and (inputs.type != "float" or inputs.num_bits not in (4, 8)):
        raise _Refused(
            f"{name} weights are served with 4- or 8-bit float inputs, or float ones", found=inputs.describe()
        )
    return _Group(block_float_spec(name, layout, weight, None if inputs is None else inputs.num_bits))


def _int_group(packing: str, weights: QuantizationArgs, inputs: QuantizationArgs | None) -> _Group:
    """A group with integer weights."""
    if packing == _FLOAT:
        raise _Refused("integer weights cannot have format float-quantized", code="bad-config", expected=_INT)
    weight = _int_weight(weights)
    activation = None if inputs is None else _int_activation(inputs)
    layout = _int_layout(packing, weights, activation)
    needs = set() if weight.symmetric else {"weight_zero_point"}
    if layout is Layout.CT_STATIC and activation is not None and not activation.symmetric:
        needs.add("input_zero_point")
    return _Group(LayerSpec(_int_name(weight, activation), layout, weight, activation), frozenset(needs))


def _int_weight(weights: QuantizationArgs) -> WeightSpec:
    granularity = {"tensor": Granularity.TENSOR, "channel": Granularity.CHANNEL, "group": Granularity.GROUP}.get(
        weights.granularity
    )
    if granularity is None or weights.num_bits > 8:
        raise _Refused(
            "integer weights are served with up to 8 bits per tensor, channel or group", found=weights.describe()
        )
    group_size = (weights.group_size or 0) if granularity is Granularity.GROUP else 0
    return WeightSpec(weights.num_bits, NumberKind.INT, granularity, group_size, weights.symmetric)


def _int_activation(inputs: QuantizationArgs) -> ActivationSpec:
    if inputs.type != "int":
        raise _Refused(
            _CHIPS_WITHOUT.format(what="FP8")
            + " them; FP8 inputs of integer weights are not replaced by another scheme",
            found=inputs.describe(),
        )
    wanted = "token" if inputs.dynamic else "tensor"
    if inputs.granularity != wanted or inputs.dynamic == "local":
        raise _Refused(
            "integer inputs are served dynamic per token, or static per tensor",
            expected="strategy token with dynamic: true, or strategy tensor with dynamic: false",
            found=inputs.describe(),
        )
    granularity = Granularity.TOKEN if inputs.dynamic else Granularity.TENSOR
    return ActivationSpec(
        inputs.num_bits, dynamic=bool(inputs.dynamic), granularity=granularity, symmetric=inputs.symmetric
    )


def _int_layout(packing: str, weights: QuantizationArgs, activation: ActivationSpec | None) -> Layout:
    static = activation is not None and not activation.dynamic
    ordered = weights.actorder == "group"
    if packing == _PACKED:
        if static:
            raise _Refused("packed weights with static input scales are not served", found=weights.describe())
        return Layout.CT_PACKED_ACT_ORDER if ordered else Layout.CT_PACKED
    if ordered:
        raise _Refused("activation order by groups is served for packed weights", expected=_PACKED, found=packing)
    return Layout.CT_STATIC if static else Layout.CT_INT


def _int_name(weight: WeightSpec, activation: ActivationSpec | None) -> str:
    """The scheme in the field's short form: W4A16, W8A8_DYNAMIC, W8A8_STATIC."""
    if activation is None:
        return f"W{weight.bits}A16"
    return f"W{weight.bits}A{activation.bits}_{'DYNAMIC' if activation.dynamic else 'STATIC'}"


def _packs_dense(version: str | None) -> bool:
    """Whether the release that a config names packs integers as a stream of bits."""
    release = _VERSION.match(version or "")
    return release is not None and tuple(map(int, release.groups())) >= _DENSE_SINCE


@dataclass
class _Layers:
    """Decides the entries of one checkpoint's layers.

    Attributes:
        packs_dense: whether integers are packed without padding if the stored shapes leave it open.
        stored_as_float: Linear layers that are stored as float although no rule excludes them.
        not_compressed: float layers with scales.
        kv_cache: names of tensors that quantize the KV cache.
    """

    groups: Sequence[_Group]
    targets: Targets
    packs_dense: bool
    source: str
    found: FindingLimit
    stored_as_float: list[str] = field(default_factory=list)
    not_compressed: list[str] = field(default_factory=list)
    kv_cache: set[str] = field(default_factory=set)

    def entry(self, layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
        """The entry of one layer; None for a lone parameter, or if a finding says why it has none."""
        kv = kv_cache_tensors(layer, named)
        self.kv_cache |= kv
        weight = named.get("weight_packed") or named.get("weight")
        floats = weight is not None and weight.dtype in FLOAT_DTYPES and "weight_packed" not in named
        scaled = not {"weight_scale", "weight_scale_inv"}.isdisjoint(named)
        linear = not is_embedding(layer) and (weight is None or not floats or len(weight.shape) == 2)
        number, match = self.targets.match(layer, linear=linear)
        if weight is None and not scaled and match is not Match.NAME:
            return None  # a lone parameter, or the scales of a KV cache
        group = self.groups[number] if number is not None else None
        if floats and (group is None or group.spec is None):
            return FLOAT_ENTRY
        if group is None:
            self._report_contradiction(layer, named, ignored=match is Match.IGNORED)
            return None
        if group.spec is None:
            return None  # the group's finding says why
        if floats and (scaled or match is not Match.NAME):
            return self._float_entry(layer, scaled=scaled, linear=linear)
        spec = replace(group.spec, layout=self._stored_layout(group.spec, named))
        return layer_entry(layer, spec, named, self.found, needs=group.needs, ignored=kv)

    def _float_entry(self, layer: str, *, scaled: bool, linear: bool) -> LayerEntry | None:
        """The entry of a layer that is stored as float although a group matches it."""
        if scaled:
            self.not_compressed.append(layer)
            return None
        if linear:
            self.stored_as_float.append(layer)
        return FLOAT_ENTRY

    def _stored_layout(self, spec: LayerSpec, named: Mapping[str, StoredTensor]) -> Layout | str:
        """The layout of a packed weight by its tensors: the config may omit the activation order, and old releases did
        not pack zero points."""
        if spec.layout not in (Layout.CT_PACKED, Layout.CT_PACKED_ACT_ORDER):
            return spec.layout
        ordered = spec.layout is Layout.CT_PACKED_ACT_ORDER or "weight_g_idx" in named
        zero = named.get("weight_zero_point")
        if zero is not None and zero.dtype == "I8":
            return Layout.CT_PACKED_PLAIN_ZERO_ACT_ORDER if ordered else Layout.CT_PACKED_PLAIN_ZERO
        if ordered:
            return Layout.CT_PACKED_ACT_ORDER
        # Only integers of 3 bits differ with and without padding.
        dense = spec.weight is not None and spec.weight.bits == 3 and self._is_dense(spec.weight, named)
        return Layout.CT_PACKED_DENSE if dense else Layout.CT_PACKED

    def _is_dense(self, weight: WeightSpec, named: Mapping[str, StoredTensor]) -> bool:
        """Whether integers are packed without padding: by the number of words if the groups give the number of inputs."""
        packed, scale = named.get("weight_packed"), named.get("weight_scale")
        if packed is None or scale is None or not weight.group_size:
            return self.packs_dense
        if len(packed.shape) == len(scale.shape) == 2:
            inputs = scale.shape[1] * weight.group_size
            if packed.shape[1] == -(-inputs * weight.bits // 32):
                return True
            if packed.shape[1] == -(-inputs // (32 // weight.bits)):
                return False
        return self.packs_dense

    def _report_contradiction(self, layer: str, named: Mapping[str, StoredTensor], *, ignored: bool) -> None:
        stored = named.get("weight_packed") or named.get("weight") or next(iter(named.values()))
        self.found.add(
            Finding(
                "bad-config",
                f"the config {'ignores the layer' if ignored else 'has no group for the layer'}, "
                "and its weight is stored quantized",
                layer=layer,
                file=self.source,
                expected="a float weight" if ignored else "a target that matches " + layer,
                found=f"{', '.join(sorted(named))} ({stored.dtype} in {stored.file})",
                fix="remove the layer from ignore, or re-export the weights"
                if ignored
                else "add the layer to the targets of its group",
            )
        )


def _not_compressed(layers: Sequence[str], source: str) -> Finding:
    return Finding(
        "unsupported-scheme",
        f"{len(layers)} layers have scales beside float weights: they were saved as fake quantization, not compressed",
        layer=layers[0],
        file=source,
        expected="weight_packed, or a weight of 8 bits per element",
        found=", ".join(layers[:4]),
        fix="save the model with save_compressed=True",
    )


def _left_to_vllm_ascend(config: Mapping[str, Any], model: Any) -> bool:
    from vllm_npu_quant.ascend.ownership import serves_compressed_tensors

    models = (model, getattr(model, "text_config", None))
    has_experts = any(getattr(part, name, 0) for part in models for name in _EXPERT_COUNTS)
    kinds = layer_kinds(config, has_experts=has_experts)
    return kinds is not None and serves_compressed_tensors(config, kinds)


#: Fields of a model's config that count its routed experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Layers that stand for all of their kind, in the spellings of models: a target means the kind if it matches every spelling.
_EXAMPLES = (
    ("linear", ("model.layers.1.self_attn.o_proj",)),
    ("linear", ("model.layers.1.mlp.down_proj",)),
    ("linear", ("model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.mlp.shared_expert.down_proj")),
    ("moe", ("model.layers.1.mlp.experts.0.down_proj",)),
)


def layer_kinds(config: Mapping[str, Any], *, has_experts: bool) -> list[frozenset[str]] | None:
    """For every group of a config, the kinds of layers that its targets mean: "linear", "moe" (routed experts), or both.

    By the names that models usually have, since config.json lists no layers; both for targets that match none of them.

    Args:
        config: the quantization_config. has_experts: whether the model has routed experts.

    Returns:
        None for a config whose rules cannot be matched.
    """
    groups = config.get("config_groups")
    members = groups.values() if isinstance(groups, Mapping) else ()
    rules = [_rules(group.get("targets") if isinstance(group, Mapping) else None) for group in members]
    ignore = _rules(config.get("ignore") or [])
    if ignore is None or any(rule is None for rule in rules):
        return None
    targets = Targets([rule or () for rule in rules], ignore)
    kinds: list[set[str]] = [set() for _ in rules]
    try:
        for kind, spellings in _EXAMPLES:
            numbers = [targets.match(name)[0] for name in spellings]
            if None in numbers or (kind == "moe" and not has_experts):
                continue
            for number in numbers:
                if number is not None:
                    kinds[number].add(kind)
    except NpuQuantError:
        return None
    return None if targets.findings else [frozenset(found or ("linear", "moe")) for found in kinds]


def _rules(value: Any) -> list[str] | None:
    """The rules in a list of an untrusted config; None if it is anything else."""
    is_list = isinstance(value, list) and len(value) <= MAX_RULES
    return value if is_list and all(isinstance(rule, str) for rule in value) else None


def _producer(config: Mapping[str, Any]) -> str:
    for key, tool in (("autoround_version", "AutoRound"), ("version", "compressed-tensors")):
        if config_text(config, key):
            return f"{tool} {config_text(config, key)}"
    return config_text(config, "provider")


_W4_GROUP = _args(4, "group", group_size=128)
_W4_CHANNEL = _args(4, "channel")
_W8_CHANNEL = _args(8, "channel")
_STATIC_8 = _args(8, "tensor")
#: (label, weights, inputs, format) of the support matrix.
_SCHEMES: tuple[tuple[str, dict[str, Any], dict[str, Any] | None, str], ...] = (
    ("W8A8 dynamic", _W8_CHANNEL, _PER_TOKEN_8, _INT),
    ("W8A8 dynamic, asymmetric", _W8_CHANNEL, {**_PER_TOKEN_8, "symmetric": False}, _INT),
    ("W8A8 static", _W8_CHANNEL, _STATIC_8, _INT),
    ("W8A8 static, asymmetric", _W8_CHANNEL, {**_STATIC_8, "symmetric": False}, _INT),
    ("W8A16 channel", _W8_CHANNEL, None, _PACKED),
    ("W8A16 group", _args(8, "group", group_size=128), None, _PACKED),
    ("W4A16 channel", _W4_CHANNEL, None, _PACKED),
    ("W4A16 group", _W4_GROUP, None, _PACKED),
    ("W4A16 group, asymmetric", {**_W4_GROUP, "symmetric": False}, None, _PACKED),
    ("W4A8 channel", _W4_CHANNEL, _PER_TOKEN_8, _INT),
    ("W4A8 group", _W4_GROUP, _PER_TOKEN_8, _INT),
    ("W4A4 channel", _W4_CHANNEL, _args(4, "token", dynamic=True), _INT),
    ("FP8 dynamic", *_PRESETS["FP8_DYNAMIC"].values(), _FLOAT),
    ("FP8 static", *_PRESETS["FP8"].values(), _FLOAT),
    ("FP8 block", *_PRESETS["FP8_BLOCK"].values(), _FLOAT),
    ("MXFP8", *_PRESETS["MXFP8"].values(), "mxfp8-quantized"),
    ("MXFP4", *_PRESETS["MXFP4"].values(), "mxfp4-pack-quantized"),
    ("MXFP4 weights, FP8 inputs", _MXFP4, _FP8_PER_TOKEN, "mxfp4-pack-quantized"),
    ("MXFP4 weights", _MXFP4, None, "mxfp4-pack-quantized"),
    ("NVFP4", *_PRESETS["NVFP4"].values(), "nvfp4-pack-quantized"),
    ("NVFP4 weights", _NVFP4, None, "nvfp4-pack-quantized"),
)


def _samples() -> Iterator[Sample]:
    for label, weights, inputs, packing in _SCHEMES:
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config = {"quant_method": "compressed-tensors", "format": packing, "config_groups": {"group_0": scheme}}
        group = _read_group("group_0", QuantizationScheme.model_validate(scheme), packing, "", FindingLimit())
        listed = group.needs | ({"weight_shape"} if packing == _PACKED else set())
        yield Sample(label, config, sample_tensors(group.spec, listed) if group.spec is not None else {})


FORMAT = Format(
    name="compressed-tensors",
    read=read,
    method_name="npu_compressed_tensors",
    quant_methods=frozenset({"compressed-tensors"}),
    has_fields=lambda config: "config_groups" in config and "quant_algo" not in config,
    left_to_vllm_ascend=_left_to_vllm_ascend,
    producer=_producer,
    samples=_samples,
)
