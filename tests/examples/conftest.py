# SPDX-License-Identifier: Apache-2.0
"""The examples are scripts, not a package: they find each other because Python puts a script's folder on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in ("examples", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache."""
    monkeypatch.setenv("VLLM_NPU_QUANT_CACHE", str(tmp_path / "own-cache"))
