# SPDX-License-Identifier: Apache-2.0
"""The emulated operators against what else this CPU can do, and against the machine's own limits.

Peers: bfloat16 linear, torch._int_mm, and vLLM's oneDNN and wna16 kernels where this build of vLLM has them for this CPU.
Limits, measured in the same run: memory bandwidth (reading), and the rate of int8 products in registers. The roofline of a
call is the larger of weight bytes / bandwidth and products / rate. All take turns; medians.

    python benchmarks/operators.py [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_npu_quant import emulation
from vllm_npu_quant.emulation import native

SHAPES = ((2048, 2048), (4096, 11008))
ROWS = (1, 16, 256)
EXPERTS = (64, 2048, 1408)
SLOWEST = 2.0

Call = Callable[[], Any]


def seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call; they take turns. A call that takes seconds is made once."""
    first = {name: seconds(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if first[name] < SLOWEST or not times[name]:
                repeat = max(1, min(20, int(0.002 / max(first[name], 1e-6))))
                times[name] += [seconds(call) for _ in range(repeat)]
    return {name: statistics.median(values) for name, values in times.items()}


def limits() -> dict[str, float]:
    """Bytes read per second, and int8 multiply-adds per second, with torch's number of threads."""
    if not native.available():
        return {}
    library = ctypes.CDLL(str(native.build(Path(__file__).with_name("roofline.c"))))
    library.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.read_bytes.restype = library.multiply_adds.restype = ctypes.c_int64
    library.multiply_adds.argtypes = [ctypes.c_int64]
    memory = torch.zeros(256 << 20, dtype=torch.int8)
    steps = 2_000_000
    library.multiply_adds(steps)
    bandwidth = max(
        memory.numel() / seconds(lambda: library.read_bytes(memory.data_ptr(), memory.numel())) for _ in range(7)
    )
    rates = []
    for _ in range(7):
        started = time.perf_counter()
        done = library.multiply_adds(steps)
        rates.append(done / (time.perf_counter() - started))
    return {"bytes/s": bandwidth, "multiply-adds/s": max(rates)}


def vllm_peers(weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Call]:
    """vLLM's oneDNN int8 product, where this CPU's build has it; weight int8 [K, N], x bfloat16 [M, K]."""
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        handler = ops.create_onednn_scaled_mm(weight.t().contiguous().t(), scale, torch.bfloat16, True, False, 32)
    except (ImportError, AttributeError, RuntimeError):
        return {}
    quantized, token_scale, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
    out = torch.empty(x.shape[0], weight.shape[1], dtype=torch.bfloat16)
    return {"vllm onednn": lambda: ops.onednn_scaled_mm(handler, quantized, out, token_scale, None, None, None)}


def dense(rows: int, depth: int, width: int) -> dict[str, Call]:
    weight = torch.randint(-128, 128, (depth, width), dtype=torch.int8)
    packed = torch.randint(-(2**31), 2**31 - 1, (depth, width // 8)).to(torch.int32)
    x = torch.randn(rows, depth, dtype=torch.bfloat16)
    scale, scales = torch.rand(width), torch.rand(depth // 128, width).to(torch.bfloat16)
    quantized, token_scale = torch.ops.npu.npu_dynamic_quant(x)
    npu = torch.ops.npu
    calls: dict[str, Call] = {
        "npu_quant_matmul": lambda: npu.npu_quant_matmul(
            quantized, weight, scale, pertoken_scale=token_scale, output_dtype=torch.bfloat16
        ),
        "npu_weight_quant_batchmatmul int8": lambda: npu.npu_weight_quant_batchmatmul(x, weight, scales[0]),
        "npu_weight_quant_batchmatmul int4": lambda: npu.npu_weight_quant_batchmatmul(
            x, packed, scales, antiquant_group_size=128
        ),
        "npu_dynamic_quant": lambda: npu.npu_dynamic_quant(x),
        **vllm_peers(weight, x, scale),
    }
    if 2 * rows * depth * width < 2e9:
        linear = weight.t().contiguous().to(torch.bfloat16)
        calls["bf16 linear"] = lambda: torch.nn.functional.linear(x, linear)
        calls["torch._int_mm"] = lambda: torch._int_mm(quantized, weight)
    return calls


def experts(rows: int) -> dict[str, Call]:
    count, depth, width = EXPERTS
    weight = torch.randint(-128, 128, (count, depth, width), dtype=torch.int8)
    scale = torch.rand(count, width).to(torch.bfloat16)
    x = torch.randint(-128, 128, (rows, depth), dtype=torch.int8)
    counts = torch.bincount(torch.arange(rows) % count, minlength=count)
    return {
        "npu_grouped_matmul": lambda: torch.ops.npu.npu_grouped_matmul(
            [x],
            [weight],
            scale=[scale],
            per_token_scale=[torch.ones(rows)],
            group_list=counts,
            split_item=2,
            group_type=0,
            group_list_type=1,
            output_dtype=torch.bfloat16,
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    emulation.register()
    bounds = limits()
    results: dict[str, Any] = {"limits": bounds, "threads": torch.get_num_threads(), "calls": {}}
    for name, value in bounds.items():
        print(f"{name:<20}{value / 1e9:8.1f} G")
    shapes = [(f"{depth}x{width}", rows, (depth, width)) for depth, width in SHAPES for rows in ROWS]
    for title, rows, (depth, width) in shapes:
        times = compare(dense(rows, depth, width), arguments.rounds)
        report(results, f"M={rows} {title}", times, rows * depth * width, depth * width)
    for rows in ROWS:
        touched = min(rows, EXPERTS[0]) * EXPERTS[1] * EXPERTS[2]
        times = compare(experts(rows), arguments.rounds)
        report(results, f"M={rows} {'x'.join(map(str, EXPERTS))}", times, rows * EXPERTS[1] * EXPERTS[2], touched)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def report(results: dict[str, Any], title: str, times: dict[str, float], products: int, weight_bytes: int) -> None:
    bounds = results["limits"]
    floor = max(weight_bytes / bounds["bytes/s"], products / bounds["multiply-adds/s"]) if bounds else 0.0
    results["calls"][title] = {"seconds": times, "roofline": floor}
    print(f"\n{title}: roofline of an int8 weight {floor * 1e6:.0f} us")
    for name, value in times.items():
        share = f"{floor / value:6.0%}" if floor and name in ("npu_quant_matmul", "npu_grouped_matmul") else ""
        print(f"  {name:<36}{value * 1e6:10.0f} us {2 * products / value / 1e9:8.1f} G/s {share}", flush=True)


if __name__ == "__main__":
    main()
