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
    "ar-qwen3vl": "auto-round",
    "awq-deepseek-mha": "awq",
    "awq-glm4v": "awq",
    "awq-gptbigcode": "awq",
    "awq-minimax-m25": "awq",
    "awq-mixed-float-down": "awq",
    "awq-phi3-fused": "awq",
    "awq-qwen25-omni": "awq",
    "awq-qwen2vl-visual": "awq",
    "awq-qwen3-seqcls": "awq",
    "awq-seed-oss": "awq",
    "ct-embedding-untied": "compressed-tensors",
    "ct-gemma4-k-eq-v": "compressed-tensors",
    "ct-gemma4-mixed": "compressed-tensors",
    "ct-llama4-fp8-fused": "compressed-tensors",
    "ct-qwen3next-nonuniform": "compressed-tensors",
    "ct-qwen3vl-awq-asym": "compressed-tensors",
    "ct-whisper": "compressed-tensors",
    "fp8-deepseek-v32": "fp8",
    "fp8-glm4-fused-tensor": "fp8",
    "fp8-k-exaone": "fp8",
    "fp8-minimax-m2": "fp8",
    "fp8-mixtral-static": "fp8",
    "fp8-qwen35-moe": "fp8",
    "fp8-qwen3moe-official": "fp8",
    "fp8-qwen3vlmoe-fused": "fp8",
    "gptq-dynamic-layers": "gptq",
    "gptq-glm4-fused": "gptq",
    "gptq-hunyuan-moe": "gptq",
    "gptq-llama-zero-bias": "gptq",
    "gptq-moe-int4-int8-mix": "gptq",
    "gptq-neox-interleaved": "gptq",
    "gptq-opt": "gptq",
    "gptq-qwen1-w2": "gptq",
    "gptq-qwen2moe-expert-bias": "gptq",
    "gptq-qwen3-embedding": "gptq",
    "gptq-qwen3next-int8": "gptq",
    "gptq-qwen3vl-dynamic": "gptq",
    "gptq-qwen3vl-optimum": "gptq",
    "gptq-tied-stored-head": "gptq",
    "ms-glm4-fused-static": "modelslim",
    "ms-kimi-k25": "modelslim",
    "ms-neox-interleaved": "modelslim",
    "ms-qwen35-moe": "modelslim",
    "ms-qwen3vl": "modelslim",
    "ms-relabelled-w8a16": "modelslim",
}

#: The severity and code of an error or warning, and a part of what it says; there is no error beside a warning.
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
    "ct-24-sparse": ("error", "unsupported-scheme", "sparse weights (sparsity_config) are not decompressed"),
    "ct-gptoss-expert-bias": (
        "error",
        "unsupported-scheme",
        "quantized experts are served without a bias (2 MoE layers have one)",
    ),
    "ct-nemotron-no-gate": (
        "error",
        "unsupported-scheme",
        "experts without a gate projection, whose activation is relu squared, a",
    ),
    "ct-qwen35-z-float": (
        "error",
        "fused-shards-disagree",
        "vLLM runs these layers as one, and the checkpoint quantizes them diffe",
    ),
    "ct-qwen3moe-kv-fp8": (
        "warning",
        "kv-cache-not-quantized",
        "the weights are served; the KV cache stays in the model's dtype and it",
    ),
    "ms-fa-quant": (
        "warning",
        "kv-cache-not-quantized",
        "the weights are served; attention and its caches stay in the model's d",
    ),
    "ms-mtp-not-described": (
        "warning",
        "unexpected-tensor",
        "the description does not list this tensor, which is loaded as it is",
    ),
    "fp8-modelopt-config": (
        "warning",
        "kv-cache-not-quantized",
        "the weights are served; the KV cache stays in the model's dtype",
    ),
    "fp8-modelopt-file-only": (
        "warning",
        "kv-cache-not-quantized",
        "the weights are served; the KV cache stays in the model's dtype",
    ),
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
    meant = [finding for finding in told if (finding.severity.value, finding.code) == (severity, code)]
    assert meant, report.findings
    assert words in meant[0].render()
    assert meant[0].fix or severity == "warning"
    assert report.passed() == (severity == "warning")
