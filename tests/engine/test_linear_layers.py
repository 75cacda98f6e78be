# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Linear layers with our method, loaded the way vLLM's loaders do, against the dequantized layer in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from tests.configs import config_of_format
from tests.engine.world import world
from tests.layouts.memory import peak_of
from vllm_npu_quant import emulation
from vllm_npu_quant.checkpoint import TensorInfo
from vllm_npu_quant.engine import config as config_module
from vllm_npu_quant.engine import stored as stored_module
from vllm_npu_quant.engine.config import NpuQuantConfig
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.modelslim import read
from vllm_npu_quant.formats.resolve import LayerResolver
from vllm_npu_quant.layouts import int4
from vllm_npu_quant.methods import base as methods_base
from vllm_npu_quant.methods import w8a8, weight_only
from vllm_npu_quant.serving.decide import Host

Tensors = dict[str, torch.Tensor]
BLOCK = "model.layers.0."
#: safetensors' names.
STORED_DTYPES = {torch.int8: "I8", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16"}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    emulation.register()
    with world(VllmConfig()):
        yield


def stored_layer(kind: str, rows: int, columns: int, seed: int, *, bias: bool = False) -> Tensors:
    """A checkpoint layer as msModelSlim writes it. The input scale and offset are those of every layer with this input."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (rows, columns), generator=rng, dtype=torch.int8)
    scale = torch.rand(rows, 1, generator=rng) * 1e-3 + 1e-4
    tensors = {"weight": weight}
    layer_bias = torch.randn(rows, generator=rng)
    if kind in ("W8A8", "W8A8_MIX"):
        input_scale, offset = torch.tensor([0.035]), torch.tensor([7.0])
        deq_scale = scale[:, 0] * input_scale
        constant = -weight.double().sum(1) * offset
        if bias:
            constant = constant + layer_bias / deq_scale
        tensors |= {
            "input_scale": input_scale,
            "input_offset": offset,
            "deq_scale": deq_scale,
            "quant_bias": constant.round().to(torch.int32),
        }
    if kind != "W8A8":
        tensors |= {"weight_scale": scale, "weight_offset": torch.zeros(rows, 1)}
    if bias:
        tensors["bias"] = layer_bias.bfloat16()
    return tensors


def dequantized(tensors: Tensors) -> torch.Tensor:
    if "weight_scale" in tensors:
        return (tensors["weight"].double() - tensors["weight_offset"].double()) * tensors["weight_scale"].double()
    return tensors["weight"].double() * (tensors["deq_scale"] / tensors["input_scale"]).double()[:, None]


def config_of(kind: str, layers: dict[str, Tensors]) -> NpuQuantConfig:
    description = {
        f"{name}.{tensor}": "FLOAT" if tensor == "bias" else kind for name, parts in layers.items() for tensor in parts
    }
    config = config_of_format("modelslim")()
    tensors = {f"{name}.{tensor}": value for name, parts in layers.items() for tensor, value in parts.items()}
    headers = {
        name: TensorInfo(name, STORED_DTYPES[value.dtype], tuple(value.shape), "model.safetensors", 0, 0)
        for name, value in tensors.items()
    }
    config.described = read(description, headers)
    assert not config.described.findings, config.described.findings[0].render()
    config.resolver = LayerResolver(config.described)
    return config


#: Layer -> (how vLLM makes it, its shards: last name, shard id, rows). All read 72 inputs, which fill no tile.
COLUMNS = 72
LAYERS: dict[str, tuple[Callable[..., Any], str, list[tuple[str, Any, int]]]] = {
    "qkv": (
        lambda **o: QKVParallelLinear(COLUMNS, 16, 5, 1, **o),
        BLOCK + "self_attn.qkv_proj",
        [("q_proj", "q", 80), ("k_proj", "k", 16), ("v_proj", "v", 16)],
    ),
    "gate_up": (
        lambda **o: MergedColumnParallelLinear(COLUMNS, [40, 40], **o),
        BLOCK + "mlp.gate_up_proj",
        [("gate_proj", 0, 40), ("up_proj", 1, 40)],
    ),
    "row": (lambda **o: RowParallelLinear(COLUMNS, 33, **o), BLOCK + "mlp.down_proj", [("down_proj", None, 33)]),
    "column": (
        lambda **o: ColumnParallelLinear(COLUMNS, 50, **o),
        BLOCK + "self_attn.q_b_proj",
        [("q_b_proj", None, 50)],
    ),
    "replicated": (lambda **o: ReplicatedLinear(COLUMNS, 64, **o), BLOCK + "mlp.fc", [("fc", None, 64)]),
    # Stored as one tensor, as Phi-3 stores them.
    "qkv on disk": (
        lambda **o: QKVParallelLinear(COLUMNS, 16, 5, 1, **o),
        BLOCK + "self_attn.qkv_proj",
        [("qkv_proj", None, 112)],
    ),
    "gate_up on disk": (
        lambda **o: MergedColumnParallelLinear(COLUMNS, [40, 40], **o),
        BLOCK + "mlp.gate_up_proj",
        [("gate_up_proj", None, 80)],
    ),
}


def load(layer: Any, tensors: Tensors, shard: Any = None) -> None:
    """Give one checkpoint layer's tensors to vLLM's loaders, under the names that our mapper gives them."""
    params = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        param = params["checkpoint_bias" if name == "bias" else name]
        param.weight_loader(param, tensor.clone(), *(() if shard is None else (shard,)))


def build(
    name: str, kind: str, *, bias: bool = False, stored_bias: bool = False, **options: Any
) -> tuple[Any, list[Tensors]]:
    """A layer of LAYERS, loaded and prepared, and what was stored."""
    make, prefix, shards = LAYERS[name]
    parent = prefix.rpartition(".")[0]
    stored = {
        f"{parent}.{part}": stored_layer(kind, rows, COLUMNS, seed, bias=stored_bias)
        for seed, (part, _, rows) in enumerate(shards)
    }
    layer = make(bias=bias, params_dtype=torch.bfloat16, quant_config=config_of(kind, stored), prefix=prefix, **options)
    for (part, shard, _), tensors in zip(shards, stored.values(), strict=True):
        assert part in LAYERS[name][1] or shard is not None
        load(layer, tensors, shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, list(stored.values())


def inputs(rows: int = 9, columns: int = COLUMNS, seed: int = 99) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(stored: list[Tensors], x: torch.Tensor) -> torch.Tensor:
    y = x.double() @ torch.cat([dequantized(tensors) for tensors in stored]).T
    if "bias" in stored[0]:
        y = y + torch.cat([tensors["bias"] for tensors in stored]).double()
    return y


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    assert result.shape == reference.shape
    return float((result.double() - reference).norm() / reference.norm())


#: Largest relative error: rounding of the output to bfloat16, and of the inputs to int8.
LIMITS = {"W8A16": 0.005, "W8A8_DYNAMIC": 0.02, "W8A8": 0.03, "W8A8_MIX": 0.02}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, kind: str) -> None:
    layer, stored = build(name, kind)
    x = inputs()
    output, output_bias = layer(x)
    assert output.dtype == torch.bfloat16
    assert output_bias is None
    assert error(output, expected(stored, x)) < LIMITS[kind]


@pytest.mark.parametrize("kind", LIMITS)
def test_any_rank_of_the_input(kind: str) -> None:
    layer, _ = build("gate_up", kind)
    x = inputs(12)
    flat = layer(x)[0]
    assert torch.equal(layer(x.reshape(2, 3, 2, COLUMNS))[0], flat.reshape(2, 3, 2, -1))


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("name", ["qkv", "row", "column"])
@pytest.mark.parametrize("model_has_bias", [False, True])
def test_the_stored_bias_is_added_once(name: str, kind: str, model_has_bias: bool) -> None:
    """Whether the model class has a bias or not: asymmetric smoothing gives one to any layer."""
    layer, stored = build(name, kind, bias=model_has_bias, stored_bias=True)
    x = inputs()
    output, output_bias = layer(x)
    assert output_bias is None
    assert error(output, expected(stored, x)) < LIMITS[kind]
    assert not hasattr(layer, "checkpoint_bias")


@pytest.mark.parametrize("kind", LIMITS)
def test_a_bias_that_the_caller_adds(kind: str) -> None:
    """skip_bias_add: output and returned bias together have it once."""
    layer, stored = build("column", kind, bias=True, stored_bias=True, skip_bias_add=True)
    x = inputs()
    output, output_bias = layer(x)
    whole = output if output_bias is None else output + output_bias
    assert whole.dtype == torch.bfloat16
    assert error(whole, expected(stored, x)) < LIMITS[kind]


@pytest.mark.parametrize("kind", LIMITS)
def test_only_one_shard_of_a_fused_layer_has_a_bias(kind: str) -> None:
    make, prefix, shards = LAYERS["gate_up"]
    parent = prefix.rpartition(".")[0]
    stored = {
        f"{parent}.{part}": stored_layer(kind, rows, COLUMNS, seed, bias=seed == 1)
        for seed, (part, _, rows) in enumerate(shards)
    }
    layer = make(bias=False, params_dtype=torch.bfloat16, quant_config=config_of(kind, stored), prefix=prefix)
    for (_, shard, _), tensors in zip(shards, stored.values(), strict=True):
        load(layer, tensors, shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = inputs()
    gate, up = stored.values()
    reference = torch.cat([expected([gate], x), expected([up], x)], dim=1)
    assert error(layer(x)[0], reference) < LIMITS[kind]


@pytest.mark.parametrize("kind", LIMITS)
def test_processing_twice_changes_nothing(kind: str) -> None:
    layer, _ = build("qkv", kind, stored_bias=True)
    x = inputs()
    first, before = layer(x)[0], {name: param.data.clone() for name, param in layer.named_parameters()}
    layer.quant_method.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters()} == before.keys()
    assert all(torch.equal(param, before[name]) for name, param in layer.named_parameters())
    assert torch.equal(layer(x)[0], first)


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("name", ["gate_up", "row"])
def test_dummy_weights(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM fills float parameters with small random numbers, and leaves integers as they are."""
    make, prefix, shards = LAYERS[name]
    parent = prefix.rpartition(".")[0]
    stored = {f"{parent}.{part}": stored_layer(kind, rows, COLUMNS, 0, bias=True) for part, _, rows in shards}
    layer = make(bias=False, params_dtype=torch.bfloat16, quant_config=config_of(kind, stored), prefix=prefix)
    for param in layer.parameters():
        if param.dtype.is_floating_point:
            param.data.uniform_(-1e-3, 1e-3)
        else:
            param.data.random_()
    monkeypatch.setattr(stored_module, "load_is_checked", lambda: False)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.isfinite(layer(inputs())[0].float()).all()


def test_without_data_a_layer_names_every_tensor() -> None:
    make, prefix, shards = LAYERS["qkv"]
    parent = prefix.rpartition(".")[0]
    stored = {f"{parent}.{part}": stored_layer("W8A8", rows, COLUMNS, 0) for part, _, rows in shards}
    layer = make(bias=False, params_dtype=torch.bfloat16, quant_config=config_of("W8A8", stored), prefix=prefix)
    with pytest.raises(NpuQuantError) as caught:
        layer.quant_method.process_weights_after_loading(layer)
    named = ", ".join(finding.expected for finding in caught.value.findings)
    assert all(f"{name}.{tensor}" in named for name, tensors in stored.items() for tensor in tensors)


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("limit", [64, 128])
def test_more_outputs_than_the_operator_takes(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """65535 outputs at most; here 112 outputs and a smaller limit: the same numbers, in pieces."""
    x = inputs()
    whole, stored = build("qkv", kind, stored_bias=True)
    reference = whole(x)[0]

    def pieces(outputs: int, *_: int) -> list[tuple[int, int]]:
        return methods_base.split_outputs(outputs, limit)

    for module in (w8a8, weight_only):
        monkeypatch.setattr(module, "split_outputs", pieces)
    cut, _ = build("qkv", kind, stored_bias=True)
    assert len(cut.quant_method.method.pieces) == (2 if limit == 64 else 1)
    result = cut(x)[0]
    if kind == "W8A16":  # float accumulation may be ordered differently
        assert error(result, expected(stored, x)) < LIMITS[kind]
    else:
        assert torch.equal(result, reference)


def test_w8a8_mix_is_static_where_it_only_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths of one checkpoint layer, against the same twin: dynamic is nearer, static clips and rounds as calibrated."""
    x = inputs(64)
    errors = {}
    for role, method in (
        ("kv_producer", "W8A8DynamicLinear"),
        ("kv_both", "W8A8DynamicLinear"),
        ("kv_consumer", "W8A8StaticLinear"),
    ):
        transfer = KVTransferConfig(kv_connector="ExampleConnector", kv_role=role)
        here = SimpleNamespace(kv_transfer_config=transfer)
        monkeypatch.setattr(config_module, "get_current_vllm_config_or_none", lambda here=here: here)
        layer, stored = build("gate_up", "W8A8_MIX", stored_bias=True)
        assert type(layer.quant_method.method).__name__ == method
        errors[role] = error(layer(x)[0], expected(stored, x))
    assert errors["kv_producer"] == errors["kv_both"] < 0.02
    assert errors["kv_both"] < errors["kv_consumer"] < 0.03


def test_static_is_the_documented_formula() -> None:
    """y = (clamp(round(x / input_scale + input_offset), -128, 127) @ q + quant_bias) * deq_scale, to bfloat16's last bits."""
    layer, (stored,) = build("row", "W8A8", stored_bias=True)
    x = inputs(200)
    # The operator takes the reciprocal in the input's dtype.
    reciprocal = (1.0 / stored["input_scale"]).bfloat16().double()
    quantized = (x.double() * reciprocal + stored["input_offset"].double()).round().clamp(-128, 127)
    step = stored["deq_scale"].double() * (1.0 / reciprocal) / stored["input_scale"].double()
    reference = (quantized @ stored["weight"].double().T + stored["quant_bias"].double()) * step
    assert error(layer(x)[0], reference) < 0.004


@pytest.mark.parametrize(("vocabulary", "padding"), [(100, 64), (128, 64), (65, 64)])
def test_a_quantized_head_with_a_padded_vocabulary(vocabulary: int, padding: int) -> None:
    stored = {"lm_head": stored_layer("W8A8_DYNAMIC", vocabulary, COLUMNS, 0)}
    head = ParallelLMHead(
        vocabulary,
        COLUMNS,
        params_dtype=torch.bfloat16,
        padding_size=padding,
        quant_config=config_of("W8A8_DYNAMIC", stored),
        prefix="lm_head",
    )
    load(head, stored["lm_head"])
    head.quant_method.process_weights_after_loading(head)
    x = inputs()
    logits = head.quant_method.apply(head, x)
    assert logits.shape[1] == -(-vocabulary // padding) * padding
    assert error(logits[:, :vocabulary], expected([stored["lm_head"]], x)) < LIMITS["W8A8_DYNAMIC"]
    assert not logits[:, vocabulary:].any()  # rows that no file holds


def test_w4a8_as_w4a16_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_W4A8", "w4a16")
    said: list[str] = []
    monkeypatch.setattr(config_module.logger, "info", lambda text, *values, **_: said.append(text % values))
    tensors = ("weight", "weight_scale", "weight_offset")
    names = [f"{BLOCK}mlp.{part}_proj" for part in ("gate", "up")]
    config = config_of("W4A8_DYNAMIC", {name: dict.fromkeys(tensors, torch.empty(0)) for name in names})
    config.host = Host.read()
    layer = MergedColumnParallelLinear(64, [16, 16], bias=False, params_dtype=torch.bfloat16)
    methods = [config.get_quant_method(layer, BLOCK + "mlp.gate_up_proj") for _ in range(2)]
    assert [method.row.method_name for method in methods] == ["WeightOnlyLinear"] * 2
    assert said == ["W4A8_DYNAMIC for linear layers: VLLM_NPU_QUANT_W4A8=w4a16: its activations are not quantized"]


@pytest.mark.parametrize("name", ["gate_up", "row"])
@pytest.mark.parametrize("kind", LIMITS)
def test_no_tokens_give_no_outputs(kind: str, name: str) -> None:
    layer, stored = build(name, kind)
    output, _ = layer(torch.empty(0, COLUMNS, dtype=torch.bfloat16))
    assert output.shape == (0, sum(len(tensors["weight"]) for tensors in stored))


@pytest.mark.parametrize("kind", LIMITS)
def test_preparing_a_layer_holds_one_more_copy_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the weight is cast to FRACTAL_NZ: the stored one is gone by then."""
    monkeypatch.setattr(int4, "BLOCK_ELEMENTS", 1 << 14)
    rows, columns = 1024, 768
    stored = stored_layer(kind, rows, columns, 0)
    config = config_of(kind, {BLOCK + "mlp.fc": stored})
    layers: list[Any] = []

    def build_and_prepare() -> None:
        options = {"params_dtype": torch.bfloat16, "quant_config": config, "prefix": BLOCK + "mlp.fc"}
        layers.append(ReplicatedLinear(columns, rows, bias=False, **options))
        load(layers[0], stored)
        layers[0].quant_method.process_weights_after_loading(layers[0])

    assert 2 * rows * columns <= peak_of(build_and_prepare) <= 2.2 * rows * columns
    assert emulation.storage_format(layers[0].weight) == methods_base.FRACTAL_NZ


def test_a_quantized_embedding_is_refused() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    stored = {"model.embed_tokens": stored_layer("W8A16", 64, COLUMNS, 0)}
    with pytest.raises(NpuQuantError) as caught:
        VocabParallelEmbedding(64, COLUMNS, quant_config=config_of("W8A16", stored), prefix="model.embed_tokens")
    assert caught.value.codes == ("unsupported-scheme",)
