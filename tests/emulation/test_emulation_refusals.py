# SPDX-License-Identifier: Apache-2.0
"""What the device refuses, the emulation refuses: a RuntimeError names operator, argument, expected and found."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_npu_quant import emulation

emulation.register()
npu = torch.ops.npu

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def t(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def quant_matmul(x1: Any = None, x2: Any = None, scale: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    x1 = t(4, 64, dtype=I8) if x1 is None else x1
    x2 = t(64, 32, dtype=I8) if x2 is None else x2
    return "npu_quant_matmul", (x1, x2, t(32) if scale is None else scale), kwargs


def weight_only(x: Any = None, weight: Any = None, scale: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    x = t(4, 64, dtype=BF16) if x is None else x
    weight = t(64, 32, dtype=I8) if weight is None else weight
    return "npu_weight_quant_batchmatmul", (x, weight, t(32, dtype=BF16) if scale is None else scale), kwargs


def kronecker(x: Any = None, p1: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    x = t(3, 4, 8, dtype=F16) if x is None else x
    p1 = t(4, 4, dtype=F16) if p1 is None else p1
    return "npu_kronecker_quant", (x, p1, t(8, 8, dtype=F16)), kwargs


def grouped(x: Any, weight: Any, kwargs: dict[str, Any]) -> tuple[str, tuple, dict]:
    common = {"group_list": t(3, dtype=I64), "group_type": 0, "split_item": 2}
    return "npu_grouped_matmul", (x, weight), common | kwargs


def gmm(x: Any = None, weight: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    """int8 x int8, per token, bfloat16 output."""
    standard = {"scale": [t(3, 32, dtype=BF16)], "per_token_scale": [t(4)], "output_dtype": BF16}
    return grouped(x or [t(4, 64, dtype=I8)], weight or [t(3, 64, 32, dtype=I8)], standard | kwargs)


def gmm16(weight: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    standard = {"antiquant_scale": [t(3, 32, dtype=BF16)]}
    return grouped([t(4, 64, dtype=BF16)], weight or [t(3, 64, 32, dtype=I8)], standard | kwargs)


def gmm84(weight: Any = None, x: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    standard = {"scale": [t(3, 2, 32, dtype=I64)], "bias": [t(3, 32)], "per_token_scale": [t(4)]}
    standard |= {"group_list_type": 1, "output_dtype": BF16}
    return grouped(x or [t(4, 512, dtype=I8)], weight or [t(3, 512, 4, dtype=I32)], standard | kwargs)


def gmm44(weight: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    standard = {"scale": [t(3, 32, dtype=I64)], "per_token_scale": [t(4)], "output_dtype": BF16}
    return grouped([t(4, 8, dtype=I32)], weight or [t(3, 64, 4, dtype=I32)], standard | kwargs)


def dsq(x: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    x = t(4, 32, dtype=BF16) if x is None else x
    return "npu_dequant_swiglu_quant", (x,), {"quant_mode": 1} | kwargs


def route(x: Any = None, expert_idx: Any = None, **kwargs: Any) -> tuple[str, tuple, dict]:
    x = t(4, 8) if x is None else x
    expert_idx = t(4, 2, dtype=I32) if expert_idx is None else expert_idx
    return "npu_moe_init_routing_v2", (x, expert_idx), {"expert_num": 8} | kwargs


def op(name: str, *args: Any, **kwargs: Any) -> tuple[str, tuple, dict]:
    return name, args, kwargs


A4, W4 = t(4, 128, dtype=I32), t(256, 128, dtype=I32).t()  # int4: 4 x 1024 by 1024 x 256
GROUPED = {"offset": t(4, 256, dtype=F16), "pertoken_scale": t(4, 1), "output_dtype": BF16, "group_sizes": [1, 1, 256]}
A8W4 = {"offset": t(32), "pertoken_scale": t(4, 1), "output_dtype": BF16}
X8, W84, S84 = t(4, 512, dtype=I8), t(512, 4, dtype=I32), t(2, 32, dtype=I64)


def without(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return options | changes


#: call, the argument that the message names, what was expected, what was found
REFUSALS: list[tuple[tuple[str, tuple, dict], str, str, str]] = [
    # npu_quantize
    (op("npu_quantize", t(4, 64, dtype=I8), t(1), None, torch.qint8, -1, False), "input", "float16", "int8[4, 64]"),
    (op("npu_quantize", t(4, 64), t(1), None, torch.quint8, -1, False), "dtype", "int8, qint8, quint4x2", "13"),
    (op("npu_quantize", t(4, 64), t(1), None, torch.quint4x2), "dtype", "qint8, quint8, int32", "16"),
    (op("npu_quantize", t(4, 64, dtype=BF16), t(1), None, torch.qint8, -1, False), "scales", "bfloat16", "float32[1]"),
    (op("npu_quantize", t(4, 64), t(1), t(1, dtype=I8), torch.qint8, -1, False), "zero_points", "float32", "int8[1]"),
    (op("npu_quantize", t(4, 64), t(4), None, torch.qint8, 0, False), "scales", "[64]", "float32[4]"),
    (op("npu_quantize", t(4, 64), t(64), None, torch.qint8, -2, False), "scales", "[4]", "float32[64]"),
    (op("npu_quantize", t(4, 64), t(4, 1), None, torch.qint8, -1, False), "scales", "[1, 64]", "float32[4, 1]"),
    (op("npu_quantize", t(4, 64), t(64), t(1), torch.qint8, -1, False), "zero_points", "shape [64]", "float32[1]"),
    (op("npu_quantize", t(4, 64), t(1), None, torch.qint8, -3, False), "axis", "-2 or greater", "-3"),
    (op("npu_quantize", t(64), t(1), None, torch.qint8, -2, False), "axis", "-1 for a 1-D", "-2"),
    (op("npu_quantize", t(4, 63), t(1), None, torch.quint4x2, -1, False), "input", "8 divides", "float32[4, 63]"),
    (op("npu_quantize", t(4, 64), t(1), None, torch.qint8, 2), "axis", "a dimension of [4, 64]", "2"),
    (op("npu_quantize", t(4, 64), t(64), None, torch.qint8, 0), "scales", "[4]", "float32[64]"),
    (op("npu_quantize", t(4, 64), t(1, dtype=F16), None, torch.qint8), "scales", "float32 or bfloat16", "float16[1]"),
    (op("npu_quantize", t(4, 64), t(1), t(1), torch.qint8), "zero_points", "int8 or uint8", "float32[1]"),
    # npu_dynamic_quant
    (op("npu_dynamic_quant", t(4, 64)), "input", "float16 or bfloat16", "float32[4, 64]"),
    (op("npu_dynamic_quant", t(64, dtype=BF16)), "input", "2 to 8 dimensions", "bfloat16[64]"),
    (op("npu_dynamic_quant", t(4, 64, dtype=F16), quant_mode="pertensor"), "quant_mode", "'pertoken'", "'pertensor'"),
    (op("npu_dynamic_quant", t(4, 64, dtype=F16), dst_type=torch.float8_e4m3fn), "dst_type", "torch.int8", "24"),
    (op("npu_dynamic_quant", t(4, 64, dtype=F16), dst_type=285), "dst_type", "torch.quint4x2", "285"),
    (op("npu_dynamic_quant", t(4, 64, dtype=F16), dst_type_max=1.0), "dst_type_max", "0.0", "1.0"),
    (op("npu_dynamic_quant", t(4, 60, dtype=F16), dst_type=torch.quint4x2), "input", "8 divides", "float16[4, 60]"),
    (
        op("npu_dynamic_quant", t(4, 64, dtype=F16), smooth_scales=t(64)),
        "smooth_scales",
        "float16",
        "float32[64]",
    ),
    (
        op("npu_dynamic_quant", t(4, 64, dtype=F16), smooth_scales=t(4, 64, dtype=F16)),
        "smooth_scales",
        "shape [64]",
        "float16[4, 64]",
    ),
    (
        op("npu_dynamic_quant", t(4, 64, dtype=F16), group_index=t(2, dtype=I32)),
        "smooth_scales",
        "a tensor",
        "None",
    ),
    (
        op(
            "npu_dynamic_quant",
            t(4, 64, dtype=F16),
            smooth_scales=t(2, 64, dtype=F16),
            group_index=t(2, dtype=I64),
        ),
        "group_index",
        "int32",
        "int64[2]",
    ),
    # npu_trans_quant_param
    (op("npu_trans_quant_param", t(4, dtype=BF16)), "scale", "float32", "bfloat16[4]"),
    (op("npu_trans_quant_param", t(4, 1)), "scale", "[n] or [1, n]", "float32[4, 1]"),
    (op("npu_trans_quant_param", t(4, 2)[:, 0]), "scale", "contiguous", "float32[4]"),
    (op("npu_trans_quant_param", t(4), t(3)), "offset", "shape [4]", "float32[3]"),
    (op("npu_trans_quant_param", t(4), None, 2), "round_mode", "0 or 1", "2"),
    # npu_quant_matmul, int8 x int8
    (quant_matmul(scale=t(32, dtype=F16), output_dtype=BF16), "scale", "float32 or bfloat16 or int64", "float16[32]"),
    (quant_matmul(scale=t(31), output_dtype=BF16), "scale", "[1] or [32]", "float32[31]"),
    (quant_matmul(scale=t(32, 1), output_dtype=BF16), "x1 (scale is 2-D", "int32", "int8[4, 64]"),
    (quant_matmul(x1=t(4, 60, dtype=I8)), "x2", "60 rows", "int8[64, 32]"),
    (quant_matmul(x1=t(64, dtype=I8)), "x1", "2 to 6 dimensions", "int8[64]"),
    (quant_matmul(x1=t(4, 64, dtype=torch.uint8)), "x1", "int8 or int32", "uint8[4, 64]"),
    (quant_matmul(x2=t(64, 64, dtype=I8)[:, ::2]), "x2", "contiguous memory", "int8[64, 32]"),
    (quant_matmul(x1=t(0, 64, dtype=I8)), "x1", "elements", "int8[0, 64]"),
    (quant_matmul(x2=t(64, 65536, dtype=I8), scale=t(1)), "x2", "at most 65535", "int8[64, 65536]"),
    (quant_matmul(output_dtype=F32), "output_dtype", "float16, bfloat16", "float32"),
    (quant_matmul(pertoken_scale=t(4, 1), output_dtype=BF16), "pertoken_scale", "shape [4]", "float32[4, 1]"),
    (quant_matmul(pertoken_scale=t(4, dtype=BF16), output_dtype=BF16), "pertoken_scale", "float32", "bfloat16[4]"),
    (quant_matmul(pertoken_scale=t(4)), "output_dtype", "bfloat16 or float16", "int8"),
    (quant_matmul(pertoken_scale=t(4), output_dtype=I32), "output_dtype", "with pertoken_scale", "int32"),
    (
        quant_matmul(scale=t(32, dtype=BF16), pertoken_scale=t(4), output_dtype=F16),
        "scale (for a float16 output)",
        "float32",
        "bfloat16[32]",
    ),
    (quant_matmul(scale=t(32, dtype=I64), output_dtype=BF16), "scale (for a bfloat16", "bfloat16", "int64[32]"),
    (quant_matmul(scale=t(32, dtype=I64), output_dtype=I32), "scale (for a int32", "float32", "int64[32]"),
    (quant_matmul(scale=t(32, dtype=BF16), output_dtype=F16), "scale (for a float16", "int64", "bfloat16[32]"),
    (quant_matmul(bias=t(32, dtype=F16), output_dtype=F16), "bias (for a float16", "int32", "float16[32]"),
    (quant_matmul(bias=t(32, dtype=F16), output_dtype=BF16), "bias (for a bfloat16", "float32", "float16[32]"),
    (
        quant_matmul(bias=t(32, dtype=BF16), pertoken_scale=t(4), output_dtype=F16),
        "bias (for a float16",
        "int32 or float16 or float32",
        "bfloat16[32]",
    ),
    (quant_matmul(bias=t(32), output_dtype=I32), "bias (for a int32", "int32", "float32[32]"),
    (quant_matmul(bias=t(1, 1, 32, dtype=I32), output_dtype=F16), "bias", "shape [32]", "int32[1, 1, 32]"),
    (quant_matmul(bias=t(1, dtype=I32), output_dtype=F16), "bias", "shape [32]", "int32[1]"),
    (quant_matmul(offset=t(32), output_dtype=F16), "offset", "None unless the output is int8", "float32[32]"),
    (quant_matmul(offset=t(32, dtype=BF16)), "offset", "float32", "bfloat16[32]"),
    (quant_matmul(group_sizes=[1, 1, 256], output_dtype=BF16), "x1 (scale is 2-D or group_sizes", "int32", "int8"),
    (quant_matmul(x1_dtype=290), "x1_dtype", "None (only Ascend 950", "290"),
    (quant_matmul(y_scale=t(1, 32, dtype=I64)), "y_scale", "None (only Ascend 950", "int64[1, 32]"),
    (
        quant_matmul(x1=t(2, 4, 64, dtype=I8), x2=t(3, 64, 32, dtype=I8), output_dtype=BF16),
        "x2",
        "broadcast with [2]",
        "int8[3, 64, 32]",
    ),
    # npu_quant_matmul, int4 x int4
    (quant_matmul(A4, W4, t(256), output_dtype=BF16), "output_dtype", "float16", "bfloat16"),
    (quant_matmul(A4, W4, t(256)), "output_dtype", "float16", "int8"),
    (quant_matmul(A4, W4, t(256), output_dtype=I32), "output_dtype", "float16", "int32"),
    (quant_matmul(A4, t(256, 128, dtype=I32), t(256), output_dtype=F16), "x2", "[1024, N/8]", "int32[256, 128]"),
    (quant_matmul(A4, t(64, 32, dtype=I8), output_dtype=F16), "x2", "int32", "int8[64, 32]"),
    (quant_matmul(A4, W4, t(4, 256), **without(GROUPED, group_sizes=None)), "group_sizes", "[1, 1, 256]", "None"),
    (quant_matmul(A4, W4, t(4, 256), **without(GROUPED, group_sizes=[1, 1, 128])), "group_sizes", "256", "[1, 1, 128]"),
    (quant_matmul(A4, W4, t(8, 256), **GROUPED), "scale", "[4, 256]", "float32[8, 256]"),
    (quant_matmul(A4, W4, t(4, 256), **without(GROUPED, offset=None)), "offset", "a tensor", "None"),
    (quant_matmul(A4, W4, t(4, 256), **without(GROUPED, offset=t(4, 256))), "offset", "float16", "float32[4, 256]"),
    (
        quant_matmul(A4, W4, t(4, 256), **without(GROUPED, pertoken_scale=t(4))),
        "pertoken_scale",
        "[4, 1]",
        "float32[4]",
    ),
    (quant_matmul(A4, W4, t(4, 256), **without(GROUPED, bias=t(256))), "bias", "None", "float32[256]"),
    (
        quant_matmul(A4, t(1024, 32, dtype=I32), t(4, 256), **GROUPED),
        "x2",
        "[N, 128] transposed",
        "int32[1024, 32]",
    ),
    (
        quant_matmul(A4[:, :32].contiguous(), t(256, 32, dtype=I32).t(), t(1, 256), **GROUPED),
        "x1",
        "1024 divides",
        "int32[4, 32]",
    ),
    # npu_quant_matmul, int8 x int4
    (quant_matmul(X8, W84, S84, **without(A8W4, offset=None)), "offset", "a tensor", "None"),
    (quant_matmul(X8, W84, S84, **without(A8W4, pertoken_scale=t(4))), "pertoken_scale", "[4, 1]", "float32[4]"),
    (quant_matmul(X8, W84, t(2, 32), **A8W4), "scale", "int64", "float32[2, 32]"),
    (quant_matmul(X8, W84, t(1, 32, dtype=I64), **A8W4), "scale", "[2, 32]", "int64[1, 32]"),
    (quant_matmul(X8, W84, S84, **without(A8W4, output_dtype=I8)), "output_dtype", "float16 or bfloat16", "int8"),
    (quant_matmul(X8, W84, S84, **without(A8W4, bias=t(32, dtype=I32))), "bias", "None", "int32[32]"),
    (
        quant_matmul(X8, t(4, 512, dtype=I32).t(), S84, **A8W4),
        "x2",
        "contiguous [K, N/8]",
        "int32[512, 4]",
    ),
    (
        quant_matmul(t(4, 128, dtype=I8), t(128, 4, dtype=I32), t(1, 32, dtype=I64), **A8W4),
        "x1",
        "256 divides",
        "int8[4, 128]",
    ),
    # npu_weight_quant_batchmatmul
    (weight_only(x=t(4, 64)), "x", "float16 or bfloat16", "float32[4, 64]"),
    (weight_only(x=t(1, 4, 64, dtype=BF16)), "x", "2-D", "bfloat16[1, 4, 64]"),
    (weight_only(weight=t(60, 32, dtype=I8)), "weight", "64 rows", "int8[60, 32]"),
    (weight_only(weight=t(64, 32, dtype=torch.uint8)), "weight", "int8 or int32", "uint8[64, 32]"),
    (weight_only(scale=t(32)), "antiquant_scale", "bfloat16", "float32[32]"),
    (weight_only(scale=t(2, 32, dtype=BF16)), "antiquant_scale", "[1, 32]", "bfloat16[2, 32]"),
    (
        weight_only(scale=t(1, 32, dtype=BF16), antiquant_group_size=64),
        "antiquant_group_size",
        "K - 1 = 63",
        "64",
    ),
    (weight_only(scale=t(4, 32, dtype=BF16), antiquant_group_size=16), "antiquant_group_size", "multiple of 32", "16"),
    (weight_only(scale=t(2, 32, dtype=BF16), antiquant_group_size=48), "antiquant_group_size", "multiple of 32", "48"),
    (weight_only(scale=t(32, dtype=BF16), antiquant_group_size=32), "antiquant_scale", "[2, 32]", "bfloat16[32]"),
    (weight_only(antiquant_offset=t(32)), "antiquant_offset", "bfloat16", "float32[32]"),
    (weight_only(antiquant_offset=t(1, dtype=BF16)), "antiquant_offset", "shape [32]", "bfloat16[1]"),
    (weight_only(bias=t(32, dtype=BF16)), "bias", "float32", "bfloat16[32]"),
    (weight_only(x=t(4, 64, dtype=F16), scale=t(32, dtype=F16), bias=t(32)), "bias", "float16", "float32[32]"),
    (weight_only(quant_offset=t(32)), "quant_offset", "None", "float32[32]"),
    (weight_only(weight=t(32, 8, dtype=I32)), "weight", "[64, N/8]", "int32[32, 8]"),
    (weight_only(weight=t(32, 4, dtype=I32).t()), "weight", "[N, 64/8] transposed", "int32[4, 32]"),
    # A transposed weight of one output column is contiguous and cannot be told from [K, N/8].
    (weight_only(weight=t(1, 8, dtype=I32).t(), scale=t(1, dtype=BF16)), "weight", "[64, N/8]", "int32[8, 1]"),
    (weight_only(weight=t(64, 16, dtype=torch.uint8), weight_dtype=285), "weight_dtype", "None", "285"),
    # npu_dynamic_quant_asymmetric, npu_kronecker_quant
    (op("npu_dynamic_quant_asymmetric", t(4, 64)), "input", "float16 or bfloat16", "float32[4, 64]"),
    (op("npu_dynamic_quant_asymmetric", t(64, dtype=F16)), "input", "2 to 8 dimensions", "float16[64]"),
    (kronecker(x=t(3, 4, 8)), "x", "float16 or bfloat16", "float32[3, 4, 8]"),
    (kronecker(x=t(3, 4, 12, dtype=F16)), "x", "8 divides", "float16[3, 4, 12]"),
    (kronecker(x=t(12, 8, dtype=F16)), "x", "3-D", "float16[12, 8]"),
    (kronecker(p1=t(8, 8, dtype=F16)), "kronecker_p1", "[4, 4]", "float16[8, 8]"),
    (kronecker(p1=t(4, 4, dtype=BF16)), "kronecker_p1", "float16", "bfloat16[4, 4]"),
    (kronecker(clip_ratio=1.5), "clip_ratio", "(0, 1]", "1.5"),
    (kronecker(dst_dtype=296), "dst_dtype", "None or 3", "296"),
    # npu_grouped_matmul
    (gmm(group_type=None), "group_type", "0 (rows)", "None"),
    (gmm(group_type=2), "group_type", "0 (rows)", "2"),
    (gmm(split_item=0), "split_item", "2 or 3", "0"),
    (gmm(group_list=None), "group_list", "a tensor", "None"),
    (gmm(group_list=t(3, dtype=I32)), "group_list", "int64", "int32[3]"),
    (gmm(group_list=t(2, dtype=I64)), "group_list", "[3]", "int64[2]"),
    (gmm(group_list_type=3), "group_list_type", "0 or 1 or 2", "3"),
    (gmm(group_list_type=2), "group_list", "[3, 2]", "int64[3]"),
    (gmm(x=[t(2, 4, 64, dtype=I8)]), "x", "2-D", "int8[2, 4, 64]"),
    (gmm(x=[t(64, 4, dtype=I8).t()]), "x", "contiguous", "int8[4, 64]"),
    (gmm(x=[t(4, 60, dtype=I8)]), "weight", "60 rows", "int8[3, 64, 32]"),
    (gmm(weight=[t(3, 64, 32)]), "weight", "goes with int8", "float32[3, 64, 32]"),
    (
        gmm(weight=[t(64, 32, dtype=I8), t(64, 16, dtype=I8), t(64, 32, dtype=I8)]),
        "weight",
        "equal sizes",
        "int8[64, 16]",
    ),
    (gmm(scale=None), "scale", "a list, for a bfloat16 output", "None"),
    (gmm(scale=[t(3, 32, dtype=F16)]), "scale (for a bfloat16", "bfloat16 or float32", "float16[3, 32]"),
    (gmm(scale=[t(3, 1, 32, dtype=BF16)]), "scale (for a bfloat16", "[3, 32]", "bfloat16[3, 1, 32]"),
    (gmm(output_dtype=F16), "scale (for a float16", "float32", "bfloat16[3, 32]"),
    (gmm(output_dtype=None), "scale (for a int8", "int64", "bfloat16[3, 32]"),
    (gmm(output_dtype=I32), "scale", "None", "[bfloat16[3, 32]]"),
    (gmm(output_dtype=F32), "output_dtype", "int8, int32, float16", "float32"),
    (gmm(per_token_scale=[t(4, 1)]), "per_token_scale", "shape [4]", "float32[4, 1]"),
    (gmm(per_token_scale=[t(4, dtype=BF16)]), "per_token_scale", "float32", "bfloat16[4]"),
    (gmm(bias=[t(3, 32)]), "bias (for a bfloat16", "int32 or bfloat16", "float32[3, 32]"),
    (gmm(bias=[t(32, dtype=I32)]), "bias (for a bfloat16", "[3, 32]", "int32[32]"),
    (gmm(per_token_scale=None, act_type=1), "act_type", "0", "1"),
    (gmm(act_type=3), "act_type", "0 or 1 or 2 or 4 or 5", "3"),
    (gmm(offset=[t(3, 32)]), "offset", "None", "[float32[3, 32]]"),
    (gmm(antiquant_scale=[t(3, 32)]), "antiquant_scale", "None", "[float32[3, 32]]"),
    (gmm(scale_dtype=293), "scale_dtype", "None", "293"),
    (gmm16(antiquant_scale=None), "antiquant_scale", "a list", "None"),
    (gmm16(antiquant_scale=[t(3, 32)]), "antiquant_scale", "bfloat16", "float32[3, 32]"),
    (gmm16(antiquant_scale=[t(3, 2, 32, dtype=BF16)]), "antiquant_scale", "[3, 32]", "bfloat16[3, 2, 32]"),
    (gmm16(antiquant_offset=[t(3, 1, dtype=BF16)]), "antiquant_offset", "[3, 32]", "bfloat16[3, 1]"),
    (gmm16(bias=[t(3, 32, dtype=BF16)]), "bias", "float32", "bfloat16[3, 32]"),
    (gmm16(scale=[t(3, 32)]), "scale", "None (x is not quantized)", "[float32[3, 32]]"),
    (gmm16(act_type=5), "act_type", "0", "5"),
    (gmm16(output_dtype=F16), "output_dtype", "bfloat16", "float16"),
    (
        gmm16(weight=[t(3, 64, 4, dtype=I32)], antiquant_scale=[t(3, 5, 32, dtype=BF16)]),
        "antiquant_scale",
        "divides 64",
        "bfloat16[3, 5, 32]",
    ),
    (gmm16(group_list=t(3, 2, dtype=I64), group_list_type=2), "group_list_type", "0 or 1 unless int8", "2"),
    (gmm16(), "antiquant_offset", "a list, of zeros", "None"),
    (gmm84(group_list_type=0), "group_list_type", "1", "0"),
    (gmm84(weight=[t(3, 64, 4, dtype=I32)], x=[t(4, 64, dtype=I8)]), "x", "K that 256 divides", "int8[4, 64]"),
    (gmm84(bias=None), "bias", "a list", "None"),
    (gmm84(per_token_scale=None), "per_token_scale", "a list", "None"),
    (gmm84(scale=[t(3, 4, 32, dtype=I64)]), "scale", "[3, 1, 32] or [3, 2, 32]", "int64[3, 4, 32]"),
    (gmm84(scale=[t(3, 2, 32)]), "scale", "int64", "float32[3, 2, 32]"),
    (gmm84(output_dtype=None), "output_dtype", "float16 or bfloat16", "None"),
    (gmm84(weight=[t(3, 4, 512, dtype=I32).transpose(1, 2)]), "weight", "512 rows", "int32[3, 512, 4]"),
    (gmm44(scale=[t(3, 3, 32, dtype=I64)]), "scale", "divides 64", "int64[3, 3, 32]"),
    (gmm44(bias=[t(3, 32)]), "bias", "None", "[float32[3, 32]]"),
    (gmm44(weight=[t(64, 4, dtype=I32)] * 3), "weight", "one 3-D", "[int32[64, 4],"),
    (
        op("npu_grouped_matmul", [t(4, 64, dtype=I8)], [t(64, 32, dtype=I8)], output_dtype=I32, group_type=-1),
        "group_type",
        "0 for int8 x int8",
        "-1",
    ),
    (op("npu_grouped_matmul", [t(4, 64)], [t(64, 8)] * 2, group_type=-1), "x", "as many tensors as weight, 2", "1"),
    # SwiGLU with dequantization and quantization
    (dsq(x=t(2, 4, 32, dtype=BF16)), "x", "2-D", "bfloat16[2, 4, 32]"),
    (dsq(x=t(4, 32)), "x", "int32 or float16", "float32[4, 32]"),
    (dsq(x=t(4, 31, dtype=BF16)), "x", "even", "bfloat16[4, 31]"),
    (dsq(quant_mode=2), "quant_mode", "0 or 1", "2"),
    (dsq(quant_mode=0), "quant_scale", "a tensor", "None"),
    (dsq(quant_mode=0, quant_scale=t(16, dtype=BF16)), "quant_scale", "float32", "bfloat16[16]"),
    (dsq(quant_scale=t(32)), "quant_scale", "[16] or [1, 16]", "float32[32]"),
    (dsq(quant_offset=t(16)), "quant_offset", "None (quantization is dynamic)", "float32[16]"),
    (dsq(weight_scale=t(32)), "weight_scale", "None (x is a float)", "float32[32]"),
    (dsq(x=t(4, 32, dtype=I32)), "activation_scale", "a tensor", "None"),
    (dsq(x=t(4, 32, dtype=I32), activation_scale=t(4, dtype=BF16)), "activation_scale", "float32", "bfloat16[4]"),
    (dsq(x=t(4, 32, dtype=I32), activation_scale=t(3)), "activation_scale", "[4] or [4, 1]", "float32[3]"),
    (dsq(group_index=t(2, dtype=I32)), "group_index", "int64", "int32[2]"),
    (dsq(group_index=t(2, dtype=I64), quant_scale=t(3, 16)), "quant_scale", "[2, 16]", "float32[3, 16]"),
    (
        dsq(x=t(4, 32, dtype=I32), activation_scale=t(4), bias=t(32, dtype=I32), group_index=t(2, dtype=I64)),
        "bias",
        "None (group_index is given)",
        "int32[32]",
    ),
    (dsq(activate_dim=0), "activate_dim", "None or -1 or 1", "0"),
    (dsq(dst_type=torch.float8_e4m3fn), "dst_type", "None or 1", "24"),
    # routing
    (op("npu_moe_init_routing", t(4, 8), t(4, 2, dtype=I64), t(4, 2, dtype=I32), 4), "row_idx", "int32", "int64[4, 2]"),
    (
        op("npu_moe_init_routing", t(4, 8), t(4, 2, dtype=I32), t(4, 3, dtype=I32), 4),
        "expert_idx",
        "[4, 2]",
        "int32[4, 3]",
    ),
    (op("npu_moe_compute_expert_tokens", t(4, dtype=I64), 2), "sorted_expert_for_source_row", "int32", "int64[4]"),
    (route(x=t(4, 8, dtype=I8), quant_mode=1), "x", "float16", "int8[4, 8]"),
    (route(expert_idx=t(4, 2, dtype=I64)), "expert_idx", "int32", "int64[4, 2]"),
    (route(expert_idx=t(3, 2, dtype=I32)), "expert_idx", "[4, 2]", "int32[3, 2]"),
    (route(expert_num=-1), "expert_num", "1 to 10240", "-1"),
    (route(active_expert_range=[2, 9]), "active_expert_range", "within [0, 8]", "[2, 9]"),
    (route(active_num=3), "active_num", "all of 8 rows", "3"),
    (route(quant_mode=2), "quant_mode", "-1 or 0 or 1", "2"),
    (route(scale=t(4, dtype=BF16)), "scale", "float32", "bfloat16[4]"),
    (route(scale=t(8)), "scale", "[4]", "float32[8]"),
    (route(quant_mode=1, scale=t(4)), "scale", "[8, 8] or [1, 8]", "float32[4]"),
    (route(quant_mode=0, scale=t(1)), "offset", "a tensor", "None"),
    (route(quant_mode=1, offset=t(1)), "offset", "None", "float32[1]"),
    (route(drop_pad_mode=1, expert_tokens_num_type=1), "expert_capacity", "1 to 4", "-1"),
    (route(drop_pad_mode=1, expert_capacity=2), "expert_tokens_num_type", "1", "0"),
    (
        route(drop_pad_mode=1, expert_capacity=2, expert_tokens_num_type=1, active_expert_range=[0, 4]),
        "active_expert_range",
        "all experts",
        "[0, 4]",
    ),
    (op("npu_moe_token_unpermute", t(8, 8), t(8, dtype=I64)), "sorted_indices", "int32", "int64[8]"),
    (op("npu_moe_token_unpermute", t(8, 8), t(7, dtype=I32), t(4, 2)), "sorted_indices", "[8]", "int32[7]"),
    (op("npu_moe_token_unpermute", t(8, 8), t(8, dtype=I32), t(8)), "probs", "2-D", "float32[8]"),
    # the rest of the dense operators
    (op("npu_format_cast", t(4, 4, dtype=I8), 4), "acl_format", "2 or 29", "4"),
    (op("npu_format_cast", t(4, dtype=I8), 29), "input", "2 dimensions", "int8[4]"),
    (op("npu_format_cast", t(4, 4, dtype=I64), 29), "input", "int8", "int64[4, 4]"),
    (op("npu_swiglu", t(4, 63)), "input", "even", "float32[4, 63]"),
    (op("npu_swiglu", t(4, 64), 2), "dim", "a dimension of [4, 64]", "2"),
]


@pytest.mark.parametrize("kind", ["cpu", "fake"])
@pytest.mark.parametrize(("called", "argument", "expected", "found"), REFUSALS)
def test_refusal(called: tuple[str, tuple, dict], argument: str, expected: str, found: str, kind: str) -> None:
    name, args, kwargs = called
    words = (re.escape(text) for text in (name, argument, expected, found))
    message = "{}: argument {}.*expected .*{}.*, found {}".format(*words)
    operator = getattr(npu, name)
    if kind == "cpu":
        with pytest.raises(RuntimeError, match=message):
            operator(*args, **kwargs)
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, list):
                return [fake(item) for item in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        with pytest.raises(RuntimeError, match=message):
            operator(*(fake(value) for value in args), **{key: fake(value) for key, value in kwargs.items()})


def test_group_index_must_end_in_the_number_of_rows() -> None:
    x, smooth = t(4, 8, dtype=BF16), t(2, 8, dtype=BF16)
    for ends in ([2, 3], [4, 2], [5, 4]):
        with pytest.raises(
            RuntimeError, match=r"npu_dynamic_quant: argument group_index: expected running totals .* 4 rows"
        ):
            npu.npu_dynamic_quant(x, smooth_scales=smooth, group_index=torch.tensor(ends, dtype=I32))


@pytest.mark.parametrize(
    ("group_list", "group_list_type", "expected"),
    [
        ([2, 1, 4], 0, "groups of no negative size"),
        ([2, 3, 5], 0, "at most 4 rows"),
        ([2, -1, 1], 1, "groups of no negative size"),
        ([2, 2, 1], 1, "at most 4 rows"),
        ([[0, 2], [1, 0], [2, 1]], 2, "pairs with a count before those without"),
    ],
)
def test_group_list_must_describe_the_rows(group_list: list, group_list_type: int, expected: str) -> None:
    _, args, kwargs = gmm(group_list=torch.tensor(group_list), group_list_type=group_list_type)
    with pytest.raises(RuntimeError, match=rf"npu_grouped_matmul: argument group_list: expected {expected}"):
        npu.npu_grouped_matmul(*args, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [{"scale": [t(3, 32)]}, {"bias": [t(3, 32, dtype=BF16)]}, {"scale": [t(3, 32)], "bias": [t(3, 32, dtype=BF16)]}],
)
def test_some_dtypes_of_grouped_matmul_need_a_fractal_nz_weight(changes: dict[str, Any]) -> None:
    weight = t(3, 64, 32, dtype=I8)
    _, args, kwargs = gmm(weight=[weight], **changes)
    with pytest.raises(RuntimeError, match=r"npu_grouped_matmul: argument weight: expected FRACTAL_NZ"):
        npu.npu_grouped_matmul(*args, **kwargs)
    nz = npu.npu_format_cast(weight, 29)
    (out,) = npu.npu_grouped_matmul(args[0], [nz], **kwargs)
    added = 1 if "bias" in changes else 0
    assert torch.equal(out[0], torch.full((32,), 64 + added, dtype=BF16))


def test_int8_by_int4_overwrites_x() -> None:
    _, (x, weight), kwargs = gmm84()
    npu.npu_grouped_matmul(x, weight, **kwargs)
    assert torch.equal(x[0], torch.full((4, 512), 0x7F, dtype=I8))


@pytest.mark.parametrize(
    ("called", "message"),
    [
        (dsq(group_index=torch.tensor([3, 2])), "group_index: expected at most 4 rows"),
        (dsq(group_index=torch.tensor([3, -1])), "group_index: expected groups of no negative size"),
        (
            op("npu_moe_token_unpermute", t(4, 8), torch.tensor([0, 1, -1, 2], dtype=I32)),
            "sorted_indices: expected no negative index",
        ),
    ],
)
def test_values_that_the_device_would_read_wrongly(called: tuple[str, tuple, dict], message: str) -> None:
    name, args, kwargs = called
    with pytest.raises(RuntimeError, match=f"{name}: argument {message}"):
        getattr(npu, name)(*args, **kwargs)
