# SPDX-License-Identifier: Apache-2.0
"""What every NPU method class offers: prepare once at load, apply at every forward."""

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

#: aclFormat number of the tiled weight layout of the cube unit.
FRACTAL_NZ = 29
#: npu_quant_matmul takes at most 65535 elements in the last dimension of either operand.
MAX_OUTPUTS = 65535


@dataclass(frozen=True)
class PrepareContext:
    """What a method needs to know about the layer besides its numbers.

    Attributes:
        act_dtype: dtype of the layer's input and output, bfloat16 or float16.
        adds_constants: whether this rank adds the terms that do not depend on the input. False on all ranks but one of a
            row-parallel layer, whose partial results are summed.
        inputs_start: the first of the layer's inputs that this rank has.
        inputs_whole: K of the layer on all ranks; 0 where it is the K of this rank.
    """

    act_dtype: torch.dtype
    adds_constants: bool = True
    inputs_start: int = 0
    inputs_whole: int = 0


class NpuLinearMethod(ABC):
    """A Linear layer's arithmetic on an NPU.

    A method never reads a config file. One instance serves one layer; it holds no tensors: what ``prepare`` returns is
    registered on the layer, and ``apply`` reads it from there.
    """

    #: Whether the layer's own bias is already inside the prepared tensors, so that apply must not add it.
    folds_bias: ClassVar[bool] = False
    #: Whether apply wants the inputs of all ranks of a row-parallel layer; ``prepare`` decides it.
    gathers_inputs = False
    #: N of this rank; ``prepare`` sets it.
    outputs = 0
    #: Prepared tensors that ``finish`` casts to FRACTAL_NZ; ``prepare`` sets it.
    tiled: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        """The tensors that ``apply`` needs, in the operators' layout.

        Raises:
            NpuQuantError: for values that the scheme does not allow.
        """

    def finish(self, tensors: dict[str, torch.Tensor]) -> None:
        """Cast what ``prepare`` gave to FRACTAL_NZ, in place.

        It is called when the checkpoint's own tensors are gone: the cast makes a copy, and a layer never has three.
        """
        for name in self.tiled:
            tensors[name] = to_nz(tensors.pop(name))

    def bias_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the operator takes the layer's bias; it is converted once, after loading."""
        return act_dtype

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output.

        No tokens give no outputs, as in vLLM's own layers: a rank without work asks for it, and no operator takes an empty
        tensor. A graph sees only the shape.

        Args:
            layer: an object that has the prepared tensors as attributes.
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
    """Cast a weight [..., K, N] to FRACTAL_NZ, where its sizes allow it; values and shape stay the same.

    NZ tiles are 16 rows by 32 bytes; a matrix that does not fill them stays in its plain layout.
    """
    rows, columns = weight.shape[-2:]
    if rows % 16 or (columns * weight.element_size()) % 32:
        return weight
    return torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K] in contiguous memory, which the operators ask for; almost always a view."""
    return (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()


def as_shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[M, N] as [..., N], with the tokens in the places that they have in ``x``; no operation where x is [M, K]."""
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def split_outputs(outputs: int, limit: int = MAX_OUTPUTS, multiple: int = 64) -> list[tuple[int, int]]:
    """Cut ``outputs`` columns into [start, stop) pieces that an operator takes, all but the last a multiple of 64 wide."""
    if outputs <= limit:
        return [(0, outputs)]
    pieces = -(-outputs // limit)
    width = -(-outputs // pieces)
    width = -(-width // multiple) * multiple
    if width > limit:
        width -= multiple
    return [(start, min(start + width, outputs)) for start in range(0, outputs, width)]


def numbered(name: str, number: int) -> str:
    """The attribute of a layer that holds a tensor of the piece with this number; the first keeps the plain name."""
    return f"{name}_{number}" if number else name


def too_many_inputs(operator: str, inputs: int) -> Finding:
    """The finding for a layer with more inputs than an operator takes."""
    return Finding(
        "operator-limit",
        f"{operator} takes at most {MAX_INPUTS} inputs",
        expected=f"K <= {MAX_INPUTS}",
        found=f"K = {inputs}",
        fix="use a larger tensor-parallel size, or export the layer as float",
    )


def bad_zero_points(what: str) -> Finding:
    """The finding for zero points in a scheme whose operator has none."""
    return Finding(
        "bad-value",
        f"{what} takes symmetric weights only, and this layer has zero points that are not 0",
        expected="weight_offset 0 everywhere",
        found="nonzero zero points",
        fix="re-export the checkpoint with symmetric weights for this scheme",
    )


def permuted_inputs(operator: str) -> Finding:
    """The finding for a layer whose inputs are permuted, in a scheme that quantizes them."""
    return Finding(
        "unsupported-scheme",
        f"permuted inputs (act-order with groups) are served for weight-only schemes, not with {operator}",
        expected="inputs in the order of the model",
        found="an input permutation",
        fix="re-export the checkpoint without act-order (desc_act=False)",
    )


def transformed_inputs(what: str) -> Finding:
    """The finding for a layer whose input is multiplied by matrices first, in a method that has no place for them."""
    return Finding(
        "unsupported-scheme",
        f"the checkpoint multiplies the layer's input by matrices, which is not served with {what}",
        expected="no FlatQuant transform and no online rotation",
        found="an input transform",
        fix="export these layers without it",
    )
