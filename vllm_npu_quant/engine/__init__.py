# SPDX-License-Identifier: Apache-2.0
"""The code that depends on vLLM's classes. Names are resolved lazily: spawned processes unpickle from here first."""

from __future__ import annotations

from typing import Any

__all__ = ["LayerGroup", "layer_summary"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from vllm_npu_quant.engine import summary

        return getattr(summary, name)
    raise AttributeError(name)
