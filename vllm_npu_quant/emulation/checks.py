# SPDX-License-Identifier: Apache-2.0
"""Argument rules: what the device refuses, the emulation refuses, in one form of words.

Every refusal is a RuntimeError, as torch_npu's own are, and names the operator, the argument, what was expected and
what was found. The rules look at shapes, dtypes and strides only, so the CPU kernels and the fake kernels share them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

__all__ = [
    "describe",
    "is_plain_or_transposed",
    "refuse",
    "remembered",
    "require",
    "require_absent",
    "require_dim",
    "require_dtype",
    "require_shape",
    "require_value",
]


P = ParamSpec("P")
R = TypeVar("R")
#: Calls that one check remembers, at most: a server meets a few thousand numbers of tokens.
REMEMBERED_CALLS = 8192


def remembered(check: Callable[P, R]) -> Callable[P, R]:
    """A check that looks at each combination of dtypes, shapes, strides and other arguments once.

    What a check may look at decides its result, so a call like an earlier one that passed passes. Calls of fake tensors
    whose sizes are symbols are looked at each time.
    """
    passed: dict[Any, R] = {}

    @functools.wraps(check)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        key = (*map(_signature, args), *kwargs, *map(_signature, kwargs.values()))
        try:
            return passed[key]
        except TypeError:  # a size that is a symbol has no hash
            return check(*args, **kwargs)
        except KeyError:
            result = check(*args, **kwargs)
        if len(passed) >= REMEMBERED_CALLS:
            passed.clear()
        passed[key] = result
        return result

    return wrapper


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    return tuple(map(_signature, value)) if isinstance(value, (list, tuple)) else value


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
