# SPDX-License-Identifier: Apache-2.0
"""Loading weights again into a running engine: the same, others of the same layout, and wrong ones.

The oracle for other weights is a fresh engine with them; for everything else, the engine before the reload, to the bit.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.e2e.twins import read_tensors
from tests.e2e.yardstick import Run, engine, measure, run
from tests.fixtures_index import fixture
from vllm_npu_quant.errors import NpuQuantError

Tensors = dict[str, torch.Tensor]

#: Every layout with its own conversions, act-order, biases of norms, rotations, a quantized head, and experts.
CHECKPOINTS = (
    "awq-qwen3-autoawq-g128",
    "ct-qwen3-fp8-block",
    "ct-qwen3-w4a16-g128-asym",
    "gptq-qwen3-gptqmodel-w4g128-lmhead",
    "gptq-qwen3-gptqmodel-w4g32-sym-descact",
    "msmodelslim-qwen3-v0-w4a16-g64",
    "msmodelslim-qwen3-w4a8-dynamic",
    "msmodelslim-qwen3-w8a8",
    "msmodelslim-qwen3-w8a8-quarot",
    "msmodelslim-qwen3fp32-w8a8-normbias",
    "msmodelslim-qwen3moe-w8a8-dynamic",
)


def exchanged(folder: Path, out: Path) -> Path:
    """A copy with the weights of its two decoder layers exchanged: other weights of the same layout."""
    shutil.copytree(folder, out)
    for index in out.glob("*.index.json"):
        index.unlink()
    tensors = read_tensors(folder)
    for file in out.glob("*.safetensors"):
        file.unlink()
    other = {".layers.0.": ".layers.1.", ".layers.1.": ".layers.0."}
    renamed = {_renamed(name, other): value for name, value in tensors.items()}
    save_file(renamed, out / next(folder.glob("*.safetensors")).name)
    return out


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if old in name:
            return name.replace(old, new)
    return name


def addresses(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.data_ptr() for name, tensor in tensors}


def wreck(model: nn.Module) -> None:
    """What sleep level 2 does to weights, as far as a CPU has it: their content is lost, their addresses stay."""
    for parameter in model.parameters():
        parameter.data.zero_()


def same(a: Run, b: Run) -> bool:
    return bool(np.array_equal(a.logprobs, b.logprobs)) and a.generated == b.generated


def chunks(tensors: Tensors, size: int = 7) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors in buckets, in an order that has nothing to do with the layers."""
    items = list(tensors.items())
    random.Random(0).shuffle(items)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def update(model: nn.Module, buckets: list[list[tuple[str, torch.Tensor]]], config: Any) -> None:
    """What a weight transfer engine does with the buckets that it receives."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    for bucket in buckets:
        model.load_weights(iter(bucket))  # type: ignore[operator]
    finalize_layerwise_reload(model, config)


class Session:
    """A running engine with its weights, which every step of a test leaves as it found them."""

    def __init__(self, llm: Any, folder: Path) -> None:
        self.llm, self.folder = llm, folder
        self.before, self.addresses = measure(llm), llm.apply_model(addresses)[0]
        self.tensors = read_tensors(folder)
        self.config = llm.llm_engine.model_config

    def check_same(self) -> None:
        assert same(measure(self.llm), self.before)
        assert self.llm.apply_model(addresses)[0] == self.addresses

    def reload(self, folder: Path | None = None) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)} if folder else {})

    def update(self, tensors: Tensors) -> None:
        buckets = list(chunks(tensors))
        self.llm.apply_model(lambda model: update(model, buckets, self.config))

    def refused(self, tensors: Tensors) -> NpuQuantError:
        """The error of an update, after which the weights are those from before."""
        with pytest.raises(NpuQuantError) as caught:
            self.update(tensors)
        self.check_same()
        return caught.value


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_loaded_again(name: str, tmp_path: Path) -> None:
    folder = fixture(name)
    other = exchanged(folder, tmp_path / "other")
    fresh = run(other)
    with engine(folder) as llm:
        session = Session(llm, folder)
        assert not same(session.before, fresh)

        llm.apply_model(wreck)
        session.reload()
        session.check_same()

        session.reload(other)
        assert same(measure(llm), fresh)
        assert llm.apply_model(addresses)[0] == session.addresses

        session.update(session.tensors)
        session.check_same()

        llm.apply_model(by_the_older_contract(session.tensors))
        session.check_same()


def by_the_older_contract(tensors: Tensors) -> Callable[[nn.Module], None]:
    """What RL trainers do without vLLM's reload: restore, load, prepare. vLLM may have repacked its float layers for the
    CPU at hand, so they are left out."""
    layers = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] not in ("weight", "bias")}
    quantized_tensors = [(name, value) for name, value in tensors.items() if name.rpartition(".")[0] in layers]

    def load(model: nn.Module) -> None:
        quantized = [
            (module, module.quant_method)
            for module in model.modules()
            if hasattr(getattr(module, "quant_method", None), "restore_weights_for_rl_loading")
        ]
        assert quantized
        for module, method in quantized:
            method.restore_weights_for_rl_loading(module)
        model.load_weights(iter(quantized_tensors))  # type: ignore[operator]
        for module, method in quantized:
            method.process_weights_after_loading(module)

    return load


@pytest.mark.parametrize("name", ["msmodelslim-qwen3-w8a8", "msmodelslim-qwen3moe-w8a8-dynamic"])
def test_wrong_weights_leave_the_old_ones(name: str, tmp_path: Path) -> None:
    folder = fixture(name)
    with engine(folder) as llm:
        session = Session(llm, folder)
        first, second = [key for key in session.tensors if key.endswith("o_proj.weight")]

        lacking = session.refused({key: value for key, value in session.tensors.items() if key not in (first, second)})
        assert [finding.code for finding in lacking.findings] == ["not-filled"] * 2
        assert {finding.expected for finding in lacking.findings} == {first, second}

        layer = first.removesuffix("weight")
        none = session.refused({key: value for key, value in session.tensors.items() if not key.startswith(layer)})
        assert {finding.layer for finding in none.findings} == {layer.removesuffix(".")}

        short = session.refused({**session.tensors, first: session.tensors[first][:-16]})
        assert [finding.code for finding in short.findings] == ["wrong-shape"]

        floats = session.refused({**session.tensors, first: session.tensors[first].to(torch.bfloat16)})
        assert [finding.code for finding in floats.findings] == ["wrong-dtype"]
        assert "quantized as the served ones" in floats.findings[0].fix

        with pytest.raises((KeyError, ValueError)):
            session.update({**session.tensors, "model.layers.0.nothing.weight": torch.zeros(1)})
        session.check_same()

        # Without a reload there is no parameter for most tensors, and the others refuse.
        weights = [(name, value) for name, value in session.tensors.items() if name.endswith("proj.weight")]
        with pytest.raises(NpuQuantError, match="reload-mismatch"):
            llm.apply_model(lambda model: model.load_weights(iter(weights)))
        session.check_same()


def test_another_recipe_is_refused_before_anything_changes(tmp_path: Path) -> None:
    folder = fixture("msmodelslim-qwen3-w8a8")
    damaged = exchanged(folder, tmp_path / "damaged")
    tensors = read_tensors(damaged)
    gone = next(name for name in tensors if name.endswith("down_proj.deq_scale"))
    kept = {name: value for name, value in tensors.items() if name != gone}
    save_file(kept, next(damaged.glob("*.safetensors")))
    with engine(folder) as llm:
        session = Session(llm, folder)
        with pytest.raises(NpuQuantError, match="missing-tensor"):
            session.reload(damaged)
        session.check_same()
        with pytest.raises(NpuQuantError) as caught:
            session.reload(fixture("msmodelslim-qwen3-w8a8-dynamic"))
        assert {finding.code for finding in caught.value.findings} == {"reload-mismatch"}
        assert any("W8A8_DYNAMIC" in finding.found for finding in caught.value.findings)
        session.check_same()


@pytest.mark.parametrize(
    ("name", "options"),
    [("msmodelslim-qwen3-w8a8", {}), ("msmodelslim-qwen3moe-w8a8-dynamic", {"enable_expert_parallel": True})],
)
def test_two_ranks(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = fixture(name)
    other = exchanged(folder, tmp_path / "other")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **options}
    fresh = run(other, **options)
    with engine(folder, **options) as llm:
        before = measure(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert same(measure(llm), fresh)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        assert same(measure(llm), before)


def test_every_tensor_of_a_model_is_registered() -> None:
    """vLLM's sleep mode keeps parameters and buffers, and no other tensor."""

    def loose(model: nn.Module) -> list[str]:
        registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        found = []
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if type(method).__module__.startswith("vllm_npu_quant"):
                found += [f"{name}.{path}" for path in _tensors_in(method, registered, set())]
        return found

    for name in ("msmodelslim-qwen3moe-w8a8-dynamic", "gptq-qwen3-gptqmodel-w4g32-sym-descact"):
        with engine(fixture(name)) as llm:
            assert llm.apply_model(loose)[0] == []


def _tensors_in(thing: Any, registered: set[int], seen: set[int]) -> list[str]:
    """The paths to tensors with content that an object holds and that are not registered with a module."""
    if id(thing) in seen or isinstance(thing, nn.Module | type | str | int | float):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [] if thing.is_meta or id(thing) in registered else [""]
    parts: dict[str, Any] = {}
    if isinstance(thing, dict):
        parts = {str(key): value for key, value in thing.items()}
    elif isinstance(thing, list | tuple | set):
        parts = {str(number): value for number, value in enumerate(thing)}
    elif type(thing).__module__.startswith("vllm_npu_quant"):
        parts = vars(thing) if hasattr(thing, "__dict__") else {}
    return [f"{name}.{path}" for name, part in parts.items() for path in _tensors_in(part, registered, seen)]
