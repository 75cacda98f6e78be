# SPDX-License-Identifier: Apache-2.0
"""vLLM's layer names to the checkpoint's."""

from __future__ import annotations

import pytest

from tests.formats.modelslim_layers import read_with_headers
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.resolve import LayerResolver

DYNAMIC = ("weight", "weight_scale", "weight_offset")


def resolver(layers: dict[str, str], **options) -> LayerResolver:
    entries = {}
    for layer, kind in layers.items():
        entries |= {f"{layer}.{name}": kind for name in (DYNAMIC if kind != "FLOAT" else ("weight",))}
    found = read_with_headers({**entries, "version": "1.0.0"})
    assert found.findings == ()
    return LayerResolver(found, **options)


QKV = {f"model.layers.0.self_attn.{name}": "W8A8_DYNAMIC" for name in ("q_proj", "k_proj", "v_proj")}


def test_fused_by_the_models_own_mapping() -> None:
    layers = {"m.wq": "W8A16", "m.wkv": "W8A16"}
    resolved = resolver(layers, packed={"fused_attn": ["wq", "wkv"]}).resolve("m.fused_attn")
    assert resolved.shards == ("m.wq", "m.wkv")
    assert resolved.spec.scheme == "W8A16"


def test_the_generic_table_serves_where_the_model_says_nothing() -> None:
    resolved = resolver(QKV).resolve("model.layers.0.self_attn.qkv_proj")
    assert [name.rpartition(".")[2] for name in resolved.shards] == ["q_proj", "k_proj", "v_proj"]


def test_the_models_mapping_overrides_the_table() -> None:
    layers = {
        "m.q": "W8A16",
        "m.kv": "W8A16",
        **{f"m.{name}": "W8A8_DYNAMIC" for name in ("q_proj", "k_proj", "v_proj")},
    }
    resolved = resolver(layers, packed={"qkv_proj": ["q", "kv"]}).resolve("m.qkv_proj")
    assert resolved.shards == ("m.q", "m.kv")


def test_a_layer_that_is_fused_on_disk() -> None:
    resolved = resolver({"m.qkv_proj": "W8A8_DYNAMIC", "m.gate_up_proj": "W8A16"}).resolve("m.qkv_proj")
    assert resolved.shards == ("m.qkv_proj",)


def test_only_the_last_component_is_renamed() -> None:
    layers = {
        "qkv_proj.layers.0.q_proj": "W8A16",
        "qkv_proj.layers.0.k_proj": "W8A16",
        "qkv_proj.layers.0.v_proj": "W8A16",
    }
    assert resolver(layers).resolve("qkv_proj.layers.0.qkv_proj").shards[0] == "qkv_proj.layers.0.q_proj"


def test_a_prefix_of_a_name_is_not_the_name() -> None:
    layers = {"m.mlp.gate": "FLOAT", "m.mlp.gate_proj": "W8A16", "m.mlp.up_proj": "W8A16"}
    found = resolver(layers)
    assert found.resolve("m.mlp.gate").spec.is_float
    assert not found.resolve("m.mlp.gate_up_proj").spec.is_float


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("language_model.model.layers.0.mlp.down_proj", "model.language_model.layers.0.mlp.down_proj"),
        ("language_model.model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"),
        ("model.language_model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"),
        ("language_model.lm_head", "lm_head"),
        ("model.layers.61.mtp_block.self_attn.o_proj", "model.layers.61.self_attn.o_proj"),
    ],
)
def test_spellings(asked: str, stored: str) -> None:
    assert resolver({stored: "W8A16"}).resolve(asked).shards == (stored,)


def test_the_mapper_is_followed_and_applying_it_twice_changes_nothing() -> None:
    found = resolver({"transformer.h.0.attn": "W8A16"})

    def rename(name: str) -> str | None:
        return name.replace("transformer.h.", "model.layers.")

    found.add_mapper(rename)
    first = dict(found.aliases)
    found.add_mapper(rename)
    assert found.aliases == first == {"model.layers.0.attn": "transformer.h.0.attn"}
    assert found.resolve("model.layers.0.attn").shards == ("transformer.h.0.attn",)


def test_an_undescribed_layer_names_what_was_tried_and_what_is_near() -> None:
    with pytest.raises(NpuQuantError) as caught:
        resolver(QKV).resolve("model.layers.0.self_attn.o_proj")
    (finding,) = caught.value.findings
    assert finding.code == "undescribed-layer"
    assert finding.layer == "model.layers.0.self_attn.o_proj"
    assert "model.layers.0.self_attn.o_proj" in finding.expected
    assert "model.layers.0.self_attn.q_proj" in finding.nearest


def test_a_missing_shard_is_named() -> None:
    layers = {name: kind for name, kind in QKV.items() if not name.endswith("k_proj")}
    with pytest.raises(NpuQuantError) as caught:
        resolver(layers).resolve("model.layers.0.self_attn.qkv_proj")
    (finding,) = caught.value.findings
    assert "only some shards" in finding.message
    assert "self_attn.k_proj" in finding.expected
    assert "self_attn.q_proj" not in finding.expected


@pytest.mark.parametrize(
    ("odd", "fix"),
    [("W8A16", "one scheme for these layers"), ("FLOAT", "quantize k_proj too, or leave q_proj and v_proj out")],
)
def test_shards_that_disagree(odd: str, fix: str) -> None:
    with pytest.raises(NpuQuantError) as caught:
        resolver({**QKV, "model.layers.0.self_attn.k_proj": odd}).resolve("model.layers.0.self_attn.qkv_proj")
    (finding,) = caught.value.findings
    assert finding.code == "fused-shards-disagree"
    assert f"k_proj: {odd}" in finding.found
    assert fix in finding.fix


def test_experts_whose_gate_and_up_disagree() -> None:
    layers = {f"l.mlp.experts.0.{name}": "W8A8_DYNAMIC" for name in ("gate_proj", "down_proj")}
    layers["l.mlp.experts.0.up_proj"] = "W8A16"
    with pytest.raises(NpuQuantError) as caught:
        resolver(layers).resolve_experts("l.mlp.experts")
    assert caught.value.codes == ("fused-shards-disagree",)


def test_undescribed_experts() -> None:
    with pytest.raises(NpuQuantError) as caught:
        resolver(QKV).resolve_experts("model.layers.0.mlp.experts")
    assert caught.value.codes == ("undescribed-layer",)
    assert "model.layers.0.mlp.experts.0.gate_proj" in caught.value.findings[0].expected


LINEAR_ATTENTION = {f"m.{name}": "W8A8_DYNAMIC" for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")}


@pytest.mark.parametrize("packed", [{}, {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}], ids=["table", "model"])
def test_a_checkpoint_layer_that_fills_several_shards(packed: dict) -> None:
    found = resolver(LINEAR_ATTENTION, packed=packed)
    qkvz = found.resolve("m.in_proj_qkvz")
    assert qkvz.shards == ("m.in_proj_qkv", "m.in_proj_z")
    assert qkvz.owners(4) == (0, 0, 0, 1)
    assert found.resolve("m.in_proj_ba").owners(2) == (0, 1)


def test_a_layer_that_is_stored_as_one_fills_every_shard() -> None:
    resolved = resolver({"m.in_proj_qkvz": "W8A16"}, packed={"in_proj_qkvz": ["in_proj_qkvz"]}).resolve(
        "m.in_proj_qkvz"
    )
    assert resolved.owners(1) == (0,)
    assert resolved.owners(4) == (0, 0, 0, 0)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_another_number_of_shards_than_the_checkpoint_layers_fill(count: int) -> None:
    with pytest.raises(NpuQuantError) as caught:
        resolver(LINEAR_ATTENTION).resolve("m.in_proj_qkvz").owners(count)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer) == ("undescribed-layer", "m.in_proj_qkvz")
    assert finding.expected == f"{count} shards"
    assert finding.found == "m.in_proj_qkv: 3, m.in_proj_z: 1"
