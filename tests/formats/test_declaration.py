# SPDX-License-Identifier: Apache-2.0
"""Where declarations are found: an extension that fails is not passed over in silence."""

from __future__ import annotations

from importlib import metadata

import pytest

from vllm_npu_quant.formats import declaration


def test_an_extension_that_fails_fails_for_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("broken", "tests.formats.no_such_module:extend", declaration.EXTENSIONS)
    monkeypatch.setattr(declaration.metadata, "entry_points", lambda *, group: [broken])
    monkeypatch.setattr(declaration, "_loaded", declaration._loaded - {declaration.EXTENSIONS})
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            declaration.formats()
    monkeypatch.setattr(declaration.metadata, "entry_points", lambda *, group: [])
    assert "modelslim" in {one.name for one in declaration.formats()}


def test_two_formats_do_not_share_a_name() -> None:
    awq = declaration.require_format("awq", "config.json")
    declaration.register_format(awq)
    other = declaration.Format("other", awq.read, awq.method_name, frozenset({"other"}))
    with pytest.raises(ValueError, match="npu_awq is registered already"):
        declaration.register_format(other)
