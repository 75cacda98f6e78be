# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the CANN libraries, so that the real torch_npu wheel can be imported where there is no NPU and no CANN.

torch_npu's libraries are linked against CANN (libascendcl.so and others). What they need is computed, not listed: the
sonames that the loader cannot find, and the symbols that neither the wheel nor this process provides. Each such symbol
becomes a C function that returns an error, so that nothing which needs a device can seem to work; only the calls that
torch_npu makes while it is imported get a sensible answer.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

#: ACL_ERROR_RT_DRV_INTERNAL_ERROR, an aclError.
FAILURE = 507899
BODIES = {
    "aclInit": "int aclInit(const char *path) { return 0; }",
    "aclFinalize": "int aclFinalize(void) { return 0; }",
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 0; return 0; }",
    "aclGetRecentErrMsg": "const char *aclGetRecentErrMsg(void) { return 0; }",
    "aclrtGetSocName": "const char *aclrtGetSocName(void) { return 0; }",
}
TOOLS = ("gcc", "nm", "readelf")


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _loads(soname: str) -> bool:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def build(package: Path, folder: Path, torch_library_folder: Path) -> list[Path]:
    """Compile stubs for the libraries in ``package`` into ``folder``. torch must have been imported.

    Returns:
        The stub libraries, to be loaded with RTLD_GLOBAL before torch_npu is imported: the loader then finds them by
        their soname.
    """
    libraries = sorted(path for path in package.rglob("*.so*") if "torchair" not in path.parts)
    own = {path.name for path in libraries}
    dynamic = _output("readelf", "-dW", *map(str, libraries))
    needed = set(re.findall(r"\(NEEDED\)\s+Shared library: \[([^\]]+)\]", dynamic)) - own
    sonames = sorted(soname for soname in needed if not _loads(soname))

    names = ("nm", "-D", "--without-symbol-versions", "--format=posix")
    defined = {line.split()[0] for line in _symbol_lines(*names, "--defined-only", libraries=libraries)}
    undefined = {line.split()[0] for line in _symbol_lines(*names, "--undefined-only", libraries=libraries, kind="U")}
    providers = [ctypes.CDLL(None), ctypes.CDLL("libstdc++.so.6")]
    providers += [ctypes.CDLL(str(torch_library_folder / name)) for name in ("libtorch.so", "libtorch_python.so")]
    missing = sorted(
        symbol for symbol in undefined - defined if not any(hasattr(provider, symbol) for provider in providers)
    )

    folder.mkdir(parents=True, exist_ok=True)
    functions = [BODIES.get(symbol, f"long {symbol}(void) {{ return {FAILURE}; }}") for symbol in missing]
    stubs = []
    for index, soname in enumerate(sonames):
        # One library holds all the symbols; the others only have to exist.
        source = folder / f"{soname}.c"
        source.write_text("\n".join(functions if index == 0 else []) + "\n")
        stub = folder / soname
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{soname}", "-o", str(stub), str(source)],
            check=True,
        )
        stubs.append(stub)
    return stubs


def _symbol_lines(*command: str, libraries: list[Path], kind: str = "") -> list[str]:
    """The lines of nm that name a symbol, of the given type letter if any (weak symbols may stay undefined)."""
    lines = _output(*command, *map(str, libraries)).splitlines()
    fields = [line.split() for line in lines if not line.endswith(":")]
    return [" ".join(row) for row in fields if len(row) >= 2 and (not kind or row[1] == kind)]
