# SPDX-License-Identifier: Apache-2.0
"""``matrix``: support by format, scheme, layer kind and chip, from the formats' samples, the dispatch table and the chips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.declaration import Format, Sample, formats
from vllm_npu_quant.formats.samples import EXPERTS, LAYER
from vllm_npu_quant.inspection.chips import CHIPS, support
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.serving.dispatch import Row
from vllm_npu_quant.spec import LayerKind

__all__ = ["MatrixRow", "matrix"]


@dataclass(frozen=True)
class MatrixRow:
    """One scheme of one format.

    Attributes:
        format: name of the format.
        scheme: the format's name of the scheme.
        numbers: the served spec as text.
        methods: layer kind -> NPU method class; kinds that are not served are omitted.
        chips: chip -> "yes", "no", "linear" or "experts" if only these are supported, or "?" if the operators' documentation
            does not say.
        remark: why it is not served, or a note on how it is served.
    """

    format: str
    scheme: str
    numbers: str
    methods: Mapping[str, str]
    chips: Mapping[str, str]
    remark: str = ""


def matrix() -> tuple[MatrixRow, ...]:
    """Support of every scheme of every format."""
    return tuple(_row(declaration, sample) for declaration in formats() for sample in declaration.samples())


def _row(declaration: Format, sample: Sample) -> MatrixRow:
    described = declaration.read(sample.config, sample.tensors, "config.json", None)
    errors = [finding for finding in described.findings if finding.severity is Severity.ERROR]
    entry, experts = described.find(LAYER), described.find_experts(EXPERTS)
    if errors or entry is None:
        remark = errors[0].message if errors else "not understood"
        return MatrixRow(declaration.name, sample.label, "", {}, dict.fromkeys(CHIPS, "no"), remark)
    host = Host()
    rows = {}
    for kind in LayerKind:
        spec = experts.gate.spec if kind is LayerKind.FUSED_MOE and experts is not None else entry.spec
        row = decide(kind, spec, host).row
        if row is not None and not (kind is LayerKind.FUSED_MOE and LAYOUTS[spec.layout].act_order):
            rows[kind] = row
    numbers = decide(LayerKind.LINEAR, entry.spec, host).describe().partition(": ")[2]
    methods = {kind.value: row.method_name for kind, row in rows.items()}
    chips = {key: _chip(key, rows) for key in CHIPS}
    remark = "; ".join(dict.fromkeys(row.remark for row in rows.values() if row.remark))
    return MatrixRow(declaration.name, sample.label, numbers, methods, chips, remark)


def _chip(key: str, rows: Mapping[LayerKind, Row]) -> str:
    answers = {kind: support(CHIPS[key], row).served for kind, row in rows.items()}
    linear = answers.get(LayerKind.LINEAR, False)
    experts = answers.get(LayerKind.FUSED_MOE, False)
    if LayerKind.FUSED_MOE not in rows or linear == experts:
        return _word(linear)
    if linear and not experts:
        return "linear" if experts is False else "linear, experts ?"
    if experts and not linear:
        return "experts" if linear is False else "experts, linear ?"
    return "?" if None in (linear, experts) else "no"


def _word(served: bool | None) -> str:
    return "?" if served is None else "yes" if served else "no"
