# SPDX-License-Identifier: Apache-2.0
"""The dispatch table: what it names exists, and what it does not serve is refused."""

from __future__ import annotations

from importlib import import_module

import pytest

from vllm_npu_quant import emulation
from vllm_npu_quant.errors import CODES, Finding, NpuQuantError, Severity, nearest_names, raise_findings
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.serving.dispatch import ROWS, Row, describe, find_row
from vllm_npu_quant.spec import FLOAT, ActivationSpec, Granularity, LayerKind, LayerSpec, Layout, WeightSpec

TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN)
STATIC = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False)


def spec(bits: int, activation: ActivationSpec | None, granularity: Granularity = Granularity.CHANNEL) -> LayerSpec:
    group = 64 if granularity is Granularity.GROUP else 0
    return LayerSpec(
        "TEST", Layout.MODELSLIM_INT, WeightSpec(bits, granularity=granularity, group_size=group), activation
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_name_classes_and_operators_that_exist(row: Row) -> None:
    import torch

    emulation.register()
    module, _, name = row.method.partition(":")
    assert callable(getattr(import_module(module), name))
    for operator in row.operators:
        assert hasattr(torch.ops.npu, operator)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not Layout.FLOAT])
def test_layouts_name_functions_that_exist(layout: Layout) -> None:
    module, _, name = LAYOUTS[layout].to_canonical.partition(":")
    assert callable(getattr(import_module(module), name))
    assert LAYOUTS[layout].tensors[0].name in ("weight", "weight_packed", "qweight")


@pytest.mark.parametrize("kind", [LayerKind.LINEAR, LayerKind.LM_HEAD])
@pytest.mark.parametrize(
    ("wanted", "method"),
    [
        (spec(8, TOKEN), "W8A8DynamicLinear"),
        (spec(8, TOKEN, Granularity.GROUP), "W8A8DynamicGroupedLinear"),
        (spec(8, STATIC), "W8A8StaticLinear"),
        (spec(8, None), "WeightOnlyLinear"),
        (spec(8, None, Granularity.GROUP), "WeightOnlyLinear"),
        (spec(4, None), "WeightOnlyLinear"),
        (spec(4, None, Granularity.GROUP), "WeightOnlyLinear"),
    ],
)
def test_linear_schemes(kind: LayerKind, wanted: LayerSpec, method: str) -> None:
    assert find_row(kind, wanted).method_name == method


@pytest.mark.parametrize("kind", LayerKind)
def test_no_row_serves_float(kind: LayerKind) -> None:
    assert find_row(kind, FLOAT) is None


def test_what_no_row_serves_is_refused_with_what_is_served() -> None:
    odd = spec(5, TOKEN)
    with pytest.raises(NpuQuantError) as caught:
        decide(LayerKind.LINEAR, odd, Host()).require_row(layer="l.q_proj", file="d.json")
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer, finding.file) == ("unsupported-scheme", "l.q_proj", "d.json")
    assert "W8A8 dynamic" in finding.expected
    assert finding.found == describe(odd)


def test_a_static_activation_is_never_run_as_a_dynamic_one() -> None:
    assert find_row(LayerKind.LINEAR, spec(8, STATIC)).operators[0] == "npu_quantize"
    assert find_row(LayerKind.LINEAR, spec(8, TOKEN)).operators[0] == "npu_dynamic_quant"


def test_findings_render_every_field() -> None:
    finding = Finding("missing-tensor", "m", "l", "f", "e", "found", ("n1", "n2"), "do")
    assert finding.render().splitlines() == [
        "error[missing-tensor]: l: m",
        "  file     f",
        "  expected e",
        "  found    found; nearest: n1, n2",
        "  fix      do",
    ]


def test_unknown_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="not a code"):
        Finding("no-such-code", "m")
    assert all(text.endswith(".") and len(text) > 60 for text in CODES.values())


def test_warnings_alone_do_not_raise() -> None:
    raise_findings([Finding("unexpected-tensor", "m", severity=Severity.WARNING)])
    with pytest.raises(NpuQuantError) as caught:
        raise_findings([Finding("unexpected-tensor", "w", severity=Severity.WARNING), Finding("bad-value", "e")])
    assert [finding.message for finding in caught.value.findings] == ["e", "w"]


def test_the_error_survives_a_process_boundary() -> None:
    import pickle

    error = NpuQuantError([Finding("bad-value", "m", "l", nearest=("a",))])
    again = pickle.loads(pickle.dumps(error))
    assert again.findings == error.findings
    assert str(again) == str(error)


def test_a_long_error_is_cut() -> None:
    text = str(NpuQuantError(Finding("bad-value", f"m{number}") for number in range(50)))
    assert text.count("error[bad-value]") == 20
    assert "30 more findings" in text


def test_nearest_names() -> None:
    names = ["model.layers.3.mlp.up_proj", "model.layers.3.mlp.down_proj", "lm_head", "visual.blocks.0.up_proj"]
    assert nearest_names("model.layers.3.mlp.upp_proj", names)[0] == "model.layers.3.mlp.up_proj"
    assert nearest_names("zzz", names) == ()
