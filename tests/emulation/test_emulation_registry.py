# SPDX-License-Identifier: Apache-2.0
"""Registration: when, which kernels, under which schemas."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_npu_quant import emulation, settings
from vllm_npu_quant.emulation import native
from vllm_npu_quant.emulation.fast import products
from vllm_npu_quant.emulation.numerics import int_matmul

emulation.register()
ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.npu, name).default


@pytest.mark.parametrize("name", emulation.OPERATORS)
def test_schema_survives_registration(name: str) -> None:
    assert str(overload(name)._schema) == emulation.OPERATORS[name].schema


@pytest.mark.parametrize("name", emulation.OPERATORS)
def test_rules_take_the_arguments_of_the_schema(name: str) -> None:
    """The dispatcher drops arguments that equal the schema's default, so the defaults must be the same."""
    parameters = list(inspect.signature(emulation.OPERATORS[name].arguments).parameters.values())
    arguments = overload(name)._schema.arguments
    assert [parameter.name for parameter in parameters] == [argument.name for argument in arguments]
    for parameter, argument in zip(parameters, arguments, strict=True):
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        given = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        assert given == default
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only


def test_register_is_idempotent() -> None:
    assert emulation.register()
    assert emulation.register()
    assert emulation.is_emulated()


def test_emulation_imports_no_vllm_and_registers_nothing_by_itself() -> None:
    code = (
        "import sys, torch, vllm_npu_quant.emulation as e\n"
        "assert not e.is_emulated() and not hasattr(torch.ops.npu, 'npu_swiglu')\n"
        "assert not [name for name in sys.modules if name == 'vllm' or name.startswith('vllm.')]\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_an_operator_that_exists_keeps_everything_as_it_is() -> None:
    code = (
        "import torch, vllm_npu_quant.emulation as e\n"
        "lib = torch.library.Library('npu', 'DEF'); lib.define('npu_swiglu(Tensor x) -> Tensor')\n"
        "assert e.register() is False and not e.is_emulated()\n"
        "assert not hasattr(torch.ops.npu, 'npu_quantize')\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_torch_npu_keeps_everything_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text("raise SystemExit('imported')\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import torch, vllm_npu_quant.emulation as e\n"
        "assert e.register() is False and not hasattr(torch.ops.npu, 'npu_quantize')\n"
    )
    result = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 0, result.stderr


def test_unknown_mode_is_an_error() -> None:
    result = python("import vllm_npu_quant.emulation as e; e.register()", VLLM_NPU_QUANT_EMULATION="quick")
    assert "NpuQuantError: " in result.stderr
    assert "bad-config" in result.stderr
    assert "VLLM_NPU_QUANT_EMULATION must be fast or reference, not 'quick'" in result.stderr


@pytest.mark.parametrize(
    ("value", "mode"), [(None, "fast"), ("", "fast"), ("fast", "fast"), ("reference", "reference"), (" Fast ", "fast")]
)
def test_values_of_the_mode(value: str | None, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("VLLM_NPU_QUANT_EMULATION", value)
    assert settings.emulation_mode() == mode


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_mode_selects_the_kernel(mode: str) -> None:
    code = (
        "import torch, vllm_npu_quant.emulation as e\n"
        "from vllm_npu_quant.emulation.fast import quant_matmul\n"
        "e.register()\n"
        "x = torch.ones(2, 8, dtype=torch.int8)\n"
        "torch.ops.npu.npu_quant_matmul(x, x.t().contiguous(), torch.ones(2), output_dtype=torch.int32)\n"
        f"assert len(quant_matmul._products) == {int(mode == 'fast')}\n"
    )
    result = python(code, VLLM_NPU_QUANT_EMULATION=mode)
    assert result.returncode == 0, result.stderr


def test_int8_dot_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test finds a product that adds pairs in 16 bits with saturation, as AVX2 without VNNI does."""

    def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        depth = left.shape[1] + left.shape[1] % 2
        padded_left = torch.nn.functional.pad(left.to(torch.int32) + 128, (0, depth - left.shape[1]))
        padded_right = torch.nn.functional.pad(right.to(torch.int32), (0, 0, 0, depth - left.shape[1]))
        pairs = padded_left.view(-1, depth // 2, 2, 1) * padded_right.view(1, depth // 2, 2, -1)
        products = pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1)
        return products.to(torch.int32) - 128 * right.to(torch.int32).sum(0, dtype=torch.int32)

    left = torch.randint(-8, 8, (3, 31), dtype=torch.int8)
    right = torch.randint(-8, 8, (31, 5), dtype=torch.int8)
    assert torch.equal(saturating(left, right), int_matmul(left, right))
    products.int8_dot_is_exact.cache_clear()
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(products, "has_int8_dot", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", saturating)
    try:
        assert not products.int8_dot_is_exact()
        left = torch.full((3, 64), 127, dtype=torch.int8)
        assert torch.equal(products.fast_int_matmul(left, left.t()), int_matmul(left, left.t()))
    finally:
        products.int8_dot_is_exact.cache_clear()


def test_format_belongs_to_the_storage() -> None:
    weight = torch.arange(64, dtype=torch.int8).view(8, 8)
    assert emulation.storage_format(weight) == 2
    cast = torch.ops.npu.npu_format_cast(weight, 29)
    assert cast.data_ptr() != weight.data_ptr()
    assert torch.equal(cast, weight)
    parameter = torch.nn.Parameter(cast, requires_grad=False)
    assert emulation.storage_format(parameter) == 29
    assert emulation.storage_format(weight) == 2
    again = torch.ops.npu.npu_format_cast(cast, 29)
    assert again is cast
    back = torch.ops.npu.npu_format_cast(cast, 2)
    assert emulation.storage_format(back) == 2
    transposed = torch.ops.npu.npu_format_cast(weight.t(), 29)
    assert transposed.stride() == weight.t().stride()


def test_operators_work_under_torch_compile_with_a_dynamic_number_of_tokens() -> None:
    weight = torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    scale = torch.rand(32)

    def layer(x: torch.Tensor) -> torch.Tensor:
        quantized, token_scale = torch.ops.npu.npu_dynamic_quant(x)
        return torch.ops.npu.npu_quant_matmul(
            quantized, weight, scale, pertoken_scale=token_scale, output_dtype=torch.bfloat16
        )

    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)
    for rows in (3, 5, 17):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
    assert graphs == 1
