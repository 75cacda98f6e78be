# SPDX-License-Identifier: Apache-2.0
"""Smoothing: moves outliers of the activations into the weights, where 8 bits can hold them.

A channel of an activation x is divided by a factor and the matching column of the weight that reads it is multiplied by
the same factor. The division is folded into what produces x: a norm's weight, or the rows of up_proj and v_proj. The
model computes what it did before, and the checkpoint looks like any other. msModelSlim's recipes for real models begin
with it (iter_smooth and flex_smooth_quant, with the subgraphs norm-linear, up-down and ov).

How far outliers are moved is searched for each group of layers, by the error that 8 bits then make on a calibration text:
one exponent for a whole model ruins the few layers whose outliers are a thousand times larger than anywhere else.

The factors are powers of two, so that smoothing rounds nothing: the bfloat16 model gives the same bits with it and
without.

Source: Xiao et al., SmoothQuant, https://arxiv.org/abs/2211.10438, equation 4.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantize import quantize_per_channel
from rich.console import Console
from rich.progress import track

__all__ = ["ALPHAS", "MODEL_TYPES", "Smoothing", "calibration_text", "smooth"]

#: Tried for each group, besides no smoothing: 0 leaves the outliers in the activations, 1 moves them into the weights.
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

#: Those whose layers have the names and the plain RMSNorm that are assumed here.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_WINDOW = 512
#: Of the tokens whose inputs are looked at for their peaks, every so manieth is kept to measure errors on.
_KEEP_EVERY = 8


class Smoothing:
    """What every tensor of a model is multiplied by; most by nothing."""

    def __init__(self) -> None:
        self.factors: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The smoothed tensor ``name``, in the dtype of ``tensor``."""
        factor = self.factors.get(name)
        return tensor if factor is None else (tensor.float() * factor).to(tensor.dtype)

    def _multiply(self, name: str, factor: torch.Tensor) -> None:
        self.factors[name] = self.factors[name] * factor if name in self.factors else factor

    def divide_norm(self, module: str, by: torch.Tensor) -> None:
        self._multiply(f"{module}.weight", 1 / by)

    def divide_rows(self, module: str, by: torch.Tensor, *, bias: bool) -> None:
        self._multiply(f"{module}.weight", 1 / by[:, None])
        if bias:
            self._multiply(f"{module}.bias", 1 / by)

    def multiply_columns(self, module: str, by: torch.Tensor) -> None:
        self._multiply(f"{module}.weight", by[None, :])


@dataclass
class _Input:
    """What a Linear was given: the peak of each channel [K], and some of the tokens [T, K]."""

    peak: torch.Tensor
    tokens: torch.Tensor

    def add(self, x: torch.Tensor) -> None:
        self.peak = torch.maximum(self.peak, x.abs().amax(dim=0))
        self.tokens = torch.cat([self.tokens, x[::_KEEP_EVERY]])


def calibration_text() -> str:
    """Python's help topics, without the paragraphs that benchmarks/perplexity.py measures on."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    measured = "\n\n".join(topics[name] for name in names[:40])
    paragraphs = "\n\n".join(topics[name] for name in names[40:]).split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in measured)


@torch.no_grad()
def smooth(
    model_dir: Path, *, alphas: Sequence[float] = ALPHAS, text: str | None = None, max_tokens: int = 2048
) -> Smoothing:
    """Run the model in ``model_dir`` over a text and compute what smooths it for 8-bit weights and activations.

    Args:
        model_dir: a Hugging Face folder of one of MODEL_TYPES. It is loaded whole, in float32.
        alphas: the exponents to try for each group.
        text: what to calibrate on; default: calibration_text().
        max_tokens: tokens of the text that are used.

    Raises:
        ValueError: if the model is of another type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model_dir)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"smoothing knows {', '.join(MODEL_TYPES)}, not {config.model_type}")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # Characters are cut first: the tokenizer would warn of a text longer than the model's context.
    ids = tokenizer.encode((text or calibration_text())[: 4 * max_tokens], add_special_tokens=False)[:max_tokens]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    inputs = _inputs(model, [ids[start : start + _WINDOW] for start in range(0, len(ids), _WINDOW)])

    modules = dict(model.named_modules())
    head_dim = modules["model.layers.0.self_attn"].head_dim
    # Query heads of a group read the same value head.
    share = config.num_attention_heads // config.num_key_value_heads
    result = Smoothing()

    def search(reads: Sequence[str], share: int = 1) -> torch.Tensor:
        """Factors [K] for the input of ``reads``, the same for the ``share`` heads of a group."""
        return _search(inputs[reads[0]], [modules[read].weight for read in reads], alphas, share, head_dim)

    def has_bias(module: str) -> bool:
        return modules[module].bias is not None

    for layer in _track(range(config.num_hidden_layers), "smooth"):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for norm, reads in (
            ("input_layernorm", [f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj")]),
            ("post_attention_layernorm", [f"{mlp}.{name}" for name in ("gate_proj", "up_proj")]),
        ):
            by = search(reads)
            result.divide_norm(f"model.layers.{layer}.{norm}", by)
            for read in reads:
                result.multiply_columns(read, by)

        by = search([f"{mlp}.down_proj"])
        result.divide_rows(f"{mlp}.up_proj", by, bias=has_bias(f"{mlp}.up_proj"))
        result.multiply_columns(f"{mlp}.down_proj", by)

        by = search([f"{attention}.o_proj"], share)
        result.multiply_columns(f"{attention}.o_proj", by)
        by = by.view(-1, share, head_dim)[:, 0].flatten()
        result.divide_rows(f"{attention}.v_proj", by, bias=has_bias(f"{attention}.v_proj"))
    return result


def _search(
    seen: _Input, weights: Sequence[torch.Tensor], alphas: Sequence[float], share: int, head_dim: int
) -> torch.Tensor:
    """The factors [K] with the smallest error of ``weights`` [N, K], among no smoothing and one try for each alpha."""
    peak, columns = seen.peak, torch.cat(list(weights)).abs().amax(dim=0)
    if share > 1:
        heads = (-1, share, head_dim)
        peak, columns = (each.view(heads).amax(dim=1, keepdim=True) for each in (peak, columns))
    tries = [torch.ones_like(peak)]
    for alpha in alphas:
        exact = peak.clamp_min(1e-5) ** alpha / columns.clamp_min(1e-5) ** (1 - alpha)
        tries.append(torch.exp2(torch.round(torch.log2(exact))))
    if share > 1:
        tries = [by.expand(-1, share, head_dim).reshape(-1) for by in tries]
    exact_outputs = [seen.tokens @ weight.T for weight in weights]

    def error(by: torch.Tensor) -> float:
        scale = (seen.tokens / by).abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        tokens = (seen.tokens / by / scale).round() * scale
        total = 0.0
        for weight, expected in zip(weights, exact_outputs, strict=True):
            values, steps = quantize_per_channel(weight * by)
            difference = tokens @ (values.float() * steps).T - expected
            # Token by token: the first token of a text is so large in some layers that it would drown the others.
            relative = difference.square().sum(dim=1) / expected.square().sum(dim=1).clamp_min(1e-30)
            total += relative.mean().item()
        return total

    return min(tries, key=error)


def _inputs(model: Any, windows: Sequence[Sequence[int]]) -> dict[str, _Input]:
    """Run the windows, and note the input of every Linear of the layers."""
    seen: dict[str, _Input] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            seen[name] = _Input(torch.zeros(module.in_features), torch.empty(0, module.in_features))

            def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen[name].add(inputs[0].flatten(0, -2))

            handles.append(module.register_forward_pre_hook(note))
    for window in _track(windows, "calibrate"):
        model.model(input_ids=torch.tensor([window]))
    for handle in handles:
        handle.remove()
    return seen


def _track(items: Sequence[Any], text: str) -> Any:
    return track(items, text, console=Console(stderr=True), disable=not sys.stderr.isatty())
