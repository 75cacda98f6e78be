# SPDX-License-Identifier: Apache-2.0
"""The base class of NPU method classes: ``prepare`` once at load, ``apply`` at every forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.serving.cost import MAX_INPUTS

__all__ = [
    "FRACTAL_NZ",
    "MAX_INPUTS",
    "MAX_OUTPUTS",
    "NpuLinearMethod",
    "PrepareContext",
    "as_shaped",
    "bad_zero_points",
    "numbered",
    "permuted_inputs",
    "split_outputs",
    "to_nz",
    "tokens_of",
    "too_many_inputs",
    "transformed_inputs",
]

#: aclFormat number of the cube unit's tiled weight layout.
FRACTAL_NZ = 29
#: Limit of npu_quant_matmul on the last dimension of either operand.
MAX_OUTPUTS = 65535


@dataclass(frozen=True)
class PrepareContext:
    """Properties of the layer on this rank, besides its canonical numbers.

    Attributes:
        act_dtype: dtype of the layer's input and output, bfloat16 or float16.
        adds_constants: whether this rank adds the terms that do not depend on the input. False on all ranks but one of a
            row-parallel layer, whose partial results are summed.
        inputs_start: index in the whole layer of this rank's first input.
        inputs_whole: K of the whole layer; 0 if it equals the K of this rank.
    """

    act_dtype: torch.dtype
    adds_constants: bool = True
    inputs_start: int = 0
    inputs_whole: int = 0


class NpuLinearMethod(ABC):
    """Arithmetic of a Linear layer on an NPU.

    A method reads no config. One instance serves one layer and holds no tensors: those that ``prepare`` returns are
    registered on the layer, and ``apply`` reads them from there.
    """

    #: Whether the prepared tensors include the layer's bias, so that apply must not add it.
    folds_bias: ClassVar[bool] = False
    #: Whether apply needs the inputs of all ranks of a row-parallel layer; set by ``prepare``.
    gathers_inputs = False
    #: N of this rank; set by ``prepare``.
    outputs = 0
    #: Names of prepared tensors that ``finish`` casts to FRACTAL_NZ; set by ``prepare``.
    tiled: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        """Convert canonical numbers to the tensors of ``apply``, in the operators' layout.

        Raises:
            NpuQuantError: for values that the scheme does not allow.
        """

    def finish(self, tensors: dict[str, torch.Tensor]) -> None:
        """Cast prepared tensors to FRACTAL_NZ; ``tensors`` is updated in place.

        Called after the stored tensors are freed: the cast copies, and a layer never holds three copies.
        """
        for name in self.tiled:
            tensors[name] = to_nz(tensors.pop(name))

    def bias_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the operator's bias argument; the bias is converted once, after loading."""
        return act_dtype

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer's output.

        An empty input gives an empty output, as in vLLM's own layers: ranks without work call it, and no operator accepts
        an empty tensor. The check depends on the shape only, so that graphs can be captured.

        Args:
            layer: an object with the prepared tensors as attributes.
            x: [..., K] in the model's dtype.
            bias: [N] in ``bias_dtype``, or None.

        Returns:
            [..., N] in x's dtype.
        """
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.outputs))
        return self.compute(layer, x, bias)

    @abstractmethod
    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``apply`` for at least one token."""


def to_nz(weight: torch.Tensor) -> torch.Tensor:
    """Cast a weight [..., K, N] to FRACTAL_NZ if its sizes are multiples of the tile; values and shape do not change.

    NZ tiles are 16 rows by 32 bytes; other matrices keep the plain layout.
    """
    rows, columns = weight.shape[-2:]
    if rows % 16 or (columns * weight.element_size()) % 32:
        return weight
    return torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """Reshape [..., K] to contiguous [M, K], as the operators require; usually a view."""
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()


def as_shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape [M, N] to [..., N] with the leading dimensions of ``x``; no operation if x is [M, K]."""
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def split_outputs(outputs: int, limit: int = MAX_OUTPUTS, multiple: int = 64) -> list[tuple[int, int]]:
    """Split ``outputs`` columns into pieces [start, stop) of at most ``limit``; the width of all but the last is a multiple
    of ``multiple``."""
    if outputs <= limit:
        return [(0, outputs)]
    pieces = -(-outputs // limit)
    width = -(-outputs // pieces)
    width = -(-width // multiple) * multiple
    if width > limit:
        width -= multiple
    return [(start, min(start + width, outputs)) for start in range(0, outputs, width)]


def numbered(name: str, number: int) -> str:
    """Attribute name of a tensor of the piece with this number; the first piece has no suffix."""
    return f"{name}_{number}" if number else name


def too_many_inputs(operator: str, inputs: int) -> Finding:
    """Finding for a layer with more inputs than an operator accepts."""
    return Finding(
        "operator-limit",
        f"{operator} takes at most {MAX_INPUTS} inputs",
        expected=f"K <= {MAX_INPUTS}",
        found=f"K = {inputs}",
        fix="use a larger tensor-parallel size, or export the layer as float",
    )


def bad_zero_points(what: str) -> Finding:
    """Finding for zero points in a scheme whose operator has none."""
    return Finding(
        "bad-value",
        f"{what} takes symmetric weights only, and this layer has zero points that are not 0",
        expected="weight_offset 0 everywhere",
        found="nonzero zero points",
        fix="re-export the checkpoint with symmetric weights for this scheme",
    )


def permuted_inputs(operator: str) -> Finding:
    """Finding for a layer with permuted inputs in a scheme that quantizes activations."""
    return Finding(
        "unsupported-scheme",
        f"permuted inputs (act-order with groups) are served for weight-only schemes, not with {operator}",
        expected="inputs in the order of the model",
        found="an input permutation",
        fix="re-export the checkpoint without act-order (desc_act=False)",
    )


def transformed_inputs(what: str) -> Finding:
    """Finding for a layer with an input transform in a method that does not support one."""
    return Finding(
        "unsupported-scheme",
        f"the checkpoint multiplies the layer's input by matrices, which is not served with {what}",
        expected="no FlatQuant transform and no online rotation",
        found="an input transform",
        fix="export these layers without it",
    )
