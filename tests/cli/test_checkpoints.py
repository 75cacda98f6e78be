# SPDX-License-Identifier: Apache-2.0
"""inspect and check on real checkpoints: schemes and counts against the headers, findings against a table, time, imports."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_index import fixture, fixtures, shared_checkpoints
from vllm_npu_quant.inspection import check, inspect, plan

FOLDERS = list({path.name: path for path in (*shared_checkpoints(), *fixtures())}.values())

#: What check says of each folder besides nothing: (severity, code) and how often, without duplicates.
FINDINGS: dict[str, set[tuple[str, str]]] = {
    "autoround-qwen3-fp8block": {("info", "requantized")},
    "ct-qwen3-fp8-block": {("info", "requantized")},
    "ct-qwen3-fp8-dynamic": {("info", "requantized")},
    "ct-qwen3moe-fp8-dynamic": {("info", "requantized")},
    "msmodelslim-qwen3-wfp8afp8": {("info", "requantized")},
    "ct-qwen3-mxfp4": {("error", "unsupported-scheme")},
    "msmodelslim-qwen3-w4a4-mxfp4": {("error", "unsupported-scheme")},
    "msmodelslim-qwen3-w8a8-mxfp8": {("error", "unsupported-scheme")},
    "msmodelslim-qwen3-w8a8c8": {("warning", "kv-cache-not-quantized")},
}

#: Part of a folder's name -> the scheme that most of its layers have.
SCHEMES = {
    "autoround-qwen3-lmhead": "AutoRound W4A16",
    "autoround-qwen3-w3g128": "AutoRound W3A16",
    "autoround-qwen3-w8g128": "AutoRound W8A16",
    "awq-": "AWQ W4A16",
    "gptq-qwen3-w3g128-sym": "GPTQ W3A16",
    "gptq-qwen3-w8g128-sym": "GPTQ W8A16",
    "ct-qwen3-w4a16-g128": "W4A16",
    "ct-qwen3-w8a8-dynamic": "W8A8_DYNAMIC",
    "msmodelslim-qwen3-w8a8-pdmix": "W8A8_MIX",
    "msmodelslim-qwen3-v0-w4a8-g64": "W4A8_DYNAMIC",
    "msmodelslim-qwen3moe-w8a8-dynamic": "W8A8_DYNAMIC",
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
    counted = [scheme for scheme in overview.schemes if scheme.scheme not in ("FLOAT", "UNKNOWN")]
    unknown = [scheme for scheme in overview.schemes if scheme.scheme == "UNKNOWN"]
    assert sum(scheme.layers for scheme in (*counted, *unknown)) == len(quantized)
    assert bool(unknown) == ("mxfp" in folder.name)
    assert sum(scheme.nbytes for scheme in overview.schemes) == overview.nbytes
    assert overview.nbytes == sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in stored.values())
    assert overview.tensors == len(stored)
    assert all(scheme.served for scheme in counted)
    for part, name in SCHEMES.items():
        if folder.name.startswith(part):
            assert counted[0].scheme == name


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
    assert 0 < made.weight_bytes <= made.stored_bytes
    assert made.fits is (made.smallest_tp == 1)


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_no_torch_and_quick(command: str) -> None:
    """A process of its own: neither torch nor vllm, and its own time below the limit (the best of three: other work on the
    host takes some)."""
    code = (
        "import sys; from vllm_npu_quant.cli import main\n"
        f"sys.argv = ['vllm-npu-quant', {command!r}, {str(fixture('ct-qwen3-w8a8-dynamic'))!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'torch_npu', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import resource; used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('seconds', used.ru_utime + used.ru_stime)\n"
    )
    seconds = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        seconds.append(float(re.findall(r"seconds ([0-9.]+)", result.stdout)[0]))
    assert min(seconds) < 0.7, seconds


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers of a checkpoint of DeepSeek-R1's size: 61 layers, 256 experts, 160 files; the data are holes."""
    folder = tmp_path_factory.mktemp("deepseek")
    tensors: dict[str, tuple[str, list[int]]] = {}
    description: dict[str, str] = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": "0"}
    description["group_size"] = 0  # type: ignore[assignment]

    def linear(name: str, outputs: int, inputs: int) -> None:
        for suffix, dtype, shape in (
            ("weight", "I8", [outputs, inputs]),
            ("weight_scale", "BF16", [outputs, 1]),
            ("weight_offset", "BF16", [outputs, 1]),
        ):
            tensors[f"{name}.{suffix}"] = (dtype, shape)
            description[f"{name}.{suffix}"] = "W8A8_DYNAMIC"

    def plain(name: str, *shape: int) -> None:
        tensors[name] = ("BF16", list(shape))
        description[name] = "FLOAT"

    plain("model.embed_tokens.weight", 129280, 7168)
    plain("lm_head.weight", 129280, 7168)
    plain("model.norm.weight", 7168)
    for number in range(61):
        layer = f"model.layers.{number}"
        plain(f"{layer}.input_layernorm.weight", 7168)
        plain(f"{layer}.post_attention_layernorm.weight", 7168)
        linear(f"{layer}.self_attn.q_a_proj", 1536, 7168)
        linear(f"{layer}.self_attn.q_b_proj", 24576, 1536)
        linear(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        plain(f"{layer}.self_attn.kv_b_proj.weight", 32768, 512)
        linear(f"{layer}.self_attn.o_proj", 7168, 16384)
        if number < 3:
            for name, outputs, inputs in (("gate", 18432, 7168), ("up", 18432, 7168), ("down", 7168, 18432)):
                linear(f"{layer}.mlp.{name}_proj", outputs, inputs)
            continue
        plain(f"{layer}.mlp.gate.weight", 256, 7168)
        for expert in (*(f"experts.{i}" for i in range(256)), "shared_experts"):
            linear(f"{layer}.mlp.{expert}.gate_proj", 2048, 7168)
            linear(f"{layer}.mlp.{expert}.up_proj", 2048, 7168)
            linear(f"{layer}.mlp.{expert}.down_proj", 7168, 2048)
    names, files = list(tensors), 160
    size = {"I8": 1, "BF16": 2}
    weight_map = {}
    for number in range(files):
        file = f"quant_model_weights-{number + 1:05d}-of-{files:05d}.safetensors"
        header, end = {}, 0
        for name in names[number * len(names) // files : (number + 1) * len(names) // files]:
            dtype, shape = tensors[name]
            count = size[dtype]
            for length in shape:
                count *= length
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
            end += count
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    config = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "hidden_size": 7168}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config |= {"num_experts_per_tok": 8, "max_position_embeddings": 163840, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's memory")
@pytest.mark.parametrize("call", ["inspect(model)", "check(model, tp=16, ep=16, device='a3')"])
def test_deepseek_size(call: str, deepseek: Path) -> None:
    """136,000 tensors in 160 files: below 5 s of processor time and 500 MB, each in a process of its own."""
    code = (
        "import json, re, resource\n"
        "from vllm_npu_quant.inspection import check, inspect\n"
        f"model = {str(deepseek)!r}\n"
        f"found = {call}\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "findings = len(getattr(found, 'findings', ())) + getattr(found, 'errors', 0)\n"
        # Not ru_maxrss: that is at least the size of the process that started this one.
        "kilobytes = int(re.findall(r'VmHWM:\\s+([0-9]+) kB', open('/proc/self/status').read())[0])\n"
        "print(json.dumps([findings, used.ru_utime + used.ru_stime, kilobytes]))\n"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    findings, seconds, kilobytes = json.loads(result.stdout)
    assert findings == 0
    assert seconds < 5
    assert kilobytes < 500_000
    assert time.perf_counter() - started < 60


def test_plan_of_deepseek(deepseek: Path) -> None:
    """A published model: 671 billion parameters as int8 fit on 16 dies of A3 or more, with 70 kB of cache per token."""
    made = plan(deepseek, device="a3", tp=16, ep=16)
    assert made.kv_bytes_per_token == 61 * (512 + 64) * 2
    assert 670e9 < made.stored_bytes < 700e9
    assert 40e9 < made.weight_bytes < 50e9
    assert made.smallest_tp == 16
    assert made.fits is True
    assert plan(deepseek, device="a3", tp=8, ep=8).fits is False
