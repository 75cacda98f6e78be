# SPDX-License-Identifier: Apache-2.0
"""The arguments of an operator's call, and the checks that its rules use.

Every refusal is a RuntimeError, as torch_npu's own are, and names the operator, the argument, what was expected and what
was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, NoReturn, TypeVar

import torch

__all__ = ["Arguments", "describe", "dtype_name", "is_plain_or_transposed"]

A = TypeVar("A", bound="Arguments")
#: The default of a parameter that stands for the value of the argument.
_VALUE: Final = object()


class Arguments:
    """The arguments of one call.

    Subclasses are dataclasses whose fields are the arguments of the operator's schema: the same names, order and
    defaults. (Dtypes arrive as numbers: ``numerics.DTYPE_OF_CODE``.) Properties derive the rest. Rules use shapes, dtypes,
    strides and numbers, never the contents of tensors, so that they serve fake tensors too.
    """

    operator: ClassVar[str]

    def check(self) -> None:
        """Refuse what the device refuses (Atlas A2 and A3), and what is not emulated.

        Raises:
            RuntimeError: the first argument that breaks a rule.
        """
        raise NotImplementedError

    def empty(self) -> Any:
        """The outputs of a call that passed ``check``, of the right shapes and dtypes and with any content."""
        raise NotImplementedError

    @classmethod
    def checked(cls: type[A], *args: Any, **kwargs: Any) -> A:
        """The arguments of a call that passed ``check``."""
        call = cls(*args, **kwargs)
        call.check()
        return call

    def refuse(self, argument: str, expected: str, found: Any = _VALUE) -> NoReturn:
        """Raise for an argument.

        Args:
            argument: its name; a remark in parentheses may follow.
            found: reported in place of its value.
        """
        if found is _VALUE:
            found = getattr(self, argument.partition(" ")[0])
        raise RuntimeError(f"{self.operator}: argument {argument}: expected {expected}, found {describe(found)}")

    def require(self, condition: Any, argument: str, expected: str, found: Any = _VALUE) -> None:
        """Refuse the argument unless ``condition``."""
        if not condition:
            self.refuse(argument, expected, found)

    def given(self, argument: str, expected: str = "a tensor") -> Any:
        """The value of an argument, refused if it is absent."""
        value = getattr(self, argument)
        if value is None or (isinstance(value, (list, tuple)) and not value):
            self.refuse(argument, expected, None)
        return value

    def require_absent(self, reason: str, *arguments: str) -> None:
        """Require that the arguments are None or empty lists."""
        for argument in arguments:
            value = getattr(self, argument)
            if value is not None and not (isinstance(value, (list, tuple)) and not value):
                self.refuse(argument, f"None ({reason})")

    def require_value(self, argument: str, *allowed: Any) -> None:
        """Require one of the values."""
        if getattr(self, argument.partition(" ")[0]) not in allowed:
            self.refuse(argument, " or ".join(repr(item) for item in allowed))

    # The checks below apply to a tensor, or to every tensor of a list, and accept an absent argument.

    def require_dtype(self, argument: str, *dtypes: torch.dtype) -> None:
        for tensor in self._tensors(argument):
            if tensor.dtype not in dtypes:
                self.refuse(argument, " or ".join(dtype_name(dtype) for dtype in dtypes), tensor)

    def require_dim(self, argument: str, low: int, high: int | None = None) -> None:
        """Require a number of dimensions in [low, high]; exactly ``low`` if ``high`` is None."""
        high = low if high is None else high
        for tensor in self._tensors(argument):
            if not low <= tensor.dim() <= high:
                self.refuse(argument, f"{low}-D" if low == high else f"{low} to {high} dimensions", tensor)

    def require_shape(self, argument: str, *shapes: Sequence[Any]) -> None:
        """Require one of ``shapes``."""
        for tensor in self._tensors(argument):
            self.require_shape_of(argument, tensor, *shapes)

    def require_shape_of(self, argument: str, tensor: torch.Tensor, *shapes: Sequence[Any]) -> None:
        """Require one of ``shapes`` for one tensor of a list."""
        if not any(_has_shape(tensor, shape) for shape in shapes):
            self.refuse(argument, "shape " + " or ".join(str(list(shape)) for shape in shapes), tensor)

    def require_contiguous(self, argument: str, expected: str = "contiguous memory") -> None:
        for tensor in self._tensors(argument):
            self.require(tensor.is_contiguous(), argument, expected, tensor)

    def require_plain_or_transposed(self, argument: str, expected: str = "contiguous or transposed memory") -> None:
        for tensor in self._tensors(argument):
            self.require(is_plain_or_transposed(tensor), argument, expected, tensor)

    def _tensors(self, argument: str) -> Sequence[torch.Tensor]:
        value = getattr(self, argument.partition(" ")[0])
        if isinstance(value, torch.Tensor):
            return (value,)
        return value or ()


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
    """``float16`` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def _has_shape(tensor: torch.Tensor, shape: Sequence[Any]) -> bool:
    # One by one: in a graph sizes may be symbols.
    return tensor.dim() == len(shape) and all(size == wanted for size, wanted in zip(tensor.shape, shape, strict=True))


def is_plain_or_transposed(tensor: torch.Tensor) -> bool:
    """Whether the memory is contiguous, as it is or after swapping the last two dimensions."""
    return tensor.is_contiguous() or tensor.transpose(-1, -2).is_contiguous()
