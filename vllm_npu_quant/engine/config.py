# SPDX-License-Identifier: Apache-2.0
"""vLLM's view of a checkpoint's quantization: one QuantizationConfig class per declared format.

The objects are pickled into spawned processes before plugins run there. They carry the compact index by layer, not the
producer's description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_npu_quant import settings
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.engine import platforms
from vllm_npu_quant.engine.awaited import AwaitedExperts, AwaitedLinear
from vllm_npu_quant.engine.dequantized import DequantizedLinearMethod
from vllm_npu_quant.engine.detection import names_vllm_ascend, open_model_checkpoint
from vllm_npu_quant.engine.linear import CHECKPOINT_BIAS, NpuQuantLinearMethod
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity, raise_findings
from vllm_npu_quant.formats.check import check_checkpoint, check_expert_biases, tied_head_findings
from vllm_npu_quant.formats.declaration import Format, find_format, formats, require_format
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.detect import Detection
from vllm_npu_quant.formats.floats import float_shapes
from vllm_npu_quant.formats.open import describe_checkpoint, detect_checkpoint
from vllm_npu_quant.formats.resolve import LayerResolver, ResolvedExperts, ResolvedLayer
from vllm_npu_quant.serving.decide import Host, Served, decide, float_experts, requantized_findings
from vllm_npu_quant.spec import LayerKind, LayerSpec

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["NpuQuantConfig", "config_class", "config_classes"]

logger = init_logger("vllm.npu_quant.config")


#: A key of ``quant_description`` that keeps vllm-ascend from fusing norms with the quantization after them: its pattern
#: ignores that operator's dst_type, and would replace int4 by int8.
INT4_ACTIVATIONS = "vllm_npu_quant.int4_activations"


class NameSet:
    """A set of tensor names in place of a regular expression, for vLLM's WeightsMapper.

    The mapper tries every rule on every tensor; one rule per layer would make that quadratic in the model's depth.
    """

    def __init__(self, names: frozenset[str], suffix: str, replacement: str) -> None:
        self.names = names
        self.suffix = suffix
        self.replacement = replacement

    def search(self, name: str) -> bool:
        return name.endswith(self.suffix) and name.removesuffix(self.suffix) in self.names

    def sub(self, replacement: str, name: str) -> str:
        return name.removesuffix(self.suffix) + self.replacement


class NpuQuantConfig(QuantizationConfig):
    """One checkpoint's quantization. ``config_class`` makes a subclass for every format."""

    declaration: ClassVar[Format]

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.raw: dict[str, Any] = dict(config or {})
        self.described: Described | None = None
        self.resolver: LayerResolver | None = None
        # Layer -> the shape of its float weight.
        self.float_shapes: dict[str, tuple[int, ...]] = {}
        # Whether layers that the checkpoint's names do not tell may wait until the model is built.
        self.awaits = False
        self.tied_embeddings = False
        self.hidden_layers: int | None = None
        self.host = Host()
        self.host_checked = False
        self.is_read_copy = False
        # vllm-ascend reads this attribute unconditionally, for the keys of norm biases.
        self.quant_description: dict[str, Any] = {}
        self.enable_fa_quant = False
        self.enable_c8_quant = False
        self.kvcache_quant_layers: list[str] = []
        self.c8_quant_layers: list[str] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.described.source if self.described else 'no checkpoint yet'})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Omit config.json's part from copies and pickles of a config that was read: it may be a whole description."""
        state = dict(self.__dict__)
        if self.resolver is not None:
            state |= {"raw": self.raw if self.declaration.rounds else {}, "is_read_copy": True}
        return _restore, (self.declaration.name, state)

    def get_name(self) -> str:
        return self.declaration.method_name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the NPU's quantized operators. float32 checkpoints run as bfloat16 unless the user gives a dtype."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # read in maybe_update_config, where a missing file can be explained

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NpuQuantConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return this method if it serves the checkpoint. vLLM asks ours before the built-in ones."""
        declaration = cls.declaration
        method = declaration.method_name
        if not settings.plugin_enabled() or not isinstance(hf_quant_cfg, Mapping):
            return None
        if user_quant == method and declaration.decisive:
            return method  # the file beside config.json decides
        if user_quant is not None and not declaration.answers_to(user_quant):
            return None
        silent = user_quant is not None and not hf_quant_cfg.get(
            "quant_method"
        )  # the user says what the config does not
        if not declaration.serves(hf_quant_cfg) and not silent:
            return None
        if names_vllm_ascend(user_quant):
            return None
        named = user_quant == method or settings.takeover()
        if settings.ascend_host() and not named and declaration.left_to_vllm_ascend(hf_quant_cfg, hf_config):
            logger.info_once("This %s checkpoint is left to vllm-ascend, which serves all of its schemes", method)
            return None
        return method

    def _detection(self, checkpoint: Checkpoint) -> Detection:
        """Find the file that describes the quantization: config.json's own part, as vLLM gave it, or a file beside it.

        Raises:
            NpuQuantError: unreadable-file if no file describes it in this format.
        """
        declaration = self.declaration
        if declaration.rounds:
            detection = detect_checkpoint(checkpoint)
            if detection.format:
                raise NpuQuantError([_quantized_already(declaration, detection)])
            return Detection(declaration.name, "config.json", self._options())
        if self.raw and declaration.is_complete(self.raw):
            return Detection(declaration.name, "config.json", self.raw)
        file = declaration.file_beside(checkpoint.names) if declaration.decisive else None
        if file is not None:  # the user may have named the format although config.json names another
            return Detection(declaration.name, file, checkpoint.read_json(file))
        detection = detect_checkpoint(checkpoint)
        if find_format(detection.format) is not declaration:
            raise NpuQuantError([_wrong_method(declaration, checkpoint, detection)])
        return replace(detection, asks=False)  # vLLM knows the method already

    def _options(self) -> dict[str, Any]:
        """The options of a method that rounds float weights; vLLM's own part of them is taken over."""
        online, self.online_quantization_config = getattr(self, "online_quantization_config", None), None
        ignore = [*(self.raw.get("ignore") or ()), *(online.args.ignore if online is not None else ())]
        self.raw = {**self.raw, "ignore": ignore}
        return self.raw

    def for_other_weights(self) -> NpuQuantConfig:
        """A config that has read nothing yet, for weights that are loaded into the engine of this one."""
        return type(self)(self.raw if self.declaration.rounds else None)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the checkpoint's quantization, and check its files against it before any weight is read.

        A copy made afterwards has the results already.

        Raises:
            NpuQuantError: with every problem that was found.
        """
        if self.is_read_copy:
            return
        checkpoint = open_model_checkpoint(model_name, revision)
        self.described = described = describe_checkpoint(checkpoint, self._detection(checkpoint))
        text_config = getattr(hf_config, "text_config", None) or hf_config
        self.tied_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        self.hidden_layers = getattr(text_config, "num_hidden_layers", None)
        # Problems of the files come first: many others follow from them.
        findings = check_checkpoint(described, checkpoint) + list(described.findings)
        findings += check_expert_biases(described, checkpoint)
        findings += tied_head_findings(described, self.tied_embeddings)
        specs = ((entry.spec, 1) for _, entry in described.stored_layers())
        self.host = Host.read()
        findings += requantized_findings(specs, self.host, described.source)
        for finding in findings:
            if finding.severity is Severity.WARNING:
                logger.warning("%s", finding.render())
            elif finding.severity is Severity.INFO:
                logger.info("%s", finding.render())
        raise_findings(findings)
        self.resolver = LayerResolver(described, self.packed_modules_mapping)
        self.float_shapes = float_shapes(described, checkpoint.tensors)
        self.quant_description = {f"{name}.bias": "FLOAT" for name in described.norm_biases}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        if self.resolver is not None:
            self.resolver.add_mapper(hf_to_vllm_mapper._map_name)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """The mapping from the checkpoint's tensor names to the parameters'."""
        from vllm.model_executor.models.utils import WeightsMapper

        if self.described is None:
            return WeightsMapper()
        rules: dict[Any, str | None] = {}
        biased = self.described.biased
        if biased:
            rules[NameSet(biased, ".bias", f".{CHECKPOINT_BIAS}")] = ""
        return WeightsMapper(
            orig_to_new_regex=rules,
            orig_to_new_suffix={f".{name}": None for name in self.described.dropped},
        )

    def get_cache_scale_mapper(self) -> WeightsMapper | None:  # type: ignore[override]
        """The same for vLLM before 0.30, which has no hook for all names and applies this one to all tensors."""
        theirs = super().get_cache_scale_mapper()
        if hasattr(QuantizationConfig, "get_checkpoint_weight_mapper"):
            return theirs
        own = self.get_checkpoint_weight_mapper()
        return own if theirs is None else own | theirs

    def get_quant_method(self, layer: nn.Module, prefix: str, tid2eid: Any = None) -> QuantizeMethodBase | None:
        """The method that serves a layer. ``tid2eid`` is vllm-ascend's, for MoE layers.

        Raises:
            NpuQuantError: for a layer that the config does not describe, or that no method class serves.
        """
        try:
            return self._method_by_name(layer, prefix, tid2eid)
        except NpuQuantError as error:
            if not self.awaits or {finding.code for finding in error.findings} != {"undescribed-layer"}:
                raise
            if platforms.is_moe(layer):
                return AwaitedExperts(layer, error, tid2eid)
            return AwaitedLinear(error)

    def _method_by_name(self, layer: nn.Module, prefix: str, tid2eid: Any) -> QuantizeMethodBase | None:
        """The method of the checkpoint layers that the layer's name tells."""
        if isinstance(layer, LinearBase):
            return self._linear(layer, prefix, LayerKind.LINEAR)
        if isinstance(layer, ParallelLMHead):
            return self._lm_head(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            self._check_embedding(prefix)
            return None
        if platforms.is_moe(layer):
            return self._experts(layer, prefix, tid2eid)
        return None

    def _linear(self, layer: nn.Module, prefix: str, kind: LayerKind) -> QuantizeMethodBase | None:
        resolver = self.require_resolver(prefix)
        resolver.packed = self.packed_modules_mapping
        return self.linear_method(layer, resolver.resolve(prefix), kind)

    def linear_method(self, layer: nn.Module, resolved: ResolvedLayer, kind: LayerKind) -> QuantizeMethodBase | None:
        """The method of a Linear layer or lm_head that these checkpoint layers fill; None for a float lm_head.

        Raises:
            NpuQuantError: unsupported-scheme for a layer that no method class serves, or whose bias would be lost.
        """
        source = self.require_resolver(resolved.prefix).described.source
        if resolved.spec.is_float:
            if "bias" in resolved.listed_tensors() and not getattr(layer, "has_bias", True):
                raise NpuQuantError([_lost_bias(resolved, source)])
            return platforms.unquantized_linear() if kind is LayerKind.LINEAR else None
        served = self._decide(kind, resolved.spec, resolved.prefix)
        if served.spec.activation is not None and served.spec.activation.bits == 4:
            self.quant_description[INT4_ACTIVATIONS] = "W4A4_DYNAMIC"
        method = DequantizedLinearMethod if served.needs_float else NpuQuantLinearMethod
        return method(resolved, served, source)

    def _decide(self, kind: LayerKind, spec: LayerSpec, prefix: str) -> Served:
        """Decide how a stored layer is served. The host is checked once, before the first quantized layer.

        Raises:
            NpuQuantError: if the host's configuration is incompatible with quantized layers.
        """
        if not self.host_checked:
            raise_findings(platforms.host_findings())
            self.host = replace(self.host, latent_attention=_uses_mla(), kv_consumer=_is_kv_consumer())
            self.host_checked = True
        served = decide(kind, spec, self.host, layer=prefix)
        told = served.difference or (served.row.remark if served.row is not None else "")
        if told:
            logger.info_once("%s for %s layers: %s", spec.scheme, kind.value, told)
        return served

    def _lm_head(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not self.require_resolver(prefix).describes(prefix) and self.tied_embeddings:
            return None
        return self._linear(layer, prefix, LayerKind.LM_HEAD)

    def _check_embedding(self, prefix: str) -> None:
        resolver = self.require_resolver(prefix)
        if not resolver.describes(prefix):
            return
        resolved = resolver.resolve(prefix)
        if not resolved.spec.is_float:
            raise NpuQuantError(
                [
                    Finding(
                        "unsupported-scheme",
                        "quantized embedding tables are not served",
                        layer=prefix,
                        file=resolver.described.source,
                        expected="a float embedding",
                        found=resolved.spec.scheme,
                        fix="export the embedding as float",
                    )
                ]
            )

    def _experts(self, layer: nn.Module, prefix: str, tid2eid: Any) -> QuantizeMethodBase:
        return self.experts_method(layer, self.require_resolver(prefix).resolve_experts(prefix), tid2eid)

    def experts_method(self, layer: nn.Module, resolved: ResolvedExperts, tid2eid: Any) -> QuantizeMethodBase:
        """The method of the routed experts of a MoE layer that these checkpoint layers fill.

        Raises:
            NpuQuantError: unsupported-scheme, wrong-shape or cannot-shard for experts that cannot be served.
        """
        specs = [resolved.w13.spec, resolved.w2.spec]
        if all(spec.is_float for spec in specs) and not platforms.float_experts_crash(layer):
            return platforms.unquantized_moe(layer, tid2eid)
        from vllm_npu_quant.engine.moe import NpuQuantMoEMethod

        w13, w2 = (
            float_experts(spec) if spec.is_float else self._decide(LayerKind.FUSED_MOE, spec, resolved.prefix)
            for spec in specs
        )
        source = self.require_resolver(resolved.prefix).described.source
        return NpuQuantMoEMethod(layer, resolved, (w13, w2), source, tid2eid)

    def require_resolver(self, prefix: str) -> LayerResolver:
        """The resolver of layer names.

        Raises:
            NpuQuantError: unreadable-file if the checkpoint was not read.
        """
        if self.resolver is None:
            raise NpuQuantError(
                [
                    Finding(
                        "unreadable-file",
                        "vLLM builds a layer before the checkpoint's quantization was read",
                        layer=prefix,
                        fix="this vLLM version does not call maybe_update_config; use one of the versions in README",
                    )
                ]
            )
        return self.resolver


def _uses_mla() -> bool:
    """Whether the model uses multi-head latent attention, for which vLLM splits the weight of kv_b_proj."""
    config = get_current_vllm_config_or_none()
    model_config = getattr(config, "model_config", None)
    return bool(getattr(model_config, "use_mla", False))


def _is_kv_consumer() -> bool:
    """Whether this process decodes for a prefill node of a disaggregated deployment."""
    config = get_current_vllm_config_or_none()
    transfer = getattr(config, "kv_transfer_config", None) if config is not None else None
    return bool(getattr(transfer, "is_kv_consumer", False)) and not bool(getattr(transfer, "is_kv_producer", False))


def _lost_bias(resolved: ResolvedLayer, source: str) -> Finding:
    """The finding for a bias that vLLM silently drops: the model class has none. Asymmetric smoothing adds one."""
    return Finding(
        "unsupported-scheme",
        "the checkpoint gives this float layer a bias, which the model class does not have: its effect would be lost",
        layer=resolved.prefix,
        file=source,
        expected="a quantized layer, or a float layer without a bias",
        found=", ".join(
            f"{name}.bias" for name, entry in zip(resolved.shards, resolved.entries, strict=True) if entry.tensors
        ),
        fix="re-export the checkpoint with this layer quantized, or with symmetric smoothing",
    )


def _quantized_already(declaration: Format, detection: Detection) -> Finding:
    """The finding for a quantized checkpoint whose weights would be rounded again."""
    return Finding(
        "contradictory-evidence",
        f"quantization={declaration.method_name} rounds float weights, and this checkpoint is quantized already",
        file=detection.file,
        expected="a float checkpoint",
        found=detection.format,
        fix="leave quantization= out, or take the float model that the checkpoint was made from",
    )


def _wrong_method(declaration: Format, checkpoint: Checkpoint, detection: Detection) -> Finding:
    """The finding for a format that the user named and that no file describes."""
    return Finding(
        "unreadable-file",
        f"quantization={declaration.method_name} needs {declaration.title or declaration.name}'s description of the weights",
        file=str(checkpoint.folder),
        expected=declaration.needs_file or "quantization_config in config.json",
        found=f"{detection.format} by {detection.file}"
        if detection.format
        else ", ".join(checkpoint.names[:12]) or "no files",
        fix="copy the file that the producer wrote into the folder, or name the format with quantization=",
    )


_classes: dict[str, type[NpuQuantConfig]] = {}


def config_class(declaration: Format) -> type[NpuQuantConfig]:
    """vLLM's config class of a format: always the same one."""
    known = _classes.get(declaration.name)
    if known is None:
        title = "".join(part.capitalize() for part in declaration.name.replace("_", "-").split("-"))
        known = type(f"Npu{title}Config", (NpuQuantConfig,), {"declaration": declaration, "__module__": __name__})
        _classes[declaration.name] = known
    return known


def _restore(name: str, state: dict[str, Any]) -> NpuQuantConfig:
    """Recreate a config from a pickle, which cannot name a class that ``config_class`` makes at run time."""
    declaration = require_format(name, "")
    restored = object.__new__(config_class(declaration))
    restored.__dict__.update(state)
    return restored


def config_classes() -> tuple[type[NpuQuantConfig], ...]:
    """The config class of every format, in the order in which vLLM asks them."""
    return tuple(map(config_class, formats()))
