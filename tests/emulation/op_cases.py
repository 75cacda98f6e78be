# SPDX-License-Identifier: Apache-2.0
"""The calls that the tests make: one table for all operators, odd shapes first.

``tests/emulation`` runs every case against its oracle, ``tests/conformance`` runs the same cases under the schemas and
Meta kernels of the real torch_npu. Only torch is imported, so that the table can be used in a process of its own.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

I8, U8, I32, I64 = torch.int8, torch.uint8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        operator: the key in the table of operators.
        meta_differs: part of what opcheck says where the real Meta kernel and the documents of the device disagree.
        functional: False if the operator writes into an argument that its schema does not mark.
    """

    operator: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    meta_differs: str = ""
    functional: bool = True

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.name}"

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.npu, self.operator).default

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the arguments, ready for a call."""
        return copy.deepcopy((self.args, self.kwargs))


def check_operator(case: Case) -> None:
    """Compare the CPU kernel with the schema and with the fake or Meta kernel."""
    args, kwargs = case.arguments()
    utils = ("test_schema", "test_faketensor") if case.functional else ("test_faketensor",)
    torch.library.opcheck(case.overload, args, kwargs, test_utils=utils)


CASES: list[Case] = []


class Maker:
    """Random tensors from the case's name, so that adding a case does not change another."""

    def __init__(self, seed: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def floats(self, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype)

    def positive(self, *shape: int, dtype: torch.dtype = F32, low: float = 0.5, high: float = 1.5) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator) * (high - low) + low).to(dtype)

    def integers(self, *shape: int, low: int = -128, high: int = 127, dtype: torch.dtype = I8) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).to(dtype)

    def int4(self, *shape: int) -> torch.Tensor:
        """Random int32: eight random nibbles each."""
        return self.integers(*shape, low=-(2**31), high=2**31 - 1, dtype=I32)


def add(
    operator: str, name: str, build: Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]], **options: Any
) -> None:
    args, kwargs = build(Maker(f"{operator}/{name}"))
    CASES.append(Case(operator, name, args, kwargs, **options))


def call(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def halves(low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    """low, low + 1/2, ..., high: every second value is a tie."""
    return (torch.arange(2 * low, 2 * high + 1) / 2).to(dtype)


# --------------------------------------------------------------------------------------------------------- npu_quantize

for dtype in (BF16, F16, F32):
    add(
        "npu_quantize",
        f"times_ties_{dtype}",
        lambda m, dtype=dtype: call(
            halves(-140, 140, dtype)[None, 100:], torch.ones(1, dtype=dtype), None, torch.qint8, -1, False
        ),
    )
    add(
        "npu_quantize",
        f"times_per_tensor_{dtype}",
        lambda m, dtype=dtype: call(
            m.floats(3, 33, dtype=dtype, scale=2),
            torch.tensor([37.0], dtype=dtype),
            torch.tensor([-5.0], dtype=dtype),
            torch.qint8,
            -1,
            False,
        ),
    )
add(
    "npu_quantize",
    "times_per_channel_repeated_scale",
    lambda m: call(
        m.floats(2, 1, 17, dtype=BF16),
        m.positive(17, dtype=BF16) * 50,
        m.floats(17, dtype=BF16, scale=9),
        I8,
        -1,
        False,
    ),
)
# Without div_mode the axis argument means the last dimension, whatever it is, unless it is -2.
add(
    "npu_quantize",
    "times_axis_0_is_last",
    lambda m: call(m.floats(5, 5, dtype=F16), m.positive(5, dtype=F16) * 50, None, torch.qint8, 0, False),
)
add(
    "npu_quantize",
    "times_rows",
    lambda m: call(
        m.floats(5, 5, dtype=F16), m.positive(5, 1, dtype=F16) * 50, m.floats(5, 1, dtype=F16), torch.qint8, -2, False
    ),
)
add(
    "npu_quantize",
    "times_rows_1d_scales",
    lambda m: call(m.floats(2, 5, 5), m.positive(5) * 50, None, torch.qint8, -2, False),
)
add(
    "npu_quantize",
    "times_scales_of_all_dims",
    lambda m: call(m.floats(2, 3, 7), m.positive(1, 1, 7) * 50, None, torch.qint8, -1, False),
)
add(
    "npu_quantize",
    "times_int4",
    lambda m: call(halves(-12, 12, F32)[:48].repeat(3, 1), torch.ones(1), None, torch.quint4x2, -1, False),
)
add(
    "npu_quantize",
    "times_int4_offset",
    lambda m: call(
        m.floats(1, 3, 8, dtype=BF16), m.positive(8, dtype=BF16) * 4, m.floats(8, dtype=BF16), torch.quint4x2, -1, False
    ),
)
for name, dtype, zero_points in (
    ("int8", torch.qint8, torch.tensor([3], dtype=I8)),
    ("uint8", torch.quint8, torch.tensor([131], dtype=U8)),
    ("int32", torch.int32, torch.tensor([-1000], dtype=I32)),
):
    add(
        "npu_quantize",
        f"divides_per_tensor_{name}",
        lambda m, dtype=dtype, zero_points=zero_points: call(
            m.floats(3, 33, scale=2), torch.tensor([0.021]), zero_points, dtype
        ),
    )
add(
    "npu_quantize",
    "divides_int32_saturates",
    lambda m: call(
        torch.tensor([[3e9, -3e9, float("inf"), 16777217.0, float("nan")]]), torch.ones(1), None, torch.qint32
    ),
)
add(
    "npu_quantize",
    "divides_default_axis_1",
    lambda m: call(
        m.floats(3, 3, 3, scale=2),
        m.positive(3, low=0.01, high=0.1),
        m.integers(3, low=-9, high=9, dtype=I32),
        torch.qint8,
    ),
)
add(
    "npu_quantize",
    "divides_axis_-3",
    lambda m: call(
        m.floats(3, 3, 3, dtype=BF16),
        m.positive(3, low=0.01, high=0.1, dtype=BF16),
        m.floats(3, dtype=BF16),
        torch.qint8,
        -3,
    ),
)

# ---------------------------------------------------------------------------------------------------- npu_dynamic_quant

for dtype in (BF16, F16):
    for shape in ((1, 33), (3, 63), (2, 1, 17), (1, 2, 3, 8)):
        add(
            "npu_dynamic_quant",
            f"{'x'.join(map(str, shape))}_{dtype}",
            lambda m, shape=shape, dtype=dtype: call(m.floats(*shape, dtype=dtype, scale=3)),
        )
    # A row whose largest value is 127 has the scale 1: every half is a tie.
    add(
        "npu_dynamic_quant",
        f"ties_{dtype}",
        lambda m, dtype=dtype: call(halves(-127, 127, dtype)[None, 99:], dst_type=I8),
    )
    add(
        "npu_dynamic_quant",
        f"smooth_{dtype}",
        lambda m, dtype=dtype: call(m.floats(3, 33, dtype=dtype), smooth_scales=m.positive(33, dtype=dtype)),
    )
add(
    "npu_dynamic_quant",
    "zero_and_tiny_rows",
    lambda m: call(torch.tensor([[0.0] * 8, [1e-30] * 8, [-0.0] * 8, [6e4, 1, -2, 3, -4, 5, -6e4, 0]], dtype=BF16)),
)
add("npu_dynamic_quant", "nan_row", lambda m: call(torch.tensor([[float("nan"), 1.0], [2.0, 1.0]], dtype=F16)))
add("npu_dynamic_quant", "int4", lambda m: call(m.floats(3, 64, dtype=BF16), dst_type=torch.quint4x2))
add(
    "npu_dynamic_quant",
    "int4_ties_3d",
    lambda m: call(halves(-7, 7, F16)[5:].repeat(2)[:32].view(2, 2, 8), dst_type=torch.quint4x2),
)
add(
    "npu_dynamic_quant",
    "smooth_groups",
    lambda m: call(
        m.floats(2, 4, 33, dtype=BF16),
        smooth_scales=m.positive(4, 33, dtype=BF16),
        group_index=torch.tensor([3, 3, 5, 8], dtype=I32),
    ),
)
add(
    "npu_dynamic_quant",
    "smooth_groups_int4",
    lambda m: call(
        m.floats(5, 16, dtype=F16),
        smooth_scales=m.positive(2, 16, dtype=F16),
        group_index=torch.tensor([1, 5], dtype=I32),
        dst_type=torch.quint4x2,
    ),
)

# ------------------------------------------------------------------------------------------------ npu_trans_quant_param

_AWKWARD_SCALES = torch.tensor(
    [1.0, -1.0, 0.1, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 3.3e38, 1e-40, -1e-40, 0.0, 0.021, float("inf")]
)
for round_mode in (0, 1):
    add(
        "npu_trans_quant_param",
        f"mode_{round_mode}",
        lambda m, round_mode=round_mode: call(_AWKWARD_SCALES.clone(), None, round_mode),
    )
    add(
        "npu_trans_quant_param",
        f"offset_mode_{round_mode}",
        lambda m, round_mode=round_mode: call(
            _AWKWARD_SCALES[:8].clone(), torch.tensor([0.5, 1.5, -0.5, -2.5, 300.0, -300.0, 255.0, -256.0]), round_mode
        ),
    )
add("npu_trans_quant_param", "one_scale", lambda m: call(torch.tensor([0.3]), m.floats(17, scale=30)))
add("npu_trans_quant_param", "one_offset", lambda m: call(m.positive(17), torch.tensor([-7.0])))
add("npu_trans_quant_param", "2d", lambda m: call(m.positive(1, 17), m.floats(1, 17, scale=30)))

# ----------------------------------------------------------------------------------------------------- npu_quant_matmul

_SHAPES = ((1, 33, 17), (3, 63, 1), (33, 64, 40))


def int8_pair(m: Maker, rows: int, depth: int, width: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x2 = m.integers(width, depth).t() if transposed else m.integers(depth, width)
    return m.integers(rows, depth), x2


def packed_params(scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """int64 fix-pipe parameters, low bits of the scale included: the device has to ignore them."""
    packed = (scale.view(I32).to(I64) & 0xFFFFFFFF) | (1 << 46)
    return packed if offset is None else packed | ((offset.to(I64) & 0x1FF) << 37)


for rows, depth, width in _SHAPES:
    for transposed in (False, True):
        tag = f"{rows}x{depth}x{width}{'_transposed' if transposed else ''}"

        def case(
            name: str,
            build: Callable[[Maker], dict[str, Any]],
            scale: Callable[[Maker], torch.Tensor],
            shape: tuple[int, int, int] = (rows, depth, width),
            transposed: bool = transposed,
            tag: str = tag,
        ) -> None:
            add(
                "npu_quant_matmul",
                f"{name}_{tag}",
                lambda m: (lambda x: call(*x, scale(m), **build(m)))(int8_pair(m, *shape, transposed)),
            )

        def channel(m: Maker, width: int = width) -> torch.Tensor:
            return m.positive(width, low=1e-4, high=1e-3)

        case("static_fp16", lambda m: {"output_dtype": F16}, channel)
        case("static_bf16", lambda m: {"output_dtype": BF16}, channel)
        case("static_int8", lambda m: {}, channel)
        case(
            "per_token_bf16",
            lambda m, rows=rows: {"pertoken_scale": m.positive(rows), "output_dtype": BF16},
            lambda m, channel=channel: channel(m).to(BF16),
        )
        case(
            "per_token_fp16",
            lambda m, rows=rows: {"pertoken_scale": m.positive(rows), "output_dtype": F16},
            channel,
        )
        case(
            "int32",
            lambda m, width=width: {"output_dtype": I32, "bias": m.integers(width, low=-999, high=999, dtype=I32)},
            channel,
        )


def int8_case(name: str, scale: Any, rows: int = 5, **kwargs: Any) -> None:
    """A 5 x 37 x 19 product; callables among the arguments are called with the case's Maker."""

    def build(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x1, x2 = int8_pair(m, rows, 37, 19, transposed=True)
        made = {key: value(m) if callable(value) else value for key, value in kwargs.items()}
        return call(x1, x2, scale(m), **made)

    add("npu_quant_matmul", name, build)


def small(m: Maker) -> torch.Tensor:
    return m.positive(19, low=1e-3, high=5e-3)


def int_bias(m: Maker) -> torch.Tensor:
    return m.integers(19, low=-20000, high=20000, dtype=I32)


def per_token(m: Maker) -> torch.Tensor:
    return m.positive(5)


int8_case("static_fp16_int_bias", small, bias=int_bias, output_dtype=F16)
int8_case("static_fp16_one_scale", lambda m: torch.tensor([0.0031]), output_dtype=F16)
int8_case("static_fp16_int64_scale", lambda m: packed_params(small(m)), bias=int_bias, output_dtype=F16)
int8_case("static_int8_offset", small, offset=lambda m: m.floats(19, scale=60), bias=int_bias)
int8_case("static_int8_one_offset", small, offset=lambda m: torch.tensor([-2.5]), output_dtype=I8)
int8_case(
    "static_int8_int64_scale_with_offset",
    lambda m: packed_params(small(m), m.integers(19, low=-256, high=255, dtype=I64)),
)
# 9 bits before the offset, 8 bits after it: a product of -300 with an offset of 200 gives -56, not -100.
int8_case("static_int8_saturates_at_9_bits", lambda m: small(m) * 30, offset=lambda m: m.floats(19, scale=200))
int8_case("static_bf16_int_bias", small, bias=int_bias, output_dtype=BF16)
int8_case("static_bf16_bf16_bias", small, bias=lambda m: m.floats(19, dtype=BF16, scale=50), output_dtype=BF16)
int8_case("static_bf16_fp32_bias", small, bias=lambda m: m.floats(19, scale=50), output_dtype=BF16)
int8_case("static_bf16_bf16_scale", lambda m: small(m).to(BF16), output_dtype=BF16)
int8_case("per_token_bf16_int_bias", small, pertoken_scale=per_token, bias=int_bias, output_dtype=BF16)
int8_case(
    "per_token_bf16_bf16_bias",
    small,
    pertoken_scale=per_token,
    bias=lambda m: m.floats(19, dtype=BF16, scale=50),
    output_dtype=BF16,
)
int8_case(
    "per_token_bf16_fp32_bias",
    small,
    pertoken_scale=per_token,
    bias=lambda m: m.floats(19, scale=50),
    output_dtype=BF16,
)
int8_case("per_token_fp16_int_bias", small, pertoken_scale=per_token, bias=int_bias, output_dtype=F16)
int8_case(
    "per_token_fp16_fp16_bias",
    small,
    pertoken_scale=per_token,
    bias=lambda m: m.floats(19, dtype=F16, scale=50),
    output_dtype=F16,
)
int8_case(
    "per_token_fp16_fp32_bias", small, pertoken_scale=per_token, bias=lambda m: m.floats(19, scale=50), output_dtype=F16
)
int8_case("per_token_one_scale", lambda m: torch.tensor([0.0031]), pertoken_scale=per_token, output_dtype=BF16)
int8_case("int32_bf16_scale", lambda m: small(m).to(BF16), output_dtype=I32)
add(
    "npu_quant_matmul",
    "extreme_values",
    lambda m: call(
        torch.full((3, 257), -128, dtype=I8), torch.full((257, 33), -128, dtype=I8), torch.ones(33), output_dtype=I32
    ),
)
add(
    "npu_quant_matmul",
    "batch_of_x1",
    lambda m: call(
        m.integers(2, 3, 33), m.integers(33, 17), m.positive(17), pertoken_scale=m.positive(3), output_dtype=BF16
    ),
)
add(
    "npu_quant_matmul",
    "batches_broadcast_3d_bias",
    lambda m: call(
        m.integers(1, 3, 33),
        m.integers(4, 33, 17),
        m.positive(17, low=1e-4, high=1e-3),
        bias=m.integers(4, 1, 17, low=-999, high=999, dtype=I32),
        output_dtype=F16,
    ),
)
add(
    "npu_quant_matmul",
    "x1_transposed",
    lambda m: call(m.integers(33, 5).t(), m.integers(33, 17), m.positive(17), output_dtype=I32),
)
for along_n in (True, False):
    tag = "along_n" if along_n else "along_k"

    def int4_pair(m: Maker, along_n: bool = along_n) -> tuple[torch.Tensor, torch.Tensor]:
        return m.int4(3, 5), (m.int4(40, 3) if along_n else m.int4(24, 5).t())

    add(
        "npu_quant_matmul",
        f"int4_static_fp16_{tag}",
        lambda m, int4_pair=int4_pair: call(
            *int4_pair(m), m.positive(24), bias=m.integers(24, low=-99, high=99, dtype=I32), output_dtype=F16
        ),
    )
    add(
        "npu_quant_matmul",
        f"int4_per_token_bf16_{tag}",
        lambda m, int4_pair=int4_pair: call(
            *int4_pair(m),
            m.positive(24, dtype=BF16),
            pertoken_scale=m.positive(3),
            bias=m.floats(24, dtype=BF16, scale=9),
            output_dtype=BF16,
        ),
    )
add(
    "npu_quant_matmul",
    "int4_static_int64_scale",
    lambda m: call(m.int4(3, 5), m.int4(40, 3), packed_params(m.positive(24)), output_dtype=F16),
)
for dtype in (BF16, F16):
    # The documents allow it; the Meta kernel wants a pertoken_scale per group, float32 offsets, groups of 32 or 128.
    add(
        "npu_quant_matmul",
        f"int4_groups_{dtype}",
        lambda m, dtype=dtype: call(
            m.int4(3, 128),
            m.int4(256, 128).t(),
            m.positive(4, 256, low=0.01, high=0.1),
            offset=m.integers(4, 256, low=-8, high=7, dtype=F16),
            pertoken_scale=m.positive(3, 1),
            output_dtype=dtype,
            group_sizes=[1, 1, 256],
        ),
        meta_differs="k dimension of scale and pertoken_scale",
    )


def int8_int4(m: Maker, rows: int, depth: int, width: int, dtype: torch.dtype, **kwargs: Any) -> Any:
    x1, weight = m.integers(rows, depth), m.integers(depth, width, low=-8, high=7, dtype=I32)
    groups = depth // 256
    scale = m.positive(groups, width, low=0.001, high=0.003)
    shifts = 4 * torch.arange(8)
    packed = ((weight.to(I64) & 0xF).view(depth, width // 8, 8) << shifts).sum(-1).to(I32)
    offset = 8 * (weight.view(groups, 256, width) * scale[:, None]).sum((0, 1))
    return call(
        x1,
        packed,
        scale.view(I32).to(I64) & 0xFFFFFFFF,
        offset=offset,
        pertoken_scale=m.positive(rows, 1),
        output_dtype=dtype,
        **kwargs,
    )


add("npu_quant_matmul", "int8_int4_bf16", lambda m: int8_int4(m, 3, 512, 24, BF16))
add("npu_quant_matmul", "int8_int4_fp16", lambda m: int8_int4(m, 1, 256, 8, F16, group_sizes=[0, 0, 256]))

# ----------------------------------------------------------------------------------------- npu_weight_quant_batchmatmul


def weight_only(
    name: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int] = (3, 80, 24),
    bits: int = 8,
    transposed: bool = False,
    group_size: int = 0,
    scale_shape: tuple[int, ...] | None = None,
    offset: bool = False,
    bias: bool = False,
    **kwargs: Any,
) -> None:
    rows, depth, width = shape

    def build(m: Maker) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if bits == 8:
            weight = m.integers(width, depth).t() if transposed else m.integers(depth, width)
        else:
            weight = m.int4(width, depth // 8).t() if transposed else m.int4(depth, width // 8)
        wanted = scale_shape or ((-(-depth // group_size), width) if group_size else (width,))
        scale = m.positive(*wanted, low=0.002, high=0.02, dtype=dtype)
        made: dict[str, Any] = {key: value(m) if callable(value) else value for key, value in kwargs.items()}
        if offset:
            made["antiquant_offset"] = m.floats(*wanted, dtype=dtype, scale=5)
        if bias:
            made["bias"] = m.floats(width, dtype=F16 if dtype == F16 else F32)
        if group_size:
            made["antiquant_group_size"] = group_size
        return call(m.floats(rows, depth, dtype=dtype), weight, scale, **made)

    add("npu_weight_quant_batchmatmul", f"{name}_{dtype}", build)


for dtype in (BF16, F16):
    weight_only("1x33x17", dtype, shape=(1, 33, 17))
    weight_only("3x63x1_transposed", dtype, shape=(3, 63, 1), transposed=True, offset=True)
    weight_only("channel", dtype, offset=True, bias=True)
    weight_only("channel_transposed", dtype, transposed=True, offset=True, bias=True)
    weight_only("channel_2d_scale", dtype, scale_shape=(1, 24), offset=True)
    weight_only("tensor", dtype, scale_shape=(1,), offset=True)
    weight_only("group", dtype, group_size=32, shape=(3, 96, 17), offset=True)
    weight_only("group_short_last", dtype, group_size=64, shape=(2, 97, 17), offset=True, bias=True)
    weight_only("int4_channel", dtype, bits=4, offset=True)
    weight_only("int4_channel_transposed", dtype, bits=4, transposed=True, offset=True)
    weight_only("int4_group", dtype, bits=4, group_size=32, offset=True, bias=True)
    weight_only("int4_group_transposed", dtype, bits=4, transposed=True, group_size=32, shape=(1, 96, 17), offset=True)
    weight_only("int4_group_no_offset", dtype, bits=4, group_size=64, shape=(5, 136, 8), inner_precise=1)
    weight_only(
        "int8_out", dtype, quant_scale=lambda m: m.positive(24) * 3, quant_offset=lambda m: m.floats(24, scale=40)
    )
weight_only(
    "int8_out_int64_scale", F16, quant_scale=lambda m: packed_params(m.positive(24), m.integers(24, low=-99, dtype=I64))
)
add(
    "npu_weight_quant_batchmatmul",
    "x_transposed",
    lambda m: call(m.floats(33, 5, dtype=BF16).t(), m.integers(33, 17), m.positive(17, dtype=BF16)),
)

# ------------------------------------------------------------------------------------------- the other dense operators

for dtype in (BF16, F16):
    for shape in ((1, 33), (2, 3, 17)):
        add(
            "npu_dynamic_quant_asymmetric",
            f"{'x'.join(map(str, shape))}_{dtype}",
            lambda m, shape=shape, dtype=dtype: call(m.floats(*shape, dtype=dtype, scale=3) + 2),
        )
    add(
        "npu_dynamic_quant_asymmetric",
        f"int4_{dtype}",
        lambda m, dtype=dtype: call(m.floats(3, 24, dtype=dtype), dst_type=torch.quint4x2),
    )
# (63.75 - 0) / 255 = 1/4: every eighth is a tie.
add("npu_dynamic_quant_asymmetric", "ties", lambda m: call((torch.arange(511) / 8).clamp(max=63.75).to(BF16)[None]))
add(
    "npu_dynamic_quant_asymmetric",
    "constant_rows",
    lambda m: call(torch.tensor([[0.0] * 4, [2.5] * 4, [-2.5] * 4], dtype=F16)),
)
add(
    "npu_dynamic_quant_asymmetric",
    "smooth_groups",
    lambda m: call(
        m.floats(5, 17, dtype=BF16),
        smooth_scales=m.positive(3, 17, dtype=BF16),
        group_index=torch.tensor([2, 2, 5], dtype=I32),
    ),
)
for dtype in (BF16, F16):
    # Small integers times powers of two: every sum is exact in float32.
    add(
        "npu_kronecker_quant",
        f"{dtype}",
        lambda m, dtype=dtype: call(
            m.integers(3, 5, 8, low=-9, high=9, dtype=dtype),
            m.integers(5, 5, low=-1, high=1, dtype=dtype),
            m.integers(8, 8, low=-2, high=2, dtype=dtype) / 4,
        ),
    )
add(
    "npu_kronecker_quant",
    "rounds_between_the_products",
    lambda m: call(
        m.integers(2, 3, 16, low=-127, high=127, dtype=BF16),
        m.integers(3, 3, low=-1, high=1, dtype=BF16),
        m.integers(16, 16, low=-3, high=3, dtype=BF16),
    ),
)
add(
    "npu_kronecker_quant",
    "clip_saturates",
    lambda m: call(
        m.integers(2, 2, 8, low=-9, high=9, dtype=F16), torch.eye(2, dtype=F16), torch.eye(8, dtype=F16), 0.6, I32
    ),
)
add(
    "npu_kronecker_quant",
    "zero_token",
    lambda m: call(torch.zeros(2, 2, 8, dtype=F16), torch.eye(2, dtype=F16), torch.eye(8, dtype=F16)),
)

# --------------------------------------------------------------------------------------------------- npu_grouped_matmul


def grouped(name: str, build: Callable[[Maker], tuple[tuple[Any, ...], dict[str, Any]]], **options: Any) -> None:
    add("npu_grouped_matmul", name, build, **options)


def group_lists(counts: list[int]) -> dict[int, torch.Tensor]:
    """The same groups as running totals, counts, and pairs with the empty groups last."""
    tensor = torch.tensor(counts, dtype=I64)
    pairs = sorted(enumerate(counts), key=lambda pair: pair[1] == 0)
    return {0: tensor.cumsum(0), 1: tensor, 2: torch.tensor(pairs, dtype=I64)}


#: Groups that start and end empty, of one row, and that cover fewer rows than there are.
_COUNTS = {"all_rows": ([0, 3, 1, 0], 4), "some_rows": ([2, 0, 1, 3], 9), "no_rows": ([0, 0, 0, 0], 2)}

for tag, (counts, rows) in _COUNTS.items():
    for list_type, group_list in group_lists(counts).items():
        options = {"group_list": group_list, "group_list_type": list_type, "group_type": 0, "split_item": 3}
        grouped(
            f"w8a8_int32_{tag}_type_{list_type}",
            lambda m, rows=rows, options=options: call(
                [m.integers(rows, 33)], [m.integers(4, 33, 17)], output_dtype=I32, **options
            ),
        )
        grouped(
            f"w8a8_bf16_per_token_{tag}_type_{list_type}",
            lambda m, rows=rows, options=options: call(
                [m.integers(rows, 33)],
                [m.integers(4, 17, 33).transpose(1, 2)],
                scale=[m.positive(4, 17, low=1e-4, high=1e-3, dtype=BF16)],
                per_token_scale=[m.positive(rows)],
                output_dtype=BF16,
                **options,
            ),
        )
        if list_type == 2:
            continue
        grouped(
            f"w8a16_{tag}_type_{list_type}",
            lambda m, rows=rows, options=options: call(
                [m.floats(rows, 33, dtype=BF16)],
                [m.integers(4, 33, 17)],
                antiquant_scale=[m.positive(4, 17, low=0.002, high=0.02, dtype=BF16)],
                antiquant_offset=[m.floats(4, 17, dtype=BF16, scale=5)],
                **options,
            ),
        )
_OPTIONS = {"group_list": group_lists([2, 0, 3])[0], "group_type": 0, "split_item": 2}
for act_type in (1, 2, 4, 5):
    grouped(
        f"w8a8_fp16_act_{act_type}",
        lambda m, act_type=act_type: call(
            [m.integers(6, 33)],
            [m.integers(3, 33, 17)],
            bias=[m.integers(3, 17, low=-9999, high=9999, dtype=I32)],
            scale=[m.positive(3, 17, low=1e-5, high=1e-4)],
            per_token_scale=[m.positive(6)],
            act_type=act_type,
            output_dtype=F16,
            **_OPTIONS,
        ),
    )
grouped(
    "w8a8_static_fp16",
    lambda m: call(
        [m.integers(6, 33)],
        [m.integers(3, 33, 17)],
        scale=[m.positive(3, 17, low=1e-3, high=1e-2)],
        output_dtype=F16,
        **_OPTIONS,
    ),
)
grouped(
    "w8a8_int8_out",
    lambda m: call(
        [m.integers(6, 33)],
        [m.integers(3, 33, 17)],
        bias=[m.integers(3, 17, low=-9999, high=9999, dtype=I32)],
        scale=[packed_params(m.positive(3, 17, low=1e-3, high=1e-2), m.integers(3, 17, low=-256, high=255, dtype=I64))],
        **_OPTIONS,
    ),
)
grouped(
    "w8a8_list_of_weights",
    lambda m: call(
        [m.integers(6, 33)],
        [m.integers(33, 17) for _ in range(3)],
        scale=[m.positive(17, low=1e-4, high=1e-3, dtype=BF16) for _ in range(3)],
        per_token_scale=[m.positive(6)],
        output_dtype=BF16,
        **_OPTIONS,
    ),
)
for dtype in (BF16, F16, F32):
    grouped(
        f"unquantized_{dtype}",
        lambda m, dtype=dtype: call(
            [m.floats(6, 33, dtype=dtype)],
            [m.floats(3, 17, 33, dtype=dtype).transpose(1, 2)],
            bias=[m.floats(3, 17, dtype=F16 if dtype == F16 else F32)],
            **_OPTIONS,
        ),
    )
for dtype in (BF16, F16):
    grouped(
        f"w8a16_bias_{dtype}",
        lambda m, dtype=dtype: call(
            [m.floats(6, 33, dtype=dtype)],
            [m.integers(3, 17, 33).transpose(1, 2)],
            bias=[m.floats(3, 17, dtype=F16 if dtype == F16 else F32)],
            antiquant_scale=[m.positive(3, 17, low=0.002, high=0.02, dtype=dtype)],
            antiquant_offset=[m.floats(3, 17, dtype=dtype, scale=5)],
            output_dtype=dtype,
            **_OPTIONS,
        ),
    )
    for transposed in (False, True):
        for groups in (0, 3):
            grouped(
                f"w4a16_{dtype}{'_groups' if groups else ''}{'_transposed' if transposed else ''}",
                lambda m, dtype=dtype, transposed=transposed, groups=groups: call(
                    [m.floats(6, 48, dtype=dtype)],
                    [m.int4(3, 24, 6).transpose(1, 2) if transposed else m.int4(3, 48, 3)],
                    antiquant_scale=[m.positive(3, *([groups] if groups else []), 24, low=0.02, high=0.2, dtype=dtype)],
                    antiquant_offset=[m.floats(3, *([groups] if groups else []), 24, dtype=dtype, scale=2)],
                    output_dtype=dtype,
                    **_OPTIONS,
                ),
            )
    grouped(
        f"w4a16_symmetric_{dtype}",
        lambda m, dtype=dtype: call(
            [m.floats(6, 48, dtype=dtype)],
            [m.int4(3, 48, 3)],
            antiquant_scale=[m.positive(3, 2, 24, low=0.02, high=0.2, dtype=dtype)],
            antiquant_offset=[torch.zeros(3, 2, 24, dtype=dtype)],
            **_OPTIONS,
        ),
    )
    grouped(
        f"w4a16_list_of_weights_{dtype}",
        lambda m, dtype=dtype: call(
            [m.floats(6, 48, dtype=dtype)],
            [m.int4(48, 3) for _ in range(3)],
            antiquant_scale=[m.positive(2, 24, low=0.02, high=0.2, dtype=dtype) for _ in range(3)],
            antiquant_offset=[torch.zeros(2, 24, dtype=dtype)] * 3,
            **_OPTIONS,
        ),
    )
    grouped(
        f"pairs_{dtype}",
        lambda m, dtype=dtype: call(
            [m.floats(2, 33, dtype=dtype), m.floats(3, 17, dtype=dtype)],
            [m.integers(33, 5), m.integers(17, 9)],
            antiquant_scale=[m.positive(5, dtype=dtype), m.positive(9, dtype=dtype)],
            antiquant_offset=[torch.zeros(5, dtype=dtype), m.integers(9, low=-8, high=7).to(dtype)],
            group_type=-1,
        ),
    )
    grouped(
        f"list_of_x_one_output_{dtype}",
        lambda m, dtype=dtype: call(
            [m.floats(2, 33, dtype=dtype), m.floats(3, 33, dtype=dtype)],
            [m.floats(33, 5, dtype=dtype), m.floats(33, 5, dtype=dtype)],
            group_type=0,
            split_item=2,
        ),
    )


def w4a8(m: Maker, rows: int, counts: list[int], depth: int, groups: int, width: int, dtype: torch.dtype) -> Any:
    experts = len(counts)
    weight = m.integers(experts, depth, width, low=-8, high=7, dtype=I32)
    scale = m.positive(experts, groups, width, low=0.001, high=0.003)
    packed = ((weight.to(I64) & 0xF).view(experts, depth, width // 8, 8) << (4 * torch.arange(8))).sum(-1).to(I32)
    bias = 8 * (weight.view(experts, groups, -1, width) * scale[:, :, None]).sum((1, 2))
    return call(
        [m.integers(rows, depth)],
        [packed],
        bias=[bias],
        scale=[scale.view(I32).to(I64) & 0xFFFFFFFF],
        per_token_scale=[m.positive(rows) if groups == 1 else m.positive(rows, 1)],
        group_list=torch.tensor(counts, dtype=I64),
        group_list_type=1,
        split_item=2,
        group_type=0,
        output_dtype=dtype,
    )


# These write into x, which the schema does not say.
grouped("w4a8_channel", lambda m: w4a8(m, 7, [2, 0, 4], 512, 1, 24, BF16), functional=False)
grouped("w4a8_groups", lambda m: w4a8(m, 4, [1, 3], 512, 2, 16, F16), functional=False)
for groups in (0, 2):
    grouped(
        f"w4a4{'_groups' if groups else ''}",
        lambda m, groups=groups: call(
            [m.int4(6, 5)],
            [m.int4(3, 40, 2)],
            scale=[m.positive(3, *([groups] if groups else []), 16, low=0.01, high=0.1).view(I32).to(I64)],
            per_token_scale=[m.positive(6)],
            output_dtype=BF16,
            **_OPTIONS,
        ),
    )
grouped(
    "w4a4_static",
    lambda m: call(
        [m.int4(6, 5)], [m.int4(3, 40, 2)], scale=[m.positive(3, 16).view(I32).to(I64)], output_dtype=F16, **_OPTIONS
    ),
)


# --------------------------------------------------------------------------------------- -------formats and activations

add("npu_format_cast", "int8", lambda m: call(m.integers(33, 17), 29))
add("npu_format_cast", "packed_int4_3d", lambda m: call(m.int4(2, 32, 8), 29))
add("npu_format_cast", "bf16_back_to_nd", lambda m: call(m.floats(16, 16, dtype=BF16), 29))

for dtype in (BF16, F16, F32):
    add("npu_swiglu", f"last_{dtype}", lambda m, dtype=dtype: call(m.floats(3, 1, 34, dtype=dtype, scale=4)))
    add("npu_swiglu", f"first_{dtype}", lambda m, dtype=dtype: call(m.floats(6, 5, dtype=dtype, scale=4), 0))

# ------------------------------------------------------------------------------------- SwiGLU with dequant and quantize

add("npu_dequant_swiglu_quant", "bf16_dynamic_right_half", lambda m: call(m.floats(3, 34, dtype=BF16), quant_mode=1))
for mode in (0, 1, 2):
    for left in (False, True):
        add(
            "npu_dequant_swiglu_quant",
            f"int32_groups_mode_{mode}{'_left' if left else ''}",
            lambda m, mode=mode, left=left: call(
                m.integers(7, 34, low=-20000, high=20000, dtype=I32),
                weight_scale=m.positive(3, 34, low=1e-4, high=4e-4),
                activation_scale=m.positive(7, 1),
                quant_scale=m.positive(3, 17),
                group_index=torch.tensor([2, 0, 3], dtype=I64),
                activate_left=left,
                quant_mode=1,
                swiglu_mode=mode,
                clamp_limit=3.0,
                glu_alpha=1.5,
                glu_bias=0.5,
            ),
        )
add(
    "npu_dequant_swiglu_quant",
    "int32_no_groups_int_bias",
    lambda m: call(
        m.integers(3, 34, low=-20000, high=20000, dtype=I32),
        weight_scale=m.positive(34, low=1e-4, high=4e-4),
        activation_scale=m.positive(3),
        bias=m.integers(34, low=-9000, high=9000, dtype=I32),
        activate_left=True,
        quant_mode=1,
        dst_type=I8,
    ),
)
add(
    "npu_dequant_swiglu_quant",
    "int32_no_groups_float_bias",
    lambda m: call(
        m.integers(3, 34, low=-20000, high=20000, dtype=I32),
        weight_scale=m.positive(1, 34, low=1e-4, high=4e-4),
        activation_scale=m.positive(3),
        bias=m.floats(34, dtype=BF16),
        quant_mode=1,
    ),
)
add(
    "npu_dequant_swiglu_quant",
    "static_divides",
    lambda m: call(
        m.floats(5, 34, dtype=F16, scale=2),
        quant_scale=m.positive(17, low=0.01, high=0.05),
        quant_offset=m.floats(17, scale=9),
    ),
)
add(
    "npu_dequant_swiglu_quant",
    "static_groups",
    lambda m: call(
        m.floats(5, 34, dtype=BF16, scale=2),
        quant_scale=m.positive(2, 17, low=0.01, high=0.05),
        group_index=torch.tensor([1, 2], dtype=I64),
        activate_left=True,
    ),
)
add("npu_dequant_swiglu_quant", "zero_row", lambda m: call(torch.zeros(2, 8, dtype=BF16), quant_mode=1))


# -------------------------------------------------------------------------------------------------------------- routing


def expert_indices(m: Maker, tokens: int, choices: int, experts: int) -> torch.Tensor:
    """int32 [tokens, choices], different experts in a row."""
    order = [torch.randperm(experts, generator=m.generator)[:choices] for _ in range(tokens)]
    return torch.stack(order).to(I32)


def column_major(tokens: int, choices: int) -> torch.Tensor:
    return torch.arange(tokens * choices, dtype=I32).view(choices, tokens).t().contiguous()


for dtype in (BF16, F16, F32):
    add(
        "npu_moe_init_routing",
        f"{dtype}",
        lambda m, dtype=dtype: call(m.floats(5, 7, dtype=dtype), column_major(5, 2), expert_indices(m, 5, 2, 4), 5),
    )
add(
    "npu_moe_init_routing",
    "active_num",
    lambda m: call(m.floats(5, 7), column_major(5, 3), expert_indices(m, 5, 3, 6), 2),
)
add(
    "npu_moe_compute_expert_tokens",
    "gaps",
    lambda m: call(torch.tensor([1, 1, 2, 4, 4, 4], dtype=I32), 7),
)

for name, dtype, options in (
    ("plain", BF16, {}),
    ("int8", I8, {}),
    ("scale_is_copied", I8, {"scale": lambda m: m.positive(5)}),
    (
        "static",
        F16,
        {"quant_mode": 0, "scale": lambda m: torch.tensor([37.0]), "offset": lambda m: torch.tensor([-4.5])},
    ),
    ("dynamic", BF16, {"quant_mode": 1}),
    ("dynamic_one_smooth", F32, {"quant_mode": 1, "scale": lambda m: m.positive(1, 9)}),
):
    for expert_range in ([], [2, 5]):
        for row_idx_type in (0, 1):
            for kind in (0, 1, 2):

                def routing(
                    m: Maker,
                    dtype: torch.dtype = dtype,
                    options: dict[str, Any] = options,
                    expert_range: list[int] = expert_range,
                    row_idx_type: int = row_idx_type,
                    kind: int = kind,
                ) -> Any:
                    made = {key: value(m) if callable(value) else value for key, value in options.items()}
                    x = m.integers(5, 9) if dtype == I8 else m.floats(5, 9, dtype=dtype)
                    return call(
                        x,
                        expert_indices(m, 5, 3, 6),
                        expert_num=6,
                        active_expert_range=expert_range,
                        row_idx_type=row_idx_type,
                        expert_tokens_num_type=kind,
                        expert_tokens_num_flag=True,
                        **made,
                    )

                tag = f"{name}{'_range' if expert_range else ''}_rows_{row_idx_type}_tokens_{kind}"
                if name == "plain" or (row_idx_type, kind) == (0, 1):
                    add("npu_moe_init_routing_v2", tag, routing)
add(
    "npu_moe_init_routing_v2",
    "dynamic_smooth_per_expert",
    lambda m: call(
        m.floats(5, 9, dtype=F16),
        expert_indices(m, 5, 3, 6),
        scale=m.positive(3, 9),
        expert_num=6,
        active_num=15,
        active_expert_range=[2, 5],
        quant_mode=1,
    ),
)
for quant_mode in (-1, 1):
    add(
        "npu_moe_init_routing_v2",
        f"drop_pad_{quant_mode}",
        lambda m, quant_mode=quant_mode: call(
            m.floats(5, 9, dtype=BF16),
            torch.tensor([[1, 3], [1, 0], [1, 3], [1, 2], [3, 1]], dtype=I32),
            scale=m.positive(5) if quant_mode == -1 else m.positive(4, 9),
            expert_num=4,
            expert_capacity=3,
            drop_pad_mode=1,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            quant_mode=quant_mode,
        ),
    )


for dtype, prob_dtype in ((BF16, F32), (BF16, BF16), (F16, F16), (F32, F32)):
    add(
        "npu_moe_token_unpermute",
        f"{dtype}_{prob_dtype}",
        lambda m, dtype=dtype, prob_dtype=prob_dtype: call(
            m.floats(10, 7, dtype=dtype),
            torch.randperm(10, generator=m.generator).to(I32),
            m.positive(5, 2, dtype=prob_dtype),
        ),
    )
add(
    "npu_moe_token_unpermute",
    "no_probs",
    lambda m: call(m.floats(6, 7, dtype=F16), torch.randperm(6, generator=m.generator).to(I32)),
)
add(
    "npu_moe_token_unpermute",
    "cut_rows",
    lambda m: call(m.floats(4, 7), torch.randperm(6, generator=m.generator).to(I32), m.positive(3, 2)),
)
