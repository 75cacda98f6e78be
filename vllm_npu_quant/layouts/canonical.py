# SPDX-License-Identifier: Apache-2.0
"""The canonical numbers of a layer: the result of every layout's conversion and the input of every method class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_npu_quant.layouts.int4 import row_blocks

__all__ = ["CanonicalLinear", "CanonicalWeight", "InputTransform", "StaticActivation", "row_sums"]


@dataclass
class CanonicalWeight:
    """An integer weight: ``w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]`` with ``g = k // group_size``.

    Integers are produced in blocks of rows, so that a packed weight is never unpacked as a whole.

    Attributes:
        outputs, inputs: N and K.
        rows: returns rows [start, stop) as int8 [stop - start, K], integers in [-2^(bits-1), 2^(bits-1) - 1].
        scale: float32 [N, G].
        zero: float32 [N, G], or None if all are 0.
        group_size: inputs per group; 0 if G is 1.
        bits: bits per integer.
        float_rows: returns the exact rows [start, stop) as float32 [stop - start, K] if the integers only approximate the
            checkpoint's values (requantized floats). None if the integers are exact.
        exact: the same weight as exact integers, with scales for smaller groups, if ``rows`` only approximates it and there
            are such integers (FP4). None otherwise.
        pairs: returns rows [start, stop) of 4-bit integers packed as by ``int4.pack_pairs``, int8 [stop - start, K/2], if
            the checkpoint packs them in that order. None otherwise, and for an odd K.
    """

    outputs: int
    inputs: int
    rows: Callable[[int, int], torch.Tensor]
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    group_size: int = 0
    bits: int = 8
    float_rows: Callable[[int, int], torch.Tensor] | None = None
    pairs: Callable[[int, int], torch.Tensor] | None = None
    exact: CanonicalWeight | None = None

    @classmethod
    def of(
        cls,
        values: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        group_size: int = 0,
        bits: int = 8,
    ) -> CanonicalWeight:
        """A weight whose integers are stored one per byte, int8 [N, K]."""
        outputs, inputs = values.shape
        return cls(outputs, inputs, lambda start, stop: values[start:stop], scale, zero, group_size, bits)

    @property
    def values(self) -> torch.Tensor:
        """All integers, int8 [N, K]: twice the memory of a packed 4-bit weight."""
        return self.rows(0, self.outputs)

    def dequantize(self) -> torch.Tensor:
        """The weight as float32 [N, K]."""
        return self.dequantized_rows(0, self.outputs)

    def dequantized_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the weight as float32 [stop - start, K]."""
        if self.float_rows is not None:
            return self.float_rows(start, stop)
        scale = self.scale[start:stop]
        zero = None if self.zero is None else self.zero[start:stop]
        if self.group_size:
            scale = scale.repeat_interleave(self.group_size, dim=1)[:, : self.inputs]
            zero = None if zero is None else zero.repeat_interleave(self.group_size, dim=1)[:, : self.inputs]
        values = self.rows(start, stop).to(torch.float32)
        return (values if zero is None else values - zero) * scale


def row_sums(weight: CanonicalWeight) -> torch.Tensor:
    """Sum of the integers of each row, int32 [N]."""
    sums = torch.empty(weight.outputs, dtype=torch.int32, device=weight.scale.device)
    for start, stop in row_blocks(weight.outputs, weight.inputs):
        sums[start:stop] = weight.rows(start, stop).sum(dim=1, dtype=torch.int32)
    return sums


@dataclass
class StaticActivation:
    """Static activation quantization and the terms that dequantize the product.

    ``x_q = clamp(round(x / scale) + offset, -128, 127)`` and ``y = (x_q @ values.T + quant_bias + correction) * deq_scale``
    with ``deq_scale = scale * weight_scale``. The sum of both terms is the layer's bias and the zero-point correction:
    ``round(bias / deq_scale) - offset * sum_k values``.

    Attributes:
        scale, offset: float32 scalars [1].
        deq_scale: float32 [N].
        quant_bias: int32 [N], the constant of the whole layer: of ranks that sum partial results, only one adds it. It is
            the bias if ``correction`` is given, else the bias plus the zero-point correction of all inputs. None if there
            is no constant.
        correction: int32 [N], the zero-point correction of this rank's inputs, added by every rank; None if quant_bias
            includes it, as msModelSlim stores it.
    """

    scale: torch.Tensor
    offset: torch.Tensor
    deq_scale: torch.Tensor
    quant_bias: torch.Tensor | None
    correction: torch.Tensor | None = None


@dataclass
class InputTransform:
    """Matrices applied to a layer's input before quantization: ``x' = L.T @ x @ R`` with each token x viewed as [L, M].

    The checkpoint's weight multiplies x'.

    Attributes:
        left: float32 [L, L], or None.
        right: float32 [M, M], or None.
        clip: factor applied to a token's largest magnitude to get its scale; 1 for no clipping.
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    clip: float = 1.0


@dataclass
class CanonicalLinear:
    """Canonical numbers of a quantized Linear layer on one rank.

    Attributes:
        weight: the integers and scales.
        static: the static activation quantization if the checkpoint has one, else None.
        bias: float32 [N], the stored bias, or None.
        input_permutation: int64 [K], or None: input k of the weight multiplies ``x[..., input_permutation[k]]``. It sorts
            inputs by group for checkpoints with activation order. -1 marks a padding input that is 0; K is then larger
            than the last dimension of x.
        transform: the matrices applied to the input, or None. They cover the whole layer, not a rank's part.
    """

    weight: CanonicalWeight
    static: StaticActivation | None = None
    bias: torch.Tensor | None = None
    input_permutation: torch.Tensor | None = None
    transform: InputTransform | None = None
