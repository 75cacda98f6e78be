# SPDX-License-Identifier: Apache-2.0
"""The operators of torch_npu on a CPU: the real schemas, the documented arithmetic, the device's argument rules.

``register()`` defines them as ``torch.ops.npu.*`` where torch_npu is absent. Nothing here was measured on an NPU: the
arithmetic is what Huawei's documents, tests and kernels say, and each function names its source.
"""

from __future__ import annotations

from vllm_npu_quant.emulation.registry import (
    OPERATORS,
    Operator,
    build_kernels,
    install_kernels,
    is_emulated,
    mode,
    register,
)

__all__ = ["OPERATORS", "Operator", "build_kernels", "install_kernels", "is_emulated", "mode", "register"]
