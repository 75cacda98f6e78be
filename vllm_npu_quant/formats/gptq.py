# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints (``quant_method: gptq``) of AutoGPTQ, GPTQModel, optimum and AutoRound.

2, 3, 4 and 8 bits, symmetric or not, per group or channel, zero points stored minus one (``checkpoint_format: gptq``, the
default) or as they are (``gptq_v2``), with or without activation order (``desc_act``). ``dynamic`` changes the scheme of
layers by regular expressions: "-:" excludes a layer, "+:" or nothing in front overrides fields; the first that matches
at the start of a layer's name counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, StrictStr, model_validator

from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError
from vllm_npu_quant.formats.common import FLOAT_BY_CONVENTION, MAX_RULES, Bool, ConfigModel, Int, Work
from vllm_npu_quant.formats.declaration import Format, Sample
from vllm_npu_quant.formats.described import Described, StoredTensor
from vllm_npu_quant.formats.experts import split_expert
from vllm_npu_quant.formats.packed import (
    BITS,
    FLOAT_BITS,
    MAX_PROBLEMS,
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
from vllm_npu_quant.formats.patterns import PatternSet
from vllm_npu_quant.formats.samples import sample_tensors
from vllm_npu_quant.spec import LayerSpec, Layout

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = ["FORMAT", "GptqConfig", "compare_files", "flat_names", "read"]

#: (zero points as they are, activation order) -> layout.
_LAYOUTS = {
    (False, False): Layout.GPTQ,
    (True, False): Layout.GPTQ_V2,
    (False, True): Layout.GPTQ_ACT_ORDER,
    (True, True): Layout.GPTQ_V2_ACT_ORDER,
}
_IN_ORDER: dict[Layout | str, Layout] = {
    Layout.GPTQ_ACT_ORDER: Layout.GPTQ,
    Layout.GPTQ_V2_ACT_ORDER: Layout.GPTQ_V2,
}

#: Entries of a g_idx that is read. The largest known layers have 53,248 inputs.
_MAX_G_IDX = 1 << 20

#: The same config in a file of its own, and the values that the two must agree on.
_FILE = "quantize_config.json"
_COMPARED = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")


class Override(ConfigModel):
    """Fields that ``dynamic`` changes for a layer. Others record how the producer quantized it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bits: Int | None = None
    group_size: GroupSize | None = None
    sym: Bool | None = None
    desc_act: Bool | None = None


class GptqConfig(ConfigModel):
    """``quantization_config`` of a GPTQ checkpoint, or its quantize_config.json. Unknown fields are accepted and
    reported."""

    model_config = ConfigDict(extra="allow", frozen=True)

    quant_method: StrictStr = "gptq"
    bits: Int
    group_size: GroupSize
    desc_act: Bool = False
    static_groups: Bool = False
    sym: Bool | None = None
    checkpoint_format: StrictStr = "gptq"
    is_marlin_format: Bool | None = None
    pack_dtype: StrictStr = "int32"
    data_type: StrictStr = "int"
    lm_head: Bool = False
    dynamic: dict[StrictStr, Override] = Field(default_factory=dict, max_length=MAX_RULES)
    modules_in_block_to_quantize: tuple[Any, ...] | None = Field(default=None, max_length=MAX_RULES)
    block_name_to_quantize: Any = None
    rotation: Any = None
    adapter: Any = None

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, config: Any) -> Any:
        return _one_spelling(config)

    def spec(self, override: Override | None = None) -> LayerSpec:
        """The spec of a quantized layer."""
        change = override or Override()
        bits = self.bits if change.bits is None else change.bits
        group = self.group_size if change.group_size is None else change.group_size
        sym = self.sym if change.sym is None else change.sym
        desc_act = self.desc_act if change.desc_act is None else change.desc_act
        # If the producer fixed the groups before reordering, or there is one group only, g_idx is in order.
        act_order = desc_act and not self.static_groups and group > 0
        layout = _LAYOUTS[self.checkpoint_format == "gptq_v2", act_order]
        return integer_spec("GPTQ", layout, bits, group, bool(sym))


def _one_spelling(config: Any) -> dict[str, Any]:
    return merge_spellings(
        config,
        {"bits": ("w_bit",), "group_size": ("q_group_size",), "checkpoint_format": ("format",)},
        lower=("checkpoint_format", "pack_dtype", "data_type"),
    )


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = "config.json",
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Describe the layers of a GPTQ checkpoint. Raises nothing: problems are in ``findings``.

    Args:
        config: config.json's ``quantization_config``, or the object of quantize_config.json.
        tensors: the stored tensors, by name.
        source: the file that holds ``config``.
        checkpoint: gives the values of g_idx, and quantize_config.json beside config.json, which is compared.
    """
    described, found = Described("gptq", source), FindingLimit()
    parsed = parse_config(GptqConfig, config, source, found)
    if parsed is not None:
        keys = [key[2:] if key[:2] in ("-:", "+:") else key for key in parsed.dynamic]
        patterns = PatternSet(keys, file=source, where="dynamic")
        problems = [*islice(_problems(parsed, source), MAX_PROBLEMS), *patterns.findings]
        found.extend(problems)
        if not problems:
            values = checkpoint if checkpoint is not None and checkpoint.has_values else None
            order = _without_order(values, source, found)
            index_packed(described, tensors, _configured(parsed, patterns, source), found, adjust=order)
    if checkpoint is not None and source == "config.json" and _FILE in checkpoint.names:
        try:
            found.extend(compare_files(config, checkpoint.read_json(_FILE), (source, _FILE)))
        except NpuQuantError as error:
            found.extend(error.findings)
    described.findings = tuple(found.close())
    return described


def _configured(config: GptqConfig, patterns: PatternSet, source: str) -> Callable[[str], Configured]:
    spec = config.spec()
    overrides = [
        None if key.startswith("-:") or (override.bits or 0) >= FLOAT_BITS else override
        for key, override in config.dynamic.items()
    ]
    modules = ModuleNames(flat_names(config.modules_in_block_to_quantize or ()), source)

    def configured(layer: str) -> Configured:
        hit = patterns.first(layer)
        if hit is not None:
            override = overrides[hit]
            if override is None:
                return Configured(spec, excluded=True, explicit=True)
            return Configured(config.spec(override))
        last = layer.rpartition(".")[2]
        if last == "lm_head":
            return Configured(spec, excluded=not config.lm_head)
        listed = not modules or modules.match_anywhere(layer) or modules.match_components(layer)
        return Configured(spec, excluded=last in FLOAT_BY_CONVENTION or not listed)

    return configured


def _without_order(
    checkpoint: Checkpoint | None, source: str, found: FindingLimit
) -> Callable[[str, LayerSpec, Mapping[str, StoredTensor]], LayerSpec]:
    """Remove activation order from layers whose g_idx is in order: many producers write desc_act true without reordering."""
    work = Work(source)

    def adjust(layer: str, spec: LayerSpec, named: Mapping[str, StoredTensor]) -> LayerSpec:
        in_order = _IN_ORDER.get(spec.layout)
        weight = spec.weight
        if in_order is None or weight is None or checkpoint is None or "g_idx" not in named:
            return spec
        if split_expert(layer) is not None:
            return spec  # all experts have one layout
        entries = prod(named["g_idx"].shape)
        if entries > _MAX_G_IDX:
            found.add(_long_g_idx(layer, named["g_idx"].file, entries))
            return spec
        work.spend(entries // 8)
        if _is_in_order(checkpoint, f"{layer}.g_idx", weight.group_size):
            return LayerSpec(spec.scheme, in_order, weight)
        return spec

    return adjust


def _is_in_order(checkpoint: Checkpoint, name: str, group_size: int) -> bool:
    """Whether a g_idx is 0, ..., 0, 1, ..., 1, ...; it is read up to the first difference."""
    start = 0
    try:
        for block in checkpoint.blocks(name, 1 << 16):
            if block.tolist() != [number // group_size for number in range(start, start + block.size)]:
                return False
            start += block.size
    except NpuQuantError:
        return False  # the check of the files reports their problems
    return True


def _long_g_idx(layer: str, file: str, entries: int) -> Finding:
    return Finding(
        "operator-limit",
        "g_idx has more entries than any layer has inputs, and is not read",
        layer=layer,
        file=file,
        expected=f"at most {_MAX_G_IDX:,}",
        found=f"{entries:,}",
        fix="check that the config and the weights belong together",
    )


def flat_names(names: Iterable[Any]) -> Iterator[str]:
    """The texts in a list of lists of texts."""
    for name in names:
        if isinstance(name, str):
            yield name
        elif isinstance(name, (list, tuple)):
            yield from (inner for inner in name if isinstance(inner, str))


def compare_files(config: Mapping[str, Any], other: Mapping[str, Any], files: tuple[str, str]) -> list[Finding]:
    """Findings if config.json and quantize_config.json of one checkpoint disagree about the stored numbers."""
    try:
        both = [_one_spelling(each) for each in (config, other)]
    except ValueError:
        return []  # validation reports it
    return [
        Finding(
            "contradictory-evidence",
            f"two files of the checkpoint disagree about {name}",
            file=", ".join(files),
            expected="one value",
            found=f"{both[0][name]!s:.40} and {both[1][name]!s:.40}",
            fix=f"correct or remove {files[1]}",
        )
        for name in _COMPARED
        if both[0].get(name) is not None and both[1].get(name) is not None and both[0][name] != both[1][name]
    ]


def _problems(config: GptqConfig, source: str) -> Iterator[Finding]:
    bits_of = [("", config.bits), *((f"dynamic {key[:60]!r}: ", rule.bits) for key, rule in config.dynamic.items())]
    for where, bits in bits_of:
        if bits is not None and bits not in BITS and not (where and bits >= FLOAT_BITS):
            yield unsupported(f"{where}GPTQ with {bits} bits", "2, 3, 4 or 8 bits", f"bits: {bits}", source)
    if config.is_marlin_format or config.checkpoint_format not in ("gptq", "gptq_v2"):
        value = "marlin" if config.is_marlin_format else config.checkpoint_format
        expected = "checkpoint_format: gptq or gptq_v2"
        yield unsupported(f"checkpoint_format {value[:40]!r}", expected, value, source)
    for name, expected in (("pack_dtype", "int32"), ("data_type", "int")):
        value = getattr(config, name)
        if value != expected:
            yield unsupported(f"GPTQ with {name} {value[:40]!r}", f"{name}: {expected}", value, source)
    if config.rotation:
        yield unsupported("GPTQModel's rotation of activations", "no rotation", config.rotation, source)
    if config.adapter:
        yield unsupported("an adapter beside GPTQ weights", "no adapter", "adapter", source)


def _samples() -> Iterator[Sample]:
    plain = {"quant_method": "gptq", "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"}
    schemes: list[tuple[str, dict[str, Any]]] = [
        *((f"{bits} bits, symmetric", {"bits": bits, "sym": True}) for bits in BITS),
        ("4 bits, zero points", {"bits": 4, "sym": False}),
        ("4 bits, desc_act", {"bits": 4, "sym": True, "desc_act": True}),
        ("4 bits, gptq_v2", {"bits": 4, "sym": True, "checkpoint_format": "gptq_v2"}),
        ("4 bits, marlin", {"bits": 4, "sym": True, "checkpoint_format": "marlin"}),
    ]
    for label, fields in schemes:
        config = {**plain, **fields}
        yield Sample(label, config, sample_tensors(GptqConfig.model_validate(config).spec()))


def _has_fields(config: Mapping[str, Any]) -> bool:
    marks = {"desc_act", "damp_percent", "true_sequential", "static_groups", "checkpoint_format"}
    return not marks.isdisjoint(config) and not {"bits", "w_bit"}.isdisjoint(config)


FORMAT = Format(
    name="gptq",
    read=read,
    method_name="npu_gptq",
    quant_methods=frozenset({"gptq", "auto-gptq", "autogptq", "gptqmodel", "gptq-marlin"}),
    has_fields=_has_fields,
    file_beside=lambda names: _FILE if _FILE in names else None,
    producer=producer_of,
    samples=_samples,
)
