# SPDX-License-Identifier: Apache-2.0
"""Conversion of msModelSlim's tensors to canonical numbers.

Formulas:

- ``weight_offset`` is the zero point: ``w = (q - weight_offset) * weight_scale``; with two levels
  ``w = (q - weight_offset_second) * weight_scale_second * weight_scale``.
- int4 is packed two per byte, the even index in the low nibble: W4A16 per channel along K, all others along N.
- Static activations: ``x_q = round(x / input_scale) + input_offset`` and
  ``quant_bias = round(bias / deq_scale - sum_k(q) * input_offset)``.
- FlatQuant stores left_trans L, right_trans R and clip_ratio: a token x, viewed as [L, M], becomes ``L.T @ x @ R``, and its
  scale is ``clip_ratio * max|x| / 7``.
- QuaRot's online rotations are the same without a clip: heads_rotation is L (over the heads, before o_proj),
  kronecker_rotation_m and kronecker_rotation_n are L and R (before down_proj).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, InputTransform, StaticActivation
from vllm_npu_quant.layouts.int4 import unpack_pairs, unpack_rows
from vllm_npu_quant.layouts.tables import group_size_of
from vllm_npu_quant.spec import LayerSpec, Layout

__all__ = [
    "decode_int64_scale",
    "int_to_canonical",
    "one_per_shard",
    "static_to_canonical",
    "two_level_to_canonical",
]

#: Names of the left and right matrix of an input transform.
_LEFT = ("left_trans", "heads_rotation", "kronecker_rotation_m")
_RIGHT = ("right_trans", "kronecker_rotation_n")


def decode_int64_scale(scale: torch.Tensor) -> torch.Tensor:
    """Decode a scale that msModelSlim stores as float32 bits widened to int64.

    Args:
        scale: int64, any shape; the high 32 bits are ignored.
    """
    return scale.to(torch.int32).view(torch.float32)


def one_per_shard(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Add the shard dimension to a tensor of one shard: [...] to [1, ...], for a parameter [S, ...]."""
    return stored.unsqueeze(0)


def int_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layouts MODELSLIM_INT, MODELSLIM_PACKED_N and MODELSLIM_PACKED_K.

    Args:
        tensors: weight int8 [N, K], [N/2, K] or [N, K/2]; weight_scale and weight_offset float32 [N, G]; optionally bias and
            the matrices of an input transform, [S, L, L] and [S, M, M].

    Raises:
        NpuQuantError: bad-value, fused-shards-disagree.
    """
    weight = _weight(tensors, spec, tensors["weight_scale"], _zero(tensors["weight_offset"]))
    return CanonicalLinear(weight, bias=tensors.get("bias"), transform=_transform(tensors))


def two_level_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layouts MODELSLIM_TWO_LEVEL and MODELSLIM_TWO_LEVEL_PACKED: weight_scale and weight_offset [N, 1],
    weight_scale_second and weight_offset_second [N, G]. The scales are multiplied.

    Raises:
        NpuQuantError: bad-value for a nonzero offset of the first level, which msModelSlim does not define.
    """
    if bool(tensors["weight_offset"].count_nonzero()):
        raise NpuQuantError(
            [
                Finding(
                    "bad-value",
                    "weight_offset of a two-level scheme must be 0",
                    expected="0 everywhere",
                    found="other values",
                    fix="re-export the checkpoint with symmetric weights",
                )
            ]
        )
    scale = tensors["weight_scale"] * tensors["weight_scale_second"]
    weight = _weight(tensors, spec, scale, _zero(tensors["weight_offset_second"]))
    return CanonicalLinear(weight, bias=tensors.get("bias"), transform=_transform(tensors))


def static_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout MODELSLIM_STATIC: weight int8 [N, K], input_scale and input_offset [S], quant_bias and deq_scale [N].

    The S shards of a fused layer read the same input, so they must share one input scale and offset.

    Raises:
        NpuQuantError: fused-shards-disagree if they do not; bad-value for a scale that is not positive and finite.
    """
    findings = []
    for name in ("input_scale", "input_offset"):
        values = tensors[name].unique()
        if values.numel() > 1:
            findings.append(_disagree(name, ", ".join(f"{value:g}" for value in tensors[name].tolist())))
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
        weight_scale, zero = tensors["weight_scale"], _zero(tensors.get("weight_offset"))
    else:
        weight_scale, zero = (tensors["deq_scale"] / scale).unsqueeze(1), None
    weight = _weight(tensors, spec, weight_scale, zero)
    return CanonicalLinear(weight, static, tensors.get("bias"), transform=_transform(tensors))


def _zero(offset: torch.Tensor | None) -> torch.Tensor | None:
    """Zero points as float32, or None if all are 0."""
    if offset is None or not bool(offset.count_nonzero()):
        return None
    return offset.to(torch.float32)


def _weight(
    tensors: Mapping[str, torch.Tensor], spec: LayerSpec, scale: torch.Tensor, zero: torch.Tensor | None
) -> CanonicalWeight:
    stored = tensors["weight"]
    bits = spec.weight.bits if spec.weight is not None else 8
    group = group_size_of(spec) if scale.shape[1] > 1 else 0
    rows, columns = stored.shape
    if spec.layout in (Layout.MODELSLIM_PACKED_N, Layout.MODELSLIM_TWO_LEVEL_PACKED):

        def pairs_of_rows(start: int, stop: int) -> torch.Tensor:
            first = start // 2
            return unpack_rows(stored[first : (stop + 1) // 2])[start - 2 * first : stop - 2 * first]

        return CanonicalWeight(2 * rows, columns, pairs_of_rows, scale, zero, group, bits)
    if spec.layout is Layout.MODELSLIM_PACKED_K:

        def pairs_of_columns(start: int, stop: int) -> torch.Tensor:
            return unpack_pairs(stored[start:stop])

        def stored_pairs(start: int, stop: int) -> torch.Tensor:
            return stored[start:stop]

        return CanonicalWeight(rows, 2 * columns, pairs_of_columns, scale, zero, group, bits, pairs=stored_pairs)
    if bits < 8:
        low, high = (int(value) for value in torch.aminmax(stored))
        if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
            raise NpuQuantError([_too_wide(low, high, bits)])
    return CanonicalWeight.of(stored, scale, zero, group, bits)


def _transform(tensors: Mapping[str, torch.Tensor]) -> InputTransform | None:
    """The input transform, or None. The shards of a fused layer read the same input, so their matrices must be equal."""
    found = {name: tensors[name] for name in (*_LEFT, *_RIGHT, "clip_ratio") if name in tensors}
    if not found:
        return None
    findings = [
        _disagree(name, "different matrices" if values.dim() > 1 else ", ".join(f"{v:g}" for v in values.tolist()))
        for name, values in found.items()
        if not bool((values == values[:1]).all())
    ]
    clip = float(found["clip_ratio"][0]) if "clip_ratio" in found else 1.0
    if not 0 < clip <= 1:
        message = "clip_ratio must be a factor between 0 and 1"
        findings.append(
            Finding("bad-value", message, expected="0 < clip_ratio <= 1", found=f"{clip:g}", fix="re-export")
        )
    for name, values in found.items():
        if not bool(torch.isfinite(values).all()):
            findings.append(
                Finding("bad-value", f"{name} must be finite", expected="numbers", found="inf or NaN", fix="re-export")
            )
    if findings:
        raise NpuQuantError(findings)
    left = next((found[name][0] for name in _LEFT if name in found), None)
    right = next((found[name][0] for name in _RIGHT if name in found), None)
    return InputTransform(left, right, clip)


def _disagree(name: str, values: str) -> Finding:
    return Finding(
        "fused-shards-disagree",
        f"the shards of a fused layer have different {name}",
        expected="one value",
        found=values,
        fix="re-export the checkpoint; layers that read the same input are calibrated together",
    )


def _too_wide(low: int, high: int, bits: int) -> Finding:
    return Finding(
        "bad-value",
        f"the weight holds integers of more than {bits} bits",
        expected=f"{-(1 << (bits - 1))} to {(1 << (bits - 1)) - 1}, one integer per byte",
        found=f"{low} to {high}",
        fix="check that the description belongs to the weights: packed integers need its field version",
    )
