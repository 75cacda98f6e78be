# SPDX-License-Identifier: Apache-2.0
"""Conversion of FP4 weights (E2M1: MXFP4, NVFP4) to canonical numbers, for chips without FP4.

``w[n, k] = e2m1(code[n, k]) * scale[n, k // group]`` (OCP Microscaling Formats 1.0: 1 sign, 2 exponent and 1 mantissa bit,
bias 1, no infinities, no NaN). Two inputs share a byte, the even one in the low nibble.

Twice an E2M1 value is an integer, so the weight is an int8 weight with the scales of its groups, exactly; operators take it
like that if they take groups. The others get int8 with a scale per channel, which only approximates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.floats import FloatWeight, decode_e8m0, largest_in_groups, raise_bad_values
from vllm_npu_quant.layouts.tables import E2M1, group_size_of
from vllm_npu_quant.spec import LayerSpec

__all__ = ["one_per_row", "to_canonical", "twice_e2m1"]


def one_per_row(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Repeat a number of a checkpoint layer for its rows: [1] to [outputs, 1]. Fused layers then have that of each shard."""
    return stored.reshape(1, 1).expand(outputs, 1)


def _twice(codes: torch.Tensor) -> torch.Tensor:
    """Twice the values of codes 0 to 15, int8."""
    sizes = torch.tensor([round(2 * value) for value in E2M1], dtype=torch.int8)[codes & 7]
    return torch.where(codes >= 8, -sizes, sizes)


_tables: dict[torch.device, torch.Tensor] = {}


def twice_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Decode FP4 codes: uint8 [n, K/2] to int8 [n, K], twice the values."""
    table = _tables.get(packed.device)
    if table is None:
        codes = torch.arange(256)
        # Both values of a byte as one int16: gathering takes one step per byte.
        both = torch.stack((_twice(codes & 15), _twice(codes >> 4)), dim=1).view(torch.int16).flatten()
        table = _tables[packed.device] = both.to(packed.device)
    values = table.index_select(0, packed.reshape(-1).to(torch.int32))
    return values.reshape(packed.shape).view(torch.int8)


def _scale(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scales of the groups, float32 [N, G]: E8M0 codes, or floats with a second factor for the whole layer."""
    scale = tensors["weight_scale"]
    if scale.dtype == torch.uint8:
        return decode_e8m0(scale)
    if "weight_scale_2" in tensors:
        return scale * tensors["weight_scale_2"]
    divisor = tensors["weight_global_scale"]
    return scale / divisor.masked_fill(divisor.isinf(), torch.nan)  # by infinity, all weights would be 0


def to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layouts MXFP4, CT_MXFP4, NVFP4 and CT_NVFP4: weight or weight_packed uint8 [N, K/2] of E2M1 codes;
    weight_scale [N, G], uint8 of E8M0 codes or float32; weight_scale_2 or weight_global_scale float32 [N, 1], or neither.

    The result has the exact values (``float_rows``), the exact integers in groups (``exact``), and int8 integers with a
    scale per channel (``rows``).

    Raises:
        NpuQuantError: bad-value for scales that are not finite.
    """
    packed = tensors["weight_packed"] if "weight_packed" in tensors else tensors["weight"]
    scale = _scale(tensors)
    raise_bad_values(("the scale", "NaN or infinity", not bool(torch.isfinite(scale).all())))
    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    group_size = group_size_of(spec) if scale.shape[1] > 1 else 0

    def integers(start: int, stop: int) -> torch.Tensor:
        return twice_e2m1(packed[start:stop])

    def magnitudes(start: int, stop: int) -> torch.Tensor:
        part = packed[start:stop]
        return torch.maximum(part & 7, (part >> 4) & 7)

    # Codes without the sign bit are ordered like their values; two inputs per byte are in the same group.
    largest = largest_in_groups(magnitudes, outputs, packed.shape[1], group_size // 2, packed.device)
    half = scale / 2
    exact = CanonicalWeight(outputs, inputs, integers, half, None, group_size)
    weight = FloatWeight(
        outputs,
        inputs,
        lambda start, stop: integers(start, stop).to(torch.float32),
        twice_e2m1(largest)[:, ::2].to(torch.float32),
        half,
        group_size,
    )
    return CanonicalLinear(replace(weight.requantized(), exact=exact), bias=tensors.get("bias"))
