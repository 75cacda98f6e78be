# SPDX-License-Identifier: Apache-2.0
"""Folders that are too large for the limits of a checkpoint, and that no limit of a single file refuses."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_npu_quant.checkpoint import Checkpoint, folder, parse_header, read_json
from vllm_npu_quant.checkpoint.safetensors_header import HeaderBudget
from vllm_npu_quant.errors import NpuQuantError


def header(tensors: dict[str, object]) -> bytes:
    content = json.dumps(tensors).encode()
    return struct.pack("<Q", len(content)) + content


def empty(*names: str) -> bytes:
    """A file with tensors of no elements."""
    return header({name: {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for name in names})


def messages(checkpoint: Checkpoint) -> list[str]:
    return [finding.message for finding in checkpoint.findings]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so it becomes somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_headers_together(tmp_path: Path) -> None:
    """Hard links to one large header: each of them is within the limit of a file."""
    large = {"__metadata__": {"note": "x" * 60_000_000}, "w": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}
    (tmp_path / "0.safetensors").write_bytes(header(large))
    for number in range(1, 6):
        (tmp_path / f"{number}.safetensors").hardlink_to(tmp_path / "0.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.tensors) == 1
    found = [finding.file for finding in checkpoint.findings if "all weight files together" in finding.message]
    assert found == ["3.safetensors", "4.safetensors", "5.safetensors"]


def test_tensors_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "HeaderBudget", lambda: HeaderBudget(tensors=5))
    for number in range(3):
        names = [f"{number}.{name}" for name in ("a", "b")]
        (tmp_path / f"{number}.safetensors").write_bytes(empty(*names))
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.tensors) == ["0.a", "0.b", "1.a", "1.b"]
    assert [finding.file for finding in checkpoint.findings if finding.code == "bad-header"] == ["2.safetensors"]


def test_the_largest_models_have_room() -> None:
    """Four times the tensors of 384 experts in 61 layers: three projections, four tensors each, at 160 bytes."""
    tensors = 4 * 384 * 61 * 3 * 4
    HeaderBudget().take("all", nbytes=160 * tensors, tensors=tensors)


def test_weight_files(tmp_path: Path) -> None:
    """None of too many files is opened."""
    for number in range(folder.MAX_WEIGHT_FILES + 1):
        (tmp_path / f"{number}.safetensors").touch()
    checkpoint = Checkpoint.open(tmp_path)
    assert [finding.code for finding in checkpoint.findings] == ["unreadable-file"]
    assert "more weight files" in messages(checkpoint)[0]


def test_findings_of_many_files(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number}.safetensors").touch()
    found = Checkpoint.open(tmp_path).findings
    assert len(found) < 200
    assert "1900 more findings of this kind were left out" in [finding.message for finding in found]


def test_indexes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(empty("a"))
    for number in range(100):
        index = tmp_path / f"{number}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": f"other-{number}.safetensors"}}))
    checkpoint = Checkpoint.open(tmp_path)
    assert sum("a weight file is missing" in message for message in messages(checkpoint)) == folder.MAX_INDEXES
    assert any("more indexes of weight files" in message for message in messages(checkpoint))


def test_series_that_claim_to_be_long(tmp_path: Path) -> None:
    """The memory follows from the files that there are, not from the number in their names."""
    names = [f"{number}-00002-of-99999.safetensors" for number in range(50)]
    folder._missing_shards(names)
    tracemalloc.start()
    try:
        found = list(folder._missing_shards(names))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert found[0].found == "1 files, and no index"
    assert found[0].file.startswith("0-00001-of-99999.safetensors, 0-00003-of-99999.safetensors")


@pytest.mark.parametrize("name", ["x" * 513, ".".join("x" * 33), "." * 40])
def test_names_longer_than_any(name: str) -> None:
    content = empty(name, "model.norm.weight")
    found = parse_header(content, file="f", file_size=len(content))
    assert list(found.tensors) == ["model.norm.weight"]
    assert ["longer than any real one" in finding.message for finding in found.findings] == [True]


def test_longest_names() -> None:
    content = empty("x" * 512, ".".join("x" * 32))
    assert parse_header(content, file="f", file_size=len(content)).findings == ()


def test_descriptions_larger_than_any(tmp_path: Path) -> None:
    path = tmp_path / "quant_model_description.json"
    path.write_text('{"a":[' + "0," * 1_300_000 + "0]}")
    with pytest.raises(NpuQuantError, match="more values than any checkpoint needs"):
        read_json(path, max_bytes=1 << 28)


def test_a_cache_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a model in huggingface_hub's cache, whose snapshots belong to somebody else."""
    monkeypatch.chdir(tmp_path)  # the folders above may be closed, too
    Path("snapshots").mkdir()
    Checkpoint.open(".")  # imports what it needs
    tmp_path.chmod(0o755)
    Path("snapshots").chmod(0)
    try:
        with unprivileged():
            checkpoint = Checkpoint.open(".")
    finally:
        Path("snapshots").chmod(0o700)
    assert messages(checkpoint) == ["the folder holds no weights"]
