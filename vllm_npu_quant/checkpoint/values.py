# SPDX-License-Identifier: Apache-2.0
"""Tensor values as NumPy arrays, and conversion of the float formats that NumPy lacks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from vllm_npu_quant.checkpoint.files import opened
from vllm_npu_quant.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo
from vllm_npu_quant.checkpoint.text import shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["NUMPY_DTYPES", "map_tensor", "to_float32"]

#: NumPy dtype of the returned values, by safetensors dtype; little-endian like the format.
NUMPY_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
} | {name: np.dtype("<u1") for name in DTYPE_BITS if name == "F4" or name.startswith(("F6_", "F8_"))}

#: 8-bit and 4-bit floats: exponent bits, mantissa bits, exponent bias.
#: E4M3 and E5M2: Micikevicius et al. 2022 (arXiv:2209.05433); FNUZ: Noune et al. 2022 (arXiv:2206.02915);
#: E8M0 and E2M1: OCP Microscaling Formats 1.0.
_SMALL_FLOATS: dict[str, tuple[int, int, int]] = {
    "F8_E4M3": (4, 3, 7),
    "F8_E5M2": (5, 2, 15),
    "F8_E4M3FNUZ": (4, 3, 8),
    "F8_E5M2FNUZ": (5, 2, 16),
    "F4": (2, 1, 1),
}


def map_tensor(path: Path, tensor: TensorInfo, file_size: int) -> np.ndarray:
    """Map a tensor's values read-only into memory; only pages that are accessed are read.

    Args:
        path: the file.
        tensor: the tensor.
        file_size: bytes of the file when its header was read.

    Returns:
        An array of dtype NUMPY_DTYPES[tensor.dtype] and shape tensor.shape. F4 and F6 are returned as packed bytes with a
        correspondingly shorter last dimension, or as a vector of all bytes if that dimension does not fill whole bytes.

    Raises:
        NpuQuantError: unreadable-file if the file is missing, its size has changed, or it ends too early.
    """
    dtype = NUMPY_DTYPES[tensor.dtype]
    shape = tensor.shape
    bits = DTYPE_BITS[tensor.dtype]
    if bits < 8:
        whole = shape and shape[-1] * bits % 8 == 0
        shape = (*shape[:-1], shape[-1] * bits // 8) if whole else (tensor.nbytes,)
    with opened(path, file=tensor.file) as (stream, size):
        if size != file_size:
            message = "the weight file has changed since the checkpoint was opened"
            fix = "Wait until the download or export has finished, and start again."
            raise _error(tensor, message, f"{file_size:,} bytes", f"{size:,} bytes", fix)
        if tensor.end > size:
            message, fix = "the weight file ends before the end of this tensor", "Download the file again."
            raise _error(tensor, message, f"at least {tensor.end:,} bytes", f"{size:,} bytes", fix)
        if tensor.nbytes == 0:  # an empty range cannot be mapped
            values = np.empty(shape, dtype)
            values.flags.writeable = False
            return values
        mapped = np.memmap(stream, np.uint8, "r", tensor.begin, (tensor.nbytes,))
    return np.asarray(mapped).view(dtype).reshape(shape)


def to_float32(values: np.ndarray, tensor: TensorInfo) -> np.ndarray:
    """Convert values of a float tensor, as returned by ``map_tensor``, to float32; exact except for F64.

    Raises:
        ValueError: for integer, complex and 6-bit float dtypes.
    """
    dtype = tensor.dtype
    if dtype in ("F16", "F32", "F64"):
        return values.astype(np.float32)
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F4":  # the low nibble holds the even index
        flat = np.ascontiguousarray(values).reshape(-1)
        both = np.stack([flat & 15, flat >> 4], axis=-1).reshape(-1)
        return _table(dtype)[both].reshape(tensor.shape)
    if dtype.startswith("F8_"):
        return _table(dtype)[values]
    raise ValueError(f"{tensor.name} is {dtype}, which is not converted to float32")


@cache
def _table(dtype: str) -> np.ndarray:
    """The float32 values of all bit patterns of a small float."""
    if dtype == "F8_E8M0":  # exponent only: 2^(code - 127), 255 is NaN
        values = np.ldexp(np.ones(256), np.arange(256) - 127)
        values[255] = np.nan
        return values.astype(np.float32)
    exponent_bits, mantissa_bits, bias = _SMALL_FLOATS[dtype]
    codes = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa = codes % 2**mantissa_bits
    exponent = codes >> mantissa_bits & (2**exponent_bits - 1)
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    subnormal = exponent == 0
    fraction = mantissa / 2**mantissa_bits + ~subnormal
    values = sign * np.ldexp(fraction, np.where(subnormal, 1, exponent) - bias)
    top = exponent == 2**exponent_bits - 1
    if dtype == "F8_E5M2":  # as IEEE 754
        values[top] = np.where(mantissa[top], np.nan, sign[top] * np.inf)
    elif dtype == "F8_E4M3":  # no infinities, one NaN per sign
        values[top & (mantissa == 2**mantissa_bits - 1)] = np.nan
    elif dtype.endswith("FNUZ"):  # no infinities, no negative zero, whose code is the only NaN
        values[len(codes) // 2] = np.nan
    return values.astype(np.float32)


def _error(tensor: TensorInfo, message: str, expected: str, found: str, fix: str) -> NpuQuantError:
    layer, file = shown_name(tensor.name), shown_name(tensor.file)
    return NpuQuantError([Finding("unreadable-file", message, layer, file, expected, found, fix=fix)])
