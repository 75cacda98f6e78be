# SPDX-License-Identifier: Apache-2.0
"""Operators and methods on an NPU: ``make chip``, or ``python -m pytest -m npu tests/npu``, on an Ascend host.

What the documents do not promise comes first. Without an NPU every test is skipped, with the reason; test_harness.py runs
the same functions over the emulation.
"""

from __future__ import annotations

import pytest
import torch

from tests.npu import chip

pytestmark = pytest.mark.npu


@pytest.fixture(scope="session")
def npu() -> torch.device:
    device, reason = chip.find_npu()
    if device is None:
        pytest.skip(reason)
    return device


@pytest.mark.parametrize("case", chip.undocumented_first(), ids=lambda case: case.title)
def test_method(case: chip.MethodCase, npu: torch.device) -> None:
    assert chip.check_method(case, npu) == []


@pytest.mark.parametrize("case", chip.OPERATOR_CASES, ids=lambda case: case.id)
def test_operator(case: chip.OperatorCase, npu: torch.device) -> None:
    assert chip.check_operator(case, npu) == []
