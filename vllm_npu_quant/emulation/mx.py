# SPDX-License-Identifier: Apache-2.0
"""Microscaling: blocks of 32 elements that share a power of two (OCP MX v1.0). Ascend 950 only."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from vllm_npu_quant.emulation.checks import refuse, require, require_dim, require_dtype, require_value

__all__ = ["npu_dynamic_mx_quant", "npu_dynamic_mx_quant_fake"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class _Element(NamedTuple):
    """An element format: the exponent and the value of its largest number; None as dtype means packed float4."""

    emax: int
    largest: float
    dtype: torch.dtype | None


#: By dtype code: torch.float8_e5m2 = 23, float8_e4m3fn = 24; torch_npu's own 291, 292 and float4_e2m1fn_x2 = 296.
_ELEMENTS: Final = {
    23: _Element(15, 57344.0, torch.float8_e5m2),
    291: _Element(15, 57344.0, torch.float8_e5m2),
    24: _Element(8, 448.0, torch.float8_e4m3fn),
    292: _Element(8, 448.0, torch.float8_e4m3fn),
    296: _Element(2, 6.0, None),
}
_FLOAT4_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _check(
    x: torch.Tensor,
    axis: int,
    round_mode: str,
    dst_type: int,
    block_size: int,
    scale_alg: int | None,
    dst_type_max: float,
    max_low_bound: float,
) -> _Element:
    name = "npu_dynamic_mx_quant"
    require_dtype(name, "input", x, *FLOATS)
    require_dim(name, "input", x, 1, 7)
    # Other axes interleave pairs of scale rows, which is not emulated.
    require(axis in (-1, x.dim() - 1), name, "axis", "the last dimension", axis)
    require_value(name, "round_mode", round_mode, "rint")
    require(
        block_size % 32 == 0 and 0 < block_size <= 1024, name, "block_size", "a multiple of 32 up to 1024", block_size
    )
    require_value(name, "dst_type_max", dst_type_max, 0.0)
    require_value(name, "max_low_bound", max_low_bound, 0.0)
    element = _ELEMENTS.get(dst_type)
    if element is None:
        refuse(name, "dst_type", "float8_e5m2, float8_e4m3fn or float4_e2m1fn_x2 (296)", dst_type)
    require_value(name, "scale_alg", scale_alg or 0, *((0,) if element.dtype is None else (0, 1)))
    if element.dtype is None:
        require(x.shape[-1] % 2 == 0, name, "input", "an even last dimension for float4", x)
    if x.dtype == torch.float32:
        require(block_size == 32 and x.shape[-1] >= 32, name, "input", "at least one block of 32 for float32", x)
    return element


def npu_dynamic_mx_quant(
    input: torch.Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks of the last dimension to float8 or float4 with a shared power of two.

        scale_alg 0: exponent = floor(log2(max|block|)) - emax;  scale_alg 1: ceil(log2(max|block| / largest))
        y = round(clamp(x / 2**exponent, -largest, largest)), half to even

    A block of zeros has the exponent -127 (byte 0).

    Args:
        input: float16, bfloat16 or float32 [..., H].
        dst_type: torch.float8_e5m2, torch.float8_e4m3fn, or torch_npu.float4_e2m1fn_x2 (296, two in a byte, the even
            element in the low nibble; scale_alg 0 only).
        block_size: a multiple of 32, at most 1024.

    Returns:
        y: float8 [..., H], or uint8 [..., H/2].
        mxscale: uint8 [..., ceil(blocks / 2), 2]: exponent + 127 (float8_e8m0fnu), padded to pairs with 0.

    Source: op-plugin torch_npu-npu_dynamic_mx_quant.md; OCP Microscaling Formats v1.0.
    """
    element = _check(input, axis, round_mode, dst_type, block_size, scale_alg, dst_type_max, max_low_bound)
    columns = input.shape[-1]
    blocks = -(-columns // block_size)
    padded = torch.nn.functional.pad(input.to(torch.float32), (0, blocks * block_size - columns))
    values = padded.view(*input.shape[:-1], blocks, block_size)
    exponent = _shared_exponent(values.abs().amax(dim=-1), element, scale_alg or 0)
    scaled = torch.ldexp(values.to(torch.float64), -exponent[..., None]).to(torch.float32)
    scaled = scaled.clamp(-element.largest, element.largest).view(padded.shape)[..., :columns]

    pairs = (blocks + 1) // 2
    scale = torch.zeros((*input.shape[:-1], 2 * pairs), dtype=torch.uint8)
    scale[..., :blocks] = (exponent + 127).to(torch.uint8)
    y = _float4(scaled) if element.dtype is None else scaled.contiguous().to(element.dtype)
    return y, scale.view(*input.shape[:-1], pairs, 2)


def _shared_exponent(largest: torch.Tensor, element: _Element, scale_alg: int) -> torch.Tensor:
    """int32 exponents in [-127, 127]."""
    if scale_alg == 0:
        _, exponent = torch.frexp(largest)  # largest = m * 2**exponent with m in [1/2, 1)
        exponent = exponent - 1 - element.emax
    else:
        mantissa, exponent = torch.frexp(largest / element.largest)
        exponent = exponent - (mantissa == 0.5).to(torch.int32)
    return torch.where(largest == 0, -127, exponent.clamp(-127, 127)).to(torch.int32)


def _float4(values: torch.Tensor) -> torch.Tensor:
    """float4 e2m1 codes, two in a byte; values lie in [-6, 6]."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    codes = torch.searchsorted(_FLOAT4_E2M1, rounded.contiguous()).to(torch.uint8)
    codes = codes | (torch.signbit(values).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def npu_dynamic_mx_quant_fake(
    input: torch.Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    element = _check(input, axis, round_mode, dst_type, block_size, scale_alg, dst_type_max, max_low_bound)
    columns = input.shape[-1]
    pairs = ((columns + block_size - 1) // block_size + 1) // 2
    if element.dtype is None:
        y = input.new_empty((*input.shape[:-1], columns // 2), dtype=torch.uint8)
    else:
        y = input.new_empty(input.shape, dtype=element.dtype)
    return y, input.new_empty((*input.shape[:-1], pairs, 2), dtype=torch.uint8)
