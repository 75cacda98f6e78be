# SPDX-License-Identifier: Apache-2.0
"""Float checkpoints whose Linear layers and experts are rounded while they load, if the user asks for it.

``quantization="npu_w8a8"`` is ModelSlim's W8A8_DYNAMIC, ``"npu_w8a16"`` and ``"npu_w4a16"`` are weight-only. Nothing in the
checkpoint names them. Options have compressed-tensors' names, in ``hf_overrides={"quantization_config": {"quant_method":
"npu_w8a8", "ignore": [...]}}``; vLLM's ``--quantization-config`` brings ``ignore`` as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from vllm_npu_quant.errors import Finding, FindingLimit, Severity
from vllm_npu_quant.formats.common import FLOAT_DTYPES, parse_config
from vllm_npu_quant.formats.compressed_tensors import Match, Targets
from vllm_npu_quant.formats.declaration import Format, Sample
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.index import index_by_rules, is_embedding, stored_layers_of
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, WeightSpec

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = ["FORMATS"]

_PER_TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN)
#: Inputs that share a scale of a 4-bit weight, unless the user gives another number.
_GROUP_SIZE = 64

#: Layers that stay float: heads, routers, the towers of multimodal models, and the weight that latent attention takes apart.
_FLOAT_PARTS = frozenset({"visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector"})
_FLOAT_LAYERS = frozenset(
    {"lm_head", "score", "gate", "router", "wg", "shared_expert_gate", "kv_b_proj", "embed_out", "classifier"}
)


class _Options(BaseModel):
    """The options; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: StrictStr = ""
    ignore: tuple[StrictStr, ...] = Field(default=(), max_length=100_000)


class _GroupOptions(_Options):
    group_size: StrictInt = Field(default=_GROUP_SIZE, ge=32, le=1024, multiple_of=32)


def _spec(name: str, group_size: int) -> LayerSpec:
    if name == "w8a8":
        return LayerSpec("W8A8_DYNAMIC", Layout.ROUNDED, WeightSpec(8), _PER_TOKEN)
    if name == "w8a16":
        return LayerSpec("W8A16", Layout.ROUNDED, WeightSpec(8))
    weight = WeightSpec(4, granularity=Granularity.GROUP, group_size=group_size)
    return LayerSpec("W4A16", Layout.ROUNDED_PAIRS, weight)


def _read(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe how the layers of a float checkpoint are received. Raises nothing: problems are in ``findings``.

    Args:
        name: "w8a8", "w8a16" or "w4a16".
        config: the options.
        tensors: the stored tensors by name.
        source: for findings.
        checkpoint: not used.
    """
    found = FindingLimit()
    described = Described(f"npu-{name}", source)
    options = parse_config(_GroupOptions if name == "w4a16" else _Options, config, source, found)
    if options is not None:
        targets = Targets([["Linear"]], options.ignore, source)
        found.extend(targets.findings)
        spec = _spec(name, getattr(options, "group_size", 0))
        rounded: list[str] = []

        def decide(layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
            weight = named.get("weight")
            if weight is None:
                return None
            if weight.dtype not in FLOAT_DTYPES or len(weight.shape) != 2 or _stays_float(layer):
                return FLOAT_ENTRY
            unpaired = spec.layout is Layout.ROUNDED_PAIRS and weight.shape[1] % 2
            if unpaired or targets.match(layer)[1] is Match.IGNORED:
                return FLOAT_ENTRY
            rounded.append(layer)
            return LayerEntry(spec, frozenset(named) & {"bias"})

        index_by_rules(described, stored_layers_of(tensors), decide, (), found)
        found.add(_told(described, spec, rounded, options.ignore))
    described.findings = tuple(found.close())
    return described


def _stays_float(layer: str) -> bool:
    parts = layer.split(".")
    return is_embedding(layer) or parts[-1] in _FLOAT_LAYERS or not _FLOAT_PARTS.isdisjoint(parts)


def _told(described: Described, spec: LayerSpec, rounded: list[str], ignore: tuple[str, ...]) -> Finding:
    """The finding about the rounded layers and the experts that stay float; an error if there is nothing to round."""
    if not rounded:
        return Finding(
            "unsupported-scheme",
            "no Linear layer of this checkpoint can be rounded",
            file=described.source,
            expected="float weights with two dimensions",
            found=f"ignore: {', '.join(ignore)[:200]}" if ignore else "none",
            fix="leave quantization= out",
        )
    message = f"float weights are rounded to nearest as {spec.scheme} while they load, without calibration"
    if described.fused_floats:
        message += f"; the experts of {len(described.fused_floats)} layers are stored as one tensor and stay float"
    return Finding(
        "requantized",
        message,
        file=described.source,
        found=f"{len(rounded):,} layers",
        fix="quantize the checkpoint with msModelSlim or llm-compressor for a smaller error",
        severity=Severity.INFO,
    )


def _samples(name: str) -> Iterator[Sample]:
    spec = _spec(name, _GROUP_SIZE)
    yield Sample(spec.scheme, {"quant_method": f"npu_{name}"}, sample_tensors(spec))


def _format(name: str, title: str) -> Format:
    return Format(
        name=f"npu-{name}",
        title=title,
        read=partial(_read, name),
        method_name=f"npu_{name}",
        quant_methods=frozenset({f"npu-{name}"}),
        rounds=True,
        float_reason="it is a head, a router or an embedding, has an odd number of inputs, or is ignored",
        samples=partial(_samples, name),
    )


FORMATS = (
    _format("w8a8", "float, rounded to W8A8 while loading"),
    _format("w8a16", "float, rounded to W8A16 while loading"),
    _format("w4a16", "float, rounded to W4A16 while loading"),
)
