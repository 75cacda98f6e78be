# SPDX-License-Identifier: Apache-2.0
"""Checks after loading that vLLM omits for a quantized checkpoint: float parameters without data, lost norm biases.

Quantized layers record their received tensors (engine.coverage). vLLM checks the other parameters of float models only, and
silently drops a bias that no parameter takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, record_metadata_for_reloading
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_npu_quant import settings
from vllm_npu_quant.engine import platforms
from vllm_npu_quant.engine.awaited import settle
from vllm_npu_quant.engine.config import NpuQuantConfig
from vllm_npu_quant.engine.norm import NormBiasMethod
from vllm_npu_quant.engine.routers import checked_before_weights
from vllm_npu_quant.engine.stored import UNWITNESSED_LOADS
from vllm_npu_quant.errors import Finding, nearest_names, raise_findings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["check_loaded", "with_check"]


def with_check(load_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap ``BaseModelLoader.load_model`` to ask each model where its weights go, and to run ``check_loaded`` once.

    The model is asked between building and loading, and checked before its layers are prepared. If the operators are
    emulated, their kernels are built before a model is loaded.
    """

    def checking(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> nn.Module:
        config = vllm_config.quant_config
        if not isinstance(config, NpuQuantConfig):
            return load_model(self, vllm_config, *args, **kwargs)
        if not settings.ascend_host():
            from vllm_npu_quant import emulation

            emulation.build_kernels()
        with _asked(self, config, vllm_config):
            return checked(self, config, vllm_config, *args, **kwargs)

    def checked(self: Any, config: NpuQuantConfig, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> nn.Module:
        if vllm_config.load_config.load_format in UNWITNESSED_LOADS:
            return load_model(self, vllm_config, *args, **kwargs)
        # vLLM's own check expects every parameter of a quantized layer in the checkpoint. It stays if the user enabled it.
        replaced = platforms.default_load_check(self)
        if replaced:
            self.enable_weights_track = True
            self.track_weights_loading = functools.partial(check_loaded, config)
        with checked_before_weights(self, config):
            model = load_model(self, vllm_config, *args, **kwargs)
        if not replaced:
            check_loaded(config, model, None)
        return model

    return checking


@contextmanager
def _asked(loader: Any, config: NpuQuantConfig, vllm_config: VllmConfig) -> Iterator[None]:
    """Ask the model that a loader loads in this context, and load it by its answers."""
    load_weights = loader.load_weights

    def load(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        config.awaits = False
        with set_current_vllm_config(vllm_config):
            settle(config, model).install(model)
        with get_layerwise_info(model).restore_device:
            record_metadata_for_reloading(model)  # layers may have got other parameters
        load_weights(model, *args, **kwargs)

    config.awaits = True
    loader.load_weights = load
    try:
        yield
    finally:
        config.awaits = False
        del loader.load_weights


def check_loaded(config: NpuQuantConfig, model: nn.Module, loaded: set[str] | None, quantized: bool = True) -> None:
    """Check that the loader filled the float parameters and norm biases.

    Args:
        config: the model's quantization.
        model: one rank's model, or one pipeline stage of it.
        loaded: the names of the parameters that were loaded; None if the model does not report them.

    Raises:
        NpuQuantError: not-filled for float parameters and norm biases without data, unexpected-tensor for norm biases that
            no module takes.
    """
    findings = _lost_biases(config, model)
    if loaded is not None:
        findings += _not_filled(config, model, loaded)
    raise_findings(findings)


def _not_filled(config: NpuQuantConfig, model: nn.Module, loaded: set[str]) -> list[Finding]:
    """Findings for float parameters without data: those that vLLM checks in float models, and embeddings."""
    exempt: set[int] = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        # All norms of a model have a bias parameter if the checkpoint holds a bias for one of them.
        if isinstance(method, NormBiasMethod) or platforms.ascend_norm_bias(module) is not None:
            exempt.add(id(module.bias))
        elif hasattr(method, "process_weights_after_loading") and not _is_embedding(module):
            exempt.update(map(id, module.parameters()))
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return [
        Finding(
            "not-filled",
            "a parameter received no data",
            layer=aliases[0].rpartition(".")[0],
            file=config.described.source if config.described is not None else "",
            expected=aliases[0],
            found="no tensor of the checkpoint that is loaded into it",
            fix="check that the weight files are complete",
        )
        for param, aliases in names.items()
        if param not in exempt and loaded.isdisjoint(aliases)
    ]


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)


def _lost_biases(config: NpuQuantConfig, model: nn.Module) -> list[Finding]:
    """Findings for norm biases that belong to this part of the model and that no module took."""
    described, resolver = config.described, config.resolver
    if described is None or resolver is None or not described.norm_biases:
        return []
    held: set[str] = set()
    elsewhere: set[str] = set()
    taken: set[str] = set()
    kinds: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        for spelling in resolver.spellings(name):
            if isinstance(module, PPMissingLayer):
                elsewhere.add(spelling)
                continue
            held.add(spelling)
            if spelling in described.norm_biases:
                kinds[spelling] = module
                if _has_bias(module):
                    taken.add(spelling)
    lost = described.norm_biases - taken - elsewhere
    # Layers of other ranks, and of the draft model in the same checkpoint, are not in this model.
    return [_lost_bias(norm, kinds.get(norm), held, described.source) for norm in sorted(lost) if _parent(norm) in held]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _lost_bias(norm: str, module: nn.Module | None, held: set[str], source: str) -> Finding:
    if module is not None and isinstance(getattr(module, "quant_method", None), NormBiasMethod):
        return Finding(
            "not-filled",
            "the norm's bias received no data",
            layer=norm,
            file=source,
            expected=f"{norm}.bias",
            found="no such tensor among those that were loaded",
            fix="check that the weight files are complete",
        )
    return Finding(
        "unexpected-tensor",
        "the checkpoint gives this norm a bias, and the model has no place for it, so its effect would be lost",
        layer=norm,
        file=source,
        expected="an RMSNorm of this name, to which a bias is added",
        found="no such module in the model" if module is None else f"a {type(module).__name__}",
        nearest=() if module is not None else nearest_names(norm, held),
        fix="re-export the checkpoint with symmetric smoothing, or for a model that vLLM knows under these names",
    )


def _has_bias(module: nn.Module) -> bool:
    method = getattr(module, "quant_method", None)
    if isinstance(method, NormBiasMethod):
        return method.loaded
    loaded = platforms.ascend_norm_bias(module)
    return loaded if loaded is not None else isinstance(getattr(module, "bias", None), torch.Tensor)
