# SPDX-License-Identifier: Apache-2.0
"""The process in which the real torch_npu is imported. Not a test module: the fixture ``report`` runs it once.

    python -m tests.conformance.real_process UNPACKED_WHEEL FOLDER

torch_npu patches torch and renames a backend, so nothing else may run here. FOLDER/report.json holds the schemas of the
real registry, which operators have a Meta kernel, the result of torch.library.opcheck for every case of
tests/emulation/op_cases.py (our CPU kernels under the real schemas, against the real Meta kernels), and the traces of all
methods on the device "npu". FOLDER/older.json has the schemas of the version that vllm-ascend pins.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulation"))

from op_cases import CASES, Case, check_operator

from tests.conformance import cann_stub
from vllm_npu_quant import emulation


def schemas() -> dict[str, str]:
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("npu::"):
            overload = f".{schema.overload_name}" if schema.overload_name else ""
            found[schema.name.removeprefix("npu::") + overload] = str(schema)
    return found


def without_a_device() -> None:
    """Let tensors say that they are on an NPU where there is none.

    Before it indexes or makes a tensor, torch asks the backend for the current device, and lets it initialise. Fake tensors
    on CUDA have the same need, for which torch puts a guard in place that does nothing (torch._C._ensureCUDADeviceGuardSet);
    for other backends there is no such function, so the guard of the meta device is put in place by hand.
    """
    kinds = torch._C._autograd.DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (int(kinds.PrivateUse1) + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    guards[int(kinds.PrivateUse1)] = guards[int(kinds.Meta)]
    torch.npu._lazy_init = lambda: None  # type: ignore[attr-defined]


def problem(check: Callable[[], Any]) -> str:
    """'' or what is wrong."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check(case: Case) -> str:
    return problem(lambda: check_operator(case))


def no_rows() -> dict[str, str]:
    """What the Meta kernels say about inputs without rows: '' or the error."""
    npu, meta = torch.ops.npu, torch.device("meta")
    x, quantized = (
        torch.empty(0, 64, dtype=torch.bfloat16, device=meta),
        torch.empty(0, 64, dtype=torch.int8, device=meta),
    )
    weight, scale = torch.empty(64, 32, dtype=torch.int8, device=meta), torch.empty(32, device=meta)
    rows, counts = torch.empty(0, device=meta), torch.empty(1, dtype=torch.int64, device=meta)
    options = {"group_list": counts, "group_type": 0, "split_item": 2}
    calls: dict[str, Callable[[], Any]] = {
        "npu_dynamic_quant": lambda: npu.npu_dynamic_quant(x),
        "npu_quant_matmul": lambda: npu.npu_quant_matmul(
            quantized, weight, scale, pertoken_scale=rows, output_dtype=torch.bfloat16
        ),
        "npu_weight_quant_batchmatmul": lambda: npu.npu_weight_quant_batchmatmul(x, weight, scale.bfloat16()),
        "npu_grouped_matmul": lambda: npu.npu_grouped_matmul([x], [x.new_empty(1, 64, 32)], **options),
    }
    return {name: problem(call) for name, call in calls.items()}


def main() -> None:
    wheel, folder = (Path(argument) for argument in sys.argv[1:3])
    stubs = cann_stub.build(wheel / "torch_npu", folder / "stub", Path(torch.__file__).parent / "lib")
    for stub in stubs:
        ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(wheel))
    import torch_npu

    assert emulation.register() is False, "the emulation must stand aside for the real torch_npu"
    real = schemas()
    faked = emulation.install_kernels(name for name in emulation.OPERATORS if name in real)
    without_a_device()
    from tests.conformance import mutations, npu_traces, older_schemas, traces
    from tests.conformance.method_cases import CASES as METHOD_CASES

    made, failed = [], {}
    for case in METHOD_CASES:
        try:
            made.append(npu_traces.on_the_npu(case))
        except Exception as error:
            failed[case.title] = [f"{type(error).__name__}: {error}"]
    broken = {}
    for name, mutation in mutations.MUTATIONS.items():
        with mutation.patch:
            try:
                broken[name] = npu_traces.on_the_npu(mutation.case).problems
            except Exception as error:
                broken[name] = [f"{type(error).__name__}: {error}"]
    older = older_schemas.define(json.loads((folder / "older.json").read_text()))
    content = {
        "version": torch_npu.__version__,
        "schemas": real,
        "faked": faked,
        "opcheck": {case.id: check(case) for case in CASES},
        "traces": traces.texts(made),
        "problems": failed | {trace.case.title: trace.problems for trace in made},
        "older": {
            trace.case.title: [text for call in trace.calls for text in older_schemas.refused(older, call)]
            for trace in made
        },
        "no_rows": no_rows(),
        "broken": broken,
    }
    (folder / "report.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
