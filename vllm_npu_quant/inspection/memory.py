# SPDX-License-Identifier: Apache-2.0
"""Memory per rank: prepared weights, by the costs of the dispatch rows, and the KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import gcd, lcm

from vllm_npu_quant.formats.resolve import FUSED_FAMILIES
from vllm_npu_quant.inspection.layers import OTHER, Layer
from vllm_npu_quant.inspection.model import Model
from vllm_npu_quant.inspection.parallel import LayerPart, kv_heads, part_of
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.serving.cost import ACT, FLOAT_EXPERTS, ExpertsCost, group_of, round_up, weight_only
from vllm_npu_quant.serving.shards import fit_group
from vllm_npu_quant.spec import LayerKind, LayerSpec, WeightSpec

__all__ = ["KvCache", "kv_cache", "layer_bytes", "rank_bytes"]


def layer_bytes(layer: Layer, tp: int, ep: int, kv_heads: int = 0) -> int:
    """Bytes of one rank's prepared tensors of a layer."""
    return _bytes(layer, part_of(layer, tp, ep, kv_heads))


def rank_bytes(layers: Iterable[Layer], tp: int, ep: int, kv_heads: int = 0, *, float16: bool = False) -> int:
    """Bytes of one rank's parameters, with q/k/v and gate/up as vLLM's fused layers.

    Tensors that the shards of a fused layer share (static input scales, matrices of an input transform) are counted once. If
    ranks have different amounts, the largest is counted. Not included: tables of rotary embeddings; copies of kv_b_proj made
    by an attention backend; zero points of ModelSlim's weight-only layers, which are known only from their values.
    """
    fused_names = {shard: fused for fused, family in FUSED_FAMILIES.items() for shard in family}
    fused: dict[tuple[str, str, LayerSpec, WeightSpec], list[Layer]] = {}
    experts: dict[str, list[Layer]] = {}
    total = 0
    for layer in layers:
        parent, _, last = layer.name.rpartition(".")
        weight = layer.spec.weight
        if layer.kind == LayerKind.FUSED_MOE.value and layer.outputs:
            experts.setdefault(parent, []).append(layer)
        elif (
            layer.row is not None
            and weight is not None
            and layer.kind == LayerKind.LINEAR.value
            and last in fused_names
        ):
            # Shards with different group sizes are fused; the fused group size divides all of them.
            any_group = replace(weight, group_size=0)
            key = (parent, fused_names[last], replace(layer.spec, weight=any_group), any_group)
            fused.setdefault(key, []).append(layer)
        else:
            total += _bytes(layer, part_of(layer, tp, ep, kv_heads), float16)
    for members in experts.values():
        total += _experts_bytes(members, [part_of(layer, tp, ep, kv_heads) for layer in members], float16)
    for (_, _, spec, weight), members in fused.items():
        parts = [part_of(layer, tp, ep, kv_heads) for layer in members]
        if len({part.inputs for part in parts}) != 1:  # not a fused layer; fused_findings reports it
            total += sum(_bytes(layer, part, float16) for layer, part in zip(members, parts, strict=True))
            continue
        group = gcd(*(layer.spec.weight.group_size for layer in members if layer.spec.weight is not None))
        layer = replace(members[0], spec=replace(spec, weight=replace(weight, group_size=group)))
        total += _bytes(layer, replace(parts[0], outputs=sum(part.outputs for part in parts)), float16)
    return total


def _bytes(layer: Layer, part: LayerPart, float16: bool = False) -> int:
    if layer.kind == OTHER or layer.row is None or layer.spec.weight is None:
        if not layer.outputs:
            return layer.loaded  # norms and similar layers are replicated
        weight_bytes = ACT * part.outputs * part.inputs * part.count
        bias_bytes = layer.loaded - ACT * layer.outputs * layer.inputs * layer.count
        return weight_bytes + max(bias_bytes, 0) * part.outputs // layer.outputs
    weight, outputs, cost = layer.spec.weight, part.outputs, layer.row.cost
    if isinstance(cost, ExpertsCost):
        group = _own_group(layer, part)
        filled = round_up(outputs, cost.outputs), round_up(part.inputs, cost.inputs(group))
        return cost.weight(weight, *filled, group) * part.count
    bias = cost.bias(outputs, "bias" in layer.tensors, float16)
    if LAYOUTS[layer.stored.layout].act_order and weight.group_size:
        return _act_order(weight, outputs, part.inputs, layer.inputs) + bias
    weight = fit_group(layer.spec, layer.inputs, part.inputs).weight or weight
    return (cost.weight(weight, outputs, part.inputs) + _matrices(layer) + bias) * part.count


def _matrices(layer: Layer) -> int:
    """Bytes of an input transform: [L, L] and [M, M] in the model's dtype. npu_kronecker_quant requires both, so a missing
    one is an identity."""
    transform = layer.spec.transform
    if transform is None:
        return 0
    left, right = transform.left, transform.right
    if "npu_kronecker_quant" in layer.operators:
        left, right = left or layer.inputs // max(right, 1), right or layer.inputs // max(left, 1)
    return ACT * (left**2 + right**2)


def _act_order(weight: WeightSpec, outputs: int, inputs: int, whole: int) -> int:
    """Bytes of a weight-only layer with activation order: inputs sorted by group, each group padded to a multiple of 32; and
    an int64 index.

    The number of a rank's inputs in each group depends on the values of g_idx; one more than the average is assumed.
    """
    size = min(round_up(weight.group_size * inputs // whole + (inputs != whole), 32), round_up(weight.group_size, 32))
    depth = -(-whole // weight.group_size) * size
    return weight_only(replace(weight, group_size=size), outputs, depth) + 8 * depth


def _experts_bytes(members: list[Layer], parts: list[LayerPart], float16: bool) -> int:
    """Of the experts of one MoE layer: gate, up and down, whose inner dimension is filled up for both products.

    A float product beside a quantized one is prepared by ``FloatExperts``; if all are float, nothing is padded.
    """
    costs = [
        cost for layer in members if isinstance(cost := layer.row.cost if layer.row else FLOAT_EXPERTS, ExpertsCost)
    ]
    if len(members) != 3 or len(costs) != 3 or not any(layer.row for layer in members):
        return sum(_bytes(layer, part, float16) for layer, part in zip(members, parts, strict=True))
    groups = [_own_group(layer, part) for layer, part in zip(members, parts, strict=True)]
    inner = round_up(parts[0].outputs, lcm(costs[0].outputs, costs[2].inputs(groups[2])))
    total = 0
    for number, (layer, part) in enumerate(zip(members, parts, strict=True)):
        cost, group = costs[number], groups[number]
        if number < 2:
            outputs, depth = inner, round_up(part.inputs, cost.inputs(group))
        else:
            outputs, depth = round_up(part.outputs, cost.outputs), inner
        total += cost.weight(layer.spec.weight, outputs, depth, group) * part.count
    return total


def _own_group(layer: Layer, part: LayerPart) -> int:
    """Inputs per scale of a rank's part of an expert; 0 where one scale serves all of them."""
    group = group_of(fit_group(layer.spec, layer.inputs, part.inputs).weight)
    return group if part.inputs > group else 0


@dataclass(frozen=True)
class KvCache:
    """The KV cache of one rank, in the model's dtype.

    Attributes:
        bytes_per_token: bytes of all layers; 0 if config.json does not determine them.
        layers: number of layers with keys and values.
        how: the computation, as text.
    """

    bytes_per_token: int
    layers: int
    how: str


def kv_cache(model: Model, tp: int) -> KvCache:
    """The KV cache of one rank, from config.json."""
    layers = model.size("num_hidden_layers", "n_layer", "num_layers")
    kinds = model.text_config.get("layer_types")
    recurrent = ""
    if isinstance(kinds, list) and len(kinds) == layers and all(isinstance(kind, str) for kind in kinds):
        attention = sum("linear" not in kind and "mamba" not in kind for kind in kinds)
        if attention != layers:
            recurrent = f", {layers - attention} layers with a recurrent state are left out"
        layers = attention
    latent = model.size("kv_lora_rank")
    if latent and layers:
        rope = model.size("qk_rope_head_dim")
        how = f"latent attention: {layers} layers x ({latent} + {rope}) x {ACT} bytes on every rank"
        return KvCache(layers * (latent + rope) * ACT, layers, how + recurrent)
    heads, keys = model.size("num_attention_heads", "n_head"), kv_heads(model)
    size = model.size("head_dim") or (model.size("hidden_size", "n_embd") // heads if heads else 0)
    if not (layers and keys and size):
        return KvCache(0, layers, "config.json does not tell layers, heads and head size")
    own = max(keys // tp, 1)
    how = f"{layers} layers x 2 x {own} heads of {size} x {ACT} bytes"
    return KvCache(layers * 2 * own * size * ACT, layers, how + recurrent)
