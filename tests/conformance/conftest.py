# SPDX-License-Identifier: Apache-2.0
"""The real torch_npu, asked once for all tests; and the traces of this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The cases of operators are shared with tests/emulation.
sys.path.insert(0, str(ROOT / "tests" / "emulation"))

from tests.conformance import traces  # noqa: E402
from tests.conformance.method_cases import CASES  # noqa: E402
from tests.conformance.real_wheel import (  # noqa: E402
    OLDER_VERSION,
    VERSION,
    cannot_import,
    downloaded_wheel,
    schemas_in_yaml,
    unpacked,
)
from vllm_npu_quant.emulation import OPERATORS  # noqa: E402
from vllm_npu_quant.serving.dispatch import ROWS  # noqa: E402


@pytest.fixture(scope="session")
def wheel() -> Path:
    return downloaded_wheel(VERSION)


@pytest.fixture(scope="session")
def older_schemas() -> dict[str, str]:
    """The schemas of the version that vllm-ascend pins."""
    return schemas_in_yaml(downloaded_wheel(OLDER_VERSION))


@pytest.fixture(scope="session")
def report(wheel: Path, older_schemas: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process with the real torch_npu found."""
    reason = cannot_import()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("real")
    (folder / "older.json").write_text(json.dumps(older_schemas))
    command = [sys.executable, "-m", "tests.conformance.real_process", str(unpacked(wheel)), str(folder)]
    # torch would import an installed backend by itself; this process imports it from the cache.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=840)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="session")
def real_schemas(wheel: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    return schemas_in_yaml(wheel) if cannot_import() else request.getfixturevalue("report")["schemas"]


@pytest.fixture(scope="session")
def made() -> dict[str, traces.Trace]:
    """The traces of this process, over the emulation, by the titles of their cases."""
    return {case.title: traces.on_the_cpu(case) for case in CASES}


#: Test -> what one of its cases is, in the summary.
COUNTED = {
    "operators": {
        "test_schema_is_the_real_one": "schemas",
        "test_real_meta_kernel_agrees": "calls against the real Meta kernels",
    },
    "methods": {
        "test_calls_keep_to_the_documents": "traces within the documents",
        "test_it_runs_on_the_device_npu_under_the_real_meta_kernels": "on the device npu under the real Meta kernels",
        "test_the_older_torch_npu_takes_the_same_calls": "under the schemas of the pinned torch_npu",
        "test_apply_is_one_graph_for_any_number_of_tokens": "as one graph",
        "test_apply_leaves_the_layer_as_it_is": "applied twice",
    },
}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was compared: operators x checks, methods x traces."""
    reports = [report for report in terminalreporter.stats.get("passed", []) if "tests/conformance/" in report.nodeid]
    passed = Counter(report.nodeid.rpartition("::")[2].partition("[")[0] for report in reports)
    of = {
        "operators": f"{len(OPERATORS)} operators",
        "methods": f"{len({row.method for row in ROWS})} methods in {len(ROWS)} rows of the dispatch table",
    }
    for kind, tests in COUNTED.items():
        counts = ", ".join(f"{passed[test]} {what}" for test, what in tests.items() if passed[test])
        if counts:
            terminalreporter.write_line(f"conformance: {of[kind]}: {counts}")
