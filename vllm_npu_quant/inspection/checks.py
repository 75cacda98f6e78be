# SPDX-License-Identifier: Apache-2.0
"""``check``: all findings about a checkpoint, before it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity
from vllm_npu_quant.formats.check import check_checkpoint, check_expert_biases, tied_head_findings
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.index import is_embedding
from vllm_npu_quant.formats.resolve import FUSED_FAMILIES, LayerResolver
from vllm_npu_quant.inspection.experts import moe_findings
from vllm_npu_quant.inspection.layers import Layer, layers_of
from vllm_npu_quant.inspection.limits import limit_findings
from vllm_npu_quant.inspection.model import Model, open_model
from vllm_npu_quant.inspection.overview import dtype_of
from vllm_npu_quant.inspection.parallel import parallel_findings
from vllm_npu_quant.inspection.sizes import size_findings
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.serving.decide import expert_findings, requantized_findings
from vllm_npu_quant.spec import LayerKind

__all__ = ["CheckReport", "check"]


@dataclass(frozen=True)
class CheckReport:
    """The result of ``check``.

    Attributes:
        model: the name given by the user.
        format: the quantization format; empty for a float checkpoint, and if it could not be detected.
        findings: all findings, errors first.
        readable: whether the format was detected and weight files were found, so that layers could be checked.
        values: whether values were read in addition to headers.
    """

    model: str
    format: str
    findings: tuple[Finding, ...]
    readable: bool
    values: bool = False

    def count(self, severity: Severity) -> int:
        return sum(finding.severity is severity for finding in self.findings)

    def passed(self, *, strict: bool = False) -> bool:
        """Whether there are no errors and, with ``strict``, no warnings."""
        worst = [Severity.ERROR, Severity.WARNING] if strict else [Severity.ERROR]
        return self.readable and not any(finding.severity in worst for finding in self.findings)


def check(
    model: str | os.PathLike[str] | Model,
    *,
    tp: int = 1,
    ep: int = 1,
    device: str | None = None,
    values: bool = False,
    revision: str | None = None,
    follow_links: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> CheckReport:
    """Check a checkpoint. Its faults are findings, never raised.

    Args:
        model: a folder, a hub id, or an opened model.
        tp: tensor-parallel size.
        ep: expert-parallel size; 1 for none.
        device: "a2", "a3", "a5" or "310p"; None to skip the checks of a chip.
        values: whether to read the weights: scales, zero points and ranges of integers.
        revision: branch, tag or commit of a hub id.
        follow_links: whether to follow links out of the folder; otherwise they are findings.
        progress: called with (layer, layers done, total layers) while values are read.

    Raises:
        ValueError: for sizes below 1, or an unknown device.
    """
    if tp < 1 or ep < 1:
        raise ValueError("tp and ep are at least 1")
    try:
        opened = model if isinstance(model, Model) else open_model(model, revision=revision, follow_links=follow_links)
    except NpuQuantError as error:
        return CheckReport(os.fspath(model) if not isinstance(model, Model) else model.name, "", error.findings, False)
    if opened.described is None:
        return _report(opened, [*opened.findings, *opened.checkpoint.findings], readable=False)
    described = opened.described
    findings = [*opened.findings, *described.findings, *check_checkpoint(described, opened.checkpoint)]
    findings += tied_head_findings(described, opened.tied_embeddings)
    findings += size_findings(opened)
    layers = layers_of(opened)
    findings += served_findings(layers, described)
    findings += difference_findings(layers, described.source)
    findings += requantized_findings(((layer.stored, layer.count) for layer in layers), opened.host, described.source)
    findings += fused_findings(described)
    findings += moe_findings(described, opened.config)
    findings += parallel_findings(opened, layers, tp=tp, ep=ep)
    reported = {finding.layer for finding in described.findings if finding.code == "operator-limit"}
    findings += limit_findings(layers, described.source, tp=tp, ep=ep, reported=reported)
    if device is not None:
        from vllm_npu_quant.inspection.chips import chip_findings

        findings += chip_findings(device, layers, dtype_of(opened), described.source)
    # With a damaged header, values would be read from wrong offsets.
    damaged = any(finding.severity is Severity.ERROR for finding in opened.checkpoint.findings)
    if not damaged:
        findings += check_expert_biases(described, opened.checkpoint, every=values)
    if values and not damaged:
        from vllm_npu_quant.inspection.values import value_findings

        findings += value_findings(opened, layers, progress)
    return _report(opened, findings, readable=bool(opened.checkpoint.files), values=values)


def _report(opened: Model, findings: Iterable[Finding], *, readable: bool, values: bool = False) -> CheckReport:
    """The report without duplicate findings, errors first."""
    order = list(Severity)
    unique = sorted(dict.fromkeys(findings), key=lambda finding: order.index(finding.severity))
    name = opened.described.format if opened.described is not None and opened.described.format != "float" else ""
    return CheckReport(opened.name, name, tuple(unique), readable, values)


def served_findings(layers: Iterable[Layer], described: Described) -> list[Finding]:
    """Findings for layers that no method class serves: one per layer kind and spec."""
    found = FindingLimit(8)
    refused: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        if layer.spec.is_float:
            continue
        if is_embedding(layer.name):
            found.add(
                Finding(
                    "unsupported-scheme",
                    "quantized embedding tables are not served",
                    layer=layer.name,
                    file=described.source,
                    expected="a float embedding",
                    found=layer.spec.scheme,
                    fix="export the embedding as float",
                )
            )
        elif layer.row is None:
            refused.setdefault((layer.kind, dispatch.describe(layer.spec, layer.stored)), []).append(layer)
        elif layer.kind == LayerKind.FUSED_MOE.value:
            for finding in expert_findings(layer.stored, layer.name, described.source):
                found.add(finding)
    for members in refused.values():
        first = members[0]
        finding = dispatch.unsupported(LayerKind(first.kind), first.spec, layer=first.name, file=described.source)
        count = sum(layer.count for layer in members)
        found.add(replace(finding, message=finding.message + (f" ({count:,} layers)" if count > 1 else "")))
    return found.close()


def difference_findings(layers: Iterable[Layer], source: str) -> list[Finding]:
    """Findings for layers that are served differently from what is stored: one per dispatch row and difference.

    Requantized FP8 is reported once per checkpoint, by ``serving.decide.requantized_findings``.
    """
    groups: dict[tuple[str, str, dispatch.Row], list[Layer]] = {}
    for layer in layers:
        if layer.difference and layer.row is not None:
            groups.setdefault((layer.difference, layer.instead, layer.row), []).append(layer)
    found = []
    for (difference, instead, row), members in groups.items():
        specs = list(dict.fromkeys(dispatch.describe(layer.stored) for layer in members))
        count = sum(layer.count for layer in members)
        found.append(
            Finding(
                "served-otherwise",
                difference + (f" ({count:,} layers)" if count > 1 else ""),
                layer=members[0].name,
                file=source,
                expected="; ".join(specs[:3]) + ("; ..." if len(specs) > 3 else ""),
                found=f"{row.name}: {row.method_name}",
                fix=f"nothing, or {instead}",
                severity=Severity.INFO,
            )
        )
    return found


def fused_findings(described: Described) -> list[Finding]:
    """Findings for shards of fused layers that the checkpoint quantizes differently, by vLLM's usual fused layers.

    A model class may fuse other layers, so only layers whose shards are all present are checked.
    """
    found = FindingLimit(8)
    resolver = LayerResolver(described)
    last_shards = {list(shards)[-1]: (fused, shards) for fused, shards in FUSED_FAMILIES.items()}
    for name in list(described.layer_names()):
        parent, dot, last = name.rpartition(".")
        prefix = name
        if last in last_shards:
            fused, shards = last_shards[last]
            if any(described.find(parent + dot + shard) is None for shard in shards):
                continue
            prefix = parent + dot + fused
        elif described.find_experts(name) is None:
            continue
        try:
            resolver.resolve_experts(name) if prefix == name else resolver.resolve(prefix)
        except NpuQuantError as error:
            for finding in error.findings:
                found.add(finding)
    return found.close()
