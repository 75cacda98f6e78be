# SPDX-License-Identifier: Apache-2.0
"""Random MoE layers for the tests of the grouped methods, and what they must compute: NumPy, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from tests.methods.layers import dequantized, inputs_of, random_weight, rows_of
from vllm_npu_quant import emulation
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods.moe import Experts, FusedExperts, GroupedMethod, Input, Placement
from vllm_npu_quant.methods.moe_int4 import W4A4DynamicExperts, W4A8DynamicExperts
from vllm_npu_quant.methods.moe_w8a8 import W8A8DynamicExperts
from vllm_npu_quant.methods.moe_weight_only import FloatExperts, WeightOnlyExperts

emulation.register()


@dataclass(frozen=True)
class Scheme:
    """A method and random weights that it serves."""

    name: str
    method: Callable[[str], GroupedMethod]
    bits: int
    group: int = 0
    asymmetric: bool = False

    def weight(self, outputs: int, inputs: int, seed: int) -> CanonicalLinear:
        if self.method is FloatExperts and self.bits == 16:
            rng = np.random.default_rng((seed, outputs, inputs))
            values = torch.from_numpy((rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32))
            weight = CanonicalWeight(outputs, inputs, lambda *_: values[:0], torch.ones(1, 1))
            weight.float_rows = lambda start, stop: values[start:stop]
            return CanonicalLinear(weight)
        return CanonicalLinear(
            random_weight(outputs, inputs, self.bits, self.group, asymmetric=self.asymmetric, seed=seed)
        )


W8A8 = Scheme("w8a8", W8A8DynamicExperts, 8)
FLOAT = Scheme("float", FloatExperts, 16)
W4A16_GROUP = Scheme("w4a16-g32-asym", WeightOnlyExperts, 4, 32, asymmetric=True)
W4A8 = Scheme("w4a8", W4A8DynamicExperts, 4)
SCHEMES = (
    W8A8,
    Scheme("w8a16", WeightOnlyExperts, 8),
    Scheme("w8a16-asym", WeightOnlyExperts, 8, asymmetric=True),
    Scheme("w8a16-g32", FloatExperts, 8, 32),
    Scheme("w4a16", WeightOnlyExperts, 4),
    Scheme("w4a16-asym", WeightOnlyExperts, 4, asymmetric=True),
    Scheme("w4a16-g32", WeightOnlyExperts, 4, 32),
    W4A16_GROUP,
    Scheme("w3a16-g48", WeightOnlyExperts, 3, 48),
    Scheme("w2a16-g32-asym", WeightOnlyExperts, 2, 32, asymmetric=True),
    W4A8,
    Scheme("w4a8-g32", W4A8DynamicExperts, 4, 32),
    Scheme("w4a4", W4A4DynamicExperts, 4),
    Scheme("w4a4-g32", W4A4DynamicExperts, 4, 32),
    FLOAT,
)


@dataclass
class MoeLayer:
    """The experts of a layer: gate, up, down as canonical weights."""

    w13: Scheme
    w2: Scheme
    hidden: int
    inner: int
    experts: list[tuple[CanonicalLinear, CanonicalLinear, CanonicalLinear]] = field(default_factory=list)

    @classmethod
    def random(cls, w13: Scheme, w2: Scheme, hidden: int, inner: int, count: int) -> MoeLayer:
        experts = [
            (
                w13.weight(inner, hidden, 3 * expert),
                w13.weight(inner, hidden, 3 * expert + 1),
                w2.weight(hidden, inner, 3 * expert + 2),
            )
            for expert in range(count)
        ]
        return cls(w13, w2, hidden, inner, experts)

    def prepared(self, dtype: torch.dtype) -> tuple[FusedExperts, SimpleNamespace]:
        """The chain and an object that has its tensors."""
        methods = self.w13.method("w13_"), self.w2.method("w2_")
        gate, _, down = self.experts[0]
        groups = tuple(linear.weight.group_size if linear.weight.scale.shape[1] > 1 else 0 for linear in (gate, down))
        chain = FusedExperts(*methods, self.hidden, self.inner, (groups[0], groups[1]))
        count, cpu = len(self.experts), torch.device("cpu")
        products = (
            Experts(count, 2, self.inner, self.hidden, cpu, lambda expert: self.experts[expert][:2]),
            Experts(count, 1, self.hidden, self.inner, cpu, lambda expert: self.experts[expert][2:]),
        )
        tensors = {}
        for method, experts, sizes in zip(methods, products, (chain.w13_sizes, chain.w2_sizes), strict=True):
            made = method.finish(method.prepare(experts, sizes, dtype))
            tensors |= {method.prefix + name: value for name, value in made.items()}
        return chain, SimpleNamespace(**tensors)

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        count: int | None = None,
    ) -> torch.Tensor:
        chain, layer = self.prepared(x.dtype)
        placement = Placement.of(count or len(self.experts), expert_map)
        return chain.apply(layer, placement, x, weights, ids)

    def inner_part(self, start: int, stop: int) -> MoeLayer:
        """A tensor-parallel rank: rows of gate and up, columns of down. Groups are cut where the part begins inside one."""
        group = self.experts[0][2].weight.group_size
        group = int(np.gcd(group, np.gcd(start, stop - start))) if group else 0
        experts = [
            (
                _with_floats(rows_of(gate, start, stop), gate, slice(start, stop), slice(None)),
                _with_floats(rows_of(up, start, stop), up, slice(start, stop), slice(None)),
                _with_floats(inputs_of(down, start, stop, group), down, slice(None), slice(start, stop)),
            )
            for gate, up, down in self.experts
        ]
        return MoeLayer(self.w13, self.w2, self.hidden, stop - start, experts)

    def some_experts(self, numbers: Sequence[int]) -> MoeLayer:
        """An expert-parallel rank."""
        return MoeLayer(self.w13, self.w2, self.hidden, self.inner, [self.experts[number] for number in numbers])

    def expected(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
        """The documented formula in float64, one token and one expert at a time."""
        out = np.zeros((x.shape[0], self.hidden))
        tokens = x.to(torch.float64).numpy()
        for t, choices in enumerate(ids.tolist()):
            for j, expert in enumerate(choices):
                gate, up, down = (_float_weight(linear.weight) for linear in self.experts[expert])
                token = _as_taken(tokens[t], self.w13)
                a, b = gate @ token, up @ token
                inner = _as_taken(a / (1 + np.exp(-a)) * b, self.w2)
                out[t] += float(weights[t, j]) * (down @ inner)
        return out


def _with_floats(part: CanonicalLinear, whole: CanonicalLinear, rows: slice, columns: slice) -> CanonicalLinear:
    """The part with its floats, where the whole is floats."""
    if whole.weight.float_rows is not None:
        values = whole.weight.float_rows(0, whole.weight.outputs)[rows, columns]
        part.weight.float_rows = lambda start, stop: values[start:stop]
    return part


def _float_weight(weight: CanonicalWeight) -> np.ndarray:
    if weight.float_rows is not None:
        return weight.float_rows(0, weight.outputs).to(torch.float64).numpy()
    return dequantized(weight)


def _as_taken(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    """x after the quantization that the scheme asks for: a scale of max|x| / 127 (int8) or / 7 (int4)."""
    limit = {Input.INT8: 127, Input.INT4: 7}.get(scheme.method.takes)  # type: ignore[attr-defined]
    largest = np.abs(x).max()
    return x if limit is None or largest == 0 else np.rint(x * (limit / largest)) * (largest / limit)


def routing(tokens: int, k: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [T, k] that sum to about 1, and k different experts per token, int32 [T, k]."""
    rng = np.random.default_rng((seed, tokens, k, count))
    ids = np.stack([rng.permutation(count)[:k] for _ in range(tokens)]) if tokens else np.empty((0, k))
    weights = rng.dirichlet(np.ones(k), tokens) if tokens else np.empty((0, k))
    return torch.from_numpy(weights.astype(np.float32)), torch.from_numpy(ids.astype(np.int32))
