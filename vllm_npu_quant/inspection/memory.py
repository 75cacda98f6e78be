# SPDX-License-Identifier: Apache-2.0
"""Bytes per rank: weights as the NPU methods prepare them, and the KV cache.

Each formula follows one method class's ``prepare``; a test compares them with prepared layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import gcd, lcm

from vllm_npu_quant.formats.resolve import FUSED_FAMILIES
from vllm_npu_quant.inspection.layers import OTHER, Layer
from vllm_npu_quant.inspection.model import Model
from vllm_npu_quant.inspection.parallel import cut_of, kv_heads
from vllm_npu_quant.layouts.tables import LAYOUTS, Axis
from vllm_npu_quant.spec import Granularity, LayerKind, WeightSpec

__all__ = ["KvCache", "RankPart", "kv_cache", "layer_bytes", "part_of", "rank_bytes", "weight_bytes"]

#: Bytes of an element of the model's dtype: bfloat16 or float16.
ACT = 2
#: vLLM fills the vocabulary up to a multiple of this, in embeddings and lm_head.
VOCABULARY = 64


@dataclass(frozen=True)
class RankPart:
    """What one rank has of a layer: ``count`` matrices of N outputs and K inputs."""

    outputs: int
    inputs: int
    count: int = 1


def part_of(layer: Layer, tp: int, ep: int, kv_heads: int = 0) -> RankPart:
    """A rank's part of a layer with ``tp`` tensor-parallel ranks, of which ``ep`` share the experts.

    Args:
        kv_heads: key-value heads of the model, which more ranks than heads repeat; 0 where they are not known.
    """
    outputs, inputs, count = layer.outputs, layer.inputs, layer.count
    axis = cut_of(layer)
    if layer.kind == LayerKind.FUSED_MOE.value and ep > 1:
        return RankPart(outputs, inputs, -(-count // ep))
    if axis is Axis.OUT:
        last = layer.name.rpartition(".")[2]
        if layer.kind in (OTHER, LayerKind.LM_HEAD.value):
            outputs = _up(_up(outputs, VOCABULARY), tp)
        elif last in ("k_proj", "v_proj"):
            if kv_heads and tp > kv_heads and outputs % kv_heads == 0:
                return RankPart(outputs // kv_heads, inputs, count)
            if outputs % tp:
                return RankPart(outputs, inputs, count)
        outputs = -(-outputs // tp)
    elif axis is Axis.IN:
        inputs = -(-inputs // tp)
    return RankPart(outputs, inputs, count)


def weight_bytes(weight: WeightSpec, method: str, outputs: int, inputs: int) -> int:
    """Bytes of the tensors that a method prepares from one matrix."""
    formula = _FORMULAS.get(method)
    if formula is None:  # a method that this table does not know yet: its integers and one float32 scale per output
        return outputs * inputs * weight.bits // 8 + 4 * outputs
    return formula(weight, outputs, inputs)


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


def _bytes(layer: Layer, part: RankPart, float16: bool = False) -> int:
    last = layer.name.rpartition(".")[2]
    if layer.kind == OTHER or layer.row is None or layer.spec.weight is None:
        if not layer.outputs:
            return layer.loaded  # norms and the like: everybody has them
        one = ACT * part.outputs * part.inputs * part.count
        beside = layer.loaded - ACT * layer.outputs * layer.inputs * layer.count  # biases
        return one + max(beside, 0) * part.outputs // layer.outputs
    if last == "kv_b_proj":  # latent attention multiplies by it both ways, as floats
        return ACT * part.outputs * part.inputs
    weight, outputs = layer.spec.weight, part.outputs
    bias = 4 * outputs if "bias" in layer.tensors else 0
    if layer.method == "W8A8StaticLinear":  # quant_bias holds it; for float16, scales are int64
        bias = 4 * outputs if float16 else 0
    if LAYOUTS[layer.stored.layout].act_order and weight.group_size and layer.kind != LayerKind.FUSED_MOE.value:
        return _act_order(weight, outputs, part.inputs, layer.inputs) + bias
    if weight.group_size and part.inputs != layer.inputs and part.inputs % weight.group_size:  # cut within groups
        weight = replace(weight, group_size=gcd(part.inputs, weight.group_size))
    if layer.kind == LayerKind.FUSED_MOE.value:
        group = _own_group(layer, part)
        depth = _up(part.inputs, _depth_multiple(layer.method, group))
        return _expert(weight, layer.method, _up(outputs, _OUTPUTS[layer.method]), depth, group) * part.count
    one = weight_bytes(weight, layer.method, outputs, part.inputs)
    return (one + _matrices(layer) + bias) * part.count


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
    """As ``_weight_only``, with the inputs sorted by groups. Each group is filled up to a multiple of 32 inputs; int64 index.

    A part of the inputs has some of every group: how many, the values of g_idx say, and this assumes just above the average.
    """
    size = min(_up(weight.group_size * inputs // whole + (inputs != whole), 32), _up(weight.group_size, 32))
    depth = -(-whole // weight.group_size) * size
    return _weight_only(replace(weight, group_size=size), outputs, depth) + 8 * depth


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _groups(weight: WeightSpec, inputs: int) -> int:
    return -(-inputs // weight.group_size) if weight.granularity is Granularity.GROUP and weight.group_size else 1


def _int8(extra: int) -> Callable[[WeightSpec, int, int], int]:
    """int8 [K, N] and ``extra`` bytes per output."""
    return lambda _, outputs, inputs: outputs * inputs + extra * outputs


def _int8_groups(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int8 [G, k, N], float32 scale and zero point [G, N]."""
    groups = _groups(weight, inputs)
    depth = groups * weight.group_size if weight.group_size else inputs
    return outputs * depth + (4 if weight.symmetric else 8) * groups * outputs


def _static(_: WeightSpec, outputs: int, inputs: int) -> int:
    """int8 [K, N], float32 scale and int32 bias per output, scale and offset per input in the model's dtype."""
    return outputs * inputs + 8 * outputs + 2 * ACT * inputs


def _weight_only(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int8 [K, N] or int4 [K, N/8], scale and offset [G, N] in the model's dtype."""
    numbers = ACT if weight.symmetric else 2 * ACT
    group, groups = weight.group_size, _groups(weight, inputs)
    depth = inputs if groups == 1 or group % 32 == 0 else groups * _up(group, 32)
    if weight.bits > 4:
        return outputs * depth + numbers * groups * outputs
    outputs = _up(outputs, 8)
    return outputs * depth // 2 + numbers * groups * outputs


def _w4a8(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int4 [1, K, N/8], int64 scale [1, G, N], float32 assist [N]."""
    group = weight.group_size if weight.granularity is Granularity.GROUP else 0
    halves = group % 256 != 0
    depth = _filled(inputs, group, 8 if halves else 256)
    parts = 1 if halves else -(-depth // 18432)
    unit = group if halves else 256
    groups = depth // unit if group else parts
    outputs = _up(outputs, 8)
    return outputs * depth // 2 + 8 * groups * outputs + 4 * outputs * parts


def _w4a4(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int4 [K/8, N] with float32 [N], or [1, K, N/8] with int64 [1, G, N]."""
    group = weight.group_size if weight.granularity is Granularity.GROUP else 0
    depth = _filled(inputs, group, 8)
    if not group:
        return outputs * depth // 2 + 4 * _up(outputs, 8)
    outputs = _up(outputs, 8)
    return outputs * depth // 2 + 8 * (depth // group) * outputs


def _filled(inputs: int, group: int, multiple: int) -> int:
    step = multiple * group // gcd(multiple, group) if group else multiple
    return _up(inputs, step)


def _experts_bytes(members: list[Layer], parts: list[RankPart], float16: bool) -> int:
    """Of the experts of one MoE layer: gate, up and down, whose inner dimension is filled up for both products.

    Float experts beside a quantized product are prepared as ``FloatExperts``, which is also what all three are without.
    """
    methods = [layer.method or "FloatExperts" for layer in members]
    if len(members) != 3 or not any(layer.row for layer in members) or not set(methods) <= _OUTPUTS.keys():
        return sum(_bytes(layer, part, float16) for layer, part in zip(members, parts, strict=True))
    groups = [_own_group(layer, part) for layer, part in zip(members, parts, strict=True)]
    inner = _up(parts[0].outputs, lcm(_OUTPUTS[methods[0]], _depth_multiple(methods[2], groups[2])))
    total = 0
    for number, (layer, part) in enumerate(zip(members, parts, strict=True)):
        method, group = methods[number], groups[number]
        if number < 2:
            outputs, depth = inner, _up(part.inputs, _depth_multiple(method, group))
        else:
            outputs, depth = _up(part.outputs, _OUTPUTS[method]), inner
        total += _expert(layer.spec.weight, method, outputs, depth, group) * part.count
    return total


def _own_group(layer: Layer, part: RankPart) -> int:
    """Inputs per scale of a rank's part of an expert; 0 where one scale serves all of them."""
    weight = layer.spec.weight
    group = weight.group_size if weight is not None and weight.granularity is Granularity.GROUP else 0
    if group and part.inputs != layer.inputs and part.inputs % group:  # cut within groups
        group = gcd(part.inputs, group)
    return group if part.inputs > group else 0


#: Of the experts' methods: what the outputs of a prepared weight are a multiple of, and its inputs.
_OUTPUTS = {
    "W8A8DynamicExperts": 64,
    "WeightOnlyExperts": 8,
    "W4A8DynamicExperts": 8,
    "W4A4DynamicExperts": 8,
    "FloatExperts": 1,
}
_INPUTS = {"W8A8DynamicExperts": 16, "W4A8DynamicExperts": 8, "W4A4DynamicExperts": 8}


def _depth_multiple(method: str, group: int) -> int:
    """What the inputs of an expert's prepared weight are a multiple of."""
    if method == "FloatExperts":
        return 1
    if method == "W4A8DynamicExperts" and group % 256 == 0:  # the int8 x int4 operator
        return lcm(256, group or 1)
    return lcm(_INPUTS.get(method, 1), group or 1)


def _expert(weight: WeightSpec | None, method: str, outputs: int, depth: int, group: int) -> int:
    """One expert's matrix, filled up to ``outputs`` x ``depth``.

    int8 [K, N] with float32 [N]; int8 [K, N] or int4 [K, N/8] with scale and offset [G, N] in the model's dtype; int4
    [K, N/8] with int64 [G, N], and float32 [N] for int8 activations; [K, N] in the model's dtype.
    """
    if method == "FloatExperts" or weight is None:
        return ACT * outputs * depth
    if method == "W8A8DynamicExperts":
        return outputs * depth + 4 * outputs
    if method == "WeightOnlyExperts":
        numbers = outputs * depth if weight.bits > 4 else outputs * depth // 2
        return numbers + 2 * ACT * (depth // group if group else 1) * outputs
    assist = 4 if method == "W4A8DynamicExperts" else 0
    unit = (256 if assist and group % 256 == 0 else group) if group else depth
    return outputs * depth // 2 + (8 * (depth // unit) + assist) * outputs


def _float(_: WeightSpec, outputs: int, inputs: int) -> int:
    return ACT * outputs * inputs


_FORMULAS: dict[str, Callable[[WeightSpec, int, int], int]] = {
    "W8A8DynamicLinear": _int8(4),
    "W8A8DynamicAsymmetricLinear": _int8(12),
    "W8A8DynamicGroupedLinear": _int8_groups,
    "W8A8StaticLinear": _static,
    "WeightOnlyLinear": _weight_only,
    "W4A8DynamicLinear": _w4a8,
    "W4A4DynamicLinear": _w4a4,
    "DequantizedLinear": _float,
}


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
