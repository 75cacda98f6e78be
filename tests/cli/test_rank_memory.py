# SPDX-License-Identifier: Apache-2.0
"""The bytes that plan counts are the bytes of the parameters that vLLM's models have after loading, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures_index import fixture, fixtures, shared, shared_checkpoints
from vllm_npu_quant.inspection import inspect, plan
from vllm_npu_quant.inspection.parallel import sharded_axis
from vllm_npu_quant.layouts.tables import Axis

pytest.importorskip("vllm")

#: One of every method class and every kind of fused layer; with --all-ranks, all checkpoints.
NAMES = (
    "msmodelslim-qwen3-w8a8",
    "msmodelslim-qwen3-w4a8-dynamic",
    "msmodelslim-qwen3-w4a4-dynamic",
    "ct-qwen3-w4a16-g128-asym",
    "ct-qwen3-fp8-block",
    "gptq-qwen3-gptqmodel-w4g32-sym-descact",
    "autoround-qwen3-mixed",
    "msmodelslim-qwen3moe-w8a8-dynamic",
)
#: Headers do not tell that these zero points are not 0: one more number per output than plan counts.
IN_VALUES = {"msmodelslim-qwen3-v0-w4a16-asym": 2 * (512 + 256 + 1024 + 256) * 2}
ALL = sorted({path.name: path for path in (*shared_checkpoints(), *fixtures())}.values())


def test_parameters(request: pytest.FixtureRequest) -> None:
    """One rank, in this process. The differences of all folders at once."""
    import torch
    from vllm.model_executor.model_loader import get_model

    from tests.cli.rank_memory import held, kv_bytes
    from tests.engine.world import engine_config, world

    folders = [fixture(name) for name in NAMES]
    if request.config.getoption("--all-ranks"):
        folders = list(ALL)
    counted, real = {}, {}
    for folder in folders:
        config = engine_config(folder)
        with world(config), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
            model = get_model(vllm_config=config)
        made = plan(folder, device="a2")
        counted[folder.name] = (made.weight_bytes, made.kv_bytes_per_token)
        real[folder.name] = (sum(held(model).values()) - IN_VALUES.get(folder.name, 0), kv_bytes(config))
    assert counted == real


RANKS = {
    "linear": (1, NAMES[:-1]),
    "experts": (1, (NAMES[-1],)),
    "expert_parallel": (2, (NAMES[-1],)),
    "shared": (
        1,
        (
            "awq-qwen3-autoawq-g128",
            "autoround-qwen3-lmhead",
            "msmodelslim-qwen3-w4a4-flatquant",
            "msmodelslim-qwen3moe-moe-w4a8",
            "ct-qwen3moe-w4a16-g128",
            "ct-dsv3-w8a8-dynamic",
        ),
    ),
}


@pytest.mark.tp2
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", RANKS)
def test_two_ranks(kind: str, tmp_path: Path) -> None:
    """Two processes, each with its half: plan counts the bytes of the rank that holds the most, which is the first."""
    experts, names = RANKS[kind]
    folders = [shared(name) if kind == "shared" else fixture(name) for name in names]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cli.rank_memory", str(rank), "2", str(experts), str(tmp_path / "store")]
            + [str(folder) for folder in folders],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # vLLM names its shared memory after the identifier, which an engine would set.
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_DIST_IDENT": f"rank-memory-{os.getpid()}"},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=1200) for process in processes]
    counted = []
    for folder in folders:
        made = plan(folder, device="a2", tp=2, ep=experts)
        counted.append((folder.name, made.weight_bytes, made.kv_bytes_per_token))
    ranks: list[list[dict[str, int]]] = []
    for output, errors in outputs:
        lines = [json.loads(line[5:]) for line in output.splitlines() if line.startswith("HELD ")]
        assert len(lines) == len(folders), errors[-3000:]
        assert [kv for _, kv in lines] == [kv for _, _, kv in counted]
        ranks.append([held for held, _ in lines])
    first, second = ranks
    assert [(name, weights) for name, weights, _ in counted] == [
        (folder.name, sum(held.values())) for folder, held in zip(folders, first, strict=True)
    ]
    for folder, mine, others in zip(folders, first, second, strict=True):
        assert mine.keys() == others.keys()
        # The results of row-parallel layers are summed: a term that does not depend on the input is added on the first rank,
        # and on another only if its share of the rounding is not 0.
        once = {
            layer.name: 4 * layer.outputs
            for layer in inspect(folder).layers
            if layer.method == "W8A8StaticLinear" and sharded_axis(layer) is Axis.IN
        }
        more = {name: size - others.get(name, 0) for name, size in mine.items() if size != others.get(name)}
        assert more.items() <= once.items()
