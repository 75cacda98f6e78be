# SPDX-License-Identifier: Apache-2.0
"""FP8 experts in tensors of all experts, in vLLM's RoutedExperts, on one rank and on several.

Experts of 128 inner and 256 other channels have weights that can be read in either order of inputs and outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.moe_layers import config_of, expected, load, make_layer, run
from tests.methods.layers import random_input, relative_error
from tests.methods.moe_layers import routing
from vllm_npu_quant.errors import NpuQuantError

PREFIX = "model.layers.0.mlp.experts"
E, BLOCK = 4, 128
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
SIZES = [(256, 128), (256, 256), (128, 384)]


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 [N, K], the scales of its blocks, and what both stand for."""
    rows, columns = (size // BLOCK for size in weight.shape)
    tiles = weight.reshape(rows, BLOCK, columns, BLOCK)
    scale = tiles.abs().amax((1, 3), keepdim=True) / 448
    codes = (tiles / scale).to(torch.float8_e4m3fn)
    return codes.reshape(weight.shape), scale.reshape(rows, columns), (codes.float() * scale).reshape(weight.shape)


def experts(hidden: int, inner: int, *, inputs_first: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The stored tensors, and the float weights of every expert."""
    generator = torch.Generator().manual_seed(7)
    stored, floats = {}, {}
    for name, outputs, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        # Magnitudes that differ by block make wrong scales visible.
        weights = torch.randn(E, outputs, inputs, generator=generator) / inputs**0.5
        weights *= 1 + torch.arange(outputs)[:, None] // BLOCK + torch.arange(inputs) // BLOCK
        codes, scales, values = (torch.stack(each) for each in zip(*map(rounded, weights), strict=True))
        for expert, value in enumerate(values):
            parts = {"gate_proj": value[:inner], "up_proj": value[inner:]} if name == "gate_up_proj" else {name: value}
            floats |= {f"{PREFIX}.{expert}.{part}.weight": matrix for part, matrix in parts.items()}
        if inputs_first:
            codes, scales = codes.transpose(1, 2), scales.transpose(1, 2)
        stored |= {f"{PREFIX}.{name}": codes.contiguous(), f"{PREFIX}.{name}_scale_inv": scales.contiguous()}
    return stored, floats


def layer_of(folder: Path, stored: dict[str, torch.Tensor], hidden: int, inner: int, **options: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    save_file(stored, folder / "model.safetensors")
    return make_layer(config_of(folder), PREFIX, experts=E, hidden=hidden, inner=inner, **options)


RANKS: dict[str, list[dict[str, Any]]] = {
    "one": [{}],
    "tp": [{"tp": (2, rank)} for rank in range(2)],
    "ep": [{"ep": (2, rank)} for rank in range(2)],
    "round robin": [{"ep": (2, rank), "placement": "round_robin"} for rank in range(2)],
}


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
@pytest.mark.parametrize("inputs_first", [False, True], ids=["outputs first", "inputs first"])
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_add_up(ranks: str, inputs_first: bool, hidden: int, inner: int, tmp_path: Path) -> None:
    stored, floats = experts(hidden, inner, inputs_first=inputs_first)
    given = (random_input(9, hidden, torch.bfloat16), *routing(9, 2, E))
    options = {"is_fused_checkpoint_transposed": inputs_first}
    layers = [layer_of(tmp_path, stored, hidden, inner, **rank, **options) for rank in RANKS[ranks]]
    y = sum(run(load(layer, stored), *given).double() for layer in layers)
    assert relative_error(y, expected(floats, PREFIX, *given)) < 0.03


@pytest.mark.parametrize("inputs_first", [False, True], ids=["outputs first", "inputs first"])
def test_a_class_that_takes_the_other_order_is_refused(inputs_first: bool, tmp_path: Path) -> None:
    stored, _ = experts(256, 128, inputs_first=inputs_first)
    layer = layer_of(tmp_path, stored, 256, 128, is_fused_checkpoint_transposed=not inputs_first)
    with pytest.raises(NpuQuantError) as caught:
        load(layer, stored)
    assert caught.value.codes == ("wrong-shape",)


def test_another_number_of_experts(tmp_path: Path) -> None:
    stored, _ = experts(256, 128, inputs_first=False)
    with pytest.raises(NpuQuantError) as caught:
        layer_of(tmp_path, {name: value[:3].contiguous() for name, value in stored.items()}, 256, 128)
    assert caught.value.codes == ("wrong-shape",)


@pytest.mark.parametrize("name", ["down_proj", "gate_up_proj_scale_inv"])
def test_a_tensor_that_does_not_arrive(name: str, tmp_path: Path) -> None:
    stored, _ = experts(256, 128, inputs_first=False)
    layer = layer_of(tmp_path, stored, 256, 128)
    del stored[f"{PREFIX}.{name}"]
    with pytest.raises(NpuQuantError) as caught:
        load(layer, stored)
    assert caught.value.codes == ("not-filled",)
