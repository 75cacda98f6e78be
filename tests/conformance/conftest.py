# SPDX-License-Identifier: Apache-2.0
"""The real torch_npu, asked once for all tests; and the traces of this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The cases of operators are shared with tests/emulation.
sys.path.insert(0, str(ROOT / "tests" / "emulation"))

from tests.conformance.real_wheel import (  # noqa: E402
    OLDER_VERSION,
    VERSION,
    cannot_import,
    downloaded_wheel,
    schemas_in_yaml,
    unpacked,
)


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
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="session")
def real_schemas(wheel: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    return schemas_in_yaml(wheel) if cannot_import() else request.getfixturevalue("report")["schemas"]
