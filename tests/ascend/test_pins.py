# SPDX-License-Identifier: Apache-2.0
"""Installing this package on an Ascend host moves no version of what is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.ascend.pins import BROUGHT, PINS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vllm_npu_quant", source / "vllm_npu_quant", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    add_stub(folder, "google_re2", "1.1")
    return found


def add_stub(folder: Path, name: str, version: str) -> None:
    """Put an empty wheel beside the others: a requirement that no Ascend host has yet, and that requires nothing itself."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def host(folder: Path, versions: dict[str, str]) -> Path:
    """The Python of a host that has these distributions, as far as pip asks."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name, version in versions.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("pip\n")
    return folder / "bin" / "python"


def would_install(python: Path, wheel: Path, report: Path) -> set[str]:
    """What pip would install or change; without an index, so that it fails where it would want anything else."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--quiet"]
    command += ["--no-index", "--find-links", str(wheel.parent)]
    # A PYTHONPATH with this project on it would make it installed already.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--report", str(report), str(wheel)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}


@pytest.mark.parametrize("release", PINS)
def test_installing_changes_nothing_that_is_there(release: str, wheel: Path, tmp_path: Path) -> None:
    python = host(tmp_path / "host", {**PINS[release], **BROUGHT, "vllm-ascend": release})
    assert would_install(python, wheel, tmp_path / "report.json") == {"vllm-npu-quant", "google-re2"}


def test_a_version_that_is_too_old_would_be_seen(wheel: Path, tmp_path: Path) -> None:
    python = host(tmp_path / "host", {**BROUGHT, "numpy": "1.21.0"})
    with pytest.raises(AssertionError, match="numpy"):
        would_install(python, wheel, tmp_path / "report.json")


def test_the_wheel_is_for_every_machine(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
