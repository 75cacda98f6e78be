# SPDX-License-Identifier: Apache-2.0
"""Detection: which format a folder has by its config files, the names of its tensors and their dtypes.

The configs are those that public reports and producers' tools show; the tensors are headers over zeros.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_npu_quant.formats.declaration import find_format, formats
from vllm_npu_quant.formats.foreign import FOREIGN, unserved
from vllm_npu_quant.inspection import check

BYTES = {
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "BF16": 2,
    "F16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
}

Tensors = dict[str, tuple[str, tuple[int, ...]]]

LAYERS = tuple(
    f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate_proj", "up_proj", "down_proj")
)
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}


def around() -> Tensors:
    """What is float in every model."""
    return {"model.embed_tokens.weight": ("BF16", (64, 256)), "lm_head.weight": ("BF16", (64, 256))}


def stored(**suffixes: tuple[str, tuple[int, ...]]) -> Tensors:
    """These tensors for each of LAYERS, and the float ones around them."""
    return around() | {f"{layer}.{name}": header for layer in LAYERS for name, header in suffixes.items()}


FLOAT = stored(weight=("BF16", (256, 256)))
INT8 = stored(weight=("I8", (256, 256)), weight_scale=("F32", (256, 1)), weight_offset=("F32", (256, 1)))
CHANNEL = stored(weight=("I8", (256, 256)), weight_scale=("BF16", (256, 1)))
FP8 = stored(weight=("F8_E4M3", (256, 256)), weight_scale=("BF16", (256, 1)))
GPTQ = stored(qweight=("I32", (32, 256)), qzeros=("I32", (2, 32)), scales=("F16", (2, 256)), g_idx=("I32", (256,)))
AWQ = stored(qweight=("I32", (256, 32)), qzeros=("I32", (2, 32)), scales=("F16", (2, 256)))
MLX = stored(weight=("U32", (256, 32)), scales=("BF16", (256, 4)), biases=("BF16", (256, 4)))

MINDIE = {"group_size": 0, "kv_quant_type": None, "fa_quant_type": None, "w_bit": 8, "a_bit": 8, "dev_type": "npu"}
GPTQ_FIELDS = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ_FIELDS = {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {**GPTQ_FIELDS, "data_type": "int", "packing_format": "auto_round:auto_gptq", "autoround_version": "0.9.0"}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
CT = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": DYNAMIC,
        }
    },
}
CT_FP8 = json.loads(json.dumps(CT | {"format": "float-quantized"}).replace('"int"', '"float"'))


def described(tensors: Tensors, **head: Any) -> dict[str, Any]:
    """msModelSlim's description of W8A8_DYNAMIC."""
    kinds = {name: "FLOAT" if name in around() else "W8A8_DYNAMIC" for name in tensors}
    return {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", **head, **kinds}


@dataclass(frozen=True)
class Case:
    """A folder and what is said of it.

    Attributes:
        quantization: config.json's quantization_config; None for none.
        tensors: of model.safetensors.
        format: the format that is found; "" if none, or if it is refused.
        error: the code of the one error; "" for a checkpoint that passes.
        words: parts of the text of the findings.
        warning: the code of the one warning.
        config: further fields of config.json; None for a folder without config.json.
        json: further JSON files. weights: further weight files.
    """

    quantization: Mapping[str, Any] | None
    tensors: Tensors
    format: str = ""
    error: str = ""
    words: tuple[str, ...] = ()
    warning: str = ""
    config: Mapping[str, Any] | None = field(default_factory=dict)
    json: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Tensors] = field(default_factory=dict)


DESCRIPTION = "quant_model_description.json"
DYNAMIC_DESCRIPTION = "quant_model_description_w8a8_dynamic.json"
UNDECLARED = "bad-config"
REFUSED = "unsupported-scheme"


def foreign(quantization: Mapping[str, Any] | None, tensors: Tensors, *words: str, **more: Any) -> Case:
    """A checkpoint of a known kind that is not served."""
    return Case(quantization, tensors, error=REFUSED, words=words, **more)


CASES = {
    # MindIE's exports of ModelSlim.
    "MindIE": Case(MINDIE, INT8, "modelslim", json={DYNAMIC_DESCRIPTION: described(INT8)}, config={"quantize": "w8a8"}),
    "MindIE, one group": Case(MINDIE | {"group_size": -1}, INT8, "modelslim", json={DESCRIPTION: described(INT8)}),
    "MindIE, group size as text": Case(
        MINDIE | {"group_size": "128"}, INT8, "modelslim", json={DESCRIPTION: described(INT8, group_size="128")}
    ),
    "ModelSlim, one group": Case(None, INT8, "modelslim", json={DESCRIPTION: described(INT8, group_size=-1)}),
    "MindIE, an index of its own": Case(
        MINDIE, {}, "modelslim", weights={"quant_model_weight_w8a8_dynamic-00001-of-00001.safetensors": INT8},
        json={
            DYNAMIC_DESCRIPTION: described(INT8),
            "quant_model_weight_w8a8_dynamic.safetensors.index.json": {
                "weight_map": dict.fromkeys(INT8, "quant_model_weight_w8a8_dynamic-00001-of-00001.safetensors")
            },
        },
    ),
    # Spellings of configs.
    "GPTQ with nulls": Case(
        {"quant_method": "gptq", **GPTQ_FIELDS, "desc_act": None, "static_groups": None, "dynamic": None, "lm_head": None},
        GPTQ,
        "gptq",
    ),
    "GPTQ, numbers as text": Case(
        {"quant_method": "gptq", "bits": "4", "group_size": "128", "desc_act": "False", "sym": "true"}, GPTQ, "gptq"
    ),
    "AWQ with nulls": Case(
        {"quant_method": "awq", **AWQ_FIELDS, "modules_to_not_convert": None, "version": None, "pack_dtype": None},
        AWQ,
        "awq",
    ),
    "AWQ, numbers as text": Case(
        {"quant_method": "awq", "w_bit": "4", "q_group_size": "128", "zero_point": 1}, AWQ, "awq"
    ),
    "compressed-tensors with nulls": Case(
        json.loads(json.dumps(CT).replace("false", "null").replace('"num_bits": 8', '"num_bits": "8"')),
        CHANNEL,
        "compressed-tensors",
    ),
    "FP8 with nulls": Case(
        {"quant_method": "fp8", "activation_scheme": None, "modules_to_not_convert": None, "weight_block_size": None},
        FP8,
        "fp8",
    ),
    "AutoRound with nulls": Case(
        {"quant_method": "auto-round", **AUTO_ROUND, "sym": None, "data_type": None, "extra_config": None}, GPTQ, "auto-round"
    ),
    "AutoRound in one word": Case({"quant_method": "autoround", **AUTO_ROUND}, GPTQ, "auto-round"),
    "AutoGPTQ's name": Case({"quant_method": "auto_gptq", **GPTQ_FIELDS}, GPTQ, "gptq"),
    "AutoAWQ's name": Case({"quant_method": "AutoAWQ", **AWQ_FIELDS}, AWQ, "awq"),
    "fbgemm": Case({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, FP8, "fp8"),
    # No quant_method.
    "GPTQ by its fields": Case(GPTQ_FIELDS, GPTQ, "gptq"),
    "AWQ by its fields": Case(AWQ_FIELDS, AWQ, "awq"),
    "AutoRound by its fields": Case({k: v for k, v in AUTO_ROUND.items() if k != "desc_act"}, GPTQ, "auto-round"),
    "compressed-tensors by its fields": Case(
        {key: value for key, value in CT.items() if key != "quant_method"}, CHANNEL, "compressed-tensors"
    ),
    "FP8 by its fields": Case({"activation_scheme": "dynamic"}, FP8, "fp8"),
    "fields that several formats have": Case(
        {"bits": 4, "group_size": 128}, GPTQ, error=UNDECLARED, words=("has no quant_method", "--quantization")
    ),
    # Other places in config.json.
    "llm_config": Case(
        None, AWQ, "awq", config={"llm_config": {**MODEL, "quantization_config": {"quant_method": "awq", **AWQ_FIELDS}}},
        words=("quantization=awq",),
    ),
    "text_config": Case(None, CHANNEL, "compressed-tensors", config={"text_config": {**MODEL, "quantization_config": CT}}),
    "thinker_config": Case(
        None, CHANNEL, "compressed-tensors",
        config={"thinker_config": {"text_config": {**MODEL, "quantization_config": CT}}},
    ),
    # Leftovers.
    "FP8 left in config.json": Case(
        {"quant_method": "fp8", "activation_scheme": "dynamic"}, INT8, "modelslim", json={DESCRIPTION: described(INT8)},
        warning="contradictory-evidence", words=("remove quantization_config",),
    ),
    "a description left in the folder": Case(
        {"quant_method": "gptq", **GPTQ_FIELDS}, GPTQ, "gptq", json={DESCRIPTION: described(INT8)},
        warning="contradictory-evidence", words=(f"remove {DESCRIPTION}",),
    ),
    "saved into the float model's folder": Case(
        None, FLOAT, error="index-mismatch", words=("remove", "model.safetensors.index.json, model.safetensors"),
        json={
            DESCRIPTION: described(INT8),
            "model.safetensors.index.json": {"weight_map": dict.fromkeys(FLOAT, "model.safetensors")},
        },
        weights={"quant_model_weights.safetensors": INT8},
    ),
    "GPTQ saved into the float model's folder": Case(
        {"quant_method": "gptq", **GPTQ_FIELDS}, FLOAT, error="index-mismatch", words=("gptq_model-4bit",),
        json={"model.safetensors.index.json": {"weight_map": dict.fromkeys(FLOAT, "model.safetensors")}},
        weights={"gptq_model-4bit-128g.safetensors": GPTQ},
    ),
    "both loaded": Case(
        None, FLOAT, error="duplicate-tensor", words=("remove the float model's files: model.safetensors",),
        json={DESCRIPTION: described(INT8)}, weights={"quant_model_weights.safetensors": INT8},
    ),
    "consolidated beside the Hugging Face set": Case(
        {"quant_method": "fp8"}, FP8, error="duplicate-tensor",
        words=("remove consolidated.safetensors, params.json",), json={"params.json": {}},
        weights={"consolidated.safetensors": {"layers.0.attention.wq.weight": ("F8_E4M3", (256, 256))}},
    ),
    "both with an index": Case(
        None, FLOAT, error="index-mismatch", words=("model.safetensors.index.json, model.safetensors",),
        json={
            DESCRIPTION: described(INT8),
            "model.safetensors.index.json": {"weight_map": dict.fromkeys(FLOAT, "model.safetensors")},
            "quant_model_weights.safetensors.index.json": {
                "weight_map": dict.fromkeys(INT8, "quant_model_weights.safetensors")
            },
        },
        weights={"quant_model_weights.safetensors": INT8},
    ),
    "layers that the index leaves out": Case(
        CT, CHANNEL, "compressed-tensors", weights={"layer_0.safetensors": CHANNEL},
        json={"model.safetensors.index.json": {"weight_map": dict.fromkeys(CHANNEL, "model.safetensors")}},
    ),
    # Not what they seem.
    "an adapter": Case(
        None, {"base_model.model.model.layers.0.q_proj.lora_A.weight": ("F32", (8, 256))}, error="unreadable-file",
        words=("an adapter (LoRA)", "serve org/base", "--lora-modules"), config=None,
        json={"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "org/base"}},
    ),
    "an adapter with the config of its model": Case(
        None, {"base_model.model.model.layers.0.q_proj.lora_A.weight": ("F32", (8, 256))}, error="unreadable-file",
        words=("a LoRA adapter's", "--lora-modules"), config=None, json={"adapter_config.json": {}, "config.json": MODEL},
    ),
    "FP8 that was not converted": Case(
        CT_FP8, FLOAT, "compressed-tensors", warning=UNDECLARED, words=("the whole model is float",)
    ),
    "AWQ that was not converted": Case(
        {"quant_method": "awq", **AWQ_FIELDS}, FLOAT, "awq", warning=UNDECLARED, words=("the whole model is float",)
    ),
    "a quantized head of a tied model": Case(
        {"quant_method": "gptq", **GPTQ_FIELDS, "lm_head": True},
        {k: v for k, v in GPTQ.items() if k != "lm_head.weight"}
        | {"lm_head.qweight": ("I32", (32, 64)), "lm_head.qzeros": ("I32", (2, 8)), "lm_head.scales": ("F16", (2, 64))},
        "gptq", config={"tie_word_embeddings": True}, warning="served-otherwise", words=("lm_head is not used",),
    ),
    **{
        f"{dtype} that no config declares": Case(
            None, stored(weight=(dtype, (256, 256))), error=UNDECLARED, words=("names no quantization", dtype)
        )
        for dtype in ("I8", "U8", "I16", "U16", "I32", "F8_E4M3")
    },
    **{
        f"the prefix {wrong}": Case(
            CT, {name.replace("model.layers", f"{wrong}.layers"): header for name, header in CHANNEL.items()},
            "compressed-tensors", error=UNDECLARED, words=(wrong, f"{right}.layers"),
        )
        for wrong, right in (
            ("model.language_model.language_model.language_model", "model.language_model"),
            ("model.language_model.language_model", "model.language_model"),
            ("model.model", "model"),
            ("language_model.model.language_model.model", "language_model.model"),
        )
    },
    **{
        f"the prefix {prefix}": Case(
            CT, {name.replace("model.layers", f"{prefix}.layers"): header for name, header in CHANNEL.items()},
            "compressed-tensors",
        )
        for prefix in ("model.language_model", "language_model.model", "vision_tower.vision_tower.encoder", "thinker.model")
    },
    # Sizes of config.json.
    "a larger vocabulary": Case(
        CT, CHANNEL, "compressed-tensors", error="wrong-shape", words=("vocab_size",), config={"vocab_size": 65}
    ),
    "a smaller vocabulary": Case(
        CT, CHANNEL, "compressed-tensors", warning="wrong-shape", words=("vocab_size",), config={"vocab_size": 60}
    ),
    "another width": Case(
        CT, CHANNEL, "compressed-tensors", error="wrong-shape", words=("hidden_size",), config={"hidden_size": 128}
    ),
    "an embedding of its own width": Case(
        CT, CHANNEL, "compressed-tensors", config={"hidden_size": 512, "word_embed_proj_dim": 256}
    ),
    "a vocabulary of the text model": Case(
        CT, CHANNEL, "compressed-tensors", config={"vocab_size": 99, "hidden_size": 8, "text_config": MODEL}
    ),
    # Kinds that are not served.
    "bitsandbytes": foreign(
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        stored(**{"weight": ("U8", (32768, 1)), "weight.absmax": ("U8", (1024,))}), "bitsandbytes", "-bnb-4bit",
    ),
    "bitsandbytes without a config": foreign(
        None, stored(**{"weight": ("U8", (32768, 1)), "weight.absmax": ("U8", (1024,))}), "bitsandbytes"
    ),
    "gpt-oss": foreign({"quant_method": "mxfp4"}, FLOAT, "gpt-oss MXFP4", "BF16 copy"),
    "gpt-oss without a config": foreign(
        None, around() | {"model.layers.0.mlp.experts.down_proj_blocks": ("U8", (4, 256, 4, 16))}, "gpt-oss MXFP4"
    ),
    "DeepSeek-V4": foreign(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"},
        stored(weight=("F8_E4M3", (256, 256)), scale=("F8_E8M0", (2, 2))), "DeepSeek-V4", "Ascend 950",
    ),
    "MLX": foreign({"bits": 4, "group_size": 64}, MLX, "MLX"),
    "MLX by both names": foreign(
        {"bits": 4, "group_size": 64, "mode": "affine"}, MLX, "MLX", config={"quantization": {"bits": 4, "group_size": 64}}
    ),
    "MLX's older config": foreign(None, MLX, "MLX", config={"quantization": {"bits": 4, "group_size": 64}}),
    "MLX MXFP4": foreign(None, stored(weight=("U32", (256, 32)), scales=("U8", (256, 8))), "MLX"),
    "SGLang int8": foreign({"quant_method": "w8a8_int8"}, CHANNEL, "'w8a8_int8'", "int-quantized"),
    "SGLang int8, other spelling": foreign({"quant_method": "w8a8-int8"}, CHANNEL, "'w8a8-int8'"),
    "EXL2 without a config": foreign(None, stored(q_weight=("I32", (32, 256)), q_invperm=("I16", (256,))), "ExLlamaV2"),
    "Mistral's format": foreign(
        None, {}, "Mistral", "params.json", config=None, json={"params.json": {"dim": 8, "quantization": {"a": 1}}},
        weights={"consolidated.safetensors": {"layers.0.attention.wq.weight": ("F8_E4M3", (256, 256))}},
    ),
    "unknown": Case({"quant_method": "zipper"}, FLOAT, error="unknown-scheme", words=("'zipper'",)),
}  # fmt: skip


def write_weights(path: Path, tensors: Tensors) -> None:
    """A safetensors file of zeros."""
    head, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def write(folder: Path, case: Case) -> Path:
    if case.config is not None:
        quantization = {} if case.quantization is None else {"quantization_config": case.quantization}
        (folder / "config.json").write_text(json.dumps({**MODEL, **quantization, **case.config}))
    for name, content in case.json.items():
        (folder / name).write_text(json.dumps(content))
    files = {
        "model.safetensors" if case.config is not None else "adapter_model.safetensors": case.tensors,
        **case.weights,
    }
    for name, tensors in files.items():
        if tensors:
            write_weights(folder / name, tensors)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_check_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    report = check(write(tmp_path, case))
    text = "\n".join(finding.render() for finding in report.findings)
    by_severity = {
        severity: [one.code for one in report.findings if one.severity.value == severity]
        for severity in ("error", "warning")
    }
    assert by_severity["error"] == [case.error] * bool(case.error), text
    assert by_severity["warning"] == [case.warning] * bool(case.warning), text
    assert report.format == case.format
    assert report.passed() == (not case.error)
    for words in case.words:
        assert words in text
    assert all(finding.fix for finding in report.findings if finding.severity.value != "info")


# The table of kinds that are not served.


def test_no_served_format_is_in_the_table() -> None:
    assert [method for one in FOREIGN for method in one.methods if find_format(method) is not None] == []
    assert [one.file for one in FOREIGN if one.file and any(other.file_beside([one.file]) for other in formats())] == []


def test_a_method_and_a_tensor_are_of_one_kind() -> None:
    methods = [method for one in FOREIGN for method in one.methods]
    tensors = [name for one in FOREIGN for name in one.tensors]
    assert len(methods) == len(set(methods))
    assert len(tensors) == len(set(tensors))


@pytest.mark.parametrize("method", sorted(method for one in FOREIGN for method in one.methods))
def test_every_kind_has_its_name_and_a_next_step(method: str) -> None:
    for spelled in (method, method.replace("-", "_").upper()):
        finding = unserved({"quant_method": spelled}, "config.json")
        assert finding.code == "unsupported-scheme"
        assert spelled in finding.found
        assert finding.fix
        assert finding.nearest == ()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gtpq", "gptq"),
        ("gpqt", "gptq"),
        ("awqq", "awq"),
        ("autoroud", "autoround"),
        ("compressed-tensor", "compressed-tensors"),
        ("modelslm", "modelslim"),
        ("zipper", None),
        ("fp4", None),
        ("int8", None),
        ("a" * 10_000, None),
    ],
)
def test_only_misspellings_are_near(written: str, meant: str | None) -> None:
    finding = unserved({"quant_method": written}, "config.json")
    assert finding.code == "unknown-scheme"
    assert finding.nearest[:1] == (() if meant is None else (meant,))
