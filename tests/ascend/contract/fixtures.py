# SPDX-License-Identifier: Apache-2.0
"""What the points share: the process, and models that are loaded once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ascend.contract.world import HOME, World, world


@pytest.fixture(scope="session")
def host() -> World:
    return world()


_models: dict[str, tuple[Any, Any]] = {}


def model_of(host: World, name: str, **options: Any) -> tuple[Any, Any]:
    """(config, model) of a fixture, loaded once."""
    if name not in _models:
        _models[name] = host.model(name, **options)
    return _models[name]


def modelslim(host: World, name: str) -> tuple[Any, Any]:
    return model_of(host, name, quantization="modelslim")


@pytest.fixture(scope="session")
def moe(host: World) -> tuple[Any, Any]:
    if HOME not in _models:
        from vllm.model_executor.model_loader import get_model

        _models[HOME] = (host.config, get_model(vllm_config=host.config))
    return _models[HOME]
