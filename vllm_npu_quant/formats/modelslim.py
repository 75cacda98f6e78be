# SPDX-License-Identifier: Apache-2.0
"""msModelSlim checkpoints: ``quant_model_description.json`` in every spelling that its releases wrote.

The description gives one type string per tensor. Spellings: v1 (``version``, ``model_quant_type``, ``metadata``,
``group_size``, ``optional``), v0 with ``version``, the old v0 file ``quant_model_description_{type}.json`` without it, and
the same dictionary embedded in config.json as ``quantization_config``. ``model_quant_type`` is not trusted: msModelSlim
writes "FLOAT" there for some fully quantized models, so each tensor's own type decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, TypeAdapter, ValidationError

from vllm_npu_quant.errors import Finding, Severity, nearest_names
from vllm_npu_quant.formats.base import FLOAT_ENTRY, ExpertsEntry, LayerEntry, QuantFormat
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.formats.experts import FUSED_FLOAT, collect_experts, holds_fused_floats, split_number
from vllm_npu_quant.formats.fp8 import fp8_activation, fp8_weight
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import (
    FLOAT,
    ActivationSpec,
    Granularity,
    LayerSpec,
    Layout,
    TransformSpec,
    WeightSpec,
)

__all__ = ["DESCRIPTION_FILE", "DescriptionHeader", "ModelSlimFormat"]

DESCRIPTION_FILE = "quant_model_description.json"


class DescriptionHeader(BaseModel):
    """The entries of a description that are not tensors. Fields that later releases add are accepted and ignored."""

    model_config = ConfigDict(extra="allow", frozen=True)

    version: StrictStr | None = None
    model_quant_type: StrictStr | None = None
    group_size: StrictInt = Field(default=0, ge=0, le=65536)
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
_STATIC_INT8 = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False)
_INT8 = WeightSpec(8)
_INT4 = WeightSpec(4)


class _Packing(str, Enum):
    """How 4-bit integers lie in a stored weight."""

    NONE = "one per byte"
    OUTPUTS = "two outputs per byte"
    INPUTS = "two inputs per byte"


@dataclass(frozen=True)
class _Type:
    """A type string of the description.

    Attributes:
        layout, weight, activation: what it means for a layer. The layout of 4-bit weights depends on how they are packed.
        grouped: whether scales may be per group of inputs.
        packed: how files of version 1.0.0 pack the weight where its scales are per channel, and per group.
        needs: tensors that are optional in the layout, and that this type needs.
    """

    layout: Layout
    weight: WeightSpec | None
    activation: ActivationSpec | None = None
    grouped: bool = False
    packed: tuple[_Packing, _Packing] = (_Packing.NONE, _Packing.NONE)
    needs: frozenset[str] = frozenset()


#: The type strings that stand for a quantized Linear or expert. "W8A8_MIX" holds the tensors of both W8A8 and
#: W8A8_DYNAMIC: it runs dynamic, except on a decode node of a prefill/decode-disaggregated deployment. "W8A8S" is W8A8 of
#: weights that were made sparse.
TYPES: dict[str, _Type] = {
    "W8A8": _Type(Layout.MODELSLIM_STATIC, _INT8, _STATIC_INT8),
    "W8A8S": _Type(Layout.MODELSLIM_STATIC, _INT8, _STATIC_INT8),
    "W8A8_DYNAMIC": _Type(Layout.MODELSLIM_INT, _INT8, _PER_TOKEN, grouped=True),
    "W8A8_MIX": _Type(Layout.MODELSLIM_STATIC, _INT8, _PER_TOKEN, needs=frozenset({"weight_scale", "weight_offset"})),
    "W8A16": _Type(Layout.MODELSLIM_INT, _INT8, grouped=True),
    "W4A16": _Type(Layout.MODELSLIM_INT, _INT4, grouped=True, packed=(_Packing.INPUTS, _Packing.OUTPUTS)),
    "W4A8_DYNAMIC": _Type(
        Layout.MODELSLIM_INT, _INT4, _PER_TOKEN, grouped=True, packed=(_Packing.OUTPUTS, _Packing.OUTPUTS)
    ),
    "W4A4_DYNAMIC": _Type(Layout.MODELSLIM_INT, _INT4, _INT4_PER_TOKEN, grouped=True),
    "W4A4_FLATQUANT_DYNAMIC": _Type(
        Layout.MODELSLIM_INT,
        _INT4,
        _INT4_PER_TOKEN,
        grouped=True,
        needs=frozenset({"left_trans", "clip_ratio"}),
    ),
    "WFP8AFP8_DYNAMIC": _Type(Layout.FP8, fp8_weight(Granularity.CHANNEL), fp8_activation(static=False)),
}
FLOAT_TYPE = "FLOAT"
#: Types of tensors that are what they were: "W16A16S" is float that was made sparse.
FLOAT_TYPES = frozenset({FLOAT_TYPE, "W16A16S"})

#: (packed along, two levels of scales) -> layout of a 4-bit weight.
_INT4_LAYOUTS = {
    (_Packing.NONE, False): Layout.MODELSLIM_INT,
    (_Packing.OUTPUTS, False): Layout.MODELSLIM_PACKED_N,
    (_Packing.INPUTS, False): Layout.MODELSLIM_PACKED_K,
    (_Packing.NONE, True): Layout.MODELSLIM_TWO_LEVEL,
    (_Packing.OUTPUTS, True): Layout.MODELSLIM_TWO_LEVEL_PACKED,
}

_REFUSED = {
    "W8A8SC": "compressed sparse weights are decompressed by Atlas 300I Duo (310P) only",
    "W16A16SC": "compressed sparse weights are decompressed by Atlas 300I Duo (310P) only",
    "NF4": "NPUs have no operator for NormalFloat weights",
    "W8A8_TIMESTEP": "scales per diffusion step have no meaning for a language model",
}

#: Tensors of an input transform: those that give the size of its left side, of its right side, and the others.
_LEFT = ("left_trans", "heads_rotation", "kronecker_rotation_m")
_RIGHT = ("right_trans", "kronecker_rotation_n")
_TRANSFORM = frozenset({*_LEFT, *_RIGHT, "clip_ratio"})
#: Types of tensors that quantize something other than a layer's weight.
KV_CACHE_TYPE = "C8"
_NOT_SERVED = {
    "FAQuant": "quantized attention (FA3) needs vllm-ascend's attention backend",
    "INT8_DYNAMIC": "a quantized sparse-attention indexer needs vllm-ascend's attention backend",
}
_KV_TENSORS = ("kv_cache_scale", "kv_cache_offset")
#: 8 * sum_k(w), which some int4 operators want. It is computed from the weights, for any number of ranks.
_SCALE_BIAS = "scale_bias"

#: A float layer whose bias is listed: the model must have a place for it.
_BIASED_FLOAT_ENTRY = LayerEntry(FLOAT, frozenset({"bias"}))

#: Names of the tensors that some layout stores.
_STORED_NAMES = frozenset(tensor.name for row in LAYOUTS.values() for tensor in row.tensors)

_MAX_VALIDATION_ERRORS = 20


#: Dtypes of tensors that the description calls FLOAT.
_FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


_ONLY_950 = (
    "microscaling formats (MXFP8, MXFP4) are computed by Ascend 950 (A5) only: Atlas A2, A3 and 310P have no instructions "
    "for them"
)


@dataclass(frozen=True)
class _Shape:
    """What the stored tensors tell about a layer besides its type.

    Attributes:
        group_size: inputs per scale, 0 for one scale per channel. packing: of a 4-bit weight.
        left, right: sizes of the matrices of its input transform.
        rotation: names of matrices that only metadata.quarot lists.
    """

    group_size: int = 0
    packing: _Packing = _Packing.NONE
    left: int = 0
    right: int = 0
    rotation: frozenset[str] = frozenset()


@dataclass
class ModelSlimFormat(QuantFormat):
    """The layers of a ModelSlim checkpoint.

    Attributes:
        layers: entry of every layer outside of routed experts.
        experts: entry of every MoE layer's experts, by the name that ends in ".experts".
        fused_floats: MoE layers whose float experts are stored as two tensors.
        kv_cache: whether the checkpoint carries KV-cache scales.
        dropped: last name components of tensors that are not loaded.
        header: the description's own fields.
    """

    layers: dict[str, LayerEntry] = field(default_factory=dict)
    experts: dict[str, ExpertsEntry] = field(default_factory=dict)
    fused_floats: frozenset[str] = frozenset()
    kv_cache: bool = False
    dropped: tuple[str, ...] = ()
    header: dict[str, Any] = field(default_factory=dict)
    biased: frozenset[str] = field(default_factory=frozenset)

    name = "modelslim"

    def find(self, layer: str) -> LayerEntry | None:
        return self.layers.get(layer)

    def find_experts(self, layer: str) -> ExpertsEntry | None:
        return FUSED_FLOAT if layer in self.fused_floats else self.experts.get(layer)

    def layer_names(self) -> Iterable[str]:
        yield from self.layers
        yield from self.experts

    def stored_layers(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, LayerEntry]]:
        yield from self.layers.items()
        for layer, experts in self.experts.items():
            for name, entry in zip(experts.names, (experts.gate, experts.up, experts.down), strict=True):
                for number in range(experts.count):
                    yield f"{layer}.{number}.{name}", entry

    def biased_layers(self) -> frozenset[str]:
        return self.biased

    def dropped_tensors(self) -> tuple[str, ...]:
        return self.dropped

    @classmethod
    def from_description(
        cls,
        description: Mapping[str, Any],
        source: str = DESCRIPTION_FILE,
        tensors: Mapping[str, StoredTensor] | None = None,
    ) -> ModelSlimFormat:
        """Validate a description and index it by layer.

        One pass over the entries: linear in their number, whatever the number of layers.

        Args:
            description: the parsed JSON object.
            source: the file's name, for messages.
            tensors: shapes of the checkpoint's tensors, where they are known. A layer's group size then follows from the
                shape of its own scale, not from the description's single ``group_size``.

        Returns:
            The format; ``findings`` holds everything that is wrong. Nothing is raised.
        """
        builder = _Builder(source, tensors)
        header, types = builder.split(description)
        builder.note_rotations(header)
        builder.index(types)
        builder.check_header(header)
        builder.check_files(types)
        return cls(
            source=source,
            findings=tuple(builder.found.close()),
            norm_biases=frozenset(builder.norm_biases),
            layers=builder.layers,
            experts=builder.experts,
            fused_floats=frozenset(builder.fused_floats),
            kv_cache=builder.kv_cache,
            dropped=(*(_KV_TENSORS if builder.kv_cache else ()), *((_SCALE_BIAS,) if builder.scale_bias else ())),
            header={"version": header.version, "group_size": header.group_size},
            biased=frozenset(builder.biased),
        )


def _by_layer(types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Layer -> (suffix, type, suffix, type, ...) of its tensors.

    Layers with the same tensors share one tuple: a hundred thousand objects fewer to make, and to visit for the collector.
    """
    layers: dict[str, tuple[str, ...]] = {}
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}

    def close() -> None:
        if listed:  # a layer whose tensors do not follow each other is met again
            tensors = (*layers.get(before, ()), *listed)
            layers[before] = shared.setdefault(tensors, tensors)

    before: str = ""
    listed: list[str] = []
    for name, kind in types.items():
        layer, _, suffix = name.rpartition(".")
        if layer == before:
            listed += (suffix, kind)
            continue
        close()
        before, listed = layer, [suffix, kind]
    close()
    return layers


def _how_many(layers: list[str]) -> str:
    return f" ({len(layers):,} layers)" if len(layers) > 1 else ""


def _pairs(listed: Sequence[str]) -> dict[str, str]:
    """{suffix: type} of a layer."""
    return dict(zip(listed[::2], listed[1::2], strict=True))


class _Builder:
    """Collects the index and the findings of one description."""

    def __init__(self, source: str, tensors: Mapping[str, StoredTensor] | None) -> None:
        self.source = source
        self.tensors = tensors
        self.found = FindingLimit()
        self.layers: dict[str, LayerEntry] = {}
        self.experts: dict[str, ExpertsEntry] = {}
        self.fused_floats: list[str] = []
        self.norm_biases: list[str] = []
        self.biased: list[str] = []
        self.kv_cache = False
        self.scale_bias = False
        self.header = DescriptionHeader()
        #: Layer -> names of the rotation matrices that metadata.quarot gives it.
        self.rotations: dict[str, frozenset[str]] = {}
        #: Layers by a type that is refused, and by those that are not known.
        self.refused: dict[str, list[str]] = {}
        self.unknown: dict[tuple[str, ...], list[str]] = {}
        #: By what is listed and what the shapes tell, and by what is listed and the shapes themselves.
        self._entries: dict[tuple, LayerEntry | None] = {}
        self._forms: dict[tuple, LayerEntry] = {}

    def near(self, code: str, name: str, names: Iterable[str]) -> tuple[str, ...]:
        """The nearest names, for a finding of this code that is going to be shown."""
        return nearest_names(name, names) if self.found.wants(code) else ()

    def report(self, code: str, message: str, *, file: str = "", **fields: Any) -> None:
        self.found.add(Finding(code, message, file=file or self.source, **fields))

    def split(self, description: Mapping[str, Any]) -> tuple[DescriptionHeader, dict[str, str]]:
        """Separate the description's own fields from its tensor entries, and validate both."""
        fields = {key: value for key, value in description.items() if "." not in key}
        tensors = dict(description)
        for key in fields:
            del tensors[key]
        try:
            header = DescriptionHeader.model_validate(fields)
        except ValidationError as error:
            self._report_validation(error)
            header = DescriptionHeader()
        self.header = header
        try:
            return header, _TENSOR_TYPES.validate_python(tensors)
        except ValidationError as error:
            self._report_validation(error)
            return header, {key: value for key, value in tensors.items() if isinstance(value, str)}

    def _report_validation(self, error: ValidationError) -> None:
        for problem in error.errors(include_url=False)[:_MAX_VALIDATION_ERRORS]:
            self.report(
                "bad-config",
                problem["msg"],
                layer=".".join(str(part) for part in problem["loc"])[:200],
                found=repr(problem["input"])[:80],
                fix="re-export the checkpoint with msModelSlim, or correct the entry by hand",
            )

    def note_rotations(self, header: DescriptionHeader) -> None:
        """Note the layers that ``metadata.quarot`` lists: their rotation matrices are stored, and described nowhere else."""
        quarot = (header.metadata or {}).get("quarot")
        if quarot is None:
            return
        try:
            listed = _QuarotMetadata.model_validate(quarot)
        except ValidationError as error:
            self._report_validation(error)
            return
        for layer in listed.heads_rotation.layers:
            self.rotations[layer] = frozenset({"heads_rotation"})
        for layer in listed.kronecker_rotation.layers:
            self.rotations[layer] = frozenset({"kronecker_rotation_m", "kronecker_rotation_n"})

    def index(self, types: Mapping[str, str]) -> None:
        """Fill the layers and experts."""
        suffixes = _by_layer(types)
        by_experts: dict[str, dict[str, dict[str, LayerEntry]]] = {}
        # Where no stored shape and no rotation tells layers apart, those with the same tensors have the same entry.
        alike: dict[tuple[str, ...], LayerEntry] = {}
        # The projections of an expert follow each other as a rule: its name is taken apart once.
        before, expert = "", None
        for layer, listed in suffixes.items():
            if (
                layer.endswith(".experts")
                and holds_fused_floats(layer, listed[::2])
                and set(listed[1::2]) == {FLOAT_TYPE}
            ):
                self.fused_floats.append(layer)
                continue
            plain = self.tensors is None and layer not in self.rotations
            entry = alike.get(listed) if plain else None
            if entry is None:
                entry = self._known_entry(layer, listed)
                if entry is None:
                    continue
                if plain:
                    alike[listed] = entry
            above, _, projection = layer.rpartition(".")
            if above != before:
                before, expert = above, split_number(above)
            if expert is not None and projection:
                by_experts.setdefault(expert[0], {}).setdefault(projection, {})[expert[1]] = entry
                continue
            self.layers[layer] = entry
            if "bias" in entry.tensors and not entry.spec.is_float:
                self.biased.append(layer)
            if entry.spec.is_float and layer.endswith("norm") and _pairs(listed).get("bias") == FLOAT_TYPE:
                self.norm_biases.append(layer)
        self._report_types()
        for layer, projections in by_experts.items():
            experts, findings = collect_experts(layer, projections, self.source)
            for finding in findings:
                self.found.add(finding)
            if experts is not None:
                self.experts[layer] = experts
        for layer in sorted(self.rotations.keys() - suffixes.keys()):
            self.report(
                "undescribed-layer",
                "metadata.quarot rotates the input of a layer that the description does not have",
                layer=layer,
                nearest=self.near("undescribed-layer", layer, suffixes),
                fix="re-export the checkpoint with msModelSlim",
            )

    def _report_types(self) -> None:
        """One finding for all layers of a type that is not served."""
        for kind, layers in self.refused.items():
            self.report(
                "unsupported-scheme",
                _REFUSED.get(kind, _ONLY_950) + _how_many(layers),
                layer=layers[0],
                found=kind[:80],
                fix="serve it on a chip that has this format, or export the checkpoint for Atlas A2 and A3: W8A8_DYNAMIC, "
                "W4A8_DYNAMIC",
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

    def _known_entry(self, layer: str, listed: Sequence[str]) -> LayerEntry | None:
        """The one entry object of all layers with these tensors and shapes; None (after a finding) where there is none."""
        rotation = self.rotations.get(layer, frozenset())
        stored: list[StoredTensor | None] = []
        if self.tensors is not None:
            names = (*listed[::2], "weight_scale", "weight_scale_second", *rotation)  # all that ``_shape`` looks at
            stored = [self.tensors.get(f"{layer}.{name}") for name in names]
        form = (rotation, *listed, *[None if tensor is None else tensor.shape for tensor in stored])
        entry = self._forms.get(form)
        if entry is not None:
            return entry
        types = _pairs(listed)
        shape = self._shape(layer, types)
        signature = (shape, *listed)
        entry = self._entries.get(signature)
        if entry is None:  # a layer that has none is reported each time
            entry = self._entries[signature] = self._entry(layer, types, shape)
        if entry is not None:
            self._forms[form] = entry
        return entry

    def _shape(self, layer: str, types: Mapping[str, str]) -> _Shape:
        """What the stored tensors tell about a layer; what the description says where they are not known."""
        kind = TYPES.get(types.get("weight", ""))
        rotation = self.rotations.get(layer, frozenset())
        packed_files = self.header.version is not None
        if kind is None:
            return _Shape(rotation=rotation)
        if self.tensors is None:
            group = self.header.group_size if kind.grouped else 0
            packing = kind.packed[group > 0] if packed_files else _Packing.NONE
            return _Shape(group, packing, rotation=rotation)
        weight, scale = self.tensors.get(layer + ".weight"), self.tensors.get(layer + ".weight_scale")
        second = self.tensors.get(layer + ".weight_scale_second", scale)
        group, packing = 0, _Packing.NONE
        if weight is None and scale is None:
            group = self.header.group_size if kind.grouped else 0
        elif _are_matrices(weight, scale, second) and kind.weight is not None:
            assert weight is not None
            assert scale is not None
            assert second is not None
            groups = second.shape[1]
            if kind.weight.bits == 4 and 2 * weight.shape[0] == scale.shape[0]:
                packing = _Packing.OUTPUTS
            elif packed_files and kind.packed[0] is _Packing.INPUTS and groups == 1:
                packing = _Packing.INPUTS
            inputs = weight.shape[1] * (2 if packing is _Packing.INPUTS else 1)
            group = 0 if groups == 1 else -(-inputs // groups)
        left, right = (self._side(layer, {*names} & {*types, *rotation}) for names in (_LEFT, _RIGHT))
        return _Shape(group, packing, left, right, rotation)

    def _side(self, layer: str, names: set[str]) -> int:
        """The size of the stored square matrix with one of these names; 0 where there is none."""
        assert self.tensors is not None
        stored = (self.tensors.get(f"{layer}.{name}") for name in sorted(names))
        return next((tensor.shape[0] for tensor in stored if tensor is not None and tensor.shape), 0)

    def _entry(self, layer: str, types: dict[str, str], shape: _Shape) -> LayerEntry | None:
        """The entry of a layer with these tensors; None (after a finding) where there can be none."""
        kv = [name for name, kind in types.items() if kind == KV_CACHE_TYPE]
        if kv:
            self.kv_cache = True
            types = {name: kind for name, kind in types.items() if kind != KV_CACHE_TYPE}
        refused = next((kind for kind in types.values() if kind in _NOT_SERVED), None)
        if refused:
            self.report(
                "unsupported-scheme",
                _NOT_SERVED[refused],
                layer=layer,
                found=refused,
                fix="export the checkpoint without it",
            )
            return None
        if "mul_scale" in types and layer.endswith(".div"):
            self.report(
                "unsupported-scheme",
                "the layer's input is scaled by a module of its own (smoothing that was not fused), which vLLM's model has "
                "no place for",
                layer=layer,
                found=f"{layer}.mul_scale",
                fix="export the checkpoint with smoothing that is fused into the preceding layer",
            )
            return None
        quantized = {kind for kind in types.values() if kind not in FLOAT_TYPES}
        if not quantized:
            if shape.rotation:
                self._refuse_float_rotation(layer, shape)
                return None
            return _BIASED_FLOAT_ENTRY if "bias" in types else FLOAT_ENTRY
        known = next((kind for kind in quantized if kind in _REFUSED or "MXFP" in kind), None)
        if known is not None:
            self.refused.setdefault(known, []).append(layer)
            return None
        unknown = sorted(kind for kind in quantized if kind not in TYPES)
        if unknown:
            self.unknown.setdefault(tuple(unknown), []).append(layer)
            return None
        scheme = types.get("weight", "")
        if quantized != {scheme}:
            self.report(
                "bad-config",
                "the tensors of one layer have different types",
                layer=layer,
                expected="one type for weight and all its scales",
                found=", ".join(f"{name}: {kind}" for name, kind in types.items())[:200],
                fix="re-export the checkpoint with msModelSlim",
            )
            return None
        spec = _spec(scheme, shape, types)
        self._check_tensors(layer, scheme, spec, types)
        matrices = {*types, *shape.rotation} & {*_LEFT, *_RIGHT}
        if matrices and spec.transform is not None and not spec.transform.left and not spec.transform.right:
            self.report(
                "unreadable-file",
                "the sizes of the input transform's matrices are only in the weight files, which are not known yet",
                layer=layer,
                expected=", ".join(f"{layer}.{name}" for name in sorted(matrices)) + " in a weight file",
                fix="download the checkpoint before it is served",
            )
            return None
        if _SCALE_BIAS in types:
            self.scale_bias = True
        optional = {tensor.name for tensor in LAYOUTS[spec.layout].tensors if tensor.optional}
        return LayerEntry(spec, frozenset(optional & {*types, *shape.rotation}))

    def _refuse_float_rotation(self, layer: str, shape: _Shape) -> None:
        self.report(
            "unsupported-scheme",
            "the input of a float layer is rotated at run time, which is served for quantized layers only",
            layer=layer,
            found=", ".join(sorted(shape.rotation)),
            fix="quantize the layer, or export the checkpoint without online rotation",
        )

    def _check_tensors(self, layer: str, scheme: str, spec: LayerSpec, types: Mapping[str, str]) -> None:
        """Compare the tensors that the description lists with those of the layout."""
        known = {tensor.name: tensor for tensor in LAYOUTS[spec.layout].tensors}
        for name, tensor in known.items():
            if name not in types and (not tensor.optional or name in TYPES[scheme].needs):
                self.report(
                    "missing-tensor",
                    f"the description does not list {name}, which {scheme} needs",
                    layer=layer,
                    expected=f"{layer}.{name}: {scheme}",
                    found=", ".join(types),
                    nearest=nearest_names(name, types),
                    fix="re-export the checkpoint with msModelSlim",
                )
        for name in types:
            if name not in known:
                self.report(
                    "unexpected-tensor",
                    f"{scheme} has no tensor {name}, so its effect would be lost",
                    layer=layer,
                    expected=", ".join(known),
                    found=name,
                    fix="update vllm-npu-quant, or re-export the checkpoint without it",
                )

    def check_files(self, types: Mapping[str, str]) -> None:
        """Compare the description with the names and dtypes of the stored tensors, where they are known."""
        if self.tensors is None:
            return
        missing = types.keys() - self.tensors.keys()
        biased = set(self.biased)
        for name in sorted(missing):
            layer, _, suffix = name.rpartition(".")
            if (types[name] not in FLOAT_TYPES and suffix in _STORED_NAMES) or (suffix == "bias" and layer in biased):
                continue  # the check of the layer's layout reports it, with its shape
            self.report(
                "missing-tensor",
                f"the description lists {suffix}, and no weight file holds it",
                layer=layer,
                expected=f"{name} ({types[name]})",
                found="no such tensor",
                nearest=self.near("missing-tensor", name, self.tensors),
                fix="download the checkpoint again, or re-export it",
            )
        for name in sorted(self.tensors.keys() - types.keys()):
            layer, _, suffix = name.rpartition(".")
            if suffix in self.rotations.get(layer, ()):
                continue
            entry = self.layers.get(layer)
            # Loaded as it is, a tensor of integers is not what anybody meant; a buffer of positions may be.
            quantized = (entry is not None and not entry.spec.is_float) or (
                suffix in _STORED_NAMES and self.tensors[name].dtype not in _FLOAT_DTYPES
            )
            self.report(
                "unexpected-tensor",
                "the description does not list this tensor" + ("" if quantized else ", which is loaded as it is"),
                layer=layer,
                file=self.tensors[name].file,
                expected=f"an entry for {name}",
                nearest=self.near("unexpected-tensor", name, types),
                fix="check that the description and the weights belong together",
                severity=Severity.ERROR if quantized else Severity.WARNING,
            )
        for name, kind in types.items():
            stored = self.tensors.get(name)
            if kind in FLOAT_TYPES and stored is not None and stored.dtype not in _FLOAT_DTYPES:
                self.report(
                    "wrong-dtype",
                    f"the description calls this tensor {kind}",
                    layer=name.rpartition(".")[0],
                    file=stored.file,
                    expected=", ".join(sorted(_FLOAT_DTYPES)),
                    found=stored.dtype,
                    fix="re-export the checkpoint",
                )

    def check_header(self, header: DescriptionHeader) -> None:
        """Findings about what the description says besides its tensors."""
        for field_name in ("fa_quant_type", "indexer_quant_type"):
            value = getattr(header, field_name)
            if value and value != FLOAT_TYPE:
                self.report(
                    "unsupported-scheme",
                    _NOT_SERVED["FAQuant" if field_name == "fa_quant_type" else "INT8_DYNAMIC"],
                    expected=f"no {field_name}",
                    found=value[:80],
                    fix="export the checkpoint without it",
                )
        if self.kv_cache or header.kv_cache_type or header.kv_quant_type:
            self.report(
                "kv-cache-not-quantized",
                "the weights are served; the KV cache stays in the model's dtype and its scales are dropped",
                severity=Severity.WARNING,
                found=header.kv_cache_type or header.kv_quant_type or KV_CACHE_TYPE,
            )


def _are_matrices(*tensors: StoredTensor | None) -> bool:
    return all(tensor is not None and len(tensor.shape) == 2 and tensor.shape[1] >= 1 for tensor in tensors)


def _spec(scheme: str, shape: _Shape, types: Mapping[str, str]) -> LayerSpec:
    kind = TYPES[scheme]
    weight = kind.weight
    assert weight is not None
    if kind.grouped and shape.group_size > 0:
        weight = WeightSpec(weight.bits, weight.kind, Granularity.GROUP, shape.group_size, weight.symmetric)
    layout = kind.layout
    if weight.bits == 4:
        layout = _INT4_LAYOUTS.get((shape.packing, "weight_scale_second" in types), layout)
    transform = None
    if shape.rotation or not _TRANSFORM.isdisjoint(types):
        transform = TransformSpec(shape.left, shape.right, "clip_ratio" in types)
    return LayerSpec(scheme, layout, weight, kind.activation, transform=transform)
