# SPDX-License-Identifier: Apache-2.0
"""Where the test checkpoints lie: the ones in this repository, and the larger set that may lie beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

__all__ = ["FIXTURES", "SHARED", "fixture", "fixtures", "shared", "shared_cases", "shared_checkpoints"]

#: Checkpoints that are part of the repository; tests/fixtures/README.md says where each comes from.
FIXTURES = Path(__file__).resolve().parent / "fixtures"

#: A larger set of the same kind, where a sibling folder of the repository holds it.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"


def fixture(name: str) -> Path:
    """The folder of one checkpoint of tests/fixtures; a KeyError that lists the names where there is none."""
    folder = FIXTURES / name
    if not folder.is_dir():
        raise KeyError(
            f"no fixture {name!r} in tests/fixtures; there are: {', '.join(path.name for path in fixtures())}"
        )
    return folder


def fixtures() -> list[Path]:
    """Every checkpoint folder of tests/fixtures, sorted by name."""
    return sorted(path for path in FIXTURES.iterdir() if (path / "config.json").is_file())


def shared_checkpoints() -> list[Path]:
    """Every checkpoint folder of the sibling folder shared/checkpoints, sorted by name; empty where it is absent."""
    if not SHARED.is_dir():
        return []
    return sorted(path.parent for path in (*SHARED.glob("*/config.json"), *SHARED.glob("source/*/config.json")))


def shared(name: str) -> Path:
    """The folder of one checkpoint of the sibling folder ("source/tiny-llama" for a source model), else a skip."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/checkpoints/{name} is not there: it is not part of the repository")
    return folder


def shared_cases() -> Path:
    """The script of the sibling folder shared/cases that makes folders after public reports, else a skip."""
    script = SHARED.parent / "cases" / "make_cases.py"
    if not script.is_file():
        pytest.skip("../shared/cases is not there: it is not part of the repository")
    return script
