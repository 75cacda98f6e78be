# SPDX-License-Identifier: Apache-2.0
"""npu_swiglu: the gated activation."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.rules.swiglu import Swiglu

__all__ = ["npu_swiglu", "silu"]


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) of a float32 tensor, as the vector unit computes it."""
    return x / (1.0 + torch.exp(-x))


def npu_swiglu(call: Swiglu) -> torch.Tensor:
    """silu(first half) * second half along ``dim``: float32 inside, one rounding.

    Returns:
        The input's dtype and shape, with half the size in ``dim``.

    Source: op-plugin test_npu_swi_glu.py.
    """
    gate, up = call.input.to(torch.float32).chunk(2, dim=call.dim)
    return (silu(gate) * up).to(call.input.dtype)
