# SPDX-License-Identifier: Apache-2.0
"""Input transforms before activation quantization: FlatQuant's matrices and QuaRot's online rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, InputTransform
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext, tokens_of

__all__ = ["LEFT", "RIGHT", "TransformPlan", "TransformingLinear", "prepare_transform", "transformed"]

#: Attributes of the layer that hold the prepared matrices.
LEFT = "transform_left"
RIGHT = "transform_right"


@dataclass(frozen=True)
class TransformPlan:
    """The input transform of one rank.

    Attributes:
        left, right: L and M: a token is viewed as a matrix [L, M].
        clip: factor applied to a token's largest magnitude to get its scale.
        start, stop: range of the transformed inputs that this rank multiplies by its weight.
        gathers: whether the transform needs the inputs of all ranks.
    """

    left: int
    right: int
    clip: float
    start: int
    stop: int
    gathers: bool

    @property
    def inputs(self) -> int:
        """Inputs of the transform."""
        return self.left * self.right


def prepare_transform(
    transform: InputTransform, inputs: int, context: PrepareContext
) -> tuple[TransformPlan, dict[str, torch.Tensor]]:
    """Plan this rank's transform and prepare its matrices.

    A rank of a row-parallel layer has a part of the inputs. If L is block diagonal with respect to the ranks, the rank
    transforms its part with its own block; msModelSlim makes its rotations so for a chosen number of ranks. Otherwise every
    rank transforms the inputs of all ranks and takes its part of the result.

    Args:
        transform: the matrices of the whole layer.
        inputs: K of this rank.
        context: gives the dtype and this rank's range of inputs.

    Returns:
        The plan, and the matrices in the activation's dtype: LEFT [L, L] (transposed) and RIGHT [M, M], if the transform
        has them.

    Raises:
        NpuQuantError: wrong-shape if the matrices do not fit the layer.
    """
    whole = context.inputs_whole or inputs
    left = transform.left.shape[0] if transform.left is not None else 0
    right = transform.right.shape[0] if transform.right is not None else 0
    if not left and right:
        left = whole // right
    if left and not right:
        right = whole // left
    if left * right != whole:
        raise NpuQuantError([_misfit(left, right, whole)])
    matrices = {}
    start, stop = context.inputs_start, context.inputs_start + inputs
    rows = None
    if inputs != whole and start % right == 0 and inputs % right == 0:
        rows = slice(start // right, stop // right)
    own = transform.left
    local = inputs == whole or (rows is not None and (own is None or _is_a_block(own, rows)))
    if local and rows is not None:
        left = inputs // right
        own = None if own is None else own[rows, rows]
    if own is not None:
        matrices[LEFT] = own.t().to(context.act_dtype).contiguous()
    if transform.right is not None:
        matrices[RIGHT] = transform.right.to(context.act_dtype).contiguous()
    if local:
        return TransformPlan(left, right, transform.clip, 0, inputs, gathers=False), matrices
    return TransformPlan(left, right, transform.clip, start, stop, gathers=True), matrices


def _is_a_block(matrix: torch.Tensor, rows: slice) -> bool:
    """Whether these rows and the same columns form a diagonal block: all entries that link them to others are 0."""
    outside = torch.ones(matrix.shape[0], dtype=torch.bool, device=matrix.device)
    outside[rows] = False
    return not bool(matrix[rows][:, outside].any()) and not bool(matrix[outside][:, rows].any())


def transformed(layer: Any, plan: TransformPlan, tokens: torch.Tensor) -> torch.Tensor:
    """Compute ``L.T @ x @ R`` for every token; each product is rounded to the activation's dtype, as in the producer's model.

    Args:
        layer: an object with the prepared matrices as attributes.
        plan: the transform of this rank.
        tokens: [M, K]; with ``plan.gathers``, the inputs of all ranks.

    Returns:
        [M, K], the transformed inputs of this rank.
    """
    matrices = tokens.view(-1, plan.left, plan.right)
    left, right = getattr(layer, LEFT, None), getattr(layer, RIGHT, None)
    if right is not None:
        matrices = torch.matmul(matrices, right)
    if left is not None:
        matrices = torch.matmul(left, matrices)
    tokens = matrices.reshape(-1, plan.inputs)
    return tokens[:, plan.start : plan.stop].contiguous() if plan.gathers else tokens


class TransformingLinear(NpuLinearMethod):
    """Base class of methods that support an input transform."""

    def __init__(self) -> None:
        self.transform: TransformPlan | None = None

    def prepare_input(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        """Prepare the tensors of ``input_tokens``; none for a layer without a transform.

        Raises:
            NpuQuantError: see ``prepare_transform``.
        """
        if linear.transform is None:
            return {}
        self.transform, matrices = prepare_transform(linear.transform, linear.weight.inputs, context)
        self.gathers_inputs = self.transform.gathers
        return matrices

    def input_tokens(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """Reshape [..., K] to [M, K] and apply the transform, if any."""
        tokens = tokens_of(x)
        return tokens if self.transform is None else transformed(layer, self.transform, tokens)


def _misfit(left: int, right: int, inputs: int) -> Finding:
    return Finding(
        "wrong-shape",
        "the matrices of the input transform do not fit the layer",
        expected=f"L * M = {inputs}",
        found=f"{left} * {right}",
        fix="check that config.json and the weights are of the same model, or re-export the checkpoint",
    )
