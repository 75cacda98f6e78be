# SPDX-License-Identifier: Apache-2.0
"""``matrix``: format x scheme x layer kind x chip, from the formats themselves, the dispatch table and the operator rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_npu_quant.checkpoint import TensorInfo
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.open import build_format
from vllm_npu_quant.inspection.chips import CHIPS, support
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.serving.decide import Host, decide
from vllm_npu_quant.spec import LayerKind

__all__ = ["MatrixRow", "matrix"]

_LAYER = "model.layers.0.mlp.down_proj"
_EXPERTS = "model.layers.0.mlp.experts"


@dataclass(frozen=True)
class MatrixRow:
    """One scheme of one format.

    Attributes:
        format: the format. scheme: its own name for the scheme.
        numbers: what it computes with, in words.
        methods: layer kind -> the NPU method class; empty where the kind is not served.
        chips: chip -> "yes", "linear" or "experts" where only these are served, "no", or "?" where the operators' pages that
            were read do not say.
        remark: why it is not served, or what to know of how it is.
    """

    format: str
    scheme: str
    numbers: str
    methods: Mapping[str, str]
    chips: Mapping[str, str]
    remark: str = ""


def matrix() -> tuple[MatrixRow, ...]:
    """Every scheme that a format can name, with what serves it."""
    return tuple(_row(name, label, config) for name, label, config in _samples())


def _row(name: str, label: str, config: Mapping[str, Any]) -> MatrixRow:
    checkpoint: Any = SimpleNamespace(tensors=_FLATQUANT, has_values=False) if "FLATQUANT" in label else None
    built = build_format(name, config, checkpoint, source="config.json")
    errors = [finding for finding in built.findings if finding.severity is Severity.ERROR]
    entry, experts = built.find(_LAYER), built.find_experts(_EXPERTS)
    if errors or entry is None:
        remark = errors[0].message if errors else "not understood"
        return MatrixRow(name, label, "", {}, dict.fromkeys(CHIPS, "no"), remark)
    rows = {}
    for kind in LayerKind:
        spec = experts.gate.spec if kind is LayerKind.FUSED_MOE and experts is not None else entry.spec
        row = decide(kind, spec, Host()).row
        if row is not None and not (kind is LayerKind.FUSED_MOE and spec.layout.value.endswith("act_order")):
            rows[kind] = row
    numbers = decide(LayerKind.LINEAR, entry.spec, Host()).describe().partition(": ")[2]
    methods = {kind.value: row.method_name for kind, row in rows.items()}
    chips = {key: _chip(key, rows) for key in CHIPS}
    remark = "; ".join(dict.fromkeys(row.remark for row in rows.values() if row.remark))
    return MatrixRow(name, label, numbers, methods, chips, remark)


def _chip(key: str, rows: Mapping[LayerKind, dispatch.Row]) -> str:
    answers = {kind: support(CHIPS[key], row).served for kind, row in rows.items()}
    linear = answers.get(LayerKind.LINEAR, False)
    experts = answers.get(LayerKind.FUSED_MOE, False)
    if LayerKind.FUSED_MOE not in rows or linear == experts:
        return _word(linear)
    if linear and not experts:
        return "linear" if experts is False else "linear, experts ?"
    if experts and not linear:
        return "experts" if linear is False else "experts, linear ?"
    return "?" if None in (linear, experts) else "no"


def _word(served: bool | None) -> str:
    return "?" if served is None else "yes" if served else "no"


def _samples() -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """(format, scheme, a config that names it) for everything that the formats' producers write."""
    yield from (("modelslim", kind, config) for kind, config in _modelslim())
    for label, weights, inputs, layout in _COMPRESSED_TENSORS:
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "config_groups": {"group_0": group},
        }
        yield "compressed-tensors", label, config
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    yield "fp8", "block 128 x 128", block
    yield "fp8", "per tensor, dynamic", {"quant_method": "fp8", "activation_scheme": "dynamic"}
    yield "fp8", "per tensor, static", {"quant_method": "fp8", "activation_scheme": "static"}
    awq: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    yield "awq", "gemm, zero points", {**awq, "zero_point": True}
    yield "awq", "gemm, symmetric", {**awq, "zero_point": False}
    yield "awq", "gemv", {**awq, "zero_point": True, "version": "gemv"}
    gptq: dict[str, Any] = {"quant_method": "gptq", "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"}
    for bits in (2, 3, 4, 8):
        yield "gptq", f"{bits} bits, symmetric", {**gptq, "bits": bits, "sym": True}
    yield "gptq", "4 bits, zero points", {**gptq, "bits": 4, "sym": False}
    yield "gptq", "4 bits, desc_act", {**gptq, "bits": 4, "sym": True, "desc_act": True}
    yield "gptq", "4 bits, gptq_v2", {**gptq, "bits": 4, "sym": True, "checkpoint_format": "gptq_v2"}
    yield "gptq", "4 bits, marlin", {**gptq, "bits": 4, "sym": True, "checkpoint_format": "marlin"}
    rounded: dict[str, Any] = {"quant_method": "auto-round", "group_size": 128, "data_type": "int"}
    for bits in (2, 3, 4, 8):
        config = {**rounded, "bits": bits, "sym": True, "packing_format": "auto_round:auto_gptq"}
        yield "auto-round", f"{bits} bits, auto_gptq packing", config
    config = {**rounded, "bits": 4, "sym": False, "packing_format": "auto_round:auto_awq"}
    yield "auto-round", "4 bits, auto_awq packing", config
    fp8 = {**rounded, "bits": 8, "sym": True, "data_type": "fp", "act_bits": 8, "packing_format": "auto_round:fp8"}
    yield "auto-round", "FP8 per channel", {**fp8, "group_size": -1}
    yield "auto-round", "FP8 per block", {**fp8, "group_size": [128, 128]}


def _weights(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": True, "dynamic": False, **more}


def _inputs(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": True, "dynamic": True, **more}


_FP8 = {"type": "float"}
_COMPRESSED_TENSORS: tuple[tuple[str, dict[str, Any], dict[str, Any] | None, str], ...] = (
    ("W8A8 dynamic", _weights(8, "channel"), _inputs(8, "token"), "int-quantized"),
    ("W8A8 dynamic, asymmetric", _weights(8, "channel"), _inputs(8, "token", symmetric=False), "int-quantized"),
    ("W8A8 static", _weights(8, "channel"), _inputs(8, "tensor", dynamic=False), "int-quantized"),
    (
        "W8A8 static, asymmetric",
        _weights(8, "channel"),
        _inputs(8, "tensor", dynamic=False, symmetric=False),
        "int-quantized",
    ),
    ("W8A16 channel", _weights(8, "channel"), None, "pack-quantized"),
    ("W8A16 group", _weights(8, "group", group_size=128), None, "pack-quantized"),
    ("W4A16 channel", _weights(4, "channel"), None, "pack-quantized"),
    ("W4A16 group", _weights(4, "group", group_size=128), None, "pack-quantized"),
    ("W4A16 group, asymmetric", _weights(4, "group", group_size=128, symmetric=False), None, "pack-quantized"),
    ("W4A8 channel", _weights(4, "channel"), _inputs(8, "token"), "int-quantized"),
    ("W4A8 group", _weights(4, "group", group_size=128), _inputs(8, "token"), "int-quantized"),
    ("W4A4 channel", _weights(4, "channel"), _inputs(4, "token"), "int-quantized"),
    ("FP8 dynamic", _weights(8, "channel", **_FP8), _inputs(8, "token", **_FP8), "float-quantized"),
    ("FP8 static", _weights(8, "tensor", **_FP8), _inputs(8, "tensor", dynamic=False, **_FP8), "float-quantized"),
    (
        "FP8 block",
        _weights(8, "block", block_structure=[128, 128], **_FP8),
        _inputs(8, "group", group_size=128, **_FP8),
        "float-quantized",
    ),
    ("MXFP4", _weights(4, "group", group_size=32, **_FP8), None, "mxfp4-pack-quantized"),
    ("NVFP4", _weights(4, "tensor_group", group_size=16, **_FP8), None, "nvfp4-pack-quantized"),
)

#: FlatQuant's sizes are only in the weight files: those of a small layer.
_FLATQUANT = {
    f"{_LAYER}.{name}": TensorInfo(f"{_LAYER}.{name}", dtype, shape, "model.safetensors", 0, 0)
    for name, dtype, shape in (
        ("weight", "I8", (256, 256)),
        ("weight_scale", "F32", (256, 1)),
        ("weight_offset", "F32", (256, 1)),
        ("left_trans", "F32", (16, 16)),
        ("right_trans", "F32", (16, 16)),
        ("clip_ratio", "F32", (1,)),
    )
}

#: Types of msModelSlim that are not in the table of those that are served; producers write them.
_MODELSLIM_MORE = ("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "W8A8SC", "FAQuant")


def _modelslim() -> Iterable[tuple[str, Mapping[str, Any]]]:
    from vllm_npu_quant.formats.modelslim import TYPES
    from vllm_npu_quant.layouts.tables import LAYOUTS

    for kind, meaning in TYPES.items():
        names = {tensor.name for tensor in LAYOUTS[meaning.layout].tensors if not tensor.optional} | meaning.needs
        if kind == "W4A4_FLATQUANT_DYNAMIC":
            names = {name.rpartition(".")[2] for name in _FLATQUANT}
        description = {"version": "1.0.0", **{f"{_LAYER}.{name}": kind for name in names}}
        if kind == "W4A4_FLATQUANT_DYNAMIC":
            yield kind, description
            continue
        for projection in ("gate_proj", "up_proj", "down_proj"):
            description |= {f"{_EXPERTS}.0.{projection}.{name}": kind for name in names}
        yield kind, description
    for kind in _MODELSLIM_MORE:
        yield kind, {"version": "1.0.0", f"{_LAYER}.weight": kind, f"{_LAYER}.weight_scale": kind}
