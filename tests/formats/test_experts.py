# SPDX-License-Identifier: Apache-2.0
"""Experts as one entry: whichever expert differs, it is found and named, from the description alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.formats.packed_layers import awq_layer, float_layer, gptq_layer, headers
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.awq import AwqFormat
from vllm_npu_quant.formats.base import LayerEntry
from vllm_npu_quant.formats.experts import EXPERT_NAMES, collect_experts
from vllm_npu_quant.formats.gptq import GptqFormat
from vllm_npu_quant.formats.modelslim import ModelSlimFormat
from vllm_npu_quant.formats.resolve import LayerResolver
from vllm_npu_quant.spec import FLOAT, Granularity, LayerSpec, Layout, WeightSpec

EXPERTS = "model.layers.0.mlp.experts"
INT4 = LayerEntry(LayerSpec("W4A16", Layout.CT_PACKED, WeightSpec(4, granularity=Granularity.GROUP, group_size=128)))
FINER = LayerEntry(LayerSpec("W4A16", Layout.CT_PACKED, WeightSpec(4, granularity=Granularity.GROUP, group_size=64)))


@pytest.mark.parametrize("names", EXPERT_NAMES, ids=["proj", "w"])
@pytest.mark.parametrize("other", [FINER, LayerEntry(FLOAT)], ids=["group", "float"])
def test_any_single_expert_that_differs_is_named(names: tuple[str, ...], other: LayerEntry) -> None:
    for number in range(64):
        for name in names:
            projections = {part: {str(i): INT4 for i in range(64)} for part in names}
            projections[name][str(number)] = other
            _, (finding,) = collect_experts(EXPERTS, projections, "config.json")
            assert finding.code == "fused-shards-disagree"
            assert finding.layer == f"{EXPERTS}.*.{name}"
            kinds = dict(part.rsplit(" for experts ", 1) for part in finding.found.split("; "))
            assert len(kinds) == 2  # the two are told apart, whatever the scheme is called
            assert any(members == str(number) for members in kinds.values())


RULES: dict[str, Any] = {"awq": AwqFormat, "gptq": GptqFormat}


def described(changes: dict[str, Any], count: int = 4) -> ModelSlimFormat:
    types: dict[str, Any] = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC"}
    for number in range(count):
        for name in EXPERT_NAMES[0]:
            types |= {
                f"{EXPERTS}.{number}.{name}.{last}": "W8A8_DYNAMIC"
                for last in ("weight", "weight_scale", "weight_offset")
            }
    for name, kind in changes.items():
        for key in [key for key in types if key.startswith(name)]:
            del types[key]
        types[name + ".weight"] = kind
    return ModelSlimFormat.from_description(types)


@pytest.mark.parametrize("number", range(4))
def test_one_float_expert_in_a_description(number: int) -> None:
    (finding,) = described({f"{EXPERTS}.{number}.up_proj": "FLOAT"}).findings
    assert finding.code == "fused-shards-disagree"
    assert f"FLOAT: float for experts {number}" in finding.found


def test_gate_and_up_that_disagree_are_named() -> None:
    found = described({f"{EXPERTS}.{number}.up_proj": "FLOAT" for number in range(4)})
    with pytest.raises(NpuQuantError) as caught:
        LayerResolver(found).resolve_experts(EXPERTS)
    (finding,) = caught.value.findings
    assert finding.code == "fused-shards-disagree"
    assert f"{EXPERTS}.*.gate_proj: W8A8_DYNAMIC" in finding.found
    assert f"{EXPERTS}.*.up_proj: FLOAT" in finding.found


@pytest.mark.parametrize("format_name", ["awq", "gptq"])
def test_one_expert_of_another_kind_in_the_files(format_name: str) -> None:
    config: dict[str, Any] = {"quant_method": format_name, "bits": 4, "group_size": 128}
    config |= (
        {"version": "gemm", "zero_point": True, "modules_to_not_convert": ["experts.2.up_proj"]}
        if format_name == "awq"
        else {"sym": True, "desc_act": False, "dynamic": {"-:.*experts\\.2\\.up_proj.*": {}}}
    )
    layer = awq_layer if format_name == "awq" else gptq_layer
    tensors = headers(
        *(
            float_layer(f"{EXPERTS}.{number}.{name}", 256, 256)
            if (number, name) == (2, "up_proj")
            else layer(f"{EXPERTS}.{number}.{name}", 256, 256)
            for number in range(3)
            for name in EXPERT_NAMES[0]
        )
    )
    found = RULES[format_name].from_config(config, tensors=tensors)
    (finding,) = [finding for finding in found.findings if finding.code == "fused-shards-disagree"]
    assert finding.layer == f"{EXPERTS}.*.up_proj"
    assert "FLOAT: float for experts 2" in finding.found


FUSED = {"gate_up_proj": (4, 256, 128), "down_proj": (4, 128, 128)}


def test_float_experts_stored_as_two_tensors_of_a_description() -> None:
    types = {f"{EXPERTS}.{name}": "FLOAT" for name in FUSED} | {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC"}
    entry = LayerResolver(ModelSlimFormat.from_description(types)).resolve_experts(EXPERTS).entry
    assert all(part.spec.is_float for part in (entry.gate, entry.up, entry.down))


def test_quantized_experts_stored_as_two_tensors_are_not_taken_for_float() -> None:
    types = {f"{EXPERTS}.{name}": "W8A8_DYNAMIC" for name in FUSED} | {"version": "1.0.0"}
    with pytest.raises(NpuQuantError):
        LayerResolver(ModelSlimFormat.from_description(types)).resolve_experts(EXPERTS)


@pytest.mark.parametrize("dtype", ["BF16", "U8"])
def test_experts_stored_as_two_tensors_in_the_files(dtype: str) -> None:
    stored = {f"{EXPERTS}.{name}": (dtype, shape) for name, shape in FUSED.items()}
    tensors = headers(awq_layer("model.layers.0.self_attn.q_proj"), stored)
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    resolver = LayerResolver(AwqFormat.from_config(config, tensors=tensors))
    if dtype == "BF16":
        assert resolver.resolve_experts(EXPERTS).w13.spec.is_float
    else:
        with pytest.raises(NpuQuantError):
            resolver.resolve_experts(EXPERTS)
