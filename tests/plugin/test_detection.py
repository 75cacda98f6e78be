# SPDX-License-Identifier: Apache-2.0
"""Which quantization method a checkpoint gets: what lies in its folder, against what the user names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.transformers_utils import repo_utils

from tests.configs import config_of_format
from tests.fixtures_index import fixture
from vllm_npu_quant.engine import registration
from vllm_npu_quant.errors import Finding, NpuQuantError

MODELSLIM = "msmodelslim-qwen3-w8a8"
FLOAT = "source-tiny-qwen3"
DESCRIPTION = "quant_model_description.json"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.fixture(autouse=True, scope="module")
def _plugins() -> None:
    load_general_plugins()


def description() -> dict[str, Any]:
    return json.loads((fixture(MODELSLIM) / DESCRIPTION).read_text())


def copy_of(name: str, folder: Path, *, without: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of a fixture; ``config`` changes config.json."""
    folder.mkdir(parents=True)
    for file in fixture(name).iterdir():
        if file.is_file() and file.name not in without:
            (folder / file.name).symlink_to(file)
    text = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def method_of(folder: Path | str, quantization: str | None = None) -> str | None:
    return EngineArgs(str(folder), quantization=quantization).create_model_config().quantization


def refused(folder: Path | str, quantization: str | None = None, *, engine: bool = False) -> Finding:
    """The one finding of the error; with ``engine``, of the whole engine config."""
    args = EngineArgs(str(folder), quantization=quantization)
    with pytest.raises(NpuQuantError) as caught:
        args.create_engine_config() if engine else args.create_model_config()
    (finding,) = caught.value.findings
    assert finding.fix
    return finding


@pytest.mark.parametrize("quantization", [None, "modelslim", "ascend", "Ascend", "ModelSlim"])
def test_a_description_beside_config_json(quantization: str | None) -> None:
    assert method_of(fixture(MODELSLIM), quantization) == "modelslim"


def test_the_old_name_of_the_description() -> None:
    assert method_of(fixture("msmodelslim-qwen3-v0-w8a8-old")) == "modelslim"


@pytest.mark.parametrize("quant_method", ["ascend", "modelslim", "Ascend", None])
@pytest.mark.parametrize("quantization", [None, "modelslim", "ascend"])
def test_a_description_inside_config_json(quant_method: str | None, quantization: str | None, tmp_path: Path) -> None:
    embedded = description() | ({} if quant_method is None else {"quant_method": quant_method})
    folder = copy_of(MODELSLIM, tmp_path / "m", without=(DESCRIPTION,), quantization_config=embedded)
    config = EngineArgs(str(folder), quantization=quantization).create_engine_config()
    assert config.model_config.quantization == "modelslim"
    assert config.quant_config.described.source == "config.json"
    assert config.quant_config.resolver.resolve("model.layers.0.self_attn.qkv_proj").spec.scheme == "W8A8"


@pytest.mark.parametrize("quant_method", ["ascend", "modelslim"])
def test_config_json_points_to_the_description(quant_method: str, tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config={"quant_method": quant_method})
    config = EngineArgs(str(folder)).create_engine_config()
    assert config.quant_config.described.source == DESCRIPTION


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_quantization_config_says_nothing(empty: Any, tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config=empty)
    assert method_of(folder) == "modelslim"


def test_the_engine_config_is_ours_and_knows_the_layers() -> None:
    config = EngineArgs(str(fixture(MODELSLIM))).create_engine_config().quant_config
    assert isinstance(config, config_of_format("modelslim"))
    assert config.described.source == DESCRIPTION
    assert config.hidden_layers == 2
    # What vllm-ascend reads of a config besides: little, and there.
    assert config.quant_description == {}
    assert config.enable_fa_quant is config.enable_c8_quant is False


def test_a_float_checkpoint_is_not_touched() -> None:
    config = EngineArgs(str(fixture(FLOAT))).create_engine_config()
    assert config.model_config.quantization is None
    assert config.quant_config is None


def test_other_files_of_a_folder_are_no_description(tmp_path: Path) -> None:
    folder = copy_of(FLOAT, tmp_path / "m")
    for name in ("quant_model_description.json.bak", "my_quant_model_description.json", "quant_model_description.txt"):
        (folder / name).write_text("{}")
    assert method_of(folder) is None


# Evidence that contradicts.


def test_config_json_names_another_format(tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config=GPTQ)
    finding = refused(folder)
    assert finding.code == "contradictory-evidence"
    assert "'gptq'" in finding.found
    assert DESCRIPTION in finding.found


def test_the_user_decides_between_config_json_and_description(tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config=GPTQ)
    config = EngineArgs(str(folder), quantization="modelslim").create_engine_config()
    assert config.quant_config.described.source == DESCRIPTION
    # A wrong decision is refused by the files: they hold no packed integers.
    with pytest.raises(NpuQuantError) as caught:
        EngineArgs(str(folder), quantization="gptq").create_engine_config()
    assert "wrong-dtype" in caught.value.codes


@pytest.mark.parametrize(
    "quantization",
    # Online methods would quantize the integers once more without a word; others would not find their config.
    ["fp8", "int8_per_channel_weight_only", "gptq", "awq", "compressed-tensors", "auto-round", "nonsense"],
)
def test_the_user_names_another_method(quantization: str) -> None:
    finding = refused(fixture(MODELSLIM), quantization)
    assert finding.code == "contradictory-evidence"
    assert "this is a ModelSlim checkpoint" in finding.message
    assert quantization in finding.found
    assert "quantization=" in finding.fix


def test_the_user_names_another_method_than_an_embedded_description(tmp_path: Path) -> None:
    embedded = description() | {"quant_method": "ascend"}
    folder = copy_of(MODELSLIM, tmp_path / "m", without=(DESCRIPTION,), quantization_config=embedded)
    with pytest.raises(ValueError, match=r"model config \(ascend\) does not match .*\(fp8\)"):
        method_of(folder, "fp8")


@pytest.mark.parametrize("quantization", [None, "modelslim", "ascend"])
def test_two_descriptions(quantization: str | None, tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m")
    (folder / "quant_model_description_w8a8.json").write_text("{}")
    finding = refused(folder, quantization, engine=True)
    assert finding.code == "contradictory-evidence"
    assert finding.found == "quant_model_description.json, quant_model_description_w8a8.json"


@pytest.mark.parametrize("quantization", ["modelslim", "ascend"])
@pytest.mark.parametrize("name", [FLOAT, "awq-qwen3-autoawq-g128"])
def test_no_description(quantization: str, name: str) -> None:
    if (name, quantization) == ("awq-qwen3-autoawq-g128", "ascend"):
        quantization = "modelslim"
    finding = refused(fixture(name), quantization, engine=True)
    assert finding.code == "unreadable-file"
    assert DESCRIPTION in finding.expected
    assert "config.json" in finding.found


def test_a_description_that_is_no_json(tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", without=(DESCRIPTION,))
    (folder / DESCRIPTION).write_text("{")
    finding = refused(folder, engine=True)
    assert finding.code == "unreadable-file"
    assert finding.file.endswith(DESCRIPTION)


def test_a_description_that_is_nested_too_deeply(tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", without=(DESCRIPTION,))
    (folder / DESCRIPTION).write_text('{"optional": ' + '{"a": ' * 5000 + "1" + "}" * 5000 + "}")
    assert refused(folder, engine=True).code == "unreadable-file"


def test_switched_off_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT", "0")
    assert method_of(fixture(MODELSLIM)) is None
    assert method_of(fixture("awq-qwen3-autoawq-g128")) == "awq"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("awq-qwen3-autoawq-g128", "npu_awq"),
        ("gptq-qwen3-w4g128-asym", "npu_gptq"),
        ("autoround-qwen3-mixed", "npu_auto_round"),
        ("ct-qwen3-w8a8-dynamic", "npu_compressed_tensors"),
    ],
)
def test_formats_that_config_json_names(name: str, method: str) -> None:
    usual = json.loads((fixture(name) / "config.json").read_text())["quantization_config"]["quant_method"]
    assert {method_of(fixture(name), asked) for asked in (None, usual, method)} == {method}


# Models of a hub.

REPOSITORY, COMMIT = "org/tiny-w8a8", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub writes it, in which REPOSITORY has no file yet; returns the folder of its snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / ("models--" + REPOSITORY.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def fill(snapshot: Path, *, without: tuple[str, ...] = ()) -> None:
    for file in fixture(MODELSLIM).iterdir():
        if file.is_file() and file.name not in without:
            shutil.copyfile(file, snapshot / file.name)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_model_in_the_cache_without_a_network(hub_cache: Path, revision: str | None) -> None:
    fill(hub_cache)
    config = EngineArgs(REPOSITORY, revision=revision).create_engine_config()
    assert config.model_config.quantization == "modelslim"
    assert config.quant_config.described.source == DESCRIPTION


def test_the_cache_is_asked_where_the_hub_is_not_reached(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(repo_utils, "list_repo_files", unreachable)
    fill(hub_cache)
    assert registration._detect(REPOSITORY, None, None) == "modelslim"
    (hub_cache / DESCRIPTION).unlink()
    assert registration._detect(REPOSITORY, None, None) is None
    assert registration._detect("org/unknown", None, "fp8") == "fp8"


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A hub with these files, of which nothing but config.json is on this host yet; returns the snapshot."""

    def make(*names: str, config: dict[str, Any]) -> Path:
        monkeypatch.setattr(repo_utils, "list_repo_files", lambda model, *, revision=None: list(names))
        monkeypatch.setattr(repo_utils, "get_hf_file_to_dict", lambda name, model, revision=None: config)

        def download(model: str, name: str, *, revision: str | None = None) -> str:
            assert model == REPOSITORY
            shutil.copyfile(fixture(MODELSLIM) / name, hub_cache / name)
            return os.fspath(hub_cache / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        (hub_cache / "config.json").write_text(json.dumps(config))
        return hub_cache

    return make


def test_a_hub_model_that_is_not_downloaded_yet(hub: Callable[..., Path]) -> None:
    """The weights come later; the description is needed before."""
    snapshot = hub("config.json", DESCRIPTION, "quant_model_weights-00001-of-00001.safetensors", config={})
    assert registration._detect(REPOSITORY, None, None) == "modelslim"
    assert not (snapshot / DESCRIPTION).exists()
    config = config_of_format("modelslim")()
    config.maybe_update_config(REPOSITORY)
    assert config.described.source == DESCRIPTION
    assert config.resolver.resolve("model.layers.1.mlp.gate_up_proj").spec.scheme == "W8A8"


def test_a_hub_model_with_contradicting_files(hub: Callable[..., Path]) -> None:
    hub("config.json", DESCRIPTION, config={"quantization_config": GPTQ})
    with pytest.raises(NpuQuantError) as caught:
        registration._detect(REPOSITORY, None, None)
    assert caught.value.codes == ("contradictory-evidence",)
    assert registration._detect(REPOSITORY, None, "gptq") == "gptq"
    assert registration._detect(REPOSITORY, None, "modelslim") == "modelslim"


def test_a_hub_model_without_description(hub: Callable[..., Path]) -> None:
    hub("config.json", "model.safetensors", config={})
    assert registration._detect(REPOSITORY, None, None) is None
    with pytest.raises(NpuQuantError) as caught:
        config_of_format("modelslim")().maybe_update_config(REPOSITORY)
    assert caught.value.codes == ("unreadable-file",)


def test_a_hub_model_whose_description_is_in_a_subfolder(hub: Callable[..., Path]) -> None:
    hub("config.json", f"w8a8/{DESCRIPTION}", config={})
    assert registration._detect(REPOSITORY, None, None) is None
