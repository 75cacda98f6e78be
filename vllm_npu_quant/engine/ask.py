# SPDX-License-Identifier: Apache-2.0
"""Asking a model's own ``load_weights`` where the checkpoint's layers go, and what is done to their weights on the way.

A model class may rename a layer, load it into several places, or reorder the rows of its weight, all by the names of float
tensors. The names and rows of quantized tensors follow from the same code. So before any tensor is read, ``load_weights``
gets float weights whose values are the numbers of their own rows, and the loaders of the model's parameters note what
arrives. Nothing is written, and nothing takes memory: the parameters are meta tensors meanwhile, and a weight is one column
of numbers that a stride of 0 repeats.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_npu_quant.formats.floats import float_tensor

__all__ = ["Answers", "Delivery", "ask", "own_method"]

#: After so many weights that ``load_weights`` refuses, the rest is not asked for.
_MOST_REFUSALS = 32

#: float32 holds all smaller integers exactly.
_EXACT = 1 << 24


@dataclass(frozen=True)
class Delivery:
    """A checkpoint weight, or a part of it, that the model hands to the loader of one of its parameters.

    Attributes:
        layer: the checkpoint layer; empty if the values are no weight's.
        args, kwargs: the loader's other arguments: the shard or the expert.
        rows: the numbers of the rows that arrive, int64; None for all of them in their own order.
        change: what else is done to the weight; empty for nothing.
    """

    layer: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: torch.Tensor | None = None
    change: str = ""


@dataclass
class Answers:
    """The ways of a checkpoint's weights through a model's ``load_weights``.

    Attributes:
        deliveries: name of a module -> the weights that its parameters receive.
        refused: checkpoint layer -> the error that its weight raised.
    """

    deliveries: dict[str, list[Delivery]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def ask(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Answers:
    """Ask a model that is built and not loaded. It is unchanged afterwards.

    A module whose ``quant_method`` has ``float_shapes`` (module -> {name: shape}) gets the parameters of a float module.

    Args:
        model: the model, or one rank's part of it.
        shapes: layer name -> the shape of its float weight (``formats.floats``).
    """
    answers = Answers()
    rows = _Numbers(shapes, 0)
    touched: dict[str, tuple[int, ...]] = {}

    def note_rows(module: str, weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, order, change = rows.read(weight)
        if len(shapes.get(layer, ())) == 2 and not change and not rows.is_untouched(layer, weight):
            touched[layer] = shapes[layer]
        answers.deliveries.setdefault(module, []).append(Delivery(layer, args, kwargs, order, change))

    with _float_parameters(model, rows.numbers.dtype, note_rows):
        answers.refused = _hand(model, rows)
    if touched:
        _check_columns(model, touched, answers)
    delivered = {each.layer for deliveries in answers.deliveries.values() for each in deliveries}
    answers.refused = {layer: error for layer, error in answers.refused.items() if layer not in delivered}
    return answers


def _check_columns(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], answers: Answers) -> None:
    """Note a change for those of these weights whose columns do not stay in their order."""
    columns = _Numbers(shapes, 1)
    kept: set[str] = set()
    moved: set[str] = set()

    def note_columns(module: str, weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, order, change = columns.read(weight)
        (moved if order is not None or change else kept).add(layer)

    with _float_parameters(model, columns.numbers.dtype, note_columns):
        _hand(model, columns)
    changed = shapes.keys() - (kept - moved)
    for module, deliveries in answers.deliveries.items():
        answers.deliveries[module] = [
            replace(each, change="its columns are reordered") if each.layer in changed and not each.change else each
            for each in deliveries
        ]


class _Numbers:
    """Float weights [N, K] whose values are the numbers of their rows (or columns), different in all weights.

    The first number is 1: 0 is padding. A weight of other than two dimensions has a single number.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dim: int) -> None:
        self.shapes, self.dim = shapes, dim
        self.names = list(shapes)
        self.first: dict[str, int] = {}
        total = 1
        for name, shape in shapes.items():
            self.first[name] = total
            total += shape[dim] if len(shape) == 2 else 1
        dtype = torch.float32 if total < _EXACT else torch.float64
        self.numbers = torch.arange(total, dtype=dtype, device="cpu")
        self.firsts = list(self.first.values())

    def weights(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights with their tensor names. They share one storage."""
        for name in names:
            shape, first = self.shapes[name], self.first[name]
            if len(shape) != 2:
                weight = self.numbers[first].expand(shape)
            else:
                line = self.numbers[first : first + shape[self.dim]].unsqueeze(1 - self.dim)
                weight = line.expand(shape)
            yield float_tensor(name, shape), weight

    def is_untouched(self, name: str, received: torch.Tensor) -> bool:
        """Whether a tensor is the very one that was handed over, or another view of all of it."""
        handed = next(weight for _, weight in self.weights([name]))
        return (received.data_ptr(), received.shape, received.stride()) == (
            handed.data_ptr(),
            handed.shape,
            handed.stride(),
        )

    def read(self, received: torch.Tensor) -> tuple[str, torch.Tensor | None, str]:
        """The weight that a received tensor is, the order of its rows (or columns), and what else was done to it.

        The order is None if all are there in their own order.
        """
        if received.dtype != self.numbers.dtype or received.device.type != "cpu":
            return "", None, f"it is converted to {received.dtype} on {received.device.type}"
        number = float(received[(0,) * received.dim()]) if received.numel() else 0.0
        if not 1 <= number < len(self.numbers):
            return "", None, "its values are replaced"
        name = self.names[bisect_right(self.firsts, number) - 1]
        shape, other = self.shapes[name], 1 - self.dim
        if len(shape) != 2:
            return name, None, ""
        if received.dim() != 2 or (self.dim == 0 and received.shape[1] != shape[1]):
            return name, None, f"{list(shape)} becomes {list(received.shape)}"
        line = received.select(other, 0)
        if received.stride(other) != 0 and not bool((received == line.unsqueeze(other)).all()):
            return name, None, "its rows and columns are mixed"
        order = line.to(torch.int64) - self.first[name]
        if (
            not bool((order + self.first[name] == line).all())
            or not 0 <= int(order.min()) <= int(order.max()) < shape[self.dim]
        ):
            return name, None, "its values are changed, or joined with those of other weights"
        same = len(order) == shape[self.dim] and bool((order == torch.arange(len(order), device="cpu")).all())
        return name, None if same else order, ""


def _hand(model: nn.Module, numbers: _Numbers) -> dict[str, str]:
    """Hand all weights to ``load_weights``, beginning anew after a weight that it refuses.

    Returns:
        Layer -> the error it raised.
    """
    refused: dict[str, str] = {}
    left, last = numbers.names, ""
    while left and len(refused) < _MOST_REFUSALS:
        taken: list[str] = []

        def weights(left: list[str] = left, taken: list[str] = taken) -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in zip(left, numbers.weights(left), strict=True):
                taken.append(name)
                yield weight

        # A model class may raise anything for a weight that it does not know, or if it misses others at the end.
        try:
            model.load_weights(weights())
        except Exception as error:
            last = f"{type(error).__name__}: {error}"
            refused[taken[-1] if taken else left[0]] = last
            left = left[max(len(taken), 1) :]
        else:
            return refused
    return dict.fromkeys(left, last) | refused


def own_method(module: nn.Module) -> Any:
    """The quantization method of a module; None where it only passes on attributes of a module that is left out."""
    return vars(module).get("quant_method")


#: Notes what a parameter of a module receives: (module, weight, the loader's other arguments).
_Note = Callable[[str, torch.Tensor, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def _float_parameters(model: nn.Module, dtype: torch.dtype, note: _Note) -> Iterator[None]:
    """Put meta tensors in place of a model's parameters, those of a float model, and note what their loaders receive."""
    stand_ins: dict[int, nn.Parameter] = {}
    before: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []
    try:
        for name, module in model.named_modules():
            held = dict(module.named_parameters(recurse=False))
            shapes = getattr(own_method(module), "float_shapes", None)
            floats = shapes(module) if shapes is not None else {}
            before.append((module, held))
            load = partial(_load, note, name)
            load.supports_moe_loading = True  # type: ignore[attr-defined]
            for key, param in held.items():
                if id(param) not in stand_ins:  # tied parameters stay tied
                    stand_ins[id(param)] = _stand_in(param, dtype, _ignore if floats else load)
                module.register_parameter(key, stand_ins[id(param)])
            for key, shape in floats.items():
                module.register_parameter(key, _float_parameter(shape, dtype, load))
        yield
    finally:
        for module, held in before:
            for key in [key for key, _ in module.named_parameters(recurse=False) if key not in held]:
                delattr(module, key)
            for key, param in held.items():
                module.register_parameter(key, param)


def _load(note: _Note, module: str, param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """The loader of every parameter meanwhile. True is what loaders of experts return if a tensor was theirs."""
    note(module, loaded_weight, args, kwargs)
    return True


def _ignore(*args: Any, **kwargs: Any) -> bool:
    """The loader of the parameters beside the float ones of a quantized module."""
    return True


def _stand_in(param: nn.Parameter, dtype: torch.dtype, load: Callable[..., bool]) -> nn.Parameter:
    """A meta tensor with a parameter's class and attributes."""
    twin = nn.Parameter(torch.empty_like(param, dtype=dtype, device="meta"), requires_grad=False)
    twin.__class__ = type(param)
    twin.__dict__.update(param.__dict__)
    if getattr(param, "weight_loader", None) is not None:
        twin.weight_loader = load  # type: ignore[attr-defined]
    return twin


def _float_parameter(shape: tuple[int, ...], dtype: torch.dtype, load: Callable[..., bool]) -> nn.Parameter:
    """The meta tensor of a float weight, with the attributes that loaders look at."""
    param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    param.output_dim, param.input_dim, param.weight_loader = 0, 1, load  # type: ignore[attr-defined]
    return param
