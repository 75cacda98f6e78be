# SPDX-License-Identifier: Apache-2.0
"""vLLM's view of a checkpoint's quantization: one QuantizationConfig class per format.

The objects are pickled into spawned processes before plugins run there, so the classes are top-level, and what they carry
is the compact per-layer index, not the description.
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
from vllm_npu_quant.engine.dequantized import DequantizedLinearMethod
from vllm_npu_quant.engine.detection import open_model_checkpoint
from vllm_npu_quant.engine.linear import CHECKPOINT_BIAS, NpuQuantLinearMethod
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity, raise_findings
from vllm_npu_quant.formats.base import QuantFormat
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.detect import description_name, embedded_description
from vllm_npu_quant.formats.modelslim import as_static
from vllm_npu_quant.formats.open import build_format
from vllm_npu_quant.formats.resolve import LayerResolver, ResolvedLayer
from vllm_npu_quant.spec import LayerKind, LayerSpec, as_float, as_w4a16

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["ModelSlimConfig", "NpuCompressedTensorsConfig", "NpuFp8Config", "NpuQuantConfig"]

logger = init_logger("vllm.npu_quant.config")


#: A key of ``quant_description`` whose value keeps vllm-ascend from fusing norms with the quantization after them: its
#: pattern does not look at that operator's dst_type, and would put int8 in the place of int4.
INT4_ACTIVATIONS = "vllm_npu_quant.int4_activations"


class NameSet:
    """A set of tensor names in the place of a regular expression, for vLLM's WeightsMapper.

    The mapper asks every rule about every tensor; one rule per layer would make that quadratic in the model's depth.
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
    """What the formats share. Subclasses parse their config into ``format``."""

    #: The name registered with vLLM.
    method_name: ClassVar[str] = ""
    #: The format's name, a key of formats.open.FORMATS.
    format_name: ClassVar[str] = ""
    #: config.json's quant_method values that this class serves.
    claims: ClassVar[frozenset[str]] = frozenset()
    #: Names that a user may give in ``quantization=`` for them, besides ``method_name`` and ``claims``.
    aliases: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.raw: dict[str, Any] = dict(config or {})
        self.format: QuantFormat | None = None
        self.resolver: LayerResolver | None = None
        self.tied_embeddings = False
        self.hidden_layers: int | None = None
        self.said_w4a16 = False
        self.host_checked = False
        self.is_read_copy = False
        # vllm-ascend reads this attribute without a guard; it wants the keys of norm biases.
        self.quant_description: dict[str, Any] = {}
        self.enable_fa_quant = False
        self.enable_c8_quant = False
        self.kvcache_quant_layers: list[str] = []
        self.c8_quant_layers: list[str] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.format.source if self.format else 'no checkpoint yet'})"

    def get_name(self) -> str:
        return self.method_name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the NPU's quantized operators take. float32 checkpoints run as bfloat16 unless a dtype is asked for."""
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
    def serves(cls, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a config.json's quantization_config is this class's to serve."""
        return str(quantization_config.get("quant_method") or "").lower() in cls.claims

    @classmethod
    def served_by_vllm_ascend(cls, quantization_config: Mapping[str, Any]) -> bool:
        """Whether vllm-ascend serves all schemes of this config itself."""
        return False

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """vLLM asks every method whether it takes a checkpoint; ours answer before the built-in ones."""
        if not settings.plugin_enabled() or not isinstance(hf_quant_cfg, Mapping):
            return None
        asked = user_quant is None or user_quant in {cls.method_name, *cls.claims, *cls.aliases}
        if not asked or not cls.serves(hf_quant_cfg):
            return None
        named = user_quant == cls.method_name or settings.takeover()
        if settings.ascend_host() and not named and cls.served_by_vllm_ascend(hf_quant_cfg):
            logger.info_once(
                "This %s checkpoint is left to vllm-ascend, which serves all of its schemes", cls.method_name
            )
            return None
        return cls.method_name

    def __getstate__(self) -> dict[str, Any]:
        """Leave config.json's part out of copies and pickles of a config that was read: it may be a whole description."""
        if self.resolver is None:
            return dict(self.__dict__)
        return {**self.__dict__, "raw": {}, "is_read_copy": True}

    def parse(self, checkpoint: Checkpoint) -> QuantFormat:
        """The format object of a checkpoint; findings are inside it."""
        return build_format(self.format_name, self.raw, checkpoint)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the checkpoint's quantization, and check its files against it before any weight is read.

        A copy of a config that did so has its results already.

        Raises:
            NpuQuantError: with every problem that was found.
        """
        if self.is_read_copy:
            return
        checkpoint = open_model_checkpoint(model_name, revision)
        self.format = self.parse(checkpoint)
        # What is wrong with the files comes first: much of the rest follows from it.
        findings = check_checkpoint(self.format, checkpoint) + list(self.format.findings)
        for finding in findings:
            if finding.severity is Severity.WARNING:
                logger.warning("%s", finding.render())
            elif finding.severity is Severity.INFO:
                logger.info("%s", finding.render())
        raise_findings(findings)
        self.resolver = LayerResolver(self.format, self.packed_modules_mapping)
        self.quant_description = {f"{name}.bias": "FLOAT" for name in self.format.norm_biases}
        text_config = getattr(hf_config, "text_config", None) or hf_config
        self.tied_embeddings = bool(getattr(text_config, "tie_word_embeddings", False))
        self.hidden_layers = getattr(text_config, "num_hidden_layers", None)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        if self.resolver is not None:
            self.resolver.add_mapper(hf_to_vllm_mapper._map_name)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Names under which the checkpoint's tensors find their parameters."""
        from vllm.model_executor.models.utils import WeightsMapper

        if self.format is None:
            return WeightsMapper()
        rules: dict[Any, str | None] = {}
        biased = self.format.biased_layers()
        if biased:
            rules[NameSet(biased, ".bias", f".{CHECKPOINT_BIAS}")] = ""
        return WeightsMapper(
            orig_to_new_regex=rules,
            orig_to_new_suffix={f".{name}": None for name in self.format.dropped_tensors()},
        )

    def get_cache_scale_mapper(self) -> WeightsMapper | None:  # type: ignore[override]
        """Where vLLM has no hook for the names of all tensors (before 0.30), it applies this one to all of them."""
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
        resolver = self._resolver(prefix)
        self._check_host()
        resolver.packed = self.packed_modules_mapping
        resolved = resolver.resolve(prefix)
        if resolved.spec.is_float:
            if "bias" in resolved.listed_tensors() and not getattr(layer, "has_bias", True):
                raise NpuQuantError([_lost_bias(resolved, resolver.format.source)])
            return platforms.unquantized_linear() if kind is LayerKind.LINEAR else None
        if prefix.endswith(".kv_b_proj") and _uses_mla():
            return DequantizedLinearMethod(resolved, as_float(resolved.spec), kind, resolver.format.source)
        spec = as_static(resolved.spec) if _is_kv_consumer() else resolved.spec
        spec = self._w4a8(spec)
        if spec.activation is not None and spec.activation.bits == 4:
            self.quant_description[INT4_ACTIVATIONS] = "W4A4_DYNAMIC"
        return NpuQuantLinearMethod(resolved, spec, kind, resolver.format.source)

    def _check_host(self) -> None:
        """Once, before the first layer: what of the host's configuration no quantized layer can be served with."""
        if not self.host_checked:
            raise_findings(platforms.host_findings())
            self.host_checked = True

    def _w4a8(self, spec: LayerSpec) -> LayerSpec:
        """W4A8 as the user wants it: with activations in the model's dtype only where that was asked for."""
        other = as_w4a16(spec)
        if other is spec:
            return spec
        if settings.w4a8_mode() == "int8":
            return spec
        if not self.said_w4a16:
            self.said_w4a16 = True
            logger.info("%s=w4a16: activations of %s layers are not quantized", settings.W4A8, spec.scheme)
        return other

    def _lm_head(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not self._resolver(prefix).describes(prefix) and self.tied_embeddings:
            return None
        return self._linear(layer, prefix, LayerKind.LM_HEAD)

    def _check_embedding(self, prefix: str) -> None:
        resolver = self._resolver(prefix)
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
                        file=resolver.format.source,
                        expected="a float embedding",
                        found=resolved.spec.scheme,
                        fix="export the embedding as float",
                    )
                ]
            )

    def _experts(self, layer: nn.Module, prefix: str, tid2eid: Any) -> QuantizeMethodBase | None:
        resolver = self._resolver(prefix)
        resolved = resolver.resolve_experts(prefix)
        entry = resolved.entry
        gate, up, down = (replace(one, spec=self._w4a8(one.spec)) for one in (entry.gate, entry.up, entry.down))
        resolved = replace(resolved, entry=replace(entry, gate=gate, up=up, down=down))
        specs = [gate.spec, down.spec]
        if all(spec.is_float for spec in specs) and not platforms.float_experts_crash(layer):
            return platforms.unquantized_moe(layer, tid2eid)
        from vllm_npu_quant.engine.moe import NpuQuantMoEMethod

        return NpuQuantMoEMethod(layer, resolved, resolver.format.source, tid2eid)

    def _resolver(self, prefix: str) -> LayerResolver:
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
    """Whether the model's attention is the latent one, for which vLLM takes the weight of kv_b_proj apart."""
    config = get_current_vllm_config_or_none()
    model_config = getattr(config, "model_config", None)
    return bool(getattr(model_config, "use_mla", False))


def _is_kv_consumer() -> bool:
    """Whether this process decodes for a prefill node of a disaggregated deployment."""
    config = get_current_vllm_config_or_none()
    transfer = getattr(config, "kv_transfer_config", None) if config is not None else None
    return bool(getattr(transfer, "is_kv_consumer", False)) and not bool(getattr(transfer, "is_kv_producer", False))


class ModelSlimConfig(NpuQuantConfig):
    """msModelSlim checkpoints."""

    method_name = "modelslim"
    format_name = "modelslim"
    aliases = frozenset({"ascend"})

    @classmethod
    def serves(cls, quantization_config: Mapping[str, Any]) -> bool:
        return embedded_description(quantization_config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        # Named by hand, it is the description beside config.json that counts, and the files are checked against it.
        if user_quant == cls.method_name and settings.plugin_enabled():
            return cls.method_name
        return super().override_quantization_method(hf_quant_cfg, user_quant, hf_config)

    def parse(self, checkpoint: Checkpoint) -> QuantFormat:
        description, source = self.raw, "config.json"
        if not any(str(key).endswith(".weight") for key in description):
            name = description_name(checkpoint.names)
            if name is None:
                raise NpuQuantError([_no_description(checkpoint)])
            description, source = checkpoint.read_json(name), name
        return build_format(self.format_name, description, checkpoint, source=source)


def _lost_bias(resolved: ResolvedLayer, source: str) -> Finding:
    """vLLM drops a bias without a word where the model class has none. Asymmetric smoothing gives such a bias to layers."""
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


def _no_description(checkpoint: Checkpoint) -> Finding:
    return Finding(
        "unreadable-file",
        "quantization=modelslim needs msModelSlim's description of the weights",
        file=str(checkpoint.folder),
        expected="quant_model_description.json beside config.json",
        found=", ".join(checkpoint.names[:12]) or "no files",
        fix="copy the description that msModelSlim wrote into the folder, or name the format with quantization=",
    )


class NpuCompressedTensorsConfig(NpuQuantConfig):
    """compressed-tensors checkpoints. It must have no attribute kv_cache_scheme: vLLM would make the KV cache FP8."""

    method_name = "npu_compressed_tensors"
    format_name = "compressed-tensors"
    claims = frozenset({"compressed-tensors", "compressed_tensors"})

    @classmethod
    def served_by_vllm_ascend(cls, quantization_config: Mapping[str, Any]) -> bool:
        from vllm_npu_quant.ascend.ownership import serves_compressed_tensors

        return serves_compressed_tensors(quantization_config)


class NpuFp8Config(NpuQuantConfig):
    """FP8 checkpoints of DeepSeek's and transformers' kind."""

    method_name = "npu_fp8"
    format_name = "fp8"
    claims = frozenset({"fp8"})


class NpuAwqConfig(NpuQuantConfig):
    """AWQ checkpoints of AutoAWQ, GPTQModel and AutoRound."""

    method_name = "npu_awq"
    format_name = "awq"
    claims = frozenset({"awq"})
    aliases = frozenset({"auto_awq", "awq_marlin"})

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quant_config.json", "quantize_config.json"]  # vLLM reads them where config.json has nothing


class NpuGptqConfig(NpuQuantConfig):
    """GPTQ checkpoints of AutoGPTQ, GPTQModel, optimum and AutoRound."""

    method_name = "npu_gptq"
    format_name = "gptq"
    claims = frozenset({"gptq"})
    aliases = frozenset({"auto_gptq", "gptq_marlin"})

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]  # vLLM reads it where config.json has nothing

    def parse(self, checkpoint: Checkpoint) -> QuantFormat:
        name = "quantize_config.json"
        beside = checkpoint.read_json(name) if name in checkpoint.names else None
        return build_format(self.format_name, self.raw, checkpoint, beside=beside)


class NpuAutoRoundConfig(NpuQuantConfig):
    """AutoRound checkpoints."""

    method_name = "npu_auto_round"
    format_name = "auto-round"
    claims = frozenset({"auto-round", "auto_round", "intel/auto-round"})
    aliases = frozenset({"inc"})


#: Every config class, in the order in which vLLM asks them.
CONFIGS: tuple[type[NpuQuantConfig], ...] = (
    ModelSlimConfig,
    NpuCompressedTensorsConfig,
    NpuFp8Config,
    NpuAwqConfig,
    NpuGptqConfig,
    NpuAutoRoundConfig,
)
