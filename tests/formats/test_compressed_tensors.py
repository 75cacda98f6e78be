# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors configs: what every spelling means, which layers a rule takes, and what is refused."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures_index import fixture, shared
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.compressed_tensors import (
    FORMAT,
    CompressedTensorsConfig,
    Match,
    QuantizationArgs,
    Targets,
    layer_kinds,
    read,
)
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.resolve import LayerResolver
from vllm_npu_quant.formats.samples import EXPERTS, LAYER
from vllm_npu_quant.serving.decide import Host, decide, requantized_findings
from vllm_npu_quant.spec import LayerKind, LayerSpec, Layout, NumberKind

W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
A8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
A8_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
F8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
F8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}


def stored(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, Any]:
    """Headers: name with "__" for "." -> (dtype, shape)."""
    return {
        name.replace("__", "."): SimpleNamespace(dtype=dtype, shape=shape, file="model.safetensors")
        for name, (dtype, shape) in tensors.items()
    }


def layer_w8(name: str, outputs: int = 16, inputs: int = 64) -> dict[str, Any]:
    return {
        f"{name}.weight": SimpleNamespace(dtype="I8", shape=(outputs, inputs), file="model.safetensors"),
        f"{name}.weight_scale": SimpleNamespace(dtype="BF16", shape=(outputs, 1), file="model.safetensors"),
    }


def layer_f8(name: str) -> dict[str, Any]:
    tensors = layer_w8(name)
    tensors[f"{name}.weight"].dtype = "F8_E4M3"
    return tensors


def layer_float(name: str, shape: tuple[int, ...] = (16, 64)) -> dict[str, Any]:
    return {f"{name}.weight": SimpleNamespace(dtype="BF16", shape=shape, file="model.safetensors")}


def config(weights: Any = W8, inputs: Any = A8, **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": "int-quantized",
        "ignore": ["lm_head"],
        **fields,
    }


def errors(described: Described) -> list[Any]:
    return [finding for finding in described.findings if finding.severity is Severity.ERROR]


def spec_of(quantization: dict[str, Any], tensors: dict[str, Any] | None = None) -> LayerSpec:
    """The spec of the only layer of a checkpoint without findings."""
    described = read(quantization, tensors or layer_w8("model.layers.0.mlp.up_proj"))
    assert described.findings == ()
    return described.find("model.layers.0.mlp.up_proj").spec


# The producers' own files.

FOLDERS = {
    "ct-qwen3-w8a8-dynamic": (
        "W8A8_DYNAMIC",
        "8-bit int weight per channel, 8-bit int dynamic activation per token",
        14,
    ),
    "ct-qwen3-w8a8-static": ("W8A8_STATIC", "8-bit int weight per channel, 8-bit int static activation per tensor", 14),
    "ct-qwen3-w8a8-static-asym": (
        "W8A8_STATIC",
        "8-bit int weight per channel, 8-bit int static activation per tensor, asymmetric",
        14,
    ),
    "ct-qwen3-w4a16-channel": ("W4A16", "4-bit int weight per channel, activation not quantized", 14),
    "ct-qwen3-w4a16-g128": ("W4A16", "4-bit int weight per group of 128, activation not quantized", 14),
    "ct-qwen3-w4a16-g128-asym": (
        "W4A16",
        "4-bit int weight per group of 128, asymmetric, activation not quantized",
        14,
    ),
    "ct-qwen3-w4a16-g32-asym": ("W4A16", "4-bit int weight per group of 32, asymmetric, activation not quantized", 14),
    "ct-qwen3-w8a16-channel": ("W8A16", "8-bit int weight per channel, activation not quantized", 14),
    "ct-qwen3-w4a8-int8-channel": (
        "W4A8_DYNAMIC",
        "4-bit int weight per channel, 8-bit int dynamic activation per token",
        14,
    ),
    "ct-qwen3-w4a8-int8-g128": (
        "W4A8_DYNAMIC",
        "4-bit int weight per group of 128, 8-bit int dynamic activation per token",
        14,
    ),
    "ct-qwen3-w4a4-int": ("W4A4_DYNAMIC", "4-bit int weight per channel, 4-bit int dynamic activation per token", 14),
    "ct-qwen3-fp8-dynamic": (
        "FP8_CHANNEL_DYNAMIC as W8A8_DYNAMIC",
        "8-bit int weight per channel (stored as 8-bit float weight per channel), 8-bit int dynamic activation per token",
        14,
    ),
    "ct-qwen3-fp8-block": (
        "FP8_BLOCK_DYNAMIC as W8A8_DYNAMIC",
        "8-bit int weight per channel (stored as 8-bit float weight per block of 128 x 128), "
        "8-bit int dynamic activation per token",
        14,
    ),
    "ct-qwen3moe-w8a8-dynamic": (
        "W8A8_DYNAMIC",
        "8-bit int weight per channel, 8-bit int dynamic activation per token",
        8 + 48,
    ),
    "ct-qwen3moe-w4a16-g128": ("W4A16", "4-bit int weight per group of 128, activation not quantized", 8 + 48),
    "ct-qwen3moe-w4a8-int8-channel": (
        "W4A8_DYNAMIC",
        "4-bit int weight per channel, 8-bit int dynamic activation per token",
        8 + 48,
    ),
    "ct-qwen3moe-fp8-dynamic": (
        "FP8_CHANNEL_DYNAMIC as W8A8_DYNAMIC",
        "8-bit int weight per channel (stored as 8-bit float weight per channel), 8-bit int dynamic activation per token",
        8 + 48,
    ),
    "ct-dsv3-w8a8-dynamic": (
        "W8A8_DYNAMIC",
        "8-bit int weight per channel, 8-bit int dynamic activation per token",
        10 + 3 + 3 + 24,
    ),
    "ct-qwen3-mxfp4": (
        "MXFP4_W4A4 as W8A8_DYNAMIC",
        "8-bit int weight per channel (stored as 4-bit mx weight per group of 32), 8-bit int dynamic activation per token",
        14,
    ),
}
IN_REPOSITORY = {"ct-qwen3-w8a8-dynamic", "ct-qwen3-w4a16-g128-asym", "ct-qwen3-fp8-block"}


def opened(name: str) -> tuple[dict[str, Any], Checkpoint]:
    folder: Path = fixture(name) if name in IN_REPOSITORY else shared(name)
    return json.loads((folder / "config.json").read_text())["quantization_config"], Checkpoint.open(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_producers_folders_are_understood(name: str) -> None:
    quantization, checkpoint = opened(name)
    described = read(quantization, checkpoint.tensors)
    assert not errors(described)
    assert check_checkpoint(described, checkpoint) == []
    scheme, text, count = FOLDERS[name]
    quantized = [entry.spec for _, entry in described.stored_layers() if not entry.spec.is_float]
    assert {decide(LayerKind.LINEAR, spec, Host()).describe() for spec in quantized} == {f"{scheme}: {text}"}
    kind = NumberKind.MX if "mxfp" in name else NumberKind.FLOAT if "fp8" in name else NumberKind.INT
    assert {spec.weight.kind for spec in quantized} == {kind}
    assert pickle.loads(pickle.dumps(described)) == described
    assert len(quantized) == count
    if "moe" in name or "dsv3" in name:
        assert {experts.count for experts in described.experts.values()} == {8}


@pytest.mark.parametrize("name", FOLDERS)
def test_fused_layers_resolve_to_their_shards(name: str) -> None:
    quantization, checkpoint = opened(name)
    resolver = LayerResolver(read(quantization, checkpoint.tensors), {})
    if "dsv3" in name:
        fused = resolver.resolve("model.layers.0.self_attn.fused_qkv_a_proj")
        assert [shard.rpartition(".")[2] for shard in fused.shards] == ["q_a_proj", "kv_a_proj_with_mqa"]
    else:
        fused = resolver.resolve("model.layers.0.self_attn.qkv_proj")
        assert [shard.rpartition(".")[2] for shard in fused.shards] == ["q_proj", "k_proj", "v_proj"]
    assert not fused.spec.is_float
    assert resolver.resolve("lm_head").spec.is_float


# Arguments.


@pytest.mark.parametrize(
    ("fields", "granularity"),
    [
        ({}, "tensor"),
        ({"group_size": 128}, "group"),
        ({"group_size": -1}, "channel"),
        ({"strategy": "CHANNEL"}, "channel"),
        ({"strategy": "group", "group_size": 64}, "group"),
        ({"strategy": "block", "block_structure": [128, 128]}, "block"),
        ({"strategy": "block", "block_structure": "128x64"}, "block"),
        ({"strategy": "token", "dynamic": True}, "token"),
        ({"type": "FLOAT"}, "tensor"),
    ],
)
def test_strategies_in_every_spelling(fields: dict[str, Any], granularity: str) -> None:
    assert QuantizationArgs.model_validate(fields).granularity == granularity


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (None, None),
        (False, None),
        (True, "group"),
        ("group", "group"),
        ("Group", "group"),
        ("dynamic", "group"),
        ("weight", "weight"),
        ("static", "weight"),
    ],
)
def test_actorder_in_every_spelling(written: Any, meant: str | None) -> None:
    assert QuantizationArgs.model_validate({**W4, "actorder": written}).actorder == meant


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "group"},
        {"strategy": "group", "group_size": 0},
        {"strategy": "channel", "group_size": 64},
        {"strategy": "block"},
        {"block_structure": [128, 128]},
        {"strategy": "block", "block_structure": [128, 0]},
        {"strategy": "block", "block_structure": [128]},
        {"strategy": "block", "block_structure": "128"},
        {"strategy": "token"},
        {"strategy": "channel", "actorder": "group"},
        {"strategy": "nonsense"},
        {"num_bits": 0},
        {"num_bits": 64},
        {"num_bits": True},
        {"num_bits": "eight"},
        {"type": "complex"},
        {"symmetric": 2},
        {"group_size": 64.5},
        {"group_size": 1 << 40},
        {"dynamic": "sometimes"},
        {"actorder": "random"},
        {"newfield": 3},
    ],
)
def test_contradictory_arguments_are_refused(fields: dict[str, Any]) -> None:
    described = read(config({"num_bits": 8, **fields}), {})
    assert {finding.code for finding in errors(described)} == {"bad-config"}
    for finding in errors(described):
        assert finding.fix
        assert "config_groups.group_0.weights" in finding.expected


def test_a_field_that_says_nothing_is_accepted() -> None:
    QuantizationArgs.model_validate({**W8, "newfield": None, "other": {}})
    assert not errors(read(config({**W8, "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None}), {}))


def test_unknown_fields_of_the_config_are_reported_and_ignored() -> None:
    described = read(config(new_feature={"on": True}, empty=None, version="0.19.0"), {})
    (finding,) = described.findings
    assert (finding.code, finding.severity) == ("bad-config", Severity.WARNING)
    assert finding.found == "new_feature"


@given(
    st.fixed_dictionaries(
        {"num_bits": st.sampled_from([4, 8])},
        optional={
            "type": st.sampled_from(["int", "float", "INT"]),
            "symmetric": st.booleans(),
            "group_size": st.sampled_from([None, -1, 0, 32, 128]),
            "strategy": st.sampled_from(["tensor", "channel", "group", "block", "token", None]),
            "block_structure": st.sampled_from([None, [128, 128], "128x128"]),
            "dynamic": st.booleans(),
            "actorder": st.sampled_from([None, True, False, "group", "weight", "static", "dynamic"]),
            "observer": st.sampled_from([None, "minmax"]),
        },
    )
)
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arguments_mean_what_the_library_says(fields: dict[str, Any]) -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    try:
        wanted = library.QuantizationArgs.model_validate(fields)
    except (ValueError, NotImplementedError):
        wanted = None
    try:
        got = QuantizationArgs.model_validate(fields)
    except ValueError:
        got = None
    if wanted is None:
        # What the library refuses for its own reasons (a dynamic weight per channel) is refused with the scheme.
        assert got is None or got.dynamic or (got.type == "float" and got.num_bits == 4)
        return
    assert got is not None
    assert got.granularity == wanted.strategy
    assert (got.num_bits, got.type, got.symmetric) == (wanted.num_bits, wanted.type, wanted.symmetric)
    assert got.group_size == wanted.group_size
    assert got.actorder == {"static": "weight", "dynamic": "group"}.get(wanted.actorder, wanted.actorder)
    assert list(got.block_structure or ()) == (wanted.block_structure or [])


def test_presets_mean_what_the_library_says() -> None:
    library = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    for name in ("W8A16", "W4A16", "W4A16_ASYM", "W8A8", "INT8", "W4A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"):
        groups = {"config_groups": {name: ["Linear"]}}
        mine = CompressedTensorsConfig.model_validate(groups).config_groups[name]
        theirs = library.QuantizationConfig.model_validate(groups).config_groups[name]
        assert list(mine.targets) == theirs.targets
        for mine_args, their_args in (
            (mine.weights, theirs.weights),
            (mine.input_activations, theirs.input_activations),
        ):
            assert (mine_args is None) == (their_args is None)
            if mine_args is not None:
                for field in ("num_bits", "type", "symmetric", "group_size", "dynamic"):
                    assert getattr(mine_args, field) == getattr(their_args, field), (name, field)
                assert mine_args.granularity == their_args.strategy


# Rules.

LAYERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.mlp.down_proj",
    "lm_head",
]


def test_a_name_wins_over_an_expression_and_that_over_a_class() -> None:
    targets = Targets([["Linear"], ["re:.*down_proj"], ["model.layers.1.mlp.down_proj"]], ["lm_head"])
    assert [targets.match(layer) for layer in LAYERS] == [
        (0, Match.CLASS),
        (1, Match.PATTERN),
        (2, Match.NAME),
        (1, Match.PATTERN),
        (None, Match.IGNORED),
    ]


def test_expressions_match_at_the_start_and_need_no_end() -> None:
    targets = Targets([["re:model.layers.1"]], [])
    assert [targets.match(layer)[0] for layer in LAYERS] == [None, None, 0, 0, None]


def test_ignore_wins_over_a_name() -> None:
    targets = Targets([["lm_head"]], ["re:lm_.*"])
    assert targets.match("lm_head") == (None, Match.IGNORED)


def test_classes_that_are_no_linear_layers_take_nothing() -> None:
    targets = Targets([["LlamaAttention", "Embedding"]], [])
    assert targets.match("model.layers.0.self_attn.q_proj") == (None, Match.NONE)
    assert targets.match("model.embed_tokens", linear=False) == (0, Match.CLASS)


def test_a_rule_may_spell_a_multimodal_models_layers_otherwise() -> None:
    targets = Targets([["model.layers.0.mlp.up_proj"], [r"re:^model\.layers\.1\..*"]], ["re:model.visual.*"])
    assert targets.match("language_model.model.layers.0.mlp.up_proj") == (0, Match.NAME)
    assert targets.match("model.language_model.layers.1.mlp.up_proj") == (1, Match.PATTERN)
    assert targets.match("model.language_model.visual.x") == (None, Match.NONE)


def test_an_ignored_class_takes_all() -> None:
    targets = Targets([["re:.*down_proj"]], ["Linear"])
    assert targets.match("model.layers.0.mlp.down_proj") == (None, Match.IGNORED)


@given(
    st.lists(
        st.lists(
            st.sampled_from(
                [
                    "Linear",
                    "lm_head",
                    "re:.*proj",
                    "re:model",
                    "re:.*mlp.*",
                    "re:.*down_proj$",
                    "model.layers.1.mlp.down_proj",
                    "down_proj",
                    "re:down_proj",
                ]
            ),
            max_size=3,
        ),
        max_size=4,
    ),
    st.lists(st.sampled_from(["lm_head", "re:.*q_proj", "model.layers.10.mlp.down_proj", "mlp"]), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_rules_match_as_in_the_library(groups: list[list[str]], ignore: list[str]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    match = pytest.importorskip("compressed_tensors.utils.match", reason="compressed-tensors is not installed")
    linear = torch.nn.Linear(1, 1)
    by_target = {target: number for number, targets in enumerate(groups) for target in targets}
    targets = Targets(groups, ignore)
    for layer in LAYERS:
        found = match.match_targets(layer, linear, by_target)
        wanted = by_target[found[0]] if found and not match.is_match(layer, linear, ignore) else None
        assert targets.match(layer)[0] == wanted, layer


@pytest.mark.parametrize("bomb", ["re:(a+)+$", "re:(.*)*proj", "re:([a-z.]*)*x", "re:" + "(a?)" * 30 + "a" * 30])
def test_expressions_take_no_exponential_time(bomb: str) -> None:
    start = time.perf_counter()
    described = read(
        config() | {"config_groups": {"group_0": {"targets": [bomb], "weights": W8}}, "ignore": [bomb]},
        layer_float("a" * 200) | layer_float("model.layers.0.self_attn.q_proj"),
    )
    assert time.perf_counter() - start < 5
    assert described.find("model.layers.0.self_attn.q_proj").spec.is_float


@pytest.mark.parametrize("rule", ["re:(", "re:(?P<a>x)(?P=a)", "re:" + "x" * 10_000])
def test_expressions_that_cannot_be_used_are_named(rule: str) -> None:
    described = read(config(ignore=[rule]), layer_w8("model.layers.0.mlp.up_proj"))
    (finding,) = errors(described)
    assert finding.code == "bad-config"
    assert finding.message.startswith("ignore:")
    assert finding.found.startswith(rule[3:20])
    assert finding.fix


# What is stored decides.

NORM = layer_float("model.layers.0.input_layernorm", (64,))
EMBEDDING = layer_float("model.embed_tokens", (512, 64))
HEAD = layer_float("lm_head", (512, 64))
UP = layer_w8("model.layers.0.mlp.up_proj")


def test_a_router_that_no_rule_excludes_runs_as_float() -> None:
    router = layer_float("model.layers.0.mlp.gate", (8, 64)) | layer_float("model.layers.1.mlp.gate", (8, 64))
    described = read(config(), UP | NORM | EMBEDDING | HEAD | router)
    (finding,) = described.findings
    assert finding.severity is Severity.INFO
    assert finding.message.startswith("2 layers are stored as float although the config does not exclude them")
    assert finding.found == "model.layers.0.mlp.gate, model.layers.1.mlp.gate"
    assert described.stored_as_float == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert described.find("model.layers.0.mlp.gate").spec.is_float


def test_norms_embeddings_and_lone_parameters_need_no_rule() -> None:
    lone = stored(model__layers__0__mlp__gate__e_score_correction_bias=("F32", (8,)))
    described = read(config(), UP | NORM | EMBEDDING | HEAD | lone)
    assert described.findings == ()
    assert described.find("model.layers.0.mlp.gate") is None
    assert described.find("model.embed_tokens").spec.is_float


def test_a_head_may_be_quantized() -> None:
    described = read(config(ignore=[]), layer_w8("lm_head", 512))
    assert described.findings == ()
    assert described.find("lm_head").spec.scheme == "W8A8_DYNAMIC"


def test_mixed_precision_gives_each_group_its_format() -> None:
    groups = {
        "group_0": {
            "targets": ["re:.*self_attn.*proj$"],
            "weights": W8,
            "input_activations": A8,
            "format": "int-quantized",
        },
        "group_1": {"targets": ["re:.*mlp.*proj$"], "weights": W4, "format": "pack-quantized"},
    }
    packed = stored(
        model__layers__0__mlp__up_proj__weight_packed=("I32", (16, 8)),
        model__layers__0__mlp__up_proj__weight_scale=("BF16", (16, 2)),
        model__layers__0__mlp__up_proj__weight_shape=("I64", (2,)),
    )
    described = read(
        config(config_groups=groups, format="mixed-precision"), packed | layer_w8("model.layers.0.self_attn.o_proj")
    )
    assert described.findings == ()
    assert described.find("model.layers.0.mlp.up_proj").spec.layout is Layout.CT_PACKED
    assert described.find("model.layers.0.self_attn.o_proj").spec.layout is Layout.CT_INT


@pytest.mark.parametrize(
    ("words", "version", "strategy", "layout"),
    [
        (6, "0.17.0", "group", Layout.CT_PACKED_DENSE),
        (7, "0.19.0", "group", Layout.CT_PACKED),
        (6, "0.18.1.a20260601", "channel", Layout.CT_PACKED_DENSE),
        (6, "1.0.0", "channel", Layout.CT_PACKED_DENSE),
        (7, "0.17.2", "channel", Layout.CT_PACKED),
        (7, None, "channel", Layout.CT_PACKED),
    ],
)
def test_3_bits_are_packed_without_padding_since_0_18(words: int, version: Any, strategy: str, layout: Layout) -> None:
    weights = {"num_bits": 3, "type": "int", "strategy": strategy, "symmetric": True}
    groups = 1
    if strategy == "group":
        weights["group_size"], groups = 32, 2
    layer = "model__layers__0__mlp__up_proj__"
    tensors = {
        layer + "weight_packed": ("I32", (16, words)),
        layer + "weight_scale": ("BF16", (16, groups)),
        layer + "weight_shape": ("I64", (2,)),
    }
    described = read(config(weights, None, format="pack-quantized", version=version), stored(**tensors))
    assert described.findings == ()
    assert described.find("model.layers.0.mlp.up_proj").spec.layout is layout
    assert not check_of(described, stored(**tensors))


def test_stored_activation_order_is_found() -> None:
    layer = "model__layers__0__mlp__up_proj__"
    tensors = {
        layer + "weight_packed": ("I32", (16, 8)),
        layer + "weight_scale": ("BF16", (16, 2)),
        layer + "weight_shape": ("I64", (2,)),
        layer + "weight_g_idx": ("I32", (64,)),
    }
    for actorder in (None, "group"):
        described = read(config({**W4, "actorder": actorder}, None, format="pack-quantized"), stored(**tensors))
        assert not errors(described)
        entry = described.find("model.layers.0.mlp.up_proj")
        assert entry.spec.layout is Layout.CT_PACKED_ACT_ORDER
        assert not check_of(described, stored(**tensors))
    del tensors[layer + "weight_g_idx"]
    (finding,) = check_of(
        read(config({**W4, "actorder": True}, None, format="pack-quantized"), stored(**tensors)), stored(**tensors)
    )
    assert (finding.code, finding.expected.split()[0]) == ("missing-tensor", "model.layers.0.mlp.up_proj.weight_g_idx")


@pytest.mark.parametrize("ordered", [False, True])
def test_zero_points_of_old_releases_are_not_packed(ordered: bool) -> None:
    """Before 0.9, zero points of packed weights were written as int8 [N, G]."""
    layer = "model__layers__0__mlp__up_proj__"
    tensors = {
        layer + "weight_packed": ("I32", (16, 8)),
        layer + "weight_scale": ("BF16", (16, 2)),
        layer + "weight_zero_point": ("I8", (16, 2)),
        layer + "weight_shape": ("I64", (2,)),
        **({layer + "weight_g_idx": ("I32", (64,))} if ordered else {}),
    }
    asymmetric = config({**W4, "symmetric": False}, None, format="pack-quantized")
    described = read(asymmetric, stored(**tensors))
    layout = Layout.CT_PACKED_PLAIN_ZERO_ACT_ORDER if ordered else Layout.CT_PACKED_PLAIN_ZERO
    assert described.find("model.layers.0.mlp.up_proj").spec.layout is layout
    assert not check_of(described, stored(**tensors))
    tensors[layer + "weight_zero_point"] = ("I8", (2, 2))
    (finding,) = check_of(read(asymmetric, stored(**tensors)), stored(**tensors))
    assert (finding.code, finding.found) == ("wrong-shape", "[2, 2]")


def check_of(described: Described, tensors: dict[str, Any]) -> list[Any]:
    return check_checkpoint(described, SimpleNamespace(tensors=tensors, findings=()))


def test_a_named_layer_of_which_nothing_is_stored_is_missing() -> None:
    groups = {"group_0": {"targets": ["model.layers.0.mlp.up_proj"], "weights": W8, "input_activations": A8}}
    described = read(config(config_groups=groups), NORM)
    found = check_of(described, NORM)
    assert [finding.code for finding in found] == ["missing-tensor", "missing-tensor"]
    assert {finding.layer for finding in found} == {"model.layers.0.mlp.up_proj"}


def test_a_kv_cache_scheme_drops_its_scales() -> None:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
    scales = stored(
        model__layers__0__self_attn__k_scale=("BF16", (1,)), model__layers__0__self_attn__v_scale=("BF16", (1,))
    )
    described = read(config(kv_cache_scheme=scheme), UP | scales)
    (finding,) = described.findings
    assert (finding.code, finding.severity) == ("kv-cache-not-quantized", Severity.WARNING)
    assert "k_scale" in finding.found
    assert "8-bit int per tensor" in finding.found
    assert {"k_scale", "v_scale"} <= set(described.dropped)
    # The scales alone say it, too; and a checkpoint without either drops nothing.
    assert {"k_scale", "v_scale"} <= set(read(config(), UP | scales).dropped)
    assert read(config(), UP).dropped == ()


def test_an_old_kv_cache_group_drops_its_scales() -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": W8, "input_activations": A8},
        "group_1": {"targets": ["re:.*k_proj", "re:.*v_proj"], "output_activations": A8_STATIC},
    }
    projection = layer_w8("model.layers.0.self_attn.k_proj") | stored(
        model__layers__0__self_attn__k_proj__output_scale=("BF16", (1,))
    )
    described = read(config(config_groups=groups), projection)
    assert [finding.code for finding in described.findings] == ["kv-cache-not-quantized"]
    assert described.find("model.layers.0.self_attn.k_proj").spec.scheme == "W8A8_DYNAMIC"
    assert "output_scale" in described.dropped


def test_fp8_is_stored_as_the_config_says() -> None:
    tensors = {}
    for number in range(30):
        name = f"model.layers.{number}.mlp.up_proj"
        tensors |= layer_f8(name)
        tensors[name + ".input_scale"] = SimpleNamespace(dtype="BF16", shape=(1,), file="model.safetensors")
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    described = read(config(F8, static, format="float-quantized"), tensors)
    assert described.findings == ()
    entry = described.find("model.layers.0.mlp.up_proj")
    assert (entry.spec.scheme, entry.tensors) == ("FP8_CHANNEL_STATIC", {"input_scale"})
    assert (entry.spec.activation.kind, entry.spec.activation.dynamic) == (NumberKind.FLOAT, False)
    assert not check_of(described, tensors)
    specs = ((entry.spec, 1) for _, entry in described.stored_layers())
    (finding,) = requantized_findings(specs, Host(), described.source)
    assert finding.found == "FP8_CHANNEL_STATIC: 30 layers"
    assert "static input scales are dropped" in finding.message
    del tensors["model.layers.7.mlp.up_proj.input_scale"]
    (finding,) = check_of(read(config(F8, static, format="float-quantized"), tensors), tensors)
    assert (finding.code, finding.layer) == ("missing-tensor", "model.layers.7.mlp.up_proj")


@pytest.mark.parametrize(("mode", "scheme"), [("int8", "as W8A8_DYNAMIC"), ("bf16", "as float")])
def test_the_setting_decides_what_is_served_and_not_what_is_read(
    mode: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_FP8", mode)
    spec = spec_of(config(F8, F8_TOKEN, format="float-quantized"), layer_f8("model.layers.0.mlp.up_proj"))
    assert spec.scheme == "FP8_CHANNEL_DYNAMIC"
    served = decide(LayerKind.LINEAR, spec, Host(float_weights=mode))
    assert served.spec.scheme == f"FP8_CHANNEL_DYNAMIC {scheme}"
    assert served.row is not None


def test_fp8_weights_alone_keep_float_inputs() -> None:
    spec = spec_of(config(F8, None, format="float-quantized"), layer_f8("model.layers.0.mlp.up_proj"))
    assert (spec.scheme, spec.activation) == ("FP8_CHANNEL_W8A16", None)
    assert decide(LayerKind.LINEAR, spec, Host()).spec.scheme == "FP8_CHANNEL_W8A16 as W8A16"


# Contradictions between the config and the files, one finding each: code, layer, and what it says.

FLOAT_UP = layer_float("model.layers.0.mlp.up_proj")
CONTRADICTIONS = {
    "an ignored layer is stored quantized": (
        config(ignore=["lm_head", "model.layers.0.mlp.up_proj"]),
        UP,
        "bad-config",
        "the config ignores the layer, and its weight is stored quantized",
    ),
    "no target matches a quantized layer": (
        config(config_groups={"group_0": {"targets": ["re:.*self_attn.*"], "weights": W8, "input_activations": A8}}),
        UP,
        "bad-config",
        "the config has no group for the layer",
    ),
    "scales beside float weights": (
        config(),
        FLOAT_UP | stored(model__layers__0__mlp__up_proj__weight_scale=("BF16", (16, 1))),
        "unsupported-scheme",
        "saved as fake quantization, not compressed",
    ),
    "a tensor that nothing knows": (
        config(),
        UP | stored(model__layers__0__mlp__up_proj__weight_global_scale=("F32", (1,))),
        "unexpected-tensor",
        "has no tensor weight_global_scale, so its effect would be lost",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(case: str) -> None:
    quantization, tensors, code, message = CONTRADICTIONS[case]
    (finding,) = errors(read(quantization, tensors))
    assert finding.code == code
    assert message in finding.message
    assert finding.layer == "model.layers.0.mlp.up_proj"
    assert finding.fix


CHECKED = {
    "no scale": ({"weight_scale": None}, "missing-tensor", "weight_scale"),
    "a scale of too few rows": ({"weight_scale": ("BF16", (15, 1))}, "wrong-shape", "[16, 1]"),
    "a scale of integers": ({"weight_scale": ("I32", (16, 1))}, "wrong-dtype", "F32"),
    "a weight of three dimensions": ({"weight": ("I8", (2, 16, 64))}, "wrong-shape", "with 2 dimensions"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_files_that_do_not_fit_are_named(case: str) -> None:
    changed, code, expected = CHECKED[case]
    tensors = dict(UP)
    for name, tensor in changed.items():
        del tensors[f"model.layers.0.mlp.up_proj.{name}"]
        if tensor is not None:
            tensors |= stored(**{f"model__layers__0__mlp__up_proj__{name}": tensor})
    found = check_of(read(config(), tensors), tensors)
    assert [finding.code for finding in found] == [code]
    assert expected in found[0].expected
    assert found[0].layer == "model.layers.0.mlp.up_proj"
    assert found[0].fix


def test_a_group_size_that_does_not_fit_is_named() -> None:
    layer = "model__layers__0__mlp__up_proj__"
    tensors = stored(
        **{
            layer + "weight_packed": ("I32", (16, 8)),
            layer + "weight_scale": ("BF16", (16, 4)),
            layer + "weight_shape": ("I64", (2,)),
        }
    )
    (finding,) = check_of(read(config(W4, None, format="pack-quantized"), tensors), tensors)
    assert (finding.code, finding.found) == ("wrong-shape", "[16, 4]")
    assert finding.expected.endswith("[16, 2]")


# What is refused, by name: the config alone.

ASYMMETRIC = {**W8, "symmetric": False}
#: As llm-compressor writes SpinQuant's R1 (multiplied into the weights) and R4 (applied to the inputs of down_proj).
FUSED_TRANSFORM = {
    "type": "hadamard",
    "apply": [
        {"targets": ["re:.*o_proj$"], "location": "weight_output", "inverse": False, "ignore": []},
        {"targets": ["re:.*q_proj$"], "location": "weight_input", "inverse": True, "ignore": []},
    ],
}
ONLINE_TRANSFORM = {
    "type": "hadamard",
    "apply": [
        {"targets": ["re:.*down_proj$"], "location": "input", "inverse": False, "ignore": []},
        {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True, "ignore": []},
    ],
}
REFUSED = {
    "nvfp4 with groups of 32": (
        config({**MXFP4, "strategy": "tensor_group"}, None, format="nvfp4-pack-quantized"),
        "bad-config",
        "nvfp4-pack-quantized holds NVFP4 weights",
    ),
    "mxfp8 of 4 bits": (config(MXFP4, None, format="mxfp8-quantized"), "bad-config", "mxfp8-quantized holds MXFP8"),
    "mxfp4 of integers": (
        config({**MXFP4, "type": "int"}, None, format="mxfp4-pack-quantized"),
        "bad-config",
        "mxfp4-pack-quantized holds MXFP4",
    ),
    "mxfp4 with zero points": (
        config({**MXFP4, "symmetric": False}, None, format="mxfp4-pack-quantized"),
        "bad-config",
        "mxfp4-pack-quantized holds MXFP4",
    ),
    "mxfp4 with int8 inputs": (
        config(MXFP4, A8, format="mxfp4-pack-quantized"),
        "unsupported-scheme",
        "MXFP4 weights are served with 4- or 8-bit float inputs",
    ),
    "fp4 in another format": (
        config({"num_bits": 4, "type": "float", "strategy": "channel"}, None, format="float-quantized"),
        "unsupported-scheme",
        "FP8 weights are served per tensor, channel or block",
    ),
    "2:4 sparse weights": (config(W4, None, format="marlin-24"), "unsupported-scheme", "2:4 sparse"),
    "sparse compression": (
        config(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}),
        "unsupported-scheme",
        "sparse weights (sparsity_config)",
    ),
    "experts that were pruned": (
        config(moe_sparsity_config={"method": "prune", "num_experts": [None, 6]}),
        "unsupported-scheme",
        "moe_sparsity_config",
    ),
    "experts that were replaced": (
        config(moe_sparsity_config={"method": "novice", "num_experts": [4, 6]}),
        "unsupported-scheme",
        "moe_sparsity_config",
    ),
    "transforms": (
        config(transform_config={"config_groups": {"R1": {"type": "hadamard", "apply": []}}}),
        "unsupported-scheme",
        "transforms that are applied while the model runs",
    ),
    "a transform of the inputs beside a fused one": (
        config(transform_config={"config_groups": {"R1": FUSED_TRANSFORM, "R4": ONLINE_TRANSFORM}}),
        "unsupported-scheme",
        "transforms that are applied while the model runs",
    ),
    "fake quantization": (config(format="fakequant"), "unsupported-scheme", "saved as floats"),
    "a format of the future": (config(format="trellis-quantized"), "unknown-scheme", "no such format"),
    "mixed precision without formats": (config(format="mixed-precision"), "bad-config", "the group has no format"),
    "fp8 inputs of integer weights": (
        config(W4, F8_TOKEN, format="pack-quantized"),
        "unsupported-scheme",
        "FP8 inputs of integer weights are not replaced",
    ),
    "dynamic inputs per tensor": (
        config(W8, {**A8_STATIC, "dynamic": True}),
        "unsupported-scheme",
        "dynamic per token, or static per tensor",
    ),
    "inputs in groups": (
        config(W8, {**A8, "strategy": "group", "group_size": 128}),
        "unsupported-scheme",
        "dynamic per token, or static per tensor",
    ),
    "quantized outputs": (
        config(
            config_groups={"group_0": {"targets": ["Linear"], "weights": W8, "output_activations": A8_STATIC}},
        ),
        "unsupported-scheme",
        "quantized outputs",
    ),
    "quantized inputs alone": (
        config(config_groups={"group_0": {"targets": ["Linear"], "input_activations": A8}}),
        "unsupported-scheme",
        "quantized activations without quantized weights",
    ),
    "packed weights with static inputs": (
        config(W4, A8_STATIC, format="pack-quantized"),
        "unsupported-scheme",
        "packed weights with static input scales",
    ),
    "fp8 in groups": (
        config({**F8, "strategy": "group", "group_size": 128}, None, format="float-quantized"),
        "unsupported-scheme",
        "per tensor, channel or block",
    ),
    "asymmetric fp8": (
        config({**F8, "symmetric": False}, None, format="float-quantized"),
        "unsupported-scheme",
        "per tensor, channel or block, symmetric",
    ),
    "dynamic weights": (
        config({**W8, "strategy": "tensor", "dynamic": True}),
        "bad-config",
        "weights cannot be dynamic",
    ),
    "integers as floats": (config(format="float-quantized"), "bad-config", "cannot have format float-quantized"),
    "floats as integers": (config(F8, F8_TOKEN), "bad-config", "cannot have format int-quantized"),
    "activation order of unpacked weights": (
        config({**W4, "actorder": "group"}, None),
        "unsupported-scheme",
        "activation order by groups",
    ),
    "no group at all": (config(config_groups={}), "bad-config", "quantizes nothing"),
    "groups that are a list": (config(config_groups=[]), "bad-config", "dictionary"),
    "targets that are a string": (config(config_groups={"g": {"targets": "Linear"}}), "bad-config", "tuple"),
    "a preset that is none": (config(config_groups={"W3A5": ["Linear"]}), "bad-config", "no scheme is called 'W3A5'"),
    "an ignore list of numbers": (config(ignore=[1]), "bad-config", "string"),
    "too many rules": (config(ignore=["x"] * 200_001), "bad-config", "at most 200000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name(case: str) -> None:
    quantization, code, message = REFUSED[case]
    (finding,) = errors(read(quantization, {}))
    assert finding.code == code
    assert message in finding.message
    assert finding.fix
    assert finding.file == "config.json"


@pytest.mark.parametrize("weights", [ASYMMETRIC, {**W8, "strategy": "group", "group_size": 32}])
def test_asymmetric_or_grouped_weights_with_quantized_inputs_have_a_method(weights: dict[str, Any]) -> None:
    served = decide(LayerKind.LINEAR, spec_of(config(weights)), Host())
    assert served.require_row().method_name == "W8A8DynamicGroupedLinear"
    assert decide(LayerKind.LINEAR, spec_of(config(weights, A8_STATIC)), Host()).row is None


def test_asymmetric_dynamic_inputs_have_a_method() -> None:
    served = decide(LayerKind.LINEAR, spec_of(config(W8, {**A8, "symmetric": False})), Host())
    assert served.require_row().method_name == "W8A8DynamicAsymmetricLinear"


@pytest.mark.parametrize(
    ("weights", "inputs", "packing", "needs"),
    [
        (ASYMMETRIC, A8, "int-quantized", ["weight_zero_point"]),
        (
            ASYMMETRIC,
            {**A8_STATIC, "symmetric": False},
            "int-quantized",
            ["input_scale", "input_zero_point", "weight_zero_point"],
        ),
        ({**W8, "symmetric": False}, None, "pack-quantized", ["weight_packed", "weight_zero_point"]),
        (W8, A8_STATIC, "int-quantized", ["input_scale"]),
        (W8, A8, "int-quantized", []),
    ],
)
def test_zero_points_and_scales_that_the_config_calls_for_are_missed(
    weights: Any, inputs: Any, packing: str, needs: list[str]
) -> None:
    described = read(config(weights, inputs, format=packing), UP)
    found = [finding for finding in check_of(described, UP) if finding.code == "missing-tensor"]
    assert sorted(finding.expected.split()[0].rpartition(".")[2] for finding in found) == needs


def test_values_of_strangers_are_cut() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    described = read(config(ignore=deep, **{"y" * 10_000: 1}, quantization_status="z" * 100_000), {})
    assert errors(described)
    assert all(len(finding.render()) < 2000 for finding in described.findings)


def test_empty_transforms_and_dense_sparsity_are_nothing() -> None:
    described = read(config(transform_config={"config_groups": {}}, sparsity_config={"format": "dense"}), {})
    assert described.findings == ()
    assert read(config(transform_config=None, sparsity_config=None, kv_cache_scheme={}), {}).findings == ()
    assert read(config(moe_sparsity_config=None), {}).findings == ()


def test_transforms_that_the_producer_fused_into_the_weights_are_nothing() -> None:
    described = read(config(transform_config={"config_groups": {"R1": FUSED_TRANSFORM}}), {})
    assert described.findings == ()


@pytest.mark.parametrize(
    "transforms",
    [
        {"config_groups": ["R4"]},
        {"config_groups": {"R4": None}},
        {"config_groups": {"R4": {"apply": {}}}},
        {"config_groups": {"R4": {"apply": ["weight_input"]}}},
        {"config_groups": {"R4": {"apply": [{"location": ["weight_input"]}]}}},
        {"R4": ONLINE_TRANSFORM},
    ],
    ids=repr,
)
def test_transforms_that_are_not_understood_are_refused(transforms: Any) -> None:
    found = read(config(transform_config=transforms), {}).findings
    assert [finding.code for finding in found] == ["unsupported-scheme"]


def test_a_large_moe_stays_small_and_fast() -> None:
    tensors: dict[str, Any] = {}
    for number in range(61):
        for name in ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj"):
            tensors |= layer_w8(f"model.layers.{number}.{name}")
        tensors |= layer_float(f"model.layers.{number}.mlp.gate", (256, 64))
        for expert in range(256):
            for name in ("gate_proj", "up_proj", "down_proj"):
                tensors |= layer_w8(f"model.layers.{number}.mlp.experts.{expert}.{name}")
    start = time.perf_counter()
    described = read(config(ignore=["lm_head", "re:.*mlp.gate$"]), tensors)
    assert time.perf_counter() - start < 20
    assert described.findings == ()
    assert len(described.experts) == 61
    assert len(pickle.dumps(described)) < 1 << 20


def test_experts_that_differ_are_named() -> None:
    tensors: dict[str, Any] = {}
    for expert in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors |= layer_w8(f"model.layers.0.mlp.experts.{expert}.{name}")
    broken = {name: value for name, value in tensors.items() if ".experts.1.up_proj" not in name}
    (finding,) = errors(read(config(), broken))
    assert (finding.code, finding.layer) == ("undescribed-layer", "model.layers.0.mlp.experts")
    mixed = broken | layer_float("model.layers.0.mlp.experts.1.up_proj")
    (finding,) = errors(read(config(), mixed))
    assert (finding.code, finding.layer) == ("fused-shards-disagree", "model.layers.0.mlp.experts.*.up_proj")


def test_a_name_beyond_the_limit_of_expressions_is_a_finding() -> None:
    (finding,) = errors(read(config(ignore=["re:.*x"]), layer_float("a" * 2000)))
    assert (finding.code, finding.file) == ("bad-config", "config.json")
    assert "longer than any real one" in finding.message


# The declaration.

#: Label -> scheme and layout of every sample that is served.
SAMPLES = {
    "W8A8 dynamic": ("W8A8_DYNAMIC", Layout.CT_INT),
    "W8A8 dynamic, asymmetric": ("W8A8_DYNAMIC", Layout.CT_INT),
    "W8A8 static": ("W8A8_STATIC", Layout.CT_STATIC),
    "W8A8 static, asymmetric": ("W8A8_STATIC", Layout.CT_STATIC),
    "W8A16 channel": ("W8A16", Layout.CT_PACKED),
    "W8A16 group": ("W8A16", Layout.CT_PACKED),
    "W4A16 channel": ("W4A16", Layout.CT_PACKED),
    "W4A16 group": ("W4A16", Layout.CT_PACKED),
    "W4A16 group, asymmetric": ("W4A16", Layout.CT_PACKED),
    "W4A8 channel": ("W4A8_DYNAMIC", Layout.CT_INT),
    "W4A8 group": ("W4A8_DYNAMIC", Layout.CT_INT),
    "W4A4 channel": ("W4A4_DYNAMIC", Layout.CT_INT),
    "FP8 dynamic": ("FP8_CHANNEL_DYNAMIC", Layout.FP8),
    "FP8 static": ("FP8_STATIC", Layout.FP8),
    "FP8 block": ("FP8_BLOCK_DYNAMIC", Layout.FP8),
    "MXFP8": ("MXFP8_W8A8", Layout.MXFP8),
    "MXFP4": ("MXFP4_W4A4", Layout.CT_MXFP4),
    "MXFP4 weights, FP8 inputs": ("MXFP4_W4A8", Layout.CT_MXFP4),
    "MXFP4 weights": ("MXFP4_W4A16", Layout.CT_MXFP4),
    "NVFP4": ("NVFP4_W4A4", Layout.CT_NVFP4),
    "NVFP4 weights": ("NVFP4_W4A16", Layout.CT_NVFP4),
}


def test_samples_are_what_they_say() -> None:
    samples = list(FORMAT.samples())
    assert [sample.label for sample in samples] == list(SAMPLES)
    for sample in samples:
        described = read(sample.config, sample.tensors)
        assert described.findings == (), sample.label
        assert not check_of(described, dict(sample.tensors)), sample.label
        entry = described.find(LAYER)
        assert (entry.spec.scheme, entry.spec.layout) == SAMPLES[sample.label]
        numbers = (entry.spec.weight, entry.spec.activation)
        asymmetric = any(not part.symmetric for part in numbers if part is not None)
        assert asymmetric == ("asymmetric" in sample.label), sample.label
        assert described.find_experts(EXPERTS).gate == entry


@pytest.mark.parametrize(
    ("quantization", "left"),
    [
        (config(), True),
        (config(W8, A8_STATIC), True),
        (config(W8, {**A8, "symmetric": False}), False),
        (config(W4, None, format="pack-quantized"), False),
        (config(config_groups={}), False),
    ],
)
def test_what_vllm_ascend_serves_is_left_to_it(quantization: dict[str, Any], left: bool) -> None:
    assert FORMAT.left_to_vllm_ascend(quantization, None) is left


@pytest.mark.parametrize(
    ("targets", "ignore", "kinds"),
    [
        (["Linear"], [], {"linear", "moe"}),
        (["Linear"], ["re:.*experts.*"], {"linear"}),
        (["Linear"], ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"], {"moe"}),
        (["Linear"], ["re:.*self_attn.*", r"re:.*mlp\.(gate|up|down)_proj.*", "re:.*shared_expert.*"], {"moe"}),
        ([r"re:.*\.experts\..*"], [], {"moe"}),
        (["re:.*self_attn.*"], [], {"linear"}),
        (["re:.*vision.*"], [], {"linear", "moe"}),
        (["MoE"], [], {"linear", "moe"}),
    ],
)
def test_the_kinds_of_layers_that_targets_mean(targets: list[str], ignore: list[str], kinds: set[str]) -> None:
    quantization = {"config_groups": {"group_0": {"targets": targets}}, "ignore": ignore}
    assert layer_kinds(quantization, has_experts=True) == [kinds]
    dense = {"linear"} if "linear" in kinds and targets in (["Linear"], ["re:.*self_attn.*"]) else {"linear", "moe"}
    assert layer_kinds(quantization, has_experts=False) == [dense]


@pytest.mark.parametrize(
    "broken",
    [
        {"config_groups": {"group_0": {"targets": "Linear"}}},
        {"config_groups": {"group_0": ["Linear"]}},
        {"config_groups": {"group_0": {"targets": [1]}}},
        {"config_groups": {"group_0": {"targets": ["Linear"]}}, "ignore": "lm_head"},
        {"config_groups": {"group_0": {"targets": ["re:(?P<a>x)(?P=a)"]}}},
    ],
)
def test_rules_that_cannot_be_matched_mean_no_kinds(broken: dict[str, Any]) -> None:
    assert layer_kinds(broken, has_experts=True) is None


def test_the_declaration_serves_configs_of_both_spellings() -> None:
    assert FORMAT.serves({"quant_method": "compressed-tensors"})
    assert FORMAT.serves({"quant_method": "compressed_tensors"})
    assert not FORMAT.serves({"quant_method": "fp8"})
    assert FORMAT.answers_to("npu_compressed_tensors")


@pytest.mark.parametrize(
    ("fields", "producer"),
    [
        ({"version": "0.19.0"}, "compressed-tensors 0.19.0"),
        ({"version": "0.19.0", "autoround_version": "0.9"}, "AutoRound 0.9"),
        ({"provider": "auto-round"}, "auto-round"),
        ({"version": 3, "provider": ["x"]}, ""),
    ],
)
def test_the_producer_is_named(fields: dict[str, Any], producer: str) -> None:
    assert FORMAT.producer(config(**fields)) == producer
