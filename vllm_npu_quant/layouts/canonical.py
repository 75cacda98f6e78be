# SPDX-License-Identifier: Apache-2.0
"""The one form that all layouts become, and that all method classes start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["CanonicalLinear", "CanonicalWeight", "InputTransform", "StaticActivation"]


@dataclass
class CanonicalWeight:
    """An integer weight: ``w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]`` with ``g = k // group_size``.

    The integers come in blocks of rows, so that a packed weight is never unpacked as a whole.

    Attributes:
        outputs, inputs: N and K.
        rows: gives rows [start, stop) as int8 [stop - start, K], integers in [-2^(bits-1), 2^(bits-1) - 1].
        scale: float32 [N, G].
        zero: float32 [N, G], or None where all are 0.
        group_size: inputs per group; 0 where G is 1.
        bits: bits per integer.
        float_rows: gives rows [start, stop) as float32 [stop - start, K], exactly as the checkpoint means them, where the
            integers are an approximation: FP8 that was requantized. None where the integers are exact.
        pairs: gives rows [start, stop) of 4-bit integers as ``int4.pack_pairs`` packs them, int8 [stop - start, K/2], where
            they are stored so but for their signs; else None, and for an odd K.
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

    @classmethod
    def of(
        cls,
        values: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None = None,
        group_size: int = 0,
        bits: int = 8,
    ) -> CanonicalWeight:
        """The weight whose integers are stored one per byte, int8 [N, K]."""
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


@dataclass
class StaticActivation:
    """A static activation quantization: ``x_q = clamp(round(x / scale) + offset, -128, 127)``, and what undoes it.

    ``y = (x_q @ values.T + quant_bias + correction) * deq_scale`` where ``deq_scale = scale * weight_scale``. Together
    the two terms are the layer's bias and the zero-point correction: ``round(bias / deq_scale) - offset * sum_k values``.

    Attributes:
        scale, offset: float32 scalars [1].
        deq_scale: float32 [N].
        quant_bias: int32 [N], the whole layer's constant: if ranks sum their parts of the inputs, one of them adds it. The
            bias if ``correction`` is given, else the bias and the zero-point correction of all inputs. None for no constant.
        correction: int32 [N], the zero-point correction of this rank's inputs, which every rank adds; None if quant_bias
            holds it already, as msModelSlim stores it.
    """

    scale: torch.Tensor
    offset: torch.Tensor
    deq_scale: torch.Tensor
    quant_bias: torch.Tensor | None
    correction: torch.Tensor | None = None


@dataclass
class InputTransform:
    """What a layer's input is multiplied by before it is quantized: ``x' = L.T @ x @ R`` with x as [L, M] per token.

    The weight of the checkpoint belongs to x'.

    Attributes:
        left: float32 [L, L], or None.
        right: float32 [M, M], or None.
        clip: factor of the largest magnitude of a token that gives its scale; 1 for none.
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    clip: float = 1.0


@dataclass
class CanonicalLinear:
    """A quantized Linear on one rank.

    Attributes:
        weight: its integers and scales.
        static: the static activation quantization, where the checkpoint holds one.
        bias: float32 [N], the layer's bias as the checkpoint stores it, or None.
        input_permutation: int64 [K], or None: input k of the weight is multiplied by ``x[..., input_permutation[k]]``. It
            sorts the inputs of a checkpoint whose groups are not runs of neighbours (GPTQ's g_idx). -1 stands for a zero,
            which fills a group up; K then is more than x has.
        transform: what the input is multiplied by first, or None. It belongs to the whole layer, not to a rank's part.
    """

    weight: CanonicalWeight
    static: StaticActivation | None = None
    bias: torch.Tensor | None = None
    input_permutation: torch.Tensor | None = None
    transform: InputTransform | None = None
