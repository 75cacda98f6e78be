# SPDX-License-Identifier: Apache-2.0
"""Specs of layers whose weights are floats with scales per block of inputs: MXFP8, MXFP4 and NVFP4."""

from __future__ import annotations

from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

__all__ = ["MXFP4", "MXFP8", "NVFP4", "SCALE_CODES", "block_float_input", "block_float_spec"]

MXFP8 = WeightSpec(8, NumberKind.MX, Granularity.GROUP, 32)
MXFP4 = WeightSpec(4, NumberKind.MX, Granularity.GROUP, 32)
#: E2M1 with E4M3 scales, and one float32 factor for the whole layer.
NVFP4 = WeightSpec(4, NumberKind.FLOAT, Granularity.GROUP, 16)

#: safetensors dtypes of power-of-two scales.
SCALE_CODES = frozenset({"U8", "F8_E8M0"})


def block_float_spec(name: str, layout: Layout, weight: WeightSpec, input_bits: int | None) -> LayerSpec:
    """The spec of a layer with such weights ("MXFP4_W4A8").

    Args:
        name: the name of the floats.
        layout: that of its tensors.
        weight: one of ``MXFP8``, ``MXFP4``, ``NVFP4``.
        input_bits: bits of the input's floats; None if the input is not quantized.
    """
    if input_bits is None:
        return LayerSpec(f"{name}_W{weight.bits}A16", layout, weight)
    return LayerSpec(f"{name}_W{weight.bits}A{input_bits}", layout, weight, block_float_input(weight.kind, input_bits))


def block_float_input(kind: NumberKind, bits: int) -> ActivationSpec:
    """Inputs of floats with scales per block that are computed at run time; those of NVFP4 have a static factor, too."""
    static = kind is not NumberKind.MX
    granularity = Granularity.TENSOR if static else Granularity.TOKEN
    return ActivationSpec(bits, dynamic=not static, granularity=granularity, kind=kind)
