# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from safetensors_stream import SafetensorsStream, TensorSpec  # noqa: E402


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
    tensors = {
        f"{prefix}.{dtype}": (torch.randn(shape, generator=generator) * 50).to(dtype)
        for prefix, shape in (("z", (3, 5)), ("a", (7,)), ("scalar", ()), ("none", (0, 4)), ("é", (2,)))
        for dtype in dtypes
    }
    with SafetensorsStream(tmp_path / "ours", specs_of(tensors), metadata) as stream:
        for name in reversed(tensors):
            stream.write(name, tensors[name])
    save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    with SafetensorsStream(tmp_path / "ours", [TensorSpec("w", whole.dtype, (4, 3))]) as stream:
        stream.write("w", whole.T)
    save_file({"w": whole.T.contiguous()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    announced = [TensorSpec("w", torch.float32, (2, 2))]
    with pytest.raises(ValueError, match="w was announced as"), SafetensorsStream(tmp_path / "f", announced) as stream:
        stream.write("w", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="w was announced as"), SafetensorsStream(tmp_path / "f", announced) as stream:
        stream.write("w", torch.zeros(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="x was not announced"), SafetensorsStream(tmp_path / "f", announced) as stream:
        stream.write("x", torch.zeros(2, 2))
    with SafetensorsStream(tmp_path / "f", announced) as stream:
        stream.write("w", torch.zeros(2, 2))
        with pytest.raises(ValueError, match="w was written twice"):
            stream.write("w", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="never written: w"), SafetensorsStream(tmp_path / "f", announced):
        pass
    with pytest.raises(ValueError, match="two tensors are named w"):
        SafetensorsStream(tmp_path / "f", announced * 2)
