# SPDX-License-Identifier: Apache-2.0
"""The table of emulated operators, and their registration in the namespace ``npu``."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_npu_quant import settings
from vllm_npu_quant.emulation import calls
from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.fast.dynamic_quant import npu_dynamic_quant_fast
from vllm_npu_quant.emulation.fast.grouped_matmul import npu_grouped_matmul_fast
from vllm_npu_quant.emulation.fast.quant_matmul import npu_quant_matmul_fast
from vllm_npu_quant.emulation.fast.weight_quant_batchmatmul import npu_weight_quant_batchmatmul_fast
from vllm_npu_quant.emulation.reference.dequant_swiglu_quant import npu_dequant_swiglu_quant
from vllm_npu_quant.emulation.reference.dynamic_quant import npu_dynamic_quant, npu_dynamic_quant_asymmetric
from vllm_npu_quant.emulation.reference.format_cast import npu_format_cast
from vllm_npu_quant.emulation.reference.grouped_matmul import npu_grouped_matmul
from vllm_npu_quant.emulation.reference.kronecker_quant import npu_kronecker_quant
from vllm_npu_quant.emulation.reference.moe_init_routing import npu_moe_compute_expert_tokens, npu_moe_init_routing
from vllm_npu_quant.emulation.reference.moe_init_routing_v2 import npu_moe_init_routing_v2
from vllm_npu_quant.emulation.reference.moe_token_unpermute import npu_moe_token_unpermute
from vllm_npu_quant.emulation.reference.quant_matmul import npu_quant_matmul
from vllm_npu_quant.emulation.reference.quantize import npu_quantize
from vllm_npu_quant.emulation.reference.swiglu import npu_swiglu
from vllm_npu_quant.emulation.reference.trans_quant_param import npu_trans_quant_param
from vllm_npu_quant.emulation.reference.weight_quant_batchmatmul import npu_weight_quant_batchmatmul
from vllm_npu_quant.emulation.rules.dequant_swiglu_quant import DequantSwigluQuant
from vllm_npu_quant.emulation.rules.dynamic_quant import DynamicQuant, DynamicQuantAsymmetric
from vllm_npu_quant.emulation.rules.format_cast import FormatCast
from vllm_npu_quant.emulation.rules.grouped_matmul import GroupedMatmul
from vllm_npu_quant.emulation.rules.kronecker_quant import KroneckerQuant
from vllm_npu_quant.emulation.rules.moe_init_routing import MoeComputeExpertTokens, MoeInitRouting
from vllm_npu_quant.emulation.rules.moe_init_routing_v2 import MoeInitRoutingV2
from vllm_npu_quant.emulation.rules.moe_token_unpermute import MoeTokenUnpermute
from vllm_npu_quant.emulation.rules.quant_matmul import QuantMatmul
from vllm_npu_quant.emulation.rules.quantize import Quantize
from vllm_npu_quant.emulation.rules.swiglu import Swiglu
from vllm_npu_quant.emulation.rules.trans_quant_param import TransQuantParam
from vllm_npu_quant.emulation.rules.weight_quant_batchmatmul import WeightQuantBatchmatmul
from vllm_npu_quant.emulation.schemas import SCHEMAS

logger = logging.getLogger(__name__)

__all__ = [
    "CALLED_MOST",
    "NAMESPACE",
    "OPERATORS",
    "Operator",
    "build_kernels",
    "install_kernels",
    "is_emulated",
    "register",
]

NAMESPACE = "npu"

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """One operator of torch_npu.

    Attributes:
        arguments: its rules.
        compute: its arithmetic in plain torch, of checked arguments.
        fast: a second CPU kernel with the same results, or None if the reference is fast enough.
    """

    arguments: type[Arguments]
    compute: Callable[[Any], Any]
    fast: Kernel | None = None

    @property
    def schema(self) -> str:
        """The text that torch_npu registers."""
        return SCHEMAS[self.arguments.operator]

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The CPU kernel in plain torch."""
        return self.compute(self.arguments.checked(*args, **kwargs))

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes and dtypes only, by the same rules."""
        return self.arguments.checked(*args, **kwargs).empty()

    def kernel(self, mode: str) -> Kernel:
        """The CPU kernel in the mode "fast" or "reference"."""
        return self.fast if mode == "fast" and self.fast is not None else self.reference


#: Name -> operator.
OPERATORS: dict[str, Operator] = {
    operator.arguments.operator: operator
    for operator in (
        Operator(Quantize, npu_quantize),
        Operator(DynamicQuant, npu_dynamic_quant, npu_dynamic_quant_fast),
        Operator(DynamicQuantAsymmetric, npu_dynamic_quant_asymmetric),
        Operator(KroneckerQuant, npu_kronecker_quant),
        Operator(TransQuantParam, npu_trans_quant_param),
        Operator(QuantMatmul, npu_quant_matmul, npu_quant_matmul_fast),
        Operator(WeightQuantBatchmatmul, npu_weight_quant_batchmatmul, npu_weight_quant_batchmatmul_fast),
        Operator(GroupedMatmul, npu_grouped_matmul, npu_grouped_matmul_fast),
        Operator(FormatCast, npu_format_cast),
        Operator(Swiglu, npu_swiglu),
        Operator(DequantSwigluQuant, npu_dequant_swiglu_quant),
        Operator(MoeInitRouting, npu_moe_init_routing),
        Operator(MoeInitRoutingV2, npu_moe_init_routing_v2),
        Operator(MoeComputeExpertTokens, npu_moe_compute_expert_tokens),
        Operator(MoeTokenUnpermute, npu_moe_token_unpermute),
    )
}

#: Products and quantization: the operators that layers call most.
CALLED_MOST = (
    "npu_dynamic_quant",
    "npu_quant_matmul",
    "npu_weight_quant_batchmatmul",
    "npu_grouped_matmul",
)
#: The namespace of their Python kernels once calls.cpp is registered in their place.
_PYTHON_NAMESPACE = "npu_emulated_in_python"

#: Registrations live as long as their Library objects.
_libraries: list[torch.library.Library] = []
#: The Library of each fast Python kernel that calls.cpp may replace.
_replaceable: dict[str, torch.library.Library] = {}
_emulated = False
_building = threading.Lock()


def register() -> bool:
    """Define the operators in the namespace ``npu``, unless torch_npu is installed or they are defined already.

    Idempotent; ``settings.emulation_mode`` is read once, at the first call.

    Returns:
        Whether the operators of this process are emulated.

    Raises:
        NpuQuantError: bad-config, the environment variable VLLM_NPU_QUANT_EMULATION holds an unknown value.
    """
    global _emulated
    chosen = settings.emulation_mode()
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
    """Build the libraries of the fast kernels, and let repeated calls of the operators in CALLED_MOST bypass Python.

    It takes 13 s with two cores if the user's cache lacks the built files, else 0.1 s. Without this, the first call of a
    fast kernel builds what it needs, and all calls go through Python, with the same results. No effect if the operators are
    not emulated, in the mode ``reference``, or the second time. Must not run while operators are called.
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
            # torch has no public way to remove a kernel, and warns if a second one replaces it.
            library._destroy()  # type: ignore[attr-defined]
            if not calls.install(NAMESPACE, name, python):
                logger.warning("calls of %s go through Python, which takes longer: torch refuses another kernel", name)
                _implement(NAMESPACE, name, kernel)


def is_emulated() -> bool:
    """Whether ``register`` defined the operators in this process."""
    return _emulated


def install_kernels(names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Register the CPU kernels for operators that exist already, under the real schemas of torch_npu. For tests.

    Operators without a Meta kernel of their own get the fake kernel too.

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
        library.impl(name, operator.kernel(settings.emulation_mode()), "CPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "Meta"):
            library.impl(name, operator.fake, "Meta")
            faked.append(name)
    return tuple(faked)


def _torch_npu_is_installed() -> bool:
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


def _is_defined(name: str) -> bool:
    return torch._C._dispatch_has_kernel(f"{NAMESPACE}::{name}")
