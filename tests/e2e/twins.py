# SPDX-License-Identifier: Apache-2.0
"""Float twins of quantized checkpoints: every quantized Linear replaced by its dequantized weight.

The formulas are written from the producers' documents and share nothing with the package: they are the oracle of the
engine tests. A twin is an ordinary unquantized folder that vLLM runs without the plugin's help.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ["make_twin", "read_tensors"]

Tensors = dict[str, torch.Tensor]


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a folder's safetensors files."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            tensors |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return tensors


def make_twin(folder: Path, out: Path) -> Path:
    """Write the float twin of a checkpoint to ``out``.

    The dtype is the one the checkpoint runs in: its own, or bfloat16 for float32 checkpoints.
    """
    config = json.loads((folder / "config.json").read_text())
    description = next(iter(sorted(folder.glob("quant_model_description*.json"))), None)
    tensors = read_tensors(folder)
    if description is not None:
        weights = _modelslim(tensors, json.loads(description.read_text()))
    else:
        weights = _FORMATS[config["quantization_config"]["quant_method"]](tensors, config["quantization_config"])
    dtype = torch.float16 if config.get("torch_dtype", config.get("dtype")) == "float16" else torch.bfloat16
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    config["torch_dtype"] = config["dtype"] = str(dtype).removeprefix("torch.")
    if any(name.endswith("self_attn.q_proj.bias") for name in weights):
        config["attention_bias"] = True
        for name in [name for name in weights if name.endswith("self_attn.q_proj.weight")]:
            layer = name.removesuffix("q_proj.weight")
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                rows = weights[f"{layer}{part}.weight"].shape[0]
                weights.setdefault(f"{layer}{part}.bias", torch.zeros(rows))
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        kept = file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json")
        if file.is_file() and kept and not file.name.startswith("quant"):
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config))
    save_file({name: value.to(dtype).contiguous() for name, value in weights.items()}, out / "model.safetensors")
    return out


def _modelslim(tensors: Tensors, description: dict) -> Tensors:
    """w = (q - weight_offset) * weight_scale; static layers without weight_scale: w = q * deq_scale / input_scale."""
    weights: Tensors = {}
    for name, value in tensors.items():
        layer, _, suffix = name.rpartition(".")
        kind = description.get(layer + ".weight", "FLOAT")
        if kind == "FLOAT":
            if not name.endswith("norm.bias"):
                weights[name] = value.float()
        elif suffix == "weight":
            part = {
                key: tensors.get(f"{layer}.{key}")
                for key in ("weight_scale", "weight_offset", "deq_scale", "input_scale")
            }
            weights[name] = _MODELSLIM_KINDS[kind](value, part, tensors, layer, description)
    # Asymmetric smoothing: W (norm(x) + b) + bias is a Linear with the bias W b + bias on the plain norm.
    for name in [name for name in tensors if name.endswith("norm.bias")]:
        block, _, norm = name.removesuffix(".bias").rpartition(".")
        readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        if norm == "input_layernorm":
            for reader in readers:
                layer = f"{block}.{reader}"
                bias = tensors.get(layer + ".bias", torch.zeros(1)).float()
                weights[layer + ".bias"] = bias + weights[layer + ".weight"] @ tensors[name].float()
        else:
            # The model class has no bias in its MLP. What would be left over there must be next to nothing.
            for reader in ("mlp.gate_proj", "mlp.up_proj"):
                layer = f"{block}.{reader}"
                left = tensors[layer + ".bias"].float() + weights[layer + ".weight"] @ tensors[name].float()
                assert left.norm() < 0.02 * tensors[layer + ".bias"].float().norm()
    return weights


def _per_row_or_group(weight: torch.Tensor, part: dict, *_: object) -> torch.Tensor:
    scale, offset = part["weight_scale"].float(), part["weight_offset"].float()
    group = weight.shape[1] // scale.shape[1]
    return (weight.float() - offset.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)


def _static(weight: torch.Tensor, part: dict, *_: object) -> torch.Tensor:
    deq = part["deq_scale"]
    if deq.dtype == torch.int64:
        deq = torch.from_numpy(deq.numpy().astype("uint32").view("float32"))
    return weight.float() * (deq.float() / part["input_scale"].float())[:, None]


_MODELSLIM_KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "W8A8": _static,
    "W8A8_MIX": _per_row_or_group,
    "W8A8_DYNAMIC": _per_row_or_group,
    "W8A16": _per_row_or_group,
}
_FORMATS: dict[str, Callable[[Tensors, dict], Tensors]] = {}
