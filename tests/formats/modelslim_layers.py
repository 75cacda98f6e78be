# SPDX-License-Identifier: Apache-2.0
"""Headers of ModelSlim checkpoints that were never written: the tensors that a description lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_npu_quant.checkpoint import TensorInfo
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.modelslim import DESCRIPTION_FILE, read

__all__ = ["read_with_headers", "stored_for"]

_SIZE = 256
#: Of quantized layers with scales per channel and one integer per byte.
_STORED: dict[str, tuple[str, tuple[int, ...]]] = {
    "weight": ("I8", (_SIZE, _SIZE)),
    "weight_scale": ("F32", (_SIZE, 1)),
    "weight_offset": ("F32", (_SIZE, 1)),
    "input_scale": ("F32", (1,)),
    "input_offset": ("F32", (1,)),
    "quant_bias": ("I32", (_SIZE,)),
    "deq_scale": ("F32", (_SIZE,)),
}


def stored_for(description: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Stored tensors for every entry of a description; those that have no place in a quantized layer are BF16."""
    found = {}
    for name, kind in description.items():
        if "." in name:
            last = name.rpartition(".")[2]
            dtype, shape = _STORED.get(last, ("BF16", (_SIZE,))) if kind != "FLOAT" else ("BF16", (_SIZE,))
            found[name] = TensorInfo(name, dtype, shape, "model.safetensors", 0, 0)
    return found


def read_with_headers(description: Mapping[str, Any], source: str = DESCRIPTION_FILE) -> Described:
    """The layers of a checkpoint that stores what its description lists."""
    return read(description, stored_for(description), source)
