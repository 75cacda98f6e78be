# SPDX-License-Identifier: Apache-2.0
"""npu_grouped_matmul by native.c."""

from __future__ import annotations

from typing import Any, Final

import torch

from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.fast.forms import form, forms, remember
from vllm_npu_quant.emulation.fast.products import fast_float_matmul, fast_int_matmul
from vllm_npu_quant.emulation.numerics import float_bits
from vllm_npu_quant.emulation.reference.grouped_matmul import Bounds, group_bounds, leave_garbage, npu_grouped_matmul
from vllm_npu_quant.emulation.rules.grouped_matmul import Form, GroupedMatmul

__all__ = ["npu_grouped_matmul_fast"]

_KINDS: Final = {
    Form.INT8: native.Kind.INT8,
    Form.WEIGHT_ONLY: native.Kind.WEIGHT_ONLY,
    Form.INT8_INT4: native.Kind.INT8_INT4,
    Form.INT4: native.Kind.INT4,
}
#: Operand of native.c -> argument.
_OPERANDS: Final = {
    "x": "x",
    "weight": "weight",
    "scale": "scale",
    "bias": "bias",
    "token_scale": "per_token_scale",
    "antiquant_scale": "antiquant_scale",
    "antiquant_offset": "antiquant_offset",
}
_NUMBERS: Final = ("split_item", "group_type", "group_list_type", "act_type", "output_dtype")
#: Optional arguments that are part of a key; a call with any other is checked every time.
_KEYED: Final = frozenset((*_OPERANDS.values(), "group_list", *_NUMBERS))
#: The native kernel, if there is one, of the calls that passed their check, and whether the weight has to be FRACTAL_NZ.
_products: dict[Any, tuple[native.Product | None, bool]] = {}


def npu_grouped_matmul_fast(x: list[torch.Tensor], weight: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """npu_grouped_matmul with all groups in one kernel; float products are the same up to the order of float32 sums."""
    call = GroupedMatmul(x, weight, **options)
    key, known = None, None
    if _KEYED.issuperset(options):
        key = _key(call)
        known = _products.get(key)
    if known is None:
        call.check()
        known = _kernel(call), call.needs_nz
        if key is not None:
            remember(_products, key, known)
    product, needs_nz = known
    if product is None:
        return npu_grouped_matmul(call, fast_int_matmul, fast_float_matmul)
    if needs_nz:
        call.require_nz()
    bounds = group_bounds(call)
    calls.remember_product(
        call,
        product,
        _OPERANDS,
        rows=x[0].shape[0],
        group_list=call.group_list,
        group_list_type=call.group_list_type or 0,
        spoils_x=call.form is Form.INT8_INT4,
        nz_weight=weight[0] if needs_nz else None,
    )
    out = product(
        x[0],
        weight[0],
        groups=bounds,
        scale=_float_scale(call, bounds),
        bias=native.bias(call.bias[0]) if call.bias else None,
        token_scale=call.per_token_scale[0].contiguous() if call.per_token_scale else None,
        antiquant_scale=call.antiquant_scale[0].contiguous() if call.antiquant_scale else None,
        antiquant_offset=call.antiquant_offset[0].contiguous() if call.antiquant_offset else None,
    )
    leave_garbage(call, out, bounds)
    return [out]


def _key(call: GroupedMatmul) -> Any:
    return (
        forms(call.x),
        forms(call.weight),
        forms(call.bias),
        forms(call.scale),
        forms(call.antiquant_scale),
        forms(call.antiquant_offset),
        forms(call.per_token_scale),
        form(call.group_list),
        call.split_item,
        call.group_type,
        call.group_list_type,
        call.act_type,
        call.output_dtype,
    )


def _kernel(call: GroupedMatmul) -> native.Product | None:
    """The native kernel that computes all groups in one call, if there is one."""
    weight = call.weight[0]
    if call.group_type != 0 or call.group_list is None or call.act_type or len(call.x) != 1:
        return None
    if not call.stacked or not weight.is_contiguous() or not weight.numel():
        return None
    if call.form not in _KINDS or call.out_dtype is torch.int8 or not native.available():
        return None
    scales = call.antiquant_scale if call.form is Form.WEIGHT_ONLY else call.scale
    scale = scales[0] if scales else None
    groups = scale.shape[1] if scale is not None and scale.dim() == 3 else 1
    group_size = weight.shape[1] // groups
    return native.Product(_KINDS[call.form], call.x[0], weight, call.out_dtype, scale, group_size)


def _float_scale(call: GroupedMatmul, bounds: Bounds) -> torch.Tensor | None:
    """The scales in float32, contiguous, of the experts that have rows; those of the others are not read."""
    if not call.scale:
        return None
    scale = call.scale[0]
    if call.form is Form.INT8 and scale.dtype == torch.float32:
        return scale.contiguous()
    as_float = torch.Tensor.float if call.form is Form.INT8 else float_bits
    if 2 * len(bounds) >= scale.shape[0]:
        return as_float(scale).contiguous()
    chosen = torch.empty(*scale.shape)
    for expert, _, _ in bounds:
        chosen[expert] = as_float(scale[expert])
    return chosen
