# SPDX-License-Identifier: Apache-2.0
"""Builds of the kernels by compilers that fail: where they write, what is said, and what is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_npu_quant.emulation import native


class Compiler:
    """A shell script in place of the C compiler. Its body runs for each compilation; ``$3`` is the library's place."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "compiler"
        self.calls = folder / "calls"
        self.source = folder / "kernel.c"
        self.source.write_text("int kernel;")
        self.cache = folder / "cache"
        monkeypatch.setenv("CC", str(self.path))
        monkeypatch.setenv("VLLM_NPU_QUANT_CACHE", str(self.cache))

    def does(self, body: str, version: str = "1.0") -> None:
        self.path.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo {version}; exit; fi\necho called >> {self.calls}\n{body}\n'
        )
        self.path.chmod(0o755)

    @property
    def count(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def build(self) -> Path:
        return native.build(self.source)

    def markers(self) -> list[Path]:
        return sorted(self.cache.rglob("*.failed"))


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(tmp_path, monkeypatch)


FAILS = "echo 'In file included from kernel.c:' >&2; echo 'kernel.c:1:5: error: no such vector type' >&2; " + (
    "for i in 1 2 3 4 5 6 7 8 9; do echo 'kernel.c:1:5: note: ten thousand words more' >&2; done; exit 1"
)


def test_a_failure_is_remembered(compiler: Compiler) -> None:
    compiler.does(FAILS)
    with pytest.raises(OSError, match="error: no such vector type") as first:
        compiler.build()
    assert "\n" not in str(first.value)
    assert "note" not in str(first.value)
    with pytest.raises(OSError, match="error: no such vector type") as second:
        compiler.build()
    assert compiler.count == 1
    (marker,) = compiler.markers()
    assert f"delete {marker} to try again" in str(second.value)


def test_a_failure_is_forgotten(compiler: Compiler) -> None:
    """By deleting its file, or with another version of the compiler."""
    compiler.does(FAILS)
    for again in (lambda: compiler.markers()[0].unlink(), lambda: compiler.does(FAILS, version="2.0")):
        with pytest.raises(OSError, match="no such vector type"):
            compiler.build()
        again()
    compiler.does("echo library > $3", version="2.0")
    assert compiler.build().read_text() == "library\n"
    assert compiler.count == 3


@pytest.mark.parametrize(
    "body", ["kill -9 $$", "echo 'fatal error: error writing to x: No space left on device' >&2; exit 1"]
)
def test_passing_failures_are_not_remembered(body: str, compiler: Compiler) -> None:
    compiler.does(body)
    for _ in range(2):
        with pytest.raises(OSError, match="compiler"):
            compiler.build()
    assert compiler.count == 2
    assert compiler.markers() == []


def test_compilers_write_to_the_cache(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder for temporary files may be full, or not there; nothing is left in the cache but the library."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    compiler.does('echo assembly > "$TMPDIR/kernel.s" && cp "$TMPDIR/kernel.s" "$3"')
    library = compiler.build()
    assert library.read_text() == "assembly\n"
    assert [path.name for path in library.parent.iterdir() if path.suffix != ".lock"] == [library.name]


def test_output_that_is_no_text_for_terminals(compiler: Compiler) -> None:
    compiler.does("printf 'error: \\033[31mred\\007' >&2; exit 1")
    with pytest.raises(OSError, match="red") as caught:
        compiler.build()
    assert str(caught.value).isprintable()
