# SPDX-License-Identifier: Apache-2.0
"""``plan``: does a checkpoint fit on a chip, how many tokens beside it, and what the chip's published peaks allow.

The roofline is an upper bound from published peaks, not a forecast: no overhead, no dequantization, no communication.
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
    """Layers of one scheme, or of one name, in one phase, on one rank.

    Attributes:
        phase: "decode" or "prefill". scheme, kind, method: of the layers. layers: how many.
        nbytes: weights and activations moved. operations: multiplications and additions.
        seconds: the larger of both over the chip's peaks; None where no bandwidth is known.
        bound: "memory" or "compute"; "memory only" where the arithmetic's peak is not known and was left out.
        gain: the same for float weights of the same sizes, divided by ``seconds``: at most this much faster.
        others: seconds with other schemes of the same layers: "float", "W8A8", "W4A16" (groups of 128), "W4A8".
        name: of the layers, with * for their numbers; empty where they are counted by scheme.
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
        roofline: by phase and scheme. layers: by phase and layer, the depths together.
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
    """Does a checkpoint fit, and what may its scheme gain.

    Args:
        model: a folder, a hub id, or an opened model.
        device: "a2", "a3", "a5" or "310p".
        tp: tensor-parallel size. ep: how many ranks share the experts; 1 where tensor parallelism cuts them.
        max_model_len: tokens of one sequence; config.json's where None.
        gpu_memory_utilization: the share of the device memory that vLLM may use.
        batch: sequences of a decode step. prompt: tokens of a prefill.
        revision: branch, tag or commit of a hub id.
        follow_links: whether links that lead out of the folder are followed; else they are findings.

    Raises:
        NpuQuantError: where the checkpoint cannot be read, or its format is not known.
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
    """Whether vLLM does not load a stored layer: an lm_head that is the embedding, layers of multi-token prediction."""
    if layer.name == "lm_head":
        return model.text_config.get("tie_word_embeddings") is True
    depth = model.size("num_hidden_layers")
    extra = model.size("num_nextn_predict_layers")
    number = layer.name.removeprefix("model.layers.").partition(".")[0] if extra else ""
    return number.isdigit() and len(number) < 9 and int(number) >= depth > 0


def _tokens(usable: float | None, weights: int, per_token: int) -> int | None:
    """Tokens that fit beside the weights; None where memory or cache are not known."""
    if usable is None or not per_token:
        return None
    return max(int((usable - RESERVE - weights) // per_token), 0)


#: Bytes of a weight's element with other schemes: what ``Roofline.others`` compares. Groups of 128 have 2 bytes each.
_OTHERS: dict[str, tuple[float, float, bool]] = {  # scheme: bytes per weight, bytes per activation, int8 arithmetic
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
    """What one rank moves for its part of a layer: rows of the input, bytes and elements of the weight."""

    part: LayerPart
    rows: float
    weights: float
    elements: float

    def values(self, layer: Layer) -> float:
        """Bytes of input and output."""
        width = ACT if layer.spec.activation is None else layer.spec.activation.bits / 8
        return self.rows * (self.part.inputs * width + self.part.outputs * ACT)


def _traffic(layer: Layer, tp: int, ep: int, tokens: int, chosen: int, kv_heads: int) -> _Traffic:
    part = part_of(layer, tp, ep, kv_heads)
    rows, touched = float(tokens), 1.0
    if layer.kind == LayerKind.FUSED_MOE.value:
        # Each token takes `chosen` of all experts; with even routing, this share of them is needed at all.
        share = min(chosen / layer.count, 1.0)
        touched = 1.0 - (1.0 - share) ** tokens
        rows = tokens * chosen * part.count / layer.count
    elif layer.kind == LayerKind.LM_HEAD.value and tokens > 1024:
        rows = 1.0  # of a prompt, only the last token's logits are computed
    weights = layer_bytes(layer, tp, ep, kv_heads) * touched
    return _Traffic(part, rows, weights, part.outputs * part.inputs * part.count * touched)


def _time(chip: Chip, nbytes: float, operations: float, peak: Number | None) -> tuple[float | None, str]:
    """The larger of the times that memory and arithmetic take at their peaks, and which it is."""
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
