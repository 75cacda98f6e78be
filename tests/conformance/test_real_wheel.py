# SPDX-License-Identifier: Apache-2.0
"""The emulation against the real torch_npu: its schemas, and its Meta kernels.

The wheel is downloaded with pip into a cache folder of its own (VLLM_NPU_QUANT_CACHE, else ~/.cache/vllm-npu-quant) and
never installed. With a C toolchain and a torch of the same minor version it is imported in a process of its own, over
stand-ins for CANN; otherwise the schemas come from a YAML file that the wheel ships.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cann_stub
import pytest
import torch
from op_cases import CASES, Case

from vllm_npu_quant import emulation

pytestmark = pytest.mark.wheel

VERSION = "2.13.0"
#: The version that vllm-ascend pins.
OLDER_VERSION = "2.10.0.post4"
FUNCTIONS_FILE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def cache_folder() -> Path:
    configured = os.environ.get("VLLM_NPU_QUANT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "vllm-npu-quant"


def downloaded_wheel(version: str) -> Path:
    """The wheel for this interpreter and machine; the test is skipped only if it cannot be had."""
    folder = cache_folder() / "wheels"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    pattern = f"torch_npu-{version}-{tag}-*{platform.machine()}.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder), f"torch_npu=={version}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"pip cannot download torch_npu {version}: {reason}")
    return next(iter(folder.glob(pattern)))


def unpacked(wheel: Path) -> Path:
    folder = cache_folder() / wheel.stem
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            assert folder.exists()
    return folder


def schemas_in_yaml(wheel: Path) -> dict[str, str]:
    """The schemas as the wheel's YAML file states them, in the registry's form.

    torch_npu's code generator renames the argument ``self`` to ``input`` when it registers an operator.
    """
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(FUNCTIONS_FILE).decode()
    found = {}
    for line in re.findall(r"^\s*-?\s*func: (.+)$", text, flags=re.MULTILINE):
        name = line.partition("(")[0]
        if name in emulation.OPERATORS:
            found[name] = str(torch._C.parse_schema("npu::" + re.sub(r"\bself\b", "input", line.strip("'\""))))
    return found


def cannot_import() -> str:
    """Why the wheel cannot be imported here, or ''."""
    if torch.__version__.split(".")[:2] != VERSION.split(".")[:2]:
        return f"torch_npu {VERSION} does not load on torch {torch.__version__}"
    missing = cann_stub.missing_tools()
    return f"no {', '.join(missing)} to build stand-ins for CANN" if missing else ""


@pytest.fixture(scope="session")
def wheel() -> Path:
    return downloaded_wheel(VERSION)


@pytest.fixture(scope="session")
def report(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process with the real torch_npu found."""
    reason = cannot_import()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("real")
    script = Path(__file__).with_name("real_process.py")
    command = [sys.executable, str(script), str(unpacked(wheel)), str(folder / "stub"), str(folder / "report.json")]
    # torch would import an installed backend by itself; this process imports it from the cache.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="session")
def real_schemas(wheel: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    return schemas_in_yaml(wheel) if cannot_import() else request.getfixturevalue("report")["schemas"]


@pytest.mark.parametrize("name", emulation.OPERATORS)
def test_schema_is_the_real_one(name: str, real_schemas: dict[str, str]) -> None:
    assert emulation.OPERATORS[name].schema == real_schemas[name]


def test_report_is_of_the_real_torch_npu(report: dict[str, Any]) -> None:
    assert report["version"].split("+")[0] == VERSION
    assert len(report["schemas"]) > 400


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_real_meta_kernel_agrees(case: Case, report: dict[str, Any]) -> None:
    problem = report["opcheck"][case.id]
    if case.meta_differs:
        assert re.search(case.meta_differs, problem), problem or "the Meta kernel takes it now: drop meta_differs"
    else:
        assert problem == ""


def test_operators_without_a_real_meta_kernel(report: dict[str, Any]) -> None:
    """Their shapes are checked against nothing but the documents."""
    without = {"npu_format_cast", "get_npu_format", "npu_convert_weight_to_int4pack"}
    assert set(report["faked"]) == without & set(emulation.OPERATORS)


def test_yaml_file_agrees_with_the_registry(wheel: Path, report: dict[str, Any]) -> None:
    """So that the schemas can be trusted where the wheel cannot be imported."""
    stated = schemas_in_yaml(wheel)
    assert set(stated) == set(emulation.OPERATORS)
    assert {name: report["schemas"][name] for name in stated} == stated


#: Operators whose schema differs in the version that vllm-ascend pins, and what callers have to mind.
DIFFERENCES = {
    "npu_dynamic_mx_quant": "no max_low_bound",
    "npu_grouped_matmul_swiglu_quant_v2": "dequant_dtype defaults to 0, not 6: pass it",
    "npu_moe_finalize_routing": "no k",
    "npu_moe_gating_top_k": "no input_ids, tid2eid",
}


def test_older_wheel_differs_only_where_known() -> None:
    older = schemas_in_yaml(downloaded_wheel(OLDER_VERSION))
    assert set(older) == set(emulation.OPERATORS)
    different = {name for name, schema in older.items() if schema != emulation.OPERATORS[name].schema}
    assert different == set(DIFFERENCES) & set(emulation.OPERATORS)
