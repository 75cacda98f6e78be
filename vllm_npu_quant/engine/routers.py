# SPDX-License-Identifier: Apache-2.0
"""Check of a model that is built and not yet loaded: layers of MoE blocks that its class keeps float, such as routers.

vLLM asks no quantization method for them. Their quantized tensors would find no parameter, which vLLM reports by names only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from vllm_npu_quant.engine import platforms
from vllm_npu_quant.engine.config import NpuQuantConfig
from vllm_npu_quant.engine.linear import NpuQuantLinearMethod
from vllm_npu_quant.errors import Finding, Severity, raise_findings
from vllm_npu_quant.formats.experts import quantized_router
from vllm_npu_quant.formats.resolve import LayerResolver

__all__ = ["checked_before_weights"]


@contextmanager
def checked_before_weights(loader: Any, config: NpuQuantConfig) -> Iterator[None]:
    """Check the models that a loader of vLLM builds within this context, before it reads their weights.

    Args:
        loader: a ``BaseModelLoader``. config: the models' quantization.
    """
    load_weights = loader.load_weights

    def checking(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise_findings(_float_layers(config.resolver, model))
        return load_weights(model, *args, **kwargs)

    loader.load_weights = checking
    try:
        yield
    finally:
        loader.load_weights = load_weights


def _float_layers(resolver: LayerResolver | None, model: nn.Module) -> list[Finding]:
    """A finding if the checkpoint stores layers of MoE blocks quantized that the model's class keeps float."""
    if resolver is None:
        return []
    modules = dict(model.named_modules())
    experts = [
        platforms.called_module(name, modules)[0] for name, module in modules.items() if platforms.is_moe(module)
    ]
    blocks = {name.rpartition(".")[0] for name in experts}
    found = [
        name
        for name, module in modules.items()
        if isinstance(module, LinearBase)
        and not isinstance(module.quant_method, NpuQuantLinearMethod)
        and not blocks.isdisjoint(_parents(name))
        and _is_quantized(resolver, name)
    ]
    return [quantized_router(found, resolver.described.source, Severity.ERROR)] if found else []


def _parents(name: str) -> Iterator[str]:
    """The names of the modules that hold a module."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_quantized(resolver: LayerResolver, name: str) -> bool:
    entries = (resolver.described.find(spelling) for spelling in resolver.spellings(name))
    return next((not entry.spec.is_float for entry in entries if entry is not None), False)
