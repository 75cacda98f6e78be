# SPDX-License-Identifier: Apache-2.0
"""Random canonical layers for the tests of method classes, and what they must compute, in NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_npu_quant import emulation
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext

emulation.register()

DTYPES = (torch.bfloat16, torch.float16)


def random_weight(
    outputs: int, inputs: int, bits: int, group: int = 0, *, asymmetric: bool = False, seed: int = 0
) -> CanonicalWeight:
    """Integers of the full range, scales of the size that makes outputs of about 1."""
    rng = np.random.default_rng((seed, outputs, inputs, bits, group))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = torch.from_numpy(rng.integers(low, high, (outputs, inputs)).astype(np.int8))
    groups = -(-inputs // group) if group else 1
    scale = torch.from_numpy((rng.uniform(0.5, 2.0, (outputs, groups)) / high / inputs**0.5).astype(np.float32))
    zero = torch.from_numpy(rng.integers(low, high, (outputs, groups)).astype(np.float32)) if asymmetric else None
    return CanonicalWeight.of(values, scale, zero, group if groups > 1 else 0, bits)


def random_input(tokens: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    rng = np.random.default_rng((seed, tokens, inputs))
    return torch.from_numpy(rng.standard_normal((tokens, inputs)).astype(np.float32)).to(dtype)


def dequantized(weight: CanonicalWeight) -> np.ndarray:
    """The weight in float64, from the formula alone."""
    values = weight.values.numpy().astype(np.float64)
    group = weight.group_size or weight.inputs
    out = np.empty_like(values)
    scale = np.broadcast_to(weight.scale.numpy(), (weight.outputs, weight.scale.shape[1]))
    for k in range(weight.inputs):
        zero = 0.0 if weight.zero is None else weight.zero.numpy()[:, k // group]
        out[:, k] = (values[:, k] - zero) * scale[:, k // group]
    return out


def run(
    method: NpuLinearMethod,
    linear: CanonicalLinear,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    adds_constants: bool = True,
) -> torch.Tensor:
    """prepare and apply, as the adapter does it. ``bias``: float32 [N]."""
    layer = prepared(method, linear, x.dtype, adds_constants=adds_constants)
    return method.apply(layer, x, None if bias is None else bias.to(method.bias_dtype(x.dtype)))


def prepared(
    method: NpuLinearMethod, linear: CanonicalLinear, dtype: torch.dtype, *, adds_constants: bool = True
) -> Any:
    """An object with the prepared tensors as attributes."""
    tensors = method.prepare(linear, PrepareContext(dtype, adds_constants))
    method.finish(tensors)
    return SimpleNamespace(**tensors)


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    difference = found.to(torch.float64).numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def rows_of(linear: CanonicalLinear, start: int, stop: int) -> CanonicalLinear:
    """A column-parallel rank's part: outputs [start, stop)."""
    whole = linear.weight
    zero = None if whole.zero is None else whole.zero[start:stop]
    weight = CanonicalWeight(
        stop - start,
        whole.inputs,
        lambda low, high: whole.rows(start + low, start + high),
        whole.scale[start:stop],
        zero,
        whole.group_size,
        whole.bits,
    )
    return CanonicalLinear(weight, bias=None if linear.bias is None else linear.bias[start:stop])


def inputs_of(linear: CanonicalLinear, start: int, stop: int, group: int | None = None) -> CanonicalLinear:
    """A row-parallel rank's part: inputs [start, stop). ``group``: its group size, which divides start and the whole's."""
    whole = linear.weight
    group = whole.group_size if group is None else group
    columns = torch.arange(start, stop, group) // whole.group_size if group else torch.zeros(1, dtype=torch.int64)
    scale = whole.scale[:, columns].contiguous()
    zero = None if whole.zero is None else whole.zero[:, columns].contiguous()
    weight = CanonicalWeight(
        whole.outputs,
        stop - start,
        lambda low, high: whole.rows(low, high)[:, start:stop],
        scale,
        zero,
        group if scale.shape[1] > 1 else 0,
        whole.bits,
    )
    return CanonicalLinear(weight)
