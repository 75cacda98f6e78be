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
    """vLLM's CPU platform for hosts without an NPU; quantized layers call emulated torch_npu operators.

    It does not change vLLM's CPU platform. ``supported_quantization`` stays empty, which allows every method; a list would
    exclude all methods that are not in it.
    """

    #: Read by tools that report whether a result came from an NPU.
    npu_operators_emulated = True

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        # Called again in the engine process, so it must be idempotent.
        cls._bind_threads(vllm_config.parallel_config.tensor_parallel_size)
        super().check_and_update_config(vllm_config)

    @classmethod
    def _bind_threads(cls, workers: int) -> None:
        """Disable thread binding if there are fewer NUMA nodes than workers: vLLM's automatic binding would fail."""
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
