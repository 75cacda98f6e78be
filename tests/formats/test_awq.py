# SPDX-License-Identifier: Apache-2.0
"""AWQ's config: spellings, exclusions, and what is stored."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from tests.formats.packed_layers import awq_layer, check, errors, float_layer, headers, of_severity
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.awq import AwqConfig, read
from vllm_npu_quant.spec import Granularity, Layout

PLAIN: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
UP = "model.layers.0.mlp.up_proj"


def config(**changes: Any) -> dict[str, Any]:
    merged = {**PLAIN, **changes}
    return {key: value for key, value in merged.items() if value != "drop"}


@pytest.mark.parametrize(
    "spelling",
    [
        PLAIN,
        {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "w_bit": 4, "group_size": 128, "zero_point": True},
        {
            "bits": 4,
            "checkpoint_format": "gemm",
            "desc_act": False,
            "format": "gemm",
            "group_size": 128,
            "lm_head": False,
            "method": "awq",
            "pack_dtype": "int32",
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
            "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        },
        {
            "autoround_version": "0.16.1",
            "bits": 4,
            "data_type": "int",
            "group_size": 128,
            "iters": 2,
            "modules_to_not_convert": ["lm_head"],
            "provider": "auto-round",
            "quant_method": "awq",
            "sym": False,
            "to_quant_block_names": "model.layers",
            "version": "gemm",
            "zero_point": True,
        },
    ],
)
def test_spellings(spelling):
    tensors = headers(awq_layer(UP), float_layer("lm_head", 512, 256), float_layer("model.embed_tokens", 512, 256))
    found = read(spelling, tensors)
    assert found.findings == ()
    assert check(found, tensors) == []
    spec = found.find(UP).spec
    assert spec.layout is Layout.AWQ_GEMM
    assert (spec.weight.bits, spec.weight.granularity, spec.weight.group_size) == (4, Granularity.GROUP, 128)
    assert not spec.weight.symmetric
    assert spec.activation is None
    assert found.find(UP).tensors == {"qzeros"}
    assert found.find("lm_head").spec.is_float
    assert found.find("model.layers.0.mlp.gate_up_proj") is None


@pytest.mark.parametrize(
    ("changes", "symmetric"),
    [
        ({"zero_point": True}, False),
        ({"zero_point": False}, True),
        ({"zero_point": "drop", "sym": True}, True),
        ({"zero_point": "drop", "sym": False}, False),
        ({"zero_point": "drop"}, False),
        ({"zero_point": True, "sym": True}, False),
    ],
)
def test_symmetry(changes, symmetric):
    assert AwqConfig.model_validate(config(**changes)).spec().weight.symmetric is symmetric


def test_one_scale_per_output():
    tensors = headers(awq_layer(UP, group=-1))
    found = read(config(group_size=-1), tensors)
    assert check(found, tensors) == []
    assert found.find(UP).spec.weight.granularity is Granularity.CHANNEL


def test_a_group_of_all_inputs():
    tensors = headers(awq_layer(UP, inputs=64, group=128))
    assert check(read(config(), tensors), tensors) == []


def test_what_is_stored_decides_where_an_entry_is_a_part_of_a_component():
    tensors = headers(
        float_layer("model.layers.0.mlp.gate", 8, 256),
        awq_layer("model.layers.0.mlp.gate_proj"),
        float_layer("model.layers.1.mlp.gate_proj"),
    )
    found = read(config(modules_to_not_convert=["mlp.gate"]), tensors)
    assert found.findings == ()
    assert not found.find("model.layers.0.mlp.gate_proj").spec.is_float
    assert found.find("model.layers.1.mlp.gate_proj").spec.is_float


def test_a_firm_exclusion_contradicts_quantized_tensors():
    tensors = headers(awq_layer(UP))
    found = read(config(modules_to_not_convert=[UP]), tensors)
    (finding,) = found.findings
    assert (finding.code, finding.layer) == ("bad-config", UP)
    assert "calls the layer float" in finding.message
    assert "qweight" in finding.found
    assert "quantization config" in finding.fix


def test_float_layers_that_no_entry_names_are_told():
    tensors = headers(
        awq_layer(UP),
        float_layer("model.visual.blocks.0.attn.qkv"),
        float_layer("model.layers.0.mlp.gate", 8, 256),
        float_layer("lm_head"),
        float_layer("model.embed_tokens", 512, 256),
        float_layer("model.layers.0.input_layernorm", 256),
    )
    found = read(PLAIN, tensors)
    (finding,) = found.findings
    assert finding.severity is Severity.INFO
    assert finding.found == "model.visual.blocks.0.attn.qkv"
    assert found.stored_as_float == {"model.visual.blocks.0.attn.qkv"}
    assert found.find("model.visual.blocks.0.attn.qkv").spec.is_float


def test_experts_are_one_entry():
    experts = [
        awq_layer(f"model.layers.0.mlp.experts.{number}.{name}", *shape)
        for number in range(4)
        for name, shape in (("gate_proj", (256, 64)), ("up_proj", (256, 64)), ("down_proj", (64, 256)))
    ]
    tensors = headers(*experts, float_layer("model.layers.0.mlp.gate", 4, 256))
    found = read(PLAIN, tensors)
    assert check(found, tensors) == []
    entry = found.find_experts("model.layers.0.mlp.experts")
    assert (entry.count, entry.names) == (4, ("gate_proj", "up_proj", "down_proj"))
    assert entry.gate == entry.up == entry.down
    assert entry.gate.spec.layout is Layout.AWQ_GEMM
    assert found.find("model.layers.0.mlp.experts.0.gate_proj") is None
    assert len(list(found.stored_layers())) == 13


def test_a_layers_own_bias():
    layer = awq_layer("model.layers.0.self_attn.q_proj")
    layer["model.layers.0.self_attn.q_proj.bias"] = ("F16", (64,))
    tensors = headers(layer)
    found = read(PLAIN, tensors)
    assert check(found, tensors) == []
    assert found.biased == {"model.layers.0.self_attn.q_proj"}


def test_zero_points_may_be_left_out_where_there_are_none():
    tensors = headers(awq_layer(UP, qzeros=False))
    assert check(read(config(zero_point=False), tensors), tensors) == []
    (finding,) = check(read(PLAIN, tensors), tensors)
    assert (finding.code, finding.layer) == ("missing-tensor", UP)
    assert "qzeros" in finding.message


BROKEN: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "8 bits": ({"bits": 8}, "unsupported-scheme", "8 bits", "4 bits"),
    "gemv": ({"version": "gemv"}, "unsupported-scheme", "gemv", "version: gemm"),
    "gemv_fast": ({"version": "gemv_fast"}, "unsupported-scheme", "gemv_fast", "version: gemm"),
    "marlin": ({"version": "marlin"}, "unsupported-scheme", "marlin", "version: gemm"),
    "llm-awq": ({"version": "drop", "format": "llm-awq"}, "unsupported-scheme", "llm-awq", "version: gemm"),
    "two versions": ({"format": "gemv"}, "bad-config", "names of one thing", "correct the field"),
    "two sizes": ({"q_group_size": 64}, "bad-config", "names of one thing", "correct the field"),
    "int64 words": ({"pack_dtype": "int64"}, "unsupported-scheme", "pack_dtype", "int32"),
    "no bits": ({"bits": "drop"}, "bad-config", "Field required", "correct the field"),
    "no group size": ({"group_size": "drop"}, "bad-config", "Field required", "correct the field"),
    "group size 0": ({"group_size": 0}, "bad-config", "group_size", "correct the field"),
    "group size -2": ({"group_size": -2}, "bad-config", "group_size", "correct the field"),
    "bits in words": ({"bits": "four"}, "bad-config", "integer", "correct the field"),
    "zero_point as a large number": ({"zero_point": 8}, "bad-config", "boolean", "correct the field"),
    "names as text": ({"modules_to_not_convert": "lm_head"}, "bad-config", "tuple", "correct the field"),
    "names of numbers": ({"modules_to_not_convert": [1]}, "bad-config", "string", "correct the field"),
    "huge bits": ({"bits": 10**30}, "unsupported-scheme", "bits", "4 bits"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_configs(case):
    changes, code, message, fix = BROKEN[case]
    tensors = headers(awq_layer(UP))
    found = read(config(**changes), tensors)
    (finding,) = errors(list(found.findings))
    assert finding.code == code
    assert message in finding.message
    assert fix in finding.fix
    assert finding.file == "config.json"
    assert len(finding.render()) < 800


def test_unknown_fields_are_told_and_records_are_not():
    found = read(config(backend="autoawq", do_fuse=False, some_new_field=3, empty={}), {})
    (finding,) = found.findings
    assert finding.severity is Severity.WARNING
    assert "some_new_field" in finding.found
    assert "do_fuse" not in finding.found


STORED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no scales": ({f"{UP}.scales": None}, "missing-tensor", "scales", "download"),
    "no qweight": ({f"{UP}.qweight": None}, "missing-tensor", "qweight", "download"),
    "wrong dtype": ({f"{UP}.qweight": ("I16", (256, 8))}, "wrong-dtype", "qweight", "re-export"),
    "wrong group size": ({f"{UP}.scales": ("F16", (4, 64))}, "wrong-shape", "scales", "re-export"),
    "wrong order": ({f"{UP}.qzeros": ("I32", (2, 64))}, "wrong-shape", "qzeros", "re-export"),
    "one dimension": ({f"{UP}.qweight": ("I32", (2048,))}, "wrong-shape", "qweight", "re-export"),
    "stray tensor": ({f"{UP}.lora_a": ("F16", (8, 64))}, "unexpected-tensor", "lora_a", "without it"),
}


@pytest.mark.parametrize("case", STORED)
def test_broken_files(case):
    changes, code, message, fix = STORED[case]
    layer = {name: value for name, value in {**awq_layer(UP), **changes}.items() if value is not None}
    tensors = headers(layer)
    (finding,) = check(read(PLAIN, tensors), tensors)
    assert (finding.code, finding.layer) == (code, UP)
    assert message in finding.message
    assert fix in finding.fix


def test_an_integer_weight_is_not_awq():
    tensors = headers(float_layer(UP, 64, 256, dtype="I8"))
    (finding,) = check(read(PLAIN, tensors), tensors)
    assert (finding.code, finding.layer, finding.found) == ("wrong-dtype", UP, "I8")


def test_groups_that_are_too_small():
    tensors = headers(awq_layer(UP, group=8))
    (finding,) = check(read(config(group_size=8), tensors), tensors)
    assert (finding.code, finding.layer) == ("operator-limit", UP)
    assert "multiple of 32" in finding.message
    for group in (16, 32, 48):
        tensors = headers(awq_layer(UP, inputs=192, group=group))
        assert check(read(config(group_size=group), tensors), tensors) == []


def test_float_layers_that_the_config_excludes_are_not_reported():
    tensors = headers(
        awq_layer(UP), *map(float_layer, ("model.layers.0.mlp.gate", "lm_head", "model.visual.blocks.0.attn.qkv"))
    )
    found = read(config(modules_to_not_convert=["visual"]), tensors)
    assert found.findings == ()
    assert found.stored_as_float == frozenset()
    assert found.find("model.visual.blocks.0.attn.qkv").spec.is_float
    assert found.find("model.layers.0.mlp.up_proj.weight") is None
    assert pickle.loads(pickle.dumps(found)) == found


def test_pickles_small_with_many_rules_and_layers():
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}"
        for layer in range(3, 61)
        for expert in range(256)
        for part in ("gate_proj", "up_proj", "down_proj")
    ]
    tensors = headers(
        *(awq_layer(name) for name in names), *(float_layer(f"model.layers.{i}.mlp.gate", 256, 256) for i in range(61))
    )
    excluded = [f"model.layers.{i}.mlp.gate" for i in range(61)] + [f"model.visual.layer.{i}" for i in range(100_000)]
    found = read(config(modules_to_not_convert=excluded), tensors)
    assert errors(list(found.findings)) == []
    assert len(found.experts) == 58
    assert len(pickle.dumps(found)) < 100_000
    assert of_severity(list(found.findings), Severity.INFO) == []
