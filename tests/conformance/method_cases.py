# SPDX-License-Identifier: Apache-2.0
"""The layers whose calls are recorded: every row of the dispatch table, in each form that changes what is called.

Only torch is imported: the cases run in this process over the emulation, and in one of their own over the real torch_npu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from tests.methods.layers import random_weight
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, InputTransform, StaticActivation
from vllm_npu_quant.methods.base import PrepareContext
from vllm_npu_quant.methods.moe import Experts, FusedExperts, GroupedMethod, Placement
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.serving.dispatch import Row
from vllm_npu_quant.spec import (
    ActivationSpec,
    Granularity,
    LayerKind,
    LayerSpec,
    Layout,
    NumberKind,
    TransformSpec,
    WeightSpec,
)

Move = Callable[[torch.Tensor], torch.Tensor]
BF16, F16 = torch.bfloat16, torch.float16
TOKENS = 5
EXPERTS = 4
TOP_K = 2


def load_object(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Scheme:
    """A layer's quantization in the terms that a method sees.

    Attributes:
        bits: of the weight; 16 for floats.
        group: inputs per scale; 0 for one scale per output.
        zero_points: whether the weight has any.
        act: bits of the activation; 0 where it is not quantized.
    """

    bits: int
    group: int = 0
    zero_points: bool = False
    act: int = 0
    static: bool = False
    act_offset: bool = False

    def spec(self, transform: InputTransform | None = None) -> LayerSpec:
        weight = WeightSpec(
            self.bits,
            NumberKind.FLOAT if self.bits == 16 else NumberKind.INT,
            Granularity.GROUP if self.group else Granularity.CHANNEL,
            self.group,
            not self.zero_points,
        )
        activation = None
        if self.act:
            granularity = Granularity.TENSOR if self.static else Granularity.TOKEN
            activation = ActivationSpec(self.act, not self.static, granularity, symmetric=not self.act_offset)
        matrices = None
        if transform is not None:
            left, right = (0 if m is None else m.shape[0] for m in (transform.left, transform.right))
            matrices = TransformSpec(left, right, transform.clip != 1.0)
        return LayerSpec(str(self), Layout.CT_INT, weight, activation, transform=matrices)

    def row(self, kind: LayerKind, transform: InputTransform | None = None) -> Row:
        return dispatch.find_row(kind, self.spec(transform))

    def weight(self, outputs: int, inputs: int, seed: int = 0) -> CanonicalWeight:
        if self.bits != 16:
            return random_weight(outputs, inputs, self.bits, self.group, asymmetric=self.zero_points, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weight = CanonicalWeight.of(values, torch.ones(1, 1))
        weight.float_rows = lambda start, stop: weight.rows(start, stop)
        return weight

    def __str__(self) -> str:
        text = f"w{self.bits}a{self.act or 16}"
        text += f" group {self.group}" if self.group else ""
        text += " zero points" if self.zero_points else ""
        return text + (" static" if self.static else " dynamic offset" if self.act_offset else "")


def moved(linear: CanonicalLinear, move: Move) -> CanonicalLinear:
    """The layer with its tensors on another device."""

    def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else move(tensor)

    whole = linear.weight
    values = move(whole.values)
    weight = replace(
        whole, rows=lambda start, stop: values[start:stop], scale=move(whole.scale), zero=maybe(whole.zero)
    )
    if whole.float_rows is not None:
        weight.float_rows = weight.rows
    static = linear.static
    if static is not None:
        static = StaticActivation(
            move(static.scale),
            move(static.offset),
            move(static.deq_scale),
            maybe(static.quant_bias),
            maybe(static.correction),
        )
    transform = linear.transform
    if transform is not None:
        transform = InputTransform(maybe(transform.left), maybe(transform.right), transform.clip)
    return CanonicalLinear(weight, static, maybe(linear.bias), maybe(linear.input_permutation), transform)


@dataclass
class Prepared:
    """A layer that is ready to be applied.

    Attributes:
        tensors: those that ``prepare`` made, by attribute.
        apply: from these attributes and the inputs by name to the output.
        inputs: dtypes and shapes of the inputs; -1 stands for the number of tokens.
        expected: the same of the output.
    """

    tensors: dict[str, torch.Tensor]
    apply: Callable[..., torch.Tensor]
    inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    expected: tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class LinearCase:
    """A Linear layer [outputs, inputs].

    Attributes:
        leading: dimensions of the input before the tokens.
        permuted: whether its inputs are permuted; ``filled``: and whether groups are filled up with zeros.
        context: what differs from a layer on one rank, and the inputs of all ranks.
        quant_bias, correction: what a static scheme stores.
    """

    name: str
    scheme: Scheme
    outputs: int
    inputs: int
    dtype: torch.dtype = BF16
    bias: bool = False
    leading: tuple[int, ...] = ()
    permuted: bool = False
    filled: int = 0
    transform: tuple[int, int, float] | None = None
    context: dict[str, int] = field(default_factory=dict)
    quant_bias: bool = True
    correction: bool = False

    @property
    def matrices(self) -> InputTransform | None:
        if self.transform is None:
            return None
        left, right, clip = self.transform
        return InputTransform(
            torch.ones(left, left) if left else None, torch.ones(right, right) if right else None, clip
        )

    @property
    def row(self) -> Row:
        return self.scheme.row(LayerKind.LINEAR, self.matrices)

    @property
    def title(self) -> str:
        parts = [str(self.scheme), f"[{self.outputs}, {self.inputs}]", str(self.dtype).removeprefix("torch.")]
        return f"{self.name}: {' '.join(parts)}" + (", bias" if self.bias else "")

    def linear(self) -> CanonicalLinear:
        weight = self.scheme.weight(self.outputs, self.inputs)
        static = None
        if self.scheme.static:
            static = StaticActivation(
                torch.tensor([0.02]),
                torch.tensor([3.0]),
                0.02 * weight.scale.reshape(-1),
                torch.arange(self.outputs, dtype=torch.int32) if self.quant_bias else None,
                torch.arange(self.outputs, dtype=torch.int32) if self.correction else None,
            )
        permutation = None
        if self.permuted:
            permutation = torch.arange(self.inputs).flip(0)
            permutation = torch.where(permutation >= self.inputs - self.filled, -1, permutation)
        return CanonicalLinear(weight, static, input_permutation=permutation, transform=self.matrices)

    def prepare(self, move: Move) -> Prepared:
        method = load_object(self.row.method)()
        tensors = method.prepare(moved(self.linear(), move), PrepareContext(self.dtype, **self.context))
        method.finish(tensors)
        width = self.context.get("inputs_whole", 0) if method.gathers_inputs else 0
        width = width or self.inputs - self.filled
        inputs: dict[str, Any] = {"x": (self.dtype, (*self.leading, -1, width))}
        if self.bias:
            inputs["bias"] = (method.bias_dtype(self.dtype), (self.outputs,))
        return Prepared(tensors, method.apply, inputs, (self.dtype, (*self.leading, -1, self.outputs)))


@dataclass(frozen=True)
class MoeCase:
    """The routed experts of a layer: ``w13`` [2 * inner, hidden] and ``w2`` [hidden, inner] for each expert.

    Attributes:
        expert_map: as vLLM gives it, for a rank that has some of the experts.
        weighted: whether the outputs are multiplied by the router's weights (or the inputs were before).
    """

    name: str
    w13: Scheme
    w2: Scheme
    hidden: int = 512
    inner: int = 256
    dtype: torch.dtype = BF16
    expert_map: tuple[int, ...] | None = None
    weighted: bool = True

    @property
    def rows(self) -> tuple[Row, Row]:
        return self.w13.row(LayerKind.FUSED_MOE), self.w2.row(LayerKind.FUSED_MOE)

    @property
    def title(self) -> str:
        sizes = f"hidden {self.hidden}, inner {self.inner} {str(self.dtype).removeprefix('torch.')}"
        return f"{self.name}: w13 {self.w13}, w2 {self.w2}, {sizes}"

    @property
    def experts(self) -> int:
        """How many this rank has."""
        return EXPERTS if self.expert_map is None else sum(number >= 0 for number in self.expert_map)

    def _experts(self, product: str, move: Move, device: torch.device) -> Experts:
        scheme, shards = (self.w13, 2) if product == "w13_" else (self.w2, 1)
        outputs, inputs = (self.inner, self.hidden) if product == "w13_" else (self.hidden, self.inner)
        linears = [
            [
                moved(CanonicalLinear(scheme.weight(outputs, inputs, expert * shards + shard)), move)
                for shard in range(shards)
            ]
            for expert in range(self.experts)
        ]
        return Experts(self.experts, shards, outputs, inputs, device, lambda expert: linears[expert])

    def prepare(self, move: Move) -> Prepared:
        w13, w2 = (load_object(row.method)(prefix) for row, prefix in zip(self.rows, ("w13_", "w2_"), strict=True))
        groups = tuple(
            scheme.group if scheme.group and scheme.group < inputs else 0
            for scheme, inputs in ((self.w13, self.hidden), (self.w2, self.inner))
        )
        chain = FusedExperts(w13, w2, self.hidden, self.inner, (groups[0], groups[1]))
        device = move(torch.zeros(1)).device
        tensors: dict[str, torch.Tensor] = {}
        methods: tuple[tuple[GroupedMethod, Any], ...] = ((w13, chain.w13_sizes), (w2, chain.w2_sizes))
        for method, sizes in methods:
            made = method.prepare(self._experts(method.prefix, move, device), sizes, self.dtype)
            tensors |= {method.prefix + name: value for name, value in method.finish(made).items()}
        count = EXPERTS if self.expert_map is None else len(self.expert_map)
        placement = Placement.of(count, None if self.expert_map is None else torch.tensor(self.expert_map))
        inputs: dict[str, Any] = {"x": (self.dtype, (-1, self.hidden))}
        if self.weighted:
            inputs["topk_weights"] = (torch.float32, (-1, TOP_K))
        inputs["topk_ids"] = (torch.int32, (-1, TOP_K if self.weighted else 1))
        if placement.to_local is not None:
            tensors["expert_to_local"] = move(placement.to_local)

        def apply(layer: Any, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: Any = None) -> torch.Tensor:
            local = getattr(layer, "expert_to_local", None)
            where = placement if local is None else replace(placement, to_local=local)
            return chain.apply(layer, where, x, topk_weights, topk_ids)

        return Prepared(tensors, apply, inputs, (self.dtype, (-1, self.hidden)))


Case = LinearCase | MoeCase

W8A8 = Scheme(8, act=8)
W8A8_OFFSET = Scheme(8, act=8, act_offset=True)
W8A8_STATIC = Scheme(8, act=8, static=True)
W4A8 = Scheme(4, act=8)
W4A4 = Scheme(4, act=4)
FLOAT = Scheme(16)


def _weight_only(bits: int) -> Iterator[LinearCase]:
    channel, group, asymmetric = Scheme(bits), Scheme(bits, 128), Scheme(bits, 32, zero_points=True)
    yield LinearCase("channel", channel, 64, 128)
    yield LinearCase("channel, zero points", replace(channel, zero_points=True), 64, 128, bias=True)
    yield LinearCase("group", group, 64, 256, bias=True)
    yield LinearCase("group, zero points", asymmetric, 64, 256, F16, bias=True)
    yield LinearCase("one group is a channel", group, 64, 128)
    yield LinearCase("last group short", Scheme(bits, 64), 64, 160)
    yield LinearCase("groups filled up to 64", Scheme(bits, 48, zero_points=True), 64, 144)
    yield LinearCase("odd sizes", Scheme(bits, 32, zero_points=True), 37, 33, bias=True)
    yield LinearCase("leading dimension", group, 64, 256, leading=(2,))
    yield LinearCase("permuted inputs", asymmetric, 64, 256, permuted=True)
    yield LinearCase("permuted inputs, filled groups", asymmetric, 64, 256, permuted=True, filled=7)
    yield LinearCase("more than 65535 outputs", asymmetric, 65600, 64, bias=True)


def _linear_cases() -> Iterator[LinearCase]:
    yield LinearCase("channel", W8A8, 64, 128)
    yield LinearCase("bias", W8A8, 64, 128, bias=True)
    yield LinearCase("bias", W8A8, 64, 128, F16, bias=True)
    yield LinearCase("odd sizes", W8A8, 33, 50, bias=True)
    yield LinearCase("leading dimension", W8A8, 64, 128, leading=(2,))
    yield LinearCase("more than 65535 outputs", W8A8, 65600, 32, bias=True)
    yield LinearCase("rotated", W8A8, 64, 128, transform=(8, 16, 1.0))
    yield LinearCase(
        "rotated, a row-parallel rank",
        W8A8,
        64,
        64,
        transform=(8, 16, 1.0),
        context={"inputs_start": 64, "inputs_whole": 128},
    )
    yield LinearCase("channel", W8A8_OFFSET, 64, 128)
    yield LinearCase("bias", W8A8_OFFSET, 64, 128, F16, bias=True)
    yield LinearCase("more than 65535 outputs", W8A8_OFFSET, 65600, 32, bias=True)
    yield LinearCase("rotated", W8A8_OFFSET, 64, 128, transform=(8, 16, 1.0))
    yield LinearCase("groups", Scheme(8, 64, act=8), 64, 256)
    yield LinearCase("groups, zero points", Scheme(8, 32, zero_points=True, act=8), 64, 256, F16, bias=True)
    yield LinearCase("channel, zero points", Scheme(8, zero_points=True, act=8), 64, 128, bias=True)
    yield LinearCase("odd sizes", Scheme(8, 32, zero_points=True, act=8), 33, 50)
    yield LinearCase("more than 65535 outputs", Scheme(8, 32, act=8), 65600, 64)
    yield LinearCase("rotated", Scheme(8, 64, act=8), 64, 128, transform=(8, 16, 1.0))
    yield LinearCase("quant_bias", W8A8_STATIC, 64, 128)
    yield LinearCase("quant_bias", W8A8_STATIC, 64, 128, F16)
    yield LinearCase("no constants", W8A8_STATIC, 64, 128, quant_bias=False)
    yield LinearCase("no constants", W8A8_STATIC, 64, 128, F16, quant_bias=False)
    yield LinearCase("correction", W8A8_STATIC, 64, 128, correction=True)
    yield LinearCase("second rank", W8A8_STATIC, 64, 128, context={"adds_constants": False})
    yield LinearCase("more than 65535 outputs", W8A8_STATIC, 65600, 32, F16)
    yield LinearCase("rotated", W8A8_STATIC, 64, 128, transform=(8, 16, 1.0))
    yield from _weight_only(8)
    yield from _weight_only(4)
    yield LinearCase("2 bits", Scheme(2, 64, zero_points=True), 64, 256)
    yield LinearCase("3 bits", Scheme(3, 64), 64, 256, F16)
    yield LinearCase("channel", W4A8, 64, 256)
    yield LinearCase("channel", W4A8, 64, 256, F16, bias=True)
    yield LinearCase("inputs filled up to 256", W4A8, 36, 300)
    yield LinearCase("groups of 256", Scheme(4, 256, act=8), 64, 512, bias=True)
    yield LinearCase("groups of 512", Scheme(4, 512, act=8), 64, 1024)
    yield LinearCase("by halves", Scheme(4, 32, act=8), 64, 256)
    yield LinearCase("by halves", Scheme(4, 128, act=8), 36, 384, F16, bias=True)
    yield LinearCase("more than 18432 inputs", Scheme(4, 256, act=8), 16, 18688)
    yield LinearCase("more than 65535 outputs", W4A8, 65600, 256)
    yield LinearCase("rotated", W4A8, 64, 256, transform=(16, 16, 1.0))
    yield LinearCase("channel", W4A4, 64, 128)
    yield LinearCase("channel", W4A4, 64, 128, F16, bias=True)
    yield LinearCase("odd sizes", W4A4, 33, 50, bias=True)
    yield LinearCase("more than 65535 outputs", W4A4, 65600, 32)
    yield LinearCase("Kronecker product", W4A4, 64, 128, transform=(8, 16, 0.9))
    yield LinearCase("right matrix only", W4A4, 64, 128, F16, bias=True, transform=(0, 16, 1.0))
    yield LinearCase("too large for npu_kronecker_quant", W4A4, 64, 1032, transform=(3, 344, 0.9))
    yield LinearCase(
        "Kronecker product, a row-parallel rank",
        W4A4,
        64,
        64,
        transform=(8, 16, 0.9),
        context={"inputs_start": 64, "inputs_whole": 128},
    )
    yield LinearCase("group", Scheme(4, 64, act=4), 64, 256)
    yield LinearCase("group", Scheme(4, 32, act=4), 36, 256, F16, bias=True)
    yield LinearCase("group, rotated", Scheme(4, 64, act=4), 64, 256, transform=(16, 16, 1.0))
    yield LinearCase("floats", FLOAT, 64, 128, bias=True)
    yield LinearCase("permuted inputs", FLOAT, 64, 128, F16, permuted=True)


#: One for each arithmetic of a grouped product: all pairs are recorded.
MOE_SCHEMES = (
    W8A8,
    Scheme(8),
    Scheme(4, 32, zero_points=True),
    FLOAT,
    W4A8,
    Scheme(4, 32, act=8),
    W4A4,
)
#: The others, as w13 and w2 of the same layer.
MORE_MOE_SCHEMES = (
    W8A8_STATIC,
    Scheme(8, zero_points=True),
    Scheme(8, 32),
    Scheme(4),
    Scheme(4, zero_points=True),
    Scheme(4, 128),
    Scheme(3, 64),
    Scheme(2, 32, zero_points=True),
    Scheme(4, 256, act=8),
    Scheme(4, 32, act=4),
)


def _moe_cases() -> Iterator[MoeCase]:
    for w13 in MOE_SCHEMES:
        for w2 in MOE_SCHEMES:
            yield MoeCase("pair", w13, w2)
    for scheme in MORE_MOE_SCHEMES:
        yield MoeCase("both", scheme, scheme)
    for scheme in MOE_SCHEMES:
        yield MoeCase("float16", scheme, scheme, dtype=F16)
        yield MoeCase("sizes filled up", scheme, scheme, hidden=100, inner=36)
    yield MoeCase("more than 10496 inner outputs", W8A8, W8A8, hidden=64, inner=10560)
    for scheme in (W8A8, Scheme(4, 32, zero_points=True), W4A8):
        yield MoeCase("half of the experts", scheme, scheme, expert_map=(-1, -1, 0, 1))
        yield MoeCase("scattered experts", scheme, scheme, expert_map=(0, -1, 1, -1))
        yield MoeCase("weighted inputs", scheme, scheme, weighted=False)


LINEAR_CASES = tuple(_linear_cases())
MOE_CASES = tuple(_moe_cases())
CASES: tuple[Case, ...] = (*LINEAR_CASES, *MOE_CASES)


def layer_of(tensors: dict[str, torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**tensors)
