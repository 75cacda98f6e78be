# SPDX-License-Identifier: Apache-2.0
"""Real vLLM layers and models without an engine: a world of one rank, and the config that layers ask for."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

__all__ = ["engine_config", "load_model", "world"]


@contextmanager
def world(config: Any, *, rank: int = 0, size: int = 1, store: str | None = None) -> Iterator[None]:
    """A process group of one rank, and ``config`` as vLLM's current one.

    With more ranks, each in a process of its own, ``store`` is the path of a file that they share.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(config):
        init_distributed_environment(size, rank, f"file://{store or scratch + '/store'}", 0, "gloo")
        initialize_model_parallel(size, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()
            gc.collect()


def engine_config(folder: Path, **options: Any) -> Any:
    """The engine's config of a checkpoint, with its quantization read and its headers checked."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(str(folder), enforce_eager=True, max_model_len=256, **options).create_engine_config()


def load_model(folder: Path, **options: Any) -> nn.Module:
    """A checkpoint's model, built and loaded by vLLM's own loader."""
    from vllm.model_executor.model_loader import get_model

    config = engine_config(folder, **options)
    # The loader empties an accelerator's cache; vLLM's CPU worker makes that call do nothing.
    with world(config), mock.patch.object(torch.accelerator, "empty_cache"):
        return get_model(vllm_config=config)
