# SPDX-License-Identifier: Apache-2.0
"""Comparison of a quantized model with its float reference, and single runs, by an engine in this process.

Both models see the same token ids. One engine runs at a time; the first one's log-probabilities are kept on disk.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["Comparison", "LayerError", "RunReport", "compare", "run"]

#: Tokens of the first window that per-layer errors are measured on.
LAYER_TOKENS = 32
#: Limit of the log-probabilities that are kept on disk.
MAX_BYTES = 16 << 30
#: Fewest tokens that are scored.
MIN_TOKENS = 16


@dataclass(frozen=True)
class LayerError:
    """Errors of one layer's output, relative to the reference's: ||a - b|| / ||b||.

    Attributes:
        layer: its name in vLLM's model. method: the NPU method class, or the class of a float layer's method.
        own: with the reference's input; None if the layer cannot run alone (experts).
        accumulated: in the model, with the errors of all layers before it.
    """

    layer: str
    method: str
    own: float | None
    accumulated: float


@dataclass(frozen=True)
class Comparison:
    """Measured differences between a model and its reference.

    Attributes:
        model, reference: as the user named them.
        tokens: number of compared predictions.
        perplexity, reference_perplexity: exp of the mean negative log-probability of the text's tokens.
        kl: mean over the tokens of KL(reference || model), in nats.
        kl_99: its 99th percentile.
        agreement: fraction of the tokens for which both models rank the same token first.
        operators: where the quantized operators ran.
        layers: worst first; empty unless asked for.
    """

    model: str
    reference: str
    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    kl_99: float
    agreement: float
    operators: str
    layers: tuple[LayerError, ...] = ()


@dataclass(frozen=True)
class RunReport:
    """Answers of a model.

    Attributes:
        model: as the user named it. operators: where the quantized operators ran.
        groups: the layers by kind, scheme and method class. answers: (prompt, continuation).
    """

    model: str
    operators: str
    groups: tuple[Any, ...]
    answers: tuple[tuple[str, str], ...]


@dataclass
class _Recording:
    """Recorded values of one engine: a log-softmax per window, and inputs and outputs of layers."""

    logits: list[torch.Tensor] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)


def default_text() -> str:
    """English prose that comes with Python: its help topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[:40])


def compare(
    model: str,
    reference: str,
    *,
    text: str | None = None,
    tokens: int = 2048,
    window: int = 512,
    layers: bool = False,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Comparison:
    """Measure both models' perplexity, the divergence between them and, with ``layers``, the error of each layer.

    Args:
        model: a folder or hub id of a quantized model. reference: of its float original.
        text: the text to score; None for Python's help topics.
        tokens: the most tokens of the text to use. window: tokens that are scored together.
        layers: measure every Linear and MoE layer, too.
        progress: called with one line per step.
        options: further arguments of ``vllm.LLM``.

    Raises:
        NpuQuantError: if the models tokenize the text differently, or the text is too short.
    """
    say = progress or (lambda _: None)
    text = default_text() if text is None else text
    with tempfile.TemporaryDirectory(prefix="vllm-npu-quant-") as scratch:
        store = Path(scratch)
        say(f"running the reference {reference}")
        first = _score(reference, text, None, tokens, window, layers, None, options, store)
        say(f"running {model}")
        second = _score(model, text, first.ids, tokens, window, layers, first, options, None)
    ordered = sorted(second.layers, key=lambda layer: -(layer.own if layer.own is not None else layer.accumulated))
    return Comparison(
        model,
        reference,
        len(second.kl),
        math.exp(float(np.mean(second.loss))),
        math.exp(float(np.mean(first.loss))),
        float(np.mean(second.kl)),
        float(np.quantile(second.kl, 0.99)),
        float(np.mean(second.agreement)),
        _operators(),
        tuple(ordered),
    )


@dataclass
class _Scored:
    """Measurements of one model.

    Attributes:
        ids: the text's tokens. loss: -log p of each that has a prediction. files: log-probabilities, one per window.
        kl, agreement: divergence from the reference and agreement with it, of each; empty for the reference itself.
        recording: of the layers. layers: their errors.
    """

    ids: list[int]
    loss: np.ndarray
    files: list[Path]
    kl: np.ndarray
    agreement: np.ndarray
    recording: _Recording
    layers: list[LayerError]


def _score(
    model: str,
    text: str,
    ids: list[int] | None,
    tokens: int,
    window: int,
    layers: bool,
    reference: _Scored | None,
    options: dict[str, Any],
    store: Path | None,
) -> _Scored:
    with _engine(model, window, options) as llm:
        # Tokens rarely have more than 16 characters, so this is enough of the text.
        own = llm.get_tokenizer().encode(text[: 16 * tokens], add_special_tokens=False)[:tokens]
        if ids is not None and own != ids:
            raise NpuQuantError([_refused("the two models cut the text into different tokens", model, "one tokenizer")])
        if len(own) < MIN_TOKENS:
            raise NpuQuantError([_refused(f"the text has {len(own)} tokens", model, f"at least {MIN_TOKENS}")])
        recording = _Recording()
        _record(llm, recording, layers)
        files: list[Path] = []
        losses, divergences, agreements = [], [], []
        for number, start in enumerate(range(0, len(own) - 1, window)):
            part = own[start : start + window]
            if len(part) < 2:
                continue
            logprobs = _window(llm, recording, part)
            targets = torch.tensor(part[1:])
            losses.append(-logprobs.gather(1, targets[:, None]).flatten().numpy())
            if store is not None:
                if number == 0 and logprobs[0].numel() * 4 * len(own) > MAX_BYTES:
                    raise NpuQuantError([_refused("the log-probabilities would not fit", model, "fewer tokens")])
                files.append(store / f"{number}.npy")
                np.save(files[-1], logprobs.numpy())
            elif reference is not None:
                theirs = torch.from_numpy(np.load(reference.files[number], mmap_mode="r").copy())
                size = min(theirs.shape[1], logprobs.shape[1])  # one of them may pad its vocabulary
                theirs, mine = theirs[:, :size], logprobs[:, :size]
                divergences.append((theirs.exp() * (theirs - mine)).sum(dim=1).clamp(min=0).numpy())
                agreements.append((theirs.argmax(1) == mine.argmax(1)).numpy())
        errors = []
        if reference is not None and layers:
            errors = _layer_errors(llm, reference.recording, recording)
    kl, agreement = (np.concatenate(parts) if parts else np.empty(0) for parts in (divergences, agreements))
    return _Scored(own, np.concatenate(losses), files, kl, agreement, recording, errors)


def _refused(message: str, model: str, expected: str) -> Finding:
    return Finding(
        "bad-config", message, file=model[:200], expected=expected, fix="choose another text, or other models"
    )


@contextlib.contextmanager
def _engine(model: str, window: int, options: dict[str, Any]) -> Iterator[Any]:
    """An engine in this process, shut down and freed on exit."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    # generate() needs room for one token after the window; cached prompt tokens have no logits.
    arguments = {
        "max_model_len": window + 1,
        "max_num_batched_tokens": max(window + 1, 2048),
        "max_num_seqs": 1,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        **options,
    }
    llm = LLM(model=model, **arguments)
    try:
        yield llm
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _window(llm: Any, recording: _Recording, ids: list[int]) -> torch.Tensor:
    """float32 [len(ids) - 1, vocabulary]: log-probabilities of the token after each one but the last."""
    from vllm import SamplingParams

    recording.logits.clear()
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    # The engine computes the logits of the last token, for sampling, and those of the prompt.
    found = [logits for logits in recording.logits if logits.shape[0] == len(ids) - 1]
    if not found:
        raise NpuQuantError(
            [_refused("the engine computed no logits for the text", str(len(ids)), "logits of every token")]
        )
    return found[-1].log_softmax(dim=-1)


def _record(llm: Any, recording: _Recording, layers: bool) -> None:
    """Record all logits that a model computes, and the first inputs and outputs of its layers."""

    def attach(model: torch.nn.Module) -> None:
        original = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            logits = original(*args, **kwargs)
            if logits is not None:
                recording.logits.append(logits.detach().to("cpu", torch.float32))
            return logits

        model.compute_logits = compute_logits
        if layers:
            for name, module, called in _measured(model):
                recording.methods[name] = _method_of(module)
                called.register_forward_hook(_hook(recording, name), with_kwargs=True)

    llm.apply_model(attach)


def _measured(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, torch.nn.Module]]:
    """(name, module, the module that the model calls) of Linear and MoE layers."""
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_npu_quant.engine import platforms

    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if isinstance(module, LinearBase):
            found.append((name, module, module))
        elif platforms.is_moe(module):
            called_name, called = platforms.called_module(name, modules)
            found.append((called_name, module, called))
    return found


def _method_of(module: torch.nn.Module) -> str:
    method = getattr(module, "quant_method", None)
    row = getattr(method, "row", None)
    if row is not None:
        return str(row.method_name)
    classes = getattr(method, "method_classes", None)
    return str(classes) if classes else type(method).__name__


def _hook(recording: _Recording, name: str) -> Callable[..., None]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        x = args[0] if args else kwargs.get("hidden_states")
        # The engine's warm-up ran before this hook; a single row is a sampled token.
        if x is None or name in recording.outputs or not torch.is_tensor(value) or value.shape[0] < 2:
            return
        recording.inputs[name] = x[:LAYER_TOKENS].detach().clone()
        recording.outputs[name] = value[:LAYER_TOKENS].detach().to("cpu", torch.float32)

    return hook


def _layer_errors(llm: Any, reference: _Recording, recording: _Recording) -> list[LayerError]:
    own: dict[str, float] = {}

    def alone(model: torch.nn.Module) -> None:
        from vllm.model_executor.layers.linear import LinearBase

        with torch.inference_mode():
            for name, module, _ in _measured(model):
                if name in reference.inputs and isinstance(module, LinearBase):
                    x = reference.inputs[name]
                    output = module(x.to(next(module.parameters()).device))
                    value = output[0] if isinstance(output, tuple) else output
                    own[name] = _error(value.to("cpu", torch.float32), reference.outputs[name])

    llm.apply_model(alone)
    return [
        LayerError(name, recording.methods[name], own.get(name), _error(output, reference.outputs[name]))
        for name, output in recording.outputs.items()
        if name in reference.outputs and output.shape == reference.outputs[name].shape
    ]


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(wanted))
    return float(torch.linalg.vector_norm(found - wanted)) / norm if norm else 0.0


def _operators() -> str:
    from vllm_npu_quant.emulation import is_emulated

    return "emulated on the CPU" if is_emulated() else "torch_npu"


def run(model: str, prompts: Sequence[str], *, max_tokens: int = 32, **options: Any) -> RunReport:
    """Continue prompts greedily.

    Args:
        model: a folder or hub id. prompts: texts to continue. max_tokens: of each answer.
        options: further arguments of ``vllm.LLM``.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    from vllm_npu_quant.engine import layer_summary

    llm = LLM(model=model, **{"enforce_eager": True, **options})
    try:
        groups = tuple(layer_summary(llm))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs = llm.generate(list(prompts), sampling, use_tqdm=False)
        answers = tuple((prompt, output.outputs[0].text) for prompt, output in zip(prompts, outputs, strict=True))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return RunReport(model, _operators(), groups, answers)
