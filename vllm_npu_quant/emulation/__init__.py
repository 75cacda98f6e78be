# SPDX-License-Identifier: Apache-2.0
"""The operators of torch_npu on a CPU, with the real schemas, the documented arithmetic and the device's argument rules.

``register()`` defines them as ``torch.ops.npu.*`` if torch_npu is absent. Nothing here was measured on an NPU: the
arithmetic follows Huawei's documents, tests and kernels, and each function names its source.

An operator is up to three modules of the same name: ``rules/`` has its arguments, what is refused, and the shapes and dtypes
of the outputs; ``reference/`` the arithmetic in plain torch; ``fast/``, for the operators that layers call most, a second
kernel on top of ``native.c``. ``registry`` has the table.
"""

from __future__ import annotations

from vllm_npu_quant.emulation.registry import (
    OPERATORS,
    Operator,
    build_kernels,
    install_kernels,
    is_emulated,
    register,
)
from vllm_npu_quant.emulation.rules.format_cast import storage_format

__all__ = [
    "OPERATORS",
    "Operator",
    "build_kernels",
    "install_kernels",
    "is_emulated",
    "register",
    "storage_format",
]
