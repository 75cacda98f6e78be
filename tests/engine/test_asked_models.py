# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of model classes that rename layers, build them without names, or reorder their rows while loading.

Each is loaded by vLLM's own loader; each quantized layer must give what the same layer of its float twin gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.rewritten import Quantized, awq, float_model, gptq, modelslim_int8, packed, write
from tests.e2e.twins import Tensors, read_tensors
from tests.engine.moe_layers import expected as expected_experts
from tests.engine.world import load_model
from vllm_npu_quant.errors import NpuQuantError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "num_shared_experts": 1}


@dataclass(frozen=True)
class Family:
    """A model class: its fields in config.json, and fragments of the names of the layers that are quantized."""

    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = PROJECTIONS


FAMILIES = {
    "llama4": Family(
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 512,
            "head_dim": 64,
            "interleave_moe_layer_step": 2,
            "attn_temperature_tuning": False,
        },
    ),
    "gpt-neox": Family("gpt_neox", parts=("query_key_value", "dense")),
    "gpt-bigcode": Family(
        "gpt_bigcode",
        {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_inner": 512, "n_positions": 512, "multi_query": True},
        ("c_attn", "c_proj", "c_fc"),
    ),
    "bloom": Family("bloom", {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True}, ("query_key_value", "dense")),
    "falcon": Family(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False},
        ("query_key_value", "dense"),
    ),
    "minicpm3": Family(
        "minicpm3",
        {
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "num_key_value_heads": 4,
            "dim_model_base": 256,
            "scale_emb": 1,
            "scale_depth": 1.0,
        },
        ("_proj",),
    ),
    "exaone-moe": Family(
        "exaone_moe",
        {
            **TINY_MOE,
            "first_k_dense_replace": 1,
            "is_moe_layer": [False, True],
            "n_group": 1,
            "topk_group": 1,
            "sliding_window_pattern": "LG",
            "layer_types": ["full_attention", "full_attention"],
            "head_dim": 64,
        },
    ),
    "afmoe": Family(
        "afmoe",
        {
            **TINY_MOE,
            "num_dense_layers": 1,
            "head_dim": 64,
            "n_group": 1,
            "topk_group": 1,
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 1.0,
        },
    ),
    "minimax-m2": Family(
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 64,
            "rotary_dim": 32,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "qk_norm_type": "per_layer",
        },
        ("_proj", "w1", "w2", "w3"),
    ),
    "falcon-h1": Family(
        "falcon_h1",
        {
            "mamba_d_ssm": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "head_dim": 64,
        },
        ("self_attn.", "feed_forward."),
    ),
    "qwen3": Family("qwen3", {"head_dim": 64}),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": Family("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, ("_proj",)),
    "gemma4": Family(
        "gemma4_text",
        {
            "head_dim": 64,
            "global_head_dim": 64,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": False,
        },
    ),
}


def static(weight: torch.Tensor) -> Quantized:
    """ModelSlim's W8A8 with an offset of the activations, whose effect is in quant_bias."""
    scale, offset, step = weight.abs().amax(1) / 127, 10, 0.05
    values = torch.round(weight / scale[:, None])
    stored = {
        "weight": values.to(torch.int8),
        "input_scale": torch.tensor([step]),
        "input_offset": torch.tensor([float(offset)]),
        "deq_scale": scale * step,
        "quant_bias": (-offset * values.sum(1)).to(torch.int32),
    }
    return Quantized(stored, values * scale[:, None])


Config = Callable[[list[str]], dict[str, Any]]


def described(scheme: str, *lasts: str) -> Config:
    return lambda layers: {"version": "1.0.0"} | {f"{layer}.{last}": scheme for layer in layers for last in lasts}


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32, "strategy": "group", "dynamic": False}
#: Format -> the quantizer of a layer, the quantization config for the layers it takes, and the largest relative error.
FORMATS: dict[str, tuple[Callable[[torch.Tensor], Quantized], Config, float]] = {
    "gptq": (
        partial(gptq, group=64, sym=False),
        lambda layers: {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False},
        0.006,
    ),
    "awq": (
        partial(awq, group=64),
        lambda layers: {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        0.006,
    ),
    "compressed-tensors": (
        partial(packed, group=32),
        lambda layers: {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
            "ignore": ["lm_head"],
        },
        0.006,
    ),
    "modelslim": (modelslim_int8, described("W8A8_DYNAMIC", "weight", "weight_scale", "weight_offset"), 0.02),
    "modelslim-static": (
        static,
        described("W8A8", "weight", "input_scale", "input_offset", "deq_scale", "quant_bias"),
        0.03,
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float model of a family. vLLM's Transformers backend changes the classes that make it, so it is made once."""
    return cache(
        lambda name: float_model(tmp_path_factory.mktemp("source"), FAMILIES[name].model, **FAMILIES[name].fields)
    )


def written(source: Path, out: Path, parts: tuple[str, ...], name: str) -> tuple[Path, Path]:
    """A checkpoint of a float model in a format, and its float twin."""
    quantizer, config, _ = FORMATS[name]
    layers = [
        tensor.removesuffix(".weight")
        for tensor, value in read_tensors(source).items()
        if any(part in tensor for part in parts) and value.dim() == 2
    ]
    return write(out, dict.fromkeys(parts, quantizer), config(layers), source=source)


def inputs(columns: int) -> torch.Tensor:
    return torch.randn(9, columns, generator=torch.Generator().manual_seed(7)).bfloat16()


def outputs(
    folder: Path, floats: Tensors | None = None, names: Collection[str] = (), **options: Any
) -> dict[str, torch.Tensor]:
    """The outputs of the quantized Linear layers of a loaded model, and of the layers of these names.

    Args:
        floats: the twin's tensors, with which experts are compared right away; they have an empty output.
    """
    from vllm_npu_quant.engine.linear import NpuQuantLinearMethod
    from vllm_npu_quant.engine.moe import NpuQuantMoEMethod

    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for name, layer in load_model(folder, **options).named_modules():
            method = vars(layer).get("quant_method")
            if isinstance(method, NpuQuantMoEMethod):
                assert floats is not None
                assert experts_error(layer, method, floats) < 0.03, name
                found[name] = torch.empty(0)
            elif isinstance(method, NpuQuantLinearMethod) or name in names:
                found[name] = method.apply(layer, inputs(layer.input_size), getattr(layer, "bias", None)).float()
    return found


def experts_error(layer: Any, method: Any, floats: Tensors) -> float:
    entry, prefix = method.resolved.entry, method.resolved.layer
    renamed = {
        f"experts.{number}.{usual}.weight": floats[f"{prefix}.{number}.{name}.weight"]
        for number in range(entry.count)
        for usual, name in zip(("gate_proj", "up_proj", "down_proj"), entry.names, strict=True)
    }
    x = inputs(layer.hidden_size)
    weights, ids = torch.rand(x.shape[0], entry.count, generator=torch.Generator().manual_seed(8)).topk(2)
    y = method.apply(layer=layer, x=x, topk_weights=weights, topk_ids=ids.to(torch.int32)).double().numpy()
    wanted = expected_experts(renamed, "experts", x, weights, ids)
    return float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))


def check(checkpoint: Path, twin: Path, limit: float, **options: Any) -> int:
    """Compare each quantized layer of a checkpoint with its twin's. Returns their number."""
    ours = outputs(checkpoint, read_tensors(twin), **options)
    linears = {name: y for name, y in ours.items() if y.numel()}
    theirs = outputs(twin, names=linears, **options)
    errors = {name: float((y - theirs[name]).norm() / theirs[name].norm()) for name, y in linears.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= limit, (worst, errors[worst])
    return len(ours)


#: Family and format -> the number of quantized layers of vLLM's model.
CASES = {
    ("llama4", "gptq"): 8,
    ("llama4", "awq"): 8,
    ("llama4", "compressed-tensors"): 8,
    ("llama4", "modelslim-static"): 8,
    ("gpt-neox", "gptq"): 8,
    ("gpt-neox", "modelslim"): 8,
    ("gpt-bigcode", "awq"): 8,
    ("bloom", "gptq"): 8,
    ("bloom", "modelslim"): 8,
    ("falcon", "awq"): 8,
    ("minicpm3", "gptq"): 14,
    ("minicpm3", "modelslim"): 14,
    ("exaone-moe", "gptq"): 9,
    ("afmoe", "modelslim"): 11,
    ("minimax-m2", "gptq"): 6,
    ("falcon-h1", "gptq"): 8,
    ("granite-moe", "gptq"): 4,
    ("gemma4", "compressed-tensors"): 8,
}
#: The others run with --all-ranks.
DEFAULT = (
    ("llama4", "gptq"),
    ("llama4", "modelslim-static"),
    ("gpt-neox", "gptq"),
    ("bloom", "gptq"),
    ("minicpm3", "gptq"),
    ("afmoe", "modelslim"),
    ("minimax-m2", "gptq"),
    ("granite-moe", "gptq"),
    ("gemma4", "compressed-tensors"),
)


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*case, id="-".join(case), marks=() if case in DEFAULT else pytest.mark.variant) for case in CASES],
)
def test_every_layer_is_its_float_twin(family: str, name: str, source: Any, tmp_path: Path) -> None:
    checkpoint, twin = written(source(family), tmp_path, FAMILIES[family].parts, name)
    assert check(checkpoint, twin, FORMATS[name][2]) == CASES[family, name]


def test_names_without_the_prefix_of_the_model(source: Any, tmp_path: Path) -> None:
    """Qwen3-Embedding: layers.0 instead of model.layers.0, and no head, which vLLM builds and leaves out."""
    checkpoint, twin = written(source("qwen3"), tmp_path, PROJECTIONS, "gptq")
    for folder in (checkpoint, twin):
        tensors = {
            name.removeprefix("model."): value for name, value in read_tensors(folder).items() if "lm_head" not in name
        }
        save_file(tensors, folder / "model.safetensors")
    assert check(checkpoint, twin, 0.006, runner="pooling") == 8


def test_a_quantized_router_is_refused_before_loading(source: Any, tmp_path: Path) -> None:
    """vLLM's model classes give routers no quantization, and its loaders would copy the integers as they are."""
    checkpoint, _ = written(source("olmoe"), tmp_path, ("mlp.gate",), "modelslim")
    with pytest.raises(NpuQuantError) as error:
        load_model(checkpoint)
    (finding,) = error.value.findings
    assert (finding.code, finding.layer) == ("unsupported-scheme", "model.layers.0.mlp.gate")
    assert "(2 layers)" in finding.message


def test_a_load_without_weights_knows_the_layers_too(source: Any, tmp_path: Path) -> None:
    checkpoint, _ = written(source("minicpm3"), tmp_path, FAMILIES["minicpm3"].parts, "modelslim")
    assert len(outputs(checkpoint, load_format="dummy")) == 14


def test_a_layer_that_no_weight_fills(source: Any, tmp_path: Path) -> None:
    """The names of all that are missing, as they are in vLLM's model, where the class gave none."""
    checkpoint, _ = written(source("minicpm3"), tmp_path, FAMILIES["minicpm3"].parts, "gptq")
    tensors = {name: value for name, value in read_tensors(checkpoint).items() if ".o_proj." not in name}
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(NpuQuantError) as error:
        load_model(checkpoint)
    assert [(finding.code, finding.layer) for finding in error.value.findings] == [
        ("undescribed-layer", f"model.layers.{number}.self_attn.o_proj") for number in (0, 1)
    ]
