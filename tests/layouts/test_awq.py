# SPDX-License-Identifier: Apache-2.0
"""AWQ's packing, against NumPy, against AutoAWQ's own code, and there and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layouts.words import awq_columns, dequantized_awq
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts import awq
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, WeightSpec

GOLDEN = Path(__file__).parent / "golden" / "awq_gemm.npz"


def spec_of(group: int, *, symmetric: bool = False) -> LayerSpec:
    granularity = Granularity.GROUP if group > 0 else Granularity.CHANNEL
    weight = WeightSpec(4, granularity=granularity, group_size=max(group, 0), symmetric=symmetric)
    return LayerSpec("AWQ W4A16", Layout.AWQ_GEMM, weight)


def loaded(qweight: np.ndarray, scales: np.ndarray, qzeros: np.ndarray | None, spec: LayerSpec) -> dict:
    """The tensors as the adapter hands them to the layout."""
    tensors = {"qweight": torch.from_numpy(qweight), "scales": torch.from_numpy(scales.astype(np.float32))}
    if qzeros is not None:
        tensors["qzeros"] = awq.zeros(torch.from_numpy(qzeros), spec, scales.shape[1])
    return tensors


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unpack_and_pack_are_inverse(rows, columns, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
    values = awq.unpack(torch.from_numpy(words))
    assert np.array_equal(values.numpy(), awq_columns(words))
    assert torch.equal(awq.pack(values), torch.from_numpy(words))
    integers = torch.from_numpy(rng.integers(0, 16, (rows, 8 * columns)))
    assert torch.equal(awq.unpack(awq.pack(integers)).long(), integers)


def test_order_of_one_word():
    """Nibble i holds output ORDER[i]."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert awq.unpack(word)[0, list(awq.ORDER)].tolist() == list(range(8))


def test_slices_of_any_stride_are_read():
    words = torch.randint(-(2**31), 2**31 - 1, (6, 4), dtype=torch.int64).to(torch.int32)
    for part in (words[:, 1:2], words[::2, 1:3], words[:1, 2:3]):
        assert np.array_equal(awq.unpack(part).numpy(), awq_columns(part.numpy()))


def test_autoawq_reads_the_same_numbers():
    golden = np.load(GOLDEN)
    assert np.array_equal(awq_columns(golden["qweight"]), golden["q"])
    spec = spec_of(32)
    linear = awq.to_canonical(loaded(golden["qweight"], golden["scales"], golden["qzeros"], spec), spec)
    weight = linear.weight
    assert (weight.outputs, weight.inputs, weight.group_size, weight.bits) == (32, 64, 32, 4)
    assert np.array_equal(weight.values.numpy(), golden["q"].T.astype(np.int8) - 8)
    assert np.array_equal(weight.zero.numpy(), golden["zero"].T.astype(np.float32) - 8)
    assert golden["zero"].min() == 0
    assert golden["zero"].max() == 15
    # AutoAWQ multiplies in float16.
    assert np.allclose(weight.dequantize().numpy(), golden["dequantized"].astype(np.float32), rtol=1e-3, atol=1e-6)
    assert torch.equal(awq.pack(torch.from_numpy(golden["q"])), torch.from_numpy(golden["qweight"]))


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.sampled_from([1, 3, 33, 64, 100]),
    columns=st.integers(1, 3),
    group=st.sampled_from([-1, 16, 32, 48, 128]),
    zero_point=st.booleans(),
    seed=st.integers(0, 999),
)
def test_canonical_numbers_are_the_formula(inputs, columns, group, zero_point, seed):
    rng = np.random.default_rng(seed)
    groups = 1 if group <= 0 else -(-inputs // group)
    qweight = rng.integers(-(2**31), 2**31, (inputs, columns)).astype(np.int32)
    qzeros = rng.integers(-(2**31), 2**31, (groups, columns)).astype(np.int32) if zero_point else None
    scales = rng.uniform(0.01, 0.1, (groups, 8 * columns)).astype(np.float16)
    spec = spec_of(group, symmetric=not zero_point)
    weight = awq.to_canonical(loaded(qweight, scales, qzeros, spec), spec).weight
    wanted = dequantized_awq(qweight, scales, qzeros, group)
    assert np.allclose(weight.dequantize().numpy(), wanted, rtol=1e-6, atol=0)
    assert weight.values.dtype == torch.int8
    assert -8 <= int(weight.values.min()) <= int(weight.values.max()) <= 7
    for start, stop in ((0, 1), (3, 8 * columns), (5, 6), (0, 8 * columns)):
        assert torch.equal(weight.rows(start, stop), weight.values[start:stop])


def test_symmetric_weights_have_no_zero_points():
    eights = np.full((2, 1), -0x77777778, dtype=np.int32)
    words = np.zeros((64, 1), dtype=np.int32)
    scales = np.ones((2, 8), dtype=np.float16)
    for symmetric in (True, False):
        spec = spec_of(32, symmetric=symmetric)
        assert awq.to_canonical(loaded(words, scales, eights, spec), spec).weight.zero is None
        assert awq.to_canonical(loaded(words, scales, None, spec), spec).weight.zero is None


def test_zero_points_that_should_not_be_there():
    spec = spec_of(32, symmetric=True)
    words, scales = np.zeros((32, 1), dtype=np.int32), np.ones((1, 8), dtype=np.float16)
    with pytest.raises(NpuQuantError) as caught:
        awq.to_canonical(loaded(words, scales, np.full((1, 1), 0x77777777, dtype=np.int32), spec), spec)
    (finding,) = caught.value.findings
    assert finding.code == "bad-value"
    assert finding.found == "7 to 7"
    assert "zero_point" in finding.fix


def test_bias_is_passed_on():
    spec = spec_of(-1)
    tensors = loaded(np.zeros((4, 1), dtype=np.int32), np.ones((1, 8), dtype=np.float16), None, spec)
    bias = torch.arange(8.0)
    assert torch.equal(awq.to_canonical({**tensors, "bias": bias}, spec).bias, bias)
