# SPDX-License-Identifier: Apache-2.0
"""Tensor and expert parallelism: the part of each layer on a rank, and the sizes that divide all layers evenly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_npu_quant.errors import Finding, FindingLimit, Severity
from vllm_npu_quant.inspection.layers import OTHER, Layer
from vllm_npu_quant.inspection.model import Model
from vllm_npu_quant.layouts.tables import Axis
from vllm_npu_quant.serving.cost import round_up
from vllm_npu_quant.serving.shards import rank_part
from vllm_npu_quant.spec import LayerKind

__all__ = ["NUMBER", "SIZES", "LayerPart", "fitting_sizes", "kv_heads", "parallel_findings", "part_of", "sharded_axis"]

#: Tensor-parallel sizes that are tried to suggest sizes that work.
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64)

#: Last name components of row-parallel layers, whose inputs are split.
ROW_PARALLEL = frozenset({"o_proj", "out_proj", "down_proj", "w2", "wo", "c_proj", "fc2", "dense_4h_to_h", "dense"})
#: Last name components of replicated layers.
REPLICATED = frozenset(
    {
        "gate",
        "router",
        "shared_expert_gate",
        "q_a_proj",
        "kv_a_proj_with_mqa",
        "wq_a",
        "wkv",
        "wkv_a",
        "indexer",
        "wk",
        "weights_proj",
        "eh_proj",
    }
)
#: The number of a layer in its name.
NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


def sharded_axis(layer: Layer) -> Axis | None:
    """The dimension that tensor parallelism splits, by the layer's name; None if the layer is replicated."""
    last = layer.name.rpartition(".")[2]
    if layer.kind == OTHER:
        return Axis.OUT if "embed_tokens" in layer.name else None
    if last in REPLICATED or ".indexer." in layer.name:
        return None
    return Axis.IN if last in ROW_PARALLEL else Axis.OUT


#: vLLM pads the vocabulary of embeddings and lm_head to a multiple of this.
VOCABULARY = 64


@dataclass(frozen=True)
class LayerPart:
    """One rank's part of a layer: ``count`` matrices of N outputs and K inputs."""

    outputs: int
    inputs: int
    count: int = 1


def part_of(layer: Layer, tp: int, ep: int, kv_heads: int = 0) -> LayerPart:
    """A rank's part of a layer with ``tp`` tensor-parallel ranks, of which ``ep`` share the experts.

    Args:
        layer: the layer.
        tp, ep: tensor- and expert-parallel sizes.
        kv_heads: key-value heads of the model, which are replicated if there are more ranks than heads; 0 if not known.
    """
    outputs, inputs, count = layer.outputs, layer.inputs, layer.count
    axis = sharded_axis(layer)
    if layer.kind == LayerKind.FUSED_MOE.value and ep > 1:
        return LayerPart(outputs, inputs, -(-count // ep))
    if axis is Axis.OUT:
        last = layer.name.rpartition(".")[2]
        if layer.kind in (OTHER, LayerKind.LM_HEAD.value):
            outputs = round_up(round_up(outputs, VOCABULARY), tp)
        elif last in ("k_proj", "v_proj"):
            if kv_heads and tp > kv_heads and outputs % kv_heads == 0:
                return LayerPart(outputs // kv_heads, inputs, count)
            if outputs % tp:
                return LayerPart(outputs, inputs, count)
        outputs = -(-outputs // tp)
    elif axis is Axis.IN:
        inputs = -(-inputs // tp)
    return LayerPart(outputs, inputs, count)


def kv_heads(model: Model) -> int:
    """Number of key-value heads in the config; 0 if not known, and for latent attention."""
    if model.size("kv_lora_rank"):
        return 0
    return model.size("num_key_value_heads", "multi_query_group_num", "num_kv_heads") or model.size(
        "num_attention_heads", "n_head"
    )


def fitting_sizes(model: Model, layers: Sequence[Layer]) -> tuple[int, ...]:
    """The tensor-parallel sizes of SIZES that divide every layer evenly."""
    return tuple(size for size in SIZES if not parallel_findings(model, layers, tp=size, ep=1, fitting=False))


def parallel_findings(
    model: Model, layers: Sequence[Layer], *, tp: int, ep: int, fitting: bool = True
) -> list[Finding]:
    """Findings for layers that cannot be split among ``tp`` tensor-parallel ranks, of which ``ep`` share the experts.

    Args:
        model: an opened model.
        layers: its layers.
        tp, ep: tensor- and expert-parallel sizes.
        fitting: whether to suggest sizes that work.
    """
    found = FindingLimit(8)
    if tp > 1:
        problems = [*_heads(model, tp), *_layers(layers, tp, ep)]
        works = ""
        if problems and fitting:
            sizes = [str(size) for size in fitting_sizes(model, layers) if size <= max(2 * tp, 16)]
            works = "use a tensor-parallel size that works: " + ", ".join(sizes)
        # One finding for the layers of all depths with the same name and problem.
        alike: dict[tuple[str, ...], list[str]] = {}
        for layer, *problem in problems:
            alike.setdefault((NUMBER.sub("*", layer), *problem), []).append(layer)
        for (_, message, expected, what), names in alike.items():
            more = f" ({len(names):,} layers like it)" if len(names) > 1 else ""
            file = "config.json" if not names[0] else ""
            found.add(Finding("cannot-shard", message + more, names[0], file, expected, what, fix=works))
    if ep > 1:
        for finding in _experts(layers, ep):
            found.add(finding)
    return found.close()


def _heads(model: Model, tp: int) -> Iterable[tuple[str, str, str, str]]:
    heads, keys = model.size("num_attention_heads", "n_head"), kv_heads(model)
    if heads and heads % tp:
        yield "", "the attention heads cannot be divided among the ranks", f"a divisor of {heads}", f"tp {tp}"
    elif keys and keys % tp and tp % keys:
        yield (
            "",
            "the key-value heads can neither be divided among the ranks nor repeated on them",
            f"a divisor or a multiple of {keys}",
            f"tp {tp}",
        )


def _layers(layers: Iterable[Layer], tp: int, ep: int) -> Iterable[tuple[str, str, str, str]]:
    """Refusals by the engine, for each layer: layer, message, expected, found."""
    for layer in layers:
        axis = sharded_axis(layer)
        if axis is None or not layer.outputs or layer.kind in (OTHER, LayerKind.LM_HEAD.value):
            continue  # vLLM pads the vocabulary
        if ep > 1 and layer.kind == LayerKind.FUSED_MOE.value:
            continue  # experts are divided among the ranks, not cut
        if layer.outputs % tp and layer.name.rpartition(".")[2] in ("k_proj", "v_proj", "qkv_proj"):
            continue  # their heads may be repeated
        for finding in rank_part(layer.stored, layer.tensors, axis, [layer.outputs], layer.inputs, tp).findings:
            yield layer.name, finding.message, finding.expected, finding.found


def _experts(layers: Iterable[Layer], ep: int) -> Iterable[Finding]:
    counts = dict.fromkeys(layer.count for layer in layers if layer.kind == LayerKind.FUSED_MOE.value)
    if not counts:
        yield Finding(
            "cannot-shard",
            "the checkpoint has no routed experts to divide",
            expected="ep 1",
            found=f"ep {ep}",
            fix="leave --ep out",
            severity=Severity.WARNING,
        )
    for count in counts:
        if count % ep:
            sizes = ", ".join(str(size) for size in range(1, min(count, 64) + 1) if count % size == 0)
            yield Finding(
                "cannot-shard",
                "the experts cannot be divided evenly among the expert-parallel ranks",
                expected=f"a divisor of {count}",
                found=f"ep {ep}",
                fix=f"use an expert-parallel size that works: {sizes}",
            )
