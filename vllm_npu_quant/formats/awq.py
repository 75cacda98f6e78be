# SPDX-License-Identifier: Apache-2.0
"""AWQ checkpoints (``quant_method: awq``) of AutoAWQ, GPTQModel and AutoRound.

Spellings: ``w_bit`` and ``q_group_size`` (AutoAWQ's own quant_config.json) or ``bits`` and ``group_size``; ``version`` or
``format`` and ``checkpoint_format`` (GPTQModel); ``modules_to_not_convert`` as null, as parts of names ("mlp.gate"), or as
full names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, StrictStr, model_validator

from vllm_npu_quant.errors import Finding, FindingLimit
from vllm_npu_quant.formats.common import FLOAT_BY_CONVENTION, MAX_RULES, Bool, ConfigModel, Int
from vllm_npu_quant.formats.declaration import Format, Sample
from vllm_npu_quant.formats.described import Described, StoredTensor
from vllm_npu_quant.formats.packed import (
    Configured,
    GroupSize,
    ModuleNames,
    index_packed,
    integer_spec,
    merge_spellings,
    parse_config,
    producer_of,
    unsupported,
)
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.spec import LayerSpec, Layout

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = ["FORMAT", "AwqConfig", "read"]


class AwqConfig(ConfigModel):
    """``quantization_config`` of an AWQ checkpoint. Unknown fields are accepted and reported."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "awq"
    bits: Int
    group_size: GroupSize
    zero_point: Bool | None = None
    sym: Bool | None = None
    version: StrictStr = "gemm"
    modules_to_not_convert: tuple[StrictStr, ...] | None = Field(default=None, max_length=MAX_RULES)
    data_type: StrictStr = "int"
    pack_dtype: StrictStr = "int32"

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, config: Any) -> Any:
        return merge_spellings(
            config,
            {"bits": ("w_bit",), "group_size": ("q_group_size",), "version": ("format", "checkpoint_format")},
            lower=("version", "pack_dtype", "data_type"),
        )

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 8."""
        return not self.zero_point if self.zero_point is not None else bool(self.sym)

    def spec(self) -> LayerSpec:
        """The spec of the quantized layers."""
        return integer_spec("AWQ", Layout.AWQ_GEMM, self.bits, self.group_size, self.symmetric)


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe the layers of an AWQ checkpoint. Raises nothing: problems are in ``findings``.

    Args:
        config: config.json's ``quantization_config``, or the object of quant_config.json.
        tensors: the stored tensors, by name.
        source: the file that holds ``config``.
        checkpoint: not used.
    """
    described, found = Described("awq", source), FindingLimit()
    parsed = parse_config(AwqConfig, config, source, found)
    if parsed is not None:
        problems = list(_problems(parsed, source))
        found.extend(problems)
        if not problems:
            index_packed(described, tensors, _configured(parsed, source), found)
    described.findings = tuple(found.close())
    return described


def _configured(config: AwqConfig, source: str) -> Callable[[str], Configured]:
    spec = config.spec()
    names = ModuleNames(config.modules_to_not_convert or (), source)

    def configured(layer: str) -> Configured:
        explicit = names.match_components(layer)
        by_default = layer.rpartition(".")[2] in FLOAT_BY_CONVENTION or names.match_anywhere(layer)
        return Configured(spec, excluded=explicit or by_default, explicit=explicit)

    return configured


def _problems(config: AwqConfig, source: str) -> Iterator[Finding]:
    if config.bits != 4:
        yield unsupported(f"AWQ with {config.bits} bits", "4 bits", f"bits: {config.bits}", source)
    for name, expected in (("version", "gemm"), ("pack_dtype", "int32"), ("data_type", "int")):
        value = getattr(config, name)
        if value != expected:
            yield unsupported(f"AWQ with {name} {value[:40]!r}", f"{name}: {expected}", value, source)


def _samples() -> Iterator[Sample]:
    config: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    asymmetric, symmetric = {**config, "zero_point": True}, {**config, "zero_point": False}
    spec = AwqConfig.model_validate(asymmetric).spec()
    yield Sample("gemm, zero points", asymmetric, sample_tensors(spec, ["qzeros"]))
    yield Sample("gemm, symmetric", symmetric, sample_tensors(spec))
    yield Sample("gemv", {**asymmetric, "version": "gemv"}, {})


def _has_fields(config: Mapping[str, Any]) -> bool:
    kernel = str(config.get("version") or "").lower().startswith("gem")  # GEMM, GEMV
    return ("zero_point" in config or kernel) and not {"bits", "w_bit"}.isdisjoint(config)


FORMAT = Format(
    name="awq",
    read=read,
    method_name="npu_awq",
    quant_methods=frozenset({"awq", "auto-awq", "autoawq", "awq-marlin"}),
    has_fields=_has_fields,
    file_beside=lambda names: "quant_config.json" if "quant_config.json" in names else None,
    producer=producer_of,
    samples=_samples,
)
