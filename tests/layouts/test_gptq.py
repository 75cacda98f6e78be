# SPDX-License-Identifier: Apache-2.0
"""GPTQ's packing, both formats of zero points, and activation order: against NumPy, against GPTQModel's own code, there and
back, and cut for ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layouts.words import bit_stream, dequantized_gptq
from tests.methods.layers import random_input, relative_error, run
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts import gptq
from vllm_npu_quant.layouts.bits import pack, unpack
from vllm_npu_quant.layouts.g_idx import MAX_GROWTH, arrange, starts_new_groups_in_order
from vllm_npu_quant.layouts.tables import LayerSizes, tensors_of
from vllm_npu_quant.methods.weight_only import WeightOnlyLinear
from vllm_npu_quant.serving.shards import act_order_ranks
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, WeightSpec

GOLDEN = Path(__file__).parent / "golden" / "gptq.npz"
BITS = (2, 3, 4, 8)


def spec_of(bits: int, group: int, layout: Layout = Layout.GPTQ, *, symmetric: bool = False) -> LayerSpec:
    granularity = Granularity.GROUP if group > 0 else Granularity.CHANNEL
    weight = WeightSpec(bits, granularity=granularity, group_size=max(group, 0), symmetric=symmetric)
    return LayerSpec(f"GPTQ W{bits}A16", layout, weight)


def loaded(spec: LayerSpec, qweight, scales, qzeros, g_idx=None) -> dict[str, torch.Tensor]:
    """The tensors as the adapter hands them to the layout."""
    unpacked = gptq.zeros_v2 if "V2" in spec.layout.name else gptq.zeros_v1
    tensors = {
        "qweight": torch.from_numpy(qweight),
        "scales": torch.from_numpy(scales.astype(np.float32)),
        "qzeros": unpacked(torch.from_numpy(qzeros), spec, scales.shape[1]),
    }
    if g_idx is not None:
        tensors["g_idx"] = torch.from_numpy(g_idx)
    return tensors


def random_layer(rng, inputs: int, outputs: int, bits: int, group: int):
    """qweight, scales, qzeros of random integers, and zeros in [0, 2^bits - 1] as the second format stores them."""
    groups = 1 if group <= 0 else -(-inputs // group)
    q = torch.from_numpy(rng.integers(0, 2**bits, (-(-inputs // 32) * 32, outputs)))
    zero = torch.from_numpy(rng.integers(0, 2**bits, (groups, -(-outputs // 32) * 32)))
    words = -(-inputs * bits // 32)
    zero_words = -(-outputs * bits // 32)
    qzeros = pack(zero.t(), bits)[:zero_words].t().contiguous().numpy()
    scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    return pack(q, bits)[:words].contiguous().numpy(), scales, qzeros


def undone(linear, inputs: int) -> np.ndarray:
    """The dequantized weight with its inputs in the checkpoint's order."""
    sorted_weight = linear.weight.dequantize().numpy()
    order = linear.input_permutation
    if order is None:
        return sorted_weight
    weight = np.full((sorted_weight.shape[0], inputs), np.nan, dtype=np.float32)
    kept = order >= 0
    weight[:, order[kept].numpy()] = sorted_weight[:, kept.numpy()]
    return weight


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_unpack_and_pack_are_inverse(bits, runs, columns, seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(-(2**31), 2**31, (runs * (3 if bits == 3 else 1), columns)).astype(np.int32)
    values = unpack(torch.from_numpy(words), bits)
    assert values.dtype == torch.uint8
    assert np.array_equal(values.numpy(), bit_stream(words, bits))
    assert np.array_equal(pack(values, bits).numpy(), words)


def test_a_stream_of_3_bits_may_end_inside_of_its_words():
    values = torch.arange(32).reshape(32, 1) % 8
    words = pack(values, 3)
    for length in (1, 2):
        found = unpack(words[:length], 3)[: length * 32 // 3]
        assert torch.equal(found.long(), values[: length * 32 // 3])


def test_columns_of_any_stride_are_read():
    words = torch.randint(-(2**31), 2**31 - 1, (6, 5), dtype=torch.int64).to(torch.int32)
    for part in (words[:, 2:3], words[:, 1:4], words.t()[:, :1], words[:1].t()):
        for bits in (2, 4, 8):
            assert np.array_equal(unpack(part, bits).numpy(), bit_stream(part.numpy(), bits))


@pytest.mark.parametrize("order", ["plain", "shuffled"])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_reads_the_same_numbers(bits, version, order):
    golden = np.load(GOLDEN)
    part = {name.split("_", 2)[2]: golden[name] for name in golden.files if name.startswith(f"{bits}_{order}_")}
    layout = {
        ("v1", "plain"): Layout.GPTQ,
        ("v2", "plain"): Layout.GPTQ_V2,
        ("v1", "shuffled"): Layout.GPTQ_ACT_ORDER,
        ("v2", "shuffled"): Layout.GPTQ_V2_ACT_ORDER,
    }[version, order]
    spec = spec_of(bits, 32, layout)
    tensors = loaded(spec, part["qweight"], part["scales"], part[f"qzeros_{version}"], part["g_idx"])
    assert np.array_equal(tensors["qzeros"].numpy(), part["zero"].T)
    to_canonical = gptq.to_canonical if order == "plain" else gptq.act_order_to_canonical
    linear = to_canonical(tensors, spec)
    # GPTQModel multiplies in float16.
    assert np.allclose(undone(linear, 96), part["dequantized"].astype(np.float32), rtol=1e-3, atol=1e-6)
    middle = 1 << (bits - 1)
    values = linear.weight.values
    assert -middle <= int(values.min()) <= int(values.max()) < middle
    q = part["q"].astype(np.int16) - middle
    if linear.input_permutation is not None:
        assert order == "shuffled"
        q = q[:, linear.input_permutation.numpy()]
    assert np.array_equal(values.numpy(), q)
    assert 0 in part["zero"]
    assert 2**bits - 1 in part["zero"]


def test_a_zero_point_of_0_borrows_from_its_neighbour_in_the_first_format():
    """GPTQModel subtracts 0x11111111 from the word 0x...50: nibble 0 becomes 15, and nibble 1 one less than 5 - 1."""
    word = torch.tensor([[0x88888850 - 0x11111111 - 2**32]]).to(torch.int32)
    assert (int(word) & 0xF, (int(word) >> 4) & 0xF) == (15, 3)
    assert gptq.zeros_v1(word, spec_of(4, 32), 8).tolist() == [[0, 5, 8, 8, 8, 8, 8, 8]]


def test_zero_points_without_a_0_are_stored_minus_one_each():
    for bits in BITS:
        zero = torch.arange(32).reshape(1, 32) % (2**bits - 1) + 1
        stored = pack((zero - 1).t(), bits).t()
        assert torch.equal(gptq.zeros_v1(stored, spec_of(bits, 32), 32).long(), zero)
        same = pack(zero.t(), bits).t()
        assert torch.equal(gptq.zeros_v2(same, spec_of(bits, 32), 32).long(), zero)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    inputs=st.sampled_from([5, 31, 32, 96, 100, 160]),
    outputs=st.sampled_from([1, 3, 8, 33]),
    group=st.sampled_from([-1, 16, 32, 48, 64, 128]),
    v2=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 999),
)
def test_canonical_numbers_are_the_formula(bits, inputs, outputs, group, v2, act_order, seed):
    rng = np.random.default_rng(seed)
    qweight, scales, qzeros = random_layer(rng, inputs, outputs, bits, group)
    in_order = np.zeros(inputs, dtype=np.int32) if group <= 0 else (np.arange(inputs) // group).astype(np.int32)
    act_order = act_order and group > 0
    g_idx = rng.permutation(in_order) if act_order else in_order
    layout = {
        (False, False): Layout.GPTQ,
        (True, False): Layout.GPTQ_V2,
        (False, True): Layout.GPTQ_ACT_ORDER,
        (True, True): Layout.GPTQ_V2_ACT_ORDER,
    }[v2, act_order]
    spec = spec_of(bits, group, layout)
    tensors = loaded(spec, qweight, scales, qzeros, g_idx)
    linear = (gptq.act_order_to_canonical if act_order else gptq.to_canonical)(tensors, spec)
    wanted = dequantized_gptq(qweight, scales, qzeros, bits, group, v2=v2, g_idx=g_idx)
    assert np.allclose(undone(linear, inputs), wanted, rtol=1e-6, atol=0)
    weight = linear.weight
    for start, stop in ((0, 1), (outputs // 2, outputs)):
        assert torch.equal(weight.rows(start, stop), weight.values[start:stop])
    # Stored shapes are what the table of layouts says.
    sizes = LayerSizes(outputs, inputs, max(group, 0))
    shapes = {tensor.name: tensor.shape(sizes) for tensor in tensors_of(spec, frozenset({"g_idx"}))}
    assert shapes == {
        "qweight": qweight.shape,
        "qzeros": qzeros.shape,
        "scales": scales.shape,
        "g_idx": g_idx.shape,
    }


def test_without_g_idx_the_words_say_how_many_inputs_there_are():
    rng = np.random.default_rng(0)
    qweight, scales, qzeros = random_layer(rng, 64, 32, 4, 32)
    spec = spec_of(4, 32)
    assert gptq.to_canonical(loaded(spec, qweight, scales, qzeros), spec).weight.inputs == 64


@pytest.mark.parametrize(
    ("layout", "word", "fix"),
    [
        (Layout.GPTQ, -0x77777778, '"gptq_v2"'),
        (Layout.GPTQ_V2, 0x77777777, '"gptq"'),
        (Layout.GPTQ, 0x12345678, '"sym": false'),
    ],
)
def test_zero_points_that_contradict_sym(layout, word, fix):
    spec = spec_of(4, 32, layout, symmetric=True)
    scales = np.ones((1, 8), dtype=np.float16)
    tensors = loaded(spec, np.zeros((4, 8), dtype=np.int32), scales, np.array([[word]], dtype=np.int32))
    with pytest.raises(NpuQuantError) as caught:
        gptq.to_canonical(tensors, spec)
    (finding,) = caught.value.findings
    assert finding.code == "bad-value"
    assert finding.expected == "zero point 8 everywhere"
    assert fix in finding.fix


def test_symmetric_weights_have_no_zero_points():
    for layout, word in ((Layout.GPTQ, 0x77777777), (Layout.GPTQ_V2, -0x77777778)):
        spec = spec_of(4, 32, layout, symmetric=True)
        zeros = np.array([[word]], dtype=np.int32)
        tensors = loaded(spec, np.zeros((4, 8), dtype=np.int32), np.ones((1, 8), dtype=np.float16), zeros)
        assert gptq.to_canonical(tensors, spec).weight.zero is None


# g_idx


@pytest.mark.parametrize(
    ("g_idx", "size"),
    [
        ([0], 1),
        ([0, 0, 0], 3),
        ([0, 0, 1, 1], 2),
        ([0, 0, 1], 2),
        ([0, 1, 2], 1),
        ([1, 1, 0, 0], 0),
        ([0, 1, 0, 1], 0),
        ([0, 0, 1, 1, 1], 0),
        ([0, 0, 2, 2], 0),
        ([1, 1, 2, 2], 0),
        ([-1, 0], 0),
    ],
)
def test_in_order(g_idx, size):
    assert starts_new_groups_in_order(torch.tensor(g_idx)) == size


@pytest.mark.parametrize(
    ("g_idx", "group", "fits"),
    [
        ([0] * 64, -1, True),
        ([0] * 64, 64, True),
        ([0] * 64, 128, True),
        ([0] * 32 + [1] * 32, 32, True),
        ([0] * 32 + [1] * 32, 16, True),  # a rank's divisor of the group size
        ([0] * 16 + [1] * 16 + [2] * 16 + [3] * 16, 32, False),
        ([0] * 32 + [1] * 32, -1, True),
        ([1] * 32 + [0] * 32, 32, False),
        ([0, 1] * 32, 32, False),
        ([], 32, False),
    ],
)
def test_g_idx_without_activation_order_is_compared(g_idx, group, fits):
    stored, spec = torch.tensor(g_idx, dtype=torch.int32), spec_of(4, group)
    if fits:
        assert torch.equal(gptq.checked_g_idx(stored, spec, 8), stored)
        return
    with pytest.raises(NpuQuantError) as caught:
        gptq.checked_g_idx(stored, spec, 8)
    (finding,) = caught.value.findings
    assert finding.code == "bad-value"
    assert "desc_act" in finding.fix


def test_groups_of_a_whole_layer_stay_as_they_are():
    g_idx = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(256) // 32))
    found = arrange(g_idx, 32, 8)
    assert found.group_size == 32
    assert found.columns.tolist() == list(range(8))
    assert torch.equal(g_idx[found.permutation], torch.arange(256) // 32)
    # Stable: inputs of one group keep their order.
    assert all(torch.equal(part, part.sort().values) for part in found.permutation.split(32))


def test_nothing_moves_where_all_is_in_order():
    found = arrange(torch.arange(100) // 32, 32, 4)
    assert found.permutation is None
    assert (found.group_size, found.columns.tolist()) == (32, [0, 1, 2, 3])
    alone = arrange(torch.full((7,), 2), 32, 4)
    assert (alone.permutation, alone.group_size, alone.columns.tolist()) == (None, 0, [2])


def test_unequal_groups_that_are_multiples_of_32_need_no_zeros():
    g_idx = torch.tensor([1] * 64 + [0] * 96 + [3] * 32)
    found = arrange(g_idx, 128, 4)
    assert found.group_size == 32
    assert found.columns.tolist() == [0, 0, 0, 1, 1, 3]
    assert found.permutation.min() == 0


@settings(max_examples=60, deadline=None)
@given(
    group=st.sampled_from([32, 64, 128]),
    groups=st.integers(2, 6),
    ranks=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 9999),
)
def test_a_ranks_part_is_filled_up_to_whole_groups(group, groups, ranks, seed):
    shuffled = np.random.default_rng(seed).permutation(np.arange(group * groups) // group)
    for part in np.split(shuffled, ranks):
        g_idx = torch.from_numpy(part)
        if ranks > act_order_ranks(group):
            continue
        found = arrange(g_idx, group, groups)
        order = found.permutation if found.permutation is not None else torch.arange(len(part))
        kept = order >= 0
        # Every input is there once, in a group of its own scale.
        assert order[kept].sort().values.tolist() == list(range(len(part)))
        assert len(order) <= MAX_GROWTH * len(part)
        of_place = found.columns.repeat_interleave(found.group_size)[: len(order)] if found.group_size else None
        if of_place is not None:
            assert torch.equal(of_place[kept], g_idx[order[kept]])
        if not kept.all():
            assert found.group_size % 32 == 0
            assert len(order) == found.group_size * len(found.columns)


def test_too_few_of_each_group():
    g_idx = torch.arange(64) % 16
    with pytest.raises(NpuQuantError) as caught:
        arrange(g_idx, 128, 16)
    (finding,) = caught.value.findings
    assert finding.code == "cannot-shard"
    assert "8.0 times" in finding.message
    assert "--tensor-parallel-size 4" in finding.fix


@pytest.mark.parametrize("value", [-1, 4])
def test_a_group_that_does_not_exist(value):
    with pytest.raises(NpuQuantError) as caught:
        arrange(torch.tensor([0, 1, 2, 3, value]), 32, 4)
    (finding,) = caught.value.findings
    assert finding.code == "bad-value"
    assert finding.expected == "0 to 3"


def _rank(tensors: dict, spec: LayerSpec, bits: int, start: int, stop: int) -> dict:
    """A row-parallel rank's part: its inputs, and all scales."""
    words = slice(start * bits // 32, stop * bits // 32)
    return {**tensors, "qweight": tensors["qweight"][words].clone(), "g_idx": tensors["g_idx"][start:stop].clone()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activation_order_through_the_method(bits, ranks, dtype):
    """Partial results of all ranks add up to x @ w.T."""
    rng = np.random.default_rng((bits, ranks))
    inputs, outputs, group = 512, 40, 64 if ranks < 4 else 128
    qweight, scales, qzeros = random_layer(rng, inputs, outputs, bits, group)
    g_idx = rng.permutation(np.arange(inputs) // group).astype(np.int32)
    spec = spec_of(bits, group, Layout.GPTQ_ACT_ORDER)
    tensors = loaded(spec, qweight, scales, qzeros, g_idx)
    x = random_input(5, inputs, dtype)
    total = torch.zeros(5, outputs, dtype=torch.float64)
    for start in range(0, inputs, inputs // ranks):
        stop = start + inputs // ranks
        linear = gptq.act_order_to_canonical(_rank(tensors, spec, bits, start, stop), spec)
        total += run(WeightOnlyLinear(), linear, x[:, start:stop].contiguous()).to(torch.float64)
    wanted = dequantized_gptq(qweight, scales, qzeros, bits, group, g_idx=g_idx)
    assert relative_error(total, x.to(torch.float64).numpy() @ wanted.T) < (0.005 if dtype is torch.bfloat16 else 0.002)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("inputs", "group"), [(96, 16), (100, 32), (96, 48), (64, 64), (64, 128), (64, -1)])
def test_groups_that_the_operator_does_not_take(bits, inputs, group):
    rng = np.random.default_rng((bits, inputs))
    qweight, scales, qzeros = random_layer(rng, inputs, 24, bits, group)
    g_idx = np.zeros(inputs, dtype=np.int32) if group <= 0 else (np.arange(inputs) // group).astype(np.int32)
    spec = spec_of(bits, group)
    linear = gptq.to_canonical(loaded(spec, qweight, scales, qzeros, g_idx), spec)
    x = random_input(3, inputs, torch.float16)
    wanted = dequantized_gptq(qweight, scales, qzeros, bits, group, g_idx=g_idx)
    found = run(WeightOnlyLinear(), linear, x)
    assert relative_error(found, x.to(torch.float64).numpy() @ wanted.T) < 0.002
