# SPDX-License-Identifier: Apache-2.0
"""What AWQ, GPTQ and AutoRound share: lists of module names, producers, and the schemes that they declare."""

from __future__ import annotations

from typing import Any

import pytest

from tests.formats.packed_layers import check, errors
from vllm_npu_quant.formats import auto_round, awq, gptq
from vllm_npu_quant.formats.packed import ModuleNames, producer_of
from vllm_npu_quant.formats.samples import EXPERTS, LAYER

FORMATS = {module.FORMAT.name: module.FORMAT for module in (awq, gptq, auto_round)}
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("names", "layer", "match"),
    [
        ((), UP, ""),
        (("lm_head",), "lm_head", "components"),
        (("mlp.gate",), "model.layers.0.mlp.gate", "components"),
        (("mlp.gate",), "model.layers.0.mlp.gate_proj", "part"),
        (("mlp.gate",), "model.layers.0.mlp.experts.3.gate_proj", ""),
        (("gate",), "model.layers.0.mlp.gate", "components"),
        (("model.layers.1.mlp.gate", "lm_head"), "model.layers.1.mlp.gate", "components"),
        (("model.layers.1",), "model.layers.1.mlp.up_proj", "components"),
        (("model.layers.1",), "model.layers.11.mlp.up_proj", "part"),
        (("visual",), "model.visual.blocks.0.attn.qkv", "components"),
        ((".mlp.gate.",), "model.layers.0.mlp.gate", "components"),
        (("",), UP, ""),
        (("o_proj", "down"), "model.layers.0.mlp.down_proj", "part"),
        (tuple(f"model.layers.{i}.mlp" for i in range(500)), "model.layers.499.mlp.up_proj", "components"),
        ((*(f"model.layers.{i}.mlp" for i in range(500)), "down"), "model.layers.0.mlp.down_proj", "components"),
        ((*(f"model.layers.{i}.mlp" for i in range(500)), "down"), "model.down_proj", "part"),
    ],
)
def test_module_names(names, layer, match):
    found = ModuleNames(names)
    assert found.match_components(layer) is (match == "components")
    if match != "components":
        assert found.match_anywhere(layer) is (match == "part")


def test_few_names_are_tried_anywhere_in_a_layers_name():
    assert len(ModuleNames(f"part{i}" for i in range(200_000)).parts) == 100
    assert ModuleNames(["a", "b", "a", "", "a"]).parts == ("a", "b")


@pytest.mark.parametrize(
    ("config", "producer"),
    [
        ({}, ""),
        ({"autoround_version": "0.16.1", "provider": "auto-round"}, "AutoRound 0.16.1"),
        ({"provider": "auto-round"}, "auto-round"),
        ({"meta": {"quantizer": ["gptqmodel:7.7.0", "other:1"]}}, "gptqmodel 7.7.0"),
        ({"meta": {"quantizer": "gptqmodel:7.7.0"}}, "gptqmodel 7.7.0"),
        ({"meta": {"quantizer": [7]}, "autoround_version": 3, "provider": None}, ""),
        ({"meta": {"quantizer": []}}, ""),
        ({"meta": "gptqmodel"}, ""),
        ({"autoround_version": "1" * 1000}, "AutoRound " + "1" * 40),
        ({"meta": {"quantizer": "a" * 1000}}, "a" * 60),
    ],
)
def test_producers(config: dict[str, Any], producer: str):
    assert producer_of(config) == producer
    assert all(declaration.producer(config) == producer for declaration in FORMATS.values())


SERVED = {
    "awq": ["gemm, zero points", "gemm, symmetric"],
    "gptq": [
        *(f"{bits} bits, symmetric" for bits in (2, 3, 4, 8)),
        *("4 bits, zero points", "4 bits, desc_act", "4 bits, gptq_v2"),
    ],
    "auto-round": [
        *(f"{bits} bits, auto_gptq packing" for bits in (2, 3, 4, 8)),
        *("4 bits, auto_awq packing", "FP8 per channel", "FP8 per block", "MXFP8", "MXFP4", "NVFP4"),
    ],
}
REFUSED = {"awq": ["gemv"], "gptq": ["4 bits, marlin"], "auto-round": []}


@pytest.mark.parametrize("name", FORMATS)
def test_samples(name: str):
    samples = list(FORMATS[name].samples())
    assert [sample.label for sample in samples] == SERVED[name] + REFUSED[name]
    for sample in samples:
        found = FORMATS[name].read(sample.config, sample.tensors, "config.json", None)
        if sample.label in REFUSED[name]:
            (finding,) = errors(list(found.findings))
            assert finding.code == "unsupported-scheme"
            continue
        assert check(found, sample.tensors) == []
        layer, experts = found.find(LAYER), found.find_experts(EXPERTS)
        assert layer is not None
        assert experts is not None
        assert layer == experts.gate == experts.up == experts.down
        assert not layer.spec.is_float


def test_declarations():
    assert FORMATS["awq"].serves({"quant_method": "AWQ"})
    assert FORMATS["auto-round"].serves({"quant_method": "intel/auto_round"})
    assert not FORMATS["gptq"].serves({"quant_method": "awq"})
    names = [["config.json", "quant_config.json"], ["quantize_config.json"], ["config.json"]]
    assert [FORMATS["awq"].file_beside(each) for each in names] == ["quant_config.json", None, None]
    assert [FORMATS["gptq"].file_beside(each) for each in names] == [None, "quantize_config.json", None]
    assert [FORMATS["auto-round"].file_beside(each) for each in names] == [None, None, None]
