# SPDX-License-Identifier: Apache-2.0
"""GPTQ tensors to canonical numbers, and back.

``w[n, k] = (q[k, n] - z[g, n]) * scales[g, n]``, q and z in [0, 2^bits - 1], ``g = k // group_size`` or ``g_idx[k]``. The
integers are a stream of bits in int32 words, lowest bits first: q along K, z along N. For 3 bits the values 10 and 21 of
each 32 reach across two words (AutoGPTQ, GPTQModel, AutoRound's QuantLinear).

In the first format (``checkpoint_format: gptq``), producers subtract 1 from every zero point before they write it. GPTQModel
subtracts from whole words, so that a zero point of 0 borrows from its neighbour; adding to whole words gives it back, and is
the same as adding to each value where none is 0. For 3 bits it works on values, modulo 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import torch

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.g_idx import Arrangement, arrange, starts_new_groups_in_order
from vllm_npu_quant.layouts.tables import group_size_of
from vllm_npu_quant.spec import LayerSpec, Layout

__all__ = [
    "act_order_to_canonical",
    "any_g_idx",
    "bytes_of",
    "checked_g_idx",
    "pack",
    "to_canonical",
    "unpack",
    "zeros_v1",
    "zeros_v2",
]

_V2 = frozenset({Layout.GPTQ_V2, Layout.GPTQ_V2_ACT_ORDER})


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """int32 [...] to uint8 [..., 4], the lowest byte first, which is memory order on the little-endian hosts of NPUs."""
    # A dimension of length 1 may have any stride, which view() does not take.
    plain = torch.empty(words.shape, dtype=torch.int32, device=words.device).copy_(words)
    return plain.view(torch.uint8).unflatten(-1, (-1, 4))


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [W, C] to uint8 [W * 32 / bits, C]: the values follow each other along the first dimension.

    Args:
        words: the stream; for 3 bits it is continued with zeros to a multiple of 3 words.
        bits: 2, 3, 4 or 8.
    """
    if bits == 3:
        return _unpack_3_bits(words)
    as_bytes = bytes_of(words).movedim(-1, 1)
    if bits == 8:
        return as_bytes.flatten(0, 1)
    mask = (1 << bits) - 1
    parts = torch.stack([(as_bytes >> shift) & mask for shift in range(0, 8, bits)], dim=2)
    return parts.flatten(0, 2)


def _unpack_3_bits(words: torch.Tensor) -> torch.Tensor:
    stream = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[0] % 3)).unflatten(0, (-1, 3))
    values = []
    for first in range(0, 96, 3):
        word, shift = divmod(first, 32)
        value = stream[:, word] >> shift
        if shift > 29:
            kept = 32 - shift
            value = (value & ((1 << kept) - 1)) | (stream[:, word + 1] << kept)
        values.append((value & 7).to(torch.uint8))
    return torch.stack(values, dim=1).flatten(0, 1)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``unpack``: integers [n, C] in [0, 2^bits - 1] to int32 [n * bits / 32, C].

    Args:
        values: n is a multiple of 32 / gcd(32, bits).
        bits: 2, 3, 4 or 8.
    """
    run = 32 // gcd(32, bits)
    stream = values.to(torch.int64).unflatten(0, (-1, run))
    words = torch.zeros(stream.shape[0], run * bits // 32, *values.shape[1:], dtype=torch.int64, device=values.device)
    for i in range(run):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= stream[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= stream[:, i] >> (32 - shift)
    words &= 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(0, 1)


def _bits(spec: LayerSpec) -> int:
    assert spec.weight is not None
    return spec.weight.bits


def zeros_v1(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """qzeros int32 [G, N * bits / 32], stored minus one, to uint8 [G, N]."""
    bits = _bits(spec)
    if bits == 3:
        return (zeros_v2(stored, spec, outputs) + 1) & 7
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return zeros_v2(stored + ones, spec, outputs)  # int32 wraps around, as the subtraction did


def zeros_v2(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """qzeros int32 [G, N * bits / 32] to uint8 [G, N]."""
    return unpack(stored.t(), _bits(spec)).t()[:, :outputs]


def checked_g_idx(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """g_idx of a layer whose groups are runs of neighbours: it must say so, too.

    Raises:
        NpuQuantError: bad-value where it does not.
    """
    group = group_size_of(spec)
    size = starts_new_groups_in_order(stored) if stored.dim() == 1 and stored.numel() else 0
    # A rank's part may end inside of a group: its spec has then a divisor of the group size.
    if size == 0 or (group and size < stored.numel() and size % group):
        raise NpuQuantError([_out_of_order(stored, group)])
    return stored


def any_g_idx(stored: torch.Tensor, spec: LayerSpec, outputs: int) -> torch.Tensor:
    """g_idx as it is."""
    return stored


def to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Layouts GPTQ and GPTQ_V2: qweight int32 [K * bits / 32, N], zeros uint8 [G, N], scales float32 [G, N].

    g_idx, where it was stored, was compared by ``checked_g_idx`` and is dropped.

    Raises:
        NpuQuantError: bad-value where the config says sym true, and the stored zero points say otherwise.
    """
    return CanonicalLinear(_weight(tensors, spec, None), bias=tensors.get("bias"))


def act_order_to_canonical(tensors: Mapping[str, torch.Tensor], spec: LayerSpec) -> CanonicalLinear:
    """Layouts GPTQ_ACT_ORDER and GPTQ_V2_ACT_ORDER: the same with g_idx int32 [K] and the scales of all groups.

    Raises:
        NpuQuantError: as ``to_canonical`` and ``arrange``.
    """
    arrangement = arrange(tensors["g_idx"].to(torch.int64), group_size_of(spec), tensors["scales"].shape[0])
    weight = _weight(tensors, spec, arrangement)
    return CanonicalLinear(weight, bias=tensors.get("bias"), input_permutation=arrangement.permutation)


def _weight(tensors: Mapping[str, torch.Tensor], spec: LayerSpec, arrangement: Arrangement | None) -> CanonicalWeight:
    words, scale, bits = tensors["qweight"], tensors["scales"].t(), _bits(spec)
    middle = 1 << (bits - 1)
    outputs = words.shape[1]
    # Words may have room for more inputs than there are.
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
