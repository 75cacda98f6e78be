# SPDX-License-Identifier: Apache-2.0
"""How long inspect and check take: wall time of the command, start of the interpreter included, best of several runs.

    python benchmarks/commands.py [--runs 3] [FOLDER ...]

Without folders: tests/fixtures, ../shared/checkpoints where it is there, and the headers of a checkpoint of DeepSeek-R1's
size (136,000 tensors in 160 files). Targets: 0.7 s each, and 5 s for the large one. Run it on an idle machine.

Modules are compiled by the first run, as pip does when it installs them: a source tree with PYTHONDONTWRITEBYTECODE in the
environment takes 0.1 s more for every command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cli.deepseek import write_deepseek  # noqa: E402
from tests.fixtures_index import fixtures, shared_checkpoints  # noqa: E402

COMMANDS = (("inspect",), ("check",), ("check", "--tp", "2", "--device", "a2"))


def measure(folder: Path, command: tuple[str, ...], runs: int, environment: dict[str, str]) -> tuple[float, float]:
    """Best wall time in seconds, and the largest peak of memory in MB."""
    best, memory = float("inf"), 0.0
    for _ in range(runs):
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_npu_quant", command[0], str(folder), *command[1:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        _, _, usage = os.wait4(process.pid, 0)
        best, memory = min(best, time.perf_counter() - started), max(memory, usage.ru_maxrss / 1000)
    return best, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    folders = arguments.folders or list({path.name: path for path in (*shared_checkpoints(), *fixtures())}.values())
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if not arguments.folders:
            folders.append(write_deepseek(Path(scratch)))
        slowest = dict.fromkeys(COMMANDS, 0.0)
        for folder in folders:
            large = folder == Path(scratch)
            found = {command: measure(folder, command, arguments.runs, environment) for command in COMMANDS}
            text = ", ".join(f"{' '.join(c)} {s:.2f} s {m:.0f} MB" for c, (s, m) in found.items())
            print(f"{'DeepSeek-R1 headers' if large else folder.name:45} {text}", flush=True)
            if not large:
                slowest = {command: max(slowest[command], found[command][0]) for command in COMMANDS}
        print("slowest small one: " + ", ".join(f"{' '.join(c)} {s:.2f} s" for c, s in slowest.items()))


if __name__ == "__main__":
    main()
