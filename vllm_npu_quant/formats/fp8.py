# SPDX-License-Identifier: Apache-2.0
"""FP8 checkpoints (``quant_method: fp8``).

Spellings: DeepSeek's and transformers' blocks (``weight_block_size``, ``weight_scale_inv``), per-tensor and per-channel
scales (``weight_scale``), Mistral's per-tensor ``weight_scale_inv`` with ``activation_scale``; static and dynamic
activations; ``modules_to_not_convert`` or ``ignored_layers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, field_validator

from vllm_npu_quant.checkpoint.text import shown
from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.base import FLOAT_ENTRY, LayerEntry
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.formats.patterns import PatternSet
from vllm_npu_quant.formats.rules import FLOAT_DTYPES, RuleFormat, index_layers, is_embedding, stored_layers_of
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

__all__ = [
    "Fp8Config",
    "Fp8Format",
    "fp8_spec",
]

#: safetensors dtypes of 8-bit floats.
FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

#: Layers that FP8 producers leave alone without saying so: vLLM has no FP8 head, and a router stays exact.
_FLOAT_BY_CONVENTION = frozenset({"lm_head", "gate", "shared_expert_gate", "router"})


def fp8_spec(scheme: str, weight: WeightSpec, layout: Layout, *, static: bool | None) -> LayerSpec:
    """The spec of a layer with FP8 weights.

    Args:
        scheme: the producer's name for it ("FP8_BLOCK").
        weight: as ``fp8_weight`` gives it.
        layout: where its numbers lie.
        static: whether the input's scale is static; None if the input is not quantized.
    """
    return LayerSpec(scheme, layout, weight, None if static is None else fp8_activation(static=static))


def fp8_activation(*, static: bool) -> ActivationSpec:
    """FP8 inputs: one scale per tensor if static, else per token."""
    granularity = Granularity.TENSOR if static else Granularity.TOKEN
    return ActivationSpec(8, dynamic=not static, granularity=granularity, kind=NumberKind.FLOAT)


def fp8_weight(granularity: Granularity, block: Sequence[int] = (0, 0)) -> WeightSpec:
    """An FP8 weight on disk.

    Args:
        granularity: TENSOR, CHANNEL or BLOCK.
        block: output rows and inputs per block.
    """
    return WeightSpec(8, NumberKind.FLOAT, granularity, block[1], block_rows=block[0])


#: What AutoRound's export in the format "fp8" adds: the scheme once more, and how it was made.
_AUTO_ROUND_FIELDS = frozenset(
    {
        *(
            "bits",
            "data_type",
            "group_size",
            "sym",
            "act_bits",
            "act_data_type",
            "act_dynamic",
            "act_group_size",
            "act_sym",
        ),
        *("amp", "autoround_version", "block_name_to_quantize", "enable_quanted_input", "iters", "nsamples", "seqlen"),
    }
)


class Fp8Config(BaseModel):
    """``quantization_config`` of an FP8 checkpoint. Fields that producers add are accepted, and reported where they are
    not empty."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "fp8"
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: tuple[StrictInt, StrictInt] | None = None
    modules_to_not_convert: tuple[StrictStr, ...] | None = Field(default=None, max_length=_MAX_RULES)
    ignored_layers: tuple[StrictStr, ...] | None = Field(default=None, max_length=_MAX_RULES)
    fmt: StrictStr | None = None
    scale_fmt: StrictStr | None = None
    dequantize: StrictBool | None = None
    kv_cache_scheme: Any = None
    store_dtype: StrictStr | None = None
    is_checkpoint_fp8_serialized: StrictBool | None = None
    weight_per_tensor: StrictBool | None = None
    act_per_tensor: StrictBool | None = None

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


@dataclass
class Fp8Format(RuleFormat):
    """The layers of an FP8 checkpoint.

    Attributes:
        config: the validated config.
        kv_cache: whether the checkpoint carries KV-cache scales.
    """

    config: Fp8Config = field(default_factory=Fp8Config)
    kv_cache: bool = False

    name = "fp8"

    def rule(self, layer: str) -> LayerEntry | None:
        if is_embedding(layer):
            return None
        if self._skips(layer) or layer.rpartition(".")[2] in _FLOAT_BY_CONVENTION:
            return FLOAT_ENTRY
        block = self.config.weight_block_size
        weight = fp8_weight(Granularity.BLOCK if block else Granularity.TENSOR, block or (0, 0))
        layout = Layout.FP8_INV if block else Layout.FP8
        static = self.config.activation_scheme == "static"
        spec = fp8_spec(_scheme(weight, static=static), weight, layout, static=static)
        return LayerEntry(spec, frozenset({"input_scale"}) if static else frozenset())

    def _skips(self, layer: str) -> bool:
        """Whether the config calls a layer float: by its name, by its last components, or by a module that holds it."""
        return any(
            layer == name or layer.endswith("." + name) or layer.startswith(name + ".") or f".{name}." in layer
            for name in self.config.skipped
        )

    def dropped_tensors(self) -> tuple[str, ...]:
        return (*KV_CACHE_TENSORS, *KV_OUTPUTS) if self.kv_cache or self.index is None else ()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        source: str = "config.json",
        tensors: Mapping[str, StoredTensor] | None = None,
    ) -> Fp8Format:
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
            parsed = Fp8Config.model_validate(dict(config))
        except ValidationError as error:
            for finding in config_findings(error, source):
                found.add(finding)
            return cls(source=source, findings=tuple(found.close()))
        for problem in _config_problems(parsed, source):
            found.add(problem)
        result = cls(source=source, config=parsed)
        if tensors is not None:
            result._index(tensors, found)
        result.findings = tuple(found.close())
        return result

    def _index(self, tensors: Mapping[str, StoredTensor], found: FindingLimit) -> None:
        stored = stored_layers_of(tensors)
        skipped = frozenset(self.config.skipped)
        patterns = PatternSet(
            [name.removeprefix("re:") for name in self.config.skipped if name.startswith("re:")],
            file=self.source,
            where="ignored_layers",
        )
        for finding in patterns.findings:
            found.add(finding)
        silent: list[str] = []

        def decide(layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
            self.kv_cache |= bool(kv_cache_tensors(layer, named))
            weight = named.get("weight")
            if weight is None:
                return None
            excluded = layer in skipped or patterns.any(layer)
            if weight.dtype in FLOAT_DTYPES and not {"weight_scale", "weight_scale_inv"} & set(named):
                if len(weight.shape) == 2 and not excluded and not self._skips(layer) and not is_embedding(layer):
                    silent.append(layer)
                return FLOAT_ENTRY
            if excluded:
                found.add(
                    Finding(
                        "bad-config",
                        "the config calls the layer float, and its weight is stored quantized",
                        layer=layer,
                        file=self.source,
                        expected="a float weight",
                        found=f"{weight.dtype} in {weight.file}",
                        fix="remove the layer from modules_to_not_convert (or ignored_layers), or re-export the weights",
                    )
                )
                return None
            return self._entry(layer, named, found)

        self.index = index_layers(stored, decide, self.source)
        for finding in self.index.findings:
            found.add(finding)
        line = silent_finding(silent, self.source)
        if line is not None:
            found.add(line)
        if self.kv_cache or self.config.kv_cache_scheme:
            found.add(kv_cache_finding("k_scale, v_scale" if self.kv_cache else "kv_cache_scheme", self.source))

    def _entry(self, layer: str, named: Mapping[str, StoredTensor], found: FindingLimit) -> LayerEntry | None:
        """The entry of a layer whose weight is stored quantized."""
        inverse = "weight_scale_inv" in named
        layout = Layout.FP8_INV if inverse else Layout.FP8
        weight = self._stored_weight(named["weight"], named.get("weight_scale_inv" if inverse else "weight_scale"))
        known = {tensor.name: tensor for tensor in LAYOUTS[layout].tensors}
        static = not {"input_scale", "activation_scale"}.isdisjoint(named)
        kv = kv_cache_tensors(layer, named)
        for name in named:
            if name not in known and name not in kv:
                found.add(
                    Finding(
                        "unexpected-tensor",
                        f"an FP8 layer has no tensor {name}, so its effect would be lost",
                        layer=layer,
                        file=named[name].file,
                        expected=", ".join(known),
                        found=name,
                        fix="update vllm-npu-quant, or re-export the checkpoint without it",
                    )
                )
        spec = fp8_spec(_scheme(weight, static=static), weight, layout, static=static)
        optional = {name for name in named if name in known and known[name].optional}
        return LayerEntry(spec, frozenset(optional))

    def _stored_weight(self, weight: StoredTensor, scale: StoredTensor | None) -> WeightSpec:
        """What shares a scale, as the scale's shape tells it; the config's word where it tells nothing."""
        default = fp8_weight(*_default(self.config))
        if scale is None or len(weight.shape) != 2:
            return default
        block = self.config.weight_block_size
        outputs, inputs = weight.shape
        if block and scale.shape == (-(-outputs // block[0]), -(-inputs // block[1])):
            return default
        if scale.shape in ((), (1,), (1, 1)):
            return fp8_weight(Granularity.TENSOR)
        if scale.shape in ((outputs,), (outputs, 1)):
            return fp8_weight(Granularity.CHANNEL)
        return default


def _default(config: Fp8Config) -> tuple[Granularity, tuple[int, int]]:
    """The granularity that the config names."""
    if config.weight_block_size:
        return Granularity.BLOCK, config.weight_block_size
    return Granularity.TENSOR, (0, 0)


def _scheme(weight: WeightSpec, *, static: bool) -> str:
    granularity = "" if weight.granularity is Granularity.TENSOR else f"_{weight.granularity.value.upper()}"
    return f"FP8{granularity}_{'STATIC' if static else 'DYNAMIC'}"


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
