# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that the operators share, on arbitrary values."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_npu_quant.emulation import numerics

INT4_ROWS = st.lists(st.integers(-8, 7), min_size=8, max_size=64).map(lambda values: values[: len(values) // 8 * 8])
FLOATS32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(INT4_ROWS)
def test_int4_survives_packing_in_the_documented_order(values: list[int]) -> None:
    for dtype in (torch.int8, torch.int32):
        packed = numerics.pack_int4(torch.tensor(values, dtype=dtype))
        assert torch.equal(numerics.unpack_int4(packed), torch.tensor(values, dtype=torch.int8))
    words = [
        sum((value & 0xF) << (4 * i) for i, value in enumerate(values[n : n + 8])) for n in range(0, len(values), 8)
    ]
    assert packed.tolist() == [word - 2**32 if word >= 2**31 else word for word in words]


def test_unpacking_reads_views_of_other_memory_orders() -> None:
    packed = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert torch.equal(numerics.unpack_int4(packed.t()), numerics.unpack_int4(packed.t().contiguous()))


@given(FLOATS32)
def test_19_bits_are_the_number_cut_off_towards_zero(value: float) -> None:
    cut = numerics.keep_19_bits(torch.tensor([value], dtype=torch.float32)).item()
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    assert struct.pack("<f", cut) == struct.pack("<I", bits & 0xFFFFE000)
    assert abs(cut) <= abs(value)
    if abs(value) >= 2.0**-126:
        assert abs(value - cut) < abs(value) * 2.0**-10


@given(FLOATS32, st.floats(-400, 400, width=32))
def test_quant_param_holds_scale_and_offset(scale: float, offset: float) -> None:
    bits = torch.tensor([scale], dtype=torch.float32).view(torch.int32)
    packed = numerics.pack_quant_param(bits, torch.tensor([offset]))
    assert packed.item() >> 46 == 1
    found_scale, found_offset = numerics.split_quant_param(packed)
    assert torch.equal(found_scale, numerics.keep_19_bits(torch.tensor([scale], dtype=torch.float32)))
    assert found_offset.item() == max(-256, min(255, round(offset)))


@given(st.floats(width=32))
def test_rounding_is_half_to_even_and_saturates(value: float) -> None:
    rounded = numerics.round_to_int(torch.tensor([value], dtype=torch.float32), numerics.INT8).item()
    if value != value:
        assert rounded == 0
    elif abs(value) == float("inf"):
        assert rounded == (127 if value > 0 else -128)
    else:
        assert rounded == max(-128, min(127, round(value)))


@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 5), st.randoms(use_true_random=False))
def test_integer_product_is_exact(rows: int, depth: int, width: int, random: object) -> None:
    generator = torch.Generator().manual_seed(random.getrandbits(32))  # type: ignore[attr-defined]
    left = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator)
    right = torch.randint(-128, 128, (depth, width), dtype=torch.int8, generator=generator)
    expected = (left.to(torch.int64)[:, :, None] * right.to(torch.int64)[None]).sum(1)
    assert torch.equal(numerics.int_matmul(left, right).to(torch.int64), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.int64])
def test_garbage_is_neither_zero_nor_a_usual_number(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, dtype=dtype)
    numerics.fill_garbage(tensor)
    if dtype.is_floating_point:
        assert tensor.isnan().all()
    else:
        assert (tensor.view(torch.uint8) == 0x7F).all()
