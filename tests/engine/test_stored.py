# SPDX-License-Identifier: Apache-2.0
"""Receiving stored tensors: which checkpoint layer each comes from, what is refused, and whose errors pass."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch import nn
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary

from tests.engine.test_packed_shards import awq_case, gptq_case
from tests.engine.test_shards import (
    TOKEN,
    Case,
    OneMethod,
    Tensors,
    as_rank,
    dequantized,
    fp8_block,
    fp8_tensor,
    int4_group,
    method_for,
    packed,
    rng_of,
    row_parallel,
)
from vllm_npu_quant.engine.linear import NpuQuantLinearMethod
from vllm_npu_quant.engine.moe import _Product
from vllm_npu_quant.errors import NpuQuantError, raise_findings
from vllm_npu_quant.formats.described import Described, LayerEntry
from vllm_npu_quant.formats.resolve import LayerResolver, ResolvedLayer
from vllm_npu_quant.serving.decide import Host, decide, float_experts
from vllm_npu_quant.spec import FLOAT, LayerKind, LayerSpec, Layout, WeightSpec

ROOT = Path(__file__).resolve().parents[2]


def method_of(layers: dict[str, Case], prefix: str) -> NpuQuantLinearMethod:
    """The method of a layer of vLLM's that holds these checkpoint layers."""
    entries = {name: LayerEntry(spec, frozenset(tensors)) for name, (spec, tensors, _) in layers.items()}
    resolved = LayerResolver(Described(layers=entries)).resolve(prefix)
    return NpuQuantLinearMethod(resolved, decide(LayerKind.LINEAR, resolved.spec, Host(), layer=prefix), "config.json")


def fused(method: NpuQuantLinearMethod, outputs: list[int], inputs: int, rank: int, size: int, kind: Any = None) -> Any:
    with as_rank(rank, size):
        return (kind or vllm_linear.MergedColumnParallelLinear)(
            inputs,
            outputs,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=OneMethod(method),
            prefix=method.resolved.prefix,
        )


def fill(layer: Any, shard: Any, tensors: Tensors) -> None:
    for name, value in tensors.items():
        param = getattr(layer, name)
        param.weight_loader(param, value, *([] if shard is None else [shard]))


# ------------------------------------------------------------- checkpoint layers that fill several of vLLM's shards


def modelslim_dynamic(outputs: int, inputs: int, seed: int = 0) -> Case:
    rng = rng_of(outputs, inputs, seed)
    values = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (outputs, 1)).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(values),
        "weight_scale": torch.from_numpy(scale),
        "weight_offset": torch.zeros(outputs, 1),
    }
    return LayerSpec("W8A8_DYNAMIC", Layout.MODELSLIM_INT, WeightSpec(8), TOKEN), tensors, values * scale


Maker = Callable[[int, int, int], Case]
#: The makers of in_proj_qkv and in_proj_z.
FUSED: dict[str, tuple[Maker, Maker]] = {
    "W8A8_DYNAMIC": (modelslim_dynamic, modelslim_dynamic),
    "int4 groups": (int4_group, int4_group),
    "packed groups": (packed(32), packed(32)),
    "fp8 blocks": (fp8_block((32, 64)), fp8_block((32, 64))),
    "fp8 tensor": (fp8_tensor, fp8_tensor),
    "awq groups": (awq_case(64), awq_case(64)),
    "gptq groups": (gptq_case(4, 64), gptq_case(4, 64)),
    "gptq, groups of two sizes": (gptq_case(4, 96), gptq_case(4, 64)),
    "gptq, a scale per channel in one": (gptq_case(4, 32), gptq_case(4, -1)),
    "awq, a scale per channel in one": (awq_case(-1), awq_case(80)),
}

#: Outputs of the keys, keys, values and values of a layer of linear attention, as vLLM makes it, and its inputs.
SHARDS, INPUTS = [64, 64, 128, 128], 192


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", FUSED)
def test_a_checkpoint_layer_that_fills_three_of_four_shards(name: str, size: int) -> None:
    """Qwen3.5's in_proj_qkvz: vLLM loads in_proj_qkv as shards (0, 1, 2), and in_proj_z as 3."""
    qkv, z = (
        make(outputs, INPUTS, seed) for seed, (make, outputs) in enumerate(zip(FUSED[name], (256, 128), strict=True))
    )
    layers = {"m.in_proj_qkv": qkv, "m.in_proj_z": z}
    for rank in range(size):
        layer = fused(method_of(layers, "m.in_proj_qkvz"), SHARDS, INPUTS, rank, size)
        fill(layer, (0, 1, 2), qkv[1])
        fill(layer, 3, z[1])
        held, start, first = dequantized(layer), 0, 0
        for outputs in SHARDS:
            part = outputs // size
            wanted = np.concatenate([qkv[2], z[2]])[first + rank * part : first + (rank + 1) * part]
            assert np.allclose(held[start : start + part], wanted, rtol=1e-6, atol=0)
            start, first = start + part, first + outputs


@pytest.mark.parametrize("size", [1, 2])
def test_a_fused_layer_that_is_stored_as_one(size: int) -> None:
    """Qwen3-Next's in_proj_qkvz: one checkpoint layer, and one shard of vLLM's, which keeps its interleaved rows."""
    case = int4_group(384, INPUTS)
    for rank in range(size):
        layer = fused(method_of({"m.in_proj_qkvz": case}, "m.in_proj_qkvz"), [384], INPUTS, rank, size)
        fill(layer, None, case[1])
        assert np.array_equal(dequantized(layer), np.split(case[2], size)[rank])


def test_a_missing_layer_is_named_where_it_fills_several_shards() -> None:
    qkv, z = (modelslim_dynamic(outputs, INPUTS) for outputs in (256, 128))
    layer = fused(method_of({"m.in_proj_qkv": qkv, "m.in_proj_z": z}, "m.in_proj_qkvz"), SHARDS, INPUTS, 0, 1)
    fill(layer, 3, z[1])
    with pytest.raises(NpuQuantError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    weight = next(finding for finding in caught.value.findings if finding.expected.endswith(".weight"))
    assert (weight.code, weight.layer, weight.expected) == ("not-filled", "m.in_proj_qkvz", "m.in_proj_qkv.weight")
    assert weight.found == "nothing for weight[0:256, 0:192]"


def test_a_missing_layer_is_named_where_rows_are_not_the_first_dimension() -> None:
    first, second = (gptq_case(4, 64)(64, INPUTS, seed) for seed in range(2))
    layer = fused(method_of({"m.gate_proj": first, "m.up_proj": second}, "m.gate_up_proj"), [64, 64], INPUTS, 0, 1)
    fill(layer, 0, first[1])
    with pytest.raises(NpuQuantError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    assert {finding.expected for finding in caught.value.findings} == {
        f"m.up_proj.{name}" for name in ("qweight", "qzeros", "scales")
    }


def test_a_layer_with_another_number_of_shards_than_is_known() -> None:
    layers = {"m.in_proj_qkv": int4_group(192, INPUTS), "m.in_proj_z": int4_group(128, INPUTS)}
    with pytest.raises(NpuQuantError) as caught:
        fused(method_of(layers, "m.in_proj_qkvz"), [64, 128, 128], INPUTS, 0, 1)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer, finding.file) == ("undescribed-layer", "m.in_proj_qkvz", "config.json")


@pytest.mark.parametrize("shard", [4, (3, 4), "q_norm"])
def test_a_shard_that_the_layer_does_not_have(shard: Any) -> None:
    qkv, z = int4_group(256, INPUTS), int4_group(128, INPUTS)
    layer = fused(method_of({"m.in_proj_qkv": qkv, "m.in_proj_z": z}, "m.in_proj_qkvz"), SHARDS, INPUTS, 0, 1)
    with pytest.raises(NpuQuantError) as caught:
        fill(layer, shard, z[1])
    assert caught.value.codes == ("undescribed-layer",)
    assert caught.value.findings[0].found == str(shard)


def test_one_tensor_for_layers_of_different_groups() -> None:
    first, second = gptq_case(4, 96)(64, INPUTS, 0), gptq_case(4, 64)(64, INPUTS, 1)
    layer = fused(method_of({"m.gate_proj": first, "m.up_proj": second}, "m.gate_up_proj"), [64, 64], INPUTS, 0, 1)
    with pytest.raises(NpuQuantError) as caught:
        fill(layer, None, gptq_case(4, 96)(128, INPUTS, 0)[1])
    assert caught.value.codes == ("fused-shards-disagree",)


class RepeatedShard(vllm_linear.MergedColumnParallelLinear):
    """As vLLM's Kimi layers: the last shard is on every rank whole, and is counted once for each."""

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
        rank = param.tp_rank
        param.tp_rank = 0 if loaded_shard_id == 1 else rank
        super().weight_loader_v2(param, loaded_weight, loaded_shard_id)
        param.tp_rank = rank


@pytest.mark.parametrize("size", [1, 2])
def test_a_shard_that_every_rank_has_whole(size: int) -> None:
    cut, whole = int4_group(64, INPUTS, 0), int4_group(32, INPUTS, 1)
    for rank in range(size):
        method = method_of({"m.gate_proj": cut, "m.up_proj": whole}, "m.gate_up_proj")
        layer = fused(method, [64, 32 * size], INPUTS, rank, size, RepeatedShard)
        fill(layer, 0, cut[1])
        fill(layer, 1, whole[1])
        assert np.array_equal(dequantized(layer), np.concatenate([np.split(cut[2], size)[rank], whole[2]]))
        with pytest.raises(NpuQuantError, match="wrong-shape"):
            fill(layer, 1, int4_group(24, INPUTS)[1])


# ------------------------------------------------------------------------------------------------ what is not padding


def product(
    spec: LayerSpec, tensors: Tensors, outputs: int, inputs: int, ranks: int, rank: int
) -> tuple[Any, nn.Module]:
    """w2 of one expert on one rank, whose inputs are cut, with its parameters."""
    served = float_experts(spec) if spec.is_float else decide(LayerKind.FUSED_MOE, spec, Host())
    w2 = _Product("w2", served, (LayerEntry(spec, frozenset(tensors)),), ("m.experts.*.down_proj",), torch.bfloat16)
    layer = nn.Module()
    raise_findings(w2.cut(outputs, inputs, ranks, rank, "m.experts", "config.json"))
    w2.register(layer, 1, 1, lambda *_: None)
    return w2, layer


def load_expert(w2: Any, layer: nn.Module, tensors: Tensors) -> None:
    for name, value in tensors.items():
        w2.load(f"w2_{name}", getattr(layer, f"w2_{name}"), value, 0, 0, 0)


EXPERTS: dict[str, Maker] = {
    "gptq": gptq_case(4, 128, g_idx=False),
    "gptq, 3 bits": gptq_case(3, 128, g_idx=False),
    "awq": awq_case(128),
    "packed": packed(128),
    "int4": int4_group,
    "fp8 blocks": fp8_block((48, 128)),
}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_whose_groups_ranks_cut(name: str, ranks: int) -> None:
    """K = 384: parts of 192 and 128, whose groups are 64 and 128."""
    outputs, inputs = 64, 384
    spec, tensors, wanted = EXPERTS[name](outputs, inputs, 0)
    parts = []
    for rank in range(ranks):
        w2, layer = product(spec, tensors, outputs, inputs, ranks, rank)
        load_expert(w2, layer, tensors)
        (linear,) = w2.experts(layer).canonical(0)
        parts.append(linear.weight.dequantize().numpy())
    assert np.allclose(np.concatenate(parts, axis=1), wanted, rtol=1e-6, atol=0)


def longer(value: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)


#: A layer with one element too many: maker, tensor, axis. The number of ranks makes groups repeat, or nothing.
LONGER = {
    "groups of scales": (gptq_case(4, 128, g_idx=False), "scales", 0),
    "groups of zero points": (gptq_case(4, 128, g_idx=False), "qzeros", 0),
    "words of zero points": (gptq_case(4, 128, g_idx=False), "qzeros", 1),
    "words of 3-bit zero points": (gptq_case(3, 128, g_idx=False), "qzeros", 1),
    "words of AWQ's zero points": (awq_case(128), "qzeros", 1),
    "words of packed zero points": (packed(128), "weight_zero_point", 0),
    "groups of packed weights": (packed(128), "weight_scale", 1),
    "blocks of rows": (fp8_block((32, 128)), "weight_scale", 0),
    "blocks of inputs": (fp8_block((32, 128)), "weight_scale", 1),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", LONGER)
def test_more_than_padding_is_never_cut_off(case: str, ranks: int) -> None:
    make, name, axis = LONGER[case]
    outputs, inputs = 64, 384
    spec, tensors, _ = make(outputs, inputs, 0)
    tensors[name] = longer(tensors[name], axis)
    stored = str(list(tensors[name].shape))
    w2, layer = product(spec, tensors, outputs, inputs, ranks, 0)
    for load in (
        lambda: row_parallel(spec, tensors, outputs, inputs, 0, ranks),
        lambda: load_expert(w2, layer, tensors),
    ):
        with pytest.raises(NpuQuantError) as caught:
            load()
        (finding,) = caught.value.findings
        assert (finding.code, finding.found, finding.file) == ("wrong-shape", stored, "config.json")
        assert name in finding.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1])
def test_float_experts_of_every_dtype(dtype: torch.dtype, rank: int) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    w2, layer = product(FLOAT, {}, 16, 32, 2, rank)
    load_expert(w2, layer, {"weight": weight})
    assert torch.equal(layer.w2_weight[0, 0], weight[:, 16 * rank : 16 * (rank + 1)].bfloat16())
    assert not w2.receiver.not_filled(lambda *_: ["anything"])


# -------------------------------------------------------------------------------------- errors that are not the file's


class Failing(torch.Tensor):
    """A stored tensor whose copy fails."""

    error: Exception

    @classmethod
    def of(cls, value: torch.Tensor, error: Exception) -> Failing:
        found = value.as_subclass(cls)
        cls.error = error
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise cls.error
        return super().__torch_function__(func, types, args, kwargs or {})


ERRORS = [torch.OutOfMemoryError("out of memory"), RuntimeError("a device is gone"), IndexError("of a bug in vLLM")]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_inside_of_a_loader_stays_what_it_is(error: Exception) -> None:
    spec, tensors, _ = int4_group(32, 64)
    w2, layer = product(spec, tensors, 32, 64, 1, 0)
    failing = {**tensors, "weight": Failing.of(tensors["weight"], error)}
    for load, named in (
        (lambda: row_parallel(spec, failing, 32, 64, 0, 1), "layer"),
        (lambda: load_expert(w2, layer, failing), "m.experts.0.down_proj.weight"),
    ):
        error.__notes__ = []
        with pytest.raises(type(error)) as caught:
            load()
        assert caught.value is error
        assert [note.partition(":")[0] for note in error.__notes__] == [named]


def test_a_prepared_layer_is_not_loaded_again() -> None:
    """Its tensors are the operators'; what is loaded then would be lost."""
    spec, tensors, _ = modelslim_dynamic(32, 64)
    layer = row_parallel(spec, tensors, 32, 64, 0, 1)
    param = layer.weight
    layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(NpuQuantError, match="whose weights are prepared"):
        param.weight_loader(param, tensors["weight"])


# ------------------------------------------------------------------------------------------------------- python -O


def head(vocabulary: int, inputs: int, rank: int, size: int) -> tuple[Any, Tensors]:
    """An AWQ lm_head, which packs eight words of the vocabulary together."""
    spec, tensors, _ = awq_case(32)(-(-vocabulary // 8) * 8, inputs)
    resolved = ResolvedLayer("lm_head", spec, ("lm_head",), (LayerEntry(spec, frozenset(tensors)),))
    method = NpuQuantLinearMethod(resolved, decide(LayerKind.LM_HEAD, spec, Host()), "config.json")
    with as_rank(rank, size):
        options = {"params_dtype": torch.bfloat16, "padding_size": 64, "quant_config": OneMethod(method)}
        layer = vllm_vocabulary.ParallelLMHead(vocabulary, inputs, prefix="lm_head", **options)
    return layer, tensors


def column_parallel(weight: torch.Tensor) -> Any:
    """A layer of 50 outputs and 72 inputs that was given this weight."""
    spec, tensors, _ = modelslim_dynamic(50, 72)
    with as_rank(0, 1):
        layer = vllm_linear.ColumnParallelLinear(
            72,
            50,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=OneMethod(method_for(spec, [tensors])),
            prefix="layer",
        )
    fill(layer, None, {**tensors, "weight": weight})
    return layer


def outcome(load: Callable[[], object]) -> list[str]:
    """The codes of an error, or "loaded"."""
    try:
        load()
    except NpuQuantError as error:
        return list(error.codes)
    return ["loaded"]


def outcomes() -> dict[str, list[str]]:
    right = modelslim_dynamic(50, 72)[1]["weight"]
    spec, tensors, _ = int4_group(32, 64)

    def expert(**changed: torch.Tensor) -> None:
        w2, layer = product(spec, tensors, 32, 64, 2, 1)
        load_expert(w2, layer, {**tensors, **changed})

    return {
        "right": outcome(lambda: column_parallel(right)),
        "too many rows": outcome(lambda: column_parallel(torch.cat([right, right]))),
        "too few rows": outcome(lambda: column_parallel(right[:40])),
        "too many inputs": outcome(lambda: column_parallel(torch.cat([right, right], dim=1))),
        "a dimension too many": outcome(lambda: column_parallel(right[None])),
        "wrong dtype": outcome(lambda: column_parallel(right.float())),
        "vocabulary": outcome(lambda: (lambda made: fill(made[0], None, made[1]))(head(96, 64, 1, 2))),
        "cut vocabulary": outcome(lambda: (lambda made: fill(made[0], None, made[1]))(head(100, 64, 1, 2))),
        "right expert": outcome(expert),
        "too many rows of an expert": outcome(lambda: expert(weight=longer(tensors["weight"], 0))),
        "wrong dtype of an expert": outcome(lambda: expert(weight=tensors["weight"].to(torch.int32))),
    }


EXPECTED = {
    "right": ["loaded"],
    "too many rows": ["wrong-shape"],
    "too few rows": ["wrong-shape"],
    "too many inputs": ["wrong-shape"],
    "a dimension too many": ["wrong-shape"],
    "wrong dtype": ["wrong-dtype"],
    "vocabulary": ["loaded"],
    "cut vocabulary": ["cannot-shard"],
    "right expert": ["loaded"],
    "too many rows of an expert": ["wrong-shape"],
    "wrong dtype of an expert": ["wrong-dtype"],
}


def test_guards() -> None:
    assert outcomes() == EXPECTED


def test_guards_without_asserts() -> None:
    code = "import json; from tests.engine.test_stored import outcomes; print(json.dumps(outcomes()))"
    found = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout.splitlines()[-1]) == EXPECTED


def test_a_layer_that_is_loaded_again_needs_the_same_tensors() -> None:
    """Graphs hold the addresses of the operators' tensors: others, such as a permutation, have no place."""
    layer, method = nn.Module(), method_of({"up_proj": int4_group(64, 128)}, "up_proj")
    received = fused(method, [64], 128, 0, 1).quant_method.receiver
    received.install(layer, {"weight": torch.ones(4, 8)})
    address = layer.weight.data_ptr()
    received.install(nn.Module(), {"weight": torch.zeros(4, 8)})
    with pytest.raises(NpuQuantError, match="reload-mismatch"):
        received.install(layer, {"weight": torch.ones(4, 8), "input_order": torch.arange(8)})
    assert layer.weight.data_ptr() == address
    with pytest.raises(NpuQuantError, match="load_weights alone"):
        layer.weight.weight_loader(layer.weight, torch.zeros(4, 8))


def test_vllm_can_free_a_layer() -> None:
    """vLLM keeps parameters' loaders as long as their layer lives: they must not keep the layer."""
    method = method_of({"up_proj": int4_group(64, 128)}, "up_proj")
    layer = fused(method, [64], 128, 0, 1)
    loaders = [parameter.weight_loader for parameter in layer.parameters()]
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert loaders
    assert alive() is None
