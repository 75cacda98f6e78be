# SPDX-License-Identifier: Apache-2.0
"""Preparing the int4 experts of one MoE layer: time and peak memory, side by side with unpacking through int32 [E, K, N].

    python benchmarks/moe_load.py                      # 64 experts, hidden 2048, intermediate 1408, every layout
    python benchmarks/moe_load.py --experts 8 --limits # exit with 1 above 1.3 x the packed bytes, or below 3 x the speed

Every case runs in a process of its own. Memory is the growth of the resident set over the state after the checkpoint's
tensors are loaded, at its peak: Linux's VmHWM, reset before the measurement.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerSpec, Layout, WeightSpec

_TOKEN = ActivationSpec(8, True, Granularity.TOKEN)


def _spec(layout: Layout, group: int, act: ActivationSpec | None = None, *, symmetric: bool = True) -> LayerSpec:
    granularity = Granularity.GROUP if group else Granularity.CHANNEL
    return LayerSpec(
        layout.value, layout, WeightSpec(4, granularity=granularity, group_size=group, symmetric=symmetric), act
    )


#: Name -> spec, optional tensors, and whether the checkpoint packs two or eight integers in an element.
CASES = {
    "compressed-tensors W4A16 g128": (_spec(Layout.CT_PACKED, 128), frozenset()),
    "AWQ g128": (_spec(Layout.AWQ_GEMM, 128, symmetric=False), frozenset({"qzeros"})),
    "GPTQ g128": (_spec(Layout.GPTQ, 128), frozenset()),
    "ModelSlim W4A8 per channel": (_spec(Layout.MODELSLIM_PACKED_N, 0, _TOKEN), frozenset()),
    "ModelSlim W4A8 g256": (_spec(Layout.MODELSLIM_TWO_LEVEL_PACKED, 256, _TOKEN), frozenset()),
    "compressed-tensors W4A8 g128, unpacked": (_spec(Layout.CT_INT, 128, _TOKEN), frozenset()),
}


def resident(key: str) -> int:
    """Bytes of the resident set: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Forget the peak; the bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def load(
    spec: LayerSpec, listed: frozenset[str], experts: int, hidden: int, inner: int, only: str = ""
) -> tuple[nn.Module, list[Any]]:
    """A layer with the checkpoint's tensors of its experts, filled with something, and its products: w13 and w2, or one."""
    from vllm_npu_quant.engine.moe import _Product
    from vllm_npu_quant.formats.described import LayerEntry
    from vllm_npu_quant.serving.decide import Host, decide
    from vllm_npu_quant.spec import LayerKind

    entry, served = LayerEntry(spec, listed), decide(LayerKind.FUSED_MOE, spec, Host())
    products = [
        _Product("w13", served, (entry, entry), ("gate", "up"), torch.bfloat16),
        _Product("w2", served, (entry,), ("down",), torch.bfloat16),
    ]
    products[0].cut(inner, hidden, 1, 0, "experts", "config.json")
    products[1].cut(hidden, inner, 1, 0, "experts", "config.json")
    layer = nn.Module()
    for product in products:
        if only not in product.name:
            continue
        product.register(layer, experts, 1, lambda *_: None)
        for tensor in product.tensors:
            param = getattr(layer, f"{product.name}_{tensor.name}").data
            if param.dtype == torch.int64:
                param.zero_()
            elif tensor.name == "weight" and spec.layout is Layout.CT_INT:
                param.random_(-8, 8)
            elif tensor.name in ("weight_offset", "qzeros"):
                param.fill_(8 if tensor.name == "qzeros" else 0)
            elif param.is_floating_point():
                param.uniform_(0.001, 0.003)
            else:
                param[0].random_(-100, 100)
                param[1:] = param[0]
    return layer, products


def prepare(layer: nn.Module, products: list[Any], hidden: int, inner: int, only: str = "") -> tuple[float, int]:
    """What the engine does after loading. Returns the seconds, and the bytes at the peak above those before."""
    from vllm_npu_quant.layouts import load_object
    from vllm_npu_quant.methods.moe import FusedExperts

    methods = [load_object(product.served.require_row().method)(product.name + "_") for product in products]
    chain = FusedExperts(methods[0], methods[1], hidden, inner, (products[0].group_size, products[1].group_size))
    before, started = reset_peak(), time.perf_counter()
    for product, method, sizes in zip(products, methods, (chain.w13_sizes, chain.w2_sizes), strict=True):
        if only not in product.name:
            continue
        prepared = method.prepare(product.experts(layer), sizes, torch.bfloat16)
        product.receiver.drop(layer)
        for key, value in method.finish(prepared).items():
            layer.register_parameter(method.prefix + key, nn.Parameter(value, requires_grad=False))
        del prepared
    return time.perf_counter() - started, resident("VmHWM") - before


def measure(name: str, experts: int, hidden: int, inner: int, queue: multiprocessing.Queue) -> None:
    """One case: what the package does, on the layer's own parameters, and the unpacking of the same number of integers."""
    from vllm_npu_quant import emulation

    emulation.register()
    packed = experts * 3 * hidden * inner // 2
    layer, products = load(*CASES[name], experts, hidden, inner)
    seconds, extra = prepare(layer, products, hidden, inner)

    del layer
    words = [
        torch.randint(-(1 << 31), (1 << 31) - 1, (experts, outputs, inputs // 8), dtype=torch.int32)
        for outputs, inputs in ((2 * inner, hidden), (hidden, inner))
    ]
    before, started = reset_peak(), time.perf_counter()
    for number in range(2):
        words[number] = through_int32(words[number])
    slow, slow_extra = time.perf_counter() - started, resident("VmHWM") - before
    queue.put((seconds, extra / packed, slow, slow_extra / packed))


def through_int32(words: torch.Tensor) -> torch.Tensor:
    """int32 [E, N, K/8] to [E, K, N/8] as it is written most simply: through int32 [E, K, N]."""
    count, outputs, _ = words.shape
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    values = ((words.unsqueeze(-1) >> shifts) & 15).flatten(2)
    values = values.transpose(1, 2).contiguous()
    pairs = values.view(count, values.shape[1], outputs // 8, 8)
    packed = pairs[..., 0].clone()
    for place in range(1, 8):
        packed |= pairs[..., place] << (4 * place)
    return packed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--limits", action="store_true", help="exit with 1 where a limit is exceeded")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("peak memory is read from Linux's /proc")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    context = multiprocessing.get_context("spawn")
    print(f"{'layout':<40} seconds  x packed  through int32: seconds  x packed  faster")
    results, failed = {}, False
    for name in CASES:
        if options.only not in name:
            continue
        queue = context.Queue()
        process = context.Process(target=measure, args=(name, options.experts, options.hidden, options.inner, queue))
        process.start()
        process.join()
        if process.exitcode:
            return 1
        seconds, extra, slow, slow_extra = results[name] = queue.get()
        failed |= extra > 1.3 or slow < 3 * seconds
        print(
            f"{name:<40} {seconds:7.2f}  {extra:8.2f}  {slow:22.2f}  {slow_extra:8.2f}  {slow / seconds:6.1f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(options.limits and failed)


if __name__ == "__main__":
    sys.exit(main())
