# SPDX-License-Identifier: Apache-2.0
"""The description's validation and its index by layer."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from tests.fixtures_index import fixture, fixtures
from tests.formats.modelslim_layers import read_with_headers, stored_for
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.modelslim import is_description_file, read
from vllm_npu_quant.spec import Granularity, Layout

DYNAMIC = {"weight": "W8A8_DYNAMIC", "weight_scale": "W8A8_DYNAMIC", "weight_offset": "W8A8_DYNAMIC"}
STATIC = {name: "W8A8" for name in ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")}


def description(layers: dict[str, dict[str, str]], **header: Any) -> dict[str, Any]:
    entries = {f"{layer}.{name}": kind for layer, types in layers.items() for name, kind in types.items()}
    return {**entries, "version": "1.0.0", "model_quant_type": "FLOAT", "metadata": {}, "group_size": 0, **header}


def modelslim_fixtures() -> list[str]:
    return [path.name for path in fixtures() if path.name.startswith("msmodelslim")]


@pytest.mark.parametrize("name", modelslim_fixtures())
def test_real_descriptions_have_no_errors(name: str) -> None:
    folder = fixture(name)
    file = next(path for path in folder.iterdir() if is_description_file(path.name))
    checkpoint = Checkpoint.open(folder)
    found = read(json.loads(file.read_text()), checkpoint.tensors, file.name)
    errors = [finding for finding in (*found.findings, *check_checkpoint(found, checkpoint))]
    assert [finding for finding in errors if finding.severity is Severity.ERROR] == []
    assert found.find("model.layers.0.self_attn.q_proj") is not None
    assert found.find("lm_head").spec.is_float


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quant_model_description.json", True),
        ("quant_model_description_w8a8.json", True),
        ("quant_model_description_w4a8_dynamic.json", True),
        ("quant_model_description.json.bak", False),
        ("my_quant_model_description.json", False),
        ("quant_model_description_../x.json", False),
        ("quant_model_weights.safetensors.index.json", False),
    ],
)
def test_description_names(name: str, expected: bool) -> None:
    assert is_description_file(name) is expected


def test_the_models_own_type_is_not_trusted() -> None:
    found = read_with_headers(description({"model.layers.0.mlp.up_proj": DYNAMIC}, model_quant_type="FLOAT"))
    assert found.findings == ()
    assert found.find("model.layers.0.mlp.up_proj").spec.scheme == "W8A8_DYNAMIC"


def test_group_size_follows_the_stored_scale_not_the_header() -> None:
    class Stored:
        dtype, file = "F32", "w.safetensors"

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    types = {name: "W8A16" for name in ("weight", "weight_scale", "weight_offset")}
    tensors = {
        "a.q.weight": Stored(8, 256),
        "a.q.weight_scale": Stored(8, 4),
        "a.q.weight_offset": Stored(8, 4),
        "a.k.weight": Stored(8, 256),
        "a.k.weight_scale": Stored(8, 1),
        "a.k.weight_offset": Stored(8, 1),
    }
    found = read(description({"a.q": types, "a.k": types}, group_size=128), tensors)
    assert found.find("a.q").spec.weight.group_size == 64
    assert found.find("a.k").spec.weight.granularity is Granularity.CHANNEL


def test_mix_stores_the_tensors_of_static_layers_and_has_dynamic_activations() -> None:
    types = {**{name: "W8A8_MIX" for name in STATIC}, **{name: "W8A8_MIX" for name in DYNAMIC}}
    found = read_with_headers(description({"a.q": types}))
    assert found.findings == ()
    entry = found.find("a.q")
    assert entry.spec.activation.dynamic
    assert entry.spec.layout is Layout.MODELSLIM_STATIC
    assert entry.tensors == {"weight_scale", "weight_offset"}


def test_mix_without_its_weight_scale_is_an_error() -> None:
    types = {name: "W8A8_MIX" for name in STATIC}
    found = read_with_headers(description({"a.q": types}))
    assert {finding.code for finding in found.findings} == {"missing-tensor"}
    assert {"a.q.weight_scale: W8A8_MIX", "a.q.weight_offset: W8A8_MIX"} == {f.expected for f in found.findings}


def test_norm_biases_and_linear_biases() -> None:
    layers = {
        "m.input_layernorm": {"weight": "FLOAT", "bias": "FLOAT"},
        "m.q_norm": {"weight": "FLOAT"},
        "m.q_proj": {**DYNAMIC, "bias": "FLOAT"},
        "m.visual.fc": {"weight": "FLOAT", "bias": "FLOAT"},
    }
    found = read_with_headers(description(layers))
    assert found.findings == ()
    assert found.norm_biases == {"m.input_layernorm"}
    assert found.biased == {"m.q_proj"}


def expert_layers(count: int = 4, **changes: dict[str, str]) -> dict[str, dict[str, str]]:
    layers = {
        f"model.layers.0.mlp.experts.{number}.{name}": dict(DYNAMIC)
        for number in range(count)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return {**layers, **{f"model.layers.0.mlp.experts.{where}": types for where, types in changes.items()}}


def test_experts_become_one_entry() -> None:
    found = read_with_headers(description(expert_layers()))
    assert found.findings == ()
    experts = found.find_experts("model.layers.0.mlp.experts")
    assert (experts.count, experts.names) == (4, ("gate_proj", "up_proj", "down_proj"))
    assert experts.gate.spec.scheme == "W8A8_DYNAMIC"
    assert found.find("model.layers.0.mlp.experts.0.gate_proj") is None


def test_mixtral_names_and_mixed_precision_of_w13_and_w2() -> None:
    layers = {}
    for number in range(2):
        for name in ("w1", "w3"):
            layers[f"l.experts.{number}.{name}"] = dict(DYNAMIC)
        layers[f"l.experts.{number}.w2"] = {"weight": "FLOAT"}
    experts = read_with_headers(description(layers)).find_experts("l.experts")
    assert experts.names == ("w1", "w3", "w2")
    assert experts.down.spec.is_float
    assert not experts.gate.spec.is_float


def test_every_expert_is_compared() -> None:
    odd = {name: "W8A16" for name in DYNAMIC}
    found = read_with_headers(description(expert_layers(64, **{"63.up_proj": odd})))
    (finding,) = found.findings
    assert finding.code == "fused-shards-disagree"
    assert finding.layer == "model.layers.0.mlp.experts.*.up_proj"
    assert "; W8A16: " in finding.found
    assert finding.found.endswith(" for experts 63")


def test_a_missing_expert_is_named() -> None:
    layers = expert_layers()
    del layers["model.layers.0.mlp.experts.2.up_proj"]
    (finding,) = read_with_headers(description(layers)).findings
    assert finding.code == "undescribed-layer"
    assert finding.found == "no model.layers.0.mlp.experts.2.up_proj"


def test_a_huge_expert_number_costs_nothing() -> None:
    layers = {f"l.experts.{10**18}.{name}": dict(DYNAMIC) for name in ("gate_proj", "up_proj", "down_proj")}
    (finding,) = read_with_headers(description(layers)).findings
    assert finding.code == "undescribed-layer"


def test_kv_cache_scales_are_dropped_with_a_finding() -> None:
    layers = {"l.k_proj": {**DYNAMIC, "kv_cache_scale": "C8", "kv_cache_offset": "C8"}}
    found = read_with_headers(description(layers, kv_cache_type="C8", kv_quant_type="C8"))
    (finding,) = found.findings
    assert (finding.code, finding.severity) == ("kv-cache-not-quantized", Severity.WARNING)
    assert found.dropped == ("kv_cache_scale", "kv_cache_offset")
    assert found.find("l.k_proj").spec.scheme == "W8A8_DYNAMIC"


FA3 = {f"l.fa_{part}.{name}": "FAQuant" for part in "qkv" for name in ("scale", "offset")}
ROTATIONS = {"l.indexer.q_rot": "FLOAT", "l.indexer.k_rot": "FLOAT"}


@pytest.mark.parametrize(
    ("entries", "header", "named", "dropped"),
    [
        ({**FA3, "l.quant_type": "K_INT8"}, {"fa_quant_type": "FAKQuant"}, "FAKQuant, FAQuant, K_INT8", 6),
        (FA3, {"fa_quant_type": "FAQuant"}, "FAQuant", 6),
        ({"l.fa_v.scale": "X"}, {"kv_cache_type": "MX"}, "MX, X", 1),
        (
            {**ROTATIONS, "l.indexer.quant_type": "INT8_DYNAMIC"},
            {"indexer_quant_type": "INT8_DYNAMIC"},
            "INT8_DYNAMIC",
            2,
        ),
        (ROTATIONS, {}, "rotations of a sparse indexer", 2),
        ({}, {"fa_quant_type": "FAKQuant"}, "FAKQuant", 0),
        ({"l.quant_type": "INT8_DYNAMIC"}, {}, "INT8_DYNAMIC", 0),
    ],
)
def test_quantized_attention_is_dropped_with_one_finding(
    entries: dict[str, str], header: dict[str, str], named: str, dropped: int
) -> None:
    written = {**description({"l.q_proj": DYNAMIC, "l.o_proj": DYNAMIC}), **entries, **header}
    tensors = {name: tensor for name, tensor in stored_for(written).items() if not name.endswith("quant_type")}
    found = read(written, tensors)
    (finding,) = found.findings
    assert (finding.code, finding.severity, finding.found) == ("kv-cache-not-quantized", Severity.WARNING, named)
    assert set(found.layers) == {"l.q_proj", "l.o_proj"}
    assert len(found.dropped) == dropped
    stored = [name for name in tensors if name in entries]
    assert all(name.endswith(tuple(f".{end}" for end in found.dropped or ("",))) for name in stored)
    kept = [name for name in tensors if name not in entries]
    assert not any(name.endswith(tuple(f".{end}" for end in found.dropped)) for name in kept)


def test_float_attention_needs_no_finding() -> None:
    written = {**description({"l.q_proj": DYNAMIC}), "l.indexer.quant_type": "FLOAT", "fa_quant_type": "FLOAT"}
    found = read(written, {name: one for name, one in stored_for(written).items() if not name.endswith("quant_type")})
    assert found.findings == ()


def test_a_rotation_without_its_counterpart_is_not_dropped() -> None:
    found = read_with_headers({**description({"l.q_proj": DYNAMIC}), "l.indexer.q_rot": "FLOAT"})
    assert found.dropped == ()
    assert "l.indexer" in found.layers


def test_scales_of_attention_that_the_description_does_not_list_are_told() -> None:
    written = {**description({"l.q_proj": DYNAMIC}), "fa_quant_type": "FAKQuant"}
    stored = stored_for({**written, "l.fa_q.scale": "FAQuant"})
    codes = [finding.code for finding in read(written, stored).findings]
    assert codes == ["kv-cache-not-quantized", "unexpected-tensor"]


def _with(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**description({"a.q_proj": DYNAMIC, "a.k_proj": DYNAMIC}), **changes}


@pytest.mark.parametrize(
    ("broken", "code", "layer", "words"),
    [
        (_with(**{"a.q_proj.weight": "W9A9"}), "unknown-scheme", "a.q_proj", "W9A9"),
        (_with(**{"a.q_proj.weight_scale": "W8A8"}), "bad-config", "a.q_proj", "one type"),
        (_with(**{"a.q_proj.weight": 8}), "bad-config", "a.q_proj.weight", "string"),
        (_with(**{"a.q_proj.weight": ["W8A8"]}), "bad-config", "a.q_proj.weight", "string"),
        (_with(**{"a.q_proj.alpha": "W8A8_DYNAMIC"}), "unexpected-tensor", "a.q_proj", "alpha"),
        (_with(group_size=-2), "bad-config", "group_size", "greater"),
        (_with(group_size="64 inputs"), "bad-config", "group_size", "integer"),
        (_with(metadata="x"), "bad-config", "metadata", "dictionary"),
        (_with(**{"a.fa_q.weight": "FAQuant"}), "unknown-scheme", "a.fa_q", "FAQuant"),
        (_with(**{"a.fa_p.scale": "FAQuant"}), "unknown-scheme", "a.fa_p", "FAQuant"),
    ],
)
def test_broken_descriptions(broken: Callable[[], dict[str, Any]], code: str, layer: str, words: str) -> None:
    findings = read_with_headers(broken(), "d.json").findings
    hit = next(finding for finding in findings if finding.code == code)
    assert hit.layer == layer
    assert hit.file == "d.json"
    assert words in hit.render()
    assert hit.fix


def test_all_problems_come_at_once() -> None:
    broken = _with(**{"a.q_proj.weight": "W9A9", "a.k_proj.weight_scale": "W8A8", "group_size": -3})()
    codes = [finding.code for finding in read_with_headers(broken).findings]
    assert sorted(set(codes)) == ["bad-config", "unknown-scheme"]
    assert len(codes) == 3


def test_many_alike_are_counted() -> None:
    layers = {f"l.{number}.q_proj": {"weight": "W8A8", "deq_scale": "W8A16"} for number in range(500)}
    findings = read_with_headers(description(layers)).findings
    assert len(findings) == 21
    assert findings[-1].message.startswith("480 more")


def test_an_unknown_type_is_said_once_for_all_its_layers() -> None:
    layers = {f"l.{number}.q_proj": {"weight": "W9A9", "weight_scale": "W9"} for number in range(500)}
    (finding,) = read_with_headers(description(layers)).findings
    assert (finding.code, finding.layer) == ("unknown-scheme", "l.0.q_proj")
    assert finding.message == "no such ModelSlim type: W9, W9A9 (500 layers)"


def test_the_order_of_the_entries_does_not_matter() -> None:
    layers = {**expert_layers(), "model.layers.0.mlp.down_proj": STATIC, "model.layers.0.mlp.gate": {"weight": "FLOAT"}}
    written = description(layers)
    scattered = dict(sorted(written.items(), key=lambda entry: entry[0].rpartition(".")[::-1]))
    expected, found = map(read_with_headers, (written, scattered))
    assert not found.findings
    assert (found.layers, found.experts) == (expected.layers, expected.experts)
    assert len(found.experts) == 1


def test_memory_is_linear_where_the_tensors_of_two_layers_take_turns() -> None:
    entries = {f"{layer}.{number}": "FLOAT" for number in range(5_000) for layer in ("a.q", "a.k")}
    tensors = stored_for(entries)
    tracemalloc.start()
    try:
        found = read(entries, tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.findings == ()
    assert set(found.layers) == {"a.q", "a.k"}
    assert peak < 20_000_000


def test_the_index_is_small() -> None:
    layers = {}
    for number in range(61):
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
            layers[f"model.layers.{number}.self_attn.{name}"] = DYNAMIC
        for expert in range(256):
            for name in ("gate_proj", "up_proj", "down_proj"):
                layers[f"model.layers.{number}.mlp.experts.{expert}.{name}"] = DYNAMIC
    entries = description(layers)
    assert len(entries) > 136_000
    found = read_with_headers(entries)
    assert found.findings == ()
    assert len(pickle.dumps(found)) < 1_000_000
    assert len(found.experts) == 61
