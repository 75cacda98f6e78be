# SPDX-License-Identifier: Apache-2.0
"""Docstrings and comments of the package are plain technical English, as far as a search can tell."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vllm_npu_quant"
PYTHON = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
NATIVE = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.c*") if path.suffix in (".c", ".cpp"))

#: Idioms that are no technical terms.
BANNED = re.compile(
    r"\b(strangers?|of no account|says? nothing|something to say|(is|are) as good|as good as|is all there is|all there are"
    r"|nobody|anybody|everybody|of its own accord|another thing|without a word|by halves|goes without saying)\b",
    re.IGNORECASE,
)
#: First words of docstrings that are clauses or questions, not an imperative or a noun phrase. "Whether" is for predicates.
CLAUSES = frozenset({"What", "Where", "Which", "How", "Who", "When", "Why", "Do", "Does"})


def docstrings(source: str) -> list[tuple[int, str]]:
    """The docstrings of a Python source, each with the line that it begins on."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, text))
    return found


def comments(source: str) -> list[tuple[int, str]]:
    """The comments of a Python source; comments on successive lines are one, because a phrase may span them."""
    found: list[tuple[int, str]] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#: ")
            if token.start[0] == last + 1:
                found[-1] = (found[-1][0], f"{found[-1][1]} {text}")
            else:
                found.append((token.start[0], text))
            last = token.start[0]
    return found


def idioms(texts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The banned phrases in texts, each with the line that its text begins on."""
    return [(line, match[0]) for line, text in texts for match in BANNED.finditer(" ".join(text.split()))]


def clauses(texts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The docstrings that begin with a clause or a question."""
    words = [(line, re.match(r"\w*", text)) for line, text in texts]
    return [(line, word[0]) for line, word in words if word is not None and word[0] in CLAUSES]


@pytest.mark.parametrize("name", PYTHON)
def test_python_is_plain_english(name: str) -> None:
    source = (PACKAGE / name).read_text(encoding="utf-8")
    assert not idioms(docstrings(source) + comments(source))
    assert not clauses(docstrings(source))


@pytest.mark.parametrize("name", NATIVE)
def test_native_code_is_plain_english(name: str) -> None:
    lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
    assert not idioms([(number, line.partition("//")[2]) for number, line in enumerate(lines, 1)])


def test_the_search_finds_idioms() -> None:
    source = '''"""What this is."""

# its scale is of no
# account
SILENT = "says nothing"  # a text for users


class Plain:
    """A noun phrase."""

    def odd(self):
        """Whether it holds. Row 0 is
        anybody's."""  # a list is as good
'''
    assert clauses(docstrings(source)) == [(1, "What")]
    assert idioms(docstrings(source)) == [(12, "anybody")]
    assert idioms(comments(source)) == [(3, "of no account"), (13, "is as good")]
    assert len(NATIVE) == 2
    assert len(PYTHON) > 80
