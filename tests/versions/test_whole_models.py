# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints in vLLM's own model classes, filled by vLLM's own loader; each quantized layer against its float twin.

No engine is started and no attention computed, so that it runs beside a vLLM whose compiled extension is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.twins import make_twin, read_tensors
from tests.engine.moe_layers import expected as expected_experts
from tests.engine.world import load_model
from tests.fixtures_index import fixture

Tensors = dict[str, torch.Tensor]

#: Checkpoint -> largest relative error of a layer's output: of integer activations and bfloat16's rounding.
CHECKPOINTS = {
    "msmodelslim-qwen3-w8a8": 0.03,
    "msmodelslim-qwen3fp32-w8a8-normbias": 0.03,
    "msmodelslim-qwen3-w8a8-dynamic": 0.02,
    "msmodelslim-qwen3-w4a8-dynamic": 0.02,
    "msmodelslim-qwen3-v0-w4a16-g64": 0.006,
    "ct-qwen3-w8a8-dynamic": 0.02,
    "ct-qwen3-w4a16-g128-asym": 0.006,
    "ct-qwen3-fp8-block": 0.025,
    "awq-qwen3-autoawq-g128": 0.006,
    "gptq-qwen3-gptqmodel-w4g32-sym-descact": 0.006,
    "gptq-qwen3-gptqmodel-w4g128-lmhead": 0.006,
    "autoround-qwen3-mixed": 0.006,
    "msmodelslim-qwen3moe-w8a8-dynamic": 0.025,
}


@pytest.fixture(autouse=True)
def no_mla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_quantized_layer_is_its_float_twin(name: str, tmp_path: Path) -> None:
    from vllm_npu_quant.engine import platforms
    from vllm_npu_quant.engine.linear import NpuQuantLinearMethod

    stored, floats = read_tensors(fixture(name)), read_tensors(make_twin(fixture(name), tmp_path / name))
    model = load_model(fixture(name))
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for layer, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, NpuQuantLinearMethod):
                errors[layer] = linear_error(module, method.resolved.shards, floats, stored)
            elif platforms.is_moe(module) and type(method).__name__ == "NpuQuantMoEMethod":
                errors[layer] = experts_error(module, method, floats)
    quantized = {layer.rpartition(".")[2] for layer in errors}
    assert quantized >= {"qkv_proj", "o_proj"} or "lm_head" in quantized
    assert ("moe" in name) == any("experts" in layer for layer in errors)
    assert ("lmhead" in name) == ("lm_head" in quantized)
    worst = max(errors, key=lambda layer: errors[layer])
    assert errors[worst] <= CHECKPOINTS[name], worst


def relative(y: torch.Tensor, wanted: np.ndarray) -> float:
    assert y.shape == wanted.shape
    return float(np.linalg.norm(y.double().numpy() - wanted) / np.linalg.norm(wanted))


def inputs(columns: int) -> torch.Tensor:
    return torch.randn(9, columns, generator=torch.Generator().manual_seed(7)).bfloat16()


def linear_error(layer: Any, shards: tuple[str, ...], floats: Tensors, stored: Tensors) -> float:
    weight = torch.cat([floats[f"{shard}.weight"] for shard in shards]).double()
    x = inputs(weight.shape[1])
    if f"{shards[0]}.input_scale" in stored:
        # Numbers that the static integers hold: outside of the calibrated range they clip, which is not an error.
        scale, offset = (stored[f"{shards[0]}.{name}"].float() for name in ("input_scale", "input_offset"))
        x = (((x.float() * 40).round().clamp(-128, 127) - offset) * scale).bfloat16()
    y = layer.quant_method.apply(layer, x, getattr(layer, "bias", None))
    wanted = x.double() @ weight.T
    if f"{shards[0]}.bias" in stored:
        # The twin's bias has the effect of a norm's bias in it, which is not this layer's to add.
        wanted += torch.cat([stored[f"{shard}.bias"] for shard in shards]).double()
    return relative(y[:, : weight.shape[0]], wanted.numpy())


def experts_error(layer: Any, method: Any, floats: Tensors) -> float:
    prefix = method.resolved.layer
    experts = len({name for name in floats if name.startswith(f"{prefix}.") and name.endswith(".down_proj.weight")})
    x = inputs(floats[f"{prefix}.0.gate_proj.weight"].shape[1])
    rng = torch.Generator().manual_seed(8)
    weights, ids = torch.rand(x.shape[0], experts, generator=rng).topk(2)
    y = method.apply(layer=layer, x=x, topk_weights=weights, topk_ids=ids.to(torch.int32))
    return relative(y, expected_experts(floats, prefix, x, weights, ids))
