# SPDX-License-Identifier: Apache-2.0
"""ModelSlim checkpoints of 4-bit weights, sparse weights and FP8 through the real engine.

Int4 activations cost so much accuracy that a limit on the error says little: those runs are compared with a float simulation
of the same scheme in the same engine.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.e2e.simulation import simulated_int4_activations
from tests.e2e.twins import make_twin
from tests.e2e.yardstick import Run, relative_error, run
from tests.fixtures_index import FIXTURES, fixture, shared
from vllm_npu_quant.errors import NpuQuantError

pytestmark = pytest.mark.engine

#: Checkpoint -> (limit of the relative error, method classes of its eight Linear layers).
CASES = {
    "msmodelslim-qwen3-v0-w4a16-asym": (0.02, {"WeightOnlyLinear": 8}),
    "msmodelslim-qwen3-v0-w4a16-g64": (0.02, {"WeightOnlyLinear": 8}),
    "msmodelslim-qwen3-v0-w4a16-old": (0.02, {"WeightOnlyLinear": 8}),
    "msmodelslim-qwen3fp32-w8a16-g128": (0.02, {"WeightOnlyLinear": 8}),
    "msmodelslim-qwen3-w4a8-dynamic": (0.06, {"W4A8DynamicLinear": 8}),
    "msmodelslim-qwen3-v0-w4a8-g64": (0.06, {"W4A8DynamicLinear": 8}),
    "msmodelslim-qwen3-v0-w4a8-g64-old": (0.06, {"W4A8DynamicLinear": 8}),
    "msmodelslim-qwen3-wfp8afp8": (0.06, {"W8A8DynamicLinear": 8}),
    "msmodelslim-qwen3-w8a8c8": (0.06, {"W8A8DynamicLinear": 8}),
    "msmodelslim-qwen3-v0-w8a8s": (0.12, {"W8A8StaticLinear": 8}),
}
INT4_ACTIVATIONS = {
    "msmodelslim-qwen3-w4a4-dynamic": {"W4A4DynamicLinear": 8},
    "msmodelslim-qwen3-w4a4-laos": {"W4A4DynamicLinear": 2, "W8A8DynamicLinear": 6},
    "msmodelslim-qwen3-w4a4-flatquant": {"W4A4DynamicLinear": 8},
}


def checkpoint(name: str) -> Path:
    return fixture(name) if (FIXTURES / name).is_dir() else shared(name)


@pytest.fixture(scope="module")
def twin_run(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def twin(name: str) -> Run:
        folder = make_twin(checkpoint(name), tmp_path_factory.mktemp("twin") / name)
        return run(folder, plugin=False)

    return twin


@cache
def quantized(name: str) -> Run:
    return run(checkpoint(name))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_its_float_twin(name: str, twin_run) -> None:
    limit, methods = CASES[name]
    result = quantized(name)
    assert result.methods == methods
    assert relative_error(result, twin_run(name)) <= limit


@pytest.mark.parametrize("name", INT4_ACTIVATIONS)
def test_int4_activations_are_as_good_as_their_simulation(name: str, twin_run) -> None:
    result = quantized(name)
    assert result.methods == INT4_ACTIVATIONS[name]
    with simulated_int4_activations():
        simulated = relative_error(run(checkpoint(name)), twin_run(name))
    assert relative_error(result, twin_run(name)) <= 1.1 * simulated


@pytest.mark.tp2
@pytest.mark.parametrize("name", [*CASES, *INT4_ACTIVATIONS])
def test_two_ranks_agree_with_the_twin_too(name: str, twin_run) -> None:
    """Packed weights are cut at whole bytes, groups at the ranks' border; FlatQuant's matrices want the inputs of both."""
    both = run(checkpoint(name), tensor_parallel_size=2)
    if name in CASES:
        assert relative_error(both, twin_run(name)) <= CASES[name][0]
    else:
        assert relative_error(both, twin_run(name)) <= 1.1 * relative_error(quantized(name), twin_run(name))


def test_w4a8_runs_weight_only_where_the_user_asks_for_it(twin_run, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "msmodelslim-qwen3-w4a8-dynamic"
    monkeypatch.setenv("VLLM_NPU_QUANT_W4A8", "w4a16")
    result = run(checkpoint(name))
    assert result.methods == {"WeightOnlyLinear": 8}
    assert {group.scheme for group in result.groups if group.method == "WeightOnlyLinear"} == {"W4A8_DYNAMIC as W4A16"}
    assert relative_error(result, twin_run(name)) <= 0.02


def test_another_value_of_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_W4A8", "w4a4")
    with pytest.raises(NpuQuantError, match="must be int8 or w4a16") as caught:
        run(checkpoint("msmodelslim-qwen3-w4a8-dynamic"))
    assert caught.value.codes == ("bad-config",)


@pytest.mark.parametrize("name", ["msmodelslim-qwen3-w8a8-mxfp8", "msmodelslim-qwen3-w4a4-mxfp4"])
def test_formats_of_other_chips_run_as_int8(name: str, twin_run) -> None:
    result = run(checkpoint(name))
    assert result.methods == {"W8A8DynamicLinear": 8}
    assert 0.001 <= relative_error(result, twin_run(name)) <= 0.06
