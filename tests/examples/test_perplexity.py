# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import perplexity
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "fixtures" / "source-tiny-qwen3"


def result(model: str, value: float, text: str = "same") -> perplexity.Result:
    return perplexity.Result(model, value, 4096, text, None, "platform", 1.0, 2.0)


def test_ratios_are_to_the_first_model() -> None:
    text = perplexity.table([result("a/float", 10.0), result("a/int8", 10.1)])
    assert text.splitlines()[1].split() == ["float", "-", "10.0000", "1.0000", "4096", "1.0", "2.0"]
    assert text.splitlines()[2].split()[:4] == ["int8", "-", "10.1000", "1.0100"]
    assert "cannot be compared" not in text


def test_folders_of_one_name_are_told_apart_and_other_tokens_are_noticed() -> None:
    text = perplexity.table([result("a/model", 10.0), result("b/model", 10.1, text="other")])
    assert "a/model" in text
    assert "b/model" in text
    assert "cannot be compared" in text


def test_a_ratio_above_the_limit_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scores = {"a": result("a", 10.0), "b": result("b", 10.2)}
    monkeypatch.setattr(perplexity, "score_in_subprocess", lambda model, arguments: scores[model.name])
    monkeypatch.setattr(perplexity.os, "environ", {})
    report = tmp_path / "report.json"
    assert perplexity.main(["a", "b", "--limit", "1.03", "--json", str(report)]) == 0
    assert perplexity.main(["a", "b", "--limit", "1.01"]) == 1
    assert [entry["perplexity"] for entry in json.loads(report.read_text())] == [10.0, 10.2]


def test_the_default_text_is_long_enough() -> None:
    # English takes at least one token per six characters or so.
    assert len(perplexity.default_text()) > 6 * perplexity.MIN_TOKENS


@pytest.mark.engine
def test_the_engine_gives_the_perplexity_that_transformers_gives(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    transformers = pytest.importorskip("transformers")
    text = perplexity.default_text()
    (tmp_path / "text").write_text(text)
    arguments = [str(SOURCE), "--window", "256", "--max-tokens", "4200"]
    arguments += ["--text", str(tmp_path / "text"), "--json", str(tmp_path / "report")]
    subprocess.run([sys.executable, perplexity.__file__, *arguments], check=True, timeout=600)
    (measured,) = json.loads((tmp_path / "report").read_text())

    tokenizer = transformers.AutoTokenizer.from_pretrained(SOURCE)
    model = transformers.AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:4200])
    loss, count = 0.0, 0
    with torch.no_grad():
        for window in ids.split(256):
            logits = model(window[None]).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    assert measured["tokens"] == count
    assert measured["quantization"] is None
    assert measured["perplexity"] == pytest.approx(math.exp(loss / count), rel=0.005)
