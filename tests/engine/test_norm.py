# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with the bias of asymmetric smoothing, against the formula in float64 NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_npu_quant.engine import norm as norm_module
from vllm_npu_quant.engine.norm import BiasedRMSNorm, NormBiasMethod, register_norm

EPS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _config() -> Iterator[None]:
    register_norm()
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def _biases_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = SimpleNamespace(norm_biases=frozenset({"model.layers.0.input_layernorm"}))
    config = SimpleNamespace(quant_config=SimpleNamespace(described=listed))
    monkeypatch.setattr(norm_module, "get_current_vllm_config_or_none", lambda: config)


def oracle(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    total = x.double().numpy() + (0 if residual is None else residual.double().numpy())
    scaled = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS)
    out = scaled * weight.double().numpy()
    return out + (0 if bias is None else bias.double().numpy()), total


def make(size: int, dtype: torch.dtype, bias: torch.Tensor | None) -> RMSNorm:
    norm = RMSNorm(size, eps=EPS, dtype=dtype)
    assert type(norm) is BiasedRMSNorm
    norm.weight.data.copy_(torch.linspace(0.5, 1.5, size))
    if bias is not None:
        norm.bias.weight_loader(norm.bias, bias)
    if isinstance(getattr(norm, "quant_method", None), NormBiasMethod):
        norm.quant_method.process_weights_after_loading(norm)
    return norm


def inputs(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(5, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


#: Roundings: of the normalized value, of its product, of the sum.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.usefixtures("_biases_listed")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [33, 64, 257])
@pytest.mark.parametrize("with_residual", [False, True])
def test_with_a_bias(size: int, dtype: torch.dtype, with_residual: bool) -> None:
    bias = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)
    norm = make(size, dtype, bias)
    x = inputs(size, dtype, 1)
    residual = inputs(size, dtype, 2) if with_residual else None
    wanted, total = oracle(x, residual, norm.weight.data, bias)
    if residual is None:
        out = norm.forward_native(x.clone())
    else:
        out, after = norm.forward_native(x.clone(), residual.clone())
        # The residual is what was normalized: it has no bias in it.
        np.testing.assert_allclose(after.double().numpy(), total, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert out.dtype == dtype
    np.testing.assert_allclose(out.double().numpy(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("_biases_listed")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norm_that_received_no_bias_is_rmsnorm_to_the_last_bit(dtype: torch.dtype, with_residual: bool) -> None:
    norm = make(64, dtype, None)
    assert norm.bias is None
    assert dict(norm.named_parameters()).keys() == {"weight"}
    arguments = [inputs(64, dtype, 1)] + ([inputs(64, dtype, 2)] if with_residual else [])
    ours = norm.forward_native(*[value.clone() for value in arguments])
    theirs = RMSNorm.forward_native(norm, *[value.clone() for value in arguments])
    for a, b in zip(ours if with_residual else [ours], theirs if with_residual else [theirs], strict=True):
        assert torch.equal(a, b)


def test_without_listed_biases_there_is_no_parameter() -> None:
    norm = RMSNorm(64, eps=EPS)
    assert norm.bias is None
    assert not hasattr(norm, "quant_method")
    x = inputs(64, norm.weight.dtype, 1)
    assert torch.equal(norm.forward_native(x.clone()), RMSNorm.forward_native(norm, x.clone()))


@pytest.mark.usefixtures("_biases_listed")
def test_a_norm_without_weight_has_no_bias() -> None:
    norm = RMSNorm(64, eps=EPS, has_weight=False)
    assert norm.bias is None


@pytest.mark.usefixtures("_biases_listed")
def test_processing_twice_keeps_the_bias() -> None:
    norm = make(64, torch.bfloat16, torch.ones(64))
    norm.quant_method.process_weights_after_loading(norm)
    assert torch.equal(norm.bias.data, torch.ones(64, dtype=torch.bfloat16))
