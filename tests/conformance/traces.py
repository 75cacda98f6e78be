# SPDX-License-Identifier: Apache-2.0
"""Traces: what ``prepare`` and ``apply`` of a method ask of torch_npu, as text.

The folder ``traces`` holds one file for each row of the dispatch table (of w13, for experts). They are written anew with

    python -m tests.conformance.traces
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.conformance.method_cases import CASES, TOKENS, Case, LinearCase, Prepared
from tests.conformance.recording import Call, Recorder, Tensor, dtype_name
from tests.methods.layers import emulation

FOLDER = Path(__file__).with_name("traces")
assert emulation  # importing tests.methods.layers registers the operators, where no torch_npu is


@dataclass
class Trace:
    """One case.

    Attributes:
        prepared: the tensors that ``prepare`` made.
        at_load, at_forward: the calls of ``prepare`` and of ``apply``.
        others: all other operators of ``apply``.
        problems: what is wrong, if anything.
    """

    case: Case
    prepared: dict[str, Tensor]
    at_load: list[Call]
    inputs: dict[str, Tensor]
    at_forward: list[Call]
    output: Tensor
    others: list[str]
    problems: list[str]

    @property
    def calls(self) -> list[Call]:
        return self.at_load + self.at_forward

    def __str__(self) -> str:
        lines = [f"## {self.case.title}", "", "load"]
        lines += [f"    {call}" for call in self.at_load]
        lines += [f"    layer.{name} = {tensor}" for name, tensor in self.prepared.items()]
        inputs = ", ".join(f"{name}={tensor}" for name, tensor in self.inputs.items())
        lines += [f"forward({inputs})", *(f"    {call}" for call in self.at_forward), f"    return {self.output}", ""]
        return "\n".join(lines)


def input_shape(shape: Iterable[int], tokens: Any) -> tuple[Any, ...]:
    return tuple(tokens if size == -1 else size for size in shape)


def host_input(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if name == "topk_ids":
        return (torch.arange(shape[0] * shape[1], dtype=dtype) % 4).view(shape)
    return torch.ones(shape, dtype=dtype)


def checked_output(prepared: Prepared, output: Tensor, tokens: int) -> list[str]:
    dtype, shape = prepared.expected
    wanted = f"{dtype_name(dtype)}[{', '.join(map(str, input_shape(shape, tokens)))}]"
    return [] if str(output) == wanted else [f"apply gives {output}, not {wanted}"]


def on_the_cpu(case: Case) -> Trace:
    """Over the emulation, with real numbers."""
    with torch.inference_mode(), Recorder() as load:
        prepared = case.prepare(lambda tensor: tensor)
    inputs = {
        name: host_input(name, dtype, input_shape(shape, TOKENS)) for name, (dtype, shape) in prepared.inputs.items()
    }
    forward = Recorder()
    described = {}
    for name, tensor in prepared.tensors.items():
        described[name] = Tensor.of(tensor, load.is_nz(tensor))
        if load.is_nz(tensor):
            forward.mark_nz(tensor)
    with torch.inference_mode(), forward:
        result = prepared.apply(SimpleNamespace(**prepared.tensors), **inputs)
    output = Tensor.of(result)
    return Trace(
        case,
        described,
        load.calls,
        {name: Tensor.of(tensor) for name, tensor in inputs.items()},
        forward.calls,
        output,
        list(forward.others),
        load.problems + forward.problems + checked_output(prepared, output, TOKENS),
    )


def file_of(case: Case) -> str:
    """The name of the file that holds a case's trace."""
    row = case.row if isinstance(case, LinearCase) else case.rows[0]
    kind = "linear" if isinstance(case, LinearCase) else "moe"
    return f"{kind}-{row.name.lower().replace(', ', '-').replace(' ', '-')}.txt"


def texts(traces: Iterable[Trace]) -> dict[str, str]:
    """The files: name -> content."""
    files: dict[str, list[str]] = {}
    for trace in traces:
        case = trace.case
        row = case.row if isinstance(case, LinearCase) else case.rows[0]
        head = f"# {'Linear' if isinstance(case, LinearCase) else 'Experts, w13'}: {row.name} ({row.method_name})\n"
        files.setdefault(file_of(case), [head]).append(str(trace))
    return {name: "\n".join(parts) for name, parts in files.items()}


def stored() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(FOLDER.glob("*.txt"))}


def write() -> None:
    """Write the files anew from the emulation."""
    FOLDER.mkdir(exist_ok=True)
    made = texts(on_the_cpu(case) for case in CASES)
    for name in stored().keys() - made.keys():
        (FOLDER / name).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text)
    print(f"{len(CASES)} traces in {len(made)} files of {FOLDER}")


if __name__ == "__main__":
    write()
