# SPDX-License-Identifier: Apache-2.0
"""Who serves which checkpoint beside vllm-ascend: the table, and what the real packages of a process decide.

The chip is written into vllm-ascend when it is built, so that every chip needs a process of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The chips, by the names that vllm-ascend's build writes, in the order of the table's columns.
CHIPS = ("A2", "A3", "A5", "_310P")

#: The letters of the table. "R": vllm-ascend's platform refuses the method. "F": stock vLLM, as a float model.
OWNERS = {"V": "vllm-ascend", "N": "vllm-npu-quant", "R": "refused by the platform", "F": "vLLM"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by what decides its owner, and the owner on A2, A3, A5 and 310P.

    Attributes:
        name: a name.
        on_023, on_030: four letters for vllm-ascend 0.23.0.post1 and 0.30.0rc2.
        description: the ModelSlim description beside config.json; None if there is none.
        config: quantization_config. model: other fields of config.json. file: the description's name.
    """

    name: str
    on_023: str
    on_030: str
    description: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    file: str = "quant_model_description.json"

    def letters(self, release: str) -> str:
        return self.on_023 if release.startswith("0.23") else self.on_030


ATTENTION = "model.layers.0.self_attn"
V1 = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "metadata": {}, "group_size": 0, "optional": {}}


def linear(kind: str, *more: str, layer: str = f"{ATTENTION}.o_proj") -> dict[str, str]:
    """A layer's entries: weight, its scale, and more tensors."""
    return {f"{layer}.{name}": kind for name in ("weight", "weight_scale", *more)}


def experts(kind: str, *names: str) -> dict[str, str]:
    """Entries of two experts; ``names`` in place of weight and weight_scale."""
    return {
        f"model.layers.3.mlp.experts.{number}.{part}.{name}": kind
        for number in range(2)
        for part in ("gate_proj", "up_proj", "down_proj")
        for name in names or ("weight", "weight_scale")
    }


def described(*entries: Mapping[str, str], **header: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"model.norm.weight": "FLOAT", "model.layers.3.mlp.gate.weight": "FLOAT"}
    for part in entries:
        found.update(part)
    return {**found, **V1, **header}


def fa3(kind: str, *parts: str) -> dict[str, str]:
    """Entries of FA3: an attention layer's type, and the scales and offsets of its inputs."""
    scales = {f"{ATTENTION}.fa_{part}.{name}": "FAQuant" for part in parts for name in ("scale", "offset")}
    return {f"{ATTENTION}.quant_type": kind, **scales}


INDEXER = {
    f"{ATTENTION}.indexer.q_rot": "FLOAT",
    f"{ATTENTION}.indexer.k_rot": "FLOAT",
    f"{ATTENTION}.indexer.quant_type": "QK_INT8_DYNAMIC",
}
C8 = {f"{ATTENTION}.{part}_proj.kv_cache_{name}": "C8" for part in "kv" for name in ("scale", "offset")}
DYNAMIC = linear("W8A8_DYNAMIC", "weight_offset")
MXFP8_CACHE = fa3("QK_MXFP8_DYNAMIC_V_MXFP8_PER_CHANNEL", "v")


def numbers(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return numbers(bits, strategy, **{"type": "float", **more})


def groups(packing: str, *members: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {f"group_{number}": member for number, member in enumerate(members)},
        "ignore": ["lm_head"],
        **more,
    }


def group(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, *targets: str) -> dict[str, Any]:
    return {"targets": list(targets or ("Linear",)), "weights": weights, "input_activations": inputs}


TOKEN = numbers(8, "token", dynamic=True)
INT4_G32 = numbers(4, "group", group_size=32)
#: What Kimi-K2-Thinking ignores: all Linear layers but those of routed experts.
NO_LINEAR = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
MX8, MX4 = (floats(bits, "group", group_size=32) for bits in (8, 4))
FP8_BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
V4 = {"model_type": "deepseek_v4", "expert_dtype": "fp4"}
MOE = {"num_experts": 8}

TABLE: tuple[Checkpoint, ...] = (
    # msModelSlim, by the description beside config.json
    Checkpoint("W8A8_DYNAMIC", "VVVV", "VVVV", described(DYNAMIC)),
    Checkpoint("W8A8_DYNAMIC, experts too", "VVVV", "VVVV", described(DYNAMIC, experts("W8A8_DYNAMIC"))),
    Checkpoint("W8A8", "VVVV", "VVVV", described(linear("W8A8"))),
    Checkpoint("W8A8_MIX", "VVVN", "VVVN", described(linear("W8A8_MIX"))),
    Checkpoint("W8A8_MIX, experts too", "VVVN", "NNNN", described(linear("W8A8_MIX"), experts("W8A8_MIX"))),
    Checkpoint("W8A16", "VVVN", "VVVN", described(linear("W8A16"))),
    Checkpoint("W4A16", "NNNN", "NNNN", described(linear("W4A16"))),
    Checkpoint("experts W4A16 of msModelSlim", "NNNN", "NNNN", described(DYNAMIC, experts("W4A16"))),
    Checkpoint(
        "experts W4A16 of LLM-Compressor",
        "VVVN",
        "VVVN",
        described(DYNAMIC, experts("W4A16", "weight_packed", "weight_scale", "weight_shape")),
    ),
    Checkpoint("W4A8_DYNAMIC", "NNNN", "NNNN", described(linear("W4A8_DYNAMIC"))),
    Checkpoint("experts W4A8_DYNAMIC", "VVVN", "VVVN", described(DYNAMIC, experts("W4A8_DYNAMIC"))),
    Checkpoint(
        "experts W4A8_DYNAMIC per group",
        "VVVN",
        "NNNN",
        described(DYNAMIC, experts("W4A8_DYNAMIC", "weight", "weight_scale", "weight_scale_second"), group_size=256),
    ),
    Checkpoint("W4A4_DYNAMIC", "VVVN", "VVVN", described(linear("W4A4_DYNAMIC"))),
    Checkpoint(
        "W4A4_FLATQUANT_DYNAMIC",
        "VVVN",
        "VVVN",
        described(linear("W4A4_FLATQUANT_DYNAMIC", "left_trans", "clip_ratio")),
    ),
    Checkpoint("W8A8S", "NNNV", "NNNV", described(linear("W8A8S"))),
    Checkpoint("W8A8SC", "NNNV", "NNNV", described(linear("W8A8SC"))),
    Checkpoint("W16A16S", "NNNN", "NNNN", described(linear("W16A16S"))),
    Checkpoint("W8A8_MXFP8", "NNVN", "NNVN", described(linear("W8A8_MXFP8"))),
    Checkpoint(
        "experts W4A16_MXFP4", "NNVN", "NNVN", described(linear("W8A8_MXFP8"), experts("W4A16_MXFP4"), group_size=32)
    ),
    Checkpoint("experts W4A8_MXFP", "NNVN", "NNVN", described(linear("W8A8_MXFP8"), experts("W4A8_MXFP"))),
    Checkpoint("W4A4_MXFP4", "NNVN", "NNVN", described(linear("W4A4_MXFP4"), experts("W4A4_MXFP4"))),
    Checkpoint("W4A4_MXFP4_DUALSCALE", "NNNN", "NNNN", described(linear("W4A4_MXFP4_DUALSCALE"))),
    Checkpoint("W8A8FP8_DYNAMIC", "NNVN", "NNVN", described(linear("W8A8FP8_DYNAMIC"))),
    Checkpoint("WFP8AFP8_DYNAMIC", "NNNN", "NNNN", described(linear("WFP8AFP8_DYNAMIC"))),
    Checkpoint("no such type", "NNNN", "NNNN", described(linear("W9A9"))),
    Checkpoint(
        "inputs rotated at run time",
        "NNNN",
        "NNNN",
        described(DYNAMIC, metadata={"quarot": {"heads_rotation": {"layers": [f"{ATTENTION}.o_proj"]}}}),
    ),
    Checkpoint(
        "W8A8, the file's old name", "NNNN", "NNNN", described(linear("W8A8")), file="quant_model_description_w8a8.json"
    ),
    # quantized attention and KV caches
    Checkpoint(
        "MLA C8 (DeepSeek-V3 w8a8c8)",
        "VVVN",
        "VVVN",
        described(DYNAMIC, experts("W8A8_DYNAMIC"), fa3("K_INT8", "q", "k", "v"), fa_quant_type="FAKQuant"),
    ),
    Checkpoint(
        "MLA C8 (DeepSeek-R1 w4a8c8)",
        "VVVN",
        "VVVN",
        described(DYNAMIC, experts("W4A8_DYNAMIC"), fa3("K_INT8", "q", "k", "v"), fa_quant_type="FAKQuant"),
    ),
    Checkpoint(
        "MLA C8 in FP8 (Kimi-K2.6 w4a4c8)",
        "NNVN",
        "NNVN",
        described(
            linear("W8A8_MXFP8"),
            experts("W4A4_MXFP4"),
            fa3("FP8", "q", "k", "v"),
            fa_quant_type="FAKQuant",
            group_size=32,
        ),
    ),
    Checkpoint(
        "MLA C8, a Linear that only this package serves",
        "NNNN",
        "NNNN",
        described(linear("W4A16"), fa3("K_INT8", "q", "k", "v"), fa_quant_type="FAKQuant"),
    ),
    Checkpoint("FA3 of msModelSlim v0", "NNNN", "NNNN", described(DYNAMIC, fa3("FLOAT", "k"), fa_quant_type="FAQuant")),
    Checkpoint("FA3 scales that no field declares", "NNNN", "NNNN", described(DYNAMIC, fa3("K_INT8", "k"))),
    Checkpoint("attention in INT8 without stored scales", "VVVV", "VVVV", described(DYNAMIC, fa3("INT8_DYNAMIC"))),
    Checkpoint(
        "int8 indexer (GLM-5 w8a8c8, DeepSeek-V3.2)",
        "VVVN",
        "VVVN",
        described(DYNAMIC, experts("W8A8_DYNAMIC"), INDEXER, indexer_quant_type="INT8_DYNAMIC"),
    ),
    Checkpoint("C8 of dense attention", "VVVN", "VVVN", described(DYNAMIC, C8, kv_cache_type="C8", kv_quant_type="C8")),
    Checkpoint("C8 that no field declares", "NNNN", "NNNN", described(DYNAMIC, C8)),
    Checkpoint("MXFP8 KV cache", "NNNN", "NNVN", described(linear("W8A8_MXFP8"), MXFP8_CACHE)),
    Checkpoint(
        "MXFP8 KV cache, declared for the model",
        "NNNN",
        "NNVN",
        described(linear("W8A8_MXFP8"), MXFP8_CACHE, kv_cache_type="K_DYNAMIC_V_STATIC_MXFP8_PER_CHANNEL"),
    ),
    # msModelSlim, named in config.json
    Checkpoint("description in config.json", "VVVV", "VVVV", config={"quant_method": "ascend", **described(DYNAMIC)}),
    Checkpoint(
        "description in config.json, W4A16",
        "NNNN",
        "NNNN",
        config={"quant_method": "ascend", **described(linear("W4A16"))},
    ),
    Checkpoint(
        "description in config.json, our name",
        "NNNN",
        "NNNN",
        config={"quant_method": "modelslim", **described(DYNAMIC)},
    ),
    Checkpoint("format in config.json", "NNNN", "VVVV", described(DYNAMIC), config={"quant_method": "ascend"}),
    Checkpoint(
        "format in config.json, W4A16", "NNNN", "NNNN", described(linear("W4A16")), config={"quant_method": "ascend"}
    ),
    # compressed-tensors
    Checkpoint("int8 W8A8", "VVVN", "VVVN", config=groups("int-quantized", group(numbers(8, "channel"), TOKEN))),
    Checkpoint(
        "int8 W8A8, static",
        "VVVN",
        "VVVN",
        config=groups("int-quantized", group(numbers(8, "channel"), numbers(8, "tensor"))),
    ),
    Checkpoint(
        "int8 W8A8, static experts",
        "NNNN",
        "NNNN",
        config=groups("int-quantized", group(numbers(8, "channel"), numbers(8, "tensor"))),
        model=MOE,
    ),
    Checkpoint(
        "int8 W8A8, experts too",
        "VVVN",
        "VVVN",
        config=groups("int-quantized", group(numbers(8, "channel"), TOKEN)),
        model=MOE,
    ),
    Checkpoint(
        "int8 W8A8, asymmetric",
        "NNNN",
        "NNNN",
        config=groups("int-quantized", group(numbers(8, "channel"), {**TOKEN, "symmetric": False})),
    ),
    Checkpoint("int4 W4A16", "NNNN", "NNNN", config=groups("pack-quantized", group(INT4_G32, None))),
    Checkpoint(
        "int4 experts (Kimi-K2-Thinking)",
        "NNVN",
        "NNVN",
        config=groups("pack-quantized", group(INT4_G32, None), ignore=NO_LINEAR),
        model={"text_config": {"n_routed_experts": 384}},
    ),
    Checkpoint(
        "the same in groups of 128",
        "NNNN",
        "NNNN",
        config=groups("pack-quantized", group(numbers(4, "group", group_size=128), None), ignore=NO_LINEAR),
        model=MOE,
    ),
    Checkpoint(
        "the same, edited as vllm-ascend's tutorial says",
        "VVVN",
        "VVVN",
        config=groups("pack-quantized", group(INT4_G32, None, "MoE"), ignore=NO_LINEAR),
        model=MOE,
    ),
    Checkpoint(
        "int4 W4A8 experts",
        "NNVN",
        "NNVN",
        config=groups("int-quantized", group(numbers(4, "channel"), TOKEN, "re:.*mlp\\.experts\\..*")),
        model=MOE,
    ),
    Checkpoint("int4 W4A8", "NNNN", "NNNN", config=groups("int-quantized", group(numbers(4, "channel"), TOKEN))),
    Checkpoint(
        "FP8 dynamic",
        "NNVN",
        "NNVN",
        config=groups("float-quantized", group(floats(8, "channel"), floats(8, "token", dynamic=True))),
    ),
    Checkpoint(
        "FP8 static", "NNNN", "NNNN", config=groups("float-quantized", group(floats(8, "channel"), floats(8, "tensor")))
    ),
    Checkpoint(
        "FP8 blocks of compressed-tensors",
        "NNNN",
        "NNNN",
        config=groups(
            "float-quantized",
            group(floats(8, "block", block_structure=[128, 128]), floats(8, "group", group_size=128, dynamic=True)),
        ),
    ),
    Checkpoint("MXFP8", "NNNN", "NNVN", config=groups("mxfp8-quantized", group(MX8, {**MX8, "dynamic": True}))),
    Checkpoint("MXFP4", "NNNN", "NNVN", config=groups("mxfp4-pack-quantized", group(MX4, {**MX4, "dynamic": True}))),
    Checkpoint("MXFP4, float inputs", "NNNN", "NNNN", config=groups("mxfp4-pack-quantized", group(MX4, None))),
    Checkpoint(
        "quantized KV cache",
        "NNNN",
        "NNNN",
        config=groups("int-quantized", group(numbers(8, "channel"), TOKEN), kv_cache_scheme=floats(8, "tensor")),
    ),
    # other methods
    Checkpoint("FP8 blocks (Qwen3-FP8)", "NNNN", "NNVN", config=FP8_BLOCKS),
    Checkpoint("FP8 per tensor", "NNNN", "NNNN", config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
    Checkpoint("DeepSeek-V4, FP8 and FP4", "NNVN", "NNVN", config=FP8_BLOCKS, model=V4),
    Checkpoint("DeepSeek-V4, FP8 only", "NNNN", "NNNN", config=FP8_BLOCKS, model={**V4, "expert_dtype": "fp8"}),
    Checkpoint("AWQ", "NNNN", "NNNN", config={"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}),
    Checkpoint(
        "GPTQ", "NNNN", "NNNN", config={"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    ),
    Checkpoint("torchao", "RRRR", "RRRR", config={"quant_method": "torchao", "quant_type": {}}),
    Checkpoint("bfloat16", "FFFF", "FFFF"),
)


class Deciders:
    """The code that decides, from the installed packages, with vllm-ascend built for a chip."""

    def __init__(self, chip: str) -> None:
        build_info = types.ModuleType("vllm_ascend._build_info")
        vars(build_info)["__device_type__"] = chip
        sys.modules[build_info.__name__] = build_info
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        from vllm.platforms import current_platform

        current_platform.pre_register_and_update()
        from vllm_ascend.quantization.utils import detect_quantization_method

        self.detect = detect_quantization_method

    def owner(self, checkpoint: Checkpoint, folder: Path) -> str:
        """The owner of a checkpoint, by the functions that an engine calls to find the class that reads it.

        Ours looks at the files, vLLM asks every class by ``override_quantization_method`` and the platform whether it takes
        the method, and vllm-ascend looks at the files if there is no method yet.
        """
        from vllm.config import ModelConfig
        from vllm.model_executor.layers.quantization import get_quantization_config

        from vllm_npu_quant.engine.detection import _detect

        config = {"model_type": "qwen3_moe", **checkpoint.model}
        if checkpoint.config is not None:
            config["quantization_config"] = checkpoint.config
        (folder / "config.json").write_text(json.dumps(config))
        if checkpoint.description is not None:
            (folder / checkpoint.file).write_text(json.dumps(checkpoint.description))
        model = types.SimpleNamespace(
            quantization=_detect(str(folder), None, None).method,
            model_arch_config=types.SimpleNamespace(quantization_config=checkpoint.config),
            hf_config=json.loads(json.dumps(config), object_hook=lambda fields: types.SimpleNamespace(**fields)),
            allow_deprecated_quantization=True,
        )
        try:
            ModelConfig._verify_quantization(model)
        except ValueError as error:
            if "not supported" not in str(error):
                raise
            return OWNERS["R"]
        method = model.quantization or self.detect(str(folder))
        if method is None:
            return OWNERS["F"]
        package = get_quantization_config(method).__module__.partition(".")[0]
        return {"vllm_ascend": OWNERS["V"], "vllm_npu_quant": OWNERS["N"]}[package]

    def schemes(self, checkpoint: Checkpoint) -> list[str]:
        """The scheme that vllm-ascend's own compressed-tensors class finds for every group of a config."""
        from compressed_tensors.quantization import QuantizationArgs
        from vllm.model_executor.layers.quantization import get_quantization_config

        theirs = get_quantization_config("compressed-tensors").from_config(json.loads(json.dumps(checkpoint.config)))
        found = []
        for member in theirs.quant_description["config_groups"].values():
            weights = QuantizationArgs.model_validate(member["weights"])
            inputs = member["input_activations"]
            given = None if inputs is None else QuantizationArgs.model_validate(inputs)
            found.append(theirs._detect_quant_type(weights, given, member.get("format")))
        return found


def decide(chip: str) -> dict[str, Any]:
    """{"owners": {checkpoint: owner}, "schemes": {checkpoint: vllm-ascend's schemes}, "initialized": ...}."""
    import torch

    deciders = Deciders(chip)
    owners = {}
    for checkpoint in TABLE:
        with tempfile.TemporaryDirectory() as folder:
            owners[checkpoint.name] = deciders.owner(checkpoint, Path(folder))
    schemes = {
        checkpoint.name: deciders.schemes(checkpoint)
        for checkpoint in TABLE
        if owners[checkpoint.name] == OWNERS["V"]
        and (checkpoint.config or {}).get("quant_method") == "compressed-tensors"
    }
    from vllm_npu_quant.ascend.host import chip as chip_of_host

    return {
        "owners": owners,
        "schemes": schemes,
        "chip": chip_of_host(),
        "initialized": torch.npu.is_initialized(),
    }
