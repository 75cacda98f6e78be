# SPDX-License-Identifier: Apache-2.0
"""npu_quant_matmul: the product of quantized matrices."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.numerics import (
    INT8,
    IntMatmul,
    float_bits,
    int_matmul,
    keep_19_bits,
    round_to_int,
    signed_9_bits,
    split_int8_matmul,
    split_quant_param,
    unpack_int4,
    unpack_weight,
)
from vllm_npu_quant.emulation.rules.quant_matmul import GROUP_SIZE, Form, QuantMatmul

__all__ = ["npu_quant_matmul"]


def npu_quant_matmul(call: QuantMatmul, matmul: IntMatmul = int_matmul) -> torch.Tensor:
    """Integer matrix product, dequantized. With acc = int32(x1 @ x2), exact:

        static, float16 out:  (acc + bias_int32) * s19                             s19: the scale cut to 19 bits
        static, int8 out:     saturate(clamp(rint((acc + bias_int32) * s19), -256, 255) + offset9)
        static, bfloat16 out: (acc + bias_int32) * scale, or acc * scale + bias_float
        per token:            (acc + bias_int32) * scale * pertoken_scale, or acc * scale * pertoken_scale + bias_float
        int32 out:            acc + bias_int32; the scale must be given and is not read
        int4 x int4, groups:  pertoken_scale * sum_g scale_g * (x1_g @ x2_g - rowsum(x1_g) * offset_g)
        int8 x int4, groups:  (16 * (hi @ w*s) + lo @ w*s + offset) * pertoken_scale with x1 = 16 * hi + lo + 8;
                              sums over groups are kept in float16

    Everything after acc is float32 with one rounding to the output's dtype. In the last form the offset must be
    8 * sum_k w[k] * s[k] (computed off line), or the result is wrong.

    Source: op-plugin torch_npu-npu_quant_matmul.md, QuantMatmulKernelNpuOpApi.cpp; ops-nn aclnnQuantMatmulV5.md,
    quant_batch_matmul_v3/tests/assets golden (compute_requant, compute_pertoken); op-plugin test_npu_grouped_matmul.py
    (the float16 sums of int8 x int4).
    """
    form = call.form
    if form is Form.INT8_INT4:
        weight, scale = unpack_weight(call.x2, True), float_bits(call.scale)
        total = split_int8_matmul(call.x1, weight, scale, call.given("offset"), matmul)
        return (total * call.given("pertoken_scale")).to(call.out_dtype)
    if form is Form.INT4_GROUPED:
        return (_grouped_int4_matmul(call, matmul) * call.given("pertoken_scale")).to(call.out_dtype)
    if form is Form.INT4:
        acc = matmul(unpack_int4(call.x1), unpack_weight(call.x2, call.packed_along_n))
    else:
        acc = matmul(call.x1, call.x2)
    if call.bias is not None and call.bias.dtype == torch.int32:
        acc = acc + call.bias
    return acc if call.out_dtype is torch.int32 else _scaled(call, acc.to(torch.float32))


def _scaled(call: QuantMatmul, acc: torch.Tensor) -> torch.Tensor:
    """A float32 accumulator scaled and rounded to the output's dtype."""
    if call.pertoken_scale is None and call.out_dtype in (torch.float16, torch.int8):
        # Through the fix-pipe of the matrix unit.
        if call.scale.dtype == torch.int64:
            factor, offset9 = split_quant_param(call.scale)
        else:
            factor = keep_19_bits(call.scale)
            offset9 = torch.zeros(1) if call.offset is None else signed_9_bits(call.offset)
        out = acc * factor
        if call.out_dtype is torch.int8:
            return round_to_int(signed_9_bits(out) + offset9, INT8).to(torch.int8)
        return out.to(call.out_dtype)
    out = acc * call.scale.to(torch.float32)
    if call.pertoken_scale is not None:
        out = out * call.pertoken_scale.unsqueeze(-1)
    if call.bias is not None and call.bias.dtype != torch.int32:
        out = out + call.bias.to(torch.float32)
    return out.to(call.out_dtype)


def _grouped_int4_matmul(call: QuantMatmul, matmul: IntMatmul) -> torch.Tensor:
    """sum_g scale_g * (x_g @ w_g - rowsum(x_g) * offset_g) in float32: weights (w - offset) * scale, MINUS here."""
    x, weight = unpack_int4(call.x1), unpack_weight(call.x2, call.packed_along_n)
    offset = call.given("offset").to(torch.float32)
    total = torch.zeros(x.shape[0], weight.shape[1])
    for group in range(call.scale.shape[0]):
        part = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        rows = x[:, part].contiguous()
        product = matmul(rows, weight[part]).to(torch.float32)
        row_sum = rows.to(torch.int32).sum(dim=1, keepdim=True).to(torch.float32)
        total += (product - row_sum * offset[group]) * call.scale[group]
    return total
