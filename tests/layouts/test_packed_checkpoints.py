# SPDX-License-Identifier: Apache-2.0
"""Real AWQ, GPTQ and AutoRound checkpoints: every quantized layer against NumPy, and through the method."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fixtures_index import FIXTURES, fixture, shared
from tests.formats.packed_layers import open_packed, problems
from tests.layouts.words import dequantized_awq, dequantized_gptq
from tests.methods.layers import random_input, relative_error, run
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.layouts.tables import LAYOUTS, tensors_of
from vllm_npu_quant.methods.weight_only import WeightOnlyLinear
from vllm_npu_quant.spec import LayerSpec, Layout

#: Checkpoint -> how many layers of each (bits, group size, symmetric, layout) it has; MoE experts one by one.
CASES: dict[str, dict[tuple[int, int, bool, str], int]] = {
    "awq-qwen3-autoawq-g128": {(4, 128, False, "awq_gemm"): 14},
    "awq-qwen3-g32": {(4, 32, False, "awq_gemm"): 14},
    "awq-qwen3moe-autoawq-g128": {(4, 128, False, "awq_gemm"): 56},
    "awq-qwen3moe-g128": {(4, 128, False, "awq_gemm"): 56},
    "gptq-qwen3-w4g128-asym": {(4, 128, False, "gptq"): 14},
    "gptq-qwen3-w4g128-sym": {(4, 128, True, "gptq"): 14},
    "gptq-qwen3-w3g128-sym": {(3, 128, True, "gptq"): 14},
    "gptq-qwen3-w8g128-sym": {(8, 128, True, "gptq"): 14},
    "gptq-qwen3-gptqmodel-w4g32-sym-descact": {(4, 32, True, "gptq_act_order"): 14},
    "gptq-qwen3-gptqmodel-w4g64-v2": {(4, 64, True, "gptq_v2"): 14},
    "gptq-qwen3-gptqmodel-w4g128-asym": {(4, 128, False, "gptq"): 14},
    "gptq-qwen3-gptqmodel-w8-channel-sym": {(8, 0, True, "gptq"): 14},
    "gptq-qwen3-gptqmodel-dynamic-mixed": {(4, 128, True, "gptq"): 11, (8, 64, True, "gptq"): 2},
    "gptq-qwen3-gptqmodel-w4g128-lmhead": {(4, 128, True, "gptq"): 14, (8, 32, True, "gptq"): 1},
    "gptq-qwen3moe-w4g128-sym": {(4, 128, True, "gptq"): 56},
    "autoround-qwen3-w4g128": {(4, 128, True, "gptq"): 14},
    "autoround-qwen3-w4g128-asym": {(4, 128, False, "awq_gemm"): 14},
    "autoround-qwen3-w2g64": {(2, 64, True, "gptq"): 14},
    "autoround-qwen3-w3g128": {(3, 128, True, "gptq"): 14},
    "autoround-qwen3-w8g128": {(8, 128, True, "gptq"): 14},
    "autoround-qwen3-lmhead": {(4, 128, True, "gptq"): 15},
    "autoround-qwen3-mixed": {(4, 128, True, "gptq"): 11, (4, 32, True, "gptq"): 1, (8, 128, True, "gptq"): 1},
    "autoround-qwen3moe-w4g128": {(4, 128, True, "gptq"): 56},
    "autoround-qwen3moe-w4g128-packawq": {(4, 128, False, "awq_gemm"): 56},
}


def load_object(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def folder_of(name: str) -> Path:
    return fixture(name) if (FIXTURES / name).is_dir() else shared(name)


def canonical(layer: str, spec: LayerSpec, tensors: frozenset[str], checkpoint: Checkpoint) -> Any:
    """The layer as the adapter loads it, on one rank."""
    loaded = {}
    outputs = checkpoint.tensors[f"{layer}.scales"].shape[1]
    for tensor in tensors_of(spec, tensors):
        value = torch.from_numpy(checkpoint.read(f"{layer}.{tensor.name}").copy())
        if tensor.rearrange:
            value = load_object(tensor.rearrange)(value, spec, outputs)
        loaded[tensor.name] = value.to(getattr(torch, tensor.load_dtype))
    return load_object(LAYOUTS[spec.layout].to_canonical)(loaded, spec)


def expected(layer: str, spec: LayerSpec, checkpoint: Checkpoint) -> np.ndarray:
    """float64 [N, K] from the stored tensors."""

    def read(name: str) -> np.ndarray:
        return checkpoint.read(f"{layer}.{name}")

    group = spec.weight.group_size or -1
    if spec.layout is Layout.AWQ_GEMM:
        return dequantized_awq(read("qweight"), read("scales"), read("qzeros"), group)
    g_idx = read("g_idx") if f"{layer}.g_idx" in checkpoint.tensors else None
    v2 = "V2" in spec.layout.name
    weight = (read("qweight"), read("scales"), read("qzeros"))
    return dequantized_gptq(*weight, spec.weight.bits, group, v2=v2, g_idx=g_idx)


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_what_the_files_say(name: str) -> None:
    found, checkpoint = open_packed(folder_of(name))
    assert problems(found, checkpoint) == []
    counts: Counter[tuple[int, int, bool, str]] = Counter()
    for layer, entry in found.stored_layers():
        spec = entry.spec
        if spec.is_float:
            assert f"{layer}.qweight" not in checkpoint.tensors
            continue
        counts[spec.weight.bits, spec.weight.group_size, spec.weight.symmetric, spec.layout.value] += 1
        linear = canonical(layer, spec, entry.tensors, checkpoint)
        wanted = expected(layer, spec, checkpoint)
        assert linear.weight.bits == spec.weight.bits
        weight = linear.weight.dequantize().numpy()
        if linear.input_permutation is not None:
            weight = weight[:, np.argsort(linear.input_permutation.numpy())]
        assert np.allclose(weight, wanted, rtol=1e-6, atol=0)
    assert counts == CASES[name]
    assert sum(counts.values()) == sum(tensor.endswith(".qweight") for tensor in checkpoint.tensors)


@pytest.mark.parametrize("name", [name for name in CASES if "moe" not in name])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_layer_through_the_method(name: str, dtype: torch.dtype) -> None:
    """Scales of float16 are rounded to bfloat16 where the model is bfloat16: half a unit in the last of 8 places."""
    found, checkpoint = open_packed(folder_of(name))
    for layer, entry in found.stored_layers():
        if entry.spec.is_float or "layers.0" in layer:
            continue  # the second block has the same shapes, and all the exceptions
        linear = canonical(layer, entry.spec, entry.tensors, checkpoint)
        wanted = expected(layer, entry.spec, checkpoint)
        x = random_input(3, wanted.shape[1], dtype)
        error = relative_error(run(WeightOnlyLinear(), linear, x), x.to(torch.float64).numpy() @ wanted.T)
        assert error < (0.004 if dtype is torch.bfloat16 else 0.0015)


def test_the_config_that_gptqmodel_wrote_twice_agrees() -> None:
    from vllm_npu_quant.formats.gptq import compare_files

    folder = fixture("gptq-qwen3-gptqmodel-dynamic-mixed")
    first = json.loads((folder / "config.json").read_text())["quantization_config"]
    second = json.loads((folder / "quantize_config.json").read_text())
    assert compare_files(first, second, ("config.json", "quantize_config.json")) == []


def test_activation_order_is_there() -> None:
    found, checkpoint = open_packed(fixture("gptq-qwen3-gptqmodel-w4g32-sym-descact"))
    layer = "model.layers.0.mlp.down_proj"
    g_idx = checkpoint.read(f"{layer}.g_idx")
    assert (np.diff(g_idx) < 0).any()
    linear = canonical(layer, found.find(layer).spec, frozenset(), checkpoint)
    assert linear.input_permutation is not None


def test_autorounds_fp8_blocks() -> None:
    found, checkpoint = open_packed(fixture("autoround-qwen3-fp8block"))
    assert problems(found, checkpoint) == []
    specs = Counter(entry.spec.layout for _, entry in found.stored_layers())
    assert specs[Layout.FP8_INV] == 14
