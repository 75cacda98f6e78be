# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/cli.md run. Its screens are compared by tests/test_docs.py, since the page is made of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_python_examples() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        subprocess.run([sys.executable, "-c", example], check=True, cwd=ROOT)


def test_every_command_has_a_section() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for command in ("inspect", "check", "plan", "compare", "run", "matrix", "doctor"):
        assert f"\n## {command}\n" in page
