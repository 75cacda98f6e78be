# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of the speed benchmarks: vLLM is measured on them, so they have to be what their producers' files are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from writers import GROUP_SIZE, write

OUTPUTS, INPUTS = 48, 2 * GROUP_SIZE
LAYER = "model.layers.0.mlp.up_proj"


def written(folder: Path, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """A layer's bfloat16 weight, the tensors that the writer made of it, and the quantization config."""
    source, target = folder / "source", folder / name
    source.mkdir()
    target.mkdir()
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({f"{LAYER}.weight": weight, "lm_head.weight": weight.clone()}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    write(source, target, name)
    stored = load_file(target / "model.safetensors")
    assert torch.equal(stored.pop("lm_head.weight"), weight)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    return weight, {key.removeprefix(LAYER + "."): value for key, value in stored.items()}, config


@pytest.mark.parametrize(
    ("name", "bits", "group"), [("ct-w8a8", 8, INPUTS), ("ct-w4a8", 4, INPUTS), ("ct-w4a16", 4, GROUP_SIZE)]
)
def test_compressed_tensors_reads_the_rounded_weights(tmp_path: Path, name: str, bits: int, group: int) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    weight, stored, config = written(tmp_path, name)
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert (scheme.format or config["format"]) == config["format"]
    compressor = base.BaseCompressor.get_value_from_registry(config["format"])
    assert {"weight_scale"} < set(stored)
    scale = stored["weight_scale"].float()
    read = compressor.decompress({**stored, "weight_scale": scale}, scheme)["weight"]
    # Written out: a scale per group of inputs that takes the largest magnitude to the largest integer.
    most = 2 ** (bits - 1) - 1
    parts = weight.float().unflatten(1, (-1, group))
    exact = parts.abs().amax(2, keepdim=True) / most
    assert torch.equal(scale, exact.squeeze(2).to(torch.bfloat16).float())
    assert torch.equal(read, ((parts / exact).round() * scale.unsqueeze(2)).flatten(1))


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_awq_and_gptq_are_within_half_a_step(tmp_path: Path, name: str) -> None:
    """Read bit by bit, as AutoAWQ and AutoGPTQ document it."""
    weight, stored, _ = written(tmp_path, name)

    def nibbles(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        parts = [(words.to(torch.int64) >> (4 * order.index(number))) & 15 for number in range(8)]
        return torch.stack(parts, dim=-1).flatten(-2)

    if name == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        values, zeros = nibbles(stored["qweight"], order), nibbles(stored["qzeros"], order)
    else:
        straight = tuple(range(8))
        values = nibbles(stored["qweight"].t(), straight).t()
        zeros = (nibbles(stored["qzeros"], straight) + 1) % 16  # "gptq": one less is stored
    scale = stored["scales"].float().repeat_interleave(GROUP_SIZE, dim=0)
    read = (values - zeros.repeat_interleave(GROUP_SIZE, dim=0)) * scale
    assert read.shape == (INPUTS, OUTPUTS)
    # Half a step, a zero point rounded by half a step, and scales in float16.
    assert ((read.t() - weight.float()).abs() <= 1.01 * scale.t()).all()
