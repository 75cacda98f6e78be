# SPDX-License-Identifier: Apache-2.0
"""What the documents of torch_npu and CANN allow on Atlas A2 and A3, for the operators that the methods call.

The rules are written from the documents and look at recorded calls only; nothing is shared with the emulation's own checks.

- op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-<operator>.md
- ops-transformer, gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md, and the host checks of aclnn_grouped_matmul.cpp
- ops-nn, matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5.md, weight_quant_batch_matmul_v2/docs

A use that the documents do not allow and that is known to work, because vllm-ascend or SGLang call the operator so, is not
a broken rule but an entry of UNDOCUMENTED. They are what to try first on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.conformance.recording import Call, Tensor

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
HALVES = (F16, BF16)

UNDOCUMENTED = {
    "offsets per group": "npu_grouped_matmul: antiquant_offset with scales per group; documented for scales per channel "
    "only. vllm-ascend's and SGLang's W4A16 experts call it so.",
    "int8 x int4, one scale per channel": "npu_grouped_matmul: scale [E, 1, N] where K is more than 256; documented is one "
    "per 256 inputs. vllm-ascend's W4A8 experts with scales per channel call it so.",
    "weight-only int8 in FRACTAL_NZ": "npu_weight_quant_batchmatmul: documented for graphs of TorchAir only. vllm-ascend's "
    "W8A16 calls it so.",
    "activation_scale without a last dimension of 1": "npu_dequant_swiglu_quant: documented is [M, 1]. vllm-ascend passes "
    "the [M] that npu_moe_init_routing_v2 gives.",
}


@dataclass
class Verdict:
    """What is wrong with a call, and which entries of UNDOCUMENTED it needs."""

    broken: list[str] = field(default_factory=list)
    undocumented: list[str] = field(default_factory=list)


class Rule:
    """The arguments of one call, and what is found about them."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.verdict = Verdict()

    def __getitem__(self, name: str) -> Any:
        return self.call.arguments.get(name)

    def need(self, condition: Any, rule: str) -> None:
        if not condition:
            self.verdict.broken.append(f"{self.call.operator}: {rule}")

    def beyond(self, condition: Any, entry: str) -> None:
        assert entry in UNDOCUMENTED
        if condition:
            self.verdict.undocumented.append(entry)

    def absent(self, *names: str) -> None:
        for name in names:
            self.need(self[name] is None, f"{name} is not for this form of call")

    def tensor(self, name: str, *dtypes: torch.dtype, shapes: tuple[tuple[int, ...], ...] = ()) -> Tensor | None:
        """The argument, which has one of the dtypes and one of the shapes if it is there."""
        value = self[name]
        if value is None:
            return None
        self.need(value.dtype in dtypes, f"{name} is {value}, and takes {dtypes}")
        self.need(not shapes or value.shape in shapes, f"{name} is {value}, and takes the shapes {shapes}")
        return value

    def only(self, name: str) -> Tensor | None:
        """The only tensor of a list."""
        values = self[name]
        if values is None:
            return None
        self.need(len(values) == 1, f"{name} has one tensor")
        return values[0]


def check(call: Call) -> Verdict:
    """Judge a call. An operator without rules is broken: rules come first."""
    rule = Rule(call)
    function = RULES.get(call.operator)
    if function is None:
        rule.need(False, "there are no rules for this operator")
    else:
        try:
            function(rule)
        except (AssertionError, AttributeError, IndexError, ValueError):
            rule.need(False, "an argument is missing, or has another number of dimensions")
    return rule.verdict


def _format_cast(rule: Rule) -> None:
    x = rule["input"]
    rule.need(rule["acl_format"] == 29, "only FRACTAL_NZ (29) is used")
    rule.need(x.dtype in (I8, I32, *HALVES), "FRACTAL_NZ holds int8, int32, float16 and bfloat16")
    rule.need(x.contiguous and len(x.shape) >= 2, "the input is a contiguous matrix, or several")
    rule.need(x.shape[-2] > 1 and x.shape[-1] > 1, "no dimension of a matrix is 1")
    rule.absent("customize_dtype", "input_dtype")


def _trans_quant_param(rule: Rule) -> None:
    scale = rule["scale"]
    rule.need(scale.dtype == F32 and len(scale.shape) in (1, 2), "scale is float32 [N] or [1, N]")
    rule.need(len(scale.shape) == 1 or scale.shape[0] == 1, "scale is float32 [N] or [1, N]")
    rule.tensor("offset", F32, shapes=(scale.shape, (1,)))
    rule.need(scale.contiguous, "scale is contiguous")
    rule.need(rule["round_mode"] in (None, 0, 1), "round_mode is 0 or 1")


def _dynamic_quant(rule: Rule) -> None:
    x = rule["input"]
    rule.need(x.dtype in HALVES, "input is float16 or bfloat16")
    rule.need(len(x.shape) >= 2, "input has at least two dimensions")
    rule.need(rule["dst_type"] in (None, I8, torch.quint4x2), "dst_type is int8 or quint4x2")
    rule.need(rule["dst_type"] != torch.quint4x2 or x.shape[-1] % 8 == 0, "8 divides the last dimension for int4")
    rule.absent("quant_mode", "dst_type_max")
    rule.absent("group_index")
    rule.tensor("smooth_scales", x.dtype, shapes=((x.shape[-1],),))


def _quantize(rule: Rule) -> None:
    x, scales = rule["input"], rule["scales"]
    rule.need(x.dtype in (*HALVES, F32), "input is float32, float16 or bfloat16")
    rule.need(rule["div_mode"] is False, "div_mode False, in which the scales are multiplied")
    rule.need(scales.dtype == x.dtype, "scales have the input's dtype")
    last = (x.shape[-1],)
    rule.need(scales.shape in (last, (1,), (1,) * (len(x.shape) - 1) + last), "scales are [K] or [1]")
    zero_points = rule["zero_points"]
    if zero_points is not None:
        rule.need(zero_points.dtype == scales.dtype, "zero_points have the dtype of scales")
        rule.need(zero_points.shape == scales.shape, "zero_points have the shape of scales")
    rule.need(rule["dtype"] in (torch.qint8, I8, torch.quint4x2), "dtype is qint8, int8 or quint4x2")
    rule.need(rule["dtype"] != torch.quint4x2 or x.shape[-1] % 8 == 0, "8 divides the last dimension for int4")
    rule.need(rule["axis"] == -1, "axis -1")


def _kronecker_quant(rule: Rule) -> None:
    x, left, right = rule["x"], rule["kronecker_p1"], rule["kronecker_p2"]
    rule.need(x.dtype in HALVES and len(x.shape) == 3, "x is float16 or bfloat16 [K, M, N]")
    tokens, rows, columns = x.shape
    rule.need(1 <= tokens <= 262144, "K lies in [1, 262144]")
    rule.need(1 <= rows <= 256 and 1 <= columns <= 256, "M and N lie in [1, 256]")
    rule.need(columns % 8 == 0, "8 divides N for int4 in int32")
    rule.need(left.dtype == x.dtype and left.shape == (rows, rows), "kronecker_p1 is [M, M] in x's dtype")
    rule.need(right.dtype == x.dtype and right.shape == (columns, columns), "kronecker_p2 is [N, N] in x's dtype")
    clip = rule["clip_ratio"]
    rule.need(clip is None or 0 < clip <= 1, "clip_ratio lies in (0, 1]")
    rule.need(rule["dst_dtype"] in (None, I32), "dst_dtype is int32")


#: npu_quant_matmul of int8: (dtype of scale, per token, dtype of the output) -> dtypes of the bias.
_INT8_MATMUL = {
    **{(scale, False, out): (I32,) for scale in (I64, F32) for out in (F16, I8)},
    **{(scale, per_token, BF16): (I32, BF16, F32) for scale in (F32, BF16) for per_token in (False, True)},
    (F32, True, F16): (I32, F16, F32),
    **{(scale, False, I32): (I32,) for scale in (F32, BF16)},
}
#: The same of int4.
_INT4_MATMUL: dict[tuple[torch.dtype, bool, torch.dtype], tuple[torch.dtype, ...]] = {
    **{(scale, False, F16): (I32,) for scale in (I64, F32)},
    **{(F32, True, out): () for out in HALVES},
}


def _quant_matmul(rule: Rule) -> None:
    x1, x2, scale = rule["x1"], rule["x2"], rule["scale"]
    rule.need(x1.dtype in (I8, I32) and x1.dtype == x2.dtype, "x1 and x2 are both int8 or both int4 in int32")
    for name, x in (("x1", x1), ("x2", x2)):
        rule.need(2 <= len(x.shape) <= 6, f"{name} has 2 to 6 dimensions")
        rule.need(0 not in x.shape, f"{name} is not empty")
        rule.need(x.shape[-1] <= 65535, f"the last dimension of {name} is at most 65535")
    rule.need(len(x2.shape) == 2 or x1.shape[:-2] == x2.shape[:-2], "x1 and x2 are batches of the same size")
    rule.need(x2.contiguous or x2.transposed or x2.nz, "x2 is contiguous or transposed")
    table = _INT8_MATMUL
    if x1.dtype == I8:
        depth, width = x2.shape[-2:]
        rule.need(x1.shape[-1] == depth, "x1's last dimension is x2's first")
    else:
        table = _INT4_MATMUL
        depth = x1.shape[-1] * 8
        rule.need(x1.contiguous, "x1 of int4 is contiguous")
        if x2.transposed:  # [n, k / 8] in memory
            width = x2.shape[-1]
            rule.need(x2.shape[-2] * 8 == depth, "x2 transposed is [k / 8, n]")
        else:
            width = x2.shape[-1] * 8
            rule.need(x2.shape[-2] == depth, "x2 is [k, n / 8]")
        rule.need(width % 8 == 0, "8 divides n of int4")
    out = rule["output_dtype"] or I8
    rule.need(scale.shape in ((width,), (1,)), "scale is [n] or [1]")
    pertoken = rule.tensor("pertoken_scale", F32, shapes=((x1.shape[-2],),))
    allowed = table.get((scale.dtype, pertoken is not None, out))
    rule.need(
        allowed is not None, f"no such combination: scale {scale.dtype}, per token {bool(pertoken)}, output {out}"
    )
    rule.tensor("bias", *(allowed or ()), shapes=((width,),))
    rule.need(rule["offset"] is None or out == I8, "offset is for int8 outputs")
    rule.tensor("offset", F32, shapes=((width,), (1,)))
    rule.absent("x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "group_sizes", "y_scale")


def _weight_quant_batchmatmul(rule: Rule) -> None:
    x, weight, scale = rule["x"], rule["weight"], rule["antiquant_scale"]
    rule.need(x.dtype in HALVES and len(x.shape) == 2, "x is float16 or bfloat16 [M, K]")
    rule.need(weight.dtype in (I8, I32) and len(weight.shape) == 2, "weight is int8 [K, N] or int4 in int32 [K, N / 8]")
    rule.need(weight.contiguous or weight.transposed or weight.nz, "weight is contiguous or transposed")
    tokens, depth = x.shape
    rows, width = weight.shape
    if weight.dtype == I32:
        rule.need(not weight.nz, "int4 in FRACTAL_NZ is for graphs and transposed inputs")
        rows, width = (rows * 8, width) if weight.transposed else (rows, width * 8)
    rule.beyond(weight.nz, "weight-only int8 in FRACTAL_NZ")
    rule.need(rows == depth, "weight's K is x's")
    rule.need(tokens > 0, "no input is empty")
    rule.need(1 <= depth <= 65535 and 1 <= width <= 65535, "K and N lie in [1, 65535]")
    group = rule["antiquant_group_size"] or 0
    if group:
        rule.need(
            group % 32 == 0 and 32 <= group <= depth - 1, "antiquant_group_size is a multiple of 32 in [32, K - 1]"
        )
        shapes: tuple[tuple[int, ...], ...] = ((-(-depth // group), width),)
    else:
        shapes = ((1,), (1, 1), (1, width), (width,))
    rule.need(scale.dtype == x.dtype, "antiquant_scale has x's dtype")
    rule.need(scale.shape in shapes, f"antiquant_scale has one of the shapes {shapes}")
    rule.tensor("antiquant_offset", x.dtype, shapes=(scale.shape,))
    rule.tensor("bias", F32 if x.dtype == BF16 else F16, shapes=((width,), (1, width)))
    rule.need(rule["bias"] is None or rule["bias"].contiguous, "bias is contiguous")
    rule.absent("quant_scale", "quant_offset", "inner_precise", "weight_dtype")


def _grouped_matmul(rule: Rule) -> None:
    x, weight = rule.only("x"), rule.only("weight")
    assert x is not None
    assert weight is not None
    rule.need(len(x.shape) == 2 and x.contiguous, "x is [M, K], not transposed")
    rule.need(len(weight.shape) == 3, "weight is [E, K, N]")
    rule.need(x.shape[-1] < 65536 and weight.shape[-1] < 65536, "the last dimensions are below 65536")
    rule.need(rule["split_item"] in (2, 3), "split_item is 2 or 3 for one output")
    rule.need(rule["group_type"] == 0, "group_type is 0: groups of rows")
    rule.need(rule["group_list_type"] in (None, 0, 1), "group_list_type is 0 or 1")
    experts = weight.shape[0]
    rule.need(experts <= 1024, "at most 1024 groups")
    group_list = rule["group_list"]
    rule.need(group_list is not None and group_list.dtype == I64, "group_list is int64")
    rule.need(group_list is not None and group_list.shape == (experts,), "group_list has one number per group")
    reserved = ("offset", "activation_input", "activation_quant_scale", "activation_quant_offset", "tuning_config")
    types = ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype")
    rule.absent(*reserved, *types, "act_type")
    form = _GROUPED_FORMS.get((x.dtype, weight.dtype))
    rule.need(form is not None, f"no such combination: {x.dtype} by {weight.dtype}")
    if form is not None:
        form(rule, x, weight)


def _grouped_float(rule: Rule, x: Tensor, weight: Tensor) -> None:
    rule.need(weight.shape[1] == x.shape[1], "weight's K is x's")
    rule.need(rule["output_dtype"] in (None, x.dtype), "the output has x's dtype")
    rule.absent("scale", "antiquant_scale", "antiquant_offset", "per_token_scale", "bias")


def _grouped_int8(rule: Rule, x: Tensor, weight: Tensor) -> None:
    experts, depth, width = weight.shape
    rule.need(depth == x.shape[1], "weight's K is x's")
    out = rule["output_dtype"] or I8
    rule.absent("antiquant_scale", "antiquant_offset", "bias")
    scale, per_token = rule.only("scale"), rule.only("per_token_scale")
    if out == I32:
        rule.absent("scale", "per_token_scale")
        return
    rule.need(out in HALVES, "the output is int32, float16 or bfloat16")
    rule.need(scale is not None and scale.shape == (experts, width), "scale is [E, N]")
    dtypes = (F32,) if out == F16 else (BF16, F32)
    rule.need(scale is not None and scale.dtype in dtypes, f"scale is {dtypes} for {out}")
    if scale is not None and scale.dtype == F32 and out == BF16:
        rule.need(weight.nz, "a float32 scale and a bfloat16 output need a weight in FRACTAL_NZ")
    _per_token(rule, per_token, x)


def _per_token(rule: Rule, per_token: Tensor | None, x: Tensor) -> None:
    if per_token is not None:
        rule.need(per_token.dtype == F32 and per_token.shape == (x.shape[0],), "per_token_scale is float32 [M]")


def _grouped_weight_only(rule: Rule, x: Tensor, weight: Tensor) -> None:
    packed = weight.dtype == I32
    experts, depth, width = weight.shape
    rule.need(depth == x.shape[1], "weight's K is x's")
    rule.need(not weight.nz and weight.contiguous, "weight is contiguous, in the plain layout")
    width = width * 8 if packed else width
    scale, offset = rule.only("antiquant_scale"), rule.only("antiquant_offset")
    rule.need(scale is not None, "antiquant_scale is given")
    # aclnn_grouped_matmul.cpp refuses a call without it; later versions for int8 only.
    rule.need(offset is not None, "antiquant_offset is given, zeros if need be")
    rule.absent("scale", "per_token_scale", "bias")
    rule.need(rule["output_dtype"] in (None, x.dtype), "the output has x's dtype")
    if scale is None:
        return
    grouped = len(scale.shape) == 3
    rule.need(scale.dtype == x.dtype, "antiquant_scale has x's dtype")
    if grouped:
        rule.need(packed, "int8 takes scales per channel only")
        rule.need(scale.shape[0] == experts and scale.shape[2] == width, "antiquant_scale is [E, G, N]")
        rule.need(depth % scale.shape[1] == 0, "the number of groups divides K")
    else:
        rule.need(scale.shape == (experts, width), "antiquant_scale is [E, N]")
    if offset is not None:
        rule.need(
            (offset.dtype, offset.shape) == (scale.dtype, scale.shape), "antiquant_offset is like antiquant_scale"
        )
        rule.beyond(grouped, "offsets per group")


def _grouped_int8_int4(rule: Rule, x: Tensor, weight: Tensor) -> None:
    experts, depth, width = weight.shape[0], weight.shape[1], weight.shape[2] * 8
    rule.need(depth == x.shape[1], "weight's K is x's")
    rule.need(weight.contiguous, "weight is contiguous")
    rule.need(rule["group_list_type"] == 1, "group_list_type is 1: the operator takes nothing else, and does not check")
    rule.need(depth % 256 == 0 and depth <= 18432, "256 divides K, which is at most 18432")
    scale, bias, per_token = rule.only("scale"), rule.only("bias"), rule.only("per_token_scale")
    rule.need(bias is not None and bias.dtype == F32 and bias.shape == (experts, width), "bias is float32 [E, N]")
    rule.need(scale is not None and scale.dtype == I64, "scale is int64")
    if scale is not None:
        per_256, per_channel = (experts, depth // 256, width), (experts, 1, width)
        rule.need(scale.shape in (per_256, per_channel), "scale is [E, K / 256, N]")
        rule.beyond(scale.shape == per_channel != per_256, "int8 x int4, one scale per channel")
    rule.need(per_token is not None, "per_token_scale is given")
    _per_token(rule, per_token, x)
    rule.need(rule["output_dtype"] in HALVES, "the output is float16 or bfloat16")
    rule.absent("antiquant_scale", "antiquant_offset")


def _grouped_int4(rule: Rule, x: Tensor, weight: Tensor) -> None:
    experts, depth, width = weight.shape[0], weight.shape[1], weight.shape[2] * 8
    rule.need(depth == x.shape[1] * 8, "weight's K is x's")
    rule.need(weight.contiguous, "weight is contiguous")
    scale = rule.only("scale")
    rule.need(scale is not None and scale.dtype == I64, "scale is int64")
    if scale is not None and len(scale.shape) == 3:
        groups = scale.shape[1]
        rule.need(scale.shape == (experts, groups, width), "scale is [E, G, N]")
        rule.need(
            depth % groups == 0 and depth // groups % 2 == 0, "groups have an even number of inputs, all the same"
        )
    elif scale is not None:
        rule.need(scale.shape == (experts, width), "scale is [E, N]")
    _per_token(rule, rule.only("per_token_scale"), x)
    rule.need(rule["output_dtype"] in HALVES, "the output is float16 or bfloat16")
    rule.absent("antiquant_scale", "antiquant_offset", "bias")


_GROUPED_FORMS: dict[tuple[torch.dtype, torch.dtype], Callable[[Rule, Tensor, Tensor], None]] = {
    **{(dtype, dtype): _grouped_float for dtype in (*HALVES, F32)},
    **{(dtype, weight): _grouped_weight_only for dtype in HALVES for weight in (I8, I32)},
    (I8, I8): _grouped_int8,
    (I8, I32): _grouped_int8_int4,
    (I32, I32): _grouped_int4,
}


def _init_routing(rule: Rule) -> None:
    x, experts = rule["x"], rule["expert_idx"]
    rule.need(x.dtype in (*HALVES, F32) and len(x.shape) == 2, "x is float16, bfloat16 or float32 [T, H]")
    rule.need(x.contiguous and experts.contiguous, "x and expert_idx are contiguous")
    rule.need(experts.dtype == I32 and len(experts.shape) == 2, "expert_idx is int32 [T, K]")
    rule.need(experts.shape[0] == x.shape[0], "one row of expert_idx for each token")
    rule.need(0 not in x.shape and 0 not in experts.shape, "there are tokens")
    count = rule["expert_num"] or 0
    rule.need(0 < count <= 10240, "expert_num lies in [1, 10240]")
    first, last = rule["active_expert_range"] or [0, count]
    rule.need(0 <= first < last <= count, "active_expert_range lies in [0, expert_num]")
    rule.need((rule["active_num"] or 0) >= 0, "active_num is not negative")
    rule.need(rule["quant_mode"] in (None, 1), "quant_mode is -1 or 1")
    rule.need(rule["expert_tokens_num_type"] in (None, 0, 1), "expert_tokens_num_type is 0 or 1")
    rule.need(rule["expert_tokens_num_flag"] is True, "the counts are asked for")
    rule.absent("scale", "offset", "drop_pad_mode", "expert_capacity", "x_dtype")


def _swiglu(rule: Rule) -> None:
    x = rule["input"]
    rule.need(x.dtype in (*HALVES, F32), "input is float16, bfloat16 or float32")
    rule.need(x.shape[-1] % 2 == 0, "the last dimension is even")
    rule.absent("dim")


def _dequant_swiglu_quant(rule: Rule) -> None:
    x = rule["x"]
    rule.need(x.dtype in (I32, *HALVES) and len(x.shape) == 2, "x is int32, float16 or bfloat16 [M, 2H]")
    rule.need(x.shape[1] % 2 == 0, "the last dimension is even")
    half = x.shape[1] // 2
    rule.need(rule["quant_mode"] == 1, "quant_mode 1: dynamic")
    rule.need(rule["activate_left"] is True, "activate_left: the gate is the left half")
    groups = 1
    if rule["group_index"] is not None:
        index = rule.tensor("group_index", I64)
        assert index is not None
        rule.need(len(index.shape) == 1, "group_index is 1-D")
        groups = index.shape[0]
        rule.need(half <= 10496 and half % 64 == 0, "with group_index, H is at most 10496 and 64 divides it")
    if x.dtype == I32:
        rule.need(rule["weight_scale"] is not None and rule["activation_scale"] is not None, "int32 takes both scales")
        rule.tensor("weight_scale", F32, shapes=((groups, 2 * half),))
        scale = rule.tensor("activation_scale", F32, shapes=((x.shape[0], 1), (x.shape[0],)))
        rule.beyond(scale is not None and len(scale.shape) == 1, "activation_scale without a last dimension of 1")
    else:
        rule.absent("weight_scale", "activation_scale")
    others = ("bias", "quant_scale", "quant_offset", "dst_type", "round_mode", "activate_dim", "swiglu_mode")
    rule.absent(*others)


def _token_unpermute(rule: Rule) -> None:
    rows, index, probs = rule["permuted_tokens"], rule["sorted_indices"], rule["probs"]
    rule.need(rows.dtype in (*HALVES, F32) and len(rows.shape) == 2, "permuted_tokens is a float [T * K, H]")
    rule.need(index.dtype == I32 and len(index.shape) == 1, "sorted_indices is int32 [T * K]")
    rule.need(index.shape[0] == rows.shape[0], "one index for each row")
    if probs is not None:
        rule.need(probs.dtype in (*HALVES, F32) and len(probs.shape) == 2, "probs is a float [T, K]")
        rule.need(probs.shape[0] * probs.shape[1] == index.shape[0], "one of probs for each index")
        rule.need(probs.shape[1] <= 512, "K is at most 512")
    rule.absent("padded_mode", "restore_shape")


RULES: dict[str, Callable[[Rule], None]] = {
    "npu_format_cast": _format_cast,
    "npu_trans_quant_param": _trans_quant_param,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_dynamic_quant_asymmetric": _dynamic_quant,
    "npu_quantize": _quantize,
    "npu_kronecker_quant": _kronecker_quant,
    "npu_quant_matmul": _quant_matmul,
    "npu_weight_quant_batchmatmul": _weight_quant_batchmatmul,
    "npu_grouped_matmul": _grouped_matmul,
    "npu_moe_init_routing_v2": _init_routing,
    "npu_swiglu": _swiglu,
    "npu_dequant_swiglu_quant": _dequant_swiglu_quant,
    "npu_moe_token_unpermute": _token_unpermute,
}
