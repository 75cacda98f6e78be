# SPDX-License-Identifier: Apache-2.0
"""Ranks of tensor-parallel layers, in one process: vLLM's own layers and loaders, the rank only told.

What the ranks hold after loading must be the checkpoint's layer, cut: their dequantized weights together are the whole one,
and the sum of their partial results has every constant once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary

from vllm_npu_quant import emulation
from vllm_npu_quant.engine.config import NpuQuantConfig
from vllm_npu_quant.engine.linear import NpuQuantLinearMethod
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.formats.fp8 import fp8_spec, fp8_weight
from vllm_npu_quant.formats.resolve import ResolvedLayer
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.spec import (
    ActivationSpec,
    Granularity,
    LayerKind,
    LayerSpec,
    Layout,
    NumberKind,
    WeightSpec,
)

emulation.register()

Tensors = dict[str, torch.Tensor]

TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN)
STATIC = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False)


class OneMethod(NpuQuantConfig):
    """A quantization config that gives one layer one method."""

    def __init__(self, method: NpuQuantLinearMethod) -> None:
        super().__init__()
        self.method = method

    def get_quant_method(self, layer: Any, prefix: str, tid2eid: Any = None) -> NpuQuantLinearMethod:
        return self.method


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """vLLM's layers and parameters are made for this rank."""
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        for module in (vllm_linear, vllm_parameter, vllm_vocabulary):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        yield


def method_for(spec: LayerSpec, shards: list[Tensors], kind: LayerKind = LayerKind.LINEAR) -> NpuQuantLinearMethod:
    optional = frozenset(shards[0]) - {"weight", "weight_packed", "weight_scale"}
    entry = LayerEntry(spec, optional)
    names = tuple(f"layer.shard{i}" for i in range(len(shards)))
    resolved = ResolvedLayer("layer", spec, names, (entry,) * len(shards))
    return NpuQuantLinearMethod(resolved, decide(kind, spec, Host()), "config.json")


def load(layer: Any, shards: list[tuple[Any, Tensors]]) -> None:
    for shard, tensors in shards:
        for name, value in tensors.items():
            param = getattr(layer, "checkpoint_bias" if name == "bias" else name)
            param.weight_loader(param, value, *([] if shard is None else [shard]))


def row_parallel(spec: LayerSpec, tensors: Tensors, outputs: int, inputs: int, rank: int, size: int) -> Any:
    method = method_for(spec, [tensors])
    with as_rank(rank, size):
        layer = vllm_linear.RowParallelLinear(
            inputs, outputs, bias=False, params_dtype=torch.bfloat16, quant_config=OneMethod(method), prefix="layer"
        )
        load(layer, [(None, tensors)])
    return layer


def qkv_parallel(
    spec: LayerSpec, shards: list[Tensors], heads: int, kv_heads: int, head: int, inputs: int, rank: int, size: int
) -> Any:
    method = method_for(spec, shards)
    with as_rank(rank, size):
        layer = vllm_linear.QKVParallelLinear(
            inputs,
            head,
            heads,
            kv_heads,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=OneMethod(method),
            prefix="layer",
        )
        load(layer, list(zip("qkv", shards, strict=True)))
    return layer


def merged(spec: LayerSpec, shards: list[Tensors], outputs: int, inputs: int, rank: int, size: int) -> Any:
    method = method_for(spec, shards)
    with as_rank(rank, size):
        layer = vllm_linear.MergedColumnParallelLinear(
            inputs,
            [outputs] * len(shards),
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=OneMethod(method),
            prefix="layer",
        )
        load(layer, list(enumerate(shards)))
    return layer


def dequantized(layer: Any) -> np.ndarray:
    """What one rank holds, float32 [N, K]."""
    method = layer.quant_method
    assert not method.receiver.not_filled(method.stored_names)
    linear = method.canonical(layer)
    weight, order = linear.weight.dequantize(), linear.input_permutation
    if order is None:
        return weight.numpy()
    kept = order >= 0
    back = torch.empty(weight.shape[0], int(kept.sum()))
    back[:, order[kept]] = weight[:, kept]
    return back.numpy()


# One checkpoint layer of each layout: its spec, its tensors, and its weight in float32 from the formula.

Case = tuple[LayerSpec, Tensors, np.ndarray]


def rng_of(outputs: int, inputs: int, seed: int) -> np.random.Generator:
    return np.random.default_rng((outputs, inputs, seed))


def fp8_block(block: tuple[int, int]) -> Callable[[int, int, int], Case]:
    def make(outputs: int, inputs: int, seed: int = 0) -> Case:
        rng = rng_of(outputs, inputs, seed)
        weight = torch.from_numpy(rng.standard_normal((outputs, inputs)).astype(np.float32)).to(torch.float8_e4m3fn)
        scale = rng.uniform(0.5, 2, (-(-outputs // block[0]), -(-inputs // block[1]))).astype(np.float32)
        rows, columns = np.arange(outputs) // block[0], np.arange(inputs) // block[1]
        wanted = weight.float().numpy() * scale[rows][:, columns]
        spec = fp8_spec("FP8", fp8_weight(Granularity.BLOCK, block), Layout.FP8, static=False)
        return spec, {"weight": weight, "weight_scale": torch.from_numpy(scale)}, wanted

    return make


def fp8_tensor(outputs: int, inputs: int, seed: int = 0) -> Case:
    rng = rng_of(outputs, inputs, seed)
    weight = torch.from_numpy(rng.standard_normal((outputs, inputs)).astype(np.float32)).to(torch.float8_e4m3fn)
    scale = np.float32(rng.uniform(0.5, 2))
    spec = fp8_spec("FP8", fp8_weight(Granularity.TENSOR), Layout.FP8, static=True)
    tensors = {"weight": weight, "weight_scale": torch.tensor(scale), "input_scale": torch.tensor([0.5])}
    return spec, tensors, weight.float().numpy() * scale


def pack(values: np.ndarray, axis: int) -> np.ndarray:
    """4-bit integers with 8 added, eight to an int32 along ``axis``; the last word filled up with zeros."""
    moved = np.moveaxis(values.astype(np.int64) + 8, axis, -1)
    moved = np.pad(moved, [(0, 0), (0, -moved.shape[1] % 8)])
    words = (moved.reshape(moved.shape[0], -1, 8) << (4 * np.arange(8))).sum(-1)
    return np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32)


def packed(group: int, *, symmetric: bool = False, plain_zero: bool = False) -> Callable[[int, int, int], Case]:
    def make(outputs: int, inputs: int, seed: int = 0) -> Case:
        rng = rng_of(outputs, inputs, seed)
        size = group or inputs
        values = rng.integers(-8, 8, (outputs, inputs))
        scale = rng.uniform(0.5, 2, (outputs, -(-inputs // size))).astype(np.float32)
        zero = np.zeros_like(scale, dtype=np.int64) if symmetric else rng.integers(-8, 8, scale.shape)
        columns = np.arange(inputs) // size
        wanted = (values - zero[:, columns]).astype(np.float32) * scale[:, columns]
        granularity = Granularity.GROUP if group else Granularity.CHANNEL
        layout = Layout.CT_PACKED_PLAIN_ZERO if plain_zero else Layout.CT_PACKED
        spec = LayerSpec("W4A16", layout, WeightSpec(4, NumberKind.INT, granularity, group, symmetric))
        tensors = {
            "weight_packed": torch.from_numpy(pack(values, 1)),
            "weight_scale": torch.from_numpy(scale),
            "weight_shape": torch.tensor([outputs, inputs]),
            "weight_zero_point": torch.from_numpy(zero.astype(np.int8) if plain_zero else pack(zero, 0)),
        }
        return spec, tensors, wanted

    return make


def dense(group: int) -> Callable[[int, int, int], Case]:
    """3-bit integers with 4 added, bit by bit in int32, as compressed-tensors 0.18 and later pack them."""

    def stream(values: np.ndarray) -> torch.Tensor:
        bits = (((values + 4)[..., None] >> np.arange(3)) & 1).reshape(values.shape[0], -1).astype(np.uint8)
        bits = np.pad(bits, [(0, 0), (0, -bits.shape[1] % 32)])
        return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))

    def make(outputs: int, inputs: int, seed: int = 0) -> Case:
        rng = rng_of(outputs, inputs, seed)
        values = rng.integers(-4, 4, (outputs, inputs))
        scale = rng.uniform(0.5, 2, (outputs, -(-inputs // group))).astype(np.float32)
        zero = rng.integers(-4, 4, scale.shape)
        columns = np.arange(inputs) // group
        weight = WeightSpec(3, NumberKind.INT, Granularity.GROUP, group, False)
        tensors = {
            "weight_packed": stream(values),
            "weight_scale": torch.from_numpy(scale),
            "weight_shape": torch.tensor([outputs, inputs]),
            "weight_zero_point": stream(zero.T).t().contiguous(),
        }
        wanted = (values - zero[:, columns]).astype(np.float32) * scale[:, columns]
        return LayerSpec("W3A16", Layout.CT_PACKED_DENSE, weight), tensors, wanted

    return make


def act_order(group: int) -> Callable[[int, int, int], Case]:
    def make(outputs: int, inputs: int, seed: int = 0) -> Case:
        _, tensors, _ = packed(group)(outputs, inputs, seed)
        # All fused shards have the same order: it comes from their common input.
        g_idx = np.random.default_rng(inputs).permutation(np.arange(inputs) // group)
        rng = rng_of(outputs, inputs, seed)
        values = rng.integers(-8, 8, (outputs, inputs))
        scale = rng.uniform(0.5, 2, (outputs, inputs // group)).astype(np.float32)
        zero = rng.integers(-8, 8, scale.shape)
        wanted = (values - zero[:, g_idx]).astype(np.float32) * scale[:, g_idx]
        weight = WeightSpec(4, NumberKind.INT, Granularity.GROUP, group, False)
        tensors["weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        return LayerSpec("W4A16", Layout.CT_PACKED_ACT_ORDER, weight), tensors, wanted

    return make


def int8_tensor(outputs: int, inputs: int, seed: int = 0) -> Case:
    rng = rng_of(outputs, inputs, seed)
    values = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    scale = np.float32(rng.uniform(0.5, 2))
    spec = LayerSpec("W8A8_DYNAMIC", Layout.CT_INT, WeightSpec(8, granularity=Granularity.TENSOR), TOKEN)
    tensors = {"weight": torch.from_numpy(values), "weight_scale": torch.tensor([scale])}
    return spec, tensors, values.astype(np.float32) * scale


def int4_group(outputs: int, inputs: int, seed: int = 0) -> Case:
    rng = rng_of(outputs, inputs, seed)
    values = rng.integers(-8, 8, (outputs, inputs)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (outputs, -(-inputs // 16))).astype(np.float32)
    weight = WeightSpec(4, NumberKind.INT, Granularity.GROUP, 16)
    tensors = {"weight": torch.from_numpy(values), "weight_scale": torch.from_numpy(scale)}
    wanted = values.astype(np.float32) * scale[:, np.arange(inputs) // 16]
    return LayerSpec("W4A16", Layout.CT_INT, weight), tensors, wanted


CASES = {
    "fp8 blocks": fp8_block((128, 128)),
    "fp8 odd blocks": fp8_block((48, 24)),
    "fp8 tensor": fp8_tensor,
    "packed groups": packed(32),
    "packed groups, symmetric": packed(32, symmetric=True),
    "packed groups, zero points of old releases": packed(32, plain_zero=True),
    "packed channels": packed(0),
    "packed odd groups": packed(24),
    "3 bits without padding": dense(32),
    "activation order": act_order(64),
    "int8 tensor": int8_tensor,
    "int4 groups": int4_group,
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_row_parallel_parts_are_the_whole(name: str, size: int) -> None:
    """K = 192: at 3 and 4 ranks, parts of 64 and 48 inputs cut blocks of 128 and groups of 32 and 24."""
    outputs, inputs = 20, 192
    spec, tensors, wanted = CASES[name](outputs, inputs)
    if spec.layout is Layout.CT_PACKED_DENSE and inputs // size % 32:
        with pytest.raises(NpuQuantError, match="sizes per rank divisible by 32"):
            row_parallel(spec, tensors, outputs, inputs, 0, size)
        return
    parts = [dequantized(row_parallel(spec, tensors, outputs, inputs, rank, size)) for rank in range(size)]
    assert np.array_equal(np.concatenate(parts, axis=1), wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_qkv_parts_are_the_whole(name: str, size: int) -> None:
    """Heads of 20: neither the blocks of rows nor the words of zero points end where a shard does. At 4 ranks, the two KV
    heads are replicated."""
    heads, kv_heads, head, inputs = 4, 2, 20, 192
    cases = [CASES[name](count * head, inputs, seed) for seed, count in enumerate((heads, kv_heads, kv_heads))]
    spec = cases[0][0]
    held = [
        dequantized(qkv_parallel(spec, [case[1] for case in cases], heads, kv_heads, head, inputs, rank, size))
        for rank in range(size)
    ]
    for rank, weight in enumerate(held):
        mine = [heads // size, max(kv_heads // size, 1), max(kv_heads // size, 1)]
        start = 0
        for (_, _, wanted), count, replicas in zip(cases, mine, (1, *(max(size // kv_heads, 1),) * 2), strict=True):
            first = rank // replicas * count * head
            assert np.array_equal(weight[start : start + count * head], wanted[first : first + count * head])
            start += count * head
        assert start == weight.shape[0]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_merged_parts_are_the_whole(name: str, size: int) -> None:
    outputs, inputs = 68, 192
    cases = [CASES[name](outputs, inputs, seed) for seed in range(2)]
    for rank in range(size):
        layer = merged(cases[0][0], [case[1] for case in cases], outputs, inputs, rank, size)
        weight, part = dequantized(layer), outputs // size
        for shard, (_, _, wanted) in enumerate(cases):
            assert np.array_equal(weight[shard * part : (shard + 1) * part], wanted[rank * part : (rank + 1) * part])


def static_layer(outputs: int, inputs: int, *, bias: bool) -> tuple[LayerSpec, Tensors]:
    rng = rng_of(outputs, inputs, 7)
    tensors = {
        "weight": torch.from_numpy(rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)),
        "weight_scale": torch.from_numpy(rng.uniform(1e-3, 2e-3, (outputs, 1)).astype(np.float32)),
        "input_scale": torch.tensor([0.03125]),
        "input_zero_point": torch.tensor([-23], dtype=torch.int8),
    }
    if bias:
        tensors["bias"] = torch.from_numpy(rng.standard_normal(outputs).astype(np.float32))
    return LayerSpec("W8A8_STATIC", Layout.CT_STATIC, WeightSpec(8), STATIC), tensors


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_static_zero_points_are_corrected_once(size: int, bias: bool) -> None:
    outputs, inputs = 20, 192
    spec, tensors = static_layer(outputs, inputs, bias=bias)
    constants = np.zeros(outputs, np.int64)
    result = torch.zeros(5, outputs, dtype=torch.float32)
    rng = rng_of(5, inputs, 1)
    x = torch.from_numpy(rng.standard_normal((5, inputs)).astype(np.float32)).to(torch.bfloat16)
    for rank in range(size):
        layer = row_parallel(spec, tensors, outputs, inputs, rank, size)
        layer.quant_method.process_weights_after_loading(layer)
        constants += layer.quant_bias.numpy() if hasattr(layer, "quant_bias") else 0
        result += layer.quant_method.apply(layer, x.chunk(size, dim=1)[rank].contiguous()).float()
    scale = 0.03125 * tensors["weight_scale"][:, 0].numpy()
    weight = tensors["weight"].numpy().astype(np.int64)
    wanted = 23 * weight.sum(1)
    if bias:
        wanted = wanted + np.rint(tensors["bias"].numpy() / scale)
    assert np.array_equal(constants, wanted)
    quantized = np.clip(np.rint(x.float().numpy() / 0.03125 - 23), -128, 127)
    exact = (quantized @ weight.T + wanted) * scale
    # Every rank rounds its part to bfloat16 before they are summed.
    assert np.abs(result.numpy() - exact).max() <= 2**-8 * np.abs(exact).max() * size


def test_a_word_that_ranks_would_cut_is_refused() -> None:
    spec, tensors, _ = packed(0)(8, 40, 0)
    with pytest.raises(NpuQuantError, match="weight_packed packs 8 numbers along K") as caught:
        row_parallel(spec, tensors, 8, 40, 0, 2)
    assert caught.value.codes == ("cannot-shard",)
    assert caught.value.findings[0].layer == "layer"


def test_a_depth_that_fills_no_word_loads_where_it_is_not_cut() -> None:
    spec, tensors, wanted = packed(0)(8, 43, 0)
    assert np.array_equal(dequantized(row_parallel(spec, tensors, 8, 43, 0, 1)), wanted)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_a_head_are_the_whole(name: str, size: int) -> None:
    """A vocabulary of 100, which vLLM fills up to 128: the rows behind it are not on disk."""
    vocabulary, inputs = 100, 192
    spec, tensors, wanted = CASES[name](vocabulary, inputs)
    parts = []
    for rank in range(size):
        method = method_for(spec, [tensors], LayerKind.LM_HEAD)
        with as_rank(rank, size):
            layer = vllm_vocabulary.ParallelLMHead(
                vocabulary,
                inputs,
                params_dtype=torch.bfloat16,
                padding_size=64,
                quant_config=OneMethod(method),
                prefix="lm_head",
            )
            load(layer, [(None, tensors)])
        parts.append(dequantized(layer))
    held = np.concatenate(parts)
    assert held.shape[0] == 128
    assert np.array_equal(held[:vocabulary], wanted)
    assert not np.nan_to_num(held[vocabulary:]).any()
