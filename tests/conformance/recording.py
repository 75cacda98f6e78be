# SPDX-License-Identifier: Apache-2.0
"""What a method asks of torch_npu: every call with the names of its arguments, dtypes and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_npu_quant.methods import operators

#: Numbers that arguments of the type ``int`` have for dtypes.
DTYPES = {
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    15: torch.bfloat16,
    16: torch.quint4x2,
}
_DTYPE_ARGUMENTS = {"dtype", "dst_type", "dst_dtype", "output_dtype"}


@dataclass(frozen=True)
class Tensor:
    """A tensor without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nz: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor, nz: bool = False) -> Tensor:
        return cls(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), nz)

    @property
    def contiguous(self) -> bool:
        return _is_row_major(self.shape, self.stride)

    @property
    def transposed(self) -> bool:
        """Whether the memory is contiguous after the last two dimensions are swapped."""
        if len(self.shape) < 2 or self.contiguous:
            return False
        swapped = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return _is_row_major(swapped, (*self.stride[:-2], self.stride[-1], self.stride[-2]))

    def __str__(self) -> str:
        text = f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"
        if self.nz:
            return text + " nz"
        return text if self.contiguous else text + (" transposed" if self.transposed else f" strides {self.stride}")


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether memory is dense, the last dimension first; the stride of a dimension of 1 is of no account."""
    size = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != size:
            return False
        size *= max(length, 1)
    return True


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Call:
    """One call of an operator of torch_npu.

    Attributes:
        operator: without the namespace, with the overload's name after a dot where it has one.
        arguments: those that differ from the schema's defaults; tensors as ``Tensor``, dtypes as dtypes.
        raw: the same as the operator received them.
    """

    operator: str
    arguments: dict[str, Any]
    results: list[Tensor]
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        given = ", ".join(f"{name}={_text(value)}" for name, value in self.arguments.items())
        return f"{self.operator}({given}) -> {', '.join(map(str, self.results))}"


def _text(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value) if isinstance(value, Tensor) else repr(value)


def is_made_of_others(func: Any) -> bool:
    """Whether an operator of torch is a sequence of others, and torch_npu has no kernel of its own for it."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return composite and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "PrivateUse1")


class Recorder(TorchDispatchMode):
    """Notes the calls of torch_npu's operators, also those inside our own operators of the namespace ``npu_quant``.

    Attributes:
        calls: in order.
        others: names of torch's own operators ("aten::cat"), in the order of their first use.
        problems: what a run of a graph would not survive: views of a weight in FRACTAL_NZ, and fake kernels of our own
            operators that do not give what their parts give.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.others: dict[str, None] = {}
        self.problems: list[str] = []
        self._nz: dict[int, torch.Tensor] = {}

    def mark_nz(self, tensor: torch.Tensor) -> None:
        """Note that a tensor is in FRACTAL_NZ. It is kept alive, so that its id stays its own."""
        self._nz[id(tensor)] = tensor

    def is_nz(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._nz

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == operators.NAMESPACE:
            return self._own(func, name, args, kwargs)
        if namespace == "aten" and is_made_of_others(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if namespace == "npu":
            self._note(func, args, kwargs, result)
        elif namespace == "aten":
            self.others.setdefault(f"{func._schema.name}.{func._schema.overload_name}".removesuffix("."))
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and self.is_nz(leaf):
                    self.problems.append(f"{func._schema.name} reads a weight in FRACTAL_NZ")
        return result

    def _own(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        with self:
            result = getattr(operators, name)(*args, **kwargs)
        if not any(type(leaf).__name__ == "FakeTensor" for leaf in tree_leaves((args, kwargs))):
            return result
        stated = func(*args, **kwargs)
        found, expected = ([Tensor.of(leaf) for leaf in tree_leaves(value)] for value in (stated, result))
        if found != expected:
            self.problems.append(
                f"the fake kernel of npu_quant::{name} gives {', '.join(map(str, found))}, "
                f"its parts {', '.join(map(str, expected))}"
            )
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        raw = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        name = func._schema.name.partition("::")[2]
        name += f".{func._schema.overload_name}" if func._schema.overload_name else ""
        if name == "npu_format_cast" and raw.get("acl_format") == 29:
            self.mark_nz(result)
        results = [Tensor.of(leaf, self.is_nz(leaf)) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.calls.append(Call(name, self.described(func._schema, raw), results, raw))

    def described(self, schema: Any, raw: dict[str, Any]) -> dict[str, Any]:
        """The arguments that differ from the defaults, without their numbers."""
        given = {}
        for argument in schema.arguments:
            if argument.name in raw and (value := raw[argument.name]) is not None:
                if (
                    argument.has_default_value()
                    and not isinstance(value, torch.Tensor)
                    and value == argument.default_value
                ):
                    continue
                given[argument.name] = self._described(argument.name, value)
        return given

    def _described(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return Tensor.of(value, self.is_nz(value))
        if isinstance(value, (list, tuple)):
            return [self._described(name, item) for item in value]
        return DTYPES.get(value, value) if name in _DTYPE_ARGUMENTS and isinstance(value, int) else value
