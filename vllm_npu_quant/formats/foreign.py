# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other producers and runtimes: how they are recognized, what they are, and what their user can do.

Nothing here is served. A format that begins to serve one of them takes its entry away: served formats are asked first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_npu_quant.checkpoint.text import shown, shown_name
from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.declaration import formats, plain_method
from vllm_npu_quant.formats.described import StoredTensor

__all__ = ["FOREIGN", "Foreign", "find_by_tensors", "find_foreign", "foreign_file", "unserved", "unserved_tensor"]

_FLOAT = "serve the BF16 or FP16 model that it was made from"
_EXPORT = f"{_FLOAT}, or export that with msModelSlim, llm-compressor, AutoRound, AutoAWQ or GPTQModel"
_INT8 = f"{_FLOAT}, or export that as W8A8 with msModelSlim or llm-compressor"
_INT4 = f"{_FLOAT}, or a W4A16 export of it: AWQ, GPTQ, or llm-compressor"
_ANY: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Foreign:
    """A kind of checkpoint that is not served.

    Attributes:
        title: the producer, the runtime or the number format, as users know it.
        what: what the weights are.
        methods: spellings of ``quant_method``, in lower case with "-" for "_".
        fix: what the user can do.
        fields: fields of a quantization config, of which one is enough to recognize it without a ``quant_method``.
        tensors: last components of tensor names that no served format has -> their dtypes; empty for any.
        file: the file beside config.json that describes it.
        needs_fp8: whether vLLM's own method calls FP8 operators, which not every platform has.
    """

    title: str
    what: str
    methods: frozenset[str]
    fix: str = _EXPORT
    fields: frozenset[str] = frozenset()
    tensors: Mapping[str, frozenset[str]] = field(default_factory=dict)
    file: str = ""
    needs_fp8: bool = False


def _methods(*names: str) -> frozenset[str]:
    return frozenset(names)


#: Every kind that is known by name. Entries with tensors are recognized by these if no config names them.
FOREIGN: tuple[Foreign, ...] = (
    Foreign(
        "NVFP4",
        "FP4 weights with FP8 scales",
        _methods("nvfp4", "petit-nvfp4"),
        "copy the producer's config.json or hf_quant_config.json (ModelOpt), which say how they are stored, into the folder",
        tensors={"weight_scale_2": _ANY},
    ),
    Foreign(
        "DeepSeek-V4",
        "FP8 weights with power-of-two scales, and experts in FP4",
        _methods("deepseek-v4-fp8"),
        "serve it with vllm-ascend on Ascend 950 (A5), or use an export for Atlas A2 and A3 (msModelSlim W8A8, W4A8)",
        tensors={"scale": frozenset({"F8_E8M0"})},
        needs_fp8=True,
    ),
    Foreign(
        "gpt-oss MXFP4",
        "experts in MXFP4 (blocks and scales of OpenAI's gpt-oss)",
        _methods("mxfp4", "gpt-oss-mxfp4"),
        "use a BF16 copy of the model (such as unsloth/gpt-oss-120b-BF16), which vllm-ascend serves unquantized",
        tensors={
            name: frozenset({"U8"})
            for name in ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
        },
    ),
    Foreign(
        "AMD Quark",
        "FP8, MXFP4 or int8 weights for AMD GPUs",
        _methods("quark"),
        fields=frozenset({"global_quant_config", "layer_quant_config"}),
        needs_fp8=True,
    ),
    Foreign(
        "bitsandbytes",
        "NF4, FP4 or LLM.int8 weights, which only its own GPU kernels read",
        _methods("bitsandbytes", "bnb", "bitsandbytes-4bit", "bitsandbytes-8bit"),
        "serve the BF16 model that it was made from (the name without -bnb-4bit), or an AWQ or GPTQ export of it",
        fields=frozenset({"load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"}),
        tensors={"absmax": _ANY, "SCB": _ANY, "quant_map": _ANY, "bitsandbytes__nf4": _ANY, "bitsandbytes__fp4": _ANY},
    ),
    Foreign(
        "MLX",
        "weights of Apple's MLX: integers in U32, with scales and biases",
        _methods("mlx", "mlx-lm"),
        f"{_INT4}: MLX conversions are for Apple hardware",
        tensors={"biases": _ANY, "weight": frozenset({"U32"})},
    ),
    Foreign(
        "Mistral's consolidated format",
        "consolidated.safetensors with params.json, under Mistral's own names",
        _methods("mistral"),
        "use a release of the model in the Hugging Face format (config.json, model*.safetensors)",
        fields=frozenset({"qformat_weight", "qscheme_act"}),
        tensors={"qscale_weight": _ANY, "qscale_act": _ANY},
    ),
    Foreign("torchao", "tensors of PyTorch's torchao", _methods("torchao", "torch-ao")),
    Foreign("HQQ", "half-quadratic quantization", _methods("hqq", "hqq-marlin"), _INT4, tensors={"W_q": _ANY}),
    Foreign("AQLM", "codebooks for groups of weights", _methods("aqlm"), _INT4, tensors={"codebooks": _ANY}),
    Foreign("SpQR", "sparse outliers beside few bits", _methods("spqr"), _INT4),
    Foreign(
        "VPTQ", "vector-quantized weights", _methods("vptq"), _INT4, tensors={"centroids": _ANY, "res_centroids": _ANY}
    ),
    Foreign("QuIP#", "lattice codebooks", _methods("quip", "quip-sharp", "quip#"), _INT4, tensors={"Qidxs": _ANY}),
    Foreign(
        "ExLlamaV2 (EXL2)",
        "mixed 2 to 8 bits for ExLlamaV2",
        _methods("exl2", "exllamav2"),
        _INT4,
        tensors={"q_weight": _ANY, "q_invperm": _ANY},
    ),
    Foreign("ExLlamaV3 (EXL3)", "trellis codes for ExLlamaV3", _methods("exl3"), _INT4, tensors={"trellis": _ANY}),
    Foreign("EETQ", "int8 weights for EETQ's GPU kernels", _methods("eetq"), _INT8),
    Foreign("Quanto", "tensors of Hugging Face's optimum-quanto", _methods("quanto"), tensors={"_data": _ANY}),
    Foreign("HIGGS", "Hadamard-rotated grids for FLUTE's GPU kernels", _methods("higgs"), _INT4),
    Foreign("FP-Quant", "MXFP4 or NVFP4 with rotations", _methods("fp-quant"), needs_fp8=True),
    Foreign("SINQ", "few bits with two scales per matrix", _methods("sinq"), _INT4),
    Foreign("QQQ", "W4A8 for QQQ's GPU kernels", _methods("qqq"), _INT8),
    Foreign("BitNet", "ternary weights", _methods("bitnet", "bitblas", "gptq-bitblas"), _INT4),
    Foreign(
        "Marlin",
        "4-bit weights in the layout of Marlin's GPU kernels",
        _methods("marlin", "gptq-marlin-24", "marlin-24"),
        "use the AWQ or GPTQ checkpoint that it was converted from",
    ),
    Foreign("SqueezeLLM", "lookup tables and sparse outliers", _methods("squeezellm"), _INT4),
    Foreign("DeepSpeed FP", "FP6 or FP8 of DeepSpeed", _methods("deepspeedfp"), _INT8),
    Foreign(
        "SGLang W8A8 int8",
        "int8 weights with a scale per output, and inputs that are quantized per token",
        _methods("w8a8-int8"),
        "write the config of compressed-tensors W8A8 (format int-quantized) in its place, which has the same tensors; or "
        + _INT8,
    ),
    Foreign(
        "SGLang W8A8 FP8",
        "FP8 weights with a scale per output",
        _methods("w8a8-fp8"),
        "write quant_method fp8 with activation_scheme dynamic in its place, which has the same tensors",
        needs_fp8=True,
    ),
    Foreign("blockwise int8", "int8 weights with a scale per block", _methods("blockwise-int8"), _INT8),
    Foreign("W4AFP8", "int4 weights with FP8 inputs", _methods("w4afp8", "w4a8-awq"), _INT4, needs_fp8=True),
    Foreign(
        "GGUF", "llama.cpp's file format", _methods("gguf"), "use a safetensors export of the model: float, AWQ or GPTQ"
    ),
    Foreign(
        "online quantization",
        "a request to quantize float weights while they are loaded, not a stored format",
        _methods("experts-int8", "online", "rtn", "tpu-int8", "ipex", "neuron-quant", "moe-wna16"),
        "remove quantization_config from config.json if the weights are float; else copy the producer's config",
    ),
)


def find_foreign(config: Mapping[str, Any]) -> Foreign | None:
    """The known kind that a quantization config names, by its quant_method, or by its fields if it has none."""
    method = plain_method(config.get("quant_method"))
    if method:
        return next((one for one in FOREIGN if method in one.methods), None)
    named = {key for key, value in config.items() if value is not None and key != "quant_method"}
    return next((one for one in FOREIGN if not one.fields.isdisjoint(named)), None)


def foreign_file(names: Iterable[str]) -> str | None:
    """The name of a file among these that describes a checkpoint which is not served; None if there is none."""
    names = frozenset(names)
    return next((one.file for one in FOREIGN if one.file in names), None)


def find_by_tensors(tensors: Mapping[str, StoredTensor]) -> tuple[Foreign, str] | None:
    """The known kind that some tensor marks, and that tensor's name. Linear in the tensors."""
    marks = {last: (dtypes, one) for one in FOREIGN for last, dtypes in one.tensors.items()}
    for name, tensor in tensors.items():
        mark = marks.get(name.rpartition(".")[2])
        if mark is not None and (not mark[0] or tensor.dtype in mark[0]):
            return mark[1], name
    return None


def unserved(config: Mapping[str, Any], source: str) -> Finding:
    """The finding for a quantization config that no format serves."""
    method = config.get("quant_method")
    foreign = find_foreign(config)
    if foreign is not None:
        algorithm = _algorithm(config)
        told = f"quant_method: {shown(method)}" if method else f"the fields {', '.join(sorted(map(shown, config))[:6])}"
        return _finding(foreign, source, told + (f", {algorithm}" if algorithm else ""))
    served = sorted({name for one in formats() for name in one.quant_methods})
    return Finding(
        "unknown-scheme",
        "this quantization format is not known, and not served",
        file=source,
        expected="one of " + ", ".join(one.name for one in formats()),
        found=f"quant_method: {shown(method)}",
        nearest=_misspelled(plain_method(method), served),
        fix=_EXPORT,
    )


def unserved_tensor(foreign: Foreign, name: str, tensors: Mapping[str, StoredTensor]) -> Finding:
    """The finding for a checkpoint of a kind that one of its tensors marks, as ``find_by_tensors`` gives them."""
    return _finding(foreign, tensors[name].file, f"{shown_name(name)} {tensors[name].dtype}")


def _finding(foreign: Foreign, source: str, found: str) -> Finding:
    return Finding(
        "unsupported-scheme",
        f"this is a checkpoint of {foreign.title}, which is not served: {foreign.what}",
        file=source,
        expected="one of " + ", ".join(one.name for one in formats()),
        found=found,
        fix=foreign.fix,
    )


def _algorithm(config: Mapping[str, Any]) -> str:
    """ModelOpt's name of its scheme; empty if the config has none."""
    inner = config.get("quantization")
    for holder in (config, inner if isinstance(inner, Mapping) else {}):
        if holder.get("quant_algo"):
            return f"quant_algo: {shown(holder['quant_algo'], 40)}"
    return ""


def _misspelled(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The served names that differ by one edit, or by two from names longer than four; digits do not differ."""
    limit = 1 if len(name) <= 4 else 2
    digits = [char for char in name if char.isdigit()]
    same = [other for other in names if [char for char in other if char.isdigit()] == digits]
    near = sorted((_edits(name[:40], other), other) for other in same)
    return tuple(other for edits, other in near if edits <= limit)[:3]


def _edits(first: str, second: str) -> int:
    """Edit distance; two neighbours that changed places are one edit."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, char in enumerate(first, 1):
        above, row = row, [i]
        for j, other in enumerate(second, 1):
            best = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (char != other))
            if i > 1 and j > 1 and char == second[j - 2] and first[i - 2] == other:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before = above
    return row[-1]
