# SPDX-License-Identifier: Apache-2.0
"""Writes the pages of docs/ that are made from the source; a test compares them.

python docs/generate.py
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

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
        "All problems of a checkpoint are in one error, which is raised before any weight is read. At most 20 findings of",
        "one kind are printed; the rest are counted.",
        "",
    ]
    for code, text in CODES.items():
        lines += [f"## {code}", "", text, ""]
    return "\n".join(lines)


def _run(*arguments: str) -> tuple[str, int]:
    """What a command prints, and its exit code."""
    before = Path.cwd()
    os.chdir(DOCS.parent)  # so that paths in the screens are short and the same everywhere
    try:
        result = CliRunner().invoke(app, list(arguments))
    finally:
        os.chdir(before)
    return result.output, result.exit_code


def _screen(*arguments: str) -> list[str]:
    """A command and what it prints, with its exit code where that is not 0."""
    output, exit_code = _run(*arguments)
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    code = [f"(exit code {exit_code})"] if exit_code else []
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


def _code(file: str, name: str) -> list[str]:
    """The source of a top-level class, function or constant of a file."""
    text = (DOCS.parent / file).read_text()
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if name in (getattr(node, "name", None), *(target.id for target in targets if isinstance(target, ast.Name))):
            return ["```python", f"# {file}", *text.splitlines()[node.lineno - 1 : node.end_lineno], "```"]
    raise LookupError(f"{file} has no {name}")


def extending_page() -> str:
    """docs/extending.md: docs/extending.in.md with its code filled in."""
    lines = []
    for line in (DOCS / "extending.in.md").read_text().splitlines():
        if line.startswith("<!-- code: "):
            lines += _code(*line.removeprefix("<!-- code: ").removesuffix(" -->").split())
        else:
            lines.append(line)
    return "\n".join([*lines, ""])


#: What the fields of --json are told from. The last two are recorded, since they start an engine.
JSON_SAMPLES: dict[str, tuple[tuple[str, ...], ...]] = {
    "inspect": (("inspect", "tests/fixtures/msmodelslim-qwen3moe-w8a8-dynamic", "--layers"),),
    "check": (("check", "tests/fixtures/ct-qwen3-w8a8-dynamic", "--tp", "3", "--device", "310p"),),
    "plan": (
        ("plan", "tests/fixtures/ct-qwen3-w4a16-g128-asym", "--device", "a2", "--layers"),
        ("plan", "tests/fixtures/ct-qwen3-w8a8-dynamic", "--device", "310p", "--max-model-len", "1000000000"),
    ),
    "matrix": (("matrix",),),
    "compare": (),
    "run": (),
}
#: Objects whose keys are names: of files, schemes, layer kinds, chips.
JSON_MAPS = frozenset({"ignored", "roofline[].others", "layers[].others", "rows[].methods", "rows[].chips"})


def json_fields(value: object, path: str = "") -> dict[str, set[str]]:
    """Every field below a JSON value, "schemes[].layers", with the types it has."""
    found: dict[str, set[str]] = {}
    if isinstance(value, dict) and path not in JSON_MAPS:
        items = [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
        kind = "object"
    elif isinstance(value, dict):
        items, kind = [(f"{path}.*", item) for item in value.values()], "object"
    elif isinstance(value, list):
        items, kind = [(f"{path}[]", item) for item in value], "array"
    else:
        items = []
        names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
        kind = names[type(value)]
    if path:
        found[path] = {kind}
    for name, item in items:
        for field, kinds in json_fields(item, name).items():
            found.setdefault(field, set()).update(kinds)
    return found


def json_samples(command: str) -> list[dict[str, Any]]:
    """What a command prints with --json."""
    if not JSON_SAMPLES[command]:
        return [json.loads((DOCS / "screens" / f"{command}.json").read_text())]
    return [json.loads(_run(*arguments, "--json")[0]) for arguments in JSON_SAMPLES[command]]


def json_page() -> str:
    """docs/cli_json.md: the fields of every command's JSON object."""
    from vllm_npu_quant.cli.data import VERSION

    lines = [
        "# What --json prints",
        "",
        "<!-- Made by docs/generate.py from what the commands print. -->",
        "",
        f"One object for each command. `version` is {VERSION}: while it stays, fields are only added, and none changes its",
        "meaning or type. `[]` stands for the elements of an array, `*` for a name that is data. Sizes are in bytes, times",
        "in seconds. The attributes of the classes that `vllm_npu_quant.inspect` and the others return have the same names,",
        "and their docstrings say what they mean (`nbytes` there is `bytes` here).",
        "",
        "A command that cannot answer prints `error` (true) and `findings` instead, and exits with 1 or 2.",
        "",
    ]
    for command in JSON_SAMPLES:
        fields: dict[str, set[str]] = {}
        for sample in json_samples(command):
            for name, kinds in json_fields(sample).items():
                fields.setdefault(name, set()).update(kinds)
        lines += [f"## {command}", "", "| field | type |", "|---|---|"]
        for name, kinds in fields.items():
            if "number" in kinds:
                kinds.discard("integer")
            lines.append(f"| `{name}` | {' or '.join(sorted(kinds, key=lambda kind: (kind == 'null', kind)))} |")
        lines.append("")
    return "\n".join(lines)


def support_matrix_page() -> str:
    """docs/support_matrix.md: what ``vllm-npu-quant matrix`` prints."""
    return matrix_markdown(matrix())


def compatibility_page() -> str:
    """docs/compatibility.md: what ``make doors`` recorded in docs/compatibility.json."""
    record = json.loads((DOCS / "compatibility.json").read_text())
    titles = list(dict.fromkeys(title for entry in record.values() for title in entry["checks"]))
    lines = [
        "# Versions of vLLM",
        "",
        "<!-- Made by docs/generate.py from compatibility.json, which make doors writes. -->",
        "",
        "What was run with each version, on a CPU with the operators emulated, and how many tests passed. Where *engine*",
        "says run, vLLM's CPU build of that version generated text, and its log-probabilities were compared with those of",
        "the dequantized float model. Where it says built, its compiled extension does not load beside the torch that the",
        "tests use (0.23 wants torch 2.11), or there is no CPU build of it (0.33: the Python files of the CUDA build):",
        "layers and whole models are built, loaded by that version's own loaders and computed, without attention. Nothing",
        "was run on an NPU.",
        "",
        "| | " + " | ".join(record) + " |",
        "|---|" + "---|" * len(record),
        "| engine | " + " | ".join("run" if entry["engine"] else "built" for entry in record.values()) + " |",
        "| date | " + " | ".join(entry["date"] for entry in record.values()) + " |",
    ]
    for title in titles:
        lines.append(f"| {title} | " + " | ".join(_counted(entry, title) for entry in record.values()) + " |")
    lines += ["", "A dash: not run. `make doors` runs all of it again; `make doors VERSION=0.31.0` one version.", ""]
    return "\n".join(lines)


def _counted(entry: dict[str, dict[str, dict[str, int]]], title: str) -> str:
    """A check's counts as a cell: "13", "12, 1 failed", or a dash."""
    counts = entry["checks"].get(title)
    if counts is None:
        return "-"
    rest = [f"{counts[kind]} {kind}" for kind in ("failed", "skipped") if counts[kind]]
    return ", ".join([str(counts["passed"]), *rest])


PAGES = {
    "errors.md": errors_page,
    "support_matrix.md": support_matrix_page,
    "cli.md": cli_page,
    "cli_json.md": json_page,
    "compatibility.md": compatibility_page,
    "extending.md": extending_page,
}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
