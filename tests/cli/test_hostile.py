# SPDX-License-Identifier: Apache-2.0
"""Input of people who mean harm, and of nobody: no exception escapes, nothing outside of the folder is opened, no time or
memory without bounds."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.broken import Folder
from tests.fixtures_index import fixture
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.inspection import check, inspect, plan

NAMES = (
    "awq-qwen3-autoawq-g128",
    "ct-qwen3-w4a16-g128-asym",
    "gptq-qwen3-w4g128-asym",
    "autoround-qwen3-mixed",
    "ct-qwen3-fp8-block",
)

_scalars = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=12)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def ask(folder: Path) -> None:
    """Everything that answers from a folder; only refusals in words may come."""
    report = check(folder, tp=2, ep=2, device="310p", values=True, follow_links=True)
    for finding in report.findings:
        assert len(finding.render()) < 6000
    for question in (
        lambda: inspect(folder, follow_links=True),
        lambda: plan(folder, device="a2", tp=2, follow_links=True),
    ):
        with suppress(NpuQuantError):
            question()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(NAMES), st.data())
def test_config_values(name: str, data: st.DataObject) -> None:
    """Any field of a quantization_config, or of config.json, with any value."""
    config = json.loads((fixture(name) / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = data.draw(st.sampled_from([config, config["quantization_config"]]))
        while True:
            key = data.draw(st.sampled_from(sorted(place, key=str)) if place else st.just("x"))
            inner = place.get(key)
            if isinstance(inner, dict) and inner and data.draw(st.booleans()):
                place = inner
                continue
            break
        place[key] = data.draw(_values)
        if not isinstance(config.get("quantization_config"), dict):
            break
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(config))
        (weights,) = fixture(name).glob("*.safetensors")
        (folder / weights.name).symlink_to(weights)
        ask(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=6)), max_size=4))
def test_header_bytes(name: str, changes: list[tuple[int, bytes]]) -> None:
    """Any bytes of a header changed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(name, Path(scratch) / "model")
        content = bytearray(folder.weights.read_bytes())
        for at, new in changes:
            content[at : at + len(new)] = new
        folder.weights.write_bytes(content)
        ask(folder.path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_any_bytes(config: bytes, weights: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_bytes(config)
        (Path(scratch) / "model.safetensors").write_bytes(weights)
        ask(Path(scratch))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.text(max_size=30) | st.sampled_from(["version", "group_size", "metadata"]), _values, max_size=6)
)
def test_description(entries: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder("msmodelslim-qwen3-w8a8-dynamic", Path(scratch) / "model")
        description = folder.json("quant_model_description.json")
        folder.write_json("quant_model_description.json", {**description, **entries})
        ask(folder.path)


def _traced(folder: Path) -> list[str]:
    """The files that ``check`` opens, as the interpreter's audit hook sees them."""
    code = (
        "import sys, json\n"
        "opened = []\n"
        "from vllm_npu_quant.inspection import check, inspect, plan\n"
        f"check({str(folder)!r})\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        f"check({str(folder)!r}, values=True)\n"
        "print(json.dumps(opened))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "a\\b.safetensors"]
)
def test_nothing_outside(name: str, tmp_path: Path) -> None:
    """What an index names outside of the folder is not opened."""
    folder = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes(folder.weights.read_bytes())
    folder.write_json("model.safetensors.index.json", {"weight_map": {"x": name}})
    opened = [path for path in _traced(folder.path) if ".py" not in path and "site-packages" not in path]
    assert opened
    assert all(Path(path).parent == folder.path for path in opened if path.startswith("/")), opened
    assert "index-mismatch" in {finding.code for finding in check(folder.path).findings}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_links_that_leave(name: str, tmp_path: Path) -> None:
    """A link out of the folder is not opened, and says so; with follow_links it is."""
    folder = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "model")
    weight_map = dict.fromkeys(folder.tensors, folder.weights.name)
    folder.write_json("model.safetensors.index.json", {"weight_map": weight_map})
    (folder.path / name).rename(tmp_path / "secret")
    (folder.path / name).symlink_to("../secret")
    opened = [path for path in _traced(folder.path) if path.startswith(str(tmp_path))]
    assert str(folder.path / name) not in opened
    assert opened
    (finding,) = [finding for finding in check(folder.path).findings if "leads out of the folder" in finding.message]
    assert (finding.code, finding.file) == ("unreadable-file", name)
    assert check(folder.path, follow_links=True).passed(strict=True)


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    """snapshots/<revision>/file -> ../../blobs/<hash>, and nothing beyond the model's own folder."""
    model = tmp_path / "models--org--model"
    folder = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "source")
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.path.iterdir())):
        path.rename(model / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert check(snapshot).passed(strict=True)
    (snapshot / "config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../config.json")
    assert not check(snapshot).passed()


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "model")
    folder.weights.unlink()
    (folder.path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    assert not [path for path in _traced(folder.path) if path.endswith(".bin")]


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**5) + b"[" * 10**5,
        struct.pack("<Q", 10**5) + b'{"a":' * (10**5 // 5),
        struct.pack("<Q", 60) + b'{"w":{"dtype":"I8","shape":[4611686018427387904,4],"data_offsets":[0,0]}}',
    ],
)
def test_headers_that_lie(content: bytes, tmp_path: Path) -> None:
    """In a process with 1 GB of address space more than it needs."""
    folder = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "model")
    folder.weights.write_bytes(content)
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from vllm_npu_quant.inspection import check\n"
        f"report = check({str(folder.path)!r})\n"
        "assert {finding.code for finding in report.findings} & {'bad-header', 'missing-tensor'}, report\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr


def limited(code: str, *, extra: int) -> None:
    """Run code in a process with ``extra`` bytes of address space more than it has after the imports."""
    start = (
        "import resource\n"
        "from vllm_npu_quant.inspection import check, inspect, plan\n"
        "from vllm_npu_quant.inspection import values as _\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (size + {extra}, size + {extra}))\n"
    )
    process = [sys.executable, "-c", start + code]
    result = subprocess.run(process, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


def test_long_rows(tmp_path: Path) -> None:
    """The values of an FP8 weight with one row: in float32 it has four times its bytes."""
    folder = Folder("ct-qwen3-fp8-block", tmp_path / "model")
    inputs = 1 << 28
    header = {
        "lm_head.weight": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]},
        "model.layers.0.mlp.up_proj.weight_scale": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "model.layers.0.mlp.up_proj.weight": {
            "dtype": "F8_E4M3",
            "shape": [1, inputs],
            "data_offsets": [4, 4 + inputs],
        },
    }
    content = json.dumps(header).encode()
    with folder.weights.open("wb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content + struct.pack("<f", 1.0))
        stream.truncate(8 + len(content) + 4 + inputs)
    limited(f"assert check({str(folder.path)!r}, values=True).values", extra=400 << 20)


def test_layers_of_a_long_model_are_bounded(tmp_path: Path) -> None:
    """``inspect --layers`` of 10,000 layers prints a part of them; --json has all."""
    entry = {"dtype": "BF16", "shape": [0, 8], "data_offsets": [0, 0]}
    content = json.dumps({f"model.layers.{number}.up_proj.weight": entry for number in range(10_000)}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    (tmp_path / "config.json").write_text("{}")
    process = [sys.executable, "-m", "vllm_npu_quant", "inspect", "--layers", str(tmp_path)]
    result = subprocess.run(process, capture_output=True, text=True, timeout=300, check=True)
    assert "... and 6,000 more layers: --json lists all" in result.stdout
    assert len(result.stdout.splitlines()) < 4_100


def test_depth_of_models_by_number() -> None:
    """num_hidden_layers is a number of config.json, which no loop runs over."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder("ct-qwen3-w8a8-dynamic", Path(scratch) / "model")
        config = {**folder.json("config.json"), "num_hidden_layers": 10**9}
        folder.write_json("config.json", config)
        ask(folder.path)
