# SPDX-License-Identifier: Apache-2.0
"""A real W8A8 ModelSlim checkpoint answers through vLLM.

    python examples/demo.py                  # SmolLM2-135M, made the first time: 93 MB download, 0.5 GB in the cache
    python examples/demo.py --model DIR      # a checkpoint of yours

Nothing tells vLLM about the format: the plugin is found by its entry point, and it recognises the checkpoint.
Exits with 1 if the model does not know the capital of France.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from vllm import LLM

PROMPTS = (
    "The capital of France is",
    "The largest planet in the solar system is",
    "Water is made of hydrogen and",
    "def factorial(n):",
)
EXPECTED = {PROMPTS[0]: "Paris"}

_DEFAULT_ENVIRONMENT = {
    # The engine in this process: it starts faster and its layers can be looked at.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # GiB. Otherwise vLLM wants 92 % of the machine's memory for it, and refuses to start where that is not free.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

#: These warn of what is so on every CPU host (no Triton, no tcmalloc, eager mode), a dozen lines at each start.
_CHATTY = ("vllm.config.vllm", "vllm.engine.arg_utils", "vllm.platforms.cpu", "vllm.v1.worker.cpu_worker")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    console = Console(highlight=False, soft_wrap=True)
    quiet = "VLLM_LOGGING_LEVEL" not in os.environ
    for name, value in _DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    started = time.perf_counter()
    model = options.model or _smollm2(options.scheme)
    _step(console, f"checkpoint  {model}", started)

    started = time.perf_counter()
    if quiet:
        _hush()
    from vllm import LLM, SamplingParams

    eager = not options.compile
    console.print(f"starting    LLM(model={str(model)!r}{', enforce_eager=True' if eager else ''})")
    llm = LLM(model=str(model), enforce_eager=eager)
    _step(console, "engine is up", started)

    console.print()
    _print_platform(console)
    _print_layers(console, llm)

    console.print()
    greedy = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    wrong = []
    for output in llm.generate(list(PROMPTS), greedy, use_tqdm=False):
        answer = output.outputs[0].text
        console.print(f"[dim]{output.prompt}[/dim][bold]{escape(answer)}[/bold]")
        console.print("[dim]" + "-" * 72 + "[/dim]")
        expected = EXPECTED.get(output.prompt)
        if expected and not answer.strip().startswith(expected):
            wrong.append(f"{output.prompt!r} should continue with {expected!r}, not {answer!r}")
    _print_speed(console, llm)

    if wrong and options.model is None:
        for line in wrong:
            console.print(f"[red]wrong: {escape(line)}[/red]")
        return 1
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text from a ModelSlim checkpoint through vLLM.")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: SmolLM2-135M-Instruct, made here)")
    parser.add_argument("--scheme", default="W8A8_DYNAMIC", help="how SmolLM2 is quantized: W8A8_DYNAMIC or W8A16")
    parser.add_argument("--max-tokens", type=int, default=32, help="length of the answers")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with torch.compile: about a minute to start on a CPU, and it needs a C++ compiler",
    )
    options = parser.parse_args(arguments)
    if options.compile and not (shutil.which("g++") or shutil.which("clang++")):
        parser.error("--compile needs a C++ compiler (g++), and none is on the PATH")
    return options


def _smollm2(scheme: str) -> Path:
    from smollm2 import smollm2_modelslim

    return smollm2_modelslim(scheme)


def _hush() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in _CHATTY:
        # A filter, because vLLM resets the levels of its loggers whenever it builds an engine.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def _print_platform(console: Console) -> None:
    from vllm.platforms import current_platform

    from vllm_npu_quant.emulation import is_emulated

    where = "emulated on the CPU" if is_emulated() else "of torch_npu"
    kind = type(current_platform)
    console.print(f"platform    {kind.__module__}.{kind.__qualname__}")
    console.print(f"operators   torch.ops.npu, {where}")


def _print_layers(console: Console, llm: LLM) -> None:
    from vllm_npu_quant.engine import layer_summary

    rows: list[tuple[str, ...]] = [("layers", "kind", "scheme", "method class", "operators")]
    for group in layer_summary(llm):
        cells = (group.count, group.kind, group.scheme, group.method, ", ".join(group.operators))
        rows.append(tuple(str(getattr(cell, "value", cell)) for cell in cells))
    # Not a rich table: that would cut names short where the output is a pipe.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for count, *names in rows:
        line = "  ".join(name.ljust(width) for name, width in zip(names, widths[1:], strict=True))
        console.print(escape(f"{count.rjust(widths[0])}  {line}".rstrip()))


def _print_speed(console: Console, llm: LLM, *, sequences: int = 8, prompt: int = 256, decode: int = 32) -> None:
    """Tokens per second: prefill from long prompts and one new token, decode from short prompts and many."""
    from vllm import SamplingParams

    prompt = min(prompt, llm.llm_engine.model_config.max_model_len - 1)
    fresh = iter(range(100, 400))

    def seconds(length: int, new_tokens: int) -> float:
        # Every sequence starts with a token of its own, so that nothing comes from the prefix cache.
        batch: list[Any] = [{"prompt_token_ids": [next(fresh)] * length} for _ in range(sequences)]
        parameters = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(batch, parameters, use_tqdm=False)
        return time.perf_counter() - started

    seconds(4, 2)  # the first batch of this size allocates and, with --compile, compiles
    console.print(
        f"speed       prefill {sequences * prompt / seconds(prompt, 1):,.0f} tokens/s, "
        f"decode {sequences * decode / seconds(4, decode):,.0f} tokens/s "
        f"({sequences} sequences at a time, {os.cpu_count()} CPUs)"
    )


def _step(console: Console, text: str, started: float) -> None:
    console.print(f"{text}  [dim]({time.perf_counter() - started:.1f} s)[/dim]")


if __name__ == "__main__":
    sys.exit(main())
