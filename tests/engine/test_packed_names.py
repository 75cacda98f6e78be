# SPDX-License-Identifier: Apache-2.0
"""The names under which AWQ, GPTQ, AutoRound and FP8 checkpoints are asked for, and the files that hold their configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from tests.fixtures_index import fixture
from vllm_npu_quant.errors import NpuQuantError

AWQ, GPTQ, AUTO_ROUND = "awq-qwen3-autoawq-g128", "gptq-qwen3-gptqmodel-w4g128-asym", "autoround-qwen3-w2g64"


@pytest.fixture(autouse=True, scope="module")
def _plugins() -> None:
    load_general_plugins()


def model_config(folder: Path, quantization: str | None = None) -> Any:
    return EngineArgs(str(folder), quantization=quantization).create_model_config()


def folder_with(tmp_path: Path, source: str, files: dict[str, Any], **config: Any) -> Path:
    """A copy of a fixture without its quantization configs, and with these files beside its config.json."""
    for file in fixture(source).iterdir():
        if file.name not in ("config.json", "quantize_config.json", "quantization_config.json"):
            (tmp_path / file.name).symlink_to(file)
    text = json.loads((fixture(source) / "config.json").read_text())
    text.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(text | config))
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


def own_config(source: str) -> dict[str, Any]:
    return json.loads((fixture(source) / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("name", "asked", "method"),
    [
        *((AWQ, asked, "npu_awq") for asked in (None, "awq", "npu_awq", "auto_awq", "awq_marlin")),
        *((GPTQ, asked, "npu_gptq") for asked in (None, "gptq", "npu_gptq", "auto_gptq", "gptq_marlin")),
        *((AUTO_ROUND, asked, "npu_auto_round") for asked in (None, "auto-round", "npu_auto_round", "inc")),
    ],
)
def test_names(name: str, asked: str | None, method: str) -> None:
    assert model_config(fixture(name), asked).quantization == method


@pytest.mark.parametrize(
    ("name", "theirs"), [(AWQ, {"awq", "auto_awq"}), (GPTQ, {"gptq", "auto_gptq"}), (AUTO_ROUND, {"inc", "auto-round"})]
)
def test_vllms_own_methods_stay_reachable(name: str, theirs: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT", "0")
    assert model_config(fixture(name)).quantization in theirs


@pytest.mark.parametrize("asked", [None, "fp8", "npu_fp8"])
def test_names_of_fp8(asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoRound's blocks are DeepSeek's, under another method's name."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = folder_with(tmp_path, "autoround-qwen3-fp8block", {}, quantization_config=fp8)
    config = EngineArgs(str(folder), quantization=asked).create_engine_config()
    assert config.model_config.quantization == "npu_fp8"
    assert config.quant_config.resolver.resolve("model.layers.0.mlp.down_proj").spec.scheme.startswith("FP8_BLOCK")
    if asked != "npu_fp8":
        monkeypatch.setenv("VLLM_NPU_QUANT", "0")
        assert model_config(folder, asked).quantization == "fp8"


@pytest.mark.parametrize(
    ("source", "file", "method"),
    [
        (GPTQ, "quantize_config.json", "npu_gptq"),
        (AWQ, "quant_config.json", "npu_awq"),
        (AWQ, "quantize_config.json", "npu_awq"),
    ],
)
@pytest.mark.parametrize("asked", [None, "theirs", "ours"])
def test_a_config_beside_config_json(source: str, file: str, method: str, asked: str | None, tmp_path: Path) -> None:
    """Early AutoGPTQ and AutoAWQ checkpoints: config.json does not mention the quantization."""
    folder = folder_with(tmp_path, source, {file: own_config(source)})
    name = {None: None, "theirs": method.removeprefix("npu_"), "ours": method}[asked]
    config = EngineArgs(str(folder), quantization=name).create_engine_config()
    assert config.model_config.quantization == method
    assert not config.quant_config.resolver.resolve("model.layers.0.self_attn.qkv_proj").spec.is_float


def test_a_config_beside_config_json_is_not_ours_where_the_plugin_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT", "0")
    folder = folder_with(tmp_path, GPTQ, {"quantize_config.json": own_config(GPTQ)})
    assert model_config(folder).quantization is None


def test_other_names_are_left_to_vllm(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, GPTQ, {"quantize_config.json": own_config(GPTQ)})
    assert model_config(folder, "fp8_per_tensor").quantization == "fp8_per_tensor"


def test_two_configs_that_disagree(tmp_path: Path) -> None:
    config = own_config(GPTQ)
    other = {**config, "format": "gptq_v2", "checkpoint_format": "gptq_v2"}
    folder = folder_with(tmp_path, GPTQ, {"quantize_config.json": other}, quantization_config=config)
    with pytest.raises(NpuQuantError) as caught:
        EngineArgs(str(folder)).create_engine_config()
    (finding,) = caught.value.findings
    assert finding.code == "contradictory-evidence"
    assert finding.found == "gptq and gptq_v2"
    assert "quantize_config.json" in finding.fix


@pytest.mark.parametrize(
    ("source", "changes", "code"),
    [
        (AWQ, {"version": "gemv"}, "unsupported-scheme"),
        (AWQ, {"bits": 8}, "unsupported-scheme"),
        (GPTQ, {"bits": 8}, "wrong-shape"),
        (GPTQ, {"group_size": 64}, "wrong-shape"),
        (GPTQ, {"dynamic": {"-:(a+": {}}}, "bad-config"),
        (GPTQ, {"dynamic": {"-:.*up_proj": {}}}, "bad-config"),
        (GPTQ, {"checkpoint_format": "marlin", "format": "marlin"}, "unsupported-scheme"),
        (AUTO_ROUND, {"extra_config": {"(": {"bits": 4}}}, "bad-config"),
        (AUTO_ROUND, {"packing_format": "auto_round:auto_awq", "bits": 4}, "wrong-shape"),
    ],
)
def test_broken_configs_are_refused_before_a_weight_is_read(
    source: str, changes: dict[str, Any], code: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, source, {}, quantization_config={**own_config(source), **changes})
    with pytest.raises(NpuQuantError) as caught:
        EngineArgs(str(folder)).create_engine_config()
    assert set(caught.value.codes) == {code}
    assert caught.value.findings[0].fix
    assert caught.value.findings[0].file
