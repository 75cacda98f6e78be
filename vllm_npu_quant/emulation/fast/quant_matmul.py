# SPDX-License-Identifier: Apache-2.0
"""npu_quant_matmul by native.c."""

from __future__ import annotations

from typing import Any, Final

import torch

from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.fast.forms import form, remember
from vllm_npu_quant.emulation.fast.products import fast_int_matmul
from vllm_npu_quant.emulation.numerics import keep_19_bits, split_quant_param
from vllm_npu_quant.emulation.reference.quant_matmul import npu_quant_matmul
from vllm_npu_quant.emulation.rules.quant_matmul import Form, QuantMatmul

__all__ = ["npu_quant_matmul_fast"]

#: Optional arguments that are part of a key; a call with any other is checked every time.
_KEYED: Final = frozenset(("offset", "pertoken_scale", "bias", "output_dtype"))
#: Operand of native.c -> argument.
_OPERANDS: Final = {
    "x": "x1",
    "weight": "x2",
    "scale": "scale",
    "token_scale": "pertoken_scale",
    "bias": "bias",
}
#: The native kernel, if there is one, of the calls that passed their check.
_products: dict[Any, tuple[native.Product | None]] = {}


def npu_quant_matmul_fast(x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor, **options: Any) -> torch.Tensor:
    """npu_quant_matmul with the integer product and the scaling in one kernel: the same numbers, bit for bit."""
    call = QuantMatmul(x1, x2, scale, **options)
    key, known = None, None
    if _KEYED.issuperset(options):
        tensors = (form(x1), form(x2), form(scale), form(call.offset), form(call.pertoken_scale), form(call.bias))
        key = (*tensors, call.output_dtype)
        known = _products.get(key)
    if known is None:
        call.check()
        known = (_kernel(call),)
        if key is not None:
            remember(_products, key, known)
    (product,) = known
    if product is None:
        return npu_quant_matmul(call, fast_int_matmul)
    token_scale, bias = call.pertoken_scale, call.bias
    if token_scale is None and call.out_dtype is torch.float16:
        factor = split_quant_param(scale)[0] if scale.dtype == torch.int64 else keep_19_bits(scale)
    else:
        factor = scale.float().contiguous()
        calls.remember_product(call, product, _OPERANDS, rows=x1.shape[0])
    return product(
        x1,
        x2,
        scale=factor,
        token_scale=None if token_scale is None else token_scale.contiguous(),
        bias=native.bias(bias),
    )


def _kernel(call: QuantMatmul) -> native.Product | None:
    plain = call.form is Form.INT8 and len(call.out_shape) == 2 and call.out_dtype is not torch.int8
    if not (plain and call.x1.is_contiguous() and call.x2.is_contiguous() and native.available()):
        return None
    return native.Product(native.Kind.INT8, call.x1, call.x2, call.out_dtype, call.scale)
