# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_format_cast, and the record of a tensor's storage format."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Final

import torch

from vllm_npu_quant.emulation.checks import Arguments
from vllm_npu_quant.emulation.numerics import FLOATS

__all__ = ["FRACTAL_NZ", "ND", "FormatCast", "set_storage_format", "storage_format"]

ND: Final = 2
FRACTAL_NZ: Final = 29


def storage_format(tensor: torch.Tensor) -> int:
    """FRACTAL_NZ (29) for a tensor that npu_format_cast gave this format, else ND (2).

    The format belongs to the storage, as on the device: a Parameter or a detached alias of the tensor keeps it.
    """
    return getattr(tensor.untyped_storage(), "_npu_format", ND)


def set_storage_format(tensor: torch.Tensor, acl_format: int) -> None:
    """Mark the storage of a tensor."""
    tensor.untyped_storage()._npu_format = acl_format  # type: ignore[attr-defined]


@dataclass(eq=False)
class FormatCast(Arguments):
    """The arguments of npu_format_cast.

    Attributes:
        input: int8, int32, float16, bfloat16 or float32, at least 2 dimensions for format 29.
        acl_format: 2 (ND) or 29 (FRACTAL_NZ).
    """

    operator = "npu_format_cast"

    input: torch.Tensor
    acl_format: int
    _: KW_ONLY
    customize_dtype: int | None = None
    input_dtype: int | None = None

    def check(self) -> None:
        self.require_value("acl_format", ND, FRACTAL_NZ)
        self.require_absent("only Ascend 950 has it", "customize_dtype", "input_dtype")
        if self.acl_format == FRACTAL_NZ:
            self.require_dtype("input", torch.int8, torch.int32, *FLOATS)
            self.require(self.input.dim() >= 2, "input", "at least 2 dimensions for FRACTAL_NZ (29)")

    def empty(self) -> torch.Tensor:
        return torch.empty_like(self.input)
