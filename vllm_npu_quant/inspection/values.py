# SPDX-License-Identifier: Apache-2.0
"""``check --values``: checks of tensor values, which are read with NumPy in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity
from vllm_npu_quant.formats.common import FLOAT_DTYPES
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.inspection.layers import Layer
from vllm_npu_quant.inspection.model import Model
from vllm_npu_quant.inspection.value_rules import ValueRules
from vllm_npu_quant.layouts.tables import LAYOUTS, Role
from vllm_npu_quant.spec import Granularity, Layout, NumberKind, WeightSpec

__all__ = ["value_findings"]

#: Elements per block.
BLOCK = 1 << 24

#: Layouts that store one int4 per byte.
_BYTES = frozenset({Layout.MODELSLIM_INT, Layout.MODELSLIM_TWO_LEVEL, Layout.CT_INT})
_FP8_NAN = 0x7F


def value_findings(
    model: Model, layers: Sequence[Layer], progress: Callable[[str, int, int], None] | None = None
) -> list[Finding]:
    """Findings about values of scales, zero points, integers and floats, and about the error of requantizing FP8.

    Args:
        model: an opened model with local files.
        layers: the result of ``layers_of``.
        progress: called with (layer, layers done, total layers).
    """
    described = model.require_described()
    checkpoint = model.checkpoint
    found = FindingLimit()
    symmetric = {layer.name: layer.row.weight_symmetric is True for layer in layers if layer.row is not None}
    # Layers whose FP8 weights are not requantized.
    floats = {layer.name for layer in layers if layer.row is not None and layer.row.weight_kind is NumberKind.FLOAT}
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
            loss = None if layer in floats else _requantization(checkpoint, layer, entry)
        except NpuQuantError as error:  # the file is damaged or has changed
            for finding in error.findings:
                found.add(finding)
            break
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
            if symmetric.get(layer, symmetric.get(_any_expert(layer), False)) and np.any(checkpoint.read(tensor.name)):
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
    if tensor.dtype == "I64":  # float32 bits widened to int64
        stored = np.asarray(checkpoint.read(tensor.name))
        values = (stored & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    elif tensor.dtype in FLOAT_DTYPES or tensor.dtype == "F8_E8M0":
        values = checkpoint.read(tensor.name, float32=True)
    else:
        return
    broken = int(np.count_nonzero(~np.isfinite(values)))
    zeros = int(np.count_nonzero(values == 0))
    if broken:
        yield _bad(
            layer,
            tensor,
            "scales that are no numbers: the layer's output would be NaN",
            "finite scales",
            f"{broken:,} of {values.size:,} are NaN or infinite",
            "download the file again, or re-export the checkpoint",
        )
    if zeros:
        yield _bad(
            layer,
            tensor,
            "scales that are 0: what they belong to is lost",
            "scales other than 0",
            f"{zeros:,} of {values.size:,}",
            "check that these outputs are 0 in the model, too, or re-export the checkpoint",
            severity=Severity.WARNING,
        )
    smallest = 2.0**-14 if tensor.dtype == "F16" else 2.0**-126
    tiny = int(np.count_nonzero((np.abs(values) < smallest) & (values != 0)))
    if tiny:
        yield _bad(
            layer,
            tensor,
            f"scales below the normal numbers of {tensor.dtype}, which have lost digits",
            f"at least {smallest:.3g}",
            f"{tiny:,} of {values.size:,}",
            "store the scales as float32, or quantize with larger groups",
            severity=Severity.WARNING,
        )


def _integers(checkpoint: Checkpoint, layer: str, tensor: TensorInfo, entry: LayerEntry) -> Iterator[Finding]:
    weight = entry.spec.weight
    if weight is None or weight.bits != 4 or entry.spec.layout not in _BYTES:
        return
    values = checkpoint.read(tensor.name)
    low, high = int(values.min()), int(values.max())
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
    stored = checkpoint.read(tensor.name).reshape(-1)
    count = 0
    for start in range(0, stored.size, BLOCK):
        block = stored[start : start + BLOCK]
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


def _requantization(checkpoint: Checkpoint, layer: str, entry: LayerEntry | None) -> float | None:
    """``||w_int8 - w_fp8|| / ||w_fp8||`` of an FP8 layer requantized to int8 per channel; None for other layers."""
    if entry is None or entry.spec.weight is None:
        return None
    stored = entry.spec.weight
    weight = checkpoint.tensors.get(f"{layer}.weight")
    scale_name = "weight_scale_inv" if entry.spec.layout is Layout.FP8_INV else "weight_scale"
    scale = checkpoint.tensors.get(f"{layer}.{scale_name}")
    if stored.kind is not NumberKind.FLOAT:
        return None
    if weight is None or scale is None or len(weight.shape) != 2 or weight.dtype != "F8_E4M3" or not weight.numel:
        return None
    scales = checkpoint.read(scale.name, float32=True)
    codes = checkpoint.read(weight.name)
    outputs, inputs = weight.shape
    step = max(BLOCK // max(inputs, 1), 1)
    error = norm = 0.0
    for start in range(0, outputs, step):
        rows = _fp8(codes[start : start + step]) * _row_scales(
            scales, stored, start, min(start + step, outputs), inputs
        )
        if not np.isfinite(rows).all():
            return None  # reported as a bad value
        largest = np.abs(rows).max(axis=1, keepdims=True)
        own = np.where(largest > 0, largest / 127, 1)
        difference = np.rint(rows / own) * own - rows
        error += float(np.square(difference, dtype=np.float64).sum())
        norm += float(np.square(rows, dtype=np.float64).sum())
    return (error / norm) ** 0.5 if norm else 0.0


def _fp8(codes: np.ndarray) -> np.ndarray:
    from vllm_npu_quant.checkpoint.values import to_float32

    tensor = TensorInfo("", "F8_E4M3", codes.shape, "", 0, codes.size)
    return to_float32(codes, tensor)


def _row_scales(scales: np.ndarray, stored: WeightSpec, start: int, stop: int, inputs: int) -> np.ndarray:
    """Scales of rows [start, stop), in a shape that broadcasts to [rows, inputs]."""
    if stored.granularity is Granularity.BLOCK:
        rows = np.arange(start, stop) // stored.block_rows
        columns = np.arange(inputs) // stored.group_size
        return scales[rows][:, columns]
    if stored.granularity is Granularity.CHANNEL and scales.size > 1:
        return scales.reshape(-1, 1)[start:stop]
    return scales.reshape(-1)[:1].reshape(1, 1)


def _losses(losses: list[tuple[float, str]], source: str) -> Finding:
    losses.sort(reverse=True)
    mean = sum(loss for loss, _ in losses) / len(losses)
    worst = ", ".join(f"{layer} {loss:.2%}" for loss, layer in losses[:3])
    return Finding(
        "requantized",
        f"FP8 weights as int8 with one scale per output differ by {mean:.2%} on average over {len(losses):,} layers "
        "(relative error of the weight)",
        file=source,
        found=f"worst: {worst}",
        fix="nothing, if that is acceptable; VLLM_NPU_QUANT_FP8=bf16 keeps the numbers, at twice the memory",
        severity=Severity.INFO,
    )
