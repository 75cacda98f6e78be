# SPDX-License-Identifier: Apache-2.0
"""Writes the pages of docs/ that are made from the source; a test compares them.

python docs/generate.py
"""

from __future__ import annotations

import os
from pathlib import Path

from typer.testing import CliRunner

from vllm_npu_quant.cli.app import app
from vllm_npu_quant.cli.render import matrix_markdown
from vllm_npu_quant.errors import CODES
from vllm_npu_quant.inspection import matrix

DOCS = Path(__file__).resolve().parent


def errors_page() -> str:
    """docs/errors.md: one paragraph for every error code."""
    lines = [
        "# Error codes",
        "",
        "<!-- Made by docs/generate.py from vllm_npu_quant/errors.py; edit there. -->",
        "",
        "Every error names its code, the layer, the file, what was expected and found, the nearest names, and what to do:",
        "",
        "```",
        "error[missing-tensor]: model.layers.3.mlp.up_proj: no weight file holds weight_scale, which W8A8_DYNAMIC needs",
        "  file     quant_model_description.json",
        "  expected model.layers.3.mlp.up_proj.weight_scale F32 or BF16 or F16 [N, G]",
        "  found    no such tensor; nearest: model.layers.3.mlp.up_proj.weight_scale_inv",
        "  fix      download the checkpoint again, or re-export it",
        "```",
        "",
        "All problems of a checkpoint come in one error, before any weight is read. Of one kind, the first 20 are shown in",
        "full and the rest is counted.",
        "",
    ]
    for code, text in CODES.items():
        lines += [f"## {code}", "", text, ""]
    return "\n".join(lines)


def _screen(*arguments: str) -> list[str]:
    """A command and what it prints, with its exit code where that is not 0."""
    before = Path.cwd()
    os.chdir(DOCS.parent)  # so that paths in the screens are short and the same everywhere
    try:
        result = CliRunner().invoke(app, list(arguments))
    finally:
        os.chdir(before)
    lines = [line.rstrip() for line in result.output.rstrip().splitlines()]
    code = [f"(exit code {result.exit_code})"] if result.exit_code else []
    return ["```console", "$ vllm-npu-quant " + " ".join(arguments), *lines, *code, "```"]


def _recorded(name: str) -> list[str]:
    """A screen of docs/screens: of commands that start an engine."""
    return ["```console", *(DOCS / "screens" / name).read_text().rstrip().splitlines(), "```"]


def cli_page() -> str:
    """docs/cli.md: docs/cli.in.md with its screens filled in."""
    lines = []
    for line in (DOCS / "cli.in.md").read_text().splitlines():
        if line.startswith("<!-- screen: "):
            lines += _screen(*line.removeprefix("<!-- screen: ").removesuffix(" -->").split())
        elif line.startswith("<!-- recorded: "):
            lines += _recorded(line.removeprefix("<!-- recorded: ").removesuffix(" -->"))
        else:
            lines.append(line)
    return "\n".join([*lines, ""])


def support_matrix_page() -> str:
    """docs/support_matrix.md: what ``vllm-npu-quant matrix`` prints."""
    return matrix_markdown(matrix())


PAGES = {"errors.md": errors_page, "support_matrix.md": support_matrix_page, "cli.md": cli_page}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
