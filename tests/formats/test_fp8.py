# SPDX-License-Identifier: Apache-2.0
"""FP8 configs and layers: every spelling, the granularity from the scale's shape, and what the layers become."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.fp8 import FORMAT, Fp8Config, read
from vllm_npu_quant.formats.resolve import LayerResolver
from vllm_npu_quant.formats.samples import EXPERTS, LAYER
from vllm_npu_quant.serving.decide import Host, decide, requantized_findings
from vllm_npu_quant.spec import Granularity, LayerKind, Layout, NumberKind

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


def errors(described: Described) -> list[Any]:
    return [finding for finding in described.findings if finding.severity is Severity.ERROR]


def check(described: Described, tensors: dict[str, Any]) -> list[Any]:
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
    described = read(config, tensors)
    assert not errors(described)
    assert not check(described, tensors)
    spec = described.find(UP).spec
    assert spec.scheme == scheme
    assert spec.layout is layout
    assert (spec.weight.bits, spec.weight.kind, spec.weight.granularity) == (8, NumberKind.FLOAT, granularity)
    assert (spec.weight.block_rows, spec.weight.group_size) == (
        (128, 128) if granularity is Granularity.BLOCK else (0, 0)
    )
    assert (spec.activation.kind, spec.activation.dynamic) == (NumberKind.FLOAT, not scheme.endswith("STATIC"))
    served = decide(LayerKind.LINEAR, spec, Host())
    assert served.require_row().method_name == "W8A8DynamicLinear"
    assert served.spec.scheme == f"{scheme} as W8A8_DYNAMIC"


def requantized(described: Described, host: Host) -> list[Any]:
    return requantized_findings(((entry.spec, 1) for _, entry in described.stored_layers()), host, described.source)


def test_the_conversion_is_said_once() -> None:
    tensors: dict[str, Any] = {}
    for number in range(40):
        tensors |= layer(f"model.layers.{number}.mlp.up_proj", (2, 3), "weight_scale_inv")
    described = read(DEEPSEEK, tensors)
    assert described.findings == ()
    (finding,) = requantized(described, Host())
    assert (finding.code, finding.severity) == ("requantized", Severity.INFO)
    assert finding.found == "FP8_BLOCK_DYNAMIC: 40 layers"
    assert "VLLM_NPU_QUANT_FLOAT_WEIGHTS=bf16" in finding.fix
    assert "static" not in finding.message
    (static,) = requantized(read(AUTO_FP8, layer(UP, (), input_scale=tensor("F32"))), Host())
    assert "static input scales are dropped" in static.message


@pytest.mark.parametrize(
    ("mode", "scheme", "method"),
    [
        ("int8", "as W8A8_DYNAMIC", "W8A8DynamicLinear"),
        ("w8a16", "as W8A16", "WeightOnlyLinear"),
        ("bf16", "as float", "DequantizedLinear"),
    ],
)
def test_the_setting_decides_what_is_served_and_not_what_is_read(
    mode: str, scheme: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = layer(UP, (2, 3), "weight_scale_inv")
    described = read(DEEPSEEK, tensors)
    served = decide(LayerKind.LINEAR, described.find(UP).spec, Host(float_weights=mode))
    assert served.spec.scheme == f"FP8_BLOCK_DYNAMIC {scheme}"
    assert served.require_row().method_name == method
    (finding,) = requantized(described, Host(float_weights=mode))
    assert ("two bytes per weight" in finding.message) == (mode == "bf16")
    assert ("activations stay in the model's dtype" in finding.message) == (mode == "w8a16")
    monkeypatch.setenv("VLLM_NPU_QUANT_FP8", mode)
    assert read(DEEPSEEK, tensors) == described


def test_what_is_stored_as_float_runs_as_float() -> None:
    """DeepSeek's config does not say that routers and the head are float."""
    tensors = (
        layer(UP, (2, 3), "weight_scale_inv")
        | floats("lm_head", 512, 320)
        | floats("model.embed_tokens", 512, 320)
        | floats("model.norm", 320)
        | floats("model.layers.3.mlp.gate", 8, 320)
    )
    described = read(DEEPSEEK, tensors)
    silent = next(finding for finding in described.findings if finding.code == "undescribed-layer")
    assert silent.severity is Severity.INFO
    assert silent.found == "lm_head, model.layers.3.mlp.gate"
    assert described.stored_as_float == {"lm_head", "model.layers.3.mlp.gate"}
    for name in ("lm_head", "model.embed_tokens", "model.norm", "model.layers.3.mlp.gate"):
        assert described.find(name).spec.is_float


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize(
    "rule",
    [
        "model.visual.blocks.0.qkv",
        "qkv",
        "visual",
        "model.visual",
        "blocks.0",
        "re:.*qkv",
        "re:model.visual",
        "re:.*l.b",
    ],
)
def test_layers_that_the_config_excludes_need_no_line(key: str, rule: str) -> None:
    tensors = layer(UP, (2, 3), "weight_scale_inv") | floats("model.visual.blocks.0.qkv", 8, 320)
    described = read({**DEEPSEEK, key: [rule]}, tensors)
    assert described.findings == ()
    assert described.stored_as_float == frozenset()
    assert described.find("model.visual.blocks.0.qkv").spec.is_float


@pytest.mark.parametrize(
    "rule", ["kv", "model.vis", "visual.0", "blocks.0.q", "s.0", "model.visual.blocks.0.qkv.a", "", ".", "re:visual"]
)
def test_rules_are_of_whole_components(rule: str) -> None:
    tensors = layer(UP, (2, 3), "weight_scale_inv") | floats("model.visual.blocks.0.qkv", 8, 320)
    described = read({**DEEPSEEK, "ignored_layers": [rule]}, tensors)
    assert [finding.code for finding in described.findings] == ["undescribed-layer"]
    assert described.stored_as_float == {"model.visual.blocks.0.qkv"}


names = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=6).map(".".join)


@given(names, st.lists(names, max_size=4))
def test_a_rule_means_a_run_of_components(name: str, rules: list[str]) -> None:
    described = read({**DEEPSEEK, "ignored_layers": rules}, floats(name, 8, 320))
    assert (name in described.stored_as_float) == (not any(f".{rule}." in f".{name}." for rule in rules))


def test_the_number_of_rules_does_not_multiply_the_layers() -> None:
    """At the limit of rules, comparing every rule with every layer takes minutes."""
    rules = [f"model.layers.{number}.mlp.nothing" for number in range(200_000)]
    tensors: dict[str, Any] = {}
    for number in range(1000):
        tensors |= floats(f"model.layers.{number}.mlp.gate", 8, 320)
    start = time.perf_counter()
    described = read({**DEEPSEEK, "ignored_layers": rules}, tensors)
    assert time.perf_counter() - start < 15
    assert len(described.stored_as_float) == 1000


def test_a_name_beyond_the_limit_of_patterns_is_a_finding() -> None:
    (finding,) = errors(read({**DEEPSEEK, "ignored_layers": ["re:.*x"]}, floats("a" * 2000, 8, 320)))
    assert (finding.code, finding.file) == ("bad-config", "config.json")
    assert "longer than any real one" in finding.message


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize("rule", [UP, "re:.*up_proj"])
def test_an_excluded_layer_that_is_stored_quantized_is_an_error(key: str, rule: str) -> None:
    (finding,) = errors(read({**DEEPSEEK, key: [rule]}, layer(UP, (2, 3), "weight_scale_inv")))
    assert (finding.code, finding.layer) == ("bad-config", UP)
    assert "calls the layer float" in finding.message
    assert key in finding.fix or "modules_to_not_convert" in finding.fix


def test_layers_and_experts_resolve_to_what_is_stored() -> None:
    tensors = floats("model.layers.0.mlp.down_proj", 200, 320) | floats("model.layers.3.mlp.gate", 8, 320)
    for name in ("model.layers.0.mlp.gate_proj", UP):
        tensors |= layer(name, (2, 3), "weight_scale_inv")
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors |= layer(f"model.layers.3.mlp.experts.0.{name}", (2, 3), "weight_scale_inv")
    described = read({**DEEPSEEK, "modules_to_not_convert": ["down_proj", "gate"]}, tensors)
    assert described.findings == ()
    resolver = LayerResolver(described, {})
    fused = resolver.resolve("model.layers.0.mlp.gate_up_proj")
    assert fused.spec.layout is Layout.FP8_INV
    assert fused.shards == ("model.layers.0.mlp.gate_proj", UP)
    assert resolver.resolve("model.layers.0.mlp.down_proj").spec.is_float
    assert resolver.resolve("model.layers.3.mlp.gate").spec.is_float
    assert not resolver.describes("model.embed_tokens")
    assert resolver.resolve_experts("model.layers.3.mlp.experts").w2.spec == fused.spec
    assert pickle.loads(pickle.dumps(described)) == described


def test_samples_are_what_they_say() -> None:
    samples = list(FORMAT.samples())
    assert [sample.label for sample in samples] == ["block 128 x 128", "per tensor, dynamic", "per tensor, static"]
    schemes = []
    for sample in samples:
        described = read(sample.config, sample.tensors)
        assert described.findings == ()
        assert not check(described, dict(sample.tensors))
        assert described.find_experts(EXPERTS).down == described.find(LAYER)
        schemes.append(described.find(LAYER).spec.scheme)
    assert schemes == ["FP8_BLOCK_DYNAMIC", "FP8_DYNAMIC", "FP8_STATIC"]


def test_the_declaration_serves_configs_of_fp8() -> None:
    assert FORMAT.serves(DEEPSEEK)
    assert not FORMAT.serves({"quant_method": "gptq"})
    assert FORMAT.answers_to("npu_fp8")
    assert FORMAT.producer({**DEEPSEEK, "autoround_version": "0.16.1"}) == "AutoRound 0.16.1"
    assert FORMAT.producer(DEEPSEEK) == ""


def test_kv_cache_scales_are_dropped_with_a_finding() -> None:
    tensors = layer(UP, (2, 3), "weight_scale_inv") | {
        "model.layers.0.self_attn.k_scale": tensor("F32", 1),
        "model.layers.0.self_attn.v_scale": tensor("F32", 1),
    }
    described = read(DEEPSEEK, tensors)
    assert [finding.code for finding in described.findings] == ["kv-cache-not-quantized"]
    assert {"k_scale", "v_scale"} <= set(described.dropped)
    assert read(DEEPSEEK, layer(UP, (2, 3), "weight_scale_inv")).dropped == ()
    old = layer("model.layers.0.self_attn.k_proj", (), output_scale=tensor("F32", 1))
    described = read({"quant_method": "fp8"}, old)
    assert not errors(described)
    assert "output_scale" in described.dropped


def test_a_tensor_that_nothing_knows_is_named() -> None:
    (finding,) = errors(read(DEEPSEEK, layer(UP, (2, 3), "weight_scale_inv", smooth=tensor("F32", 320))))
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
    found = check(read(DEEPSEEK, tensors), tensors)
    assert [finding.code for finding in found] == [code]
    assert expected in found[0].expected
    assert found[0].layer == UP
    assert found[0].fix


def test_power_of_two_scales_are_taken() -> None:
    tensors = layer(UP, (2, 3), "weight_scale_inv")
    tensors[f"{UP}.weight_scale_inv"] = tensor("F8_E8M0", 2, 3)
    assert not check(read(DEEPSEEK, tensors), tensors)


BROKEN = {
    "blocks of one size": ({**DEEPSEEK, "weight_block_size": [128]}, "bad-config", "weight_block_size"),
    "blocks of nothing": ({**DEEPSEEK, "weight_block_size": [128, 0]}, "bad-config", "weight_block_size"),
    "blocks of text": ({**DEEPSEEK, "weight_block_size": ["128", "one"]}, "bad-config", "weight_block_size"),
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
    found = errors(read(config, {}))
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
    assert read({**DEEPSEEK, **added}, {}).findings == ()
    assert [finding.code for finding in read({**DEEPSEEK, **added, "bits": 4}, {}).findings] == ["bad-config"]


def test_unknown_fields_are_reported_and_ignored() -> None:
    described = read({**DEEPSEEK, "rotation": {"kind": "hadamard"}, "empty": []}, {})
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
    described = read(DEEPSEEK, tensors)
    assert time.perf_counter() - start < 20
    assert not errors(described)
    assert len(pickle.dumps(described)) < 1 << 20
    assert {experts.count for experts in described.experts.values()} == {256}
