# SPDX-License-Identifier: Apache-2.0
"""The first inputs of every fuzz target, the same at each run; ``make fuzz`` goes on from there."""

from __future__ import annotations

import json
from random import Random

import pytest

from tests.fuzz.mutate import changed_bytes, changed_json
from tests.fuzz.run import run_one
from tests.fuzz.targets import FP8, TARGETS

#: Inputs of each target: some seconds.
INPUTS = 400


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_readers_raise_nothing_else(target: str) -> None:
    for number in range(INPUTS):
        try:
            run_one(target, number)
        except BaseException:
            print(f"python -m tests.fuzz.run --one --target {target} --first {number}")
            raise


def test_inputs_are_reproduced() -> None:
    assert len({json.dumps(changed_json(FP8, Random(number))) for number in range(100)}) > 80
    assert len({changed_bytes(b'{"a": [1, 2]}', Random(number)) for number in range(100)}) > 80
    assert changed_json(FP8, Random(7)) == changed_json(FP8, Random(7))
    assert changed_bytes(b"abc" * 9, Random(7)) == changed_bytes(b"abc" * 9, Random(7))


def test_a_reader_that_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "broken", lambda random: {}["missing"])
    with pytest.raises(KeyError):
        run_one("broken", 0)
