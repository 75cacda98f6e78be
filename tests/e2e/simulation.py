# SPDX-License-Identifier: Apache-2.0
"""What int4 activations cost in float32.

They cost so much accuracy that a limit on the error says little: those runs are compared with a float simulation of the same
scheme in the same engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from vllm_npu_quant.layouts.canonical import CanonicalLinear, InputTransform
from vllm_npu_quant.methods import w4a4
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext

__all__ = ["FloatSimulation", "simulated_int4_activations"]


class FloatSimulation(NpuLinearMethod):
    """int4 activations in float32: ``x_scale = clip * max|x| / 7``, ``x_q = clamp(round(x / x_scale), -8, 7)``."""

    def prepare(self, linear: CanonicalLinear, context: PrepareContext) -> dict[str, torch.Tensor]:
        self.transform = linear.transform
        return {"weight": linear.weight.dequantize()}

    def compute(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.float().reshape(-1, x.shape[-1])
        clip = 1.0
        if self.transform is not None:
            tokens, clip = simulated_transform(tokens, self.transform), self.transform.clip
        scale = clip * tokens.abs().amax(1, keepdim=True) / 7
        y = (torch.round(tokens / scale).clamp(-8, 7) * scale) @ layer.weight.T
        return (y if bias is None else y + bias.float()).to(x.dtype).reshape(*x.shape[:-1], -1)


def simulated_transform(tokens: torch.Tensor, transform: InputTransform) -> torch.Tensor:
    left, right = transform.left, transform.right
    assert left is not None
    matrices = tokens.view(tokens.shape[0], left.shape[0], -1)
    matrices = matrices if right is None else matrices @ right
    return (left.T @ matrices).flatten(1)


@contextmanager
def simulated_int4_activations() -> Iterator[None]:
    """Layers of int4 activations that are built meanwhile compute in float32."""
    with mock.patch.object(w4a4, "W4A4DynamicLinear", FloatSimulation):
        yield
