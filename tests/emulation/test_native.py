# SPDX-License-Identifier: Apache-2.0
"""The built kernels against the reference, at the sizes where their loops begin and end; and what happens without them."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_emulation_registry import python

from vllm_npu_quant import emulation, settings
from vllm_npu_quant.emulation import native
from vllm_npu_quant.emulation.fast import forms
from vllm_npu_quant.emulation.fast.products import float_int_matmul
from vllm_npu_quant.emulation.numerics import dequantize_weight, int_matmul, pack_int4, unpack_weight

BF16, F16 = torch.bfloat16, torch.float16
OPERATORS = emulation.OPERATORS

built = pytest.mark.skipif(not native.available(), reason="needs x86-64 with AVX2 and a C compiler")


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """int8 with many extreme values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, shape, generator=generator)
    extremes = torch.where(torch.rand(shape, generator=generator) < 0.5, 127, -128)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, values, extremes).to(torch.int8)


def packed(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def positive(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)


def fast_kernel(name: str) -> Callable[..., Any]:
    kernel = OPERATORS[name].fast
    assert kernel is not None
    return kernel


@built
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 23, 24, 265])
@pytest.mark.parametrize("depth", [1, 2, 15, 256, 257, 777, 1300])
def test_integer_products_are_exact(rows: int, depth: int) -> None:
    for width in (1, 7, 16, 31, 129, 1025):
        x, weight = integers(rows, depth), integers(depth, width, seed=1)
        product = native.product(native.Kind.INT8, x, weight, torch.int32)
        assert torch.equal(product, int_matmul(x, weight)), width


#: vpdpbusd by its definition: unsigned times signed bytes, four products added to each 32-bit sum, without saturation.
VNNI = """
#include <immintrin.h>
#include <string.h>
static inline __m256i dpbusd(__m256i sums, __m256i left, __m256i right) {
    int sum[8];
    unsigned char u[32];
    signed char s[32];
    memcpy(sum, &sums, 32), memcpy(u, &left, 32), memcpy(s, &right, 32);
    for (int i = 0; i < 32; i++) sum[i / 4] += u[i] * s[i];
    memcpy(&sums, sum, 32);
    return sums;
}
#define DOT4 dpbusd
"""


@built
def test_products_are_exact_with_the_instruction_that_this_host_may_lack(tmp_path: Path) -> None:
    header = tmp_path / "vnni.h"
    header.write_text(VNNI)
    library = native.load(native.build(native.SOURCE, (*native.FLAGS, "-include", str(header))))
    assert native.reproduces_the_reference(library)
    for rows, depth in itertools.product((3, 17, 40), (37, 700)):
        x, weight = integers(rows, depth), integers(depth, 129, seed=1)
        assert torch.equal(
            native.product(native.Kind.INT8, x, weight, torch.int32, found=library), int_matmul(x, weight)
        )
    x, weight = packed(20, 8), packed(64, 5)  # sums of int4, without the instruction in 16 bits
    options = {"scale": positive(4, 40), "token_scale": positive(20), "group_size": 16}
    one, other = (
        native.product(native.Kind.INT4, x, weight, BF16, found=found, **options) for found in (library, None)
    )
    assert torch.equal(one, other)


@built
@pytest.mark.parametrize("rows", [1, 3, 4, 11, 16])
def test_few_rows_of_wide_layers_are_exact(rows: int) -> None:
    """More columns than one task has accumulators for, whole tiles and not."""
    for width in (4096, 4096 + 5, 9000):
        x, weight = integers(rows, 37), integers(37, width, seed=1)
        product = native.product(native.Kind.INT8, x, weight, torch.int32)
        assert torch.equal(product, int_matmul(x, weight)), width


@built
@pytest.mark.parametrize("out_dtype", [BF16, F16, torch.int32])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_quantized_products_are_equal_bit_for_bit(rows: int, out_dtype: torch.dtype) -> None:
    x, weight = integers(rows, 100), integers(100, 67, seed=1)
    code = {BF16: 15, F16: 5, torch.int32: 3}[out_dtype]
    biases = [None, packed(67) // 2**12]
    if out_dtype is not torch.int32:
        biases.append(positive(67))
    for bias, token_scale, scale in itertools.product(biases, (None, positive(rows)), (positive(67), positive(1))):
        if token_scale is None and out_dtype is F16 and bias is not None and bias.dtype != torch.int32:
            continue
        if out_dtype is torch.int32 and token_scale is not None:
            continue
        options = {"bias": bias, "pertoken_scale": token_scale, "output_dtype": code}
        fast = fast_kernel("npu_quant_matmul")(x, weight, scale * 1e-4, **options)
        assert torch.equal(fast, OPERATORS["npu_quant_matmul"].reference(x, weight, scale * 1e-4, **options))


@built
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("group_size", [0, 32, 64, 96])
def test_every_weight_is_dequantized_with_the_devices_roundings(dtype: torch.dtype, group_size: int) -> None:
    """One-hot rows pick rows of the weight, so that nothing is summed."""
    depth, width = 256, 152
    groups = -(-depth // group_size) if group_size else 1
    scale = positive(groups, width, dtype=dtype)
    offset = (torch.arange(groups * width) % 17 - 8).view(groups, width).to(dtype) * 1.5
    if not group_size:
        scale, offset = scale[0], offset[0]
    for weight, some_offset in itertools.product((integers(depth, width), packed(depth, width // 8)), (None, offset)):
        values = weight if weight.dtype == torch.int8 else unpack_weight(weight, True)
        expected = dequantize_weight(values, scale, some_offset, dtype, group_size)
        one_by_one = [slice(row, row + 1) for row in range(depth - 17, depth)]  # looked up
        for rows in (slice(0, depth), slice(250, 253), *one_by_one):  # many, few, one
            x = torch.eye(depth, dtype=dtype)[rows].contiguous()
            fast = fast_kernel("npu_weight_quant_batchmatmul")(
                x, weight, scale, some_offset, antiquant_group_size=group_size
            )
            assert torch.equal(fast, expected[rows])


@built
@pytest.mark.parametrize("offset", [None, -1.5], ids=["symmetric", "offset"])
def test_every_code_of_every_scale_is_looked_up(offset: float | None) -> None:
    """All sixteen codes times scales of every sign and size, denormal ones among them, in one row at a time."""
    depth, width, group_size = 96, 2048, 32
    codes = (torch.arange(depth)[:, None] + torch.arange(width)) % 16 - 8
    weight = pack_int4(codes.to(torch.int32))
    bits = torch.randint(-(2**15), 2**15, (depth // group_size, width), generator=torch.Generator().manual_seed(3))
    scale = bits.to(torch.int16).view(BF16)
    scale = torch.where(scale.abs().float() < 2.0**120, scale, 3.0)  # times 8, and finite
    some_offset = None if offset is None else torch.full_like(scale, offset)
    expected = dequantize_weight(codes.to(torch.int8), scale, some_offset, BF16, group_size)
    for row in range(depth):
        x = torch.eye(depth, dtype=BF16)[row : row + 1].contiguous()
        fast = fast_kernel("npu_weight_quant_batchmatmul")(
            x, weight, scale, some_offset, antiquant_group_size=group_size
        )
        assert torch.equal(fast[0], expected[row]), row


@built
def test_scales_that_are_not_finite_spoil_what_they_spoil_in_the_reference() -> None:
    weight, x = packed(64, 16), torch.randn(1, 64, generator=torch.Generator().manual_seed(4)).to(BF16)
    weight[:, 0] = 0  # eight columns of zeros: 0 * inf is NaN
    for special in (float("inf"), float("-inf"), float("nan")):
        scale = positive(128, dtype=BF16)
        scale[::3] = special
        fast = fast_kernel("npu_weight_quant_batchmatmul")(x, weight, scale)
        slow = OPERATORS["npu_weight_quant_batchmatmul"].reference(x, weight, scale)
        assert torch.equal(fast.isfinite(), slow.isfinite())
        assert torch.equal(fast.isnan(), slow.isnan())


@built
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("rows", [1, 2])
def test_any_number_of_threads_may_share_the_inputs(rows: int, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for depth, width in ((5, 16384), (1100, 4099), (8203, 33)):
            x, weight = integers(rows, depth), integers(depth, width, seed=1)
            product = native.product(native.Kind.INT8, x, weight, torch.int32)
            assert torch.equal(product, int_matmul(x, weight)), (depth, width)
    finally:
        torch.set_num_threads(before)


@built
@pytest.mark.parametrize("sizes", [[3, 0, 1, 300, 5], [0, 0, 2, 4, 0]], ids=["most", "few"])
def test_experts_are_multiplied_by_their_own_weights(sizes: list[int]) -> None:
    counts = torch.tensor(sizes)
    rows, depth, width = int(counts.sum()) + 2, 70, 40
    options = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1, "output_dtype": 15}
    calls: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = [
        (
            integers(rows, depth),
            integers(5, depth, width, seed=1),
            {"scale": [positive(5, width, dtype=BF16)], "per_token_scale": [positive(rows)]},
        ),
        (
            integers(rows, 512),
            packed(5, 512, 5),
            {
                "scale": [positive(5, 2, width).view(torch.int32).to(torch.int64)],
                "bias": [positive(5, width)],
                "per_token_scale": [positive(rows)],
            },
        ),
        (
            packed(rows, 8),
            packed(5, 64, 5),
            {"scale": [positive(5, 4, width).view(torch.int32).to(torch.int64)], "per_token_scale": [positive(rows)]},
        ),
    ]
    for x, weight, more in calls:
        (fast,) = fast_kernel("npu_grouped_matmul")([x.clone()], [weight], **options, **more)
        (wanted,) = OPERATORS["npu_grouped_matmul"].reference([x.clone()], [weight], **options, **more)
        assert torch.equal(fast[:-2], wanted[:-2])
        assert torch.equal(fast.isnan(), wanted.isnan())


@built
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dynamic_quantization_is_equal_for_every_kind_of_number(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = bits.view(-1, 32)  # rows of denormals, of NaN and infinities, of zeros and of all else
    mixed = bits[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(-1, 64)
    finite = torch.where(mixed.isfinite(), mixed, 0)[:, :61].contiguous()
    for x in (every, finite, torch.zeros(3, 5, dtype=dtype)):
        fast, scale = fast_kernel("npu_dynamic_quant")(x)
        wanted, wanted_scale = OPERATORS["npu_dynamic_quant"].reference(x)
        assert torch.equal(fast, wanted)
        assert torch.equal(
            scale.view(torch.int32)[~wanted_scale.isnan()], wanted_scale.view(torch.int32)[~wanted_scale.isnan()]
        )
        assert torch.equal(scale.isnan(), wanted_scale.isnan())


def test_float32_products_by_parts_are_exact() -> None:
    x = torch.full((3, 3000), -128, dtype=torch.int8)
    for weight in (torch.full((3000, 5), -128, dtype=torch.int8), integers(3000, 5)):
        assert torch.equal(float_int_matmul(x, weight), int_matmul(x, weight))


def test_without_the_kernels_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    x, weight = integers(5, 1100), integers(1100, 24, seed=1)
    options = {"pertoken_scale": positive(5), "output_dtype": 15}
    fast = fast_kernel("npu_quant_matmul")(x, weight, positive(24), **options)
    assert torch.equal(fast, OPERATORS["npu_quant_matmul"].reference(x, weight, positive(24), **options))
    tokens = torch.randn(5, 64, dtype=BF16)
    assert all(
        map(torch.equal, fast_kernel("npu_dynamic_quant")(tokens), OPERATORS["npu_dynamic_quant"].reference(tokens))
    )


def test_a_host_without_a_compiler_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "_folder", lambda: tmp_path)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not native.available()
            assert not native.available()
        assert [record for record in caplog.messages if "no C compiler" in record] == caplog.messages
        assert len(caplog.messages) == 1
    finally:
        native.library.cache_clear()


@built
def test_kernels_that_are_not_exact_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = native.product
    wrong = lambda *args, **options: real(*args, **options) + 1  # noqa: E731
    monkeypatch.setattr(native, "product", wrong)
    native.library.cache_clear()
    try:
        assert not native.available()
    finally:
        native.library.cache_clear()


@built
def test_a_folder_that_others_can_write_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_NPU_QUANT_CACHE", str(tmp_path))
    assert native._folder() == tmp_path / "native"
    assert (tmp_path / "native").stat().st_mode & 0o077 == 0
    os.chmod(tmp_path / "native", 0o777)
    assert native._folder() != tmp_path / "native"


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("VLLM_NPU_QUANT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert settings.cache_dir() == tmp_path / ".cache" / "vllm-npu-quant"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert settings.cache_dir() == tmp_path / "xdg" / "vllm-npu-quant"
    monkeypatch.setenv("VLLM_NPU_QUANT_CACHE", "~/own")
    assert settings.cache_dir() == tmp_path / "own"


@built
def test_a_library_is_built_once_for_a_source_and_its_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_folder", lambda: tmp_path)
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }\n")
    first = native.build(source)
    stamp = first.stat().st_mtime_ns
    assert native.build(source) == first
    assert first.stat().st_mtime_ns == stamp
    assert native.build(source, (*native.FLAGS, "-DX")) != first
    source.write_text("not C\n")
    with pytest.raises(OSError, match="error"):
        native.build(source)
    assert len(list(tmp_path.glob("*.so"))) == 2


@built
def test_two_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """As two servers do on a cold cache, or the workers of one."""
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    slow = tmp_path / "slow"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *-o*) echo x >> {tmp_path}/compiled; sleep 2;; esac\nexec {compiler} "$@"\n'
    )
    slow.chmod(0o700)
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }\n")
    code = f"""
import ctypes, pathlib
from vllm_npu_quant.emulation import native
found = native.build(pathlib.Path({str(source)!r}))
print(found, ctypes.CDLL(str(found)).answer())
"""
    env = {"CC": str(slow), "VLLM_NPU_QUANT_CACHE": str(tmp_path / "cache")}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: python(code, **env), range(2))
    assert first.stdout == second.stdout, first.stderr + second.stderr
    assert first.stdout.endswith(".so 42\n")
    assert (tmp_path / "compiled").read_text() == "x\n"
    assert [path.suffix for path in (tmp_path / "cache" / "native").iterdir() if path.suffix != ".lock"] == [".so"]


SHORT_LIVED_THREADS = """
import threading, torch
from vllm_npu_quant.emulation import native
x, weight = torch.ones(264, 4096, dtype=torch.int8), torch.ones(4096, 8, dtype=torch.int8)

def multiply():
    assert native.product(native.Kind.INT8, x, weight, torch.int32)[0, 0] == 4096

def resident(threads):
    for _ in range(threads):
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

before = resident(30)
print("MiB:", resident(200) - before)
"""


@built
def test_the_memory_of_ended_threads_is_freed() -> None:
    """Each of the 200 threads takes more than 1 MiB of scratch memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = python(SHORT_LIVED_THREADS)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rpartition("MiB:")[2]) < 60


Call = tuple[str, tuple[Any, ...], dict[str, Any]]
#: Of each operator: a call that it takes, and arguments in the place of some of these that it refuses or computes with.
REMEMBERED: dict[str, tuple[Call, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "dynamic_quant": (
        ("npu_dynamic_quant", (), {"input": positive(4, 16, dtype=BF16)}),
        [{"input": positive(4, 16)}, {"quant_mode": "pertensor"}, {"dst_type": 3}, {"dst_type_max": 1.0}],
        [{"input": positive(16, 4, dtype=BF16).t()}, {"dst_type": 16}, {"input": positive(2, 2, 16, dtype=BF16)}],
    ),
    "quant_matmul": (
        (
            "npu_quant_matmul",
            (integers(3, 32), integers(32, 32, seed=1)),
            {"scale": positive(32), "pertoken_scale": positive(3), "output_dtype": 15},
        ),
        [
            {"scale": positive(31)},
            {"pertoken_scale": positive(4)},
            {"output_dtype": 6},
            {"bias": positive(3)},
            {"scale_dtype": 1},
            {"offset": positive(1)},
        ],
        [
            {"scale": positive(64)[::2]},
            {"pertoken_scale": positive(6)[::2]},
            {"bias": positive(32)},
            {"bias": positive(64)[::2]},
            {"output_dtype": 5},
        ],
    ),
    "weight_quant_batchmatmul": (
        (
            "npu_weight_quant_batchmatmul",
            (torch.eye(64, dtype=BF16)[:3].contiguous(), packed(64, 8)),
            {"antiquant_scale": positive(2, 64, dtype=BF16), "antiquant_group_size": 32},
        ),
        [
            {"antiquant_group_size": 64},
            {"antiquant_offset": positive(2, 64)},
            {"bias": positive(65)},
            {"inner_precise": 2},
            {"weight_dtype": 1},
            {"quant_offset": positive(64)},
        ],
        [
            {"antiquant_offset": positive(2, 64, dtype=BF16)},
            {"antiquant_scale": positive(64, 2, dtype=BF16).t()},
            {"bias": positive(64)},
            {"quant_scale": positive(64)},
            {"inner_precise": 1},
        ],
    ),
    "grouped_matmul": (
        (
            "npu_grouped_matmul",
            ([integers(3, 32)], [integers(2, 32, 16, seed=1)]),
            {
                "scale": [positive(2, 16, dtype=BF16)],
                "per_token_scale": [positive(3)],
                "group_list": torch.tensor([1, 2]),
                "split_item": 2,
                "group_type": 0,
                "group_list_type": 1,
                "output_dtype": 15,
            },
        ),
        [
            {"scale": [positive(2, 16)]},
            {"group_list": torch.tensor([1, 1, 1])},
            {"group_list": torch.tensor([4, -1])},
            {"group_list": torch.tensor([1, 3])},
            {"group_list_type": 3},
            {"split_item": 0},
            {"act_type": 3},
            {"x_dtype": 1},
            {"offset": [positive(2, 16)]},
        ],
        [
            {"group_list": torch.tensor([0, 3])},
            {"group_list": torch.tensor([1, 3]), "group_list_type": 0},
            {"group_list": torch.tensor([[1, 2], [0, 1]]), "group_list_type": 2},
            {"per_token_scale": [positive(6)[::2]]},
            {"scale": [positive(16, 2, dtype=BF16).t()]},
            {"bias": [packed(2, 16) // 2**12]},
            {"act_type": 1},
        ],
    ),
}


def assert_refused_alike(kernels: Iterable[Any], operands: tuple[Any, ...], given: dict[str, Any]) -> None:
    messages = set()
    for kernel in kernels:
        with pytest.raises(RuntimeError) as error:
            kernel(*operands, **given)
        messages.add(str(error.value))
    assert len(messages) == 1


@built
@pytest.mark.parametrize("operator", REMEMBERED)
def test_calls_are_remembered_for_equal_arguments_only(operator: str) -> None:
    (name, operands, given), refused, taken = REMEMBERED[operator]
    kernels = OPERATORS[name].reference, fast_kernel(name)

    def as_the_reference(changed: dict[str, Any]) -> None:
        expected, found = (kernel(*operands, **(given | changed)) for kernel in kernels)
        if isinstance(expected, torch.Tensor):
            expected, found = [expected], [found]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), changed

    for _ in range(2):
        as_the_reference({})
        for changed in taken:
            as_the_reference(changed)
        for changed in refused:
            assert_refused_alike(kernels, operands, given | changed)


def test_no_more_calls_are_remembered_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "REMEMBERED_CALLS", 2)
    calls: dict[Any, int] = {}
    for number in range(5):
        assert forms.remember(calls, forms.form(torch.ones(number)), number) == number
        assert len(calls) <= 2
