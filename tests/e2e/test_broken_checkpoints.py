# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: every damage is named before a weight is read, and the engine's own verification is the backstop."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from tests.e2e.damage import DESCRIPTION, WEIGHTS, Copy, Damage
from tests.e2e.yardstick import run
from tests.engine.world import load_model
from tests.test_imports import deepseek_r1_description
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity

STATIC, DYNAMIC = "msmodelslim-qwen3-w8a8", "msmodelslim-qwen3-w8a8-dynamic"
NORM_BIAS = "msmodelslim-qwen3fp32-w8a8-normbias"
UP = "model.layers.0.mlp.up_proj"
KEY = "model.layers.1.self_attn.k_proj"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(autouse=True, scope="module")
def _plugins() -> None:
    load_general_plugins()


def in_shards(*, index: bool) -> Damage:
    def damage(copy: Copy) -> None:
        copy.parts, copy.index = SHARDS, index

    return damage


def written(change: Callable[[Path], object]) -> Damage:
    """A damage to the written folder."""
    return lambda copy: copy.after.append(change)


def errors_of(folder: Path) -> list[Finding]:
    """The errors of a folder, as the engine config raises them."""
    args = EngineArgs(str(folder))
    with pytest.raises(NpuQuantError) as caught:
        args.create_engine_config()
    return [finding for finding in caught.value.findings if finding.severity is Severity.ERROR]


def broken(tmp_path: Path, name: str, *damages: Damage) -> list[Finding]:
    copy = Copy(name)
    for damage in damages:
        damage(copy)
    return errors_of(copy.write(tmp_path / "m"))


def test_copies_are_whole(tmp_path: Path) -> None:
    """What is wrong below is the damage, not the copy."""
    for number, name in enumerate((STATIC, DYNAMIC)):
        EngineArgs(str(Copy(name).write(tmp_path / str(number)))).create_engine_config()
    for number, index in enumerate((True, False)):
        copy = Copy(STATIC)
        in_shards(index=index)(copy)
        EngineArgs(str(copy.write(tmp_path / f"parts{number}"))).create_engine_config()


#: Damage -> (checkpoint, damage, and of each error in order: code, layer, file, parts of expected, found and nearest).
Expected = tuple[str, str, str, str, str, str]
CASES: dict[str, tuple[str, Damage, list[Expected]]] = {
    "weight deleted": (
        STATIC,
        lambda c: c.delete(UP + ".weight"),
        [("missing-tensor", UP, DESCRIPTION, f"{UP}.weight I8 [N, K]", "no such tensor", "model.layers.1.mlp.up_proj")],
    ),
    "scale deleted": (
        STATIC,
        lambda c: c.delete(KEY + ".deq_scale"),
        [("missing-tensor", KEY, DESCRIPTION, f"{KEY}.deq_scale F32 or I64 [N]", "no such tensor", "_proj.deq_scale")],
    ),
    "offset deleted": (
        DYNAMIC,
        lambda c: c.delete(UP + ".weight_offset"),
        [("missing-tensor", UP, DESCRIPTION, f"{UP}.weight_offset", "no such tensor", "weight_offset")],
    ),
    "quant_bias too short": (
        STATIC,
        lambda c: c.change(UP + ".quant_bias", lambda x: x[:100]),
        [("wrong-shape", UP, WEIGHTS, "[N] = [512]", "[100]", "")],
    ),
    "weight with too few rows": (
        STATIC,
        lambda c: c.change(UP + ".weight", lambda x: x[:200]),
        [
            ("wrong-shape", UP, WEIGHTS, "[N] = [200]", "[512]", ""),
            ("wrong-shape", UP, WEIGHTS, "= [200]", "[512]", ""),
        ],
    ),
    "weight without a dimension": (
        STATIC,
        lambda c: c.change(UP + ".weight", lambda x: x.flatten()),
        [("wrong-shape", UP, WEIGHTS, "[N, K] with 2 dimensions", "[131072]", "")],
    ),
    "scale without its column": (
        DYNAMIC,
        lambda c: c.change(UP + ".weight_scale", lambda x: x[:, 0]),
        [("wrong-shape", UP, WEIGHTS, "[N, G] = [512, 1]", "[512]", "")],
    ),
    "one scale for all rows": (
        DYNAMIC,
        lambda c: c.change(UP + ".weight_scale", lambda x: x[:1]),
        [("wrong-shape", UP, WEIGHTS, "[N, G] = [512, 1]", "[1, 1]", "")],
    ),
    "groups in one of two scales": (
        DYNAMIC,
        lambda c: c.change(UP + ".weight_scale", lambda x: x.expand(-1, 4)),
        [("wrong-shape", UP, WEIGHTS, "[N, G] = [512, 4]", "[512, 1]", "")],
    ),
    "two input scales": (
        STATIC,
        lambda c: c.change(UP + ".input_scale", lambda x: x.expand(2)),
        [("wrong-shape", UP, WEIGHTS, "[S] = [1]", "[2]", "")],
    ),
    "tensor renamed": (
        STATIC,
        lambda c: c.rename(UP + ".deq_scale", UP + ".deq_scales"),
        [
            ("missing-tensor", UP, DESCRIPTION, f"{UP}.deq_scale ", "no such tensor", f"{UP}.deq_scales"),
            ("unexpected-tensor", UP, WEIGHTS, f"an entry for {UP}.deq_scales", "", f"{UP}.deq_scale"),
        ],
    ),
    "weight in bfloat16": (
        STATIC,
        lambda c: c.change(UP + ".weight", lambda x: x.bfloat16()),
        [("wrong-dtype", UP, WEIGHTS, "I8", "BF16", "")],
    ),
    "weight unsigned": (
        DYNAMIC,
        lambda c: c.change(UP + ".weight", lambda x: x.to(torch.uint8)),
        [("wrong-dtype", UP, WEIGHTS, "I8", "U8", "")],
    ),
    "quant_bias in float32": (
        STATIC,
        lambda c: c.change(UP + ".quant_bias", lambda x: x.float()),
        [("wrong-dtype", UP, WEIGHTS, "I32", "F32", "")],
    ),
    "norm in int8": (
        STATIC,
        lambda c: c.change("model.norm.weight", lambda x: x.to(torch.int8)),
        [("wrong-dtype", "model.norm", WEIGHTS, "BF16", "I8", "")],
    ),
    "norm deleted": (
        STATIC,
        lambda c: c.delete("model.norm.weight"),
        [("missing-tensor", "model.norm", DESCRIPTION, "model.norm.weight (FLOAT)", "no such tensor", "")],
    ),
    "embedding deleted": (
        STATIC,
        lambda c: c.delete("model.embed_tokens.weight"),
        [("missing-tensor", "model.embed_tokens", DESCRIPTION, "model.embed_tokens.weight", "no such tensor", "")],
    ),
    "head deleted": (
        DYNAMIC,
        lambda c: c.delete("lm_head.weight"),
        [("missing-tensor", "lm_head", DESCRIPTION, "lm_head.weight (FLOAT)", "no such tensor", "")],
    ),
    "description forgets a scale": (
        STATIC,
        lambda c: c.forget(UP + ".deq_scale"),
        [
            ("missing-tensor", UP, DESCRIPTION, f"{UP}.deq_scale: W8A8", "weight, quant_bias", ""),
            ("unexpected-tensor", UP, WEIGHTS, f"an entry for {UP}.deq_scale", "", "deq_scale"),
        ],
    ),
    "unknown type": (
        STATIC,
        lambda c: c.describe(UP, "W8A88"),
        [("unknown-scheme", UP, DESCRIPTION, "W8A8_DYNAMIC", "W8A88", "W8A8")],
    ),
    "quantized layer called FLOAT": (
        STATIC,
        lambda c: c.describe(KEY, "FLOAT"),
        [
            ("wrong-dtype", KEY, WEIGHTS, "BF16", "I8", ""),
            ("wrong-dtype", KEY, WEIGHTS, "BF16", "I32", ""),
        ],
    ),
    "group size below zero": (
        STATIC,
        lambda c: c.description.update(group_size=-2),  # -1 is MindIE's word for no groups
        [("bad-config", "group_size", DESCRIPTION, "", "-2", "")],
    ),
    "description nested deeply": (
        STATIC,
        written(lambda f: (f / DESCRIPTION).write_text('{"a":' * 100_000)),
        [("unreadable-file", "", DESCRIPTION, "100 levels", "", "")],
    ),
    "file cut off": (
        STATIC,
        written(lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 10)),
        [("bad-header", "", WEIGHTS, "bytes", "cuts off 1 of 81 tensors", "")],
    ),
    "the same tensors in two files": (
        STATIC,
        written(lambda f: shutil.copyfile(f / WEIGHTS, f / "model2.safetensors")),
        [("duplicate-tensor", "", "model2.safetensors", "every tensor in one file", "", "")],
    ),
}


def matches(finding: Finding, expected: Expected) -> bool:
    code, layer, file, wanted, found, nearest = expected
    return (
        finding.code == code
        and (not layer or finding.layer == layer)
        and file in finding.file
        and wanted in finding.expected
        and found in finding.found
        and (not nearest or any(nearest in name for name in finding.nearest))
        and bool(finding.fix)
    )


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_before_loading(case: str, tmp_path: Path) -> None:
    name, damage, expected = CASES[case]
    findings = broken(tmp_path, name, damage)
    assert len(findings) == len(expected), [finding.render() for finding in findings]
    for wanted in expected:
        assert sum(matches(finding, wanted) for finding in findings) >= 1, (wanted, findings)


def test_integers_that_no_description_lists(tmp_path: Path) -> None:
    """Loaded as they are, they would become the floats of a layer."""
    findings = broken(tmp_path, STATIC, lambda c: c.forget(UP))
    assert {(finding.code, finding.layer) for finding in findings} == {("unexpected-tensor", UP)}
    assert {finding.expected for finding in findings} >= {f"an entry for {UP}.weight", f"an entry for {UP}.quant_bias"}


def test_an_empty_description(tmp_path: Path) -> None:
    findings = broken(tmp_path, DYNAMIC, lambda c: c.description.clear())
    assert {finding.code for finding in findings} == {"unexpected-tensor"}


def test_a_type_that_is_no_string(tmp_path: Path) -> None:
    findings = broken(tmp_path, STATIC, lambda c: c.describe(UP + ".weight", 8))
    assert ("bad-config", f"{UP}.weight", "8") in {(f.code, f.layer, f.found) for f in findings}


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard(index: bool, tmp_path: Path) -> None:
    findings = broken(tmp_path, STATIC, in_shards(index=index), written(lambda f: (f / SHARDS[1]).unlink()))
    codes = {finding.code for finding in findings}
    # The cause before what follows from it. Without an index, the files' names say how many there are.
    assert codes == {"index-mismatch", "missing-tensor"}
    assert findings[0].code == "index-mismatch"
    assert not index or SHARDS[1] in findings[0].message


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>" * 20])
def test_a_file_that_is_something_else(content: bytes, tmp_path: Path) -> None:
    findings = broken(tmp_path, STATIC, written(lambda f: (f / WEIGHTS).write_bytes(content)))
    assert findings[0].file == WEIGHTS
    assert findings[0].code in ("bad-header", "unreadable-file")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    findings = broken(
        tmp_path,
        STATIC,
        lambda c: c.delete("lm_head.weight", KEY + ".deq_scale"),
        lambda c: c.change(UP + ".quant_bias", lambda x: x.float()),
        lambda c: c.describe("model.layers.1.mlp.down_proj", "W9"),
    )
    assert sorted((finding.code, finding.layer) for finding in findings) == [
        ("missing-tensor", "lm_head"),
        ("missing-tensor", KEY),
        ("unknown-scheme", "model.layers.1.mlp.down_proj"),
        ("wrong-dtype", UP),
    ]


def test_hundreds_of_problems_are_counted(tmp_path: Path) -> None:
    findings = broken(
        tmp_path, STATIC, lambda c: c.delete(*[n for n in c.tensors if n.endswith(("deq_scale", "quant_bias"))])
    )
    assert len(findings) == 21
    assert findings[-1].message == "8 more findings of this kind were left out"


def test_the_check_stays_linear_where_half_of_a_large_checkpoint_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest names cost a look at every name: only for findings that are shown."""
    from vllm_npu_quant import errors
    from vllm_npu_quant.formats import check, modelslim

    calls = []

    def counted(name: str, names: object, **options: int) -> tuple[str, ...]:
        calls.append(name)
        return errors.nearest_names(name, [], **options)

    monkeypatch.setattr(check, "nearest_names", counted)
    monkeypatch.setattr(modelslim, "nearest_names", counted)
    described = deepseek_r1_description()
    names = list(described)
    stored = {name: SimpleNamespace(dtype="BF16", shape=(1, 1), file="a") for name in names[: len(names) // 2]}
    found = modelslim.read(described, stored)
    check.check_checkpoint(found, SimpleNamespace(tensors=stored, findings=()))
    assert 0 < len(calls) < 100


# The backstop: the same damages where nobody has looked at the headers, as for a hub model that is not downloaded yet.


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No header is compared with anything."""
    from vllm_npu_quant.engine import config
    from vllm_npu_quant.formats import modelslim

    monkeypatch.setattr(config, "check_checkpoint", lambda *_: [])
    for name in ("_report_missing", "_report_unlisted", "_report_float_dtypes"):
        monkeypatch.setattr(modelslim, name, lambda *_: None)


def errors_while_loading(tmp_path: Path, name: str, *damages: Damage, **options: object) -> list[Finding]:
    copy = Copy(name)
    for damage in damages:
        damage(copy)
    folder = copy.write(tmp_path / "m")
    with pytest.raises(NpuQuantError) as caught:
        load_model(folder, **options)
    return list(caught.value.findings)


#: Damage -> (checkpoint, damage, the one error: code, layer, parts of expected and found).
LOADING: dict[str, tuple[str, Damage, tuple[str, str, str, str]]] = {
    "one shard of a fused weight": (
        STATIC,
        lambda c: c.delete(UP + ".weight"),
        ("not-filled", "model.layers.0.mlp.gate_up_proj", f"{UP}.weight", "nothing for weight[512:1024, 0:256]"),
    ),
    "the middle shard of a fused scale": (
        STATIC,
        lambda c: c.delete(KEY + ".deq_scale"),
        ("not-filled", "model.layers.1.self_attn.qkv_proj", f"{KEY}.deq_scale", "nothing for deq_scale[256:384]"),
    ),
    "the input scale of one shard": (
        STATIC,
        lambda c: c.delete(KEY + ".input_scale"),
        ("not-filled", "model.layers.1.self_attn.qkv_proj", f"{KEY}.input_scale", "nothing for input_scale[1:2]"),
    ),
    "a weight that is not fused": (
        DYNAMIC,
        lambda c: c.delete("model.layers.1.mlp.down_proj.weight"),
        ("not-filled", "model.layers.1.mlp.down_proj", "down_proj.weight", "nothing for weight[0:256, 0:512]"),
    ),
    "an offset": (
        DYNAMIC,
        lambda c: c.delete(UP + ".weight_offset"),
        ("not-filled", "model.layers.0.mlp.gate_up_proj", f"{UP}.weight_offset", "weight_offset[512:1024, 0:1]"),
    ),
    "too few rows": (
        STATIC,
        lambda c: c.change(UP + ".weight", lambda x: x[:100]),
        (
            "wrong-shape",
            "model.layers.0.mlp.gate_up_proj",
            f"{UP}.weight [N, K] = [512, 256]",
            "[100, 256] for shard 1",
        ),
    ),
    "too many rows": (
        DYNAMIC,
        lambda c: c.change(UP + ".weight_scale", lambda x: torch.cat([x, x])),
        ("wrong-shape", "model.layers.0.mlp.gate_up_proj", "[N, G] = [512, 1]", "[1024, 1] for shard 1"),
    ),
    "too few inputs": (
        STATIC,
        lambda c: c.change("model.layers.1.self_attn.o_proj.weight", lambda x: x[:, :100]),
        ("wrong-shape", "model.layers.1.self_attn.o_proj", "[N, K] = [256, 256]", "[256, 100]"),
    ),
    "too many inputs": (
        DYNAMIC,
        lambda c: c.change("model.layers.1.self_attn.o_proj.weight", lambda x: torch.cat([x, x], dim=1)),
        ("wrong-shape", "model.layers.1.self_attn.o_proj", "[N, K] = [256, 256]", "[256, 512]"),
    ),
    "another dtype": (
        STATIC,
        lambda c: c.change(UP + ".weight", lambda x: x.bfloat16()),
        ("wrong-dtype", "model.layers.0.mlp.gate_up_proj", "I8", "BF16"),
    ),
    "shards with different input scales": (
        STATIC,
        lambda c: c.change(KEY + ".input_scale", lambda x: x * 2),
        ("fused-shards-disagree", "model.layers.1.self_attn.qkv_proj", "one value", "0.0"),
    ),
    "an input scale that is no number": (
        STATIC,
        lambda c: c.change("model.layers.0.self_attn.o_proj.input_scale", lambda x: x * float("nan")),
        ("bad-value", "model.layers.0.self_attn.o_proj", "> 0", "nan"),
    ),
    "an input scale of 0": (
        STATIC,
        lambda c: c.change("model.layers.0.self_attn.o_proj.input_scale", lambda x: x * 0),
        ("bad-value", "model.layers.0.self_attn.o_proj", "> 0", "0"),
    ),
    "a norm": (
        STATIC,
        lambda c: c.delete("model.layers.0.input_layernorm.weight"),
        ("not-filled", "model.layers.0.input_layernorm", "model.layers.0.input_layernorm.weight", "no tensor"),
    ),
    "the embedding": (
        STATIC,
        lambda c: c.delete("model.embed_tokens.weight"),
        ("not-filled", "model.embed_tokens", "model.embed_tokens.weight", "no tensor"),
    ),
    "a norm's bias": (
        NORM_BIAS,
        lambda c: c.delete("model.layers.0.input_layernorm.bias"),
        ("not-filled", "model.layers.0.input_layernorm", "model.layers.0.input_layernorm.bias", "no such tensor"),
    ),
    "a layer's bias from smoothing": (
        NORM_BIAS,
        lambda c: c.delete(KEY + ".bias"),
        ("not-filled", "model.layers.1.self_attn.qkv_proj", f"{KEY}.bias", "nothing for checkpoint_bias[256:384]"),
    ),
}


@pytest.mark.parametrize("case", LOADING)
@pytest.mark.usefixtures("unchecked")
def test_damage_is_named_while_loading(case: str, tmp_path: Path) -> None:
    name, damage, (code, layer, expected, found) = LOADING[case]
    (finding,) = errors_while_loading(tmp_path, name, damage)
    assert (finding.code, finding.layer) == (code, layer), finding.render()
    assert expected in finding.expected
    assert found in finding.found
    assert finding.fix


def test_a_width_that_only_the_model_knows(tmp_path: Path) -> None:
    """All tensors of the layer agree with each other, so that the headers are right."""
    (finding,) = errors_while_loading(tmp_path, STATIC, lambda c: c.change(UP + ".weight", lambda x: x[:, :200]))
    assert (finding.code, finding.found) == ("wrong-shape", "[512, 200] for shard 1")


def test_a_model_that_is_narrower_than_the_checkpoint(tmp_path: Path) -> None:
    """vLLM would take the first rows of every layer, without a word."""
    findings = errors_while_loading(tmp_path, STATIC, lambda c: c.config.update(intermediate_size=256))
    assert {finding.code for finding in findings} == {"wrong-shape"}


def test_fused_layers_of_different_types(tmp_path: Path) -> None:
    """Whether two layers are fused is known when the model is built, before a weight is read."""
    (finding,) = errors_while_loading(tmp_path, DYNAMIC, lambda c: c.describe(KEY, "W8A16"))
    assert (finding.code, finding.layer) == ("fused-shards-disagree", "model.layers.1.self_attn.qkv_proj")
    assert all(f"{part}_proj: W8A8_DYNAMIC" in finding.found for part in "qv")
    assert "k_proj: W8A16" in finding.found


@pytest.mark.parametrize("layer", ["model.norm", "model.embed_tokens"])
def test_a_float_layer_that_neither_description_nor_files_have(layer: str, tmp_path: Path) -> None:
    """vLLM looks for parameters without data in float models only."""
    damages = (lambda c: c.forget(layer), lambda c: c.delete(layer + ".weight"))
    (finding,) = errors_while_loading(tmp_path, STATIC, *damages)
    assert (finding.code, finding.layer) == ("not-filled", layer)


def test_a_head_that_neither_description_nor_files_have(tmp_path: Path) -> None:
    damages = (lambda c: c.forget("lm_head"), lambda c: c.delete("lm_head.weight"))
    (finding,) = errors_while_loading(tmp_path, STATIC, *damages)
    assert (finding.code, finding.layer) == ("undescribed-layer", "lm_head")


def test_a_float_layer_with_a_bias_that_the_model_class_has_not(tmp_path: Path) -> None:
    """Asymmetric smoothing gives it to layers that are rolled back to float, too, and vLLM drops it without a word."""

    def roll_back(copy: Copy) -> None:
        for part in ("gate_proj", "up_proj"):
            layer = f"model.layers.0.mlp.{part}"
            rows, columns = copy.tensors[layer + ".weight"].shape
            copy.delete(*[name for name in copy.tensors if name.startswith(layer)])
            copy.forget(layer)
            copy.tensors |= {layer + ".weight": torch.zeros(rows, columns), layer + ".bias": torch.ones(rows)}
            copy.description |= {layer + ".weight": "FLOAT", layer + ".bias": "FLOAT"}

    (finding,) = errors_while_loading(tmp_path, NORM_BIAS, roll_back)
    assert (finding.code, finding.layer) == ("unsupported-scheme", "model.layers.0.mlp.gate_up_proj")
    assert finding.found == "model.layers.0.mlp.gate_proj.bias, model.layers.0.mlp.up_proj.bias"


def test_norms_that_take_no_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with GemmaRMSNorm: vLLM drops the bias without a word."""
    from vllm.model_executor.models import qwen3

    class GemmaLikeNorm(torch.nn.Module):
        def __init__(self, size: int, eps: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(size))

    monkeypatch.setattr(qwen3, "RMSNorm", GemmaLikeNorm)
    findings = errors_while_loading(tmp_path, NORM_BIAS)
    assert {(finding.code, finding.layer) for finding in findings} == {
        ("unexpected-tensor", f"model.layers.{layer}.{norm}")
        for layer in (0, 1)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert {finding.found for finding in findings} == {"a GemmaLikeNorm"}


@pytest.mark.engine
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", ["the middle shard of a fused scale", "a norm's bias"])
def test_the_engine_does_not_start(case: str, tmp_path: Path) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    name, damage, (code, layer, *_) = LOADING[case]
    copy = Copy(name)
    damage(copy)
    folder = copy.write(tmp_path / "m")
    try:
        with pytest.raises(NpuQuantError) as caught:
            run(folder)
    finally:
        cleanup_dist_env_and_memory()
    assert [(finding.code, finding.layer) for finding in caught.value.findings] == [(code, layer)]


@pytest.mark.engine
@pytest.mark.tp2
@pytest.mark.usefixtures("unchecked")
def test_two_ranks_do_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each rank names the rows that it lacks: the two ranks hold half of q, k and v each."""
    copy = Copy(STATIC)
    copy.delete(KEY + ".deq_scale")
    folder = copy.write(tmp_path / "m")
    with pytest.raises(Exception, match=r"(?i)initialization failed"):
        run(folder, tensor_parallel_size=2)
    said = "".join(capfd.readouterr())
    assert "error[not-filled]: model.layers.1.self_attn.qkv_proj" in said
    assert "nothing for deq_scale[128:192]" in said
