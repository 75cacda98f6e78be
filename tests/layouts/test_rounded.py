# SPDX-License-Identifier: Apache-2.0
"""Float weights that are rounded while they load, against the formula in NumPy's float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.layouts import load_object
from vllm_npu_quant.layouts.tables import LAYOUTS, tensors_of
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, WeightSpec


def weight_of(outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    values = np.random.default_rng((outputs, inputs)).standard_normal((outputs, inputs))
    values[0] = 0  # a row without a scale of its own
    values[-1] *= 1e-30
    return torch.from_numpy(values).to(dtype)


def received(spec: LayerSpec, stored: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a layer's parameters hold, in the form of the table of layouts."""
    tensors = {}
    for tensor in tensors_of(spec):
        tensors[tensor.name] = load_object(tensor.rearrange)(stored, spec, stored.shape[0])
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 2), (5, 64), (300, 130)])
def test_int8_per_row(size: tuple[int, int], dtype: torch.dtype) -> None:
    stored, spec = weight_of(*size, dtype), LayerSpec("W8A8_DYNAMIC", Layout.ROUNDED, WeightSpec(8))
    canonical = load_object(LAYOUTS[Layout.ROUNDED].to_canonical)(received(spec, stored), spec)
    exact = stored.to(torch.float32).numpy()
    scale = np.maximum(np.abs(exact).max(1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
    assert np.array_equal(canonical.weight.scale.numpy(), scale.astype(np.float32))
    assert np.array_equal(canonical.weight.values.numpy(), np.clip(np.rint(exact / scale), -128, 127))


@pytest.mark.parametrize("size", [(3, 64), (40, 192), (9, 96)])
def test_int4_per_group(size: tuple[int, int]) -> None:
    """Of 96 inputs the second group of 64 has 32."""
    weight = WeightSpec(4, granularity=Granularity.GROUP, group_size=64)
    stored, spec = weight_of(*size, torch.float32), LayerSpec("W4A16", Layout.ROUNDED_PAIRS, weight)
    tensors = received(spec, stored)
    assert tensors["weight"].shape == (size[0], size[1] // 2)
    canonical = load_object(LAYOUTS[Layout.ROUNDED_PAIRS].to_canonical)(tensors, spec)
    exact = stored.numpy()
    for start in range(0, size[1], 64):
        part = exact[:, start : start + 64]
        largest = torch.from_numpy(np.maximum(np.abs(part).max(1) / np.float32(7), np.finfo(np.float32).tiny))
        scale = largest.to(torch.bfloat16).to(torch.float32).numpy()[:, None]
        assert np.array_equal(canonical.weight.scale[:, start // 64].numpy(), scale[:, 0])
        integers = canonical.weight.values[:, start : start + 64].numpy()
        assert np.array_equal(integers, np.clip(np.rint(part / scale), -8, 7))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_has_no_integer(value: float) -> None:
    stored, spec = weight_of(5, 64, torch.float32), LayerSpec("W8A16", Layout.ROUNDED, WeightSpec(8))
    stored[3, 7] = value
    with pytest.raises(NpuQuantError, match="bad-value"):
        received(spec, stored)
