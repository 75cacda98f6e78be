# SPDX-License-Identifier: Apache-2.0
"""Real vLLM MoE layers for one rank of a parallel run, without the other ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from tests.e2e.twins import read_tensors
from vllm_npu_quant import emulation
from vllm_npu_quant.engine.config import NpuQuantConfig, config_classes

emulation.register()

Tensors = dict[str, torch.Tensor]


def config_of(folder: Path) -> NpuQuantConfig:
    """The quantization config of a checkpoint, as vLLM makes it."""
    raw = json.loads((folder / "config.json").read_text()).get("quantization_config")
    chosen = next(config for config in config_classes() if raw is None or config.declaration.serves(raw))
    config = chosen.from_config(raw or {})
    config.maybe_update_config(str(folder), SimpleNamespace(tie_word_embeddings=False, num_hidden_layers=2))
    return config


def sizes_of(folder: Path) -> dict[str, int]:
    config = json.loads((folder / "config.json").read_text())
    return {
        "experts": next(
            config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config
        ),
        "hidden": config["hidden_size"],
        "inner": config["moe_intermediate_size"],
        "top_k": config["num_experts_per_tok"],
    }


def make_layer(
    config: NpuQuantConfig,
    prefix: str,
    *,
    experts: int,
    hidden: int,
    inner: int,
    top_k: int = 2,
    tp: tuple[int, int] = (1, 0),
    ep: tuple[int, int] | None = None,
    placement: str = "linear",
    dtype: torch.dtype = torch.bfloat16,
    change: Callable[[FusedMoEConfig], Any] | None = None,
    **options: Any,
) -> RoutedExperts:
    """The layer of one rank. ``tp``, ``ep``: size and rank; ``change``: a last word on vLLM's config of the layer."""
    size, rank = ep or (1, 0)
    parallel = FusedMoEParallelConfig(
        tp_size=tp[0],
        pcp_size=1,
        dp_size=1,
        ep_size=size,
        tp_rank=tp[1],
        pcp_rank=0,
        dp_rank=0,
        ep_rank=rank,
        sp_size=1,
        use_ep=ep is not None,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=top_k,
        global_num_experts=experts,
        num_redundant_experts=0,
        num_expert_group=2 if placement == "round_robin" else None,
        moe_parallel_config=parallel,
        placement_strategy=placement,
        enable_eplb=False,
    )
    moe = FusedMoEConfig(
        num_experts=experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size=inner,
        num_local_experts=manager.local_num_experts,
        num_logical_experts=experts,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=parallel,
        in_dtype=dtype,
    )
    if change is not None:
        change(moe)
    return RoutedExperts(prefix, dtype, moe, config, manager, **options)


def load(layer: RoutedExperts, tensors: Tensors) -> RoutedExperts:
    """Load the tensors of this layer (named as in the checkpoint) through vLLM's loader, and prepare it."""
    prefix = layer.layer_name + "."
    own = ((name.removeprefix(prefix), value) for name, value in tensors.items() if name.startswith(prefix))
    list(layer.load_weights(own))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer: RoutedExperts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return layer.forward_modular(x, weights, ids)


def expected(tensors: Tensors, prefix: str, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """What the layer computes with float weights, in float64."""

    def matrix(expert: int, name: str) -> np.ndarray:
        return tensors[f"{prefix}.{expert}.{name}_proj.weight"].to(torch.float64).numpy()

    out = np.zeros(x.shape)
    for t, token in enumerate(x.to(torch.float64).numpy()):
        for j, expert in enumerate(ids[t].tolist()):
            a, b = matrix(expert, "gate") @ token, matrix(expert, "up") @ token
            out[t] += float(weights[t, j]) * (matrix(expert, "down") @ (a / (1 + np.exp(-a)) * b))
    return out


def experts_prefix(tensors: Tensors) -> str:
    """The name of a checkpoint's first MoE layer."""
    return min(name.partition(".experts.")[0] for name in tensors if ".mlp.experts." in name) + ".experts"


__all__ = ["config_of", "expected", "experts_prefix", "load", "make_layer", "read_tensors", "run", "sizes_of"]
