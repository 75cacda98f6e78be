# SPDX-License-Identifier: Apache-2.0
"""Who serves a checkpoint on an Ascend host. vllm-ascend is not installed here: its known registry stands in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.configs import config_of_format
from tests.fixtures_index import fixture
from vllm_npu_quant import settings
from vllm_npu_quant.ascend import ownership
from vllm_npu_quant.ascend.ownership import serves_compressed_tensors, unserved
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
        group[part] = {**group[part], key: value} if key else value
    return config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"input_activations__symmetric": False}, False),
        ({"input_activations": None}, False),
        ({"weights__num_bits": 4}, False),
        ({"weights__strategy": "tensor"}, False),
        ({"weights__type": "float", "input_activations__type": "float"}, False),
        ({"input_activations__dynamic": False}, False),
        ({"input_activations__dynamic": False, "input_activations__strategy": "tensor"}, True),
    ],
)
def test_compressed_tensors(changes: dict[str, Any], expected: bool) -> None:
    assert serves_compressed_tensors(_config(**changes)) is expected


@pytest.mark.parametrize(
    "config", [{}, {"config_groups": []}, {"config_groups": {"g": "x"}}, {"config_groups": {"g": {}}}]
)
def test_strange_configs_are_not_claimed_for_vllm_ascend(config: dict[str, Any]) -> None:
    assert serves_compressed_tensors(config) is False


def test_what_a_registry_has_and_does_not_compute_as_said_is_not_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_registry", lambda: lambda scheme, layer: object())
    assert unserved({("W8A8", "linear"), ("W4A8_DYNAMIC", "moe")}) == ""
    assert unserved({("W4A8_DYNAMIC", "linear")}) == "W4A8_DYNAMIC for linear layers"
