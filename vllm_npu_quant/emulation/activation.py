# SPDX-License-Identifier: Apache-2.0
"""SwiGLU and its fusions with dequantization and quantization."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.checks import require, require_dtype

__all__ = ["npu_swiglu", "npu_swiglu_fake"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) in float32, as the vector unit computes it."""
    return x / (1.0 + torch.exp(-x))


def _check_swiglu(x: torch.Tensor, dim: int) -> list[int]:
    require_dtype("npu_swiglu", "input", x, *FLOATS)
    require(x.dim() >= 1 and -x.dim() <= dim < x.dim(), "npu_swiglu", "dim", f"a dimension of {list(x.shape)}", dim)
    require(x.shape[dim] % 2 == 0, "npu_swiglu", "input", f"an even size in dimension {dim}", x)
    shape = list(x.shape)
    shape[dim] = x.shape[dim] // 2
    return shape


def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) * second half along ``dim``: float32 inside, one rounding.

    Args:
        input: float16, bfloat16 or float32; the size of ``dim`` is even.

    Returns:
        The input's dtype and shape, with half the size in ``dim``.

    Source: op-plugin test_npu_swi_glu.py.
    """
    _check_swiglu(input, dim)
    gate, up = input.to(torch.float32).chunk(2, dim=dim)
    return (silu(gate) * up).to(input.dtype)


def npu_swiglu_fake(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return input.new_empty(_check_swiglu(input, dim))
