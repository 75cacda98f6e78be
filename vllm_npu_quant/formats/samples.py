# SPDX-License-Identifier: Apache-2.0
"""Stored tensors of small layers, made from the table of layouts, for a format's ``Sample``."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_npu_quant.checkpoint import TensorInfo
from vllm_npu_quant.layouts.tables import ANY_LENGTH, LayerSizes, group_size_of, rows_per_scale_of, tensors_of
from vllm_npu_quant.spec import LayerSpec, TransformSpec

__all__ = ["EXPERTS", "LAYER", "sample_tensors"]

#: A Linear layer, and the experts of a MoE layer.
LAYER = "model.layers.0.self_attn.o_proj"
EXPERTS = "model.layers.0.mlp.experts"
_SIZE = 256


def sample_tensors(spec: LayerSpec, listed: Iterable[str] = (), *, experts: bool = True) -> dict[str, TensorInfo]:
    """The tensors of ``LAYER``, and with ``experts`` of one expert's projections, 256 x 256 each.

    Args:
        spec: their quantization. listed: the optional tensors of its layout that they have.
    """
    sizes = LayerSizes(
        _SIZE,
        _SIZE,
        group_size_of(spec),
        rows_per_scale=rows_per_scale_of(spec, _SIZE),
        transform=spec.transform or TransformSpec(),
    )
    layers = [LAYER, *(f"{EXPERTS}.0.{name}" for name in ("gate_proj", "up_proj", "down_proj") if experts)]
    found = {}
    for tensor in (tensor for tensor in tensors_of(spec, frozenset(listed)) if not tensor.of):
        shape = tuple(1 if length == ANY_LENGTH else length for length in tensor.shape(sizes))
        for layer in layers:
            name = f"{layer}.{tensor.name}"
            found[name] = TensorInfo(name, tensor.dtypes[0], shape, "model.safetensors", 0, 0)
    return found
