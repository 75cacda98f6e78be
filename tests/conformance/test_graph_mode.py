# SPDX-License-Identifier: Apache-2.0
"""Graphs: ``apply`` is one graph for any number of tokens, and what a captured graph points at stays where it is.

That nothing reads a number, on the device "npu", is proved with fake tensors under the real torch_npu (test_traces.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conformance.method_cases import CASES, Case
from tests.conformance.recording import Recorder
from tests.conformance.traces import input_shape

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TITLES = [case.title for case in CASES]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_inputs(spec: dict[str, Any], tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    made = {}
    for name, (dtype, shape) in spec.items():
        size = input_shape(shape, tokens)
        if name == "topk_ids":
            made[name] = torch.stack([torch.randperm(4, generator=generator)[: size[1]] for _ in range(tokens)]).to(
                dtype
            )
        else:
            made[name] = torch.rand(size, generator=generator).to(dtype)
    return made


@pytest.mark.parametrize("case", CASES, ids=TITLES)
def test_apply_is_one_graph_for_any_number_of_tokens(case: Case) -> None:
    """No break, and no second compilation; in-place operators are made functional on the way, as vLLM's backend does it."""
    prepared = case.prepare(lambda tensor: tensor)
    layer = SimpleNamespace(**prepared.tensors)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return prepared.apply(layer, **inputs)

    with torch.inference_mode():
        compiled(random_inputs(prepared.inputs, 11))  # not a size of a weight: equal sizes are one symbol
        with torch._dynamo.config.patch(error_on_recompile=True):
            for tokens in (3, 17):
                inputs = random_inputs(prepared.inputs, tokens)
                assert torch.equal(compiled(inputs), prepared.apply(layer, **inputs))


@pytest.mark.parametrize("case", CASES, ids=TITLES)
def test_apply_leaves_the_layer_as_it_is(case: Case) -> None:
    """Neither the addresses nor the contents of the prepared tensors change."""
    prepared = case.prepare(lambda tensor: tensor)
    layer = SimpleNamespace(**prepared.tensors)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in prepared.tensors.items()}
    inputs = random_inputs(prepared.inputs, 5)
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    first, second = prepared.apply(layer, **inputs), prepared.apply(layer, **inputs)
    assert torch.equal(first, second)
    assert set(vars(layer)) == set(before)
    for name, (address, content) in before.items():
        tensor = getattr(layer, name)
        assert tensor.data_ptr() == address, name
        assert torch.equal(tensor, content), name
    assert all(torch.equal(inputs[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize("case", CASES, ids=TITLES)
def test_no_tokens_ask_the_device_for_nothing(case: Case) -> None:
    """No operator of torch_npu takes an empty tensor, says its documentation; its Meta kernels do not refuse one."""
    prepared = case.prepare(lambda tensor: tensor)
    inputs = {name: torch.empty(input_shape(shape, 0), dtype=dtype) for name, (dtype, shape) in prepared.inputs.items()}
    with Recorder() as recorder:
        result = prepared.apply(SimpleNamespace(**prepared.tensors), **inputs)
    assert recorder.calls == []
    assert (result.dtype, tuple(result.shape)) == (prepared.expected[0], input_shape(prepared.expected[1], 0))
