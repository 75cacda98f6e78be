# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt checkpoints (``quant_method: modelopt``), and MiniMax's MXFP8 (``quant_method: mxfp8``), alike in storage.

Two spellings: ``quantization_config`` of config.json with ``quant_algo`` and ``ignore``, and the older file
hf_quant_config.json, whose object ``quantization`` has ``exclude_modules``; vLLM reads both. A scheme may be named per layer
(``MIXED_PRECISION`` and ``quantized_layers``).

The stored tensors tell which floats a layer has (dtypes of the weight and of its scale); the config has to agree, and says
how inputs are quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator, model_validator

from vllm_npu_quant.checkpoint.text import shown
from vllm_npu_quant.errors import Finding, FindingLimit, nearest_names
from vllm_npu_quant.formats.common import (
    FLOAT_DTYPES,
    KV_CACHE_TENSORS,
    KV_OUTPUTS,
    MAX_RULES,
    config_text,
    kv_cache_finding,
    kv_cache_tensors,
    layer_entry,
    parse_config,
    unknown_fields_finding,
)
from vllm_npu_quant.formats.declaration import Format, Sample, plain_method
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.fp8 import (
    ExcludedLayers,
    fp8_weight,
    named_fp8_spec,
    stored_fp8_weight,
    stored_quantized,
)
from vllm_npu_quant.formats.index import index_by_rules, is_embedding, stored_layers_of
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.formats.small_floats import MXFP4, MXFP8, NVFP4, SCALE_CODES, block_float_spec
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = ["FORMAT", "ModelOptConfig", "read"]

#: The file beside config.json that ModelOpt 0.29 and earlier describe the quantization in.
HF_QUANT_CONFIG = "hf_quant_config.json"

_MIXED = "MIXED_PRECISION"
#: ``quant_algo`` -> the floats of the weights, and the bits of the inputs' floats; None if inputs are not quantized.
_ALGORITHMS: dict[str, tuple[str, int | None]] = {
    "FP8": ("FP8", 8),
    "FP8_PER_CHANNEL_PER_TOKEN": ("FP8", 8),
    "FP8_PB_WO": ("FP8", 8),
    "FP8_BLOCK_SCALES": ("FP8", 8),
    "MXFP8": ("MXFP8", 8),
    "NVFP4": ("NVFP4", 4),
    "NVFP4_AWQ": ("NVFP4", 4),
    "W4A8_NVFP4_FP8": ("NVFP4", 8),
    "W4A16_NVFP4": ("NVFP4", None),
    "MXFP4": ("MXFP4", 4),
    "W4A8_MXFP4_FP8": ("MXFP4", 8),
    "W4A16_MXFP4": ("MXFP4", None),
}
#: The algorithm of floats for which the config names none.
_USUAL = {"FP8": "FP8", "MXFP8": "MXFP8", "NVFP4": "NVFP4", "MXFP4": "MXFP4"}
_WEIGHTS = {"MXFP8": MXFP8, "MXFP4": MXFP4}

#: Blocks of FP8: 128 outputs by 128 inputs.
_BLOCK = (128, 128)


class LayerAlgorithm(BaseModel):
    """The scheme of one layer or module of a mixed checkpoint."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    quant_algo: StrictStr
    group_size: StrictInt | None = Field(default=None, ge=2, le=65536, multiple_of=2)

    @field_validator("quant_algo")
    @classmethod
    def _upper(cls, value: str) -> str:
        return value.upper()


class ModelOptConfig(BaseModel):
    """Both spellings of the config. Unknown fields are accepted and reported."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "modelopt"
    quant_algo: StrictStr | None = None
    group_size: StrictInt | None = Field(default=None, ge=2, le=65536, multiple_of=2)
    quantized_layers: dict[StrictStr, LayerAlgorithm] = Field(default_factory=dict, max_length=MAX_RULES)
    ignore: tuple[StrictStr, ...] | None = Field(default=None, max_length=MAX_RULES)
    exclude_modules: tuple[StrictStr, ...] | None = Field(default=None, max_length=MAX_RULES)
    ignored_layers: tuple[StrictStr, ...] | None = Field(default=None, max_length=MAX_RULES)
    modules_to_not_convert: tuple[StrictStr, ...] | None = Field(default=None, max_length=MAX_RULES)
    kv_cache_quant_algo: StrictStr | None = None
    kv_cache_scheme: Any = None
    # How it was made, and what the shapes of the scales say as well.
    producer: Any = None
    config_groups: Any = None
    activation_scheme: Any = None
    weight_block_size: Any = None
    fmt: Any = None
    scale_fmt: Any = None

    @model_validator(mode="before")
    @classmethod
    def _one_level(cls, config: Any) -> Any:
        """hf_quant_config.json's inner object in place of the outer one; MiniMax's config names no algorithm."""
        if not isinstance(config, Mapping):
            return config
        inner = config.get("quantization")
        merged = {key: value for key, value in config.items() if key != "quantization"}
        if inner is not None and not isinstance(inner, Mapping):
            raise ValueError("quantization is an object")
        merged |= inner or {}
        if plain_method(merged.get("quant_method")) == "mxfp8" and merged.get("quant_algo") is None:
            merged["quant_algo"] = "MXFP8"
        if merged.get("quantized_layers", 0) is None:
            del merged["quantized_layers"]
        return merged

    @field_validator("quant_algo")
    @classmethod
    def _upper(cls, value: str | None) -> str | None:
        return value.upper() if value is not None else None

    @property
    def excluded(self) -> tuple[str, ...]:
        """The rules of the layers that the config calls float: names, or wildcards."""
        fields = (self.ignore, self.exclude_modules, self.ignored_layers, self.modules_to_not_convert)
        return tuple(dict.fromkeys(rule for rules in fields for rule in rules or ()))


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe the layers of a ModelOpt checkpoint. Raises nothing: problems are in ``findings``.

    Args:
        config: the ``quantization_config``, or the object of hf_quant_config.json.
        tensors: the stored tensors by name.
        source: the name of the config's file, for findings.
        checkpoint: not used.
    """
    found = FindingLimit()
    described = Described("modelopt", source)
    parsed = parse_config(ModelOptConfig, config, source, found)
    problems = [] if parsed is None else _config_problems(parsed, source)
    found.extend(problems)
    if parsed is not None and not any(finding.code == "unsupported-scheme" for finding in problems):
        _describe_layers(described, parsed, tensors, found)
    described.findings = tuple(found.close())
    return described


def _config_problems(config: ModelOptConfig, source: str) -> list[Finding]:
    findings = []
    named = [config.quant_algo, *(layer.quant_algo for layer in config.quantized_layers.values())]
    for algorithm in dict.fromkeys(named):
        if algorithm is None or algorithm in _ALGORITHMS or algorithm == _MIXED:
            continue
        findings.append(
            Finding(
                "unsupported-scheme",
                "this algorithm of ModelOpt is not served",
                file=source,
                expected="quant_algo " + ", ".join((*_ALGORITHMS, _MIXED)),
                found=shown(algorithm),
                nearest=nearest_names(algorithm[:60], _ALGORITHMS),
                fix="export the checkpoint with one of these, or with another tool: llm-compressor, msModelSlim",
            )
        )
    unknown = unknown_fields_finding(config.model_extra, source)
    return findings[:20] + ([unknown] if unknown is not None else [])


def _describe_layers(
    described: Described, config: ModelOptConfig, tensors: Mapping[str, StoredTensor], found: FindingLimit
) -> None:
    """Fill ``described`` with the stored layers."""
    source = described.source
    excluded = ExcludedLayers([_expression(rule) for rule in config.excluded], source, "ignore")
    found.extend(excluded.patterns.findings)
    layers = _Layers(config, excluded, source, found)
    index_by_rules(described, stored_layers_of(tensors), layers.entry, layers.stored_as_float, found)
    cache = config.kv_cache_quant_algo or ("kv_cache_scheme" if config.kv_cache_scheme else "")
    if layers.kv_cache:
        described.dropped = (*KV_CACHE_TENSORS, *KV_OUTPUTS)
    if layers.kv_cache or cache:
        found.add(kv_cache_finding("k_scale, v_scale" if layers.kv_cache else cache[:40], source))


def _expression(rule: str) -> str:
    """A rule of ``ExcludedLayers``: a wildcard as a regular expression, other rules as they are."""
    if rule.startswith("re:") or not ("*" in rule or "?" in rule):
        return rule
    parts = re.split(r"([*?])", rule)
    return "re:" + "".join({"*": ".*", "?": "."}.get(part, re.escape(part)) for part in parts) + "$"


@dataclass
class _Layers:
    """Decides the entries of one checkpoint's layers.

    Attributes:
        stored_as_float: Linear layers that are stored as float although no rule excludes them.
        kv_cache: whether a layer has tensors that quantize the KV cache.
    """

    config: ModelOptConfig
    excluded: ExcludedLayers
    source: str
    found: FindingLimit
    stored_as_float: list[str] = field(default_factory=list)
    kv_cache: bool = False

    def entry(self, layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
        """The entry of one stored layer; None for a lone parameter, or after a finding."""
        kv = kv_cache_tensors(layer, named)
        self.kv_cache |= bool(kv)
        weight = named.get("weight")
        if weight is None:
            return None
        scale = named.get("weight_scale", named.get("weight_scale_inv"))
        if weight.dtype in FLOAT_DTYPES and scale is None:
            if len(weight.shape) == 2 and not is_embedding(layer) and not self._is_float(layer):
                self.stored_as_float.append(layer)
            return FLOAT_ENTRY
        if self.excluded.contains(layer):
            self.found.add(stored_quantized(layer, weight, self.source, "ignore (or exclude_modules)"))
            return None
        own = self._algorithm(layer)
        floats = _stored_floats(weight, scale)
        algorithm = own.quant_algo if own is not None else _USUAL[floats or "FP8"]
        expected = _ALGORITHMS[algorithm][0]
        if floats and floats != expected:
            self.found.add(self._contradiction(layer, weight, scale, algorithm, floats))
            return None
        spec = _spec(algorithm, own.group_size if own is not None else None, named)
        return layer_entry(layer, spec, named, self.found, ignored=kv)

    def _is_float(self, layer: str) -> bool:
        """Whether the config calls a layer float: a rule covers it, or its list of quantized layers lacks it."""
        listed = self.config.quantized_layers
        return self.excluded.covers(layer) or (bool(listed) and self._algorithm(layer) is None)

    def _algorithm(self, layer: str) -> LayerAlgorithm | None:
        """The algorithm that the config names for a layer, or for a module that the layer belongs to."""
        algorithm, listed = self.config.quant_algo, self.config.quantized_layers
        if algorithm is not None and algorithm != _MIXED:
            return LayerAlgorithm(quant_algo=algorithm, group_size=self.config.group_size)
        module = layer if listed else ""
        while module:
            if module in listed:
                return listed[module]
            module = module.rpartition(".")[0]
        return None

    def _contradiction(
        self, layer: str, weight: StoredTensor, scale: StoredTensor | None, algorithm: str, floats: str
    ) -> Finding:
        return Finding(
            "bad-config",
            f"the config says {algorithm}, and the layer is stored as {floats}",
            layer=layer,
            file=self.source,
            expected=f"the tensors of {algorithm}",
            found=f"weight {weight.dtype}" + (f", scale {scale.dtype}" if scale is not None else ""),
            fix="copy the producer's config, or re-export the checkpoint",
        )


def _stored_floats(weight: StoredTensor, scale: StoredTensor | None) -> str:
    """The floats that a weight is stored as, by its dtype and that of its scale; empty if they do not say."""
    if scale is None:
        return ""
    power_of_two = scale.dtype in SCALE_CODES
    if weight.dtype == "U8":
        return "MXFP4" if power_of_two else "NVFP4"
    return ("MXFP8" if power_of_two else "FP8") if weight.dtype == "F8_E4M3" else ""


def _spec(algorithm: str, group_size: int | None, named: Mapping[str, StoredTensor]) -> LayerSpec:
    """The spec of a layer: of FP8 by the shape of its scale, of the others by the algorithm."""
    inverse = "weight_scale_inv" in named
    if _ALGORITHMS[algorithm][0] == "FP8":
        scale = named.get("weight_scale_inv" if inverse else "weight_scale")
        layout = Layout.FP8_BLOCK_4D if scale is not None and len(scale.shape) == 4 else Layout.FP8
        weight = stored_fp8_weight(named["weight"], scale, _BLOCK)
        return named_fp8_spec(weight, Layout.FP8_INV if inverse else layout, static="input_scale" in named)
    return _block_spec(algorithm, group_size, frozenset(named))


def _block_spec(algorithm: str, group_size: int | None, names: frozenset[str]) -> LayerSpec:
    """The spec of a layer with scales per block of inputs, from the names of its tensors."""
    floats, bits = _ALGORITHMS[algorithm]
    if floats == "NVFP4":
        weight = NVFP4 if group_size is None else replace(NVFP4, group_size=group_size)
        # Exports that quantize weights only say NVFP4, too.
        return block_float_spec(floats, Layout.NVFP4, weight, bits if "input_scale" in names else None)
    layout = Layout.MXFP8_INV if "weight_scale_inv" in names else Layout.MXFP8
    return block_float_spec(floats, Layout.MXFP4 if floats == "MXFP4" else layout, _WEIGHTS[floats], bits)


def _has_fields(config: Mapping[str, Any]) -> bool:
    """Whether a config without a ``quant_method`` is ModelOpt's, by the producer that hf_quant_config.json names."""
    producer = config.get("producer")
    return isinstance(producer, Mapping) and producer.get("name") == "modelopt"


def _left_to_vllm_ascend(config: Mapping[str, Any], model: Any) -> bool:
    from vllm_npu_quant.ascend.ownership import serves_modelopt

    return serves_modelopt(config)


def _beside(names: Iterable[str]) -> str | None:
    return HF_QUANT_CONFIG if HF_QUANT_CONFIG in names else None


def _producer(config: Mapping[str, Any]) -> str:
    producer = config.get("producer")
    if not isinstance(producer, Mapping):
        return ""
    return f"{config_text(producer, 'name')} {config_text(producer, 'version')}".strip()


def _samples() -> Iterator[Sample]:
    config = {"quant_method": "modelopt", "ignore": ["lm_head"]}
    for label, algorithm, listed in (
        ("NVFP4", "NVFP4", ("input_scale",)),
        ("NVFP4 weights", "W4A16_NVFP4", ()),
        ("MXFP8", "MXFP8", ()),
        ("MXFP4", "MXFP4", ()),
    ):
        tensors = sample_tensors(_block_spec(algorithm, None, frozenset(listed)), listed)
        yield Sample(label, {**config, "quant_algo": algorithm}, tensors)
    for label, algorithm, granularity, layout, static in (
        ("FP8", "FP8", Granularity.TENSOR, Layout.FP8, True),
        ("FP8 per channel", "FP8_PER_CHANNEL_PER_TOKEN", Granularity.CHANNEL, Layout.FP8, False),
        ("FP8 block", "FP8_PB_WO", Granularity.BLOCK, Layout.FP8_BLOCK_4D, False),
    ):
        weight = fp8_weight(granularity, _BLOCK if granularity is Granularity.BLOCK else (0, 0))
        spec = named_fp8_spec(weight, layout, static=static)
        tensors = sample_tensors(spec, ("input_scale",) if static else ())
        yield Sample(label, {**config, "quant_algo": algorithm}, tensors)


FORMAT = Format(
    name="modelopt",
    title="ModelOpt",
    read=read,
    method_name="npu_modelopt",
    quant_methods=frozenset({"modelopt", "modelopt-fp4", "modelopt-mxfp8", "modelopt-mixed", "mxfp8"}),
    file_beside=_beside,
    read_by_vllm=True,
    needs_file=f"{HF_QUANT_CONFIG} beside config.json, or quantization_config in it",
    has_fields=_has_fields,
    left_to_vllm_ascend=_left_to_vllm_ascend,
    producer=_producer,
    samples=_samples,
)
