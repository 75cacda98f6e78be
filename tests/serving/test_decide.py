# SPDX-License-Identifier: Apache-2.0
"""What a stored layer becomes: one decision, from the layer and the host alone."""

from __future__ import annotations

import pytest

from vllm_npu_quant import settings
from vllm_npu_quant.errors import NpuQuantError, Severity
from vllm_npu_quant.formats.fp8 import fp8_spec, fp8_weight
from vllm_npu_quant.formats.small_floats import MXFP4, MXFP8, NVFP4, block_float_spec
from vllm_npu_quant.serving.decide import Host, decide, float_experts, requantized_findings
from vllm_npu_quant.spec import FLOAT, ActivationSpec, Granularity, LayerKind, LayerSpec, Layout, NumberKind, WeightSpec

PER_TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN)
FP8_BLOCK = fp8_spec("FP8_BLOCK_DYNAMIC", fp8_weight(Granularity.BLOCK, (128, 128)), Layout.FP8_INV, static=False)
FP8_STATIC = fp8_spec("FP8_STATIC", fp8_weight(Granularity.TENSOR), Layout.FP8, static=True)
FP8_WEIGHT_ONLY = fp8_spec("FP8_W8A16", fp8_weight(Granularity.CHANNEL), Layout.FP8, static=None)
MIX = LayerSpec("W8A8_MIX", Layout.MODELSLIM_STATIC, WeightSpec(8), PER_TOKEN)
W8A8 = LayerSpec("W8A8_DYNAMIC", Layout.MODELSLIM_INT, WeightSpec(8), PER_TOKEN)
W4A8 = LayerSpec("W4A8_DYNAMIC", Layout.MODELSLIM_INT, WeightSpec(4), PER_TOKEN)
MXFP8_W8A8 = block_float_spec("MXFP8", Layout.MXFP8, MXFP8, 8)
MXFP8_W8A16 = block_float_spec("MXFP8", Layout.MXFP8, MXFP8, None)
MXFP4_W4A4 = block_float_spec("MXFP4", Layout.MXFP4, MXFP4, 4)
MXFP4_W4A8 = block_float_spec("MXFP4", Layout.MXFP4, MXFP4, 8)
MXFP4_W4A16 = block_float_spec("MXFP4", Layout.MXFP4, MXFP4, None)
NVFP4_W4A4 = block_float_spec("NVFP4", Layout.NVFP4, NVFP4, 4)
NVFP4_W4A16 = block_float_spec("NVFP4", Layout.NVFP4, NVFP4, None)


@pytest.mark.parametrize(
    ("stored", "host", "layer", "scheme", "method"),
    [
        (W8A8, Host(), "l.q_proj", "W8A8_DYNAMIC", "W8A8DynamicLinear"),
        (FP8_BLOCK, Host(), "l.q_proj", "FP8_BLOCK_DYNAMIC as W8A8_DYNAMIC", "W8A8DynamicLinear"),
        (FP8_STATIC, Host(), "l.q_proj", "FP8_STATIC as W8A8_DYNAMIC", "W8A8DynamicLinear"),
        (FP8_WEIGHT_ONLY, Host(), "l.q_proj", "FP8_W8A16 as W8A16", "WeightOnlyLinear"),
        (FP8_BLOCK, Host(float_weights="bf16"), "l.q_proj", "FP8_BLOCK_DYNAMIC as float", "DequantizedLinear"),
        (MIX, Host(), "l.q_proj", "W8A8_MIX", "W8A8DynamicLinear"),
        (MIX, Host(kv_consumer=True), "l.q_proj", "W8A8_MIX", "W8A8StaticLinear"),
        (W8A8, Host(kv_consumer=True), "l.q_proj", "W8A8_DYNAMIC", "W8A8DynamicLinear"),
        (W4A8, Host(), "l.q_proj", "W4A8_DYNAMIC", "W4A8DynamicLinear"),
        (W4A8, Host(w4a8="w4a16"), "l.q_proj", "W4A8_DYNAMIC as W4A16", "WeightOnlyLinear"),
        (W8A8, Host(w4a8="w4a16"), "l.q_proj", "W8A8_DYNAMIC", "W8A8DynamicLinear"),
        (W8A8, Host(latent_attention=True), "l.kv_b_proj", "W8A8_DYNAMIC as float", "DequantizedLinear"),
        (W8A8, Host(latent_attention=True), "l.q_proj", "W8A8_DYNAMIC", "W8A8DynamicLinear"),
        (W8A8, Host(), "l.kv_b_proj", "W8A8_DYNAMIC", "W8A8DynamicLinear"),
        (FP8_BLOCK, Host(latent_attention=True), "l.kv_b_proj", "FP8_BLOCK_DYNAMIC as float", "DequantizedLinear"),
    ],
)
def test_linear_layers(stored: LayerSpec, host: Host, layer: str, scheme: str, method: str) -> None:
    served = decide(LayerKind.LINEAR, stored, host, layer=layer)
    assert (served.spec.scheme, served.require_row().method_name) == (scheme, method)
    assert served.stored is stored, "the decision leaves what is stored as it is"
    assert served.spec.layout is stored.layout


_CHANNEL, _EXACT = WeightSpec(8), WeightSpec(8, granularity=Granularity.GROUP, group_size=32)
_FLOAT = WeightSpec(16, NumberKind.FLOAT)


@pytest.mark.parametrize(
    ("stored", "mode", "weight", "experts", "method"),
    [
        (MXFP8_W8A8, "int8", _CHANNEL, _CHANNEL, "W8A8DynamicLinear"),
        (MXFP4_W4A4, "int8", _CHANNEL, _CHANNEL, "W8A8DynamicLinear"),
        (MXFP4_W4A8, "int8", _CHANNEL, _CHANNEL, "W8A8DynamicLinear"),
        (NVFP4_W4A4, "int8", _CHANNEL, _CHANNEL, "W8A8DynamicLinear"),
        (MXFP8_W8A16, "int8", _CHANNEL, _CHANNEL, "WeightOnlyLinear"),
        (NVFP4_W4A16, "int8", _CHANNEL, _CHANNEL, "WeightOnlyLinear"),
        # Only weight-only Linear operators take groups.
        (MXFP4_W4A16, "int8", _EXACT, _CHANNEL, "WeightOnlyLinear"),
        (MXFP4_W4A4, "w8a16", _EXACT, _CHANNEL, "WeightOnlyLinear"),
        (NVFP4_W4A4, "w8a16", _CHANNEL, _CHANNEL, "WeightOnlyLinear"),
        (FP8_BLOCK, "w8a16", _CHANNEL, _CHANNEL, "WeightOnlyLinear"),
        (MXFP4_W4A4, "bf16", _FLOAT, _FLOAT, "DequantizedLinear"),
        (NVFP4_W4A16, "bf16", _FLOAT, _FLOAT, "DequantizedLinear"),
    ],
)
def test_small_floats(stored: LayerSpec, mode: str, weight: WeightSpec, experts: WeightSpec, method: str) -> None:
    host = Host(float_weights=mode)
    for kind in (LayerKind.LINEAR, LayerKind.LM_HEAD):
        served = decide(kind, stored, host, layer="l")
        assert served.require_row().method_name == method
        assert served.spec.weight == weight
        assert served.difference == "", "it is told once per checkpoint"
    served = decide(LayerKind.FUSED_MOE, stored, host)
    assert served.spec.weight == experts
    assert served.row is not None
    quantized = stored.activation is not None and mode == "int8"
    assert served.spec.activation == (PER_TOKEN if quantized else None)


def test_small_floats_are_told_by_their_names() -> None:
    (finding,) = requantized_findings([(MXFP8_W8A8, 2), (NVFP4_W4A4, 1)], Host(), "config.json")
    assert "have no MXFP8 or NVFP4: weights are requantized at load to int8, one byte per weight" in finding.message
    assert "static input scales are dropped" in finding.message, "NVFP4's inputs have a static factor"
    assert "exact" not in finding.message
    assert finding.found == "MXFP8_W8A8: 2 layers, NVFP4_W4A4: 1 layers"
    (finding,) = requantized_findings([(NVFP4_W4A4, 1)], Host(float_weights="w8a16"), "config.json")
    assert "activations stay in the model's dtype" in finding.message
    assert "static" not in finding.message
    for host, spec in ((Host(), MXFP4_W4A16), (Host(float_weights="w8a16"), MXFP4_W4A4)):
        (finding,) = requantized_findings([(spec, 1)], host, "config.json")
        assert "keep MXFP4's groups, in which int8 is exact" in finding.message
    (finding,) = requantized_findings([(MXFP4_W4A4, 1)], Host(), "config.json")
    assert "exact" not in finding.message


@pytest.mark.parametrize("kind", LayerKind)
def test_a_float_layer_stays_float(kind: LayerKind) -> None:
    served = decide(
        kind, FLOAT, Host(float_weights="bf16", w4a8="w4a16", latent_attention=True, kv_consumer=True), layer="l"
    )
    assert (served.spec, served.row, served.difference) == (FLOAT, None, "")


def test_the_weight_that_latent_attention_takes_apart_is_told() -> None:
    served = decide(LayerKind.LINEAR, W8A8, Host(latent_attention=True), layer="model.layers.0.self_attn.kv_b_proj")
    assert served.needs_float
    assert "latent attention" in served.difference
    assert not decide(LayerKind.LINEAR, W8A8, Host(latent_attention=True), layer="l.o_proj").needs_float


def test_a_setting_that_changes_the_scheme_is_told_with_its_name() -> None:
    served = decide(LayerKind.FUSED_MOE, W4A8, Host(w4a8="w4a16"))
    assert settings.W4A8 in served.difference
    assert settings.W4A8 in served.instead


def test_static_experts_are_told_by_their_row() -> None:
    static = LayerSpec(
        "W8A8",
        Layout.MODELSLIM_STATIC,
        WeightSpec(8),
        ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False),
    )
    assert "per token" in decide(LayerKind.FUSED_MOE, static, Host()).difference
    assert not decide(LayerKind.LINEAR, static, Host()).difference


def test_float_experts_beside_quantized_ones_are_grouped_products() -> None:
    served = float_experts(FLOAT)
    assert served.require_row().method_name == "FloatExperts"
    assert served.stored.is_float


def test_what_no_method_class_serves_is_refused_where_it_is_needed() -> None:
    odd = LayerSpec("W5A8", Layout.CT_INT, WeightSpec(5), PER_TOKEN)
    served = decide(LayerKind.LINEAR, odd, Host())
    assert served.row is None
    with pytest.raises(NpuQuantError) as caught:
        served.require_row(layer="l.q_proj", file="config.json")
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer, finding.file) == ("unsupported-scheme", "l.q_proj", "config.json")


def test_the_description_says_what_is_stored_where_the_numbers_are_others() -> None:
    text = decide(LayerKind.LINEAR, FP8_BLOCK, Host(), layer="l").describe()
    assert text == (
        "FP8_BLOCK_DYNAMIC as W8A8_DYNAMIC: 8-bit int weight per channel "
        "(stored as 8-bit float weight per block of 128 x 128), 8-bit int dynamic activation per token"
    )
    assert "stored" not in decide(LayerKind.LINEAR, W8A8, Host(), layer="l").describe()


def test_fp8_is_told_once_with_counts() -> None:
    layers = [(FP8_BLOCK, 3), (FP8_STATIC, 2), (FP8_BLOCK, 1), (W8A8, 7)]
    (finding,) = requantized_findings(layers, Host(), "config.json")
    assert (finding.code, finding.severity) == ("requantized", Severity.INFO)
    assert finding.found == "FP8_BLOCK_DYNAMIC: 4 layers, FP8_STATIC: 2 layers"
    assert "static input scales are dropped" in finding.message
    assert requantized_findings([(W8A8, 7)], Host(), "config.json") == []
    (finding,) = requantized_findings([(FP8_BLOCK, 1)], Host(float_weights="bf16"), "config.json")
    assert "two bytes per weight" in finding.message


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (settings.FP8, [(FP8_BLOCK, 1)]),
        (settings.FLOAT_WEIGHTS, [(MXFP4_W4A4, 1)]),
        (settings.W4A8, [(W4A8, 1)]),
    ],
)
def test_an_invalid_setting_is_an_error_of_the_checkpoints_that_it_concerns(
    name: str, layers: list[tuple[LayerSpec, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "int7")
    host = Host.read()
    found = requantized_findings(layers, host, "config.json")
    assert [finding.code for finding in found if finding.severity is Severity.ERROR] == ["bad-config"]
    assert name in found[0].message
    assert requantized_findings([(W8A8, 1)], host, "config.json") == []


def test_the_settings_are_read_by_the_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.FP8, "bf16")
    assert decide(LayerKind.LINEAR, FP8_BLOCK, Host(), layer="l").spec.weight == WeightSpec(8)
    served = decide(LayerKind.LINEAR, FP8_BLOCK, Host.read(), layer="l")
    assert served.spec.weight == WeightSpec(16, NumberKind.FLOAT)


@pytest.mark.parametrize(
    "weight", [WeightSpec(6, NumberKind.FLOAT, Granularity.GROUP, 16), WeightSpec(6, NumberKind.MX)]
)
@pytest.mark.parametrize("kind", LayerKind)
@pytest.mark.parametrize("host", [Host(), Host(float_weights="bf16")])
def test_other_floats_are_not_taken_for_known_ones(weight: WeightSpec, kind: LayerKind, host: Host) -> None:
    stored = LayerSpec("OTHER", Layout.FP8, weight)
    served = decide(kind, stored, host, layer="l")
    assert (served.spec, served.row) == (stored, None)
    assert requantized_findings([(stored, 3)], host, "config.json") == []
