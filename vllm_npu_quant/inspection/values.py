# SPDX-License-Identifier: Apache-2.0
"""``check --values``: checks of tensor values, which are read with NumPy in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from vllm_npu_quant import settings
from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.checkpoint.values import to_float32
from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity
from vllm_npu_quant.formats.check import check_layer
from vllm_npu_quant.formats.common import FLOAT_DTYPES
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.inspection.layers import Layer
from vllm_npu_quant.inspection.model import Model
from vllm_npu_quant.inspection.value_rules import ValueRules
from vllm_npu_quant.layouts.tables import LAYOUTS, Role, tensors_of
from vllm_npu_quant.serving.cost import MAX_INPUTS
from vllm_npu_quant.serving.decide import float_name
from vllm_npu_quant.spec import Granularity, Layout, WeightSpec

__all__ = ["value_findings"]

#: Elements per block.
BLOCK = 1 << 24

#: Layouts that store one int4 per byte.
_BYTES = frozenset({Layout.MODELSLIM_INT, Layout.MODELSLIM_TWO_LEVEL, Layout.CT_INT})
_FP8_NAN = 0x7F
#: Scales of blocks of floats: E4M3, and E8M0, whose dtype most files call U8.
_FLOAT_SCALES = frozenset({"F8_E4M3", "F8_E8M0", "U8"})


def value_findings(
    model: Model, layers: Sequence[Layer], progress: Callable[[str, int, int], None] | None = None
) -> list[Finding]:
    """Findings about values of scales, zero points, integers and floats, and about the error of requantizing floats.

    Args:
        model: an opened model with local files.
        layers: the result of ``layers_of``.
        progress: called with (layer, layers done, total layers).
    """
    described = model.require_described()
    checkpoint = model.checkpoint
    found = FindingLimit()
    symmetric = {layer.name: layer.row.weight_symmetric is True for layer in layers if layer.row is not None}
    # Layers whose weights are requantized with a scale per channel.
    requantized = {layer.name for layer in layers if float_name(layer.stored) and layer.spec.weight == WeightSpec(8)}
    entries = dict(described.stored_layers())
    by_layer: dict[str, list[TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        by_layer.setdefault(name.rpartition(".")[0], []).append(tensor)
    rules = ValueRules(described.source)
    losses: list[tuple[float, str]] = []
    for done, (layer, tensors) in enumerate(by_layer.items()):
        entry = entries.get(layer)
        try:
            for finding in _layer_values(checkpoint, layer, tensors, entry, symmetric):
                found.add(finding)
            if entry is not None and not entry.spec.is_float:
                rules.layer(checkpoint, layer, entry)
            else:
                for tensor in tensors:
                    if tensor.dtype in FLOAT_DTYPES:
                        rules.floats(checkpoint, tensor)
            own = requantized & {layer, _any_expert(layer)}
            loss = _requantization(checkpoint, layer, entry) if own and entry is not None else None
        except NpuQuantError as error:
            found.extend(error.findings)
            if "unreadable-file" in error.codes:  # the file is damaged or has changed
                break
            continue
        if loss is not None:
            losses.append((loss, layer))
        if progress is not None:
            progress(layer, done + 1, len(by_layer))
    found.extend(rules.findings())
    if losses:
        found.add(_losses(losses, described.source))
    return found.close()


def _layer_values(
    checkpoint: Checkpoint,
    layer: str,
    tensors: Iterable[TensorInfo],
    entry: LayerEntry | None,
    symmetric: Mapping[str, bool],
) -> Iterator[Finding]:
    roles = {} if entry is None else {tensor.name: tensor.role for tensor in LAYOUTS[entry.spec.layout].tensors}
    for tensor in tensors:
        last = tensor.name.rpartition(".")[2]
        if tensor.numel == 0:
            continue
        if roles.get(last) is Role.SCALE:
            yield from _scale_values(checkpoint, layer, tensor)
        elif roles.get(last) is Role.ZERO:
            if symmetric.get(layer, symmetric.get(_any_expert(layer), False)) and any(
                np.any(block) for block in checkpoint.blocks(tensor.name, BLOCK)
            ):
                yield _bad(
                    layer,
                    tensor,
                    "zero points that are not 0, and the operator takes symmetric weights only",
                    "0 everywhere",
                    "nonzero zero points",
                    "re-export the checkpoint with symmetric weights for this scheme",
                )
        elif entry is not None and last == "weight" and tensor.dtype == "I8":
            yield from _integers(checkpoint, layer, tensor, entry)
        elif tensor.dtype in FLOAT_DTYPES or tensor.dtype.startswith("F8_E4M3"):
            broken = _not_finite(checkpoint, tensor)
            if broken:
                yield _bad(
                    layer,
                    tensor,
                    "values that are no numbers",
                    "finite values",
                    f"{broken:,} of {tensor.numel:,} are NaN or infinite",
                    "download the file again, or re-export the checkpoint",
                )


def _scale_values(checkpoint: Checkpoint, layer: str, tensor: TensorInfo) -> Iterator[Finding]:
    if tensor.dtype != "I64" and tensor.dtype not in FLOAT_DTYPES and tensor.dtype not in _FLOAT_SCALES:
        return
    smallest = 2.0**-14 if tensor.dtype == "F16" else 2.0**-126
    broken = zeros = tiny = 0
    for block in checkpoint.blocks(tensor.name, BLOCK):
        if tensor.dtype == "I64":  # float32 bits widened to int64
            values = (block & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        else:
            values = to_float32(block, _as_scale(tensor))
        broken += int(np.count_nonzero(~np.isfinite(values)))
        zeros += int(np.count_nonzero(values == 0))
        tiny += int(np.count_nonzero((np.abs(values) < smallest) & (values != 0)))
    if broken:
        yield _bad(
            layer,
            tensor,
            "scales that are no numbers: the layer's output would be NaN",
            "finite scales",
            f"{broken:,} of {tensor.numel:,} are NaN or infinite",
            "download the file again, or re-export the checkpoint",
        )
    if zeros:
        yield _bad(
            layer,
            tensor,
            "scales that are 0: what they belong to is lost",
            "scales other than 0",
            f"{zeros:,} of {tensor.numel:,}",
            "check that these outputs are 0 in the model, too, or re-export the checkpoint",
            severity=Severity.WARNING,
        )
    if tiny and tensor.dtype not in _FLOAT_SCALES:
        yield _bad(
            layer,
            tensor,
            f"scales below the normal numbers of {tensor.dtype}, which have lost digits",
            f"at least {smallest:.3g}",
            f"{tiny:,} of {tensor.numel:,}",
            "store the scales as float32, or quantize with larger groups",
            severity=Severity.WARNING,
        )


def _integers(checkpoint: Checkpoint, layer: str, tensor: TensorInfo, entry: LayerEntry) -> Iterator[Finding]:
    weight = entry.spec.weight
    if weight is None or weight.bits != 4 or entry.spec.layout not in _BYTES:
        return
    ranges = [(int(block.min()), int(block.max())) for block in checkpoint.blocks(tensor.name, BLOCK)]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < -8 or high > 7:
        yield _bad(
            layer,
            tensor,
            "4-bit integers out of their range",
            "-8 to 7",
            f"{low} to {high}",
            "check that the scheme of the layer is the one that its weights were made with",
        )


def _not_finite(checkpoint: Checkpoint, tensor: TensorInfo) -> int:
    """Number of NaN and infinite values of a float tensor, counted without conversion."""
    count = 0
    for block in checkpoint.blocks(tensor.name, BLOCK):
        if tensor.dtype == "BF16":
            count += int(np.count_nonzero((block & 0x7F80) == 0x7F80))
        elif tensor.dtype.startswith("F8_E4M3"):
            count += int(np.count_nonzero((block & 0x7F) == _FP8_NAN)) if tensor.dtype == "F8_E4M3" else 0
        else:
            count += int(np.count_nonzero(~np.isfinite(block)))
    return count


def _any_expert(layer: str) -> str:
    """The layer's name with * for the number of an expert."""
    parent, found, rest = layer.rpartition(".experts.")
    return f"{parent}.experts.*.{rest.partition('.')[2]}" if found else layer


def _bad(
    layer: str,
    tensor: TensorInfo,
    message: str,
    expected: str,
    found: str,
    fix: str,
    *,
    severity: Severity = Severity.ERROR,
) -> Finding:
    name = tensor.name.rpartition(".")[2]
    return Finding(
        "bad-value", f"{name} holds {message}", layer, tensor.file, expected, found, fix=fix, severity=severity
    )


def _requantization(checkpoint: Checkpoint, layer: str, entry: LayerEntry) -> float | None:
    """``||w_int8 - w|| / ||w||`` of a layer of small floats requantized to int8 per channel; None after a finding."""
    spec = entry.spec.weight
    if spec is None or check_layer(layer, entry, checkpoint.tensors, "", near=False):
        return None
    names = [tensor.name for tensor in tensors_of(entry.spec, entry.tensors)]
    tensors = {name: checkpoint.tensors[f"{layer}.{name}"] for name in names}
    weight = tensors[names[0]]
    columns = weight.shape[1]
    dtype, inputs = ("F4", 2 * columns) if spec.bits == 4 else ("F8_E4M3", columns)
    if not 0 < inputs <= MAX_INPUTS:
        return None  # the operators' limits say so
    scales = _scales(checkpoint, tensors)
    error = norm = 0.0
    start = 0
    for block in checkpoint.blocks(weight.name, max(BLOCK // inputs, 1) * columns):
        stop = start + block.size // columns
        values = to_float32(block, TensorInfo("", dtype, (stop - start, inputs), "", 0, block.size))
        rows = values.reshape(-1, inputs) * _row_scales(scales, spec, start, stop, inputs)
        start = stop
        if not np.isfinite(rows).all():
            return None  # reported as a bad value
        largest = np.abs(rows).max(axis=1, keepdims=True)
        own = np.where(largest > 0, largest / 127, 1)
        difference = np.rint(rows / own) * own - rows
        error += float(np.square(difference, dtype=np.float64).sum())
        norm += float(np.square(rows, dtype=np.float64).sum())
    return (error / norm) ** 0.5 if norm else 0.0


def _as_scale(tensor: TensorInfo) -> TensorInfo:
    """A scale whose U8 are power-of-two scales."""
    return tensor._replace(dtype="F8_E8M0") if tensor.dtype == "U8" else tensor


def _as_float32(checkpoint: Checkpoint, tensor: TensorInfo) -> np.ndarray:
    """A scale as float32."""
    return to_float32(checkpoint.read(tensor.name), _as_scale(tensor))


def _scales(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> np.ndarray:
    """The scales of a layer of small floats, float32 in their stored shape."""
    name = "weight_scale" if "weight_scale" in tensors else "weight_scale_inv"
    scales = _as_float32(checkpoint, tensors[name])
    if "weight_scale_2" in tensors:
        scales = scales * _as_float32(checkpoint, tensors["weight_scale_2"]).reshape(1)
    if "weight_global_scale" in tensors:
        with np.errstate(divide="ignore", invalid="ignore"):  # reported as a bad value
            scales = scales / _as_float32(checkpoint, tensors["weight_global_scale"]).reshape(1)
    return scales


def _row_scales(scales: np.ndarray, stored: WeightSpec, start: int, stop: int, inputs: int) -> np.ndarray:
    """Scales of rows [start, stop), in a shape that broadcasts to [rows, inputs]."""
    if stored.granularity in (Granularity.BLOCK, Granularity.GROUP):
        rows = np.arange(start, stop) // max(stored.block_rows, 1)
        columns = np.arange(inputs) // stored.group_size
        return scales.reshape(scales.shape[0], -1)[rows][:, columns]
    if stored.granularity is Granularity.CHANNEL and scales.size > 1:
        return scales.reshape(-1, 1)[start:stop]
    return scales.reshape(-1)[:1].reshape(1, 1)


def _losses(losses: list[tuple[float, str]], source: str) -> Finding:
    losses.sort(reverse=True)
    mean = sum(loss for loss, _ in losses) / len(losses)
    worst = ", ".join(f"{layer} {loss:.2%}" for loss, layer in losses[:3])
    return Finding(
        "requantized",
        f"int8 with one scale per output differs from the stored floats by {mean:.2%} on average over {len(losses):,} "
        "layers (relative error of the weight)",
        file=source,
        found=f"worst: {worst}",
        fix=f"nothing, if that is acceptable; {settings.FLOAT_WEIGHTS}=bf16 keeps the numbers, two bytes per weight",
        severity=Severity.INFO,
    )
