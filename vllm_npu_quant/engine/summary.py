# SPDX-License-Identifier: Apache-2.0
"""Summary of a running model's layers: schemes, method classes, operators."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["LayerGroup", "layer_groups", "layer_summary"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one kind that share scheme and method.

    Attributes:
        kind: layer kind ("linear", "fused_moe"). scheme: the producer's name for the scheme, "FLOAT" for float layers.
        method: the method class; for experts that mix two, w13's + w2's. operators: the torch_npu operators it calls, in
            order. count: number of layers.
    """

    kind: str
    scheme: str
    method: str
    operators: tuple[str, ...]
    count: int


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """The groups of one rank's model, the quantized ones first."""
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_npu_quant.engine import platforms
    from vllm_npu_quant.engine.linear import NpuQuantLinearMethod
    from vllm_npu_quant.engine.moe import NpuQuantMoEMethod

    found: Counter[tuple[str, str, str, tuple[str, ...]]] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, NpuQuantLinearMethod):
            row = method.row
            found[(method.kind.value, method.spec.scheme, row.method_name, row.operators)] += 1
        elif isinstance(method, NpuQuantMoEMethod) and platforms.is_moe(module):
            found[("fused_moe", method.scheme, method.method_classes, method.operators)] += 1
        elif platforms.is_moe(module):
            found[("fused_moe", "FLOAT", type(method).__name__, ())] += 1
        elif isinstance(module, LinearBase):
            found[("linear", "FLOAT", type(method).__name__, ())] += 1
    groups = [LayerGroup(*key, count=count) for key, count in found.items()]
    return sorted(groups, key=lambda group: (group.scheme == "FLOAT", group.kind, group.scheme))


def layer_summary(llm: Any) -> list[LayerGroup]:
    """The groups on the first rank of a running ``vllm.LLM``."""
    return llm.apply_model(layer_groups)[0]
