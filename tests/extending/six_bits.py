# SPDX-License-Identifier: Apache-2.0
"""A scheme that vllm_npu_quant does not serve: its dispatch row, with its cost. six_bits_linear.py has the method class.

docs/extending.md walks through it. compressed-tensors stores such weights as int8, and they are computed as int8. This file
imports no torch, so that the command line stays fast.
"""

from __future__ import annotations

from vllm_npu_quant.serving.cost import ACT, LinearCost
from vllm_npu_quant.serving.dispatch import Row, register_row
from vllm_npu_quant.spec import Granularity, LayerKind, WeightSpec


def weight_bytes(weight: WeightSpec, outputs: int, inputs: int) -> int:
    """int8 [K, N] and a scale [1, N] in the model's dtype."""
    return outputs * inputs + ACT * outputs


ROW = Row(
    "W6A16",
    frozenset({LayerKind.LINEAR, LayerKind.LM_HEAD}),
    weight_bits=frozenset({6}),
    weight_granularity=frozenset({Granularity.CHANNEL}),
    weight_symmetric=True,
    act=None,
    act_dynamic=None,
    method="tests.extending.six_bits_linear:W6A16Linear",
    operators=("npu_weight_quant_batchmatmul",),
    cost=LinearCost(weight_bytes),
)


def extend() -> None:
    """Add the row to vllm_npu_quant."""
    register_row(ROW)
