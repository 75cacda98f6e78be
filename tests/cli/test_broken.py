# SPDX-License-Identifier: Apache-2.0
"""Each broken checkpoint is found out, with its code, in words; never with a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.broken import CASES, Case, Folder
from vllm_npu_quant.cli.app import app
from vllm_npu_quant.inspection import check

RUNNER = CliRunner()


def test_there_are_enough_and_each_has_a_name() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_found(case: Case, tmp_path: Path) -> None:
    folder = Folder(case.source, tmp_path / "model")
    case.change(folder)
    report = check(folder.path, **(case.options or {}))
    found = [finding for finding in report.findings if finding.code == case.code and case.layer in finding.layer]
    assert found, f"{case.code} {case.layer}: found {[finding.render() for finding in report.findings]}"
    assert any(finding.severity.value == case.severity for finding in found)
    assert report.passed() == (case.severity != "error")
    assert not report.passed(strict=True)
    assert all(
        finding.fix or "more findings" in finding.message
        for finding in report.findings
        if finding.severity.value == "error"
    )


@pytest.mark.parametrize("case", CASES[:: max(len(CASES) // 20, 1)], ids=lambda case: case.name)
def test_command(case: Case, tmp_path: Path) -> None:
    """Exit codes, JSON and text of a part of them."""
    folder = Folder(case.source, tmp_path / "model")
    case.change(folder)
    options = [part for key, value in (case.options or {}).items() for part in _option(key, value)]
    text = RUNNER.invoke(app, ["check", str(folder.path), *options])
    data = RUNNER.invoke(app, ["check", str(folder.path), *options, "--json", "--strict"])
    assert text.exit_code in ((1, 2) if case.severity == "error" else (0,))
    assert data.exit_code in (1, 2)
    assert f"{case.severity}[{case.code}]" in text.output
    found = json.loads(data.stdout)
    assert (found["schema"], found["version"]) == ("vllm-npu-quant/check", 1)
    assert case.code in {finding["code"] for finding in found["findings"]}
    assert "Traceback" not in text.output
    assert "Traceback" not in data.output
    for command in (["inspect"], ["inspect", "--layers"], ["plan", "--device", "a2"]):
        result = RUNNER.invoke(app, [*command, str(folder.path)])
        assert result.exit_code in (0, 1, 2), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception


def _option(key: str, value: object) -> list[str]:
    return [f"--{key}"] if value is True else [f"--{key}", str(value)]
