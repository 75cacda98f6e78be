# SPDX-License-Identifier: Apache-2.0
"""inspect and check on real checkpoints: schemes and counts against the headers, findings against a table, time, imports."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.deepseek import write_deepseek
from tests.fixtures_index import fixture, fixtures, shared_checkpoints
from vllm_npu_quant.inspection import check, inspect, plan

FOLDERS = list({path.name: path for path in (*shared_checkpoints(), *fixtures())}.values())

#: What check says of each folder besides nothing: (severity, code) and how often, without duplicates.
FINDINGS: dict[str, set[tuple[str, str]]] = {
    "autoround-qwen3-fp8block": {("info", "requantized")},
    "ct-dsv3-w8a8-dynamic": {("info", "served-otherwise")},
    "ct-qwen3-fp8-block": {("info", "requantized")},
    "ct-qwen3-fp8-dynamic": {("info", "requantized")},
    "ct-qwen3moe-fp8-dynamic": {("info", "requantized")},
    "msmodelslim-qwen3-wfp8afp8": {("info", "requantized")},
    "ct-qwen3-mxfp4": {("info", "requantized")},
    "msmodelslim-qwen3-w4a4-mxfp4": {("info", "requantized")},
    "msmodelslim-qwen3-w8a8-mxfp8": {("info", "requantized")},
    "msmodelslim-qwen3-w8a8c8": {("warning", "kv-cache-not-quantized")},
}

#: Scheme -> (Linear layers, experts' projections, lm_head), by what a folder holds; against the list of all tensors that
#: came with the folders.
SCHEMES: dict[str, dict[str, tuple[int, int, int]]] = {
    "autoround-qwen3-lmhead": {"AutoRound W4A16": (14, 0, 1)},
    "autoround-qwen3-mixed": {"AutoRound W4A16": (12, 0, 0), "AutoRound W8A16": (1, 0, 0), "FLOAT": (1, 0, 1)},
    "autoround-qwen3-w3g128": {"AutoRound W3A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "autoround-qwen3-w4g128": {"AutoRound W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "autoround-qwen3-w4g128-asym": {"AutoRound W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "autoround-qwen3-w8g128": {"AutoRound W8A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "autoround-qwen3moe-w4g128": {"AutoRound W4A16": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "autoround-qwen3moe-w4g128-packawq": {"AutoRound W4A16": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "awq-qwen3-autoawq-g128": {"AWQ W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "awq-qwen3-g32": {"AWQ W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "awq-qwen3moe-autoawq-g128": {"AWQ W4A16": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "awq-qwen3moe-g128": {"AWQ W4A16": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "ct-dsv3-w8a8-dynamic": {
        "W8A8_DYNAMIC": (14, 24, 0),
        "W8A8_DYNAMIC as float": (2, 0, 0),  # kv_b_proj
        "FLOAT": (1, 0, 1),
    },
    "ct-qwen3-fp8-block": {"FP8_BLOCK_DYNAMIC as W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "autoround-qwen3-fp8block": {"FP8_BLOCK_DYNAMIC as W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-fp8-dynamic": {"FP8_CHANNEL_DYNAMIC as W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-mxfp4": {"MXFP4_W4A4 as W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w4a4-mxfp4": {"W4A4_MXFP4 as W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w8a8-mxfp8": {"W8A8_MXFP8 as W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w4a16-channel": {"W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w4a16-g128": {"W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w4a16-g128-asym": {"W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w4a16-g32-asym": {"W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w4a16-asym": {"W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w4a16-g64": {"W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w4a16-old": {"W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w4a4-int": {"W4A4_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w4a4-dynamic": {"W4A4_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w4a8-int8-channel": {"W4A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w4a8-int8-g128": {"W4A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w4a8-g64": {"W4A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w4a8-g64-old": {"W4A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w4a8-dynamic": {"W4A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w8a16-channel": {"W8A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w8a16": {"W8A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w8a16": {"W8A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3fp32-w8a16-g128": {"W8A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w8a8-dynamic": {"W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w8a8-dynamic": {"W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w8a8-quarot": {"W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w8a8-static": {"W8A8_STATIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3-w8a8-static-asym": {"W8A8_STATIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "ct-qwen3moe-fp8-dynamic": {"FP8_CHANNEL_DYNAMIC as W8A8_DYNAMIC": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "ct-qwen3moe-w4a16-g128": {"W4A16": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "ct-qwen3moe-w4a8-int8-channel": {"W4A8_DYNAMIC": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "msmodelslim-qwen3moe-v0-w4a8-g64": {"W4A8_DYNAMIC": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "ct-qwen3moe-w8a8-dynamic": {"W8A8_DYNAMIC": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "msmodelslim-qwen3moe-w8a8-dynamic": {"W8A8_DYNAMIC": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "gptq-qwen3-gptqmodel-w4g32-sym-descact": {"GPTQ W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-gptqmodel-w4g64-v2": {"GPTQ W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-w4g128-asym": {"GPTQ W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-w4g128-sym": {"GPTQ W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-gptqmodel-w4g128-asym": {"GPTQ W4A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-w3g128-sym": {"GPTQ W3A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-w8g128-sym": {"GPTQ W8A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-gptqmodel-w8-channel-sym": {"GPTQ W8A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3moe-w4g128-sym": {"GPTQ W4A16": (8, 48, 0), "FLOAT": (2, 0, 1)},
    "msmodelslim-dsv3-moe-w8a8": {"W8A8_DYNAMIC": (6, 24, 0), "W8A8": (8, 0, 0), "FLOAT": (3, 0, 1)},
    "msmodelslim-qwen3-v0-w8a8": {"W8A8": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w8a8-old": {"W8A8": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w8a8": {"W8A8": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3fp16-w8a8": {"W8A8": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3fp32-w8a8-normbias": {"W8A8": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-v0-w8a8s": {"W8A8S": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w4a4-flatquant": {"W4A4_FLATQUANT_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w4a4-laos": {"W8A8_DYNAMIC": (10, 0, 0), "W4A4_DYNAMIC": (4, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w8a8-pdmix": {"W8A8_MIX": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-w8a8c8": {"W8A8_MIX": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3-wfp8afp8": {"WFP8AFP8_DYNAMIC as W8A8_DYNAMIC": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "msmodelslim-qwen3moe-moe-w4a8": {"W4A8_DYNAMIC": (0, 48, 0), "W8A8_DYNAMIC": (8, 0, 0), "FLOAT": (2, 0, 1)},
    "tiny-deepseek-v3": {"FLOAT": (41, 0, 1)},
    "tiny-llama": {"FLOAT": (14, 0, 1)},
    "tiny-qwen3": {"FLOAT": (14, 0, 1)},
    "source-tiny-qwen3": {"FLOAT": (14, 0, 1)},
    "tiny-qwen3-moe": {"FLOAT": (58, 0, 1)},
    "trained-qwen3-moe": {"FLOAT": (116, 0, 1)},
    "autoround-qwen3-w2g64": {"AutoRound W2A16": (14, 0, 0), "FLOAT": (0, 0, 1)},
    "gptq-qwen3-gptqmodel-dynamic-mixed": {"GPTQ W4A16": (11, 0, 0), "GPTQ W8A16": (2, 0, 0), "FLOAT": (1, 0, 1)},
    "gptq-qwen3-gptqmodel-w4g128-lmhead": {"GPTQ W4A16": (14, 0, 0), "GPTQ W8A16": (0, 0, 1)},
}


def headers(folder: Path) -> dict[str, dict[str, Any]]:
    """The headers of a folder's weight files, read without the package."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        found.update(json.loads(content[8 : 8 + length]))
    found.pop("__metadata__", None)
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_counts(folder: Path) -> None:
    """As many quantized layers as layers with a quantized weight are stored, and every byte is counted once."""
    stored = headers(folder)
    marks = (".qweight", ".weight_packed", ".weight")
    quantized = {
        name.rpartition(".")[0]
        for name, entry in stored.items()
        if name.endswith(marks) and entry["dtype"] in ("I8", "I32", "U8", "F8_E4M3")
    }
    overview = inspect(folder)
    counted = [scheme for scheme in overview.schemes if scheme.scheme != "FLOAT"]
    assert sum(scheme.layers for scheme in counted) == len(quantized)
    assert sum(scheme.nbytes for scheme in overview.schemes) == overview.nbytes
    assert overview.nbytes == sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in stored.values())
    assert overview.tensors == len(stored)
    assert all(scheme.served for scheme in counted)
    found: dict[str, list[int]] = {}
    for scheme in overview.schemes:
        if (scheme.scheme, scheme.kind) != ("FLOAT", "other"):
            kind = ("linear", "fused_moe", "lm_head").index(scheme.kind) if scheme.kind != "other" else 0
            found.setdefault(scheme.scheme, [0, 0, 0])[kind] += scheme.layers
    # A fixture that is newer than the table is checked by its headers alone.
    assert {name: tuple(counts) for name, counts in found.items()} == SCHEMES.get(
        folder.name, {name: tuple(counts) for name, counts in found.items()}
    )


def test_tables_are_complete() -> None:
    assert {folder.name for folder in shared_checkpoints()} <= SCHEMES.keys()
    assert FINDINGS.keys() <= SCHEMES.keys()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_findings(folder: Path) -> None:
    """Exactly what the table says: nothing on the plain ones; also when values are read."""
    expected = FINDINGS.get(folder.name, set())
    report = check(folder, values=True)
    assert {(finding.severity.value, finding.code) for finding in report.findings} == expected
    severities = {severity for severity, _ in expected}
    assert report.passed() == ("error" not in severities)
    assert report.passed(strict=True) == severities.isdisjoint({"error", "warning"})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_two_ranks(folder: Path) -> None:
    """All of these models are made for two ranks, on A2."""
    report = check(folder, tp=2, device="a2")
    assert {finding.code for finding in report.findings if finding.severity.value == "error"} <= {"unsupported-scheme"}
    assert "cannot-shard" not in {finding.code for finding in report.findings}
    made = plan(folder, device="a2", tp=2)
    # Two of them have experts so small that zeros up to the operators' sizes take more than the second rank does.
    assert 0 < made.weight_bytes <= 1.1 * made.stored_bytes
    assert made.fits is True
    assert made.smallest_tp == 1


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_imports(command: str) -> None:
    """What takes long to import is not: benchmarks/commands.py measures the time."""
    code = (
        "import sys; from vllm_npu_quant.cli import main\n"
        f"sys.argv = ['vllm-npu-quant', {command!r}, {str(fixture('ct-qwen3-w8a8-dynamic'))!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'torch_npu', 'numpy', 'huggingface_hub'}\n"
        "heavy |= {'vllm_npu_quant.inspection.planning'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers of a checkpoint of DeepSeek-R1's size: 61 layers, 256 experts, 160 files; the data are holes."""
    return write_deepseek(tmp_path_factory.mktemp("deepseek"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's memory")
@pytest.mark.parametrize("call", ["inspect(model)", "check(model, tp=16, ep=16, device='a3')"])
def test_deepseek_size(call: str, deepseek: Path) -> None:
    """136,000 tensors in 160 files: below 500 MB, each in a process of its own; benchmarks/commands.py has the time."""
    code = (
        "import json, re\n"
        "from vllm_npu_quant.inspection import check, inspect\n"
        f"model = {str(deepseek)!r}\n"
        f"found = {call}\n"
        "findings = len(getattr(found, 'findings', ())) + getattr(found, 'errors', 0)\n"
        # Not ru_maxrss: that is at least the size of the process that started this one.
        "kilobytes = int(re.findall(r'VmHWM:\\s+([0-9]+) kB', open('/proc/self/status').read())[0])\n"
        "print(json.dumps([findings, kilobytes]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    findings, kilobytes = json.loads(result.stdout)
    assert findings == 0
    assert kilobytes < 500_000


def test_plan_of_deepseek(deepseek: Path) -> None:
    """A published model: 671 billion parameters as int8 fit on 16 dies of A3 or more, with 70 kB of cache per token."""
    made = plan(deepseek, device="a3", tp=16, ep=16)
    assert made.kv_bytes_per_token == 61 * (512 + 64) * 2
    assert 670e9 < made.stored_bytes < 700e9
    assert 40e9 < made.weight_bytes < 50e9
    assert made.smallest_tp == 16
    assert made.fits is True
    assert plan(deepseek, device="a3", tp=8, ep=8).fits is False
