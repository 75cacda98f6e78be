# SPDX-License-Identifier: Apache-2.0
"""How long a checkpoint takes to load and how much memory that needs at most, side by side.

Two tables. The first: SmolLM2-135M through vLLM's engine in every format, each start in a process of its own, in turns, the
medians. "loader" is vLLM's model loader: building the layers, reading the files, and preparing the weights; "weights" is the
part of it after the layers are built; "engine" is the whole start, and "memory" the growth of the resident set in the
loader, at its peak. "own" is vLLM without the plugin (VLLM_NPU_QUANT=0) on the very same files.

The second: preparing the experts of one MoE layer of DeepSeek's size, hidden 7168 x intermediate 2048, 128 of them in int8
and 256 in int4, beside a plain copy of the same bytes. w13 and w2 are loaded and prepared one after the other, so that
stored and prepared weights stay below 8 GB together.

    python benchmarks/load.py [--configs bf16 ct-w8a8 ct-w8a8:own ...] [--rounds 5] [--experts 128] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine import CONFIGS, engine_environment, last_error, model_folder
from moe_load import load, prepare, reset_peak, resident

from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, WeightSpec

HIDDEN, INNER = 7168, 2048
_TOKEN = ActivationSpec(8, True, Granularity.TOKEN)
#: Name -> spec, listed tensors, experts for each of ``--experts``.
LAYERS = {
    "ModelSlim W8A8, int8": (
        LayerSpec("W8A8_DYNAMIC", Layout.MODELSLIM_INT, WeightSpec(8), _TOKEN),
        frozenset({"weight_offset"}),
        1,
    ),
    "ModelSlim W4A8, int4": (
        LayerSpec("W4A8_DYNAMIC", Layout.MODELSLIM_PACKED_N, WeightSpec(4), _TOKEN),
        frozenset[str](),
        2,
    ),
    "compressed-tensors W4A16 g256, int4": (
        LayerSpec("W4A16", Layout.CT_PACKED, WeightSpec(4, granularity=Granularity.GROUP, group_size=256)),
        frozenset[str](),
        2,
    ),
}


def start(name: str) -> None:
    """The worker: start the engine once, and print what it took as JSON."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader, default_loader

    taken: dict[str, float] = {}

    def timed(owner: Any, function: str, key: str, *, memory: bool = False) -> None:
        inner = getattr(owner, function)

        def call(*arguments: Any, **options: Any) -> Any:
            before, started = reset_peak() if memory else 0, time.perf_counter()
            result = inner(*arguments, **options)
            taken[key] = taken.get(key, 0.0) + time.perf_counter() - started
            if memory:
                taken["memory"] = resident("VmHWM") - before
            return result

        setattr(owner, function, call)

    timed(base_loader.BaseModelLoader, "load_model", "loader", memory=True)
    timed(base_loader, "process_weights_after_loading", "weights")
    timed(default_loader.DefaultModelLoader, "load_weights", "weights")
    started = time.perf_counter()
    LLM(
        model=str(model_folder(name)),
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=16 << 20,
    )
    taken["engine"] = time.perf_counter() - started
    print(json.dumps(taken), file=reply, flush=True)


def engine_starts(configs: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Config -> medians, or {"error": reason} where the engine refused the checkpoint."""
    for config in configs:
        model_folder(config)
    taken: dict[str, list[dict[str, float]]] = {config: [] for config in configs}
    results: dict[str, dict[str, Any]] = {}
    for number in range(rounds + 1):
        for config in configs:
            if config in results:
                continue
            done = subprocess.run(
                [sys.executable, __file__, "--worker", config.partition(":")[0]],
                env=engine_environment(config),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode or not done.stdout:
                results[config] = {"error": last_error(done.stderr.splitlines()) or f"exit status {done.returncode}"}
                continue
            row = json.loads(done.stdout)
            print(f"{config}: loader {row['loader']:.2f} s, engine {row['engine']:.1f} s", file=sys.stderr, flush=True)
            if number:  # the first round reads files into memory
                taken[config].append(row)
    for config, rows in taken.items():
        if rows:
            results[config] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            results[config]["rounds"] = rows
    return {config: results[config] for config in configs}


def layer(name: str, product: str, experts: int, queue: multiprocessing.Queue) -> None:
    """One of the two products of a MoE layer: seconds of preparing it, stored bytes, extra bytes, seconds of a copy."""
    from vllm_npu_quant import emulation

    emulation.register()
    spec, listed, factor = LAYERS[name]
    module, products = load(spec, listed, factor * experts, HIDDEN, INNER, only=product)
    stored = sum(parameter.nbytes for parameter in module.parameters())
    seconds, extra = prepare(module, products, HIDDEN, INNER, only=product)
    weight = max(module.parameters(), key=lambda parameter: parameter.nbytes).data
    started = time.perf_counter()
    weight.clone()
    queue.put((seconds, stored, extra, time.perf_counter() - started))


def layers(experts: int) -> dict[str, dict[str, float]]:
    """Each layer of LAYERS, its products in processes of their own."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for name, (_, _, factor) in LAYERS.items():
        rows = []
        for product in ("w13", "w2"):
            queue = context.Queue()
            process = context.Process(target=layer, args=(name, product, experts, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name}: exit status {process.exitcode}")
            rows.append(queue.get())
        seconds, stored, extra, copy = zip(*rows, strict=True)
        results[name] = {
            "experts": factor * experts,
            "seconds": sum(seconds),
            "bytes": sum(stored),
            "copy": sum(copy),
            # Of the whole layer, w13 and w2 being prepared one after the other.
            "extra": max(extra[0], extra[1]) / sum(stored),
            "most bytes": max(map(sum, zip(stored, extra, strict=True))),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="*", default=[config for config in CONFIGS if config != "w8a16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=128, help="in int8, and twice as many in int4; 0 for none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        start(arguments.worker)
        return
    if sys.platform != "linux":
        parser.error("peak memory is read from Linux's /proc")
    starts = engine_starts(arguments.configs, arguments.rounds)
    print(f"{'seconds':<16}{'loader':>9}{'weights':>9}{'engine':>9}{'memory':>12}{'loader to own':>15}")
    for config, row in starts.items():
        if "error" in row:
            print(f"{config:<16}  not served: {row['error']}")
            continue
        own = starts.get(f"{config}:own", {}).get("loader")
        share = f"{row['loader'] / own:15.2f}" if own else ""
        columns = "".join(f"{row[key]:9.2f}" for key in ("loader", "weights", "engine"))
        print(f"{config:<16}{columns}{row['memory'] / 1e6:9.0f} MB{share}")
    experts = layers(arguments.experts) if arguments.experts else {}
    if experts:
        print(f"\n{f'one MoE layer, {HIDDEN} x {INNER}':<38}experts  stored  prepare    copy  extra/stored    most")
    for name, found in experts.items():
        print(
            f"{name:<38}{found['experts']:7.0f}{found['bytes'] / 1e9:5.2f} GB{found['seconds']:7.1f} s"
            f"{found['copy']:6.1f} s{found['extra']:14.2f}{found['most bytes'] / 1e9:5.2f} GB"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"engine": starts, "layers": experts}, indent=2))


if __name__ == "__main__":
    main()
