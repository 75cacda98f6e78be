# SPDX-License-Identifier: Apache-2.0
"""The number of experts in every MoE layer, against config.json; and the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.broken import Folder
from tests.formats.packed_layers import float_layer, gptq_layer, headers
from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats import gptq
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.inspection import check
from vllm_npu_quant.inspection.experts import moe_findings

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
MTP = "model.mtp.layers.0.mlp.experts"


def layer(number: int) -> str:
    return f"model.layers.{number}.mlp.experts"


def described(counts: dict[str, int], *more: Any) -> Described:
    """A GPTQ checkpoint with this many experts in each MoE layer."""
    experts = (
        gptq_layer(f"{moe}.{expert}.{name}", 128, 128)
        for moe, count in counts.items()
        for expert in range(count)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    found = gptq.read(GPTQ, headers(*experts, *more))
    assert found.experts.keys() == counts.keys()
    return found


def findings(counts: dict[str, int], config: dict[str, Any]) -> list[Finding]:
    return moe_findings(described(counts), config)


#: config.json, the numbers of stored experts.
FINE: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "one number": ({"num_experts": 4}, {layer(0): 4, layer(1): 4}),
    "Mixtral": ({"num_local_experts": 4}, {layer(0): 4}),
    "DeepSeek with shared experts": ({"n_routed_experts": 4, "n_shared_experts": 2}, {layer(3): 4}),
    "ERNIE": ({"moe_num_experts": 4}, {layer(1): 4}),
    "ERNIE-VL: text and vision as one": ({"moe_num_experts": [4, 2]}, {layer(1): 6}),
    "text_config": ({"text_config": {"num_experts": 4}}, {layer(0): 4}),
    "Qwen3-Omni": (
        {
            "thinker_config": {"text_config": {"num_experts": 4}},
            "talker_config": {"text_config": {"num_experts": 2}},
        },
        {"thinker.model.layers.0.mlp.experts": 4, "talker.model.layers.0.mlp.experts": 2},
    ),
    "DBRX": ({"ffn_config": {"moe_num_experts": 4}}, {layer(0): 4}),
    "Hunyuan: a list by layer": (
        {"num_hidden_layers": 2, "num_experts": [4, 2]},
        {layer(0): 4, layer(1): 2},
    ),
    "a draft beside a list": ({"num_hidden_layers": 2, "num_experts": [4, 2]}, {layer(0): 4, MTP: 2}),
    "a draft with its own": ({"n_routed_experts": 4, "mtp_n_routed_experts": 2}, {layer(0): 4, MTP: 2}),
    "Nemotron-NAS: blocks": ({"block_configs": [{"n_routed_experts": 4}, {"n_routed_experts": 2}]}, {layer(0): 2}),
    "a pruned model that says so": ({"num_experts": 3}, {layer(0): 3}),
    "LongCat's zero experts": ({"n_routed_experts": 4, "zero_expert_num": 2}, {layer(0): 4}),
    "no number": ({}, {layer(0): 4, layer(1): 4}),
    "numbers that are none": ({"num_experts": None, "num_local_experts": True}, {layer(0): 4, layer(1): 4}),
    "a number of the quantization": ({"quantization_config": {"num_experts": 2}}, {layer(0): 4}),
}


@pytest.mark.parametrize("case", FINE)
def test_fine(case: str) -> None:
    config, counts = FINE[case]
    assert findings(counts, config) == []


#: config.json, the numbers of stored experts -> (layer, expected, found, severity).
WRONG: dict[str, tuple[dict[str, Any], dict[str, int], tuple[str, str, str, str]]] = {
    "one layer": ({"num_experts": 4}, {layer(0): 4, layer(1): 3}, (layer(1), "4", "3", "error")),
    "text_config": ({"text_config": {"num_experts": 4}}, {layer(0): 3}, (layer(0), "4", "3", "error")),
    "too many": ({"num_local_experts": 2}, {layer(0): 3}, (layer(0), "2", "3", "error")),
    "a draft": ({"n_routed_experts": 4}, {layer(0): 4, MTP: 3}, (MTP, "4", "3", "error")),
    "a list by layer": (
        {"num_hidden_layers": 2, "num_experts": [4, 2]},
        {layer(0): 4, layer(1): 4},
        (layer(1), "2", "4", "error"),
    ),
    "two numbers": (
        {"num_experts": 4, "talker": {"num_experts": 2}},
        {layer(0): 3},
        (layer(0), "2 or 4", "3", "error"),
    ),
    "no number": ({}, {layer(0): 4, layer(1): 4, layer(2): 3}, (layer(2), "4", "3", "warning")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str) -> None:
    config, counts, (name, expected, found, severity) = WRONG[case]
    (finding,) = findings(counts, config)
    assert (finding.code, finding.layer, finding.severity.value) == ("wrong-shape", name, severity)
    assert finding.expected.startswith(f"{expected} experts, as in ")
    assert finding.found == f"{found} experts"


def test_a_config_of_any_depth() -> None:
    config: dict[str, Any] = {"num_experts": 4}
    for _ in range(5000):
        config = {"part": [config]}
    assert findings({layer(0): 4}, config) == []


def test_check_finds_missing_experts(tmp_path: Path) -> None:
    """A download that ended early, and a description that was cut with it."""
    folder = Folder("msmodelslim-qwen3moe-w8a8-dynamic", tmp_path / "model")
    assert check(folder.path).passed()
    last = [name for name in folder.tensors if any(f"layers.1.mlp.experts.{number}." in name for number in (5, 6, 7))]
    folder.describe(**{name.replace(".", "__"): None for name in last})
    folder.save(tensors={name: tensor for name, tensor in folder.tensors.items() if name not in last})
    (folder.path / "quant_model_weights.safetensors.index.json").unlink()
    errors = [finding for finding in check(folder.path).findings if finding.severity.value == "error"]
    assert [(finding.code, finding.layer, finding.found) for finding in errors] == [
        ("wrong-shape", layer(1), "5 experts")
    ]


@pytest.mark.parametrize("name", ["gate", "router", "gate.wg", "shared_expert_gate"])
def test_quantized_routers_are_told(name: str) -> None:
    blocks = [layer(number).removesuffix("experts") for number in range(2)]
    quantized = described({layer(0): 1, layer(1): 1}, *(gptq_layer(block + name, 128, 8) for block in blocks))
    (finding,) = moe_findings(quantized, {"num_experts": 1})
    assert (finding.code, finding.layer, finding.severity.value) == ("unsupported-scheme", blocks[0] + name, "warning")
    floats = described({layer(0): 1, layer(1): 1}, *(float_layer(block + name, 128, 8) for block in blocks))
    assert moe_findings(floats, {"num_experts": 1}) == []
