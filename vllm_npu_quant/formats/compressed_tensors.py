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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_npu_quant.checkpoint.text import shown, shown_name
from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.base import FLOAT_ENTRY, LayerEntry
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.formats.fp8 import (
    KV_CACHE_TENSORS,
    KV_OUTPUTS,
    config_findings,
    fp8_spec,
    fp8_weight,
    kv_cache_finding,
    kv_cache_tensors,
    silent_finding,
    unknown_fields_finding,
)
from vllm_npu_quant.formats.patterns import PatternSet
from vllm_npu_quant.formats.resolve import variants
from vllm_npu_quant.formats.rules import FLOAT_DTYPES, RuleFormat, index_layers, is_embedding, stored_layers_of
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

__all__ = ["CompressedTensorsConfig", "CompressedTensorsFormat", "QuantizationArgs", "QuantizationScheme", "Targets"]

#: Entries of targets and ignore at most: real lists have a few per decoder layer.
_MAX_RULES = 200_000
_MAX_GROUPS = 10_000

_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_CHIPS_WITHOUT = "Ascend A2, A3 and 310P have no {what} instructions; Ascend 950 (A5) has"

#: Formats that are refused by name, and why.
_REFUSED_FORMATS = {
    "nvfp4-pack-quantized": _CHIPS_WITHOUT.format(what="FP4")
    + " FP4 of the MX kind, with power-of-two scales, but not this one",
    "mxfp4-pack-quantized": _CHIPS_WITHOUT.format(what="MXFP4") + " them, and this version does not serve them there",
    "mxfp8-quantized": _CHIPS_WITHOUT.format(what="MXFP8") + " them, and this version does not serve them there",
    "marlin-24": "the weights are packed for the 2:4 sparse instructions of NVIDIA GPUs",
    "sparse-24-bitmask": "weights of 2:4 sparsity are not decompressed",
    "sparse-bitmask": "sparse weights are not decompressed",
}
_PACKED, _INT, _FLOAT, _NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
_SERVED_FORMATS = (_PACKED, _INT, _FLOAT, _NAIVE)
_PACKED_LAYOUTS = (Layout.CT_PACKED, Layout.CT_PACKED_DENSE, Layout.CT_PACKED_ACT_ORDER)

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})")
#: The first release that packs integers as a stream of bits, without padding.
_DENSE_SINCE = (0, 18)
#: Formats that say nothing about how quantized weights lie: each group has its own, or the weights were not compressed.
_NO_FORMAT = ("mixed-precision", "dense", "fakequant")


class _Model(BaseModel):
    """Fields that are not known are accepted where they are empty. Elsewhere they may change what the weights mean."""

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
    """How one tensor is quantized: weights, input_activations, output_activations or the KV cache."""

    num_bits: StrictInt = Field(default=8, ge=1, le=16)
    type: Literal["int", "float"] = "int"
    symmetric: StrictBool = True
    group_size: StrictInt | None = Field(default=None, ge=-1, le=1 << 20)
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"] | None = None
    block_structure: tuple[StrictInt, StrictInt] | None = None
    dynamic: StrictBool | Literal["local"] = False
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
        """The strategy, which old configs leave to group_size."""
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
    """A group of layers that are quantized alike."""

    targets: tuple[StrictStr, ...] = Field(max_length=_MAX_RULES)
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    output_activations: QuantizationArgs | None = None
    format: StrictStr | None = None


def _args(num_bits: int, strategy: str, **fields: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "strategy": strategy, **fields}


_PER_TOKEN_8 = _args(8, "token", dynamic=True)
_FP8_PER_TOKEN = _args(8, "token", dynamic=True, type="float")
#: Names of schemes that a group may have in the place of its arguments: {"W8A8": ["Linear"]}.
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
}


class CompressedTensorsConfig(BaseModel):
    """The quantization_config. Fields that are not known are reported, and ignored as the library does."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "compressed-tensors"
    config_groups: dict[StrictStr, QuantizationScheme] = Field(default_factory=dict, max_length=_MAX_GROUPS)
    format: StrictStr | None = None
    ignore: tuple[StrictStr, ...] = Field(default=(), max_length=_MAX_RULES)
    kv_cache_scheme: QuantizationArgs | None = None
    quantization_status: StrictStr | None = None
    global_compression_ratio: float | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    version: StrictStr | None = None
    run_compressed: Any = None
    total_num_heads: StrictInt | None = None
    total_num_kv_heads: StrictInt | None = None
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

    @field_validator("ignore", "kv_cache_scheme", mode="before")
    @classmethod
    def _none(cls, value: Any, info: Any) -> Any:
        if info.field_name == "ignore":
            return () if value is None else value
        return None if value == {} else value


class Match(str, Enum):
    """How a rule matched a layer."""

    NAME = "name"
    PATTERN = "pattern"
    CLASS = "class"
    IGNORED = "ignored"
    NONE = "none"


class Targets:
    """The rules of a config. Small: names, expressions and classes, each with the number of its group.

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
        self.expressions = PatternSet([text[3:] for text in expressions], file=source, where="targets")
        self.linear = next((self.names[name] for name in _linear_classes(self.names)), None)
        self.embedding = self.names.get("Embedding")
        self.ignored = frozenset(rule for rule in ignore if not rule.startswith("re:"))
        self.ignored_expressions = PatternSet(
            [rule[3:] for rule in ignore if rule.startswith("re:")], file=source, where="ignore"
        )
        self.ignores_linear = bool(self.ignored & {"Linear", "Module"})

    @property
    def findings(self) -> tuple[Finding, ...]:
        return (*self.expressions.findings, *self.ignored_expressions.findings)

    def match(self, layer: str, *, linear: bool = True) -> tuple[int | None, Match]:
        """The group of a layer, None for a float one, and which kind of rule said so.

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
        # Rules are written with the names of the producer's modules, which a multimodal model's tensors may spell otherwise.
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
    """What a group's arguments mean: a spec, or None where it is not served (there is a finding then).

    Attributes:
        needs: optional tensors of the layout that the arguments call for.
    """

    spec: LayerSpec | None = None
    needs: frozenset[str] = frozenset()


@dataclass
class CompressedTensorsFormat(RuleFormat):
    """The layers of a compressed-tensors checkpoint.

    Attributes:
        targets: the rules; None where the config could not be read, or where the stored layers are known.
        groups: what each group means.
        kv_cache: names of the tensors that are dropped because they quantize the KV cache.
    """

    targets: Targets | None = None
    groups: tuple[_Group, ...] = ()
    kv_cache: tuple[str, ...] = ()

    name = "compressed-tensors"

    def rule(self, layer: str) -> LayerEntry | None:
        if self.targets is None:
            return None
        embedding = is_embedding(layer)
        number, _ = self.targets.match(layer, linear=not embedding)
        group = self.groups[number] if number is not None else None
        if group is None or group.spec is None:
            return None if embedding else FLOAT_ENTRY
        # What every release writes beside packed weights.
        listed = {"weight_shape"} if group.spec.layout in _PACKED_LAYOUTS else set()
        return LayerEntry(group.spec, group.needs | listed)

    def dropped_tensors(self) -> tuple[str, ...]:
        return self.kv_cache

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        source: str = "config.json",
        tensors: Mapping[str, StoredTensor] | None = None,
    ) -> CompressedTensorsFormat:
        """Validate a quantization_config and look up the stored layers.

        Args:
            config: the JSON object.
            source: the file it is in, for messages.
            tensors: dtypes and shapes of the checkpoint's tensors, where they are known.

        Returns:
            The format; ``findings`` holds everything that is wrong. Nothing is raised.
        """
        found = FindingLimit()
        try:
            parsed = CompressedTensorsConfig.model_validate(dict(config))
        except ValidationError as error:
            for finding in config_findings(error, source):
                found.add(finding)
            return cls(source=source, findings=tuple(found.close()))
        for finding in _refused_parts(parsed, source):
            found.add(finding)
        groups = []
        for name, scheme in parsed.config_groups.items():
            group, findings = _Reader(name, scheme, parsed.format, source).read()
            groups.append(group)
            for finding in findings:
                found.add(finding)
        # A group without weights (attention, the outputs of k_proj) does not take a layer from the group that has them.
        rules = [scheme.targets if scheme.weights is not None else () for scheme in parsed.config_groups.values()]
        targets = Targets(rules, parsed.ignore, source)
        for finding in targets.findings:
            found.add(finding)
        result = cls(source=source, groups=tuple(groups))
        builder = _Builder(parsed, tuple(groups), targets, found, source)
        if tensors is None:
            result.targets = targets
        else:
            builder.index(result, tensors)
        result.kv_cache = builder.kv_tensors(known=tensors is not None)
        result.findings = tuple(found.close())
        return result


#: Where the producer has multiplied the stored weights by the transform; nothing is left to do when the model runs.
_FUSED_LOCATIONS = ("weight_input", "weight_output")


def _online_transforms(config: Mapping[str, Any]) -> list[str]:
    """The transforms that the model would have to apply, as "name at location", in the config's order.

    SpinQuant's R1 and R2 are listed although they are fused: vLLM and the library ignore them, too. What is not understood
    counts as one that has to be applied.
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
    """Findings for the parts of a config that change what weights mean and are not served."""
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


class _Reader:
    """Turns one group's arguments into a LayerSpec."""

    def __init__(self, name: str, scheme: QuantizationScheme, config_format: str | None, source: str) -> None:
        self.name = name
        self.scheme = scheme
        self.format = scheme.format or config_format or ""
        self.source = source
        self.findings: list[Finding] = []

    def refuse(self, message: str, *, code: str = "unsupported-scheme", expected: str = "", found: str = "") -> _Group:
        self.findings.append(
            Finding(
                code,
                message,
                layer=f"config_groups.{shown_name(self.name, 80)}",
                file=self.source,
                expected=expected,
                found=found or ", ".join(shown_name(target, 80) for target in self.scheme.targets[:4]),
                fix="export the checkpoint with a scheme that is served, or leave these layers float",
            )
        )
        return _Group()

    def read(self) -> tuple[_Group, list[Finding]]:
        return self._read(), self.findings

    def _read(self) -> _Group:
        scheme, weights, inputs = self.scheme, self.scheme.weights, self.scheme.input_activations
        if weights is None:
            return self._without_weights()
        if scheme.output_activations is not None:
            return self.refuse("quantized outputs are not served", found=scheme.output_activations.describe())
        if self.format in _REFUSED_FORMATS:
            return self.refuse(f"{self.format}: {_REFUSED_FORMATS[self.format]}", found=weights.describe())
        if weights.type == "float" and weights.num_bits == 4:
            return self.refuse(_CHIPS_WITHOUT.format(what="FP4") + " some", found=weights.describe())
        if self.format not in _SERVED_FORMATS:
            known = (*_SERVED_FORMATS, *_REFUSED_FORMATS, *_NO_FORMAT)
            if self.format and self.format not in known:
                return self.refuse(
                    f"no such format: {shown_name(self.format, 80)}", code="unknown-scheme", expected=", ".join(known)
                )
            if self.format in ("dense", "fakequant"):
                return self.refuse(
                    "the weights were saved as floats (fake quantization), not compressed",
                    expected=f"format {', '.join(_SERVED_FORMATS)}",
                    found=f"format {self.format}",
                )
            return self.refuse("the group has no format", code="bad-config", expected=", ".join(_SERVED_FORMATS))
        if weights.dynamic:
            return self.refuse("weights cannot be dynamic", code="bad-config", found=weights.describe())
        if weights.type == "float":
            return self._fp8(weights, inputs)
        return self._int(weights, inputs)

    def _without_weights(self) -> _Group:
        """A group that quantizes inputs or outputs only: attention, whose KV cache stays in the model's dtype."""
        if self.scheme.input_activations is None and self.scheme.output_activations is None:
            return _Group()
        attention = all(
            target.endswith(("Attention", "Attn", "attn", "attn$", "k_proj", "v_proj", "proj$"))
            for target in self.scheme.targets
        )
        if attention:
            return _Group()
        return self.refuse("quantized activations without quantized weights are not served")

    def _fp8(self, weights: QuantizationArgs, inputs: QuantizationArgs | None) -> _Group:
        granularities = {"tensor": Granularity.TENSOR, "channel": Granularity.CHANNEL, "block": Granularity.BLOCK}
        if weights.num_bits != 8 or weights.granularity not in granularities or not weights.symmetric:
            return self.refuse(
                "FP8 weights are served per tensor, channel or block, symmetric",
                expected="8-bit float per tensor, channel or block",
                found=weights.describe(),
            )
        if self.format not in (_FLOAT, _NAIVE):
            return self.refuse(f"FP8 weights cannot have format {self.format}", code="bad-config", expected=_FLOAT)
        if inputs is not None and (inputs.type != "float" or inputs.num_bits != 8):
            return self.refuse("FP8 weights are served with FP8 or float inputs", found=inputs.describe())
        granularity = granularities[weights.granularity]
        stored = fp8_weight(granularity, weights.block_structure or (0, 0))
        static = inputs is not None and not inputs.dynamic
        kind = "W8A16" if inputs is None else "STATIC" if static else "DYNAMIC"
        name = f"FP8{'' if granularity is Granularity.TENSOR else '_' + granularity.value.upper()}_{kind}"
        spec = fp8_spec(name, stored, Layout.FP8, static=None if inputs is None else static)
        return _Group(spec, frozenset({"input_scale"}) if static else frozenset())

    def _int(self, weights: QuantizationArgs, inputs: QuantizationArgs | None) -> _Group:
        if self.format == _FLOAT:
            return self.refuse("integer weights cannot have format float-quantized", code="bad-config", expected=_INT)
        granularity = {"tensor": Granularity.TENSOR, "channel": Granularity.CHANNEL, "group": Granularity.GROUP}.get(
            weights.granularity
        )
        if granularity is None or weights.num_bits > 8:
            return self.refuse(
                "integer weights are served with up to 8 bits per tensor, channel or group", found=weights.describe()
            )
        grouped = granularity is Granularity.GROUP
        weight = WeightSpec(
            weights.num_bits,
            NumberKind.INT,
            granularity,
            weights.group_size if grouped and weights.group_size else 0,
            weights.symmetric,
        )
        activation = None
        if inputs is not None:
            activation = self._activation(inputs)
            if activation is None:
                return _Group()
        static = activation is not None and not activation.dynamic
        if static and self.format == _PACKED:
            return self.refuse("packed weights with static input scales are not served", found=weights.describe())
        act_order = weights.actorder == "group"
        if act_order and self.format != _PACKED:
            return self.refuse(
                "activation order by groups is served for packed weights", expected=_PACKED, found=self.format
            )
        needs = set() if weights.symmetric else {"weight_zero_point"}
        if static and activation is not None and not activation.symmetric:
            needs.add("input_zero_point")
        layout = Layout.CT_INT
        if self.format == _PACKED:
            layout = Layout.CT_PACKED_ACT_ORDER if act_order else Layout.CT_PACKED
        elif static:
            layout = Layout.CT_STATIC
        return _Group(LayerSpec(_int_name(weight, activation), layout, weight, activation), frozenset(needs))

    def _activation(self, inputs: QuantizationArgs) -> ActivationSpec | None:
        """The activation of an integer scheme; None (after a finding) where there is no operator for it."""
        if inputs.type != "int":
            self.refuse(
                _CHIPS_WITHOUT.format(what="FP8")
                + " them; FP8 inputs of integer weights are not replaced by another scheme",
                found=inputs.describe(),
            )
            return None
        wanted = "token" if inputs.dynamic else "tensor"
        if inputs.granularity != wanted or inputs.dynamic == "local":
            self.refuse(
                "integer inputs are served dynamic per token, or static per tensor",
                expected="strategy token with dynamic: true, or strategy tensor with dynamic: false",
                found=inputs.describe(),
            )
            return None
        granularity = Granularity.TOKEN if inputs.dynamic else Granularity.TENSOR
        return ActivationSpec(
            inputs.num_bits, dynamic=bool(inputs.dynamic), granularity=granularity, symmetric=inputs.symmetric
        )


def _stored_layout(layout: Layout, named: Mapping[str, StoredTensor]) -> Layout:
    """The layout of a packed weight by its tensors: activation order is stored where the config does not tell, and old
    releases did not pack zero points."""
    if layout not in (Layout.CT_PACKED, Layout.CT_PACKED_ACT_ORDER):
        return layout
    ordered = layout is Layout.CT_PACKED_ACT_ORDER or "weight_g_idx" in named
    zero = named.get("weight_zero_point")
    if zero is not None and zero.dtype == "I8":
        return Layout.CT_PACKED_PLAIN_ZERO_ACT_ORDER if ordered else Layout.CT_PACKED_PLAIN_ZERO
    return Layout.CT_PACKED_ACT_ORDER if ordered else Layout.CT_PACKED


def _int_name(weight: WeightSpec, activation: ActivationSpec | None) -> str:
    """The scheme in the field's short form: W4A16, W8A8_DYNAMIC, W8A8_STATIC."""
    if activation is None:
        return f"W{weight.bits}A16"
    return f"W{weight.bits}A{activation.bits}_{'DYNAMIC' if activation.dynamic else 'STATIC'}"


@dataclass
class _Builder:
    """Looks up the stored layers of one checkpoint."""

    config: CompressedTensorsConfig
    groups: tuple[_Group, ...]
    targets: Targets
    found: FindingLimit
    source: str
    silent: list[str] = field(default_factory=list)
    kv_found: set[str] = field(default_factory=set)
    not_compressed: list[str] = field(default_factory=list)

    def index(self, result: CompressedTensorsFormat, tensors: Mapping[str, StoredTensor]) -> None:
        stored = stored_layers_of(tensors)
        for name in self.targets.names:
            # A layer that the config names, and of which nothing is stored: its tensors are reported missing.
            if ("." in name or name == "lm_head") and name not in stored:
                stored[name] = {}
        result.index = index_layers(stored, self.decide, self.source)
        for finding in result.index.findings:
            self.found.add(finding)
        line = silent_finding(self.silent, self.source)
        if line is not None:
            self.found.add(line)
        if self.not_compressed:
            self.found.add(
                Finding(
                    "unsupported-scheme",
                    f"{len(self.not_compressed)} layers have scales beside float weights: they were saved as fake "
                    "quantization, not compressed",
                    layer=self.not_compressed[0],
                    file=self.source,
                    expected="weight_packed, or a weight of 8 bits per element",
                    found=", ".join(self.not_compressed[:4]),
                    fix="save the model with save_compressed=True",
                )
            )

    def kv_tensors(self, *, known: bool) -> tuple[str, ...]:
        """The tensors to drop; reports them."""
        outputs = any(
            scheme.output_activations is not None and scheme.weights is None
            for scheme in self.config.config_groups.values()
        )
        scheme = self.config.kv_cache_scheme
        if not (self.kv_found or scheme is not None or outputs):
            return () if known else KV_CACHE_TENSORS
        what = ", ".join(sorted(self.kv_found)) or "kv_cache_scheme"
        self.found.add(kv_cache_finding(f"{what}: {scheme.describe()}" if scheme is not None else what, self.source))
        return (*KV_CACHE_TENSORS, *KV_OUTPUTS)

    def decide(self, layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
        """The entry of one stored layer."""
        kv = kv_cache_tensors(layer, named)
        self.kv_found |= kv
        weight = named.get("weight_packed") or named.get("weight")
        scaled = not {"weight_scale", "weight_scale_inv"}.isdisjoint(named)
        floats = weight is not None and weight.dtype in FLOAT_DTYPES and "weight_packed" not in named
        linear = not is_embedding(layer) and (weight is None or not floats or len(weight.shape) == 2)
        number, match = self.targets.match(layer, linear=linear)
        group = self.groups[number] if number is not None else None
        if weight is None and not scaled and match is not Match.NAME:
            return None  # a lone parameter, or the scales of a KV cache
        if floats:
            if group is None or group.spec is None:
                return FLOAT_ENTRY
            if scaled:
                self.not_compressed.append(layer)
                return None
            if match is not Match.NAME:
                if linear:
                    self.silent.append(layer)
                return FLOAT_ENTRY
        if group is None:
            self._contradiction(layer, named, match)
            return None
        if group.spec is None:
            return None  # the group's finding says why
        return self._entry(layer, group, named, kv)

    def _entry(self, layer: str, group: _Group, named: Mapping[str, StoredTensor], kv: set[str]) -> LayerEntry | None:
        spec = group.spec
        assert spec is not None
        spec = replace(spec, layout=_stored_layout(spec.layout, named))
        if spec.layout is Layout.CT_PACKED and self._dense(spec, named):
            spec = replace(spec, layout=Layout.CT_PACKED_DENSE)
        known = {tensor.name: tensor for tensor in LAYOUTS[spec.layout].tensors}
        for name in named:
            if name not in known and name not in kv:
                self.found.add(
                    Finding(
                        "unexpected-tensor",
                        f"{spec.scheme} has no tensor {name}, so its effect would be lost",
                        layer=layer,
                        file=named[name].file,
                        expected=", ".join(known),
                        found=name,
                        fix="update vllm-npu-quant, or re-export the checkpoint without it",
                    )
                )
        optional = {name for name in named if name in known and known[name].optional}
        return LayerEntry(spec, group.needs | optional)

    def _dense(self, spec: LayerSpec, named: Mapping[str, StoredTensor]) -> bool:
        """Whether integers are packed without padding, where that is another thing: for 3 bits.

        The number of words says it where the groups tell the number of inputs, else the release that is named in the config.
        """
        weight = spec.weight
        if weight is None or weight.bits != 3:
            return False
        packed, scale = named.get("weight_packed"), named.get("weight_scale")
        if (
            weight.group_size
            and packed is not None
            and scale is not None
            and len(packed.shape) == len(scale.shape) == 2
        ):
            inputs = scale.shape[1] * weight.group_size
            if packed.shape[1] == -(-inputs * weight.bits // 32):
                return True
            if packed.shape[1] == -(-inputs // (32 // weight.bits)):
                return False
        release = _VERSION.match(self.config.version or "")
        return release is not None and tuple(map(int, release.groups())) >= _DENSE_SINCE

    def _contradiction(self, layer: str, named: Mapping[str, StoredTensor], match: Match) -> None:
        stored = named.get("weight_packed") or named.get("weight") or next(iter(named.values()))
        ignored = match is Match.IGNORED
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
