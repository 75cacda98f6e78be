# SPDX-License-Identifier: Apache-2.0
"""A format that vllm_npu_quant does not know, in one file: its config, its layout, its reader and its declaration.

docs/extending.md walks through it. ``extend`` is what the entry point names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from vllm_npu_quant.checkpoint import Checkpoint
from vllm_npu_quant.errors import FindingLimit
from vllm_npu_quant.formats.common import MAX_RULES, layer_entry, parse_config
from vllm_npu_quant.formats.declaration import Format, Sample, register_format
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.index import index_layers, stored_layers_of
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.layouts.tables import GROUP, OUT, Axis, Dim, LayoutRow, Role, TensorSpec
from vllm_npu_quant.spec import Granularity, LayerSpec, WeightSpec

#: The layout's name in ``LayerSpec.layout``.
LAYOUT = "nibbles"


class NibblesConfig(BaseModel):
    """``quantization_config`` of a nibbles checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: StrictStr
    inputs_per_step: StrictInt = Field(ge=16, le=65536)
    keep: tuple[StrictStr, ...] = Field(default=(), max_length=MAX_RULES)
    made_by: StrictStr = ""

    def spec(self) -> LayerSpec:
        weight = WeightSpec(4, granularity=Granularity.GROUP, group_size=self.inputs_per_step)
        return LayerSpec("NIBBLES W4A16", LAYOUT, weight)


def to_canonical(tensors: Mapping[str, Any], spec: LayerSpec) -> Any:
    """``w[n, k] = (nibble[n, k] - 8) * step[n, k // group]``; the first of two inputs is in the high nibble.

    Args:
        tensors: codes uint8 [N, K/2], steps float32 [N, G].
    """
    import torch

    from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
    from vllm_npu_quant.layouts.tables import group_size_of

    codes, steps = tensors["codes"], tensors["steps"]

    def rows(start: int, stop: int) -> torch.Tensor:
        part = codes[start:stop]
        return torch.stack((part >> 4, part & 15), dim=-1).flatten(1).view(torch.int8) - 8

    group = group_size_of(spec) if steps.shape[1] > 1 else 0
    return CanonicalLinear(CanonicalWeight(codes.shape[0], 2 * codes.shape[1], rows, steps, None, group, bits=4))


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe a nibbles checkpoint: layers with codes are quantized, unless the config keeps them."""
    found = FindingLimit()
    described = Described("nibbles", source)
    parsed = parse_config(NibblesConfig, config, source, found)
    if parsed is not None:
        spec, keep = parsed.spec(), frozenset(parsed.keep)

        def entry(layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
            if "codes" in named and layer not in keep:
                return layer_entry(layer, spec, named, found)
            return FLOAT_ENTRY if "weight" in named else None

        index_layers(described, stored_layers_of(tensors), entry, found)
    described.findings = tuple(found.close())
    return described


def samples() -> list[Sample]:
    config = {"quant_method": "nibbles", "inputs_per_step": 64}
    return [Sample("4 bits", config, sample_tensors(NibblesConfig(**config).spec()))]


FORMAT = Format(
    name="nibbles",
    read=read,
    method_name="npu_nibbles",
    quant_methods=frozenset({"nibbles"}),
    producer=lambda config: str(config.get("made_by", ""))[:40],
    samples=samples,
    layouts={
        LAYOUT: LayoutRow(
            (
                TensorSpec("codes", ("U8",), (OUT, Dim(Axis.IN, 2)), "uint8"),
                TensorSpec("steps", ("F32", "BF16", "F16"), (OUT, GROUP), "float32", role=Role.SCALE),
            ),
            to_canonical,
        )
    },
)


def extend() -> None:
    """Add the format to vllm_npu_quant."""
    register_format(FORMAT)
