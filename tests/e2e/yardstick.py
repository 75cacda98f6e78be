# SPDX-License-Identifier: Apache-2.0
"""The yardstick of all engine tests: full-vocabulary prompt log-probabilities of a checkpoint and of its float twin.

error = ||a - b|| / ||b|| over the log-probabilities of at least 110 positions of fixed token ids, after the mean of each
position was taken away. The noise of bfloat16 alone is about 0.01.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

__all__ = ["TOKENS", "Run", "engine", "measure", "relative_error", "run"]

#: Fixed token ids of the tiny models' byte-level vocabulary of 512: English text, like the text that static scales were
#: calibrated on. Ids drawn at random leave the calibrated range, and measure the clipping instead of the layers.
# fmt: off
TOKENS = [
    54, 74, 71, 223, 69, 67, 82, 75, 86, 67, 78, 223, 81, 72, 223, 40, 84, 67, 80, 69, 71, 223, 75, 85,
    223, 50, 67, 84, 75, 85, 16, 223, 35, 223, 83, 87, 67, 80, 86, 75, 92, 71, 70, 223, 78, 67, 91, 71,
    84, 223, 77, 71, 71, 82, 85, 223, 75, 86, 85, 223, 89, 71, 75, 73, 74, 86, 85, 223, 67, 85, 223, 85,
    79, 67, 78, 78, 223, 75, 80, 86, 71, 73, 71, 84, 85, 223, 67, 80, 70, 223, 67, 223, 85, 69, 67, 78,
    71, 14, 223, 67, 80, 70, 223, 86, 74, 71, 223, 82, 84, 81, 70, 87, 69, 86, 223, 81, 72, 223, 68, 81,
    86, 74, 223, 69, 81, 79, 71, 85,
]
# fmt: on


class Run:
    """What one engine run gave.

    Attributes:
        logprobs: float64 [positions, vocabulary], centred per position.
        generated: the token ids of a greedy continuation.
        groups: what the layers became.
        inspected: what the caller's ``inspect`` said of the model.
    """

    def __init__(self, logprobs: np.ndarray, generated: list[int], groups: list[Any], inspected: Any = None) -> None:
        self.logprobs = logprobs
        self.generated = generated
        self.groups = groups
        self.inspected = inspected

    @property
    def methods(self) -> dict[str, int]:
        """Method class -> number of layers."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.method] = counts.get(group.method, 0) + group.count
        return counts


@contextmanager
def engine(folder: Path, *, plugin: bool = True, **options: Any) -> Iterator[Any]:
    """A tiny model in the real engine, in this process (worker processes for tensor_parallel_size > 1)."""
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    _reset_distributed()  # an engine that was refused while it was built leaves its groups, and the next would take them

    load_general_plugins()  # with the plugin on: vLLM loads plugins once per process, and asks it at every checkpoint

    settings = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_logprobs": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "seed": 0,
        **options,
    }
    before = os.environ.get("VLLM_NPU_QUANT")
    os.environ["VLLM_NPU_QUANT"] = "auto" if plugin else "0"
    try:
        llm = LLM(model=str(folder), **settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            _reset_distributed()
    finally:
        if before is None:
            os.environ.pop("VLLM_NPU_QUANT", None)
        else:
            os.environ["VLLM_NPU_QUANT"] = before


def measure(llm: Any) -> Run:
    """The log-probabilities and the greedy continuation of a running engine."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=512, detokenize=False)
    output = llm.generate([{"prompt_token_ids": TOKENS}], sampling, use_tqdm=False)[0]
    rows = [[row[token].logprob for token in range(512)] for row in output.prompt_logprobs[1:] if row is not None]
    logprobs = np.array(rows, dtype=np.float64)
    assert logprobs.shape[0] >= 110
    return Run(logprobs - logprobs.mean(1, keepdims=True), list(output.outputs[0].token_ids), [])


def run(folder: Path, *, plugin: bool = True, inspect: Callable[[Any], Any] | None = None, **options: Any) -> Run:
    """Run a tiny model in the real engine once."""
    from vllm_npu_quant.engine import layer_summary

    with engine(folder, plugin=plugin, **options) as llm:
        measured = measure(llm)
        single = options.get("tensor_parallel_size", 1) == 1
        measured.groups = layer_summary(llm) if plugin and single else []
        measured.inspected = llm.apply_model(inspect)[0] if inspect is not None else None
        return measured


def _reset_distributed() -> None:
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    if torch.distributed.is_initialized():
        cleanup_dist_env_and_memory()


def relative_error(run: Run, reference: Run) -> float:
    return float(np.linalg.norm(run.logprobs - reference.logprobs) / np.linalg.norm(reference.logprobs))
