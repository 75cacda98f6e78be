# SPDX-License-Identifier: Apache-2.0
"""Who serves a checkpoint on an Ascend host. vllm-ascend is not installed here: its known registry stands in."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tests.configs import config_of_format
from tests.fixtures_index import fixture
from vllm_npu_quant import settings
from vllm_npu_quant.ascend import ownership
from vllm_npu_quant.ascend.ownership import serves_compressed_tensors, serves_fp8, unserved
from vllm_npu_quant.engine.detection import _detect


@pytest.fixture
def on_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "ascend_host", lambda: True)


def test_all_schemes_must_be_served() -> None:
    assert unserved({("W8A8_DYNAMIC", "linear"), ("W8A8_DYNAMIC", "moe")}) == ""
    assert unserved({("W8A8_DYNAMIC", "linear"), ("W4A16", "linear")}) == "W4A16 for linear layers"
    assert unserved({("W8A8", "moe")}) == "W8A8 for moe layers"


@pytest.mark.usefixtures("on_ascend")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("msmodelslim-qwen3-w8a8-dynamic", None),
        ("msmodelslim-qwen3moe-w8a8-dynamic", None),
        ("msmodelslim-qwen3-v0-w4a16-g64", "modelslim"),
        ("msmodelslim-qwen3-w4a8-dynamic", "modelslim"),
    ],
)
def test_what_vllm_ascend_serves_is_left_to_it(name: str, expected: str | None) -> None:
    assert _detect(str(fixture(name)), None, None).method == expected


@pytest.mark.usefixtures("on_ascend")
def test_takeover(monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(fixture("msmodelslim-qwen3-w8a8-dynamic"))
    assert _detect(model, None, "ascend").method == "ascend"
    monkeypatch.setenv("VLLM_NPU_QUANT_TAKEOVER", "1")
    assert _detect(model, None, None).method == "modelslim"
    assert _detect(model, None, "ascend").method == "modelslim"


@pytest.mark.usefixtures("on_ascend")
def test_naming_our_method_is_enough() -> None:
    assert _detect(str(fixture("msmodelslim-qwen3-w8a8-dynamic")), None, "modelslim").method == "modelslim"
    embedded = {"quant_method": "modelslim", "a.q_proj.weight": "W8A8"}
    assert config_of_format("modelslim").override_quantization_method(embedded, "modelslim") == "modelslim"


@pytest.mark.usefixtures("on_ascend")
def test_compressed_tensors_that_vllm_ascend_serves_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = config_of_format("compressed-tensors").override_quantization_method
    assert ask(_config(), None) is None
    assert ask(_config(weights__num_bits=4), None) == "npu_compressed_tensors"
    assert ask(_config(), "npu_compressed_tensors") == "npu_compressed_tensors"
    monkeypatch.setenv("VLLM_NPU_QUANT_TAKEOVER", "1")
    assert ask(_config(), None) == "npu_compressed_tensors"


def test_elsewhere_ascend_is_an_alias() -> None:
    assert _detect(str(fixture("msmodelslim-qwen3-w8a8-dynamic")), None, "ascend").method == "modelslim"


def _config(**changes: Any) -> dict[str, Any]:
    name = "ct-qwen3-w8a8-dynamic"
    config = json.loads((fixture(name) / "config.json").read_text())["quantization_config"]
    group = next(iter(config["config_groups"].values()))
    for where, value in changes.items():
        part, _, key = where.partition("__")
        if part == "format":
            config[part] = group[part] = value
        else:
            group[part] = {**group[part], key: value} if key else value
    return config


BOTH = [{"linear", "moe"}]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"input_activations__symmetric": False}, False),
        ({"input_activations": None}, False),
        ({"weights__num_bits": 4}, False),
        ({"weights__num_bits": [8]}, False),
        ({"weights__strategy": "tensor"}, False),
        ({"weights__type": "float"}, False),
        ({"input_activations__dynamic": False}, False),
        ({"format": "pack-quantized"}, False),
    ],
)
def test_compressed_tensors(changes: dict[str, Any], expected: bool) -> None:
    assert serves_compressed_tensors(_config(**changes), BOTH) is expected


def test_static_int8_is_served_for_linear_layers_only() -> None:
    config = _config(input_activations__dynamic=False, input_activations__strategy="tensor")
    assert serves_compressed_tensors(config, [{"linear"}]) is True
    assert serves_compressed_tensors(config, BOTH) is False


@pytest.mark.parametrize(
    "config", [{}, {"config_groups": []}, {"config_groups": {"g": "x"}}, {"config_groups": {"g": {}}}]
)
def test_strange_configs_are_not_claimed_for_vllm_ascend(config: dict[str, Any]) -> None:
    assert serves_compressed_tensors(config, BOTH) is False


def _has(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str], chip: str | None = "a2") -> None:
    """A vllm-ascend for this chip whose registry has these pairs, and nothing else."""
    monkeypatch.setattr(ownership.host, "chip", lambda: chip)
    monkeypatch.setattr(ownership, "_registry", lambda: lambda *pair: type(pair[0], (), {}) if pair in pairs else None)


def test_what_a_registry_has_and_does_not_compute_as_said_is_not_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, ("W8A8", "linear"), ("W4A8_DYNAMIC", "moe"), ("W4A8_DYNAMIC", "linear"))
    assert unserved({("W8A8", "linear"), ("W4A8_DYNAMIC", "moe")}) == ""
    assert unserved({("W4A8_DYNAMIC", "linear")}) == "W4A8_DYNAMIC for linear layers"


def test_the_second_key_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, ("FAKQuant", "attention"), ("W4A16", "moe"))
    assert unserved({("FAKQuant", "attention"), ("W4A16", "moe")}) == ""
    assert unserved({("FAKQuant", "linear")}) == "FAKQuant for linear layers"
    assert unserved({("W4A16", "linear"), ("C8", "attention")}) == "C8 for attention layers, W4A16 for linear layers"


@pytest.mark.parametrize(
    ("chip", "served"), [("a2", False), ("a3", False), ("310p", False), ("a5", True), (None, True)]
)
def test_only_a5_computes_fp8_and_fp4(chip: str | None, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = (("W8A8_MXFP8", "linear"), ("W4A16_MXFP4", "moe"), ("W8A8FP8_DYNAMIC", "linear"), ("fp8", "linear"))
    _has(monkeypatch, *pairs, chip=chip)
    for pair in pairs:
        assert (unserved([pair]) == "") is served


def test_groups_need_a_class_that_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, ("W4A8_DYNAMIC", "moe"))
    assert unserved({("W4A8_DYNAMIC", "moe")}) == ""
    assert unserved({("W4A8_DYNAMIC per group", "moe")}) == "W4A8_DYNAMIC per group for moe layers"

    class Grouped:
        def process_scale(self, weight: Any, scale: Any, per_group_scale: Any) -> None: ...

    monkeypatch.setattr(ownership, "_registry", lambda: lambda scheme, kind: Grouped)
    assert unserved({("W4A8_DYNAMIC per group", "moe")}) == ""


def test_many_schemes_are_counted() -> None:
    assert unserved((f"T{number}", "linear") for number in range(1000)).endswith(" for linear layers, and 992 more")


FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
BLOCKS = (("fp8", "linear"), ("fp8", "moe"))
V4 = (("FP8", "ds_linear"), ("FP8", "w4a8_moe"))


@pytest.mark.parametrize(
    ("changes", "model", "pairs", "chip", "served"),
    [
        ({}, {}, BLOCKS, "a5", True),
        ({}, {}, BLOCKS, "a2", False),
        ({}, {}, V4, "a5", False),
        ({}, {}, BLOCKS[:1], "a5", False),
        ({"weight_block_size": None}, {}, BLOCKS, "a5", False),
        ({"activation_scheme": "static"}, {}, BLOCKS, "a5", False),
        ({"quant_method": "FP8"}, {}, BLOCKS, "a5", False),
        ({}, {"model_type": "deepseek_v4"}, V4, "a5", True),
        ({}, {"model_type": "deepseek_v4", "expert_dtype": "fp8"}, V4, "a5", False),
        ({}, {"model_type": "deepseek_v4"}, BLOCKS, "a5", False),
    ],
)
def test_fp8(
    changes: dict[str, Any],
    model: dict[str, str],
    pairs: tuple[tuple[str, str], ...],
    chip: str,
    served: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _has(monkeypatch, *pairs, chip=chip)
    assert serves_fp8({**FP8_BLOCKS, **changes}, SimpleNamespace(**model) if model else None) is served


@pytest.mark.usefixtures("on_ascend")
def test_a_description_in_config_json_is_left_by_its_name_and_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = config_of_format("modelslim").override_quantization_method
    served = {"quant_method": "ascend", "a.o_proj.weight": "W8A8"}
    assert ask(served, None) is None
    assert ask({**served, "quant_method": "modelslim"}, None) == "modelslim"
    assert ask({**served, "a.q_proj.weight": "W4A16"}, None) == "modelslim"
    assert ask({**served, "a.q_proj.weight": "W4A16"}, "ascend") is None
    monkeypatch.setenv("VLLM_NPU_QUANT_TAKEOVER", "1")
    assert ask(served, "ascend") == "modelslim"


@pytest.mark.usefixtures("on_ascend")
def test_vllm_ascend_does_not_find_a_description_under_its_old_name() -> None:
    assert _detect(str(fixture("msmodelslim-qwen3-v0-w8a8")), None, None).method is None
    assert _detect(str(fixture("msmodelslim-qwen3-v0-w8a8-old")), None, None).method == "modelslim"
