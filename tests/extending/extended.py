# SPDX-License-Identifier: Apache-2.0
"""Processes in which an extension is installed: a distribution with an entry point, in a folder on PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.yardstick import Run

__all__ = ["install", "matrix_text", "run_extended", "vllm_npu_quant_json"]

ROOT = Path(__file__).resolve().parents[2]

_ENGINE = """
import json, sys
from pathlib import Path
import numpy as np
from tests.e2e.yardstick import run
done = run(Path(sys.argv[1]))
np.save(sys.argv[2], done.logprobs)
print(json.dumps({"generated": done.generated, "methods": done.methods}))
"""


def install(folder: Path, module: str) -> dict[str, str]:
    """Install an extension whose ``module`` has a function ``extend``; the environment of processes that have it."""
    metadata = folder / f"{module.rpartition('.')[2]}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.rpartition('.')[2]}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm_npu_quant.extensions]\nit = {module}:extend\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


def _output(arguments: list[str], environment: dict[str, str], *, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def vllm_npu_quant_json(arguments: list[str], environment: dict[str, str], *, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json."""
    return json.loads(_output(["-m", "vllm_npu_quant", *arguments, "--json"], environment, code=code))


def matrix_text(environment: dict[str, str]) -> str:
    return _output(["-m", "vllm_npu_quant", "matrix", "--json"], environment)


def run_extended(folder: Path, environment: dict[str, str], scratch: Path) -> tuple[Run, dict[str, int]]:
    """An engine run in a process that has the extension, and its layers by method class."""
    file = scratch / "logprobs.npy"
    said = json.loads(_output(["-c", _ENGINE, str(folder), str(file)], environment).strip().splitlines()[-1])
    return Run(np.load(file), said["generated"], []), said["methods"]
