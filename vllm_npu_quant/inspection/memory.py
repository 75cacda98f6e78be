# SPDX-License-Identifier: Apache-2.0
"""Bytes per rank: weights as the NPU methods prepare them, and the KV cache. The rows' costs have the formulas."""

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
from vllm_npu_quant.spec import LayerKind, WeightSpec

__all__ = ["KvCache", "kv_cache", "layer_bytes", "rank_bytes"]


def layer_bytes(layer: Layer, tp: int, ep: int, kv_heads: int = 0) -> int:
    """Bytes that one rank holds of a layer after preparation."""
    return _bytes(layer, part_of(layer, tp, ep, kv_heads))


def rank_bytes(layers: Iterable[Layer], tp: int, ep: int, kv_heads: int = 0, *, float16: bool = False) -> int:
    """Bytes of one rank's parameters: each layer's, with q/k/v and gate/up as the one layer that vLLM makes of them.

    What a fused layer shares (the scales of a static input, the matrices of an input transform) is counted once; of what
    ranks have different amounts, the most. Left out: tables of rotary embeddings; the copies of kv_b_proj that an attention
    backend may make; zero points that are only seen in the values of ModelSlim's weight-only layers.
    """
    shards = {shard: (fused, family) for fused, family in FUSED_FAMILIES.items() for shard in family}
    found: dict[tuple[object, ...], list[Layer]] = {}
    experts: dict[str, list[Layer]] = {}
    total = 0
    for layer in layers:
        parent, _, last = layer.name.rpartition(".")
        if layer.kind == LayerKind.FUSED_MOE.value and layer.outputs:
            experts.setdefault(parent, []).append(layer)
        elif layer.row is not None and layer.kind == LayerKind.LINEAR.value and last in shards:
            # Shards of different groups become one layer whose groups divide them all.
            weight = None if layer.spec.weight is None else replace(layer.spec.weight, group_size=0)
            found.setdefault((parent, shards[last][0], replace(layer.spec, weight=weight)), []).append(layer)
        else:
            total += _bytes(layer, part_of(layer, tp, ep, kv_heads), float16)
    for members in experts.values():
        total += _experts_bytes(members, [part_of(layer, tp, ep, kv_heads) for layer in members], float16)
    for members in found.values():
        parts = [part_of(layer, tp, ep, kv_heads) for layer in members]
        if len({part.inputs for part in parts}) != 1:  # not what the family is: the check speaks of it
            total += sum(_bytes(layer, part, float16) for layer, part in zip(members, parts, strict=True))
            continue
        whole = replace(parts[0], outputs=sum(part.outputs for part in parts))
        weight = members[0].spec.weight
        assert weight is not None
        group = gcd(*(layer.spec.weight.group_size for layer in members if layer.spec.weight is not None))
        fused = replace(members[0], spec=replace(members[0].spec, weight=replace(weight, group_size=group)))
        total += _bytes(fused, whole, float16)
    return total


def _bytes(layer: Layer, part: LayerPart, float16: bool = False) -> int:
    if layer.kind == OTHER or layer.row is None or layer.spec.weight is None:
        if not layer.outputs:
            return layer.loaded  # norms and the like: everybody has them
        one = ACT * part.outputs * part.inputs * part.count
        beside = layer.loaded - ACT * layer.outputs * layer.inputs * layer.count  # biases
        return one + max(beside, 0) * part.outputs // layer.outputs
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
    """Of an input transform: [L, L] and [M, M] in the model's dtype. npu_kronecker_quant takes both, or an identity."""
    transform = layer.spec.transform
    if transform is None:
        return 0
    left, right = transform.left, transform.right
    if "npu_kronecker_quant" in layer.operators:
        left, right = left or layer.inputs // max(right, 1), right or layer.inputs // max(left, 1)
    return ACT * (left**2 + right**2)


def _act_order(weight: WeightSpec, outputs: int, inputs: int, whole: int) -> int:
    """As ``cost.weight_only`` with the inputs sorted by groups, each filled up to a multiple of 32; an int64 index.

    A part of the inputs has some of every group: how many, the values of g_idx say, and this assumes just above the average.
    """
    size = min(round_up(weight.group_size * inputs // whole + (inputs != whole), 32), round_up(weight.group_size, 32))
    depth = -(-whole // weight.group_size) * size
    return weight_only(replace(weight, group_size=size), outputs, depth) + 8 * depth


def _experts_bytes(members: list[Layer], parts: list[LayerPart], float16: bool) -> int:
    """Of the experts of one MoE layer: gate, up and down, whose inner dimension is filled up for both products.

    Float experts beside a quantized product are prepared as ``FloatExperts``, which is also what all three are without.
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
        bytes_per_token: of all layers; 0 where config.json does not tell.
        layers: layers that keep keys and values of every token.
        how: what it was computed from.
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
