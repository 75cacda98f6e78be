# SPDX-License-Identifier: Apache-2.0
"""msModelSlim checkpoints: ``quant_model_description.json`` in every spelling that its releases wrote.

The description gives one type string per tensor. Spellings: v1 (``version``, ``model_quant_type``, ``metadata``,
``group_size``, ``optional``), v0 with ``version``, the old v0 file ``quant_model_description_{type}.json`` without it, and
the same dictionary embedded in config.json as ``quantization_config``. ``model_quant_type`` is not trusted: msModelSlim
writes "FLOAT" there for some fully quantized models, so each tensor's own type decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, TypeAdapter, ValidationError

from vllm_npu_quant.errors import Finding, Severity, nearest_names
from vllm_npu_quant.formats.base import FLOAT_ENTRY, ExpertsEntry, LayerEntry, QuantFormat
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, WeightSpec

__all__ = ["DESCRIPTION_FILE", "DescriptionHeader", "ModelSlimFormat", "is_description_file"]

DESCRIPTION_FILE = "quant_model_description.json"
_DESCRIPTION_PATTERN = re.compile(r"quant_model_description(_[a-z0-9_]{1,40})?\.json")


def is_description_file(name: str) -> bool:
    """Whether a file name is one of the names that msModelSlim gives its description."""
    return _DESCRIPTION_PATTERN.fullmatch(name) is not None


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

_PER_TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN)
_STATIC_INT8 = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False)
_INT8 = WeightSpec(8)


@dataclass(frozen=True)
class _Type:
    """A type string of the description.

    Attributes:
        layout, weight, activation: what it means for a layer.
        grouped: whether scales may be per group of inputs.
    """

    layout: Layout
    weight: WeightSpec | None
    activation: ActivationSpec | None = None
    grouped: bool = False


#: The type strings that stand for a quantized Linear or expert. "W8A8_MIX" holds the tensors of both W8A8 and
#: W8A8_DYNAMIC: it runs dynamic, except on a decode node of a prefill/decode-disaggregated deployment.
TYPES: dict[str, _Type] = {
    "W8A8": _Type(Layout.MODELSLIM_STATIC, _INT8, _STATIC_INT8),
    "W8A8_DYNAMIC": _Type(Layout.MODELSLIM_INT, _INT8, _PER_TOKEN, grouped=True),
    "W8A8_MIX": _Type(Layout.MODELSLIM_STATIC, _INT8, _PER_TOKEN),
    "W8A16": _Type(Layout.MODELSLIM_INT, _INT8, grouped=True),
}
FLOAT_TYPE = "FLOAT"
#: Types of tensors that quantize something other than a layer's weight.
KV_CACHE_TYPE = "C8"
_NOT_SERVED = {
    "FAQuant": "quantized attention (FA3) needs vllm-ascend's attention backend",
    "INT8_DYNAMIC": "a quantized sparse-attention indexer needs vllm-ascend's attention backend",
}
_KV_TENSORS = ("kv_cache_scale", "kv_cache_offset")

_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

_MAX_VALIDATION_ERRORS = 20


#: Dtypes of tensors that the description calls FLOAT.
_FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass
class ModelSlimFormat(QuantFormat):
    """The layers of a ModelSlim checkpoint.

    Attributes:
        layers: entry of every layer outside of routed experts.
        experts: entry of every MoE layer's experts, by the name that ends in ".experts".
        kv_cache: whether the checkpoint carries KV-cache scales.
        header: the description's own fields.
    """

    layers: dict[str, LayerEntry] = field(default_factory=dict)
    experts: dict[str, ExpertsEntry] = field(default_factory=dict)
    kv_cache: bool = False
    header: dict[str, Any] = field(default_factory=dict)
    biased: frozenset[str] = field(default_factory=frozenset)

    name = "modelslim"

    def find(self, layer: str) -> LayerEntry | None:
        return self.layers.get(layer)

    def find_experts(self, layer: str) -> ExpertsEntry | None:
        return self.experts.get(layer)

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
        return _KV_TENSORS if self.kv_cache else ()

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
        builder.index(types, header.group_size)
        builder.check_header(header)
        builder.check_files(types)
        return cls(
            source=source,
            findings=tuple(builder.found.close()),
            norm_biases=frozenset(builder.norm_biases),
            layers=builder.layers,
            experts=builder.experts,
            kv_cache=builder.kv_cache,
            header={"version": header.version, "group_size": header.group_size},
            biased=frozenset(builder.biased),
        )


class _Builder:
    """Collects the index and the findings of one description."""

    def __init__(self, source: str, tensors: Mapping[str, StoredTensor] | None) -> None:
        self.source = source
        self.tensors = tensors
        self.found = FindingLimit()
        self.layers: dict[str, LayerEntry] = {}
        self.experts: dict[str, ExpertsEntry] = {}
        self.norm_biases: list[str] = []
        self.biased: list[str] = []
        self.kv_cache = False
        self._entries: dict[tuple, LayerEntry | None] = {}

    def report(self, code: str, message: str, *, file: str = "", **fields: Any) -> None:
        self.found.add(Finding(code, message, file=file or self.source, **fields))

    def split(self, description: Mapping[str, Any]) -> tuple[DescriptionHeader, dict[str, str]]:
        """Separate the description's own fields from its tensor entries, and validate both."""
        fields = {key: value for key, value in description.items() if "." not in key}
        tensors = {key: value for key, value in description.items() if "." in key}
        try:
            header = DescriptionHeader.model_validate(fields)
        except ValidationError as error:
            self._report_validation(error)
            header = DescriptionHeader()
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

    def index(self, types: Mapping[str, str], group_size: int) -> None:
        """Fill the layers and experts."""
        suffixes: dict[str, list[tuple[str, str]]] = {}
        for name, kind in types.items():
            layer, _, suffix = name.rpartition(".")
            listed = suffixes.get(layer)
            if listed is None:
                suffixes[layer] = [(suffix, kind)]
            else:
                listed.append((suffix, kind))
        by_experts: dict[str, dict[str, dict[str, LayerEntry]]] = {}
        for layer, listed in suffixes.items():
            own_group = self._group_size(layer, group_size)
            signature = (own_group, *listed)
            if signature in self._entries:
                entry = self._entries[signature]
                if entry is None:
                    self._entry(layer, dict(listed), own_group)  # report it for this layer too
            else:
                entry = self._entries[signature] = self._entry(layer, dict(listed), own_group)
            if entry is None:
                continue
            parent, is_expert, rest = layer.rpartition(".experts.")
            if is_expert and rest[:1].isdigit() and rest.count(".") == 1:
                number, _, projection = rest.partition(".")
                by_experts.setdefault(parent + ".experts", {}).setdefault(projection, {})[number] = entry
                continue
            self.layers[layer] = entry
            if "bias" in entry.tensors and not entry.spec.is_float:
                self.biased.append(layer)
            if entry.spec.is_float and layer.endswith("norm") and ("bias", FLOAT_TYPE) in listed:
                self.norm_biases.append(layer)
        for layer, projections in by_experts.items():
            self._index_experts(layer, projections)

    def _group_size(self, layer: str, described: int) -> int:
        """The layer's group size from its tensors' shapes; the description's where the shapes are not known."""
        if self.tensors is None:
            return described
        weight, scale = self.tensors.get(layer + ".weight"), self.tensors.get(layer + ".weight_scale")
        if weight is None or scale is None or len(weight.shape) != 2 or len(scale.shape) != 2 or scale.shape[1] < 1:
            return described if scale is None and weight is None else 0
        groups = scale.shape[1]
        return 0 if groups == 1 else -(-weight.shape[1] // groups)

    def _entry(self, layer: str, types: dict[str, str], group_size: int) -> LayerEntry | None:
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
        quantized = {kind for kind in types.values() if kind != FLOAT_TYPE}
        if not quantized:
            return FLOAT_ENTRY
        unknown = sorted(kind for kind in quantized if kind not in TYPES)
        if unknown:
            self.report(
                "unknown-scheme",
                f"no such ModelSlim type: {', '.join(unknown)[:120]}",
                layer=layer,
                expected="one of " + ", ".join(sorted(TYPES)),
                found=unknown[0][:80],
                nearest=nearest_names(unknown[0][:80], TYPES),
                fix="update vllm-npu-quant, or re-export the checkpoint with one of these types",
            )
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
        spec = _spec(scheme, group_size)
        self._check_tensors(layer, scheme, spec, types)
        optional = {tensor.name for tensor in LAYOUTS[spec.layout].tensors if tensor.optional}
        return LayerEntry(spec, frozenset(optional & set(types)))

    def _check_tensors(self, layer: str, scheme: str, spec: LayerSpec, types: Mapping[str, str]) -> None:
        """Compare the tensors that the description lists with those of the layout."""
        known = {tensor.name: tensor for tensor in LAYOUTS[spec.layout].tensors}
        for name, tensor in known.items():
            if name not in types and (not tensor.optional or _needed(scheme, name)):
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

    def _index_experts(self, layer: str, projections: Mapping[str, Mapping[str, LayerEntry]]) -> None:
        names = next((family for family in _EXPERT_NAMES if set(family) == set(projections)), None)
        if names is None:
            self.report(
                "undescribed-layer",
                "the experts' projections have unexpected names",
                layer=layer,
                expected=" or ".join(" ".join(family) for family in _EXPERT_NAMES),
                found=" ".join(sorted(projections)),
                fix="check that the description is complete",
            )
            return
        numbers = [set(map(int, projections[name])) for name in names]
        count = max(map(max, numbers)) + 1
        # The highest number is a stranger's: bound the work by what is listed, not by it.
        absent = [
            f"{layer}.{number}.{name}"
            for name, present in zip(names, numbers, strict=True)
            if len(present) != count
            for number in range(min(count, len(present) + 4))
            if number not in present
        ]
        if absent:
            self.report(
                "undescribed-layer",
                "the description leaves out experts",
                layer=layer,
                expected=f"experts 0 to {count - 1} with {', '.join(names)}",
                found="no " + ", ".join(absent[:6]),
                fix="re-export the checkpoint with msModelSlim",
            )
            return
        entries = []
        for name in names:
            by_entry: dict[LayerEntry, list[str]] = {}
            for number, entry in projections[name].items():
                by_entry.setdefault(entry, []).append(number)
            if len(by_entry) > 1:
                self.report(
                    "fused-shards-disagree",
                    "the experts of one layer are quantized differently",
                    layer=f"{layer}.*.{name}",
                    expected="one scheme for all experts",
                    found="; ".join(
                        f"{entry.spec.scheme} for experts {', '.join(members[:4])}"
                        + (" ..." if len(members) > 4 else "")
                        for entry, members in by_entry.items()
                    ),
                    fix="re-export the checkpoint with one scheme for the experts of a layer",
                )
            entries.append(next(iter(by_entry)))
        gate, up, down = entries
        self.experts[layer] = ExpertsEntry(count, gate, up, down, names)

    def check_files(self, types: Mapping[str, str]) -> None:
        """Compare the description with the names and dtypes of the stored tensors, where they are known."""
        if self.tensors is None:
            return
        missing = types.keys() - self.tensors.keys()
        layouts = {tensor.name for row in LAYOUTS.values() for tensor in row.tensors}
        biased = set(self.biased)
        for name in sorted(missing):
            layer, _, suffix = name.rpartition(".")
            if (types[name] != FLOAT_TYPE and suffix in layouts) or (suffix == "bias" and layer in biased):
                continue  # the check of the layer's layout reports it, with its shape
            self.report(
                "missing-tensor",
                f"the description lists {suffix}, and no weight file holds it",
                layer=layer,
                expected=f"{name} ({types[name]})",
                found="no such tensor",
                nearest=nearest_names(name, self.tensors),
                fix="download the checkpoint again, or re-export it",
            )
        for name in sorted(self.tensors.keys() - types.keys()):
            layer = name.rpartition(".")[0]
            entry = self.layers.get(layer)
            quantized = entry is not None and not entry.spec.is_float
            self.report(
                "unexpected-tensor",
                "the description does not list this tensor" + ("" if quantized else ", which is loaded as it is"),
                layer=layer,
                file=self.tensors[name].file,
                expected=f"an entry for {name}",
                nearest=nearest_names(name, types),
                fix="check that the description and the weights belong together",
                severity=Severity.ERROR if quantized else Severity.WARNING,
            )
        for name, kind in types.items():
            stored = self.tensors.get(name)
            if kind == FLOAT_TYPE and stored is not None and stored.dtype not in _FLOAT_DTYPES:
                self.report(
                    "wrong-dtype",
                    "the description calls this tensor FLOAT",
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
                severity=Severity.INFO,
                found=header.kv_cache_type or header.kv_quant_type or KV_CACHE_TYPE,
            )


def _spec(scheme: str, group_size: int) -> LayerSpec:
    kind = TYPES[scheme]
    weight = kind.weight
    if weight is not None and kind.grouped and group_size > 0:
        weight = WeightSpec(weight.bits, weight.kind, Granularity.GROUP, group_size, weight.symmetric)
    return LayerSpec(scheme, kind.layout, weight, kind.activation)


def _needed(scheme: str, tensor: str) -> bool:
    """Whether a type needs a tensor that is optional in its layout."""
    return scheme == "W8A8_MIX" and tensor in ("weight_scale", "weight_offset")


def as_static(spec: LayerSpec) -> LayerSpec:
    """The spec of a W8A8_MIX layer where it runs with its static input scale; other specs are returned as they are."""
    if spec.scheme != "W8A8_MIX":
        return spec
    return LayerSpec(spec.scheme, spec.layout, spec.weight, _STATIC_INT8)
