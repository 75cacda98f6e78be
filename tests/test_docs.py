# SPDX-License-Identifier: Apache-2.0
"""Pages that are made from the source say what the source says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.e2e.routing import MOST_CHANGED

DOCS = Path(__file__).resolve().parents[1] / "docs"
_spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_page_is_fresh(name: str) -> None:
    assert (DOCS / name).read_text() == generate.PAGES[name](), f"run: python docs/generate.py (docs/{name} is stale)"


def test_no_checkpoint_is_beyond_its_limit() -> None:
    """docs/checkpoints.md is made from runs, which are no part of the suite; what it says has to hold."""
    lines = (DOCS / "checkpoints.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    ran = {row[0]: row for row in rows if len(row) == 5 and row[0] != "checkpoint"}
    for name, _, limit, error, both in ran.values():
        one, _, rerouted = error.partition(", rerouted ")
        assert float(one) <= float(limit), name
        assert float(rerouted.rstrip("%") or 0) <= 100 * MOST_CHANGED, name
        for text in both.split(", EP "):
            assert text == "not run" or float(text) <= float(limit), name
    assert len(ran) > 60
