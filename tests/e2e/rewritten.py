# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in spellings for which no producer's folder is at hand: a tiny float model, rounded to nearest here.

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

__all__ = [
    "Quantized",
    "awq",
    "float_model",
    "fp8",
    "gptq",
    "int8",
    "modelslim_int8",
    "mx",
    "nvfp4",
    "packed",
    "write",
]


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
    *,
    source: Path | None = None,
    **config_changes: Any,
) -> tuple[Path, Path]:
    """Write a checkpoint and its twin.

    Args:
        out: a folder of one's own.
        rules: name fragment -> quantizer; the first fragment that a Linear's name contains decides, others stay float.
        quantization_config: for config.json; a ModelSlim description, which begins with "version", becomes a file of its own.
        extra: tensors that are stored besides.
        source: the float model; the tiny Qwen3 where none is given.
        config_changes: entries of config.json, in both.

    Returns:
        The folders of the checkpoint and of its twin.
    """
    source = source or fixture("source-tiny-qwen3")
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
        described = "version" in quantization_config and "quant_method" not in quantization_config
        own = config | ({"quantization_config": quantization_config} if quantized and not described else {})
        if quantized and described:
            types = {name: "FLOAT" for name in stored} | quantization_config
            (folder / "quant_model_description.json").write_text(json.dumps(types))
        (folder / "config.json").write_text(json.dumps(own))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folders


def float_model(out: Path, model_type: str, **fields: Any) -> Path:
    """A tiny model of another architecture with random weights, biases and norms, in bfloat16.

    Args:
        out: a folder of one's own.
        model_type, fields: as in config.json; the sizes of the tiny Qwen3 where they are not given.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "initializer_range": 0.06,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | fields)), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.3)
            elif value.dim() == 1:
                value.normal_(1, 0.1)
    model.save_pretrained(out)
    for file in fixture("source-tiny-qwen3").glob("*token*"):
        shutil.copy(file, out)
    return out


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


#: E2M1 (OCP Microscaling Formats 1.0); bit 3 of a code is the sign.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _fp4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [N, G, g] as E2M1: two codes per byte, the even input in the low nibble, and their values."""
    codes = (groups.unsqueeze(-1) - _E2M1).abs().argmin(-1)
    pairs = codes.flatten(1).to(torch.uint8)
    return pairs[:, 0::2] | (pairs[:, 1::2] << 4), _E2M1[codes]


def mx(weight: torch.Tensor, *, bits: int, weight_name: str = "weight", scale_name: str = "weight_scale") -> Quantized:
    """MXFP4 or MXFP8: blocks of 32 inputs whose scale is a power of two, stored as its exponent plus 127."""
    groups = weight.unflatten(1, (-1, 32))
    exponent = groups.abs().amax(2).clamp(min=2**-40).log2().floor() - (2 if bits == 4 else 8)
    scale = torch.exp2(exponent).unsqueeze(2)
    if bits == 4:
        stored, values = _fp4(groups / scale)
    else:
        eights = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored, values = eights.flatten(1), eights.float()
    return Quantized({weight_name: stored, scale_name: (exponent + 127).to(torch.uint8)}, (values * scale).flatten(1))


def nvfp4(weight: torch.Tensor, *, modelopt: bool, inputs: bool = True) -> Quantized:
    """Blocks of 16 inputs with E4M3 scales, and a factor for the layer, which compressed-tensors stores inverted."""
    groups = weight.unflatten(1, (-1, 16))
    largest = groups.abs().amax(2)
    factor = largest.max() / (6 * 448)
    scale = (largest / 6 / factor).to(torch.float8_e4m3fn)
    stored_factor = factor if modelopt else (1 / factor).reshape(1)
    spread = scale.float() * (factor if modelopt else 1 / stored_factor)
    packed_values, values = _fp4(groups / spread.clamp(min=1e-30).unsqueeze(2))
    stored = {"weight" if modelopt else "weight_packed": packed_values, "weight_scale": scale}
    stored["weight_scale_2" if modelopt else "weight_global_scale"] = stored_factor
    if inputs:
        stored["input_scale" if modelopt else "input_global_scale"] = torch.tensor(0.01).reshape(stored_factor.shape)
    return Quantized(stored, (values * spread.unsqueeze(2)).flatten(1))


def modelslim_int8(weight: torch.Tensor, *, group: int = 0) -> Quantized:
    """ModelSlim's W8A8_DYNAMIC and W8A16, symmetric."""
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    scale = groups.abs().amax(2) / 127
    values = torch.round(groups / scale.unsqueeze(2)).clamp(-128, 127)
    stored = {
        "weight": values.flatten(1).to(torch.int8),
        "weight_scale": scale,
        "weight_offset": torch.zeros_like(scale),
    }
    return Quantized(stored, (values * scale.unsqueeze(2)).flatten(1))


def _groups(weight: torch.Tensor, g_idx: torch.Tensor, bits: int, *, sym: bool) -> tuple[torch.Tensor, ...]:
    """Codes [N, K], float16 scales [N, G] and zero points [N, G], both of the groups that ``g_idx`` gives the inputs. No
    zero point is 0: stored minus one, it would borrow from its neighbour."""
    levels = 2**bits - 1
    parts = [weight[:, g_idx == g] for g in range(int(g_idx.max()) + 1)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / levels).clamp(min=1e-5).half()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-low / scale.float()).clamp(1, levels)
    codes = torch.round(weight / scale.float()[:, g_idx] + zero.float()[:, g_idx]).clamp(0, levels)
    return codes, scale, zero.float()


def _stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes along the last dimension as a stream of bits in int32, lowest bits first."""
    numbers = codes.numpy().astype(np.uint8)
    places = (numbers[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = np.packbits(places.reshape(numbers.shape[0], -1), axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(stream).view("<i4"))


def gptq(
    weight: torch.Tensor, *, bits: int = 4, group: int = 128, sym: bool = True, v2: bool = False, act_order: int = 0
) -> Quantized:
    """GPTQ. ``group``: -1 for one per output. ``act_order``: a seed for the order of the inputs, 0 for their own."""
    inputs = weight.shape[1]
    g_idx = torch.arange(inputs) // (group if group > 0 else inputs)
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(act_order))]
    codes, scale, zero = _groups(weight, g_idx, bits, sym=sym)
    stored = {
        "qweight": _stream(codes, bits).t(),
        "qzeros": _stream((zero - (0 if v2 else 1)).t(), bits),
        "scales": scale.t(),
        "g_idx": g_idx.to(torch.int32),
    }
    return Quantized(stored, (codes - zero[:, g_idx]) * scale.float()[:, g_idx])


def awq(weight: torch.Tensor, *, group: int = 128) -> Quantized:
    """AutoAWQ's gemm version: eight outputs to a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    inputs = weight.shape[1]
    g_idx = torch.arange(inputs) // (group if group > 0 else inputs)
    codes, scale, zero = _groups(weight, g_idx, 4, sym=False)

    def columns(numbers: torch.Tensor) -> torch.Tensor:
        return _stream(numbers.t().unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    stored = {"qweight": columns(codes), "qzeros": columns(zero), "scales": scale.t()}
    return Quantized(stored, (codes - zero[:, g_idx]) * scale.float()[:, g_idx])
