# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of real producers, and the folder of fixtures itself."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.fixtures_index import FIXTURES, SHARED, fixture, fixtures, shared, shared_checkpoints
from vllm_npu_quant.checkpoint import Checkpoint

ALL = fixtures() + shared_checkpoints()


@pytest.mark.parametrize("folder", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_real_checkpoints(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.findings == ()
    assert checkpoint.ignored == {}
    found = {}
    for file in checkpoint.files:
        with safe_open(folder / file, "np") as theirs:
            for name in theirs.keys():  # noqa: SIM118
                piece = theirs.get_slice(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()), file)
    assert {name: (info.dtype, info.shape, info.file) for name, info in checkpoint.tensors.items()} == found
    for path in folder.glob("*.json"):
        assert checkpoint.read_json(path.name)


def test_shared_checkpoints_are_there() -> None:
    if not SHARED.is_dir():
        pytest.skip("the sibling folder shared/checkpoints is not part of the repository")
    assert shared("source/tiny-llama") in shared_checkpoints()


def test_shared_skips_with_a_reason() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"\.\./shared/checkpoints/no-such-checkpoint is not there"):
        shared("no-such-checkpoint")


def test_rotation_of_quarot_is_a_checkpoint_of_its_own() -> None:
    checkpoint = Checkpoint.open(fixture("msmodelslim-qwen3-w8a8-quarot") / "optional")
    assert checkpoint.findings == ()
    assert checkpoint.tensors["global_rotation"].shape == (256, 256)


def test_unknown_fixture_lists_the_known() -> None:
    with pytest.raises(KeyError, match="source-tiny-qwen3"):
        fixture("no-such-fixture")


def test_every_fixture_is_documented() -> None:
    text = (FIXTURES / "README.md").read_text()
    folders = {path.name for path in FIXTURES.iterdir() if path.is_dir()}
    assert folders == {path.name for path in fixtures()}
    assert not [name for name in folders if f"{name} " not in text and f"`{name}`" not in text]


def test_fixtures_are_plain_files() -> None:
    paths = [path for path in FIXTURES.rglob("*") if not path.is_dir()]
    assert not [path for path in paths if path.is_symlink() or not path.is_file()]
    assert not [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o111]
    assert sum(path.stat().st_size for path in paths) < 60e6
