# SPDX-License-Identifier: Apache-2.0
"""W4A8 and W4A4 against the scheme written out in NumPy with exact integers, and against the dequantized float layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.layers import (
    DTYPES,
    dequantized,
    inputs_of,
    prepared,
    random_input,
    random_weight,
    relative_error,
    rows_of,
    run,
)
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods import base
from vllm_npu_quant.methods.base import PrepareContext
from vllm_npu_quant.methods.w4a4 import W4A4DynamicLinear
from vllm_npu_quant.methods.w4a8 import W4A8DynamicLinear

METHODS = {W4A8DynamicLinear: 127, W4A4DynamicLinear: 7}

# N, K, group
SHAPES = [
    (1, 33, 0),
    (5, 40, 0),
    (17, 600, 0),
    (64, 256, 0),
    (9, 100, 32),
    (24, 160, 20),
    (16, 96, 6),
    (20, 130, 64),
    (48, 128, 128),  # one group: a channel
    (7, 512, 128),
    (16, 600, 256),
    (24, 512, 256),
    (8, 1030, 512),
]


def quantized(x: torch.Tensor, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scale per token, x_scale = max|x| / largest."""
    tokens = x.double().numpy()
    scale = np.abs(tokens).max(1, keepdims=True) / largest
    return np.rint(tokens / scale), scale


def without_ties(x: torch.Tensor, largest: int) -> torch.Tensor:
    """Inputs that lie just between two integers become 0: kernels that divide round them otherwise than kernels that multiply
    with the reciprocal, and both are right."""
    tokens = x.double()
    ratio = tokens * largest / tokens.abs().amax(1, keepdim=True)
    return x.masked_fill(((ratio - ratio.floor()) - 0.5).abs() < 1e-4, 0)


def scheme(x: torch.Tensor, weight: CanonicalWeight, largest: int) -> np.ndarray:
    """sum_g int(x_q[g] . w_q[g]) * weight_scale[g] * x_scale in float64; the products are exact integers."""
    integers, x_scale = quantized(x, largest)
    values = weight.values.numpy().astype(np.int64)
    group = weight.group_size or weight.inputs
    y = np.zeros((x.shape[0], weight.outputs))
    for g in range(weight.scale.shape[1]):
        part = slice(g * group, (g + 1) * group)
        y += (integers[:, part].astype(np.int64) @ values[:, part].T) * weight.scale.numpy()[:, g].astype(np.float64)
    return y * x_scale


def tolerance(dtype: torch.dtype, method: type) -> float:
    """The output's rounding; W4A8's operator adds up its groups in float16."""
    return {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype] + (2.0**-9 if method is W4A8DynamicLinear else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_it_is_the_scheme(outputs: int, inputs: int, group: int, method: type, dtype: torch.dtype) -> None:
    weight = random_weight(outputs, inputs, 4, group)
    x = without_ties(random_input(5, inputs, dtype), METHODS[method])
    expected = scheme(x, weight, METHODS[method])
    found = run(method(), CanonicalLinear(weight), x)
    assert found.dtype == dtype
    assert relative_error(found, expected) < tolerance(dtype, method)
    bias = torch.linspace(2, 3, outputs)
    with_bias = run(method(), CanonicalLinear(weight), x, bias)
    assert relative_error(with_bias, expected + bias.double().numpy()) < tolerance(dtype, method) + 2.0**-8
    # Nothing but the quantization of the activation lies between the scheme and the float layer.
    exact = x.double().numpy() @ dequantized(weight).T
    simulated = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
    assert relative_error(found, exact) < 1.1 * simulated + tolerance(dtype, method)


@pytest.mark.parametrize("method", METHODS)
def test_leading_dimensions_are_kept(method: type) -> None:
    weight = random_weight(10, 64, 4, 32)
    x = random_input(6, 64, torch.bfloat16)
    flat = run(method(), CanonicalLinear(weight), x)
    assert torch.equal(run(method(), CanonicalLinear(weight), x.reshape(2, 3, 64)), flat.reshape(2, 3, 10))


@pytest.mark.parametrize("method", METHODS)
def test_a_token_of_zeros_gives_zeros(method: type) -> None:
    x = random_input(3, 64, torch.bfloat16)
    x[1] = 0
    found = run(method(), CanonicalLinear(random_weight(16, 64, 4)), x)
    assert torch.equal(found[1], torch.zeros(16, dtype=torch.bfloat16))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("method", METHODS)
def test_many_outputs_run_in_pieces(method: type, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.split_outputs, "__defaults__", (100, 64))
    weight = random_weight(205, 64, 4, group)
    x = without_ties(random_input(2, 64, torch.float16), METHODS[method])
    instance = method()
    found = run(instance, CanonicalLinear(weight), x)
    assert len(instance.pieces) == 4
    assert relative_error(found, scheme(x, weight, METHODS[method])) < tolerance(torch.float16, method)


@pytest.mark.parametrize("group", [0, 256])
def test_more_inputs_than_the_int8_int4_operator_takes(group: int) -> None:
    weight = random_weight(8, 20000, 4, group)
    x = random_input(2, 20000, torch.bfloat16)
    method = W4A8DynamicLinear()
    found = run(method, CanonicalLinear(weight), x)
    assert method.parts == [(0, 10240), (10240, 20224)]
    assert relative_error(found, scheme(x, weight, 127)) < tolerance(torch.bfloat16, W4A8DynamicLinear)


@pytest.mark.parametrize("parts", [2, 3, 4, 6])
@pytest.mark.parametrize("group", [0, 32, 64, 128, 256])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_a_row_parallel_layer_sum_up(method: type, group: int, parts: int) -> None:
    """Every rank quantizes its own part of a token; groups are cut at the common divisor of group and part."""
    weight = random_weight(24, 768, 4, group)
    x = random_input(3, 768, torch.float16)
    part = 768 // parts
    common = int(np.gcd(part, group)) if group else 0
    total, expected = torch.zeros(3, 24), np.zeros((3, 24))
    for rank in range(parts):
        linear = inputs_of(CanonicalLinear(weight), rank * part, (rank + 1) * part, common)
        own = without_ties(x[:, rank * part : (rank + 1) * part].contiguous(), METHODS[method])
        total += run(method(), linear, own).float()
        expected += scheme(own, linear.weight, METHODS[method])
    assert relative_error(total, expected) < tolerance(torch.float16, method)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_a_column_parallel_layer_are_its_rows(method: type, group: int) -> None:
    weight = random_weight(48, 128, 4, group)
    x = random_input(4, 128, torch.bfloat16)
    whole = run(method(), CanonicalLinear(weight), x)
    parts = [run(method(), rows_of(CanonicalLinear(weight), 12 * rank, 12 * rank + 12), x) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize(("group", "outputs"), [(0, 24), (256, 24), (64, 24), (0, 21)])
def test_the_prepared_weight_is_packed(group: int, outputs: int) -> None:
    """Two integers per byte, whichever operator runs."""
    layer = prepared(W4A8DynamicLinear(), CanonicalLinear(random_weight(outputs, 512, 4, group)), torch.bfloat16)
    assert (layer.weight.dtype, list(layer.weight.shape)) == (torch.int32, [1, 512, 3])
    values = random_weight(outputs, 512, 4, group).values.numpy().T
    nibbles = np.stack([(layer.weight[0].numpy() >> shift) & 15 for shift in range(0, 32, 4)], axis=-1).reshape(512, 24)
    np.testing.assert_array_equal(np.where(nibbles > 7, nibbles - 16, nibbles)[:, :outputs], values)


def test_int64_scales_hold_float32_bits() -> None:
    weight = random_weight(16, 512, 4, 256)
    weight.scale[0, 0] = -weight.scale[0, 0]  # a set sign bit must not reach the high word
    layer = prepared(W4A8DynamicLinear(), CanonicalLinear(weight), torch.bfloat16)
    words = layer.scale.numpy().view(np.uint32).reshape(2, 16, 2)
    np.testing.assert_array_equal(words[..., 1], 0)
    np.testing.assert_array_equal(words[..., 0].view(np.float32), weight.scale.numpy().T)


def test_the_assist_is_eight_times_the_sum_of_the_weights() -> None:
    for group in (0, 64, 256):
        weight = random_weight(16, 600, 4, group)
        layer = prepared(W4A8DynamicLinear(), CanonicalLinear(weight), torch.bfloat16)
        np.testing.assert_allclose(layer.assist.numpy().flatten(), 8 * dequantized(weight).sum(1), rtol=1e-4, atol=1e-4)


def test_products_that_float16_does_not_hold() -> None:
    weight = random_weight(8, 64, 4, 32)
    weight.scale *= 4e3
    x = random_input(3, 64, torch.bfloat16)
    method = W4A8DynamicLinear()
    found = run(method, CanonicalLinear(weight), x)
    assert method.halves_dtype == torch.bfloat16
    assert relative_error(found, scheme(x, weight, 127)) < 2.0**-6


def permuted(weight: CanonicalWeight) -> CanonicalLinear:
    return CanonicalLinear(weight, input_permutation=torch.arange(weight.inputs))


REFUSED = [
    ("zero points", lambda: CanonicalLinear(random_weight(8, 64, 4, 32, asymmetric=True)), "bad-value", "symmetric"),
    ("odd groups", lambda: CanonicalLinear(random_weight(8, 99, 4, 33)), "operator-limit", "even group size"),
    ("permutation", lambda: permuted(random_weight(8, 64, 4)), "unsupported-scheme", "desc_act=False"),
    ("deep", lambda: CanonicalLinear(random_weight(1, 65600, 4)), "operator-limit", "larger tensor-parallel size"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "code", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_the_operators_cannot_take_is_refused_at_load(make, code: str, text: str, method: type) -> None:
    with pytest.raises(NpuQuantError) as caught:
        method().prepare(make(), PrepareContext(torch.float16))
    assert caught.value.codes == (code,)
    assert text in str(caught.value)


@pytest.mark.parametrize("group", [0, 64, 256])
@pytest.mark.parametrize("method", METHODS)
def test_apply_compiles_without_a_graph_break(method: type, group: int) -> None:
    instance = method()
    layer = prepared(instance, CanonicalLinear(random_weight(20, 512, 4, group)), torch.bfloat16)
    bias = torch.ones(20, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: instance.apply(layer, x, bias), fullgraph=True, backend="eager", dynamic=True)
    for tokens in (4, 7):
        x = random_input(tokens, 512, torch.bfloat16)
        assert torch.equal(compiled(x), instance.apply(layer, x, bias))


@pytest.mark.parametrize("group", [0, 64, 256])
@pytest.mark.parametrize("method", METHODS)
def test_apply_works_on_fake_tensors(method: type, group: int) -> None:
    """No step looks at a value: what a graph capture forbids, fake tensors cannot do."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    instance = method()
    layer = prepared(instance, CanonicalLinear(random_weight(20, 512, 4, group)), torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = instance.apply(layer, torch.empty(3, 512, dtype=torch.bfloat16))
    assert (list(y.shape), y.dtype) == ([3, 20], torch.bfloat16)


def test_the_input_is_not_overwritten() -> None:
    """The int8 x int4 operator overwrites the integers that it is given, never the layer's own input."""
    x = random_input(3, 256, torch.bfloat16)
    before = x.clone()
    run(W4A8DynamicLinear(), CanonicalLinear(random_weight(16, 256, 4)), x)
    assert torch.equal(x, before)
