# SPDX-License-Identifier: Apache-2.0
"""The CI script fails when any of its commands does, and runs all of them all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "run"


@pytest.mark.skipif(shutil.which("timeout") is None, reason="coreutils' timeout is not on the PATH")
@pytest.mark.parametrize(
    ("lint", "test", "expected"), [(0, 0, 0), (2, 0, 1), (0, 2, 1), (2, 2, 1), (0, 137, 1), (0, 124, 1)]
)
def test_exit_code(lint: int, test: int, expected: int, tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "ran $1"\n[ "$1" = lint ] && exit {lint}\nexit {test}\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == expected, done.stdout
    assert "ran lint" in done.stdout
    assert "ran test" in done.stdout
    assert "ran conformance" in done.stdout
    assert (f"make test ({test})" in done.stdout) == (test != 0)
    assert ("stopped at the limit" in done.stdout) == (test in (124, 137))
