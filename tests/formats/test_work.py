# SPDX-License-Identifier: Apache-2.0
"""Rules times layers: bounded for hostile configs, with room for the largest models that exist."""

from __future__ import annotations

from typing import Any

import pytest

from tests.formats.packed_layers import headers
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats import auto_round, awq, common, fp8, gptq
from vllm_npu_quant.formats.described import Described

INT4 = {"bits": 4, "group_size": 128, "sym": True}


def quantized(names: list[str]) -> Any:
    return headers({f"{name}.qweight": ("I32", (16, 128)) for name in names})


def floats(names: list[str]) -> Any:
    return headers({f"{name}.weight": ("BF16", (16, 128)) for name in names})


def refused(described: Described) -> bool:
    return any("takes too much work" in finding.message for finding in described.findings)


#: Names of thirty components, each with modules of its own, and a list of a hundred parts.
DEEP = [".".join((f"a{number}", *"b" * 29)) for number in range(300)]
PARTS = [f"c{number}." for number in range(100)]
RUNS = [".".join("d" * length) for length in range(1, 33)]
HOSTILE = {
    "modules of GPTQ": lambda: gptq.read({**INT4, "modules_in_block_to_quantize": [PARTS]}, quantized(DEEP)),
    "modules of AWQ": lambda: awq.read(
        {"bits": 4, "group_size": 128, "modules_to_not_convert": PARTS}, quantized(DEEP)
    ),
    "components of FP8": lambda: fp8.read({"ignored_layers": RUNS}, floats(DEEP)),
    "keys of AutoRound": lambda: auto_round.read({**INT4, "extra_config": {"." * 29: {"bits": 8}}}, quantized(DEEP)),
    "blocks of AutoRound": lambda: auto_round.read({**INT4, "block_name_to_quantize": ["a.b"]}, quantized(DEEP)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not refused(HOSTILE[name]())
    monkeypatch.setattr(common, "MAX_STEPS", 5000)
    assert refused(HOSTILE[name]())


def test_room_for_the_largest_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """384 experts in 61 layers, a list of each router's name and of parts: with a quarter of the steps.

    A twentieth of the layers, and of the steps, takes a twentieth of the time.
    """
    monkeypatch.setattr(common, "MAX_STEPS", common.MAX_STEPS // 4 // 20)
    layers = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
        for layer in range(3)
        for expert in range(384)
        for part in ("gate", "up", "down")
    ]
    lists = [f"model.layers.{layer}.mlp.gate" for layer in range(61)] + ["lm_head", "mlp.gate", "self_attn", "shared"]
    assert not refused(awq.read({"bits": 4, "group_size": 128, "modules_to_not_convert": lists}, quantized(layers)))
    assert not refused(fp8.read({"ignored_layers": lists}, floats(layers)))
    assert not refused(gptq.read({**INT4, "modules_in_block_to_quantize": [lists]}, quantized(layers)))
    extra = {f"model.layers.{layer}.mlp.gate": {"bits": 16} for layer in range(61)}
    assert not refused(auto_round.read({**INT4, "extra_config": extra}, quantized(layers)))


def test_names_without_end() -> None:
    """A name of dots takes all the steps, and no more."""
    rules = common.ComponentRules(["a.b"], common.Work("config.json"))
    with pytest.raises(NpuQuantError, match="too much work"):
        rules.match("." * 10**5)


@pytest.mark.parametrize(
    ("rule", "layer", "found"),
    [
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("layers.0", "model.layers.0.mlp.gate", True),
        ("layers.0", "model.layers.00.mlp.gate", False),
        ("model", "model.layers.0", True),
        ("0", "model.layers.0", True),
        ("model.layers.0", "layers.0", False),
        ("", "model", False),
    ],
)
def test_component_rules(rule: str, layer: str, found: bool) -> None:
    rules = common.ComponentRules([rule], common.Work("config.json"))
    assert rules.match(layer) is found
    assert rules.match(layer) is found
