# SPDX-License-Identifier: Apache-2.0
"""Model families whose experts have other names or other routers, in formats that no producer's folder has for them.

Mixtral (w1, w2, w3 under block_sparse_moe) is made here; DeepSeek-V3 (sigmoid scores, groups, e_score_correction_bias, shared
experts) is a tiny float folder. benchmarks/moe_accuracy.py rounds them, and writes the twin from the same integers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.routing import MOST_CHANGED, changed_share, routers
from tests.e2e.yardstick import relative_error, run
from tests.fixtures_index import fixture, shared

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import moe_accuracy

pytestmark = pytest.mark.engine

SCHEMES: dict[str, tuple[Any, ...]] = {
    "ct_w4a16": (moe_accuracy.ct_packed(32), moe_accuracy._compressed(4, 32, False, "pack-quantized")),
    "ct_w4a8": (moe_accuracy.ct_int(4, 32), moe_accuracy._compressed(4, 32, True, "int-quantized")),
    "ct_w8a8": (moe_accuracy.ct_int(8), moe_accuracy._compressed(8, 0, True, "int-quantized")),
    "awq": (
        moe_accuracy.awq(32),
        moe_accuracy._packing(
            "awq", version="gemm", zero_point=True, modules_to_not_convert=["lm_head", ".gate"], group_size=32
        ),
    ),
    "gptq": (
        moe_accuracy.gptq(32),
        moe_accuracy._packing(
            "gptq",
            sym=True,
            desc_act=False,
            checkpoint_format="gptq",
            lm_head=False,
            dynamic={"-:.*\\.gate$": {}},
            group_size=32,
        ),
    ),
    "modelslim_w4a8": (moe_accuracy.modelslim_w4a8, None),
    # gate and up in 4 bits, down in 8.
    "modelslim_mixed": (moe_accuracy.modelslim_w4a8, None, (moe_accuracy.modelslim_int8, "W8A8_DYNAMIC")),
}

CASES = {
    ("mixtral", "ct_w4a16"): 0.03,
    ("mixtral", "gptq"): 0.03,
    ("mixtral", "awq"): 0.03,
    ("mixtral", "modelslim_w4a8"): 0.06,
    ("mixtral", "modelslim_mixed"): 0.06,
    ("mixtral", "ct_w8a8"): 0.06,
    ("deepseek", "ct_w4a16"): 0.03,
    ("deepseek", "gptq"): 0.03,
    ("deepseek", "awq"): 0.03,
    ("deepseek", "ct_w4a8"): 0.06,
    ("deepseek", "modelslim_w4a8"): 0.06,
}


@pytest.fixture(autouse=True)
def no_mla(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU backend has no MLA."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")


def mixtral(folder: Path) -> Path:
    """A tiny Mixtral with random weights, and the other models' tokenizer."""
    source = fixture("source-tiny-qwen3")
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(5)

    def matrix(outputs: int, inputs: int, gain: float = 1.5) -> torch.Tensor:
        return (torch.randn(outputs, inputs, generator=generator) * gain / inputs**0.5).bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(512, 128, 11.0), "lm_head.weight": matrix(512, 128)}
    tensors["model.norm.weight"] = torch.ones(128).bfloat16()
    for layer in range(2):
        stem = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{norm}.weight"] = torch.ones(128).bfloat16()
        for name, shape in (("q", (128, 128)), ("k", (64, 128)), ("v", (64, 128)), ("o", (128, 128))):
            tensors[f"{stem}self_attn.{name}_proj.weight"] = matrix(*shape)
        tensors[f"{stem}block_sparse_moe.gate.weight"] = matrix(4, 128)
        for expert in range(4):
            for name, shape in (("w1", (96, 128)), ("w3", (96, 128)), ("w2", (128, 96))):
                tensors[f"{stem}block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(*shape)
    folder.mkdir()
    for file in source.iterdir():
        if "token" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


#: What runs by default; the others run with --all-ranks.
DEFAULT = ("mixtral", "modelslim_mixed")


@pytest.mark.parametrize(
    ("family", "scheme"),
    [pytest.param(*case, id="-".join(case), marks=() if case == DEFAULT else pytest.mark.variant) for case in CASES],
)
def test_agrees_with_its_float_twin(family: str, scheme: str, tmp_path: Path) -> None:
    source = mixtral(tmp_path / "source") if family == "mixtral" else shared("source/tiny-deepseek-v3")
    quantize, config, *down = SCHEMES[scheme]
    others = moe_accuracy.modelslim_int8 if config is None else quantize
    types = ("W4A8_DYNAMIC", "W8A8_DYNAMIC")
    row = moe_accuracy.Scheme(scheme, quantize, others, config, types, down=down[0] if down else None)
    checkpoint, twin = moe_accuracy.write(source, row, tmp_path)
    with routers() as choices:
        reference = run(twin, plugin=False)
    with routers(choices) as chosen:
        result = run(checkpoint)
    assert [group.count for group in result.groups if group.kind == "fused_moe"] == [2 if family == "mixtral" else 1]
    if down:
        assert "W4A8DynamicExperts + W8A8DynamicExperts" in result.methods
    assert 0.0005 < relative_error(result, reference) <= CASES[family, scheme]
    assert changed_share(chosen, choices) <= MOST_CHANGED
