# SPDX-License-Identifier: Apache-2.0
"""``plan``: memory of a checkpoint on a chip, tokens of the KV cache, and roofline times.

The roofline gives upper bounds from published peaks, not predictions: no overhead, dequantization or communication.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.inspection.chips import Chip, Number, chip_of
from vllm_npu_quant.inspection.layers import OTHER, UNKNOWN, Layer, layers_of
from vllm_npu_quant.inspection.memory import kv_cache, layer_bytes, rank_bytes
from vllm_npu_quant.inspection.model import Model, open_model
from vllm_npu_quant.inspection.overview import dtype_of
from vllm_npu_quant.inspection.parallel import NUMBER, LayerPart, fitting_sizes, kv_heads, part_of
from vllm_npu_quant.serving.cost import ACT
from vllm_npu_quant.spec import LayerKind

__all__ = ["Plan", "Roofline", "Source", "plan"]

#: Device memory for activations, graphs and the communication library; assumed, not measured.
RESERVE = 2 << 30


@dataclass(frozen=True)
class Source:
    """A published number and its source."""

    what: str
    value: float
    source: str


@dataclass(frozen=True)
class Roofline:
    """Roofline of the layers with one scheme, or one name, in one phase, on one rank.

    Attributes:
        phase: "decode" or "prefill".
        scheme, kind, method: those of the layers.
        layers: number of checkpoint layers.
        nbytes: bytes of weights and activations moved.
        operations: multiplications and additions.
        seconds: the larger of memory time and compute time at the chip's peaks; None if its bandwidth is not known.
        bound: "memory" or "compute"; "memory only" if the compute peak is not known and not considered.
        gain: upper bound on the speedup over float weights of the same sizes.
        others: seconds with other schemes: "float", "W8A8", "W4A16" (groups of 128), "W4A8".
        name: name of the layers, with * for their numbers; empty if they are grouped by scheme.
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
    others: Mapping[str, float | None] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Plan:
    """The result of ``plan``, for one rank.

    Attributes:
        model, device, device_name, tp, ep: the request.
        weight_bytes: bytes of the prepared weights of one rank.
        stored_bytes: bytes of the checkpoint's tensors.
        kv_bytes_per_token: bytes of the KV cache per token on one rank; 0 if not known.
        kv_how: its computation, as text.
        memory: bytes of the device; None if not known.
        usable: the part of ``memory`` that vLLM may use; None if not known.
        reserve: bytes of ``usable`` that are assumed for activations, graphs and communication.
        tokens: tokens that fit into the KV cache, at least 0; None if not known.
        max_model_len: tokens of one sequence.
        fits: whether weights and one sequence of max_model_len fit; None if not known.
        smallest_tp: the smallest tensor-parallel size that fits and divides the layers evenly; None if there is none.
        batch, prompt: sequences of a decode step, tokens of a prefill.
        roofline: grouped by phase and scheme.
        sources: sources of the chip's numbers.
        remarks: notes for users.
        layers: roofline grouped by phase and layer name, all depths together.
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
    layers: tuple[Roofline, ...] = ()


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
    follow_links: bool = False,
) -> Plan:
    """Plan the memory of a checkpoint on a chip and bound the gain of its schemes.

    Args:
        model: a folder, a hub id, or an opened model.
        device: "a2", "a3", "a5" or "310p".
        tp: tensor-parallel size.
        ep: number of ranks that share the experts; 1 if tensor parallelism splits them.
        max_model_len: tokens of one sequence; None for the value in config.json.
        gpu_memory_utilization: the fraction of the device memory that vLLM may use.
        batch: sequences of a decode step.
        prompt: tokens of a prefill.
        revision: branch, tag or commit of a hub id.
        follow_links: whether to follow links out of the folder; otherwise they are findings.

    Raises:
        NpuQuantError: the checkpoint cannot be read, or its format is not known.
        ValueError: for an unknown device, or a size out of its range.
    """
    chip = chip_of(device)
    if min(tp, ep, batch, prompt) < 1 or not 0 < gpu_memory_utilization <= 1:
        raise ValueError("sizes are at least 1, and gpu_memory_utilization is above 0 and at most 1")
    opened = model if isinstance(model, Model) else open_model(model, revision=revision, follow_links=follow_links)
    layers = [layer for layer in layers_of(opened) if not _left_out(opened, layer)]
    if not layers:
        raise NpuQuantError([*opened.checkpoint.findings, _nothing(opened.name)])
    length = max_model_len or opened.size("max_position_embeddings", "n_positions", "seq_length") or 4096
    heads = kv_heads(opened)
    half = dtype_of(opened) == "float16" or "bfloat16" not in chip.dtypes
    weights = rank_bytes(layers, tp, ep, heads, float16=half)
    kv = kv_cache(opened, tp)
    usable = None if chip.memory is None else chip.memory.value * gpu_memory_utilization
    tokens = _tokens(usable, weights, kv.bytes_per_token)
    smallest = None
    if usable is not None and kv.bytes_per_token:
        for size in fitting_sizes(opened, layers):
            experts = size if ep > 1 else 1
            found = _tokens(
                usable, rank_bytes(layers, size, experts, heads, float16=half), kv_cache(opened, size).bytes_per_token
            )
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
        layers=tuple(_roofline(chip, opened, layers, tp, ep, batch, prompt, by_name=True)),
        sources=_sources(chip),
        remarks=tuple(_remarks(chip, opened, layers, smallest is None and usable is not None)),
    )


def _nothing(name: str) -> Finding:
    return Finding("unreadable-file", "there are no weights to plan for", file=name, fix="check the path")


def _left_out(model: Model, layer: Layer) -> bool:
    """Whether vLLM does not load a stored layer: a tied lm_head, layers of multi-token prediction."""
    if layer.name == "lm_head":
        return model.tied_embeddings
    depth = model.size("num_hidden_layers")
    extra = model.size("num_nextn_predict_layers")
    number = layer.name.removeprefix("model.layers.").partition(".")[0] if extra else ""
    return number.isdigit() and len(number) < 9 and int(number) >= depth > 0


def _tokens(usable: float | None, weights: int, per_token: int) -> int | None:
    """Tokens that fit into the memory left by the weights; None if memory or KV cache are not known."""
    if usable is None or not per_token:
        return None
    return max(int((usable - RESERVE - weights) // per_token), 0)


#: Schemes of ``Roofline.others``: bytes per weight, bytes per activation, int8 arithmetic. W4A16 has groups of 128 with a
#: scale of 2 bytes.
_OTHERS: dict[str, tuple[float, float, bool]] = {
    "float": (ACT, ACT, False),
    "W8A8": (1.0, 1.0, True),
    "W4A16": (0.5 + ACT / 128, ACT, False),
    "W4A8": (0.5, 1.0, True),
}


def _roofline(
    chip: Chip,
    model: Model,
    layers: Sequence[Layer],
    tp: int,
    ep: int,
    batch: int,
    prompt: int,
    *,
    by_name: bool = False,
) -> Iterable[Roofline]:
    chosen = model.size("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts") or 1
    heads = kv_heads(model)
    groups: dict[tuple[str, str, str, str], list[Layer]] = {}
    for layer in layers:
        if layer.kind != OTHER and layer.outputs:
            name = NUMBER.sub("*", layer.name) if by_name else ""
            groups.setdefault((layer.scheme, layer.kind, layer.method, name), []).append(layer)
    for phase, tokens in (("decode", batch), ("prefill", prompt)):
        for (scheme, kind, method, name), members in groups.items():
            nbytes = operations = 0
            moved = dict.fromkeys(_OTHERS, 0.0)
            for layer in members:
                traffic = _traffic(layer, tp, ep, tokens, chosen, heads)
                nbytes += int(traffic.weights + traffic.values(layer))
                operations += int(2 * traffic.rows * traffic.part.outputs * traffic.part.inputs)
                for other, (weight, width, _) in _OTHERS.items():
                    moved[other] += traffic.elements * weight
                    moved[other] += traffic.rows * (traffic.part.inputs * width + traffic.part.outputs * ACT)
            act = members[0].spec.activation
            seconds, bound = _time(chip, nbytes, operations, chip.fp16 if act is None else chip.int8)
            others = {
                other: _time(chip, moved[other], operations, chip.int8 if integers else chip.fp16)[0]
                for other, (_, _, integers) in _OTHERS.items()
            }
            gain = others["float"] / seconds if seconds and others["float"] else None
            count = sum(layer.count for layer in members)
            yield Roofline(phase, scheme, kind, method, count, nbytes, operations, seconds, bound, gain, others, name)


@dataclass(frozen=True)
class _Traffic:
    """Traffic of one rank for its part of a layer: rows of the input, bytes and elements of the weight."""

    part: LayerPart
    rows: float
    weights: float
    elements: float

    def values(self, layer: Layer) -> float:
        """Bytes of the activations, input and output."""
        width = ACT if layer.spec.activation is None else layer.spec.activation.bits / 8
        return self.rows * (self.part.inputs * width + self.part.outputs * ACT)


def _traffic(layer: Layer, tp: int, ep: int, tokens: int, chosen: int, kv_heads: int) -> _Traffic:
    part = part_of(layer, tp, ep, kv_heads)
    rows, touched = float(tokens), 1.0
    if layer.kind == LayerKind.FUSED_MOE.value:
        # Each token is routed to `chosen` experts; with uniform routing, this fraction of the experts is used.
        share = min(chosen / layer.count, 1.0)
        touched = 1.0 - (1.0 - share) ** tokens
        rows = tokens * chosen * part.count / layer.count
    elif layer.kind == LayerKind.LM_HEAD.value and tokens > 1024:
        rows = 1.0  # for a prompt, only the logits of the last token are computed
    weights = layer_bytes(layer, tp, ep, kv_heads) * touched
    return _Traffic(part, rows, weights, part.outputs * part.inputs * part.count * touched)


def _time(chip: Chip, nbytes: float, operations: float, peak: Number | None) -> tuple[float | None, str]:
    """The larger of memory time and compute time at the chip's peaks, and the bound: "memory", "compute" or "memory only"."""
    if chip.bandwidth is None:
        return None, ""
    memory = nbytes / chip.bandwidth.value
    if peak is None:
        return memory, "memory only"
    compute = operations / peak.value
    return max(memory, compute), "memory" if memory >= compute else "compute"


def _sources(chip: Chip) -> tuple[Source, ...]:
    numbers = (("memory", chip.memory), ("bandwidth", chip.bandwidth), ("fp16", chip.fp16), ("int8", chip.int8))
    return tuple(Source(what, number.value, number.source) for what, number in numbers if number is not None)


def _remarks(chip: Chip, model: Model, layers: Sequence[Layer], fits_nowhere: bool) -> Iterable[str]:
    if chip.remark:
        yield chip.remark
    if chip.fp16 is None:
        yield "without a float16 peak, times of float arithmetic count memory only: too good for prompts"
    yield "gains are upper bounds from published peaks: no overhead, no communication, nothing measured on an NPU"
    yield from dict.fromkeys(
        layer.row.cost.remark for layer in layers if layer.row is not None and layer.row.cost.remark
    )
    unserved = [layer.name for layer in layers if not layer.spec.is_float and layer.row is None]
    if unserved:
        yield f"{len(unserved):,} quantized layers are not served (see check); they are counted as float"
    unknown = sum(layer.spec == UNKNOWN for layer in layers)
    if unknown:
        yield f"{unknown:,} layers are quantized in a way that is not served (see check); they are counted as they are stored"
    if fits_nowhere:
        yield "no tensor-parallel size that cuts the layers evenly leaves room for max_model_len tokens"
    if not model.config:
        yield "without config.json, attention heads and the KV cache are not known"
