# SPDX-License-Identifier: Apache-2.0
"""The commands. Exit codes: 0 success, 1 findings, 2 wrong usage or unreadable checkpoint."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_npu_quant.errors import Finding, NpuQuantError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app"]

app = typer.Typer(
    help="Know before you load: quantized checkpoints for vLLM on Ascend NPUs. No command here needs an NPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or the id of a model of the hub.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
LinksOption = Annotated[bool, typer.Option("--follow-links", help="Follow links that lead out of the folder.")]
DeviceOption = Annotated[str | None, typer.Option(help="a2, a3, a5 or 310p: apply this chip's rules, too.")]
TpOption = Annotated[int, typer.Option("--tp", min=1, max=4096, help="Tensor-parallel size.")]
EpOption = Annotated[int, typer.Option("--ep", min=1, max=4096, help="Expert-parallel size.")]


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    # Output to a pipe is not wrapped at the terminal's width.
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 240
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def _print_json(data: dict[str, Any]) -> None:
    # ASCII only: checkpoints contain untrusted text, which not every terminal or pipe can encode.
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


@contextmanager
def _refusals(command: str, as_json: bool) -> Iterator[None]:
    """Print errors that a user can cause and set the exit code."""
    try:
        yield
    except NpuQuantError as error:
        _refuse(command, as_json, error.findings)
        unreadable = any(finding.code == "unreadable-file" for finding in error.findings)
        raise typer.Exit(2 if unreadable else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        sys.stdout = None  # type: ignore[assignment]
        raise typer.Exit(0) from None


def _refuse(command: str, as_json: bool, findings: tuple[Finding, ...]) -> None:
    if as_json:
        from vllm_npu_quant.cli.data import plain, wrapped

        _print_json(wrapped(command, {"error": True, "findings": plain(findings)}))
        return
    from vllm_npu_quant.cli.render import findings_text

    findings_text(_console(stderr=True), findings)


def _usage(message: str) -> typer.BadParameter:
    return typer.BadParameter(message)


def _version(asked: bool) -> None:
    if asked:
        from vllm_npu_quant._version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Know before you load: quantized checkpoints for vLLM on Ascend NPUs."""


@app.command()
def inspect(
    model: ModelArgument,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    follow_links: LinksOption = False,
) -> None:
    """Show a checkpoint's format, schemes, and the NPU method class and operators of its layers."""
    from vllm_npu_quant.inspection.overview import inspect as inspect_model

    with _refusals("inspect", as_json):
        overview = inspect_model(model, revision=revision, follow_links=follow_links)
        if as_json:
            from vllm_npu_quant.cli.data import inspect_data

            _print_json(inspect_data(overview, layers=layers))
        else:
            from vllm_npu_quant.cli.render import inspect_text

            inspect_text(_console(), overview, layers=layers)


@app.command()
def check(
    model: ModelArgument,
    tp: TpOption = 1,
    ep: EpOption = 1,
    device: DeviceOption = None,
    values: Annotated[
        bool, typer.Option("--values", help="Read the weights, too: scales, zero points, ranges of integers.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as findings.")] = False,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    follow_links: LinksOption = False,
) -> None:
    """Check a checkpoint for everything that could go wrong, at once. Exit code 1 if something would."""
    from vllm_npu_quant.inspection.checks import check as run_check

    _known_device(device)
    with _refusals("check", as_json), _progress(values and not as_json) as progress:
        report = run_check(
            model,
            tp=tp,
            ep=ep,
            device=device,
            values=values,
            revision=revision,
            follow_links=follow_links,
            progress=progress,
        )
    with _refusals("check", as_json):
        if as_json:
            from vllm_npu_quant.cli.data import check_data

            _print_json(check_data(report, strict=strict))
        else:
            from vllm_npu_quant.cli.render import check_text

            check_text(_console(), report, strict=strict)
    if not report.passed(strict=strict):
        unreadable = not report.readable and any(finding.code == "unreadable-file" for finding in report.findings)
        raise typer.Exit(2 if unreadable else 1)


@app.command()
def plan(
    model: ModelArgument,
    device: Annotated[str, typer.Option(help="a2, a3, a5 or 310p.")],
    tp: TpOption = 1,
    ep: EpOption = 1,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, max=1 << 31, help="Tokens of one sequence; default: config.json's.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of the device memory that vLLM may use.")
    ] = 0.9,
    batch: Annotated[int, typer.Option(min=1, max=1 << 20, help="Sequences of a decode step.")] = 16,
    prompt: Annotated[int, typer.Option(min=1, max=1 << 24, help="Tokens of a prefill.")] = 2048,
    layers: Annotated[bool, typer.Option("--layers", help="Bounds for every layer, the depths together.")] = False,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    follow_links: LinksOption = False,
) -> None:
    """Estimate whether a checkpoint fits, with how many tokens, and the gain of its schemes. Exit code 1 if it does not
    fit."""
    from vllm_npu_quant.inspection.planning import plan as make_plan

    _known_device(device)
    with _refusals("plan", as_json):
        made = make_plan(
            model,
            device=device,
            tp=tp,
            ep=ep,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            batch=batch,
            prompt=prompt,
            revision=revision,
            follow_links=follow_links,
        )
        if as_json:
            from vllm_npu_quant.cli.data import plan_data

            _print_json(plan_data(made, layers=layers))
        else:
            from vllm_npu_quant.cli.render import plan_text

            plan_text(_console(), made, layers=layers)
    if made.fits is False:
        raise typer.Exit(1)


@app.command()
def matrix(as_json: JsonOption = False) -> None:
    """Print the support matrix: format, scheme, layer kind and chip, as a page of Markdown."""
    from vllm_npu_quant.inspection.support_matrix import matrix as make_matrix

    with _refusals("matrix", as_json):
        rows = make_matrix()
        if as_json:
            from vllm_npu_quant.cli.data import matrix_data

            _print_json(matrix_data(rows))
        else:
            from vllm_npu_quant.cli.render import matrix_markdown

            typer.echo(matrix_markdown(rows), nl=False)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show what is installed on this host, the platform that vLLM will choose, and problems. For bug reports, too."""
    from vllm_npu_quant.inspection.host import doctor as examine_host

    with _refusals("doctor", as_json):
        host = examine_host()
        if as_json:
            from vllm_npu_quant.cli.data import doctor_data

            _print_json(doctor_data(host))
        else:
            from vllm_npu_quant.cli.render import doctor_text

            doctor_text(_console(), host)
    if not host.passed:
        raise typer.Exit(1)


@app.command()
def compare(
    model: ModelArgument,
    reference: Annotated[str, typer.Option(help="The float model: a folder, or the id of a model of the hub.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file; default: Python's help topics.")] = None,
    tokens: Annotated[int, typer.Option(min=16, max=1 << 20, help="Tokens of the text that are used.")] = 2048,
    window: Annotated[int, typer.Option(min=16, max=1 << 17, help="Tokens that are scored together.")] = 512,
    layers: Annotated[bool, typer.Option("--layers", help="Measure every layer, worst first.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the layers' errors: an .svg or .png file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity and divergence of a quantized model against its float original, through vLLM's engine."""
    _needs_engine("compare")
    if plot is not None:
        from vllm_npu_quant.cli.plot import plot_problem

        problem = plot_problem(plot)
        if problem:
            raise _usage(problem)
    content = None if text is None else _read_text(text)
    with _refusals("compare", as_json):
        _openable(model, reference)
    with _refusals("compare", as_json), _engine_output():
        from vllm_npu_quant.engine.compare import compare as run_compare

        result = run_compare(
            model,
            reference,
            text=content,
            tokens=tokens,
            window=window,
            layers=layers or plot is not None,
            progress=None if as_json else _say,
        )
    with _refusals("compare", as_json):
        if plot is not None:
            from vllm_npu_quant.cli.plot import write_plot

            rows = [
                (layer.layer, layer.own)
                if layer.own is not None
                else (f"{layer.layer} (accumulated)", layer.accumulated)
                for layer in result.layers[:60]
            ]
            which = f", the worst 60 of {len(result.layers)}" if len(result.layers) > 60 else ""
            try:
                write_plot(plot, f"{model}: relative error of the layers' outputs{which}", rows)
            except (OSError, ValueError) as error:
                raise _usage(str(error)) from None
        if as_json:
            from vllm_npu_quant.cli.data import plain, wrapped

            _print_json(wrapped("compare", plain(result)))
        else:
            from vllm_npu_quant.cli.render import compare_text

            compare_text(_console(), result)


@app.command()
def run(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="What to continue; may be given several times.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1 << 16, help="Tokens of each answer.")] = 32,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and answer together.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or auto.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue prompts with any model, and show what its layers became."""
    _needs_engine("run")
    if dtype not in ("auto", "bfloat16", "float16"):
        raise _usage(f"--dtype is auto, bfloat16 or float16, not {dtype[:40]!r}")
    prompts = prompt or ["The capital of France is"]
    with _refusals("run", as_json):
        _openable(model)
    with _refusals("run", as_json), _engine_output():
        from vllm_npu_quant.engine.compare import run as run_model

        options = {} if max_model_len is None else {"max_model_len": max_model_len}
        report = run_model(model, prompts, max_tokens=max_tokens, dtype=dtype, **options)
    if as_json:
        from vllm_npu_quant.cli.data import plain, wrapped

        _print_json(wrapped("run", plain(report)))
    else:
        from vllm_npu_quant.cli.render import run_text

        run_text(_console(), report)


def _openable(*models: str) -> None:
    """Reject folders without weights before starting an engine, which would fail much later.

    Raises:
        NpuQuantError: unreadable-file.
    """
    from vllm_npu_quant.checkpoint import is_path
    from vllm_npu_quant.inspection.model import open_model

    for model in models:
        if os.path.isdir(model) or is_path(model):
            opened = open_model(model, follow_links=True)
            if not opened.checkpoint.files:
                raise NpuQuantError(opened.checkpoint.findings)


def _needs_engine(command: str) -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise _usage(f"{command} runs vLLM's engine, and vllm is not installed; pip install 'vllm-npu-quant[cpu]'")


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > 64 << 20:
            raise _usage(f"{path} is larger than 64 MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _usage(f"{path} cannot be read as UTF-8 text: {error}") from None


def _say(line: str) -> None:
    typer.echo(line, err=True)


@contextmanager
def _engine_output() -> Iterator[None]:
    """Redirect the engine's output to stderr, so that stdout has only the result, and turn its failures into findings."""
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        # Users of these commands cannot act on the libraries' warnings.
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (NpuQuantError, typer.Exit):
        raise
    except Exception as error:  # the last resort: vLLM documents no exception types, and any library below may raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, NpuQuantError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, NpuQuantError):  # pydantic and vLLM raise their own errors from it
            raise cause from None
        if level.upper() in ("INFO", "DEBUG"):  # the fix below recommends INFO
            traceback.print_exception(error)
        first = (str(error).strip() or type(error).__name__).splitlines()
        text = " ".join(line.strip() for line in first[:4])[:600]
        raise NpuQuantError(
            [
                Finding(
                    "engine-failed",
                    "vLLM could not run the model",
                    found=f"{type(error).__name__}: {text}",
                    fix="run `vllm-npu-quant check` on it, and read vLLM's lines above (VLLM_LOGGING_LEVEL=INFO for more)",
                )
            ]
        ) from None


def _known_device(device: str | None) -> None:
    if device is None:
        return
    from vllm_npu_quant.inspection.chips import chip_of

    try:
        chip_of(device)
    except ValueError as error:
        raise _usage(str(error)) from None


@contextmanager
def _progress(wanted: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr if that is a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading weights"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda _, done, total: bar.update(task, completed=done, total=total)
