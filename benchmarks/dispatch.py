# SPDX-License-Identifier: Apache-2.0
"""How long the description of a very large checkpoint takes: validate, index, compare with headers, dispatch every layer.

The peer is the way in which vllm-ascend 0.23 looks layers up: per layer that is not fused, a scan over all keys for those
that start with the layer's name, and per norm a scan for a bias. It is written afresh here from that description, runs in
the same process on the same data, and does only its lookups: neither validation nor choice of a method. Both alternate,
and medians of their processor time are compared: each runs in one thread and waits for nothing.

    python benchmarks/dispatch.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

from vllm_npu_quant.checkpoint import TensorInfo
from vllm_npu_quant.formats.modelslim import read
from vllm_npu_quant.formats.resolve import LayerResolver
from vllm_npu_quant.serving.dispatch import find_row
from vllm_npu_quant.spec import LayerKind

LAYERS, DENSE, EXPERTS = 61, 3, 256
QUANTIZED = ("weight", "weight_scale", "weight_offset")


def deepseek_r1() -> dict[str, object]:
    """A description of DeepSeek-R1's size and names in W8A8_DYNAMIC: about 136,000 entries."""
    entries: dict[str, object] = {
        "model.embed_tokens.weight": "FLOAT",
        "model.norm.weight": "FLOAT",
        "lm_head.weight": "FLOAT",
    }

    def quantized(name: str) -> None:
        entries.update((f"{name}.{tensor}", "W8A8_DYNAMIC") for tensor in QUANTIZED)

    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_a_layernorm",
            "self_attn.kv_a_layernorm",
        ):
            entries[f"{layer}.{norm}.weight"] = "FLOAT"
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
            quantized(f"{layer}.self_attn.{name}")
        entries[f"{layer}.self_attn.kv_b_proj.weight"] = "FLOAT"
        if number < DENSE:
            for name in ("gate_proj", "up_proj", "down_proj"):
                quantized(f"{layer}.mlp.{name}")
            continue
        entries[f"{layer}.mlp.gate.weight"] = "FLOAT"
        entries[f"{layer}.mlp.gate.e_score_correction_bias"] = "FLOAT"
        for name in ("gate_proj", "up_proj", "down_proj"):
            quantized(f"{layer}.mlp.shared_experts.{name}")
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                quantized(f"{layer}.mlp.experts.{expert}.{name}")
    return {
        **entries,
        "version": "1.0.0",
        "model_quant_type": "W8A8_DYNAMIC",
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }


def headers(description: dict[str, object]) -> dict[str, TensorInfo]:
    """Stored tensors for the description: of one size, which changes no time."""
    stored = {"weight": ("I8", (256, 256)), "weight_scale": ("BF16", (256, 1)), "weight_offset": ("BF16", (256, 1))}
    found = {}
    for name, kind in description.items():
        if "." in name:
            dtype, shape = ("BF16", (256, 256)) if kind == "FLOAT" else stored[name.rpartition(".")[2]]
            found[name] = TensorInfo(name, dtype, shape, "model.safetensors", 0, 0)
    return found


def model_layers() -> list[tuple[str, tuple[str, ...]]]:
    """The layers that vLLM asks for, with the shards of the fused ones."""
    layers: list[tuple[str, tuple[str, ...]]] = []
    for number in range(LAYERS):
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        layers.append((f"{attention}.fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")))
        layers += [(f"{attention}.{name}", ()) for name in ("q_b_proj", "kv_b_proj", "o_proj")]
        dense = mlp if number < DENSE else f"{mlp}.shared_experts"
        layers += [(f"{dense}.gate_up_proj", ("gate_proj", "up_proj")), (f"{dense}.down_proj", ())]
        if number >= DENSE:
            layers += [(f"{mlp}.gate", ()), (f"{mlp}.experts", ())]
    return layers


def ours(
    description: dict[str, object], tensors: dict[str, TensorInfo], layers: list[tuple[str, tuple[str, ...]]]
) -> int:
    """Validate and index the description, compare it with the headers, resolve every layer, and choose its method class."""
    found = read(description, tensors)
    if found.findings:
        sys.exit("\n".join(finding.render() for finding in found.findings))
    resolver = LayerResolver(found)
    resolved = 0
    for name, _ in layers:
        if name.endswith(".experts"):
            experts = resolver.resolve_experts(name)
            for spec in (experts.w13.spec, experts.w2.spec):
                find_row(LayerKind.FUSED_MOE, spec)
        else:
            spec = resolver.resolve(name).spec
            if not spec.is_float and find_row(LayerKind.LINEAR, spec) is None:
                sys.exit(f"no method class for {name}")
        resolved += 1
    return resolved


def scans(description: dict[str, object], layers: list[tuple[str, tuple[str, ...]]]) -> int:
    """The peer's lookups: a key scan for each layer that is not fused, and one for each norm."""
    resolved = 0
    for name, shards in layers:
        if shards:
            parent = name.rpartition(".")[0]
            kinds = {description[f"{parent}.{shard}.weight"] for shard in shards}
        else:
            kinds = {kind for key, kind in description.items() if key.startswith(name) and key.endswith(".weight")}
        assert kinds
        resolved += 1
    for _ in range(4 * LAYERS + 1):
        any("norm.bias" in key for key in description)
    return resolved


def timed(run: Callable[[], int]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    description, layers = deepseek_r1(), model_layers()
    tensors = headers(description)
    pairs = [
        (timed(lambda: ours(description, tensors, layers)), timed(lambda: scans(description, layers)))
        for _ in range(arguments.rounds)
    ]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{len(description):,} entries, {len(layers)} layers; Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    print(f"validate + index + dispatch   {mine:7.3f} s")
    print(f"lookups by scanning           {theirs:7.3f} s")
    print(f"ratio                         {theirs / mine:7.1f} x")
    if arguments.json:
        with open(arguments.json, "w") as stream:
            json.dump(
                {"entries": len(description), "ours_s": mine, "scans_s": theirs, "pairs_s": pairs}, stream, indent=2
            )


if __name__ == "__main__":
    main()
