# SPDX-License-Identifier: Apache-2.0
"""Limits of operators: one finding for the layers of all depths, and none about ranks' parts that there cannot be."""

from __future__ import annotations

from pathlib import Path

from tests.cli.broken import Folder
from tests.fixtures_index import fixture
from vllm_npu_quant.inspection import check

ACT_ORDER = "gptq-qwen3-gptqmodel-w4g32-sym-descact"


def test_layers_of_all_depths_have_one_finding(tmp_path: Path) -> None:
    """Groups of 24 inputs: a rank's 256 or 128 are cut into groups of 8."""
    folder = Folder("ct-qwen3-w4a16-g128-asym", tmp_path / "model")
    groups = folder.json("config.json")["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["group_size"] = 24
    folder.quantization(config_groups=groups)  # the scales do not fit, either
    limits = [finding for finding in check(folder.path, tp=2).findings if finding.code == "operator-limit"]
    assert [finding.layer for finding in limits] == ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"]
    assert all(finding.message.endswith("(2 layers like it)") for finding in limits)
    assert {finding.found for finding in limits} == {"groups of 8 on 2 ranks"}


def test_what_a_format_has_said_is_not_said_again(tmp_path: Path) -> None:
    folder = Folder("awq-qwen3-autoawq-g128", tmp_path / "model")
    folder.quantization(group_size=8)
    limits = [finding.layer for finding in check(folder.path).findings if finding.code == "operator-limit"]
    assert len(limits) == len(set(limits)) == 14


def test_a_layer_that_cannot_be_cut_is_said_once() -> None:
    codes = {finding.code for finding in check(fixture(ACT_ORDER), tp=3).findings}
    assert codes == {"cannot-shard"}
