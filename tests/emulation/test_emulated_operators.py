# SPDX-License-Identifier: Apache-2.0
"""Every case of the table: against its oracle, against the other implementation, and against its fake kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import CASES, Case, check_operator
from oracles import ORACLES, Array, Expected, mismatch, ulp

from vllm_npu_quant import emulation

emulation.register()


def as_array(value: Any) -> Any:
    """Tensors to Array, dtypes to the codes that kernels receive."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if value.dtype.itemsize == 1 and value.dtype.is_floating_point:
            return Array(value.view(torch.uint8).numpy().astype(np.int64), name)
        exact = torch.float64 if value.dtype.is_floating_point else torch.int64
        return Array(value.to(exact).numpy(), name)
    if isinstance(value, torch.dtype):
        return CODES[value]
    if isinstance(value, (list, tuple)):
        return [as_array(item) for item in value]
    return value


CODES = {
    torch.int8: 1,
    torch.int32: 3,
    torch.float16: 5,
    torch.float32: 6,
    torch.qint8: 12,
    torch.quint8: 13,
    torch.qint32: 14,
    torch.bfloat16: 15,
    torch.quint4x2: 16,
    torch.float8_e5m2: 23,
    torch.float8_e4m3fn: 24,
}


def outputs(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def run(function: Any, case: Case) -> list[torch.Tensor]:
    args, kwargs = case.arguments()
    return outputs(function(*args, **kwargs))


def codes(case: Case) -> Case:
    """The case as a kernel sees it: dtypes as numbers."""

    def convert(value: Any) -> Any:
        return CODES[value] if isinstance(value, torch.dtype) else value

    args = tuple(convert(value) for value in case.args)
    kwargs = {key: convert(value) for key, value in case.kwargs.items()}
    return dataclasses.replace(case, args=args, kwargs=kwargs)


def oracle(case: Case) -> list[Expected]:
    kwargs = {key: as_array(value) for key, value in case.kwargs.items()}
    return ORACLES[case.operator](*(as_array(value) for value in case.args), **kwargs)


def assert_matches(actual: list[torch.Tensor], expected: list[Expected]) -> None:
    assert len(actual) == len(expected)
    for index, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        problem = mismatch(as_array(got), wanted)
        assert problem is None, f"output {index}: {problem}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_operator_agrees_with_oracle(case: Case) -> None:
    actual = run(case.overload, case)
    assert_matches(actual, oracle(case))
    assert all(tensor.is_contiguous() for tensor in actual)


FAST_CASES = [case for case in CASES if emulation.OPERATORS[case.operator].fast is not None]


@pytest.mark.parametrize("case", FAST_CASES, ids=lambda case: case.id)
def test_fast_and_reference_agree(case: Case) -> None:
    """Both are right; their integers are equal, and their floats differ by one rounding at most, on top of what the
    order of float32 sums may change."""
    operator = emulation.OPERATORS[case.operator]
    assert operator.fast is not None
    expected = oracle(case)
    case = codes(case)
    fast, reference = run(operator.fast, case), run(operator.reference, case)
    assert_matches(reference, expected)
    for got, wanted, bound in zip(fast, reference, expected, strict=True):
        if not got.dtype.is_floating_point:
            assert torch.equal(got, wanted)
            continue
        values = as_array(wanted).values
        slack = 0.5 * ulp(bound.dtype, np.nan_to_num(values)) + 2 * np.asarray(bound.slack)
        problem = mismatch(as_array(got), Expected(values, bound.dtype, slack))
        assert problem is None, problem


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fake_kernel_and_schema_agree_with_the_cpu_kernel(case: Case) -> None:
    check_operator(case)


def test_every_operator_has_cases() -> None:
    covered = {case.operator for case in CASES}
    assert covered == set(emulation.OPERATORS)
    assert len({case.id for case in CASES}) == len(CASES)
