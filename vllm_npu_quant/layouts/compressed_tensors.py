# SPDX-License-Identifier: Apache-2.0
"""Conversion of compressed-tensors' tensors to canonical numbers.

Formulas (compressed_tensors: quantization.lifecycle.forward, compressors.pack_quantized):

- ``w = (q - zero_point) * scale`` with q in two's complement, per tensor, channel or group.
- Packed integers and zero points are offset-binary, ``q + 2^(bits-1)``: weights along K, zero points along N. An int32 holds
  32 // bits of them from the low bits up; since 0.18 they are a dense bit stream, which differs for 3 bits only.
- Static activations: ``x_q = clamp(round(x / input_scale + input_zero_point))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.bits import unpack
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, StaticActivation, row_sums
from vllm_npu_quant.layouts.g_idx import arrange
from vllm_npu_quant.layouts.int4 import unpack_pairs
from vllm_npu_quant.layouts.tables import group_size_of, stored_weight
from vllm_npu_quant.spec import Granularity, LayerSpec, WeightSpec

__all__ = [
    "act_order_to_canonical",
    "dense_to_canonical",
    "dense_zero_points",
    "group_of_inputs",
    "int_to_canonical",
    "one_scale_per_row",
    "packed_to_canonical",
    "static_to_canonical",
    "unpack_inputs",
    "unpack_outputs",
    "unpacked_zero_points",
]

#: Sign bits of eight int4 in an int32: XOR converts offset-binary to two's complement.
_SIGNS = -0x77777778

#: Bound on a bias folded into the int32 accumulator; the rest of its range is left to the products.
_MAX_FOLDED = 1 << 30


def one_scale_per_row(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Repeat a stored scale or zero point so that every output row has its own.

    Args:
        stored: per tensor [], [1] or [1, 1]; per channel [N] or [N, 1]; per group [N, G]; per block [ceil(N/rows), G] or
            [ceil(N/rows), 1, G, 1].
        spec: gives the granularity.
        outputs: rows of vLLM's layer: an upper bound of N, exact if the layer is one checkpoint layer.

    Returns:
        [R, G] with R >= N: R is ``outputs`` for a scale per tensor, at most ``outputs`` for blocks, N otherwise. 8-bit
        floats are converted to float32; other dtypes are kept.
    """
    weight = stored_weight(spec)
    if stored.dtype.itemsize == 1 and stored.is_floating_point():
        stored = stored.to(torch.float32)
    if weight.granularity is Granularity.TENSOR:
        return stored.reshape(1, 1).expand(outputs, 1)
    if weight.granularity is Granularity.BLOCK:
        return stored.flatten(1).repeat_interleave(weight.block_rows, dim=0)[:outputs]
    return stored.unsqueeze(1) if stored.dim() == 1 else stored


def unpacked_zero_points(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Unpack zero points packed along N: int32 [ceil(N / p), G], p = 32 // bits, to int8 [R, G], N <= R <= ``outputs``."""
    return unpack_outputs(stored, stored_weight(spec).bits)[:outputs]


def dense_zero_points(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Unpack zero points from a dense bit stream along N: int32 [ceil(N * bits / 32), G] to int8 [R, G]."""
    bits = stored_weight(spec).bits
    return _signed(unpack(stored, bits)[:outputs], bits)


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Convert offset-binary uint8 to two's complement int8."""
    return codes.bitwise_xor(128).view(torch.int8) if bits == 8 else codes.view(torch.int8) - (1 << (bits - 1))


def unpack_outputs(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack integers along the first dimension: int32 [n, g] to int8 [n * (32 // bits), g] in two's complement."""
    return unpack_inputs(packed.t().contiguous(), bits).t()


def unpack_inputs(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack integers along the last dimension: int32 [n, w] to int8 [n, w * (32 // bits)] in two's complement.

    Args:
        packed: contiguous; each element holds 32 // bits offset-binary integers from the low bits up.
    """
    if bits == 4:
        return unpack_pairs((packed ^ _SIGNS).view(torch.int8))
    per_word = 32 // bits
    mask, middle = (1 << bits) - 1, 1 << (bits - 1)
    values = torch.empty((*packed.shape, per_word), dtype=torch.int8, device=packed.device)
    for place in range(per_word):
        values[..., place] = ((packed >> (bits * place)) & mask) - middle
    return values.flatten(-2)


def group_of_inputs(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """weight_g_idx int32 [K], with k // group_size in place of -1: producers write -1 everywhere if nothing is reordered."""
    if stored.numel() and bool((stored == -1).all()):
        return torch.arange(stored.numel(), dtype=stored.dtype, device=stored.device) // max(group_size_of(spec), 1)
    return stored


def _scales(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight_scale, and the zero points as float32, or None if all are 0.

    Raises:
        NpuQuantError: bad-value for scales that are not finite, or zero points in a symmetric scheme.
    """
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    findings = []
    if not bool(torch.isfinite(scale).all()):
        findings.append(
            Finding(
                "bad-value",
                "weight_scale holds numbers that are not finite",
                expected="finite scales",
                found="NaN or infinity",
                fix="re-export the checkpoint",
            )
        )
    if zero is not None and not bool(zero.count_nonzero()):
        zero = None
    if zero is not None and spec.weight is not None and spec.weight.symmetric:
        findings.append(
            Finding(
                "bad-value",
                "the config calls the weight symmetric, and its zero points are not 0",
                expected="weight_zero_point 0 everywhere, or symmetric: false",
                found="nonzero zero points",
                fix="re-export the checkpoint",
            )
        )
    if findings:
        raise NpuQuantError(findings)
    return scale, None if zero is None else zero.to(torch.float32)


def _group_size(spec: LayerSpec, scale: torch.Tensor) -> int:
    return group_size_of(spec) if scale.shape[1] > 1 else 0


def _unpacked_weight(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalWeight:
    weight = stored_weight(spec)
    scale, zero = _scales(tensors, spec)
    values = tensors["weight"]
    _check_range(values, weight)
    return CanonicalWeight.of(values, scale, zero, _group_size(spec, scale), weight.bits)


def _check_range(values: torch.Tensor, weight: WeightSpec) -> None:
    if weight.bits >= 8 or values.numel() == 0:
        return
    low, high = (int(value) for value in values.aminmax())
    limit = 1 << (weight.bits - 1)
    if low < -limit or high >= limit:
        raise NpuQuantError(
            [
                Finding(
                    "bad-value",
                    f"weight holds integers that {weight.bits} bits do not hold",
                    expected=f"-{limit} to {limit - 1}",
                    found=f"{low} to {high}",
                    fix="check num_bits in the config, or re-export the checkpoint",
                )
            ]
        )


def int_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout CT_INT: weight int8 [N, K] for any number of bits, weight_scale float32 [N, G], weight_zero_point int8
    [N, G] or none."""
    return CanonicalLinear(_unpacked_weight(tensors, spec), bias=tensors.get("bias"))


def packed_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout CT_PACKED: weight_packed int32 [N, ceil(K / p)], p = 32 // bits; scales and zero points as in CT_INT.

    ``weight_shape`` gives K if K does not fill the last word. It is the whole layer's shape, so a rank may have fewer inputs.
    """
    bits = stored_weight(spec).bits
    packed = tensors["weight_packed"]
    scale, zero = _scales(tensors, spec)
    inputs = packed.shape[1] * (32 // bits)
    if "weight_shape" in tensors:
        inputs = min(inputs, int(tensors["weight_shape"][1]))
    if packed.shape[1] != -(-inputs // (32 // bits)):
        raise NpuQuantError(
            [
                Finding(
                    "wrong-shape",
                    "weight_shape and weight_packed disagree",
                    expected=f"[N, {packed.shape[1] * (32 // bits)}] in weight_shape",
                    found=str(tensors["weight_shape"].tolist()),
                    fix="re-export the checkpoint",
                )
            ]
        )

    def rows(start: int, stop: int) -> torch.Tensor:
        return unpack_inputs(packed[start:stop], bits)[:, :inputs]

    def pairs(start: int, stop: int) -> torch.Tensor:
        return (packed[start:stop] ^ _SIGNS).view(torch.int8)[:, : inputs // 2]

    weight = CanonicalWeight(packed.shape[0], inputs, rows, scale, zero, _group_size(spec, scale), bits)
    if bits == 4 and inputs % 2 == 0:
        weight = replace(weight, pairs=pairs)
    return CanonicalLinear(weight, bias=tensors.get("bias"))


def dense_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout CT_PACKED_DENSE: as CT_PACKED, with weight_packed int32 [N, ceil(K * bits / 32)], a dense bit stream
    along K."""
    bits = stored_weight(spec).bits
    packed = tensors["weight_packed"]
    scale, zero = _scales(tensors, spec)
    inputs = packed.shape[1] * 32 // bits
    if "weight_shape" in tensors:
        inputs = min(inputs, int(tensors["weight_shape"][1]))

    def rows(start: int, stop: int) -> torch.Tensor:
        return _signed(unpack(packed[start:stop].t(), bits)[:inputs].t().contiguous(), bits)

    weight = CanonicalWeight(packed.shape[0], inputs, rows, scale, zero, _group_size(spec, scale), bits)
    return CanonicalLinear(weight, bias=tensors.get("bias"))


def act_order_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout CT_PACKED_ACT_ORDER: CT_PACKED with weight_g_idx int32 [K], scales and zero points of all groups.

    Raises:
        NpuQuantError: as ``packed_to_canonical`` and ``arrange``.
    """
    linear = packed_to_canonical(tensors, spec)
    plain = linear.weight
    g_idx = tensors["weight_g_idx"].to(torch.int64)
    arrangement = arrange(g_idx, group_size_of(spec) or plain.inputs, plain.scale.shape[1])
    scale = plain.scale[:, arrangement.columns]
    zero = None if plain.zero is None else plain.zero[:, arrangement.columns]
    order = arrangement.permutation
    if order is None:
        weight = replace(plain, scale=scale, zero=zero, group_size=arrangement.group_size)
        return replace(linear, weight=weight)
    moved, filled = order.clamp(min=0), order < 0

    def rows(start: int, stop: int) -> torch.Tensor:
        return plain.rows(start, stop).index_select(1, moved).masked_fill_(filled, 0)

    weight = CanonicalWeight(plain.outputs, order.numel(), rows, scale, zero, arrangement.group_size, plain.bits)
    return replace(linear, weight=weight, input_permutation=order)


def static_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layout CT_STATIC: CT_INT with input_scale [S], input_zero_point [S] or none.

    The S shards of a fused layer read the same input, so they must share one scale and zero point.

    Raises:
        NpuQuantError: fused-shards-disagree if they do not; bad-value for a scale that is not positive and finite, or a
            zero point in a symmetric scheme.
    """
    weight = _unpacked_weight(tensors, spec)
    scale = tensors["input_scale"]
    zero = tensors.get("input_zero_point")
    zero = torch.zeros_like(scale) if zero is None else zero
    raise_static_findings(scale, zero, spec)
    scale, zero = scale[:1].contiguous(), zero[:1].contiguous()
    deq_scale = (scale * weight.scale.reshape(-1)).contiguous()
    correction = (-zero.to(torch.int32) * row_sums(weight)) if bool(zero.count_nonzero()) else None
    bias = tensors.get("bias")
    quant_bias = None
    if bias is not None:
        deq_scale, quant_bias = _folded(bias.to(torch.float32), deq_scale, weight)
    if correction is None:
        correction = torch.zeros(weight.outputs, dtype=torch.int32, device=scale.device)
    return CanonicalLinear(weight, StaticActivation(scale, zero, deq_scale, quant_bias, correction), bias)


def raise_static_findings(scale: torch.Tensor, zero: torch.Tensor, spec: LayerSpec) -> None:
    """Raise one NpuQuantError for all faults of the static input scales and zero points of the shards.

    Args:
        scale, zero: float32 [S].
        spec: tells whether the activation is symmetric.
    """
    findings = []
    for name, values in (("input_scale", scale), ("input_zero_point", zero)):
        if values.unique().numel() > 1:
            findings.append(
                Finding(
                    "fused-shards-disagree",
                    f"the shards of a fused layer have different {name}",
                    expected="one value",
                    found=", ".join(f"{value:g}" for value in values.tolist()),
                    fix="re-export the checkpoint; layers that read the same input are calibrated together",
                )
            )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        findings.append(
            Finding(
                "bad-value",
                "input_scale must be positive",
                expected="> 0",
                found=str(scale.tolist()),
                fix="re-export the checkpoint",
            )
        )
    if spec.activation is not None and spec.activation.symmetric and bool(zero.count_nonzero()):
        findings.append(
            Finding(
                "bad-value",
                "the config calls the activation symmetric, and its zero point is not 0",
                expected="input_zero_point 0, or symmetric: false",
                found=str(zero.tolist()),
                fix="re-export the checkpoint",
            )
        )
    if findings:
        raise NpuQuantError(findings)


def _folded(bias: torch.Tensor, deq_scale: torch.Tensor, weight: CanonicalWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """deq_scale, and the bias in units of it, int32 [N]. All-zero rows get a scale that represents the bias."""
    units = bias / deq_scale
    large = ~(units.abs() < _MAX_FOLDED) & (bias != 0)
    if bool(large.any()):
        deq_scale = deq_scale.clone()
        for row in large.nonzero().flatten().tolist():
            if bool(weight.rows(row, row + 1).count_nonzero()):
                raise NpuQuantError(
                    [
                        Finding(
                            "bad-value",
                            f"output {row} has a bias that is out of proportion to its scale",
                            expected=f"|bias| below {_MAX_FOLDED} times input_scale * weight_scale",
                            found=f"bias {float(bias[row]):g}, scale {float(deq_scale[row]):g}",
                            fix="re-export the checkpoint",
                        )
                    ]
                )
            deq_scale[row] = bias[row].abs() / (1 << 24)
        units = bias / deq_scale
    return deq_scale, torch.where(bias == 0, torch.zeros_like(units), units).round().to(torch.int32)
