# SPDX-License-Identifier: Apache-2.0
"""How much memory torch takes for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["peak_of"]


def peak_of(action: Callable[[], Any]) -> int:
    """Bytes that torch allocated on top, at the most."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    current = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            top = max(top, current)
    return top
