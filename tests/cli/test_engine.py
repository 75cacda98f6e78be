# SPDX-License-Identifier: Apache-2.0
"""compare and run, through the real engine in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.cli.broken import Folder
from tests.fixtures_index import fixture, shared

pytest.importorskip("vllm")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = [sys.executable, "-m", "vllm_npu_quant", *arguments]
    return subprocess.run(process, capture_output=True, text=True, check=False, timeout=600, env=environment)


def _as_documented(data: dict[str, Any]) -> None:
    """The fields are those of the recorded object that docs/cli_json.md is made from."""
    command = data["schema"].partition("/")[2]
    recorded = json.loads((Path(__file__).parents[2] / "docs" / "screens" / f"{command}.json").read_text())
    assert data.keys() == recorded.keys()
    for key in ("layers", "groups"):
        if key in data:
            assert data[key][0].keys() == recorded[key][0].keys()


def test_compare(tmp_path: Path) -> None:
    """W8A8 against its float source: close, every layer measured, worst first, and nothing but JSON on stdout."""
    plot = tmp_path / "errors.svg"
    model, reference = str(fixture("ct-qwen3-w8a8-dynamic")), str(fixture("source-tiny-qwen3"))
    result = command(
        "compare", model, "--reference", reference, "--tokens", "300", "--window", "128", "--plot", str(plot), "--json"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    data = json.loads(result.stdout)
    assert data["schema"] == "vllm-npu-quant/compare"
    _as_documented(data)
    assert data["tokens"] == 297  # 300 tokens in 3 windows, the first of each has no prediction
    assert abs(data["perplexity"] / data["reference_perplexity"] - 1) < 0.02
    assert 0 < data["kl"] < 0.01
    assert data["kl"] <= data["kl_99"]
    assert data["agreement"] > 0.8
    assert data["operators"] == "emulated on the CPU"
    errors = [layer["own"] for layer in data["layers"]]
    assert len(errors) == 8
    assert errors == sorted(errors, reverse=True)
    assert all(0.002 < error < 0.05 for error in errors)
    assert {layer["method"] for layer in data["layers"]} == {"W8A8DynamicLinear"}
    tree = xml.etree.ElementTree.parse(plot)
    assert len(tree.findall(".//{http://www.w3.org/2000/svg}rect")) == 1 + 8


def test_compare_experts() -> None:
    """Experts cannot run alone: their error is the accumulated one."""
    model, reference = fixture("msmodelslim-qwen3moe-w8a8-dynamic"), shared("source/tiny-qwen3-moe")
    result = command(
        "compare", str(model), "--reference", str(reference), "--tokens", "130", "--window", "128", "--layers", "--json"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    layers = json.loads(result.stdout)["layers"]
    assert {layer["own"] is None for layer in layers if "experts" in layer["layer"]} == {True}
    assert all(layer["accumulated"] < 0.3 for layer in layers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "EMPTY", "--reference", "MODEL"), "the folder holds no weights"),
        (("compare", "MODEL", "--reference", "./nowhere"), "the folder of the checkpoint cannot be read"),
        (("compare", "MODEL", "--reference", "MODEL", "--plot", "errors.pdf"), "a plot is .svg or .png"),
        (("compare", "MODEL", "--reference", "MODEL", "--plot", "nowhere/errors.svg"), "there is no folder nowhere"),
        (("compare", "MODEL", "--reference", "MODEL", "--plot", "EMPTY.svg"), "is a folder"),
        (("run", "EMPTY"), "the folder holds no weights"),
    ],
)
def test_what_cannot_be_run_is_refused_before_an_engine_starts(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY.svg").mkdir()
    model = str(fixture("source-tiny-qwen3"))
    names = {"MODEL": model, "EMPTY": str(tmp_path / "EMPTY"), "EMPTY.svg": str(tmp_path / "EMPTY.svg")}
    code = (
        "import sys; from vllm_npu_quant.cli import main\n"
        f"sys.argv = ['vllm-npu-quant', *{[names.get(argument, argument) for argument in arguments]!r}]\n"
        "try: main()\n"
        "finally: assert not {'vllm', 'torch'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert result.stdout == ""


def test_run() -> None:
    model = str(fixture("msmodelslim-qwen3-w8a8-dynamic"))
    result = command(
        "run", model, "--prompt", "a", "--prompt", "b", "--max-tokens", "3", "--max-model-len", "64", "--json"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    data = json.loads(result.stdout)
    _as_documented(data)
    assert [prompt for prompt, _ in data["answers"]] == ["a", "b"]
    (group,) = [group for group in data["groups"] if group["scheme"] == "W8A8_DYNAMIC"]
    assert (group["method"], group["count"]) == ("W8A8DynamicLinear", 8)


def test_broken_checkpoint(tmp_path: Path) -> None:
    """What vLLM raises comes as our finding, and without a traceback of ours."""
    folder = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "model")
    folder.drop("model.layers.0.self_attn.q_proj.weight_scale")
    result = command("run", str(folder.path), "--max-model-len", "64")
    assert result.returncode in (1, 2)
    assert "missing-tensor" in result.stderr
    assert "model.layers.0.self_attn.q_proj" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
