# SPDX-License-Identifier: Apache-2.0
"""npu_format_cast: the storage format of weights."""

from __future__ import annotations

import torch

from vllm_npu_quant.emulation.rules.format_cast import FormatCast, set_storage_format, storage_format

__all__ = ["npu_format_cast"]


def npu_format_cast(call: FormatCast) -> torch.Tensor:
    """Change the storage format: 29 (FRACTAL_NZ) or back to 2 (ND). Shape, strides and values stay.

    On the device only the order in memory changes, and operators keep taking the logical shape; here the memory is
    copied as it is, and the format is recorded for ``storage_format``. A tensor that has the format already is
    returned itself.

    Source: Ascend/pytorch torch_npu/csrc/framework/FormatHelper.cpp, aten/common/FormatCastKernelNpu.cpp.
    """
    if storage_format(call.input) == call.acl_format:
        return call.input
    out = call.input.clone(memory_format=torch.preserve_format)
    set_storage_format(out, call.acl_format)
    return out
