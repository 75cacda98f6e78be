# SPDX-License-Identifier: Apache-2.0
"""Repeated calls without Python: ``calls.cpp``, built like ``native.c``, between torch's dispatcher and its kernels.

A fast kernel that has checked a call which native.c computes alone records it (``remember_*``); later calls of that form do
not reach Python. Without a C++ compiler, or torch's headers, all calls do.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

from vllm_npu_quant.emulation import native
from vllm_npu_quant.emulation.checks import Arguments

__all__ = ["define", "install", "library", "remember_dynamic_quant", "remember_product"]

logger = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).with_name("calls.cpp")

#: ``ProductCall`` of calls.cpp: eight operands; native.c's constants; and five more.
_PRODUCT: Final = struct.Struct("16q64s5q")
_OPERANDS: Final = (
    "x",
    "weight",
    "scale",
    "int_bias",
    "float_bias",
    "token_scale",
    "antiquant_scale",
    "antiquant_offset",
)
_AS_IT_IS, _TO_FLOAT, _FLOAT_BITS = range(3)
_ABSENT: Final = (-1, _AS_IT_IS)


def flags() -> tuple[str, ...]:
    """The compiler's arguments that build against the torch of this process."""
    torch_folder = Path(torch.__file__).parent
    return (
        "-std=c++20",
        "-O2",
        "-fwrapv",  # a group list may hold any numbers
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DBUILT_FOR_TORCH_{torch.version.git_version}",  # part of the built file's name
        f"-I{torch_folder / 'include'}",
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    )


#: The library that records calls; None before ``library`` loaded it, and if it cannot be built.
_listener: ctypes.CDLL | None = None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built at the first call together with native.c's; None if either cannot be built."""
    global _listener
    if not native.supported():
        return None
    # Two compilers at once: half the wait of a host's first start.
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(native.build, SOURCE, flags())
        kernels = native.library()
    if kernels is None:
        return None
    try:
        found = ctypes.CDLL(str(building.result()))
        found.nq_define.argtypes = [ctypes.c_char_p] * 2
        found.nq_install.argtypes = [ctypes.c_char_p] * 3
        found.nq_remember_product.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        found.nq_remember_product.restype = found.nq_remember_dynamic_quant.restype = None
        found.nq_remember_dynamic_quant.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 3]
        found.nq_computed_here.restype = ctypes.c_int64
        found.nq_use_kernels.argtypes = [ctypes.c_void_p] * 2
        found.nq_use_kernels.restype = None
        addresses = (ctypes.cast(kernel, ctypes.c_void_p) for kernel in (kernels.nq_product, kernels.nq_dynamic_quant))
        found.nq_use_kernels(*addresses)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("every call of an emulated operator goes through Python, which takes longer: %s", error)
        return None
    _listener = found
    return found


def define(namespace: str, schema: str) -> bool:
    """Define an operator that lives as long as the process; its kernels are registered in Python.

    Args:
        schema: without the namespace.

    Returns:
        Whether it is defined; False without the library.
    """
    found = library()
    return found is not None and found.nq_define(namespace.encode(), schema.encode()) == 0


def install(namespace: str, name: str, python: str) -> bool:
    """Make calls.cpp the CPU kernel of an operator that has none.

    Args:
        python: name, with its namespace, of an operator of the same schema with the Python kernel.

    Returns:
        Whether it is; False without the library.
    """
    found = library()
    return found is not None and found.nq_install(namespace.encode(), name.encode(), python.encode()) == 0


@functools.cache
def _places(operator: str) -> dict[str, int]:
    arguments = getattr(torch.ops.npu, operator).default._schema.arguments
    return {argument.name: place for place, argument in enumerate(arguments)}


def remember_product(
    call: Arguments,
    product: native.Product,
    operands: Mapping[str, str],
    *,
    rows: int,
    group_list: torch.Tensor | None = None,
    group_list_type: int = 0,
    spoils_x: bool = False,
    nz_weight: torch.Tensor | None = None,
) -> None:
    """Record that the call which Python computes now is this product; no effect before ``library`` was built.

    Args:
        operands: the operand of ``native.product`` -> the argument that it is, or is the only tensor of; the argument may
            be absent. A scale or bias in another dtype than native.c takes is converted in every call.
        rows: of x, M.
        group_list: the tensor of the argument ``group_list``. group_list_type: as in npu_grouped_matmul.
        spoils_x: x holds garbage afterwards. nz_weight: the weight, if it has to be FRACTAL_NZ and was checked.
    """
    if _listener is None:
        return
    places, packed = _places(call.operator), dict.fromkeys(_OPERANDS, _ABSENT)
    for operand, argument in operands.items():
        tensor = getattr(call, argument)
        if not isinstance(tensor, torch.Tensor):
            if not tensor:
                continue
            tensor = tensor[0]
        if not tensor.is_contiguous():
            return
        taken, conversion = operand, _AS_IT_IS
        if operand == "bias":
            taken = "int_bias" if tensor.dtype == torch.int32 else "float_bias"
        if taken in ("scale", "float_bias") and tensor.dtype != torch.float32:
            conversion = _FLOAT_BITS if tensor.dtype == torch.int64 else _TO_FLOAT
        packed[taken] = places[argument], conversion
    if group_list is not None and (group_list.dtype != torch.int64 or not group_list.is_contiguous()):
        return
    recorded = _PRODUCT.pack(
        *(number for pair in packed.values() for number in pair),
        product.constants,
        rows,
        -1 if group_list is None else places["group_list"],
        group_list_type,
        spoils_x,
        0 if nz_weight is None else nz_weight.untyped_storage()._cdata,
    )
    _listener.nq_remember_product(call.operator.encode(), recorded)


def remember_dynamic_quant(operator: str, quantizer: native.DynamicQuant) -> None:
    """Record that the call which Python computes now is this quantization of its first argument."""
    if _listener is not None:
        _listener.nq_remember_dynamic_quant(operator.encode(), *quantizer.sizes)
