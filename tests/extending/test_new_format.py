# SPDX-License-Identifier: Apache-2.0
"""A new format is one file: nibbles.py is detected, checked, inspected, loaded and run, and nothing else knows it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.rewritten import Quantized, write
from tests.e2e.twins import read_tensors
from tests.e2e.yardstick import relative_error, run
from tests.extending.extended import ROOT, install, matrix_text, run_extended, vllm_npu_quant_json

#: Inputs that share a step.
GROUP = 64
CONFIG = {"quant_method": "nibbles", "inputs_per_step": GROUP, "made_by": "nibbler 1"}


def nibbles(weight: torch.Tensor) -> Quantized:
    """The format's own packing, from its formula: the oracle of the reader and of the layout."""
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, inputs // GROUP, GROUP)
    steps = (groups.abs().amax(2, keepdim=True) / 7).half()
    values = torch.round(groups / steps.float()).clamp(-8, 7)
    codes = (values + 8).reshape(outputs, inputs // 2, 2).to(torch.uint8)
    stored = {"codes": codes[..., 0] * 16 + codes[..., 1], "steps": steps[..., 0]}
    return Quantized(stored, (values * steps.float()).reshape(outputs, inputs))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write(tmp_path_factory.mktemp("nibbles"), {"_proj": nibbles}, CONFIG)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install(tmp_path_factory.mktemp("site"), "tests.extending.nibbles")


def test_the_package_has_never_heard_of_it() -> None:
    hits = subprocess.run(
        ["grep", "-rl", '"nibbles"', "vllm_npu_quant", "--include=*.py"], cwd=ROOT, capture_output=True
    )
    assert not hits.stdout, hits.stdout


def test_without_the_file_it_is_refused_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import os

    report = vllm_npu_quant_json(["check", str(folders[0])], dict(os.environ), code=1)
    assert [finding["code"] for finding in report["findings"]] == ["unknown-scheme"]
    assert "nibbles" in report["findings"][0]["found"]


def test_it_is_detected_and_inspected(folders: tuple[Path, Path], environment: dict[str, str]) -> None:
    overview = vllm_npu_quant_json(["inspect", str(folders[0])], environment)
    assert (overview["format"], overview["decided_by"], overview["producer"]) == ("nibbles", "config.json", "nibbler 1")
    quantized = [scheme for scheme in overview["schemes"] if scheme["scheme"] == "NIBBLES W4A16"]
    assert [(scheme["method"], scheme["layers"]) for scheme in quantized] == [("WeightOnlyLinear", 14)]
    assert "nibbles" in {row["format"] for row in json.loads(matrix_text(environment))["rows"]}


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype", "unknown field", "unexpected"])
def test_its_faults_are_found_before_a_weight_is_read(
    fault: str, folders: tuple[Path, Path], environment: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders[0], broken)
    tensors = read_tensors(broken)
    layer = "model.layers.1.mlp.up_proj"
    if fault == "missing":
        del tensors[f"{layer}.steps"]
    elif fault == "shape":
        tensors[f"{layer}.steps"] = tensors[f"{layer}.steps"][:, :-1].contiguous()
    elif fault == "dtype":
        tensors[f"{layer}.codes"] = tensors[f"{layer}.codes"].to(torch.int32)
    elif fault == "unexpected":
        tensors[f"{layer}.zeros"] = torch.zeros(4)
    else:
        config = json.loads((broken / "config.json").read_text())
        config["quantization_config"]["order"] = "shuffled"
        (broken / "config.json").write_text(json.dumps(config))
    save_file(tensors, broken / "model.safetensors")
    report = vllm_npu_quant_json(["check", str(broken)], environment, code=1)
    codes = {
        "missing": "missing-tensor",
        "shape": "wrong-shape",
        "dtype": "wrong-dtype",
        "unexpected": "unexpected-tensor",
    }
    (finding,) = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert finding["code"] == codes.get(fault, "bad-config")
    assert finding["layer"] == ("order" if fault == "unknown field" else layer) or fault == "unknown field"


@pytest.mark.engine
def test_it_runs(folders: tuple[Path, Path], environment: dict[str, str], tmp_path: Path) -> None:
    done, methods = run_extended(folders[0], environment, tmp_path)
    assert methods == {"WeightOnlyLinear": 8}
    assert relative_error(done, run(folders[1], plugin=False)) <= 0.02
