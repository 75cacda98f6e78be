# SPDX-License-Identifier: Apache-2.0
"""Float checkpoints that are quantized while they load, and that take float weights again.

The oracles: the offline writer's checkpoint, whose integers must be the same; the float twin of the rounded weights by the
formula; and a fresh engine with the weights that a trainer sent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.e2e.routing import median_error
from tests.e2e.test_reload import addresses, chunks, same, update
from tests.e2e.twins import make_twin, read_tensors
from tests.e2e.yardstick import engine, measure, relative_error, run
from tests.fixtures_index import fixture
from vllm_npu_quant.errors import NpuQuantError

SOURCE = "source-tiny-qwen3"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantized_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the operators take, of every layer that the plugin serves."""
    return {
        f"{name}.{part}": parameter.detach().clone()
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__module__.startswith("vllm_npu_quant")
        for part, parameter in module.named_parameters(recurse=False)
    }


def changed(folder: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a float checkpoint whose Linear weights went through ``change``."""
    tensors = read_tensors(folder)
    shutil.copytree(folder, out)
    for file in (*out.glob("*.safetensors"), *out.glob("*.index.json")):
        file.unlink()
    for name, value in tensors.items():
        if name.endswith(tuple(f"{layer}.weight" for layer in LINEAR)):
            tensors[name] = change(name, value).to(value.dtype)
    save_file(tensors, out / "model.safetensors")
    return out


def to_int4(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Groups of 64 inputs with the scale max|w| / 7, rounded to bfloat16."""
    groups = weight.float().unflatten(1, (-1, 64))
    scale = (groups.abs().amax(2, keepdim=True) / 7).to(torch.bfloat16).float()
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)


def test_int4_groups(tmp_path: Path) -> None:
    source = fixture(SOURCE)
    twin = run(changed(source, tmp_path / "twin", to_int4), plugin=False)
    assert relative_error(run(source, quantization="npu_w4a16"), twin) < 0.02


def test_experts(tmp_path: Path) -> None:
    source = make_twin(fixture("msmodelslim-qwen3moe-w8a8-dynamic"), tmp_path / "float")
    floats = run(source, plugin=False)
    online = run(source, quantization="npu_w8a8")
    assert online.methods["W8A8DynamicExperts"] == 2
    assert median_error(online, floats) < 0.06  # the noise of int8 inputs changes the experts of single positions


def test_options(tmp_path: Path) -> None:
    source = fixture(SOURCE)
    options = {"quantization_config": {"quant_method": "npu_w8a16", "ignore": ["re:.*down_proj"]}}
    some = run(source, quantization="npu_w8a16", hf_overrides=options)
    every = run(source, quantization="npu_w8a16")
    assert (every.methods["WeightOnlyLinear"], some.methods["WeightOnlyLinear"]) == (8, 6)
    with engine(source, quantization="npu_w8a16", hf_overrides=options) as llm:
        llm.collective_rpc("reload_weights")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(source)})
        assert same(measure(llm), some)
    unknown = {"quantization_config": {"quant_method": "npu_w8a16", "group_size": 64}}
    with pytest.raises(NpuQuantError, match="group_size"):
        run(source, quantization="npu_w8a16", hf_overrides=unknown)


def test_a_quantized_checkpoint_is_not_rounded_again() -> None:
    with pytest.raises(NpuQuantError, match="contradictory-evidence"):
        run(fixture("msmodelslim-qwen3-w8a8-dynamic"), quantization="npu_w8a8")


def test_the_integers_do_not_depend_on_the_ranks() -> None:
    source = fixture(SOURCE)
    one = run(source, quantization="npu_w8a8", inspect=quantized_tensors).inspected
    with engine(source, quantization="npu_w8a8", tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        ranks = llm.apply_model(quantized_tensors)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(torch.cat([rank[name] for rank in ranks]), one[name])
    for rank in ranks:
        scale = "model.layers.0.mlp.down_proj.weight_scale"
        assert torch.equal(rank[scale], one[scale])


def test_a_trainer_sends_float_weights(tmp_path: Path) -> None:
    """A few steps of gradient descent in plain torch; after each the weights go to the engine."""
    source = fixture(SOURCE)
    tensors = {name: value.float() for name, value in read_tensors(source).items()}
    generator = torch.Generator().manual_seed(0)
    with engine(source, quantization="npu_w8a8") as llm:
        config, before = llm.llm_engine.model_config, llm.apply_model(addresses)[0]
        for step in range(2):
            for name, value in tensors.items():
                if name.endswith("proj.weight"):
                    weight = value.requires_grad_(True)
                    inputs = torch.randn(8, value.shape[1], generator=generator)
                    (inputs @ weight.T).square().mean().backward()
                    tensors[name] = (weight - 0.5 * weight.grad).detach()
            sent = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
            llm.apply_model(lambda model, sent=sent: update(model, list(chunks(sent)), config))
            folder = tmp_path / f"step{step}"
            folder.mkdir()
            shutil.copyfile(source / "config.json", folder / "config.json")
            for file in source.glob("*token*"):
                shutil.copyfile(file, folder / file.name)
            save_file(sent, folder / "model.safetensors")
            assert llm.apply_model(addresses)[0] == before
        measured = measure(llm)
    assert same(measured, run(folder, quantization="npu_w8a8"))
