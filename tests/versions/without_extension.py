# SPDX-License-Identifier: Apache-2.0
"""pytest plugin for environments without vLLM's compiled extension: the CPU counts as one without AMX tiles.

Where it has them, vLLM packs float weights for kernels of the extension, and has no other way there.
"""

from __future__ import annotations

import pytest
import torch

__all__ = ["pytest_sessionfinish", "pytest_sessionstart"]

_PATCH = pytest.MonkeyPatch()


def pytest_sessionstart() -> None:
    _PATCH.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def pytest_sessionfinish() -> None:
    _PATCH.undo()
