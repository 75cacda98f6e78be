# SPDX-License-Identifier: Apache-2.0
"""The rules themselves can fail: what the emulation refuses, they refuse, though they were written apart; and every change
to an argument of a recorded call breaks one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conformance import rules
from tests.conformance.recording import Call, Recorder, Tensor
from tests.conformance.traces import Trace
from tests.emulation.test_emulation_refusals import REFUSALS


def described(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call that is not made."""
    schema = getattr(torch.ops.npu, operator).default._schema
    raw = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    return Call(operator, Recorder().described(schema, raw), [])


def test_what_the_emulation_refuses_breaks_a_rule() -> None:
    seen = [(entry, *said) for entry, *said in REFUSALS if entry[0] in rules.RULES]
    assert len(seen) > 150
    missed = {
        (operator, argument, expected)
        for (operator, args, kwargs), argument, expected, _ in seen
        if not rules.check(described(operator, args, kwargs)).broken
    }
    assert missed == set()


def changes(call: Call) -> Iterator[tuple[str, Call]]:
    """The call with one thing wrong: a dtype, a size, the number of dimensions, two tensors swapped, an option left out."""

    def changed(name: str, value: Any) -> Call:
        return replace(call, arguments={**call.arguments, name: value})

    tensors = {
        name: value[0] if isinstance(value, list) else value
        for name, value in call.arguments.items()
        if isinstance(value[0] if isinstance(value, list) and value else value, Tensor)
    }

    def like(name: str, tensor: Tensor) -> Any:
        return [tensor] if isinstance(call.arguments[name], list) else tensor

    for name, tensor in tensors.items():
        yield f"{name}: dtype", changed(name, like(name, replace(tensor, dtype=torch.float64)))
        for dim, size in enumerate(tensor.shape):
            shape = (*tensor.shape[:dim], size + 1, *tensor.shape[dim + 1 :])
            yield f"{name}: dimension {dim}", changed(name, like(name, dense(tensor.dtype, shape)))
        yield f"{name}: dimensions", changed(name, like(name, dense(tensor.dtype, (*tensor.shape, 3))))
    for first in tensors:
        for second in tensors:
            one, other = tensors[first], tensors[second]
            if first < second and (one.dtype, one.shape) != (other.dtype, other.shape):
                swapped = {**call.arguments, first: like(first, other), second: like(second, one)}
                yield f"{first} and {second} swapped", replace(call, arguments=swapped)


def dense(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return Tensor.of(torch.empty(shape, dtype=dtype, device="meta"))


#: Changes that make another call which is right too, by operator.
RIGHT_TOO = {
    # One more token, one more input: nothing else has their number.
    "npu_format_cast": {"input: dimension 0", "input: dimension 1", "input: dimension 2", "input: dimensions"},
    "npu_trans_quant_param": {"scale: dimension 0"},
    "npu_dynamic_quant": {"input: dimension 0", "input: dimension 1", "input: dimensions"},
    "npu_dynamic_quant_asymmetric": {"input: dimension 0", "input: dimension 1", "input: dimensions"},
    "npu_quantize": {"input: dimension 0"},
    "npu_kronecker_quant": {"x: dimension 0"},
    "npu_quant_matmul": {"x1: dimension 0"},
    "npu_weight_quant_batchmatmul": {"x: dimension 0"},
    "npu_grouped_matmul": {"x: dimension 0"},
    "npu_moe_init_routing_v2": {"x: dimension 1", "expert_idx: dimension 1"},
    "npu_swiglu": {"input: dimension 0", "input: dimensions"},
    "npu_dequant_swiglu_quant": {"x: dimension 0"},
    "npu_moe_token_unpermute": {"permuted_tokens: dimension 1"},
}
#: The same where it depends on the form of the call.
RIGHT_TOO_SOMETIMES = {
    # bias and scale may be of one dtype and shape; only the numbers tell.
    "npu_quant_matmul": {
        *("x1: dimension 1", "x2: dimension 1", "x2: dimension 2", "x2: dimensions", "bias and scale swapped"),
    },
    "npu_swiglu": {"input: dimension 1"},
    "npu_dequant_swiglu_quant": {"x: dimension 1"},
    # K = 512 takes one scale per channel, or two.
    "npu_grouped_matmul": {"weight: dimension 2", "scale: dimension 1"},
    "npu_weight_quant_batchmatmul": {"weight: dimension 1"},
}


@pytest.mark.parametrize("operator", sorted(rules.RULES))
def test_every_change_to_an_argument_breaks_a_rule(operator: str, made: dict[str, Trace]) -> None:
    calls = {str(call): call for trace in made.values() for call in trace.calls if call.operator == operator}
    assert calls
    unseen: dict[str, str] = {}
    for call in calls.values():
        for change, wrong in changes(call):
            if not rules.check(wrong).broken:
                unseen.setdefault(change, str(wrong))
    allowed = RIGHT_TOO[operator] | RIGHT_TOO_SOMETIMES.get(operator, set())
    assert {change: wrong for change, wrong in unseen.items() if change not in allowed} == {}


@pytest.mark.parametrize(
    ("operator", "option"),
    [
        ("npu_grouped_matmul", "group_type"),
        ("npu_grouped_matmul", "split_item"),
        ("npu_grouped_matmul", "group_list"),
        ("npu_grouped_matmul", "antiquant_offset"),
        ("npu_quantize", "axis"),
        ("npu_quantize", "div_mode"),
        ("npu_dequant_swiglu_quant", "activate_left"),
        ("npu_dequant_swiglu_quant", "quant_mode"),
        ("npu_moe_init_routing_v2", "expert_tokens_num_flag"),
        ("npu_moe_init_routing_v2", "expert_num"),
        ("npu_weight_quant_batchmatmul", "antiquant_group_size"),
        ("npu_format_cast", "acl_format"),
    ],
)
def test_an_option_left_out_breaks_a_rule(operator: str, option: str, made: dict[str, Trace]) -> None:
    calls = [
        call
        for trace in made.values()
        for call in trace.calls
        if call.operator == operator and option in call.arguments
    ]
    assert calls
    for call in calls:
        without = {name: value for name, value in call.arguments.items() if name != option}
        assert rules.check(replace(call, arguments=without)).broken, call
