# SPDX-License-Identifier: Apache-2.0
"""Tensor values as NumPy arrays, read in parts, and conversion of the float formats that NumPy lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from vllm_npu_quant.checkpoint.files import opened
from vllm_npu_quant.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo
from vllm_npu_quant.checkpoint.text import shown_name
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["MAX_READ", "NUMPY_DTYPES", "read_blocks", "read_tensor", "to_float32"]

#: Bytes of a tensor that are read at once. The largest known scales have 130 MB; weights are read in blocks.
MAX_READ = 1 << 29

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


def read_tensor(path: Path, tensor: TensorInfo, file_size: int) -> np.ndarray:
    """Read a tensor's values.

    They are read, not mapped: a file that is cut off meanwhile would end the process.

    Args:
        path: the file.
        tensor: the tensor.
        file_size: bytes of the file when its header was read.

    Returns:
        A read-only array of dtype NUMPY_DTYPES[tensor.dtype] and shape tensor.shape. F4 and F6 are returned as packed bytes
        with a correspondingly shorter last dimension, or as a vector of all bytes if that dimension does not fill whole
        bytes.

    Raises:
        NpuQuantError: unreadable-file if the file is missing, its size has changed, or it ends too early; operator-limit if
            the tensor has more than MAX_READ bytes.
    """
    if tensor.nbytes > MAX_READ:
        raise _error(
            tensor,
            "the tensor is larger than any of its kind, and is not read",
            f"at most {MAX_READ:,} bytes",
            f"{tensor.nbytes:,} bytes",
            "Check that the config and the weights belong together.",
            code="operator-limit",
        )
    parts = list(_parts(path, tensor, file_size, max(tensor.nbytes, 1)))
    dtype = NUMPY_DTYPES[tensor.dtype]
    shape = tensor.shape
    bits = DTYPE_BITS[tensor.dtype]
    if bits < 8:
        whole = shape and shape[-1] * bits % 8 == 0
        shape = (*shape[:-1], shape[-1] * bits // 8) if whole else (tensor.nbytes,)
    return np.frombuffer(parts[0] if parts else b"", dtype).reshape(shape)


def read_blocks(path: Path, tensor: TensorInfo, file_size: int, elements: int) -> Iterator[np.ndarray]:
    """Read a tensor's values in order, in read-only vectors of at most ``elements`` numbers.

    Args:
        path, tensor, file_size: as for ``read_tensor``.
        elements: numbers of a block; of F4 and F6, bytes.

    Raises:
        NpuQuantError: as ``read_tensor``, whatever the tensor's size.
    """
    dtype = NUMPY_DTYPES[tensor.dtype]
    for part in _parts(path, tensor, file_size, elements * dtype.itemsize):
        yield np.frombuffer(part, dtype)


def _parts(path: Path, tensor: TensorInfo, file_size: int, nbytes: int) -> Iterator[bytes]:
    """The bytes of a tensor, in parts of ``nbytes`` and a rest."""
    with opened(path, file=tensor.file) as (stream, size):
        if size != file_size:
            raise _changed(tensor, file_size, size)
        if tensor.end > size:
            message, fix = "the weight file ends before the end of this tensor", "Download the file again."
            raise _error(tensor, message, f"at least {tensor.end:,} bytes", f"{size:,} bytes", fix)
        for begin in range(tensor.begin, tensor.end, nbytes):
            wanted = min(nbytes, tensor.end - begin)
            part = _read(stream.fileno(), begin, wanted)
            if len(part) < wanted:
                raise _changed(tensor, file_size, begin + len(part))
            yield part


def _read(descriptor: int, begin: int, nbytes: int) -> bytes:
    """Bytes of a file from an offset; fewer where it ends. One call of the system gives at most 2 GiB."""
    part = os.pread(descriptor, nbytes, begin)
    while part and len(part) < nbytes:
        more = os.pread(descriptor, nbytes - len(part), begin + len(part))
        if not more:
            break
        part += more
    return part


def _changed(tensor: TensorInfo, before: int, now: int) -> NpuQuantError:
    message = "the weight file has changed since the checkpoint was opened"
    fix = "Wait until the download or export has finished, and start again."
    return _error(tensor, message, f"{before:,} bytes", f"{now:,} bytes", fix)


def to_float32(values: np.ndarray, tensor: TensorInfo) -> np.ndarray:
    """Convert values of a float tensor, as returned by ``read_tensor`` or ``read_blocks``, to float32; exact except for F64.

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


def _error(
    tensor: TensorInfo, message: str, expected: str, found: str, fix: str, *, code: str = "unreadable-file"
) -> NpuQuantError:
    layer, file = shown_name(tensor.name), shown_name(tensor.file)
    return NpuQuantError([Finding(code, message, layer, file, expected, found, fix=fix)])
