# SPDX-License-Identifier: Apache-2.0
"""msModelSlim checkpoints: ``quant_model_description.json`` in every spelling that its releases wrote.

The description gives one type string per tensor. Spellings: v1 (``version``, ``model_quant_type``, ``metadata``,
``group_size``, ``optional``), v0 with ``version``, the old v0 file ``quant_model_description_{type}.json`` without it, and
the same dictionary embedded in config.json as ``quantization_config``. ``model_quant_type`` is not trusted: msModelSlim
writes "FLOAT" there for some fully quantized models, so each tensor's own type decides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr, TypeAdapter, ValidationError

from vllm_npu_quant.checkpoint.text import shown_name
from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity, nearest_names
from vllm_npu_quant.formats.common import FLOAT_DTYPES, ConfigModel, Int, kv_cache_finding, unexpected_tensor
from vllm_npu_quant.formats.declaration import Format, Sample
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.experts import holds_fused_floats, split_expert
from vllm_npu_quant.formats.index import add_layers
from vllm_npu_quant.formats.samples import LAYER, sample_tensors
from vllm_npu_quant.formats.small_floats import MXFP4, MXFP8, block_float_input
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import (
    FLOAT,
    ActivationSpec,
    Granularity,
    LayerSpec,
    Layout,
    NumberKind,
    TransformSpec,
    WeightSpec,
)

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = [
    "DESCRIPTION_FILE",
    "FORMAT",
    "TYPES",
    "description_name",
    "is_description_file",
    "read",
    "vllm_ascend_schemes",
]

DESCRIPTION_FILE = "quant_model_description.json"
_FILE_NAME = re.compile(r"quant_model_description(_[a-z0-9_]{1,40})?\.json")


def is_description_file(name: str) -> bool:
    """Whether a file name is one of the names that msModelSlim gives its description."""
    return _FILE_NAME.fullmatch(name) is not None


def description_name(names: Iterable[str]) -> str | None:
    """The one description file among these file names; None if there is none.

    Raises:
        NpuQuantError: contradictory-evidence if there are several: each would quantize the weights differently.
    """
    found = sorted(name for name in names if is_description_file(name))
    if len(found) > 1:
        raise NpuQuantError(
            [
                Finding(
                    "contradictory-evidence",
                    "the checkpoint holds several ModelSlim descriptions",
                    expected="one quant_model_description*.json",
                    found=", ".join(found),
                    fix="remove the descriptions that do not belong to the weight files",
                )
            ]
        )
    return found[0] if found else None


class DescriptionHeader(ConfigModel):
    """The entries of a description that are not tensors. Fields that later releases add are accepted and ignored."""

    model_config = ConfigDict(extra="allow", frozen=True)

    version: StrictStr | None = None
    model_quant_type: StrictStr | None = None
    group_size: Int = Field(default=0, ge=-1, le=65536)
    metadata: dict[str, Any] | None = None
    optional: dict[str, Any] | None = None
    kv_cache_type: StrictStr | None = None
    kv_quant_type: StrictStr | None = None
    fa_quant_type: StrictStr | None = None
    indexer_quant_type: StrictStr | None = None
    quant_method: StrictStr | None = None


_TENSOR_TYPES = TypeAdapter(dict[StrictStr, StrictStr])


class _RotatedLayers(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    layers: tuple[StrictStr, ...] = ()


class _QuarotMetadata(BaseModel):
    """``metadata.quarot``: the layers whose input is rotated at run time. Their matrices are in no other list."""

    model_config = ConfigDict(extra="allow", frozen=True)

    heads_rotation: _RotatedLayers = _RotatedLayers()
    kronecker_rotation: _RotatedLayers = _RotatedLayers()


_PER_TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN)
_INT4_PER_TOKEN = ActivationSpec(4, dynamic=True, granularity=Granularity.TOKEN)
_FP8_PER_TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN, kind=NumberKind.FLOAT)
_STATIC_INT8 = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False)
_INT8 = WeightSpec(8)
_INT4 = WeightSpec(4)
_FP8 = WeightSpec(8, NumberKind.FLOAT)
_MX8, _MX4 = (block_float_input(NumberKind.MX, bits) for bits in (8, 4))


@dataclass(frozen=True)
class _Type:
    """A type string of the description.

    Attributes:
        layout, weight, activation: those of a layer with scales per channel and an unpacked weight.
        grouped: whether scales may be per group of inputs.
        packed: the layout of 4-bit weights with scales per channel in files that name a version; None for ``layout``.
        needs: optional tensors of the layout that this type requires.
    """

    layout: Layout
    weight: WeightSpec
    activation: ActivationSpec | None = None
    grouped: bool = False
    packed: Layout | None = None
    needs: frozenset[str] = frozenset()


#: The type strings that stand for a quantized Linear or expert. "W8A8_MIX" stores the tensors of both W8A8 and
#: W8A8_DYNAMIC. "W8A8S" is W8A8 of weights that were made sparse.
TYPES: dict[str, _Type] = {
    "W8A8": _Type(Layout.MODELSLIM_STATIC, _INT8, _STATIC_INT8),
    "W8A8S": _Type(Layout.MODELSLIM_STATIC, _INT8, _STATIC_INT8),
    "W8A8_DYNAMIC": _Type(Layout.MODELSLIM_INT, _INT8, _PER_TOKEN, grouped=True),
    "W8A8_MIX": _Type(Layout.MODELSLIM_STATIC, _INT8, _PER_TOKEN, needs=frozenset({"weight_scale", "weight_offset"})),
    "W8A16": _Type(Layout.MODELSLIM_INT, _INT8, grouped=True),
    "W4A16": _Type(Layout.MODELSLIM_INT, _INT4, grouped=True, packed=Layout.MODELSLIM_PACKED_K),
    "W4A8_DYNAMIC": _Type(Layout.MODELSLIM_INT, _INT4, _PER_TOKEN, grouped=True, packed=Layout.MODELSLIM_PACKED_N),
    "W4A4_DYNAMIC": _Type(Layout.MODELSLIM_INT, _INT4, _INT4_PER_TOKEN, grouped=True),
    "W4A4_FLATQUANT_DYNAMIC": _Type(
        Layout.MODELSLIM_INT,
        _INT4,
        _INT4_PER_TOKEN,
        grouped=True,
        needs=frozenset({"left_trans", "clip_ratio"}),
    ),
    "WFP8AFP8_DYNAMIC": _Type(Layout.FP8, _FP8, _FP8_PER_TOKEN),
    "W8A8_MXFP8": _Type(Layout.MXFP8, MXFP8, _MX8),
    "W4A8_MXFP": _Type(Layout.MXFP4, MXFP4, _MX8),
    "W4A4_MXFP4": _Type(Layout.MXFP4, MXFP4, _MX4),
    "W4A16_MXFP4": _Type(Layout.MXFP4, MXFP4),
}
FLOAT_TYPE = "FLOAT"
#: Types of tensors that are not quantized: "W16A16S" is float that was made sparse.
FLOAT_TYPES = frozenset({FLOAT_TYPE, "W16A16S"})

#: Layout of 4-bit weights -> the same with two outputs per byte.
_OUTPUTS_PACKED: dict[Layout | str, Layout] = {
    Layout.MODELSLIM_INT: Layout.MODELSLIM_PACKED_N,
    Layout.MODELSLIM_TWO_LEVEL: Layout.MODELSLIM_TWO_LEVEL_PACKED,
}

_REFUSED = {
    "W8A8SC": "compressed sparse weights are decompressed by Atlas 300I Duo (310P) only",
    "W16A16SC": "compressed sparse weights are decompressed by Atlas 300I Duo (310P) only",
    "NF4": "NPUs have no operator for NormalFloat weights",
    "W8A8_TIMESTEP": "scales per diffusion step have no meaning for a language model",
}
_ONLY_950 = (
    "this microscaling type is computed by Ascend 950 (A5) only: Atlas A2, A3 and 310P have no instructions for it, and it "
    "is not among those that are converted at load"
)
#: The type of tensors that quantize the KV cache of dense attention.
KV_CACHE_TYPE = "C8"
#: Tensors of vllm-ascend's attention backend, whatever their type: scales of FA3's inputs, which may be those of an MXFP8 KV
#: cache, and the rotations of a sparse indexer, which cancel out in the product of its queries and keys.
_ATTENTION_SCALES = tuple(f"fa_{part}.{name}" for part in "qkv" for name in ("scale", "offset"))
_ATTENTION_ROTATIONS = ("indexer.q_rot", "indexer.k_rot")
#: The entry for how an attention layer quantizes, which is no tensor.
_ATTENTION_TYPE = "quant_type"

#: Tensors of an input transform: those that give the size of its left side, of its right side, and the others.
_LEFT = ("heads_rotation", "kronecker_rotation_m", "left_trans")
_RIGHT = ("kronecker_rotation_n", "right_trans")
_TRANSFORM = frozenset({*_LEFT, *_RIGHT, "clip_ratio"})

_KV_TENSORS = ("kv_cache_scale", "kv_cache_offset")
#: 8 * sum_k(w), which some int4 operators take. It is computed from the weights, for any number of ranks.
_SCALE_BIAS = "scale_bias"

#: A float layer whose bias is listed: the model must have a place for it.
_BIASED_FLOAT_ENTRY = LayerEntry(FLOAT, frozenset({"bias"}))

#: Names of the tensors that some layout stores.
_STORED_NAMES = frozenset(tensor.name for row in LAYOUTS.values() for tensor in row.tensors)

_MAX_VALIDATION_ERRORS = 20


class _Findings(FindingLimit):
    """The findings of one description. Layers of an unserved type share one finding.

    Attributes:
        source: the description's file.
        refused: layers of known types that are not served, by type.
        unknown: layers of unknown types, by type.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.refused: dict[str, list[str]] = {}
        self.unknown: dict[tuple[str, ...], list[str]] = {}

    def report(self, code: str, message: str, *, file: str = "", **fields: Any) -> None:
        """Add a finding; the description is its file unless another one is named."""
        if self.skips(code, fields.get("severity", Severity.ERROR)):
            return
        self.add(Finding(code, message, file=file or self.source, **fields))

    def report_invalid(self, error: ValidationError) -> None:
        """Add a finding for each of pydantic's errors."""
        for problem in error.errors(include_url=False)[:_MAX_VALIDATION_ERRORS]:
            self.report(
                "bad-config",
                problem["msg"],
                layer=".".join(str(part) for part in problem["loc"])[:200],
                found=repr(problem["input"])[:80],
                fix="re-export the checkpoint with msModelSlim, or correct the entry by hand",
            )

    def near(self, code: str, name: str, names: Iterable[str]) -> tuple[str, ...]:
        """The nearest names, for a finding of this code that will be shown."""
        return nearest_names(name, names) if self.wants_names(code) else ()

    def close(self) -> list[Finding]:
        """All findings, those about types included."""
        for kind, layers in self.refused.items():
            self.report(
                "unsupported-scheme",
                _REFUSED.get(kind, _ONLY_950) + _how_many(layers),
                layer=layers[0],
                found=kind[:80],
                fix="serve it on a chip that has this format, or export the checkpoint for Atlas A2 and A3: W8A8_DYNAMIC, "
                "W4A8_DYNAMIC, W8A8_MXFP8",
            )
        for kinds, layers in self.unknown.items():
            self.report(
                "unknown-scheme",
                f"no such ModelSlim type: {', '.join(kinds)[:120]}" + _how_many(layers),
                layer=layers[0],
                expected="one of " + ", ".join(sorted(TYPES)),
                found=kinds[0][:80],
                nearest=self.near("unknown-scheme", kinds[0][:80], TYPES),
                fix="update vllm-npu-quant, or re-export the checkpoint with one of these types",
            )
        return super().close()


def _how_many(layers: list[str]) -> str:
    return f" ({len(layers):,} layers)" if len(layers) > 1 else ""


def read(
    description: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    source: str = DESCRIPTION_FILE,
    checkpoint: Checkpoint | None = None,
) -> Described:
    """Validate a description and index it by layer. Linear in the number of entries.

    Args:
        description: the parsed JSON object.
        tensors: the stored tensors by name. A layer's group size and packing follow from the shapes of its own tensors, not
            from the description's single ``group_size``.
        source: the file's name, for messages.
        checkpoint: not used: headers are enough.

    Returns:
        The layers; problems are in ``findings``. Nothing is raised.
    """
    found = _Findings(source)
    header, types, attention = _split(description, found)
    rotations = _rotated_layers(header, found)
    layers = _by_layer(types, rotations, tensors)
    entries = _Entries(header.version is not None, found)
    described = Described("modelslim", source, fused_floats=_fused_floats(layers))
    add_layers(described, entries.of(layers, described.fused_floats), found)
    described.norm_biases = frozenset(
        layer
        for layer, entry in described.layers.items()
        if layer.endswith("norm") and entry.spec.is_float and "bias" in entry.tensors
    )
    kv_cache = KV_CACHE_TYPE in types.values()
    _report_attention(header, kv_cache, attention, found)
    _report_undescribed_rotations(rotations, layers, found)
    missing = types.keys() - tensors.keys()
    _report_missing(missing, types, tensors, described, found)
    if len(tensors) > len(types) - len(missing):  # more than those that are listed
        _report_unlisted({**types, **attention}, tensors, described, rotations, found)
    _report_float_dtypes(types, tensors, found)
    scale_bias = any(_SCALE_BIAS in entry.tensors for entry in entries.distinct)
    unused = {_last_two(name) for name in attention} & {*_ATTENTION_SCALES, *_ATTENTION_ROTATIONS}
    described.dropped = (*(_KV_TENSORS if kv_cache else ()), *((_SCALE_BIAS,) if scale_bias else ()), *sorted(unused))
    described.findings = tuple(found.close())
    return described


def vllm_ascend_schemes(description: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Every (scheme, kind) that vllm-ascend needs a class for, from a description's type strings alone.

    The kind is "linear", "moe" or "attention". Types that this package refuses or does not know are among them: they are no
    reason to take the checkpoint from vllm-ascend. So are things that it does not compute, under names that it does not have.
    """
    found = _Findings(DESCRIPTION_FILE)
    header, types, attention = _split(description, found)
    rotations = _rotated_layers(header, found)
    schemes = set(_attention_schemes(header, KV_CACHE_TYPE in types.values(), attention))
    if rotations:
        schemes.add(("inputs that are rotated at run time", "linear"))
    layers = _by_layer(types, rotations, {})
    fused_floats = _fused_floats(layers)
    # Equal layers share one form, so that there are few of them.
    kinds = {(form, _kind(layer)) for layer, form in layers.items() if layer not in fused_floats}
    for form, kind in kinds:
        listed = dict(zip(form.names, form.types, strict=True))
        if kind == "smoothing" and "mul_scale" in listed:
            schemes.add(("smoothing that is not fused", "linear"))
        weights = {listed[name] for name in ("weight", "weight_packed") if name in listed} or set(form.types)
        where = "moe" if kind == "moe" else "linear"
        schemes |= {
            (_vllm_ascend_name(scheme, where, listed, header), where)
            for scheme in weights - {FLOAT_TYPE, KV_CACHE_TYPE}
        }
    return {(shown_name(scheme, 80), kind) for scheme, kind in schemes}


def _kind(layer: str) -> str:
    """ "moe" for routed experts, "smoothing" for modules of unfused smoothing, "linear" for all other layers."""
    if layer.endswith(".experts") or split_expert(layer) is not None:
        return "moe"
    return "smoothing" if layer.endswith(".div") else "linear"


def _vllm_ascend_name(scheme: str, kind: str, listed: Mapping[str, str], header: DescriptionHeader) -> str:
    """vllm-ascend's name of a layer's scheme; one that it does not have for what its class of that name does not take.

    Args:
        scheme: the type of the layer's weight. kind: "linear" or "moe".
        listed: the types of the layer's tensors. header: the description's own fields.
    """
    if (scheme, kind) == ("W4A16", "moe") and "weight_packed" not in listed:
        return "W4A16 without weight_packed"  # it takes LLM-Compressor's tensors only
    if (scheme, kind) == ("W4A8_DYNAMIC", "moe") and ("weight_scale_second" in listed or header.group_size):
        return "W4A8_DYNAMIC per group"
    return scheme


def _attention_schemes(
    header: DescriptionHeader, kv_cache: bool, attention: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(scheme, "attention") for quantized attention and KV caches, by the fields and entries that vllm-ascend reads.

    It goes by the header's fields; by an attention layer's own type it knows an MXFP8 KV cache. Stored tensors that none of
    these gives a meaning are unknown to it.
    """
    header_types = (header.fa_quant_type, header.indexer_quant_type, header.kv_cache_type)
    yield from ((kind, "attention") for kind in header_types if kind and kind != FLOAT_TYPE)
    if kv_cache and header.kv_cache_type != KV_CACHE_TYPE:
        yield "C8 without kv_cache_type", "attention"
    names = {_last_two(name) for name in attention}
    if not names.isdisjoint(_ATTENTION_ROTATIONS) and not header.indexer_quant_type:
        yield "rotations without indexer_quant_type", "attention"
    if not names.isdisjoint(_ATTENTION_SCALES) and not header.fa_quant_type and not header.kv_cache_type:
        own = {kind for name, kind in attention.items() if name.endswith(f"_attn.{_ATTENTION_TYPE}")}
        yield from ((kind, "attention") for kind in own or {"scales without fa_quant_type"})


def _split(
    description: Mapping[str, Any], found: _Findings
) -> tuple[DescriptionHeader, dict[str, str], dict[str, str]]:
    """Separate the description's own fields, its tensor entries and those of its attention layers, and validate them."""
    fields = {key: value for key, value in description.items() if "." not in key}
    entries = dict(description)
    for key in fields:
        del entries[key]
    try:
        header = DescriptionHeader.model_validate(fields)
    except ValidationError as error:
        found.report_invalid(error)
        header = DescriptionHeader()
    try:
        types = _TENSOR_TYPES.validate_python(entries)
    except ValidationError as error:
        found.report_invalid(error)
        types = {key: value for key, value in entries.items() if isinstance(value, str)}
    attention = {name: kind for name, kind in types.items() if _is_attention(name, types)}
    for name in attention:
        del types[name]
    return header, types, attention


def _is_attention(name: str, types: Mapping[str, str]) -> bool:
    """Whether an entry is one of an attention layer's own. A rotation is one if it has its counterpart."""
    layer, _, last = name.rpartition(".")
    if last == _ATTENTION_TYPE:
        return True
    if last in ("q_rot", "k_rot"):
        return layer.endswith(".indexer") and {f"{layer}.q_rot", f"{layer}.k_rot"} <= types.keys()
    return last in ("scale", "offset") and _last_two(name) in _ATTENTION_SCALES


def _last_two(name: str) -> str:
    """ "fa_q.scale" for "model.layers.0.self_attn.fa_q.scale"."""
    return ".".join(name.rsplit(".", 2)[-2:])


def _rotated_layers(header: DescriptionHeader, found: _Findings) -> dict[str, tuple[str, ...]]:
    """Layer -> names of the rotation matrices that ``metadata.quarot`` gives it; they are stored, and listed nowhere else."""
    quarot = (header.metadata or {}).get("quarot")
    if quarot is None:
        return {}
    try:
        listed = _QuarotMetadata.model_validate(quarot)
    except ValidationError as error:
        found.report_invalid(error)
        return {}
    heads = dict.fromkeys(listed.heads_rotation.layers, ("heads_rotation",))
    kronecker = dict.fromkeys(listed.kronecker_rotation.layers, ("kronecker_rotation_m", "kronecker_rotation_n"))
    return {**heads, **kronecker}


@dataclass(frozen=True, eq=False)
class _Form:
    """The listed and stored tensors of a layer. Equal layers, such as the experts of a model, share one form.

    Attributes:
        names: last name components of the tensors that the description lists.
        types: their type strings.
        shapes: their stored shapes; None for a tensor that is not stored.
        rotation: names and shapes of the matrices that only metadata.quarot lists.
    """

    names: tuple[str, ...]
    types: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    rotation: tuple[tuple[str, tuple[int, ...] | None], ...] = ()


def _by_layer(
    types: Mapping[str, str], rotations: Mapping[str, tuple[str, ...]], tensors: Mapping[str, StoredTensor]
) -> dict[str, _Form]:
    """Every layer that the description lists, with its form."""
    layers: dict[str, _Form] = {}
    forms: dict[tuple[Any, ...], _Form] = {}
    scattered: dict[str, list[Any]] = {}  # tensors that do not follow the others of their layer

    def form_of(triples: Iterable[Any]) -> _Form:
        """The form of: name, type, shape, name, type, shape, ..."""
        key = tuple(triples)
        form = forms.get(key)
        if form is None:
            form = forms[key] = _Form(key[::3], key[1::3], key[2::3])
        return form

    before: str | None = None
    triples: list[Any] = []
    shapes = [None if stored is None else stored.shape for stored in map(tensors.get, types)]
    for (name, kind), shape in zip(types.items(), shapes, strict=True):
        layer, _, last = name.rpartition(".")
        if layer != before:
            if before is not None and before not in scattered:
                layers[before] = form_of(triples)
            before = layer
            triples = scattered.setdefault(layer, []) if layer in layers else []
        triples += (last, kind, shape)
    if before is not None and before not in scattered:
        layers[before] = form_of(triples)
    for layer, triples in scattered.items():
        first = layers[layer]
        layers[layer] = form_of(
            (*chain.from_iterable(zip(first.names, first.types, first.shapes, strict=True)), *triples)
        )
    for layer in layers.keys() & rotations.keys():
        stored_matrices = ((name, tensors.get(f"{layer}.{name}")) for name in rotations[layer])
        matrices = tuple((name, None if matrix is None else matrix.shape) for name, matrix in stored_matrices)
        layers[layer] = replace(layers[layer], rotation=matrices)
    return layers


def _fused_floats(layers: Mapping[str, _Form]) -> frozenset[str]:
    """The MoE layers whose float experts are stored as two tensors."""
    return frozenset(
        layer
        for layer, form in layers.items()
        if holds_fused_floats(layer, form.names) and set(form.types) == {FLOAT_TYPE}
    )


class _Entries:
    """The entries of layers: made once for each form, and equal ones are one object.

    Attributes:
        versioned: whether the description names a version.
        found: collects the findings.
        distinct: the entries, for interning.
    """

    def __init__(self, versioned: bool, found: _Findings) -> None:
        self.versioned = versioned
        self.found = found
        self.distinct: dict[LayerEntry, LayerEntry] = {}
        self._by_form: dict[_Form, LayerEntry] = {}
        #: Entries by types alone, by the form without shapes.
        self._listed: dict[tuple[tuple[str, ...], ...], LayerEntry] = {}

    def of(self, layers: Mapping[str, _Form], skipped: frozenset[str]) -> Iterator[tuple[str, LayerEntry]]:
        """Every layer with its entry, unless it is skipped or has none, which a finding explains."""
        for layer, form in layers.items():
            if layer in skipped:
                continue
            if layer.endswith(".div") and "mul_scale" in form.names:
                _report_unfused_smoothing(layer, self.found)
                continue
            entry = self._by_form.get(form) or self._make(layer, form)
            if entry is not None:
                yield layer, entry

    def _make(self, layer: str, form: _Form) -> LayerEntry | None:
        """The entry of the first layer of a form; None, after a finding, if it has none."""
        matrices = dict(form.rotation)
        types = dict(zip(form.names, form.types, strict=True))
        key = (form.names, form.types, tuple(matrices))
        listed = self._listed.get(key) or _listed_entry(layer, types, frozenset(matrices), self.found)
        if listed is None:
            return None
        self._listed[key] = listed
        shapes = {**dict(zip(form.names, form.shapes, strict=True)), **matrices}
        entry = _with_shapes(listed, {name: shape for name, shape in shapes.items() if shape}, self.versioned)
        self._by_form[form] = self.distinct.setdefault(entry, entry)
        return self._by_form[form]


def _listed_entry(
    layer: str, types: Mapping[str, str], rotation: frozenset[str], found: _Findings
) -> LayerEntry | None:
    """The entry by the types of a layer's tensors; None, after a finding, if it has no entry.

    Args:
        layer: its name.
        types: the types by the last component of its tensors' names.
        rotation: names of the matrices that only metadata.quarot lists.
        found: collects the findings.
    """
    types = {name: kind for name, kind in types.items() if kind != KV_CACHE_TYPE}
    quantized = dict.fromkeys(kind for kind in types.values() if kind not in FLOAT_TYPES)
    if not quantized and not rotation:
        return _BIASED_FLOAT_ENTRY if "bias" in types else FLOAT_ENTRY
    if not _is_served(layer, quantized, rotation, found):
        return None
    scheme = types.get("weight", "")
    if list(quantized) != [scheme]:
        found.report(
            "bad-config",
            "the tensors of one layer have different types",
            layer=layer,
            expected="one type for weight and all its scales",
            found=", ".join(f"{name}: {kind}" for name, kind in types.items())[:200],
            fix="re-export the checkpoint with msModelSlim",
        )
        return None
    names = rotation.union(types)
    spec = _listed_spec(scheme, names)
    _report_listed(layer, spec, types, found)
    optional = {tensor.name for tensor in LAYOUTS[spec.layout].tensors if tensor.optional}
    return LayerEntry(spec, frozenset(optional & names))


def _is_served(layer: str, quantized: Collection[str], rotation: frozenset[str], found: _Findings) -> bool:
    """Whether all of a layer's types, and its rotation, are served. Others are reported."""
    if not quantized:
        found.report(
            "unsupported-scheme",
            "the input of a float layer is rotated at run time, which is served for quantized layers only",
            layer=layer,
            found=", ".join(sorted(rotation)),
            fix="quantize the layer, or export the checkpoint without online rotation",
        )
        return False
    refused = next((kind for kind in quantized if kind in _REFUSED or ("MXFP" in kind and kind not in TYPES)), None)
    if refused is not None:
        found.refused.setdefault(refused, []).append(layer)
        return False
    unknown = tuple(sorted(kind for kind in quantized if kind not in TYPES))
    if unknown:
        found.unknown.setdefault(unknown, []).append(layer)
    return not unknown


def _report_unfused_smoothing(layer: str, found: _Findings) -> None:
    found.report(
        "unsupported-scheme",
        "the layer's input is scaled by a module of its own (smoothing that was not fused), which vLLM's model has "
        "no place for",
        layer=layer,
        found=f"{layer}.mul_scale",
        fix="export the checkpoint with smoothing that is fused into the preceding layer",
    )


def _report_listed(layer: str, spec: LayerSpec, types: Mapping[str, str], found: _Findings) -> None:
    """Compare the tensors that the description lists for a layer with those of its layout."""
    known = {tensor.name: tensor for tensor in LAYOUTS[spec.layout].tensors}
    for name, tensor in known.items():
        if name not in types and (not tensor.optional or name in TYPES[spec.scheme].needs):
            found.report(
                "missing-tensor",
                f"the description does not list {name}, which {spec.scheme} needs",
                layer=layer,
                expected=f"{layer}.{name}: {spec.scheme}",
                found=", ".join(types),
                nearest=nearest_names(name, types),
                fix="re-export the checkpoint with msModelSlim",
            )
    found.extend(unexpected_tensor(layer, spec, name, found.source) for name in types if name not in known)


def _listed_spec(scheme: str, names: frozenset[str]) -> LayerSpec:
    """The spec of a type, with scales per channel, a weight that is not packed, and a transform without sizes.

    Args:
        scheme: a key of TYPES.
        names: the last name components of the layer's tensors.
    """
    kind = TYPES[scheme]
    two_level = kind.weight.bits == 4 and "weight_scale_second" in names
    layout = Layout.MODELSLIM_TWO_LEVEL if two_level else kind.layout
    transform = None if _TRANSFORM.isdisjoint(names) else TransformSpec(clip="clip_ratio" in names)
    return LayerSpec(scheme, layout, kind.weight, kind.activation, transform)


def _with_shapes(entry: LayerEntry, shapes: Mapping[str, tuple[int, ...]], versioned: bool) -> LayerEntry:
    """The entry completed from the stored shapes: group size, packing, and the sizes of the input transform.

    Args:
        entry: as ``_listed_entry`` gives it.
        shapes: those of its stored tensors that have dimensions, by the last component of their names.
        versioned: whether the description names a version.
    """
    spec = entry.spec
    if spec.transform is not None:
        left, right = (next((shapes[name][0] for name in side if name in shapes), 0) for side in (_LEFT, _RIGHT))
        spec = replace(spec, transform=replace(spec.transform, left=left, right=right))
    if not spec.is_float and TYPES[spec.scheme].grouped:
        weight, scale = shapes.get("weight", ()), shapes.get("weight_scale", ())
        groups = shapes.get("weight_scale_second", scale)
        # The check of the layout reports shapes that have other dimensions.
        if all(len(shape) == 2 and shape[1] > 0 for shape in (weight, scale, groups)):
            spec = _with_groups(spec, weight, scale[0], groups[1], versioned)
    return replace(entry, spec=spec)


def _with_groups(spec: LayerSpec, weight: Sequence[int], outputs: int, groups: int, versioned: bool) -> LayerSpec:
    """The spec with its layout and group size.

    Args:
        spec: as ``_listed_spec`` gives it. weight: the weight's stored shape. outputs: rows of its scale.
        groups: scales per row. versioned: whether the description names a version.
    """
    numbers, layout, inputs = TYPES[spec.scheme].weight, spec.layout, weight[1]
    packed = TYPES[spec.scheme].packed if versioned and groups == 1 else None
    if numbers.bits == 4 and 2 * weight[0] == outputs:
        layout = _OUTPUTS_PACKED[layout]
    elif packed is Layout.MODELSLIM_PACKED_K and layout is Layout.MODELSLIM_INT:
        layout, inputs = packed, 2 * inputs
    if groups > 1:
        numbers = replace(numbers, granularity=Granularity.GROUP, group_size=-(-inputs // groups))
    return replace(spec, layout=layout, weight=numbers)


def _report_undescribed_rotations(rotations: Iterable[str], layers: Mapping[str, Any], found: _Findings) -> None:
    """Report layers that ``metadata.quarot`` lists and the description does not have."""
    for layer in sorted(set(rotations) - layers.keys()):
        found.report(
            "undescribed-layer",
            "metadata.quarot rotates the input of a layer that the description does not have",
            layer=layer,
            nearest=found.near("undescribed-layer", layer, layers),
            fix="re-export the checkpoint with msModelSlim",
        )


def _report_attention(
    header: DescriptionHeader, kv_cache: bool, attention: Mapping[str, str], found: _Findings
) -> None:
    """Report, once for the model, that attention and its caches are not quantized."""
    cache = header.kv_cache_type or header.kv_quant_type or (KV_CACHE_TYPE if kv_cache else None)
    listed = (cache, header.fa_quant_type, header.indexer_quant_type, *sorted(set(attention.values())))
    kinds = dict.fromkeys(kind for kind in listed if kind and kind != FLOAT_TYPE)
    if not kinds and all(name.endswith(f".{_ATTENTION_TYPE}") for name in attention):
        return
    names = ", ".join(shown_name(kind, 80) for kind in list(kinds)[:8])
    finding = kv_cache_finding(names or "rotations of a sparse indexer", found.source)
    if list(kinds) != [cache]:
        message = (
            "the weights are served; attention and its caches stay in the model's dtype, and their scales are dropped"
        )
        finding = replace(finding, message=message)
    found.add(finding)


def _report_missing(
    missing: Iterable[str],
    types: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
    described: Described,
    found: _Findings,
) -> None:
    """Report tensors that the description lists and no file holds, unless the check of the layer's layout does."""
    for name in sorted(missing):
        layer, _, suffix = name.rpartition(".")
        if (types[name] not in FLOAT_TYPES and suffix in _STORED_NAMES) or (
            suffix == "bias" and layer in described.biased
        ):
            continue
        found.report(
            "missing-tensor",
            f"the description lists {suffix}, and no weight file holds it",
            layer=layer,
            expected=f"{name} ({types[name]})",
            found="no such tensor",
            nearest=found.near("missing-tensor", name, tensors),
            fix="download the checkpoint again, or re-export it",
        )


def _report_unlisted(
    types: Mapping[str, str],
    tensors: Mapping[str, StoredTensor],
    described: Described,
    rotations: Mapping[str, tuple[str, ...]],
    found: _Findings,
) -> None:
    """Report tensors that a file holds and the description does not list."""
    for name in sorted(tensors.keys() - types.keys()):
        layer, _, suffix = name.rpartition(".")
        if suffix in rotations.get(layer, ()):
            continue
        entry = described.layers.get(layer)
        # An undeclared integer tensor is an error unless it is a buffer (e.g. position ids).
        quantized = (entry is not None and not entry.spec.is_float) or (
            suffix in _STORED_NAMES and tensors[name].dtype not in FLOAT_DTYPES
        )
        found.report(
            "unexpected-tensor",
            "the description does not list this tensor" + ("" if quantized else ", which is loaded as it is"),
            layer=layer,
            file=tensors[name].file,
            expected=f"an entry for {name}",
            nearest=found.near("unexpected-tensor", name, types),
            fix="check that the description and the weights belong together",
            severity=Severity.ERROR if quantized else Severity.WARNING,
        )


def _report_float_dtypes(types: Mapping[str, str], tensors: Mapping[str, StoredTensor], found: _Findings) -> None:
    """Report tensors that the description calls float and that are stored as something else."""
    for name, kind in types.items():
        stored = tensors.get(name) if kind in FLOAT_TYPES else None
        if stored is not None and stored.dtype not in FLOAT_DTYPES:
            found.report(
                "wrong-dtype",
                f"the description calls this tensor {kind}",
                layer=name.rpartition(".")[0],
                file=stored.file,
                expected=", ".join(sorted(FLOAT_DTYPES)),
                found=stored.dtype,
                fix="re-export the checkpoint",
            )


def _producer(description: Mapping[str, Any]) -> str:
    version = description.get("version")
    return f"msModelSlim, description {version[:40]}" if isinstance(version, str) and version else "msModelSlim"


#: Types that msModelSlim writes and that are refused, for the support matrix.
_REFUSED_SAMPLES = ("W4A4_MXFP4_FLATQUANT", "W8A8SC")


def _samples() -> Iterator[Sample]:
    for scheme, kind in TYPES.items():
        flatquant = scheme == "W4A4_FLATQUANT_DYNAMIC"
        transform = TransformSpec(16, 16, clip=True) if flatquant else None
        listed = {*kind.needs, "right_trans"} if flatquant else kind.needs
        spec = LayerSpec(scheme, kind.packed or kind.layout, kind.weight, kind.activation, transform)
        tensors = sample_tensors(spec, listed, experts=not flatquant)
        yield Sample(scheme, {"version": "1.0.0", **dict.fromkeys(tensors, scheme)}, tensors)
    for scheme in _REFUSED_SAMPLES:
        yield Sample(
            scheme, {"version": "1.0.0", f"{LAYER}.weight": scheme, f"{LAYER}.weight_scale": scheme}, tensors={}
        )


def _lists_tensors(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config holds the description itself, and not only its name."""
    return any(str(key).endswith(".weight") for key in quantization_config)


def _left_to_vllm_ascend(config: Mapping[str, Any], model: Any) -> bool:
    """Whether a description in config.json has vllm-ascend's name for the format, and only schemes that it serves."""
    named = str(config.get("quant_method") or "") in ("ascend", "")
    return named and _lists_tensors(config) and not _unserved_by_vllm_ascend(config, DESCRIPTION_FILE)


def _unserved_by_vllm_ascend(description: Mapping[str, Any], file: str) -> str:
    from vllm_npu_quant.ascend.ownership import unserved

    if file != DESCRIPTION_FILE:
        return f"a description named {shown_name(file, 80)}"
    return unserved(vllm_ascend_schemes(description))


FORMAT = Format(
    name="modelslim",
    title="ModelSlim",
    read=read,
    method_name="modelslim",
    quant_methods=frozenset({"modelslim", "ascend"}),
    aliases=frozenset({"ascend"}),
    file_beside=description_name,
    needs_file="quant_model_description.json beside config.json",
    decisive=True,
    is_complete=_lists_tensors,
    has_fields=_lists_tensors,
    left_to_vllm_ascend=_left_to_vllm_ascend,
    unserved_by_vllm_ascend=_unserved_by_vllm_ascend,
    float_reason="{source} says FLOAT",
    producer=_producer,
    samples=_samples,
)
