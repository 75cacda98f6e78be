# SPDX-License-Identifier: Apache-2.0
"""What holds for every Linear method: no tokens, one graph for any number of them, and little memory while preparing."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.layouts.memory import peak_of
from tests.methods.layers import DTYPES, prepared, random_weight
from vllm_npu_quant import emulation
from vllm_npu_quant.layouts import int4
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight, StaticActivation
from vllm_npu_quant.layouts.int4 import pack_pairs, unpack_pairs
from vllm_npu_quant.methods import w8a8
from vllm_npu_quant.methods.base import FRACTAL_NZ, PrepareContext
from vllm_npu_quant.methods.dequantized import DequantizedLinear
from vllm_npu_quant.methods.w4a4 import W4A4DynamicLinear
from vllm_npu_quant.methods.w4a8 import W4A8DynamicLinear
from vllm_npu_quant.methods.w8a8 import (
    W8A8DynamicAsymmetricLinear,
    W8A8DynamicGroupedLinear,
    W8A8DynamicLinear,
    W8A8StaticLinear,
)
from vllm_npu_quant.methods.weight_only import WeightOnlyLinear
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.spec import LayerKind


@dataclass(frozen=True)
class Case:
    """A method and the weight it is given."""

    method: type
    bits: int
    group: int = 0
    asymmetric: bool = False
    permuted: bool = False

    def linear(self, outputs: int, inputs: int) -> CanonicalLinear:
        weight = random_weight(outputs, inputs, self.bits, self.group, asymmetric=self.asymmetric)
        static = None
        if self.method is W8A8StaticLinear:
            scale = torch.tensor([0.02])
            deq = scale * weight.scale.reshape(-1)
            static = StaticActivation(scale, torch.zeros(1), deq, torch.zeros(outputs, dtype=torch.int32))
        order = torch.arange(inputs).flip(0) if self.permuted else None
        return CanonicalLinear(weight, static, input_permutation=order)


CASES = {
    "w8a8-dynamic": Case(W8A8DynamicLinear, 8),
    "w8a8-dynamic-asymmetric": Case(W8A8DynamicAsymmetricLinear, 8),
    "w8a8-dynamic-groups": Case(W8A8DynamicGroupedLinear, 8, 64),
    "w8a8-static": Case(W8A8StaticLinear, 8),
    "w8a16": Case(WeightOnlyLinear, 8),
    "w8a16-groups": Case(WeightOnlyLinear, 8, 64, asymmetric=True),
    "w4a16": Case(WeightOnlyLinear, 4),
    "w4a16-groups": Case(WeightOnlyLinear, 4, 64, asymmetric=True),
    "w4a16-odd-groups": Case(WeightOnlyLinear, 4, 48),
    "w4a16-permuted": Case(WeightOnlyLinear, 4, 32, permuted=True),
    "w4a8": Case(W4A8DynamicLinear, 4),
    "w4a8-256": Case(W4A8DynamicLinear, 4, 256),
    "w4a8-groups": Case(W4A8DynamicLinear, 4, 64),
    "w4a4": Case(W4A4DynamicLinear, 4),
    "w4a4-groups": Case(W4A4DynamicLinear, 4, 64),
    "dequantized": Case(DequantizedLinear, 4, 64, asymmetric=True),
}


def test_every_method_is_here() -> None:
    rows = {row.method_name for row in dispatch.ROWS if LayerKind.LINEAR in row.kinds}
    assert {case.method.__name__ for case in CASES.values()} == rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("name", CASES)
def test_no_tokens_give_no_outputs(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    method = CASES[name].method()
    layer = prepared(method, CASES[name].linear(40, 512), dtype)
    y = method.apply(layer, torch.empty(*shape, 512, dtype=dtype), torch.zeros(40, dtype=method.bias_dtype(dtype)))
    assert y.shape == (*shape, 40)
    assert y.dtype == dtype


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_any_number_of_tokens(name: str) -> None:
    """The look at the input's size is a look at its shape: it makes no break in the graph, and no graph of its own."""
    method = CASES[name].method()
    layer = prepared(method, CASES[name].linear(40, 512), torch.bfloat16)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: method.apply(layer, x), backend=count, fullgraph=True, dynamic=True)
    for tokens in (5, 64, 3):
        x = torch.randn(tokens, 512, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), method.apply(layer, x))
    assert len(graphs) == 1


def test_only_plain_calls_of_npu_dynamic_quant_are_seen_by_a_graph() -> None:
    """vllm-ascend fuses that operator with the norm in front of it, and drops the arguments that it does not know."""
    folder = Path(w8a8.__file__).parent
    seen = 0
    for file in sorted(folder.glob("*.py")):
        if file.name == "operators.py" or file.name.startswith("moe"):
            continue  # behind operators of our own
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "npu_dynamic_quant":
                seen += 1
                assert (len(node.args), node.keywords) == (1, []), f"{file.name}:{node.lineno}"
    assert seen >= 2


#: N and K; blocks of rows are made so small that they are a small part of the weight.
OUTPUTS, INPUTS = 1536, 1536
BLOCK = 1 << 15


def packed(linear: CanonicalLinear) -> tuple[CanonicalLinear, int]:
    """The layer with 4-bit integers held two to a byte, as checkpoints have them; and the bytes of its integers."""
    weight = linear.weight
    values = weight.values
    if weight.bits == 8:
        return linear, values.numel()
    stored = pack_pairs(values)
    linear.weight = CanonicalWeight(
        weight.outputs,
        weight.inputs,
        lambda start, stop: unpack_pairs(stored[start:stop]),
        weight.scale,
        weight.zero,
        weight.group_size,
        weight.bits,
    )
    return linear, stored.numel()


@pytest.mark.parametrize("name", [name for name in CASES if name != "dequantized"])
def test_preparing_holds_one_more_copy_of_the_integers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prepared weight beside the stored one, the scales, and a few blocks of rows; no int32 of the whole layer."""
    monkeypatch.setattr(int4, "BLOCK_ELEMENTS", BLOCK)
    case = CASES[name]
    linear, stored = packed(case.linear(OUTPUTS, INPUTS))
    scales = linear.weight.scale.numel() * (8 + 8 + 4 + 4 + 4)  # as int64 bits, widened and padded on the way
    method = case.method()
    tensors: dict[str, torch.Tensor] = {}

    def prepare() -> None:
        tensors.update(method.prepare(linear, PrepareContext(torch.bfloat16)))

    used = peak_of(prepare)
    weights = sum(value.numel() * value.element_size() for key, value in tensors.items() if key.startswith("weight"))
    grown = 4 / 3 if name == "w4a16-odd-groups" else 1  # each 48 inputs take the place of 64
    assert stored <= weights <= grown * 1.1 * stored + scales
    assert used <= grown * stored + scales + 16 * BLOCK
    # The cast to FRACTAL_NZ comes when the stored weight is gone.
    assert peak_of(lambda: method.finish(tensors)) <= stored


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8-static", "w8a16-groups"])
def test_int8_weights_end_in_fractal_nz(name: str) -> None:
    layer = prepared(CASES[name].method(), CASES[name].linear(64, 256), torch.bfloat16)
    assert emulation.storage_format(layer.weight) == FRACTAL_NZ
