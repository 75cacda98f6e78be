# SPDX-License-Identifier: Apache-2.0
"""Conversion of FP8 (E4M3) weights to canonical numbers, for chips without FP8.

``w[n, k] = e4m3(code[n, k]) * scale[n, k // group]`` (OCP 8-bit floating point: 1 sign, 4 exponent and 3 mantissa bits,
bias 7, no infinities, one NaN per sign). Each row is requantized to int8 with its own scale ``max|w| / 127``, in blocks of
rows. Codes are kept as bytes because some chips do not support the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.tables import group_size_of
from vllm_npu_quant.spec import LayerSpec

__all__ = ["as_bytes", "decode_e4m3", "float_rows", "largest_codes", "requantized", "to_canonical"]

#: Elements per block of rows while it is float: 4 MiB of float32 and a few temporaries of that size.
_BLOCK_ELEMENTS = 1 << 20

#: Largest integer of a symmetric int8 weight.
_INT8_MAX = 127


def as_bytes(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """View a stored FP8 weight as its codes, uint8 of the same shape."""
    return stored.view(torch.uint8)


def _e4m3_values() -> torch.Tensor:
    """Values of the 256 codes, float32; 0 for NaN."""
    codes = torch.arange(256, dtype=torch.int32)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).to(torch.float32)
    fraction = torch.where(exponent > 0, 1 + mantissa / 8, mantissa / 8)
    size = torch.ldexp(fraction, exponent.clamp(min=1) - 7)
    values = torch.where(codes >= 128, -size, size)
    return torch.where(codes & 127 == 127, torch.zeros_like(values), values)


_tables: dict[torch.device, torch.Tensor] = {}


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Decode FP8 codes: uint8 of any shape to float32. NaN codes give 0; ``to_canonical`` rejects them."""
    table = _tables.get(codes.device)
    if table is None:
        table = _tables[codes.device] = _e4m3_values().to(codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def float_rows(codes: torch.Tensor, scale: torch.Tensor, group_size: int, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of the weight as float32 [stop - start, K].

    Args:
        codes: uint8 [N, K].
        scale: float32 [N, G].
        group_size: inputs per scale; 0 if G is 1.
    """
    values = decode_e4m3(codes[start:stop])
    part = scale[start:stop]
    if part.shape[1] > 1:
        part = part.repeat_interleave(group_size, dim=1)[:, : values.shape[1]]
    return values.mul_(part)


def largest_codes(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Codes of the largest magnitude in each group of each row: uint8 [N, K] to uint8 [N, G].

    Without the sign bit, codes are ordered like the values that they encode; 127 is NaN.
    """
    outputs, inputs = codes.shape
    if group_size <= 0 or group_size >= inputs:
        group_size = inputs
    groups = -(-inputs // group_size)
    largest = torch.empty(outputs, groups, dtype=torch.uint8, device=codes.device)
    for start, stop in _blocks(0, outputs, inputs):
        block = codes[start:stop] & 127
        whole = inputs // group_size * group_size
        if whole:
            largest[start:stop, : inputs // group_size] = block[:, :whole].unflatten(1, (-1, group_size)).amax(dim=2)
        if whole < inputs:
            largest[start:stop, -1] = block[:, whole:].amax(dim=1)
    return largest


def requantized(codes: torch.Tensor, scale: torch.Tensor, group_size: int, largest: torch.Tensor) -> CanonicalWeight:
    """Requantize a weight to int8 per channel. Scales are computed now, integers on demand.

    Args:
        codes, scale, group_size: as for ``float_rows``.
        largest: the result of ``largest_codes`` for the same groups.
    """
    outputs, inputs = codes.shape
    largest = decode_e4m3(largest).mul_(scale.abs()).amax(dim=1, keepdim=True)
    channel = torch.where(largest > 0, largest / _INT8_MAX, torch.ones_like(largest))
    steps = scale / channel

    def rows(start: int, stop: int) -> torch.Tensor:
        values = torch.empty(stop - start, inputs, dtype=torch.int8, device=codes.device)
        for low, high in _blocks(start, stop, inputs):
            block = float_rows(codes, steps, group_size, low, high)
            values[low - start : high - start] = block.round_().clamp_(-_INT8_MAX, _INT8_MAX)
        return values

    return CanonicalWeight(outputs, inputs, rows, channel)


def to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layouts FP8 and FP8_INV: weight uint8 [N, K] of E4M3 codes, weight_scale or weight_scale_inv float32 [N, G].

    The result has the exact values (``float_rows``) and int8 integers with a scale per channel (``rows``).

    Raises:
        NpuQuantError: bad-value for NaN codes, scales that are not finite, or zero points that are not 0.
    """
    codes = tensors["weight"]
    scale = tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"]
    group_size = group_size_of(spec)
    largest = largest_codes(codes, group_size)
    findings = [
        Finding(
            "bad-value",
            f"{name} holds {what}",
            expected=expected,
            found=what,
            fix="re-export or download the checkpoint",
        )
        for name, what, expected, wrong in (
            ("the FP8 weight", "NaN", "finite numbers", bool((largest == 127).any())),
            ("the scale", "NaN or infinity", "finite scales", not bool(torch.isfinite(scale).all())),
            ("weight_offset", "nonzero offsets", "0 everywhere", _nonzero(tensors.get("weight_offset"))),
        )
        if wrong
    ]
    if findings:
        raise NpuQuantError(findings)
    weight = requantized(codes, scale, group_size, largest)
    weight.float_rows = lambda start, stop: float_rows(codes, scale, group_size, start, stop)
    return CanonicalLinear(weight, bias=tensors.get("bias"))


def _blocks(start: int, stop: int, inputs: int) -> list[tuple[int, int]]:
    height = max(_BLOCK_ELEMENTS // max(inputs, 1), 1)
    return [(low, min(low + height, stop)) for low in range(start, stop, height)]


def _nonzero(offset: torch.Tensor | None) -> bool:
    return offset is not None and bool(offset.count_nonzero())
