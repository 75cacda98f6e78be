# SPDX-License-Identifier: Apache-2.0
"""Writes a float model as the checkpoints that vLLM reads itself: compressed-tensors, AWQ and GPTQ, rounded to nearest.

For speed only: nothing is calibrated. The layouts are those of the compressed-tensors library, AutoAWQ and GPTQModel.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ["FORMATS", "GROUP_SIZE", "write"]

#: Divides the inputs of every layer of SmolLM2-135M (576 and 1536).
GROUP_SIZE = 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Modules that stay float.
FLOAT = ("lm_head", "embed_tokens")

Tensors = dict[str, torch.Tensor]
Layer = Callable[[torch.Tensor], Tensors]


def rounded(weight: torch.Tensor, bits: int, group: int, *, symmetric: bool = True) -> tuple[torch.Tensor, ...]:
    """(integers [N, K], scale [N, G], zero [N, G]): ``w = (q - zero) * scale``, q from 0 where not symmetric."""
    rows, inputs = weight.shape
    parts = weight.float().view(rows, -1, group or inputs)
    high = 2 ** (bits - 1) - 1
    if symmetric:
        scale = (parts.abs().amax(-1) / high).clamp(min=1e-8)
        zero = torch.zeros_like(scale)
        low, top = -high - 1, high
    else:
        least, most = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        low, top = 0, 2**bits - 1
        scale = ((most - least) / top).clamp(min=1e-8)
        zero = (-least / scale).round()
    integers = (parts / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(low, top)
    return integers.view(rows, inputs).to(torch.int32), scale, zero.to(torch.int32)


def packed(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight nibbles of the last dimension in one int32; nibble i holds number ``order[i]``."""
    eights = values.view(*values.shape[:-1], -1, 8).to(torch.int64) & 15
    total = sum(eights[..., number] << (4 * place) for place, number in enumerate(order))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def ct_int8(weight: torch.Tensor) -> Tensors:
    integers, scale, _ = rounded(weight, 8, 0)
    return {"weight": integers.to(torch.int8), "weight_scale": scale.to(weight.dtype)}


def ct_int4_values(weight: torch.Tensor) -> Tensors:
    integers, scale, _ = rounded(weight, 4, 0)
    return {"weight": integers.to(torch.int8), "weight_scale": scale.to(weight.dtype)}


def ct_packed(weight: torch.Tensor) -> Tensors:
    integers, scale, _ = rounded(weight, 4, GROUP_SIZE)
    return {
        "weight_packed": packed(integers + 8),
        "weight_scale": scale.to(weight.dtype),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def awq(weight: torch.Tensor) -> Tensors:
    integers, scale, zero = rounded(weight, 4, GROUP_SIZE, symmetric=False)
    return {
        "qweight": packed(integers.t().contiguous(), AWQ_ORDER),
        "qzeros": packed(zero.t().contiguous(), AWQ_ORDER),
        "scales": scale.t().contiguous().to(torch.float16),
    }


def gptq(weight: torch.Tensor) -> Tensors:
    integers, scale, zero = rounded(weight, 4, GROUP_SIZE, symmetric=False)
    return {
        "qweight": packed(integers).t().contiguous(),
        "qzeros": packed(zero.t().contiguous()) - 0x11111111,  # whole words, as GPTQModel: 0 borrows from its neighbour
        "scales": scale.t().contiguous().to(torch.float16),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP_SIZE).to(torch.int32),
    }


def _compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    fixed = {"type": "int", "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**fixed, "dynamic": False, **weights}}
    group["input_activations"] = activations and {**fixed, "dynamic": True, **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_PER_TOKEN = {"num_bits": 8, "strategy": "token"}
_PACKED = {"bits": 4, "group_size": GROUP_SIZE}
#: Name -> (what a layer becomes, quantization_config).
FORMATS: dict[str, tuple[Layer, dict[str, Any]]] = {
    "ct-w8a8": (ct_int8, _compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, _PER_TOKEN)),
    "ct-w4a8": (ct_int4_values, _compressed("int-quantized", {"num_bits": 4, "strategy": "channel"}, _PER_TOKEN)),
    "ct-w4a16": (
        ct_packed,
        _compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP_SIZE}, None),
    ),
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "zero_point": True, **_PACKED}),
    "gptq": (gptq, {"quant_method": "gptq", "desc_act": False, "sym": False, "lm_head": False, **_PACKED}),
}


def write(source: Path, target: Path, name: str) -> None:
    """Write the model in ``source`` into the folder ``target`` in one of FORMATS."""
    convert, config = FORMATS[name]
    tensors: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dictionary)
                tensor = handle.get_tensor(key)
                module, _, kind = key.rpartition(".")
                if kind != "weight" or tensor.dim() != 2 or module.rpartition(".")[2] in FLOAT:
                    tensors[key] = tensor
                    continue
                tensors.update({f"{module}.{part}": value.contiguous() for part, value in convert(tensor).items()})
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "model.safetensors.index.json":
            shutil.copyfile(file, target / file.name)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, "quantization_config": config}, indent=2))
