# SPDX-License-Identifier: Apache-2.0
"""GPTQ's config: spellings, dynamic rules, activation order, and what is stored."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures_index import fixture
from tests.formats.packed_layers import check, errors, float_layer, frames, gptq_layer, headers
from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import NpuQuantError, Severity
from vllm_npu_quant.formats import patterns
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.gptq import GptqConfig, compare_files, flat_names, read
from vllm_npu_quant.spec import Granularity, Layout

PLAIN: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def config(**changes: Any) -> dict[str, Any]:
    merged = {**PLAIN, **changes}
    return {key: value for key, value in merged.items() if value != "drop"}


def of(tensors: Any, checkpoint: Any = None, **changes: Any) -> Described:
    return read(config(**changes), tensors, "config.json", checkpoint)


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({}, Layout.GPTQ),
        ({"checkpoint_format": "gptq"}, Layout.GPTQ),
        ({"checkpoint_format": "gptq_v2"}, Layout.GPTQ_V2),
        ({"format": "gptq_v2", "checkpoint_format": "GPTQ_V2", "method": "gptq"}, Layout.GPTQ_V2),
        ({"desc_act": True}, Layout.GPTQ_ACT_ORDER),
        ({"desc_act": True, "checkpoint_format": "gptq_v2"}, Layout.GPTQ_V2_ACT_ORDER),
        ({"desc_act": True, "static_groups": True}, Layout.GPTQ),
        ({"desc_act": True, "group_size": -1}, Layout.GPTQ),
    ],
)
def test_layouts(changes, layout):
    group = changes.get("group_size", 128)
    tensors = headers(gptq_layer(UP, group=group))
    found = of(tensors, **changes)
    assert check(found, tensors) == []
    entry = found.find(UP)
    assert entry.spec.layout is layout
    optional = "ACT_ORDER" not in layout.name
    assert entry.tensors == (frozenset({"g_idx"}) if optional else frozenset())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 32, 128])
@pytest.mark.parametrize("sym", [True, False, "drop"])
def test_schemes(bits, group, sym):
    tensors = headers(gptq_layer(UP, bits=bits, group=group))
    found = of(tensors, bits=bits, group_size=group, sym=sym)
    assert check(found, tensors) == []
    weight = found.find(UP).spec.weight
    assert (weight.bits, weight.group_size) == (bits, max(group, 0))
    assert weight.granularity is (Granularity.GROUP if group > 0 else Granularity.CHANNEL)
    assert weight.symmetric is (sym is True)


def test_records_of_all_producers_are_passed_over():
    tensors = headers(gptq_layer(UP))
    found = of(
        tensors,
        lm_head=False,
        pack_dtype="int32",
        meta={"quantizer": ["gptqmodel:7.7.0"]},
        damp_percent=0.01,
        true_sequential=False,
        model_name_or_path=None,
        model_file_base_name="model",
        is_marlin_format=False,
        autoround_version="0.16.1",
        provider="auto-round",
        iters=2,
        data_type="int",
        tokenizer=None,
        dataset="c4",
        use_exllama=True,
        exllama_config={"version": 1},
        max_input_length=None,
        dynamic=None,
        adapter=None,
        rotation=None,
    )
    assert found.findings == ()


def test_old_spellings():
    assert GptqConfig.model_validate({"w_bit": 4, "q_group_size": 64}).spec().weight.group_size == 64


DYNAMIC = {
    r"-:.*layers\.1\.self_attn\.o_proj.*": {},
    r"+:.*\.down_proj.*": {"bits": 8, "group_size": 64},
    r".*layers\.2\..*": {"sym": False, "desc_act": True, "mse": 2.4},
    "lm_head": {"bits": 8, "group_size": 32, "sym": True},
    "+:.*gate_proj": {"bits": 16},
}


def test_dynamic():
    tensors = headers(
        gptq_layer(UP),
        gptq_layer(DOWN, bits=8, group=64),
        float_layer("model.layers.1.self_attn.o_proj"),
        gptq_layer("model.layers.2.mlp.up_proj"),
        gptq_layer("model.layers.2.mlp.down_proj", bits=8, group=64),
        float_layer("model.layers.0.mlp.gate_proj"),
        gptq_layer("lm_head", bits=8, group=32),
    )
    found = of(tensors, dynamic=DYNAMIC, lm_head=True)
    assert check(found, tensors) == []
    assert found.findings == ()

    def bits_and_group(layer: str) -> tuple[int, int]:
        weight = found.find(layer).spec.weight
        return weight.bits, weight.group_size

    assert bits_and_group(UP) == (4, 128)
    assert bits_and_group(DOWN) == (8, 64)
    assert bits_and_group("lm_head") == (8, 32)
    # The first rule that matches counts, alone.
    assert bits_and_group("model.layers.2.mlp.down_proj") == (8, 64)
    assert found.find("model.layers.2.mlp.down_proj").spec.layout is Layout.GPTQ
    second = found.find("model.layers.2.mlp.up_proj").spec
    assert (second.weight.bits, second.weight.symmetric, second.layout) == (4, False, Layout.GPTQ_ACT_ORDER)
    assert found.find("model.layers.1.self_attn.o_proj").spec.is_float
    assert found.find("model.layers.0.mlp.gate_proj").spec.is_float


def test_rules_match_at_the_start_of_a_name():
    """As re.match: "lm_head" is no rule for "model.lm_head", and "mlp" none for "model.layers.0.mlp"."""
    tensors = headers(gptq_layer(UP))
    assert of(tensors, dynamic={"-:mlp": {}}).find(UP).spec.weight.bits == 4
    assert errors(list(of(tensors, dynamic={"-:model": {}}).findings))[0].layer == UP


@pytest.mark.parametrize("rule", [{"-:.*up_proj": {}}, {"+:.*up_proj": {"bits": 16}}])
def test_a_rule_that_skips_contradicts_quantized_tensors(rule):
    (finding,) = of(headers(gptq_layer(UP)), dynamic=rule).findings
    assert (finding.code, finding.layer) == ("bad-config", UP)
    assert "calls the layer float" in finding.message


def test_a_float_layer_that_rules_quantize_is_told_and_runs_as_float():
    tensors = headers(gptq_layer(UP), float_layer("model.layers.0.mlp.gate", 8, 256), float_layer("lm_head"))
    found = of(tensors)
    assert found.findings == ()
    found = of(tensors, dynamic={"+:.*mlp.*": {"bits": 4}}, lm_head=True)
    (finding,) = found.findings
    assert finding.severity is Severity.INFO
    assert "model.layers.0.mlp.gate" in finding.found
    assert "lm_head" in finding.found
    assert found.find("lm_head").spec.is_float


def test_a_head_that_is_stored_quantized_is_quantized():
    tensors = headers(gptq_layer("lm_head"))
    assert of(tensors).find("lm_head").spec.weight.bits == 4


def test_modules_in_block_to_quantize():
    modules = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"], "mlp.gate_proj", [7, None]]
    assert list(flat_names(modules)) == ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj"]
    tensors = headers(gptq_layer(UP), float_layer(DOWN))
    found = of(tensors, modules_in_block_to_quantize=modules)
    assert found.findings == ()
    assert found.find(DOWN).spec.is_float
    assert not found.find(UP).spec.is_float


def test_a_long_list_of_modules():
    """Full names far behind in a list are found, and a listed layer that is stored as float is reported."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(150_000)]
    tensors = headers(float_layer(names[-1]), float_layer("model.layers.150000.mlp.up_proj"))
    found = of(tensors, modules_in_block_to_quantize=[names])
    assert found.stored_as_float == {names[-1]}


def test_a_layer_costs_the_same_whatever_the_list_of_modules():
    tensors = headers(*(gptq_layer(f"model.layers.{i}.mlp.up_proj") for i in range(200)))

    def work(entries: int) -> int:
        modules = [[f"other{i}.up_proj" for i in range(entries)]]
        return frames(lambda: of(tensors, modules_in_block_to_quantize=modules))

    assert work(4000) - work(1000) < 3000 * 20


def test_activation_order_that_orders_nothing():
    """Many configs say desc_act true over weights that were not reordered; g_idx itself tells."""
    other = "model.layers.0.mlp.gate_proj"
    tensors = headers(gptq_layer(UP), gptq_layer(other), gptq_layer(DOWN))
    values = {
        f"{UP}.g_idx": np.arange(256) // 128,
        f"{other}.g_idx": np.roll(np.arange(256) // 128, 1),
    }

    class Values:
        names = ()
        has_values = True

        def blocks(self, name: str, elements: int) -> Iterator[np.ndarray]:
            if name not in values:
                raise NpuQuantError([])
            yield from np.split(values[name], 2)

    found = of(tensors, Values(), desc_act=True)
    assert found.find(UP).spec.layout is Layout.GPTQ
    assert found.find(UP).tensors == {"g_idx"}
    assert found.find(other).spec.layout is Layout.GPTQ_ACT_ORDER
    assert found.find(DOWN).spec.layout is Layout.GPTQ_ACT_ORDER  # cannot be read: as the config says
    assert pickle.loads(pickle.dumps(found)) == found
    Values.has_values = False  # only the headers are here
    assert of(tensors, Values(), desc_act=True).find(UP).spec.layout is Layout.GPTQ_ACT_ORDER


class Zeros:
    """A checkpoint whose g_idx hold nothing but zeros, and that counts the entries it was asked for."""

    names = ()
    has_values = True

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.given = 0

    def blocks(self, name: str, elements: int) -> Iterator[np.ndarray]:
        for start in range(0, self.entries, elements):
            size = min(elements, self.entries - start)
            self.given += size
            yield np.zeros(size, np.int32)


def test_a_long_g_idx_is_not_read():
    """2^28 inputs, as the qweight has them, too."""
    inputs = 1 << 28
    layer = {
        f"{UP}.qweight": ("I32", (inputs // 8, 8)),
        f"{UP}.qzeros": ("I32", (inputs // 128, 1)),
        f"{UP}.scales": ("F16", (inputs // 128, 8)),
        f"{UP}.g_idx": ("I32", (inputs,)),
    }
    checkpoint = Zeros(inputs)
    found = of(headers(layer), checkpoint, desc_act=True)
    assert checkpoint.given == 0
    assert [finding.code for finding in found.findings] == ["operator-limit"]
    assert found.find(UP).spec.layout is Layout.GPTQ_ACT_ORDER


def test_a_g_idx_is_read_up_to_the_first_difference():
    inputs = 1 << 20
    checkpoint = Zeros(inputs)
    tensors = headers(gptq_layer(UP)) | headers({f"{UP}.g_idx": ("I32", (inputs,))})
    found = of(tensors, checkpoint, desc_act=True)
    assert checkpoint.given == 1 << 16
    assert found.find(UP).spec.layout is Layout.GPTQ_ACT_ORDER


def test_all_g_idx_together_are_bounded():
    """Layers of one group, whose g_idx of zeros are in order: each is read to its end."""
    inputs = 1 << 20
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(200)]
    tensors = {}
    for name in names:
        tensors |= headers(gptq_layer(name)) | headers({f"{name}.g_idx": ("I32", (inputs,))})
    checkpoint = Zeros(inputs)
    found = of(tensors, checkpoint, desc_act=True, group_size=inputs)
    assert checkpoint.given <= 100 << 20
    assert any("too much work" in finding.message for finding in found.findings)


def test_g_idx_is_needed_for_activation_order():
    tensors = headers(gptq_layer(UP, g_idx=False))
    assert check(of(tensors), tensors) == []
    (finding,) = check(of(tensors, desc_act=True), tensors)
    assert (finding.code, finding.layer) == ("missing-tensor", UP)
    assert "g_idx" in finding.message


BROKEN: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "5 bits": ({"bits": 5}, "unsupported-scheme", "5 bits", "2, 3, 4 or 8"),
    "rule of 6 bits": ({"dynamic": {"+:.*": {"bits": 6}}}, "unsupported-scheme", "dynamic '+:.*'", "2, 3, 4 or 8"),
    "marlin": ({"checkpoint_format": "marlin"}, "unsupported-scheme", "marlin", "gptq_v2"),
    "marlin flag": ({"is_marlin_format": True}, "unsupported-scheme", "checkpoint_format", "gptq_v2"),
    "bitblas": ({"format": "bitblas"}, "unsupported-scheme", "bitblas", "gptq_v2"),
    "planar": ({"format": "gptq_p"}, "unsupported-scheme", "gptq_p", "gptq_v2"),
    "two formats": ({"format": "gptq", "checkpoint_format": "gptq_v2"}, "bad-config", "names of one thing", "correct"),
    "int64 words": ({"pack_dtype": "int64"}, "unsupported-scheme", "pack_dtype", "int32"),
    "rotation": ({"rotation": "hadamard"}, "unsupported-scheme", "rotation", "no rotation"),
    "adapter": ({"adapter": {"name": "lora"}}, "unsupported-scheme", "adapter", "no adapter"),
    "no bits": ({"bits": "drop"}, "bad-config", "Field required", "correct the field"),
    "bits as a fraction": ({"bits": 4.5}, "bad-config", "integer", "correct the field"),
    "group size 0": ({"group_size": 0}, "bad-config", "group_size", "correct the field"),
    "rule of group size 0": ({"dynamic": {"a": {"group_size": 0}}}, "bad-config", "group_size", "correct the field"),
    "rule is a number": ({"dynamic": {"a": 3}}, "bad-config", "dictionary", "correct the field"),
    "rules are a list": ({"dynamic": ["a"]}, "bad-config", "dictionary", "correct the field"),
    "desc_act as text": ({"desc_act": "yes"}, "bad-config", "boolean", "correct the field"),
    "bad pattern": ({"dynamic": {"-:(": {}}}, "bad-config", "not a regular expression", "layer names"),
    "backreference": ({"dynamic": {r"(a)\1": {"bits": 4}}}, "bad-config", "backreferences", "layer names"),
    "huge repeats": ({"dynamic": {"(((a{99}){99}){99}){99}": {"bits": 4}}}, "bad-config", "too large", "layer names"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_configs(case):
    changes, code, message, fix = BROKEN[case]
    found = of(headers(gptq_layer(UP)), **changes)
    (finding,) = errors(list(found.findings))
    assert finding.code == code
    assert message in finding.message
    assert fix in finding.fix
    assert finding.file == "config.json"


def test_a_regex_bomb_is_matched_in_linear_time():
    layer = "model." + "a" * 500
    tensors = headers(gptq_layer(layer))
    found = of(tensors, dynamic={r"-:model\.(a+)+$b": {}, r"-:(.*)*x": {}, "+:(a|a)*$": {"bits": 8}})
    assert check(found, tensors) == []
    assert found.find(layer).spec.weight.bits == 4


def test_deep_nesting_is_no_recursion():
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    (finding,) = errors(list(read({**PLAIN, "dynamic": {"a": {"bits": deep}}}, {}).findings))
    assert finding.code == "bad-config"
    assert len(finding.render()) < 1000


STORED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no scales": ({f"{UP}.scales": None}, "missing-tensor", "scales"),
    "no qzeros": ({f"{UP}.qzeros": None}, "missing-tensor", "qzeros"),
    "no qweight": ({f"{UP}.qweight": None}, "missing-tensor", "qweight"),
    "wrong group size": ({f"{UP}.scales": ("F16", (8, 64))}, "wrong-shape", "scales"),
    "scales of integers": ({f"{UP}.scales": ("I32", (2, 64))}, "wrong-dtype", "scales"),
    "short g_idx": ({f"{UP}.g_idx": ("I32", (128,))}, "wrong-shape", "g_idx"),
    "float g_idx": ({f"{UP}.g_idx": ("F32", (256,))}, "wrong-dtype", "g_idx"),
    "packed for awq": ({f"{UP}.qzeros": ("I32", (2, 64))}, "wrong-shape", "qzeros"),
    "stray tensor": ({f"{UP}.w_bf16_to_fp8_scale": ("F32", (1,))}, "unexpected-tensor", "w_bf16_to_fp8_scale"),
}


@pytest.mark.parametrize("case", STORED)
def test_broken_files(case):
    changes, code, message = STORED[case]
    layer = {name: value for name, value in {**gptq_layer(UP), **changes}.items() if value is not None}
    tensors = headers(layer)
    (finding,) = check(of(tensors), tensors)
    assert (finding.code, finding.layer) == (code, UP)
    assert message in finding.message
    assert finding.fix


@pytest.mark.parametrize("told", [2, 8])
def test_bits_that_the_files_contradict(told):
    tensors = headers(gptq_layer(UP))
    found = check(of(tensors, bits=told), tensors)
    assert {finding.code for finding in found} == {"wrong-shape"}
    assert {finding.layer for finding in found} == {UP}


def test_words_that_are_not_full():
    """100 inputs and 30 outputs in words of 8."""
    tensors = headers(gptq_layer(UP, inputs=100, outputs=30, group=-1))
    assert check(of(tensors, group_size=-1), tensors) == []


def test_pickles_small_with_many_rules():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(61)]
    tensors = headers(*(gptq_layer(name) for name in names))
    rules = {f"+:model\\.layers\\.{i}\\.x": {"bits": 8} for i in range(5000)}
    found = of(tensors, dynamic=rules)
    assert found.findings == ()
    assert len(pickle.dumps(found)) < 20_000


def folder_with(tmp_path: Path, text: str) -> Checkpoint:
    """A GPTQ checkpoint of 4 bits with this quantize_config.json."""
    for file in fixture("gptq-qwen3-gptqmodel-w4g128-asym").iterdir():
        if file.name != "quantize_config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "quantize_config.json").write_text(text)
    return Checkpoint.open(tmp_path)


def test_the_file_beside_config_json(tmp_path):
    checkpoint = folder_with(tmp_path, '{"bits": 8}')
    own = checkpoint.read_json("config.json")["quantization_config"]
    found = read(own, checkpoint.tensors, "config.json", checkpoint)
    (finding,) = errors(list(found.findings))
    assert (finding.code, finding.found) == ("contradictory-evidence", "4 and 8")
    assert errors(list(read(own, checkpoint.tensors, "quantize_config.json", checkpoint).findings)) == []
    assert errors(list(read(own, checkpoint.tensors).findings)) == []


def test_the_file_beside_config_json_is_damaged(tmp_path):
    checkpoint = folder_with(tmp_path, "{")
    own = checkpoint.read_json("config.json")["quantization_config"]
    (finding,) = errors(list(read(own, checkpoint.tensors, "config.json", checkpoint).findings))
    assert (finding.code, finding.file) == ("unreadable-file", "quantize_config.json")


def test_patterns_that_take_too_much_work_are_reported(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.0)
    (finding,) = of(headers(gptq_layer(UP)), dynamic={"+:.*up_proj": {"bits": 8}}).findings
    assert finding.code == "bad-config"
    assert "too much work" in finding.message


@pytest.mark.parametrize(
    ("other", "fields"),
    [
        (PLAIN, []),
        ({}, []),
        ({"bits": 4, "group_size": None}, []),
        ({"w_bit": 4, "q_group_size": 128, "meta": {}}, []),
        ({"bits": 8}, ["bits"]),
        ({"bits": 4, "desc_act": True, "checkpoint_format": "gptq_v2"}, ["desc_act"]),
        ({"sym": False, "group_size": 64}, ["group_size", "sym"]),
    ],
)
def test_two_files_of_one_checkpoint(other, fields):
    found = compare_files(PLAIN, other, ("config.json", "quantize_config.json"))
    assert [finding.message.rpartition(" ")[2] for finding in found] == fields
    for finding in found:
        assert finding.code == "contradictory-evidence"
        assert finding.file == "config.json, quantize_config.json"
        assert "quantize_config.json" in finding.fix


def test_two_files_that_disagree_about_the_format():
    found = compare_files({**PLAIN, "format": "gptq"}, {"checkpoint_format": "gptq_v2"}, ("a", "b"))
    assert [finding.found for finding in found] == ["gptq and gptq_v2"]
