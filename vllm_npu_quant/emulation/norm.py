# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and its fusions."""

from __future__ import annotations

from typing import Any

import torch

from vllm_npu_quant.emulation.checks import require, require_dtype, require_shape, require_value
from vllm_npu_quant.emulation.numerics import INT8, fill_garbage, round_to_int

__all__ = [
    "npu_add_rms_norm",
    "npu_add_rms_norm_fake",
    "npu_add_rms_norm_quant",
    "npu_add_rms_norm_quant_fake",
    "npu_rms_norm",
    "npu_rms_norm_fake",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check_norm(name: str, argument: str, x: torch.Tensor, gamma: torch.Tensor) -> list[int]:
    """The shape of rstd: the input's, with 1 for every dimension that gamma covers."""
    require_dtype(name, argument, x, *FLOATS)
    require(1 <= gamma.dim() <= x.dim(), name, "gamma", f"1 to {x.dim()} dimensions", gamma)
    require_shape(name, "gamma", gamma, x.shape[x.dim() - gamma.dim() :])
    return [*x.shape[: x.dim() - gamma.dim()], *[1] * gamma.dim()]


def reciprocal_root_mean_square(x: torch.Tensor, gamma_dim: int, epsilon: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + epsilon) of a float32 tensor over its last ``gamma_dim`` dimensions (kept as size 1)."""
    return torch.rsqrt(x.square().mean(dim=list(range(-gamma_dim, 0)), keepdim=True) + epsilon)


def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-06) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x * rstd * gamma with rstd = 1 / sqrt(mean(x^2) + epsilon): float32 throughout, one rounding at the end.

    Args:
        input: float16, bfloat16 or float32 [..., *normalized].
        gamma: [*normalized], the input's dtype or float32.

    Returns:
        y: the input's shape and dtype.
        rstd: float32 [..., 1].

    Source: ops-nn norm/rms_norm/op_kernel, tests/assets/golden.py.
    """
    _check_norm("npu_rms_norm", "input", input, gamma)
    require_dtype("npu_rms_norm", "gamma", gamma, input.dtype, torch.float32)
    x = input.to(torch.float32)
    rstd = reciprocal_root_mean_square(x, gamma.dim(), epsilon)
    return (x * rstd * gamma.to(torch.float32)).to(input.dtype), rstd


def npu_rms_norm_fake(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-06
) -> tuple[torch.Tensor, torch.Tensor]:
    rstd_shape = _check_norm("npu_rms_norm", "input", input, gamma)
    require_dtype("npu_rms_norm", "gamma", gamma, input.dtype, torch.float32)
    return input.new_empty(input.shape), input.new_empty(rstd_shape, dtype=torch.float32)


def check_add_rms_norm(name: str, x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor) -> list[int]:
    rstd_shape = _check_norm(name, "x1", x1, gamma)
    require_dtype(name, "x2", x2, x1.dtype)
    require_shape(name, "x2", x2, x1.shape)
    require_dtype(name, "gamma", gamma, x1.dtype)
    return rstd_shape


def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-06
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual addition and RMSNorm, with the roundings of Ascend 910B and 910_93.

        x = round(x1 + x2);  rstd = 1 / sqrt(mean(x^2) + epsilon) of the rounded x;  y = round(round(x * rstd) * gamma)

    ``round`` is to the input's dtype. The rounding before gamma is the device's; npu_rms_norm has none.

    Args:
        x1, x2: the same shape [..., *normalized] and dtype (float16, bfloat16, float32).
        gamma: [*normalized], the same dtype.

    Returns:
        (y, rstd, x): y and x like x1; rstd float32 [..., 1].

    Source: ops-nn norm/add_rms_norm/op_kernel, tests/assets/golden.py.
    """
    check_add_rms_norm("npu_add_rms_norm", x1, x2, gamma)
    x = (x1.to(torch.float32) + x2.to(torch.float32)).to(x1.dtype)
    x32 = x.to(torch.float32)
    rstd = reciprocal_root_mean_square(x32, gamma.dim(), epsilon)
    normalized = (x32 * rstd).to(x1.dtype).to(torch.float32)
    return (normalized * gamma.to(torch.float32)).to(x1.dtype), rstd, x


def npu_add_rms_norm_fake(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-06
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rstd_shape = check_add_rms_norm("npu_add_rms_norm", x1, x2, gamma)
    return x1.new_empty(x1.shape), x1.new_empty(rstd_shape, dtype=torch.float32), x1.new_empty(x1.shape)


_QUANT_DTYPES = {
    # dtype of x: (scales, zero points)
    torch.float16: (torch.float32, torch.int32),
    torch.bfloat16: (torch.bfloat16, torch.bfloat16),
}


def _check_add_rms_norm_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    scales1: torch.Tensor,
    zero_points1: torch.Tensor | None,
    beta: torch.Tensor | None = None,
    scales2: torch.Tensor | None = None,
    zero_points2: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-06,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> None:
    name = "npu_add_rms_norm_quant"
    require_dtype(name, "x1", x1, *_QUANT_DTYPES)
    require_value(name, "axis", axis, -1)
    require_value(name, "dst_type", dst_type, None, 1)
    require_shape(name, "gamma", gamma, (x1.shape[-1],))
    check_add_rms_norm(name, x1, x2, gamma)
    scale_dtype, zero_point_dtype = _QUANT_DTYPES[x1.dtype]
    expected = {
        "scales1": (scales1, scale_dtype),
        "zero_points1": (zero_points1, zero_point_dtype),
        "beta": (beta, x1.dtype),
        "scales2": (scales2, scale_dtype),
        "zero_points2": (zero_points2, zero_point_dtype),
    }
    for argument, (tensor, dtype) in expected.items():
        if tensor is not None:
            require_dtype(name, argument, tensor, dtype)
            require_shape(name, argument, tensor, gamma.shape)
    require(zero_points2 is None or scales2 is not None, name, "zero_points2", "None without scales2", zero_points2)


def npu_add_rms_norm_quant(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    scales1: torch.Tensor,
    zero_points1: torch.Tensor | None,
    beta: torch.Tensor | None = None,
    scales2: torch.Tensor | None = None,
    zero_points2: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-06,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """npu_add_rms_norm, then static quantization by one or two sets of scales.

        y1 = saturate(rint(y / scales1 + zero_points1))    div_mode=True, the default
        y1 = saturate(rint(y * scales1 + zero_points1))    div_mode=False

    y is that of npu_add_rms_norm with its roundings, plus beta in float32. y2 likewise; garbage without scales2.

    Args:
        x1, x2: float16 or bfloat16 [..., H]; gamma, beta: the same dtype [H].
        scales1, scales2: [H], float32 (float16 x) or bfloat16 (bfloat16 x).
        zero_points1, zero_points2: [H], int32 (float16 x) or bfloat16 (bfloat16 x).

    Returns:
        (y1, y2, x): int8, int8, and round(x1 + x2).

    Source: op-plugin torch_npu-npu_add_rms_norm_quant.md, test_npu_add_rms_norm_quant.py.
    """
    _check_add_rms_norm_quant(
        x1,
        x2,
        gamma,
        scales1,
        zero_points1,
        beta,
        scales2,
        zero_points2,
        axis=axis,
        epsilon=epsilon,
        div_mode=div_mode,
        dst_type=dst_type,
    )
    normalized, _, x = npu_add_rms_norm(x1, x2, gamma, epsilon)
    y = normalized.to(torch.float32)
    if beta is not None:
        y = y + beta.to(torch.float32)

    def quantized(scales: torch.Tensor | None, zero_points: torch.Tensor | None) -> torch.Tensor:
        if scales is None:
            out = torch.empty(y.shape, dtype=torch.int8)
            fill_garbage(out)
            return out
        scales = scales.to(torch.float32)
        values = y / scales if div_mode else y * scales
        if zero_points is not None:
            values = values + zero_points.to(torch.float32)
        return round_to_int(values, INT8).to(torch.int8)

    return quantized(scales1, zero_points1), quantized(scales2, zero_points2), x


def npu_add_rms_norm_quant_fake(
    x1: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_add_rms_norm_quant(x1, *args, **kwargs)
    y1, y2 = (x1.new_empty(x1.shape, dtype=torch.int8) for _ in range(2))
    return y1, y2, x1.new_empty(x1.shape)
