# SPDX-License-Identifier: Apache-2.0
"""The float weights that a checkpoint's layers stand for: their names and shapes, without their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_npu_quant.formats.described import Described, LayerEntry, StoredTensor
from vllm_npu_quant.layouts.tables import Axis, tensors_of

__all__ = ["FUSED_EXPERTS", "float_shapes"]

#: The two tensors of float experts that are stored together.
FUSED_EXPERTS = ("gate_up_proj", "down_proj")


def float_shapes(described: Described, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """The shape [N, K] of the float weight of every layer, and [E, ...] of experts that are stored together.

    Of other experts only the first one of each MoE layer is in it: vLLM's models treat all of them alike.

    Args:
        described: the checkpoint's layers.
        tensors: its stored tensors by name.

    Returns:
        Layer name, or name of a tensor of experts that are stored together -> shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    same: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object per distinct shape keeps the pickle small
    for layer, entry in _asked_layers(described):
        shape = _float_shape(layer, entry, tensors)
        if shape is not None:
            shapes[layer] = same.setdefault(shape, shape)
    for layer in sorted(described.fused_floats):
        for name in FUSED_EXPERTS:
            stored = tensors.get(f"{layer}.{name}")
            if stored is not None:
                shapes[f"{layer}.{name}"] = tuple(stored.shape)
    return shapes


def _asked_layers(described: Described) -> Iterator[tuple[str, LayerEntry]]:
    yield from described.layers.items()
    for layer, experts in described.experts.items():
        for name, entry in zip(experts.names, (experts.gate, experts.up, experts.down), strict=True):
            yield f"{layer}.0.{name}", entry


def _float_shape(layer: str, entry: LayerEntry, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...] | None:
    """[N, K] of a layer; None for what is no matrix, such as a norm."""
    if entry.spec.is_float:
        stored = tensors.get(f"{layer}.weight")
        return tuple(stored.shape) if stored is not None and len(stored.shape) == 2 else None
    weight = tensors_of(entry.spec, entry.tensors)[0]
    stored = tensors.get(f"{layer}.{weight.name}")
    if stored is None or len(stored.shape) != len(weight.dims):
        return None
    lengths = {dim.axis: dim.elements(length) for dim, length in zip(weight.dims, stored.shape, strict=True)}
    return lengths[Axis.OUT], lengths[Axis.IN]
