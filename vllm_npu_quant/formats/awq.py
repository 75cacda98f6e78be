# SPDX-License-Identifier: Apache-2.0
"""AWQ checkpoints (``quant_method: awq``) of AutoAWQ, GPTQModel and AutoRound.

Spellings: ``w_bit`` and ``q_group_size`` (AutoAWQ's own quant_config.json) or ``bits`` and ``group_size``; ``version`` or
``format`` and ``checkpoint_format`` (GPTQModel); ``modules_to_not_convert`` as null, as parts of names ("mlp.gate"), or as
full names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.formats.packed import (
    MAX_RULES,
    GroupSize,
    PackedFormat,
    Ruling,
    float_ruling,
    integer_spec,
    is_float_by_convention,
    merge_spellings,
    parse_config,
    refused_value,
)
from vllm_npu_quant.spec import LayerSpec, Layout

#: Entries of modules_to_not_convert that are tried as parts of names, and components of a name that are combined.
_MAX_PARTS = 100
_MAX_COMPONENTS = 24

__all__ = ["AwqConfig", "AwqFormat", "ModuleNames"]


class AwqConfig(BaseModel):
    """``quantization_config`` of an AWQ checkpoint. Fields that producers add are accepted, and reported where they are not
    known."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "awq"
    bits: StrictInt
    group_size: GroupSize
    zero_point: StrictBool | None = None
    sym: StrictBool | None = None
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
        return integer_spec("AWQ", Layout.AWQ_GEMM, self.bits, self.group_size, self.symmetric)


class ModuleNames:
    """``modules_to_not_convert``: names, or parts of names.

    AutoAWQ leaves a layer alone where an entry is anywhere in its name. Taken at its word, "mlp.gate" would also exclude
    ``mlp.gate_proj``. So an entry made of whole components of the name excludes firmly, and one that begins or ends inside
    of a component only where no quantized tensors are stored.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.whole = frozenset(name.strip(".") for name in names if name.strip("."))
        # Long lists are lists of full names, which have the number of a layer among their components.
        parts = sorted(dict.fromkeys(filter(None, names)), key=lambda name: any(map(str.isdigit, name.split("."))))
        self.parts = tuple(parts[:_MAX_PARTS])

    def excludes(self, layer: str) -> bool | None:
        """True for a firm exclusion, False for a part of a component, None for no match."""
        if not self.parts:
            return None
        components = layer.split(".")[:_MAX_COMPONENTS]
        length = len(components)
        for start in range(length):
            for stop in range(start + 1, length + 1):
                if ".".join(components[start:stop]) in self.whole:
                    return True
        return False if any(part in layer for part in self.parts) else None


@dataclass
class AwqFormat(PackedFormat):
    """The layers of an AWQ checkpoint.

    Attributes:
        config: the validated config, without its list of names once the stored layers are known; None where it is not
            valid.
    """

    config: AwqConfig | None = None

    name = "awq"

    def __post_init__(self) -> None:
        self._names: ModuleNames | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": None}

    def ruling(self, layer: str) -> Ruling:
        assert self.config is not None
        if self._names is None:
            self._names = ModuleNames(self.config.modules_to_not_convert or ())
        spec = self.config.spec()
        excluded = self._names.excludes(layer)
        if excluded is not None:
            return float_ruling(spec, firm=excluded)
        if is_float_by_convention(layer):
            return float_ruling(spec)
        return Ruling(spec)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        source: str = "config.json",
        tensors: Mapping[str, StoredTensor] | None = None,
    ) -> AwqFormat:
        """Validate a quantization_config and look up the stored layers.

        Args:
            config: the JSON object.
            source: the file it is in, for messages.
            tensors: dtypes and shapes of the checkpoint's tensors, where they are known.

        Returns:
            The format; ``findings`` holds everything that is wrong. Nothing is raised.
        """
        found = FindingLimit()
        parsed = parse_config(AwqConfig, config, source, found)
        result = cls(source=source, file_tensors=frozenset({"qzeros"}), config=parsed)
        if parsed is not None:
            problems = _problems(parsed, source)
            for finding in problems:
                found.add(finding)
            if tensors is not None and not problems:
                result.index_stored(tensors, found)
                result._names = None
                result.config = parsed.model_copy(update={"modules_to_not_convert": None})
        result.findings = tuple(found.close())
        return result


def _problems(config: AwqConfig, source: str) -> list[Finding]:
    findings = []
    if config.bits != 4:
        findings.append(refused_value(f"AWQ with {config.bits} bits", "4 bits", f"bits: {config.bits}", source))
    for name, expected in (("version", "gemm"), ("pack_dtype", "int32"), ("data_type", "int")):
        value = getattr(config, name)
        if value != expected:
            findings.append(refused_value(f"AWQ with {name} {value[:40]!r}", f"{name}: {expected}", value, source))
    return findings
