# SPDX-License-Identifier: Apache-2.0
"""The vocabulary that formats, the serving decision and method classes share. Standard library only.

A format describes each checkpoint layer by one ``LayerSpec``: what is stored, nothing else. ``serving.decide`` derives the
spec that this host computes with, and ``serving.dispatch`` finds its NPU method class. ``layouts.tables`` lists the tensors
that hold a layout's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "FLOAT",
    "ActivationSpec",
    "Granularity",
    "LayerKind",
    "LayerSpec",
    "Layout",
    "NumberKind",
    "TransformSpec",
    "WeightSpec",
]


class LayerKind(str, Enum):
    """The kinds of layers that vLLM asks a quantization method for."""

    LINEAR = "linear"
    FUSED_MOE = "fused_moe"
    LM_HEAD = "lm_head"


class NumberKind(str, Enum):
    INT = "int"
    #: Floats: E4M3 of 8 bits, E2M1 of 4, the model's dtype of 16.
    FLOAT = "float"
    #: Microscaling: the same floats in blocks of 32 that share one power-of-two scale, E8M0 (OCP MX v1.0).
    MX = "mx"

    @property
    def is_float(self) -> bool:
        return self is not NumberKind.INT


class Granularity(str, Enum):
    """The part of a tensor that shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"


class Layout(str, Enum):
    """Storage of a layer's integers, scales and zero points; ``layouts.tables`` lists the tensors of each layout."""

    FLOAT = "float"
    #: int8 [N, K] with weight_scale and weight_offset, one integer per byte.
    MODELSLIM_INT = "modelslim_int"
    #: int8 [N, K] with static activation scale and offset, quant_bias and deq_scale.
    MODELSLIM_STATIC = "modelslim_static"
    #: int4, two outputs per byte: int8 [N/2, K] with weight_scale and weight_offset.
    MODELSLIM_PACKED_N = "modelslim_packed_n"
    #: int4, two inputs per byte: int8 [N, K/2] with weight_scale and weight_offset.
    MODELSLIM_PACKED_K = "modelslim_packed_k"
    #: int4, one integer per byte, with weight_scale [N, 1] and weight_scale_second [N, G], which are multiplied.
    MODELSLIM_TWO_LEVEL = "modelslim_two_level"
    #: The same with two outputs per byte.
    MODELSLIM_TWO_LEVEL_PACKED = "modelslim_two_level_packed"
    #: compressed-tensors, one integer per byte: int8 [N, K] with weight_scale.
    CT_INT = "ct_int"
    #: The same with a static activation scale per layer.
    CT_STATIC = "ct_static"
    #: compressed-tensors, 32 // bits integers per int32 along K, zero points packed along N.
    CT_PACKED = "ct_packed"
    #: Dense bit stream (compressed-tensors 0.18 and later); differs from CT_PACKED for 3 bits only.
    CT_PACKED_DENSE = "ct_packed_dense"
    #: The same with activation order: weight_g_idx says which group each input belongs to.
    CT_PACKED_ACT_ORDER = "ct_packed_act_order"
    #: CT_PACKED and CT_PACKED_ACT_ORDER before compressed-tensors 0.9: zero points int8 [N, G], one per byte.
    CT_PACKED_PLAIN_ZERO = "ct_packed_plain_zero"
    CT_PACKED_PLAIN_ZERO_ACT_ORDER = "ct_packed_plain_zero_act_order"
    #: compressed-tensors and ModelSlim: E4M3 [N, K] with weight_scale per tensor, channel or block.
    FP8 = "fp8"
    #: DeepSeek's and transformers' blockwise FP8: the same with weight_scale_inv.
    FP8_INV = "fp8_inv"
    #: ModelOpt's blocks of FP8: the same with weight_scale [N/128, 1, K/128, 1].
    FP8_BLOCK_4D = "fp8_block_4d"
    #: E4M3 [N, K] with weight_scale E8M0 [N, K/32].
    MXFP8 = "mxfp8"
    #: MiniMax: the same with weight_scale_inv.
    MXFP8_INV = "mxfp8_inv"
    #: E2M1, two inputs per byte: uint8 [N, K/2] with weight_scale E8M0 [N, K/32].
    MXFP4 = "mxfp4"
    #: compressed-tensors and AutoRound: the same with weight_packed.
    CT_MXFP4 = "ct_mxfp4"
    #: ModelOpt: E2M1 [N, K/2] with weight_scale E4M3 [N, K/16] and weight_scale_2, which are multiplied.
    NVFP4 = "nvfp4"
    #: compressed-tensors and AutoRound: weight_packed and weight_scale, which is divided by weight_global_scale.
    CT_NVFP4 = "ct_nvfp4"
    #: Float weights [N, K] that are rounded while they load, to int8 or to pairs of 4-bit integers.
    ROUNDED = "rounded"
    ROUNDED_PAIRS = "rounded_pairs"
    #: AWQ "gemm": eight integers per int32 along N, in the order 0 2 4 6 1 3 5 7.
    AWQ_GEMM = "awq_gemm"
    #: GPTQ: integers packed along K, zero points along N and stored minus one.
    GPTQ = "gptq"
    #: The same with unmodified zero points.
    GPTQ_V2 = "gptq_v2"
    #: GPTQ with activation order: g_idx says which group each input belongs to.
    GPTQ_ACT_ORDER = "gptq_act_order"
    GPTQ_V2_ACT_ORDER = "gptq_v2_act_order"


@dataclass(frozen=True)
class WeightSpec:
    """The weight of a layer.

    Attributes:
        bits: bits per element.
        kind: integers, or floats: E4M3 of 8 bits and E2M1 of 4, with power-of-two scales if MX.
        granularity: the elements that share a scale: TENSOR, CHANNEL (an output row), GROUP (``group_size`` inputs of a
            row), BLOCK.
        group_size: elements along the input dimension per group or block; 0 unless the granularity is GROUP or BLOCK.
        symmetric: whether every zero point is 0 (in two's complement).
        block_rows: output rows per block; 0 unless the granularity is BLOCK.
    """

    bits: int
    kind: NumberKind = NumberKind.INT
    granularity: Granularity = Granularity.CHANNEL
    group_size: int = 0
    symmetric: bool = True
    block_rows: int = 0


@dataclass(frozen=True)
class ActivationSpec:
    """The quantized input of a layer.

    Attributes:
        bits: bits per element.
        dynamic: whether scales are computed from the input at run time.
        granularity: TENSOR or TOKEN.
        symmetric: whether the zero point is 0.
    """

    bits: int
    dynamic: bool
    granularity: Granularity
    kind: NumberKind = NumberKind.INT
    symmetric: bool = True


@dataclass(frozen=True)
class TransformSpec:
    """Matrices that the layer's input is multiplied by before it is quantized: with x as [L, M], L.T @ x @ R.

    Attributes:
        left: L's size; 0 if there is none.
        right: R's size, that is M; 0 if there is none.
        clip: whether the largest magnitude of a token is multiplied by a ratio before it gives the scale.
    """

    left: int = 0
    right: int = 0
    clip: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One layer's numbers: as a checkpoint stores them, or as a method class computes with them.

    Attributes:
        scheme: the producer's name for it, for messages ("W8A8_DYNAMIC").
        layout: the storage of the numbers: a member of ``Layout``, or the name of a registered layout.
        weight: None for a float layer (it runs in the model's dtype).
        activation: None if the input is not quantized.
        transform: the matrices that the layer's input is multiplied by first (FlatQuant, online rotations); None if none.
    """

    scheme: str
    layout: Layout | str
    weight: WeightSpec | None = None
    activation: ActivationSpec | None = None
    transform: TransformSpec | None = None

    @property
    def is_float(self) -> bool:
        return self.weight is None


#: A layer that is not quantized.
FLOAT = LayerSpec("FLOAT", Layout.FLOAT)
