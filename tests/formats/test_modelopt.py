# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's configs in both spellings, MiniMax's, and the layers by their stored tensors."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.declaration import find_format
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.detect import detect_files
from vllm_npu_quant.formats.modelopt import FORMAT, read
from vllm_npu_quant.formats.samples import EXPERTS, LAYER
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.spec import Granularity, LayerKind, Layout

UP = "model.layers.0.mlp.up_proj"

#: As ModelOpt 0.37 writes it into config.json.
NVFP4 = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.37.0"},
    "quant_method": "modelopt",
}


def legacy(algorithm: str, **fields: Any) -> dict[str, Any]:
    """hf_quant_config.json of ModelOpt 0.29."""
    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **fields}
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}


def layer(name: str, weight: tuple[str, tuple[int, ...]], **others: tuple[str, tuple[int, ...]]) -> dict[str, Any]:
    named = {"weight": weight, **others}
    return {
        f"{name}.{last}": SimpleNamespace(dtype=dtype, shape=shape, file="model.safetensors")
        for last, (dtype, shape) in named.items()
    }


FP4 = ("U8", (200, 128))
E4M3 = ("F8_E4M3", (200, 256))
SCALAR = ("F32", ())
NV = {"weight_scale": ("F8_E4M3", (200, 16)), "weight_scale_2": SCALAR}


def errors(described: Described) -> list[Any]:
    return [finding for finding in described.findings if finding.severity is Severity.ERROR]


def check(described: Described, tensors: dict[str, Any]) -> list[Any]:
    return check_checkpoint(described, SimpleNamespace(tensors=tensors, findings=()))


#: Config, the layer's tensors, its scheme and layout, and how it is served.
STORED: dict[str, tuple[dict[str, Any], dict[str, Any], str, Layout, str]] = {
    "NVFP4": (NVFP4, layer(UP, FP4, **NV, input_scale=SCALAR), "NVFP4_W4A4", Layout.NVFP4, "W8A8_DYNAMIC"),
    "NVFP4, legacy": (
        legacy("NVFP4", group_size=16),
        layer(UP, FP4, **NV, input_scale=SCALAR),
        "NVFP4_W4A4",
        Layout.NVFP4,
        "W8A8_DYNAMIC",
    ),
    "NVFP4 in lower case": (
        {**NVFP4, "quant_algo": "nvfp4"},
        layer(UP, FP4, **NV, input_scale=SCALAR),
        "NVFP4_W4A4",
        Layout.NVFP4,
        "W8A8_DYNAMIC",
    ),
    "NVFP4 of weights only, under NVFP4's name": (NVFP4, layer(UP, FP4, **NV), "NVFP4_W4A16", Layout.NVFP4, "W8A16"),
    "NVFP4 of weights only": (
        {**NVFP4, "quant_algo": "W4A16_NVFP4"},
        layer(UP, FP4, **NV, input_scale=SCALAR),
        "NVFP4_W4A16",
        Layout.NVFP4,
        "W8A16",
    ),
    "NVFP4 with FP8 inputs": (
        {**NVFP4, "quant_algo": "W4A8_NVFP4_FP8"},
        layer(UP, FP4, **NV, input_scale=SCALAR),
        "NVFP4_W4A8",
        Layout.NVFP4,
        "W8A8_DYNAMIC",
    ),
    "MXFP8": (
        {**NVFP4, "quant_algo": "MXFP8"},
        layer(UP, E4M3, weight_scale=("U8", (200, 8))),
        "MXFP8_W8A8",
        Layout.MXFP8,
        "W8A8_DYNAMIC",
    ),
    "MXFP8 of MiniMax": (
        {"quant_method": "mxfp8", "ignored_layers": ["lm_head"], "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        layer(UP, E4M3, weight_scale_inv=("U8", (200, 8))),
        "MXFP8_W8A8",
        Layout.MXFP8_INV,
        "W8A8_DYNAMIC",
    ),
    "MXFP4": (
        {**NVFP4, "quant_algo": "MXFP4"},
        layer(UP, FP4, weight_scale=("U8", (200, 8))),
        "MXFP4_W4A4",
        Layout.MXFP4,
        "W8A8_DYNAMIC",
    ),
    "MXFP4 with FP8 inputs": (
        {**NVFP4, "quant_algo": "W4A8_MXFP4_FP8"},
        layer(UP, FP4, weight_scale=("F8_E8M0", (200, 8))),
        "MXFP4_W4A8",
        Layout.MXFP4,
        "W8A8_DYNAMIC",
    ),
    "FP8": (
        legacy("FP8"),
        layer(UP, E4M3, weight_scale=SCALAR, input_scale=SCALAR),
        "FP8_STATIC",
        Layout.FP8,
        "W8A8_DYNAMIC",
    ),
    "FP8 per channel": (
        {**NVFP4, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        layer(UP, E4M3, weight_scale=("F32", (200,))),
        "FP8_CHANNEL_DYNAMIC",
        Layout.FP8,
        "W8A8_DYNAMIC",
    ),
    "FP8 in blocks": (
        legacy("fp8_pb_wo"),
        layer(UP, E4M3, weight_scale=("F32", (2, 1, 2, 1))),
        "FP8_BLOCK_DYNAMIC",
        Layout.FP8_BLOCK_4D,
        "W8A8_DYNAMIC",
    ),
    "FP8 in blocks, with two dimensions": (
        legacy("FP8_PB_WO"),
        layer(UP, E4M3, weight_scale=("F32", (2, 2))),
        "FP8_BLOCK_DYNAMIC",
        Layout.FP8,
        "W8A8_DYNAMIC",
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_layers_are_what_their_tensors_say(name: str) -> None:
    config, tensors, scheme, layout, served = STORED[name]
    tensors = tensors | layer("lm_head", ("BF16", (512, 256)))
    described = read(config, tensors)
    assert described.findings == ()
    assert check(described, tensors) == []
    spec = described.find(UP).spec
    assert (spec.scheme, spec.layout) == (scheme, layout)
    assert described.find("lm_head").spec.is_float
    result = decide(LayerKind.LINEAR, spec, Host())
    assert result.require_row() is not None
    assert result.spec.scheme == f"{scheme} as {served}"
    assert pickle.loads(pickle.dumps(described)) == described


def test_a_mixed_checkpoint_names_algorithms_of_layers_and_of_modules() -> None:
    config = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "model.layers.0.self_attn.o_proj": {"quant_algo": "MXFP8"},
            "model.layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        },
    }
    projections = [f"model.layers.0.mlp.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    tensors = layer("model.layers.0.self_attn.o_proj", E4M3, weight_scale=("U8", (200, 8)))
    tensors |= layer("model.layers.0.self_attn.q_proj", E4M3, weight_scale=SCALAR)  # not listed: by its tensors
    tensors |= layer("model.layers.0.mlp.gate", ("BF16", (8, 256)))
    for name in projections:
        tensors |= layer(name, FP4, **NV, input_scale=SCALAR)
    described = read(config, tensors)
    assert described.findings == ()
    assert check(described, tensors) == []
    assert described.find("model.layers.0.self_attn.o_proj").spec.scheme == "MXFP8_W8A8"
    assert described.find("model.layers.0.self_attn.q_proj").spec.scheme == "FP8_DYNAMIC"
    assert described.find_experts("model.layers.0.mlp.experts").gate.spec.scheme == "NVFP4_W4A16"


@pytest.mark.parametrize(
    ("rule", "excluded"),
    [
        (UP, True),
        ("model.layers.0.mlp*", True),
        ("model.layers.0.*", True),
        ("*up_proj", True),
        ("model.layers.?.mlp.up_proj", True),
        ("model.layers.0", True),
        ("model.layers.1*", False),
        ("layers.0.mlp*", False),
        ("model?layers?0?mlp?u", False),
        ("model.layers.(0).mlp.*", False),
    ],
)
def test_wildcards_exclude_layers(rule: str, excluded: bool) -> None:
    """Float layers that no rule covers are told; a quantized one that a wildcard excludes is an error."""
    config = {**NVFP4, "ignore": [rule]}
    described = read(config, layer(UP, ("BF16", (200, 256))))
    assert [finding.code for finding in described.findings] == ([] if excluded else ["undescribed-layer"])
    found = errors(read(config, layer(UP, FP4, **NV)))
    exact = excluded and rule != "model.layers.0"
    assert [(finding.code, finding.layer) for finding in found] == ([("bad-config", UP)] if exact else [])


def test_scales_of_a_kv_cache_are_told_and_dropped() -> None:
    attention = "model.layers.0.self_attn.k_proj"
    tensors = layer(attention, FP4, **NV, input_scale=SCALAR, k_scale=SCALAR)
    described = read({**NVFP4, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, tensors)
    assert [finding.code for finding in described.findings] == ["kv-cache-not-quantized"]
    assert "k_scale" in described.dropped
    assert check(described, tensors) == []
    described = read(legacy("NVFP4", kv_cache_quant_algo="FP8"), layer(UP, FP4, **NV))
    assert [(finding.code, finding.found) for finding in described.findings] == [("kv-cache-not-quantized", "FP8")]


#: Config, tensors, code, what the message says.
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "AWQ": ({**NVFP4, "quant_algo": "W4A16_AWQ"}, layer(UP, FP4, **NV), "unsupported-scheme", "algorithm of ModelOpt"),
    "SmoothQuant": (legacy("INT8_SQ"), {}, "unsupported-scheme", "algorithm of ModelOpt"),
    "an unknown one of one layer": (
        {**NVFP4, "quant_algo": "MIXED_PRECISION", "quantized_layers": {UP: {"quant_algo": "NVFP3"}}},
        layer(UP, FP4, **NV),
        "unsupported-scheme",
        "algorithm of ModelOpt",
    ),
    "smoothing that is not fused": (
        NVFP4,
        layer(UP, FP4, **NV, pre_quant_scale=("BF16", (256,))),
        "unexpected-tensor",
        "pre_quant_scale",
    ),
    "another kind of floats": (
        NVFP4,
        layer(UP, E4M3, weight_scale=SCALAR),
        "bad-config",
        "the config says NVFP4, and the layer is stored as FP8",
    ),
    "no second scale": (
        NVFP4,
        layer(UP, FP4, weight_scale=("F8_E4M3", (200, 16))),
        "missing-tensor",
        "weight_scale_2",
    ),
    "no scale": (NVFP4, layer(UP, FP4), "missing-tensor", "weight_scale"),
    "scales of other groups": (
        NVFP4,
        layer(UP, FP4, weight_scale=("F8_E4M3", (200, 8)), weight_scale_2=SCALAR),
        "wrong-shape",
        "weight_scale",
    ),
    "integers": (NVFP4, layer(UP, ("I8", (200, 128)), **NV), "wrong-dtype", "weight has a dtype"),
    "a list for an object": (legacy("NVFP4") | {"quantization": []}, {}, "bad-config", "quantization is an object"),
    "odd groups": ({**NVFP4, "group_size": 15}, {}, "bad-config", "multiple of 2"),
    "rules that are numbers": ({**NVFP4, "ignore": [1]}, {}, "bad-config", "valid string"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(name: str) -> None:
    config, tensors, code, text = BROKEN[name]
    described = read(config, tensors)
    found = [*errors(described), *check(described, tensors)]
    assert {finding.code for finding in found} == {code}
    assert any(text in finding.message for finding in found)
    assert all(finding.fix for finding in found)
    assert all(finding.file for finding in found)


def test_unknown_fields_are_told() -> None:
    (finding,) = read({**NVFP4, "rotation": {"kind": "hadamard"}}, layer(UP, FP4, **NV)).findings
    assert (finding.code, finding.severity, finding.found) == ("bad-config", Severity.WARNING, "rotation")


def test_samples_are_what_they_say() -> None:
    samples = list(FORMAT.samples())
    labels = ["NVFP4", "NVFP4 weights", "MXFP8", "MXFP4", "FP8", "FP8 per channel", "FP8 block"]
    assert [sample.label for sample in samples] == labels
    for sample in samples:
        described = read(sample.config, sample.tensors)
        assert described.findings == (), sample.label
        assert not check(described, dict(sample.tensors)), sample.label
        entry = described.find(LAYER)
        assert entry.spec.scheme.startswith(sample.label.split()[0])
        assert ("block" in sample.label) == (entry.spec.weight.granularity is Granularity.BLOCK)
        assert described.find_experts(EXPERTS).gate == entry


@pytest.mark.parametrize(
    ("config", "serves"),
    [
        ({"quant_method": "modelopt"}, True),
        ({"quant_method": "modelopt_fp4"}, True),
        ({"quant_method": "MXFP8"}, True),
        (legacy("NVFP4"), True),
        ({"producer": {"name": "modelopt"}, "quant_method": "fp8"}, False),
        ({"producer": "modelopt"}, False),
        ({"quant_method": "mxfp4"}, False),
        ({}, False),
    ],
)
def test_the_declaration_serves_both_spellings(config: dict[str, Any], serves: bool) -> None:
    assert FORMAT.serves(config) is serves


def test_the_old_file_is_found_and_vllm_needs_no_word() -> None:
    files = {"config.json": {"model_type": "llama"}, "hf_quant_config.json": legacy("NVFP4")}
    found = detect_files(files, files.__getitem__)
    assert (find_format(found.format), found.file, found.asks) == (FORMAT, "hf_quant_config.json", False)
    files["config.json"] = {"quantization_config": NVFP4}
    assert detect_files(files, files.__getitem__).file == "config.json"


def test_the_producer_is_named() -> None:
    assert FORMAT.producer(NVFP4) == "modelopt 0.37.0"
    assert FORMAT.producer(legacy("FP8")) == "modelopt 0.29.0"
    assert FORMAT.producer({"producer": ["x"]}) == ""
