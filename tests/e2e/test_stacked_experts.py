# SPDX-License-Identifier: Apache-2.0
"""FP8 experts in tensors of all experts, through vLLM's own loaders: in both orders of inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.yardstick import Run, run

pytestmark = pytest.mark.engine

EXPERTS, HIDDEN, INNER, BLOCK = 4, 256, 128, 128

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3 = {
    **COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "intermediate_size": 512,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LLAMA4 = {
    **COMMON,
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size": INNER,
    "intermediate_size_mlp": 512,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "moe_layers": [0, 1],
    "use_qk_norm": False,
}
BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["self_attn", "gate", "lm_head"],
}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["re:.*experts.*"],
            "weights": {**_FP8, "strategy": "channel"},
            "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["re:.*self_attn.*", "re:.*router.*", "lm_head"],
}


def _blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 [N, K], the scales of its blocks, and what both stand for."""
    rows, columns = (size // BLOCK for size in weight.shape)
    tiles = weight.reshape(rows, BLOCK, columns, BLOCK)
    scale = (tiles.abs().amax((1, 3), keepdim=True) / 448).bfloat16().float()
    codes = (tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.reshape(weight.shape), scale.reshape(rows, columns), (codes.float() * scale).reshape(weight.shape)


def _channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16().float()
    codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale


#: (config, quantization, rounding, suffix of the scales, name of the MoE block, of its router, whether inputs come first).
CASES: dict[str, tuple[Any, ...]] = {
    "qwen3-blocks": (QWEN3, BLOCKS, _blocks, "_scale_inv", "mlp", "gate", False),
    "llama4-channels": (LLAMA4, CHANNELS, _channels, "_scale", "feed_forward", "router", True),
}


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def write(case: str, folder: Path) -> tuple[Path, Path]:
    """The checkpoint, and its float twin, stacked in the same way."""
    config, quantization, rounded, suffix, block, router, inputs_first = CASES[case]
    generator = torch.Generator().manual_seed(3)

    def matrix(outputs: int, inputs: int, gain: float = 1.5) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator) * gain / inputs**0.5

    both = {"model.embed_tokens.weight": matrix(512, HIDDEN, 16.0), "lm_head.weight": matrix(512, HIDDEN)}
    both["model.norm.weight"] = torch.ones(HIDDEN)
    stored: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for layer in range(2):
        stem = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            both[f"{stem}{norm}.weight"] = torch.ones(HIDDEN)
        for name, outputs, inputs in (("q", 256, HIDDEN), ("k", 128, HIDDEN), ("v", 128, HIDDEN), ("o", HIDDEN, 256)):
            both[f"{stem}self_attn.{name}_proj.weight"] = matrix(outputs, inputs)
        if config is QWEN3:
            both |= {f"{stem}self_attn.{name}_norm.weight": torch.ones(64) for name in "qk"}
        else:
            for name, outputs, inputs in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
                both[f"{stem}{block}.shared_expert.{name}_proj.weight"] = matrix(outputs, inputs)
        both[f"{stem}{block}.{router}.weight"] = matrix(EXPERTS, HIDDEN, 8.0)
        for name, outputs, inputs in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            parts = [rounded(matrix(outputs, inputs)) for _ in range(EXPERTS)]
            codes, scales, values = (torch.stack(each) for each in zip(*parts, strict=True))
            if inputs_first:
                codes, scales, values = (each.transpose(1, 2) for each in (codes, scales, values))
            stored |= {
                f"{stem}{block}.experts.{name}": codes,
                f"{stem}{block}.experts.{name}{suffix}": scales.bfloat16(),
            }
            floats[f"{stem}{block}.experts.{name}"] = values.bfloat16()
    both = {name: value.bfloat16() for name, value in both.items()}
    checkpoint = _write(folder / "checkpoint", {**config, "quantization_config": quantization}, both | stored)
    return checkpoint, _write(folder / "twin", config, both | floats)


def median_error(result: Run, reference: Run) -> float:
    """The relative error of the median position: a token that is routed elsewhere moves its own position only."""

    def norms(values: np.ndarray) -> np.ndarray:
        return np.linalg.norm(values, axis=1)

    return float(np.median(norms(result.logprobs - reference.logprobs) / norms(reference.logprobs)))


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_its_float_twin(case: str, tmp_path: Path) -> None:
    checkpoint, twin = write(case, tmp_path)
    reference = run(twin, plugin=False, skip_tokenizer_init=True)
    result = run(checkpoint, skip_tokenizer_init=True)
    assert result.methods["W8A8DynamicExperts"] == 2
    assert 0.0005 < median_error(result, reference) <= 0.06
