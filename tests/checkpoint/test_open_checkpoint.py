# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by name: what is opened of a folder, of the local caches and of a hub, and what the hub is asked for."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_index import fixture
from tests.hub_server import COMMIT, Hub, serve, use_hub
from vllm_npu_quant.checkpoint import Checkpoint, RemoteCheckpoint, find_local, hub, open_checkpoint
from vllm_npu_quant.errors import Finding, NpuQuantError

huggingface_hub = pytest.importorskip("huggingface_hub")

MODEL = "org/model"
NAME = "msmodelslim-qwen3-w8a8"
WEIGHTS = "quant_model_weights-00001-of-00001.safetensors"
INDEX = "quant_model_weights.safetensors.index.json"
DESCRIPTION = "quant_model_description.json"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, and an empty cache."""
    with serve({MODEL: fixture(NAME)}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path)
        yield server


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is an error that nothing catches."""

    def connect(_: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


def snapshot(cache: Path, *names: str, model: str = MODEL, commit: str = COMMIT) -> Path:
    """A snapshot in a cache, with some of the model's files, or all of them."""
    repository = cache / ("models--" + model.replace("/", "--"))
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in fixture(NAME).iterdir():
        if file.is_file() and (not names or file.name in names):
            shutil.copyfile(file, folder / file.name)
    return folder


def refused(*args: Any, **kwargs: Any) -> Finding:
    with pytest.raises(NpuQuantError) as caught:
        open_checkpoint(*args, **kwargs)
    (finding,) = caught.value.findings
    assert finding.code == "unreadable-file"
    assert finding.fix
    return finding


def test_a_folder_asks_nothing(no_network: None) -> None:
    checkpoint = open_checkpoint(fixture(NAME))
    assert type(checkpoint) is Checkpoint
    assert len(checkpoint.tensors) == 81
    assert checkpoint.findings == ()


@pytest.mark.parametrize("headers", [True, False])
def test_a_complete_snapshot_asks_nothing(
    headers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    use_hub(monkeypatch, NOWHERE, tmp_path)
    snapshot(tmp_path / "hub")
    checkpoint = open_checkpoint(MODEL, headers=headers)
    assert checkpoint.has_values
    assert set(checkpoint.names) == {file.name for file in fixture(NAME).iterdir()}
    assert checkpoint.read("model.norm.weight", float32=True).shape == (256,)


def test_pickled_weights_ask_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    """Whether all of them are here cannot be known, and none of them is read."""
    use_hub(monkeypatch, NOWHERE, tmp_path)
    (snapshot(tmp_path / "hub", "config.json") / "pytorch_model.bin").write_bytes(b"")
    assert open_checkpoint(MODEL).has_values


def test_a_pickle_without_weights_is_no_checkpoint(served: Hub, tmp_path: Path) -> None:
    (snapshot(tmp_path / "hub", "config.json") / "training_args.bin").write_bytes(b"")
    assert len(open_checkpoint(MODEL).tensors) == 81


def test_a_warning_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    use_hub(monkeypatch, NOWHERE, tmp_path)
    index = snapshot(tmp_path / "hub") / INDEX
    content = json.loads(index.read_text())
    content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    (finding,) = open_checkpoint(MODEL).findings
    assert "does not list 1 tensor" in finding.message


def test_configs_in_the_usual_cache_and_weights_in_the_download_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """As vLLM leaves them with --download-dir."""
    use_hub(monkeypatch, NOWHERE, tmp_path)
    snapshot(tmp_path / "hub", "config.json", DESCRIPTION)
    snapshot(tmp_path / "weights", WEIGHTS, INDEX)
    checkpoint = open_checkpoint(MODEL, download_dir=tmp_path / "weights")
    assert len(checkpoint.tensors) == 81
    assert checkpoint.read_json("config.json")["model_type"] == "qwen3"
    assert checkpoint.read_json(DESCRIPTION)["model_quant_type"] == "W8A8"
    assert checkpoint.read("model.norm.weight", float32=True).shape == (256,)


def test_files_of_two_commits_are_not_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, NOWHERE, tmp_path)
    snapshot(tmp_path / "hub", "config.json", DESCRIPTION, commit="f" * 40)
    snapshot(tmp_path / "weights", WEIGHTS, INDEX)
    assert set(open_checkpoint(MODEL, download_dir=tmp_path / "weights").names) == {WEIGHTS, INDEX}


def test_a_snapshot_without_its_weights(served: Hub, tmp_path: Path) -> None:
    """The hub has them; where it cannot be reached, the findings say what is missing."""
    snapshot(tmp_path / "hub", "config.json", INDEX)
    remote = open_checkpoint(MODEL)
    assert isinstance(remote, RemoteCheckpoint)
    assert remote.tensors.keys() == Checkpoint.open(fixture(NAME)).tensors.keys()
    assert remote.findings == ()


def test_a_snapshot_without_its_weights_and_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, NOWHERE, tmp_path)
    snapshot(tmp_path / "hub", "config.json", INDEX)
    local = open_checkpoint(MODEL)
    assert local.has_values
    assert any(f"a weight file is missing: {WEIGHTS}" in finding.message for finding in local.findings)


def test_a_snapshot_whose_weights_nothing_describes(served: Hub, tmp_path: Path) -> None:
    """Older versions of vLLM download config.json and the weights, and leave the description on the hub."""
    snapshot(tmp_path / "hub", "config.json", WEIGHTS, INDEX)
    assert DESCRIPTION in open_checkpoint(MODEL, headers=False).names


def test_a_snapshot_that_was_downloaded_in_part_is_found(served: Hub, tmp_path: Path) -> None:
    """Versions of huggingface_hub from 2 on know that another file is missing, here chat_template.jinja."""
    huggingface_hub.snapshot_download(MODEL, allow_patterns=["*.json", "*.safetensors"])
    assert find_local(MODEL) is not None
    asked = len(served.requests)
    assert open_checkpoint(MODEL).has_values
    assert len(served.requests) == asked


def test_names_and_configs_without_headers(served: Hub, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MODEL, headers=False)
    assert served.requests == ["GET /api/models/org/model?blobs=true"]
    assert WEIGHTS in checkpoint.names
    assert checkpoint.tensors == {}
    assert checkpoint.read_json(DESCRIPTION)["model_quant_type"] == "W8A8"
    checkpoint.read_headers()
    assert len(checkpoint.tensors) == 81


def test_configs_are_downloaded_into_the_download_folder(served: Hub, tmp_path: Path) -> None:
    open_checkpoint(MODEL, download_dir=tmp_path / "weights").read_json("config.json")
    assert not (tmp_path / "hub").exists()
    folder = find_local(MODEL, revision=COMMIT, cache_dir=tmp_path / "weights")
    assert folder is not None
    assert (folder / "config.json").is_file()


def test_a_private_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({MODEL: fixture(NAME)}, token="hf_secret") as server:
        use_hub(monkeypatch, server.endpoint, tmp_path)
        finding = refused(MODEL)
        assert "401" in finding.found
        assert "token" in finding.fix
        checkpoint = open_checkpoint(MODEL, token="hf_secret")
        assert len(checkpoint.tensors) == 81
        assert checkpoint.read_json("config.json")["model_type"] == "qwen3"


def test_one_lost_answer_is_asked_for_again(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PAUSE", 0)
    served.failing = 1
    checkpoint = open_checkpoint(MODEL)
    assert checkpoint.findings == ()
    assert len(checkpoint.tensors) == 81


def test_a_header_that_the_hub_does_not_give(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PAUSE", 0)
    served.failing = 2
    finding = open_checkpoint(MODEL).findings[0]
    assert finding.code == "unreadable-file"
    assert "503" in finding.found


def test_offline_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    use_hub(monkeypatch, NOWHERE, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(MODEL).message


def test_the_reason_of_a_hub_that_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, NOWHERE, tmp_path)
    finding = refused(MODEL)
    assert "refused" in finding.found
    assert "HF_ENDPOINT" in finding.fix


def test_an_error_of_the_program_is_none_of_the_hub(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_hf_headers() -> None:
        """huggingface_hub's, of a version without these arguments."""

    monkeypatch.setattr(huggingface_hub.utils, "build_hf_headers", build_hf_headers)
    with pytest.raises(TypeError):
        open_checkpoint(MODEL)
