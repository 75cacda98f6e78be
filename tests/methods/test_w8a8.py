# SPDX-License-Identifier: Apache-2.0
"""The int8 methods against the scheme written out in NumPy, and against the dequantized float layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_npu_quant import emulation
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, StaticActivation
from vllm_npu_quant.methods import base
from vllm_npu_quant.methods.base import PrepareContext, split_outputs
from vllm_npu_quant.methods.w8a8 import W8A8DynamicLinear, W8A8StaticLinear

emulation.register()

# Outputs, inputs: sizes that fill no tile first.
SHAPES = [(1, 33), (17, 63), (48, 96), (64, 256)]
DTYPES = [torch.bfloat16, torch.float16]


def layer_of(tensors: dict[str, torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**tensors)


def random_weight(outputs: int, inputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    return values, (rng.random((outputs, 1)) * 0.02 + 0.001).astype(np.float32)


def random_input(tokens: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dynamic_oracle(x: torch.Tensor, values: np.ndarray, scale: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x_scale = max|x| / 127 per token; y = (round(x / x_scale) @ q.T) * scale * x_scale + bias, in float64."""
    tokens = x.double().numpy()
    x_scale = np.abs(tokens).max(1, keepdims=True) / 127
    quantized = np.rint(tokens / x_scale)
    y = (quantized @ values.T.astype(np.float64)) * scale.T * x_scale
    return y if bias is None else y + bias


def one_rounding(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_dynamic_is_the_scheme(outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype) -> None:
    values, scale = random_weight(outputs, inputs)
    method = W8A8DynamicLinear()
    weight = CanonicalWeight.of(torch.from_numpy(values), torch.from_numpy(scale))
    layer = layer_of(method.prepare(CanonicalLinear(weight), PrepareContext(dtype)))
    bias = torch.linspace(-1, 1, outputs).to(method.bias_dtype(dtype)) if with_bias else None
    x = random_input(5, inputs, dtype)
    y = method.apply(layer, x, bias)
    expected = dynamic_oracle(x, values, scale, None if bias is None else bias.double().numpy())
    assert y.dtype == dtype
    # A scale that differs in its last bit may move an activation that lies between two integers; one step of one input.
    step = float(np.abs(x.float().numpy()).max() / 127 * 128 * scale.max())
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=2 * one_rounding(dtype), atol=step)
    assert np.abs(y.double().numpy() - expected).mean() <= np.abs(expected).mean() * one_rounding(dtype)


@pytest.mark.parametrize("shape", [(33,), (1, 33), (2, 3, 33), (2, 1, 3, 33)])
def test_any_rank_of_the_input(shape: tuple[int, ...]) -> None:
    values, scale = random_weight(17, 33)
    method = W8A8DynamicLinear()
    weight = CanonicalWeight.of(torch.from_numpy(values), torch.from_numpy(scale))
    layer = layer_of(method.prepare(CanonicalLinear(weight), PrepareContext(torch.bfloat16)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = method.apply(layer, x)
    assert y.shape == (*shape[:-1], 17)
    flat = method.apply(layer, x.reshape(-1, 33))
    assert torch.equal(y.reshape(-1, 17), flat)


def test_a_token_of_zeros_gives_the_bias() -> None:
    values, scale = random_weight(17, 33)
    method = W8A8DynamicLinear()
    weight = CanonicalWeight.of(torch.from_numpy(values), torch.from_numpy(scale))
    layer = layer_of(method.prepare(CanonicalLinear(weight), PrepareContext(torch.bfloat16)))
    bias = torch.arange(17).bfloat16()
    assert torch.equal(method.apply(layer, torch.zeros(2, 33).bfloat16(), bias), bias.expand(2, 17))


@pytest.mark.parametrize("method", [W8A8DynamicLinear, W8A8StaticLinear])
def test_more_outputs_than_the_operator_takes(method: type, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _ = static_linear(200, 64)
    x = random_input(3, 64, torch.bfloat16)
    whole = method()
    expected = whole.apply(layer_of(whole.prepare(linear, PrepareContext(torch.bfloat16))), x)
    monkeypatch.setattr(base.split_outputs, "__defaults__", (128, 64))
    cut = method()
    prepared = cut.prepare(linear, PrepareContext(torch.bfloat16))
    assert sum(name.startswith("weight") and tensor.dim() == 2 for name, tensor in prepared.items()) == 2
    assert torch.equal(cut.apply(layer_of(prepared), x), expected)


@pytest.mark.parametrize(
    ("outputs", "limit", "expected"),
    [
        (10, 65535, [(0, 10)]),
        (65535, 65535, [(0, 65535)]),
        (65536, 65535, [(0, 32768), (32768, 65536)]),
        (151936, 65535, [(0, 50688), (50688, 101376), (101376, 151936)]),
    ],
)
def test_split_outputs(outputs: int, limit: int, expected: list[tuple[int, int]]) -> None:
    assert split_outputs(outputs, limit) == expected


@pytest.mark.parametrize("outputs", [65535, 65536, 131069, 131070, 131071, 196605, 262143, 655350, 1_000_003])
def test_split_outputs_covers_everything_within_the_limit(outputs: int) -> None:
    pieces = split_outputs(outputs)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == outputs
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert all(0 < stop - start <= 65535 for start, stop in pieces)


def static_linear(
    outputs: int, inputs: int, *, bias: bool = False, input_scale: float = 0.0237, offset: float = -11.0
) -> tuple[CanonicalLinear, np.ndarray]:
    """A layer as msModelSlim calibrates it, and the float weight that it stands for."""
    values, scale = random_weight(outputs, inputs, seed=3)
    deq = (np.float32(input_scale) * scale[:, 0]).astype(np.float32)
    own = np.linspace(-1, 1, outputs) if bias else np.zeros(outputs)
    quant_bias = np.rint(own / deq - values.astype(np.int64).sum(1) * offset).astype(np.int32)
    static = StaticActivation(
        torch.tensor([input_scale]), torch.tensor([offset]), torch.from_numpy(deq), torch.from_numpy(quant_bias)
    )
    weight = CanonicalWeight.of(torch.from_numpy(values), torch.from_numpy(scale))
    return CanonicalLinear(weight, static), values * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_static_is_the_scheme(outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype) -> None:
    linear, _ = static_linear(outputs, inputs, bias=with_bias)
    assert linear.static is not None
    method = W8A8StaticLinear()
    layer = layer_of(method.prepare(linear, PrepareContext(dtype)))
    x = random_input(5, inputs, dtype)
    y = method.apply(layer, x)
    # npu_quantize multiplies by a reciprocal in x's dtype; the step that it really takes is the one that counts.
    reciprocal = float((1 / linear.static.scale).to(dtype))
    quantized = np.clip(np.rint(x.double().numpy() * reciprocal - 11), -128, 127)
    acc = (quantized + 11) @ linear.weight.values.numpy().T.astype(np.float64)
    expected = acc / reciprocal * linear.weight.scale.numpy()[:, 0]
    expected += np.linspace(-1, 1, outputs) if with_bias else 0
    # The stored and the converted bias are rounded once each.
    unit = float(linear.static.deq_scale.max())
    # float16 keeps 19 bits of the scale: one part in 1024.
    rtol = one_rounding(dtype) + (2**-10 if dtype == torch.float16 else 0)
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=2 * rtol, atol=1e-4 + 1.1 * unit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_is_near_the_float_layer(dtype: torch.dtype) -> None:
    linear, weight = static_linear(48, 256, bias=True)
    method = W8A8StaticLinear()
    x = random_input(64, 256, dtype)
    y = method.apply(layer_of(method.prepare(linear, PrepareContext(dtype))), x).double().numpy()
    clipped = np.clip(x.double().numpy(), (-128 + 11) * 0.0237, (127 + 11) * 0.0237)
    expected = clipped @ weight.T.astype(np.float64) + np.linspace(-1, 1, 48)
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 0.012


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_static_ranks_add_up(ranks: int, dtype: torch.dtype) -> None:
    """Row-parallel: quant_bias holds the zero-point correction of all inputs, so one rank adds it."""
    linear, _ = static_linear(48, 256, bias=True)
    static = linear.static
    assert static is not None
    x = random_input(7, 256, dtype)
    whole = W8A8StaticLinear()
    expected = whole.apply(layer_of(whole.prepare(linear, PrepareContext(dtype))), x).double()
    total = torch.zeros_like(expected)
    largest = torch.zeros_like(expected)
    for part, shard in row_parallel(linear, ranks):
        method = W8A8StaticLinear()
        layer = layer_of(method.prepare(shard, PrepareContext(dtype, adds_constants=part.start == 0)))
        partial = method.apply(layer, x[:, part].contiguous()).double()
        largest = torch.maximum(largest, partial.abs())
        total += partial
    # Every partial result is rounded once to the output dtype.
    assert bool(((total - expected).abs() <= (ranks + 1) * one_rounding(dtype) * largest.clamp(min=1e-3)).all())


def row_parallel(linear: CanonicalLinear, ranks: int) -> Iterator[tuple[slice, CanonicalLinear]]:
    """Each rank's inputs, and its part of a static layer."""
    size = linear.weight.inputs // ranks
    for start in range(0, linear.weight.inputs, size):
        part = slice(start, start + size)
        values = linear.weight.values[:, part].contiguous()
        yield part, CanonicalLinear(CanonicalWeight.of(values, linear.weight.scale), linear.static)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("input_scale", [0.0237, 0.03114, 0.0311])
def test_the_bias_of_a_static_layer_does_not_follow_the_step(input_scale: float, ranks: int) -> None:
    """The stored bias, in float64 from the prepared integers: exact to the rounding of the stored and of each rank's integer.

    The steps in bfloat16 differ from these input scales by -0.13, 0.35 and -0.30 %.
    """
    linear, _ = static_linear(48, 256, bias=True, input_scale=input_scale)
    static, bias = linear.static, np.linspace(-1, 1, 48)
    assert static is not None
    constants = np.zeros(48)
    for part, shard in row_parallel(linear, ranks):
        context = PrepareContext(torch.bfloat16, adds_constants=part.start == 0)
        tensors = W8A8StaticLinear().prepare(shard, context)
        # What is added for an input of zeros, which npu_quantize makes the offset of.
        integers = shard.weight.values.double().numpy().sum(1) * float(static.offset)
        if "quant_bias" in tensors:
            assert tensors["quant_bias"].dtype == torch.int32
            integers = integers + tensors["quant_bias"].double().numpy()
        constants += integers * tensors["weight_scale"].double().numpy()
    unit = static.deq_scale.double().numpy()
    step = 1 / float((1 / static.scale).bfloat16())
    assert np.all(np.abs(constants - bias) <= (0.501 + 0.501 * ranks) * unit * max(1, step / input_scale))


def test_a_rank_without_a_share_of_the_constants_adds_none() -> None:
    """With offset 0 there is no correction; with a step that bfloat16 holds, nothing is converted."""
    for options in ({"offset": 0.0}, {"input_scale": 0.03125}):
        linear, _ = static_linear(48, 256, bias=True, **options)
        for part, shard in row_parallel(linear, 2):
            context = PrepareContext(torch.bfloat16, adds_constants=part.start == 0)
            assert ("quant_bias" in W8A8StaticLinear().prepare(shard, context)) == (part.start == 0)


def test_dynamic_ranks_add_up() -> None:
    """Each rank scales its own part of a token: the sum stays within the quantization error of the whole."""
    values, scale = random_weight(48, 256)
    weight = (values * scale).astype(np.float64)
    x = random_input(16, 256, torch.bfloat16)
    expected = x.double().numpy() @ weight.T
    total = np.zeros_like(expected)
    for part in (slice(0, 128), slice(128, 256)):
        method = W8A8DynamicLinear()
        shard = CanonicalWeight.of(torch.from_numpy(values[:, part].copy()), torch.from_numpy(scale))
        layer = layer_of(method.prepare(CanonicalLinear(shard), PrepareContext(torch.bfloat16)))
        total += method.apply(layer, x[:, part].contiguous()).double().numpy()
    assert np.linalg.norm(total - expected) / np.linalg.norm(expected) < 0.012


@pytest.mark.parametrize("method", [W8A8DynamicLinear, W8A8StaticLinear])
def test_zero_points_are_refused(method: type) -> None:
    linear, _ = static_linear(16, 32)
    linear.weight.zero = torch.ones(16, 1)
    with pytest.raises(NpuQuantError, match="symmetric weights only") as caught:
        method().prepare(linear, PrepareContext(torch.bfloat16))
    assert caught.value.codes == ("bad-value",)


def test_static_without_its_scales_is_refused() -> None:
    linear, _ = static_linear(16, 32)
    linear.static = None
    with pytest.raises(NpuQuantError) as caught:
        W8A8StaticLinear().prepare(linear, PrepareContext(torch.bfloat16))
    assert caught.value.codes == ("missing-tensor",)


def test_static_folds_the_bias_and_ignores_the_argument() -> None:
    linear, _ = static_linear(16, 32, bias=True)
    method = W8A8StaticLinear()
    layer = layer_of(method.prepare(linear, PrepareContext(torch.bfloat16)))
    x = random_input(3, 32, torch.bfloat16)
    assert method.folds_bias
    assert torch.equal(method.apply(layer, x, torch.full((16,), 100.0).bfloat16()), method.apply(layer, x))


@pytest.mark.parametrize("method", [W8A8DynamicLinear, W8A8StaticLinear])
def test_apply_is_one_graph(method: type) -> None:
    linear, _ = static_linear(32, 64)
    one = method()
    layer = torch.nn.Module()
    for name, value in one.prepare(linear, PrepareContext(torch.bfloat16)).items():
        layer.register_buffer(name, value)
    compiled = torch.compile(lambda x: one.apply(layer, x), fullgraph=True, backend="aot_eager")
    x = random_input(3, 64, torch.bfloat16)
    assert torch.equal(compiled(x), one.apply(layer, x))
