# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that all operators share: rounding, saturation, 19-bit scales, four-bit packing, dtype codes."""

from __future__ import annotations

from typing import Final

import torch

__all__ = [
    "DTYPE_OF_CODE",
    "INT4",
    "INT4_PER_INT32",
    "INT8",
    "fill_garbage",
    "int_matmul",
    "keep_19_bits",
    "pack_int4",
    "pack_quant_param",
    "round_to_int",
    "signed_9_bits",
    "split_quant_param",
    "unpack_int4",
]

#: Inclusive ranges of the signed integers that operators write.
INT8: Final = (-128, 127)
INT4: Final = (-8, 7)
INT4_PER_INT32: Final = 8

#: What an ``int`` dtype argument means. A torch.dtype that is passed for an ``int`` argument of a schema reaches the
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
    """(scale, offset) as float32: what the matrix unit reads of a fix-pipe parameter, 19 bits and 9 bits."""
    scale = keep_19_bits((packed & 0xFFFFFFFF).to(torch.int32).view(torch.float32))
    offset = (packed >> 37) & 0x1FF
    return scale, torch.where(offset >= 256, offset - 512, offset).to(torch.float32)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack eight integers of the last dimension into one int32: element i in bits 4i..4i+3, two's complement.

    Values outside of [-8, 7] lose their high bits without a word, as on the device. Shape [..., n] to [..., n/8].
    Source: ConvertWeightToINT4PackKernelNpuOpApi.cpp of op-plugin.
    """
    nibbles = values.to(torch.uint8) & 0xF if values.dtype == torch.int8 else (values & 0xF).to(torch.uint8)
    # Two nibbles a byte, four bytes an int32: both supported machines (x86_64, aarch64) are little-endian.
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_int4``: int32 [..., n/8] to int8 [..., n] with values in [-8, 7]."""
    pairs = packed.contiguous().view(torch.int8)
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(-2)


def fill_garbage(tensor: torch.Tensor) -> None:
    """Fill memory that the device leaves as it was: NaN, or bytes of 0x7f. Never zeros, which code might rely on."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(int.from_bytes(b"\x7f" * tensor.dtype.itemsize, "little"))


def int_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Exact int32 product of two int8 matrices (or batches of them).

    Through float64: every partial sum is an integer below 2**31 for K <= 65535, so it is exact in any order.
    """
    return torch.matmul(left.to(torch.float64), right.to(torch.float64)).to(torch.int32)
