# SPDX-License-Identifier: Apache-2.0
"""AutoRound's config: packings, blocks, overrides by name and pattern, and what is stored."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from tests.formats.packed_layers import awq_layer, check, errors, float_layer, gptq_layer, headers
from vllm_npu_quant.formats.auto_round import AutoRoundConfig, read
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.spec import ActivationSpec, Granularity, Layout, NumberKind, WeightSpec

PLAIN: dict[str, Any] = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "block_name_to_quantize": "model.layers",
    "autoround_version": "0.16.1",
    "iters": 2,
}
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def of(tensors: Any, **changes: Any) -> Described:
    merged = {**PLAIN, **changes}
    return read({key: value for key, value in merged.items() if value != "drop"}, tensors)


def scheme(found: Described, layer: str) -> tuple[int, int, bool]:
    weight = found.find(layer).spec.weight
    return weight.bits, weight.group_size, weight.symmetric


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", Layout.GPTQ),
        ("auto_round:gptq", Layout.GPTQ),
        ("drop", Layout.GPTQ),
        (None, Layout.GPTQ),
        ("auto_round", Layout.GPTQ_V2),
        ("auto_round:gptqmodel", Layout.GPTQ_V2),
        ("auto_round:auto_awq", Layout.AWQ_GEMM),
        ("AUTO_ROUND:AWQ", Layout.AWQ_GEMM),
    ],
)
def test_packings(packing, layout):
    make = awq_layer if layout is Layout.AWQ_GEMM else gptq_layer
    tensors = headers(make(UP), float_layer("lm_head"), float_layer("model.embed_tokens"))
    found = of(tensors, packing_format=packing)
    assert found.findings == ()
    assert check(found, tensors) == []
    assert found.find(UP).spec.layout is layout
    assert found.find("lm_head").spec.is_float


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits(bits):
    tensors = headers(gptq_layer(UP, bits=bits, g_idx=False))
    found = of(tensors, bits=bits)
    assert check(found, tensors) == []
    assert scheme(found, UP) == (bits, 128, True)


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (None, ()),
        ("model.layers", ("model.layers",)),
        ("model.layers, model.visual.blocks", ("model.layers", "model.visual.blocks")),
        (["model.layers"], ("model.layers",)),
        (
            [["model.layers.0", "model.layers.1"], ["model.visual.blocks.0"]],
            ("model.layers.0", "model.layers.1", "model.visual.blocks.0"),
        ),
        ([["model.layers.0."], "b"], ("model.layers.0", "b")),
    ],
)
def test_block_names(names, blocks):
    assert AutoRoundConfig.model_validate({**PLAIN, "block_name_to_quantize": names}).block_name_to_quantize == blocks


def test_layers_outside_of_blocks_are_float_without_a_word():
    tensors = headers(
        gptq_layer("model.layers.1.mlp.up_proj"),
        float_layer("model.layers.11.mlp.up_proj"),
        float_layer("model.visual.merger.mlp.0"),
        float_layer("lm_head"),
    )
    found = of(tensors, block_name_to_quantize=[["model.layers.1"]])
    assert found.findings == ()
    assert found.find("model.layers.11.mlp.up_proj").spec.is_float
    # A wrapper that a multimodal export puts in front is no reason to distrust what is stored.
    tensors = headers(gptq_layer("language_model.model.layers.0.mlp.up_proj"))
    assert check(of(tensors), tensors) == []


EXTRA = {
    "model.layers.0.mlp.down_proj": {"bits": 8},
    "model.layers.1.mlp.up_proj": {"group_size": 32},
    "model.layers.1.self_attn.o_proj": {"bits": 16},
    r".*layers\.2\..*_proj": {"bits": 8, "group_size": 64, "sym": False},
    ".*self_attn.*": {"bits": 8},
    r".*model\.layers\.0\.mlp\.gate.*": {"bits": 16, "data_type": "float"},
    "lm_head": {"bits": 4, "group_size": 64, "sym": True, "act_bits": 16, "super_bits": None, "rotation_config": None},
}


def test_extra_config():
    tensors = headers(
        gptq_layer("model.layers.0.mlp.down_proj", bits=8),
        gptq_layer("model.layers.1.mlp.up_proj", group=32),
        float_layer("model.layers.1.self_attn.o_proj"),
        gptq_layer("model.layers.2.mlp.up_proj", bits=8, group=64),
        gptq_layer("model.layers.2.self_attn.q_proj", bits=8, group=64),
        gptq_layer("model.layers.3.self_attn.q_proj", bits=8),
        gptq_layer("model.layers.3.mlp.up_proj"),
        float_layer("model.layers.0.mlp.gate", 8, 256),
        gptq_layer("lm_head", group=64),
    )
    found = of(tensors, extra_config=EXTRA)
    assert found.findings == ()
    assert check(found, tensors) == []
    assert scheme(found, "model.layers.0.mlp.down_proj") == (8, 128, True)
    assert scheme(found, "model.layers.1.mlp.up_proj") == (4, 32, True)
    assert found.find("model.layers.1.self_attn.o_proj").spec.is_float
    assert scheme(found, "model.layers.2.mlp.up_proj") == (8, 64, False)
    assert scheme(found, "model.layers.2.self_attn.q_proj") == (8, 64, False)  # the first pattern
    assert scheme(found, "model.layers.3.self_attn.q_proj") == (8, 128, True)
    assert scheme(found, "model.layers.3.mlp.up_proj") == (4, 128, True)
    assert found.find("model.layers.0.mlp.gate").spec.is_float
    assert scheme(found, "lm_head") == (4, 64, True)


def test_a_name_counts_before_a_pattern():
    tensors = headers(gptq_layer(UP, bits=2), gptq_layer(DOWN, bits=8))
    found = of(tensors, extra_config={".*": {"bits": 8}, UP: {"bits": 2}})
    assert check(found, tensors) == []


def test_a_name_is_no_pattern_where_it_is_a_layers_name():
    """ "...mlp.gate" is found in "...mlp.gate_proj", too."""
    gate = "model.layers.0.mlp.gate"
    tensors = headers(float_layer(gate, 8, 256), gptq_layer(gate + "_proj"))
    assert check(of(tensors, extra_config={gate: {"bits": 16}}), tensors) == []
    # Where no layer has the name, AutoRound takes it for a pattern.
    tensors = headers(gptq_layer("model.layers.0.self_attn.q_proj", bits=8), gptq_layer(UP))
    assert check(of(tensors, extra_config={"layers.0.self_attn": {"bits": 8}}), tensors) == []


def test_names_may_leave_out_what_a_wrapper_puts_in_front():
    tensors = headers(gptq_layer("model.language_model.lm_head", bits=8))
    found = of(tensors, extra_config={"lm_head": {"bits": 8}})
    assert check(found, tensors) == []


@pytest.mark.parametrize("key", [UP, ".*up_proj"])
def test_16_bits_contradict_quantized_tensors(key):
    (finding,) = of(headers(gptq_layer(UP)), extra_config={key: {"bits": 16}}).findings
    assert (finding.code, finding.layer) == ("bad-config", UP)
    assert "calls the layer float" in finding.message


def test_experts_are_one_entry():
    experts = [
        gptq_layer(f"model.layers.0.mlp.experts.{number}.{name}", *shape, g_idx=False)
        for number in range(3)
        for name, shape in (("gate_proj", (256, 64)), ("up_proj", (256, 64)), ("down_proj", (64, 256)))
    ]
    tensors = headers(*experts, float_layer("model.layers.0.mlp.gate", 3, 256))
    found = of(tensors, extra_config={r".*model\.layers\.0\.mlp\.gate.*": {"bits": 16, "data_type": "float"}})
    assert found.findings == ()
    assert check(found, tensors) == []
    assert found.find_experts("model.layers.0.mlp.experts").count == 3


FP8_BLOCKS: dict[str, Any] = {
    "bits": 8,
    "group_size": [128, 128],
    "data_type": "fp",
    "packing_format": "auto_round:fp8",
    "act_bits": 8,
    "act_data_type": "fp",
    "act_dynamic": True,
    "act_group_size": 128,
    "act_sym": True,
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
FP8_UP = float_layer(UP, 512, 256, dtype="F8_E4M3") | {f"{UP}.weight_scale_inv": ("BF16", (4, 2))}


def test_fp8_blocks(monkeypatch):
    """What is stored does not depend on the setting that says how it is served."""
    gate = "model.layers.0.mlp.gate"
    tensors = headers(FP8_UP, float_layer("lm_head"), float_layer(gate, 8, 256))
    found = of(tensors, **FP8_BLOCKS, extra_config={gate: {"bits": 16}})
    assert check(found, tensors) == []
    assert found.findings == ()
    spec = found.find(UP).spec
    assert (spec.scheme, spec.layout) == ("FP8_BLOCK_DYNAMIC", Layout.FP8_INV)
    assert spec.weight == WeightSpec(8, NumberKind.FLOAT, Granularity.BLOCK, 128, block_rows=128)
    assert spec.activation == ActivationSpec(8, True, Granularity.TOKEN, NumberKind.FLOAT)
    assert pickle.loads(pickle.dumps(found)) == found
    monkeypatch.setenv("VLLM_NPU_QUANT_FP8", "bf16")
    assert of(tensors, **FP8_BLOCKS, extra_config={gate: {"bits": 16}}) == found


def test_what_is_stored_decides_for_fp8_too():
    tensors = headers(FP8_UP)
    assert check(of(tensors, **FP8_BLOCKS, block_name_to_quantize="language_model.layers"), tensors) == []
    (finding,) = check(of(tensors, **FP8_BLOCKS, extra_config={UP: {"bits": 16}}), tensors)
    assert (finding.code, finding.layer) == ("bad-config", UP)
    assert "F8_E4M3" in finding.found
    (finding,) = check(of(headers(FP8_UP, {f"{UP}.lora_a": ("F16", (8, 64))}), **FP8_BLOCKS), tensors)
    assert (finding.code, finding.layer) == ("unexpected-tensor", UP)
    (finding,) = check(of(tensors), tensors)  # the config is one of integers
    assert (finding.code, finding.layer, finding.found) == ("wrong-dtype", UP, "F8_E4M3")


def test_scales_of_the_kv_cache_are_told_and_dropped():
    key = "model.layers.0.self_attn.k_proj"
    layer = {name.replace(UP, key): value for name, value in FP8_UP.items()}
    tensors = headers(layer, {f"{key}.k_scale": ("F32", (1,)), f"{key}.output_scale": ("F32", (1,))})
    found = of(tensors, **FP8_BLOCKS)
    assert [(finding.code, finding.severity.value) for finding in check(found, tensors)] == []
    assert [finding.code for finding in found.findings] == ["kv-cache-not-quantized"]
    assert {"k_scale", "output_scale"} <= set(found.dropped)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fp8_per_output(dynamic):
    """As the scheme FP8_STATIC is written: weight_scale [N], and input_scale where the inputs' scale is static."""
    fp8 = {
        "bits": 8,
        "group_size": -1,
        "data_type": "fp",
        "packing_format": "auto_round:fp8_static",
        "act_bits": 8,
        "act_data_type": "fp",
        "act_dynamic": dynamic,
        "act_group_size": 0,
        "act_sym": True,
    }
    tensors = headers(
        float_layer(UP, 512, 256, dtype="F8_E4M3"),
        {f"{UP}.weight_scale": ("F32", (512,))} | ({} if dynamic else {f"{UP}.input_scale": ("F32", (1,))}),
        float_layer("lm_head"),
    )
    found = of(tensors, **fp8)
    assert check(found, tensors) == []
    assert found.findings == ()
    entry = found.find(UP)
    assert entry.spec.layout is Layout.FP8
    assert entry.spec.weight == WeightSpec(8, NumberKind.FLOAT, Granularity.CHANNEL)
    granularity = Granularity.TOKEN if dynamic else Granularity.TENSOR
    assert entry.spec.activation == ActivationSpec(8, dynamic, granularity, NumberKind.FLOAT)
    assert ("input_scale" in entry.tensors) is not dynamic


def test_the_name_of_an_fp8_layer_is_its_own():
    """One layer with scales per output among layers in blocks."""
    tensors = headers(FP8_UP, float_layer(DOWN, 512, 256, dtype="F8_E4M3"), {f"{DOWN}.weight_scale": ("F32", (512, 1))})
    found = of(tensors, **FP8_BLOCKS, extra_config={DOWN: {"group_size": -1}})
    assert check(found, tensors) == []
    assert found.find(DOWN).spec.scheme == "FP8_CHANNEL_DYNAMIC"
    assert found.find(UP).spec.scheme == "FP8_BLOCK_DYNAMIC"


@pytest.mark.parametrize(
    ("changes", "stored", "scheme", "layout"),
    [
        (
            {"bits": 4, "data_type": "mx_fp", "group_size": 32, "act_bits": 4, "act_data_type": "mx_fp_rceil"},
            {"weight_packed": ("U8", (512, 128)), "weight_scale": ("U8", (512, 8))},
            "MXFP4_W4A4",
            Layout.CT_MXFP4,
        ),
        (
            {"bits": 8, "data_type": "mx_fp", "group_size": 32, "act_bits": 8},
            {"weight": ("F8_E4M3", (512, 256)), "weight_scale": ("U8", (512, 8))},
            "MXFP8_W8A8",
            Layout.MXFP8,
        ),
        (
            {"bits": 4, "data_type": "mx_fp4e2m1", "group_size": 32, "act_bits": 16},
            {"weight_packed": ("U8", (512, 128)), "weight_scale": ("U8", (512, 8))},
            "MXFP4_W4A16",
            Layout.CT_MXFP4,
        ),
        (
            {
                "bits": 4,
                "data_type": "nv_fp",
                "group_size": 16,
                "act_bits": 4,
                "act_data_type": "nv_fp4_with_static_gs",
            },
            {
                "weight_packed": ("U8", (512, 128)),
                "weight_scale": ("F8_E4M3", (512, 16)),
                "weight_global_scale": ("F32", (1,)),
                "input_global_scale": ("F32", (1,)),
            },
            "NVFP4_W4A4",
            Layout.CT_NVFP4,
        ),
    ],
)
def test_floats_with_scales_per_block(changes: dict[str, Any], stored: dict[str, Any], scheme: str, layout: Layout):
    tensors = headers({f"{UP}.{name}": tensor for name, tensor in stored.items()}, float_layer("lm_head"))
    found = of(tensors, **changes, packing_format="auto_round:llm_compressor")
    assert found.findings == ()
    assert check(found, tensors) == []
    assert (found.find(UP).spec.scheme, found.find(UP).spec.layout) == (scheme, layout)
    assert found.find("lm_head").spec.is_float


BROKEN: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "5 bits": ({"bits": 5}, "unsupported-scheme", "5 bits", "2 or 3 or 4 or 8"),
    "8 bits of awq": ({"bits": 8, "packing_format": "auto_round:auto_awq"}, "unsupported-scheme", "8 bits", "4 bits"),
    "one layer of 6": ({"extra_config": {UP: {"bits": 6}}}, "unsupported-scheme", f"extra_config '{UP}'", "2 or 3"),
    "mxfp in other groups": ({"data_type": "mx_fp"}, "unsupported-scheme", "MXFP4 in other groups", "group_size: 32"),
    "nvfp in other groups": (
        {"data_type": "nv_fp", "group_size": 32},
        "unsupported-scheme",
        "NVFP4 in other groups",
        "group_size: 16",
    ),
    "mxfp with 6-bit inputs": (
        {"data_type": "mx_fp", "group_size": 32, "act_bits": 6},
        "unsupported-scheme",
        "6-bit activations",
        "act_bits: 4",
    ),
    "mxfp of 6 bits": ({"data_type": "mx_fp", "bits": 6}, "unsupported-scheme", "mx_fp", "data_type int"),
    "activations": ({"act_bits": 8}, "unsupported-scheme", "8-bit activations", "llm_compressor"),
    "activations of one": ({"extra_config": {UP: {"act_bits": 4}}}, "unsupported-scheme", "4-bit activations", "llm"),
    "gguf scales": ({"super_bits": 6}, "unsupported-scheme", "scales that are quantized", "super_bits"),
    "rotation": ({"rotation_config": {"block_size": 32}}, "unsupported-scheme", "rotated", "no rotation_config"),
    "fp8 in groups": (
        {"bits": 8, "data_type": "fp", "act_bits": 8, "group_size": 128},
        "unsupported-scheme",
        "FP8 weights in groups",
        "[128, 128]",
    ),
    "fp8 with float inputs": ({"bits": 8, "data_type": "fp"}, "unsupported-scheme", "with float inputs", "act_bits: 8"),
    "packing": ({"packing_format": "auto_round:exllamav2"}, "unsupported-scheme", "exllamav2", "auto_round:auto_gptq"),
    "no bits": ({"bits": "drop"}, "bad-config", "Field required", "correct the field"),
    "group size 0": ({"group_size": 0}, "bad-config", "group_size", "correct the field"),
    "blocks are numbers": ({"block_name_to_quantize": [1]}, "bad-config", "block_name_to_quantize", "correct"),
    "blocks are an object": ({"block_name_to_quantize": {}}, "bad-config", "block_name_to_quantize", "correct"),
    "blocks nested": ({"block_name_to_quantize": [[["a"]]]}, "bad-config", "block_name_to_quantize", "correct"),
    "extra is a list": ({"extra_config": []}, "bad-config", "dictionary", "correct the field"),
    "extra of numbers": ({"extra_config": {"a": 1}}, "bad-config", "dictionary", "correct the field"),
    "bad pattern": ({"extra_config": {"(": {"bits": 8}}}, "bad-config", "not a regular expression", "layer names"),
    "backreference": ({"extra_config": {r"(a)\1": {"bits": 8}}}, "bad-config", "backreferences", "layer names"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_configs(case):
    changes, code, message, fix = BROKEN[case]
    found = of(headers(gptq_layer(UP)), **changes)
    reported = errors(list(found.findings))
    finding = reported[0]
    assert {other.code for other in reported} == {code}
    assert message in finding.message
    assert fix in finding.fix
    assert finding.file == "config.json"


def test_a_regex_bomb_is_matched_in_linear_time():
    layer = "model.layers." + "a" * 500
    tensors = headers(gptq_layer(layer))
    assert check(of(tensors, extra_config={"(a+)+$b": {"bits": 8}, "(.*)*x": {"bits": 2}}), tensors) == []


def test_pickles_small_with_many_overrides():
    names = [
        f"model.layers.{i}.mlp.experts.{expert}.{part}"
        for i in range(40)
        for expert in range(64)
        for part in ("gate_proj", "up_proj", "down_proj")
    ]
    tensors = headers(*(gptq_layer(name, bits=8) for name in names))
    found = of(tensors, extra_config={name: {"bits": 8} for name in names})
    assert check(found, tensors) == []
    assert len(pickle.dumps(found)) < 30_000
