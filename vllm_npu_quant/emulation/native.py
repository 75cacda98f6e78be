# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``native.c``: built once with the host's C compiler, kept in the user's cache, loaded with ctypes.

They need x86-64 with AVX2. On other hosts, and without a compiler, ``available`` is False and the fast kernels use torch;
one log line gives the reason. Before a built library is used it has to reproduce the reference on a few extreme operands.
Nothing here is called in the mode ``reference``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import itertools
import logging
import math
import os
import platform
import shutil
import stat
import struct
import subprocess
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from vllm_npu_quant import settings
from vllm_npu_quant.emulation.numerics import INT8, dequantize_weight, int_matmul, quantize_rows, unpack_weight
from vllm_npu_quant.errors import printable

__all__ = [
    "DynamicQuant",
    "Kind",
    "Product",
    "available",
    "bias",
    "build",
    "dynamic_quant",
    "library",
    "load",
    "product",
    "supported",
]

logger = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).with_name("native.c")
#: One rounding per written operation, signed sums that wrap: the arithmetic of the reference.
FLAGS: Final = (
    "-std=gnu11",
    "-O2",
    "-march=native",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fwrapv",
    "-fPIC",
    "-shared",
)
COMPILER_SECONDS: Final = 300
#: The most characters of the reason for a failure.
MAX_REASON: Final = 400
#: Suffix of a source -> language, environment variable that names a compiler, and its usual names.
_COMPILERS: Final = {".c": ("C", "CC", "gcc", "clang", "cc"), ".cpp": ("C++", "CXX", "g++", "clang++", "c++")}

_CODES: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3, torch.int8: -1}


class Kind:
    """Kinds of products; see ``product`` for the formulas."""

    INT8 = 0
    WEIGHT_ONLY = 1
    INT8_INT4 = 2
    INT4 = 3


#: ``Product`` of native.c, field for field: the part that changes from call to call (ten addresses, the number of groups),
#: and the constants.
_ADDRESSES: Final = struct.Struct("10Qq")
_CONSTANTS: Final = struct.Struct("8q")


# ---------------------------------------------------------------------------------------------------------------- building


def build(source: Path, flags: Sequence[str] = FLAGS) -> Path:
    """Compile a C or C++ file into a shared library in the user's cache, unless it is there.

    The compiler is that of $CC or $CXX, or the first that is found. Its failure is remembered beside the library's place, for
    this source, compiler, version, flags and CPU: compiling again would take seconds at every start and fail again.

    Returns:
        The library's path.

    Raises:
        OSError: no compiler, or it failed.
    """
    language, variable, *names = _COMPILERS[source.suffix]
    compiler = next(filter(None, map(shutil.which, (os.environ.get(variable) or names[0], *names))), None)
    if compiler is None:
        raise FileNotFoundError(f"no {language} compiler ({', '.join(names)} or ${variable})")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILER_SECONDS, check=False).stdout
    parts = (source.read_bytes(), " ".join(flags).encode(), compiler.encode(), version, _cpu().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    name = f"{source.stem}-{digest}.so"
    target = _folder() / name
    if target.is_file():
        return target
    if not os.access(target.parent, os.W_OK):
        target = _own_folder() / name
    with _one_at_a_time(target.with_name(f"{source.stem}.lock")):
        failure = target.with_suffix(settings.FAILED_BUILD)
        if not target.is_file():
            if failure.is_file():
                reason = failure.read_text(encoding="utf-8", errors="replace")[:MAX_REASON]
                raise OSError(f"{reason} (as before; delete {failure} to try again)")
            _compile(compiler, source, flags, target)
    return target


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let one of the workers of a tensor-parallel engine, which start together, compile while the others wait."""
    with path.open("w") as file:
        # A file system without locks: each compiles for itself.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, source: Path, flags: Sequence[str], target: Path) -> None:
    # Compilers write their intermediate files to $TMPDIR, which may be full or closed where the cache is neither.
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        # Libraries in the flags have to follow the source that uses them.
        command = [compiler, str(source), "-o", str(unfinished), *flags]
        environment = {**os.environ, "TMPDIR": folder}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=COMPILER_SECONDS, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{compiler} took more than {COMPILER_SECONDS} s") from error
        if done.returncode == 0:
            os.replace(unfinished, target)
            return
    reason = f"{compiler}: {_first_error(done.stderr)}"
    # A signal or a full disk is no property of the compiler.
    if done.returncode > 0 and os.strerror(errno.ENOSPC) not in done.stderr:
        target.with_suffix(settings.FAILED_BUILD).write_text(reason, encoding="utf-8")
    raise OSError(reason)


def _first_error(output: str) -> str:
    """The first line of a compiler's output that names an error, else its first line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next(
        (line for line in lines if "error" in line.lower()), lines[0] if lines else "it failed without a message"
    )
    return printable(line, MAX_REASON - 100)


def _cpu() -> str:
    """The CPU properties that -march=native depends on: different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = (line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return platform.machine() + "".join(sorted(set(kept)))


def _folder() -> Path:
    """A folder that only this user can write, because the files in it are executed."""
    try:
        folder = settings.kernels_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return folder
    except (OSError, RuntimeError):
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    """A temporary folder of this process, for a cache that cannot be written or is not private."""
    holder = tempfile.TemporaryDirectory(prefix="vllm-npu-quant-")
    _kept.append(holder)
    return Path(holder.name)


_kept: list[Any] = []


def load(path: Path) -> ctypes.CDLL:
    """Load a library built from ``SOURCE`` and declare its functions.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks a function.
    """
    found = ctypes.CDLL(str(path))
    found.nq_dynamic_quant.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_void_p]
    found.nq_dynamic_quant.restype = None
    found.nq_product.argtypes = [ctypes.c_void_p]
    found.nq_product.restype = ctypes.c_int64
    return found


def supported() -> bool:
    """Whether native.c is written for this CPU."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built at the first call; None if it cannot be built or does not reproduce the reference."""
    if not supported():
        return None
    try:
        found = load(build(SOURCE))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("the emulated operators go through torch, which is slow on this host: %s", error)
        return None
    if not reproduces_the_reference(found):
        logger.warning("the emulated operators go through torch: the built kernels are not exact on this host")
        return None
    return found


def available() -> bool:
    """Whether products and quantization can be computed here."""
    return library() is not None


def _loaded() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("the kernels of native.c are not available on this host")
    return found


def reproduces_the_reference(found: ctypes.CDLL) -> bool:
    """Whether the library's integers and dequantized weights are those of the reference, on extreme operands."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int, low: int = -128) -> torch.Tensor:
        picked = torch.tensor([low, -1, 0, 1, 127], dtype=torch.int8)
        return picked[torch.randint(5, shape, generator=generator)]

    for rows, depth, width in ((1, 37, 24), (1, 576, 152), (3, 520, 104), (7, 37, 24), (13, 520, 152), (29, 700, 152)):
        x, weight = integers(rows, depth), integers(depth, width)
        if not torch.equal(product(Kind.INT8, x, weight, torch.int32, found=found), int_matmul(x, weight)):
            return False
        for dtype in (torch.bfloat16, torch.float16):
            packed = torch.randint(-(2**31), 2**31 - 1, (depth, width // 8), generator=generator).to(torch.int32)
            scale = torch.rand((-(-depth // 64), width), generator=generator).to(dtype)
            # One-hot rows pick rows of the dequantized weight.
            ones = torch.eye(depth, dtype=dtype)[torch.randperm(depth, generator=generator)[:rows]]
            for stored, values in ((weight, weight), (packed, unpack_weight(packed, True))):
                picked = ones.float() @ dequantize_weight(values, scale, scale, dtype, 64).float()
                options = {"antiquant_scale": scale, "antiquant_offset": scale, "group_size": 64}
                if not torch.equal(
                    product(Kind.WEIGHT_ONLY, ones, stored, dtype, found=found, **options).float(), picked
                ):
                    return False
            tokens = torch.randn((rows, depth), generator=generator).to(dtype)
            if not all(map(torch.equal, dynamic_quant(tokens, found=found), quantize_rows(tokens.float(), INT8))):
                return False
    return True


# ------------------------------------------------------------------------------------------------------------------- calls


class DynamicQuant:
    """``dynamic_quant`` for one shape and dtype; values that depend on these only are computed once."""

    def __init__(self, x: torch.Tensor, found: ctypes.CDLL | None = None) -> None:
        found = found or _loaded()
        *self.rows, columns = x.shape
        #: The code of the dtype, rows, columns.
        self.sizes = _CODES[x.dtype], math.prod(self.rows), columns
        self._run = found.nq_dynamic_quant

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # One number per dimension, not a tuple: torch.empty takes twice as long for that.
        y, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(*self.rows, dtype=torch.float32)
        self._run(x.data_ptr(), *self.sizes, y.data_ptr(), scale.data_ptr())
        return y, scale


def dynamic_quant(x: torch.Tensor, found: ctypes.CDLL | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with a scale for every row, as ``numerics.quantize_rows``.

    Args:
        x: bfloat16 or float16 [..., K], contiguous, at least 2 dimensions.

    Returns:
        int8 [..., K], float32 [...].
    """
    return DynamicQuant(x, found)(x)


def bias(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as ``product`` takes it: int32 as it is, floats in float32."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype == torch.int32 else tensor.float()).contiguous()


class Product:
    """``product`` for one combination of shapes and dtypes; values that depend on these only are computed once."""

    def __init__(
        self,
        kind: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        out_dtype: torch.dtype,
        scales: torch.Tensor | None,
        group_size: int = 0,
        found: ctypes.CDLL | None = None,
    ) -> None:
        """
        Args:
            scales: scale or antiquant_scale, whichever there is.
        """
        found = found or _loaded()
        rows, int4 = x.shape[0], weight.dtype == torch.int32
        depth, width = weight.shape[-2], weight.shape[-1] * (8 if int4 else 1)
        step = scales is not None and scales.numel() > 1
        codes = _CODES[x.dtype], _CODES[out_dtype]
        #: The part of native.c's ``Product`` that does not change from call to call.
        self.constants = _CONSTANTS.pack(depth, width, int4, *codes, group_size or depth, step, kind)
        self._all_rows = array("q", (0, 0, rows))
        self._run = found.nq_product
        self._shape, self._dtype = (rows, width), out_dtype

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        groups: Sequence[tuple[int, int, int]] | None = None,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        token_scale: torch.Tensor | None = None,
        antiquant_scale: torch.Tensor | None = None,
        antiquant_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty(*self._shape, dtype=self._dtype)
        if groups is None:
            numbers = self._all_rows
        elif groups:
            numbers = array("q", itertools.chain.from_iterable(groups))
        else:
            return out
        address, length = numbers.buffer_info()
        int_bias = bias is not None and bias.dtype == torch.int32
        addresses = _ADDRESSES.pack(
            x.data_ptr(),
            weight.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            bias.data_ptr() if bias is not None and int_bias else 0,
            0 if bias is None or int_bias else bias.data_ptr(),
            0 if token_scale is None else token_scale.data_ptr(),
            0 if antiquant_scale is None else antiquant_scale.data_ptr(),
            0 if antiquant_offset is None else antiquant_offset.data_ptr(),
            out.data_ptr(),
            address,
            length // 3,
        )
        if not self._run(addresses + self.constants):
            raise MemoryError("no memory for the scratch space of a matrix product")
        return out


def product(
    kind: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    group_size: int = 0,
    found: ctypes.CDLL | None = None,
    scale: torch.Tensor | None = None,
    antiquant_scale: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The product of rows with the weight of their group, all contiguous; the functions are those of ``numerics``.

        INT8:         int8 x int8 -> int32 (+ bias_int32); for float outputs * scale * token_scale (+ bias_float32)
        WEIGHT_ONLY:  x @ dequantize_weight(...) (+ bias_float32), summed in float32
        INT8_INT4:    ``split_int8_matmul(...)`` * token_scale, with the bias as its offset
        INT4:         ``scaled_groups(...)`` * token_scale

    Args:
        x: int8, bfloat16 or float16 [M, K]; INT4: int32 [M, K/8].
        weight: int8 [K, N] or [E, K, N]; int4 as int32, N/8 in place of N.
        group_size: inputs per scale; 0 for all of them.
        scale: float32, [1], [N] or [E, N]; INT8_INT4 and INT4: [E, G, N] for G groups of inputs.
        antiquant_scale, antiquant_offset: x's dtype, [N], [G, N], [E, N] or [E, G, N]; or one number.
        groups: (expert, first row, end) of every group; None: all rows times the one weight.
        bias: int32 or float32 [N] or [E, N].
        token_scale: float32 [M].

    Returns:
        [M, N] in ``out_dtype``; rows that no group covers are undefined.
    """
    scales = antiquant_scale if scale is None else scale
    prepared = Product(kind, x, weight, out_dtype, scales, group_size, found)
    return prepared(x, weight, scale=scale, antiquant_scale=antiquant_scale, **options)
