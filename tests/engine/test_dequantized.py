# SPDX-License-Identifier: Apache-2.0
"""kv_b_proj of multi-head latent attention: stored quantized, float in memory, for every scheme of every format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

from tests.configs import config_of_format
from tests.formats.modelslim_layers import read_with_headers
from vllm_npu_quant.engine.dequantized import DequantizedLinearMethod
from vllm_npu_quant.engine.stored import TORCH_DTYPES
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.formats.resolve import ResolvedLayer
from vllm_npu_quant.layouts.tables import LayerSizes, group_size_of, rows_per_scale_of, tensors_of
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.spec import (
    ActivationSpec,
    Granularity,
    LayerKind,
    LayerSpec,
    Layout,
    NumberKind,
    WeightSpec,
)

# A tiny kv_b_proj: 2 heads of 16 + 16, kv_lora_rank 64.
OUTPUTS, INPUTS = 64, 64
PREFIX = "model.layers.0.self_attn.kv_b_proj"
PER_TOKEN = ActivationSpec(8, True, Granularity.TOKEN)
STATIC = ActivationSpec(8, False, Granularity.TENSOR, symmetric=False)
INT4_GROUPS = WeightSpec(4, granularity=Granularity.GROUP, group_size=32)

SPECS = {
    "ModelSlim W8A8_DYNAMIC": LayerSpec("W8A8_DYNAMIC", Layout.MODELSLIM_INT, WeightSpec(8), PER_TOKEN),
    "ModelSlim W8A8": LayerSpec("W8A8", Layout.MODELSLIM_STATIC, WeightSpec(8), STATIC),
    "ModelSlim W4A8_DYNAMIC": LayerSpec("W4A8_DYNAMIC", Layout.MODELSLIM_PACKED_N, WeightSpec(4), PER_TOKEN),
    "ModelSlim W4A16": LayerSpec("W4A16", Layout.MODELSLIM_PACKED_K, WeightSpec(4)),
    "compressed-tensors W8A8": LayerSpec("W8A8", Layout.CT_INT, WeightSpec(8), PER_TOKEN),
    "compressed-tensors W4A16": LayerSpec("W4A16", Layout.CT_PACKED, INT4_GROUPS),
    "AWQ": LayerSpec("AWQ", Layout.AWQ_GEMM, replace(INT4_GROUPS, symmetric=False)),
    "GPTQ": LayerSpec("GPTQ", Layout.GPTQ, INT4_GROUPS),
    "FP8 blocks": LayerSpec(
        "FP8",
        Layout.FP8_INV,
        WeightSpec(8, NumberKind.FLOAT, Granularity.BLOCK, 32, block_rows=32),
        ActivationSpec(8, True, Granularity.TOKEN, NumberKind.FLOAT),
    ),
}


def random_tensors(spec: LayerSpec) -> dict[str, torch.Tensor]:
    """Stored tensors of the layer with random numbers of sensible sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = LayerSizes(OUTPUTS, INPUTS, group_size_of(spec), rows_per_scale=rows_per_scale_of(spec, OUTPUTS))
    tensors = {}
    for tensor in tensors_of(spec, frozenset({"qzeros"} if spec.layout is Layout.AWQ_GEMM else ())):
        shape, dtype = tensor.shape(sizes), TORCH_DTYPES[tensor.dtypes[0]]
        if tensor.name.endswith(("offset", "quant_bias")):
            tensors[tensor.name] = torch.zeros(shape, dtype=dtype)
        elif tensor.name == "weight_shape":
            tensors[tensor.name] = torch.tensor([OUTPUTS, INPUTS])
        elif dtype == torch.float8_e4m3fn:
            tensors[tensor.name] = torch.randn(shape, generator=generator).to(dtype)
        elif dtype.is_floating_point:
            tensors[tensor.name] = (torch.rand(shape, generator=generator) * 0.01 + 0.005).to(dtype)
        elif tensor.name == "qzeros" and spec.layout is Layout.GPTQ:
            tensors[tensor.name] = torch.full(shape, 0x77777777, dtype=torch.int32)
        else:
            info = torch.iinfo(dtype)
            tensors[tensor.name] = torch.randint(info.min, info.max, shape, generator=generator, dtype=dtype)
    return tensors


def load(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.load_column_parallel_weight(loaded_weight=loaded)  # type: ignore[attr-defined]


def loaded_layer(spec: LayerSpec, dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tensors = random_tensors(spec)
    listed = frozenset(tensors)
    resolved = ResolvedLayer(PREFIX, spec, (PREFIX,), (LayerEntry(spec, listed),))
    served = decide(LayerKind.LINEAR, spec, Host(latent_attention=True), layer=PREFIX)
    method = DequantizedLinearMethod(resolved, served, "config.json")
    layer = nn.Module()
    layer.quant_method, layer.tp_rank, layer.tp_size = method, 0, 1
    method.create_weights(layer, INPUTS, [OUTPUTS], INPUTS, OUTPUTS, dtype, weight_loader=load)
    for name, value in tensors.items():
        if hasattr(layer, name):
            param = getattr(layer, name)
            param.weight_loader(param, value)
    method.process_weights_after_loading(layer)
    return layer, tensors


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters ask for the tensor-parallel group; there is one rank here."""
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_the_weight_is_float_and_what_the_checkpoint_means(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    layer, tensors = loaded_layer(spec, dtype)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert {name for name, _ in layer.named_parameters()} == {"weight"}
    assert (list(layer.weight.shape), layer.weight.dtype) == ([OUTPUTS, INPUTS], dtype)
    # What vLLM's attention makes of it.
    taken = get_and_maybe_dequant_weights(layer, out_dtype=torch.float32)
    expected = dequantized(spec, tensors)
    assert (
        np.abs(taken.numpy() - expected).max()
        <= 2.0 ** (-8 if dtype == torch.bfloat16 else -10) * np.abs(expected).max()
    )
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer.quant_method.apply(layer, x)
    np.testing.assert_allclose(y.float().numpy(), (x.float() @ taken.T).numpy(), rtol=0.02, atol=0.02)


def nibbles(words: np.ndarray) -> np.ndarray:
    """Unsigned 4-bit integers from the lowest bits of each element, along a new last dimension."""
    width = 2 * words.dtype.itemsize
    unsigned = words.view(f"u{words.dtype.itemsize}")
    return np.stack([(unsigned >> (4 * i)) & 15 for i in range(width)], axis=-1).astype(np.int64)


def signed(values: np.ndarray) -> np.ndarray:
    return np.where(values > 7, values - 16, values)


def dequantized(spec: LayerSpec, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The producers' formulas, in NumPy."""
    part = {
        name: value.float().numpy() if value.is_floating_point() else value.numpy() for name, value in tensors.items()
    }
    layout = spec.layout
    if layout in (Layout.MODELSLIM_INT, Layout.CT_INT):
        return part["weight"] * part["weight_scale"]
    if layout is Layout.MODELSLIM_STATIC:
        return part["weight"] * (part["deq_scale"] / part["input_scale"])[:, None]
    if layout is Layout.MODELSLIM_PACKED_N:
        return signed(nibbles(part["weight"]).transpose(0, 2, 1).reshape(OUTPUTS, INPUTS)) * part["weight_scale"]
    if layout is Layout.MODELSLIM_PACKED_K:
        return signed(nibbles(part["weight"]).reshape(OUTPUTS, INPUTS)) * part["weight_scale"]
    if layout is Layout.CT_PACKED:
        values = nibbles(part["weight_packed"]).reshape(OUTPUTS, INPUTS) - 8
        return values * part["weight_scale"].repeat(32, axis=1)
    if layout is Layout.GPTQ:
        values = nibbles(part["qweight"]).transpose(0, 2, 1).reshape(INPUTS, OUTPUTS) - 8
        return (values * part["scales"].repeat(32, axis=0)).T
    if layout is Layout.AWQ_GEMM:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        values, zeros = (np.empty((part[name].shape[0], OUTPUTS // 8, 8)) for name in ("qweight", "qzeros"))
        values[:, :, order], zeros[:, :, order] = nibbles(part["qweight"]), nibbles(part["qzeros"])
        zeros = zeros.reshape(-1, OUTPUTS).repeat(32, axis=0)
        return ((values.reshape(INPUTS, OUTPUTS) - zeros) * part["scales"].repeat(32, axis=0)).T
    assert layout is Layout.FP8_INV
    return part["weight"] * part["weight_scale_inv"].repeat(32, axis=0).repeat(32, axis=1)


def test_the_config_picks_it_for_latent_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_npu_quant.engine import config as engine_config
    from vllm_npu_quant.formats.resolve import LayerResolver

    types = {f"{PREFIX}.{name}": "W8A8_DYNAMIC" for name in ("weight", "weight_scale", "weight_offset")}
    quant_config = config_of_format("modelslim")()
    quant_config.described = read_with_headers({**types, "version": "1.0.0"})
    quant_config.resolver = LayerResolver(quant_config.described)
    layer = LinearBase.__new__(LinearBase)
    nn.Module.__init__(layer)
    for latent in (True, False):
        monkeypatch.setattr(engine_config, "_uses_mla", lambda latent=latent: latent)
        quant_config.host_checked = False
        method = quant_config.get_quant_method(layer, PREFIX)
        assert isinstance(method, UnquantizedLinearMethod) == latent
        assert method.row.method_name == ("DequantizedLinear" if latent else "W8A8DynamicLinear")
