# SPDX-License-Identifier: Apache-2.0
"""Conversion of FP8 and MXFP8 weights (E4M3) to canonical numbers, for chips without FP8.

``w[n, k] = e4m3(code[n, k]) * scale[n, k // group]`` (OCP 8-bit floating point: 1 sign, 4 exponent and 3 mantissa bits,
bias 7, no infinities, one NaN per sign). Codes are kept as bytes because some chips do not support the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.floats import FloatWeight, decode_e8m0, largest_in_groups, raise_bad_values
from vllm_npu_quant.layouts.tables import group_size_of
from vllm_npu_quant.spec import LayerSpec

__all__ = ["as_bytes", "decode_e4m3", "float_weight", "to_canonical"]

_NAN = 127


def as_bytes(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """View stored 8-bit floats as their codes, uint8 of the same shape."""
    return stored.view(torch.uint8)


def _e4m3_values() -> torch.Tensor:
    """Values of the 256 codes, float32; 0 for NaN."""
    codes = torch.arange(256, dtype=torch.int32)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).to(torch.float32)
    fraction = torch.where(exponent > 0, 1 + mantissa / 8, mantissa / 8)
    size = torch.ldexp(fraction, exponent.clamp(min=1) - 7)
    values = torch.where(codes >= 128, -size, size)
    return torch.where(codes & 127 == _NAN, torch.zeros_like(values), values)


_tables: dict[torch.device, torch.Tensor] = {}


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Decode FP8 codes: uint8 of any shape to float32. NaN codes give 0; ``to_canonical`` rejects them."""
    table = _tables.get(codes.device)
    if table is None:
        table = _tables[codes.device] = _e4m3_values().to(codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def float_weight(codes: torch.Tensor, scale: torch.Tensor, group_size: int) -> FloatWeight:
    """A weight of E4M3 codes.

    Args:
        codes: uint8 [N, K].
        scale: float32 [N, G].
        group_size: inputs per scale; 0 if G is 1.

    Raises:
        NpuQuantError: bad-value for NaN codes, or scales that are not finite.
    """
    outputs, inputs = codes.shape
    # Without the sign bit, codes are ordered like the values that they encode; the largest one is NaN.
    largest = largest_in_groups(lambda start, stop: codes[start:stop] & 127, outputs, inputs, group_size, codes.device)
    raise_bad_values(
        ("the FP8 weight", "NaN", bool((largest == _NAN).any())),
        ("the scale", "NaN or infinity", not bool(torch.isfinite(scale).all())),
    )
    return FloatWeight(
        outputs,
        inputs,
        lambda start, stop: decode_e4m3(codes[start:stop]),
        decode_e4m3(largest),
        scale,
        group_size,
    )


def to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layouts FP8, FP8_BLOCK_4D and MXFP8: weight uint8 [N, K] of E4M3 codes; weight_scale or weight_scale_inv
    [N, G], float32, or uint8 of E8M0 codes.

    The result has the exact values (``float_rows``) and int8 integers with a scale per channel (``rows``).

    Raises:
        NpuQuantError: bad-value for NaN codes, scales that are not finite, or zero points that are not 0.
    """
    scale = tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"]
    if scale.dtype == torch.uint8:
        scale = decode_e8m0(scale)
    offset = tensors.get("weight_offset")
    raise_bad_values(("weight_offset", "nonzero offsets", offset is not None and bool(offset.count_nonzero())))
    weight = float_weight(tensors["weight"], scale, group_size_of(spec))
    return CanonicalLinear(weight.requantized(), bias=tensors.get("bias"))
