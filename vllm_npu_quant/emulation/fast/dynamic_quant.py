# SPDX-License-Identifier: Apache-2.0
"""npu_dynamic_quant by native.c."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.fast.forms import form, remember
from vllm_npu_quant.emulation.reference.dynamic_quant import npu_dynamic_quant
from vllm_npu_quant.emulation.rules.dynamic_quant import DynamicQuant

__all__ = ["npu_dynamic_quant_fast"]

#: The native kernel, if there is one, of the calls without smoothing that passed their check.
_quantizers: dict[Any, tuple[native.DynamicQuant | None]] = {}


def npu_dynamic_quant_fast(input: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_dynamic_quant in one pass over the rows; with smoothing or to int4, the reference."""
    call = DynamicQuant(input, **options)
    if call.smooth_scales is not None or call.group_index is not None:
        call.check()
        return npu_dynamic_quant(call)
    key = (form(input), call.dst_type, call.quant_mode, call.dst_type_max)
    known = _quantizers.get(key)
    if known is None:
        call.check()
        plain = not call.packed and input.is_contiguous() and input.numel() > 0 and native.available()
        known = remember(_quantizers, key, (native.DynamicQuant(input) if plain else None,))
    (quantizer,) = known
    if quantizer is None:
        return npu_dynamic_quant(call)
    calls.remember_dynamic_quant(call.operator, quantizer)
    return quantizer(input)
