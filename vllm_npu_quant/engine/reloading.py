# SPDX-License-Identifier: Apache-2.0
"""Loading weights again into a running engine: all of them, or none.

vLLM reloads layer by layer (``model_loader/reload``): it puts the parameters of ``create_weights`` back on the meta device,
buffers the calls of their loaders until a layer is complete, loads and prepares the layer, and copies the result into the
tensors that were in use, whose addresses graphs have captured. An error in between leaves a model of new, old and missing
layers. Therefore the tensors in use are saved when a reload begins, and put back if one of its steps fails:

    start           save the tensors in use; vLLM's own start
    load_weights    any number of calls, with the tensors in any order
    finish          check that no quantized layer lacks a tensor; vLLM's own finish; drop the saved tensors

Another checkpoint on disk is compared with the one that is served before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_npu_quant import settings
from vllm_npu_quant.engine.config import NpuQuantConfig
from vllm_npu_quant.engine.linear import NpuQuantLinearMethod
from vllm_npu_quant.engine.moe import NpuQuantMoEMethod
from vllm_npu_quant.errors import Finding, FindingLimit, raise_findings
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.serving.dispatch import describe

__all__ = ["differences", "with_finish", "with_source_check", "with_start"]

#: The reloads that have begun, by model.
_reloads: WeakKeyDictionary[nn.Module, _Reload] = WeakKeyDictionary()


class _Saved:
    """The tensors of one module that were in use before a reload."""

    def __init__(self, module: nn.Module, values: bool) -> None:
        """
        Args:
            values: whether to copy the values to the host's memory; otherwise the tensors alone are kept.
        """
        self.parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        transient = module._non_persistent_buffers_set
        self.buffers = {name: (buffer, name not in transient) for name, buffer in buffers.items()}
        tensors = [*self.parameters.values(), *buffers.values()]
        self.kept = [
            # vLLM replaces the weight loaders of tensors that it leaves in place.
            (tensor, dict(tensor.__dict__), tensor.detach().to("cpu", copy=True) if values else None)
            for tensor in tensors
            if not tensor.is_meta
        ]

    def restore(self, module: nn.Module) -> None:
        """Put the tensors back, with their attributes and values."""
        present = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, _ in present:
            delattr(module, name)
        for name, parameter in self.parameters.items():
            module.register_parameter(name, parameter)
        for name, (buffer, persistent) in self.buffers.items():
            module.register_buffer(name, buffer, persistent=persistent)
        for tensor, attributes, value in self.kept:
            tensor.__dict__.clear()
            tensor.__dict__.update(attributes)
            if value is not None:
                tensor.data.copy_(value)


class _Reload:
    """One reload of one model, from its start to its finish."""

    def __init__(self, model: nn.Module) -> None:
        values = settings.reload_mode() == "safe"
        self.saved = [(module, _Saved(module, values)) for module in model.modules()]
        self.load_weights = model.__dict__.get("load_weights")

    def guard(self, model: nn.Module) -> None:
        """Make every failure of ``model.load_weights`` undo the reload."""
        load_weights = model.load_weights

        def loading(*args: Any, **kwargs: Any) -> Any:
            with _undone_by_errors(model):
                return load_weights(*args, **kwargs)

        model.load_weights = loading  # type: ignore[assignment]

    def release(self, model: nn.Module) -> None:
        """Take the guard away."""
        if self.load_weights is None:
            model.__dict__.pop("load_weights", None)
        else:
            model.__dict__["load_weights"] = self.load_weights

    @torch.no_grad()
    def undo(self, model: nn.Module) -> None:
        """Put the tensors back that were in use before."""
        self.release(model)
        for module, saved in self.saved:
            get_layerwise_info(module).reset()
            saved.restore(module)
            method = getattr(module, "quant_method", None)
            for receiver in method.receivers if isinstance(method, _METHODS) else ():
                receiver.coverage.clear()


_METHODS = (NpuQuantLinearMethod, NpuQuantMoEMethod)


def _quantized(model: nn.Module) -> Iterator[tuple[nn.Module, NpuQuantLinearMethod | NpuQuantMoEMethod]]:
    """The model's layers that this package serves, with their methods."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, _METHODS):
            yield module, method


@contextmanager
def _undone_by_errors(model: nn.Module) -> Iterator[None]:
    """Undo the model's reload if the body raises."""
    with ExitStack() as stack:
        reload = _reloads.get(model)
        if reload is not None:
            stack.callback(_reloads.pop, model, None)
            stack.callback(reload.undo, model)
        yield
        stack.pop_all()


def with_start(initialize: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Wrap ``initialize_layerwise_reload`` to save the tensors of a model that this package serves."""

    def starting(model: nn.Module) -> None:
        abandoned = _reloads.pop(model, None)
        if abandoned is not None:  # its sender failed before this process noticed
            abandoned.undo(model)
        if next(_quantized(model), None) is None:
            return initialize(model)
        _reloads[model] = _Reload(model)
        with _undone_by_errors(model):
            initialize(model)
        _reloads[model].guard(model)
        return None

    return starting


def with_finish(finalize: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``finalize_layerwise_processing`` to check that the reload is complete, and to undo it if not."""

    def finishing(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        reload = _reloads.get(model)
        with _undone_by_errors(model):
            if reload is not None:
                raise_findings(_lacking(model))
            finalize(model, *args, **kwargs)
        if reload is not None:
            reload.release(model)
            _reloads.pop(model, None)

    return finishing


def _lacking(model: nn.Module) -> list[Finding]:
    """Findings for quantized layers that lack tensors in this reload, all of them if other layers got theirs."""
    if not any(
        get_layerwise_info(module).load_numel or not get_layerwise_info(module).can_load() for module in model.modules()
    ):
        return []
    found = FindingLimit()
    for module, method in _quantized(model):
        if get_layerwise_info(module).can_load():  # not complete, so not prepared yet
            found.extend(method.lacking(module))
    return found.close()


def with_source_check(reload_weights: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``GPUModelRunner.reload_weights`` to compare another checkpoint with the served one before anything changes."""

    def reloading(
        self: Any,
        weights_iterator: Iterable[Any] | None = None,
        weights_path: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        config = self.vllm_config.quant_config
        other = None if weights_iterator is not None else weights_path
        if other is not None and isinstance(config, NpuQuantConfig) and config.described is not None:
            sent = config.for_other_weights()
            sent.maybe_update_config(other, self.vllm_config.model_config.hf_config)
            if sent.described is not None:
                raise_findings(differences(config.described, sent.described))
        reload_weights(self, weights_iterator, weights_path, *args, **kwargs)

    return reloading


def differences(served: Described, sent: Described) -> list[Finding]:
    """Findings for layers that the served and the sent checkpoint store in different ways."""
    found = FindingLimit()
    for layer in dict.fromkeys((*served.layer_names(), *sent.layer_names())):
        old, new = (_stored(described, layer) for described in (served, sent))
        if old != new:
            found.add(
                Finding(
                    "reload-mismatch",
                    "the weights to load are not stored as those that this engine serves",
                    layer=layer,
                    file=sent.source,
                    expected=old or "no such layer",
                    found=new or "no such layer",
                    fix="export the weights with the recipe of the served checkpoint, or start a new engine with them",
                )
            )
    return found.close()


def _stored(described: Described, layer: str) -> str:
    """The way in which a layer is stored, in words; empty if the checkpoint has no such layer."""
    experts = described.experts.get(layer)
    entry = described.layers.get(layer)
    parts = (experts.gate, experts.up, experts.down) if experts is not None else (entry,) if entry is not None else ()
    words = [
        describe(part.spec) + (f" with {', '.join(sorted(part.tensors))}" if part.tensors else "") for part in parts
    ]
    return (f"{experts.count} experts: " if experts is not None else "") + "; ".join(dict.fromkeys(words))
