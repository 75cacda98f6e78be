# SPDX-License-Identifier: Apache-2.0
"""What one rank of vLLM really holds of a checkpoint: a process that builds, loads and prepares models, and prints bytes.

    python -m tests.cli.rank_memory RANK SIZE EXPERTS STORE FOLDER...

One line of JSON for each folder: module -> bytes of its parameters, after preparation, and the KV cache's bytes per token.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def held(model: Any) -> dict[str, int]:
    """Module -> bytes of its own parameters and of the buffers that a state_dict would hold, each storage once.

    On some hosts vLLM packs a float weight, for oneDNN or for latent attention, and empties the parameter: these bytes count
    as before.
    """
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and not weight.numel():
            names = ("output_size_per_partition", "num_embeddings_per_partition", "output_size")
            outputs = next(getattr(module, size) for size in names if hasattr(module, size))
            names = ("input_size_per_partition", "embedding_dim", "input_size")
            inputs = next(getattr(module, size) for size in names if hasattr(module, size))
            found[name] = outputs * inputs * getattr(module, "params_dtype", weight.dtype).itemsize
        buffers = {key: t for key, t in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for tensor in (*module._parameters.values(), *buffers.values()):
            if tensor is None or not tensor.numel() or tensor.untyped_storage().data_ptr() in seen:
                continue
            seen.add(tensor.untyped_storage().data_ptr())
            # vLLM's own scales of a quantized KV cache, which are there for every attention layer.
            if not name.endswith(("attn", "_attn")):
                found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
    return found


def kv_bytes(config: Any) -> float:
    """Bytes per token of all layers' pages, as vLLM's own cache specs of this rank say."""
    layers = config.compilation_config.static_forward_context.values()
    specs = [layer.get_kv_cache_spec(config) for layer in layers if hasattr(layer, "get_kv_cache_spec")]
    return sum(spec.page_size_bytes / spec.block_size for spec in specs if spec is not None)


def main(rank: int, size: int, experts: int, store: str, folders: list[str]) -> None:
    import torch
    from vllm.model_executor.model_loader import get_model

    from tests.engine.world import engine_config, world

    for number, folder in enumerate(folders):
        config = engine_config(Path(folder), tensor_parallel_size=size, enable_expert_parallel=experts > 1)
        with (
            world(config, rank=rank, size=size, store=f"{store}-{number}"),
            mock.patch.object(torch.accelerator, "empty_cache"),
        ):
            model = get_model(vllm_config=config)
            print("HELD " + json.dumps([held(model), kv_bytes(config)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
