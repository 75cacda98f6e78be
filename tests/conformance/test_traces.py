# SPDX-License-Identifier: Apache-2.0
"""What every method asks of torch_npu: as recorded, within the documents, and accepted by the real Meta kernels."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import pytest

from tests.conformance import rules, traces
from tests.conformance.method_cases import CASES, LINEAR_CASES, MOE_CASES, Case, load_object
from tests.conformance.mutations import MUTATIONS
from tests.conformance.rules import UNDOCUMENTED
from tests.conformance.traces import Trace
from tests.npu import chip
from vllm_npu_quant.methods.moe import operators_of
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.spec import LayerKind

TITLES = [case.title for case in CASES]
REWRITE = "read the difference; if it is meant, write the files anew with: python -m tests.conformance.traces"


def test_every_row_of_the_dispatch_table_is_recorded() -> None:
    assert len(set(TITLES)) == len(TITLES)
    linear = {case.row for case in LINEAR_CASES}
    experts = {row for case in MOE_CASES for row in case.rows}
    assert linear == {row for row in dispatch.ROWS if LayerKind.LINEAR in row.kinds}
    assert experts == {row for row in dispatch.ROWS if LayerKind.FUSED_MOE in row.kinds}


@pytest.mark.parametrize("name", sorted({traces.file_of(case) for case in CASES}))
def test_traces_are_the_stored_ones(name: str, made: dict[str, Trace]) -> None:
    assert traces.texts(made.values())[name] == traces.stored().get(name), REWRITE


def test_no_file_is_left_over() -> None:
    assert set(traces.stored()) == {traces.file_of(case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=TITLES)
def test_calls_keep_to_the_documents(case: Case, made: dict[str, Trace]) -> None:
    trace = made[case.title]
    assert [text for call in trace.calls for text in rules.check(call).broken] == []
    assert trace.problems == []


def test_undocumented_uses_are_the_known_ones(made: dict[str, Trace]) -> None:
    found = {entry for trace in made.values() for call in trace.calls for entry in rules.check(call).undocumented}
    assert found == set(UNDOCUMENTED)


def test_a_chip_runs_them_first(made: dict[str, Trace]) -> None:
    """The on-chip tests begin with the experts that have offsets per group; all other undocumented uses follow soon."""
    uses = [
        {entry for call in made[case.title].calls for entry in rules.check(call).undocumented}
        for case in chip.undocumented_first()
    ]
    offsets = ["offsets per group" in found for found in uses]
    assert offsets == sorted(offsets, reverse=True)
    assert not any(uses[len(uses) * 2 // 3 :])


def in_order(trace: Trace) -> tuple[str, ...]:
    """The operators of a forward pass; several calls in a row are one."""
    return tuple(name for name, _ in groupby(call.operator for call in trace.at_forward))


def test_the_dispatch_table_names_the_operators(made: dict[str, Trace]) -> None:
    """What documents and the command line say a layer runs is what it runs."""
    for row in dict.fromkeys(case.row for case in LINEAR_CASES):
        found = {in_order(made[case.title]) for case in LINEAR_CASES if case.row == row}
        assert row.operators in found, row.name
    for case in MOE_CASES:
        methods = [load_object(row.method)("") for row in case.rows]
        named = tuple(name for name, _ in groupby(operators_of(*methods)))
        assert in_order(made[case.title]) == named, case.title


@pytest.mark.wheel
@pytest.mark.parametrize("name", sorted({traces.file_of(case) for case in CASES}))
def test_the_real_torch_npu_gives_the_stored_traces(name: str, report: dict[str, Any]) -> None:
    assert report["traces"].get(name) == traces.stored()[name], REWRITE


@pytest.mark.wheel
@pytest.mark.parametrize("title", TITLES)
def test_it_runs_on_the_device_npu_under_the_real_meta_kernels(title: str, report: dict[str, Any]) -> None:
    """No tensor on the CPU, no number read, nothing that depends on the number of tokens, no operator that would fall back
    to the CPU, no view of a weight in FRACTAL_NZ; and the fake kernels of our own operators agree with their parts."""
    assert report["problems"][title] == []


@pytest.mark.wheel
@pytest.mark.parametrize("title", TITLES)
def test_the_older_torch_npu_takes_the_same_calls(title: str, report: dict[str, Any]) -> None:
    assert report["older"][title] == []


@pytest.mark.wheel
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_broken_on_purpose_is_reported(name: str, report: dict[str, Any]) -> None:
    assert re.search(MUTATIONS[name].said, "\n".join(report["broken"][name])), report["broken"][name]


@pytest.mark.wheel
def test_meta_kernels_do_not_refuse_inputs_without_rows(report: dict[str, Any]) -> None:
    """The documents do ("no empty tensors"), so that no call may rely on the Meta kernels for it."""
    assert set(report["no_rows"].values()) == {""}
