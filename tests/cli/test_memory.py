# SPDX-License-Identifier: Apache-2.0
"""The bytes that plan counts are the bytes that the methods prepare."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vllm_npu_quant import emulation
from vllm_npu_quant.inspection.layers import Layer
from vllm_npu_quant.inspection.memory import kv_cache, layer_bytes, rank_bytes
from vllm_npu_quant.inspection.model import open_model
from vllm_npu_quant.inspection.parallel import part_of
from vllm_npu_quant.layouts import load_object
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods.base import PrepareContext
from vllm_npu_quant.methods.moe import Experts, FusedExperts
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerKind, LayerSpec, Layout, WeightSpec

TOKEN, TENSOR = Granularity.TOKEN, Granularity.TENSOR
W8A8 = ActivationSpec(8, dynamic=True, granularity=TOKEN)
ASYMMETRIC = ActivationSpec(8, dynamic=True, granularity=TOKEN, symmetric=False)
W4A4 = ActivationSpec(4, dynamic=True, granularity=TOKEN)


def weight(bits: int, group: int = 0, symmetric: bool = True) -> WeightSpec:
    return WeightSpec(
        bits,
        granularity=Granularity.GROUP if group else Granularity.CHANNEL,
        group_size=group,
        symmetric=symmetric,
    )


CASES = [
    (weight(8), W8A8, 96, 128),
    (weight(8), W8A8, 33, 70),
    (weight(8), ASYMMETRIC, 96, 128),
    (weight(8, 64), W8A8, 48, 128),
    (weight(8, 48, False), W8A8, 33, 130),
    (weight(8, 0, False), W8A8, 33, 130),
    (weight(8), None, 48, 128),
    (weight(8, 64), None, 48, 128),
    (weight(8, 64, False), None, 48, 128),
    (weight(4), None, 48, 128),
    (weight(4, 32), None, 44, 128),
    (weight(4, 128, False), None, 44, 512),
    (weight(4, 48), None, 40, 192),
    (weight(3, 64, False), None, 40, 192),
    (weight(4), W8A8, 40, 512),
    (weight(4), W8A8, 44, 300),
    (weight(4, 256), W8A8, 40, 1024),
    (weight(4, 128), W8A8, 44, 512),
    (weight(4), W4A4, 40, 512),
    (weight(4, 64), W4A4, 40, 512),
]


def layer(spec: LayerSpec, outputs: int, inputs: int, name: str = "model.layers.0.mlp.up_proj", **more: Any) -> Layer:
    row = dispatch.find_row(LayerKind.LINEAR, spec)
    return Layer(name, "linear", 1, spec, row, outputs, inputs, 0, **more)


@pytest.mark.parametrize(("weight", "act", "outputs", "inputs"), CASES)
def test_prepared(weight: WeightSpec, act: ActivationSpec | None, outputs: int, inputs: int) -> None:
    emulation.register()
    spec = LayerSpec("test", Layout.MODELSLIM_INT, weight, act)
    counted = layer(spec, outputs, inputs)
    assert counted.row is not None
    generator = torch.Generator().manual_seed(0)
    limit = 2 ** (weight.bits - 1)
    groups = -(-inputs // weight.group_size) if weight.group_size else 1
    values = torch.randint(-limit, limit, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, groups, generator=generator) + 0.5
    zero = None if weight.symmetric else torch.randint(-limit, limit, (outputs, groups), generator=generator).float()
    canonical = CanonicalWeight.of(values, scale, zero, group_size=weight.group_size, bits=weight.bits)
    method = load_object(counted.row.method)()
    prepared = method.prepare(CanonicalLinear(canonical), PrepareContext(act_dtype=torch.bfloat16))
    prepared.pop("input_index", None)  # of groups that are filled up, not of the weight
    own = sum(tensor.numel() * tensor.element_size() for tensor in prepared.values())
    assert layer_bytes(counted, 1, 1) == own, {name: (t.dtype, tuple(t.shape)) for name, t in prepared.items()}


#: (w13, its activation, w2, its activation, hidden, inner of the whole layer, ranks)
EXPERTS = [
    (weight(8), W8A8, weight(8), W8A8, 128, 96, 1),
    (weight(8), W8A8, weight(8), W8A8, 120, 64, 2),
    (weight(8), None, weight(8), None, 64, 48, 2),
    (weight(8, 32), None, weight(8, 32), None, 64, 96, 1),
    (weight(4), None, weight(4), None, 64, 48, 1),
    (weight(4, 32), None, weight(4, 32), None, 96, 64, 1),
    (weight(4, 32), None, weight(4, 32), None, 96, 48, 2),
    (weight(4, 32, False), None, weight(3, 32), None, 96, 64, 1),
    (weight(4), W8A8, weight(4), W8A8, 64, 64, 2),
    (weight(4, 256), W8A8, weight(4, 256), W8A8, 512, 512, 1),
    (weight(4, 32), W8A8, weight(4, 32), W8A8, 96, 96, 1),
    (weight(4, 32), W8A8, weight(8), W8A8, 96, 96, 1),
    (weight(8), W8A8, weight(4), W8A8, 96, 96, 1),
    (weight(4), W4A4, weight(4, 32), W4A4, 96, 96, 1),
    (weight(4), W4A4, weight(8), None, 100, 44, 1),
    (None, None, weight(8), W8A8, 96, 80, 1),
]


@pytest.mark.parametrize(("w13", "act13", "w2", "act2", "hidden", "inner", "ranks"), EXPERTS)
def test_prepared_experts(
    w13: WeightSpec | None,
    act13: ActivationSpec | None,
    w2: WeightSpec,
    act2: ActivationSpec | None,
    hidden: int,
    inner: int,
    ranks: int,
) -> None:
    """The inner dimension is filled up to what both products ask for."""
    emulation.register()
    count, part = 3, inner // ranks
    layers, methods, groups = [], [], []
    for name, kind, act in (("gate_proj", w13, act13), ("up_proj", w13, act13), ("down_proj", w2, act2)):
        spec = LayerSpec("FLOAT", Layout.FLOAT) if kind is None else LayerSpec("test", Layout.MODELSLIM_INT, kind, act)
        row = None if kind is None else dispatch.find_row(LayerKind.FUSED_MOE, spec)
        outputs, inputs = (hidden, inner) if name == "down_proj" else (inner, hidden)
        layers.append(Layer(f"m.mlp.experts.*.{name}", "fused_moe", count, spec, row, outputs, inputs, 0))
        path = "vllm_npu_quant.methods.moe_weight_only:FloatExperts" if row is None else row.method
        methods.append(load_object(path)("w13_" if name != "down_proj" else "w2_"))
        own = part if name == "down_proj" else hidden
        group = (
            0 if kind is None else math.gcd(own, kind.group_size) if own % (kind.group_size or 1) else kind.group_size
        )
        groups.append(group if own > group else 0)
    chain = FusedExperts(methods[0], methods[2], hidden, part, (groups[0], groups[2]))
    total = 0
    for method, sizes, kind, group, shards, outputs, inputs in (
        (methods[0], chain.w13_sizes, w13, groups[0], 2, part, hidden),
        (methods[2], chain.w2_sizes, w2, groups[2], 1, hidden, part),
    ):
        bits = 8 if kind is None else kind.bits
        values = torch.ones(outputs, inputs, dtype=torch.int8)
        scale = torch.ones(outputs, inputs // group if group else 1)
        zero = torch.ones_like(scale) if kind is not None and not kind.symmetric else None
        linear = CanonicalLinear(CanonicalWeight.of(values, scale, zero, group_size=group, bits=bits))
        experts = Experts(
            count, shards, outputs, inputs, torch.device("cpu"), lambda _, one=linear, n=shards: [one] * n
        )
        prepared = method.prepare(experts, sizes, torch.bfloat16)
        total += sum(tensor.numel() * tensor.element_size() for tensor in prepared.values())
    assert rank_bytes(layers, ranks, 1) == total


def test_the_cost_of_experts_has_the_multiple_of_their_method() -> None:
    for row in dispatch.ROWS:
        if LayerKind.FUSED_MOE in row.kinds:
            assert load_object(row.method).outputs_multiple == row.cost.outputs, row.name


def test_parts() -> None:
    spec = LayerSpec("test", Layout.MODELSLIM_INT, weight(8), W8A8)
    assert part_of(layer(spec, 100, 64), 4, 1).outputs == 25
    assert part_of(layer(spec, 100, 64, "model.layers.0.mlp.down_proj"), 4, 1).inputs == 16
    assert part_of(layer(spec, 100, 64, "model.layers.0.self_attn.q_a_proj"), 4, 1).outputs == 100
    experts = Layer("m.mlp.experts.*.up_proj", "fused_moe", 8, spec, None, 100, 64, 0)
    assert part_of(experts, 4, 1).outputs == 25
    assert (part_of(experts, 4, 4).outputs, part_of(experts, 4, 4).count) == (100, 2)


def test_kv_cache(tmp_path: Any) -> None:
    import json

    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128})
    )
    model = open_model(tmp_path)
    assert kv_cache(model, 1).bytes_per_token == 64 * 2 * 8 * 128 * 2  # Qwen3-32B: 256 KiB
    assert kv_cache(model, 8).bytes_per_token == 64 * 2 * 1 * 128 * 2
    assert kv_cache(model, 16).bytes_per_token == 64 * 2 * 1 * 128 * 2
