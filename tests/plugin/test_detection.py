# SPDX-License-Identifier: Apache-2.0
"""Which quantization method a checkpoint gets: what lies in its folder, against what the user names."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import (
    _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.plugins import load_general_plugins

from tests.configs import config_of_format
from tests.fixtures_index import fixture
from tests.hub_server import COMMIT, Hub, environment_of, serve, use_hub
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.engine import detection
from vllm_npu_quant.engine.config import NpuQuantConfig
from vllm_npu_quant.engine.detection import _detect, detect_quantization
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


def test_the_weights_decide_between_config_json_and_description(tmp_path: Path) -> None:
    """The float model's config.json had a quantization of its own, which was left in it."""
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config=GPTQ)
    config = EngineArgs(str(folder)).create_engine_config()
    assert config.model_config.quantization == "modelslim"
    assert config.quant_config.described.source == DESCRIPTION
    packed = copy_of("gptq-qwen3-w4g128-asym", tmp_path / "packed")
    shutil.copyfile(fixture(MODELSLIM) / DESCRIPTION, packed / DESCRIPTION)
    config = EngineArgs(str(packed)).create_engine_config()
    assert config.model_config.quantization == "npu_gptq"
    assert config.quant_config.described.source == "config.json"


def test_neither_config_json_nor_the_description_fits(tmp_path: Path) -> None:
    folder = copy_of("msmodelslim-qwen3-w8a8-dynamic", tmp_path / "m", without=(DESCRIPTION,), quantization_config=GPTQ)
    shutil.copyfile(fixture(MODELSLIM) / DESCRIPTION, folder / DESCRIPTION)
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


def test_an_export_for_mindie(tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config={"w_bit": 8, "group_size": -1}, quantize="w8a8")
    config = EngineArgs(str(folder)).create_engine_config()
    assert config.model_config.quantization == "modelslim"
    assert config.quant_config.described.source == DESCRIPTION


@pytest.mark.parametrize("quantization", [None, "gptq"])
@pytest.mark.parametrize("fields", [{"desc_act": False}, {}])
def test_a_config_without_quant_method(fields: dict[str, Any], quantization: str | None, tmp_path: Path) -> None:
    """desc_act is GPTQ's alone; without it only the user can say which format it is."""
    silent = {"bits": 4, "group_size": 128, "sym": False, **fields}
    folder = copy_of(
        "gptq-qwen3-w4g128-asym", tmp_path / "m", without=("quantize_config.json",), quantization_config=silent
    )
    if fields or quantization:
        assert (
            EngineArgs(str(folder), quantization=quantization).create_engine_config().quant_config.described.format
            == "gptq"
        )
    else:
        finding = refused(folder)
        assert finding.code == "bad-config"
        assert "has no quant_method" in finding.message


def test_the_config_of_a_part_that_vllm_does_not_look_at(tmp_path: Path) -> None:
    source = json.loads((fixture("awq-qwen3-autoawq-g128") / "config.json").read_text())
    part = {"language_config": {"quantization_config": source["quantization_config"]}}
    folder = copy_of("awq-qwen3-autoawq-g128", tmp_path / "m", quantization_config=None, **part)
    assert EngineArgs(str(folder)).create_engine_config().model_config.quantization == "npu_awq"


# Checkpoints that nobody here serves: the reason, before weights are read.


@pytest.mark.parametrize(
    ("quantization", "title"),
    [
        ({"quant_method": "quark", "global_quant_config": {}}, "AMD Quark"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "w8a8_int8"}, "SGLang W8A8 int8"),
    ],
)
def test_what_vllm_cannot_serve_here(quantization: dict[str, Any], title: str, tmp_path: Path) -> None:
    finding = refused(copy_of(FLOAT, tmp_path / "m", quantization_config=quantization))
    assert finding.code == "unsupported-scheme"
    assert title in finding.message


def test_other_errors_of_vllm_stay(tmp_path: Path) -> None:
    folder = copy_of(FLOAT, tmp_path / "m", quantization_config={"quant_method": "quark"})
    with pytest.raises(ValueError, match="max_model_len"):
        EngineArgs(str(folder), max_model_len=1 << 30).create_model_config()


class TheirConfig(QuantizationConfig):
    """The config class of another plugin, which takes every checkpoint."""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> str:
        return "theirs"


@pytest.fixture
def another_plugin() -> Iterator[None]:
    register_quantization_config("theirs")(TheirConfig)
    yield
    QUANTIZATION_METHODS.remove("theirs")
    del _CUSTOMIZED_METHOD_TO_QUANT_CONFIG["theirs"]


def test_a_method_of_another_plugin_stays(tmp_path: Path, another_plugin: None) -> None:
    """It serves the checkpoint, whatever our table says of it."""
    folder = copy_of(FLOAT, tmp_path / "m", quantization_config={"quant_method": "quark"})
    assert method_of(folder) == "theirs"


def test_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )
    assert "serve org/base" in refused(folder).fix


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_consolidated_files_beside_the_others(load_format: str, tmp_path: Path) -> None:
    """An index leaves them out where vLLM does not prefer them."""
    folder = copy_of("awq-qwen3-autoawq-g128", tmp_path / "m")
    (weights,) = folder.glob("*.safetensors")
    (source,) = fixture(FLOAT).glob("*.safetensors")
    (folder / "consolidated.safetensors").symlink_to(source)
    index = {"weight_map": dict.fromkeys(Checkpoint.open(folder).header(weights.name).tensors, weights.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if load_format == "auto":
        fix = refused(folder).fix
        assert "remove consolidated.safetensors" in fix
        assert "--load-format safetensors" in fix
    else:
        config = EngineArgs(str(folder), load_format=load_format).create_engine_config()
        assert config.quant_config.described.is_quantized


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

REPOSITORY = "org/tiny-w8a8"


@contextmanager
def hub_of(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, *, token: str = "", without: tuple[str, ...] = ()
) -> Iterator[Hub]:
    """A hub with a folder as REPOSITORY, of which nothing is on this host yet."""
    served = home / "served"
    if not served.exists():
        shutil.copytree(folder, served, ignore=shutil.ignore_patterns(*without))
    with serve({REPOSITORY: served}, token=token) as hub:
        use_hub(monkeypatch, hub.endpoint, home)
        yield hub


def fill(cache: Path, folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """Put a folder into a cache of huggingface_hub as REPOSITORY; returns the snapshot."""
    repository = cache / ("models--" + REPOSITORY.replace("/", "--"))
    shutil.copytree(folder, repository / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(*without))
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def detect(quantization: str | None = None, **options: Any) -> str | None:
    return detect_quantization(EngineArgs(REPOSITORY, quantization=quantization, **options)).method


def entries(config: NpuQuantConfig) -> dict[str, Any]:
    assert config.described is not None
    return {name: config.described.find(name) for name in config.described.layer_names()}


def config_of(folder: Path) -> NpuQuantConfig:
    """Our config of a folder's config.json, as vLLM makes it."""
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    method = str(quantization.get("quant_method", "modelslim"))
    return config_of_format(method)(quantization)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is an error that nothing catches."""

    def connect(_: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_model_in_the_cache_without_a_network(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fill(tmp_path / "hub", fixture(MODELSLIM))
    config = EngineArgs(REPOSITORY, revision=revision).create_engine_config()
    assert config.model_config.quantization == "modelslim"
    assert config.quant_config.described.source == DESCRIPTION


@pytest.mark.parametrize(
    ("name", "method"), [(MODELSLIM, "modelslim"), (FLOAT, None), ("awq-qwen3-autoawq-g128", None)]
)
def test_a_model_in_the_cache_is_not_looked_up(
    name: str, method: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """With a hub that could be asked, by us or through vLLM."""
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    fill(tmp_path / "hub", fixture(name))
    assert detect() == method


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("reached", [False, True])
def test_a_hub_that_does_not_answer(
    reached: bool,
    quantization: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """vLLM may be able to load the model all the same. It is asked for once, and the log says why nothing was found out."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with serve({}) as hub:
        use_hub(monkeypatch, hub.endpoint if reached else "http://127.0.0.1:9", tmp_path)
        assert detect(quantization) == quantization
    assert hub.requests == ["GET /api/models/org/tiny-w8a8?blobs=true"] * reached
    (message,) = {record.getMessage() for record in caplog.records if record.name == "vllm.npu_quant"}
    assert ("404" if reached else "refused") in message


@pytest.mark.parametrize("model", ["/no/such/model.gguf", "s3://bucket/model", "org/model:Q4_K_M"])
def test_what_is_no_hub_id_is_left_to_vllm(model: str, no_network: None) -> None:
    assert _detect(model, None, None).method is None
    assert _detect(model, None, "gguf").method == "gguf"


@pytest.mark.parametrize(
    "name",
    [
        MODELSLIM,
        "msmodelslim-qwen3moe-w8a8-dynamic",
        "ct-qwen3-w8a8-dynamic",
        "awq-qwen3-autoawq-g128",
        "autoround-qwen3-fp8block",
        "gptq-qwen3-gptqmodel-dynamic-mixed",
    ],
)
def test_a_hub_model_is_read_as_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start by a hub id, with nothing downloaded, knows of a checkpoint what every other start knows."""
    local, remote = config_of(fixture(name)), config_of(fixture(name))
    local.maybe_update_config(str(fixture(name)))
    with hub_of(fixture(name), tmp_path, monkeypatch) as hub:
        detected = detect()
        assert [file for file, _ in hub.ranges if file.endswith(".safetensors")] == []
        remote.maybe_update_config(REPOSITORY)
    assert detected == ("modelslim" if name.startswith("msmodelslim") else None)
    assert entries(remote) == entries(local)
    assert remote.described.findings == local.described.findings


def test_float_layers_by_expression_are_the_same_by_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An FP8 model whose first down_proj is float, named by a regular expression."""
    folder, name = tmp_path / "fp8", "model.layers.0.mlp.down_proj"
    write_fp8(folder, floats=(name,), config={"modules_to_not_convert": ["re:.*layers.0.*down_proj", "lm_head"]})
    for model in (str(folder), REPOSITORY):
        with hub_of(folder, tmp_path, monkeypatch):
            config = config_of(folder)
            config.maybe_update_config(model)
        assert config.described.find(name).spec.is_float
        assert not config.described.find("model.layers.1.mlp.down_proj").spec.is_float


def write_fp8(folder: Path, *, floats: tuple[str, ...], config: dict[str, Any]) -> None:
    """The float fixture's linear layers in FP8 with a scale each, but for some."""
    folder.mkdir()
    (source,) = fixture(FLOAT).glob("*.safetensors")
    tensors = load_file(source)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        if name.removesuffix(".weight") in floats:
            continue
        scale = tensors[name].abs().max().float() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[name.removesuffix(".weight") + ".weight_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    model = json.loads((fixture(FLOAT) / "config.json").read_text())
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", **config}
    (folder / "config.json").write_text(json.dumps(model | {"quantization_config": quantization}))


def test_damage_of_a_hub_model_is_found_before_it_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are of another scheme than the description, which is right by itself."""
    folder = copy_of("msmodelslim-qwen3-w8a8-dynamic", tmp_path / "m", without=(DESCRIPTION,))
    shutil.copyfile(fixture(MODELSLIM) / DESCRIPTION, folder / DESCRIPTION)
    with hub_of(folder, tmp_path, monkeypatch) as hub:
        with pytest.raises(NpuQuantError) as caught:
            config_of_format("modelslim")().maybe_update_config(REPOSITORY)
        assert [asked for file, asked in hub.ranges if file.endswith(".safetensors")] == ["bytes=0-262143"]
    assert "missing-tensor" in caught.value.codes


def test_a_hub_model_with_contradicting_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config=GPTQ)
    with hub_of(folder, tmp_path, monkeypatch):
        assert detect() == "modelslim"
        assert detect("gptq") == "gptq"
        assert detect("modelslim") == "modelslim"


def test_a_hub_model_without_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of(fixture(FLOAT), tmp_path, monkeypatch):
        assert detect() is None
        with pytest.raises(NpuQuantError) as caught:
            config_of_format("modelslim")().maybe_update_config(REPOSITORY)
    (finding,) = caught.value.findings
    assert finding.code == "unreadable-file"
    assert "config.json" in finding.found


def test_a_hub_model_whose_description_is_in_a_subfolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(FLOAT, tmp_path / "m")
    (folder / "w8a8").mkdir()
    (folder / "w8a8" / DESCRIPTION).write_text("{}")
    with hub_of(folder, tmp_path, monkeypatch):
        assert detect() is None


def test_a_hub_model_with_the_config_of_autogptq_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a folder: config.json is silent, and vLLM looks nowhere else."""
    folder = copy_of("gptq-qwen3-w4g128-asym", tmp_path / "m", quantization_config=None)
    source = json.loads((fixture("gptq-qwen3-w4g128-asym") / "config.json").read_text())
    (folder / "quantize_config.json").unlink(missing_ok=True)
    (folder / "quantize_config.json").write_text(json.dumps(source["quantization_config"]))
    assert method_of(folder) == "npu_gptq"
    with hub_of(folder, tmp_path, monkeypatch):
        assert detect() == "npu_gptq"


def test_a_private_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--hf-token is for all that we ask for, too."""
    with hub_of(fixture(MODELSLIM), tmp_path, monkeypatch, token="hf_secret"):
        assert detect() is None
        with pytest.raises(NpuQuantError):
            config_of_format("modelslim")().maybe_update_config(REPOSITORY)
        assert detect(hf_token="hf_secret") == "modelslim"
        config = config_of_format("modelslim")()
        config.maybe_update_config(REPOSITORY)
    assert config.described.source == DESCRIPTION


def test_a_private_draft_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model comes with no EngineArgs: it is opened with what the engine has."""
    engine = EngineArgs(str(fixture(FLOAT)), hf_token="hf_secret", download_dir=str(tmp_path / "weights"))
    engine_config = engine.create_engine_config()
    monkeypatch.setattr(detection, "_ACCESS", {})  # as in a process of a worker
    with hub_of(fixture(MODELSLIM), tmp_path, monkeypatch, token="hf_secret"):
        config = config_of_format("modelslim")()
        with set_current_vllm_config(engine_config):
            config.maybe_update_config(REPOSITORY)
    assert config.described.source == DESCRIPTION
    assert (tmp_path / "weights").is_dir()
    assert not (tmp_path / "hub").exists()


def test_weights_in_the_download_folder_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    """With --download-dir: configs are in the usual cache, and the weights of another scheme are where vLLM puts them."""
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    fill(tmp_path / "hub", fixture(MODELSLIM), without=("*.safetensors*",))
    fill(tmp_path / "weights", fixture("msmodelslim-qwen3-w8a8-dynamic"), without=("config.json", DESCRIPTION))
    assert detect(download_dir=str(tmp_path / "weights")) == "modelslim"
    with pytest.raises(NpuQuantError) as caught:
        config_of_format("modelslim")().maybe_update_config(REPOSITORY)
    assert "missing-tensor" in caught.value.codes


# vLLM calls it once for each engine config that it makes.


@pytest.mark.parametrize("name", [MODELSLIM, "ct-qwen3-w8a8-dynamic", "awq-qwen3-autoawq-g128"])
def test_a_config_may_be_updated_twice(name: str) -> None:
    config = config_of(fixture(name))
    config.maybe_update_config(str(fixture(name)))
    first = entries(config)
    config.maybe_update_config(str(fixture(name)))
    assert entries(config) == first


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_of_a_config(duplicate: Callable[[NpuQuantConfig], NpuQuantConfig]) -> None:
    name = "ct-qwen3-w8a8-dynamic"
    config = config_of(fixture(name))
    early = duplicate(config)
    config.maybe_update_config(str(fixture(name)))
    late = duplicate(config)
    for one in (early, late):
        one.maybe_update_config(str(fixture(name)))
        assert entries(one) == entries(config)


def test_the_description_is_not_in_pickles(tmp_path: Path) -> None:
    folder = copy_of(MODELSLIM, tmp_path / "m", quantization_config=description() | {"quant_method": "ascend"})
    config = config_of_format("modelslim")(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    assert b"up_proj.deq_scale" in pickle.dumps(config.raw)
    assert b"up_proj.deq_scale" not in pickle.dumps(config)


# The whole way through vLLM, in a process that knows no other hub.

_ENGINE_CONFIG = """
import json
from vllm.engine.arg_utils import EngineArgs

config = EngineArgs("org/tiny-w8a8").create_engine_config()
resolved = config.quant_config.resolver.resolve("model.layers.0.self_attn.qkv_proj")
print(json.dumps([config.model_config.quantization, config.quant_config.described.source, resolved.spec.scheme]))
"""


@pytest.mark.parametrize("modelscope", [False, True])
def test_vllm_with_a_hub(modelscope: bool, tmp_path: Path) -> None:
    if modelscope:
        pytest.importorskip("modelscope")
    with serve({REPOSITORY: fixture(MODELSLIM)}, modelscope=modelscope) as hub:
        environment = environment_of(hub, tmp_path, VLLM_USE_MODELSCOPE=str(modelscope), HF_HUB_OFFLINE="0")
        for _ in range(2):  # with an empty cache, and with what the first start has downloaded
            command = [sys.executable, "-c", _ENGINE_CONFIG]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == 0, done.stderr[-4000:]
            assert json.loads(done.stdout.splitlines()[-1]) == ["modelslim", DESCRIPTION, "W8A8"]


def test_configs_too_deep_for_vllm(tmp_path: Path) -> None:
    """vLLM's parser raises RecursionError; the wrapper around it says why before."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "a": ' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(NpuQuantError, match="nested too deeply"):
        EngineArgs(str(tmp_path)).create_model_config()
