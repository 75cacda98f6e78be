# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that a version of vLLM has to pass, in an environment with that version, and records what came out.

python -m tests.versions.doors [--quick] [--check WORD] [VERSION ...]

What was found goes into docs/compatibility.json, of which docs/generate.py makes the page. The environments are kept in
VLLM_NPU_QUANT_CACHE (default ~/.cache/vllm-npu-quant).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.versions import smaller_cpu
from tests.versions.environments import RELEASES, Release, make

__all__ = ["CHECKS", "Check", "main"]

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "compatibility.json"


@dataclass(frozen=True)
class Check:
    """A row of the page.

    Attributes:
        title: what the tests show. tests: pytest's names for them.
        engine: whether they run the engine, which needs vLLM's compiled extension.
        quick: whether they are part of a quick run.
    """

    title: str
    tests: tuple[str, ...]
    engine: bool = False
    quick: bool = False


def _engine(title: str, *tests: str, quick: bool = False) -> Check:
    return Check(title, tests, engine=True, quick=quick)


def _twin(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/e2e/{file}.py::test_agrees_with_its_float_twin[{name}]" for name in names)


CHECKS = (
    Check(
        "registration, and detection with the framework's name, ours or none",
        (
            "tests/plugin/test_register.py",
            "tests/engine/test_packed_names.py::test_names",
            "tests/plugin/test_detection.py::test_formats_that_config_json_names",
            "tests/plugin/test_detection.py::test_a_description_beside_config_json",
            "tests/plugin/test_detection.py::test_the_engine_config_is_ours_and_knows_the_layers",
        ),
        quick=True,
    ),
    Check(
        "whole checkpoints in vLLM's model classes, through its own loader: each layer against its float twin",
        ("tests/versions/test_whole_models.py",),
        quick=True,
    ),
    Check(
        "column-parallel, merged, QKV, row-parallel and replicated Linear, lm_head",
        ("tests/engine/test_linear_layers.py",),
    ),
    Check("shards of every packed layout on 1 to 4 ranks", ("tests/engine/test_packed_shards.py",)),
    Check("RMSNorm with a bias", ("tests/engine/test_norm.py",), quick=True),
    _engine(
        "engine: ModelSlim W8A8 static",
        *_twin("test_modelslim", "msmodelslim-qwen3-w8a8", "msmodelslim-qwen3fp32-w8a8-normbias"),
    ),
    _engine("engine: ModelSlim W8A8 dynamic", *_twin("test_modelslim", "msmodelslim-qwen3-w8a8-dynamic"), quick=True),
    _engine("engine: ModelSlim W4A8", *_twin("test_modelslim_int4", "msmodelslim-qwen3-w4a8-dynamic")),
    _engine("engine: compressed-tensors W8A8", *_twin("test_compressed_tensors", "ct-qwen3-w8a8-dynamic")),
    _engine("engine: compressed-tensors W4A16", *_twin("test_compressed_tensors", "ct-qwen3-w4a16-g128-asym")),
    _engine("engine: FP8 in blocks", *_twin("test_compressed_tensors", "ct-qwen3-fp8-block")),
    _engine("engine: AWQ", *_twin("test_packed", "awq-qwen3-autoawq-g128")),
    _engine("engine: GPTQ with activation order", *_twin("test_packed", "gptq-qwen3-gptqmodel-w4g32-sym-descact")),
    _engine("engine: AutoRound", *_twin("test_packed", "autoround-qwen3-mixed")),
    _engine(
        "engine: experts W8A8 and int4 weight-only",
        *_twin("test_moe", "msmodelslim-qwen3moe-w8a8-dynamic", "awq-qwen3moe-autoawq-g128"),
    ),
    _engine(
        "engine: torch.compile",
        "tests/e2e/test_modelslim.py::test_torch_compile_agrees_with_the_twin_too[msmodelslim-qwen3-w8a8-dynamic]",
    ),
    _engine(
        "engine: two tensor-parallel ranks",
        "tests/e2e/test_modelslim.py::test_two_ranks_agree_with_the_twin_too[msmodelslim-qwen3-w8a8]",
    ),
)


def run(release: Release, python: Path, checks: tuple[Check, ...]) -> dict[str, Any]:
    """Run the tests of the checks in one process; the counts of each check by its title."""
    wanted = [check for check in checks if release.runs or not check.engine]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1"]  # which names the file of each test
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
        if not release.runs:  # for AMX, vLLM packs float weights with its extension, and knows no other way
            command += ["-p", smaller_cpu.__name__]
            env[smaller_cpu.VARIABLE] = "amx_"
        started = time.monotonic()
        done = subprocess.run([*command, *(test for check in wanted for test in check.tests)], cwd=ROOT, env=env)
        if done.returncode not in (0, 1):
            sys.exit(f"pytest could not run the tests with vLLM {release.version} (exit code {done.returncode})")
        outcomes = _outcomes(report)
    checked = {check.title: _count(check, outcomes) for check in wanted}
    return {"seconds": round(time.monotonic() - started), "checks": checked}


def _outcomes(report: Path) -> dict[str, str]:
    """Test -> passed, failed or skipped."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[f"{case.get('file')}::{case.get('name')}"] = outcome
    return found


def _count(check: Check, outcomes: dict[str, str]) -> dict[str, int]:
    """How many of a check's tests passed, failed and were skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for test, outcome in outcomes.items():
        if any(test == name or test.startswith((name + "::", name + "[")) for name in check.tests):
            counts[outcome] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(RELEASES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="one checkpoint per kind of layer; nothing is recorded")
    parser.add_argument("--check", default="", metavar="WORD", help="only checks with this word in their title")
    parser.add_argument("--only-environments", action="store_true", help="make the environments, and run nothing")
    arguments = parser.parse_args()
    unknown = [version for version in arguments.versions if version not in RELEASES]
    if unknown:
        parser.error(f"no such version: {', '.join(unknown)}; there are {', '.join(RELEASES)}")
    cache = Path(os.environ.get("VLLM_NPU_QUANT_CACHE", "~/.cache/vllm-npu-quant")).expanduser() / "vllm"
    failed = 0
    for version in arguments.versions or RELEASES:
        release = RELEASES[version]
        python = make(release, cache / version)
        if arguments.only_environments:
            print(python)
            continue
        chosen = [check for check in CHECKS if arguments.check in check.title and (check.quick or not arguments.quick)]
        result = run(release, python, tuple(chosen))
        counts = result["checks"].values()
        failed += sum(count["failed"] + (count["passed"] == 0) for count in counts)
        print(f"vLLM {version}: {sum(count['passed'] for count in counts)} tests passed, ", end="")
        print(f"{sum(count['failed'] for count in counts)} failed, in {result['seconds']} s")
        if not arguments.quick:
            _record(version, result)
    sys.exit(1 if failed else 0)


def _record(version: str, result: dict[str, Any]) -> None:
    """Put the counts of the checks that ran in the place of older ones."""
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    checks = known.get(version, {}).get("checks", {}) | result["checks"]
    known[version] = {
        "date": datetime.date.today().isoformat(),
        "engine": RELEASES[version].runs,
        "checks": {check.title: checks[check.title] for check in CHECKS if check.title in checks},
    }
    RECORD.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
