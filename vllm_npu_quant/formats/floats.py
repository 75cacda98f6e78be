# SPDX-License-Identifier: Apache-2.0
"""The float weights that a checkpoint's layers stand for: their names and shapes, without their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_npu_quant.formats.described import Described, LayerEntry, StoredTensor
from vllm_npu_quant.layouts.tables import Axis, tensors_of

__all__ = ["float_shape", "float_shapes", "float_tensor"]

#: The two tensors of float experts that are stored together, beside each other and without ".weight".
_FUSED_EXPERTS = ("gate_up_proj", "down_proj")


def float_tensor(layer: str, shape: tuple[int, ...]) -> str:
    """The name of the tensor that holds the float weight of a layer in ``float_shapes``."""
    fused = len(shape) == 3 and layer.endswith(tuple(f".experts.{name}" for name in _FUSED_EXPERTS))
    return layer if fused else f"{layer}.weight"


def float_shapes(described: Described, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """The shape of the float weight of every layer that has a matrix: [N, K], or [E, N, K] of experts that are one tensor.

    Of experts that are stored singly only the first one of each MoE layer is in it: vLLM's models treat all of them alike.

    Args:
        described: the checkpoint's layers.
        tensors: its stored tensors by name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    same: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object per distinct shape keeps the pickle small
    for layer, entry in _layers(described):
        shape = float_shape(layer, entry, tensors)
        if len(shape) > 1:
            shapes[layer] = same.setdefault(shape, shape)
    for experts in sorted(described.fused_floats):
        # Other names of stacked experts, such as input_linear, are layers of their own.
        for tensor in (f"{experts}.{name}" for name in _FUSED_EXPERTS):
            if tensor in tensors:
                shapes[tensor] = tuple(tensors[tensor].shape)
    return shapes


def _layers(described: Described) -> Iterator[tuple[str, LayerEntry]]:
    yield from described.layers.items()
    for layer, experts in described.experts.items():
        for name, entry in zip(experts.names, (experts.gate, experts.up, experts.down), strict=True):
            yield f"{layer}.0.{name}", entry


def float_shape(layer: str, entry: LayerEntry, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """The shape of a layer's float weight; empty if no weight is stored, or not with the dimensions of its layout."""
    if entry.spec.is_float:
        stored = tensors.get(f"{layer}.weight")
        return () if stored is None else tuple(stored.shape)
    weight = tensors_of(entry.spec, entry.tensors)[0]
    stored = tensors.get(f"{layer}.{weight.name}")
    if stored is None or len(stored.shape) != len(weight.dims):
        return ()
    lengths = {dim.axis: dim.elements(length) for dim, length in zip(weight.dims, stored.shape, strict=True)}
    return lengths.get(Axis.OUT, 0), lengths.get(Axis.IN, 0)
