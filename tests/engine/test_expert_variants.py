# SPDX-License-Identifier: Apache-2.0
"""What exporters add to MoE checkpoints, through vLLM's own classes and loader: biases of experts, quantized routers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from tests.e2e.test_moe_families import SCHEMES, mixtral, moe_accuracy
from tests.engine.world import engine_config, load_model
from vllm_npu_quant.errors import NpuQuantError

MOE = "model.layers.{}.block_sparse_moe"
BIAS = MOE + ".experts.{}.{}.bias"


def checkpoint(scheme: str, tmp_path: Path) -> Path:
    quantize, config, *_ = SCHEMES[scheme]
    row = moe_accuracy.Scheme(scheme, quantize, quantize, config)
    return moe_accuracy.write(mixtral(tmp_path / "source"), row, tmp_path)[0]


def change(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


def zeros() -> dict[str, torch.Tensor]:
    """The biases of all experts."""
    outputs = {"w1": 96, "w3": 96, "w2": 128}
    return {
        BIAS.format(layer, expert, name): torch.zeros(rows, dtype=torch.float16)
        for layer in range(2)
        for expert in range(4)
        for name, rows in outputs.items()
    }


def test_zero_biases_change_nothing(tmp_path: Path) -> None:
    folder = checkpoint("gptq", tmp_path)
    without = load_model(folder).state_dict()
    change(folder, zeros())
    loaded = load_model(folder).state_dict()
    assert loaded.keys() == without.keys()
    assert all(torch.equal(value.cpu(), without[name].cpu()) for name, value in loaded.items())


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_a_bias_is_refused_when_it_arrives(name: str, tmp_path: Path) -> None:
    """The first expert of each layer has zeros, as exporters write them."""
    folder = checkpoint("gptq", tmp_path)
    bias = BIAS.format(1, 3, name)
    change(folder, {**zeros(), bias: zeros()[bias] + 1})
    with pytest.raises(NpuQuantError) as caught:
        load_model(folder)
    (finding,) = caught.value.findings
    assert (finding.code, finding.found) == ("unsupported-scheme", bias)
    assert finding.layer.startswith(MOE.format(1) + ".experts")


def test_biases_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = checkpoint("gptq", tmp_path)
    change(folder, {name: value + 1 for name, value in zeros().items()})
    with pytest.raises(NpuQuantError) as caught:
        engine_config(folder)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer) == ("unsupported-scheme", MOE.format(0) + ".experts")
    assert "2 MoE layers" in finding.message


def test_a_quantized_router_that_the_class_keeps_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("ct_w8a8", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    quantize = SCHEMES["ct_w8a8"][0]
    file = folder / "model.safetensors"
    stored = load_file(file)
    for layer in range(2):
        router = MOE.format(layer) + ".gate"
        parts, _ = quantize(stored.pop(f"{router}.weight").float())
        stored |= {f"{router}.{name}": value.contiguous() for name, value in parts.items()}
    save_file(stored, file)

    def read(*_: object) -> None:
        raise RuntimeError("weights are read")

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", read)
    with pytest.raises(NpuQuantError) as caught:
        load_model(folder)
    (finding,) = caught.value.findings
    assert (finding.code, finding.layer) == ("unsupported-scheme", MOE.format(0) + ".gate")
    assert "keeps it float (2 layers)" in finding.message
