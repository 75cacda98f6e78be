# SPDX-License-Identifier: Apache-2.0
"""AWQ and GPTQ layers on tensor-parallel ranks, with vLLM's own layers and loaders: cut groups, activation order, fused
shards of different schemes, and vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary

from tests.engine.test_shards import Case, OneMethod, Tensors, as_rank, dequantized, merged, qkv_parallel, row_parallel
from tests.layouts.words import dequantized_awq, dequantized_gptq
from vllm_npu_quant.engine.linear import NpuQuantLinearMethod
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.formats.packed import integer_spec
from vllm_npu_quant.formats.resolve import ResolvedLayer, joint_spec
from vllm_npu_quant.layouts.bits import pack
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.spec import LayerKind, LayerSpec, Layout


def gptq_case(bits: int, group: int, layout: Layout = Layout.GPTQ, *, g_idx: bool = True) -> Callable[..., Case]:
    def make(outputs: int, inputs: int, seed: int = 0) -> Case:
        rng = np.random.default_rng((outputs, inputs, bits, seed))
        size = group if group > 0 else inputs
        groups = -(-inputs // size)
        values = torch.from_numpy(rng.integers(0, 2**bits, (-(-inputs // 32) * 32, outputs)))
        qweight = pack(values, bits)[: -(-inputs * bits // 32)].contiguous()
        zeros = torch.from_numpy(rng.integers(1, 2**bits, (-(-outputs // 32) * 32, groups)))
        qzeros = pack(zeros, bits)[: -(-outputs * bits // 32)].t().contiguous()
        scales = torch.from_numpy(rng.uniform(0.5, 2, (groups, outputs)).astype(np.float16))
        order = np.arange(inputs) // size
        if "ACT_ORDER" in layout.name:
            order = np.random.default_rng(inputs).permutation(order)  # from the common input of all shards
        order = order.astype(np.int32)
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        if g_idx:
            tensors["g_idx"] = torch.from_numpy(order)
        v2 = "V2" in layout.name
        arrays = (qweight.numpy(), scales.numpy(), qzeros.numpy())
        wanted = dequantized_gptq(*arrays, bits, group, v2=v2, g_idx=order).astype(np.float32)
        return integer_spec("GPTQ", layout, bits, group, False), tensors, wanted

    return make


def awq_case(group: int) -> Callable[..., Case]:
    def make(outputs: int, inputs: int, seed: int = 0) -> Case:
        rng = np.random.default_rng((outputs, inputs, seed))
        groups = -(-inputs // group) if group > 0 else 1
        qweight = rng.integers(-(2**31), 2**31, (inputs, outputs // 8)).astype(np.int32)
        qzeros = rng.integers(-(2**31), 2**31, (groups, outputs // 8)).astype(np.int32)
        scales = rng.uniform(0.5, 2, (groups, outputs)).astype(np.float16)
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
        wanted = dequantized_awq(qweight, scales, qzeros, group).astype(np.float32)
        spec = integer_spec("AWQ", Layout.AWQ_GEMM, 4, group, False)
        return spec, {name: torch.from_numpy(value) for name, value in tensors.items()}, wanted

    return make


CASES = {
    "awq groups": awq_case(64),
    "awq channel": awq_case(-1),
    "2 bits": gptq_case(2, 64),
    "3 bits": gptq_case(3, 64),
    "4 bits": gptq_case(4, 64),
    "4 bits, no g_idx": gptq_case(4, 128, g_idx=False),
    "4 bits, second format": gptq_case(4, 32, Layout.GPTQ_V2),
    "8 bits": gptq_case(8, 64),
    "8 bits, channel": gptq_case(8, -1),
    "odd groups": gptq_case(4, 24),
    "activation order": gptq_case(4, 64, Layout.GPTQ_ACT_ORDER),
    "activation order, 8 bits": gptq_case(8, 64, Layout.GPTQ_V2_ACT_ORDER),
    "activation order, 3 bits": gptq_case(3, 64, Layout.GPTQ_ACT_ORDER),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_row_parallel_parts_are_the_whole(name: str, size: int) -> None:
    """K = 384: parts of 192, 128 and 96 inputs cut groups of 128, 64 and 24."""
    outputs, inputs = 40, 384
    spec, tensors, wanted = CASES[name](outputs, inputs)
    parts = [dequantized(row_parallel(spec, tensors, outputs, inputs, rank, size)) for rank in range(size)]
    assert np.allclose(np.concatenate(parts, axis=1), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_qkv_parts_are_the_whole(name: str, size: int) -> None:
    heads, kv_heads, head, inputs = 4, 2, 32, 192
    cases = [CASES[name](count * head, inputs, seed) for seed, count in enumerate((heads, kv_heads, kv_heads))]
    for rank in range(size):
        layer = qkv_parallel(cases[0][0], [case[1] for case in cases], heads, kv_heads, head, inputs, rank, size)
        weight, start = dequantized(layer), 0
        for (_, _, wanted), count, replicas in zip(
            cases, (heads // size, *(max(kv_heads // size, 1),) * 2), (1, *(max(size // kv_heads, 1),) * 2), strict=True
        ):
            first = rank // replicas * count * head
            held = weight[start : start + count * head]
            assert np.allclose(held, wanted[first : first + count * head], rtol=1e-6, atol=0)
            start += count * head


def test_results_of_ranks_add_up() -> None:
    outputs, inputs = 40, 512
    spec, tensors, wanted = gptq_case(4, 64, Layout.GPTQ_ACT_ORDER)(outputs, inputs)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, inputs))).to(torch.bfloat16)
    total = torch.zeros(3, outputs)
    for rank in range(2):
        layer = row_parallel(spec, tensors, outputs, inputs, rank, 2)
        layer.quant_method.process_weights_after_loading(layer)
        # Groups are filled up to 32, within twice the weight.
        assert inputs // 2 < layer.weight.shape[0] <= inputs
        total += layer.quant_method.apply(layer, x.chunk(2, dim=1)[rank].contiguous()).float()
    exact = x.double().numpy() @ wanted.T.astype(np.float64)
    assert np.linalg.norm(total.numpy() - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize(("group", "size", "fits"), [(64, 8, False), (32, 4, False), (128, 8, True), (32, 2, True)])
def test_activation_order_over_too_many_ranks(group: int, size: int, fits: bool) -> None:
    spec, tensors, wanted = gptq_case(4, group, Layout.GPTQ_ACT_ORDER)(16, 1024)
    if fits:
        part = dequantized(row_parallel(spec, tensors, 16, 1024, 1, size))
        assert np.allclose(part, wanted[:, 1024 // size : 2 * 1024 // size], rtol=1e-6, atol=0)
        return
    with pytest.raises(NpuQuantError) as caught:
        row_parallel(spec, tensors, 16, 1024, 0, size)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer, finding.found) == ("cannot-shard", "layer", f"{size} ranks")
    assert f"--tensor-parallel-size {group // 16} or less" in finding.fix


def test_shards_of_one_input_have_one_order() -> None:
    make = gptq_case(4, 64, Layout.GPTQ_ACT_ORDER)
    spec, first, _ = make(64, 192, 0)
    _, second, _ = make(64, 192, 1)
    second["g_idx"] = second["g_idx"].flip(0)
    with pytest.raises(NpuQuantError) as caught:
        merged(spec, [first, second], 64, 192, 0, 1)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer) == ("fused-shards-disagree", "layer")
    assert "g_idx" in finding.message
    assert "desc_act" in finding.fix


def test_an_order_that_the_config_denies() -> None:
    spec, tensors, _ = gptq_case(4, 64)(64, 192)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(NpuQuantError) as caught:
        row_parallel(spec, tensors, 64, 192, 0, 1)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer, finding.file) == ("bad-value", "layer", "config.json")


def joint(cases: list[Case]) -> NpuQuantLinearMethod:
    specs = [case[0] for case in cases]
    spec = joint_spec(specs)
    assert spec is not None
    entries = tuple(LayerEntry(own, frozenset(tensors)) for own, tensors, _ in cases)
    names = tuple(f"layer.shard{i}" for i in range(len(cases)))
    served = decide(LayerKind.LINEAR, spec, Host(), layer="layer")
    return NpuQuantLinearMethod(ResolvedLayer("layer", spec, names, entries), served, "config.json")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "makers",
    [
        (gptq_case(4, 128), gptq_case(4, 32)),
        (gptq_case(4, 32), gptq_case(4, -1)),
        (gptq_case(4, 96), gptq_case(4, 64)),
        (gptq_case(8, 128, g_idx=False), gptq_case(8, 80, g_idx=False)),
        (awq_case(128), awq_case(64)),
        (awq_case(-1), awq_case(80)),
    ],
)
def test_fused_shards_of_different_groups(makers: tuple, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoRound chooses group sizes layer by layer: a scale repeated for a common divisor changes nothing."""
    outputs, inputs = 64, 192
    cases = [make(outputs, inputs, seed) for seed, make in enumerate(makers)]
    monkeypatch.setattr("tests.engine.test_shards.method_for", lambda spec, shards: joint(cases))
    for rank in range(size):
        layer = merged(cases[0][0], [case[1] for case in cases], outputs, inputs, rank, size)
        weight, part = dequantized(layer), outputs // size
        for shard, (_, _, wanted) in enumerate(cases):
            held = weight[shard * part : (shard + 1) * part]
            assert np.allclose(held, wanted[rank * part : (rank + 1) * part], rtol=1e-6, atol=0)


def head(spec: LayerSpec, tensors: Tensors, vocabulary: int, inputs: int, rank: int, size: int) -> Any:
    entry = LayerEntry(spec, frozenset(tensors))
    resolved = ResolvedLayer("lm_head", spec, ("lm_head",), (entry,))
    method = NpuQuantLinearMethod(resolved, decide(LayerKind.LM_HEAD, spec, Host()), "config.json")
    with as_rank(rank, size), pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_vocabulary, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(vllm_vocabulary, "get_tensor_model_parallel_world_size", lambda: size)
        layer = vllm_vocabulary.ParallelLMHead(
            vocabulary, inputs, params_dtype=torch.bfloat16, quant_config=OneMethod(method), prefix="lm_head"
        )
        for name, value in tensors.items():
            param = getattr(layer, name)
            param.weight_loader(param, value)
    return layer


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("vocabulary", [128, 200])
@pytest.mark.parametrize("name", ["awq groups", "3 bits", "4 bits", "8 bits", "8 bits, channel", "activation order"])
def test_vocabularies(name: str, vocabulary: int, size: int) -> None:
    """200 words are padded to 256 in memory, and not on disk. Rows that only fill up are 0."""
    spec, tensors, wanted = CASES[name](vocabulary, 192)
    parts = []
    for rank in range(size):
        layer = head(spec, tensors, vocabulary, 192, rank, size)
        parts.append(dequantized(layer))
        layer.quant_method.process_weights_after_loading(layer)
        x = torch.ones(2, 192, dtype=torch.bfloat16)
        assert layer.quant_method.apply(layer, x).shape == (2, layer.num_embeddings_per_partition)
    whole = np.concatenate(parts)
    assert np.allclose(whole[:vocabulary], wanted, rtol=1e-6, atol=0)
    assert not whole[vocabulary:].any()


def test_words_that_are_not_full() -> None:
    """100 inputs in 13 words of 8, 30 outputs in 4: g_idx says how many inputs there are; without it nothing does."""
    spec, tensors, wanted = gptq_case(4, 32)(30, 100)
    assert np.allclose(dequantized(row_parallel(spec, tensors, 30, 100, 0, 1)), wanted, rtol=1e-6, atol=0)
    spec, tensors, _ = gptq_case(4, 32, g_idx=False)(30, 100)
    layer = row_parallel(spec, tensors, 30, 100, 0, 1)
    with pytest.raises(NpuQuantError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer, finding.found) == ("wrong-shape", "layer", "104")


@pytest.mark.parametrize(
    ("name", "inputs", "size", "what"),
    [("4 bits", 36, 3, "divisible by 8"), ("8 bits", 36, 6, "divisible by 4"), ("3 bits", 192, 12, "divisible by 32")],
)
def test_words_that_ranks_would_cut(name: str, inputs: int, size: int, what: str) -> None:
    spec, tensors, _ = CASES[name](64, inputs)
    with pytest.raises(NpuQuantError) as caught:
        row_parallel(spec, tensors, 64, inputs, 0, size)
    (finding, *_) = caught.value.findings
    assert (finding.code, finding.layer) == ("cannot-shard", "layer")
    assert what in finding.expected
    assert "tensor-parallel" in finding.fix
