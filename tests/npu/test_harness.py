# SPDX-License-Identifier: Apache-2.0
"""The harness of test_chip.py over the emulation: it accepts what is right and reports what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.npu import chip
from vllm_npu_quant import emulation

emulation.register()
CPU = torch.device("cpu")
METHODS = chip.undocumented_first()[::12]
OPERATORS = chip.OPERATOR_CASES[::8]


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.id)
def test_operators_are_accepted(case: chip.OperatorCase) -> None:
    assert chip.check_operator(case, CPU) == []


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.title)
def test_methods_are_accepted(case: chip.MethodCase) -> None:
    assert chip.check_method(case, CPU) == []


def is_cast(operator: str) -> bool:
    return "format" in operator


class WrongDevice(TorchDispatchMode):
    """A device whose operators give something else; casts of memory formats, which cases need for their inputs, are right."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "npu" or is_cast(func._schema.name):
            return result
        return tree_map_only(torch.Tensor, wrong, result)


def wrong(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return torch.where(torch.isfinite(tensor), tensor * 1.25 + 1, tensor)
    return tensor + 3


def writes(case: chip.OperatorCase) -> bool:
    """Whether the device writes anything of the outputs."""
    return all(np.any(expected.written) for expected in chip.oracle(case))


@pytest.mark.parametrize(
    "case", [case for case in OPERATORS if writes(case) and not is_cast(case.operator)], ids=lambda case: case.id
)
def test_wrong_operators_are_reported(case: chip.OperatorCase) -> None:
    with WrongDevice():
        assert chip.check_operator(case, CPU) != []


def test_wrong_methods_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    case = METHODS[0]
    right, device = chip.run_method(case, CPU), torch.device("meta")
    monkeypatch.setattr(chip, "run_method", lambda case, where: right * 1.1 if where == device else right)
    assert chip.check_method(case, CPU) == []
    assert chip.check_method(case, device) != []


def test_what_the_device_may_do_otherwise() -> None:
    wanted = chip.Expected(np.array([[1, 2], [3, 4]]), "int8", written=np.array([[True], [False]]))
    assert chip.differs("npu_dynamic_quant", chip.Array(np.array([[2, 1], [9, 9]]), "int8"), wanted) == ""
    assert chip.differs("npu_dynamic_quant", chip.Array(np.array([[3, 1], [9, 9]]), "int8"), wanted) != ""
    assert chip.differs("npu_quant_matmul", chip.Array(np.array([[2, 2], [3, 4]]), "int8"), wanted) != ""


def test_without_an_npu_the_reason_is_told() -> None:
    device, reason = chip.find_npu()
    assert device is not None or "torch_npu" in reason
