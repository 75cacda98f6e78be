# SPDX-License-Identifier: Apache-2.0
"""Runs checkpoint folders through the engine, and writes what became of each to docs/checkpoints.md.

A checkpoint either generates, and its prompt log-probabilities are compared with those of its float twin (every quantized
Linear replaced by its dequantized weight, run without the plugin in the same dtype), or is refused with a reason.

    python benchmarks/checkpoints.py [FOLDER ...] [--two-ranks] [--write]

Without folders: tests/fixtures, and ../shared/checkpoints where it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# DeepSeek's tiny model has a head size that vLLM's CPU kernel for MLA does not take.
os.environ.setdefault("VLLM_MLA_DISABLE", "1")

from tests.e2e.twins import make_twin  # noqa: E402
from tests.e2e.yardstick import relative_error, run  # noqa: E402
from tests.fixtures_index import fixtures, shared_checkpoints  # noqa: E402
from vllm_npu_quant.errors import NpuQuantError  # noqa: E402

HEAD = """# Checkpoints that were run

<!-- Made by benchmarks/checkpoints.py from a run on a CPU with emulated operators. -->

Each row is a small checkpoint that a real producer wrote. `error` is the relative error of its centred full-vocabulary
prompt log-probabilities against its dequantized float twin in vLLM's engine; bfloat16 alone differs by about 0.01. The
models have random weights: the column shows that the arithmetic is right, not what a scheme costs in accuracy. `two ranks`
is the same with tensor_parallel_size=2. No number here comes from an NPU.

"""


def reason(error: BaseException) -> str:
    """The first finding of a refusal, or the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NpuQuantError):
            finding = cause.findings[0]
            return f"refused, {finding.code}: {finding.message}"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def examine(folder: Path, *, two_ranks: bool) -> dict[str, object]:
    """Run one folder and its twin."""
    row: dict[str, object] = {"name": folder.name}
    try:
        result = run(folder)
    except Exception as error:
        return {**row, "result": reason(error)}
    row["methods"] = ", ".join(f"{name} x{count}" for name, count in result.methods.items())
    with tempfile.TemporaryDirectory() as scratch:
        reference = run(make_twin(folder, Path(scratch) / "twin"), plugin=False)
    row["error"] = round(relative_error(result, reference), 4)
    if two_ranks:
        try:
            row["two_ranks"] = round(relative_error(run(folder, tensor_parallel_size=2), reference), 4)
        except Exception as error:
            row["two_ranks"] = reason(error)
    return row


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| checkpoint | methods | error | two ranks |", "|---|---|---|---|"]
    for row in rows:
        methods, error = row.get("methods", row.get("result", "")), row.get("error", "-")
        lines.append(f"| {row['name']} | {methods} | {error} | {row.get('two_ranks', '-')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--two-ranks", action="store_true", help="also with tensor_parallel_size=2")
    parser.add_argument("--write", action="store_true", help="write docs/checkpoints.md")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = arguments.folders or [*shared_checkpoints(), *fixtures()]
    folders = {
        path.name: path for path in reversed(found) if "source" not in path.name and path.parent.name != "source"
    }
    rows = []
    for name in sorted(folders):
        start = time.perf_counter()
        rows.append(examine(folders[name], two_ranks=arguments.two_ranks))
        print(f"{time.perf_counter() - start:6.1f} s  {json.dumps(rows[-1])}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2))
    if arguments.write:
        (ROOT / "docs" / "checkpoints.md").write_text(HEAD + table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
