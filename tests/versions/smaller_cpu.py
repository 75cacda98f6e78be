# SPDX-License-Identifier: Apache-2.0
"""pytest plugin that takes instruction sets away from the CPU that torch.cpu describes, by which vLLM chooses its kernels.

The environment variable SMALLER_CPU names the beginnings of what is taken: "amx_" or "amx_,avx512_".
"""

from __future__ import annotations

import os
from types import MappingProxyType

import pytest
import torch

__all__ = ["VARIABLE", "pytest_sessionfinish", "pytest_sessionstart"]

VARIABLE = "SMALLER_CPU"

_PATCH = pytest.MonkeyPatch()


def pytest_sessionstart() -> None:
    lacking = tuple(filter(None, os.environ.get(VARIABLE, "").split(",")))
    known = torch.cpu.get_capabilities()
    smaller = MappingProxyType({name: not name.startswith(lacking) and value for name, value in known.items()})
    _PATCH.setattr(torch.cpu, "get_capabilities", lambda: smaller)


def pytest_sessionfinish() -> None:
    _PATCH.undo()
