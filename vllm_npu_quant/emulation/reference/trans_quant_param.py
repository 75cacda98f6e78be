# SPDX-License-Identifier: Apache-2.0
"""npu_trans_quant_param: the scale and offset that the matrix unit's fix-pipe reads."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import keep_19_bits, pack_quant_param
from vllm_npu_quant.emulation.rules.trans_quant_param import TransQuantParam

__all__ = ["npu_trans_quant_param"]


def npu_trans_quant_param(call: TransQuantParam) -> torch.Tensor:
    """Pack a float32 scale, and an offset, into int64.

        bits 0..31: the scale's bits with the low 13 cleared;  bit 46: 1;  bits 37..45: clamp(rint(offset), -256, 255)

    Returns:
        int64 of the broadcast shape.

    Source: op-plugin torch_npu-npu_trans_quant_param.md; ops-nn quant/trans_quant_param_v2/op_kernel.
    """
    if call.round_mode == 1:
        bits = _round_to_19_bits(call.scale)
    else:
        bits = keep_19_bits(call.scale).view(torch.int32)
    return pack_quant_param(bits, call.offset).expand(call.shape).contiguous()


def _round_to_19_bits(scale: torch.Tensor) -> torch.Tensor:
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    exponent = magnitude & 0x7F800000
    rounded = (magnitude + 0xFFF + ((magnitude >> 13) & 1)) & ~0x1FFF
    rounded = torch.where(exponent == 0x7F800000, magnitude & ~0x1FFF, rounded)
    return (sign | torch.where(exponent == 0, 0, rounded)).to(torch.int32)
