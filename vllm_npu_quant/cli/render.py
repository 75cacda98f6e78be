# SPDX-License-Identifier: Apache-2.0
"""The commands' data for people. The texts of checkpoints are a stranger's: nothing of them is taken for markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_npu_quant.errors import Finding, Severity
from vllm_npu_quant.inspection.checks import CheckReport
from vllm_npu_quant.inspection.overview import Overview

__all__ = ["check_text", "findings_text", "inspect_text", "size_text", "table"]

_COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}


def size_text(nbytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:,.0f} B" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} TiB"


def safe(value: object) -> str:
    """A stranger's text without control characters."""
    return "".join(char if char.isprintable() else "�" for char in str(value))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> Table:
    """A plain table; the columns in ``right`` are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    numbers = set(right)
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(safe(cell)) for cell in row))
    return made


def _facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    for name, value in facts:
        if value:
            console.print(Text(f"{name:<13}", style="bold") + Text(safe(value)))


def inspect_text(console: Console, overview: Overview, *, layers: bool) -> None:
    decided = f" (decided by {overview.decided_by})" if overview.decided_by else ""
    _facts(
        console,
        [
            ("model", overview.model),
            ("format", (overview.format or "not quantized") + decided),
            ("producer", overview.producer),
            ("architecture", " ".join(filter(None, (overview.architecture, overview.dtype)))),
            ("weights", f"{size_text(overview.nbytes)}, {overview.tensors:,} tensors in {overview.files:,} files"),
        ],
    )
    console.print()
    rows = []
    for scheme in overview.schemes:
        method: Text | str = scheme.method or scheme.reason
        if not scheme.served:
            method = Text("not served", style="bold red")
        spec = scheme.spec if scheme.method or not scheme.served else ""
        if scheme.kind == "other" and scheme.served:
            method = "embeddings, norms and the like"
        rows.append(
            (
                scheme.scheme,
                scheme.kind,
                f"{scheme.layers:,}",
                size_text(scheme.nbytes),
                method,
                ", ".join(scheme.operators),
                spec,
            )
        )
    console.print(
        table(("scheme", "kind", "layers", "bytes", "method", "operators", "numbers"), rows, right=(2, 3)),
        soft_wrap=False,
    )
    if layers:
        console.print()
        console.print(
            table(
                ("layer", "kind", "scheme", "N", "K", "bytes", "method"),
                [
                    (
                        layer.name + (f" x {layer.count}" if layer.count > 1 else ""),
                        layer.kind,
                        layer.scheme,
                        layer.outputs or "",
                        layer.inputs or "",
                        size_text(layer.nbytes),
                        layer.method or layer.reason,
                    )
                    for layer in overview.layers
                ],
                right=(3, 4, 5),
            )
        )


def findings_text(console: Console, findings: Iterable[Finding]) -> None:
    for finding in findings:
        head, _, rest = finding.render().partition("\n")
        mark = f"{finding.severity.value}[{finding.code}]"
        console.print(
            Text(mark, style=_COLOURS[finding.severity]) + Text(safe(head.removeprefix(mark))), soft_wrap=True
        )
        for line in rest.splitlines():
            console.print(Text(safe(line)), soft_wrap=True)


def check_text(console: Console, report: CheckReport, *, strict: bool) -> None:
    findings_text(console, report.findings)
    counts = [(severity, report.count(severity)) for severity in Severity]
    words = ", ".join(f"{count} {severity.value}{'s' if count > 1 else ''}" for severity, count in counts if count)
    what = f"{report.format} checkpoint" if report.format else "checkpoint"
    if report.passed(strict=strict):
        read = "headers and values" if report.values else "headers"
        console.print(
            Text("ok", style="bold green")
            + Text(safe(f" {report.model}: this {what} can be loaded, by its config and {read}"))
            + Text(f" ({words})" if words else "")
        )
    else:
        console.print(Text("failed", style="bold red") + Text(safe(f" {report.model}: {words or 'not readable'}")))
