# SPDX-License-Identifier: Apache-2.0
"""Conversion of GPTQ tensors to canonical numbers.

``w[n, k] = (q[k, n] - z[g, n]) * scales[g, n]``, q and z in [0, 2^bits - 1], ``g = k // group_size`` or ``g_idx[k]``. The
integers are a dense bit stream in int32 words, lowest bits first: q along K, z along N. For 3 bits, values 10 and 21 of
each 32 span two words (AutoGPTQ, GPTQModel, AutoRound's QuantLinear).

In the first format (``checkpoint_format: gptq``), producers subtract 1 from every zero point before writing it. GPTQModel
subtracts from whole words, so that a zero point of 0 borrows from the next value; adding to whole words restores both, and
equals adding to each value if none is 0. For 3 bits it subtracts from each value, modulo 8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.bits import unpack
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.g_idx import Arrangement, arrange, starts_new_groups_in_order
from vllm_npu_quant.layouts.tables import group_size_of, stored_weight
from vllm_npu_quant.spec import LayerSpec, Layout

__all__ = [
    "act_order_to_canonical",
    "any_g_idx",
    "checked_g_idx",
    "to_canonical",
    "zeros_v1",
    "zeros_v2",
]

_V2 = frozenset({Layout.GPTQ_V2, Layout.GPTQ_V2_ACT_ORDER})


def zeros_v1(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Unpack qzeros that are stored minus one: int32 [G, N * bits / 32] to uint8 [G, N]."""
    bits = stored_weight(spec).bits
    if bits == 3:
        return (zeros_v2(stored, spec, outputs) + 1) & 7
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return zeros_v2(stored + ones, spec, outputs)  # int32 overflow inverts the producer's underflow


def zeros_v2(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Unpack qzeros: int32 [G, N * bits / 32] to uint8 [G, N]."""
    return unpack(stored.t(), stored_weight(spec).bits).t()[:, :outputs]


def checked_g_idx(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Check that g_idx has contiguous groups, as the config says.

    Raises:
        NpuQuantError: bad-value if it has not.
    """
    group = group_size_of(spec)
    size = starts_new_groups_in_order(stored) if stored.dim() == 1 and stored.numel() else 0
    # A rank's part may end inside a group; its spec then has a divisor of the group size.
    if size == 0 or (group and size < stored.numel() and size % group):
        raise NpuQuantError([_out_of_order(stored, group)])
    return stored


def any_g_idx(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """Return g_idx unchanged."""
    return stored


def to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layouts GPTQ and GPTQ_V2: qweight int32 [K * bits / 32, N], zeros uint8 [G, N], scales float32 [G, N].

    A stored g_idx was verified by ``checked_g_idx`` and is not used.

    Raises:
        NpuQuantError: bad-value if the config has sym true and the stored zero points are not symmetric.
    """
    return CanonicalLinear(_weight(tensors, spec, None), bias=tensors.get("bias"))


def act_order_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Convert layouts GPTQ_ACT_ORDER and GPTQ_V2_ACT_ORDER: the same with g_idx int32 [K] and the scales of all groups.

    Raises:
        NpuQuantError: as ``to_canonical`` and ``arrange``.
    """
    arrangement = arrange(tensors["g_idx"].to(torch.int64), group_size_of(spec), tensors["scales"].shape[0])
    weight = _weight(tensors, spec, arrangement)
    return CanonicalLinear(weight, bias=tensors.get("bias"), input_permutation=arrangement.permutation)


def _weight(tensors: Mapping[str, torch.Tensor], spec: LayerSpec, arrangement: Arrangement | None) -> CanonicalWeight:
    words, scale, bits = tensors["qweight"], tensors["scales"].t(), stored_weight(spec).bits
    middle = 1 << (bits - 1)
    outputs = words.shape[1]
    # The last words may be padded.
    inputs = tensors["g_idx"].numel() if "g_idx" in tensors else words.shape[0] * 32 // bits
    stored = tensors["qzeros"]
    zero = None
    if bool((stored != middle).any()):
        if spec.weight is not None and spec.weight.symmetric:
            raise NpuQuantError([_contradiction(stored, middle, spec)])
        zero = stored.t().to(torch.float32) - middle

    def rows(start: int, stop: int) -> torch.Tensor:
        block = unpack(words[:, start:stop], bits)[:inputs]
        return ((block ^ 128).view(torch.int8) if bits == 8 else block.view(torch.int8) - middle).t()

    if arrangement is None:
        return CanonicalWeight(outputs, inputs, rows, scale, zero, group_size_of(spec), bits)
    scale = scale[:, arrangement.columns]
    zero = None if zero is None else zero[:, arrangement.columns]
    order = arrangement.permutation
    if order is None:
        return CanonicalWeight(outputs, inputs, rows, scale, zero, arrangement.group_size, bits)
    moved, filled = order.clamp(min=0), order < 0

    def sorted_rows(start: int, stop: int) -> torch.Tensor:
        return rows(start, stop).index_select(1, moved).masked_fill_(filled, 0)

    return CanonicalWeight(outputs, order.numel(), sorted_rows, scale, zero, arrangement.group_size, bits)


def _contradiction(stored: torch.Tensor, middle: int, spec: LayerSpec) -> Finding:
    low, high = int(stored.min()), int(stored.max())
    fix = 'set "sym": false in the quantization config if the producer quantized asymmetrically, or re-export'
    if low == high and abs(low - middle) == 1:
        other = "gptq" if spec.layout in _V2 else "gptq_v2"
        fix = (
            f'set "checkpoint_format": "{other}" in the quantization config: the zero points are off by one everywhere'
        )
    return Finding(
        "bad-value",
        "the config says sym true, and the weights have other zero points",
        expected=f"zero point {middle} everywhere",
        found=f"{low}" if low == high else f"{low} to {high}",
        fix=fix,
    )


def _out_of_order(stored: torch.Tensor, group: int) -> Finding:
    return Finding(
        "bad-value",
        "the config says desc_act false, and g_idx has another order or group size",
        expected=f"k // {group}" if group else "0 everywhere",
        found=", ".join(map(str, stored.flatten()[:8].tolist())) + ", ...",
        fix='set "desc_act": true in the quantization config, or re-export the checkpoint',
    )
