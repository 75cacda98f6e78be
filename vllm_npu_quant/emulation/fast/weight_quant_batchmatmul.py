# SPDX-License-Identifier: Apache-2.0
"""npu_weight_quant_batchmatmul by native.c."""

from __future__ import annotations

from typing import Any, Final

import torch

from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.fast.forms import form, remember
from vllm_npu_quant.emulation.fast.products import fast_float_matmul
from vllm_npu_quant.emulation.reference.weight_quant_batchmatmul import npu_weight_quant_batchmatmul
from vllm_npu_quant.emulation.rules.weight_quant_batchmatmul import WeightQuantBatchmatmul

__all__ = ["npu_weight_quant_batchmatmul_fast"]

#: Operand of native.c -> argument.
_OPERANDS: Final = {
    "x": "x",
    "weight": "weight",
    "antiquant_scale": "antiquant_scale",
    "antiquant_offset": "antiquant_offset",
    "bias": "bias",
}
#: The native kernel of the calls that passed their check.
_products: dict[Any, native.Product] = {}


def npu_weight_quant_batchmatmul_fast(*args: Any, **kwargs: Any) -> torch.Tensor:
    """npu_weight_quant_batchmatmul that dequantizes in the product: the same up to the order of float32 sums."""
    call = WeightQuantBatchmatmul(*args, **kwargs)
    x, weight, scale, offset, bias = call.x, call.weight, call.antiquant_scale, call.antiquant_offset, call.bias
    # The other arguments, by default None and 0, change the result or are refused.
    plain = (
        call.quant_scale is None and call.quant_offset is None and not call.inner_precise and call.weight_dtype is None
    )
    key = (form(x), form(weight), form(scale), form(offset), form(bias), call.antiquant_group_size)
    product = _products.get(key) if plain else None
    if product is None:
        call.check()
        if not (plain and x.is_contiguous() and weight.is_contiguous() and native.available()):
            return npu_weight_quant_batchmatmul(call, fast_float_matmul)
        group_size = call.antiquant_group_size
        product = native.Product(native.Kind.WEIGHT_ONLY, x, weight, call.out_dtype, scale, group_size)
        remember(_products, key, product)
    calls.remember_product(call, product, _OPERANDS, rows=x.shape[0])
    return product(
        x,
        weight,
        antiquant_scale=scale.contiguous(),
        antiquant_offset=None if offset is None else offset.contiguous(),
        bias=native.bias(bias),
    )
