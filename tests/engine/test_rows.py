# SPDX-License-Identifier: Apache-2.0
"""Layers whose rows a model class reorders: every tensor of every layout follows, on every rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engine.test_shards import dequantized
from tests.engine.test_stored import FUSED, INPUTS, Maker, fill, fused, method_of, modelslim_dynamic
from tests.layouts.test_every_layout import WAYS, Numbers, layers
from vllm_npu_quant.engine.coverage import Coverage
from vllm_npu_quant.engine.stored import Origin, Receiver, Rows
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.tables import PAIRS, tensors_of
from vllm_npu_quant.serving.shards import rank_part
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, NumberKind, WeightSpec


def shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def received(layout: Layout, numbers: Numbers, order: torch.Tensor, *, symmetric: bool) -> CanonicalLinear:
    """What a layer on one rank holds of stored tensors whose rows the model takes in this order."""
    granularity = Granularity.GROUP if numbers.group else Granularity.CHANNEL
    weight = WeightSpec(numbers.bits, NumberKind.INT, granularity, numbers.group, symmetric)
    static = layout in (Layout.MODELSLIM_STATIC, Layout.CT_STATIC)
    activation = ActivationSpec(8, False, Granularity.TENSOR, symmetric=False) if static else None
    spec = LayerSpec("", layout, weight, activation)
    stored = WAYS[layout].store(numbers)
    outputs, inputs = numbers.values.shape
    listed = frozenset(stored)
    part = rank_part(spec, listed, None, [outputs], inputs, 1)
    tensors = {tensor.name: tensor for tensor in tensors_of(spec, listed)}
    receiver = Receiver(part, tensors, "layer", "file", {"weight": Coverage((1,))})
    origin = Origin("layer", spec, (outputs,), rows=Rows(order, outputs))
    values = {}
    for name, tensor in tensors.items():
        value = torch.from_numpy(np.ascontiguousarray(stored[name]))
        receiver.expect(counting=True)
        counted = receiver.receive(tensor, value, origin)
        receiver.expect()
        values[name] = receiver.receive(tensor, value, origin).to(getattr(torch, tensor.load_dtype))
        assert (counted.device.type, counted.shape) == ("meta", values[name].shape)
    return receiver.canonical(values, spec)


@given(layers())
@settings(max_examples=400, deadline=None)
def test_every_tensor_of_every_layout_follows(case: tuple[Layout, Numbers, bool]) -> None:
    layout, numbers, symmetric = case
    order = shuffled(numbers.values.shape[0])
    linear = received(layout, numbers, order, symmetric=symmetric)
    inputs = linear.input_permutation
    inputs = torch.arange(linear.weight.inputs) if inputs is None else inputs
    kept = inputs >= 0
    floats = np.empty(numbers.values.shape, np.float32)
    floats[:, inputs[kept].numpy()] = linear.weight.dequantize().numpy()[:, kept.numpy()]
    np.testing.assert_array_equal(floats, numbers.weight()[order.numpy()])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", FUSED)
def test_ranks_cut_after_the_rows_are_reordered(name: str, size: int) -> None:
    case, order = FUSED[name][0](256, INPUTS, 0), shuffled(256)
    for rank in range(size):
        method = method_of({"m.in_proj_qkvz": case}, "m.in_proj_qkvz")
        layer = fused(method, [256], INPUTS, rank, size)
        method.take_rows(None, Rows(order, 256))
        fill(layer, None, case[1])
        wanted = case[2][order.numpy()][rank * 256 // size : (rank + 1) * 256 // size]
        assert np.allclose(dequantized(layer), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [modelslim_dynamic, FUSED["awq groups"][0], FUSED["fp8 blocks"][0]])
def test_one_checkpoint_layer_that_a_model_divides(make: Maker) -> None:
    """A model that takes gate and up out of one tensor, which lie in it row by row."""
    case = make(256, INPUTS, 0)
    method = method_of({"m.gate_up_proj": case}, "m.gate_up_proj")
    layer = fused(method, [128, 128], INPUTS, 0, 1)
    for shard in (0, 1):
        method.take_rows(shard, Rows(torch.arange(shard, 256, 2), 256))
        fill(layer, shard, case[1])
    wanted = np.concatenate([case[2][0::2], case[2][1::2]])
    assert np.allclose(dequantized(layer), wanted, rtol=1e-6, atol=0)


def test_another_number_of_rows_than_the_layer_has() -> None:
    case = modelslim_dynamic(256, INPUTS)
    method = method_of({"m.in_proj_qkvz": case}, "m.in_proj_qkvz")
    fused(method, [256], INPUTS, 0, 1)
    with pytest.raises(NpuQuantError) as error:
        method.take_rows(None, Rows(torch.arange(255), 256))
    (finding,) = error.value.findings
    assert (finding.code, finding.expected, finding.found) == ("wrong-shape", "256", "255")


def test_words_of_rows_in_an_order_that_is_not_known() -> None:
    """A layout of an extension that packs rows, and does not say where in a word each lies."""
    spec = LayerSpec("W4A8", Layout.MODELSLIM_PACKED_N, WeightSpec(4))
    weight = tensors_of(spec)[0]
    receiver = Receiver(rank_part(spec, frozenset(), None, [8], 6, 1), {}, "layer", "file", {"weight": Coverage((1,))})
    origin, stored = Origin("layer", spec, (8,), rows=Rows(shuffled(8), 8)), torch.zeros(4, 6, dtype=torch.int8)
    assert weight.dims[0] == PAIRS
    receiver.receive(weight, stored, origin)
    with pytest.raises(NpuQuantError, match="packs 2 into a word"):
        receiver.receive(replace(weight, dims=(replace(PAIRS, places=()), weight.dims[1])), stored, origin)
