# SPDX-License-Identifier: Apache-2.0
"""msModelSlim's tensors to canonical numbers.

Formulas: msModelSlim writes ``weight_offset`` as the zero point, w = (q - offset) * scale; static activations as
``x_q = round(x / input_scale) + input_offset`` and ``quant_bias = round(bias / deq_scale - sum_k(q) * input_offset)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, StaticActivation
from vllm_npu_quant.layouts.tables import group_size_of
from vllm_npu_quant.spec import LayerSpec

__all__ = ["decode_int64_scale", "int_to_canonical", "static_to_canonical"]


def decode_int64_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32 values of a scale that msModelSlim stored as the float32 bit pattern widened to int64.

    Args:
        scale: int64, any shape; only the low 32 bits are meaningful.
    """
    return scale.to(torch.int32).view(torch.float32)


def _weight(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalWeight:
    offset = tensors.get("weight_offset")
    zero = offset if offset is not None and bool(offset.count_nonzero()) else None
    return CanonicalWeight.of(tensors["weight"], tensors["weight_scale"], zero, group_size_of(spec))


def int_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Layout MODELSLIM_INT: weight int8 [N, K], weight_scale and weight_offset float32 [N, G]."""
    return CanonicalLinear(_weight(tensors, spec), bias=tensors.get("bias"))


def static_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Layout MODELSLIM_STATIC: weight int8 [N, K], input_scale and input_offset [S], quant_bias [N], deq_scale [N].

    The S fused shards read the same input, so they must share one input scale and offset.

    Raises:
        NpuQuantError: fused-shards-disagree where they do not; bad-value for a scale that is not positive and finite.
    """
    findings = []
    for name in ("input_scale", "input_offset"):
        values = tensors[name].unique()
        if values.numel() > 1:
            findings.append(
                Finding(
                    "fused-shards-disagree",
                    f"the shards of a fused layer have different {name}",
                    expected="one value",
                    found=", ".join(f"{value:g}" for value in tensors[name].tolist()),
                    fix="re-export the checkpoint; layers that read the same input are calibrated together",
                )
            )
    scale = tensors["input_scale"][:1]
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        findings.append(
            Finding(
                "bad-value", "input_scale must be positive", expected="> 0", found=str(scale.tolist()), fix="re-export"
            )
        )
    if findings:
        raise NpuQuantError(findings)
    static = StaticActivation(scale, tensors["input_offset"][:1], tensors["deq_scale"], tensors["quant_bias"])
    if "weight_scale" in tensors:
        weight = _weight(tensors, spec)
    else:
        weight = CanonicalWeight.of(tensors["weight"], tensors["deq_scale"].new_empty(0))
    return CanonicalLinear(weight, static, tensors.get("bias"))
