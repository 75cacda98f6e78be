# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that the operators share: dtype codes, rounding, packing, dequantization, matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

__all__ = [
    "DTYPE_OF_CODE",
    "FLOATS",
    "HALVES",
    "INT4",
    "INT4_PER_INT32",
    "INT8",
    "PACKED_INT4",
    "FloatMatmul",
    "IntMatmul",
    "dequantize_weight",
    "fill_garbage",
    "float_bits",
    "float_matmul",
    "garbage",
    "int_matmul",
    "keep_19_bits",
    "pack_int4",
    "pack_quant_param",
    "quantize_rows",
    "round_to_int",
    "scaled_groups",
    "signed_9_bits",
    "split_int8_matmul",
    "split_quant_param",
    "unpack_int4",
    "unpack_weight",
]

HALVES: Final = (torch.float16, torch.bfloat16)
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
IntMatmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FloatMatmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

#: Inclusive ranges of the signed integers that operators write.
INT8: Final = (-128, 127)
INT4: Final = (-8, 7)
INT4_PER_INT32: Final = 8

#: Meaning of an ``int`` dtype argument. A torch.dtype that is passed for an ``int`` argument of a schema reaches the
#: kernel as its ScalarType number; torch_npu's own constants (torch_npu.int4 = 285, ...) lie above 256.
DTYPE_OF_CODE: Final[dict[int, torch.dtype]] = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    291: torch.float8_e5m2,
    292: torch.float8_e4m3fn,
}
#: The code of torch.quint4x2: eight int4 packed in an int32.
PACKED_INT4: Final = 16


def round_to_int(values: torch.Tensor, limits: tuple[int, int]) -> torch.Tensor:
    """Round half to even, then saturate. NaN becomes 0, as the device's float-to-integer casts make it.

    Source: CAST_RINT in the quantize kernels of ops-nn (quant/*/op_kernel). Input and output are float32 or float64.
    """
    low, high = limits
    return torch.nan_to_num(torch.round(values), nan=0.0, posinf=high, neginf=low).clamp_(low, high)


def keep_19_bits(scale: torch.Tensor) -> torch.Tensor:
    """A float32 tensor with the low 13 of its 32 bits cleared: truncation, not rounding (relative error below 2**-10).

    The fix-pipe of the matrix unit multiplies by scales of 19 bits. Source: trans_quant_param_v2.h of ops-nn.
    """
    return (scale.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def signed_9_bits(values: torch.Tensor) -> torch.Tensor:
    """Round half to even and saturate to [-256, 255], the range of the fix-pipe's offset and requantization."""
    return round_to_int(values, (-256, 255))


def pack_quant_param(scale_bits: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """The fix-pipe parameter: int64 with the scale's bits in 0..31, the offset in 37..45 and bit 46 set.

    Args:
        scale_bits: int32, the bits of the (already shortened) float32 scale.
        offset: float32 or None.
    """
    packed = (scale_bits.to(torch.int64) & 0xFFFFFFFF) | (1 << 46)
    if offset is not None:
        packed = packed | ((signed_9_bits(offset).to(torch.int64) & 0x1FF) << 37)
    return packed


def split_quant_param(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset) as float32: as the matrix unit reads them from a fix-pipe parameter, 19 bits and 9 bits."""
    scale = keep_19_bits((packed & 0xFFFFFFFF).to(torch.int32).view(torch.float32))
    offset = (packed >> 37) & 0x1FF
    return scale, torch.where(offset >= 256, offset - 512, offset).to(torch.float32)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack eight integers of the last dimension into one int32: element i in bits 4i..4i+3, two's complement.

    Values outside of [-8, 7] lose their high bits silently, as on the device. Shape [..., n] to [..., n/8].
    Source: ConvertWeightToINT4PackKernelNpuOpApi.cpp of op-plugin.
    """
    nibbles = values.to(torch.uint8) & 0xF if values.dtype == torch.int8 else (values & 0xF).to(torch.uint8)
    # Two nibbles a byte, four bytes an int32: both supported machines (x86_64, aarch64) are little-endian.
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_int4``: int32 [..., n/8] to int8 [..., n] with values in [-8, 7]."""
    pairs = packed.contiguous().view(torch.int8)
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(-2)


def unpack_weight(weight: torch.Tensor, packed_along_n: bool) -> torch.Tensor:
    """int8 [..., K, N] of an int4 weight: contiguous [..., K, N/8], or the transposed view [..., K/8, N]."""
    if packed_along_n:
        return unpack_int4(weight)
    return unpack_int4(weight.transpose(-1, -2)).transpose(-1, -2)


def fill_garbage(tensor: torch.Tensor) -> None:
    """Fill memory that the device does not write: with NaN, or bytes of 0x7f. Never zeros, which code might rely on."""
    if tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(int.from_bytes(b"\x7f" * tensor.dtype.itemsize, "little"))


def garbage(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that holds what ``fill_garbage`` writes."""
    out = torch.empty(shape, dtype=dtype)
    fill_garbage(out)
    return out


def quantize_rows(x: torch.Tensor, limits: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantization of float32 rows [..., H]: int8 [..., H], and float32 [...], max|row| / MAX."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    # A Python number over a tensor would be the number times the rounded reciprocal.
    factor = torch.full_like(largest, limits[1]) / largest
    y = round_to_int(x * factor, limits).to(torch.int8)
    return y, (largest / float(limits[1])).squeeze(-1)


def float_bits(scale: torch.Tensor) -> torch.Tensor:
    """The float32 whose bits are the low words of an int64 tensor."""
    return scale.to(torch.int32).view(torch.float32)


def dequantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype, group_size: int = 0
) -> torch.Tensor:
    """(weight + offset) * scale with the roundings of the device, in ``dtype``.

    float16: the addition and the multiplication are each rounded to float16. bfloat16: both are float32, then one rounding
    to bfloat16.

    Args:
        weight: int8 [K, N].
        scale, offset: ``dtype``, [N] or [1]; with group_size [ceil(K / group_size), N], the last group may be short.
    """
    step = torch.float16 if dtype == torch.float16 else torch.float32
    values = weight.to(step)
    depth, width = weight.shape
    scale, offset = scale.to(step), None if offset is None else offset.to(step)
    if group_size and depth % group_size == 0:
        values = values.reshape(-1, group_size, width)
        scale, offset = scale.unsqueeze(1), None if offset is None else offset.unsqueeze(1)
    elif group_size:
        scale = scale.repeat_interleave(group_size, dim=0)[:depth]
        offset = None if offset is None else offset.repeat_interleave(group_size, dim=0)[:depth]
    if offset is not None:
        values = values.add_(offset)
    return values.mul_(scale).to(dtype).view(depth, width)


def int_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Exact int32 product of two int8 matrices, or batches of them.

    Through float64: every partial sum is an integer below 2**31 for K <= 65535, so it is exact in any order.
    """
    return torch.matmul(left.to(torch.float64), right.to(torch.float64)).to(torch.int32)


def float_matmul(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """left @ right + bias, summed in float32 and not rounded."""
    out = torch.matmul(left.to(torch.float32), right.to(torch.float32))
    return out if bias is None else out + bias.to(torch.float32)


def split_int8_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, matmul: IntMatmul
) -> torch.Tensor:
    """int8 x int4 on a unit that multiplies int4 by int4: float32 16 * (hi @ w*s) + lo @ w*s + offset.

    x = 16 * hi + (lo + 8) with hi = x // 16 and lo = (x & 15) - 8, both in [-8, 7]. The products of every group are
    scaled in float32, rounded to float16 and added up in float16.

    Args:
        x: int8 [M, K]. weight: int8 [K, N] in [-8, 7]. scale: float32 [G, N], G divides K. offset: float32 [N].
    """
    halves = torch.cat((x >> 4, (x & 15) - 8))
    size = x.shape[1] // scale.shape[0]
    total = torch.zeros(halves.shape[0], weight.shape[1], dtype=torch.float16)
    for group, factor in enumerate(scale):
        part = slice(group * size, (group + 1) * size)
        product = matmul(halves[:, part].contiguous(), weight[part]).to(torch.float32) * factor
        total = total + product.to(torch.float16)
    high, low = total.to(torch.float32).chunk(2)
    return high * 16.0 + low + offset


def scaled_groups(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, matmul: IntMatmul) -> torch.Tensor:
    """sum_g (x_g @ w_g) * scale_g in float32.

    Args:
        x: int8 [M, K]. weight: int8 [K, N]. scale: float32 [G, N], G divides K.
    """
    size = x.shape[1] // scale.shape[0]
    total = torch.zeros(x.shape[0], weight.shape[1])
    for group, factor in enumerate(scale):
        part = slice(group * size, (group + 1) * size)
        total += matmul(x[:, part].contiguous(), weight[part]).to(torch.float32) * factor
    return total
