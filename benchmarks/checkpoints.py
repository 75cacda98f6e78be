# SPDX-License-Identifier: Apache-2.0
"""Runs checkpoint folders through the engine, and writes what became of each to docs/checkpoints.md.

A checkpoint either runs, and its prompt log-probabilities are compared with those of its float twin (every quantized Linear
replaced by its dequantized weight, run without the plugin in the same dtype), or is refused with a reason. An error above the
limit of the checkpoint's schemes ends the command with the status 1.

    python benchmarks/checkpoints.py [FOLDER ...] [--two-ranks] [--again] [--write]

Without folders: tests/fixtures, and ../shared/checkpoints where it is there. Results are kept in build/checkpoints, so that
the command can be interrupted and goes on where it stopped; ``--again`` forgets those of the folders it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# DeepSeek's tiny model has a head size that vLLM's CPU kernel for MLA does not take.
os.environ.setdefault("VLLM_MLA_DISABLE", "1")

from tests.e2e.routing import MOST_CHANGED, Choices, changed_share, median_error, routers  # noqa: E402
from tests.e2e.simulation import simulated_int4_activations  # noqa: E402
from tests.e2e.twins import make_twin  # noqa: E402
from tests.e2e.yardstick import Run, relative_error, run  # noqa: E402
from tests.fixtures_index import fixtures, shared_checkpoints  # noqa: E402
from vllm_npu_quant.errors import NpuQuantError  # noqa: E402
from vllm_npu_quant.serving.dispatch import ROWS  # noqa: E402

KEPT = ROOT / "build" / "checkpoints"

#: The largest error of int4 activations, as a multiple of what a float simulation of the same scheme has.
SIMULATION_MARGIN = 1.1

HEAD = """# Checkpoints that were run

<!-- Made by benchmarks/checkpoints.py from a run on a CPU with emulated operators. -->

Each row is a small checkpoint that a real producer wrote. `error` is the relative error of its centred full-vocabulary
prompt log-probabilities against its dequantized float twin in vLLM's engine; bfloat16 alone differs by about 0.01.
`two ranks` is the same with `tensor_parallel_size=2`. The models have random weights: the columns show that the arithmetic
is right, not what a scheme costs in accuracy. No number here comes from an NPU.

The random routers of the mixtures of experts are often nearly undecided, and the last bit then chooses another expert: on
one rank the twin's choices are replayed (`rerouted` is the share of tokens that would have gone elsewhere; at most 8 %), on
two ranks, each a process of its own, the median over the positions is compared; `EP` is with `enable_expert_parallel`.

`limit` is what the test suite allows: 0.02 where only weights are quantized; 0.06 for int8 activations with scales from the
input; 0.12 with scales from calibration; for int4 activations 1.1 times the error of a float simulation of the same scheme.
Where schemes are mixed, the largest counts.

"""


def reason(error: BaseException) -> str:
    """The first finding of a refusal, or the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NpuQuantError):
            finding = cause.findings[0]
            return f"refused, {finding.code}: {finding.message}"
        cause = cause.__cause__ or cause.__context__
    return f"FAILS, {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def limit_of(method: str) -> float | None:
    """The largest error that a method class may have; None for int4 activations, which are compared with a simulation."""
    row = next(row for row in ROWS if row.method_name == method)
    if row.act is None:
        return 0.02
    if row.act == 4:
        return None
    return 0.06 if row.act_dynamic else 0.12


class Examination:
    """One folder's row of the table, and what is needed to go on with it."""

    def __init__(self, folder: Path, *, again: bool) -> None:
        self.folder = folder
        self.file = KEPT / f"{folder.name}.json"
        self.twin_file = KEPT / f"{folder.name}.npy"
        self.row: dict[str, Any] = {"name": folder.name}
        if self.file.is_file() and not again:
            kept = self.file.read_text()
            self.row = self.row if "FAILS" in kept else json.loads(kept)

    def go_on(self, *, two_ranks: bool) -> None:
        """Run what the row lacks."""
        if "result" not in self.row and "error" not in self.row:
            try:
                self._one_rank()
            except Exception as error:
                self.row["result"] = reason(error)
        if two_ranks and "error" in self.row and "two_ranks" not in self.row:
            try:
                self.row["two_ranks"] = self._two_ranks()
            except Exception as error:
                self.row["two_ranks"] = reason(error)
        self.file.write_text(json.dumps(self.row))

    def _one_rank(self) -> None:
        result = run(self.folder)  # first, because a checkpoint that is refused has no twin
        with tempfile.TemporaryDirectory() as scratch, routers() as choices:
            twin = run(make_twin(self.folder, Path(scratch) / "twin"), plugin=False)
        if choices:
            result, changed = self._routed_as(choices)
            self.row["rerouted"] = round(changed, 3)
        np.save(self.twin_file, twin.logprobs)
        quantized = [group for group in result.groups if group.scheme != "FLOAT"]
        schemes: dict[str, int] = {}
        for group in quantized:
            text = f"{group.scheme} as {group.method}"
            schemes[text] = schemes.get(text, 0) + group.count
        self.row["methods"] = ", ".join(f"{count} x {text}" for text, count in schemes.items())
        self.row["error"] = round(relative_error(result, twin), 4)
        limits = [limit_of(method) for group in quantized for method in set(group.method.split(" + "))]
        stated = [limit for limit in limits if limit is not None]
        if len(stated) < len(limits):
            with simulated_int4_activations():
                simulated = relative_error(self._routed_as(choices)[0], twin)
            stated.append(SIMULATION_MARGIN * simulated)
        self.row["limit"] = round(max(stated), 4)

    def _routed_as(self, choices: Choices) -> tuple[Run, float]:
        """A run of the checkpoint, with the twin's choice of experts where it has experts, and the share it changed."""
        with routers(choices) as chosen:
            result = run(self.folder)
        return result, changed_share(chosen, choices) if choices else 0.0

    def _two_ranks(self) -> str:
        """The error on two ranks; of experts also with whole experts on each."""
        twin = Run(np.load(self.twin_file), [], [])
        if "rerouted" not in self.row:
            return str(round(relative_error(run(self.folder, tensor_parallel_size=2), twin), 4))
        # vLLM's float DeepSeek-V3 without MLA gives other numbers on two ranks than on one.
        if "dsv3" in self.folder.name:
            with tempfile.TemporaryDirectory() as scratch:
                twin = run(make_twin(self.folder, Path(scratch) / "twin"), plugin=False, tensor_parallel_size=2)
        errors = [
            round(median_error(run(self.folder, tensor_parallel_size=2, enable_expert_parallel=split), twin), 4)
            for split in (False, True)
        ]
        return f"{errors[0]}, EP {errors[1]}"

    @property
    def fails(self) -> bool:
        limit, text = self.row.get("limit", 0.0), self.row.get("two_ranks", "")
        measured = [] if text.startswith("refused") else re.findall(r"\d+\.\d+", text)
        numbers = [self.row.get("error", 0.0), *map(float, measured)]
        return "FAILS" in json.dumps(self.row) or max(numbers) > limit or self.row.get("rerouted", 0.0) > MOST_CHANGED


def table(rows: list[dict[str, Any]]) -> str:
    """The rows that ran, then those that were refused."""
    lines = ["| checkpoint | layers | limit | error | two ranks |", "|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            error = f"{row['error']}, rerouted {row['rerouted']:.1%}" if "rerouted" in row else row["error"]
            cells = (row["name"], row["methods"], row["limit"], error, row.get("two_ranks", "not run"))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Refused", "", "| checkpoint | reason |", "|---|---|"]
    lines += [f"| {row['name']} | {row['result'].removeprefix('refused, ')} |" for row in rows if "result" in row]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--two-ranks", action="store_true", help="also with tensor_parallel_size=2")
    parser.add_argument("--again", action="store_true", help="run again what was run before")
    parser.add_argument("--write", action="store_true", help="write docs/checkpoints.md from all that was run")
    arguments = parser.parse_args()
    found = arguments.folders or [*fixtures(), *shared_checkpoints()]
    folders = {path.name: path for path in found if "source" not in path.name and path.parent.name != "source"}
    KEPT.mkdir(parents=True, exist_ok=True)
    failing = []
    for name in folders:
        start = time.perf_counter()
        one = Examination(folders[name], again=arguments.again)
        one.go_on(two_ranks=arguments.two_ranks)
        failing += [name] * one.fails
        print(f"{time.perf_counter() - start:6.1f} s  {json.dumps(one.row)}", flush=True)
    if arguments.write:
        rows = [json.loads(file.read_text()) for file in sorted(KEPT.glob("*.json"))]
        (ROOT / "docs" / "checkpoints.md").write_text(HEAD + table(rows))
    if failing:
        sys.exit(f"beyond their limits: {', '.join(failing)}")


if __name__ == "__main__":
    main()
