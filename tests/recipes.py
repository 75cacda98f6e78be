# SPDX-License-Identifier: Apache-2.0
"""The headers of checkpoints as large as the ones in docs/ascend.md; their data are holes in the files.

Sizes are those of the models' published config.json; tensors and dtypes are the producers' (tests/fixtures has small ones).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

__all__ = ["RECIPES", "write"]

_BYTES = {"I8": 1, "BF16": 2, "F16": 2, "I32": 4, "F32": 4, "I64": 8}

#: A Linear layer's tensors: (name, outputs, inputs) -> tensor name -> (dtype, shape).
Tensors = dict[str, tuple[str, list[int]]]
Writer = Callable[[str, int, int], Tensors]


def plain(name: str, outputs: int, inputs: int) -> Tensors:
    return {f"{name}.weight": ("BF16", [outputs, inputs])}


def int8(name: str, outputs: int, inputs: int) -> Tensors:
    """ModelSlim W8A8_DYNAMIC, and W4A4_DYNAMIC, which stores one integer per byte."""
    scale = ("F32", [outputs, 1])
    return {
        f"{name}.weight": ("I8", [outputs, inputs]),
        f"{name}.weight_scale": scale,
        f"{name}.weight_offset": scale,
    }


def w4a8(name: str, outputs: int, inputs: int) -> Tensors:
    rows = 16 if name.endswith("down_proj") else 1
    scale = ("F32", [outputs, 1])
    return {
        f"{name}.weight": ("I8", [outputs // 2, inputs]),
        f"{name}.weight_scale": scale,
        f"{name}.weight_offset": scale,
        f"{name}.scale_bias": ("F32", [outputs, rows]),
    }


def ct_int8(name: str, outputs: int, inputs: int) -> Tensors:
    return {f"{name}.weight": ("I8", [outputs, inputs]), f"{name}.weight_scale": ("BF16", [outputs, 1])}


def ct_int4(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", [outputs, inputs // 8]),
        f"{name}.weight_scale": ("BF16", [outputs, inputs // 32]),
        f"{name}.weight_shape": ("I32", [2]),
    }


def awq(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", [inputs, outputs // 8]),
        f"{name}.qzeros": ("I32", [inputs // 128, outputs // 8]),
        f"{name}.scales": ("F16", [inputs // 128, outputs]),
    }


def gptq(name: str, outputs: int, inputs: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", [inputs // 8, outputs]),
        f"{name}.qzeros": ("I32", [inputs // 128, outputs // 8]),
        f"{name}.scales": ("F16", [inputs // 128, outputs]),
        f"{name}.g_idx": ("I32", [inputs]),
    }


def attention(layer: str, config: dict[str, Any], linear: Writer) -> Tensors:
    """Grouped-query attention, or DeepSeek's latent attention, whose kv_b_proj stays float."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        rank, head = config["q_lora_rank"], config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        kv = config["kv_lora_rank"]
        return {
            **linear(f"{layer}.self_attn.q_a_proj", rank, hidden),
            **linear(f"{layer}.self_attn.q_b_proj", heads * head, rank),
            **linear(f"{layer}.self_attn.kv_a_proj_with_mqa", kv + config["qk_rope_head_dim"], hidden),
            **plain(f"{layer}.self_attn.kv_b_proj", heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), kv),
            **linear(f"{layer}.self_attn.o_proj", hidden, heads * config["v_head_dim"]),
        }
    head, kv_heads = config.get("head_dim", hidden // heads), config["num_key_value_heads"]
    return {
        **linear(f"{layer}.self_attn.q_proj", heads * head, hidden),
        **linear(f"{layer}.self_attn.k_proj", kv_heads * head, hidden),
        **linear(f"{layer}.self_attn.v_proj", kv_heads * head, hidden),
        **linear(f"{layer}.self_attn.o_proj", hidden, heads * head),
    }


def mlp(layer: str, hidden: int, inner: int, linear: Writer, down: Writer | None = None) -> Tensors:
    return {
        **linear(f"{layer}.gate_proj", inner, hidden),
        **linear(f"{layer}.up_proj", inner, hidden),
        **(down or linear)(f"{layer}.down_proj", hidden, inner),
    }


def model(config: dict[str, Any], linear: Writer, experts: Writer | None = None, **parts: Writer) -> Tensors:
    """All tensors of a model. ``experts``: of routed experts; ``shared``, ``dense``, ``gate_up``: where they differ."""
    hidden = config["hidden_size"]
    found = {
        **plain("model.embed_tokens", config["vocab_size"], hidden),
        **plain("lm_head", config["vocab_size"], hidden),
    }
    found["model.norm.weight"] = ("BF16", [hidden])
    count = config.get("num_experts") or config.get("n_routed_experts") or 0
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = ("BF16", [hidden])
        found |= attention(layer, config, linear)
        if not count or number < config.get("first_k_dense_replace", 0):
            dense = parts.get("dense", linear)
            found |= mlp(f"{layer}.mlp", hidden, config["intermediate_size"], parts.get("gate_up", dense), dense)
            continue
        assert experts is not None
        found |= plain(f"{layer}.mlp.gate", count, hidden)
        for expert in range(count):
            found |= mlp(f"{layer}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"], experts)
        if config.get("n_shared_experts"):
            found |= mlp(f"{layer}.mlp.shared_experts", hidden, config["moe_intermediate_size"], parts["shared"])
    return found


def write(name: str, folder: Path) -> Path:
    """Write the headers, config and description of one of RECIPES."""
    config, tensors, description = RECIPES[name]()
    folder.mkdir(parents=True)
    names, files = list(tensors), max(1, len(tensors) // 2000)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        header, end = {}, 0
        for tensor in names[number * len(names) // files : (number + 1) * len(names) // files]:
            dtype, shape = tensors[tensor]
            stop = end + _BYTES[dtype] * prod(shape)
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
            end, weight_map[tensor] = stop, file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    if description:
        (folder / "quant_model_description.json").write_text(json.dumps(description))
    return folder


_QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25600,
    "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
_QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
_LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip
_DEEPSEEK_R1 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "vocab_size": 129280, "max_position_embeddings": 163840,
}  # fmt: skip
_KIMI_K2 = {
    **_DEEPSEEK_R1, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
    "first_k_dense_replace": 1, "vocab_size": 163840, "max_position_embeddings": 262144,
}  # fmt: skip


def _described(tensors: Tensors, kinds: Callable[[str], str]) -> dict[str, Any]:
    """msModelSlim's description: ``kinds`` gives the type of a layer that has a weight_scale."""
    layers = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    found: dict[str, Any] = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": 0, "optional": {}}
    for name in tensors:
        layer = name.rpartition(".")[0]
        found[name] = kinds(layer) if layer in layers else "FLOAT"
    return found


def _ct(bits: int, targets: list[str], ignore: list[str], **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **more.pop("weights")}
    group = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None, **more}
    kind = "pack-quantized" if bits == 4 else "int-quantized"
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None,
    }  # fmt: skip


def _awq_32b() -> Any:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return {**_QWEN3_32B, "quantization_config": quantization}, model(_QWEN3_32B, awq), None


def _gptq_30b() -> Any:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    config = {**_QWEN3_30B_A3B, "quantization_config": quantization | {"dynamic": {r"-:.*mlp\.gate$": {}}}}
    return config, model(_QWEN3_30B_A3B, gptq, gptq), None


def _llama() -> Any:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    quantization = _ct(8, ["Linear"], ["lm_head"], weights={"strategy": "channel"}, input_activations=inputs)
    return {**_LLAMA_8B, "quantization_config": quantization}, model(_LLAMA_8B, ct_int8), None


def _kimi() -> Any:
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    weights = {"strategy": "group", "group_size": 32}
    quantization = _ct(4, ["Linear"], [*ignore, r"re:.*mlp\.gate$"], weights=weights)
    tensors = model(_KIMI_K2, plain, ct_int4, shared=plain, dense=plain)
    return {**_KIMI_K2, "quantization_config": quantization}, tensors, None


def _deepseek() -> Any:
    tensors = model(_DEEPSEEK_R1, int8, w4a8, shared=int8)
    return (
        _DEEPSEEK_R1,
        tensors,
        _described(tensors, lambda layer: "W4A8_DYNAMIC" if ".experts." in layer else "W8A8_DYNAMIC"),
    )


def _laos() -> Any:
    tensors = model(_QWEN3_32B, int8)
    return (
        _QWEN3_32B,
        tensors,
        _described(
            tensors, lambda layer: "W4A4_DYNAMIC" if layer.endswith(("gate_proj", "up_proj")) else "W8A8_DYNAMIC"
        ),
    )


#: The models of docs/ascend.md -> (config.json, tensors, description).
RECIPES: dict[str, Callable[[], Any]] = {
    "Qwen3-32B AWQ": _awq_32b,
    "Qwen3-30B-A3B GPTQ-Int4": _gptq_30b,
    "Kimi-K2-Thinking W4A16": _kimi,
    "DeepSeek-R1 W4A8": _deepseek,
    "Qwen3-32B W4A4 LAOS": _laos,
    "Llama-3.1-8B W8A8": _llama,
}
