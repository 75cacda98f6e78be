# SPDX-License-Identifier: Apache-2.0
"""Experts in tensors of all experts: which are served, which are vLLM's, and what is said of all others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.formats.packed_layers import awq_layer, gptq_layer, headers
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats.declaration import require_format
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.resolve import LayerResolver
from vllm_npu_quant.spec import Granularity

MOE = "model.layers.1.mlp.experts"
E, HIDDEN, INNER = 4, 512, 256
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_ARGS = {"num_bits": 8, "type": "float", "symmetric": True}
_GROUP = {
    "targets": ["re:.*experts.*"],
    "weights": {**_ARGS, "strategy": "channel"},
    "input_activations": {**_ARGS, "strategy": "token", "dynamic": True},
}
CT = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": _GROUP}}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


def stack(suffix: str = "_scale_inv", **changes: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stacked tensors with inputs before outputs; ``changes`` replace or add some, None removes one."""
    scales = {"_scale_inv": ((E, 4, 4), (E, 2, 4)), "_scale": ((E, 1, 2 * INNER), (E, 1, HIDDEN))}[suffix]
    tensors: dict[str, Any] = {
        "gate_up_proj": ("F8_E4M3", (E, HIDDEN, 2 * INNER)),
        f"gate_up_proj{suffix}": ("BF16", scales[0]),
        "down_proj": ("F8_E4M3", (E, INNER, HIDDEN)),
        f"down_proj{suffix}": ("BF16", scales[1]),
    } | changes
    return {f"{MOE}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}


def outputs_first(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, (shape[0], *shape[:0:-1])) for name, (dtype, shape) in tensors.items()}


def described(config: dict[str, Any], *tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Described:
    return require_format(config["quant_method"], "").read(config, headers(*tensors))


def errors(found: Described) -> list[tuple[str, str]]:
    return [(finding.code, finding.layer) for finding in found.findings if finding.severity is Severity.ERROR]


SERVED = {
    "blocks, inputs first": (FP8, stack(), Granularity.BLOCK),
    "blocks, outputs first": (FP8, outputs_first(stack()), Granularity.BLOCK),
    "channels, inputs first": (CT, stack("_scale"), Granularity.CHANNEL),
    "channels, outputs first": (CT, outputs_first(stack("_scale")), Granularity.CHANNEL),
}


@pytest.mark.parametrize("case", SERVED)
def test_served(case: str) -> None:
    config, tensors, granularity = SERVED[case]
    found = described(config, tensors)
    assert errors(found) == []
    entry = found.experts[MOE]
    assert (entry.count, entry.stacked) == (E, True)
    assert {part.spec.weight.granularity for part in (entry.gate, entry.up, entry.down)} == {granularity}
    resolved = LayerResolver(found).resolve_experts(MOE)
    assert resolved.w13.spec == resolved.w2.spec == entry.down.spec


#: What is stored beside a config -> codes. One finding for all layers.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blocks that gate and up share": (
        {**FP8, "weight_block_size": [512, 128]},
        stack(gate_up_proj_scale_inv=("BF16", (E, 4, 1)), down_proj_scale_inv=("BF16", (E, 2, 1))),
    ),
    "gate and up of half a block": (
        FP8,
        stack(
            gate_up_proj=("F8_E4M3", (E, HIDDEN, 400)),
            gate_up_proj_scale_inv=("BF16", (E, 4, 4)),
            down_proj=("F8_E4M3", (E, 200, HIDDEN)),
            down_proj_scale_inv=("BF16", (E, 2, 4)),
        ),
    ),
    "other sizes": (FP8, stack(down_proj=("F8_E4M3", (E, INNER, HIDDEN + 128)))),
    "another number of experts": (FP8, stack(down_proj_scale_inv=("BF16", (E - 1, 2, 4)))),
    "no down projection": (FP8, stack(down_proj=None, down_proj_scale_inv=None)),
    "a scale for each expert": (FP8, stack(gate_up_proj_scale_inv=("F32", (E,)))),
    "biases": (FP8, stack(gate_up_proj_bias=("BF16", (E, 2 * INNER)))),
    "integers that the config does not know": (CT | {"config_groups": {}, "ignore": []}, stack("_scale")),
    "packed integers": (GPTQ, {f"{MOE}.{name}_qweight": ("I32", (E, 8, 64)) for name in ("gate_up_proj", "down_proj")}),
    "gpt-oss": (
        FP8,
        {f"{MOE}.{name}_blocks": ("U8", (E, 512, 16, 16)) for name in ("gate_up_proj", "down_proj")}
        | {f"{MOE}.{name}_scales": ("U8", (E, 512, 16)) for name in ("gate_up_proj", "down_proj")},
    ),
    "Step-3.5": (
        FP8,
        {
            f"model.layers.1.mlp.{name}.weight": ("F8_E4M3", (E, 256, 256))
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        | {
            f"model.layers.1.mlp.{name}.weight_scale_inv": ("BF16", (E, 2, 2))
            for name in ("gate_proj", "up_proj", "down_proj")
        },
    ),
    "Granite": (
        CT,
        {f"model.layers.1.mlp.{name}.weight": ("F8_E4M3", (E, 256, 256)) for name in ("input_linear", "output_linear")}
        | {
            f"model.layers.1.mlp.{name}.weight_scale": ("BF16", (E, 256, 1))
            for name in ("input_linear", "output_linear")
        },
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_once_for_all_layers(case: str) -> None:
    config, tensors = REFUSED[case]
    again = {name.replace("layers.1", "layers.2"): tensor for name, tensor in tensors.items()}
    found = described(config, tensors, again)
    assert ("unsupported-scheme", MOE) in errors(found)
    assert [finding.message.endswith("(2 MoE layers)") for finding in found.findings if finding.layer == MOE] == [True]
    assert MOE not in found.experts


def test_wrong_dtypes_are_named() -> None:
    assert errors(described(FP8, stack(gate_up_proj_scale_inv=("I32", (E, 4, 4))))) == [
        ("wrong-dtype", f"{MOE}.0.gate_proj"),
        ("wrong-dtype", f"{MOE}.0.up_proj"),
    ]


FLOATS = {
    "two tensors": {f"{MOE}.gate_up_proj": (E, 512, 512), f"{MOE}.down_proj": (E, 256, 512)},
    "Granite": {
        "model.layers.1.mlp.input_linear.weight": (E, 512, 512),
        "model.layers.1.mlp.output_linear.weight": (E, 512, 256),
    },
    "Step-3.5": {
        "model.layers.1.mlp.gate_proj.weight": (E, 256, 512),
        "model.layers.1.mlp.up_proj.weight": (E, 256, 512),
        "model.layers.1.mlp.down_proj.weight": (E, 512, 256),
    },
}


@pytest.mark.parametrize("case", FLOATS)
@pytest.mark.parametrize(("config", "layer"), [(GPTQ, gptq_layer), (AWQ, awq_layer)], ids=["gptq", "awq"])
def test_float_experts_beside_quantized_layers(case: str, config: dict[str, Any], layer: Any) -> None:
    tensors = {name: ("BF16", shape) for name, shape in FLOATS[case].items()}
    found = described(config, tensors, layer("model.layers.1.self_attn.q_proj"))
    assert errors(found) == []
    assert LayerResolver(found).resolve_experts(MOE).w13.spec.is_float


def test_a_weight_with_a_dimension_too_many_is_no_stack() -> None:
    """Its scale has one row per output, and not one matrix per expert."""
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (2, 16, 64)),
        "model.layers.0.mlp.up_proj.weight_scale": ("BF16", (16, 1)),
    }
    assert "model.layers.0.mlp.experts" not in described(FP8, tensors).fused_floats
    assert errors(described(FP8, tensors)) == []
