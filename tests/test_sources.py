# SPDX-License-Identifier: Apache-2.0
"""What the sources of the package may not have, whatever they do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vllm_npu_quant"
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

#: Handlers of every exception: an entry point whose errors would stop vLLM for everybody, the command line's last resort, and
#: the code of any model class that runs on weights without values, which must never be what stops a load.
LAST_RESORTS = {("plugin.py", "register"), ("cli/app.py", "_engine_output"), ("engine/ask.py", "_hand")}
#: Exceptions that hide others: too broad to expect.
BROAD = frozenset(
    {"Exception", "BaseException", "AssertionError", "IndexError", "KeyError", "AttributeError", "TypeError"}
)
#: Rooms that call vLLM's and torch's functions, where RuntimeError is what every kernel raises, out of memory included.
CALLERS = ("engine/", "layouts/", "methods/", "platform.py")


def functions(source: str) -> list[tuple[str, ast.AST]]:
    """Every node of a source file, with the name of the function that holds it."""
    found: list[tuple[str, ast.AST]] = []

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else name
            found.append((inner, child))
            walk(child, inner)

    walk(ast.parse((PACKAGE / source).read_text(encoding="utf-8")), "")
    return found


def caught(handler: ast.ExceptHandler) -> set[str]:
    """The names of the exceptions that a handler catches; Exception for a bare one."""
    if handler.type is None:
        return {"Exception"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind).rpartition(".")[2] for kind in kinds}


@pytest.mark.parametrize("source", SOURCES)
def test_no_assert_guards_anything(source: str) -> None:
    """python -O takes them away."""
    assert not [node.lineno for _, node in functions(source) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("source", SOURCES)
def test_no_broad_except(source: str) -> None:
    found = []
    for name, node in functions(source):
        if isinstance(node, ast.ExceptHandler) and (source, name) not in LAST_RESORTS:
            forbidden = BROAD | ({"RuntimeError"} if source.startswith(CALLERS) else set())
            if source.startswith("emulation/"):
                forbidden -= {"AttributeError"}  # a library that lacks a symbol
            found += [(node.lineno, kind) for kind in caught(node) & forbidden]
    assert not found


def test_the_last_resorts_are_there() -> None:
    for source, name in LAST_RESORTS:
        handlers = [node for inner, node in functions(source) if inner == name and isinstance(node, ast.ExceptHandler)]
        assert any("Exception" in caught(handler) for handler in handlers), (source, name)
