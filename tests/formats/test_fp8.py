# SPDX-License-Identifier: Apache-2.0
"""FP8 configs and layers: every spelling, what the scale's shape tells, and the one line about the conversion."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_npu_quant import settings
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.fp8 import Fp8Config, Fp8Format
from vllm_npu_quant.formats.resolve import LayerResolver
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.spec import Granularity, LayerKind, Layout

DEEPSEEK = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
MISTRAL = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
UP = "model.layers.0.mlp.up_proj"


def tensor(dtype: str, *shape: int) -> Any:
    return SimpleNamespace(dtype=dtype, shape=shape, file="model.safetensors")


def layer(name: str, scale: tuple[int, ...], suffix: str = "weight_scale", **others: Any) -> dict[str, Any]:
    """An FP8 layer of 200 x 320 and its scale."""
    named = {"weight": tensor("F8_E4M3", 200, 320), suffix: tensor("F32", *scale), **others}
    return {f"{name}.{last}": value for last, value in named.items()}


def floats(name: str, *shape: int) -> dict[str, Any]:
    return {f"{name}.weight": tensor("BF16", *shape)}


def parse(config: dict[str, Any], tensors: dict[str, Any] | None = None) -> Fp8Format:
    return Fp8Format.from_config(config, tensors=tensors)


def errors(described: Fp8Format) -> list[Any]:
    return [finding for finding in described.findings if finding.severity is Severity.ERROR]


def check(described: Fp8Format, tensors: dict[str, Any]) -> list[Any]:
    return check_checkpoint(described, SimpleNamespace(tensors=tensors, findings=()))


SPELLINGS = {
    "deepseek": (
        DEEPSEEK,
        layer(UP, (2, 3), "weight_scale_inv"),
        "FP8_BLOCK_DYNAMIC",
        Layout.FP8_INV,
        Granularity.BLOCK,
    ),
    "auto_fp8": (
        AUTO_FP8,
        layer(UP, (), input_scale=tensor("F32")),
        "FP8_STATIC",
        Layout.FP8,
        Granularity.TENSOR,
    ),
    "per tensor, dynamic": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        layer(UP, (1,)),
        "FP8_DYNAMIC",
        Layout.FP8,
        Granularity.TENSOR,
    ),
    "per channel": (
        {"quant_method": "fp8"},
        layer(UP, (200, 1)),
        "FP8_CHANNEL_DYNAMIC",
        Layout.FP8,
        Granularity.CHANNEL,
    ),
    "per channel, one dimension": (
        {"quant_method": "fp8"},
        layer(UP, (200,)),
        "FP8_CHANNEL_DYNAMIC",
        Layout.FP8,
        Granularity.CHANNEL,
    ),
    "mistral": (
        MISTRAL,
        layer(UP, (), "weight_scale_inv", activation_scale=tensor("BF16")),
        "FP8_STATIC",
        Layout.FP8_INV,
        Granularity.TENSOR,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    config, tensors, scheme, layout, granularity = SPELLINGS[name]
    described = parse(config, tensors)
    assert not errors(described)
    assert not check(described, tensors)
    spec = described.find(UP).spec
    assert spec.scheme == f"{scheme} as W8A8_DYNAMIC"
    assert spec.layout is layout
    assert spec.stored is not None
    assert spec.stored.granularity is granularity
    assert (spec.stored.block_rows, spec.stored.group_size) == (
        (128, 128) if granularity is Granularity.BLOCK else (0, 0)
    )
    row = dispatch.find_row(LayerKind.LINEAR, spec)
    assert row is not None
    assert row.method_name == "W8A8DynamicLinear"


def test_the_conversion_is_said_once() -> None:
    tensors: dict[str, Any] = {}
    for number in range(40):
        tensors |= layer(f"model.layers.{number}.mlp.up_proj", (2, 3), "weight_scale_inv")
    (finding,) = parse(DEEPSEEK, tensors).findings
    assert (finding.code, finding.severity) == ("requantized", Severity.INFO)
    assert finding.found == "FP8_BLOCK_DYNAMIC: 40 layers"
    assert "VLLM_NPU_QUANT_FP8=bf16" in finding.fix
    assert "static" not in finding.message
    (static,) = parse(AUTO_FP8, layer(UP, (), input_scale=tensor("F32"))).findings
    assert "static input scales are dropped" in static.message


@pytest.mark.parametrize("value", ["", "int8", " INT8 ", "bf16"])
def test_the_setting(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_FP8", value)
    described = parse(DEEPSEEK, layer(UP, (2, 3), "weight_scale_inv"))
    spec = described.find(UP).spec
    assert spec.scheme.endswith("as float" if value == "bf16" else "as W8A8_DYNAMIC")
    row = dispatch.find_row(LayerKind.LINEAR, spec)
    assert row is not None
    assert row.method_name == ("DequantizedLinear" if value == "bf16" else "W8A8DynamicLinear")
    assert ("doubles their memory" in described.findings[0].message) == (value == "bf16")


def test_an_unknown_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_FP8", "fp8")
    with pytest.raises(ValueError, match="VLLM_NPU_QUANT_FP8 must be int8 or bf16, not 'fp8'"):
        settings.fp8_mode()
    (finding,) = errors(parse(DEEPSEEK))
    assert (finding.code, finding.expected) == ("bad-config", "int8 or bf16")
    assert "VLLM_NPU_QUANT_FP8" in finding.fix


def test_what_is_stored_as_float_runs_as_float() -> None:
    """DeepSeek's config does not say that routers and the head are float."""
    tensors = (
        layer(UP, (2, 3), "weight_scale_inv")
        | floats("lm_head", 512, 320)
        | floats("model.embed_tokens", 512, 320)
        | floats("model.norm", 320)
        | floats("model.layers.3.mlp.gate", 8, 320)
    )
    described = parse(DEEPSEEK, tensors)
    silent = next(finding for finding in described.findings if finding.code == "undescribed-layer")
    assert silent.severity is Severity.INFO
    assert silent.found == "lm_head, model.layers.3.mlp.gate"
    for name in ("lm_head", "model.embed_tokens", "model.norm", "model.layers.3.mlp.gate"):
        assert described.find(name).spec.is_float


def test_layers_that_the_config_excludes_need_no_line() -> None:
    config = {**DEEPSEEK, "modules_to_not_convert": ["lm_head", "gate", "model.visual", "shared"]}
    tensors = (
        layer(UP, (2, 3), "weight_scale_inv")
        | floats("lm_head", 512, 320)
        | floats("model.layers.3.mlp.gate", 8, 320)
        | floats("model.visual.blocks.0.qkv", 8, 320)
        | floats("model.layers.3.shared.fc", 8, 320)
    )
    assert [finding.code for finding in parse(config, tensors).findings] == ["requantized"]


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize("rule", [UP, "re:.*up_proj"])
def test_an_excluded_layer_that_is_stored_quantized_is_an_error(key: str, rule: str) -> None:
    (finding,) = errors(parse({**DEEPSEEK, key: [rule]}, layer(UP, (2, 3), "weight_scale_inv")))
    assert (finding.code, finding.layer) == ("bad-config", UP)
    assert "calls the layer float" in finding.message
    assert key in finding.fix or "modules_to_not_convert" in finding.fix


def test_without_headers_the_config_decides() -> None:
    described = parse({**DEEPSEEK, "modules_to_not_convert": ["model.layers.0.mlp.down_proj"]})
    assert [finding.code for finding in described.findings] == ["requantized"]
    resolver = LayerResolver(described, {})
    fused = resolver.resolve("model.layers.0.mlp.gate_up_proj")
    assert fused.spec.layout is Layout.FP8_INV
    assert fused.shards == ("model.layers.0.mlp.gate_proj", UP)
    assert resolver.resolve("model.layers.0.mlp.down_proj").spec.is_float
    assert resolver.resolve("lm_head").spec.is_float
    assert resolver.resolve("model.layers.3.mlp.gate").spec.is_float
    assert not resolver.describes("model.embed_tokens")
    assert resolver.resolve_experts("model.layers.3.mlp.experts").w2.spec == fused.spec
    assert pickle.loads(pickle.dumps(described)).find(UP).spec == fused.spec
    static = parse(AUTO_FP8).find(UP)
    assert (static.spec.layout, static.tensors) == (Layout.FP8, frozenset({"input_scale"}))


def test_kv_cache_scales_are_dropped_with_a_finding() -> None:
    tensors = layer(UP, (2, 3), "weight_scale_inv") | {
        "model.layers.0.self_attn.k_scale": tensor("F32", 1),
        "model.layers.0.self_attn.v_scale": tensor("F32", 1),
    }
    described = parse(DEEPSEEK, tensors)
    assert [finding.code for finding in described.findings] == ["kv-cache-not-quantized", "requantized"]
    assert {"k_scale", "v_scale"} <= set(described.dropped_tensors())
    assert parse(DEEPSEEK, layer(UP, (2, 3), "weight_scale_inv")).dropped_tensors() == ()
    old = layer("model.layers.0.self_attn.k_proj", (), output_scale=tensor("F32", 1))
    described = parse({"quant_method": "fp8"}, old)
    assert not errors(described)
    assert "output_scale" in described.dropped_tensors()


def test_a_tensor_that_nothing_knows_is_named() -> None:
    (finding,) = errors(parse(DEEPSEEK, layer(UP, (2, 3), "weight_scale_inv", smooth=tensor("F32", 320))))
    assert (finding.code, finding.layer, finding.found) == ("unexpected-tensor", UP, "smooth")


FILES = {
    "no scale": ({"weight_scale_inv": None}, "missing-tensor", "weight_scale"),
    "blocks of another size": ({"weight_scale_inv": tensor("F32", 4, 5)}, "wrong-shape", "[2, 3]"),
    "another 8-bit float": ({"weight": tensor("F8_E5M2", 200, 320)}, "wrong-dtype", "F8_E4M3"),
    "a scale of integers": ({"weight_scale_inv": tensor("I32", 2, 3)}, "wrong-dtype", "F32"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit_are_named(case: str) -> None:
    changed, code, expected = FILES[case]
    tensors = layer(UP, (2, 3), "weight_scale_inv") | floats("lm_head", 512, 320)
    for name, value in changed.items():
        tensors.pop(f"{UP}.{name}")
        if value is not None:
            tensors[f"{UP}.{name}"] = value
    found = check(parse(DEEPSEEK, tensors), tensors)
    assert [finding.code for finding in found] == [code]
    assert expected in found[0].expected
    assert found[0].layer == UP
    assert found[0].fix


def test_power_of_two_scales_are_taken() -> None:
    tensors = layer(UP, (2, 3), "weight_scale_inv")
    tensors[f"{UP}.weight_scale_inv"] = tensor("F8_E8M0", 2, 3)
    assert not check(parse(DEEPSEEK, tensors), tensors)


BROKEN = {
    "blocks of one size": ({**DEEPSEEK, "weight_block_size": [128]}, "bad-config", "weight_block_size"),
    "blocks of nothing": ({**DEEPSEEK, "weight_block_size": [128, 0]}, "bad-config", "weight_block_size"),
    "blocks of text": ({**DEEPSEEK, "weight_block_size": ["128", "128"]}, "bad-config", "weight_block_size"),
    "an unknown activation scheme": ({**DEEPSEEK, "activation_scheme": "sometimes"}, "bad-config", "activation_scheme"),
    "a list of numbers": ({**DEEPSEEK, "modules_to_not_convert": [1]}, "bad-config", "modules_to_not_convert"),
    "a string for a list": ({**DEEPSEEK, "ignored_layers": "lm_head"}, "bad-config", "ignored_layers"),
    "too many rules": ({**DEEPSEEK, "ignored_layers": ["x"] * 200_001}, "bad-config", "ignored_layers"),
    "E5M2": ({**DEEPSEEK, "fmt": "e5m2"}, "unsupported-scheme", "fmt: e4m3"),
    "mixed MXFP4": ({**DEEPSEEK, "store_dtype": "mxfp4"}, "unsupported-scheme", "store_dtype"),
    "quantize while loading": (
        {"quant_method": "fp8", "is_checkpoint_fp8_serialized": False},
        "unsupported-scheme",
        "stored as FP8",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_configs_are_refused(case: str) -> None:
    config, code, expected = BROKEN[case]
    found = errors(parse(config))
    assert {finding.code for finding in found} == {code}
    assert expected in found[0].expected
    assert found[0].fix
    assert found[0].file == "config.json"


def test_the_fields_that_auto_round_adds_are_known() -> None:
    added = {"bits": 8, "data_type": "fp", "group_size": [128, 128], "sym": True, "act_bits": 8, "act_data_type": "fp"}
    added |= {
        "act_dynamic": True,
        "act_sym": True,
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.layers",
    }
    codes = [finding.code for finding in Fp8Format.from_config({**DEEPSEEK, **added}).findings]
    assert codes == [finding.code for finding in Fp8Format.from_config(DEEPSEEK).findings]
    assert "bad-config" in [f.code for f in Fp8Format.from_config({**DEEPSEEK, **added, "bits": 4}).findings]


def test_unknown_fields_are_reported_and_ignored() -> None:
    described = parse({**DEEPSEEK, "rotation": {"kind": "hadamard"}, "empty": []})
    warning = next(finding for finding in described.findings if finding.severity is Severity.WARNING)
    assert warning.found == "rotation"
    assert not errors(described)
    assert Fp8Config.model_validate(DEEPSEEK).weight_block_size == (128, 128)


def test_deepseek_r1_stays_small_and_fast() -> None:
    tensors: dict[str, Any] = {}
    for number in range(61):
        for name in ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj"):
            tensors |= layer(f"model.layers.{number}.{name}", (2, 3), "weight_scale_inv")
        tensors |= floats(f"model.layers.{number}.mlp.gate", 256, 320)
        for expert in range(256):
            for name in ("gate_proj", "up_proj", "down_proj"):
                tensors |= layer(f"model.layers.{number}.mlp.experts.{expert}.{name}", (2, 3), "weight_scale_inv")
    start = time.perf_counter()
    described = parse(DEEPSEEK, tensors)
    assert time.perf_counter() - start < 20
    assert not errors(described)
    assert len(pickle.dumps(described)) < 1 << 20
    assert {experts.count for experts in described.index.experts.values()} == {256}
