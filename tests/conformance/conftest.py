# SPDX-License-Identifier: Apache-2.0
"""The cases are shared with tests/emulation."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulation"))
