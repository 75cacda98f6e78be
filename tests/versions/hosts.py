# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that compare numbers as on other CPUs than this one, with the switches of torch, oneDNN and vLLM.

python -m tests.versions.hosts [HOST ...]

A CPU can only be made smaller: on one without AVX-512 the hosts "avx512" and "avx2" are the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.versions import smaller_cpu

__all__ = ["HOSTS", "Host", "main"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Host:
    """A host to pretend.

    Attributes:
        aten, onednn: the largest instruction sets of torch's own kernels and of oneDNN.
        lacking: beginnings of torch.cpu's names of what the CPU does not have.
        march: the CPU that C and C++ are compiled for; "" for no compiler.
    """

    aten: str
    onednn: str
    lacking: str
    march: str


HOSTS = {
    "this": Host("", "", "", "native"),
    "avx512": Host("avx512", "AVX512_CORE_VNNI", "amx_,avx512_bf16,avx512_fp16", "cascadelake"),
    "avx2": Host("avx2", "AVX2", "amx_,avx512_,avx_vnni,avx10", "haswell"),
    "no-compiler": Host("", "", "", ""),
    "none": Host("default", "SSE41", "amx_,avx512_,avx_vnni,avx10", ""),
}

TESTS = (
    "tests/emulation",
    "tests/methods",
    "tests/layouts",
    "tests/engine/test_linear_layers.py",
    "tests/cli/test_rank_memory.py::test_parameters",
    "tests/e2e/test_latent_attention.py",
    "tests/e2e/test_compressed_tensors.py::test_fp8_as_float_is_the_twin",
    *(
        f"tests/e2e/{file}.py::test_agrees_with_its_float_twin[{name}]"
        for file, name in (
            ("test_modelslim", "msmodelslim-qwen3-w8a8"),
            ("test_modelslim", "msmodelslim-qwen3-w8a8-dynamic"),
            ("test_modelslim_int4", "msmodelslim-qwen3-w4a8-dynamic"),
            ("test_compressed_tensors", "ct-qwen3-w8a8-dynamic"),
            ("test_compressed_tensors", "ct-qwen3-w4a16-g128-asym"),
            ("test_compressed_tensors", "ct-qwen3-fp8-block"),
            ("test_packed", "awq-qwen3-autoawq-g128"),
            ("test_packed", "gptq-qwen3-gptqmodel-w4g32-sym-descact"),
            ("test_packed", "autoround-qwen3-mixed"),
            ("test_moe", "msmodelslim-qwen3moe-w8a8-dynamic"),
        )
    ),
)


def environment(host: Host, scratch: Path) -> dict[str, str]:
    """The environment variables of a host; ``scratch`` holds its compilers and what is built."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), smaller_cpu.VARIABLE: host.lacking}
    env |= {"ATEN_CPU_CAPABILITY": host.aten} if host.aten else {}
    env |= {"ONEDNN_MAX_CPU_ISA": host.onednn} if host.onednn else {}
    if host.march == "native":
        return env
    env["XDG_CACHE_HOME"] = str(scratch / "cache")
    if not host.march:
        return {name: value for name, value in env.items() if name not in ("CC", "CXX")} | {
            "PATH": _without_compilers(scratch)
        }
    for variable, names in (("CC", ("gcc", "clang", "cc")), ("CXX", ("g++", "clang++", "c++"))):
        compiler = next(filter(None, map(shutil.which, names)), None)
        if compiler:
            wrapper = scratch / variable.lower()
            wrapper.write_text(f'#!/bin/bash\nexec {compiler} "${{@/-march=native/-march={host.march}}}"\n')
            wrapper.chmod(0o700)
            env[variable] = str(wrapper)
    return env


def _without_compilers(scratch: Path) -> str:
    """A PATH with links to everything but compilers."""
    folder = scratch / "bin"
    folder.mkdir()
    for place in os.get_exec_path():
        for path in Path(place).glob("*"):
            link, words = folder / path.name, ("gcc", "g++", "clang", "c++")
            if path.name != "cc" and not any(word in path.name for word in words) and not link.is_symlink():
                link.symlink_to(path)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="*", metavar="HOST", help=f"of {', '.join(HOSTS)}; default: all")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="pytest's names of what runs")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.hosts if name not in HOSTS]
    if unknown:
        parser.error(f"no such host: {', '.join(unknown)}; there are {', '.join(HOSTS)}")
    failed = []
    for name in arguments.hosts or HOSTS:
        print(f"==> as on the host {name}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", smaller_cpu.__name__]
            env = environment(HOSTS[name], Path(scratch))
            if subprocess.run([*command, *arguments.tests], cwd=ROOT, env=env).returncode:
                failed.append(name)
    sys.exit(f"failed as on {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
