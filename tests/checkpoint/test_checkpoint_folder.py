# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fixtures_index import fixture
from vllm_npu_quant.checkpoint import Checkpoint, find_local, folder
from vllm_npu_quant.errors import NpuQuantError, Severity

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_INDEX = "quant_model_weights.safetensors.index.json"


def save(path: Path, *names: str) -> None:
    save_file({name: np.zeros(2, np.int8) for name in names}, path)


def save_index(path: Path, weight_map: object) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two weight files and their index."""
    save(tmp_path / ONE, "a", "b")
    save(tmp_path / TWO, "c")
    save_index(tmp_path / INDEX, {"a": ONE, "b": ONE, "c": TWO})
    return tmp_path


def said(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    return [(finding.code, finding.message) for finding in checkpoint.findings]


def errors(checkpoint: Checkpoint) -> list[str]:
    return [finding.message for finding in checkpoint.findings if finding.severity is Severity.ERROR]


def text(checkpoint: Checkpoint) -> str:
    return str(NpuQuantError(checkpoint.findings))


def test_a_folder_without_fault(two: Path) -> None:
    checkpoint = Checkpoint.open(str(two))
    assert checkpoint.findings == ()
    assert checkpoint.folder == two
    assert checkpoint.files == (ONE, TWO)
    assert checkpoint.indexes == (INDEX,)
    assert checkpoint.ignored == {}
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["c"].file == TWO
    assert checkpoint.total_bytes == 6
    assert checkpoint.sizes == {name: (two / name).stat().st_size for name in (ONE, TWO)}
    assert "3 tensors in 2 files, 0 errors" in repr(checkpoint)
    assert checkpoint.read("a").tolist() == [0, 0]
    with pytest.raises(TypeError):
        checkpoint.tensors["a"] = checkpoint.tensors["b"]  # type: ignore[index]


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no", tmp_path / "file", "nul\0"):
        with pytest.raises(NpuQuantError, match="the folder of the checkpoint cannot be read") as caught:
            Checkpoint.open(path)
        assert caught.value.codes == ("unreadable-file",)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "the folder holds no weights"),
        (["config.json"], "the folder holds no weights"),
        (["training_args.bin"], "the folder holds no weights"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "a PyTorch pickle"),
        (["consolidated.00.pth"], "a PyTorch pickle"),
        (["model.pt"], "a PyTorch pickle"),
        (["Qwen3-8B-Q4_K_M.gguf"], "the weights are GGUF"),
        (["model.onnx"], "the weights are not safetensors"),
    ],
)
def test_weights_that_are_not_read(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    checkpoint = Checkpoint.open(tmp_path)
    (finding,) = checkpoint.findings
    assert finding.code == "unreadable-file"
    assert expected in finding.message
    assert finding.fix
    assert checkpoint.tensors == {}


def test_only_the_top_folder_counts(two: Path) -> None:
    for name in ("optional", "original", "onnx"):
        (two / name).mkdir()
        save(two / name / "quarot.safetensors", "a", "rotation")
    save(two / ".hidden.safetensors", "a")
    (two / "pytorch_model.bin").write_text("")
    (two / "training_args.bin").write_text("")
    checkpoint = Checkpoint.open(two)
    assert checkpoint.findings == ()
    assert checkpoint.files == (ONE, TWO)
    assert checkpoint.ignored == {"pytorch_model.bin": "vLLM loads safetensors where they exist"}
    assert list(Checkpoint.open(two / "optional").tensors) == ["a", "rotation"]


def test_vllm_loads_what_its_index_names(two: Path) -> None:
    save(two / "model.safetensors", "a", "b", "c")
    save(two / "adapter_model.safetensors", "lora")
    checkpoint = Checkpoint.open(two)
    assert checkpoint.findings == ()
    assert checkpoint.files == (ONE, TWO)
    reason = f"{INDEX} does not name it"
    assert checkpoint.ignored == {"adapter_model.safetensors": reason, "model.safetensors": reason}


def test_without_that_index_it_loads_everything(two: Path) -> None:
    (two / INDEX).rename(two / OTHER_INDEX)
    save(two / "model.safetensors", "a", "b", "x")
    checkpoint = Checkpoint.open(two)
    assert checkpoint.files == (ONE, TWO, "model.safetensors")
    assert said(checkpoint) == [
        ("duplicate-tensor", "two files hold 2 tensors"),
        ("index-mismatch", "the index does not name model.safetensors; vLLM loads it all the same"),
    ]
    assert checkpoint.findings[0].file == f"{ONE}, model.safetensors"
    assert checkpoint.findings[0].layer == "a"


def test_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "adapter_model.safetensors", "lora")
    (finding,) = Checkpoint.open(tmp_path).findings
    assert (finding.code, finding.severity) == ("unexpected-tensor", Severity.WARNING)
    assert finding.file == "adapter_model.safetensors"


def test_consolidated_files_come_first(two: Path) -> None:
    save(two / "consolidated.safetensors", "layers.0")
    checkpoint = Checkpoint.open(two)
    assert checkpoint.files == ("consolidated.safetensors",)
    assert set(checkpoint.ignored) == {ONE, TWO}
    assert checkpoint.findings[0].code == "duplicate-tensor"
    assert checkpoint.findings[0].severity is Severity.WARNING
    assert "vLLM will not load" in text(checkpoint)


def test_index_of_consolidated_files_that_are_not_there(two: Path) -> None:
    save_index(two / folder.CONSOLIDATED_INDEX, {"layers.0": "consolidated.safetensors"})
    assert Checkpoint.open(two).findings == ()


@pytest.mark.parametrize("index", [INDEX, OTHER_INDEX])
def test_missing_file(two: Path, index: str) -> None:
    (two / INDEX).rename(two / index)
    (two / TWO).unlink()
    (finding,) = Checkpoint.open(two).findings
    assert finding.code == "index-mismatch"
    assert finding.message == f"a weight file is missing: {TWO}"
    assert (finding.file, finding.expected, finding.nearest) == (index, "a file with 1 tensor", (ONE,))


def test_all_files_missing(two: Path) -> None:
    for name in (ONE, TWO):
        (two / name).unlink()
    assert said(Checkpoint.open(two)) == [
        ("unreadable-file", "the folder holds no weights"),
        ("index-mismatch", f"a weight file is missing: {ONE}"),
        ("index-mismatch", f"a weight file is missing: {TWO}"),
    ]


def test_left_over_index_of_the_float_model(tmp_path: Path) -> None:
    save(tmp_path / "quant_model_weights-00001-of-00001.safetensors", "a")
    save_index(tmp_path / OTHER_INDEX, {"a": "quant_model_weights-00001-of-00001.safetensors"})
    save_index(tmp_path / INDEX, {"a": "model-00001-of-00001.safetensors"})
    checkpoint = Checkpoint.open(tmp_path)
    missing = [finding for finding in checkpoint.findings if "is missing" in finding.message]
    assert [finding.fix for finding in missing] == [f"The weights here belong to {OTHER_INDEX}: delete {INDEX}."]


def test_two_sets_with_their_indexes(two: Path) -> None:
    name = "quant_model_weights-00001-of-00001.safetensors"
    save(two / name, "a")
    save_index(two / OTHER_INDEX, {"a": name})
    checkpoint = Checkpoint.open(two)
    assert checkpoint.files == (ONE, TWO)
    assert f"vLLM will not load {name}, which this index names: {INDEX} does not name it" in errors(checkpoint)


def test_tensor_in_another_file_than_the_index_says(two: Path) -> None:
    save_index(two / INDEX, {"a": TWO, "b": ONE, "c": TWO, "d": ONE})
    checkpoint = Checkpoint.open(two)
    first, second = checkpoint.findings
    assert (first.code, second.code) == ("index-mismatch", "index-mismatch")
    assert (first.layer, first.expected, first.found) == ("a", f"in {TWO}", f"in {ONE}")
    assert (second.layer, second.expected, second.found) == ("d", f"in {ONE}", "in no file")


def test_tensor_that_the_index_does_not_list(two: Path) -> None:
    save_index(two / INDEX, {"a": ONE, "c": TWO})
    (finding,) = Checkpoint.open(two).findings
    assert (finding.code, finding.layer, finding.severity) == ("index-mismatch", "b", Severity.WARNING)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "/x.safetensors",
        "./x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        "",
        "model.bin",
        "a\0.safetensors",
        "a\n.safetensors",
        "x" * 300 + ".safetensors",
        7,
        None,
        True,
        ["model.safetensors"],
        {"a": "b"},
    ],
)
def test_index_names_something_else_than_a_file(two: Path, name: object) -> None:
    save_index(two / INDEX, {"a": ONE, "b": ONE, "c": TWO, "x": name, "y": name})
    checkpoint = Checkpoint.open(two)
    (finding,) = checkpoint.findings
    assert finding.code == "index-mismatch"
    assert finding.message == "weight_map names something else than a file of the folder for 2 tensors"
    assert finding.layer == "x"
    assert checkpoint.files == (ONE, TWO)
    assert len(finding.render()) < 700


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        ("{}", "index-mismatch", "no weight_map"),
        ('{"weight_map": []}', "index-mismatch", "weight_map is not an object"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "bad-config", "weight_map.a"),
        ("{", "unreadable-file", "is not JSON"),
        ("[]", "unreadable-file", "does not hold a JSON object"),
    ],
)
def test_broken_index(two: Path, content: str, code: str, expected: str) -> None:
    (two / INDEX).write_text(content)
    checkpoint = Checkpoint.open(two)
    (finding,) = checkpoint.findings
    assert finding.code == code
    assert finding.file == INDEX
    assert expected in finding.message
    assert sorted(checkpoint.tensors) == ["a", "b", "c"], "the tensors are there all the same, for further checks"


def test_damaged_files_are_reported_together(two: Path) -> None:
    (two / ONE).write_bytes((two / ONE).read_bytes()[:-1])
    (two / TWO).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    checkpoint = Checkpoint.open(two)
    assert [(finding.code, finding.file) for finding in checkpoint.findings] == [
        ("bad-header", ONE),
        ("bad-header", TWO),
    ]
    with pytest.raises(NpuQuantError, match="ends before the end of this tensor"):
        checkpoint.read("b")


def test_every_kind_of_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("../../blobs/0123")
    save(tmp_path / "model.safetensors", "a")
    checkpoint = Checkpoint.open(tmp_path)
    assert [(finding.code, finding.file) for finding in checkpoint.findings] == [
        ("unreadable-file", "folder.safetensors"),
        ("unreadable-file", "link.safetensors"),
        ("unreadable-file", "pipe.safetensors"),
    ]


def test_file_that_changes_after_opening(two: Path) -> None:
    checkpoint = Checkpoint.open(two)
    save(two / ONE, "a", "b", "more")
    with pytest.raises(NpuQuantError, match="has changed since the checkpoint was opened"):
        checkpoint.read("a")
    (two / TWO).unlink()
    with pytest.raises(NpuQuantError, match="does not exist"):
        checkpoint.read("c")


def test_unknown_tensor(two: Path) -> None:
    save(two / TWO, "model.layers.0.q_proj.weight")
    with pytest.raises(KeyError, match=r"model\.layers\.1\.q_proj\.weight.*nearest: model\.layers\.0\.q_proj\.weight"):
        Checkpoint.open(two).read("model.layers.1.q_proj.weight")


def test_limits_of_json_by_kind(two: Path) -> None:
    for name, limit in (("config.json", 16), ("quant_model_description_w8a8.json", 256), (INDEX, 256)):
        with open(two / name, "wb") as stream:
            stream.truncate(limit * 2**20 + 1)
        with pytest.raises(NpuQuantError, match=f"at most {limit * 2**20:,} bytes"):
            Checkpoint.open(two).read_json(name)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of huggingface_hub with one model, of links as it makes them."""
    model = tmp_path / "cache" / "models--org--tiny"
    snapshot = model / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    source = fixture("msmodelslim-qwen3-w8a8")
    for number, name in enumerate(("config.json", "quant_model_weights-00001-of-00001.safetensors")):
        (model / "blobs" / str(number)).write_bytes((source / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    return tmp_path / "cache"


def test_hub_cache(cache: Path) -> None:
    found = find_local("org/tiny", cache_dir=cache)
    assert found is not None
    checkpoint = Checkpoint.open(found)
    assert checkpoint.findings == ()
    assert len(checkpoint.tensors) == 81
    assert checkpoint.read("model.norm.weight", float32=True).shape == (256,)
    assert checkpoint.read_json("config.json")["model_type"] == "qwen3"
    assert find_local("org/tiny", revision="0123456789" * 4, cache_dir=cache) == found
    assert find_local(found) == found


@pytest.mark.parametrize("model", ["org/none", "none", "a/b/c", "no such//id", "", "../x", "nul\0", "x" * 5000])
def test_not_in_the_hub_cache(cache: Path, model: str) -> None:
    assert find_local(model, cache_dir=cache) is None
    assert find_local("org/tiny", revision="other", cache_dir=cache) is None


def test_unfinished_download(cache: Path) -> None:
    (cache / "models--org--tiny" / "blobs" / "1").unlink()
    found = find_local("org/tiny", cache_dir=cache)
    assert found is not None
    (finding,) = Checkpoint.open(found).findings
    assert finding.message == "the file is a link to a file that does not exist"
    assert finding.fix == "Download it again."


def save_sparse(path: Path, tensors: Iterable[tuple[str, str, list[int], int]]) -> None:
    """A file whose data is a hole, from (name, dtype, shape, bytes)."""
    header, at = {}, 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + at)


def test_deepseek_r1_in_size(tmp_path: Path) -> None:
    shards, experts = 163, 278
    weight_map = {}
    for shard in range(shards):
        file = f"quant_model_weights-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = []
        for expert in range(experts):
            layer = f"model.layers.{shard}.mlp.experts.{expert}.gate_proj"
            tensors.append((f"{layer}.weight", "I8", [2048, 7168], 2048 * 7168))
            tensors.append((f"{layer}.weight_scale", "F32", [2048, 1], 8192))
            tensors.append((f"{layer}.weight_offset", "F32", [2048, 1], 8192))
        weight_map |= dict.fromkeys((tensor[0] for tensor in tensors), file)
        save_sparse(tmp_path / file, tensors)
    save_index(tmp_path / OTHER_INDEX, weight_map)
    times = []
    for _ in range(3):
        begin = time.process_time()
        checkpoint = Checkpoint.open(tmp_path)
        times.append(time.process_time() - begin)
    assert checkpoint.findings == ()
    assert len(checkpoint.tensors) == shards * experts * 3 == 135_942
    assert checkpoint.total_bytes > 600e9
    # 1.0 s on an idle machine, of which the index takes 0.2; the bound leaves room for a busy one.
    assert min(times) < 3


def test_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_npu_quant.checkpoint as c; c.Checkpoint.open(sys.argv[1]).read('lm_head.weight', float32=True);"
        "print([m for m in ('torch', 'vllm', 'transformers', 'safetensors', 'huggingface_hub') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(fixture("source-tiny-qwen3"))]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
