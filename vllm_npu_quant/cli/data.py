# SPDX-License-Identifier: Apache-2.0
"""The JSON objects of ``--json``: one per command, with its name and a version.

Within a version, fields are only added; a field that is removed or changes its meaning increments the version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from vllm_npu_quant._version import __version__
from vllm_npu_quant.serving import dispatch

if TYPE_CHECKING:
    from vllm_npu_quant.inspection.checks import CheckReport
    from vllm_npu_quant.inspection.host import Doctor
    from vllm_npu_quant.inspection.layers import Layer
    from vllm_npu_quant.inspection.overview import Overview
    from vllm_npu_quant.inspection.planning import Plan
    from vllm_npu_quant.inspection.support_matrix import MatrixRow

__all__ = ["VERSION", "check_data", "doctor_data", "inspect_data", "matrix_data", "plain", "plan_data", "wrapped"]

#: Version of the JSON objects.
VERSION = 1


def wrapped(command: str, data: dict[str, Any]) -> dict[str, Any]:
    """Add the fields that all objects have."""
    return {"schema": f"vllm-npu-quant/{command}", "version": VERSION, "tool_version": __version__, **data}


def plain(value: Any) -> Any:
    """Convert a value to JSON types: dataclasses to objects, enums to their values, tuples to arrays."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    return value


def inspect_data(overview: Overview, *, layers: bool) -> dict[str, Any]:
    """The object of ``inspect``; ``layers`` includes every layer."""
    data = {
        "model": overview.model,
        "architecture": overview.architecture,
        "dtype": overview.dtype,
        "format": overview.format,
        "decided_by": overview.decided_by,
        "producer": overview.producer,
        "files": overview.files,
        "bytes": overview.nbytes,
        "tensors": overview.tensors,
        "ignored": dict(overview.ignored),
        "errors": overview.errors,
        "warnings": overview.warnings,
        "schemes": [
            {("bytes" if key == "nbytes" else key): value for key, value in plain(scheme).items()}
            for scheme in overview.schemes
        ],
    }
    if layers:
        data["layers"] = [layer_data(layer) for layer in overview.layers]
    return wrapped("inspect", data)


def layer_data(layer: Layer) -> dict[str, Any]:
    """The object of one layer of ``inspect``."""
    return {
        "name": layer.name,
        "kind": layer.kind,
        "count": layer.count,
        "scheme": layer.scheme,
        "spec": dispatch.describe(layer.spec, layer.stored).partition(": ")[2],
        "method": layer.method,
        "operators": list(layer.operators),
        "outputs": layer.outputs,
        "inputs": layer.inputs,
        "bytes": layer.nbytes,
        "reason": layer.reason,
    }


def check_data(report: CheckReport, *, strict: bool) -> dict[str, Any]:
    """The object of ``check``."""
    return wrapped(
        "check",
        {
            "model": report.model,
            "format": report.format,
            "readable": report.readable,
            "values": report.values,
            "strict": strict,
            "passed": report.passed(strict=strict),
            "findings": plain(report.findings),
        },
    )


def doctor_data(host: Doctor) -> dict[str, Any]:
    """The object of ``doctor``."""
    data = plain(host)
    data["environment"] = dict(host.environment)
    data["device"]["pci"] = dict(host.device.pci)
    return wrapped("doctor", {**data, "passed": host.passed})


def plan_data(plan: Plan, *, layers: bool) -> dict[str, Any]:
    """The object of ``plan``; ``layers`` includes the roofline of every layer."""
    data = plain(plan)
    for line in (*data["roofline"], *data["layers"]):
        line["bytes"] = line.pop("nbytes")
    if not layers:
        del data["layers"]
    return wrapped("plan", data)


def matrix_data(rows: Sequence[MatrixRow]) -> dict[str, Any]:
    """The object of ``matrix``."""
    return wrapped("matrix", {"rows": plain(rows)})
