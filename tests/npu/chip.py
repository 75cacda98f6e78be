# SPDX-License-Identifier: Apache-2.0
"""The cases of operators and methods on a device, and how far it may be from the references.

Nothing here knows whether the device is an NPU: the same functions run on the CPU over the emulation, so that the harness is
known to work before anybody has a device.

Tolerances, from the documents and Huawei's own tests of the operators: integers that come from rounding a float may differ
by 1, other integers not at all; floats by the rounding of their dtype and a part of their size (RELATIVE). Rows that no
expert has are not looked at, for the device does not write them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulation"))

from op_cases import CASES as OPERATOR_CASES
from op_cases import Case as OperatorCase
from oracles import FLOATS, Array, Expected, nibbles, ulp

from tests.conformance.method_cases import CASES as METHOD_CASES
from tests.conformance.method_cases import Case as MethodCase
from tests.conformance.method_cases import LinearCase
from tests.conformance.traces import input_shape
from vllm_npu_quant import emulation

#: Part of its size that a float may be off by.
RELATIVE = {"float32": 1e-4, "float16": 2.0**-9, "bfloat16": 2.0**-6}
#: Operators whose integers are rounded floats.
ROUNDING = {
    "npu_dequant_swiglu_quant",
    "npu_dynamic_quant",
    "npu_dynamic_quant_asymmetric",
    "npu_kronecker_quant",
    "npu_moe_init_routing_v2",
    "npu_quantize",
}
#: Relative error (of norms) of a layer's output on the device, by the bits of the activation.
LAYER = {0: 2.0**-7, 8: 2.0**-6, 4: 0.06}


def find_npu() -> tuple[torch.device | None, str]:
    """The device, or None and why."""
    try:
        import torch_npu  # noqa: F401
    except ImportError as error:
        return None, f"torch_npu cannot be imported: {error}"
    if not torch.npu.is_available():  # type: ignore[attr-defined]
        return None, "torch_npu finds no NPU"
    torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]
    if not emulation.register():
        # CPU kernels under torch_npu's own schemas: what methods are compared with.
        emulation.install_kernels()
    return torch.device("npu:0"), ""


def on(device: torch.device, value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)


def as_array(tensor: torch.Tensor) -> Array:
    name = str(tensor.dtype).removeprefix("torch.")
    host = tensor.cpu()
    exact = torch.float64 if host.dtype.is_floating_point else torch.int64
    return Array(host.to(exact).numpy(), name)


def differs(operator: str, found: Array, wanted: Expected) -> str:
    """'' or what is wrong with an output of the device."""
    if found.dtype != wanted.dtype or found.shape != np.shape(wanted.values):
        return f"{found.dtype}{list(found.shape)}, expected {wanted.dtype}{list(np.shape(wanted.values))}"
    written = np.broadcast_to(wanted.written, found.shape)
    values, expected = found.values, np.asarray(wanted.values)
    if wanted.dtype in FLOATS:
        finite = np.isfinite(expected)
        safe = np.where(finite, expected, 0.0)
        limit = ulp(wanted.dtype, safe) + np.asarray(wanted.slack) + RELATIVE[wanted.dtype] * np.abs(safe)
        # Sums of terms that cancel: a part of the largest result.
        limit = limit + RELATIVE[wanted.dtype] * np.abs(safe).max(initial=0.0) * 2.0**-4
        with np.errstate(invalid="ignore"):
            good = np.where(finite, np.abs(values - safe) <= limit, (values == expected) | np.isnan(values))
    elif operator in ROUNDING and wanted.dtype == "int32" and operator != "npu_moe_init_routing_v2":
        near = np.abs(nibbles(values) - nibbles(expected)) <= 1  # eight int4 in an int32
        good = near.reshape(*values.shape, 8).all(axis=-1)
    else:
        near = 1 if operator in ROUNDING and wanted.dtype == "int8" else 0
        good = np.abs(values - expected) <= np.maximum(np.asarray(wanted.slack), near)
    bad = written & ~good
    if not bad.any():
        return ""
    where = tuple(int(index) for index in np.argwhere(bad)[0])
    return f"{int(bad.sum())} of {bad.size}; first at {where}: {values[where]!r}, expected {expected[where]!r}"


def check_operator(case: OperatorCase, device: torch.device) -> list[str]:
    """Run a case on the device, and compare it with its oracle."""
    args, kwargs = on(device, case.arguments())
    result = case.overload(*args, **kwargs)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    expected = oracle(case)
    problems = [] if len(outputs) == len(expected) else [f"{len(outputs)} outputs, expected {len(expected)}"]
    for number, (found, wanted) in enumerate(zip(outputs, expected, strict=False)):
        text = differs(case.operator, as_array(found), wanted)
        problems += [f"output {number}: {text}"] if text else []
    return problems


def oracle(case: OperatorCase) -> list[Expected]:
    from tests.emulation.test_emulated_operators import oracle as expected

    return expected(case)


def random_inputs(spec: dict[str, Any], tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    made = {}
    for name, (dtype, shape) in spec.items():
        size = input_shape(shape, tokens)
        if name == "topk_ids":
            choices = [torch.randperm(4, generator=generator)[: size[1]] for _ in range(tokens)]
            made[name] = torch.stack(choices).to(dtype)
        elif name == "topk_weights":
            made[name] = torch.rand(size, generator=generator).to(dtype)
        else:
            made[name] = torch.randn(size, generator=generator).to(dtype)
    return made


def run_method(case: MethodCase, device: torch.device, tokens: int = 5) -> torch.Tensor:
    """prepare and apply on a device; the output on the host."""
    prepared = case.prepare(lambda tensor: tensor.to(device))
    layer = SimpleNamespace(**prepared.tensors)
    with torch.inference_mode():
        return prepared.apply(layer, **on(device, random_inputs(prepared.inputs, tokens))).cpu()


def check_method(case: MethodCase, device: torch.device) -> list[str]:
    """Compare a layer on the device with the same layer on the CPU, over the emulation."""
    found, wanted = run_method(case, device).double(), run_method(case, torch.device("cpu")).double()
    if found.shape != wanted.shape:
        return [f"shape {list(found.shape)}, expected {list(wanted.shape)}"]
    schemes = (case.scheme,) if isinstance(case, LinearCase) else (case.w13, case.w2)
    limit = max(LAYER[scheme.act] for scheme in schemes)
    error = float((found - wanted).norm() / wanted.norm())
    return [] if error <= limit else [f"relative error {error:.2g}, at most {limit:.2g} expected"]


def undocumented_first() -> list[MethodCase]:
    """The methods' cases, first those that call an operator as the documents do not say (rules.UNDOCUMENTED).

    The very first are experts with offsets per group, which npu_grouped_matmul's documents allow without groups only.
    """
    from tests.conformance.method_cases import MoeCase

    def rank(case: MethodCase) -> int:
        if isinstance(case, MoeCase):
            both = (case.w13, case.w2)
            if any(scheme.bits <= 4 and scheme.group and not scheme.act for scheme in both):
                return 0
            return 1 if any(scheme.act == 8 for scheme in both) else 2
        return 1 if (case.scheme.bits == 8 and not case.scheme.act) or case.scheme == METHOD_W4A8 else 2

    return sorted(METHOD_CASES, key=rank)


METHOD_W4A8 = next(case.scheme for case in METHOD_CASES if isinstance(case, LinearCase) and str(case.scheme) == "w4a8")

__all__ = [
    "OPERATOR_CASES",
    "check_method",
    "check_operator",
    "differs",
    "find_npu",
    "oracle",
    "run_method",
    "undocumented_first",
]
