# SPDX-License-Identifier: Apache-2.0
"""The commands as a user meets them: exit codes, JSON field by field, texts, wrong use; the Python API behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vllm_npu_quant
from tests.fixtures_index import fixture
from vllm_npu_quant.cli.app import _engine_output, app
from vllm_npu_quant.errors import NpuQuantError

RUNNER = CliRunner()
W8A8 = str(fixture("msmodelslim-qwen3-w8a8-dynamic"))


def invoke(*arguments: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_inspect_json() -> None:
    code, output = invoke("inspect", W8A8, "--json", "--layers")
    data = json.loads(output)
    assert code == 0
    assert list(data) == [
        "schema", "version", "tool_version", "model", "architecture", "dtype", "format", "decided_by", "producer",
        "files", "bytes", "tensors", "ignored", "errors", "warnings", "schemes", "layers",
    ]  # fmt: skip
    assert (data["schema"], data["version"]) == ("vllm-npu-quant/inspect", 1)
    assert (data["format"], data["decided_by"]) == ("modelslim", "quant_model_description.json")
    scheme = data["schemes"][0]
    assert scheme == {
        "scheme": "W8A8_DYNAMIC",
        "kind": "linear",
        "spec": "8-bit int weight per channel, 8-bit int dynamic activation per token",
        "method": "W8A8DynamicLinear",
        "operators": ["npu_dynamic_quant", "npu_quant_matmul"],
        "served": True,
        "layers": 14,
        "bytes": 1212416,
        "parameters": 1179648,
        "reason": "",
        "remark": "",
    }
    layer = next(layer for layer in data["layers"] if layer["name"] == "model.layers.0.mlp.down_proj")
    assert (layer["outputs"], layer["inputs"], layer["method"]) == (256, 512, "W8A8DynamicLinear")
    assert next(layer for layer in data["layers"] if layer["name"] == "lm_head")["reason"].endswith("says FLOAT")


def test_inspect_text() -> None:
    code, output = invoke("inspect", W8A8, "--layers")
    assert code == 0
    assert "W8A8DynamicLinear: npu_dynamic_quant, npu_quant_matmul" in output
    assert "model.layers.1.mlp.down_proj" in output


def test_check() -> None:
    assert invoke("check", W8A8)[0] == 0
    assert invoke("check", W8A8, "--strict", "--values", "--tp", "2", "--device", "a2")[0] == 0
    code, output = invoke("check", W8A8, "--tp", "3")
    assert code == 1
    assert "use a tensor-parallel size that works: 1, 2, 4" in output
    code, output = invoke("check", str(fixture("ct-qwen3-w8a8-dynamic")), "--ep", "2")
    assert code == 0
    assert invoke("check", str(fixture("ct-qwen3-w8a8-dynamic")), "--ep", "2", "--strict")[0] == 1
    data = json.loads(invoke("check", W8A8, "--tp", "3", "--json")[1])
    assert set(data["findings"][0]) == {
        "code", "message", "layer", "file", "expected", "found", "nearest", "fix", "severity",
    }  # fmt: skip
    assert data["passed"] is False


def test_plan() -> None:
    code, output = invoke("plan", W8A8, "--device", "a2", "--tp", "2")
    assert code == 0
    assert "upper bounds from published peaks" in output
    assert "github.com/Ascend/msmodeling" in output
    data = json.loads(invoke("plan", W8A8, "--device", "a2", "--tp", "2", "--json")[1])
    assert (data["schema"], data["fits"], data["smallest_tp"]) == ("vllm-npu-quant/plan", True, 1)
    assert data["kv_bytes_per_token"] == 2 * 2 * 1 * 64 * 2
    decode = next(line for line in data["roofline"] if line["phase"] == "decode" and line["scheme"] == "W8A8_DYNAMIC")
    assert decode["bound"] == "memory"
    assert 1.5 < decode["gain"] < 2
    # 310P's float16 peak is not published in a document that was found: memory alone counts, and it says so.
    data = json.loads(invoke("plan", W8A8, "--device", "310p", "--json", "--layers")[1])
    assert {line["bound"] for line in data["roofline"] if line["scheme"] == "FLOAT"} == {"memory only"}
    assert any("without a float16 peak" in remark for remark in data["remarks"])
    layer = next(line for line in data["layers"] if line["name"] == "model.layers.*.mlp.down_proj")
    assert (layer["layers"], layer["phase"], layer["bound"]) == (2, "decode", "memory")
    code, _ = invoke("plan", W8A8, "--device", "a2", "--max-model-len", str(1 << 30))
    assert code == 1


def test_bounds_by_hand() -> None:
    """One layer's bound, from the chip's numbers: 16 rows of a 256 x 512 int8 weight, twice."""
    data = json.loads(invoke("plan", W8A8, "--device", "a2", "--json", "--layers")[1])
    layer = next(
        line for line in data["layers"] if (line["name"], line["phase"]) == ("model.layers.*.mlp.down_proj", "decode")
    )
    weights, rows = 256 * 512, 16
    bandwidth = 1.6 * 2**40
    assert layer["bytes"] == 2 * (weights + 4 * 256 + rows * (512 + 2 * 256))
    assert layer["operations"] == 2 * 2 * rows * weights
    assert layer["seconds"] == pytest.approx(layer["bytes"] / bandwidth)
    assert layer["others"]["float"] == pytest.approx(2 * (2 * weights + rows * 2 * (512 + 256)) / bandwidth)
    assert layer["others"]["W4A16"] == pytest.approx(
        2 * (weights * (0.5 + 2 / 128) + rows * 2 * (512 + 256)) / bandwidth
    )
    assert layer["gain"] == pytest.approx(layer["others"]["float"] / layer["seconds"])
    # In a prefill of many tokens weights do not count, and four bits gain nothing.
    data = json.loads(invoke("plan", W8A8, "--device", "a2", "--json", "--layers", "--prompt", "16777216")[1])
    layer = next(line for line in data["layers"] if line["phase"] == "prefill")
    assert layer["others"]["W4A16"] == pytest.approx(layer["others"]["float"], rel=1e-3)


def test_numbers_have_sources() -> None:
    from vllm_npu_quant.inspection.chips import CHIPS

    for chip in CHIPS.values():
        for number in (chip.memory, chip.bandwidth, chip.fp16, chip.int8):
            assert number is None or (number.value > 0 and len(number.source) > 20)


def test_matrix() -> None:
    code, output = invoke("matrix")
    assert code == 0
    assert output == (Path(__file__).resolve().parents[2] / "docs" / "support_matrix.md").read_text()
    rows = json.loads(invoke("matrix", "--json")[1])["rows"]
    published = {"modelslim", "compressed-tensors", "fp8", "modelopt", "awq", "gptq", "auto-round"}
    assert {row["format"] for row in rows} == published | {"npu-w8a8", "npu-w8a16", "npu-w4a16"}
    assert all(row["methods"] or row["remark"] for row in rows)
    dynamic = next(row for row in rows if (row["format"], row["scheme"]) == ("modelslim", "W8A8_DYNAMIC"))
    assert dynamic["chips"]["a2"] == "yes"
    assert dynamic["chips"]["310p"] == "no"


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "/nowhere/at/all"],
        ["inspect", ""],
        ["inspect", "\0"],
        ["inspect", "../" * 40],
        ["inspect", __file__],
        ["check", W8A8, "--tp", "0"],
        ["check", W8A8, "--tp", "two"],
        ["check", W8A8, "--device", "b200"],
        ["plan", W8A8],
        ["plan", W8A8, "--device", "a9"],
        ["plan", W8A8, "--device", "a2", "--gpu-memory-utilization", "2"],
        ["compare", W8A8],
        ["compare", W8A8, "--reference", W8A8, "--plot", "x.gif"],
        ["compare", W8A8, "--reference", W8A8, "--text", "/nowhere.txt"],
        ["run", W8A8, "--dtype", "int3"],
        ["unknown"],
        ["check", W8A8, "--unknown"],
    ],
)
def test_wrong_use(arguments: list[str]) -> None:
    code, output = invoke(*arguments)
    assert code == 2
    assert output.strip()
    assert "Traceback" not in output


def test_names_are_not_markup(tmp_path: Path) -> None:
    """Texts of strangers in a terminal: no colours, no control characters."""
    config = {"architectures": ["[red]\x1b[31mEvil"], "quantization_config": {"quant_method": "[bold]\x1b]0;title\x07"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in (["inspect"], ["check"]):
        _, output = invoke(*command, str(tmp_path))
        assert "\x1b]" not in output
        assert "\x07" not in output


def test_version_and_help() -> None:
    assert invoke("--version") == (0, vllm_npu_quant.__version__ + "\n")
    code, output = invoke("--help")
    assert code == 0
    assert all(command in output for command in ("inspect", "check", "plan", "compare", "run", "matrix"))


def test_api() -> None:
    overview = vllm_npu_quant.inspect(W8A8)
    assert isinstance(overview, vllm_npu_quant.Overview)
    assert overview.schemes[0].layers == 14
    assert vllm_npu_quant.check(W8A8).passed()
    assert vllm_npu_quant.plan(W8A8, device="a3").fits
    assert vllm_npu_quant.matrix()
    with pytest.raises(vllm_npu_quant.NpuQuantError):
        vllm_npu_quant.inspect("/nowhere")
    with pytest.raises(ValueError, match="a2, a3, a5, 310p"):
        vllm_npu_quant.plan(W8A8, device="b200")
    with pytest.raises(AttributeError):
        _ = vllm_npu_quant.nothing  # type: ignore[attr-defined]
    assert set(vllm_npu_quant.__all__) <= set(dir(vllm_npu_quant))


def test_package_is_lazy() -> None:
    code = "import sys, vllm_npu_quant; assert not {'pydantic', 'torch', 'vllm', 'rich', 'typer', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_closed_pipe() -> None:
    command = f"{sys.executable} -m vllm_npu_quant matrix | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("# What is served where")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("level", "shown"), [("INFO", True), ("ERROR", False)])
def test_traceback_of_an_engine_failure(level: str, shown: bool, monkeypatch, capsys) -> None:
    """Any exception of an engine is one finding; its traceback is printed at the log level that the fix recommends."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    with pytest.raises(NpuQuantError, match="KeyError: 'missing'"), _engine_output():
        raise KeyError("missing")
    assert ("Traceback (most recent call last)" in capsys.readouterr().err) is shown
