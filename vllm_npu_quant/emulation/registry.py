# SPDX-License-Identifier: Apache-2.0
"""The table of emulated operators, and their registration in the namespace ``npu``."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_npu_quant.emulation import activation, calls, grouped, grouped_swiglu, matmul, mx, norm, quantize, routing
from vllm_npu_quant.emulation.schemas import SCHEMAS

logger = logging.getLogger(__name__)

__all__ = [
    "CALLED_MOST",
    "MODE_VARIABLE",
    "NAMESPACE",
    "OPERATORS",
    "Operator",
    "build_kernels",
    "install_kernels",
    "is_emulated",
    "mode",
    "register",
]

NAMESPACE = "npu"
#: ``reference``: plain torch, obviously right. ``fast``, the default: the same numbers by the CPU's own instructions.
MODE_VARIABLE = "VLLM_NPU_QUANT_EMULATION"
MODES = ("fast", "reference")

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """One operator of torch_npu.

    Attributes:
        schema: the text that torch_npu registers.
        reference: the CPU kernel in plain torch.
        fake: shapes and dtypes only, with the same argument rules.
        fast: a CPU kernel with the same results, where one pays; else the reference serves.
    """

    schema: str
    reference: Kernel
    fake: Kernel
    fast: Kernel | None = None

    def kernel(self, mode: str) -> Kernel:
        return self.fast if mode == "fast" and self.fast is not None else self.reference


def _table(kernels: dict[str, tuple[Kernel, ...]]) -> dict[str, Operator]:
    return {name: Operator(SCHEMAS[name], *functions) for name, functions in kernels.items()}


#: Name (with the overload after a dot) -> operator.
OPERATORS: dict[str, Operator] = _table(
    {
        "npu_quantize": (quantize.npu_quantize, quantize.npu_quantize_fake),
        "npu_dynamic_quant": (
            quantize.npu_dynamic_quant,
            quantize.npu_dynamic_quant_fake,
            quantize.npu_dynamic_quant_fast,
        ),
        "npu_dynamic_quant_asymmetric": (
            quantize.npu_dynamic_quant_asymmetric,
            quantize.npu_dynamic_quant_asymmetric_fake,
        ),
        "npu_kronecker_quant": (quantize.npu_kronecker_quant, quantize.npu_kronecker_quant_fake),
        "npu_anti_quant": (quantize.npu_anti_quant, quantize.npu_anti_quant_fake),
        "npu_trans_quant_param": (quantize.npu_trans_quant_param, quantize.npu_trans_quant_param_fake),
        "npu_quant_matmul": (matmul.npu_quant_matmul, matmul.npu_quant_matmul_fake, matmul.npu_quant_matmul_fast),
        "npu_weight_quant_batchmatmul": (
            matmul.npu_weight_quant_batchmatmul,
            matmul.npu_weight_quant_batchmatmul_fake,
            matmul.npu_weight_quant_batchmatmul_fast,
        ),
        "npu_convert_weight_to_int4pack": (
            matmul.npu_convert_weight_to_int4pack,
            matmul.npu_convert_weight_to_int4pack_fake,
        ),
        "npu_grouped_matmul": (
            grouped.npu_grouped_matmul,
            grouped.npu_grouped_matmul_fake,
            grouped.npu_grouped_matmul_fast,
        ),
        "npu_grouped_matmul.List": (
            grouped.npu_grouped_matmul_list,
            grouped.npu_grouped_matmul_list_fake,
            grouped.npu_grouped_matmul_list_fast,
        ),
        "npu_format_cast": (matmul.npu_format_cast, matmul.npu_format_cast_fake),
        "get_npu_format": (matmul.get_npu_format, matmul.get_npu_format_fake),
        "npu_rms_norm": (norm.npu_rms_norm, norm.npu_rms_norm_fake),
        "npu_add_rms_norm": (norm.npu_add_rms_norm, norm.npu_add_rms_norm_fake),
        "npu_swiglu": (activation.npu_swiglu, activation.npu_swiglu_fake),
        "npu_swiglu_quant": (activation.npu_swiglu_quant, activation.npu_swiglu_quant_fake),
        "npu_dequant_swiglu_quant": (activation.npu_dequant_swiglu_quant, activation.npu_dequant_swiglu_quant_fake),
        "npu_add_rms_norm_quant": (norm.npu_add_rms_norm_quant, norm.npu_add_rms_norm_quant_fake),
        "npu_dynamic_mx_quant": (mx.npu_dynamic_mx_quant, mx.npu_dynamic_mx_quant_fake),
        "npu_grouped_matmul_swiglu_quant": (
            grouped_swiglu.npu_grouped_matmul_swiglu_quant,
            grouped_swiglu.npu_grouped_matmul_swiglu_quant_fake,
            grouped_swiglu.npu_grouped_matmul_swiglu_quant_fast,
        ),
        "npu_grouped_matmul_swiglu_quant_v2": (
            grouped_swiglu.npu_grouped_matmul_swiglu_quant_v2,
            grouped_swiglu.npu_grouped_matmul_swiglu_quant_v2_fake,
            grouped_swiglu.npu_grouped_matmul_swiglu_quant_v2_fast,
        ),
        "npu_moe_init_routing": (routing.npu_moe_init_routing, routing.npu_moe_init_routing_fake),
        "npu_moe_init_routing_v2": (routing.npu_moe_init_routing_v2, routing.npu_moe_init_routing_v2_fake),
        "npu_moe_compute_expert_tokens": (
            routing.npu_moe_compute_expert_tokens,
            routing.npu_moe_compute_expert_tokens_fake,
        ),
        "npu_moe_finalize_routing": (routing.npu_moe_finalize_routing, routing.npu_moe_finalize_routing_fake),
        "npu_moe_token_permute": (routing.npu_moe_token_permute, routing.npu_moe_token_permute_fake),
        "npu_moe_token_unpermute": (routing.npu_moe_token_unpermute, routing.npu_moe_token_unpermute_fake),
        "npu_moe_gating_top_k": (routing.npu_moe_gating_top_k, routing.npu_moe_gating_top_k_fake),
        "npu_moe_gating_top_k_softmax": (
            routing.npu_moe_gating_top_k_softmax,
            routing.npu_moe_gating_top_k_softmax_fake,
        ),
        "npu_moe_re_routing": (routing.npu_moe_re_routing, routing.npu_moe_re_routing_fake),
    }
)

#: Products and quantization: the operators that layers call most.
CALLED_MOST = (
    "npu_dynamic_quant",
    "npu_quant_matmul",
    "npu_weight_quant_batchmatmul",
    "npu_grouped_matmul",
)
#: Where their Python kernels are when calls.cpp stands before them.
_PYTHON_NAMESPACE = "npu_emulated_in_python"

#: Registrations live as long as their Library objects.
_libraries: list[torch.library.Library] = []
#: The Library of each fast Python kernel that calls.cpp may replace.
_replaceable: dict[str, torch.library.Library] = {}
_emulated = False
_building = threading.Lock()


def mode() -> str:
    """``reference`` or ``fast``, from the environment variable VLLM_NPU_QUANT_EMULATION (default: fast)."""
    value = os.environ.get(MODE_VARIABLE, "fast")
    if value not in MODES:
        raise ValueError(f"{MODE_VARIABLE}={value!r}: expected 'reference' or 'fast'")
    return value


def register() -> bool:
    """Define the operators in the namespace ``npu``, unless torch_npu is installed or somebody defined them before.

    Idempotent; the mode is read once, at the first call.

    Returns:
        Whether the operators of this process are emulated.

    Raises:
        ValueError: the environment variable VLLM_NPU_QUANT_EMULATION holds an unknown value.
    """
    global _emulated
    chosen = mode()
    if _emulated:
        return True
    if _torch_npu_is_installed() or any(_is_defined(name) for name in OPERATORS):
        return False
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _libraries.append(library)
    for name, operator in OPERATORS.items():
        library.define(operator.schema.removeprefix(f"{NAMESPACE}::"))
        implemented = _implement(NAMESPACE, name, operator.kernel(chosen))
        if name in CALLED_MOST and chosen == "fast":
            _replaceable[name] = implemented
        torch.library.register_fake(f"{NAMESPACE}::{name}", operator.fake, lib=library)
    _emulated = True
    return True


def _implement(namespace: str, name: str, kernel: Kernel) -> torch.library.Library:
    """Register a CPU kernel in a Library of its own."""
    library = torch.library.Library(namespace, "IMPL")
    library.impl(name, kernel, "CPU")
    _libraries.append(library)
    return library


def build_kernels() -> None:
    """Build what the fast kernels use, and let repeated calls of the operators in CALLED_MOST go without Python.

    It takes 13 s with two cores where the user's cache lacks the built files, else a tenth of one. Without this, the first
    call of a fast kernel builds what it needs, and all calls go through Python: the same numbers. No effect where the
    operators are not emulated, in the mode ``reference``, or a second time. Not while operators are called.
    """
    with _building:
        while _replaceable and calls.library() is not None:
            name, library = _replaceable.popitem()
            kernel, python = OPERATORS[name].kernel("fast"), f"{_PYTHON_NAMESPACE}::{name}"
            schema = str(getattr(torch.ops.npu, name).default._schema).removeprefix(f"{NAMESPACE}::")
            if not calls.define(_PYTHON_NAMESPACE, schema):
                logger.warning("calls of %s go through Python, which takes longer: torch refuses %s", name, python)
                continue
            _implement(_PYTHON_NAMESPACE, name, kernel)
            # torch has no public way to take a kernel back; a second one in its place would make it warn.
            library._destroy()  # type: ignore[attr-defined]
            if not calls.install(NAMESPACE, name, python):
                logger.warning("calls of %s go through Python, which takes longer: torch refuses another kernel", name)
                _implement(NAMESPACE, name, kernel)


def is_emulated() -> bool:
    """Whether ``register`` put the emulation in force in this process."""
    return _emulated


def install_kernels(names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Put the CPU kernels under operators that exist already: the real schemas of torch_npu.

    Operators without a Meta kernel of their own get the fake kernel too. For the conformance test.

    Args:
        names: keys of OPERATORS; None means all of them.

    Returns:
        The names whose fake kernel was installed because the operator had none.
    """
    library = torch.library.Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    faked = []
    for name in OPERATORS if names is None else names:
        operator = OPERATORS[name]
        library.impl(name, operator.kernel(mode()), "CPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "Meta"):
            library.impl(name, operator.fake, "Meta")
            faked.append(name)
    return tuple(faked)


def _torch_npu_is_installed() -> bool:
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


def _is_defined(name: str) -> bool:
    return torch._C._dispatch_has_kernel(f"{NAMESPACE}::{name}")
