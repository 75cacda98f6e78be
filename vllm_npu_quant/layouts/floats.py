# SPDX-License-Identifier: Apache-2.0
"""Weights of small floats (E4M3, E2M1), for chips without them: their exact values, and requantization to int8.

``w[n, k] = value[n, k] * scale[n, k // group_size]``. Each row is requantized to int8 with its own scale ``max|w| / 127``,
in blocks of rows, so that no layer is held as floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalWeight

__all__ = ["FloatWeight", "decode_e8m0", "largest_in_groups", "raise_bad_values"]

#: Elements per block of rows while it is float: 4 MiB of float32 and a few temporaries of that size.
_BLOCK_ELEMENTS = 1 << 20

#: Largest integer of a symmetric int8 weight.
_INT8_MAX = 127


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """Decode power-of-two scales: uint8 to float32, ``2^(code - 127)``. Code 255, which is NaN, gives infinity."""
    bits = codes.to(torch.int32) << 23  # the exponent of a float32, which has the same bias
    return bits.masked_fill_(codes == 0, 1 << 22).view(torch.float32)  # 2^-127 is subnormal


def largest_in_groups(
    magnitudes: Callable[[int, int], torch.Tensor], outputs: int, inputs: int, group_size: int, device: torch.device
) -> torch.Tensor:
    """The largest magnitude in each group of each row: uint8 [N, G].

    Args:
        magnitudes: returns rows [start, stop) as uint8 [stop - start, K], in the order of the values' magnitudes.
        outputs, inputs: N and K.
        group_size: inputs per group; the last group may be shorter. One group if it is 0.
        device: where the result is.
    """
    if group_size <= 0 or group_size >= inputs:
        group_size = inputs
    whole = inputs // group_size * group_size
    largest = torch.empty(outputs, -(-inputs // group_size), dtype=torch.uint8, device=device)
    for start, stop in _blocks(0, outputs, inputs):
        block = magnitudes(start, stop)
        if whole:
            largest[start:stop, : inputs // group_size] = block[:, :whole].unflatten(1, (-1, group_size)).amax(dim=2)
        if whole < inputs:
            largest[start:stop, -1] = block[:, whole:].amax(dim=1)
    return largest


@dataclass(frozen=True)
class FloatWeight:
    """A weight of small floats.

    Attributes:
        outputs, inputs: N and K.
        values: returns rows [start, stop) without scales as float32 [stop - start, K], a new tensor.
        largest: float32 [N, G], the largest magnitude of ``values`` in each group.
        scale: float32 [N, G].
        group_size: inputs per scale; 0 if G is 1.
    """

    outputs: int
    inputs: int
    values: Callable[[int, int], torch.Tensor]
    largest: torch.Tensor
    scale: torch.Tensor
    group_size: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the weight as float32 [stop - start, K]."""
        return self._scaled(self.scale, start, stop)

    def requantized(self) -> CanonicalWeight:
        """The weight as int8 with a scale per channel. Scales are computed now, integers on demand.

        Raises:
            NpuQuantError: bad-value for weights that float32 does not hold.
        """
        largest = (self.largest * self.scale.abs()).amax(dim=1, keepdim=True)
        raise_bad_values(("the weight", "numbers beyond float32", not bool(torch.isfinite(largest).all())))
        channel = torch.where(largest > 0, largest / _INT8_MAX, torch.ones_like(largest))
        steps = self.scale / channel

        def rows(start: int, stop: int) -> torch.Tensor:
            values = torch.empty(stop - start, self.inputs, dtype=torch.int8, device=steps.device)
            for low, high in _blocks(start, stop, self.inputs):
                block = self._scaled(steps, low, high)
                values[low - start : high - start] = block.round_().clamp_(-_INT8_MAX, _INT8_MAX)
            return values

        return CanonicalWeight(self.outputs, self.inputs, rows, channel, float_rows=self.rows)

    def _scaled(self, scale: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        part = scale[start:stop]
        if part.shape[1] > 1:
            part = part.repeat_interleave(self.group_size, dim=1)[:, : self.inputs]
        return self.values(start, stop).mul_(part)


def raise_bad_values(*problems: tuple[str, str, bool]) -> None:
    """Raise one NpuQuantError for all (what, what it holds, whether it does) that hold.

    Raises:
        NpuQuantError: bad-value.
    """
    findings = [
        Finding(
            "bad-value",
            f"{what} holds {held}",
            expected="finite numbers" if held != "nonzero offsets" else "0 everywhere",
            found=held,
            fix="re-export or download the checkpoint",
        )
        for what, held, wrong in problems
        if wrong
    ]
    if findings:
        raise NpuQuantError(findings)


def _blocks(start: int, stop: int, inputs: int) -> Iterator[tuple[int, int]]:
    height = max(_BLOCK_ELEMENTS // max(inputs, 1), 1)
    return ((low, min(low + height, stop)) for low in range(start, stop, height))
