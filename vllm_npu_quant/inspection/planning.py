# SPDX-License-Identifier: Apache-2.0
"""``plan``: does a checkpoint fit on a chip, how many tokens beside it, and what the chip's published peaks allow.

The roofline is an upper bound from published peaks, not a forecast: no overhead, no dequantization, no communication.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.inspection.chips import Chip, chip_of
from vllm_npu_quant.inspection.layers import OTHER, Layer, layers_of
from vllm_npu_quant.inspection.memory import ACT, kv_cache, layer_bytes, part_of
from vllm_npu_quant.inspection.model import Model, open_model
from vllm_npu_quant.inspection.parallel import fitting_sizes
from vllm_npu_quant.spec import LayerKind

__all__ = ["Plan", "Roofline", "Source", "plan"]

#: Device memory for activations, graphs and the communication library: an assumption, not a measurement.
RESERVE = 2 << 30


@dataclass(frozen=True)
class Source:
    """Where a published number is from."""

    what: str
    value: float
    source: str


@dataclass(frozen=True)
class Roofline:
    """Layers of one scheme in one phase, on one rank.

    Attributes:
        phase: "decode" or "prefill". scheme, kind, method: of the layers. layers: how many.
        nbytes: weights and activations moved. operations: multiplications and additions.
        seconds: the larger of both over the chip's peaks; None where a peak is not known.
        bound: "memory" or "compute".
        gain: the same for float weights of the same sizes, divided by ``seconds``: at most this much faster.
    """

    phase: str
    scheme: str
    kind: str
    method: str
    layers: int
    nbytes: int
    operations: int
    seconds: float | None
    bound: str
    gain: float | None


@dataclass(frozen=True)
class Plan:
    """What one rank of a deployment holds, and what fits.

    Attributes:
        model, device, device_name, tp, ep: what was asked.
        weight_bytes: of one rank, after preparation. stored_bytes: of the checkpoint's files.
        kv_bytes_per_token: of one rank; 0 where not known. kv_how: how it was computed.
        memory: of the device; None where not known. usable: the share that vLLM may use. reserve: assumed for the rest.
        tokens: that fit into the KV cache; None where not known, negative never.
        max_model_len: what ``fits`` asks for.
        fits: whether weights and one sequence of max_model_len fit; None where not known.
        smallest_tp: the smallest size that fits and that the layers can be cut for; None where there is none.
        batch, prompt: sequences of a decode step, tokens of a prefill.
        roofline: by phase and scheme.
        sources: of the chip's numbers. remarks: what a reader has to know.
    """

    model: str
    device: str
    device_name: str
    tp: int
    ep: int
    weight_bytes: int
    stored_bytes: int
    kv_bytes_per_token: int
    kv_how: str
    memory: float | None
    usable: float | None
    reserve: int
    tokens: int | None
    max_model_len: int
    fits: bool | None
    smallest_tp: int | None
    batch: int
    prompt: int
    roofline: tuple[Roofline, ...]
    sources: tuple[Source, ...]
    remarks: tuple[str, ...]


def plan(
    model: str | os.PathLike[str] | Model,
    *,
    device: str,
    tp: int = 1,
    ep: int = 1,
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.9,
    batch: int = 16,
    prompt: int = 2048,
    revision: str | None = None,
) -> Plan:
    """Does a checkpoint fit, and what may its scheme gain.

    Args:
        model: a folder, a hub id, or an opened model.
        device: "a2", "a3", "a5" or "310p".
        tp: tensor-parallel size. ep: how many ranks share the experts; 1 where tensor parallelism cuts them.
        max_model_len: tokens of one sequence; config.json's where None.
        gpu_memory_utilization: the share of the device memory that vLLM may use.
        batch: sequences of a decode step. prompt: tokens of a prefill.
        revision: branch, tag or commit of a hub id.

    Raises:
        NpuQuantError: where the checkpoint cannot be read, or its format is not known.
        ValueError: for an unknown device, or a size out of its range.
    """
    chip = chip_of(device)
    if min(tp, ep, batch, prompt) < 1 or not 0 < gpu_memory_utilization <= 1:
        raise ValueError("sizes are at least 1, and gpu_memory_utilization is above 0 and at most 1")
    opened = model if isinstance(model, Model) else open_model(model, revision=revision)
    quant_format = opened.require_format()
    layers = layers_of(quant_format, opened.checkpoint)
    if not layers:
        raise NpuQuantError([*opened.checkpoint.findings, _nothing(opened.name)])
    length = max_model_len or opened.size("max_position_embeddings", "n_positions", "seq_length") or 4096
    weights = _weights(layers, tp, ep)
    kv = kv_cache(opened, tp)
    usable = None if chip.memory is None else chip.memory.value * gpu_memory_utilization
    tokens = _tokens(usable, weights, kv.bytes_per_token)
    smallest = None
    if usable is not None and kv.bytes_per_token:
        for size in fitting_sizes(opened, layers):
            experts = size if ep > 1 else 1
            found = _tokens(usable, _weights(layers, size, experts), kv_cache(opened, size).bytes_per_token)
            if found is not None and found >= length:
                smallest = size
                break
    return Plan(
        model=opened.name,
        device=chip.key,
        device_name=chip.name,
        tp=tp,
        ep=ep,
        weight_bytes=weights,
        stored_bytes=opened.checkpoint.total_bytes,
        kv_bytes_per_token=kv.bytes_per_token,
        kv_how=kv.how,
        memory=None if chip.memory is None else chip.memory.value,
        usable=usable,
        reserve=RESERVE,
        tokens=tokens,
        max_model_len=length,
        fits=None if tokens is None else tokens >= length,
        smallest_tp=smallest,
        batch=batch,
        prompt=prompt,
        roofline=tuple(_roofline(chip, opened, layers, tp, ep, batch, prompt)),
        sources=_sources(chip),
        remarks=tuple(_remarks(chip, opened, layers, smallest is None and usable is not None)),
    )


def _nothing(name: str) -> Finding:
    return Finding("unreadable-file", "there are no weights to plan for", file=name, fix="check the path")


def _weights(layers: Iterable[Layer], tp: int, ep: int) -> int:
    return sum(layer_bytes(layer, tp, ep) for layer in layers)


def _tokens(usable: float | None, weights: int, per_token: int) -> int | None:
    """Tokens that fit beside the weights; None where memory or cache are not known."""
    if usable is None or not per_token:
        return None
    return max(int((usable - RESERVE - weights) // per_token), 0)


def _roofline(
    chip: Chip, model: Model, layers: Sequence[Layer], tp: int, ep: int, batch: int, prompt: int
) -> Iterable[Roofline]:
    chosen = model.size("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts") or 1
    for phase, tokens in (("decode", batch), ("prefill", prompt)):
        groups: dict[tuple[str, str, str], list[Layer]] = {}
        for layer in layers:
            if layer.kind != OTHER and layer.outputs:
                groups.setdefault((layer.scheme, layer.kind, layer.method), []).append(layer)
        for (scheme, kind, method), members in groups.items():
            nbytes = operations = float_bytes = 0
            for layer in members:
                moved, moved_float, done = _traffic(layer, tp, ep, tokens, chosen)
                nbytes, float_bytes, operations = nbytes + moved, float_bytes + moved_float, operations + done
            act = members[0].spec.activation
            peak = chip.fp16 if act is None else chip.int8
            seconds, bound = _time(chip, nbytes, operations, peak.value if peak else None)
            as_float, _ = _time(chip, float_bytes, operations, chip.fp16.value if chip.fp16 else None)
            gain = as_float / seconds if seconds and as_float else None
            count = sum(layer.count for layer in members)
            yield Roofline(phase, scheme, kind, method, count, nbytes, operations, seconds, bound, gain)


def _traffic(layer: Layer, tp: int, ep: int, tokens: int, chosen: int) -> tuple[int, int, int]:
    """Bytes moved, bytes moved with float weights, and operations of one rank's part of a layer."""
    part = part_of(layer, tp, ep)
    rows, touched = float(tokens), 1.0
    if layer.kind == LayerKind.FUSED_MOE.value:
        # Each token takes `chosen` of all experts; with even routing, this share of them is needed at all.
        share = min(chosen / layer.count, 1.0)
        touched = 1.0 - (1.0 - share) ** tokens
        rows = tokens * chosen * part.count / layer.count
    elif layer.kind == LayerKind.LM_HEAD.value and tokens > 1024:
        rows = 1.0  # of a prompt, only the last token's logits are computed
    weights = layer_bytes(layer, tp, ep) * touched
    floats = ACT * part.outputs * part.inputs * part.count * touched
    width = ACT if layer.spec.activation is None else layer.spec.activation.bits / 8
    values = rows * (part.inputs * width + part.outputs * ACT)
    float_values = rows * ACT * (part.inputs + part.outputs)
    return int(weights + values), int(floats + float_values), int(2 * rows * part.outputs * part.inputs)


def _time(chip: Chip, nbytes: int, operations: int, peak: float | None) -> tuple[float | None, str]:
    """The larger of the times that memory and arithmetic take at their peaks, and which it is."""
    if chip.bandwidth is None or peak is None:
        return None, ""
    memory, compute = nbytes / chip.bandwidth.value, operations / peak
    return max(memory, compute), "memory" if memory >= compute else "compute"


def _sources(chip: Chip) -> tuple[Source, ...]:
    numbers = (("memory", chip.memory), ("bandwidth", chip.bandwidth), ("fp16", chip.fp16), ("int8", chip.int8))
    return tuple(Source(what, number.value, number.source) for what, number in numbers if number is not None)


def _remarks(chip: Chip, model: Model, layers: Iterable[Layer], fits_nowhere: bool) -> Iterable[str]:
    if chip.remark:
        yield chip.remark
    yield "gains are upper bounds from published peaks: no overhead, no communication, nothing measured on an NPU"
    methods = {layer.method for layer in layers}
    if methods & {"WeightOnlyLinear", "WeightOnlyExperts"}:
        yield (
            "weight-only operators also write and read dequantized weights, which the bound leaves out; arXiv 2601.16536 "
            "measured at most 1.48 times float16 for a W4A16 kernel on Ascend 910"
        )
    if "W4A4DynamicLinear" in methods or "W4A4DynamicExperts" in methods:
        yield "no int4 peak is published: int8's is used for W4A4"
    unserved = [layer.name for layer in layers if not layer.spec.is_float and layer.row is None]
    if unserved:
        yield f"{len(unserved)} quantized layers are not served (see check); they are counted as float"
    if fits_nowhere:
        yield "no tensor-parallel size that cuts the layers evenly leaves room for max_model_len tokens"
    if not model.config:
        yield "without config.json, attention heads and the KV cache are not known"
