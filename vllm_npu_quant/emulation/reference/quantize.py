# SPDX-License-Identifier: Apache-2.0
"""npu_quantize: static quantization."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import pack_int4, round_to_int
from vllm_npu_quant.emulation.rules.quantize import Quantize

__all__ = ["npu_quantize"]


def npu_quantize(call: Quantize) -> torch.Tensor:
    """Static quantization; ``div_mode=False`` MULTIPLIES by the scales.

        div_mode=True:  y = saturate(rint(x / scales + zero_points))
        div_mode=False: y = saturate(rint(x * scales + zero_points))

    Source: op-plugin torch_npu-npu_quantize.md, QuantizeKernelNpuOpApi.cpp; ops-nn quant/ascend_quant_v2 and
    quant/quantize.
    """
    out_dtype, limits = call.output

    def along_axis(tensor: torch.Tensor) -> torch.Tensor:
        shape = [1] * call.input.dim()
        shape[call.dim] = tensor.numel()
        return tensor.to(torch.float32).reshape(shape)

    x = call.input.to(torch.float32)
    x = x / along_axis(call.scales) if call.div_mode else x * along_axis(call.scales)
    if call.zero_points is not None:
        x = x + along_axis(call.zero_points)
    if limits[1] > 2**24:
        x = x.to(torch.float64)  # 2**31 - 1 has no float32
    y = round_to_int(x, limits)
    return pack_int4(y.to(torch.int8)) if call.packed else y.to(out_dtype)
