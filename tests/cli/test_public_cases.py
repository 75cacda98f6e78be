# SPDX-License-Identifier: Apache-2.0
"""Folders after public reports, where they can be made: what ``check`` answers of each, against a table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures_index import shared_cases
from vllm_npu_quant.inspection import check

#: What is neither an error nor a warning, with the format that is found.
LOADS = {
    "fp8-modelopt-config": "modelopt",
    "fp8-modelopt-file-only": "modelopt",
    "ms-mindie-format": "modelslim",
    "ms-mindie-group-minus-one": "modelslim",
    "ms-group-size-text": "modelslim",
    "ms-options-in-description": "modelslim",
    "ct-kimi-k25-nested": "compressed-tensors",
    "fp8-devstral-hf": "fp8",
    "fp8-fbgemm": "fp8",
    "fp8-transformers5": "fp8",
    "awq-internvl-llm-config": "awq",
    "awq-minicpmo-null": "awq",
    "awq-transformers5": "awq",
    "gptq-no-quant-method": "gptq",
    "gptq-null-options": "gptq",
    "gptq-quantize-config-only": "gptq",
    "ar-bits16-default": "auto-round",
    "ar-method-autoround": "auto-round",
    "folder-leftover-layers": "compressed-tensors",
}

#: The severity and code of the one error or warning, and a part of what it says.
TOLD = {
    "ms-leftover-fp8": ("warning", "contradictory-evidence", "remove quantization_config ('fp8') from config.json"),
    "ms-saved-into-float-folder": (
        "error",
        "index-mismatch",
        "remove the float model's files: model.safetensors.index.json, model-00001-of-00001.safetensors",
    ),
    "fp8-devstral-both": ("error", "duplicate-tensor", "remove consolidated.safetensors, params.json"),
    "ct-mistral-format": ("error", "unsupported-scheme", "Mistral's consolidated format"),
    "folder-lora-adapter": ("error", "unreadable-file", "serve Qwen/Qwen3-8B-AWQ"),
    "ct-fp8-not-converted": ("warning", "bad-config", "the whole model is float"),
    "ct-qwen35-triple-prefix": ("error", "bad-config", "model.language_model.language_model.language_model"),
    "ct-pangu-router-int8": ("warning", "bad-config", "quantize"),
    "gptq-tied-quantized-head": ("warning", "served-otherwise", "the stored lm_head is not used"),
    "gptq-marlin-format": ("error", "unsupported-scheme", "marlin"),
    "other-bnb4": ("error", "unsupported-scheme", "bitsandbytes"),
    "other-gptoss-mxfp4": ("error", "unsupported-scheme", "MXFP4"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    command = [sys.executable, str(shared_cases()), str(folder), *LOADS, *TOLD]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", LOADS)
def test_loads(name: str, folders: Path) -> None:
    report = check(folders / name)
    assert report.format == LOADS[name]
    assert report.passed(strict=True), report.findings


@pytest.mark.parametrize("name", TOLD)
def test_is_told(name: str, folders: Path) -> None:
    severity, code, words = TOLD[name]
    report = check(folders / name)
    told = [finding for finding in report.findings if finding.severity.value != "info"]
    assert [(finding.severity.value, finding.code) for finding in told] == [(severity, code)]
    assert words in told[0].render()
    assert told[0].fix
    assert report.passed() == (severity == "warning")
