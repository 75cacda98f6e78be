# SPDX-License-Identifier: Apache-2.0
"""The emulated operators against what else this CPU can do, and against the machine's own limits.

Peers: bfloat16 linear, torch._int_mm, and vLLM's oneDNN and wna16 kernels where this build of vLLM has them for this CPU.
Every call takes the next of several equal weights, more than a cache holds, as the layers of a model do. Limits, measured in
every round: memory bandwidth (reading), and the rate of int8 products in registers. The roofline of a call is the larger of
weight bytes / bandwidth and products / rate; its share is that of the same round. All take turns; medians.

    python benchmarks/operators.py [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_npu_quant import emulation
from vllm_npu_quant.emulation import native
from vllm_npu_quant.methods.base import FRACTAL_NZ

SHAPES = ((2048, 2048), (4096, 11008))
ROWS = (1, 16, 256)
EXPERTS = (64, 2048, 1408)
EXPERTS_ROWS = (1, 6, 16, 256)
GROUP = 128
#: Bytes of the weights that calls go through in turns; no CPU of today keeps that in its caches.
COLD = 256 << 20
#: Of these the share of the roofline is shown.
INT8_PRODUCTS = ("npu_quant_matmul", "npu_grouped_matmul", "vllm onednn")
#: Seconds: a call that takes longer is made once.
SLOWEST = 1.0

#: A call, given which of its weights to use.
Call = Callable[[int], Any]


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


class Limits:
    """What this machine can do at most at this moment, with torch's number of threads."""

    STEPS = 1_000_000

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        if native.available():
            self.library = ctypes.CDLL(str(native.build(Path(__file__).with_name("roofline.c"))))
            self.library.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64]
            self.library.read_bytes.restype = self.library.multiply_adds.restype = ctypes.c_int64
            self.library.multiply_adds.argtypes = [ctypes.c_int64]
            self.memory = torch.ones(COLD, dtype=torch.int8)

    def measure(self) -> tuple[float, float]:
        """Bytes read from memory per second, and int8 multiply-adds per second; (0, 0) where neither can be measured."""
        if self.library is None:
            return 0.0, 0.0
        library, memory = self.library, self.memory
        reading = seconds(library.read_bytes, memory.data_ptr(), memory.numel())
        started = time.perf_counter()
        done = library.multiply_adds(self.STEPS)
        return memory.numel() / reading, done / (time.perf_counter() - started)


def compare(calls: dict[str, Call], rounds: int, limits: Limits, products: int, weight_bytes: int) -> dict[str, Any]:
    """Median seconds of each call, and the median share that it reaches of the roofline of an int8 weight."""
    turn = itertools.count()
    first = {name: seconds(call, next(turn)) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    shares: dict[str, list[float]] = {name: [] for name in calls}
    found = []
    for _ in range(rounds):
        bandwidth, rate = limits.measure()
        found.append((bandwidth, rate))
        for name, call in calls.items():
            if first[name] > SLOWEST and times[name]:
                continue
            repeat = max(1, min(20, int(0.02 / first[name])))
            taken = [seconds(call, next(turn)) for _ in range(repeat)]
            times[name].append(statistics.median(taken))
            if bandwidth:
                shares[name].append(max(weight_bytes / bandwidth, products / rate) / times[name][-1])
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "share of the roofline": {name: statistics.median(values) for name, values in shares.items() if values},
        "bytes/s": statistics.median(one[0] for one in found),
        "multiply-adds/s": statistics.median(one[1] for one in found),
    }


def vllm_peers(weights: list[torch.Tensor], packed: list[torch.Tensor], x: torch.Tensor) -> dict[str, Call]:
    """vLLM's own CPU products, those that its build has for this CPU.

    Args:
        weights: int8 [K, N].
        packed: int32 [K, N/8]; random, so that any layout is as good.
        x: bfloat16 [M, K].
    """
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
    except (ImportError, AttributeError, RuntimeError):
        return {}
    depth, width = weights[0].shape
    calls: dict[str, Call] = {}
    with contextlib.suppress(AttributeError, RuntimeError):
        scale = torch.rand(width)
        handlers = [
            ops.create_onednn_scaled_mm(weight.t().contiguous().t(), scale, torch.bfloat16, True, False, 32)
            for weight in weights
        ]
        quantized, token_scale, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty(x.shape[0], width, dtype=torch.bfloat16)

        def onednn(turn: int) -> None:
            ops.onednn_scaled_mm(handlers[turn % len(handlers)], quantized, out, token_scale, None, None, None)

        calls["vllm onednn"] = onednn
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        blocks = [weight.view(width // 16, 2 * depth) for weight in packed]  # sixteen columns together
        scales = torch.rand(depth // GROUP, width).to(torch.bfloat16)
        hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

        def wna16(turn: int) -> None:
            ops.cpu_gemm_wna16(x, blocks[turn % len(blocks)], scales, None, None, 8, hint)

        calls["vllm wna16"] = wna16
    return calls


def dense(rows: int, depth: int, width: int) -> dict[str, Call]:
    count = max(1, COLD // (depth * width))
    weights = [torch.randint(-128, 128, (depth, width), dtype=torch.int8) for _ in range(count)]
    packed = [torch.randint(-(2**31), 2**31 - 1, (depth, width // 8)).to(torch.int32) for _ in range(count)]
    x = torch.randn(rows, depth, dtype=torch.bfloat16)
    scale, scales = torch.rand(width), torch.rand(depth // GROUP, width).to(torch.bfloat16)
    quantized, token_scale = torch.ops.npu.npu_dynamic_quant(x)
    npu = torch.ops.npu
    calls: dict[str, Call] = {
        "npu_quant_matmul": lambda turn: npu.npu_quant_matmul(
            quantized, weights[turn % count], scale, pertoken_scale=token_scale, output_dtype=torch.bfloat16
        ),
        "npu_weight_quant_batchmatmul int8": lambda turn: npu.npu_weight_quant_batchmatmul(
            x, weights[turn % count], scales[0]
        ),
        "npu_weight_quant_batchmatmul int4": lambda turn: npu.npu_weight_quant_batchmatmul(
            x, packed[turn % count], scales, antiquant_group_size=GROUP
        ),
        "npu_dynamic_quant": lambda turn: npu.npu_dynamic_quant(x),
        **vllm_peers(weights, packed, x),
    }
    if 2 * rows * depth * width < 2e9:
        linears = [weight.t().contiguous().to(torch.bfloat16) for weight in weights]
        calls["bf16 linear"] = lambda turn: torch.nn.functional.linear(x, linears[turn % count])
        calls["torch._int_mm"] = lambda turn: torch._int_mm(quantized, weights[turn % count])
    return calls


def experts(rows: int) -> dict[str, Call]:
    """Rows for each expert in turn, as the methods of W8A8 and W4A8 call it. Few rows meet other experts in every call."""
    count, depth, width = EXPERTS
    counts = [torch.bincount((torch.arange(rows) + turn * rows) % count, minlength=count) for turn in range(count)]

    def call(weight: torch.Tensor, **operands: list[torch.Tensor]) -> Call:
        x = torch.randint(-128, 128, (rows, depth), dtype=torch.int8)
        token_scale = torch.ones(rows)
        return lambda turn: torch.ops.npu.npu_grouped_matmul(
            [x],
            [weight],
            **operands,
            per_token_scale=[token_scale],
            group_list=counts[turn % count],
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=torch.bfloat16,
        )

    int8 = torch.randint(-128, 128, (count, depth, width), dtype=torch.int8)
    int4 = torch.randint(-(2**31), 2**31 - 1, (count, depth, width // 8)).to(torch.int32)
    bits = torch.rand(count, 1, width).view(torch.int32).to(torch.int64)
    return {
        "npu_grouped_matmul": call(torch.ops.npu.npu_format_cast(int8, FRACTAL_NZ), scale=[torch.rand(count, width)]),
        "npu_grouped_matmul int8 x int4": call(int4, scale=[bits], bias=[torch.rand(count, width)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    emulation.register()
    emulation.build_kernels()
    limits = Limits()
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "calls": {}}

    def measured(title: str, calls: dict[str, Call], products: int, weight_bytes: int) -> None:
        found = results["calls"][title] = compare(calls, arguments.rounds, limits, products, weight_bytes)
        report(title, found, products)

    with torch.inference_mode():  # as vLLM's workers
        for depth, width in SHAPES:
            for rows in ROWS:
                products, weight_bytes = rows * depth * width, depth * width
                measured(f"M={rows} {depth}x{width}", dense(rows, depth, width), products, weight_bytes)
        count, depth, width = EXPERTS
        for rows in EXPERTS_ROWS:
            products, weight_bytes = rows * depth * width, min(rows, count) * depth * width
            measured(f"M={rows} {count}x{depth}x{width}", experts(rows), products, weight_bytes)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def report(title: str, found: dict[str, Any], products: int) -> None:
    limits = f"{found['bytes/s'] / 1e9:.1f} GB/s, {found['multiply-adds/s'] / 1e9:.0f} G multiply-adds/s"
    print(f"\n{title}: this machine meanwhile: {limits}")
    for name, value in found["seconds"].items():
        share = found["share of the roofline"].get(name)
        shown = f"{share:6.0%}" if share and name in INT8_PRODUCTS else ""
        print(f"  {name:<36}{value * 1e6:10.0f} us {products / value / 1e9:8.1f} G/s {shown}", flush=True)


if __name__ == "__main__":
    main()
