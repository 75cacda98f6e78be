# SPDX-License-Identifier: Apache-2.0
"""docs/ascend.md: its commands have flags that exist, and its numbers are what ``plan`` says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.recipes import RECIPES, write
from vllm_npu_quant import check, plan
from vllm_npu_quant.cli.app import app
from vllm_npu_quant.inspection.chips import CHIPS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "ascend.md").read_text()


def commands(page: str = PAGE) -> list[list[str]]:
    """The words of every command of the page's shell blocks, without variables before and pipes behind it."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.split(r" 2>| >| \|", line)[0])
            while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", words[0]):
                words.pop(0)
            found.append(words)
    return found


def of(*program: str) -> list[list[str]]:
    return [words[len(program) :] for words in commands() if words[: len(program)] == list(program)]


def test_the_page_has_the_commands_that_are_checked_here() -> None:
    known = {"vllm", "vllm-npu-quant", "lm_eval", "pip", "python"}
    assert {words[0] for words in commands()} == known
    assert len(of("vllm", "serve")) == 6


@pytest.mark.parametrize("words", of("vllm", "serve"), ids=lambda words: words[0])
def test_flags_of_vllm_serve(words: list[str]) -> None:
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    found = parser.parse_args(words)
    assert found.model_tag == words[0]
    assert found.max_model_len == 32768
    given = {word for word in words if word.startswith("--")}
    # argparse takes a unique beginning for the whole name; a recipe says the whole name.
    assert given <= {name for action in parser._actions for name in action.option_strings}


def test_parsers_exist() -> None:
    """Names of parsers are plain strings to argparse."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for words in of("vllm", "serve"):
        for flag, manager in (
            ("--reasoning-parser", ReasoningParserManager),
            ("--tool-call-parser", ToolParserManager),
        ):
            if flag in words:
                assert words[words.index(flag) + 1] in manager.list_registered()


@pytest.mark.parametrize("words", of("vllm-npu-quant"), ids=" ".join)
def test_our_own_commands(words: list[str]) -> None:
    import typer.main

    group = typer.main.get_command(app)
    context = group.make_context("vllm-npu-quant", list(words))  # a usage error for a flag that does not exist
    group.commands[words[0]].make_context(words[0], list(words[1:]), parent=context)


def table() -> list[list[str]]:
    part = PAGE.partition("<!-- plan: ")[2].partition("<!-- end of plan -->")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ][2:]


@pytest.mark.parametrize("name", RECIPES)
def test_plan(name: str, tmp_path: Path) -> None:
    """Every row of the table, and the files pass ``check``, so that they are read as what they stand for."""
    folder = write(name, tmp_path / "model")
    rows = [row for row in table() if row[0] == name]
    for row in rows:
        ranks = dict(part.split() for part in row[2].split(", "))
        tp, ep = int(ranks["TP"]), int(ranks.get("EP", 1))
        made = plan(folder, device=row[1], tp=tp, ep=ep, max_model_len=32768)
        wanted = [f"{made.stored_bytes / 2**30:.1f}", f"{made.weight_bytes / 2**30:.1f}", f"{made.tokens:,}"]
        assert row[3:] == [*wanted, str(made.smallest_tp)]
        assert made.fits
        assert row[1] in CHIPS
    report = check(folder, tp=2)
    assert report.passed(), report.findings[0].render()
    assert report.format


def test_every_planned_model_has_a_recipe() -> None:
    headings = set(re.findall(r"^### (.+)$", PAGE, re.MULTILINE))
    for row in table():
        assert any(row[0].startswith(heading.split()[0]) for heading in headings), row[0]
