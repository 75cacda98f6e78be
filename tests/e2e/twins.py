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

import numpy as np
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


def _grouped(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """(q - zero) * scale with one scale per output row and group of inputs; float32 [N, K]."""
    group = values.shape[1] // scale.shape[1]
    scale = scale.float().repeat_interleave(group, 1)
    values = values.float()
    return (values if zero is None else values - zero.float().repeat_interleave(group, 1)) * scale


def _nibbles(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Two's-complement int4 pairs of a byte, the even index in the low nibble, along ``dim``."""
    low, high = (packed << 4) >> 4, packed >> 4
    return torch.stack((low, high), dim=dim + 1).flatten(dim, dim + 1)


def _bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers of ``bits`` bits, one after the other from the lowest bit of int32 words, along the last dim."""
    stream = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=-1, bitorder="little")
    numbers = stream.reshape(*stream.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(numbers.astype(np.int32))


def _per_row_or_group(weight: torch.Tensor, part: dict, *_: object) -> torch.Tensor:
    return _grouped(weight, part["weight_scale"], part["weight_offset"])


def _static(weight: torch.Tensor, part: dict, *_: object) -> torch.Tensor:
    deq = part["deq_scale"]
    if deq.dtype == torch.int64:
        deq = torch.from_numpy(deq.numpy().astype("uint32").view("float32"))
    return weight.float() * (deq.float() / part["input_scale"].float())[:, None]


def _w4a8(weight: torch.Tensor, part: dict, tensors: Tensors, layer: str, *_: object) -> torch.Tensor:
    """Packed along outputs where the scale has twice the rows; v0 has a second scale per group of inputs."""
    scale = part["weight_scale"]
    if scale.shape[0] == 2 * weight.shape[0]:
        weight = _nibbles(weight, 0)
    second = tensors.get(f"{layer}.weight_scale_second")
    return _grouped(weight, scale if second is None else scale.float() * second.float(), None)


def _w4a16(weight: torch.Tensor, part: dict, tensors: Tensors, layer: str, description: dict) -> torch.Tensor:
    """Per channel packed along inputs, per group along outputs; the old export stores one integer per byte."""
    scale = part["weight_scale"]
    if scale.shape[0] == 2 * weight.shape[0]:
        weight = _nibbles(weight, 0)
    elif scale.shape[1] == 1 and "version" in description:
        weight = _nibbles(weight, 1)
    return _grouped(weight, scale, part["weight_offset"])


def _flatquant(weight: torch.Tensor, part: dict, tensors: Tensors, layer: str, *_: object) -> torch.Tensor:
    """The stored weight belongs to L.T @ x @ R, with x as a matrix [L, M]; o_proj has no R."""
    left = tensors[f"{layer}.left_trans"].float()
    stored = _grouped(weight, part["weight_scale"], part["weight_offset"])
    own = left @ stored.unflatten(1, (left.shape[0], -1))
    right = tensors.get(f"{layer}.right_trans")
    return (own if right is None else own @ right.float().T).flatten(1)


#: Values of E2M1 codes (OCP Microscaling Formats 1.0, table 5); the sign is bit 3.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Two codes per byte, the even input in the low nibble: uint8 [N, K/2] to float32 [N, K]."""
    return _E2M1[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).long()]


def _blocks(weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | float = 1.0) -> torch.Tensor:
    """E4M3, or E2M1 in bytes, with scales per block of inputs: power-of-two ones (E8M0 in uint8) or E4M3."""
    values = _e2m1(weight) if weight.dtype == torch.uint8 else weight.float()
    scale = torch.ldexp(torch.ones(scale.shape), scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()
    return _grouped(values, scale * factor, None)


def _mx(weight: torch.Tensor, part: dict, *_: object) -> torch.Tensor:
    return _blocks(weight, part["weight_scale"])


def _fp8_rows(weight: torch.Tensor, part: dict, *_: object) -> torch.Tensor:
    return weight.float() * part["weight_scale"].float()


_MODELSLIM_KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "W8A8": _static,
    "W8A8S": _static,
    "W8A8_MIX": _per_row_or_group,
    "W8A8_DYNAMIC": _per_row_or_group,
    "W8A16": _per_row_or_group,
    "W4A4_DYNAMIC": _per_row_or_group,
    "W4A4_FLATQUANT_DYNAMIC": _flatquant,
    "W4A8_DYNAMIC": _w4a8,
    "W4A16": _w4a16,
    "WFP8AFP8_DYNAMIC": _fp8_rows,
    **dict.fromkeys(("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "W4A16_MXFP4"), _mx),
}


def _layers(tensors: Tensors, marker: str) -> dict[str, dict[str, torch.Tensor]]:
    """The quantized layers, those that have a tensor ``marker``: layer name -> its tensors by their last name."""
    layers: dict[str, dict[str, torch.Tensor]] = {
        name.removesuffix("." + marker): {} for name in tensors if name.endswith("." + marker)
    }
    for name, value in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers:
            layers[layer][suffix] = value
    return layers


def _rest(tensors: Tensors, layers: dict[str, dict[str, torch.Tensor]], dropped: tuple[str, ...] = ()) -> Tensors:
    """Everything outside of the quantized layers, and their biases."""
    return {
        name: value.float()
        for name, value in tensors.items()
        if (name.rpartition(".")[0] not in layers or name.endswith(".bias")) and not name.endswith(dropped or ("\0",))
    }


def _compressed_tensors(tensors: Tensors, config: dict) -> Tensors:
    """Offset-binary integers packed along inputs (zero points along outputs), plain int8, or FP8 per row or block."""
    layers = _layers(tensors, "weight_scale")
    weights = _rest(tensors, layers, ("_proj.k_scale", "self_attn.k_scale", "self_attn.v_scale"))
    for layer, part in layers.items():
        scale = part["weight_scale"]
        if scale.dtype == torch.uint8 or "weight_global_scale" in part:
            factor = 1 / part["weight_global_scale"] if "weight_global_scale" in part else 1.0
            weights[layer + ".weight"] = _blocks(part.get("weight_packed", part.get("weight")), scale, factor)
        elif "weight_packed" in part:
            outputs, inputs = part["weight_shape"].tolist()
            scale = scale.reshape(-1, 1).expand(outputs, -1) if scale.dim() < 2 else scale
            packed = part["weight_packed"]
            bits = 32 * packed.shape[1] // inputs
            values = _bits(packed, bits)[:outputs, :inputs] - 2 ** (bits - 1)
            zero = part.get("weight_zero_point")
            if zero is not None and zero.dtype == torch.int32:
                zero = _bits(zero.t(), bits).t()[:outputs] - 2 ** (bits - 1)
            weights[layer + ".weight"] = _grouped(values, scale, zero)
        elif part["weight"].dtype == torch.int8:
            scale = scale.reshape(-1, 1).expand(part["weight"].shape[0], -1) if scale.dim() < 2 else scale
            weights[layer + ".weight"] = _grouped(part["weight"], scale, part.get("weight_zero_point"))
        else:
            weights[layer + ".weight"] = _fp8(part["weight"], scale)
    return weights


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A scale per tensor, per row [N] or [N, 1], or per block of 128 x 128."""
    if (scale.dim() == 2 and scale.shape[1] > 1) or (scale.dim() == 2 and scale.shape[0] not in (1, weight.shape[0])):
        scale = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return weight.float() * (scale[:, None] if scale.dim() == 1 and scale.numel() > 1 else scale).float()


def _awq(tensors: Tensors, config: dict) -> Tensors:
    """qweight [K, N/8] with columns in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble; zero points alike."""
    layers = _layers(tensors, "qweight")
    weights = _rest(tensors, layers)
    for layer, part in layers.items():
        weights[layer + ".weight"] = _awq_layer(part)
    return weights


def _awq_layer(part: dict[str, torch.Tensor]) -> torch.Tensor:
    def columns(words: torch.Tensor) -> torch.Tensor:
        numbers = _bits(words, 4).reshape(words.shape[0], -1, 8)
        natural = torch.empty_like(numbers)
        natural[:, :, [0, 2, 4, 6, 1, 3, 5, 7]] = numbers
        return natural.flatten(1)

    values, scale = columns(part["qweight"]), part["scales"].float()
    zero = columns(part["qzeros"]) if "qzeros" in part else torch.full(scale.shape, 8)
    return _grouped(values.t(), scale.t(), zero.t()).contiguous()


def _gptq(tensors: Tensors, config: dict) -> Tensors:
    """qweight [K*b/32, N] packed along inputs, qzeros [G, N*b/32] along outputs; the old format stores zero - 1."""
    layers = _layers(tensors, "qweight")
    weights = _rest(tensors, layers)
    version_2 = config.get("checkpoint_format") == "gptq_v2"
    for layer, part in layers.items():
        weights[layer + ".weight"] = _gptq_layer(part, 0 if version_2 else 1)
    return weights


def _gptq_layer(part: dict[str, torch.Tensor], plus: int) -> torch.Tensor:
    scale = part["scales"].float()
    bits = 32 * part["qzeros"].shape[1] // scale.shape[1]
    values = _bits(part["qweight"].t(), bits)
    zero = _bits(part["qzeros"], bits) + plus
    inputs = values.shape[1]
    group = part["g_idx"].long() if "g_idx" in part else torch.arange(inputs) // (inputs // scale.shape[0])
    return ((values - zero.t()[:, group]).float() * scale.t()[:, group]).contiguous()


def _auto_round(tensors: Tensors, config: dict) -> Tensors:
    if config.get("data_type") == "fp" or isinstance(config["group_size"], list):
        return _fp8_config(tensors, config)
    layers = _layers(tensors, "qweight")
    weights = _rest(tensors, layers)
    plus = 0 if config.get("packing_format") in ("auto_round", "auto_round:gptqmodel") else 1
    for layer, part in layers.items():
        # AWQ packs along the outputs, so its qweight is as long as there are inputs.
        groups = part["scales"].shape[0]
        packed_along_outputs = part["qweight"].shape[1] == part["qzeros"].shape[1] and groups < part["qweight"].shape[0]
        weights[layer + ".weight"] = _awq_layer(part) if packed_along_outputs else _gptq_layer(part, plus)
    return weights


def _fp8_config(tensors: Tensors, config: dict) -> Tensors:
    layers = _layers(tensors, "weight_scale_inv") or _layers(tensors, "weight_scale")
    weights = _rest(tensors, layers)
    for layer, part in layers.items():
        weights[layer + ".weight"] = _fp8(part["weight"], part.get("weight_scale_inv", part.get("weight_scale")))
    return weights


_FORMATS: dict[str, Callable[[Tensors, dict], Tensors]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "fp8": _fp8_config,
}
