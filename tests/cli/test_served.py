# SPDX-License-Identifier: Apache-2.0
"""Layers that are served, and not as the checkpoint says: check and inspect tell it, and none of it is a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.broken import Folder
from tests.fixtures_index import fixture
from vllm_npu_quant.cli.app import app
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.inspection import check, inspect
from vllm_npu_quant.serving import dispatch

EXPERTS = "msmodelslim-qwen3moe-w8a8-dynamic"
DEQUANTIZED = next(row.remark for row in dispatch.ROWS if row.name == "W8A16 group, dequantized")


def expert_layers(folder: Folder) -> list[str]:
    return [name.removesuffix(".weight") for name in folder.tensors if ".experts." in name and name.endswith(".weight")]


def static_experts(target: Path) -> Folder:
    """The experts with a calibrated scale of their inputs (W8A8)."""
    folder = Folder(EXPERTS, target)
    changes: dict[str, str | None] = {}
    for layer in expert_layers(folder):
        outputs = folder.tensors[f"{layer}.weight"][1][0]
        for suffix in ("weight_scale", "weight_offset"):
            del folder.tensors[f"{layer}.{suffix}"]
            changes[f"{layer}.{suffix}"] = None
        one, many = [1], [outputs]
        folder.tensors |= {
            f"{layer}.input_scale": ("F32", one, b"\0\0\x80\x3c"),
            f"{layer}.input_offset": ("F32", one, b"\0" * 4),
            f"{layer}.quant_bias": ("I32", many, b"\0" * (4 * outputs)),
            f"{layer}.deq_scale": ("F32", many, b"\0\0\x80\x3c" * outputs),
        }
        suffixes = ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
        changes |= {f"{layer}.{suffix}": "W8A8" for suffix in suffixes}
    folder.describe(**changes)
    folder.save()
    (folder.path / "quant_model_weights.safetensors.index.json").unlink()  # which lists the old names
    return folder


def grouped_experts(target: Path) -> Folder:
    """The experts as 8-bit integers with two scales per output (W8A16)."""
    folder = Folder(EXPERTS, target)
    changes: dict[str, str | None] = {}
    for layer in expert_layers(folder):
        changes[f"{layer}.weight"] = "W8A16"
        for suffix in ("weight_scale", "weight_offset"):
            dtype, (outputs, _), data = folder.tensors[f"{layer}.{suffix}"]
            folder.tensors[f"{layer}.{suffix}"] = (dtype, [outputs, 2], data + data)
            changes[f"{layer}.{suffix}"] = "W8A16"
    folder.describe(**changes)
    folder.save()
    return folder


def test_static_experts(tmp_path: Path) -> None:
    folder = static_experts(tmp_path / "model")
    report = check(folder.path)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("served-otherwise", Severity.INFO)
    assert "48 layers" in finding.message
    assert "static scales are not used" in finding.message
    assert finding.layer == "model.layers.0.mlp.experts.*.gate_proj"
    assert finding.file == "quant_model_description.json"
    assert "static activation" in finding.expected
    assert "W8A8DynamicExperts" in finding.found
    assert report.passed(strict=True)  # no warning: a scale per token is finer than the calibrated one


def test_experts_that_are_dequantized(tmp_path: Path) -> None:
    folder = grouped_experts(tmp_path / "model")
    report = check(folder.path, device="a2")
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("served-otherwise", Severity.INFO)
    assert "two bytes each" in finding.message
    assert "one scale per channel" in finding.fix
    schemes = [scheme for scheme in inspect(folder.path).schemes if scheme.kind == "fused_moe"]
    assert {(scheme.method, scheme.remark) for scheme in schemes} == {("FloatExperts", DEQUANTIZED)}
    assert all(scheme.spec in finding.expected for scheme in schemes)  # groups of 128 and of 64 inputs
    assert "48 layers" in finding.message


def test_commands(tmp_path: Path) -> None:
    model = str(static_experts(tmp_path / "model").path)
    runner = CliRunner()
    checked = runner.invoke(app, ["check", model, "--strict", "--json"])
    assert checked.exit_code == 0
    assert [finding["code"] for finding in json.loads(checked.output)["findings"]] == ["served-otherwise"]
    inspected = runner.invoke(app, ["inspect", model, "--json"])
    remarks = {scheme["scheme"]: scheme["remark"] for scheme in json.loads(inspected.output)["schemes"]}
    assert "static scales are not used" in remarks["W8A8"]
    assert remarks["W8A8_DYNAMIC"] == ""
    assert "static scales are not used" in runner.invoke(app, ["inspect", model]).output


def test_use_that_the_operators_pages_do_not_have(tmp_path: Path) -> None:
    """Zero points of 4-bit experts are as the checkpoint says; what the operator's page says is a matter of the chip."""
    folder = Folder("awq-qwen3-autoawq-g128", tmp_path / "model")
    moved = {}
    for name, tensor in folder.tensors.items():
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(f".mlp.{part}.", f".mlp.experts.0.{part}.")
        moved[name] = tensor
    folder.save(tensors=moved)
    assert check(folder.path).findings == ()
    (finding,) = check(folder.path, device="a2").findings
    assert (finding.code, finding.severity) == ("operator-limit", Severity.INFO)
    assert "undocumented" in finding.message


def test_what_is_not_served_is_said_once_for_all_its_layers(tmp_path: Path) -> None:
    """And inspect and plan point to it."""
    folder = Folder("msmodelslim-qwen3-w8a8-dynamic", tmp_path / "model")
    layers = [name.removesuffix(".weight") for name, (dtype, _, _) in folder.tensors.items() if dtype == "I8"]
    names = [f"{layer}.{suffix}" for layer in layers for suffix in ("weight", "weight_scale", "weight_offset")]
    folder.describe(**dict.fromkeys(names, "W4A4_MXFP4_FLATQUANT"))
    (finding,) = check(folder.path).findings
    assert finding.code == "unsupported-scheme"
    assert finding.layer in layers
    assert f"({len(layers)} layers)" in finding.message
    runner = CliRunner()
    assert (
        "1 error in config and files: `vllm-npu-quant check`"
        in runner.invoke(app, ["inspect", str(folder.path)]).output
    )
    planned = runner.invoke(app, ["plan", str(folder.path), "--device", "a2"]).output
    assert f"{len(layers)} layers are quantized in a way that is not served" in planned
    assert "memory: 64.0 GiB" in planned
    assert "int8: 626 TOPS" in planned
    config = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "static")
    groups = config.json("config.json")["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"] |= {"num_bits": 4, "symmetric": False}
    config.quantization(config_groups=groups)
    (finding,) = check(config.path).findings
    assert (finding.code, finding.message) == (
        "unsupported-scheme",
        "no NPU method class serves W8A4_DYNAMIC for linear layers (14 layers)",
    )


def test_kv_b_proj_of_latent_attention(tmp_path: Path) -> None:
    """The engine takes its weight apart, so that it becomes floats; without latent attention it is as any other layer."""
    folder = Folder("ct-qwen3-w8a8-dynamic", tmp_path / "model")
    folder.save(
        tensors={name.replace("self_attn.v_proj", "self_attn.kv_b_proj"): t for name, t in folder.tensors.items()}
    )
    config = folder.json("config.json")
    assert check(folder.path).findings == ()
    folder.write_json("config.json", {**config, "kv_lora_rank": 64})
    (finding,) = check(folder.path, values=True).findings
    assert (finding.code, finding.severity) == ("served-otherwise", Severity.INFO)
    assert finding.layer == "model.layers.0.self_attn.kv_b_proj"
    assert finding.expected.startswith("W8A8_DYNAMIC: 8-bit int weight per channel")
    assert finding.found == "dequantized: DequantizedLinear"
    schemes = {scheme.scheme: (scheme.layers, scheme.method) for scheme in inspect(folder.path).schemes}
    assert schemes["W8A8_DYNAMIC as float"] == (2, "DequantizedLinear")
    assert schemes["W8A8_DYNAMIC"] == (12, "W8A8DynamicLinear")


def test_the_setting_of_w4a8(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fixture("msmodelslim-qwen3-w4a8-dynamic")
    assert check(model).findings == ()
    monkeypatch.setenv("VLLM_NPU_QUANT_W4A8", "w4a16")
    (finding,) = check(model).findings
    assert (finding.code, finding.found) == ("served-otherwise", "W4A16: WeightOnlyLinear")
    assert "unset VLLM_NPU_QUANT_W4A8" in finding.fix
    assert {scheme.method for scheme in inspect(model).schemes if scheme.kind == "linear"} == {"WeightOnlyLinear"}
    monkeypatch.setenv("VLLM_NPU_QUANT_W4A8", "w4")
    (finding,) = check(model).findings
    assert (finding.code, finding.severity) == ("bad-config", Severity.ERROR)
    assert check(fixture("ct-qwen3-w8a8-dynamic")).findings == ()
