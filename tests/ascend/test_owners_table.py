# SPDX-License-Identifier: Apache-2.0
"""docs/ascend_contract.md has the table of owners that ``make ascend-contract`` checks."""

from __future__ import annotations

from pathlib import Path

from tests.ascend.contract.owners import CHIPS, OWNERS, TABLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ascend_contract.md"


def test_the_page_has_the_table() -> None:
    expected = [f"| {one.name} | {' '.join(one.on_023)} | {' '.join(one.on_030)} |" for one in TABLE]
    written = PAGE.read_text().partition("| checkpoint | 0.23.0.post1 | 0.30.0rc2 |\n|---|---|---|\n")[2]
    assert written.partition("\n\n")[0].splitlines() == expected


def test_every_chip_has_a_letter() -> None:
    for one in TABLE:
        assert len(one.on_023) == len(one.on_030) == len(CHIPS)
        assert OWNERS.keys() >= set(one.on_023 + one.on_030), one.name
