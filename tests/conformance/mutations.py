# SPDX-License-Identifier: Apache-2.0
"""Methods that are broken on purpose: each must be reported when its trace is made under the real torch_npu."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from tests.conformance.method_cases import FLOAT, W4A8, W8A8, Case, LinearCase, MoeCase
from vllm_npu_quant.methods import moe, operators
from vllm_npu_quant.methods.dequantized import DequantizedLinear
from vllm_npu_quant.methods.w8a8 import W8A8DynamicLinear

_compute = W8A8DynamicLinear.compute
_matmul = W8A8DynamicLinear.matmul
_prepare = W8A8DynamicLinear.prepare


def _reads_a_number(self: Any, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
    return _compute(self, layer, x if float(x.abs().max()) > 0 else x + 1, bias)


def _loops_over_tokens(self: Any, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
    return torch.cat([_compute(self, layer, token, bias) for token in x.split(1)])


def _asks_for_the_number_of_tokens(self: Any, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
    return _compute(self, layer, x, bias) if x.shape[0] > 4 else _compute(self, layer, x, bias).clone()


def _views_the_weight(self: Any, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
    return _compute(self, layer, x, bias) + layer.weight[:1].sum()


def _falls_back_to_the_cpu(self: Any, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
    return _compute(self, layer, torch.special.bessel_j0(x.float()).to(x.dtype), bias)


def _swaps_operands(self: Any, layer: Any, x: torch.Tensor, bias: Any, **options: Any) -> torch.Tensor:
    return torch.ops.npu.npu_quant_matmul(layer.weight, x, layer.weight_scale, bias=bias, **options)


def _forgets_the_tokens_scale(self: Any, layer: Any, x: torch.Tensor, bias: Any, **options: Any) -> torch.Tensor:
    return _matmul(self, layer, x, bias, output_dtype=torch.float32)


def _prepares_on_the_cpu(self: Any, linear: Any, context: Any) -> dict[str, torch.Tensor]:
    return {**_prepare(self, linear, context), "index": torch.arange(4)}


def _keeps_the_stored_weight(self: Any, linear: Any, context: Any) -> dict[str, torch.Tensor]:
    return {**_prepare(self, linear, context), "first": linear.weight.values[:1]}


def _rows_on_the_cpu(x: torch.Tensor) -> torch.Tensor:
    return torch.full((1,), x.shape[0], dtype=torch.int64)


def _wide(self: Any, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
    return F.linear(x.float(), layer.weight.float())


def _synchronises(*args: Any) -> Any:
    _y, row_index, counts, weights, _shape = args
    assert counts.tolist()
    return row_index, weights


@dataclass(frozen=True)
class Mutation:
    """``said``: a pattern that the report holds."""

    case: Case
    patch: AbstractContextManager[Any]
    said: str


def _linear(name: str, function: Any, said: str) -> Mutation:
    return Mutation(LinearCase("channel", W8A8, 64, 128), mock.patch.object(W8A8DynamicLinear, name, function), said)


MUTATIONS = {
    "reads a number": _linear("compute", _reads_a_number, "DataDependent|local_scalar_dense"),
    "loops over tokens": _linear("compute", _loops_over_tokens, "depends on the number of tokens|GuardOn|specializ"),
    "asks for the number of tokens": _linear(
        "compute", _asks_for_the_number_of_tokens, "depends on the number of tokens"
    ),
    "views a weight in FRACTAL_NZ": _linear("compute", _views_the_weight, "reads a weight in FRACTAL_NZ"),
    "falls back to the CPU": _linear("compute", _falls_back_to_the_cpu, "bessel_j0 has no kernel for the NPU"),
    "swaps operands": _linear("matmul", _swaps_operands, "RuntimeError"),
    "forgets the tokens' scale": _linear("matmul", _forgets_the_tokens_scale, "Error|apply gives"),
    "prepares on the CPU": _linear("prepare", _prepares_on_the_cpu, "layer.index is on cpu"),
    "keeps the stored weight": _linear("prepare", _keeps_the_stored_weight, "bytes are kept for"),
    "makes rows on the CPU": Mutation(
        LinearCase("channel", W4A8, 64, 256), mock.patch.object(operators, "_all_rows", _rows_on_the_cpu), "cpu"
    ),
    "gives another dtype": Mutation(
        LinearCase("floats", FLOAT, 64, 128),
        mock.patch.object(DequantizedLinear, "compute", _wide),
        "apply gives float32",
    ),
    "experts wait for their counts": Mutation(
        MoeCase("half of the experts", W8A8, W8A8, expert_map=(-1, -1, 0, 1)),
        mock.patch.object(moe, "_without_absent", _synchronises),
        "DataDependent|local_scalar_dense|Error",
    ),
}
