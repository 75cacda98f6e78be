# SPDX-License-Identifier: Apache-2.0
"""vLLM's config classes by the names of their formats."""

from __future__ import annotations

from vllm_npu_quant.engine.config import NpuQuantConfig, config_class
from vllm_npu_quant.formats.declaration import require_format

__all__ = ["config_of_format"]


def config_of_format(name: str) -> type[NpuQuantConfig]:
    """The config class of a format ("awq")."""
    return config_class(require_format(name, ""))
