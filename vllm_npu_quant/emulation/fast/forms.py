# SPDX-License-Identifier: Apache-2.0
"""The forms of calls: the properties that rules may use, so that calls of one form get one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

__all__ = ["form", "forms", "remember"]

R = TypeVar("R")
#: The most calls that one operator remembers: a server sees a few thousand numbers of tokens.
REMEMBERED_CALLS = 8192


def form(tensor: torch.Tensor | None) -> Any:
    """The properties of a tensor that a check may use. Equal forms get equal answers, which can be remembered.

    Every call of a fast kernel makes a key of these: it costs half of what looking through any arguments would.
    """
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


def forms(tensors: Sequence[torch.Tensor] | None) -> Any:
    """``form`` of a list; an empty list is an absent one."""
    if not tensors:
        return None
    return form(tensors[0]) if len(tensors) == 1 else (None, *map(form, tensors))


def remember(calls: dict[Any, R], key: Any, answer: R) -> R:
    """Keep the answer to a call that passed its check; the oldest answers are evicted together."""
    if len(calls) >= REMEMBERED_CALLS:
        calls.clear()
    calls[key] = answer
    return answer
