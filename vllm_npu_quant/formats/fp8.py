# SPDX-License-Identifier: Apache-2.0
"""FP8 checkpoints (``quant_method: fp8``, and ``fbgemm_fp8``, which is FP8 per channel).

Spellings: DeepSeek's and transformers' blocks (``weight_block_size``, ``weight_scale_inv``), per-tensor and per-channel
scales (``weight_scale``), Mistral's per-tensor ``weight_scale_inv`` with ``activation_scale``; static and dynamic
activations; ``modules_to_not_convert`` or ``ignored_layers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, StrictStr, field_validator

from vllm_npu_quant.checkpoint.text import shown
from vllm_npu_quant.errors import Finding, FindingLimit
from vllm_npu_quant.formats.common import (
    FLOAT_DTYPES,
    KV_CACHE_TENSORS,
    KV_OUTPUTS,
    MAX_RULES,
    Bool,
    ComponentRules,
    ConfigModel,
    Int,
    Work,
    config_text,
    kv_cache_finding,
    kv_cache_tensors,
    layer_entry,
    parse_config,
    unknown_fields_finding,
)
from vllm_npu_quant.formats.declaration import Format, Sample
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.index import index_by_rules, is_embedding, stored_layers_of
from vllm_npu_quant.formats.patterns import PatternSet
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = [
    "FORMAT",
    "FP8_DTYPES",
    "ExcludedLayers",
    "Fp8Config",
    "fp8_activation",
    "fp8_spec",
    "fp8_weight",
    "named_fp8_spec",
    "read",
    "stored_fp8_weight",
    "stored_quantized",
]

#: safetensors dtypes of 8-bit floats.
FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


def fp8_spec(scheme: str, weight: WeightSpec, layout: Layout, *, static: bool | None) -> LayerSpec:
    """The spec of a layer with FP8 weights.

    Args:
        scheme: the producer's name for it ("FP8_BLOCK").
        weight: as ``fp8_weight`` gives it.
        layout: that of its tensors.
        static: whether the input's scale is static; None if the input is not quantized.
    """
    return LayerSpec(scheme, layout, weight, None if static is None else fp8_activation(static=static))


def fp8_activation(*, static: bool) -> ActivationSpec:
    """FP8 inputs: one scale per tensor if static, else per token."""
    granularity = Granularity.TENSOR if static else Granularity.TOKEN
    return ActivationSpec(8, dynamic=not static, granularity=granularity, kind=NumberKind.FLOAT)


def fp8_weight(granularity: Granularity, block: Sequence[int] = (0, 0)) -> WeightSpec:
    """A stored FP8 weight.

    Args:
        granularity: TENSOR, CHANNEL or BLOCK.
        block: output rows and inputs per block.
    """
    return WeightSpec(8, NumberKind.FLOAT, granularity, block[1], block_rows=block[0])


#: Fields that AutoRound's export in the format "fp8" adds: the scheme again, and how it was made.
_AUTO_ROUND_FIELDS = frozenset(
    {
        *("bits", "data_type", "group_size", "sym"),
        *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym"),
        *("amp", "autoround_version", "block_name_to_quantize", "enable_quanted_input", "iters", "nsamples", "seqlen"),
    }
)


class Fp8Config(ConfigModel):
    """``quantization_config`` of an FP8 checkpoint. Unknown fields are accepted, and reported unless they are empty."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "fp8"
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: tuple[Int, Int] | None = None
    modules_to_not_convert: tuple[StrictStr, ...] | None = Field(default=None, max_length=MAX_RULES)
    ignored_layers: tuple[StrictStr, ...] | None = Field(default=None, max_length=MAX_RULES)
    fmt: StrictStr | None = None
    scale_fmt: StrictStr | None = None
    dequantize: Bool | None = None
    kv_cache_scheme: Any = None
    store_dtype: StrictStr | None = None
    is_checkpoint_fp8_serialized: Bool | None = None
    activation_scale_ub: float | None = None
    weight_per_tensor: Bool | None = None
    act_per_tensor: Bool | None = None

    @field_validator("weight_block_size")
    @classmethod
    def _positive(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not all(0 < size <= 65536 for size in value):
            raise ValueError("weight_block_size needs two sizes from 1 to 65536")
        return value

    @property
    def skipped(self) -> tuple[str, ...]:
        """The layers that the config calls float."""
        return tuple(dict.fromkeys((*(self.ignored_layers or ()), *(self.modules_to_not_convert or ()))))


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe the layers of an FP8 checkpoint. Raises nothing: problems are in ``findings``.

    Args:
        config: the ``quantization_config``.
        tensors: the stored tensors by name.
        source: the name of the config's file, for findings.
        checkpoint: not used.
    """
    found = FindingLimit()
    described = Described("fp8", source)
    parsed = parse_config(Fp8Config, config, source, found)
    if parsed is not None:
        found.extend(_config_problems(parsed, source))
        _describe_layers(described, parsed, tensors, found)
    described.findings = tuple(found.close())
    return described


def _describe_layers(
    described: Described, config: Fp8Config, tensors: Mapping[str, StoredTensor], found: FindingLimit
) -> None:
    """Fill ``described`` with the stored layers."""
    source = described.source
    excluded = ExcludedLayers(config.skipped, source, "ignored_layers")
    found.extend(excluded.patterns.findings)
    layers = _Layers(config, excluded, source, found)
    index_by_rules(described, stored_layers_of(tensors), layers.entry, layers.stored_as_float, found)
    if layers.kv_cache:
        described.dropped = (*KV_CACHE_TENSORS, *KV_OUTPUTS)
    if layers.kv_cache or config.kv_cache_scheme:
        found.add(kv_cache_finding("k_scale, v_scale" if layers.kv_cache else "kv_cache_scheme", source))


class ExcludedLayers:
    """The layers that a config calls float, by names and by regular expressions after "re:".

    Attributes:
        names: the names; a name also stands for the layers of a module, or for all layers that end in it.
        patterns: the regular expressions, matched at the start of a layer's name.
    """

    def __init__(self, rules: Sequence[str], source: str, where: str) -> None:
        """
        Args:
            rules: names, and expressions after "re:".
            source, where: the file and the field to name in findings.
        """
        self.names = frozenset(rule for rule in rules if not rule.startswith("re:"))
        expressions = [rule.removeprefix("re:") for rule in rules if rule.startswith("re:")]
        self.patterns = PatternSet(expressions, file=source, where=where)
        self._components = ComponentRules(self.names, Work(source))

    def contains(self, layer: str) -> bool:
        """Whether a rule names exactly this layer, or a regular expression matches it."""
        return layer in self.names or self.patterns.any(layer)

    def covers(self, layer: str) -> bool:
        """``contains``, or a rule names some of its components ("mlp", "layers.0")."""
        return self.contains(layer) or self._components.match(layer)


@dataclass
class _Layers:
    """Decides the entries of one checkpoint's layers.

    Attributes:
        stored_as_float: Linear layers that are stored as float although no rule excludes them.
        kv_cache: whether a layer has tensors that quantize the KV cache.
    """

    config: Fp8Config
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
        scale_name = "weight_scale_inv" if "weight_scale_inv" in named else "weight_scale"
        scale = named.get(scale_name)
        if weight.dtype in FLOAT_DTYPES and scale is None:
            if len(weight.shape) == 2 and not is_embedding(layer) and not self.excluded.covers(layer):
                self.stored_as_float.append(layer)
            return FLOAT_ENTRY
        if self.excluded.contains(layer):
            self.found.add(stored_quantized(layer, weight, self.source, "modules_to_not_convert (or ignored_layers)"))
            return None
        stored = stored_fp8_weight(weight, scale, self.config.weight_block_size)
        static = not {"input_scale", "activation_scale"}.isdisjoint(named)
        layout = Layout.FP8_INV if scale_name == "weight_scale_inv" else Layout.FP8
        return layer_entry(layer, named_fp8_spec(stored, layout, static=static), named, self.found, ignored=kv)


def stored_quantized(layer: str, weight: StoredTensor, source: str, where: str) -> Finding:
    """The finding for a layer that the config calls float in the field ``where``, and whose weight is stored quantized."""
    return Finding(
        "bad-config",
        "the config calls the layer float, and its weight is stored quantized",
        layer=layer,
        file=source,
        expected="a float weight",
        found=f"{weight.dtype} in {weight.file}",
        fix=f"remove the layer from {where}, or re-export the weights",
    )


def stored_fp8_weight(
    weight: StoredTensor, scale: StoredTensor | None, block: tuple[int, int] | None = None
) -> WeightSpec:
    """The spec of a stored FP8 weight, by the shape of its scale.

    Args:
        block: output rows and inputs per scale, if the config names blocks; taken if the shape fits nothing else.
    """
    named = fp8_weight(Granularity.BLOCK, block) if block else fp8_weight(Granularity.TENSOR)
    if scale is None or len(weight.shape) != 2:
        return named
    outputs, inputs = weight.shape
    if block:
        rows, columns = -(-outputs // block[0]), -(-inputs // block[1])
        if scale.shape in ((rows, columns), (rows, 1, columns, 1)):
            return named
    if scale.shape in ((), (1,), (1, 1)):
        return fp8_weight(Granularity.TENSOR)
    if scale.shape in ((outputs,), (outputs, 1)):
        return fp8_weight(Granularity.CHANNEL)
    return named


def named_fp8_spec(weight: WeightSpec, layout: Layout, *, static: bool) -> LayerSpec:
    """``fp8_spec`` with a scheme by granularity and activation: "FP8_BLOCK_DYNAMIC"."""
    granularity = "" if weight.granularity is Granularity.TENSOR else f"_{weight.granularity.value.upper()}"
    return fp8_spec(f"FP8{granularity}_{'STATIC' if static else 'DYNAMIC'}", weight, layout, static=static)


def _config_problems(config: Fp8Config, source: str) -> list[Finding]:
    findings = []
    if config.fmt is not None and config.fmt.lower() not in ("e4m3", "float8_e4m3fn", "e4m3fn"):
        findings.append(
            Finding(
                "unsupported-scheme",
                "only FP8 with 4 exponent bits (E4M3) is converted",
                file=source,
                expected="fmt: e4m3",
                found=shown(config.fmt),
                fix="export the checkpoint as E4M3, or as int8",
            )
        )
    if config.store_dtype not in (None, "", "fp8", "float8_e4m3fn"):
        findings.append(
            Finding(
                "unsupported-scheme",
                "the experts are stored in another number format, which is not converted",
                file=source,
                expected="no store_dtype",
                found=shown(config.store_dtype),
                fix="use a checkpoint whose experts are FP8 or int8",
            )
        )
    if config.is_checkpoint_fp8_serialized is False:
        findings.append(
            Finding(
                "unsupported-scheme",
                "the config asks for quantization while the model loads, which is not offered",
                file=source,
                expected="weights that are stored as FP8",
                found="is_checkpoint_fp8_serialized: false",
                fix="remove quantization_config from config.json to serve the weights as they are",
            )
        )
    extra = config.model_extra or {}
    if extra.get("bits") == 8 and extra.get("data_type") in ("fp", "fp8", "fp8_e4m3"):
        extra = {name: value for name, value in extra.items() if name not in _AUTO_ROUND_FIELDS}
    unknown = unknown_fields_finding(extra, source)
    return findings + ([unknown] if unknown is not None else [])


def _left_to_vllm_ascend(config: Mapping[str, Any], model: Any) -> bool:
    from vllm_npu_quant.ascend.ownership import serves_fp8

    return serves_fp8(config, model)


def _producer(config: Mapping[str, Any]) -> str:
    version = config_text(config, "autoround_version")
    return f"AutoRound {version}" if version else config_text(config, "provider")


def _samples() -> Iterator[Sample]:
    block = named_fp8_spec(fp8_weight(Granularity.BLOCK, (128, 128)), Layout.FP8_INV, static=False)
    tensor = fp8_weight(Granularity.TENSOR)
    dynamic, static = (named_fp8_spec(tensor, Layout.FP8, static=static) for static in (False, True))
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    yield Sample("block 128 x 128", {**config, "weight_block_size": [128, 128]}, sample_tensors(block))
    yield Sample("per tensor, dynamic", config, sample_tensors(dynamic))
    yield Sample(
        "per tensor, static", {**config, "activation_scheme": "static"}, sample_tensors(static, ("input_scale",))
    )


FORMAT = Format(
    name="fp8",
    read=read,
    method_name="npu_fp8",
    quant_methods=frozenset({"fp8", "fbgemm-fp8"}),
    has_fields=lambda config: "activation_scheme" in config and "bits" not in config,
    left_to_vllm_ascend=_left_to_vllm_ascend,
    producer=_producer,
    samples=_samples,
)
