# SPDX-License-Identifier: Apache-2.0
"""Who serves what, on every chip: the table of owners.py, decided by the released packages in a process for each chip."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from typing import Any

import pytest

from tests.ascend.contract.owners import CHIPS, OWNERS, TABLE, Checkpoint
from tests.ascend.contract.processes import run_fresh

DECIDE = "import json, sys; from tests.ascend.contract.owners import decide; print(json.dumps(decide(sys.argv[1])))"


@lru_cache
def decided(chip: str) -> dict[str, Any]:
    return run_fresh(DECIDE, chip)


def test_names_are_unique() -> None:
    assert len({checkpoint.name for checkpoint in TABLE}) == len(TABLE)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_chip_is_known_and_its_device_untouched(chip: str) -> None:
    found = decided(chip)
    assert found["chip"] == chip.strip("_").lower()
    assert found["initialized"] is False


@pytest.mark.parametrize("checkpoint", TABLE, ids=lambda checkpoint: checkpoint.name)
@pytest.mark.parametrize("chip", CHIPS)
def test_owner(chip: str, checkpoint: Checkpoint) -> None:
    expected = OWNERS[checkpoint.letters(version("vllm-ascend"))[CHIPS.index(chip)]]
    assert decided(chip)["owners"][checkpoint.name] == expected


@pytest.mark.parametrize("chip", CHIPS)
def test_what_is_left_to_vllm_ascends_class_is_what_that_class_finds(chip: str) -> None:
    """Its own detection names the scheme that we took for the key of its registry."""
    from vllm_npu_quant.ascend.ownership import _compressed_tensors_scheme

    by_name = {checkpoint.name: checkpoint.config or {} for checkpoint in TABLE}
    theirs = decided(chip)["schemes"]
    assert theirs or chip == "_310P"
    for name, schemes in theirs.items():
        config = by_name[name]
        ours = [_compressed_tensors_scheme(group, config["format"]) for group in config["config_groups"].values()]
        assert ours == schemes, name
