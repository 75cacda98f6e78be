# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from artifacts import STALE_SECONDS, build_once, cache_root


def test_the_second_call_builds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    builds = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "file").write_text("content")

    assert build_once(target, build) == target
    assert build_once(target, build) == target
    assert len(builds) == 1
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        assert not target.exists()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(target, build)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builds_at_the_same_time_one_wins_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    both_are_building = threading.Barrier(2, timeout=30)

    def work(name: str) -> None:
        def build(folder: Path) -> None:
            both_are_building.wait()
            for part in "ab":
                (folder / part).write_text(name)

        build_once(target, build)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(target / part).read_text() for part in "ab"} in ({"first"}, {"second"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_run_left_is_removed_after_a_day_and_not_before(tmp_path: Path) -> None:
    old, recent, other = (tmp_path / f".unfinished-{name}" for name in ("model-old", "model-recent", "another-old"))
    for folder in (old, recent, other):
        folder.mkdir()
    long_ago = time.time() - STALE_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    build_once(tmp_path / "model", lambda folder: None)
    assert not old.exists()
    assert recent.exists()
    assert other.exists()


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert build_once(tmp_path / "model", lambda folder: None).stat().st_mode & 0o777 == 0o755
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("{home}/own", "{home}/xdg", "{home}/own"),
        (None, "{home}/xdg", "{home}/xdg/vllm-npu-quant"),
        (None, None, "{home}/.cache/vllm-npu-quant"),
        ("", "", "{home}/.cache/vllm-npu-quant"),
    ],
)
def test_where_the_cache_is(
    own: str | None, xdg: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in (("VLLM_NPU_QUANT_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value.format(home=tmp_path))
    assert cache_root().parent == Path(expected.format(home=tmp_path))
