# SPDX-License-Identifier: Apache-2.0
"""Asking a model class where weights go: the ways through ``load_weights`` that vLLM's models have, and some more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch import nn

from vllm_npu_quant.engine.ask import Delivery, ask

Weights = Iterable[tuple[str, torch.Tensor]]


def weight_of(outputs: int, inputs: int) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(outputs, inputs), requires_grad=False)

    def weight_loader(param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: object = None) -> None:
        raise AssertionError("a loader of the model ran")

    param.weight_loader = weight_loader  # type: ignore[attr-defined]
    return param


class Toy(nn.Module):
    """A layer of 8 outputs and 6 inputs, loaded from "a" and "b", and a norm without a loader of its own."""

    def __init__(self, change: Callable[[str, torch.Tensor], Iterator[tuple[torch.Tensor, object]]]) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = weight_of(8, 6)
        self.norm = nn.LayerNorm(6)
        self.change = change

    def load_weights(self, weights: Weights) -> set[str]:
        for name, weight in weights:
            if name == "norm.weight":
                self.norm.weight.data.copy_(weight.flatten()[:6])
                continue
            for changed, shard in self.change(name, weight):
                param = self.inner.weight
                param.weight_loader(param, changed, *([] if shard is None else [shard]))
        return {"inner.weight"}


def delivered(
    change: Callable[..., Iterator[tuple[torch.Tensor, object]]], **shapes: tuple[int, ...]
) -> list[Delivery]:
    return ask(Toy(change), shapes or {"a": (8, 6)}).deliveries["inner"]


def once(change: Callable[[torch.Tensor], torch.Tensor]) -> Delivery:
    (delivery,) = delivered(lambda name, weight: iter([(change(weight), None)]))
    return delivery


def test_a_weight_that_arrives_as_it_is() -> None:
    for change in (lambda w: w, lambda w: w.clone(), lambda w: w.detach().contiguous(), lambda w: w * 1.0):
        delivery = once(change)
        assert (delivery.layer, delivery.args, delivery.rows, delivery.change) == ("a", (), None, "")


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda w: w.view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6), [0, 2, 1, 3, 4, 6, 5, 7]),
        (lambda w: w.flip(0), [7, 6, 5, 4, 3, 2, 1, 0]),
        (lambda w: w[2:4], [2, 3]),
        (lambda w: w.chunk(2)[1], [4, 5, 6, 7]),
        (lambda w: w[1::2], [1, 3, 5, 7]),
        (lambda w: w[:2].repeat(2, 1), [0, 1, 0, 1]),
        (lambda w: torch.cat([w[4:], w[:4]]), [4, 5, 6, 7, 0, 1, 2, 3]),
    ],
)
def test_rows_in_another_order(change: Callable[[torch.Tensor], torch.Tensor], rows: list[int]) -> None:
    delivery = once(change)
    assert delivery.rows is not None
    assert (delivery.layer, delivery.rows.tolist(), delivery.change) == ("a", rows, "")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w + 1,
        lambda w: w / 2,
        lambda w: w + w.flip(0),
        lambda w: torch.zeros_like(w),
        lambda w: torch.cat([w[:4], torch.zeros(4, 6)]),
        lambda w: w.t(),
        lambda w: w.t().reshape(8, 6),
        lambda w: w.reshape(4, 12),
        lambda w: w.unsqueeze(0),
        lambda w: w[:, :3],
        lambda w: w.to(torch.bfloat16),
        lambda w: w.view(2, 4, 6).transpose(0, 1).reshape(8, 6)[:, [1, 0, 2, 3, 4, 5]],
        lambda w: w[[1, 0, 2, 3, 4, 5, 6, 7]][:, [0, 0, 2, 3, 4, 5]],
    ],
)
def test_what_no_quantized_weight_can_follow(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert once(change).change


def test_a_square_weight_that_is_transposed() -> None:
    (delivery,) = delivered(lambda name, weight: iter([(weight.t(), None)]), a=(6, 6))
    assert delivery.change


def test_columns_alone_in_another_order() -> None:
    (delivery,) = delivered(lambda name, weight: iter([(weight[:, [1, 0, 2, 3, 4, 5]], None)]))
    assert delivery.change


def test_weights_that_are_joined_are_not_one_of_them() -> None:
    held: list[torch.Tensor] = []

    def join(name: str, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, object]]:
        held.append(weight)
        return iter([(torch.cat(held), None)] if len(held) == 2 else [])

    (delivery,) = delivered(join, a=(4, 6), b=(4, 6))
    assert delivery.change


def test_one_weight_in_two_places_and_two_in_one() -> None:
    found = delivered(lambda name, w: iter([(w, 0), (w, "v")] if name == "a.weight" else [(w, 1)]), a=(8, 6), b=(8, 6))
    assert [(each.layer, each.args, each.rows) for each in found] == [
        ("a", (0,), None),
        ("a", ("v",), None),
        ("b", (1,), None),
    ]


def test_a_model_that_collects_weights_first_and_takes_them_backwards() -> None:
    class Backwards(Toy):
        def load_weights(self, weights: Weights) -> set[str]:
            return super().load_weights(reversed(list(weights)))

    model = Backwards(lambda name, weight: iter([(weight, name)]))
    found = ask(model, {"a": (8, 6), "b": (3, 6), "c": (1, 6)}).deliveries["inner"]
    assert [(each.layer, each.args) for each in found] == [
        ("c", ("c.weight",)),
        ("b", ("b.weight",)),
        ("a", ("a.weight",)),
    ]


def test_a_weight_that_the_model_refuses_and_an_error_at_the_end() -> None:
    class Strict(Toy):
        def load_weights(self, weights: Weights) -> set[str]:
            super().load_weights(weights)
            raise ValueError("weights are left out")

    def refuse(name: str, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, object]]:
        if name == "b.weight":
            raise KeyError(name)
        return iter([(weight, None)])

    answers = ask(Strict(refuse), {"a": (8, 6), "b": (8, 6), "c": (8, 6)})
    assert [each.layer for each in answers.deliveries["inner"]] == ["a", "c"]
    assert answers.refused == {"b": "KeyError: 'b.weight'"}


def test_a_model_that_refuses_everything_is_asked_only_so_often() -> None:
    asked = []

    def refuse(name: str, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, object]]:
        asked.append(name)
        raise KeyError(name)

    answers = ask(Toy(refuse), {f"l{i}": (8, 6) for i in range(1000)})
    assert len(asked) < 100
    assert len(answers.refused) == 1000
    assert not answers.deliveries


def test_the_model_is_unchanged() -> None:
    model = Toy(lambda name, weight: iter([(weight, None)]))
    model.tied = nn.Module()
    model.tied.weight = model.inner.weight
    before = {name: param for name, param in model.named_parameters(remove_duplicate=False)}
    values = {name: param.detach().clone() for name, param in before.items()}
    ask(model, {"a": (8, 6), "norm": (6, 6)})
    after = {name: param for name, param in model.named_parameters(remove_duplicate=False)}
    assert list(after) == list(before)
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    assert model.inner.weight is model.tied.weight


def test_a_large_weight_takes_no_memory() -> None:
    """A matrix of 10^12 elements: what repeated its rows would not end."""
    (delivery,) = delivered(lambda name, weight: iter([(weight, None)]), a=(1_000_000, 1_000_000))
    assert (delivery.rows, delivery.change) == (None, "")
