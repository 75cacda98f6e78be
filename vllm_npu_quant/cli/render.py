# SPDX-License-Identifier: Apache-2.0
"""Text output of the commands. Text from checkpoints is untrusted and is never interpreted as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_npu_quant.errors import Finding, Severity

if TYPE_CHECKING:
    from vllm_npu_quant.engine.compare import Comparison, RunReport
    from vllm_npu_quant.inspection.checks import CheckReport
    from vllm_npu_quant.inspection.host import Doctor
    from vllm_npu_quant.inspection.layers import Layer, Scheme
    from vllm_npu_quant.inspection.overview import Overview
    from vllm_npu_quant.inspection.planning import Plan, Roofline
    from vllm_npu_quant.inspection.support_matrix import MatrixRow

__all__ = [
    "check_text",
    "compare_text",
    "doctor_text",
    "findings_text",
    "inspect_text",
    "matrix_markdown",
    "plan_text",
    "run_text",
    "size_text",
    "table",
]

_KINDS = {"linear": "linear layer", "fused_moe": "experts' projection", "lm_head": "output head (lm_head)"}
#: Rows of a table of layers; the layers of one depth are one to twenty rows. --json has all of them.
MAX_ROWS = 4_000
#: Units of a chip's numbers, in 10^12.
_UNITS = {"bandwidth": "TB/s", "fp16": "TFLOPS", "int8": "TOPS"}
_COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}


def size_text(nbytes: float) -> str:
    """Format bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:,.0f} B" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} TiB"


def safe(value: object) -> str:
    """Replace control characters in untrusted text."""
    return "".join(char if char.isprintable() else "�" for char in str(value))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> Table:
    """A table without borders; the columns in ``right`` are right-aligned."""
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    numbers = set(right)
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(safe(cell)) for cell in row))
    return made


def counted(number: int, what: str) -> str:
    """Format a number with its noun, in the plural unless the number is 1."""
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    for name, value in facts:
        if value:
            console.print(Text(f"{name:<13}", style="bold") + Text(safe(value)), soft_wrap=True)


def inspect_text(console: Console, overview: Overview, *, layers: bool) -> None:
    """Print the result of ``inspect``; ``layers`` adds a table of every layer."""
    _overview_facts(console, overview)
    for scheme in overview.schemes:
        console.print()
        _scheme_lines(console, scheme)
    problems = [
        counted(count, what) for count, what in ((overview.errors, "error"), (overview.warnings, "warning")) if count
    ]
    if problems:
        console.print()
        text = f"{' and '.join(problems)} in config and files: `vllm-npu-quant check` tells which"
        console.print(Text(text, style="bold red" if overview.errors else "yellow"), soft_wrap=True)
    if layers:
        console.print()
        console.print(_layer_table(overview.layers[:MAX_ROWS]))
        if len(overview.layers) > MAX_ROWS:
            console.print(f"... and {counted(len(overview.layers) - MAX_ROWS, 'more layer')}: --json lists all")


def _overview_facts(console: Console, overview: Overview) -> None:
    decided = f" (decided by {overview.decided_by})" if overview.decided_by else ""
    _facts(
        console,
        [
            ("model", overview.model),
            ("format", (overview.format or "not quantized") + decided),
            ("producer", overview.producer),
            ("architecture", " ".join(filter(None, (overview.architecture, overview.dtype)))),
            (
                "weights",
                f"{size_text(overview.nbytes)}, {counted(overview.tensors, 'tensor')} in {counted(overview.files, 'file')}",
            ),
            *(("not loaded", f"{name}: {why}") for name, why in list(overview.ignored.items())[:5]),
        ],
    )


def _scheme_lines(console: Console, scheme: Scheme) -> None:
    head = Text(safe(f"{scheme.scheme}"), style="bold" if scheme.scheme != "FLOAT" else "")
    what = counted(scheme.layers, _KINDS.get(scheme.kind, "layer"))
    if scheme.kind == "other" and scheme.served:
        what = f"{scheme.layers:,} embeddings, norms and the like"
    head += Text(safe(f"  {what}, {size_text(scheme.nbytes)}"))
    console.print(head, soft_wrap=True)
    if not scheme.served:
        console.print(Text("  not served", style="bold red"))
    elif scheme.method:
        operators = ", ".join(scheme.operators) or "no quantized operator"
        console.print(Text(safe(f"  {scheme.method}: {operators}"), style="green"), soft_wrap=True)
    if scheme.scheme != "FLOAT" and scheme.spec:
        console.print(Text(safe(f"  {scheme.spec}"), style="dim"), soft_wrap=True)
    elif scheme.reason:
        console.print(Text(safe(f"  {scheme.reason}"), style="dim"), soft_wrap=True)
    if scheme.remark:
        console.print(Text(safe(f"  {scheme.remark}"), style="cyan"), soft_wrap=True)


def _layer_table(layers: Iterable[Layer]) -> Table:
    rows = [
        (
            layer.name + (f" x {layer.count}" if layer.count > 1 else ""),
            layer.kind,
            layer.scheme,
            layer.outputs or "",
            layer.inputs or "",
            size_text(layer.nbytes),
            layer.method or layer.reason,
        )
        for layer in layers
    ]
    return table(("layer", "kind", "scheme", "N", "K", "bytes", "method"), rows, right=(3, 4, 5))


def findings_text(console: Console, findings: Iterable[Finding]) -> None:
    """Print findings, each as one headline and its fields."""
    for finding in findings:
        head, _, rest = finding.render().partition("\n")
        mark = f"{finding.severity.value}[{finding.code}]"
        console.print(
            Text(mark, style=_COLOURS[finding.severity]) + Text(safe(head.removeprefix(mark))), soft_wrap=True
        )
        for line in rest.splitlines():
            console.print(Text(safe(line)), soft_wrap=True)


def check_text(console: Console, report: CheckReport, *, strict: bool) -> None:
    """Print the result of ``check``."""
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


def doctor_text(console: Console, host: Doctor) -> None:
    """Print the result of ``doctor``."""
    from vllm_npu_quant.inspection.host import as_facts

    _facts(console, as_facts(host).items())
    console.print()
    rows = [(entry.name, entry.version, entry.location) for entry in host.distributions]
    console.print(table(("package", "version", "where"), rows))
    if host.plugins:
        console.print()
        points = [
            (point.group.removeprefix("vllm."), point.name, point.distribution, "yes" if point.loaded else "no")
            for point in host.plugins
        ]
        console.print(table(("plugins", "name", "package", "loaded"), points))
    if host.environment:
        console.print()
        console.print(Text("environment", style="bold"))
        for name, value in host.environment:
            console.print(Text(safe(f"  {name}={value}")), soft_wrap=True)
    console.print()
    findings_text(console, host.findings)
    if not host.findings:
        console.print(Text("ok", style="bold green") + Text(" no conflict was found"))


def _microseconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds * 1e6:,.1f}"


def plan_text(console: Console, plan: Plan, *, layers: bool = False) -> None:
    """Print the result of ``plan``; ``layers`` prints the roofline of every layer instead of every scheme."""
    _plan_facts(console, plan)
    for phase, what in (("decode", f"{plan.batch} sequences"), ("prefill", f"{plan.prompt:,} tokens")):
        console.print()
        console.print(Text(f"{phase}, {what}: upper bounds from published peaks", style="bold"), soft_wrap=True)
        lines = [line for line in (plan.layers if layers else plan.roofline) if line.phase == phase]
        console.print(_roofline_table(lines, by_layer=layers))
    console.print()
    for source in plan.sources:
        number = (
            size_text(source.value) if source.what == "memory" else f"{source.value / 1e12:.4g} {_UNITS[source.what]}"
        )
        console.print(Text(safe(f"{source.what}: {number}, {source.source}"), style="dim"), soft_wrap=True)
    for remark in plan.remarks:
        console.print(Text(safe(f"note: {remark}"), style="dim"), soft_wrap=True)


def _plan_facts(console: Console, plan: Plan) -> None:
    room = "not known"
    if plan.tokens is not None:
        room = f"{plan.tokens:,} tokens beside the weights"
    usable = "not known"
    if plan.memory is not None and plan.usable is not None:
        usable = (
            f"{size_text(plan.usable)} of {size_text(plan.memory)}, {size_text(plan.reserve)} of it kept free (assumed)"
        )
    verdict = {True: "yes", False: "no", None: "not known"}[plan.fits]
    per_token = size_text(plan.kv_bytes_per_token) if plan.kv_bytes_per_token else "not known"
    ranks = f"tensor parallel {plan.tp}" + (f", expert parallel {plan.ep}" if plan.ep > 1 else "")
    _facts(
        console,
        [
            ("model", plan.model),
            ("device", f"{plan.device_name}, {ranks}"),
            (
                "weights",
                f"{size_text(plan.weight_bytes)} on each rank, prepared ({size_text(plan.stored_bytes)} stored)",
            ),
            ("KV cache", f"{per_token} per token on each rank ({plan.kv_how})"),
            ("memory", usable),
            ("room", room),
            ("fits", f"{verdict}, for max_model_len {plan.max_model_len:,}"),
            ("smallest TP", str(plan.smallest_tp or ("none" if plan.tokens is not None else "not known"))),
        ],
    )


def _roofline_table(lines: Sequence[Roofline], *, by_layer: bool) -> Table:
    others = list(lines[0].others) if lines else []
    rows = [
        (
            *((line.name,) if by_layer else ()),
            line.scheme,
            line.kind,
            f"{line.layers:,}",
            size_text(line.nbytes),
            f"{line.operations / 1e9:,.2f}",
            _microseconds(line.seconds),
            line.bound,
            "" if line.gain is None else f"{line.gain:.2f}",
            *(_microseconds(line.others[other]) for other in others),
        )
        for line in lines
    ]
    first = ("layer",) if by_layer else ()
    columns = (*first, "scheme", "kind", "layers", "moved", "Gop", "us", "bound", "x float")
    right = [len(first) + number for number in (2, 3, 4, 5, 7, *range(8, 8 + len(others)))]
    return table((*columns, *(f"us {other}" for other in others)), rows, right=right)


def compare_text(console: Console, result: Comparison) -> None:
    """Print the result of ``compare``."""
    change = result.perplexity / result.reference_perplexity - 1
    _facts(
        console,
        [
            ("model", result.model),
            ("reference", result.reference),
            ("operators", result.operators),
            ("tokens", f"{result.tokens:,}"),
            (
                "perplexity",
                f"{result.perplexity:.4f}, of the reference {result.reference_perplexity:.4f} ({change:+.2%})",
            ),
            ("divergence", f"{result.kl:.5f} nats per token on average, 99 % of them below {result.kl_99:.4f}"),
            ("agreement", f"{result.agreement:.1%} of the likeliest tokens are the same"),
        ],
    )
    if result.layers:
        console.print()
        rows = [
            (layer.layer, layer.method, "" if layer.own is None else f"{layer.own:.2%}", f"{layer.accumulated:.2%}")
            for layer in result.layers
        ]
        console.print(table(("layer, worst first", "method", "own error", "accumulated"), rows, right=(2, 3)))


def run_text(console: Console, report: RunReport) -> None:
    """Print the result of ``run``."""
    _facts(console, [("model", report.model), ("operators", report.operators)])
    for group in report.groups:
        operators = f": {', '.join(group.operators)}" if group.operators else ""
        line = f"  {group.count} {group.kind} {group.scheme}, {group.method}{operators}"
        console.print(Text(safe(line), style="dim"), soft_wrap=True)
    for prompt, answer in report.answers:
        console.print()
        console.print(Text(safe_lines(prompt), style="dim") + Text(safe_lines(answer), style="bold"), soft_wrap=True)


def safe_lines(value: str) -> str:
    """Replace control characters except line breaks in untrusted text."""
    return "\n".join(safe(line) for line in value.split("\n"))


def matrix_markdown(rows: Sequence[MatrixRow]) -> str:
    """Format the matrix as a Markdown page, docs/support_matrix.md."""
    from vllm_npu_quant.inspection.chips import CHIPS

    chips = list(CHIPS.values())
    lines = [
        "# What is served where",
        "",
        "<!-- Made by docs/generate.py from the formats, the dispatch table and the operator rules. -->",
        "",
        "One row for each scheme that a format can name. Linear and MoE name the method class that serves it; `lm_head` is",
        "served wherever Linear is. A chip says *yes* where the operators' pages list it for every kind that is served,",
        "*linear* or *experts* where only that kind, *no*, or *?* where the pages that were read do not say. Nothing in this",
        "table was run on an NPU: the arithmetic is checked on a CPU, the operators' domains are read in their documentation",
        "(`vllm_npu_quant/inspection/chips.py`).",
        "",
        "`vllm-npu-quant matrix` prints this page; `vllm-npu-quant check MODEL --device a2` applies it to a checkpoint.",
    ]
    for name in dict.fromkeys(row.format for row in rows):
        lines += ["", f"## {name}", ""]
        lines.append("| scheme | Linear | MoE experts | " + " | ".join(chip.key.upper() for chip in chips) + " |")
        lines.append("|---|---|---|" + "---|" * len(chips))
        for row in rows:
            if row.format != name:
                continue
            cells = [row.scheme, row.methods.get("linear", "-"), row.methods.get("fused_moe", "-")]
            cells += [row.chips[chip.key] for chip in chips]
            lines.append("| " + " | ".join(cells) + " |")
        for title, served in (("Not served:", False), ("Served, and to know:", True)):
            remarks = [
                f"- {row.scheme}: {row.remark}."
                for row in rows
                if row.format == name and row.remark and bool(row.methods) == served
            ]
            if remarks:
                lines += ["", title, "", *remarks]
    lines += ["", "## Chips", ""]
    lines += [f"- {chip.key.upper()}: {chip.name}; model dtype {' or '.join(chip.dtypes)}" for chip in chips]
    return "\n".join([*lines, ""])
