# SPDX-License-Identifier: Apache-2.0
"""Conversion of AWQ "gemm" tensors to canonical numbers, and packing.

``w[n, k] = (q[k, n] - z[g, n]) * scales[g, n]`` with ``g = k // group_size``, q and z in [0, 15]. Eight outputs share an
int32: nibble i of column c holds output 8 * c + ORDER[i] (AutoAWQ's WQLinear_GEMM).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.bits import bytes_of
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.tables import group_size_of
from vllm_npu_quant.spec import LayerSpec

__all__ = ["ORDER", "pack", "to_canonical", "unpack", "zeros"]

#: Offset of the output in each nibble, lowest nibble first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_MIDDLE = 8


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [R, C] to uint8 [R, 8 * C], values in [0, 15]."""
    as_bytes = bytes_of(_in_order(words)).flatten(-2)
    return torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(-2)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int32 [...] with output i of each word in nibble i. Works on words, an eighth as many elements as values."""
    swapped = (words ^ (words >> 8)) & 0x0000FF00  # the two middle bytes
    words = words ^ swapped ^ (swapped << 8)
    swapped = (words ^ (words >> 4)) & 0x00F000F0  # the two middle nibbles of each half
    return words ^ swapped ^ (swapped << 4)


def pack(values: torch.Tensor) -> torch.Tensor:
    """Inverse of ``unpack``: integers [R, 8 * C] in [0, 15] to int32 [R, C]."""
    nibbles = values.to(torch.uint8).unflatten(-1, (-1, 8))[..., ORDER].unflatten(-1, (4, 2))
    as_bytes = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return as_bytes.contiguous().view(torch.int32).squeeze(-1)


def zeros(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Unpack qzeros: int32 [G, N/8] to uint8 [G, N]."""
    return unpack(stored)


def to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout AWQ_GEMM: qweight int32 [K, N/8], scales float32 [G, N], zeros uint8 [G, N] or none (all 8).

    Raises:
        NpuQuantError: bad-value if the config has zero_point false and stored zero points are not 8.
    """
    words, scales, stored = tensors["qweight"], tensors["scales"], tensors.get("qzeros")
    inputs, columns = words.shape
    zero = None
    if stored is not None and bool((stored != _MIDDLE).any()):
        if spec.weight is not None and spec.weight.symmetric:
            raise NpuQuantError([_contradiction(stored)])
        zero = stored.t().to(torch.float32) - _MIDDLE

    def rows(start: int, stop: int) -> torch.Tensor:
        first = start // 8
        block = unpack(words[:, first : -(-stop // 8)])[:, start - first * 8 : stop - first * 8]
        return (block.view(torch.int8) - _MIDDLE).t()

    weight = CanonicalWeight(columns * 8, inputs, rows, scales.t(), zero, group_size_of(spec), bits=4)
    return CanonicalLinear(weight, bias=tensors.get("bias"))


def _contradiction(stored: torch.Tensor) -> Finding:
    return Finding(
        "bad-value",
        "the config says zero_point false, and the weights have zero points",
        expected=f"qzeros {_MIDDLE} everywhere",
        found=f"{int(stored.min())} to {int(stored.max())}",
        fix='set "zero_point": true in the quantization config if the producer quantized asymmetrically, or re-export',
    )
