# SPDX-License-Identifier: Apache-2.0
"""Costs of method classes, from sizes alone: bytes of prepared tensors, multiples of sizes, limits.

Each formula follows one method class's ``prepare``; a test compares it with prepared layers. A dispatch row names its cost,
so that a new scheme brings both. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, lcm

from vllm_npu_quant.spec import Granularity, WeightSpec

__all__ = ["ACT", "MAX_INPUTS", "MIN_GROUP", "ExpertsCost", "LinearCost", "group_of", "round_up"]

#: Bytes of an element of the model's dtype: bfloat16 or float16.
ACT = 2
#: npu_quant_matmul and npu_weight_quant_batchmatmul take at most 65535 elements in the last dimension of either operand.
#: Outputs are split into several calls, inputs are not.
MAX_INPUTS = 65535
#: Smaller groups cannot be filled up to the operator's 32 inputs within twice the memory.
MIN_GROUP = 16

#: Remark of ``plan`` on weight-only schemes.
_WEIGHT_ONLY_REMARK = (
    "weight-only operators also write and read dequantized weights, which the bound leaves out; arXiv 2601.16536 "
    "measured at most 1.48 times float16 for a W4A16 kernel on Ascend 910"
)
_W4A4_REMARK = "no int4 peak is published: int8's is used for W4A4"


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def group_of(weight: WeightSpec | None) -> int:
    """Inputs per group of a weight; 0 if one scale serves a whole output."""
    return weight.group_size if weight is not None and weight.granularity is Granularity.GROUP else 0


def _bias(outputs: int, has_bias: bool, float16: bool) -> int:
    return 4 * outputs if has_bias else 0


@dataclass(frozen=True)
class LinearCost:
    """The cost of a Linear method class.

    Attributes:
        weight: bytes of the prepared weight and its scales, from (weight, outputs, inputs).
        bias: bytes of the prepared bias, from (outputs, whether the checkpoint stores one, whether the model is float16).
        min_group: the smallest group that the operators take.
        even_groups: whether groups have an even number of inputs.
        remark: a remark for ``plan``.
    """

    weight: Callable[[WeightSpec, int, int], int]
    bias: Callable[[int, bool, bool], int] = _bias
    min_group: int = 1
    even_groups: bool = False
    remark: str = ""


@dataclass(frozen=True)
class ExpertsCost:
    """The cost of an experts' method class, for w13 or w2 of one expert.

    Attributes:
        outputs: outputs of a prepared weight are multiples of this.
        inputs: its inputs are multiples of this, from the group size (0 for none).
        weight: bytes of the prepared weight and its scales, from (weight, outputs, inputs, group size).
        even_groups, remark: as in ``LinearCost``.
    """

    outputs: int
    inputs: Callable[[int], int]
    weight: Callable[[WeightSpec | None, int, int, int], int]
    even_groups: bool = False
    remark: str = ""
    min_group: int = 1


def _groups(weight: WeightSpec, inputs: int) -> int:
    group = group_of(weight)
    return -(-inputs // group) if group else 1


def _int8(extra: int) -> Callable[[WeightSpec, int, int], int]:
    """int8 [K, N] and ``extra`` bytes per output."""
    return lambda _, outputs, inputs: outputs * inputs + extra * outputs


def _int8_groups(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int8 [G, k, N], float32 scale and zero point [G, N]."""
    groups = _groups(weight, inputs)
    depth = groups * weight.group_size if weight.group_size else inputs
    return outputs * depth + (4 if weight.symmetric else 8) * groups * outputs


def _static(_: WeightSpec, outputs: int, inputs: int) -> int:
    """int8 [K, N], float32 scale and int32 bias per output, scale and offset per input in the model's dtype."""
    return outputs * inputs + 8 * outputs + 2 * ACT * inputs


def _static_bias(outputs: int, has_bias: bool, float16: bool) -> int:
    """quant_bias holds the bias; for float16, scales are int64."""
    return 4 * outputs if float16 else 0


def weight_only(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int8 [K, N] or int4 [K, N/8], scale and offset [G, N] in the model's dtype."""
    numbers = ACT if weight.symmetric else 2 * ACT
    group, groups = weight.group_size, _groups(weight, inputs)
    depth = inputs if groups == 1 or group % 32 == 0 else groups * round_up(group, 32)
    if weight.bits > 4:
        return outputs * depth + numbers * groups * outputs
    outputs = round_up(outputs, 8)
    return outputs * depth // 2 + numbers * groups * outputs


def _w4a8(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int4 [1, K, N/8], int64 scale [1, G, N], float32 assist [N]."""
    group = group_of(weight)
    halves = group % 256 != 0
    depth = _filled(inputs, group, 8 if halves else 256)
    parts = 1 if halves else -(-depth // 18432)
    unit = group if halves else 256
    groups = depth // unit if group else parts
    outputs = round_up(outputs, 8)
    return outputs * depth // 2 + 8 * groups * outputs + 4 * outputs * parts


def _w4a4(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int4 [K/8, N] with float32 [N], or [1, K, N/8] with int64 [1, G, N]."""
    group = group_of(weight)
    depth = _filled(inputs, group, 8)
    if not group:
        return outputs * depth // 2 + 4 * round_up(outputs, 8)
    outputs = round_up(outputs, 8)
    return outputs * depth // 2 + 8 * (depth // group) * outputs


def _filled(inputs: int, group: int, multiple: int) -> int:
    step = multiple * group // gcd(multiple, group) if group else multiple
    return round_up(inputs, step)


def _float(_: WeightSpec, outputs: int, inputs: int) -> int:
    return ACT * outputs * inputs


def _float_experts(_: WeightSpec | None, outputs: int, inputs: int, group: int) -> int:
    return ACT * outputs * inputs


def _int8_experts(_: WeightSpec | None, outputs: int, inputs: int, group: int) -> int:
    """int8 [K, N] with float32 [N]."""
    return outputs * inputs + 4 * outputs


def _weight_only_experts(weight: WeightSpec | None, outputs: int, inputs: int, group: int) -> int:
    """int8 [K, N] or int4 [K, N/8] with scale and offset [G, N] in the model's dtype."""
    numbers = outputs * inputs if weight is not None and weight.bits > 4 else outputs * inputs // 2
    return numbers + 2 * ACT * (inputs // group if group else 1) * outputs


def _w4a8_experts(_: WeightSpec | None, outputs: int, inputs: int, group: int) -> int:
    """int4 [K, N/8] with int64 [G, N] and float32 [N]; scales per 256 inputs if the int8 x int4 operator serves."""
    unit = (256 if group % 256 == 0 else group) if group else inputs
    return outputs * inputs // 2 + (8 * (inputs // unit) + 4) * outputs


def _w4a4_experts(_: WeightSpec | None, outputs: int, inputs: int, group: int) -> int:
    """int4 [K, N/8] with int64 [G, N]."""
    return outputs * inputs // 2 + 8 * (inputs // group if group else 1) * outputs


W8A8_DYNAMIC = LinearCost(_int8(4))
W8A8_ASYMMETRIC = LinearCost(_int8(12))
W8A8_GROUPED = LinearCost(_int8_groups)
W8A8_STATIC = LinearCost(_static, _static_bias)
WEIGHT_ONLY = LinearCost(weight_only, min_group=MIN_GROUP, remark=_WEIGHT_ONLY_REMARK)
W4A8 = LinearCost(_w4a8, even_groups=True)
W4A4 = LinearCost(_w4a4, even_groups=True, remark=_W4A4_REMARK)
DEQUANTIZED = LinearCost(_float)

W8A8_EXPERTS = ExpertsCost(64, lambda group: lcm(16, group or 1), _int8_experts)
WEIGHT_ONLY_EXPERTS = ExpertsCost(8, lambda group: group or 1, _weight_only_experts, remark=_WEIGHT_ONLY_REMARK)
W4A8_EXPERTS = ExpertsCost(
    8, lambda group: lcm(256 if group % 256 == 0 else 8, group or 1), _w4a8_experts, even_groups=True
)
W4A4_EXPERTS = ExpertsCost(8, lambda group: lcm(8, group or 1), _w4a4_experts, remark=_W4A4_REMARK)
FLOAT_EXPERTS = ExpertsCost(1, lambda group: 1, _float_experts)
