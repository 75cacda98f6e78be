# SPDX-License-Identifier: Apache-2.0
"""Calls that calls.cpp computes without Python: the same results, the same refusals, and what has to stay with Python."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import CASES, Case
from test_emulated_operators import CODES, assert_matches, codes, oracle, outputs, run
from test_emulation_registry import python
from test_native import REMEMBERED, assert_refused_alike, integers, packed, positive

from vllm_npu_quant import emulation
from vllm_npu_quant.emulation import calls, native
from vllm_npu_quant.emulation.registry import CALLED_MOST

BF16, F16 = torch.bfloat16, torch.float16
npu = torch.ops.npu

pytestmark = pytest.mark.skipif(
    not native.available() or shutil.which(os.environ.get("CXX") or "g++") is None,
    reason="needs x86-64 with AVX2, a C compiler and a C++ compiler",
)
emulation.register()


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    emulation.build_kernels()
    assert calls.library() is not None


def computed() -> int:
    """How many calls of this thread were computed without Python."""
    library = calls.library()
    assert library is not None
    return library.nq_computed_here()


def without_python(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and how many operators Python did not see."""
    before = computed()
    return call(), computed() - before


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, garbage too."""
    for one, other in zip(outputs(found), outputs(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.is_contiguous() == other.is_contiguous()
        assert torch.equal(one.contiguous().view(torch.int8), other.contiguous().view(torch.int8))


@pytest.mark.parametrize("case", [case for case in CASES if case.operator in CALLED_MOST], ids=lambda case: case.id)
def test_every_case_gives_what_the_python_kernel_gives(case: Case) -> None:
    fast = emulation.OPERATORS[case.operator].fast
    assert fast is not None
    expected = run(fast, codes(case))
    for _ in range(3):
        found = run(case.overload, case)
        assert_same(found, expected)
        assert_matches(found, oracle(case))


def nz(weight: torch.Tensor) -> torch.Tensor:
    return npu.npu_format_cast(weight, 29)


def quant(**changes: Any) -> dict[str, Any]:
    standard = {
        "x1": integers(3, 32),
        "x2": integers(32, 16, seed=1),
        "scale": positive(16),
        "pertoken_scale": positive(3),
    }
    return {"operator": "npu_quant_matmul", **standard, "output_dtype": BF16, **changes}


def weight_only(**changes: Any) -> dict[str, Any]:
    standard = {
        "x": positive(3, 64, dtype=BF16),
        "weight": packed(64, 2),
        "antiquant_scale": positive(2, 16, dtype=BF16),
    }
    return {"operator": "npu_weight_quant_batchmatmul", **standard, "antiquant_group_size": 32, **changes}


def grouped(**changes: Any) -> dict[str, Any]:
    """int8 by int8, of four rows one for the first expert and two for the third."""
    standard = {"x": [integers(4, 32)], "weight": [integers(3, 32, 16, seed=1)], "scale": [positive(3, 16, dtype=BF16)]}
    standard |= {"per_token_scale": [positive(4)], "group_list": torch.tensor([1, 0, 2]), "group_list_type": 1}
    return {
        "operator": "npu_grouped_matmul",
        **standard,
        "split_item": 2,
        "group_type": 0,
        "output_dtype": BF16,
        **changes,
    }


def float_grouped(**changes: Any) -> dict[str, Any]:
    changes = {"x": [positive(4, 64, dtype=BF16)], "weight": [packed(3, 64, 2)], "scale": None} | changes
    factors = [positive(3, 2, 16, dtype=BF16)]
    return grouped(**{"per_token_scale": None, "antiquant_scale": factors, "antiquant_offset": factors, **changes})


def bits(*shape: int) -> torch.Tensor:
    """float32 in the low words of int64."""
    return positive(*shape).view(torch.int32).to(torch.int64)


WITHOUT_PYTHON: dict[str, dict[str, Any]] = {
    "quantize": {"operator": "npu_dynamic_quant", "input": positive(3, 16, dtype=BF16)},
    "quantize 3-D": {"operator": "npu_dynamic_quant", "input": positive(2, 3, 16, dtype=F16)},
    "w8a8": quant(),
    "w8a8 float16": quant(output_dtype=F16),
    "w8a8 int32": quant(output_dtype=torch.int32, pertoken_scale=None),
    "w8a8 static": quant(pertoken_scale=None),
    "w8a8 one scale": quant(scale=positive(1)),
    "w8a8 bfloat16 scale": quant(scale=positive(16, dtype=BF16)),
    "w8a8 int32 bias": quant(bias=packed(16) // 2**12),
    "w8a8 float32 bias": quant(bias=positive(16)),
    "w8a8 bfloat16 bias": quant(bias=positive(16, dtype=BF16)),
    "w8a16": weight_only(weight=integers(64, 16), antiquant_scale=positive(16, dtype=BF16), antiquant_group_size=0),
    "w4a16": weight_only(),
    "w4a16 offset": weight_only(antiquant_offset=positive(2, 16, dtype=BF16)),
    "w4a16 bias": weight_only(bias=positive(16)),
    "w4a16 float16": weight_only(x=positive(3, 64, dtype=F16), antiquant_scale=positive(2, 16, dtype=F16)),
    "w4a16 float16 bias": weight_only(
        x=positive(3, 64, dtype=F16), antiquant_scale=positive(2, 16, dtype=F16), bias=positive(16, dtype=F16)
    ),
    "experts w8a8": grouped(),
    "experts w8a8 nz": grouped(weight=[nz(integers(3, 32, 16, seed=1))], scale=[positive(3, 16)]),
    "experts w8a8 totals": grouped(group_list=torch.tensor([1, 1, 3]), group_list_type=0),
    "experts w8a8 pairs": grouped(group_list=torch.tensor([[2, 1], [0, 2], [0, 0]]), group_list_type=2),
    "experts w8a8 all rows": grouped(group_list=torch.tensor([1, 0, 3])),
    "experts w8a8 no rows": grouped(group_list=torch.tensor([0, 0, 0])),
    "experts w8a8 int32": grouped(scale=None, per_token_scale=None, output_dtype=torch.int32),
    "experts w8a8 int32 bias": grouped(bias=[packed(3, 16) // 2**12]),
    "experts w8a8 bfloat16 bias": grouped(weight=[nz(integers(3, 32, 16))], bias=[positive(3, 16, dtype=BF16)]),
    "experts w8a16": float_grouped(
        weight=[integers(3, 64, 16)],
        antiquant_scale=[positive(3, 16, dtype=BF16)],
        antiquant_offset=[positive(3, 16, dtype=BF16)],
    ),
    "experts w4a16": float_grouped(),
    "experts w4a16 bias": float_grouped(bias=[positive(3, 16)]),
    "experts w4a8": grouped(
        x=[integers(4, 256)], weight=[packed(3, 256, 2)], scale=[bits(3, 1, 16)], bias=[positive(3, 16)]
    ),
    "experts w4a4": grouped(x=[packed(4, 8)], weight=[packed(3, 64, 2)], scale=[bits(3, 2, 16)]),
}


@pytest.mark.parametrize("name", WITHOUT_PYTHON)
def test_a_repeated_call_does_not_come_to_python(name: str) -> None:
    given = dict(WITHOUT_PYTHON[name])
    operator = given.pop("operator")
    x = next(argument for argument in ("input", "x1", "x") if argument in given)

    def arguments() -> dict[str, Any]:
        # npu_grouped_matmul leaves garbage in the x of W4A8.
        return given | {x: copy.deepcopy(given[x])}

    fast = emulation.OPERATORS[operator].fast
    assert fast is not None
    by_python = arguments()
    code = {"output_dtype": CODES[given["output_dtype"]]} if "output_dtype" in given else {}
    expected = fast(**by_python | code)
    getattr(npu, operator)(**arguments())
    repeated = arguments()
    found, count = without_python(lambda: getattr(npu, operator)(**repeated))
    assert count == 1
    assert_same(found, expected)
    assert_same(repeated[x], by_python[x])


@pytest.mark.parametrize("operator", REMEMBERED)
def test_other_arguments_are_looked_at(operator: str) -> None:
    """After a call is known: what differs from it is computed or refused as by the Python kernel."""
    (name, operands, given), refused, taken = REMEMBERED[operator]
    fast, call = emulation.OPERATORS[name].fast, getattr(npu, name)
    assert fast is not None

    def as_python(changed: dict[str, Any]) -> None:
        assert_same(call(*operands, **(given | changed)), fast(*operands, **(given | changed)))

    for _ in range(3):
        as_python({})
        for changed in taken:
            as_python(changed)
        for changed in refused:
            assert_refused_alike((call, fast), operands, given | changed)


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([1, 0, 4], 1),
        ([1, -1, 2], 1),
        ([2**62, 2**62, 2**62], 1),
        ([2, 1, 3], 0),
        ([1, 2, 5], 0),
        ([[0, 1], [1, 0], [2, 1]], 2),
        ([[3, 1], [0, 1], [0, 0]], 2),
        ([[-1, 1], [0, 1], [0, 0]], 2),
        ([[0, 5], [0, 0], [0, 0]], 2),
    ],
)
def test_groups_that_cannot_be_are_refused_in_a_known_form(numbers: list[Any], kind: int) -> None:
    given = grouped(group_list_type=kind)
    operator = getattr(npu, given.pop("operator"))
    known = torch.tensor([[0, 1], [1, 2], [2, 0]]) if kind == 2 else torch.tensor([1, 2, 3] if kind == 0 else [1, 0, 2])
    for _ in range(2):
        _, count = without_python(lambda: operator(**given | {"group_list": known}))
    assert count == 1
    with pytest.raises(RuntimeError, match=r"npu_grouped_matmul: argument group_list: expected .*, found \[") as error:
        operator(**given | {"group_list": torch.tensor(numbers)})
    reference = emulation.OPERATORS["npu_grouped_matmul"].reference
    with pytest.raises(RuntimeError) as wanted:
        reference(**given | {"group_list": torch.tensor(numbers), "output_dtype": CODES[BF16]})
    assert str(error.value) == str(wanted.value)


def test_the_format_of_every_weight_is_looked_at() -> None:
    """float32 scales for a bfloat16 output need FRACTAL_NZ, which belongs to a storage and not to a form."""
    given = grouped(scale=[positive(3, 16)])
    operator = getattr(npu, given.pop("operator"))
    plain = given["weight"][0]

    def looked_at(weight: torch.Tensor) -> bool:
        return without_python(lambda: operator(**given | {"weight": [weight]}))[1] == 0

    for seed in range(3):
        weight = nz(integers(3, 32, 16, seed=seed))
        assert [looked_at(weight), looked_at(weight), looked_at(weight.detach())] == [True, False, False]
        with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
            operator(**given)
        # A plain storage may get the address of one that was freed.
        del weight
        for _ in range(20):
            with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
                operator(**given | {"weight": [plain.clone()]})


def test_threads_know_their_own_calls() -> None:
    given = quant(x1=integers(7, 96), x2=integers(96, 40), scale=positive(40), pertoken_scale=positive(7))
    operator = getattr(npu, given.pop("operator"))
    expected = emulation.OPERATORS["npu_quant_matmul"].reference(**given | {"output_dtype": 15})

    def work(_: int) -> list[torch.Tensor]:
        return [operator(**given) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(8)):
            for found in results:
                assert_same(found, expected)


def test_many_forms_in_any_order_are_kept_apart() -> None:
    generator = torch.Generator().manual_seed(0)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    reference, before, rounds = emulation.OPERATORS["npu_quant_matmul"].reference, computed(), 400
    for _ in range(rounds):
        rows, depth, width = pick(1, 2, 16), pick(1, 2, 16), pick(1, 2, 16)
        given = {
            "x1": integers(rows, depth),
            "x2": pick(integers(depth, width), integers(width, depth).t()),
            "scale": positive(pick(1, width)),
            "pertoken_scale": pick(None, positive(rows)),
            "bias": pick(None, positive(width), packed(width) // 2**12),
        }
        dtype = pick((BF16, 15), (torch.int32, 3))
        if dtype[1] == 3:
            given |= {"pertoken_scale": None, "bias": pick(None, packed(width) // 2**12)}
        found = npu.npu_quant_matmul(**given, output_dtype=dtype[0])
        assert_same(found, reference(**given, output_dtype=dtype[1]))
    assert rounds / 10 < computed() - before < rounds


@pytest.mark.parametrize("scale", [positive(9, 16, dtype=BF16), positive(9, 16)])
def test_few_of_many_experts(scale: torch.Tensor) -> None:
    """Only the scales and biases of experts that have rows are converted; other rows are met in the same form."""
    weight = nz(integers(9, 32, 16, seed=1))
    given = grouped(weight=[weight], scale=[scale], bias=[positive(9, 16, dtype=BF16)])
    operator, reference = getattr(npu, given.pop("operator")), emulation.OPERATORS["npu_grouped_matmul"].reference
    for counts in (
        [0, 0, 4, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 1, 2],
        [0] * 8 + [4],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
    ):
        given["group_list"] = torch.tensor(counts)
        expected = reference(**given | {"output_dtype": 15})
        operator(**given)
        found, count = without_python(lambda: operator(**given))
        assert count == 1
        assert_same(found, expected)


def test_a_matrix_without_elements_stays_with_python() -> None:
    for depth, width in ((0, 16), (32, 0)):
        given = grouped(
            x=[integers(4, depth)], weight=[integers(3, depth, width)], scale=[positive(3, width, dtype=BF16)]
        )
        operator = getattr(npu, given.pop("operator"))
        expected = emulation.OPERATORS["npu_grouped_matmul"].reference(**given | {"output_dtype": 15})
        for _ in range(2):
            assert_same(operator(**given), expected)


def test_no_more_forms_are_known_than_allowed() -> None:
    library = calls.library()
    most = ctypes.c_int64.in_dll(library, "nq_most_forms")
    kept, most.value = most.value, 4
    try:
        # A thread of its own has nothing to lose.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(_meet_many_forms).result() == [0] * 9 + [1] * 4 + [0] * 5
    finally:
        most.value = kept


def _meet_many_forms() -> list[int]:
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 1, 2, 3, 4, 5]
    return [without_python(lambda: npu.npu_dynamic_quant(positive(size, 8, dtype=BF16)))[1] for size in sizes]  # noqa: B023


def test_a_call_without_memory_is_left_to_python() -> None:
    library, kernels = calls.library(), native.library()
    assert library is not None
    assert kernels is not None
    given = quant(x1=integers(5, 48), x2=integers(48, 24), scale=positive(24), pertoken_scale=positive(5))
    operator = getattr(npu, given.pop("operator"))
    expected = operator(**given)
    never = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda call: 0)
    quantizer = ctypes.cast(kernels.nq_dynamic_quant, ctypes.c_void_p)
    library.nq_use_kernels(ctypes.cast(never, ctypes.c_void_p), quantizer)
    try:
        found, count = without_python(lambda: operator(**given))
    finally:
        library.nq_use_kernels(ctypes.cast(kernels.nq_product, ctypes.c_void_p), quantizer)
    assert count == 0
    assert_same(found, expected)
    assert without_python(lambda: operator(**given))[1] == 1


def test_outputs_take_part_in_inference_mode() -> None:
    given = quant()
    operator = getattr(npu, given.pop("operator"))
    for _ in range(3):
        with torch.inference_mode():
            assert operator(**given).is_inference()
        assert not operator(**given).is_inference()


CALL_TWICE = """
import logging, torch
logging.basicConfig()
from vllm_npu_quant import emulation
from vllm_npu_quant.emulation import calls
emulation.register()
emulation.build_kernels()
emulation.build_kernels()
x = torch.ones(2, 8, dtype=torch.int8)
for _ in range(2):
    product = torch.ops.npu.npu_quant_matmul(x, x.t().contiguous(), torch.ones(2), output_dtype=torch.int32)
assert product.tolist() == [[8, 8], [8, 8]]
library = calls.library()
print("computed without Python:", library.nq_computed_here() if library else 0)
"""


def log_of_two_calls(**variables: str) -> str:
    done = python(CALL_TWICE, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_reference_mode_stays_in_python() -> None:
    assert "computed without Python: 0\n" in log_of_two_calls(VLLM_NPU_QUANT_EMULATION="reference")
    assert "computed without Python: 1\n" in log_of_two_calls()


def test_without_a_cpp_compiler_the_operators_stay_as_they_are(tmp_path: Path) -> None:
    for tool in ("gcc", "as", "ld"):
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"no {tool}")
        (tmp_path / tool).symlink_to(found)
    log = log_of_two_calls(PATH=str(tmp_path), CC="gcc", CXX="", VLLM_NPU_QUANT_CACHE=str(tmp_path / "cache"))
    assert "computed without Python: 0\n" in log
    assert "goes through Python, which takes longer: no C++ compiler (g++, clang++, c++ or $CXX)" in log
