# SPDX-License-Identifier: Apache-2.0
"""Rounding of float weights while they load, and their conversion to canonical numbers.

``q[n, k] = round(w[n, k] / scale[n, k // group])``, symmetric and rounded half to even. 8 bits: one scale per output row,
``max_k |w| / 127``, in float32. 4 bits: one scale per group of inputs, ``max |w| / 7``, rounded to bfloat16 first, since the
operators for 4-bit weights take scales in the model's dtype. A scale is that of the whole stored row or group, whatever part
of it a rank gets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.int4 import pack_pairs, row_blocks, unpack_pairs
from vllm_npu_quant.layouts.tables import group_size_of, stored_weight
from vllm_npu_quant.spec import LayerSpec

__all__ = ["integers", "packed_integers", "packed_to_canonical", "scales", "to_canonical"]


def scales(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """The scales of a stored weight: [N, K] in any float dtype to float32 [N, G].

    Raises:
        NpuQuantError: bad-value for weights that are not finite.
    """
    bits, size = stored_weight(spec).bits, group_size_of(spec)
    largest = []
    for start, stop in row_blocks(*stored.shape):
        rows = stored[start:stop].to(torch.float32).abs_()
        if size:
            missing = -rows.shape[1] % size
            rows = F.pad(rows, (0, missing)).unflatten(1, (-1, size))
            largest.append(rows.amax(dim=2))
        else:
            largest.append(rows.amax(dim=1, keepdim=True))
    reach = torch.cat(largest)
    if not bool(torch.isfinite(reach).all()):
        message, fix = "the weight holds NaN or infinity, which have no integer", "check the weights that are loaded"
        raise NpuQuantError(
            [Finding("bad-value", message, expected="finite numbers", found="NaN or infinity", fix=fix)]
        )
    scale = (reach / ((1 << (bits - 1)) - 1)).clamp_min_(torch.finfo(torch.float32).tiny)
    return scale if bits == 8 else scale.to(torch.bfloat16).to(torch.float32)


def integers(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """The integers of a stored weight: [N, K] in any float dtype to int8 [N, K]."""
    return _rounded(stored, spec)


def packed_integers(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """The 4-bit integers of a stored weight, two inputs per byte: [N, K] in any float dtype to int8 [N, K/2]."""
    return pack_pairs(_rounded(stored, spec))


def _rounded(stored: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    bits, size = stored_weight(spec).bits, group_size_of(spec)
    limit, scale = 1 << (bits - 1), scales(stored, spec, 0)
    rounded = torch.empty(stored.shape, dtype=torch.int8, device=stored.device)
    for start, stop in row_blocks(*stored.shape):
        part = scale[start:stop]
        if size:
            part = part.repeat_interleave(size, dim=1)[:, : stored.shape[1]]
        rows = stored[start:stop].to(torch.float32) / part
        rounded[start:stop] = rows.round_().clamp_(-limit, limit - 1)
    return rounded


def to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout ROUNDED: weight int8 [N, K], weight_scale float32 [N, G]."""
    weight = CanonicalWeight.of(tensors["weight"], tensors["weight_scale"], None, group_size_of(spec))
    return CanonicalLinear(weight, bias=tensors.get("bias"))


def packed_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout ROUNDED_PAIRS: weight int8 [N, K/2], weight_scale float32 [N, G]."""
    packed, scale = tensors["weight"], tensors["weight_scale"]
    outputs, half = packed.shape
    weight = CanonicalWeight(
        outputs,
        2 * half,
        lambda start, stop: unpack_pairs(packed[start:stop]),
        scale,
        group_size=group_size_of(spec),
        bits=4,
        pairs=lambda start, stop: packed[start:stop],
    )
    return CanonicalLinear(weight, bias=tensors.get("bias"))
