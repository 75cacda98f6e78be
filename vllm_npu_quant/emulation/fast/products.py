# SPDX-License-Identifier: Apache-2.0
"""Matrix products by the fastest exact way that the host has, for calls that native.c does not compute alone."""

from __future__ import annotations

import functools
import platform

import torch

from vllm_npu_quant.emulation import native
from vllm_npu_quant.emulation.numerics import float_matmul, int_matmul

__all__ = ["fast_float_matmul", "fast_int_matmul", "float_int_matmul"]

#: Up to here a float32 sum of products of 8-bit numbers is exact: 1024 * 128 * 128 = 2**24.
EXACT_DEPTH = 1024
#: From here on the CPU's own int8 product is faster than a kernel that widens to 16 bits.
MANY_ROWS = 64


def fast_float_matmul(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``float_matmul``, but bfloat16 without a bias goes through the CPU's own product, which rounds once."""
    if bias is None and left.dtype == torch.bfloat16:
        return torch.matmul(left, right)
    return float_matmul(left, right, bias)


def fast_int_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``int_matmul``: int32 [..., M, N] of int8 [..., M, K] and [K, N]."""
    if right.dim() != 2 or not right.numel():
        return int_matmul(left, right)
    rows = left.reshape(-1, left.shape[-1]).contiguous()
    own = has_int8_dot() and int8_dot_is_exact()
    if native.available() and right.is_contiguous() and not (own and rows.shape[0] >= MANY_ROWS):
        product = native.product(native.Kind.INT8, rows, right, torch.int32)
    elif own:
        product = torch._int_mm(rows, right)
    else:
        product = float_int_matmul(rows, right)
    return product.view(*left.shape[:-1], right.shape[-1])


def float_int_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``int_matmul`` of two matrices through float32, by parts of the depth in which every sum is exact."""
    product = torch.zeros((left.shape[0], right.shape[1]), dtype=torch.int32)
    for start in range(0, left.shape[1], EXACT_DEPTH):
        part = slice(start, start + EXACT_DEPTH)
        product += torch.mm(left[:, part].to(torch.float32), right[part].to(torch.float32)).to(torch.int32)
    return product


@functools.cache
def has_int8_dot() -> bool:
    """Whether the CPU multiplies bytes into 32-bit sums; without, torch._int_mm is a plain loop."""
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_vnni_supported())
    return True


@functools.cache
def int8_dot_is_exact() -> bool:
    """Whether torch._int_mm is exact on this CPU, tried once with extreme values."""
    generator = torch.Generator().manual_seed(0)
    for rows, depth, width in ((1, 64, 32), (3, 257, 17), (33, 512, 96)):
        for pool in ([-128, 127], [127], [-128], [-128, -1, 0, 1, 127]):
            values = torch.tensor(pool, dtype=torch.int8)
            left = values[torch.randint(len(pool), (rows, depth), generator=generator)]
            right = values[torch.randint(len(pool), (depth, width), generator=generator)]
            exact = int_matmul(left, right)
            try:
                products = (torch._int_mm(left, right), torch._int_mm(left, right.t().contiguous().t()))
            except RuntimeError:
                return False
            if not all(torch.equal(product, exact) for product in products):
                return False
    return True
