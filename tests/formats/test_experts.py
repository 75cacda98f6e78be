# SPDX-License-Identifier: Apache-2.0
"""Experts as one entry: whichever expert differs, it is found and named, from the description alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.modelslim_layers import read_with_headers
from tests.formats.packed_layers import awq_layer, float_layer, gptq_layer, headers
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import NpuQuantError, Severity
from vllm_npu_quant.formats import awq, gptq
from vllm_npu_quant.formats.check import check_expert_biases
from vllm_npu_quant.formats.described import Described, LayerEntry
from vllm_npu_quant.formats.experts import EXPERT_NAMES, collect_experts
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


READERS = {"awq": awq.read, "gptq": gptq.read}


def described(changes: dict[str, Any], count: int = 4) -> Described:
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
    return read_with_headers(types)


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
    found = READERS[format_name](config, tensors)
    (finding,) = [finding for finding in found.findings if finding.code == "fused-shards-disagree"]
    assert finding.layer == f"{EXPERTS}.*.up_proj"
    assert "FLOAT: float for experts 2" in finding.found


FUSED = {"gate_up_proj": (4, 256, 128), "down_proj": (4, 128, 128)}


def test_float_experts_stored_as_two_tensors_of_a_description() -> None:
    types = {f"{EXPERTS}.{name}": "FLOAT" for name in FUSED} | {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC"}
    entry = LayerResolver(read_with_headers(types)).resolve_experts(EXPERTS).entry
    assert all(part.spec.is_float for part in (entry.gate, entry.up, entry.down))


def test_quantized_experts_stored_as_two_tensors_are_not_taken_for_float() -> None:
    types = {f"{EXPERTS}.{name}": "W8A8_DYNAMIC" for name in FUSED} | {"version": "1.0.0"}
    with pytest.raises(NpuQuantError):
        LayerResolver(read_with_headers(types)).resolve_experts(EXPERTS)


@pytest.mark.parametrize("dtype", ["BF16", "U8"])
def test_experts_stored_as_two_tensors_in_the_files(dtype: str) -> None:
    stored = {f"{EXPERTS}.{name}": (dtype, shape) for name, shape in FUSED.items()}
    tensors = headers(awq_layer("model.layers.0.self_attn.q_proj"), stored)
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    resolver = LayerResolver(awq.read(config, tensors))
    if dtype == "BF16":
        assert resolver.resolve_experts(EXPERTS).w13.spec.is_float
    else:
        with pytest.raises(NpuQuantError):
            resolver.resolve_experts(EXPERTS)


@pytest.mark.parametrize("names", EXPERT_NAMES, ids=["proj", "w"])
def test_messages_have_the_names_of_the_checkpoint(names: tuple[str, str, str]) -> None:
    """Mixtral's w1, w3 and w2 are not called gate_proj, up_proj and down_proj, nor the other way around."""
    others = next(family for family in EXPERT_NAMES if family != names)
    for absent in names:
        projections = {name: {"0": INT4, "1": INT4} for name in names if name != absent}
        entry, (finding,) = collect_experts(EXPERTS, projections, "config.json")
        assert entry is None
        assert finding.message == "a projection of the experts is left out"
        assert finding.expected.split() == list(names)
        projections[absent] = {"0": INT4}
        _, (finding,) = collect_experts(EXPERTS, projections, "config.json")
        assert finding.found == f"no {EXPERTS}.1.{absent}"
        assert not any(name in finding.render() for name in others)
    described_layers = {
        f"{EXPERTS}.0.{name}.{last}": "W8A8_DYNAMIC"
        for name in names
        for last in ("weight", "weight_scale", "weight_offset")
    }
    resolver = LayerResolver(read_with_headers({"version": "1.0.0", **described_layers}))
    with pytest.raises(NpuQuantError) as caught:
        resolver.resolve_experts("model.layers.1.mlp.experts")
    assert f"model.layers.1.mlp.experts.0.{names[0]}" in caught.value.findings[0].expected
    assert others[0] not in caught.value.findings[0].expected


def test_projections_of_no_family() -> None:
    projections = {name: {"0": INT4} for name in ("fc1", "fc2")}
    _, (finding,) = collect_experts(EXPERTS, projections, "config.json")
    assert finding.expected == "gate_proj up_proj down_proj or w1 w3 w2"
    assert finding.found == "fc1 fc2"


def ungated(layers: range, complete: int = 0) -> Described:
    """GPTQ experts with up_proj and down_proj only; the first ``complete`` layers have a gate, too."""
    tensors = headers(
        *(
            gptq_layer(f"model.layers.{layer}.mlp.experts.{number}.{name}", 128, 128)
            for layer in layers
            for number in range(2)
            for name in EXPERT_NAMES[0]
            if name != "gate_proj" or layer < complete
        )
    )
    return gptq.read({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}, tensors)


def test_experts_without_a_gate_are_refused_once() -> None:
    (finding,) = ungated(range(3)).findings
    assert (finding.code, finding.layer) == ("unsupported-scheme", EXPERTS)
    assert "without a gate projection" in finding.message
    assert "(3 MoE layers)" in finding.message


def test_a_gate_that_is_missing_in_one_layer_is_left_out() -> None:
    (finding,) = ungated(range(3), complete=2).findings
    assert (finding.code, finding.layer) == ("undescribed-layer", "model.layers.2.mlp.experts")
    assert "left out" in finding.message


@pytest.mark.parametrize("bias", [0.0, -0.0, 0.5])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_biases_of_experts_are_read(bias: float, dtype: str, tmp_path: Path) -> None:
    """Of the first expert of each layer, or of every expert; -0.0 is zero, too."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    tensors = {
        f"model.layers.{layer}.mlp.experts.{number}.{name}.{last}": content
        for layer in range(2)
        for number in range(2)
        for name in EXPERT_NAMES[0]
        for last, content in {
            "qweight": np.zeros((16, 128), np.int32),
            "qzeros": np.zeros((1, 16), np.int32),
            "scales": np.ones((1, 128), np.float16),
            "bias": np.full(128, bias if (layer, number) == (1, 1) else 0.0),
        }.items()
    }
    write(tmp_path / "model.safetensors", tensors, dtype)
    checkpoint = Checkpoint.open(tmp_path)
    found = gptq.read(config, checkpoint.tensors)
    (note,) = check_expert_biases(found, checkpoint)
    assert (note.code, note.severity) == ("served-otherwise", Severity.INFO)
    assert "6 of 12" in note.message
    (finding,) = check_expert_biases(found, checkpoint, every=True)
    if bias:
        assert (finding.code, finding.layer) == ("unsupported-scheme", "model.layers.1.mlp.experts")
        assert finding.found == "model.layers.1.mlp.experts.1.gate_proj.bias"
    else:
        assert "12 of 12" in finding.message


def write(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """A safetensors file, in which float64 arrays are stored as ``dtype``."""
    header, data = {}, b""
    for name, value in tensors.items():
        kind = {"int32": "I32", "float16": "F16"}.get(str(value.dtype), dtype)
        if kind == "BF16":
            content = (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            content = value.astype({"I32": np.int32, "F16": np.float16, "F32": np.float32}[kind]).tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
