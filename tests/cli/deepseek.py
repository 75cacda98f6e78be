# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of DeepSeek-R1's size, of which only the headers are written."""

from __future__ import annotations

import json
import struct
from pathlib import Path

__all__ = ["write_deepseek"]


def write_deepseek(folder: Path) -> Path:
    """61 layers, 256 experts, 136,000 tensors in 160 files; the data are holes."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    description: dict[str, str] = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": "0"}
    description["group_size"] = 0  # type: ignore[assignment]

    def linear(name: str, outputs: int, inputs: int) -> None:
        for suffix, dtype, shape in (
            ("weight", "I8", [outputs, inputs]),
            ("weight_scale", "BF16", [outputs, 1]),
            ("weight_offset", "BF16", [outputs, 1]),
        ):
            tensors[f"{name}.{suffix}"] = (dtype, shape)
            description[f"{name}.{suffix}"] = "W8A8_DYNAMIC"

    def plain(name: str, *shape: int) -> None:
        tensors[name] = ("BF16", list(shape))
        description[name] = "FLOAT"

    plain("model.embed_tokens.weight", 129280, 7168)
    plain("lm_head.weight", 129280, 7168)
    plain("model.norm.weight", 7168)
    for number in range(61):
        layer = f"model.layers.{number}"
        plain(f"{layer}.input_layernorm.weight", 7168)
        plain(f"{layer}.post_attention_layernorm.weight", 7168)
        linear(f"{layer}.self_attn.q_a_proj", 1536, 7168)
        linear(f"{layer}.self_attn.q_b_proj", 24576, 1536)
        linear(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        plain(f"{layer}.self_attn.kv_b_proj.weight", 32768, 512)
        linear(f"{layer}.self_attn.o_proj", 7168, 16384)
        if number < 3:
            for name, outputs, inputs in (("gate", 18432, 7168), ("up", 18432, 7168), ("down", 7168, 18432)):
                linear(f"{layer}.mlp.{name}_proj", outputs, inputs)
            continue
        plain(f"{layer}.mlp.gate.weight", 256, 7168)
        for expert in (*(f"experts.{i}" for i in range(256)), "shared_experts"):
            linear(f"{layer}.mlp.{expert}.gate_proj", 2048, 7168)
            linear(f"{layer}.mlp.{expert}.up_proj", 2048, 7168)
            linear(f"{layer}.mlp.{expert}.down_proj", 7168, 2048)
    names, files = list(tensors), 160
    size = {"I8": 1, "BF16": 2}
    weight_map = {}
    for number in range(files):
        file = f"quant_model_weights-{number + 1:05d}-of-{files:05d}.safetensors"
        header, end = {}, 0
        for name in names[number * len(names) // files : (number + 1) * len(names) // files]:
            dtype, shape = tensors[name]
            count = size[dtype]
            for length in shape:
                count *= length
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
            end += count
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    config = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "hidden_size": 7168}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config |= {"num_experts_per_tok": 8, "max_position_embeddings": 163840, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
