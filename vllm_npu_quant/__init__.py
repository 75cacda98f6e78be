# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints on Huawei Ascend NPUs with vLLM, and the same arithmetic on a CPU.

Neither this package nor the functions ``inspect``, ``check``, ``plan``, ``matrix`` and ``doctor`` import torch or vllm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_npu_quant._version import __version__

if TYPE_CHECKING:
    from vllm_npu_quant.errors import Finding, NpuQuantError, Severity
    from vllm_npu_quant.inspection import (
        CheckReport,
        Doctor,
        MatrixRow,
        Overview,
        Plan,
        check,
        doctor,
        inspect,
        matrix,
        plan,
    )

__all__ = [
    "CheckReport",
    "Doctor",
    "Finding",
    "MatrixRow",
    "NpuQuantError",
    "Overview",
    "Plan",
    "Severity",
    "__version__",
    "check",
    "doctor",
    "inspect",
    "matrix",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "errors" if name in ("Finding", "NpuQuantError", "Severity") else "inspection"
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
