# SPDX-License-Identifier: Apache-2.0
"""npu_weight_quant_batchmatmul: the product with a quantized weight."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import (
    INT8,
    FloatMatmul,
    dequantize_weight,
    float_matmul,
    keep_19_bits,
    round_to_int,
    signed_9_bits,
    split_quant_param,
    unpack_weight,
)
from vllm_npu_quant.emulation.rules.weight_quant_batchmatmul import WeightQuantBatchmatmul

__all__ = ["npu_weight_quant_batchmatmul"]


def npu_weight_quant_batchmatmul(call: WeightQuantBatchmatmul, matmul: FloatMatmul = float_matmul) -> torch.Tensor:
    """y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias. The offset is ADDED: pass minus the zero point.

    The weight is dequantized with the roundings of ``dequantize_weight``; products are summed in float32, the bias is
    added in float32, then one rounding to the dtype of x. (For small M the device may split x into integer parts, which
    gives slightly different numbers.) With quant_scale: saturate(clamp(rint(y * s19), -256, 255) + offset9) as int8.

    Source: op-plugin torch_npu-npu_weight_quant_batchmatmul.md and its C++ checks; ops-nn
    weight_quant_batch_matmul_v2/op_kernel, tests/assets/wqbmmv2_kernel_golden.py.
    """
    packed_along_n = call.packed_along_n
    integers = call.weight if packed_along_n is None else unpack_weight(call.weight, packed_along_n)
    scale, offset, size = call.antiquant_scale, call.antiquant_offset, call.antiquant_group_size
    weight = dequantize_weight(integers, scale, offset, call.x.dtype, size)
    if call.quant_scale is None:
        return matmul(call.x, weight, call.bias).to(call.x.dtype)
    # A requantized output is not rounded to the dtype of x in between.
    out = float_matmul(call.x, weight, call.bias)
    if call.quant_scale.dtype == torch.int64:
        factor, offset9 = split_quant_param(call.quant_scale)
    else:
        factor = keep_19_bits(call.quant_scale)
        offset9 = torch.zeros(1) if call.quant_offset is None else signed_9_bits(call.quant_offset)
    return round_to_int(signed_9_bits(out * factor) + offset9, INT8).to(torch.int8)
