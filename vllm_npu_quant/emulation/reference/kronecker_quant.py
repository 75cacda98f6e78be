# SPDX-License-Identifier: Apache-2.0
"""npu_kronecker_quant: FlatQuant's transform with int4 quantization."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import INT4, pack_int4, round_to_int
from vllm_npu_quant.emulation.rules.kronecker_quant import KroneckerQuant

__all__ = ["npu_kronecker_quant"]


def npu_kronecker_quant(call: KroneckerQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """FlatQuant's transform and int4 quantization of every token.

        x' = round(x @ p2);  x'' = p1 @ x';  scale = max|x''| / (7 / clip_ratio);  y = saturate(rint(x'' / scale))

    x' is rounded to the input's dtype; x'' stays float32. (op-plugin's golden truncates y, and its test is skipped; the
    kernel rounds.) A token of zeros gives y = 0 and scale = 0.

    Returns:
        out: int32 [K, M, N/8], eight int4 in each.
        quant_scale: float32 [K].

    Source: op-plugin torch_npu-npu_kronecker_quant.md; ops-nn matmul/flat_quant.
    """
    right = torch.matmul(call.x.to(torch.float32), call.kronecker_p2.to(torch.float32)).to(call.x.dtype)
    both = torch.matmul(call.kronecker_p1.to(torch.float32), right.to(torch.float32))
    largest = both.abs().amax(dim=(1, 2))
    scale = largest / (7.0 / (1.0 if call.clip_ratio is None else call.clip_ratio))
    return pack_int4(round_to_int(both / scale[:, None, None], INT4).to(torch.int8)), scale
