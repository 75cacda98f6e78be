# SPDX-License-Identifier: Apache-2.0
"""Environment variables: what each accepts, and what is said about anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_npu_quant import settings
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.settings import Settings

ON, OFF = ("1", "true", "TRUE", "Yes", " on "), ("0", "false", "False", "no", "OFF")


@pytest.mark.parametrize(
    ("name", "read", "accepted"),
    [
        (
            settings.MODE,
            settings.plugin_mode,
            {"": "auto", " Auto ": "auto", **dict.fromkeys(ON, "1"), **dict.fromkeys(OFF, "0")},
        ),
        (settings.TAKEOVER, settings.takeover, {"": False, **dict.fromkeys(ON, True), **dict.fromkeys(OFF, False)}),
        *(
            (name, settings.float_weights_mode, {"": "int8", " INT8 ": "int8", "w8a16": "w8a16", "bf16": "bf16"})
            for name in (settings.FLOAT_WEIGHTS, settings.FP8)
        ),
        (settings.W4A8, settings.w4a8_mode, {"": "int8", "int8": "int8", "W4A16": "w4a16"}),
        (settings.EMULATION, settings.emulation_mode, {"": "fast", "fast": "fast", "reference": "reference"}),
    ],
)
def test_values(name: str, read: Callable[[], Any], accepted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert read() == accepted[""]
    for value, meaning in accepted.items():
        monkeypatch.setenv(name, value)
        assert read() == meaning
        assert Settings.read()[1] == ()


@pytest.mark.parametrize(
    ("name", "read", "value", "expected"),
    [
        (settings.MODE, settings.plugin_mode, "maybe", "auto, 1 or 0"),
        (settings.TAKEOVER, settings.takeover, "auto", "0 or 1"),
        (settings.TAKEOVER, settings.takeover, "2", "0 or 1"),
        (settings.FP8, settings.float_weights_mode, "fp8", "int8, w8a16 or bf16"),
        (settings.FLOAT_WEIGHTS, settings.float_weights_mode, "1", "int8, w8a16 or bf16"),
        (settings.W4A8, settings.w4a8_mode, "true", "int8 or w4a16"),
        (settings.EMULATION, settings.emulation_mode, "Quick", "fast or reference"),
    ],
)
def test_other_values_are_refused(
    name: str, read: Callable[[], Any], value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(NpuQuantError) as caught:
        read()
    (finding,) = caught.value.findings
    assert finding.code == "bad-config"
    assert finding.message == f"{name} must be {expected}, not {value!r}"
    assert (finding.expected, finding.found) == (expected, value)
    assert finding.fix == f"unset {name}, or set it to {expected}"


def test_all_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Settings.read() == (Settings("auto", False, "int8", "int8", "safe", "fast"), ())
    monkeypatch.setenv(settings.TAKEOVER, "on")
    monkeypatch.setenv(settings.MODE, "perhaps")
    monkeypatch.setenv(settings.W4A8, "w4a4")
    found, findings = Settings.read()
    # What is invalid is read as the default, and everything is reported.
    assert found == Settings("auto", True, "int8", "int8", "safe", "fast")
    assert [finding.found for finding in findings] == ["perhaps", "w4a4"]


def test_the_earlier_name_is_read_unless_the_later_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.FP8, "bf16")
    assert Settings.read()[0].float_weights == "bf16"
    monkeypatch.setenv(settings.FLOAT_WEIGHTS, " ")
    assert settings.float_weights_mode() == "bf16"
    monkeypatch.setenv(settings.FLOAT_WEIGHTS, "w8a16")
    assert settings.float_weights_mode() == "w8a16"


def test_long_values_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.FP8, "x" * 1000)
    (finding,) = Settings.read()[1]
    assert len(finding.message) < 100
    assert len(finding.found) == 80


def test_the_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(settings.CACHE, raising=False)
    assert settings.cache_dir() == tmp_path / ".cache" / "vllm-npu-quant"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert settings.cache_dir() == tmp_path / "xdg" / "vllm-npu-quant"
    monkeypatch.setenv(settings.CACHE, "~/own")
    assert settings.cache_dir() == tmp_path / "own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(settings.CACHE, "beside")
    assert settings.cache_dir() == tmp_path / "beside"
    assert list(tmp_path.iterdir()) == []
