# SPDX-License-Identifier: Apache-2.0
"""Lists of names: the right answers, and a number of lookups that does not grow with the list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_npu_quant.formats.names import MAX_COMPONENTS, MAX_PARTS, LayerNames

LAYER = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("name", "holds", "within"),
    [
        ("model.layers.1.mlp.gate_proj", True, True),
        ("gate_proj", True, True),
        ("mlp.gate_proj", True, True),
        ("model", True, True),
        ("model.layers.1", True, True),
        ("layers.1.mlp", True, True),
        (".mlp.", True, True),
        ("mlp.gate", False, True),
        ("gate", False, True),
        ("odel.layers", False, True),
        ("1", True, True),
        ("layers.11", False, False),
        ("layers.gate_proj", False, False),
        ("model.layers.1.mlp.gate_proj.x", False, False),
        ("mlp..gate_proj", False, False),
        ("Model", False, False),
        ("", False, False),
        (".", False, False),
    ],
)
def test_one_name(name, holds, within):
    names = LayerNames([name])
    assert names.holds(LAYER) is holds
    assert names.within(LAYER) is within
    assert bool(names) is bool(name.strip("."))


_NAMES = st.lists(st.sampled_from(["a", "b", "ab", "0", "10"]), min_size=1, max_size=5).map(".".join)


@given(st.lists(_NAMES, max_size=20), _NAMES)
def test_agrees_with_trying_each_name(names, layer):
    found = LayerNames(names)
    assert found.holds(layer) is any(
        layer == name or layer.endswith(f".{name}") or layer.startswith(f"{name}.") or f".{name}." in layer
        for name in names
    )
    assert found.within(layer) is any(name in layer for name in names)


class Counted(str):
    """A layer's name that counts how often something is looked up in it."""

    lookups = 0

    def __contains__(self, part: object) -> bool:
        type(self).lookups += 1
        return super().__contains__(part)

    def split(self, *args):
        return CountedParts(super().split(*args))


class CountedParts(list):
    def __getitem__(self, index):
        Counted.lookups += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [1_000, 200_000])
def test_lookups_do_not_grow_with_the_list(monkeypatch, count):
    monkeypatch.setattr(Counted, "lookups", 0)
    names = LayerNames(f"visual.layers.{number}.x{number}_" + ".y" * (number % 40) for number in range(count))
    layer = Counted(LAYER)
    assert not names.holds(layer)
    assert not names.within(layer)
    components = LAYER.count(".") + 1
    assert 0 < Counted.lookups <= 2 * MAX_COMPONENTS * components + MAX_PARTS


def test_general_names_are_tried_as_parts_of_long_lists_of_full_names():
    """As AWQ checkpoints list every float layer, and "gate" among them."""
    full = [f"visual.blocks.{number}.attn" for number in range(5_000)]
    names = LayerNames([*full, "gate", full[0]])
    assert names.within(LAYER)
    assert not names.holds(LAYER)
    assert names.holds("visual.blocks.4999.attn.qkv")
    assert not names.within("visual.blocks.5000.attn.qkv")
    assert names.untried == 5_001 - MAX_PARTS


def test_names_beyond_any_real_length_name_nothing():
    assert LayerNames([".".join("a" * MAX_COMPONENTS)]).holds(".".join("a" * 30))
    assert not LayerNames([".".join("a" * (MAX_COMPONENTS + 1))]).holds(".".join("a" * 30))
