# SPDX-License-Identifier: Apache-2.0
"""Fresh processes of the environment that this one runs in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run_fresh(code: str, *arguments: str, timeout: float = 300, **environment: str) -> Any:
    """Run Python code; the last line that it prints is JSON, which is returned."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
