# SPDX-License-Identifier: Apache-2.0
"""Check of the weight files against the quantization config, from headers alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity, nearest_names
from vllm_npu_quant.formats.described import Described, LayerEntry, StoredTensor
from vllm_npu_quant.layouts.tables import (
    ANY_LENGTH,
    IN,
    Axis,
    LayerSizes,
    TensorSpec,
    group_size_of,
    rows_per_scale_of,
    tensors_of,
)
from vllm_npu_quant.serving.decide import expert_bias
from vllm_npu_quant.spec import LayerSpec, TransformSpec

__all__ = ["check_checkpoint", "check_expert_biases", "check_layer", "tied_head_findings"]


class StoredCheckpoint(Protocol):
    """The part of ``checkpoint.Checkpoint`` that a check needs."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...
    @property
    def findings(self) -> tuple[Finding, ...]: ...


class ReadableCheckpoint(StoredCheckpoint, Protocol):
    """The same with the values of its tensors, if they are on this machine."""

    @property
    def has_values(self) -> bool: ...
    def read(self, name: str) -> Any: ...


def tied_head_findings(described: Described, tied: bool) -> list[Finding]:
    """The warning for a quantized lm_head of a model whose head is its embedding; vLLM drops it silently.

    Args:
        tied: config.json's ``tie_word_embeddings``.
    """
    heads = [
        (layer, entry)
        for layer, entry in described.layers.items()
        if tied and layer.rpartition(".")[2] == "lm_head" and not entry.spec.is_float
    ]
    return [
        Finding(
            "served-otherwise",
            "the stored lm_head is not used: tie_word_embeddings makes the float embedding the head",
            layer=layer,
            file=described.source,
            expected="no lm_head, or tie_word_embeddings: false",
            found=f"{entry.spec.scheme}, and tie_word_embeddings: true",
            fix="set tie_word_embeddings to false in config.json if the head was quantized from one of its own; else nothing",
            severity=Severity.WARNING,
        )
        for layer, entry in heads
    ]


@dataclass
class _Forms:
    """The tensors of one entry's layers, and the forms of them that were compared with the layout.

    Attributes:
        entry: the entry, held so that no other object gets its id.
        names: last name components of its tensors.
        codes: dtypes and shapes of these tensors -> the codes of their findings.
    """

    entry: LayerEntry
    names: list[str]
    codes: dict[tuple[tuple[str, tuple[int, ...]] | None, ...], list[str]] = field(default_factory=dict)


def check_checkpoint(described: Described, checkpoint: StoredCheckpoint) -> list[Finding]:
    """Find the problems of the files, and the contradictions between the files and the config.

    Linear in the number of layers. Layers that have the same entry and tensors of the same dtypes and shapes, the experts of
    a model above all, are compared with their layout once.
    """
    found = FindingLimit()
    tensors = checkpoint.tensors
    forms: dict[int, _Forms] = {}
    for layer, entry in described.stored_layers(stacked=False):
        if entry.spec.is_float:
            continue
        known = forms.get(id(entry))
        if known is None:
            known = forms[id(entry)] = _Forms(entry, [tensor.name for tensor in stored_tensors_of(entry)])
        stored = [tensors.get(f"{layer}.{name}") for name in known.names]
        form = tuple([None if tensor is None else (tensor.dtype, tensor.shape) for tensor in stored])
        codes = known.codes.get(form)
        if codes is not None and all(found.is_full(code) for code in codes):
            for code in codes:
                found.skips(code)
            continue
        near = found.wants_names("missing-tensor")
        findings = check_layer(layer, entry, tensors, described.source, near=near)
        found.extend(findings)
        known.codes[form] = [finding.code for finding in findings]
    return [*checkpoint.findings, *found.close()]


def stored_tensors_of(entry: LayerEntry) -> list[TensorSpec]:
    """The tensors of a layer that its files hold."""
    return [tensor for tensor in tensors_of(entry.spec, entry.tensors) if not tensor.of]


def check_expert_biases(described: Described, checkpoint: ReadableCheckpoint, *, every: bool = False) -> list[Finding]:
    """Find out whether the biases that are stored for quantized experts are zero: some exporters write zeros.

    Args:
        described: the checkpoint's layers. checkpoint: its files.
        every: whether to read the biases of all experts, and not of the first expert of each MoE layer.

    Returns:
        One finding: an error for biases that are not zero, a note for others; none if no bias is stored.
    """
    stored = zeros = 0
    nonzero: dict[str, str] = {}
    for layer, experts in described.experts.items():
        for name, entry in zip(experts.names, (experts.gate, experts.up, experts.down), strict=True):
            if entry.spec.is_float or "bias" not in entry.tensors:
                continue
            stored += experts.count
            for number in range(experts.count if every else 1):
                bias = f"{layer}.{number}.{name}.bias"
                known = None if layer in nonzero else _is_zero(checkpoint, bias)
                zeros += known is True
                if known is False:
                    nonzero[layer] = bias
    if nonzero:
        layer, bias = next(iter(nonzero.items()))
        return [expert_bias(bias, layer=layer, file=described.source, layers=len(nonzero))]
    if not stored:
        return []
    read = f"{zeros:,} of {stored:,} were read, and are zero" if zeros else "they were not read"
    return [
        Finding(
            "served-otherwise",
            f"biases of experts are stored, and are left out if they are zero: {read}",
            layer=next(iter(described.experts)),
            file=described.source,
            fix="nothing: while the model loads, a bias that is not zero is an error",
            severity=Severity.INFO,
        )
    ]


def _is_zero(checkpoint: ReadableCheckpoint, name: str) -> bool | None:
    """Whether a float tensor holds zeros only; None if it cannot be read, which other checks report."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None or not checkpoint.has_values or len(tensor.shape) != 1:
        return None
    try:
        values = checkpoint.read(name)
    except NpuQuantError:
        return None
    # The bits without the sign: BF16 is read as uint16.
    return not (values.view(f"<u{values.dtype.itemsize}") << 1).any()


def check_layer(
    layer: str, entry: LayerEntry, tensors: Mapping[str, StoredTensor], source: str, *, near: bool = True
) -> list[Finding]:
    """Compare one layer's stored tensors with its layout: presence, dtypes and shapes.

    ``near`` adds the stored names nearest to the missing ones, which takes a search of all stored names.
    """
    wanted = stored_tensors_of(entry)
    weight = tensors.get(f"{layer}.{wanted[0].name}")
    findings = [
        Finding(
            "missing-tensor",
            f"no weight file holds {tensor.name}, which {entry.spec.scheme} needs",
            layer=layer,
            file=source,
            expected=f"{layer}.{tensor.name} {' or '.join(tensor.dtypes)} {tensor.shape_text()}",
            found="no such tensor",
            nearest=nearest_names(f"{layer}.{tensor.name}", tensors) if near else (),
            fix="download the checkpoint again, or re-export it",
        )
        for tensor in wanted
        if f"{layer}.{tensor.name}" not in tensors
    ]
    if weight is None:
        return findings
    sizes = _sizes(entry.spec, wanted[0], weight)
    if sizes is None:
        return [*findings, _wrong_shape(layer, wanted[0], weight, f"{wanted[0].shape_text()} with 2 dimensions")]
    sizes = _exact_inputs(sizes, layer, wanted, tensors)
    for tensor in wanted:
        stored = tensors.get(f"{layer}.{tensor.name}")
        if stored is None:
            continue
        if stored.dtype not in tensor.dtypes:
            findings.append(
                Finding(
                    "wrong-dtype",
                    f"{tensor.name} has a dtype that {entry.spec.scheme} does not allow",
                    layer=layer,
                    file=stored.file,
                    expected=" or ".join(tensor.dtypes),
                    found=stored.dtype,
                    fix="re-export the checkpoint",
                )
            )
        shape = tensor.shape(sizes)
        if not _same_shape(tensor, shape, stored.shape):
            findings.append(_wrong_shape(layer, tensor, stored, f"{tensor.shape_text()} = {list(shape)}"))
    return findings


def _sizes(spec: LayerSpec, tensor: TensorSpec, weight: StoredTensor) -> LayerSizes | None:
    """The layer's sizes from its weight; None if its number of dimensions differs from the layout's."""
    if len(weight.shape) != len(tensor.dims) or 0 in weight.shape:
        return None
    lengths = {dim.axis: dim.elements(length) for dim, length in zip(tensor.dims, weight.shape, strict=True)}
    outputs = lengths[Axis.OUT]
    return LayerSizes(
        outputs,
        lengths[Axis.IN],
        group_size_of(spec),
        rows_per_scale=rows_per_scale_of(spec, outputs),
        transform=spec.transform or TransformSpec(),
    )


def _exact_inputs(
    sizes: LayerSizes, layer: str, wanted: Sequence[TensorSpec], tensors: Mapping[str, StoredTensor]
) -> LayerSizes:
    """The sizes with the exact inputs, from an unpacked tensor or the groups: a packed weight may have room for more."""
    packed = next((dim for dim in wanted[0].dims if dim.axis is Axis.IN and dim.pack > 1), None)
    for tensor in wanted if packed is not None else ():
        stored = tensors.get(f"{layer}.{tensor.name}")
        if stored is None or packed is None:
            continue
        group = tensor.axis_of(Axis.GROUP)
        if tensor.dims == (IN,) and len(stored.shape) == 1:
            exact = replace(sizes, inputs=stored.shape[0])
        elif group is not None and sizes.group_size and len(stored.shape) == len(tensor.dims):
            exact = replace(sizes, inputs=stored.shape[group] * sizes.group_size)
        else:
            continue
        if packed.length(exact) == packed.length(sizes):
            return exact
    return sizes


def _same_shape(tensor: TensorSpec, wanted: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether a stored shape is the expected one. Producers omit trailing dimensions of length 1 of a scale."""
    if tensor.axis_of(Axis.SHARD) is None and tensor.axis_of(Axis.ROWS) is None:
        return len(stored) == len(wanted) and all(a in (b, ANY_LENGTH) for a, b in zip(wanted, stored, strict=True))
    shorter = len(wanted) - len(stored)
    return shorter >= 0 and stored + (1,) * shorter == wanted


def _wrong_shape(layer: str, tensor: TensorSpec, stored: StoredTensor, expected: str) -> Finding:
    return Finding(
        "wrong-shape",
        f"{tensor.name} has a shape that does not fit the layer and its scheme",
        layer=layer,
        file=stored.file,
        expected=expected,
        found=str(list(stored.shape)),
        fix="check that the config and the weights belong together, or re-export the checkpoint",
    )
