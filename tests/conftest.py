# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

# One process runs many engines: the import of vLLM costs more than a tiny engine. Set before vllm is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# vLLM has torch compile what ranks log-probabilities; without a C++ compiler it has to run as it is.
if not shutil.which(os.environ.get("CXX") or "g++"):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Several processes share the cores: threads that wait for each other only slow them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# The reference for what runs here must not depend on what a developer has set.
for name in ("VLLM_PLUGINS", *(name for name in os.environ if name.startswith("VLLM_NPU_QUANT"))):
    os.environ.pop(name, None)

# Hosts differ in speed, and other work may run on them. Hosts with a chip may be without Hypothesis.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("any host", deadline=None)
    settings.load_profile("any host")

#: Two-rank engine runs take 20 to 30 s each. One or two for each kind of sharding run by default, all with --all-ranks.
DEFAULT_TWO_RANKS = (
    "[msmodelslim-qwen3-w8a8]",
    "[msmodelslim-qwen3fp32-w8a8-normbias]",
    "[msmodelslim-qwen3-w4a8-dynamic]",
    "[msmodelslim-qwen3-w4a4-flatquant]",
    "[ct-qwen3-w4a16-g128-asym]",
    "[ct-qwen3-w8a8-static-asym]",
    "[ct-qwen3-fp8-block]",
    "[gptq-qwen3-gptqmodel-w4g32-sym-descact]",
    "[awq-qwen3-autoawq-g128]",
    "[msmodelslim-qwen3moe-w8a8-dynamic-tensor_parallel]",
    "[msmodelslim-qwen3moe-w8a8-dynamic-expert_parallel]",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-ranks", action="store_true", help="run every two-rank engine test, not one for each kind, and variants"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-ranks") or config.args_source is pytest.Config.ArgsSource.ARGS:
        return
    left_out = [
        item
        for item in items
        if item.get_closest_marker("variant")
        or (item.get_closest_marker("tp2") and "[" in item.name and not item.name.endswith(DEFAULT_TWO_RANKS))
    ]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
