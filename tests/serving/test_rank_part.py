# SPDX-License-Identifier: Apache-2.0
"""What ranks keep of a stored layer, and what cannot be cut."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_npu_quant.layouts.tables import Axis
from vllm_npu_quant.serving.shards import act_order_ranks, fit_group, rank_part
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, WeightSpec


def spec(layout: Layout, bits: int, group: int = 0) -> LayerSpec:
    granularity = Granularity.GROUP if group else Granularity.CHANNEL
    return LayerSpec("any", layout, WeightSpec(bits, granularity=granularity, group_size=group))


@pytest.mark.parametrize(
    ("inputs", "part", "group", "kept"),
    [
        (512, 512, 128, 128),
        (512, 256, 128, 128),
        (384, 192, 128, 64),
        (384, 96, 64, 32),
        (100, 100, 64, 64),
        (96, 48, 0, 0),
    ],
)
def test_groups_that_no_rank_cuts(inputs: int, part: int, group: int, kept: int) -> None:
    fitted = fit_group(spec(Layout.GPTQ, 4, group), inputs, part)
    assert fitted.weight is not None
    assert fitted.weight.group_size == kept


def test_activation_order_keeps_the_groups_of_the_whole_layer() -> None:
    stored = spec(Layout.GPTQ_ACT_ORDER, 4, 128)
    part = rank_part(stored, frozenset(), Axis.IN, [64], 384, 4)
    assert part.spec == stored
    assert (part.sizes.inputs, part.sizes.all_inputs, part.sizes.all_groups, part.findings) == (96, 384, 3, ())


def test_sizes_of_outputs_that_are_cut() -> None:
    part = rank_part(spec(Layout.AWQ_GEMM, 4, 64), frozenset({"qzeros"}), Axis.OUT, [64, 32], 192, 2)
    assert (part.sizes.outputs, part.sizes.inputs, part.sizes.shards, part.sizes.groups) == (48, 192, 2, 3)
    assert not part.findings


#: Why a layer cannot be cut: spec, cut, outputs, inputs, ranks; parts of message, expected and found.
REFUSED = {
    "outputs": (spec(Layout.CT_INT, 8), Axis.OUT, [30], 64, 4, "outputs cannot be divided", "divisor of 30", "4 ranks"),
    "inputs": (spec(Layout.CT_INT, 8), Axis.IN, [32], 66, 4, "inputs cannot be divided", "divisor of 66", "4 ranks"),
    "words of inputs": (spec(Layout.GPTQ, 4, 4), Axis.IN, [64], 36, 3, "qweight packs 8", "divisible by 8", "12"),
    "words of outputs": (
        spec(Layout.AWQ_GEMM, 4, 32),
        Axis.OUT,
        [72],
        64,
        2,
        "qweight packs 8",
        "divisible by 8",
        "36",
    ),
    "bits of inputs": (spec(Layout.GPTQ, 3, 32), Axis.IN, [64], 96, 2, "qweight packs 32", "divisible by 32", "48"),
    "words of an uncut shard": (spec(Layout.AWQ_GEMM, 4, 32), None, [64, 12], 64, 1, "packs 8", "by 8", "64, 12"),
    "groups": (spec(Layout.CT_INT, 4, 32), Axis.IN, [64], 99, 3, "no divisor with the groups of 32", "shares", "33"),
    "activation order": (
        *(spec(Layout.GPTQ_ACT_ORDER, 4, 64), Axis.IN, [64], 1024, 8),
        *("activation order", "at most 4 ranks for groups of 64", "8 ranks"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut(case: str) -> None:
    stored, cut, outputs, inputs, ranks, message, expected, found = REFUSED[case]
    (finding,) = rank_part(stored, frozenset(), cut, outputs, inputs, ranks, "do something else").findings
    assert finding.code == "cannot-shard"
    assert message in finding.message
    assert expected in finding.expected
    assert found in finding.found
    assert "do something else" in finding.fix or f"--tensor-parallel-size {act_order_ranks(64)} or less" in finding.fix


def test_packed_inputs_that_nobody_cuts() -> None:
    """43 inputs in 6 words of 8, on one rank."""
    assert not rank_part(spec(Layout.CT_PACKED, 4), frozenset(), None, [8], 43, 1).findings


def test_no_torch() -> None:
    code = "import sys, vllm_npu_quant.serving.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
