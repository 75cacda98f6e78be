# SPDX-License-Identifier: Apache-2.0
"""Checkpoint layouts: their tensors as data (``tables``), and the conversions to canonical numbers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["load_object"]


def load_object(path: str | Callable[..., Any]) -> Any:
    """The object that "module:name" stands for; a callable stands for itself."""
    if not isinstance(path, str):
        return path
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
