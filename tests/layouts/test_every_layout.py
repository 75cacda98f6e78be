# SPDX-License-Identifier: Apache-2.0
"""Every layout: numbers are stored the way its producer stores them, and come back through the table of layouts.

The packers here are written from the producers' documents, in NumPy, and share nothing with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.int4 import unpack_pairs
from vllm_npu_quant.layouts.tables import LAYOUTS, tensors_of
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec

Stored = dict[str, np.ndarray]


@dataclass(frozen=True)
class Numbers:
    """A layer's numbers.

    Attributes:
        values: integers in two's complement, int64 [N, K]. scale: float32 [N, G]. zero: int64 [N, G].
        g_idx: int64 [K], the group of every input.
    """

    bits: int
    group: int
    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    g_idx: np.ndarray

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    def weight(self) -> np.ndarray:
        """float32 [N, K]."""
        return (self.values - self.zero[:, self.g_idx]).astype(np.float32) * self.scale[:, self.g_idx]


def pairs(even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    return ((odd << 4) | (even & 15)).astype(np.uint8).view(np.int8)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """32 // bits codes to an int32 along the last dimension, the last word filled up with zeros."""
    per_word = 32 // bits
    codes = np.pad(codes.astype(np.uint64), [(0, 0), (0, -codes.shape[1] % per_word)])
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    return (codes.reshape(codes.shape[0], -1, per_word) << shifts).sum(-1).astype(np.uint32).view(np.int32)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes bit by bit in int32 along the last dimension, lowest bits first, the last word filled up with zeros."""
    places = ((codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1).reshape(codes.shape[0], -1)
    places = np.pad(places, [(0, 0), (0, -places.shape[1] % 32)])
    return np.ascontiguousarray(np.packbits(places, axis=1, bitorder="little")).view(np.int32)


def modelslim(numbers: Numbers) -> Stored:
    return {
        "weight": numbers.values.astype(np.int8),
        "weight_scale": numbers.scale,
        "weight_offset": numbers.zero.astype(np.float32),
    }


def packed_outputs(numbers: Numbers) -> Stored:
    return modelslim(numbers) | {"weight": pairs(numbers.values[0::2], numbers.values[1::2])}


def packed_inputs(numbers: Numbers) -> Stored:
    return modelslim(numbers) | {"weight": pairs(numbers.values[:, 0::2], numbers.values[:, 1::2])}


def two_level(store: Callable[[Numbers], Stored]) -> Callable[[Numbers], Stored]:
    """A first scale of 2 everywhere, whose product with the second is exact."""

    def make(numbers: Numbers) -> Stored:
        first = np.full((numbers.values.shape[0], 1), 2, np.float32)
        return store(numbers) | {
            "weight_scale": first,
            "weight_offset": np.zeros_like(first),
            "weight_scale_second": numbers.scale / 2,
            "weight_offset_second": numbers.zero,
        }

    return make


def modelslim_static(numbers: Numbers) -> Stored:
    scale, one = np.float32(0.25), np.ones(1, np.float32)
    return modelslim(numbers) | {
        "input_scale": scale * one,
        "input_offset": 3 * one,
        "quant_bias": np.arange(numbers.values.shape[0], dtype=np.int32),
        "deq_scale": (scale * numbers.scale[:, 0]).view(np.int32).astype(np.int64),  # as in float16 models
    }


def compressed(numbers: Numbers) -> Stored:
    return {
        "weight": numbers.values.astype(np.int8),
        "weight_scale": numbers.scale,
        "weight_zero_point": numbers.zero.astype(np.int8),
    }


def compressed_static(numbers: Numbers) -> Stored:
    return compressed(numbers) | {
        "input_scale": np.array([0.5], np.float32),
        "input_zero_point": np.array([-7], np.int8),
    }


def compressed_packed(numbers: Numbers) -> Stored:
    middle = numbers.middle
    return {
        "weight_packed": words(numbers.values + middle, numbers.bits),
        "weight_scale": numbers.scale,
        "weight_zero_point": np.ascontiguousarray(words((numbers.zero + middle).T, numbers.bits).T),
        "weight_shape": np.array(numbers.values.shape),
        "weight_g_idx": numbers.g_idx.astype(np.int32),
    }


def compressed_dense(numbers: Numbers) -> Stored:
    zeros = stream((numbers.zero + numbers.middle).T, numbers.bits)
    return compressed_packed(numbers) | {
        "weight_packed": stream(numbers.values + numbers.middle, numbers.bits),
        "weight_zero_point": np.ascontiguousarray(zeros.T),
    }


def plain_zero(numbers: Numbers) -> Stored:
    return compressed_packed(numbers) | {"weight_zero_point": numbers.zero.astype(np.int8)}


def awq(numbers: Numbers) -> Stored:
    def columns(codes: np.ndarray) -> np.ndarray:
        return words(codes.reshape(codes.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape), 4)

    return {
        "qweight": columns(numbers.values.T + 8),
        "qzeros": columns(numbers.zero.T + 8),
        "scales": numbers.scale.T,
    }


def gptq(*, v2: bool) -> Callable[[Numbers], Stored]:
    def make(numbers: Numbers) -> Stored:
        bits, codes = numbers.bits, numbers.zero.T + numbers.middle
        if v2:
            zeros = stream(codes, bits)
        elif bits == 3:
            zeros = stream((codes - 1) & 7, bits)
        else:  # from whole words: a zero point of 0 borrows from its neighbour
            ones = stream(np.ones((codes.shape[0], -(-codes.shape[1] * bits // 32) * 32 // bits), np.int64), bits)
            zeros = (stream(codes, bits).view(np.uint32) - ones.view(np.uint32)).view(np.int32)
        return {
            "qweight": np.ascontiguousarray(stream(numbers.values + numbers.middle, bits).T),
            "qzeros": zeros,
            "scales": numbers.scale.T,
            "g_idx": numbers.g_idx.astype(np.int32),
        }

    return make


@dataclass(frozen=True)
class Way:
    """How a layout stores numbers.

    Attributes:
        store: Numbers to the stored tensors. bits: what it takes. outputs, inputs: what divides the layer's sizes.
        grouped, ordered: whether it has groups, and whether they come in any order.
        asymmetric: whether zero points may be there.
    """

    store: Callable[[Numbers], Stored]
    bits: tuple[int, ...] = (4,)
    outputs: int = 1
    inputs: int = 1
    grouped: bool = True
    ordered: bool = False
    asymmetric: bool = True


GPTQ_BITS = (2, 3, 4, 8)
WAYS: dict[Layout, Way] = {
    Layout.MODELSLIM_INT: Way(modelslim, (4, 8)),
    Layout.MODELSLIM_STATIC: Way(modelslim_static, (8,), grouped=False, asymmetric=False),
    Layout.MODELSLIM_PACKED_N: Way(packed_outputs, outputs=2),
    Layout.MODELSLIM_PACKED_K: Way(packed_inputs, inputs=2),
    Layout.MODELSLIM_TWO_LEVEL: Way(two_level(modelslim)),
    Layout.MODELSLIM_TWO_LEVEL_PACKED: Way(two_level(packed_outputs), outputs=2),
    Layout.CT_INT: Way(compressed, (2, 4, 6, 8)),
    Layout.CT_STATIC: Way(compressed_static, (8,), grouped=False, asymmetric=False),
    Layout.CT_PACKED: Way(compressed_packed, (1, 2, 3, 4, 5, 8)),
    Layout.CT_PACKED_DENSE: Way(compressed_dense, GPTQ_BITS),
    Layout.CT_PACKED_ACT_ORDER: Way(compressed_packed, (2, 4, 8), ordered=True),
    Layout.CT_PACKED_PLAIN_ZERO: Way(plain_zero, (4, 8)),
    Layout.CT_PACKED_PLAIN_ZERO_ACT_ORDER: Way(plain_zero, (4, 8), ordered=True),
    Layout.AWQ_GEMM: Way(awq, outputs=8),
    Layout.GPTQ: Way(gptq(v2=False), GPTQ_BITS),
    Layout.GPTQ_V2: Way(gptq(v2=True), GPTQ_BITS),
    Layout.GPTQ_ACT_ORDER: Way(gptq(v2=False), GPTQ_BITS, ordered=True),
    Layout.GPTQ_V2_ACT_ORDER: Way(gptq(v2=True), GPTQ_BITS, ordered=True),
}


#: Layouts of floats have tests of their own: test_fp8.py, test_fp4.py and test_rounded.py.
FLOATS = {
    *(Layout.FLOAT, Layout.FP8, Layout.FP8_INV, Layout.FP8_BLOCK_4D, Layout.MXFP8, Layout.MXFP8_INV),
    *(Layout.MXFP4, Layout.CT_MXFP4, Layout.NVFP4, Layout.CT_NVFP4, Layout.ROUNDED, Layout.ROUNDED_PAIRS),
}


def test_every_layout_is_here() -> None:
    assert WAYS.keys() == LAYOUTS.keys() - FLOATS


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layout, Numbers, bool]:
    """A layout, numbers for it, and whether the layer is symmetric; small and odd sizes first."""
    layout = draw(st.sampled_from(list(WAYS)))
    way = WAYS[layout]
    bits = draw(st.sampled_from(way.bits))
    outputs = way.outputs * draw(st.integers(1, 13))
    grouped = (way.grouped and draw(st.booleans())) or way.ordered
    group = draw(st.integers(1, 9)) if grouped else 0
    groups = draw(st.integers(2, 5)) if grouped else 1
    inputs = groups * group if grouped else draw(st.integers(1, 41))
    if inputs % way.inputs:
        inputs *= way.inputs
    group = inputs // groups if grouped else 0
    asymmetric = way.asymmetric and draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    zero = rng.integers(low, high, (outputs, groups)) if asymmetric else np.zeros((outputs, groups), np.int64)
    g_idx = np.arange(inputs) // (group or inputs)
    numbers = Numbers(
        bits,
        group,
        rng.integers(low, high, (outputs, inputs)),
        rng.uniform(0.5, 2, (outputs, groups)).astype(np.float32),
        zero,
        rng.permutation(g_idx) if way.ordered else g_idx,
    )
    return layout, numbers, not asymmetric


def load_object(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def loaded(layout: Layout, numbers: Numbers, *, symmetric: bool) -> CanonicalLinear:
    """What the table of layouts makes of the stored tensors, on one rank."""
    granularity = Granularity.GROUP if numbers.group else Granularity.CHANNEL
    weight = WeightSpec(numbers.bits, NumberKind.INT, granularity, numbers.group, symmetric)
    static = layout in (Layout.MODELSLIM_STATIC, Layout.CT_STATIC)
    activation = ActivationSpec(8, False, Granularity.TENSOR, symmetric=False) if static else None
    spec = LayerSpec("", layout, weight, activation)
    stored = WAYS[layout].store(numbers)
    outputs = numbers.values.shape[0]
    tensors = {}
    for tensor in tensors_of(spec, frozenset(stored)):
        value = torch.from_numpy(np.ascontiguousarray(stored[tensor.name]))
        if tensor.name == "deq_scale":
            value = load_object("vllm_npu_quant.layouts.modelslim:decode_int64_scale")(value)
        if tensor.rearrange:
            value = load_object(tensor.rearrange)(value, spec, outputs)
        tensors[tensor.name] = value.to(getattr(torch, tensor.load_dtype))
    return load_object(LAYOUTS[layout].to_canonical)(tensors, spec)


@given(layers())
@settings(max_examples=600, deadline=None)
def test_numbers_come_back(case: tuple[Layout, Numbers, bool]) -> None:
    layout, numbers, symmetric = case
    linear = loaded(layout, numbers, symmetric=symmetric)
    weight, order = linear.weight, linear.input_permutation
    if order is None:
        order = torch.arange(weight.inputs)
    kept = order >= 0
    assert sorted(order[kept].tolist()) == list(range(numbers.values.shape[1]))
    assert weight.bits == numbers.bits
    integers = np.empty_like(numbers.values)
    integers[:, order[kept].numpy()] = weight.values.numpy()[:, kept.numpy()]
    np.testing.assert_array_equal(integers, numbers.values)
    if weight.pairs is not None:
        for start in (0, weight.outputs // 2):
            assert torch.equal(unpack_pairs(weight.pairs(start, weight.outputs)), weight.rows(start, weight.outputs))
    elif layout is Layout.CT_PACKED:
        assert numbers.bits != 4 or weight.inputs % 2
    floats = np.empty(integers.shape, np.float32)
    floats[:, order[kept].numpy()] = weight.dequantize().numpy()[:, kept.numpy()]
    np.testing.assert_array_equal(floats, numbers.weight())
    assert (weight.zero is None) == (not numbers.zero.any())
