# SPDX-License-Identifier: Apache-2.0
"""Rounding a weight to 8-bit integers."""

from __future__ import annotations

import torch

__all__ = ["quantize_per_channel"]


def quantize_per_channel(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``weight`` to 8-bit integers, symmetric, one scale for each output channel.

    Args:
        weight: [N, K], any float dtype.
        dtype: what to compute in. In float32 the values lie in [-127, 127] and ``|weight - q * scale| <= scale / 2`` up
            to float32's own rounding. msModelSlim computes in the model's dtype: in bfloat16 it is off by up to 3/4 of
            a scale.

    Returns:
        int8 [N, K] and float32 scale [N, 1] > 0.

    Raises:
        ValueError: if the weight holds an infinity or a NaN.
    """
    exact = weight.to(dtype)
    peak = exact.abs().amax(dim=1, keepdim=True)
    if not torch.isfinite(peak).all():
        raise ValueError("the weight holds values that are not finite")
    # A row of zeros still needs a scale that can be divided by.
    scale = (peak / 127).clamp_min(torch.finfo(dtype).tiny)
    return (exact / scale).round_().clamp_(-128, 127).to(torch.int8), scale.float()
