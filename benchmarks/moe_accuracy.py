# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a mixture-of-experts model, quantized by round-to-nearest in every format, and of the float twins.

    python benchmarks/moe_accuracy.py MODEL_DIR                          # a float Qwen3-MoE folder of your own
    python benchmarks/moe_accuracy.py MODEL_DIR --write docs/accuracy.md

Each scheme is written as a real checkpoint of its format and beside it, from the same integers, as its dequantized float
twin. Three engines score the same text: the float model, the checkpoint through this package, and the twin through vLLM
alone. What the twin loses is the rounding's; what the checkpoint loses beyond it is the activations' quantization and the
operators'. The text is MODEL_DIR/val.txt where there is one: text that the model was not trained on.

Exits with 1 where a scheme exceeds its limit and is not within 0.5 % of its twin.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import perplexity
import torch
from safetensors.torch import load_file, save_file

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "shared" / "checkpoints" / "source" / "trained-qwen3-moe"

Tensors = dict[str, torch.Tensor]
#: float32 [N, K] -> what is stored, by the last component of its name, and the float32 [N, K] that it stands for.
Quantizer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    Attributes:
        experts, others: how routed experts and the other Linear layers are stored.
        config: quantization_config of config.json; for ModelSlim, None, and ``types`` are the two layers' types.
        down: how the experts' down projections are stored, and their ModelSlim type, where it is another way.
        limit: the largest ratio to the float model's perplexity; None where there is no promise.
    """

    name: str
    experts: Quantizer
    others: Quantizer
    config: dict[str, Any] | None
    types: tuple[str, str] = ("", "")
    limit: float | None = None
    down: tuple[Quantizer, str] | None = None


def _groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.view(weight.shape[0], -1, size or weight.shape[1])


def _symmetric(weight: torch.Tensor, bits: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [N, K] and scales [N, G]: compressed-tensors' minmax, max|w| / ((2^bits - 1) / 2)."""
    groups, top = _groups(weight, size), 2 ** (bits - 1)
    scale = (groups.abs().amax(2, keepdim=True) / (top - 0.5)).clamp(min=1e-8).to(dtype)
    values = torch.round(groups / scale.float()).clamp(-top, top - 1)
    return values.view(weight.shape), scale.squeeze(2)


def _float(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    groups = _groups(values.float(), values.shape[1] // scale.shape[1])
    return (groups * scale.float().unsqueeze(2)).view(values.shape)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes in [0, 15] of the last dimension in an int32, the first in the lowest bits."""
    shifted = codes.to(torch.int64).view(*codes.shape[:-1], -1, 8) << (4 * torch.arange(8))
    return shifted.sum(-1).to(torch.int32)


def ct_int(bits: int, size: int = 0) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, scale = _symmetric(weight, bits, size, torch.bfloat16)
        return {"weight": values.to(torch.int8), "weight_scale": scale}, _float(values, scale)

    return quantize


def ct_packed(size: int) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, scale = _symmetric(weight, 4, size, torch.bfloat16)
        stored = {
            "weight_packed": _words(values + 8),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        return stored, _float(values, scale)

    return quantize


def gptq(size: int) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, scale = _symmetric(weight, 4, size, torch.float16)
        outputs, inputs = weight.shape
        stored = {
            "qweight": _words(values + 8).t(),
            "qzeros": _words(torch.full((scale.shape[1], outputs), 7)),  # 8, stored minus one
            "scales": scale.t(),
            "g_idx": (torch.arange(inputs) // size).to(torch.int32),
        }
        return stored, _float(values, scale)

    return quantize


def awq(size: int) -> Quantizer:
    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = _groups(weight, size)
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-6).half()
        zero = torch.round(-low / scale.float()).clamp(0, 15)
        codes = (torch.round(groups / scale.float()) + zero).clamp(0, 15)
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

        def packed(values: torch.Tensor) -> torch.Tensor:
            return _words(values.view(values.shape[0], -1, 8)[..., order].flatten(1))

        stored = {
            "qweight": packed(codes.view(weight.shape).t().contiguous()),
            "qzeros": packed(zero.squeeze(2).t().contiguous()),
            "scales": scale.squeeze(2).t(),
        }
        return stored, ((codes - zero) * scale.float()).view(weight.shape)

    return quantize


def modelslim_int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    values = torch.round(weight / scale)
    return {"weight": values.to(torch.int8), "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}, (
        values * scale
    )


def _pairs_of_rows(values: torch.Tensor) -> torch.Tensor:
    integers = values.to(torch.int8)
    return (integers[0::2] & 15) | (integers[1::2] << 4)


def modelslim_w4a8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """msModelSlim 26: int4 per channel, two outputs in a byte."""
    values, scale = _symmetric(weight, 4, 0, torch.float32)
    stored = {
        "weight": _pairs_of_rows(values),
        "weight_scale": scale,
        "weight_offset": torch.zeros_like(scale),
        "scale_bias": 8 * (values * scale).sum(1, keepdim=True),
    }
    return stored, values * scale


def modelslim_two_level(size: int) -> Quantizer:
    """msModelSlim's older export: int8 per channel, and that to int4 per group."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        first = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        values, second = _symmetric(torch.round(weight / first), 4, size, torch.float32)
        meant = _float(values, second * first)
        stored = {
            "weight": _pairs_of_rows(values),
            "weight_scale": first,
            "weight_offset": torch.zeros_like(first),
            "weight_scale_second": second,
            "weight_offset_second": torch.zeros_like(second, dtype=torch.int64),
            "scale_bias": 8 * meant.sum(1, keepdim=True),
        }
        return stored, meant

    return quantize


def _compressed(bits: int, size: int, activation: bool, layout: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if activation else None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp\\.gate$"],
    }


def _packing(method: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, "bits": 4, "group_size": 128, **more}


def _same(name: str, quantize: Quantizer, config: dict[str, Any], limit: float | None) -> Scheme:
    return Scheme(name, quantize, quantize, config, limit=limit)


SCHEMES = (
    Scheme("W8A8 dynamic, ModelSlim", modelslim_int8, modelslim_int8, None, ("W8A8_DYNAMIC",) * 2, 1.01),
    _same("W8A8 dynamic, compressed-tensors", ct_int(8), _compressed(8, 0, True, "int-quantized"), 1.01),
    _same("W4A16 g128, compressed-tensors", ct_packed(128), _compressed(4, 128, False, "pack-quantized"), 1.03),
    _same("W4A16 g32, compressed-tensors", ct_packed(32), _compressed(4, 32, False, "pack-quantized"), 1.03),
    _same(
        "W4A16 g128, AWQ",
        awq(128),
        _packing("awq", version="gemm", zero_point=True, modules_to_not_convert=["lm_head", "mlp.gate"]),
        1.03,
    ),
    _same(
        "W4A16 g128, GPTQ",
        gptq(128),
        _packing(
            "gptq", sym=True, desc_act=False, checkpoint_format="gptq", lm_head=False, dynamic={"-:.*mlp\\.gate$": {}}
        ),
        1.03,
    ),
    _same("W4A8 g128, compressed-tensors", ct_int(4, 128), _compressed(4, 128, True, "int-quantized"), 1.03),
    _same("W4A8 g32, compressed-tensors", ct_int(4, 32), _compressed(4, 32, True, "int-quantized"), 1.03),
    Scheme(
        "W4A8 g64 experts, ModelSlim",
        modelslim_two_level(64),
        modelslim_int8,
        None,
        ("W4A8_DYNAMIC", "W8A8_DYNAMIC"),
        1.03,
    ),
    Scheme(
        "W4A8 per channel experts, ModelSlim", modelslim_w4a8, modelslim_int8, None, ("W4A8_DYNAMIC", "W8A8_DYNAMIC")
    ),
)


def read(folder: Path) -> Tensors:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def write(source: Path, scheme: Scheme, target: Path) -> tuple[Path, Path]:
    """Write the checkpoint and its twin; returns both folders."""
    stored: Tensors = {}
    twin: Tensors = {}
    description: dict[str, Any] = {"version": "1.0.0", "model_quant_type": scheme.types[0], "group_size": 0}
    if "weight_scale_second" in scheme.experts(torch.ones(64, 128))[0]:
        description["group_size"] = 64
    for name, value in read(source).items():
        layer = name.removesuffix(".weight")
        linear = value.dim() == 2 and not layer.endswith(("embed_tokens", "lm_head", ".gate"))
        if not linear:
            stored[name] = twin[name] = value
            description[name] = "FLOAT"
            continue
        quantize, kind = (scheme.experts, scheme.types[0]) if ".experts." in layer else (scheme.others, scheme.types[1])
        if scheme.down is not None and ".experts." in layer and layer.endswith(("down_proj", "w2")):
            quantize, kind = scheme.down
        parts, meant = quantize(value.float())
        stored |= {f"{layer}.{last}": tensor.contiguous() for last, tensor in parts.items()}
        description |= dict.fromkeys((f"{layer}.{last}" for last in parts), kind)
        twin[name] = meant.to(value.dtype)
    folders = target / "checkpoint", target / "twin"
    config = json.loads((source / "config.json").read_text())
    for folder, tensors in zip(folders, (stored, twin), strict=True):
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
                shutil.copyfile(file, folder / file.name)
        save_file(tensors, folder / "model.safetensors")
    if scheme.config is None:
        (folders[0] / "quant_model_description.json").write_text(json.dumps(description))
    else:
        (folders[0] / "config.json").write_text(json.dumps({**config, "quantization_config": scheme.config}))
    return folders


def score(model: Path, text: str, max_tokens: int) -> perplexity.Result:
    """Score one model in this process, and leave nothing of it behind: the import of vLLM costs more than a small engine."""
    from vllm.distributed import cleanup_dist_env_and_memory

    result = perplexity.score(model, text, window=512, max_tokens=max_tokens, options={})
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


@dataclass(frozen=True)
class Row:
    scheme: Scheme
    ratio: float
    twin: float

    @property
    def holds(self) -> bool:
        return self.scheme.limit is None or self.ratio <= self.scheme.limit or self.ratio <= 1.005 * self.twin


def page(base: perplexity.Result, rows: Sequence[Row]) -> str:
    """docs/accuracy.md."""
    lines = [
        "# Accuracy of quantized experts",
        "",
        "<!-- Made by benchmarks/moe_accuracy.py. -->",
        "",
        "Perplexity of a small Qwen3-MoE that has learned something (11 M parameters, 4 layers of 8 experts, 2 chosen), on",
        f"text that it was not trained on: {base.tokens} tokens in windows of 512. In bfloat16 it is {base.perplexity:.3f}.",
        "Attention and experts are rounded to nearest, without calibration; router, embedding and head stay float.",
        "*Twin* is the same integers, dequantized to bfloat16 and run by vLLM alone: what the rounding of weights costs.",
        "*Checkpoint* is the real format through this package, with the operators emulated on a CPU. Nothing here was",
        "measured on an NPU.",
        "",
        "| scheme, format | checkpoint | twin | checkpoint to twin | limit |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        limit = "-" if row.scheme.limit is None else f"{100 * (row.scheme.limit - 1):+.0f} %"
        lines.append(
            f"| {row.scheme.name} | {100 * (row.ratio - 1):+.2f} % | {100 * (row.twin - 1):+.2f} % | "
            f"{100 * (row.ratio / row.twin - 1):+.2f} % | {limit} |"
        )
    lines += [
        "",
        "Limits hold against bfloat16, or else within 0.5 % of the twin: a model of this size loses more to 4-bit rounding",
        "than one of useful size does.",
        "",
        "```",
        "python benchmarks/moe_accuracy.py MODEL_DIR --write docs/accuracy.md",
        "```",
        "",
        "does the same with a float Qwen3-MoE folder of your own. It scores MODEL_DIR/val.txt where there is one, else prose",
        "that comes with Python; `--text FILE` names another.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEFAULT_MODEL, help="a float Qwen3-MoE folder")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file; MODEL_DIR/val.txt where there is one")
    parser.add_argument("--only", default="", help="schemes whose name contains this")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--write", type=Path, help="write the page to this file")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        parser.error(
            f"{options.model} holds no model: name the folder of a float Qwen3-MoE, for example Qwen/Qwen3-30B-A3B"
        )
    for name, value in perplexity._ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    file = options.text or (options.model / "val.txt")
    text = file.read_text(encoding="utf-8") if file.is_file() else perplexity.default_text()
    base = score(options.model, text, options.max_tokens)
    print(f"{'bfloat16':<38} {base.perplexity:9.4f}  ({base.tokens} tokens)", flush=True)
    rows = []
    for scheme in SCHEMES:
        if options.only not in scheme.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = [
                score(model, text, options.max_tokens).perplexity / base.perplexity
                for model in write(options.model, scheme, Path(folder))
            ]
        rows.append(Row(scheme, *found))
        verdict = "" if rows[-1].holds else "  EXCEEDS ITS LIMIT"
        print(f"{scheme.name:<38} {found[0]:9.4f}  twin {found[1]:.4f}{verdict}", flush=True)
    if options.write:
        options.write.write_text(page(base, rows))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
