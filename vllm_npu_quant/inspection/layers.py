# SPDX-License-Identifier: Apache-2.0
"""The layers of a checkpoint as they are served: kind, scheme, method class, operators, sizes, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.formats.common import FLOAT_DTYPES
from vllm_npu_quant.formats.declaration import find_format
from vllm_npu_quant.formats.described import Described, ExpertsEntry, LayerEntry, StoredTensor
from vllm_npu_quant.formats.floats import float_shape
from vllm_npu_quant.formats.index import is_embedding
from vllm_npu_quant.formats.stacked import STACKED_TENSORS, expert_parts
from vllm_npu_quant.inspection.model import Model
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.serving.decide import Host, Served, decide
from vllm_npu_quant.spec import FLOAT, LayerKind, LayerSpec, Layout

__all__ = ["OTHER", "UNKNOWN", "Layer", "Scheme", "layers_of", "schemes_of"]

#: Kind of layers without a quantization method: norms, embeddings, single parameters.
OTHER = "other"

#: Spec of a layer with tensors in a quantized dtype and no readable description.
UNKNOWN = LayerSpec("UNKNOWN", Layout.FLOAT)


@dataclass(frozen=True)
class Layer:
    """One layer of the checkpoint, or one projection of all experts of a MoE layer.

    Attributes:
        name: name of the layer, with * for the number of an expert.
        kind: "linear", "fused_moe", "lm_head", or "other".
        count: number of checkpoint layers it represents: the number of experts, else 1.
        spec: the served spec.
        row: the dispatch row; None for float layers and for layers that are not served.
        outputs, inputs: N and K of one checkpoint layer; 0 if not known.
        nbytes: bytes of all stored tensors.
        reason: why the layer is float; empty if it is quantized.
        tensors: names of the optional tensors that are stored.
        loaded: ``nbytes`` with floats of 32 bits and more counted in 16 bits, as loaded by vLLM.
        difference: how the served layer differs from the stored one; empty if it does not.
        instead: what a user can do to have the layer served as stored.
        stored: the stored spec.
    """

    name: str
    kind: str
    count: int
    spec: LayerSpec
    row: dispatch.Row | None
    outputs: int
    inputs: int
    nbytes: int
    reason: str = ""
    tensors: frozenset[str] = frozenset()
    loaded: int = 0
    difference: str = ""
    instead: str = ""
    stored: LayerSpec = FLOAT

    @property
    def remark(self) -> str:
        """A note for users on how the layer is served; empty if there is none."""
        return self.difference or (self.row.remark if self.row is not None else "")

    @property
    def method(self) -> str:
        """Name of the NPU method class; empty if there is none."""
        return self.row.method_name if self.row is not None else ""

    @property
    def operators(self) -> tuple[str, ...]:
        return self.row.operators if self.row is not None else ()

    @property
    def scheme(self) -> str:
        return self.spec.scheme


@dataclass(frozen=True)
class Scheme:
    """All layers of one kind with one scheme.

    Attributes:
        scheme: the producer's name of the scheme, "FLOAT" for float.
        kind: as in Layer.
        spec: the spec as text.
        method: the NPU method class; empty for float layers and for schemes that are not served.
        operators: the operators that it calls.
        served: whether a method class serves the layers, or they are float.
        layers: number of checkpoint layers.
        nbytes: stored bytes.
        parameters: elements of the weights.
        reason: why the layers are float.
        remark: as in Layer.
    """

    scheme: str
    kind: str
    spec: str
    method: str
    operators: tuple[str, ...]
    served: bool
    layers: int
    nbytes: int
    parameters: int
    reason: str = ""
    remark: str = ""


def layers_of(model: Model) -> list[Layer]:
    """Every layer of an opened model as it is served, in the order of the files. Linear in the number of tensors.

    Raises:
        NpuQuantError: the format could not be detected.
    """
    return _layers(model.require_described(), model.checkpoint, model.host)


def _layers(described: Described, checkpoint: Checkpoint, host: Host) -> list[Layer]:
    tensors = checkpoint.tensors
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + tensor.nbytes
    found: list[Layer] = []
    moe: dict[str, ExpertsEntry] = {}
    for name in described.layer_names():
        experts = described.find_experts(name)
        if experts is not None:
            moe[name] = experts
            continue
        entry = described.find(name)
        if entry is not None:
            found.append(_layer(name, entry, described, tensors, sizes.pop(name, 0), host))
    for name, experts in moe.items():
        found += _experts(name, experts, described, tensors, sizes, host)
    unknown = _not_float(sizes, tensors)
    for name, nbytes in sizes.items():
        table = tensors.get(name + ".weight") if is_embedding(name) and name not in unknown else None
        outputs, inputs = (table.shape[0], table.shape[1]) if table is not None and len(table.shape) == 2 else (0, 0)
        spec = UNKNOWN if name in unknown else FLOAT
        found.append(Layer(name or "(no layer)", OTHER, 1, spec, None, outputs, inputs, nbytes))
    # vLLM loads float32 into the model's 16-bit dtype by default.
    wide: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):  # always float32 in vLLM
            wide[name.rpartition(".")[0]] = tensor.nbytes - 4 * tensor.numel
        elif tensor.dtype in ("F32", "F64"):
            layer = name.rpartition(".")[0] or "(no layer)"
            wide[layer] = wide.get(layer, 0) + tensor.nbytes - 2 * tensor.numel
    return [replace(layer, loaded=layer.nbytes - wide.get(layer.name, 0)) for layer in found]


def _not_float(layers: Mapping[str, int], tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Names of the given layers, which have no description, that hold a tensor in a quantized dtype."""
    return {
        layer
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOAT_DTYPES and (layer := name.rpartition(".")[0]) in layers
    }


def _layer(
    name: str,
    entry: LayerEntry,
    described: Described,
    tensors: Mapping[str, TensorInfo],
    nbytes: int,
    host: Host,
) -> Layer:
    outputs, inputs = _sizes(name, entry, tensors)
    if entry.spec.is_float and (not outputs or is_embedding(name)):
        return Layer(name, OTHER, 1, entry.spec, None, outputs, inputs, nbytes)
    kind = LayerKind.LM_HEAD if name.rpartition(".")[2] == "lm_head" else LayerKind.LINEAR
    reason = _why_float(name, described) if entry.spec.is_float else ""
    served = decide(kind, entry.spec, host, layer=name)
    return _as_layer(name, served, 1, (outputs, inputs), nbytes, reason, entry.tensors)


def _as_layer(
    name: str,
    served: Served,
    count: int,
    sizes: tuple[int, int],
    nbytes: int,
    reason: str,
    tensors: frozenset[str],
) -> Layer:
    return Layer(
        name,
        served.kind.value,
        count,
        served.spec,
        served.row,
        *sizes,
        nbytes,
        reason,
        tensors,
        difference=served.difference,
        instead=served.instead,
        stored=served.stored,
    )


def _experts(
    name: str,
    experts: ExpertsEntry,
    described: Described,
    tensors: Mapping[str, TensorInfo],
    sizes: dict[str, int],
    host: Host,
) -> Iterable[Layer]:
    parts: Mapping[str, StoredTensor] = tensors
    if experts.stacked:
        del sizes[name]
        parts, sizes = _parts(name, tensors)
    for projection, entry in zip(experts.names, (experts.gate, experts.up, experts.down), strict=True):
        nbytes = sum(sizes.pop(f"{name}.{number}.{projection}", 0) for number in range(experts.count))
        first = f"{name}.0.{projection}"
        reason = _why_float(first, described) if entry.spec.is_float else ""
        served = decide(LayerKind.FUSED_MOE, entry.spec, host, layer=first)
        shape = _sizes(first, entry, parts)
        yield _as_layer(f"{name}.*.{projection}", served, experts.count, shape, nbytes, reason, entry.tensors)


def _parts(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[Mapping[str, StoredTensor], dict[str, int]]:
    """The headers of the first expert's parts of stacked tensors, and the bytes of each projection of all experts."""
    stored = {last: tensors[f"{name}.{last}"] for last in STACKED_TENSORS if f"{name}.{last}" in tensors}
    parts = expert_parts(stored)
    halves = sum(tensor.nbytes for last, tensor in stored.items() if last.startswith("gate_up_proj"))
    down = sum(tensor.nbytes for tensor in stored.values()) - halves
    headers = {f"{name}.0.{part}.{last}": header for part, own in parts.items() for last, header in own.items()}
    return headers, {
        f"{name}.0.{part}": nbytes for part, nbytes in zip(parts, (halves // 2, halves // 2, down), strict=True)
    }


def _sizes(layer: str, entry: LayerEntry, tensors: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """N and K of the stored weight; zeros if it is missing or does not have the dimensions of its layout."""
    shape = float_shape(layer, entry, tensors)
    return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)


def _why_float(name: str, described: Described) -> str:
    """The reason why a layer with a weight matrix is float."""
    declaration = find_format(described.format)
    if declaration is None:
        return "the checkpoint is not quantized"
    if name in described.stored_as_float:
        return "its weight is stored as float"
    return declaration.float_reason.format(source=described.source)


def schemes_of(layers: Iterable[Layer]) -> list[Scheme]:
    """Group layers by kind and scheme; quantized schemes first, then by decreasing size."""
    groups: dict[tuple[object, ...], Scheme] = {}
    for layer in layers:
        spec = "" if layer.kind == OTHER else dispatch.describe(layer.spec, layer.stored).partition(": ")[2]
        key = (layer.kind, layer.scheme, spec, layer.method, layer.reason, layer.remark)
        parameters = layer.count * layer.outputs * layer.inputs
        known = groups.get(key)
        if known is None:
            groups[key] = Scheme(
                layer.scheme,
                layer.kind,
                spec,
                layer.method,
                layer.operators,
                layer.row is not None or (layer.spec.is_float and layer.spec != UNKNOWN),
                layer.count,
                layer.nbytes,
                parameters,
                layer.reason,
                layer.remark,
            )
        else:
            groups[key] = replace(
                known,
                layers=known.layers + layer.count,
                nbytes=known.nbytes + layer.nbytes,
                parameters=known.parameters + parameters,
            )
    return sorted(groups.values(), key=lambda group: (group.scheme == "FLOAT", group.kind == OTHER, -group.nbytes))
