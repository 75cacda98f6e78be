# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors and FP8 checkpoints through the real engine, against their float twins."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rewritten import Quantized, fp8, int8, packed, write
from tests.e2e.simulation import simulated_int4_activations
from tests.e2e.twins import make_twin, read_tensors
from tests.e2e.yardstick import Run, relative_error, run
from tests.fixtures_index import FIXTURES, fixture, shared
from vllm_npu_quant.errors import NpuQuantError

pytestmark = pytest.mark.engine

#: Checkpoint -> (limit of the relative error, method class of its eight Linear layers).
CASES = {
    "ct-qwen3-w8a8-dynamic": (0.06, "W8A8DynamicLinear"),
    "ct-qwen3-w8a8-static": (0.12, "W8A8StaticLinear"),
    "ct-qwen3-w8a8-static-asym": (0.12, "W8A8StaticLinear"),
    "ct-qwen3-w8a16-channel": (0.02, "WeightOnlyLinear"),
    "ct-qwen3-w4a16-channel": (0.02, "WeightOnlyLinear"),
    "ct-qwen3-w4a16-g128": (0.02, "WeightOnlyLinear"),
    "ct-qwen3-w4a16-g128-asym": (0.02, "WeightOnlyLinear"),
    "ct-qwen3-w4a16-g32-asym": (0.02, "WeightOnlyLinear"),
    "ct-qwen3-w4a8-int8-channel": (0.06, "W4A8DynamicLinear"),
    "ct-qwen3-w4a8-int8-g128": (0.06, "W4A8DynamicLinear"),
    "ct-qwen3-fp8-dynamic": (0.06, "W8A8DynamicLinear"),
    "ct-qwen3-fp8-block": (0.06, "W8A8DynamicLinear"),
    "ct-qwen3-mxfp4": (0.06, "W8A8DynamicLinear"),
}


def checkpoint(name: str) -> Path:
    return fixture(name) if (FIXTURES / name).is_dir() else shared(name)


@pytest.fixture(scope="module")
def twin_run(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def twin(name: str) -> Run:
        folder = make_twin(checkpoint(name), tmp_path_factory.mktemp("twin") / name)
        return run(folder, plugin=False)

    return twin


@cache
def quantized(name: str) -> Run:
    return run(checkpoint(name))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_its_float_twin(name: str, twin_run) -> None:
    limit, method = CASES[name]
    result = quantized(name)
    assert result.methods == {method: 8}
    assert relative_error(result, twin_run(name)) <= limit


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("ct-qwen3-fp8-block", "VLLM_NPU_QUANT_FLOAT_WEIGHTS"),
        ("ct-qwen3-fp8-dynamic", "VLLM_NPU_QUANT_FP8"),
        ("ct-qwen3-mxfp4", "VLLM_NPU_QUANT_FLOAT_WEIGHTS"),
    ],
)
def test_small_floats_as_float_are_the_twin(
    name: str, setting: str, twin_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are the twin's to the last bit. vLLM multiplies by the twin's in another order on hosts with AMX or
    AVX512-BF16, so that the answers agree within bfloat16's noise."""
    monkeypatch.setenv(setting, "bf16")
    result = run(checkpoint(name), inspect=dequantized_weights)
    assert result.methods == {"DequantizedLinear": 8}
    assert relative_error(result, twin_run(name)) < 0.01
    floats = read_tensors(make_twin(checkpoint(name), tmp_path / "twin"))
    assert len(result.inspected) == 8
    for layer, weight in result.inspected.items():
        parent, _, last = layer.rpartition(".")
        shards = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(
            last, (last,)
        )
        assert torch.equal(weight, torch.cat([floats[f"{parent}.{shard}.weight"] for shard in shards])), layer


def dequantized_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if getattr(getattr(module, "quant_method", None), "row", None) is not None
    }


def test_mxfp4_with_float_activations_is_exact_in_int8(twin_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are powers of two, so that the operator's weights are the twin's to the last bit."""
    monkeypatch.setenv("VLLM_NPU_QUANT_FLOAT_WEIGHTS", "w8a16")
    result = run(checkpoint("ct-qwen3-mxfp4"))
    assert result.methods == {"WeightOnlyLinear": 8}
    assert relative_error(result, twin_run("ct-qwen3-mxfp4")) < 0.01


def test_an_unknown_setting_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_FP8", "fp16")
    with pytest.raises(NpuQuantError, match="VLLM_NPU_QUANT_FP8 must be int8, w8a16 or bf16, not 'fp16'"):
        run(checkpoint("ct-qwen3-fp8-block"))


def test_int4_activations_are_as_good_as_their_simulation(twin_run) -> None:
    name = "ct-qwen3-w4a4-int"
    result = quantized(name)
    assert result.methods == {"W4A4DynamicLinear": 8}
    with simulated_int4_activations():
        simulated = relative_error(run(checkpoint(name)), twin_run(name))
    assert relative_error(result, twin_run(name)) <= 1.1 * simulated


@pytest.mark.parametrize("quantization", ["compressed-tensors", "npu_compressed_tensors"])
def test_quantization_may_be_named(quantization: str) -> None:
    name = "ct-qwen3-w8a8-dynamic"
    assert relative_error(run(checkpoint(name), quantization=quantization), quantized(name)) == 0


def test_vllms_own_method_stays_reachable(twin_run) -> None:
    name = "ct-qwen3-w8a8-dynamic"
    theirs = run(checkpoint(name), plugin=False)
    assert theirs.methods == {}
    # No limit of ours: without VNNI, vLLM's own kernel saturates sums of two products at 16 bits.
    assert 0.001 < relative_error(theirs, twin_run(name)) < 1


@pytest.mark.tp2
@pytest.mark.parametrize(
    "name", ["ct-qwen3-w4a16-g128-asym", "ct-qwen3-w8a8-static-asym", "ct-qwen3-w4a8-int8-g128", "ct-qwen3-fp8-block"]
)
def test_two_ranks_agree_with_the_twin_too(name: str, twin_run) -> None:
    both = run(checkpoint(name), tensor_parallel_size=2)
    assert relative_error(both, twin_run(name)) <= CASES[name][0]


# Spellings that no producer's folder here has.

A8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def compressed(groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "format": "mixed-precision",
        "quantization_status": "frozen",
        **fields,
    }


def mixed(out: Path) -> tuple[Path, Path]:
    """Asymmetric int8 inputs in attention, act-order int4 groups of 64 in the MLP, an 8-bit head, scales of a KV cache."""
    groups = {
        "group_0": {
            "targets": ["re:.*self_attn.*proj$"],
            "weights": {**W8, "strategy": "tensor"},
            "input_activations": {**A8, "symmetric": False},
            "format": "int-quantized",
        },
        "group_1": {
            "targets": ["re:.*mlp.*proj$"],
            "weights": {
                "num_bits": 4,
                "strategy": "group",
                "group_size": 64,
                "symmetric": False,
                "actorder": "group",
            },
            "format": "pack-quantized",
        },
        "group_2": {
            "targets": ["lm_head"],
            "weights": {"num_bits": 8, "strategy": "channel", "symmetric": False},
            "format": "pack-quantized",
        },
    }
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.tensor([0.03], dtype=torch.bfloat16)
        for layer in range(2)
        for name in ("k_scale", "v_scale")
    }
    rules = {
        "self_attn": partial(int8, per_tensor=True),
        "mlp": partial(packed, group=64, act_order=1),
        "lm_head": partial(packed, bits=8),
    }
    return write(out, rules, compressed(groups, kv_cache_scheme=KV), scales)


def block_fp8(out: Path) -> tuple[Path, Path]:
    """DeepSeek's spelling with blocks of 96 x 48: neither the shards of qkv nor the ranks' parts end where blocks do."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [96, 48]}
    return write(out, {"_proj": partial(fp8, block=(96, 48), name="weight_scale_inv")}, config)


def static_fp8(out: Path) -> tuple[Path, Path]:
    """AutoFP8's spelling: scalars for weight and input, and one scale per fused shard of its own."""

    def quantize(weight: torch.Tensor) -> Quantized:
        done = fp8(weight, name="weight_scale")
        return Quantized({**done.stored, "input_scale": torch.tensor(0.01)}, done.weight)

    config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    return write(out, {"_proj": quantize}, config)


#: Name -> (writer, limit, methods).
REWRITTEN = {
    "mixed": (mixed, 0.06, {"W8A8DynamicAsymmetricLinear": 4, "WeightOnlyLinear": 5}),
    "block fp8": (block_fp8, 0.06, {"W8A8DynamicLinear": 8}),
    "static fp8": (static_fp8, 0.06, {"W8A8DynamicLinear": 8}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def make(name: str) -> tuple[Path, Run]:
        folder, twin = REWRITTEN[name][0](tmp_path_factory.mktemp(name.replace(" ", "-")))
        return folder, run(twin, plugin=False)

    return make


@pytest.mark.parametrize("name", REWRITTEN)
def test_other_spellings_agree_with_their_twins(name: str, written) -> None:
    folder, twin = written(name)
    _, limit, methods = REWRITTEN[name]
    result = run(folder)
    assert result.methods == methods
    assert 0.001 < relative_error(result, twin) <= limit


@pytest.mark.tp2
@pytest.mark.parametrize("name", REWRITTEN)
def test_two_ranks_of_other_spellings_agree_with_their_twins(name: str, written) -> None:
    folder, twin = written(name)
    assert relative_error(run(folder, tensor_parallel_size=2), twin) <= REWRITTEN[name][1]


def test_a_damaged_checkpoint_is_refused_before_it_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = static_fp8(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NpuQuantError, match=r"missing-tensor.*model.layers.1.mlp.down_proj"):
        run(folder)
