# SPDX-License-Identifier: Apache-2.0
"""The emulation against the real torch_npu: its schemas, and its Meta kernels.

The wheel is downloaded with pip into a cache folder of its own (VLLM_NPU_QUANT_CACHE, else ~/.cache/vllm-npu-quant) and
never installed. With a C toolchain and a torch of the same minor version it is imported in a process of its own, over
stand-ins for CANN; otherwise the schemas come from a YAML file that the wheel ships.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from op_cases import CASES, Case

from tests.conformance.real_wheel import VERSION, schemas_in_yaml
from vllm_npu_quant import emulation

pytestmark = pytest.mark.wheel


@pytest.mark.parametrize("name", emulation.OPERATORS)
def test_schema_is_the_real_one(name: str, real_schemas: dict[str, str]) -> None:
    assert emulation.OPERATORS[name].schema == real_schemas[name]


def test_report_is_of_the_real_torch_npu(report: dict[str, Any]) -> None:
    assert report["version"].split("+")[0] == VERSION
    assert len(report["schemas"]) > 400


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_real_meta_kernel_agrees(case: Case, report: dict[str, Any]) -> None:
    problem = report["opcheck"][case.id]
    if case.meta_differs:
        assert re.search(case.meta_differs, problem), problem or "the Meta kernel takes it now: drop meta_differs"
    else:
        assert problem == ""


def test_operators_without_a_real_meta_kernel(report: dict[str, Any]) -> None:
    """Their shapes are checked against nothing but the documents."""
    assert report["faked"] == ["npu_format_cast"]


def test_yaml_file_agrees_with_the_registry(wheel: Path, report: dict[str, Any]) -> None:
    """So that the schemas can be trusted where the wheel cannot be imported."""
    stated = schemas_in_yaml(wheel)
    assert set(stated) == set(emulation.OPERATORS)
    assert {name: report["schemas"][name] for name in stated} == stated


def test_older_wheel_has_the_same_schemas(older_schemas: dict[str, str]) -> None:
    """That of the version which vllm-ascend pins."""
    assert older_schemas == {name: operator.schema for name, operator in emulation.OPERATORS.items()}
