# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.fixtures_index import fixture
from vllm_npu_quant.checkpoint import DTYPE_BITS, Checkpoint
from vllm_npu_quant.checkpoint.values import NUMPY_DTYPES
from vllm_npu_quant.errors import NpuQuantError


def opened(folder: Path, dtype: str, shape: list[int], data: bytes, before: bytes = b"") -> Checkpoint:
    """A checkpoint with the tensor "a", its data after the bytes ``before``."""
    begin = len(before)
    header = {
        "pad": {"dtype": "U8", "shape": [begin], "data_offsets": [0, begin]},
        "a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]},
    }
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + before + data)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.findings == ()
    return checkpoint


@pytest.mark.parametrize("before", [b"", b"x"], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPE_BITS if DTYPE_BITS[dtype] >= 8])
def test_values_come_as_stored(tmp_path: Path, dtype: str, before: bytes) -> None:
    data = bytes(range(48)) if dtype != "BOOL" else bytes(n % 2 for n in range(48))
    count = 48 * 8 // DTYPE_BITS[dtype]
    values = opened(tmp_path, dtype, [2, 1, count // 2], data, before).read("a")
    assert values.shape == (2, 1, count // 2)
    assert values.dtype == NUMPY_DTYPES[dtype]
    assert values.tobytes() == data
    assert not values.flags.writeable


def test_scalar_and_nothing(tmp_path: Path) -> None:
    assert opened(tmp_path, "F32", [], struct.pack("<f", 1.5)).read("a").item() == 1.5
    for dtype in ("F32", "BF16", "F8_E4M3", "F4"):
        checkpoint = opened(tmp_path, dtype, [0, 6], b"")
        assert checkpoint.read("a", float32=True).shape == (0, 6)
        assert checkpoint.read("a").size == 0
        assert not checkpoint.read("a").flags.writeable


def test_packed_shapes(tmp_path: Path) -> None:
    assert opened(tmp_path, "F4", [2, 6], bytes(6)).read("a").shape == (2, 3)
    assert opened(tmp_path, "F4", [2, 3], bytes(3)).read("a").shape == (3,)
    assert opened(tmp_path, "F6_E2M3", [3, 4], bytes(9)).read("a").shape == (3, 3)


def test_four_bit_floats(tmp_path: Path) -> None:
    # OCP Microscaling Formats 1.0, table 5: the codes 0 to 7 of E2M1, and the low nibble comes first.
    checkpoint = opened(tmp_path, "F4", [2, 8], bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]))
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = checkpoint.read("a", float32=True)
    assert values.tolist() == [positive, [-value for value in positive]]
    assert np.signbit(values[1, 0])
    odd = opened(tmp_path, "F4", [2, 3], bytes([0x21, 0x43, 0x65])).read("a", float32=True)
    assert odd.tolist() == [[0.5, 1, 1.5], [2, 3, 4]]


@pytest.mark.parametrize(
    ("dtype", "codes"),
    [
        ("F8_E4M3", {0: 0, 1: 2**-9, 7: 7 * 2**-9, 8: 2**-6, 0x38: 1, 0x7E: 448, 0x7F: None, 0xB8: -1, 0xFF: None}),
        ("F8_E5M2", {1: 2**-16, 4: 2**-14, 0x3C: 1, 0x7B: 57344, 0x7C: np.inf, 0x7D: None, 0xFC: -np.inf, 0xFF: None}),
        ("F8_E4M3FNUZ", {1: 2**-10, 0x40: 1, 0x7F: 240, 0x80: None, 0xFF: -240}),
        ("F8_E5M2FNUZ", {1: 2**-17, 0x40: 1, 0x7F: 57344, 0x80: None, 0xFF: -57344}),
        ("F8_E8M0", {0: 2**-127, 1: 2**-126, 127: 1, 128: 2, 254: 2**127, 255: None}),
    ],
)  # fmt: skip
def test_eight_bit_floats(tmp_path: Path, dtype: str, codes: dict[int, float | None]) -> None:
    checkpoint = opened(tmp_path, dtype, [16, 16], bytes(range(256)))
    values = checkpoint.read("a", float32=True)
    assert values.shape == (16, 16)
    for code, value in codes.items():
        found = values.flat[code]
        assert np.isnan(found) if value is None else found == np.float32(value), (code, found)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "BF16", "F16"])
def test_floats_are_torch_s(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    names = {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16", "F16": "float16"}
    theirs = getattr(torch, names.get(dtype, dtype.replace("F8", "float8").lower()), None)
    if theirs is None:
        pytest.skip(f"this torch does not have {dtype}")
    if DTYPE_BITS[dtype] == 8:
        codes = np.arange(256, dtype=np.uint8)
    else:
        codes = np.arange(2**16, dtype=np.uint16)
    checkpoint = opened(tmp_path, dtype, [len(codes)], codes.tobytes(), b"x")
    expected = torch.from_numpy(codes.view(f"i{codes.itemsize}")).view(theirs).to(torch.float32).numpy()
    found = checkpoint.read("a", float32=True)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("dtype", ["I8", "I32", "U8", "BOOL", "C64", "F6_E2M3"])
def test_what_is_not_converted(tmp_path: Path, dtype: str) -> None:
    checkpoint = opened(tmp_path, dtype, [4], bytes(DTYPE_BITS[dtype] // 2))
    with pytest.raises(ValueError, match=f"a is {dtype}, which is not converted"):
        checkpoint.read("a", float32=True)


def test_conversion_gives_a_copy(tmp_path: Path) -> None:
    values = opened(tmp_path, "F32", [2], struct.pack("<2f", 1, 2)).read("a", float32=True)
    values[0] = 3
    assert opened(tmp_path, "F32", [2], struct.pack("<2f", 1, 2)).read("a").tolist() == [1, 2]


def sparse(folder: Path, dtype: str, *shape: int) -> Checkpoint:
    """A file with one tensor of zeros that takes no space."""
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + nbytes)
    return Checkpoint.open(folder)


def test_large_tensors_are_read_in_blocks(tmp_path: Path) -> None:
    checkpoint = sparse(tmp_path, "I8", 2**20, 2**20)
    with pytest.raises(NpuQuantError, match="larger than any of its kind") as caught:
        checkpoint.read("a")
    assert caught.value.codes == ("operator-limit",)
    first = next(checkpoint.blocks("a", 1 << 16))
    assert first.tolist() == [0] * (1 << 16)


@pytest.mark.parametrize("elements", [1, 3, 4, 7, 12, 100])
def test_blocks_are_the_tensor(tmp_path: Path, elements: int) -> None:
    checkpoint = opened(tmp_path, "I16", [3, 4], np.arange(12, dtype="<i2").tobytes(), b"xy")
    blocks = list(checkpoint.blocks("a", elements))
    assert {block.size for block in blocks[:-1]} <= {elements}
    assert np.concatenate(blocks).tolist() == checkpoint.read("a").reshape(-1).tolist()
    assert list(opened(tmp_path, "I16", [0, 4], b"").blocks("a", elements)) == []


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """A memory map would end the process by a signal."""
    checkpoint = sparse(tmp_path, "I8", 1 << 24)
    blocks = checkpoint.blocks("a", 1 << 20)
    assert next(blocks).size == 1 << 20
    os.truncate(tmp_path / "model.safetensors", 1 << 21)
    with pytest.raises(NpuQuantError, match="has changed since") as caught:
        list(blocks)
    assert caught.value.codes == ("unreadable-file",)
    assert caught.value.findings[0].found == f"{1 << 21:,} bytes"


def test_values_are_not_those_of_the_file(tmp_path: Path) -> None:
    """What was read stays when the file is cut off afterwards."""
    checkpoint = sparse(tmp_path, "I8", 1 << 20)
    values = checkpoint.read("a")
    os.truncate(tmp_path / "model.safetensors", 100)
    assert not values.any()


@pytest.mark.parametrize("name", ["msmodelslim-qwen3-w8a8", "awq-qwen3-autoawq-g128", "msmodelslim-qwen3fp16-w8a8"])
def test_values_are_the_library_s(name: str) -> None:
    checkpoint = Checkpoint.open(fixture(name))
    compared = 0
    for file in checkpoint.files:
        with safe_open(checkpoint.folder / file, "np") as theirs:
            for tensor in theirs.keys():  # noqa: SIM118
                if checkpoint.tensors[tensor].dtype != "BF16":
                    expected = theirs.get_tensor(tensor)
                    found = checkpoint.read(tensor)
                    assert found.dtype == expected.dtype
                    assert np.array_equal(found, expected)
                    compared += 1
    assert compared > 40
