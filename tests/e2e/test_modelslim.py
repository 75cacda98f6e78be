# SPDX-License-Identifier: Apache-2.0
"""ModelSlim checkpoints through the real engine, against their float twins."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.e2e.twins import make_twin
from tests.e2e.yardstick import Run, relative_error, run
from tests.fixtures_index import fixture
from vllm_npu_quant.emulation import calls

pytestmark = pytest.mark.engine

#: Checkpoint -> (limit of the relative error, method class of its eight Linear layers).
CASES = {
    "msmodelslim-qwen3-w8a8": (0.12, "W8A8StaticLinear"),
    "msmodelslim-qwen3-w8a8-dynamic": (0.06, "W8A8DynamicLinear"),
    "msmodelslim-qwen3-w8a8-pdmix": (0.06, "W8A8DynamicLinear"),
    "msmodelslim-qwen3-w8a8-quarot": (0.06, "W8A8DynamicLinear"),
    "msmodelslim-qwen3-w8a16": (0.02, "WeightOnlyLinear"),
    "msmodelslim-qwen3-v0-w8a8": (0.12, "W8A8StaticLinear"),
    "msmodelslim-qwen3-v0-w8a8-old": (0.12, "W8A8StaticLinear"),
    "msmodelslim-qwen3-v0-w8a16": (0.02, "WeightOnlyLinear"),
    "msmodelslim-qwen3fp16-w8a8": (0.12, "W8A8StaticLinear"),
    "msmodelslim-qwen3fp32-w8a8-normbias": (0.12, "W8A8StaticLinear"),
}


@pytest.fixture(scope="module")
def twin_run(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def twin(name: str) -> Run:
        folder = make_twin(fixture(name), tmp_path_factory.mktemp("twin") / name)
        return run(folder, plugin=False)

    return twin


@cache
def quantized(name: str) -> Run:
    return run(fixture(name))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_its_float_twin(name: str, twin_run) -> None:
    limit, method = CASES[name]
    result = quantized(name)
    assert result.methods == {method: 8}
    error = relative_error(result, twin_run(name))
    # Quantized activations leave a trace; weights alone may be equal to the twin's to the last bit.
    assert (0.001 if "W8A8" in method else 0) <= error <= limit


def test_the_engines_repeated_calls_do_not_come_to_python() -> None:
    library = calls.library()
    if library is None:
        pytest.skip("needs x86-64 with AVX2, a C compiler and a C++ compiler")
    before = library.nq_computed_here()
    run(fixture("msmodelslim-qwen3-w8a8-dynamic"))
    # Eight layers quantize and multiply in every step.
    assert library.nq_computed_here() - before >= 2 * 8


@pytest.mark.parametrize("quantization", ["modelslim", "ascend"])
def test_quantization_may_be_named(quantization: str) -> None:
    name = "msmodelslim-qwen3-w8a8-dynamic"
    named = run(fixture(name), quantization=quantization)
    assert relative_error(named, quantized(name)) == 0


@pytest.mark.parametrize(
    ("name", "dtype"), [("msmodelslim-qwen3-w8a8", "float16"), ("msmodelslim-qwen3fp16-w8a8", "bfloat16")]
)
def test_the_run_may_have_another_dtype_than_the_checkpoint(name: str, dtype: str, twin_run) -> None:
    result = run(fixture(name), dtype=dtype)
    assert relative_error(result, twin_run(name)) <= 0.12


def test_float32_is_refused_with_the_dtypes_that_work() -> None:
    with pytest.raises(ValueError, match=r"float32 is not supported for quantization method modelslim.*bfloat16"):
        run(fixture("msmodelslim-qwen3-w8a8"), dtype="float32")


@pytest.mark.parametrize(
    "name", ["msmodelslim-qwen3-w8a8", "msmodelslim-qwen3-w8a8-dynamic", "msmodelslim-qwen3-w8a16"]
)
def test_torch_compile_agrees_with_the_twin_too(name: str, twin_run) -> None:
    """Fusion around the operators moves single activations to the next integer, so eager mode is not the measure."""
    compiled = run(fixture(name), enforce_eager=False)
    assert compiled.methods == {CASES[name][1]: 8}
    assert relative_error(compiled, twin_run(name)) <= CASES[name][0]


def test_norm_bias_matters_and_is_only_there(tmp_path: Path) -> None:
    from vllm_npu_quant.engine.norm import BiasedRMSNorm

    def norms(model) -> list[tuple[str, bool]]:
        return [
            (name, module.bias is not None)
            for name, module in model.named_modules()
            if isinstance(module, BiasedRMSNorm)
        ]

    found = dict(run(fixture("msmodelslim-qwen3fp32-w8a8-normbias"), inspect=norms).inspected)
    biased = {name for name, has_bias in found.items() if has_bias}
    assert biased == {
        f"model.layers.{layer}.{norm}" for layer in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert {name.rpartition(".")[2] for name in found.keys() - biased} == {"q_norm", "k_norm", "norm"}


@pytest.mark.tp2
@pytest.mark.parametrize(
    "name",
    [
        "msmodelslim-qwen3-w8a8",
        "msmodelslim-qwen3-w8a8-dynamic",
        "msmodelslim-qwen3-w8a16",
        "msmodelslim-qwen3fp32-w8a8-normbias",
    ],
)
def test_two_ranks_agree_with_the_twin_too(name: str, twin_run) -> None:
    """One rank adds quant_bias, and the norms' biases are on both.

    Partial sums are rounded to bfloat16 before they are added, which moves single activations to the next integer; that
    the parts of one layer add up to the whole is tested to the last bit in tests/methods.
    """
    both = run(fixture(name), tensor_parallel_size=2)
    assert relative_error(both, twin_run(name)) <= CASES[name][0]
