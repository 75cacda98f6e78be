# SPDX-License-Identifier: Apache-2.0
"""Inspection of checkpoints and hosts without loading weights, as typed objects. Imports neither torch nor vllm.

``vllm_npu_quant.inspect`` and the other public functions return these objects; the command line renders them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_npu_quant.inspection.checks import CheckReport, check
    from vllm_npu_quant.inspection.host import Doctor, doctor
    from vllm_npu_quant.inspection.layers import Layer, Scheme
    from vllm_npu_quant.inspection.model import Model, open_model
    from vllm_npu_quant.inspection.overview import Overview, inspect
    from vllm_npu_quant.inspection.planning import Plan, plan
    from vllm_npu_quant.inspection.support_matrix import MatrixRow, matrix

__all__ = [
    "CheckReport",
    "Doctor",
    "Layer",
    "MatrixRow",
    "Model",
    "Overview",
    "Plan",
    "Scheme",
    "check",
    "doctor",
    "inspect",
    "matrix",
    "open_model",
    "plan",
]

#: Module of each name; imported on first use, so that a command imports only what it needs.
_HOMES = {
    "CheckReport": "checks",
    "Doctor": "host",
    "Layer": "layers",
    "MatrixRow": "support_matrix",
    "Model": "model",
    "Overview": "overview",
    "Plan": "planning",
    "Scheme": "layers",
    "check": "checks",
    "doctor": "host",
    "inspect": "overview",
    "matrix": "support_matrix",
    "open_model": "model",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)
