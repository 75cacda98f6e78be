# SPDX-License-Identifier: Apache-2.0
"""Argument rules: what the device refuses, the emulation refuses, in one form of words.

Every refusal is a RuntimeError, as torch_npu's own are, and names the operator, the argument, what was expected and
what was found. The rules look at shapes, dtypes and strides only, so the CPU kernels and the fake kernels share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch

__all__ = [
    "describe",
    "form",
    "forms",
    "is_plain_or_transposed",
    "refuse",
    "remember",
    "require",
    "require_absent",
    "require_dim",
    "require_dtype",
    "require_shape",
    "require_value",
]


R = TypeVar("R")
#: Calls that one operator remembers, at most: a server meets a few thousand numbers of tokens.
REMEMBERED_CALLS = 8192


def form(tensor: torch.Tensor | None) -> Any:
    """What a check may look at in a tensor. Equal forms get equal answers, so that the answers can be remembered.

    Every call of a fast kernel makes a key of these: it costs half of what looking through any arguments would.
    """
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


def forms(tensors: Sequence[torch.Tensor] | None) -> Any:
    """``form`` of a list; an empty list is an absent one."""
    if not tensors:
        return None
    return form(tensors[0]) if len(tensors) == 1 else (None, *map(form, tensors))


def remember(calls: dict[Any, R], key: Any, answer: R) -> R:
    """Keep the answer to a call that passed its check."""
    if len(calls) >= REMEMBERED_CALLS:
        calls.clear()
    calls[key] = answer
    return answer


def describe(value: Any) -> str:
    """``float16[3, 64]`` for a tensor, ``repr`` for everything else."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(describe(item) for item in value) + "]"
    return repr(value)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse(operator: str, argument: str, expected: str, found: Any) -> NoReturn:
    raise RuntimeError(f"{operator}: argument {argument}: expected {expected}, found {describe(found)}")


def require(condition: Any, operator: str, argument: str, expected: str, found: Any) -> None:
    """Refuse the call unless ``condition``; the message is only built for a refusal."""
    if not condition:
        refuse(operator, argument, expected, found)


def require_dtype(operator: str, argument: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        refuse(operator, argument, " or ".join(dtype_name(dtype) for dtype in dtypes), tensor)


def require_dim(operator: str, argument: str, tensor: torch.Tensor, low: int, high: int | None = None) -> None:
    """The number of dimensions lies in [low, high]; exactly low if high is None."""
    high = low if high is None else high
    if not low <= tensor.dim() <= high:
        refuse(operator, argument, f"{low}-D" if low == high else f"{low} to {high} dimensions", tensor)


def require_shape(operator: str, argument: str, tensor: torch.Tensor, *shapes: Sequence[Any]) -> None:
    """The shape is one of ``shapes``."""
    for shape in shapes:
        if tensor.dim() == len(shape) and all(size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)):
            return
    refuse(operator, argument, "shape " + " or ".join(str(list(shape)) for shape in shapes), tensor)


def require_value(operator: str, argument: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        refuse(operator, argument, " or ".join(repr(item) for item in allowed), value)


def require_absent(operator: str, reason: str, **arguments: Any) -> None:
    """The named arguments must be None."""
    for name, value in arguments.items():
        if value is not None:
            refuse(operator, name, f"None ({reason})", value)


def is_plain_or_transposed(tensor: torch.Tensor) -> bool:
    """Whether the memory is contiguous, as it is or after swapping the last two dimensions."""
    return tensor.is_contiguous() or tensor.transpose(-1, -2).is_contiguous()
