# SPDX-License-Identifier: Apache-2.0
"""Perplexity of model folders, through vLLM's engine.

    python benchmarks/perplexity.py MODEL_DIR [MODEL_DIR ...]      # ratios to the first
    python benchmarks/perplexity.py --demo                         # SmolLM2 in bfloat16 against its W8A8_DYNAMIC

The text is cut into windows that are scored independently; the first token of a window has no prediction and is not
counted. The default text comes with Python (pydoc_data.topics), so nothing is downloaded. Every model runs in a process
of its own, one after the other, and is given the same text; models of different tokenizers cannot be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIN_TOKENS = 4000

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    # GiB; otherwise vLLM wants 92 % of the machine's memory for it.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass(frozen=True)
class Result:
    """What one model scored.

    Attributes:
        model: the folder.
        perplexity: exp of the mean negative log-probability of the counted tokens.
        tokens: how many were counted.
        text_sha256: of the token ids, to tell whether two results may be compared.
        quantization: what the engine took the checkpoint for; None for a float model.
        platform: the vLLM platform class that ran it.
        seconds_load, seconds_score: wall time.
    """

    model: str
    perplexity: float
    tokens: int
    text_sha256: str
    quantization: str | None
    platform: str
    seconds_load: float
    seconds_score: float


def default_text() -> str:
    """English prose about Python: pydoc's help topics, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[:40])


def score(model: Path, text: str, *, window: int, max_tokens: int, options: dict[str, Any]) -> Result:
    """Load ``model`` into an engine in this process and score ``text``.

    Args:
        window: tokens of one window.
        max_tokens: tokens of the text that are used, at most.
        options: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: if the text is shorter than MIN_TOKENS tokens.
    """
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    started = time.perf_counter()
    # The window plus the one token that generate() insists on making.
    arguments = {"max_model_len": window + 1, "max_num_seqs": 8, "enforce_eager": True, **options}
    # Cached prompt tokens would come without log-probabilities.
    llm = LLM(model=str(model), enable_prefix_caching=False, **arguments)
    loaded = time.perf_counter()

    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)[:max_tokens]
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens; a figure from fewer than {MIN_TOKENS} means little")
    windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    # 0: the log-probability of the token that is there, and no other.
    parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": part} for part in windows], parameters, use_tqdm=sys.stderr.isatty())
    loss = [
        -logprobs[token].logprob
        for part, output in zip(windows, outputs, strict=True)
        for token, logprobs in zip(part[1:], output.prompt_logprobs[1:], strict=True)
    ]
    kind = type(current_platform)
    return Result(
        model=str(model),
        perplexity=math.exp(math.fsum(loss) / len(loss)),
        tokens=len(loss),
        text_sha256=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        quantization=llm.llm_engine.model_config.quantization,
        platform=f"{kind.__module__}.{kind.__qualname__}",
        seconds_load=round(loaded - started, 2),
        seconds_score=round(time.perf_counter() - loaded, 2),
    )


def score_in_subprocess(model: Path, arguments: Sequence[str]) -> Result:
    """Score one model in a process of its own, so that its memory is free again for the next.

    Raises:
        SystemExit: if that process fails; it has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, __file__, str(model), *arguments, "--one-to", str(file)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"error: {model} could not be scored")
        return Result(**json.loads(file.read_text()))


def table(results: Sequence[Result]) -> str:
    """The results as text; the ratio is to the first."""
    names = _short_names([result.model for result in results])
    width = max(map(len, names))
    lines = [f"{'model':<{width}}  quantization  perplexity   ratio  tokens  load s  score s"]
    for name, result in zip(names, results, strict=True):
        ratio = result.perplexity / results[0].perplexity
        lines.append(
            f"{name:<{width}}  {result.quantization or '-':<12}  {result.perplexity:10.4f}  {ratio:.4f}  "
            f"{result.tokens:6d}  {result.seconds_load:6.1f}  {result.seconds_score:7.1f}"
        )
    if len({result.text_sha256 for result in results}) > 1:
        lines.append("the models cut the text into different tokens: these figures cannot be compared")
    return "\n".join(lines)


def _short_names(models: Sequence[str]) -> list[str]:
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else list(models)


def _demo_models(scheme: str) -> list[Path]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from smollm2 import smollm2_bf16, smollm2_modelslim

    return [smollm2_bf16(), smollm2_modelslim(scheme)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, help="model folders; ratios are to the first")
    parser.add_argument("--demo", action="store_true", help="SmolLM2 in bfloat16 and quantized, made in the cache")
    parser.add_argument("--scheme", default="W8A8_DYNAMIC", help="with --demo: W8A8_DYNAMIC or W8A16")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file instead of Python's help topics")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of the text that are used")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument(
        "--limit", type=float, help="exit with 1 if a ratio to the first exceeds this, for example 1.01"
    )
    parser.add_argument("--llm", type=json.loads, default={}, help="further arguments of vllm.LLM, as a JSON object")
    parser.add_argument("--one-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.window < 2:
        parser.error("--window must be at least 2")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    if options.one_to:
        text = options.text.read_text(encoding="utf-8") if options.text else default_text()
        (model,) = options.models
        result = score(model, text, window=options.window, max_tokens=options.max_tokens, options=options.llm)
        options.one_to.write_text(json.dumps(asdict(result)))
        return 0

    models = (_demo_models(options.scheme) if options.demo else []) + options.models
    if not models:
        parser.error("name a model folder, or --demo")
    passed_on = ["--window", str(options.window), "--max-tokens", str(options.max_tokens)]
    passed_on += ["--llm", json.dumps(options.llm)]
    if options.text:
        passed_on += ["--text", str(options.text)]
    results = [score_in_subprocess(model, passed_on) for model in models]
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    worst = max(result.perplexity / results[0].perplexity for result in results)
    if options.limit is not None and worst > options.limit:
        print(f"error: a ratio of {worst:.4f} exceeds {options.limit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
