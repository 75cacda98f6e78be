# SPDX-License-Identifier: Apache-2.0
"""Pages that are made from the source say what the source says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
_spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_page_is_fresh(name: str) -> None:
    assert (DOCS / name).read_text() == generate.PAGES[name](), f"run: python docs/generate.py (docs/{name} is stale)"
