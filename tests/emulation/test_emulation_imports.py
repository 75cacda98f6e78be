# SPDX-License-Identifier: Apache-2.0
"""Which module of the emulation may import which."""

from __future__ import annotations

from graphlib import TopologicalSorter

from tests.test_imports import imports, modules
from vllm_npu_quant import emulation

ROOM = {name: path for name, path in modules().items() if name.partition(".")[0] == "emulation"}
#: What the modules about operators are made of.
SHARED = {"emulation.checks", "emulation.numerics"}


def imported(name: str) -> set[str]:
    """The modules of the room that a module imports, in functions too; packages come first whoever asks."""
    prefix = "vllm_npu_quant."
    found = {other.removeprefix(prefix) for other, _, _ in imports(ROOM[name]) if other.startswith(prefix)}
    return {other for other in found & ROOM.keys() if ROOM[other].name != "__init__.py"}


def test_there_is_no_import_circle() -> None:
    graph = {name: imported(name) for name in ROOM}
    assert graph["emulation.calls"] >= {"emulation.native"}
    TopologicalSorter(graph).prepare()


def test_rules_know_no_arithmetic_and_references_no_fast_kernels() -> None:
    kinds = {"rules": ("rules",), "reference": ("rules", "reference"), "fast": ("rules", "reference", "fast")}
    native = {"emulation.native", "emulation.calls"}
    for name in ROOM:
        kind = name.split(".")[1] if name.count(".") == 2 else ""
        if kind:
            allowed = SHARED | (native if kind == "fast" else set())
            assert {other.split(".")[1] for other in imported(name) - allowed} <= set(kinds[kind]), name


def test_the_modules_of_an_operator_have_its_name() -> None:
    for name, operator in emulation.OPERATORS.items():
        rules, reference = operator.arguments.__module__, operator.compute.__module__
        assert rules.rpartition(".")[2] == reference.rpartition(".")[2], name
        if operator.fast is not None:
            assert operator.fast.__module__.rpartition(".")[2] == reference.rpartition(".")[2], name
