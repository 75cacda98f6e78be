# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform with the NPU operators emulated."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["NpuEmulationPlatform"]

logger = init_logger("vllm.npu_quant.platform")

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


class NpuEmulationPlatform(CpuPlatform):
    """The CPU platform of a host without an NPU: the same layers run, on reference implementations of torch_npu's operators.

    It stays a CPU platform in every respect that vLLM asks for. ``supported_quantization`` stays empty, which admits every
    method: a list would refuse all names that are not in it.
    """

    #: Asked by tools that say whether a number came from an NPU.
    npu_operators_emulated = True

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        # Idempotent: vLLM calls it again in the engine process.
        cls._bind_threads(vllm_config.parallel_config.tensor_parallel_size)
        super().check_and_update_config(vllm_config)

    @classmethod
    def _bind_threads(cls, workers: int) -> None:
        """Leave threads unbound where vLLM's automatic binding would find fewer NUMA nodes than workers, and die."""
        if workers <= 1 or os.environ.get(_BIND):
            return
        nodes = _numa_nodes()
        if workers > nodes:
            os.environ[_BIND] = "nobind"
            logger.info(
                "%s=nobind: %d workers share %d NUMA node(s), and vLLM's automatic binding wants one node each",
                _BIND,
                workers,
                nodes,
            )


def _numa_nodes() -> int:
    folder = "/sys/devices/system/node"
    try:
        names = os.listdir(folder)
    except OSError:
        return 1
    return max(1, sum(name.startswith("node") and name[4:].isdigit() for name in names))
