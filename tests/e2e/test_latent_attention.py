# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention through the real engine: kv_b_proj is stored quantized, and absorbed into the attention."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rewritten import awq, float_model, fp8, gptq, int8, modelslim_int8, packed, write
from tests.e2e.test_compressed_tensors import A8, W8, compressed
from tests.e2e.yardstick import Run, relative_error, run

pytestmark = pytest.mark.engine

#: vLLM's CPU kernel for latent attention takes these sizes only.
SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 128}

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}

#: Name -> (quantizer, quantization config, limit).
FORMATS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "compressed-tensors W8A8": (
        int8,
        compressed(
            {"g": {"targets": ["Linear"], "weights": W8, "input_activations": A8}},
            format="int-quantized",
            ignore=["lm_head"],
        ),
        0.06,
    ),
    "compressed-tensors W4A16": (
        partial(packed, group=64),
        compressed({"g": {"targets": ["Linear"], "weights": INT4}}, format="pack-quantized", ignore=["lm_head"]),
        0.02,
    ),
    "FP8 blocks": (
        partial(fp8, block=(128, 128), name="weight_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        0.06,
    ),
    "AWQ": (partial(awq, group=64), {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, 0.02),
    "GPTQ": (
        partial(gptq, group=64, sym=False, act_order=3),
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False},
        0.02,
    ),
    "ModelSlim": (modelslim_int8, {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC"}, 0.06),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 without experts."""
    folder = tmp_path_factory.mktemp("latent") / "source"
    return float_model(
        folder,
        "deepseek_v3",
        **SIZES,
        first_k_dense_replace=2,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
    )


def attention_of(model: Any) -> set[str]:
    """The attention layers that took the weight of kv_b_proj apart: into W_UK and W_UV, or on hosts with AMX into packed
    weights of the implementation, after which vLLM frees the layer's own."""

    def taken_apart(module: Any) -> bool:
        if getattr(module, "is_amx_bmm_enabled", False):
            return module.kv_b_proj.weight.numel() == 0
        return hasattr(module, "W_UK_T")

    return {type(module).__name__ for module in model.modules() if taken_apart(module)}


#: One of int8 and one of int4 run by default.
DEFAULT = ("ModelSlim", "GPTQ")


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.variant) for name in FORMATS]
)
def test_it_agrees_with_its_float_twin(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_MLA_DISABLE", raising=False)
    quantizer, config, limit = FORMATS[name]
    if name == "ModelSlim":
        config = config | described(source)
    folder, twin = write(tmp_path, {"_proj": quantizer}, config, source=source)
    result: Run = run(folder, inspect=attention_of)
    assert result.inspected == {"MLAAttention"}  # vLLM took the weight of kv_b_proj apart
    assert result.methods["DequantizedLinear"] == 2
    assert sum(group.count for group in result.groups if group.scheme != "FLOAT") == 12
    assert relative_error(result, run(twin, plugin=False)) <= limit


def described(source: Path) -> dict[str, str]:
    """The entries of a ModelSlim description for every projection."""
    from tests.e2e.twins import read_tensors

    layers = [name.removesuffix(".weight") for name in read_tensors(source) if name.endswith("_proj.weight")]
    layers += [
        name.removesuffix(".weight") for name in read_tensors(source) if name.endswith("kv_a_proj_with_mqa.weight")
    ]
    return {
        f"{layer}.{last}": "W8A8_DYNAMIC" for layer in layers for last in ("weight", "weight_scale", "weight_offset")
    }
