# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in spellings for which no producer's folder is at hand: the tiny float model, rounded to nearest here.

Each comes with its float twin, written from the same numbers. The formulas share nothing with the package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.e2e.twins import Tensors, read_tensors
from tests.fixtures_index import fixture

__all__ = ["Quantized", "fp8", "int8", "packed", "write"]


@dataclass
class Quantized:
    """One layer: what is stored, by the last component of its name, and the weight that it stands for."""

    stored: Tensors
    weight: torch.Tensor


Quantizer = Callable[[torch.Tensor], Quantized]


def write(
    out: Path,
    rules: Mapping[str, Quantizer],
    quantization_config: dict[str, Any],
    extra: Tensors | None = None,
    **config_changes: Any,
) -> tuple[Path, Path]:
    """Write a checkpoint and its twin.

    Args:
        out: a folder of one's own.
        rules: name fragment -> quantizer; the first fragment that a Linear's name contains decides, others stay float.
        quantization_config: for config.json.
        extra: tensors that are stored besides.
        config_changes: entries of config.json, in both.

    Returns:
        The folders of the checkpoint and of its twin.
    """
    source = fixture("source-tiny-qwen3")
    stored: Tensors = dict(extra or {})
    twin: Tensors = {}
    for name, value in read_tensors(source).items():
        layer = name.removesuffix(".weight")
        quantize = next((rule for part, rule in rules.items() if part in layer), None)
        if quantize is None or value.dim() != 2 or "embed" in name:
            stored[name] = twin[name] = value
            continue
        done = quantize(value.float())
        stored |= {f"{layer}.{last}": tensor.contiguous() for last, tensor in done.stored.items()}
        twin[name] = done.weight.to(torch.bfloat16)
    folders = out / "checkpoint", out / "twin"
    config = json.loads((source / "config.json").read_text()) | config_changes
    for folder, tensors, quantized in ((folders[0], stored, True), (folders[1], twin, False)):
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja") and "index" not in file.name:
                shutil.copy(file, folder)
        own = config | ({"quantization_config": quantization_config} if quantized else {})
        (folder / "config.json").write_text(json.dumps(own))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folders


def int8(weight: torch.Tensor, *, per_tensor: bool = False) -> Quantized:
    """compressed-tensors int-quantized: int8 with one scale per output, or one for the tensor."""
    largest = weight.abs().amax() if per_tensor else weight.abs().amax(1, keepdim=True)
    scale = (largest / 127).bfloat16()
    values = torch.round(weight / scale.float()).clamp(-128, 127)
    stored_scale = scale.reshape(1) if per_tensor else scale
    return Quantized({"weight": values.to(torch.int8), "weight_scale": stored_scale}, values * scale.float())


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in [0, 2^bits - 1], packed along the last dimension, 32 // bits in an int32."""
    per_word = 32 // bits
    padded = np.pad(codes.numpy().astype(np.uint64), [(0, 0), (0, -codes.shape[1] % per_word)])
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    packed = (padded.reshape(padded.shape[0], -1, per_word) << shifts).sum(-1, dtype=np.uint64)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def packed(weight: torch.Tensor, *, bits: int = 4, group: int = 0, act_order: int = 0) -> Quantized:
    """compressed-tensors pack-quantized, asymmetric. ``act_order``: a seed for the order of the inputs, 0 for their own."""
    outputs, inputs = weight.shape
    group = group or inputs
    g_idx = torch.arange(inputs) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(act_order))]
    groups, middle, levels = inputs // group, 2 ** (bits - 1), 2**bits - 1
    low = torch.stack([weight[:, g_idx == g].amin(1).clamp(max=0) for g in range(groups)], 1)
    high = torch.stack([weight[:, g_idx == g].amax(1).clamp(min=0) for g in range(groups)], 1)
    scale = ((high - low) / levels).clamp(min=1e-6).bfloat16()
    zero = torch.round(-middle - low / scale.float()).clamp(-middle, middle - 1)
    values = torch.round(weight / scale.float()[:, g_idx] + zero[:, g_idx]).clamp(-middle, middle - 1)
    stored = {
        "weight_packed": words(values + middle, bits),
        "weight_scale": scale,
        "weight_zero_point": words((zero + middle).t(), bits).t(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if act_order:
        stored["weight_g_idx"] = g_idx.to(torch.int32)
    return Quantized(stored, (values - zero[:, g_idx]) * scale.float()[:, g_idx])


def fp8(weight: torch.Tensor, *, block: tuple[int, int] | None = None, channel: bool = False, name: str) -> Quantized:
    """E4M3 with a scale per block, per output, or for the tensor, under the given name."""
    outputs, inputs = weight.shape
    rows, columns = block or ((1, inputs) if channel else (outputs, inputs))
    scale = torch.empty(-(-outputs // rows), -(-inputs // columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = part.abs().amax() / 448
    spread = scale.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :inputs]
    values = (weight / spread).to(torch.float8_e4m3fn)
    stored_scale = scale if block or channel else scale.reshape(())
    return Quantized({"weight": values, name: stored_scale}, values.float() * spread)
