# SPDX-License-Identifier: Apache-2.0
"""A new scheme is one method class, one row with its cost, and one table of cases: six_bits.py."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.e2e.rewritten import Quantized, write
from tests.e2e.yardstick import relative_error, run
from tests.extending.extended import install, run_extended, vllm_npu_quant_json
from tests.extending.six_bits import ROW, weight_bytes
from tests.extending.six_bits_linear import W6A16Linear
from vllm_npu_quant import emulation
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.methods.base import PrepareContext
from vllm_npu_quant.spec import WeightSpec

WEIGHTS = {"num_bits": 6, "type": "int", "symmetric": True, "strategy": "channel"}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}

#: (outputs, inputs, tokens, bias)
CASES = [(64, 128, 1, False), (33, 70, 5, True), (128, 64, 17, False), (16, 32, 0, True)]


def six_bits(weight: torch.Tensor) -> Quantized:
    scale = (weight.abs().amax(1, keepdim=True) / 31).bfloat16()
    values = torch.round(weight / scale.float()).clamp(-32, 31)
    return Quantized({"weight": values.to(torch.int8), "weight_scale": scale}, values * scale.float())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write(tmp_path_factory.mktemp("six"), {"_proj": six_bits}, CONFIG)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install(tmp_path_factory.mktemp("site"), "tests.extending.six_bits")


@pytest.mark.parametrize(("outputs", "inputs", "tokens", "has_bias"), CASES)
def test_the_method_agrees_with_the_dequantized_layer(outputs: int, inputs: int, tokens: int, has_bias: bool) -> None:
    emulation.register()
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-32, 32, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = 2.0 ** torch.randint(-8, -4, (outputs, 1), generator=generator)  # so that no weight is rounded
    method = W6A16Linear()
    bias = torch.randn(outputs, generator=generator).to(method.bias_dtype(torch.bfloat16)) if has_bias else None
    prepared = method.prepare(CanonicalLinear(CanonicalWeight.of(values, scale)), PrepareContext(torch.bfloat16))
    assert sum(tensor.numel() * tensor.element_size() for tensor in prepared.values()) == weight_bytes(
        WeightSpec(6), outputs, inputs
    )
    method.finish(prepared)
    x = torch.randn(tokens, inputs, generator=generator).bfloat16()
    y = method.apply(SimpleNamespace(**prepared), x, bias)
    expected = x.float() @ (values.float() * scale).t() + (0 if bias is None else bias.float())
    torch.testing.assert_close(y, expected.bfloat16(), rtol=2**-8, atol=2**-16)


def test_without_the_file_it_is_refused(folders: tuple[Path, Path]) -> None:
    report = vllm_npu_quant_json(["check", str(folders[0])], dict(os.environ), code=1)
    assert {finding["code"] for finding in report["findings"]} == {"unsupported-scheme"}


def test_it_is_inspected_and_planned(folders: tuple[Path, Path], environment: dict[str, str]) -> None:
    overview = vllm_npu_quant_json(["inspect", str(folders[0])], environment)
    quantized = [scheme for scheme in overview["schemes"] if scheme["scheme"] == "W6A16"]
    assert [(scheme["method"], scheme["served"]) for scheme in quantized] == [(ROW.method_name, True)]
    planned = vllm_npu_quant_json(["plan", str(folders[0]), "--device", "a2"], environment)
    assert planned["weight_bytes"] > 0


@pytest.mark.engine
def test_it_runs(folders: tuple[Path, Path], environment: dict[str, str], tmp_path: Path) -> None:
    done, methods = run_extended(folders[0], environment, tmp_path)
    assert methods == {ROW.method_name: 8}
    assert relative_error(done, run(folders[1], plugin=False)) <= 0.02
