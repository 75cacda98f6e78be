# SPDX-License-Identifier: Apache-2.0
"""What ModelSlim's 4-bit, sparse, FP8 and rotated layers are, in every spelling; types that are refused, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_index import fixture, shared
from tests.formats.modelslim_layers import read_with_headers, stored_for
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity
from vllm_npu_quant.formats.check import check_checkpoint, check_layer
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.formats.modelslim import FORMAT, TYPES, is_description_file, read, vllm_ascend_schemes
from vllm_npu_quant.formats.samples import EXPERTS
from vllm_npu_quant.formats.samples import LAYER as SAMPLE_LAYER
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.serving.dispatch import describe, find_row
from vllm_npu_quant.spec import Granularity, LayerKind, LayerSpec, Layout, NumberKind, TransformSpec, WeightSpec

LAYER = "model.layers.0.self_attn.o_proj"
SCALES = ("weight", "weight_scale", "weight_offset")
TWO_LEVEL = (*SCALES, "weight_scale_second", "weight_offset_second", "scale_bias")
FLATQUANT = (*SCALES, "left_trans", "clip_ratio")


@dataclass(frozen=True)
class Stored:
    dtype: str
    shape: tuple[int, ...]
    file: str = "w.safetensors"


def described(names: tuple[str, ...], kind: str, **header: Any) -> dict[str, Any]:
    return {**{f"{LAYER}.{name}": kind for name in names}, **header}


def stored(**tensors: Stored) -> dict[str, Stored]:
    return {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}


def int8(*shape: int) -> Stored:
    return Stored("I8", shape)


def f32(*shape: int) -> Stored:
    return Stored("F32", shape)


def scaled(weight: Stored, scale: tuple[int, int], **more: Stored) -> dict[str, Stored]:
    return stored(weight=weight, weight_scale=f32(*scale), weight_offset=f32(*scale), **more)


def entry_of(description: dict[str, Any], tensors: dict[str, Stored]) -> LayerEntry:
    found = read(description, tensors)
    assert [finding for finding in found.findings if finding.severity is Severity.ERROR] == []
    entry = found.find(LAYER)
    assert entry is not None
    if not entry.spec.is_float:
        assert check_layer(LAYER, entry, tensors, "description") == []
    return entry


V1 = {"version": "1.0.0"}

#: N = 64, K = 256 in every case: (names, type, header, stored tensors, layout, group size).
LAYOUTS = {
    "W4A16 per channel": (SCALES, "W4A16", V1, scaled(int8(64, 128), (64, 1)), Layout.MODELSLIM_PACKED_K, 0),
    "W4A16 per group": (SCALES, "W4A16", V1, scaled(int8(32, 256), (64, 4)), Layout.MODELSLIM_PACKED_N, 64),
    "W4A16, a version that does not pack": (
        SCALES,
        "W4A16",
        V1,
        scaled(int8(64, 256), (64, 4)),
        Layout.MODELSLIM_INT,
        64,
    ),
    "W4A16 of old files": (SCALES, "W4A16", {}, scaled(int8(64, 256), (64, 1)), Layout.MODELSLIM_INT, 0),
    "W4A16 of old files per group": (SCALES, "W4A16", {}, scaled(int8(64, 256), (64, 4)), Layout.MODELSLIM_INT, 64),
    "W4A8": (
        (*SCALES, "scale_bias"),
        "W4A8_DYNAMIC",
        V1,
        scaled(int8(32, 256), (64, 1), scale_bias=f32(64, 16)),
        Layout.MODELSLIM_PACKED_N,
        0,
    ),
    "W4A8 of two levels": (
        TWO_LEVEL,
        "W4A8_DYNAMIC",
        {**V1, "group_size": 64},
        scaled(
            int8(32, 256),
            (64, 1),
            scale_bias=f32(64, 1),
            weight_scale_second=f32(64, 4),
            weight_offset_second=Stored("I64", (64, 4)),
        ),
        Layout.MODELSLIM_TWO_LEVEL_PACKED,
        64,
    ),
    "W4A8 of old files": (
        TWO_LEVEL[:-1],
        "W4A8_DYNAMIC",
        {},
        scaled(
            int8(64, 256),
            (64, 1),
            weight_scale_second=f32(64, 4),
            weight_offset_second=Stored("I64", (64, 4)),
        ),
        Layout.MODELSLIM_TWO_LEVEL,
        64,
    ),
    "W4A8 of old files, one level": (
        SCALES,
        "W4A8_DYNAMIC",
        {},
        scaled(int8(64, 256), (64, 4)),
        Layout.MODELSLIM_INT,
        64,
    ),
    "W4A4": (SCALES, "W4A4_DYNAMIC", V1, scaled(int8(64, 256), (64, 1)), Layout.MODELSLIM_INT, 0),
    "W4A4 per group": (SCALES, "W4A4_DYNAMIC", V1, scaled(int8(64, 256), (64, 4)), Layout.MODELSLIM_INT, 64),
    "W4A4 packed": (SCALES, "W4A4_DYNAMIC", V1, scaled(int8(32, 256), (64, 1)), Layout.MODELSLIM_PACKED_N, 0),
    "W8A16 per group": (SCALES, "W8A16", V1, scaled(int8(64, 256), (64, 2)), Layout.MODELSLIM_INT, 128),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_stored_shapes_tell_the_layout(name: str) -> None:
    names, kind, header, tensors, layout, group = LAYOUTS[name]
    spec = entry_of(described(names, kind, **header), tensors).spec
    assert (spec.scheme, spec.layout) == (kind, layout)
    assert spec.weight.group_size == group
    assert spec.weight.granularity is (Granularity.GROUP if group else Granularity.CHANNEL)
    assert find_row(LayerKind.LINEAR, spec) is not None


def test_scale_bias_is_checked_and_not_loaded() -> None:
    names, kind, header, tensors, _, _ = LAYOUTS["W4A8"]
    found = read(described(names, kind, **header), tensors)
    assert found.dropped == ("scale_bias",)
    broken = {**tensors, f"{LAYER}.scale_bias": f32(63, 16)}
    (finding,) = check_layer(LAYER, found.find(LAYER), broken, "description")
    assert (finding.code, finding.expected) == ("wrong-shape", "[N, *] = [64, -1]")


def test_activations_stay_what_the_checkpoint_says() -> None:
    bits = {
        kind: (meaning.weight.bits, meaning.activation.bits if meaning.activation else None)
        for kind, meaning in TYPES.items()
    }
    assert bits["W4A8_DYNAMIC"] == (4, 8)
    assert bits["W4A16"] == (4, None)
    assert bits["W4A4_DYNAMIC"] == bits["W4A4_FLATQUANT_DYNAMIC"] == (4, 4)


def test_sparse_types() -> None:
    static = ("weight", "quant_bias", "input_scale", "input_offset", "deq_scale")
    tensors = stored(
        weight=int8(64, 256),
        quant_bias=Stored("I32", (64,)),
        input_scale=f32(1),
        input_offset=f32(1),
        deq_scale=f32(64),
    )
    spec = entry_of(described(static, "W8A8S", **V1), tensors).spec
    assert (spec.layout, spec.activation.dynamic) == (Layout.MODELSLIM_STATIC, False)
    tensors = stored(weight=Stored("BF16", (64, 256)))
    assert entry_of(described(("weight",), "W16A16S", **V1), tensors).spec.is_float


def test_fp8_is_what_the_checkpoint_stores() -> None:
    spec = entry_of(described(SCALES, "WFP8AFP8_DYNAMIC", **V1), scaled(Stored("F8_E4M3", (64, 256)), (64, 1))).spec
    assert (spec.scheme, spec.layout) == ("WFP8AFP8_DYNAMIC", Layout.FP8)
    assert (spec.weight.bits, spec.weight.kind, spec.weight.granularity) == (8, NumberKind.FLOAT, Granularity.CHANNEL)
    assert (spec.activation.bits, spec.activation.kind, spec.activation.dynamic) == (8, NumberKind.FLOAT, True)


@pytest.mark.parametrize(
    ("kind", "weight", "layout", "bits", "input_bits"),
    [
        ("W8A8_MXFP8", Stored("F8_E4M3", (64, 256)), Layout.MXFP8, 8, 8),
        ("W4A8_MXFP", Stored("U8", (64, 128)), Layout.MXFP4, 4, 8),
        ("W4A4_MXFP4", Stored("U8", (64, 128)), Layout.MXFP4, 4, 4),
        ("W4A16_MXFP4", Stored("U8", (64, 128)), Layout.MXFP4, 4, None),
    ],
)
def test_microscaling(kind: str, weight: Stored, layout: Layout, bits: int, input_bits: int | None) -> None:
    tensors = stored(weight=weight, weight_scale=Stored("U8", (64, 8)))
    assert errors(described(SCALES[:2], kind, **V1), tensors) == []
    spec = entry_of(described(SCALES[:2], kind, **V1), tensors).spec
    assert (spec.scheme, spec.layout) == (kind, layout)
    assert spec.weight == WeightSpec(bits, NumberKind.MX, Granularity.GROUP, 32)
    activation = spec.activation
    assert (activation and (activation.bits, activation.kind)) == (input_bits and (input_bits, NumberKind.MX))


FLATQUANT_TENSORS = scaled(int8(64, 256), (64, 1), left_trans=f32(8, 8), right_trans=f32(32, 32), clip_ratio=f32(1))
HEADS_TENSORS = scaled(int8(64, 256), (64, 1), heads_rotation=f32(4, 4))
KRONECKER_TENSORS = scaled(int8(64, 256), (64, 1), kronecker_rotation_m=f32(8, 8), kronecker_rotation_n=f32(32, 32))


def rotated(name: str, *layers: str) -> dict[str, Any]:
    quarot = {"max_tp_size": 1, "heads_rotation": {"layers": []}, "kronecker_rotation": {"layers": []}}
    return {**V1, "metadata": {"quarot": {**quarot, name: {"layers": list(layers)}}}}


@pytest.mark.parametrize(
    ("names", "kind", "header", "tensors", "transform"),
    [
        ((*FLATQUANT, "right_trans"), "W4A4_FLATQUANT_DYNAMIC", V1, FLATQUANT_TENSORS, TransformSpec(8, 32, clip=True)),
        (
            FLATQUANT,
            "W4A4_FLATQUANT_DYNAMIC",
            V1,
            scaled(int8(64, 256), (64, 1), left_trans=f32(4, 4), clip_ratio=f32(1)),
            TransformSpec(4, 0, clip=True),
        ),
        (SCALES, "W8A8_DYNAMIC", rotated("heads_rotation", LAYER), HEADS_TENSORS, TransformSpec(4, 0)),
        (SCALES, "W4A4_DYNAMIC", rotated("kronecker_rotation", LAYER), KRONECKER_TENSORS, TransformSpec(8, 32)),
    ],
)
def test_input_transforms(names: Any, kind: str, header: Any, tensors: Any, transform: TransformSpec) -> None:
    """The sizes come from the files: the description has none, and lists no rotation among its tensors."""
    entry = entry_of(described(names, kind, **header), tensors)
    assert entry.spec.transform == transform
    assert {name.rpartition(".")[2] for name in tensors} - set(SCALES) <= entry.tensors
    assert find_row(LayerKind.LINEAR, entry.spec) is not None
    assert "input transform" in describe(entry.spec)


def test_a_scheme_without_a_place_for_a_transform_is_not_served() -> None:
    spec = entry_of(described(SCALES, "W8A16", **rotated("heads_rotation", LAYER)), HEADS_TENSORS).spec
    assert find_row(LayerKind.LINEAR, spec) is None
    assert isinstance(spec, LayerSpec)


def errors(description: dict[str, Any], tensors: dict[str, Stored]) -> list[Finding]:
    found = read(description, tensors)
    findings = list(found.findings)
    if found.find(LAYER) is not None and not found.find(LAYER).spec.is_float:
        findings += check_layer(LAYER, found.find(LAYER), tensors, "description")
    return [finding for finding in findings if finding.severity is Severity.ERROR]


UNFUSED = {f"{LAYER}.div.mul_scale": "FLOAT", **{f"{LAYER}.linear.{name}": "W8A8_DYNAMIC" for name in SCALES}, **V1}

#: description, tensors (None for those that the description lists), code, what the message says.
BROKEN = {
    "MXFP8 without its scales": (
        described(("weight",), "W8A8_MXFP8", **V1),
        stored(weight=Stored("F8_E4M3", (64, 256))),
        "missing-tensor",
        "weight_scale",
    ),
    "MXFP4 with float scales": (
        described(SCALES[:2], "W4A4_MXFP4", **V1),
        stored(weight=Stored("U8", (64, 128)), weight_scale=f32(64, 8)),
        "wrong-dtype",
        "U8 or F8_E8M0",
    ),
    "MXFP4 in groups of 64": (
        described(SCALES[:2], "W4A8_MXFP", **V1),
        stored(weight=Stored("U8", (64, 128)), weight_scale=Stored("U8", (64, 4))),
        "wrong-shape",
        "[N, G] = [64, 8]",
    ),
    "MXFP4 FlatQuant": (described(SCALES, "W4A4_MXFP4_FLATQUANT", **V1), None, "unsupported-scheme", "Ascend 950"),
    "compressed": (described(SCALES, "W8A8SC", **V1), None, "unsupported-scheme", "310P"),
    "NF4": (described(("weight",), "NF4", **V1), None, "unsupported-scheme", "NormalFloat"),
    "diffusion": (described(SCALES, "W8A8_TIMESTEP", **V1), None, "unsupported-scheme", "diffusion"),
    "smoothing that was not fused": (UNFUSED, None, "unsupported-scheme", "fused into the preceding layer"),
    "another type": (described(SCALES, "W4A12_DYNAMIC", **V1), None, "unknown-scheme", "W4A16"),
    "FlatQuant without its matrix": (
        described((*SCALES, "clip_ratio"), "W4A4_FLATQUANT_DYNAMIC", **V1),
        scaled(int8(64, 256), (64, 1), clip_ratio=f32(1)),
        "missing-tensor",
        "left_trans",
    ),
    "a rotation that is not stored": (
        described(SCALES, "W8A8_DYNAMIC", **rotated("heads_rotation", LAYER)),
        scaled(int8(64, 256), (64, 1)),
        "missing-tensor",
        "heads_rotation",
    ),
    "a rotation that is not square": (
        described(SCALES, "W8A8_DYNAMIC", **rotated("heads_rotation", LAYER)),
        {**HEADS_TENSORS, f"{LAYER}.heads_rotation": f32(4, 5)},
        "wrong-shape",
        "[L, L] = [4, 4]",
    ),
    "a rotation that nothing lists": (
        described(SCALES, "W8A8_DYNAMIC", **V1),
        HEADS_TENSORS,
        "unexpected-tensor",
        "heads_rotation",
    ),
    "a rotated layer that is float": (
        described(("weight",), "FLOAT", **rotated("heads_rotation", LAYER)),
        stored(weight=Stored("BF16", (64, 256)), heads_rotation=f32(4, 4)),
        "unsupported-scheme",
        "without online rotation",
    ),
    "a rotated layer that is not there": (
        described(SCALES, "W8A8_DYNAMIC", **rotated("heads_rotation", "model.layers.0.self_attn.o_prj")),
        None,
        "undescribed-layer",
        "nearest: " + LAYER,
    ),
    "metadata of another kind": (
        described(SCALES, "W8A8_DYNAMIC", **V1, metadata={"quarot": {"heads_rotation": {"layers": 7}}}),
        None,
        "bad-config",
        "heads_rotation.layers",
    ),
    "a float weight called sparse": (
        described(("weight",), "W16A16S", **V1),
        stored(weight=int8(64, 256)),
        "wrong-dtype",
        "W16A16S",
    ),
    "half as many outputs": (
        described(SCALES, "W4A8_DYNAMIC", **V1),
        scaled(int8(16, 256), (64, 1)),
        "wrong-shape",
        "[N, G]",
    ),
    "groups that do not divide": (
        described(SCALES, "W4A16", **V1),
        scaled(int8(32, 256), (64, 6)),
        "",
        "",
    ),
    "an offset without its scale": (
        described(("weight", "weight_offset"), "W4A4_DYNAMIC", **V1),
        None,
        "missing-tensor",
        "weight_scale",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_descriptions_give_one_clear_error(name: str) -> None:
    description, tensors, code, text = BROKEN[name]
    found = errors(description, stored_for(description) if tensors is None else tensors)
    if not code:
        assert found == []  # 6 groups of 43 inputs, of which the last is short: odd, and possible
        return
    assert {finding.code for finding in found} == {code}
    assert any(text in finding.render() for finding in found)
    assert all(finding.fix for finding in found)
    assert any(LAYER[:-2] in finding.render() or code == "bad-config" for finding in found)


def test_a_refused_type_is_said_once_for_all_its_layers() -> None:
    types = {f"model.layers.{number}.mlp.up_proj.weight": "W4A4_MXFP4_FLATQUANT" for number in range(30)}
    types["model.layers.7.mlp.down_proj.weight"] = "NF4"
    first, second = read_with_headers({**types, **V1}).findings
    assert (first.code, first.layer) == ("unsupported-scheme", "model.layers.0.mlp.up_proj")
    assert first.found == "W4A4_MXFP4_FLATQUANT"
    assert first.message.endswith("(30 layers)")
    assert (second.layer, second.found) == ("model.layers.7.mlp.down_proj", "NF4")


def test_unfused_smoothing_is_found_behind_a_layer_with_the_same_tensors() -> None:
    found = read_with_headers({"a.smooth.mul_scale": "FLOAT", "b.div.mul_scale": "FLOAT", **V1})
    (finding,) = found.findings
    assert (finding.code, finding.layer, finding.found) == ("unsupported-scheme", "b.div", "b.div.mul_scale")


def test_the_support_matrix_has_a_sample_of_every_type() -> None:
    samples = {sample.label: sample for sample in FORMAT.samples()}
    assert list(samples) == [*TYPES, "W4A4_MXFP4_FLATQUANT", "W8A8SC"]
    for label, sample in samples.items():
        found = read(sample.config, sample.tensors)
        if label not in TYPES:
            assert {finding.code for finding in found.findings if finding.severity is Severity.ERROR} >= {
                "unsupported-scheme"
            }
            continue
        assert found.findings == ()
        entry = found.find(SAMPLE_LAYER)
        assert entry.spec.scheme == label
        assert check_layer(SAMPLE_LAYER, entry, sample.tensors, "description") == []
        if label == "W4A4_FLATQUANT_DYNAMIC":  # experts have no place for a transform
            assert entry.spec.transform == TransformSpec(16, 16, clip=True)
            assert found.find_experts(EXPERTS) is None
        else:
            assert found.find_experts(EXPERTS).gate == entry
    packed = {
        label: read(samples[label].config, samples[label].tensors).find(SAMPLE_LAYER).spec.layout for label in TYPES
    }
    assert packed["W4A16"] is Layout.MODELSLIM_PACKED_K
    assert packed["W4A8_DYNAMIC"] is Layout.MODELSLIM_PACKED_N
    assert packed["W4A4_DYNAMIC"] is Layout.MODELSLIM_INT


def test_schemes_come_from_the_type_strings_alone() -> None:
    types = {
        **{f"{LAYER}.{name}": "W8A8_DYNAMIC" for name in SCALES},
        **{f"m.experts.0.{part}.{name}": "W4A8_DYNAMIC" for part in ("w1", "w2", "w3") for name in SCALES},
        **{f"m.q_proj.{name}": "W4A4_FLATQUANT_DYNAMIC" for name in FLATQUANT},
        **{f"m.experts.{number}.w1.{name}": "W9A9" for number in range(1, 3) for name in SCALES},
        "m.shared_experts.w1.weight": "W4A16",
        "m.norm.weight": "FLOAT",
        "m.a.weight": "W8A8_MXFP8",
        "m.b.weight": "W9A9",
        "m.c.weight": "W16A16S",
        "m.d.div.mul_scale": "FLOAT",
    }
    assert vllm_ascend_schemes({**types, **V1}) == {
        ("W8A8_DYNAMIC", "linear"),
        ("W4A8_DYNAMIC", "moe"),
        ("W4A4_FLATQUANT_DYNAMIC", "linear"),
        ("W4A16", "linear"),
        ("W8A8_MXFP8", "linear"),
        ("W9A9", "linear"),
        ("W9A9", "moe"),
        ("W16A16S", "linear"),
        ("smoothing that is not fused", "linear"),
    }


EXPERT = "m.experts.0.w1"
FA_SCALE = {"m.self_attn.fa_v.scale": "FAQuant"}


@pytest.mark.parametrize(
    ("entries", "header", "expected"),
    [
        ({}, {"fa_quant_type": "FAKQuant"}, ("FAKQuant", "attention")),
        ({}, {"indexer_quant_type": "INT8_DYNAMIC"}, ("INT8_DYNAMIC", "attention")),
        ({}, {"kv_cache_type": "C8"}, ("C8", "attention")),
        ({"m.k_proj.kv_cache_scale": "C8"}, {}, ("C8 without kv_cache_type", "attention")),
        ({**FA_SCALE, "m.self_attn.quant_type": "QK_X_V_Y"}, {}, ("QK_X_V_Y", "attention")),
        (FA_SCALE, {}, ("scales without fa_quant_type", "attention")),
        (FA_SCALE, {"kv_cache_type": "X"}, ("X", "attention")),
        (
            {"m.indexer.q_rot": "FLOAT", "m.indexer.k_rot": "FLOAT"},
            {},
            ("rotations without indexer_quant_type", "attention"),
        ),
        ({"m.self_attn.quant_type": "INT8_DYNAMIC"}, {}, None),
        ({}, {"fa_quant_type": "FLOAT", "kv_cache_type": ""}, None),
        ({f"{EXPERT}.weight": "W4A16"}, {}, ("W4A16 without weight_packed", "moe")),
        ({f"{EXPERT}.weight_packed": "W4A16"}, {}, ("W4A16", "moe")),
        ({f"{EXPERT}.weight": "W4A8_DYNAMIC"}, {"group_size": 256}, ("W4A8_DYNAMIC per group", "moe")),
        (
            {f"{EXPERT}.weight": "W4A8_DYNAMIC", f"{EXPERT}.weight_scale_second": "W4A8_DYNAMIC"},
            {},
            ("W4A8_DYNAMIC per group", "moe"),
        ),
        ({"m.experts.gate_up_proj": "W8A8_DYNAMIC"}, {}, ("W8A8_DYNAMIC", "moe")),
        (
            {},
            {"metadata": {"quarot": {"heads_rotation": {"layers": ["m.o_proj"]}}}},
            ("inputs that are rotated at run time", "linear"),
        ),
        ({"m.a.weight": "W8A8\x1b[2J"}, {}, ("'W8A8\\x1b[2J'", "linear")),
    ],
)
def test_what_vllm_ascend_needs_a_class_for(
    entries: dict[str, str], header: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    always = {"m.o_proj.weight": "W8A8_DYNAMIC"}
    needed = vllm_ascend_schemes({**always, **entries, **V1, **header})
    assert needed == {("W8A8_DYNAMIC", "linear"), *([expected] if expected else [])}


@pytest.mark.parametrize(
    ("description", "expected"),
    [(V1, "msModelSlim, description 1.0.0"), ({}, "msModelSlim"), ({"version": 1}, "msModelSlim")],
)
def test_producer(description: dict[str, Any], expected: str) -> None:
    assert FORMAT.producer(description) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "modelslim"}, True),
        ({"quant_method": "ASCEND"}, True),
        ({"a.q_proj.weight": "W8A8"}, True),
        ({"version": "1.0.0"}, False),
        ({"quant_method": "awq", "a.q_proj.weight": "W8A8"}, False),
        ({}, False),
    ],
)
def test_an_embedded_description_is_claimed(config: dict[str, Any], expected: bool) -> None:
    assert FORMAT.serves(config) is expected


def test_several_descriptions_contradict_each_other() -> None:
    assert FORMAT.file_beside(["config.json", "model.safetensors"]) is None
    assert (
        FORMAT.file_beside(["config.json", "quant_model_description_w8a8.json"]) == "quant_model_description_w8a8.json"
    )
    with pytest.raises(NpuQuantError) as caught:
        FORMAT.file_beside(["quant_model_description_w8a8.json", "quant_model_description.json"])
    (finding,) = caught.value.findings
    assert finding.code == "contradictory-evidence"
    assert finding.found == "quant_model_description.json, quant_model_description_w8a8.json"


def description_of(folder: Path) -> dict[str, Any]:
    return json.loads(next(path for path in folder.iterdir() if is_description_file(path.name)).read_text())


#: Every dense ModelSlim checkpoint of the set: the layouts of its quantized layers.
REAL = {
    "msmodelslim-qwen3-v0-w4a16-asym": {Layout.MODELSLIM_PACKED_K},
    "msmodelslim-qwen3-v0-w4a16-g64": {Layout.MODELSLIM_PACKED_N},
    "msmodelslim-qwen3-v0-w4a16-old": {Layout.MODELSLIM_INT},
    "msmodelslim-qwen3-v0-w4a8-g64": {Layout.MODELSLIM_TWO_LEVEL_PACKED},
    "msmodelslim-qwen3-v0-w4a8-g64-old": {Layout.MODELSLIM_TWO_LEVEL},
    "msmodelslim-qwen3-v0-w8a8s": {Layout.MODELSLIM_STATIC},
    "msmodelslim-qwen3-w4a4-dynamic": {Layout.MODELSLIM_INT},
    "msmodelslim-qwen3-w4a4-flatquant": {Layout.MODELSLIM_INT},
    "msmodelslim-qwen3-w4a4-laos": {Layout.MODELSLIM_INT},
    "msmodelslim-qwen3-w4a8-dynamic": {Layout.MODELSLIM_PACKED_N},
    "msmodelslim-qwen3-w8a8c8": {Layout.MODELSLIM_STATIC},
    "msmodelslim-qwen3-wfp8afp8": {Layout.FP8},
    "msmodelslim-qwen3fp32-w8a16-g128": {Layout.MODELSLIM_INT},
    "msmodelslim-qwen3-w8a8-mxfp8": {Layout.MXFP8},
    "msmodelslim-qwen3-w4a4-mxfp4": {Layout.MXFP4},
}


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name: str) -> None:
    try:
        folder = fixture(name)
    except KeyError:
        folder = shared(name)
    checkpoint = Checkpoint.open(folder)
    found = read(description_of(folder), checkpoint.tensors)
    codes = {finding.code for finding in found.findings if finding.severity is Severity.ERROR}
    expected = REAL[name]
    assert codes == set()
    assert [finding for finding in check_checkpoint(found, checkpoint) if finding.severity is Severity.ERROR] == []
    quantized = {entry.spec for entry in found.layers.values() if not entry.spec.is_float}
    assert {spec.layout for spec in quantized} == expected
    assert all(decide(LayerKind.LINEAR, spec, Host()).row is not None for spec in quantized)
