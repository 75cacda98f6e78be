# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's smoothing: moves outliers of the activations into the weights, where 8 bits can hold them.

A channel of an activation x is divided by a factor and the matching column of the weight that reads it is multiplied by
the same factor. The division is folded into what produces x: a norm's weight, or the rows of up_proj and v_proj. The
model computes what it did before, and the checkpoint looks like any other. msModelSlim calls this iter_smooth with the
subgraphs norm-linear, up-down and ov; its recipes for real models begin with it.

The factors are powers of two, so that smoothing rounds nothing: the bfloat16 model gives the same bits with it and
without.

Source: Xiao et al., SmoothQuant, https://arxiv.org/abs/2211.10438, equation 4.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

__all__ = ["Smoothing", "calibration_text", "smooth"]

#: How much of an outlier moves into the weights. The paper takes 0.5 for most models and 0.7 to 0.9 for those with large
#: outliers, which Llama's kin are.
ALPHA = 0.7

#: Those whose layers have the names and the plain RMSNorm that are assumed here.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_WINDOW = 512


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


def calibration_text() -> str:
    """Python's help topics, without the paragraphs that benchmarks/perplexity.py measures on."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    measured = "\n\n".join(topics[name] for name in names[:40])
    paragraphs = "\n\n".join(topics[name] for name in names[40:]).split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in measured)


@torch.no_grad()
def smooth(model_dir: Path, *, alpha: float = ALPHA, text: str | None = None, max_tokens: int = 4096) -> Smoothing:
    """Run the model in ``model_dir`` over a text and compute what smooths it.

    Args:
        model_dir: a Hugging Face folder of one of MODEL_TYPES. It is loaded whole, in float32.
        alpha: 0 leaves the outliers in the activations, 1 moves them into the weights.
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
    ids = tokenizer.encode((text or calibration_text())[: 8 * max_tokens], add_special_tokens=False)[:max_tokens]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    peaks = _input_peaks(model, [ids[start : start + _WINDOW] for start in range(0, len(ids), _WINDOW)])

    modules = dict(model.named_modules())
    head_dim = modules["model.layers.0.self_attn"].head_dim
    result = Smoothing()

    def factors(reads: Sequence[str], share: int = 1) -> torch.Tensor:
        """Of the input of the modules ``reads``; ``share`` heads of a group have one factor per channel."""
        weight = torch.stack([modules[module].weight.abs().amax(dim=0) for module in reads]).amax(dim=0)
        peak = peaks[reads[0]]
        if share > 1:
            grouped = (-1, share, head_dim)
            peak, weight = peak.view(grouped).amax(dim=1).flatten(), weight.view(grouped).amax(dim=1).flatten()
        exact = peak.clamp_min(1e-5) ** alpha / weight.clamp_min(1e-5) ** (1 - alpha)
        return torch.exp2(torch.round(torch.log2(exact)))

    for layer in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for norm, module, names in (
            ("input_layernorm", attention, ("q_proj", "k_proj", "v_proj")),
            ("post_attention_layernorm", mlp, ("gate_proj", "up_proj")),
        ):
            reads = [f"{module}.{name}" for name in names]
            by = factors(reads)
            result.divide_norm(f"model.layers.{layer}.{norm}", by)
            for read in reads:
                result.multiply_columns(read, by)

        by = factors([f"{mlp}.down_proj"])
        result.divide_rows(f"{mlp}.up_proj", by, bias=modules[f"{mlp}.up_proj"].bias is not None)
        result.multiply_columns(f"{mlp}.down_proj", by)

        # Query heads of a group read the same value head.
        share = config.num_attention_heads // config.num_key_value_heads
        by = factors([f"{attention}.o_proj"], share)
        result.divide_rows(f"{attention}.v_proj", by, bias=modules[f"{attention}.v_proj"].bias is not None)
        per_head = by.view(-1, 1, head_dim).expand(-1, share, -1).reshape(-1)
        result.multiply_columns(f"{attention}.o_proj", per_head)
    return result


def _input_peaks(model: Any, windows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """The largest magnitude that each input channel of each Linear in a layer sees."""
    peaks: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                peak = inputs[0].abs().flatten(0, -2).amax(dim=0)
                peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

            handles.append(module.register_forward_pre_hook(note))
    console = Console(stderr=True)
    for window in track(windows, "calibrate", console=console, disable=not sys.stderr.isatty()):
        model.model(input_ids=torch.tensor([window]))
    for handle in handles:
        handle.remove()
    return peaks
