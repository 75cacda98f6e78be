# SPDX-License-Identifier: Apache-2.0
"""The process in which the real torch_npu is imported. Not a test module: test_real_wheel.py runs it once.

    python real_process.py UNPACKED_WHEEL STUB_FOLDER REPORT.json

torch_npu patches torch and renames a backend, so nothing else may run here. The report holds the schemas of the real
registry, which operators have a Meta kernel, and the result of torch.library.opcheck for every case of
tests/emulation/op_cases.py: our CPU kernels under the real schemas, against the real Meta kernels.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "emulation"), str(HERE.parents[1])]

import cann_stub  # noqa: E402
from op_cases import CASES, Case, check_operator  # noqa: E402

from vllm_npu_quant import emulation  # noqa: E402


def schemas() -> dict[str, str]:
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("npu::"):
            overload = f".{schema.overload_name}" if schema.overload_name else ""
            found[schema.name.removeprefix("npu::") + overload] = str(schema)
    return found


def check(case: Case) -> str:
    """'' or what is wrong."""
    try:
        check_operator(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    wheel, stub_folder, report = (Path(argument) for argument in sys.argv[1:4])
    stubs = cann_stub.build(wheel / "torch_npu", stub_folder, Path(torch.__file__).parent / "lib")
    for stub in stubs:
        ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(wheel))
    import torch_npu

    assert emulation.register() is False, "the emulation must stand aside for the real torch_npu"
    real = schemas()
    faked = emulation.install_kernels(name for name in emulation.OPERATORS if name in real)
    content = {
        "version": torch_npu.__version__,
        "schemas": real,
        "faked": faked,
        "opcheck": {case.id: check(case) for case in CASES},
    }
    report.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
