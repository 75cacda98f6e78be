# SPDX-License-Identifier: Apache-2.0
"""MXFP8, MXFP4, NVFP4 and ModelOpt's FP8 through the real engine, against their float twins: one spelling per format."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rewritten import Quantized, float_model, fp8, mx, nvfp4, write
from tests.e2e.routing import MOST_CHANGED, Choices, changed_share, median_error, routers
from tests.e2e.yardstick import Run, relative_error, run

pytestmark = pytest.mark.engine

MX_ARGUMENTS = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
W8A8, W4A16 = {"W8A8DynamicLinear": 8}, {"WeightOnlyLinear": 9}


def compressed(packing: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": packing}
    ignored = ["lm_head", "re:.*gate$"] if inputs is not None else []
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


def ct_mxfp8(out: Path) -> tuple[Path, Path]:
    weights = {**MX_ARGUMENTS, "num_bits": 8}
    config = compressed("mxfp8-quantized", weights, {**weights, "dynamic": True})
    return write(out, {"_proj": partial(mx, bits=8)}, config)


def ct_mxfp4_weights(out: Path) -> tuple[Path, Path]:
    """Weight-only, with the head: int8 in groups of 32, exactly."""
    quantize = partial(mx, bits=4, weight_name="weight_packed")
    config = compressed("mxfp4-pack-quantized", {**MX_ARGUMENTS, "num_bits": 4}, None)
    return write(out, {"_proj": quantize, "lm_head": quantize}, config)


def ct_nvfp4(out: Path) -> tuple[Path, Path]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = compressed("nvfp4-pack-quantized", weights, {**weights, "dynamic": "local"})
    return write(out, {"_proj": partial(nvfp4, modelopt=False)}, config)


def auto_round_mxfp4(out: Path) -> tuple[Path, Path]:
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "bits": 4,
        "group_size": 32,
        "data_type": "mx_fp",
        "act_bits": 4,
        "block_name_to_quantize": "model.layers",
    }
    return write(out, {"_proj": partial(mx, bits=4, weight_name="weight_packed")}, config)


def modelopt_nvfp4(out: Path) -> tuple[Path, Path]:
    """The old spelling: hf_quant_config.json beside a config.json that says nothing; the first layer's MLP is float."""
    rules = {"layers.0.mlp": as_float, "_proj": partial(nvfp4, modelopt=True)}
    folder, twin = write(out, rules, {"quant_method": "modelopt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    described = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    described["exclude_modules"] = ["lm_head", "model.layers.0.mlp*"]
    quantization = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": described}
    (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    return folder, twin


def as_float(weight: torch.Tensor) -> Quantized:
    return Quantized({"weight": weight.bfloat16()}, weight)


def modelopt_mixed(out: Path) -> tuple[Path, Path]:
    """Blocks of FP8 in attention, with the four dimensions of ModelOpt's scales; NVFP4 weights in the MLP."""

    def blocks(weight: torch.Tensor) -> Quantized:
        done = fp8(weight, block=(128, 128), name="weight_scale")
        return Quantized(done.stored | {"weight_scale": done.stored["weight_scale"][:, None, :, None]}, done.weight)

    layers = {}
    for number in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layers[f"model.layers.{number}.self_attn.{name}"] = {"quant_algo": "FP8_PB_WO"}
        layers[f"model.layers.{number}.mlp"] = {"quant_algo": "NVFP4", "group_size": 16}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return write(out, {"self_attn": blocks, "mlp": partial(nvfp4, modelopt=True, inputs=False)}, config)


def minimax_mxfp8(out: Path) -> tuple[Path, Path]:
    config = {"quant_method": "mxfp8", "ignored_layers": ["lm_head"], "weight_block_size": [1, 32]}
    return write(out, {"_proj": partial(mx, bits=8, scale_name="weight_scale_inv")}, config)


def modelslim_mxfp4(out: Path) -> tuple[Path, Path]:
    types = {
        f"model.layers.{number}.{name}.{last}": "W4A8_MXFP"
        for number in range(2)
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
        for last in ("weight", "weight_scale")
    }
    return write(out, {"_proj": partial(mx, bits=4)}, {"version": "1.0.0", **types})


Writer = Callable[[Path], tuple[Path, Path]]

#: Name -> (writer, limit, methods).
CASES: dict[str, tuple[Writer, float, dict[str, int]]] = {
    "compressed-tensors MXFP8": (ct_mxfp8, 0.06, W8A8),
    "compressed-tensors MXFP4 weights": (ct_mxfp4_weights, 0.01, W4A16),
    "compressed-tensors NVFP4": (ct_nvfp4, 0.06, W8A8),
    "AutoRound MXFP4": (auto_round_mxfp4, 0.06, W8A8),
    "ModelOpt NVFP4": (modelopt_nvfp4, 0.06, {"W8A8DynamicLinear": 6, "UnquantizedLinearMethod": 2}),
    "ModelOpt mixed": (modelopt_mixed, 0.06, {"W8A8DynamicLinear": 4, "WeightOnlyLinear": 4}),
    "MiniMax MXFP8": (minimax_mxfp8, 0.06, W8A8),
    "ModelSlim W4A8_MXFP": (modelslim_mxfp4, 0.06, W8A8),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def make(name: str) -> tuple[Path, Run]:
        folder, twin = CASES[name][0](tmp_path_factory.mktemp(name.replace(" ", "-")))
        return folder, run(twin, plugin=False)

    return make


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_its_float_twin(name: str, written) -> None:
    folder, twin = written(name)
    _, limit, methods = CASES[name]
    result = run(folder)
    assert result.methods == methods
    assert relative_error(result, twin) <= limit


@pytest.mark.tp2
@pytest.mark.parametrize("name", ["compressed-tensors MXFP4 weights", "ModelOpt NVFP4"])
def test_two_ranks_agree_with_the_twin_too(name: str, written) -> None:
    folder, twin = written(name)
    assert relative_error(run(folder, tensor_parallel_size=2), twin) <= max(CASES[name][1], 0.02)


def experts_of(out: Path, quantize: Callable[[torch.Tensor], Quantized], config: dict[str, Any]) -> tuple[Path, Path]:
    """A tiny Qwen3-MoE whose Linear layers and experts are quantized, and whose router is float."""
    source = float_model(
        out / "source",
        "qwen3_moe",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        head_dim=64,
        norm_topk_prob=True,
    )
    return write(out, {"_proj": quantize}, config, source=source)


NVFP4_CONFIG = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*mlp.gate"]}
MXFP4_CONFIG = compressed(
    "mxfp4-pack-quantized", {**MX_ARGUMENTS, "num_bits": 4}, {**MX_ARGUMENTS, "num_bits": 4, "dynamic": True}
)
#: Name -> (quantizer, config, method, limit).
EXPERTS = {
    "ModelOpt NVFP4": (partial(nvfp4, modelopt=True), NVFP4_CONFIG, "W8A8DynamicExperts"),
    "compressed-tensors MXFP4": (partial(mx, bits=4, weight_name="weight_packed"), MXFP4_CONFIG, "W8A8DynamicExperts"),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def make(name: str) -> tuple[Path, Run, Choices]:
        quantize, config, _ = EXPERTS[name]
        folder, twin = experts_of(tmp_path_factory.mktemp(name.replace(" ", "-")), quantize, config)
        with routers() as chosen:
            result = run(twin, plugin=False)
        return folder, result, chosen

    return make


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_agree_with_their_float_twin(name: str, mixture) -> None:
    folder, twin, choices = mixture(name)
    with routers(choices) as chosen:
        result = run(folder)
    assert result.methods[EXPERTS[name][2]] == 2
    assert 0.0005 < relative_error(result, twin) <= 0.06
    assert changed_share(chosen, choices) <= MOST_CHANGED


@pytest.mark.tp2
@pytest.mark.parametrize("split", [False, True], ids=["tensor_parallel", "expert_parallel"])
def test_experts_on_two_ranks_agree_too(split: bool, mixture) -> None:
    folder, twin, _ = mixture("ModelOpt NVFP4")
    result = run(folder, tensor_parallel_size=2, enable_expert_parallel=split)
    assert 0.0004 < median_error(result, twin) <= 0.06
