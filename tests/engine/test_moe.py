# SPDX-License-Identifier: Apache-2.0
"""Routed experts in real vLLM layers: every producer's tensors, on one rank and on several, and what can be wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from tests.e2e.twins import make_twin
from tests.engine.moe_layers import config_of, expected, experts_prefix, load, make_layer, read_tensors, run, sizes_of
from tests.fixtures_index import FIXTURES, shared
from tests.methods.layers import random_input, relative_error
from tests.methods.moe_layers import routing
from vllm_npu_quant.engine.moe import NpuQuantMoEMethod
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.spec import Layout

W8A8 = "msmodelslim-qwen3moe-w8a8-dynamic"

#: Checkpoint -> limit of a layer's relative error against the dequantized weights. int8 activations cost about 0.01.
CHECKPOINTS = {
    W8A8: 0.02,
    "msmodelslim-dsv3-moe-w8a8": 0.02,
    "msmodelslim-qwen3moe-moe-w4a8": 0.02,
    "msmodelslim-qwen3moe-v0-w4a8-g64": 0.02,
    "ct-qwen3moe-w8a8-dynamic": 0.02,
    "ct-dsv3-w8a8-dynamic": 0.02,
    "ct-qwen3moe-w4a8-int8-channel": 0.02,
    "ct-qwen3moe-w4a16-g128": 0.01,
    # The weights are requantized, too.
    "ct-qwen3moe-fp8-dynamic": 0.025,
    "awq-qwen3moe-g128": 0.01,
    "awq-qwen3moe-autoawq-g128": 0.01,
    "gptq-qwen3moe-w4g128-sym": 0.01,
    "autoround-qwen3moe-w4g128": 0.01,
    "autoround-qwen3moe-w4g128-packawq": 0.01,
}


def folder_of(name: str) -> Path:
    return FIXTURES / name if (FIXTURES / name).is_dir() else shared(name)


@cache
def tensors_of(name: str) -> dict[str, torch.Tensor]:
    return read_tensors(folder_of(name))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def of(name: str) -> dict[str, torch.Tensor]:
        return read_tensors(make_twin(folder_of(name), tmp_path_factory.mktemp("twin") / name))

    return of


@cache
def config_for(name: str):
    return config_of(folder_of(name))


def layer_of(name: str, **options: Any):
    return make_layer(config_for(name), experts_prefix(tensors_of(name)), **{**sizes_of(folder_of(name)), **options})


def loaded(name: str, **options: Any):
    return load(layer_of(name, **options), tensors_of(name))


def inputs(name: str, tokens: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = sizes_of(folder_of(name))
    weights, ids = routing(tokens, sizes["top_k"], sizes["experts"])
    return random_input(tokens, sizes["hidden"], torch.bfloat16), weights, ids


def error_of(y: torch.Tensor, name: str, floats: Any, given: tuple) -> float:
    return relative_error(y, expected(floats(name), experts_prefix(tensors_of(name)), *given))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_producer(name: str, floats) -> None:
    given = inputs(name)
    assert error_of(run(loaded(name), *given), name, floats, given) < CHECKPOINTS[name]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_two_tensor_parallel_ranks_add_up(name: str, floats) -> None:
    given = inputs(name)
    y = sum(run(loaded(name, tp=(2, rank)), *given).double() for rank in range(2))
    assert error_of(y, name, floats, given) < CHECKPOINTS[name]


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_expert_parallel_ranks_add_up(name: str, placement: str, floats) -> None:
    given = inputs(name)
    layers = [loaded(name, ep=(4, rank), placement=placement) for rank in range(4)]
    assert [int((layer.expert_map >= 0).sum()) for layer in layers] == [layers[0].w13_weight.shape[0]] * 4
    y = sum(run(layer, *given).double() for layer in layers)
    assert error_of(y, name, floats, given) < CHECKPOINTS[name]


@pytest.mark.parametrize("choices", [1, 8])
@pytest.mark.parametrize("tokens", [0, 1, 7, 1000])
@pytest.mark.parametrize("name", [W8A8, "msmodelslim-qwen3moe-moe-w4a8", "ct-qwen3moe-w4a16-g128"])
def test_numbers_of_tokens_and_choices(name: str, tokens: int, choices: int, floats) -> None:
    sizes = sizes_of(folder_of(name))
    x = random_input(tokens, sizes["hidden"], torch.bfloat16)
    given = x, *routing(tokens, choices, sizes["experts"])
    y = run(loaded(name, top_k=choices) if tokens != 1000 else _kept(name, choices), *given)
    assert y.shape == given[0].shape
    assert y.dtype == x.dtype
    some = slice(0, 40)  # the oracle goes token by token
    if tokens:
        assert error_of(y[some], name, floats, tuple(part[some] for part in given)) < CHECKPOINTS[name]


@cache
def _kept(name: str, choices: int):
    return loaded(name, top_k=choices)


@pytest.mark.parametrize("tp", [(1, 0), (2, 0)], ids=["one_rank", "two_ranks"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_all_tokens_to_one_expert(name: str, tp: tuple[int, int], floats) -> None:
    """The other experts have none."""
    x, _, _ = inputs(name, 9)
    ids = torch.full((9, 1), 5, dtype=torch.int32)
    given = x, torch.ones(9, 1), ids
    y = sum(run(loaded(name, tp=(tp[0], rank), top_k=1), *given).double() for rank in range(tp[0]))
    assert error_of(y, name, floats, given) < CHECKPOINTS[name]


def test_float16(floats) -> None:
    x, weights, ids = inputs(W8A8)
    y = run(loaded(W8A8, dtype=torch.float16), x.half(), weights, ids)
    assert y.dtype == torch.float16
    assert error_of(y, W8A8, floats, (x, weights, ids)) < 0.02


def test_router_weights_on_the_input(floats) -> None:
    x, _, ids = inputs(W8A8)
    weights = torch.linspace(0.2, 1.5, 17).unsqueeze(1)
    y = run(loaded(W8A8, apply_router_weight_on_input=True), x, weights, ids[:, :1].contiguous())
    given = ((x * weights.bfloat16()).float(), torch.ones(17, 1), ids[:, :1])
    assert error_of(y, W8A8, floats, given) < 0.02


def test_the_checkpoints_tensors_are_gone_and_a_second_call_changes_nothing() -> None:
    layer = loaded(W8A8)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"}
    before = layer.w13_weight.data_ptr()
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.w13_weight.data_ptr() == before


def test_apply_is_one_graph() -> None:
    layer = loaded(W8A8)
    given = inputs(W8A8)

    def call(*arguments: torch.Tensor) -> torch.Tensor:
        return run(layer, *arguments) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), call(*given))


def test_the_operator_agrees_with_its_fake() -> None:
    layer = loaded(W8A8)
    x, weights, ids = inputs(W8A8)
    torch.library.opcheck(torch.ops.npu_quant.fused_experts, (x, weights, ids, layer.quant_method.key))


def test_two_living_layers_of_one_name_have_two_keys() -> None:
    first, second = layer_of(W8A8), layer_of(W8A8)
    assert first.quant_method.key != second.quant_method.key
    del first
    third = layer_of(W8A8)
    assert third.quant_method.key != second.quant_method.key


def test_what_the_layer_says_of_itself() -> None:
    method = layer_of(W8A8).quant_method
    assert isinstance(method, NpuQuantMoEMethod)
    assert method.scheme == "W8A8_DYNAMIC"
    assert method.method_classes == "W8A8DynamicExperts"
    assert method.operators == (
        "npu_moe_init_routing_v2",
        "npu_grouped_matmul",
        "npu_dequant_swiglu_quant",
        "npu_grouped_matmul",
        "npu_moe_token_unpermute",
    )
    assert not method.supports_eplb
    assert method.get_fused_moe_quant_config(layer_of(W8A8)) is None


@pytest.mark.parametrize("name", ["msmodelslim-qwen3moe-moe-w4a8", "ct-qwen3moe-w4a8-int8-channel"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_w4a8_with_activations_in_the_models_dtype(
    name: str, ranks: int, floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_W4A8", "w4a16")
    config, tensors, sizes = config_of(folder_of(name)), tensors_of(name), sizes_of(folder_of(name))
    made = (make_layer(config, experts_prefix(tensors), tp=(ranks, rank), **sizes) for rank in range(ranks))
    layers = [load(layer, tensors) for layer in made]
    assert layers[0].quant_method.method_classes == "WeightOnlyExperts"
    assert layers[0].quant_method.scheme.endswith(" as W4A16")
    given = inputs(name)
    # Below what int8 activations would cost.
    assert error_of(sum(run(layer, *given).double() for layer in layers), name, floats, given) < 0.007


# --------------------------------------------------------------------------------------------------- static activations


def static_checkpoint(folder: Path, offset: int, *, bias: int = 0, wide: bool = False) -> Path:
    """The W8A8 checkpoint with the experts of layer 0 as msModelSlim's W8A8 (static) stores them.

    Args:
        offset: input_offset. bias: added to one quant_bias. wide: deq_scale as the float32's bits in int64.
    """
    source = FIXTURES / W8A8
    description = json.loads((source / "quant_model_description.json").read_text())
    tensors = dict(tensors_of(W8A8))
    for name in [name for name in tensors if name.startswith(PREFIX) and name.endswith(".weight")]:
        stem = name.removesuffix("weight")
        scale, _ = tensors.pop(stem + "weight_scale"), tensors.pop(stem + "weight_offset")
        del description[stem + "weight_scale"], description[stem + "weight_offset"]
        quant_bias = -offset * tensors[name].sum(1, dtype=torch.int32)
        quant_bias[0] += bias
        own = {
            "input_scale": torch.tensor([0.03]),
            "input_offset": torch.tensor([float(offset)]),
            "quant_bias": quant_bias,
            "deq_scale": scale.float().reshape(-1) * 0.03,
        }
        if wide:
            own["deq_scale"] = torch.from_numpy(own["deq_scale"].numpy().view("uint32").astype("int64"))
        tensors |= {stem + key: value for key, value in own.items()}
        description |= {stem + key: "W8A8" for key in ("weight", *own)}
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "int64"])
@pytest.mark.parametrize("offset", [0, -5])
def test_static_experts_get_a_scale_per_token(tmp_path: Path, offset: int, wide: bool, floats) -> None:
    folder = static_checkpoint(tmp_path, offset, wide=wide)
    tensors, config, given = read_tensors(folder), config_of(folder), inputs(W8A8)
    for ranks in (1, 2):
        layers = [
            load(make_layer(config, PREFIX, **sizes_of(folder), tp=(ranks, rank)), tensors) for rank in range(ranks)
        ]
        assert layers[0].quant_method.method_classes == "W8A8DynamicExperts"
        y = sum(run(layer, *given).double() for layer in layers)
        assert relative_error(y, expected(floats(W8A8), PREFIX, *given)) < 0.02


@pytest.mark.parametrize("offset", [0, -5])
def test_static_experts_with_a_bias_are_refused(tmp_path: Path, offset: int) -> None:
    folder = static_checkpoint(tmp_path, offset, bias=7)
    with pytest.raises(NpuQuantError, match="bias") as caught:
        load(make_layer(config_of(folder), PREFIX, **sizes_of(folder)), read_tensors(folder))
    assert caught.value.codes == ("unsupported-scheme",)
    assert caught.value.findings[0].layer == PREFIX


# ------------------------------------------------------------------------------------------------------ mixed precision


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A copy of the W8A8 checkpoint whose down projections are float in layer 0, gate and up in layer 1."""
    source = FIXTURES / W8A8
    description = json.loads((source / "quant_model_description.json").read_text())
    tensors = dict(tensors_of(W8A8))
    for layer, names in ((0, ("down_proj",)), (1, ("gate_proj", "up_proj"))):
        for expert in range(sizes_of(source)["experts"]):
            for name in names:
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{name}."
                scale, offset = tensors.pop(stem + "weight_scale"), tensors.pop(stem + "weight_offset")
                tensors[stem + "weight"] = ((tensors[stem + "weight"].float() - offset) * scale).bfloat16()
                description[stem + "weight"] = "FLOAT"
                del description[stem + "weight_scale"], description[stem + "weight_offset"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "quant_model_description.json").write_text(json.dumps(description))
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_float_and_quantized_products_mix(mixed: Path, layer: int, ranks: int, floats) -> None:
    prefix = f"model.layers.{layer}.mlp.experts"
    tensors = read_tensors(mixed)
    parts = [
        load(make_layer(config_of(mixed), prefix, **sizes_of(mixed), tp=(ranks, rank)), tensors)
        for rank in range(ranks)
    ]
    assert {part.quant_method.method_classes for part in parts} == {
        ("W8A8DynamicExperts + FloatExperts", "FloatExperts + W8A8DynamicExperts")[layer]
    }
    given = inputs(W8A8)
    y = sum(run(part, *given).double() for part in parts)
    assert relative_error(y, expected(floats(W8A8), prefix, *given)) < 0.02


def float_checkpoint(folder: Path) -> Path:
    """The W8A8 checkpoint with the experts of layer 0 float."""
    source = FIXTURES / W8A8
    description = json.loads((source / "quant_model_description.json").read_text())
    tensors = dict(tensors_of(W8A8))
    for name in [name for name in tensors if name.startswith(PREFIX) and name.endswith(".weight")]:
        stem = name.removesuffix("weight")
        scale, offset = tensors.pop(stem + "weight_scale"), tensors.pop(stem + "weight_offset")
        tensors[name] = ((tensors[name].float() - offset) * scale).bfloat16()
        description[name] = "FLOAT"
        del description[stem + "weight_scale"], description[stem + "weight_offset"]
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


PREFIX = "model.layers.0.mlp.experts"


def test_float_experts_are_vllms_own(tmp_path: Path) -> None:
    with set_current_vllm_config(VllmConfig()):
        layer = make_layer(config_of(float_checkpoint(tmp_path)), PREFIX, **sizes_of(FIXTURES / W8A8))
    assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"


def test_float_experts_of_expert_parallel_ranks_add_up(tmp_path: Path, floats) -> None:
    """vLLM's own CPU kernel crashes there."""
    folder = float_checkpoint(tmp_path)
    tensors, config, given = read_tensors(folder), config_of(folder), inputs(W8A8)
    ranks = [load(make_layer(config, PREFIX, **sizes_of(folder), ep=(2, rank)), tensors) for rank in range(2)]
    assert [rank.quant_method.method_classes for rank in ranks] == ["FloatExperts"] * 2
    y = sum(run(rank, *given).double() for rank in ranks)
    assert relative_error(y, expected(floats(W8A8), PREFIX, *given)) < 0.01


# ------------------------------------------------------------------------------------------------------------- mistakes


def refused(name: str = W8A8, **options: Any) -> NpuQuantError:
    with pytest.raises(NpuQuantError) as caught:
        layer_of(name, **options)
    for finding in caught.value.findings:
        assert finding.layer == experts_prefix(tensors_of(name))
        assert finding.fix
    return caught.value


def broken(tensors: dict[str, torch.Tensor], **options: Any) -> NpuQuantError:
    with pytest.raises(NpuQuantError) as caught:
        load(layer_of(W8A8, **options), tensors)
    assert all(finding.fix for finding in caught.value.findings)
    return caught.value


@pytest.mark.parametrize(
    "suffix", ["gate_proj.weight", "up_proj.weight_scale", "down_proj.weight", "down_proj.weight_offset"]
)
def test_a_tensor_that_did_not_come(suffix: str) -> None:
    tensors = dict(tensors_of(W8A8))
    del tensors[f"{PREFIX}.5.{suffix}"]
    error = broken(tensors)
    assert error.codes == ("not-filled",)
    assert error.findings[0].expected == f"{PREFIX}.5.{suffix}"


def test_tensors_that_did_not_come_are_named_by_the_checkpoints_numbers_on_every_rank() -> None:
    tensors = dict(tensors_of(W8A8))
    del tensors[f"{PREFIX}.5.down_proj.weight"]
    assert broken(tensors, ep=(2, 1)).findings[0].expected == f"{PREFIX}.5.down_proj.weight"
    load(layer_of(W8A8, ep=(2, 0)), tensors)  # experts 0 to 3 are all there


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("gate_proj.weight", lambda value: value[:-1]),
        ("gate_proj.weight", lambda value: value[:64]),
        ("down_proj.weight", lambda value: value[:, :64]),
        ("up_proj.weight", lambda value: torch.cat((value, value))),
        ("up_proj.weight_scale", lambda value: value[:64]),
        ("down_proj.weight_scale", lambda value: value.expand(-1, 2)),
        ("down_proj.weight_offset", lambda value: value[:1]),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tensor_of_another_size(suffix: str, change: Any, ranks: int) -> None:
    tensors = dict(tensors_of(W8A8))
    tensors[f"{PREFIX}.3.{suffix}"] = change(tensors[f"{PREFIX}.3.{suffix}"]).contiguous()
    error = broken(tensors, tp=(ranks, 0))
    assert error.codes == ("wrong-shape",)
    assert error.findings[0].layer == f"{PREFIX}.3.{suffix}"


def test_a_tensor_of_another_dtype() -> None:
    tensors = dict(tensors_of(W8A8))
    tensors[f"{PREFIX}.3.up_proj.weight"] = tensors[f"{PREFIX}.3.up_proj.weight"].to(torch.int32)
    error = broken(tensors)
    assert error.codes == ("wrong-dtype",)
    assert error.findings[0].layer == f"{PREFIX}.3.up_proj.weight"
    assert (error.findings[0].expected, error.findings[0].found) == ("I8", "I32")


def test_zero_points_in_a_symmetric_scheme() -> None:
    tensors = dict(tensors_of(W8A8))
    tensors[f"{PREFIX}.3.up_proj.weight_offset"] = torch.ones_like(tensors[f"{PREFIX}.3.up_proj.weight_offset"])
    error = broken(tensors)
    assert error.codes == ("bad-value",)
    assert error.findings[0].layer == PREFIX


def test_scales_without_their_last_dimension() -> None:
    tensors = {
        name: value.squeeze(-1) if name.endswith("weight_scale") else value for name, value in tensors_of(W8A8).items()
    }
    given = inputs(W8A8)
    assert torch.equal(run(load(layer_of(W8A8), tensors), *given), run(loaded(W8A8), *given))


def test_experts_that_do_not_divide_are_refused() -> None:
    error = refused(ep=(3, 0))
    assert error.codes == ("cannot-shard",)
    assert "2, 4, 8" in error.findings[0].expected


def test_another_number_of_experts_than_the_description() -> None:
    folder = folder_of(W8A8)
    with pytest.raises(NpuQuantError) as caught:
        make_layer(config_of(folder), PREFIX, **{**sizes_of(folder), "experts": 4})
    assert caught.value.codes == ("wrong-shape",)
    assert (caught.value.findings[0].expected, caught.value.findings[0].found) == (
        "4 experts, as in config.json",
        "8 experts",
    )


@pytest.mark.parametrize("activation", [MoEActivation.GELU, MoEActivation.SWIGLUOAI])
def test_other_activations_are_refused(activation: MoEActivation) -> None:
    error = refused(change=lambda moe: setattr(moe, "activation", activation))
    assert error.codes == ("unsupported-scheme",)
    assert activation.value in error.findings[0].found


def test_a_limit_of_the_activation_is_refused() -> None:
    error = refused(swiglu_limit=7.0)
    assert error.codes == ("unsupported-scheme",)
    assert "swiglu_limit 7.0" in error.findings[0].found


def test_biased_experts_are_refused() -> None:
    assert refused(change=lambda moe: setattr(moe, "has_bias", True)).codes == ("unsupported-scheme",)


def test_schemes_without_a_row_are_refused_from_the_description() -> None:
    folder = folder_of(W8A8)
    config = copy.deepcopy(config_of(folder))
    entry = config.described.experts[PREFIX]  # type: ignore[union-attr]
    bad = replace(entry.down, spec=replace(entry.down.spec, weight=replace(entry.down.spec.weight, symmetric=False)))
    config.described.experts[PREFIX] = replace(entry, down=bad)  # type: ignore[union-attr]
    with pytest.raises(NpuQuantError) as caught:
        make_layer(config, PREFIX, **sizes_of(folder))
    assert caught.value.codes == ("unsupported-scheme",)
    assert "W8A8 dynamic" in caught.value.findings[0].expected


def test_activation_order_is_refused_from_the_description() -> None:
    name = "gptq-qwen3moe-w4g128-sym"
    config = config_of(folder_of(name))
    index = config.described  # type: ignore[union-attr]
    entry = index.experts[PREFIX]
    ordered = replace(entry.gate, spec=replace(entry.gate.spec, layout=Layout.GPTQ_ACT_ORDER))
    index.experts[PREFIX] = replace(entry, gate=ordered, up=ordered)
    with pytest.raises(NpuQuantError, match="activation order") as caught:
        make_layer(config, PREFIX, **sizes_of(folder_of(name)))
    assert caught.value.codes == ("unsupported-scheme",)


def test_packed_words_that_ranks_would_cut_are_refused() -> None:
    error = refused("ct-qwen3moe-w4a16-g128", tp=(32, 0))
    assert error.codes == ("cannot-shard",)
    assert "weight_packed" in error.findings[0].message
