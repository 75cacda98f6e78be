# SPDX-License-Identifier: Apache-2.0
"""The rules of npu_grouped_matmul.

Sources: op-plugin torch_npu-npu_grouped_matmul.md; ops-transformer gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from enum import Enum

import torch

from vllm_npu_quant.emulation.checks import Arguments, dtype_name
from vllm_npu_quant.emulation.numerics import DTYPE_OF_CODE, FLOATS, HALVES, INT4_PER_INT32
from vllm_npu_quant.emulation.rules.format_cast import FRACTAL_NZ, storage_format

__all__ = ["Form", "GroupedMatmul", "Tensors"]

INNER_LIMIT = 65536
W4A8_GROUP_SIZE = 256
Tensors = Sequence[torch.Tensor]


class Form(Enum):
    """Operand types of a product."""

    FLOAT = "unquantized"
    INT8 = "int8 x int8"
    WEIGHT_ONLY = "float x int8 or int4"
    INT8_INT4 = "int8 x int4"
    INT4 = "int4 x int4"


_FORMS = {
    (torch.int8, torch.int8): Form.INT8,
    (torch.int8, torch.int32): Form.INT8_INT4,
    (torch.int32, torch.int32): Form.INT4,
    **{(dtype, dtype): Form.FLOAT for dtype in FLOATS},
    **{(dtype, weight): Form.WEIGHT_ONLY for dtype in HALVES for weight in (torch.int8, torch.int32)},
}


def _width(weight: torch.Tensor) -> int:
    """N of a weight; int4 is packed along N in contiguous memory, else along K."""
    packed = weight.dtype == torch.int32 and weight.is_contiguous()
    return weight.shape[-1] * (INT4_PER_INT32 if packed else 1)


@dataclass(eq=False)
class GroupedMatmul(Arguments):
    """The arguments of npu_grouped_matmul. An empty list is an absent one.

    Attributes:
        x: one tensor [M, K], or one per expert; int4 is packed in int32 [M, K/8].
        weight: one 3-D tensor [E, K, N] or a list of [K, N]; transposed views are taken. int4 is packed in int32:
            contiguous [.., K, N/8], or (weight-only) [.., N, K/8] transposed. int8 x int4 and int4 x int4 take one
            contiguous 3-D tensor only.
        bias: float x: float16 (float16 x) or float32; int8 x int8: int32, or bfloat16 with a FRACTAL_NZ weight and
            a bfloat16 output; int8 x int4: float32 [E, N], required. [[E, N]], or a list of [N].
        scale: int8 output: int64; float16 output: float32; bfloat16 output: bfloat16 (float32 with a FRACTAL_NZ
            weight); int32 output: None. [[E, N]], or a list of [N]. int8 x int4: int64 [[E, 1, N]] or [[E, K/256, N]],
            int4 x int4: int64 [[E, N]] or [[E, G, N]], both holding float32 bits.
        antiquant_scale, antiquant_offset: the dtype of x; [[E, N]] or, int4 only, [[E, G, N]] if G divides K; for a
            list of weights [N] or [G, N] each. (aclnnGroupedMatmulV5.md allows offsets only per channel; op-plugin's
            document has no such rule and frameworks pass them per group, so they are taken.)
        per_token_scale: [float32 [M]]; int8 x int4 also [M, 1].
        group_list: int64 [E] (group_list_type 0: running totals, 1: counts), [E, 2] (2: pairs of expert and count, int8
            x int8 only). The groups may cover fewer rows than x has: the rest of the output is garbage.
        split_item: 0, 1: one output per group (group_type -1); 2, 3: one output.
        group_type: 0, or -1: x[i] @ weight[i]. Must be given: the default None is refused.
        act_type: with per_token_scale: 0 none, 1 relu, 2 gelu (tanh), 4 fast gelu, 5 silu.
        output_dtype: None means the dtype of x.
    """

    operator = "npu_grouped_matmul"

    x: Tensors
    weight: Tensors
    _: KW_ONLY
    bias: Tensors | None = None
    scale: Tensors | None = None
    offset: Tensors | None = None
    antiquant_scale: Tensors | None = None
    antiquant_offset: Tensors | None = None
    per_token_scale: Tensors | None = None
    group_list: torch.Tensor | None = None
    activation_input: Tensors | None = None
    activation_quant_scale: Tensors | None = None
    activation_quant_offset: Tensors | None = None
    split_item: int | None = 0
    group_type: int | None = None
    group_list_type: int | None = 0
    act_type: int | None = 0
    tuning_config: list[int] | None = None
    output_dtype: int | None = None
    x_dtype: int | None = None
    weight_dtype: int | None = None
    scale_dtype: int | None = None
    per_token_scale_dtype: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether weight is one 3-D tensor."""
        return len(self.weight) == 1 and self.weight[0].dim() == 3

    @property
    def experts(self) -> int:
        return self.weight[0].shape[0] if self.stacked else len(self.weight)

    @property
    def form(self) -> Form:
        form = _FORMS.get((self.x[0].dtype, self.weight[0].dtype))
        if form is None:
            self.refuse("weight", f"a dtype that goes with {dtype_name(self.x[0].dtype)} x", self.weight[0])
        return form

    @property
    def packed_along_n(self) -> bool | None:
        """Whether an int4 weight is packed along N; None if it is not int4."""
        return self.weight[0].is_contiguous() if self.weight[0].dtype == torch.int32 else None

    @property
    def depth(self) -> int:
        """K."""
        return self._depth(0)

    def _depth(self, expert: int) -> int:
        x = self.x[expert if len(self.x) > 1 else 0]
        return x.shape[-1] * (INT4_PER_INT32 if self.form is Form.INT4 else 1)

    @property
    def width(self) -> int:
        """N."""
        return _width(self.weight[0])

    @property
    def _asked_dtype(self) -> torch.dtype | None:
        if self.output_dtype is None:
            return None
        dtype = DTYPE_OF_CODE.get(self.output_dtype)
        if dtype not in (torch.int8, torch.int32, *FLOATS):
            expected = "None, int8, int32, float16, bfloat16 or float32"
            self.refuse("output_dtype", expected, dtype or self.output_dtype)
        return dtype

    @property
    def out_dtype(self) -> torch.dtype:
        return self._asked_dtype or self.x[0].dtype

    @property
    def needs_nz(self) -> bool:
        """Whether only kernels for FRACTAL_NZ weights take these dtypes."""
        if self.form is not Form.INT8 or self.out_dtype is not torch.bfloat16:
            return False
        scale, bias = self.scale, self.bias
        wide_scale = scale and scale[0].dtype == torch.float32
        return bool(wide_scale or (bias and bias[0].dtype == torch.bfloat16))

    def require_nz(self) -> None:
        """Refuse a weight whose storage is not FRACTAL_NZ. Not a part of ``check``: fake tensors have no format."""
        nz = all(storage_format(tensor) == FRACTAL_NZ for tensor in self.weight)
        self.require(nz, "weight", "FRACTAL_NZ (npu_format_cast(w, 29)): no other kernel takes these dtypes")

    def check(self) -> None:
        # The document prints a default of -1; the registered default is None, which the operator refuses.
        self.require(self.group_type in (-1, 0), "group_type", "0 (rows) or -1 (no groups); 2 is not emulated")
        self.require_value("group_list_type", 0, 1, 2, None)
        if self.group_type == 0:
            self.require_value("split_item", 2, 3)
        _ = self._asked_dtype
        types = ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype")
        self.require_absent("only Ascend 950 has it", *types)
        activation = ("activation_input", "activation_quant_scale", "activation_quant_offset")
        self.require_absent("reserved", "offset", *activation)
        self._check_counts()
        self._check_matrices()
        self._check_group_list()
        _CHECKS[self.form](self)
        if self.form in (Form.INT8, Form.INT8_INT4, Form.INT4):
            self.require(self.group_type == 0, "group_type", f"0 for {self.form.value}")
            self.require(len(self.x) == 1, "x", f"one tensor for {self.form.value}", len(self.x))

    def _check_counts(self) -> None:
        x, weight = self.x, self.weight
        self.require(1 <= len(x) <= 128, "x", "1 to 128 tensors", len(x))
        self.require(1 <= len(weight) <= 128, "weight", "1 to 128 tensors", len(weight))
        self.require_value("split_item", 0, 1, 2, 3)
        if self.group_type == -1:
            self.require(len(x) == len(weight), "x", f"as many tensors as weight, {len(weight)}", len(x))
            self.require(not self.stacked, "weight", "2-D tensors for group_type -1")
            self.require_absent("group_type is -1", "group_list")
            self.require_value("split_item", 0, 1)
        else:
            self.require(len(x) in (1, self.experts), "x", f"1 or {self.experts} tensors", len(x))

    def _check_matrices(self) -> None:
        self.require_dtype("x", self.x[0].dtype)
        self.require_dim("x", 2, 6 if self.group_type == -1 else 2)
        self.require_contiguous("x")
        for tensor in self.x:
            self.require(tensor.shape[-1] < INNER_LIMIT, "x", f"fewer than {INNER_LIMIT} columns", tensor)
        self.require_dtype("weight", self.weight[0].dtype)
        self.require_dim("weight", 3 if self.stacked else 2)
        self.require_plain_or_transposed("weight", "contiguous memory, or the last two dims swapped")
        for tensor in self.weight:
            inner = tensor.shape[-1] if tensor.is_contiguous() else tensor.shape[-2]
            expected = f"fewer than {INNER_LIMIT} in the innermost dimension"
            self.require(inner < INNER_LIMIT, "weight", expected, tensor)
        along_k = INT4_PER_INT32 if self.packed_along_n is False else 1
        for expert, tensor in enumerate(self.weight):
            depth, width = self._depth(expert), _width(tensor)
            self.require(tensor.shape[-2] * along_k == depth, "weight", f"{depth} rows, the depth of x", tensor)
            if self.group_type != -1:
                equal = (depth, width) == (self.depth, self.width)
                self.require(equal, "weight", "equal sizes in all tensors", tensor)

    def _check_group_list(self) -> None:
        if self.group_list is None:
            if len(self.x) == 1 and self.group_type != -1:
                self.refuse("group_list", "a tensor, since x is one tensor")
            return
        pairs = self.group_list_type == 2
        self.require_dtype("group_list", torch.int64)
        self.require_shape("group_list", (self.experts, 2) if pairs else (self.experts,))
        most = 1024 if self.stacked else 128
        self.require(self.experts <= most, "group_list", "at most 1024 groups (128 of a list)", self.experts)
        self.require(not pairs or self.form is Form.INT8, "group_list_type", "0 or 1 unless int8 x int8")

    def _per_expert(self, *shape: int) -> tuple[int, ...]:
        """The shape of a parameter: with a leading E for a 3-D weight, else one tensor per expert."""
        return (self.experts, *shape) if self.stacked else shape

    def _check_list(self, argument: str, dtypes: Sequence[torch.dtype], count: int, *shapes: tuple[int, ...]) -> None:
        """A list, if it is given, has ``count`` tensors of one of the dtypes and of one of the shapes."""
        tensors = self._tensors(argument)
        if tensors:
            self.require(len(tensors) == count, argument, f"{count} tensors", len(tensors))
            self.require_dtype(argument, *dtypes)
            self.require_shape(argument, *shapes)

    def _check_float(self) -> None:
        parameters = ("scale", "antiquant_scale", "antiquant_offset", "per_token_scale")
        self.require_absent("x and weight are not quantized", *parameters)
        self._check_float_output()

    def _check_float_output(self) -> None:
        """Output, activation and bias of a float x."""
        dtype = self.x[0].dtype
        self.require(not self.act_type, "act_type", "0")
        self.require(self.out_dtype == dtype, "output_dtype", f"None or {dtype_name(dtype)}", self.out_dtype)
        if self.bias:
            count = len(self.weight)
            self.require(len(self.bias) == count, "bias", f"{count} tensors", len(self.bias))
            self.require_dtype("bias", torch.float16 if dtype == torch.float16 else torch.float32)
            for tensor, matrix in zip(self.bias, self.weight, strict=True):
                self.require_shape_of("bias", tensor, self._per_expert(_width(matrix)))

    def _check_int8(self) -> None:
        """The A8W8 table of aclnnGroupedMatmulV5.md."""
        self.require_absent("int8 x int8", "antiquant_scale", "antiquant_offset")
        out, shape, count = self.out_dtype, self._per_expert(self.width), len(self.weight)
        output = f"(for a {dtype_name(out)} output)"
        bias_dtypes: tuple[torch.dtype, ...] = (torch.int32,)
        if out is torch.int32:
            self.require_absent("the output is int32", "scale", "per_token_scale")
        else:
            scales = {
                torch.int8: (torch.int64,),
                torch.float16: (torch.float32,),
                torch.bfloat16: (torch.bfloat16, torch.float32),
            }
            if out not in scales:
                self.refuse("output_dtype", "int8, int32, float16 or bfloat16", out)
            scale = self.given("scale", f"a list, for a {dtype_name(out)} output")
            self._check_list(f"scale {output}", scales[out], count, shape)
            if out is torch.bfloat16:
                wide_scale = scale[0].dtype == torch.float32
                bias_dtypes = (torch.bfloat16,) if wide_scale else (torch.int32, torch.bfloat16)
        if out is torch.int8:
            self.require_absent("the output is int8", "per_token_scale")
        self._check_list("per_token_scale", (torch.float32,), 1, (self.x[0].shape[0],))
        self._check_list(f"bias {output}", bias_dtypes, count, shape)
        allowed = (0, 1, 2, 4, 5) if self.per_token_scale else (0,)
        self.require((self.act_type or 0) in allowed, "act_type", " or ".join(map(str, allowed)))

    def _check_weight_only(self) -> None:
        self.require_absent("x is not quantized", "scale", "per_token_scale")
        self._check_float_output()
        dtype, count = self.x[0].dtype, len(self.weight)
        scales = self.given("antiquant_scale", "a list, for a quantized weight")
        self.require(len(scales) == count, "antiquant_scale", f"{count} tensors", len(scales))
        self.require_dtype("antiquant_scale", dtype)
        lengths = [
            self._group_length(expert, scale, matrix)
            for expert, (scale, matrix) in enumerate(zip(scales, self.weight, strict=True))
        ]
        grouped = [length for length in lengths if length is not None]  # they may be symbols, which have no hash
        equal = all(length == grouped[0] for length in grouped)
        self.require(equal, "antiquant_scale", "groups of one length in all tensors", grouped)
        # "antiquantOffset must not be nullptr in antiquant"; newer versions of CANN let int4 go without.
        offsets = self.given("antiquant_offset", "a list, of zeros where the weight is symmetric")
        self.require(len(offsets) == count, "antiquant_offset", f"{count} tensors", len(offsets))
        self.require_dtype("antiquant_offset", dtype)
        for offset, scale in zip(offsets, scales, strict=True):
            self.require_shape_of("antiquant_offset", offset, scale.shape)

    def _group_length(self, expert: int, scale: torch.Tensor, weight: torch.Tensor) -> int | None:
        """Inputs per scale of an int4 weight; None for a scale per channel."""
        channel = self._per_expert(_width(weight))
        if weight.dtype == torch.int8 or scale.dim() == len(channel):
            # Only int4 weights have scales per group.
            self.require_shape_of("antiquant_scale", scale, channel)
            return None
        depth, groups = self._depth(expert), scale.shape[-2] if scale.dim() >= 2 else 0
        self.require_shape_of("antiquant_scale", scale, channel, self._per_expert(groups, _width(weight)))
        self.require(depth % groups == 0, "antiquant_scale", f"a number of groups that divides {depth}", scale)
        return depth // groups

    def _check_packed_operands(self) -> None:
        """The common rules of int8 x int4 and int4 x int4."""
        self.require_absent("x is quantized", "antiquant_scale", "antiquant_offset")
        self.require(len(self.x) == 1, "x", "one tensor", len(self.x))
        self.require(self.stacked, "weight", "one 3-D tensor")
        self.require_contiguous("weight", "contiguous [E, K, N/8]")
        self.require(not self.act_type, "act_type", "0")
        self.require(self._asked_dtype in HALVES, "output_dtype", "float16 or bfloat16", self._asked_dtype)

    def _check_int8_int4(self) -> None:
        self._check_packed_operands()
        depth, rows = self.depth, self.x[0].shape[0]
        # The kernel ignores group_list_type and reads counts.
        self.require(self.group_list_type == 1, "group_list_type", "1", self.group_list_type or 0)
        self.require(depth <= 18432, "x", "a depth of at most 18432", self.x[0])
        for argument in ("scale", "bias", "per_token_scale"):
            self.given(argument, "a list, for int8 x int4")
        self.require(depth % W4A8_GROUP_SIZE == 0, "x", f"K that {W4A8_GROUP_SIZE} divides", self.x[0])
        shapes = [(self.experts, groups, self.width) for groups in (1, depth // W4A8_GROUP_SIZE)]
        self._check_list("scale", (torch.int64,), 1, *shapes)
        self._check_list("bias", (torch.float32,), 1, (self.experts, self.width))
        self._check_list("per_token_scale", (torch.float32,), 1, (rows,), (rows, 1))

    def _check_int4(self) -> None:
        self._check_packed_operands()
        self.require_absent("int4 x int4", "bias")
        scale = self.given("scale", "a list, for int4 x int4")[0]
        groups = scale.shape[1] if scale.dim() == 3 else 1
        shapes = (self.experts, self.width), (self.experts, groups, self.width)
        self._check_list("scale", (torch.int64,), 1, *shapes)
        even = self.depth % groups == 0 and (self.depth // groups) % 2 == 0
        self.require(even, "scale", f"groups of an even length that divides {self.depth}", scale)
        self._check_list("per_token_scale", (torch.float32,), 1, (self.x[0].shape[0],))

    def empty(self) -> list[torch.Tensor]:
        x = self.x
        if self.group_type == 0:
            rows = sum(tensor.shape[0] for tensor in x)
            return [x[0].new_empty((rows, self.width), dtype=self.out_dtype)]
        pairs = zip(x, self.weight, strict=True)
        factor = INT4_PER_INT32 if self.packed_along_n else 1
        return [
            rows.new_empty((*rows.shape[:-1], weight.shape[-1] * factor), dtype=self.out_dtype)
            for rows, weight in pairs
        ]


_CHECKS = {
    Form.FLOAT: GroupedMatmul._check_float,
    Form.INT8: GroupedMatmul._check_int8,
    Form.WEIGHT_ONLY: GroupedMatmul._check_weight_only,
    Form.INT8_INT4: GroupedMatmul._check_int8_int4,
    Form.INT4: GroupedMatmul._check_int4,
}
