# SPDX-License-Identifier: Apache-2.0
"""Models of a hub, against a server on this host: headers by range requests, the cache offline, refusals in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures_index import fixture
from tests.hub_server import Hub, environment_of, serve

pytest.importorskip("huggingface_hub")
NAMES = ("ct-qwen3-w8a8-dynamic", "msmodelslim-qwen3moe-w8a8-dynamic", "gptq-qwen3-gptqmodel-w4g32-sym-descact")


def command(hub: Hub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    process = [sys.executable, "-m", "vllm_npu_quant", *arguments]
    environment = environment_of(hub, home, **more)
    return subprocess.run(process, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("name", NAMES)
def test_as_the_folder(name: str, tmp_path: Path) -> None:
    """A hub id and the folder that it is served from give the same, but for the name; of the weights, only a part is read."""
    with serve({"org/model": fixture(name)}) as hub:
        remote = command(hub, tmp_path, "inspect", "org/model", "--json", "--layers")
        checked = command(hub, tmp_path, "check", "org/model", "--json", "--tp", "2")
    local = command(hub, tmp_path, "inspect", str(fixture(name)), "--json", "--layers")
    assert remote.returncode == 0, remote.stderr
    assert json.loads(remote.stdout) == {**json.loads(local.stdout), "model": "org/model"}
    assert json.loads(checked.stdout)["findings"] == []
    ranges = [asked for file, asked in hub.ranges if file.endswith(".safetensors")]
    assert ranges == ["bytes=0-262143"] * 2


def test_server_without_ranges(tmp_path: Path) -> None:
    with serve({"org/model": fixture(NAMES[0])}, honour_ranges=False) as hub:
        result = command(hub, tmp_path, "inspect", "org/model", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tensors"] == 39


def test_offline_from_the_cache(tmp_path: Path) -> None:
    files = [path.name for path in fixture(NAMES[1]).iterdir()]
    code = f"from huggingface_hub import hf_hub_download\nfor file in {files!r}: hf_hub_download('org/model', file)"
    with serve({"org/model": fixture(NAMES[1])}) as hub:
        environment = environment_of(hub, tmp_path)
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        asked = len(hub.ranges)
        result = command(hub, tmp_path, "check", "org/model", "--values", "--json", HF_HUB_OFFLINE="1")
        assert len(hub.ranges) == asked
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["values"] is True


def test_values_need_the_files(tmp_path: Path) -> None:
    with serve({"org/model": fixture(NAMES[0])}) as hub:
        result = command(hub, tmp_path, "check", "org/model", "--values")
    assert result.returncode == 1
    assert "download the model first" in result.stdout


@pytest.mark.parametrize(
    ("model", "environment"),
    [
        ("org/other", {}),
        ("org/model", {"HF_HUB_OFFLINE": "1"}),
        ("org/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ("or g/mod el", {}),
        ("a/b/c", {}),
        ("--", {}),
    ],
)
def test_refused_in_words(model: str, environment: dict[str, str], tmp_path: Path) -> None:
    with serve({"org/model": fixture(NAMES[0])}) as hub:
        result = command(hub, tmp_path, "inspect", model, **environment)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "fix" in result.stderr or "Usage" in result.stderr


def test_damaged_header(tmp_path: Path) -> None:
    """A server that sends nonsense: a finding, no traceback."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in fixture(NAMES[0]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path.suffix != ".safetensors" else b"\xff" * 4096)
    with serve({"org/model": folder}) as hub:
        result = command(hub, tmp_path, "check", "org/model")
    assert result.returncode == 1
    assert "bad-header" in result.stdout


# ModelScope: VLLM_USE_MODELSCOPE means what it means to vLLM.

MODELSCOPE = {"VLLM_USE_MODELSCOPE": "True"}


@pytest.mark.parametrize("name", NAMES)
def test_modelscope_as_the_folder(name: str, tmp_path: Path) -> None:
    pytest.importorskip("modelscope")
    with serve({"org/model": fixture(name)}, modelscope=True) as hub:
        remote = command(hub, tmp_path, "inspect", "org/model", "--json", "--layers", **MODELSCOPE)
        checked = command(hub, tmp_path, "check", "org/model", "--json", "--revision", "master", **MODELSCOPE)
    local = command(hub, tmp_path, "inspect", str(fixture(name)), "--json", "--layers")
    assert remote.returncode == 0, remote.stderr
    assert json.loads(remote.stdout) == {**json.loads(local.stdout), "model": "org/model"}
    assert json.loads(checked.stdout)["findings"] == []
    assert [asked for file, asked in hub.ranges if file.endswith(".safetensors")] == ["bytes=0-262143"] * 2


def test_modelscope_from_its_cache(tmp_path: Path) -> None:
    """What ModelScope's own library has downloaded is used, and nothing is asked for."""
    pytest.importorskip("modelscope")
    code = "from modelscope.hub.snapshot_download import snapshot_download; snapshot_download('org/model')"
    with serve({"org/model": fixture(NAMES[1])}, modelscope=True) as hub:
        subprocess.run([sys.executable, "-c", code], env=environment_of(hub, tmp_path), check=True, capture_output=True)
        asked = len(hub.requests)
        result = command(hub, tmp_path, "check", "org/model", "--values", "--json", **MODELSCOPE)
        assert len(hub.requests) == asked > 0
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["values"] is True


def test_modelscope_private(tmp_path: Path) -> None:
    pytest.importorskip("modelscope")
    with serve({"org/model": fixture(NAMES[0])}, modelscope=True, token="ms-secret") as hub:
        refused = command(hub, tmp_path, "inspect", "org/model", **MODELSCOPE)
        result = command(hub, tmp_path, "inspect", "org/model", **MODELSCOPE, MODELSCOPE_API_TOKEN="ms-secret")
    assert refused.returncode == 2
    assert "token" in refused.stderr
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["org/other"], {}),
        (["org/model", "--revision", "none"], {}),
        (["org/model"], {"HF_HUB_OFFLINE": "1"}),
        (["org/model"], {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}),
        (["or g/mod el"], {}),
    ],
)
def test_modelscope_refused_in_words(arguments: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("modelscope")
    with serve({"org/model": fixture(NAMES[0])}, modelscope=True) as hub:
        result = command(hub, tmp_path, "inspect", *arguments, **MODELSCOPE, **environment)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "fix" in result.stderr


def test_modelscope_is_not_installed(tmp_path: Path) -> None:
    code = "import sys; sys.modules['modelscope'] = None; from vllm_npu_quant.cli import main; main()"
    with serve({}, modelscope=True) as hub:
        result = subprocess.run(
            [sys.executable, "-c", code, "inspect", "org/model"],
            env=environment_of(hub, tmp_path, **MODELSCOPE),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert result.returncode == 2
    assert "pip install modelscope" in result.stderr
