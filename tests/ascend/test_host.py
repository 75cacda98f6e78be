# SPDX-License-Identifier: Apache-2.0
"""What is asked of vllm-ascend about the host, with its module in the state that a test wants."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from vllm_npu_quant.ascend import host


@pytest.fixture
def vllm_ascend(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    package = types.ModuleType("vllm_ascend")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "vllm_ascend", package)
    return package


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(values)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("vllm_ascend")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"__device_type__": "A2"}, "a2"),
        ({"__device_type__": "A3"}, "a3"),
        ({"__device_type__": "A5"}, "a5"),
        ({"__device_type__": "_310P"}, "310p"),
        ({"__device_type__": "A9"}, None),
        ({"__soc_version__": "ASCEND910B1"}, "a2"),
        ({"__soc_version__": "ascend310p3"}, "310p"),
        ({}, None),
    ],
)
def test_chip_is_what_vllm_ascend_was_built_for(
    values: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_npu_quant.inspection.chips import CHIPS

    _module(monkeypatch, "vllm_ascend._build_info", **values)
    assert host.chip() == expected
    assert expected is None or expected in CHIPS


def test_without_vllm_ascend_nothing_is_known() -> None:
    assert host.chip() is None
    assert host.ascend_config() is None
    assert host.nz_wanted() is True
    assert host.findings() == []


@pytest.mark.usefixtures("vllm_ascend")
def test_settings_before_vllm_ascend_has_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_ascend_config() -> Any:
        raise RuntimeError("Ascend config is not initialized.")

    _module(monkeypatch, "vllm_ascend.ascend_config", get_ascend_config=get_ascend_config)
    assert host.nz_wanted() is True


@pytest.mark.usefixtures("vllm_ascend")
@pytest.mark.parametrize(("mode", "expected"), [(0, False), (1, True), (2, True)])
def test_nz_mode(mode: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = types.SimpleNamespace(weight_nz_mode=mode)
    _module(monkeypatch, "vllm_ascend.ascend_config", get_ascend_config=lambda: config)
    assert host.nz_wanted() is expected
