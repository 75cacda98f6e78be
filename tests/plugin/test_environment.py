# SPDX-License-Identifier: Apache-2.0
"""The plugin's environment variables in vLLM's own table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vllm import envs
from vllm.platforms import current_platform

from vllm_npu_quant import plugin, settings


def validate(hard_fail: bool = True) -> None:
    if hasattr(envs, "validate_environ"):  # before 0.31
        envs.validate_environ(hard_fail)
    else:
        current_platform.validate_environ(hard_fail)


@pytest.mark.parametrize("mode", ["auto", "0"])
def test_vllm_does_not_refuse_them(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.VARIABLES:
        monkeypatch.delitem(envs.environment_variables, name, raising=False)
    # An engine that ran in this process leaves variables that vLLM does not know itself.
    for name in [name for name in os.environ if name.startswith("VLLM_") and name not in envs.environment_variables]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(settings.MODE, mode)
    with pytest.raises(ValueError, match=settings.MODE):
        validate()
    plugin.register()  # where the plugin is off, too
    validate()
    monkeypatch.setenv("VLLM_NPU_QUANT_NO_SUCH", "1")
    with pytest.raises(ValueError, match="NO_SUCH"):
        validate()


def test_they_are_in_the_key_of_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    before = envs.compile_factors()
    monkeypatch.setenv(settings.W4A8, "w4a16")
    assert envs.compile_factors() != before


def test_every_variable_of_the_package_is_one_of_them() -> None:
    import re

    package = Path(plugin.__file__).parent
    named = set(re.findall(r"\"(VLLM_NPU_QUANT\w*)\"", "".join(path.read_text() for path in package.rglob("*.py"))))
    assert named == set(settings.VARIABLES)
