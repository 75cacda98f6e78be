# SPDX-License-Identifier: Apache-2.0
"""The real torch_npu wheels: where they are, and what they say of themselves without being imported."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conformance import cann_stub
from vllm_npu_quant import emulation

VERSION = "2.13.0"
#: The version that vllm-ascend pins.
OLDER_VERSION = "2.10.0.post4"
FUNCTIONS_FILE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def cache_dir() -> Path:
    configured = os.environ.get("VLLM_NPU_QUANT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "vllm-npu-quant"


def downloaded_wheel(version: str) -> Path:
    """The wheel for this interpreter and machine; the test is skipped only if it cannot be had."""
    folder = cache_dir() / "wheels"
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
    folder = cache_dir() / wheel.stem
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
