# SPDX-License-Identifier: Apache-2.0
"""AWQ, GPTQ and AutoRound checkpoints through the real engine, against their float twins."""

from __future__ import annotations

from functools import cache

import pytest

from tests.e2e.twins import make_twin
from tests.e2e.yardstick import Run, relative_error, run
from tests.fixtures_index import fixture, shared

pytestmark = pytest.mark.engine

#: Checkpoints of tests/fixtures, and of the larger set that may lie beside the repository.
OWN = (
    "awq-qwen3-autoawq-g128",
    "gptq-qwen3-w4g128-asym",
    "gptq-qwen3-gptqmodel-w4g32-sym-descact",
    "autoround-qwen3-mixed",
)
BESIDE = (
    "awq-qwen3-g32",
    "gptq-qwen3-w3g128-sym",
    "gptq-qwen3-w8g128-sym",
    "gptq-qwen3-gptqmodel-w4g64-v2",
    "autoround-qwen3-lmhead",
    "autoround-qwen3-w4g128-asym",
)
LIMIT = 0.02


@pytest.fixture(scope="module")
def twin_run(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def twin(name: str) -> Run:
        folder = fixture(name) if name in OWN else shared(name)
        return run(make_twin(folder, tmp_path_factory.mktemp("twin") / name), plugin=False)

    return twin


@pytest.mark.parametrize("name", [*OWN, *BESIDE])
def test_agrees_with_its_float_twin(name: str, twin_run) -> None:
    result = run(fixture(name) if name in OWN else shared(name))
    assert result.methods["WeightOnlyLinear"] >= 6
    # The operator dequantizes and rounds as the twin did: the two may be equal to the last bit.
    assert relative_error(result, twin_run(name)) <= LIMIT


@pytest.mark.parametrize(
    ("name", "quantization", "method"),
    [
        ("awq-qwen3-autoawq-g128", "awq", "npu_awq"),
        ("awq-qwen3-autoawq-g128", "npu_awq", "npu_awq"),
        ("awq-qwen3-autoawq-g128", None, "npu_awq"),
        ("gptq-qwen3-w4g128-asym", "gptq", "npu_gptq"),
        ("autoround-qwen3-mixed", "auto-round", "npu_auto_round"),
    ],
)
def test_the_frameworks_name_or_ours_or_none(name: str, quantization: str | None, method: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(fixture(name)), quantization=quantization).create_model_config()
    assert config.quantization == method


@pytest.mark.tp2
@pytest.mark.parametrize("name", ["gptq-qwen3-gptqmodel-w4g32-sym-descact", "awq-qwen3-autoawq-g128"])
def test_two_ranks_agree_with_the_twin_too(name: str, twin_run) -> None:
    both = run(fixture(name), tensor_parallel_size=2)
    assert relative_error(both, twin_run(name)) <= LIMIT
