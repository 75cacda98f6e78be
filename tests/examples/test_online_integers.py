# SPDX-License-Identifier: Apache-2.0
"""A float checkpoint that is quantized while it loads against the one that the offline writer makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vLLM is not installed")

from modelslim_writer import write_modelslim  # noqa: E402

from tests.e2e.test_online import SOURCE, quantized_tensors  # noqa: E402
from tests.e2e.test_reload import same  # noqa: E402
from tests.e2e.yardstick import run  # noqa: E402
from tests.fixtures_index import fixture  # noqa: E402


def test_the_integers_are_those_of_the_offline_writer(tmp_path: Path) -> None:
    source = fixture(SOURCE)
    written = tmp_path / "written"
    write_modelslim(source, written, scheme="W8A8_DYNAMIC")
    offline = run(written, inspect=quantized_tensors)
    online = run(source, quantization="npu_w8a8", inspect=quantized_tensors)
    assert online.methods == offline.methods
    assert online.inspected.keys() == offline.inspected.keys()
    assert all(torch.equal(value, offline.inspected[name]) for name, value in online.inspected.items())
    assert same(online, offline)
