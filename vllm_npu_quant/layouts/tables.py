# SPDX-License-Identifier: Apache-2.0
"""Declarative tables of the tensors that each checkpoint layout stores for one layer.

They are used by the header check, by the vLLM layers (parameters and their sharding) and by the conversions to canonical
numbers. This module does not import torch.

Shapes are written with the layer's sizes: N outputs, K inputs, G = ceil(K / group_size) groups, S shards of a fused layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from math import gcd
from typing import Any

from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, TransformSpec, WeightSpec

__all__ = [
    "E2M1",
    "LAYOUTS",
    "Axis",
    "Dim",
    "LayerSizes",
    "LayoutRow",
    "Role",
    "TensorSpec",
    "group_size_of",
    "register_layout",
    "rows_per_scale_of",
    "stored_weight",
    "tensors_of",
]


class Axis(str, Enum):
    """The quantity that one dimension of a stored tensor indexes."""

    OUT = "N"
    IN = "K"
    GROUP = "G"
    #: Groups of the whole layer, held by every rank: with activation order its inputs may belong to any of them.
    ALL_GROUPS = "all G"
    #: One number per shard of a fused layer: stored as [1] or as a scalar in each checkpoint layer.
    SHARD = "S"
    #: Rows of a scale: N if per row, ceil(N / block rows) if per block, 1 if per tensor.
    ROWS = "R"
    #: Sides of the matrix [L, M] as which an input transform views a token.
    LEFT = "L"
    RIGHT = "M"
    #: Any length: for tensors that are not loaded.
    ANY = "*"
    FIXED = ""


class Role(str, Enum):
    """Role of a stored tensor in its layer."""

    #: A factor of the weight or of the input: finite and nonzero.
    SCALE = "scale"
    #: Zero points or offsets, one per scale: 0 in a symmetric scheme.
    ZERO = "zero"
    OTHER = "other"


#: Length of a dimension that may have any length.
ANY_LENGTH = -1
_NO_TRANSFORM = TransformSpec()


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer, or of one rank's part of it.

    Attributes:
        outputs: N.
        inputs: K.
        group_size: inputs per group; 0 for one scale per channel.
        shards: shards of the fused layer.
        rows_per_scale: output rows that share a scale.
        all_inputs: K of the whole layer; 0 if it equals ``inputs``.
        transform: sizes of the matrices of an input transform.
    """

    outputs: int
    inputs: int
    group_size: int = 0
    shards: int = 1
    rows_per_scale: int = 1
    all_inputs: int = 0
    transform: TransformSpec = _NO_TRANSFORM

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.group_size) if self.group_size > 0 else 1

    @property
    def all_groups(self) -> int:
        return -(-(self.all_inputs or self.inputs) // self.group_size) if self.group_size > 0 else 1


#: Number of elements along each axis of a layer.
_LENGTHS: dict[Axis, Callable[[LayerSizes], int]] = {
    Axis.OUT: lambda sizes: sizes.outputs,
    Axis.IN: lambda sizes: sizes.inputs,
    Axis.GROUP: lambda sizes: sizes.groups,
    Axis.ALL_GROUPS: lambda sizes: sizes.all_groups,
    Axis.SHARD: lambda sizes: sizes.shards,
    Axis.ROWS: lambda sizes: -(-sizes.outputs // sizes.rows_per_scale),
    Axis.LEFT: lambda sizes: sizes.transform.left,
    Axis.RIGHT: lambda sizes: sizes.transform.right,
}


@dataclass(frozen=True)
class Dim:
    """One dimension of a stored tensor.

    Attributes:
        axis: the quantity it indexes.
        pack: elements of that axis per stored element; PER_WORD for 32 // bits, DENSE for a dense bit stream.
        size: the size of a FIXED dimension.
        words: stored elements that together hold ``pack`` elements of the axis: 3 words for 32 integers of 3 bits.
        places: the place in a word, from the lowest bits, of each of the ``pack`` elements; empty if it is not needed.
            Along OUT it is needed for model classes that reorder rows.
    """

    axis: Axis
    pack: int = 1
    size: int = 1
    words: int = 1
    places: tuple[int, ...] = ()

    def length(self, sizes: LayerSizes) -> int:
        """Length of the dimension for a layer of these sizes."""
        if self.axis is Axis.ANY:
            return ANY_LENGTH
        whole = self.size if self.axis is Axis.FIXED else _LENGTHS[self.axis](sizes)
        return -(-whole * self.words // self.pack)

    def elements(self, length: int) -> int:
        """Number of elements of the axis in a stored dimension of this length."""
        return length * self.pack // self.words

    def __str__(self) -> str:
        if self.axis is Axis.FIXED:
            return str(self.size)
        times = f"*{self.words}" if self.words > 1 else ""
        return self.axis.value if self.pack == 1 else f"{self.axis.value}{times}/{self.pack}"


OUT, IN, GROUP, SHARD, ONE = (Dim(axis) for axis in (Axis.OUT, Axis.IN, Axis.GROUP, Axis.SHARD, Axis.FIXED))
ROWS = Dim(Axis.ROWS)
LEFT, RIGHT, ANY = (Dim(axis) for axis in (Axis.LEFT, Axis.RIGHT, Axis.ANY))
#: Two rows in a byte, the even one in the low bits.
PAIRS = Dim(Axis.OUT, 2, places=(0, 1))

#: ``Dim.pack`` of 32 // bits integers per int32; ``tensors_of`` replaces it by the number.
PER_WORD = 0
#: ``Dim.pack`` of a dense bit stream in int32; integers span two words if 32 is not a multiple of their bits.
DENSE = -1


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layout.

    Attributes:
        name: the last component of its name in the checkpoint ("weight_scale").
        dtypes: allowed safetensors dtypes.
        dims: the stored shape.
        load_dtype: torch dtype name of the parameter that receives it. Scales load into float32, which represents every
            stored float dtype exactly.
        optional: whether it is registered only for layers whose config lists it or whose files hold it.
        loaded_dims: shape of the parameter that receives it, if ``rearrange`` changes the shape.
        rearrange: a function, or "module:function", applied to the stored tensor of one checkpoint layer before vLLM splits
            it into shards and ranks; it does not change values. ``function(stored, spec, outputs)`` returns a tensor of
            shape ``loaded_dims``, whose output dimension may exceed the checkpoint layer's but not ``outputs``: N of
            vLLM's layer, which may hold several checkpoint layers.
        loaded: False for a tensor that is checked and then dropped because it follows from the others.
        role: the role of its values, for ``check --values`` and for placeholders.
        of: the stored tensor of the same layer from which ``rearrange`` computes it; empty for a tensor that is stored.
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]
    load_dtype: str
    optional: bool = False
    loaded_dims: tuple[Dim, ...] = ()
    rearrange: str | Callable[..., Any] = ""
    loaded: bool = True
    role: Role = Role.OTHER
    of: str = ""

    def as_loaded(self) -> TensorSpec:
        """The spec with the shape of the parameter."""
        return self._loaded_form

    @cached_property
    def _loaded_form(self) -> TensorSpec:
        return replace(self, dims=self.loaded_dims, loaded_dims=()) if self.loaded_dims else self

    def shape(self, sizes: LayerSizes) -> tuple[int, ...]:
        return tuple(dim.length(sizes) for dim in self.dims)

    def shape_text(self) -> str:
        return "[" + ", ".join(str(dim) for dim in self.dims) + "]"

    def axis_of(self, axis: Axis) -> int | None:
        """Index of the dimension along ``axis``, or None."""
        return next((i for i, dim in enumerate(self.dims) if dim.axis is axis), None)


@dataclass(frozen=True)
class LayoutRow:
    """A layout's tensors and the function that turns them into canonical numbers.

    Attributes:
        tensors: the stored tensors, the weight first.
        to_canonical: the function ``(tensors, spec) -> CanonicalLinear``, or "module:function", which is resolved later so
            that torch is not imported here.
    """

    tensors: tuple[TensorSpec, ...]
    to_canonical: str | Callable[..., Any]

    @property
    def act_order(self) -> bool:
        """Whether the layout has activation order, so that every rank needs the scales of all groups."""
        return any(dim.axis is Axis.ALL_GROUPS for tensor in self.tensors for dim in tensor.dims)


_FLOATS = ("F32", "BF16", "F16")

#: Values of the codes 0 to 7 of E2M1 (OCP Microscaling Formats 1.0); 8 to 15 are minus these.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: The bias of a Linear layer. Layouts list it because asymmetric smoothing adds a bias to layers whose model class has
#: none; ``engine`` assigns it to vLLM's ``layer.bias``.
BIAS = TensorSpec("bias", _FLOATS, (OUT,), "float32", optional=True)


def _scale(name: str, *, optional: bool = False, dims: tuple[Dim, ...] = (OUT, GROUP)) -> TensorSpec:
    return TensorSpec(name, _FLOATS, dims, "float32", optional, role=Role.SCALE)


def _offset(name: str, *, optional: bool = False, dims: tuple[Dim, ...] = (OUT, GROUP)) -> TensorSpec:
    return TensorSpec(name, _FLOATS, dims, "float32", optional, role=Role.ZERO)


_MODELSLIM = "vllm_npu_quant.layouts.modelslim:"


def _matrix(name: str, side: Dim) -> TensorSpec:
    """A square matrix of an input transform, one per shard of a fused layer."""
    one_per_shard = _MODELSLIM + "one_per_shard"
    return TensorSpec(name, _FLOATS, (side, side), "float32", True, (SHARD, side, side), one_per_shard)


#: FlatQuant's matrices and clip ratio; QuaRot's online rotations of the inputs of o_proj (over heads) and down_proj.
_TRANSFORM = (
    _matrix("left_trans", LEFT),
    _matrix("right_trans", RIGHT),
    TensorSpec("clip_ratio", _FLOATS, (SHARD,), "float32", optional=True),
    _matrix("heads_rotation", LEFT),
    _matrix("kronecker_rotation_m", LEFT),
    _matrix("kronecker_rotation_n", RIGHT),
)


def _modelslim(weight: tuple[Dim, ...], *, two_level: bool = False) -> LayoutRow:
    """An integer weight with scales and offsets; with two levels, channel scales are multiplied by group scales."""
    scales: tuple[TensorSpec, ...]
    if two_level:
        scales = (
            _scale("weight_scale", dims=(OUT, ONE)),
            _offset("weight_offset", dims=(OUT, ONE)),
            _scale("weight_scale_second"),
            TensorSpec("weight_offset_second", ("I64", *_FLOATS), (OUT, GROUP), "int64", role=Role.ZERO),
        )
        function = "two_level_to_canonical"
    else:
        scales = (_scale("weight_scale"), _offset("weight_offset"))
        function = "int_to_canonical"
    # 8 * sum_k(w), in row-parallel layers for each of 16 parts of the inputs. It follows from the weights for any number
    # of ranks, so it is not loaded.
    scale_bias = TensorSpec("scale_bias", _FLOATS, (OUT, ANY), "float32", optional=True, loaded=False)
    return LayoutRow(
        (TensorSpec("weight", ("I8",), weight, "int8"), *scales, scale_bias, *_TRANSFORM, BIAS), _MODELSLIM + function
    )


_MODELSLIM_STATIC = (
    TensorSpec("weight", ("I8",), (OUT, IN), "int8"),
    _scale("input_scale", dims=(SHARD,)),
    TensorSpec("input_offset", (*_FLOATS, "I8"), (SHARD,), "float32"),
    TensorSpec("quant_bias", ("I32",), (OUT,), "int32"),
    # For float16 models, producers write float32 bits widened to int64.
    TensorSpec("deq_scale", ("F32", "I64"), (OUT,), "float32", role=Role.SCALE),
    _scale("weight_scale", optional=True),
    _offset("weight_offset", optional=True),
    *_TRANSFORM,
    BIAS,
)

_CT = "vllm_npu_quant.layouts.compressed_tensors:"
_FP8 = "vllm_npu_quant.layouts.fp8:"


def _scale_per_row(
    name: str,
    *dtypes: str,
    load_dtype: str = "float32",
    optional: bool = False,
    groups: Dim = GROUP,
    dims: tuple[Dim, ...] = (),
    role: Role = Role.SCALE,
) -> TensorSpec:
    """A scale or zero point per row, block or tensor, repeated at load so that every row has its own. The parameter is then
    sharded along rows like the weight, for any block size."""
    return TensorSpec(
        name,
        dtypes or _FLOATS,
        dims or (ROWS, groups),
        load_dtype,
        optional,
        (OUT, groups),
        _CT + "one_scale_per_row",
        role=role,
    )


_CT_WEIGHT = (
    TensorSpec("weight", ("I8",), (OUT, IN), "int8"),
    _scale_per_row("weight_scale"),
    _scale_per_row("weight_zero_point", "I8", load_dtype="int8", optional=True, role=Role.ZERO),
    BIAS,
)


def _ct_packed(groups: Axis, *, plain_zero: bool = False, pack: int = PER_WORD) -> LayoutRow:
    """compressed-tensors' packed weights. Zero points are unpacked at load, so that shards need not be whole words."""
    group = Dim(groups)
    zero = TensorSpec(
        "weight_zero_point",
        ("I32",),
        (Dim(Axis.OUT, pack), group),
        "int8",
        True,
        (OUT, group),
        _CT + ("dense_zero_points" if pack == DENSE else "unpacked_zero_points"),
    )
    if plain_zero:
        zero = _scale_per_row("weight_zero_point", "I8", load_dtype="int8", optional=True, groups=group, role=Role.ZERO)
    tensors = (
        TensorSpec("weight_packed", ("I32",), (OUT, Dim(Axis.IN, pack)), "int32"),
        _scale_per_row("weight_scale", groups=group),
        zero,
        # int64 in most checkpoints, int32 in Kimi-K2-Thinking.
        TensorSpec("weight_shape", ("I64", "I32"), (Dim(Axis.FIXED, size=2),), "int64", optional=True),
        BIAS,
    )
    if groups is Axis.GROUP:
        return LayoutRow(tensors, _CT + ("dense_to_canonical" if pack == DENSE else "packed_to_canonical"))
    g_idx = TensorSpec("weight_g_idx", ("I32", "I64"), (IN,), "int32", rearrange=_CT + "group_of_inputs")
    return LayoutRow((*tensors, g_idx), _CT + "act_order_to_canonical")


def _fp8(scale: str, *dims: Dim) -> tuple[TensorSpec, ...]:
    """FP8 weights, held as bytes for chips without the dtype. Static input scales are loaded but not used: activations are
    quantized per token."""
    return (
        TensorSpec("weight", ("F8_E4M3",), (OUT, IN), "uint8", rearrange=_FP8 + "as_bytes"),
        _scale_per_row(scale, *_FLOATS, "F8_E8M0", dims=dims),
        _scale("input_scale", dims=(SHARD,), optional=True),
        _scale("activation_scale", dims=(SHARD,), optional=True),
        _scale_per_row("weight_offset", optional=True, role=Role.ZERO),
        BIAS,
    )


_FP4 = "vllm_npu_quant.layouts.fp4:"


def _e8m0(name: str) -> TensorSpec:
    """Power-of-two scales, as codes."""
    as_codes = _FP8 + "as_bytes"
    return TensorSpec(name, ("U8", "F8_E8M0"), (OUT, GROUP), "uint8", rearrange=as_codes, role=Role.SCALE)


def _mxfp8(scale: str) -> LayoutRow:
    weight = TensorSpec("weight", ("F8_E4M3",), (OUT, IN), "uint8", rearrange=_FP8 + "as_bytes")
    return LayoutRow((weight, _e8m0(scale), BIAS), _FP8 + "to_canonical")


def _fp4(weight: str, *scales: TensorSpec) -> LayoutRow:
    packed = TensorSpec(weight, ("U8",), (OUT, Dim(Axis.IN, 2)), "uint8")
    return LayoutRow((packed, *scales, BIAS), _FP4 + "to_canonical")


def _nvfp4(weight: str, factor: str, input_factor: str) -> LayoutRow:
    """E4M3 scales with a factor for the whole layer. The static factor of the input is loaded but not used: activations are
    quantized per token."""
    return _fp4(
        weight,
        TensorSpec("weight_scale", ("F8_E4M3",), (OUT, GROUP), "float32", role=Role.SCALE),
        TensorSpec(factor, ("F32",), (SHARD,), "float32", False, (OUT, ONE), _FP4 + "one_per_row", role=Role.SCALE),
        _scale(input_factor, dims=(SHARD,), optional=True),
    )


_ROUNDED = "vllm_npu_quant.layouts.rounded:"


def _rounded(packed: bool) -> LayoutRow:
    """Float weights that are rounded while they load: integers, and scales computed from the whole stored rows, so that they
    do not depend on the number of ranks."""
    stored = ("BF16", "F16", "F32", "F64")
    integers = (OUT, Dim(Axis.IN, 2)) if packed else (OUT, IN)
    return LayoutRow(
        (
            TensorSpec(
                "weight",
                stored,
                (OUT, IN),
                "int8",
                loaded_dims=integers,
                rearrange=_ROUNDED + ("packed_integers" if packed else "integers"),
            ),
            TensorSpec(
                "weight_scale",
                stored,
                (OUT, IN),
                "float32",
                loaded_dims=(OUT, GROUP),
                rearrange=_ROUNDED + "scales",
                role=Role.SCALE,
                of="weight",
            ),
            BIAS,
        ),
        _ROUNDED + ("packed_to_canonical" if packed else "to_canonical"),
    )


_AWQ = "vllm_npu_quant.layouts.awq:"
_GPTQ = "vllm_npu_quant.layouts.gptq:"


def _gptq(groups: Axis, v2: bool) -> LayoutRow:
    """GPTQ's tensors. Zero points are unpacked at load, so that shards need not be whole words."""
    group = Dim(groups)
    return LayoutRow(
        (
            TensorSpec("qweight", ("I32",), (Dim(Axis.IN, DENSE), OUT), "int32"),
            TensorSpec(
                "qzeros",
                ("I32",),
                (group, Dim(Axis.OUT, DENSE)),
                "uint8",
                loaded_dims=(group, OUT),
                rearrange=_GPTQ + ("zeros_v2" if v2 else "zeros_v1"),
            ),
            _scale("scales", dims=(group, OUT)),
            # Required for activation order; otherwise redundant: verified, then dropped.
            TensorSpec(
                "g_idx",
                ("I32", "I64"),
                (IN,),
                "int32",
                optional=groups is Axis.GROUP,
                rearrange=_GPTQ + ("checked_g_idx" if groups is Axis.GROUP else "any_g_idx"),
            ),
            BIAS,
        ),
        _GPTQ + ("to_canonical" if groups is Axis.GROUP else "act_order_to_canonical"),
    )


#: All layouts, by ``Layout`` member or by the name that an extension registers.
LAYOUTS: dict[Layout | str, LayoutRow] = {
    Layout.FLOAT: LayoutRow((), ""),
    Layout.MODELSLIM_INT: _modelslim((OUT, IN)),
    Layout.MODELSLIM_PACKED_N: _modelslim((PAIRS, IN)),
    Layout.MODELSLIM_PACKED_K: _modelslim((OUT, Dim(Axis.IN, 2))),
    Layout.MODELSLIM_TWO_LEVEL: _modelslim((OUT, IN), two_level=True),
    Layout.MODELSLIM_TWO_LEVEL_PACKED: _modelslim((PAIRS, IN), two_level=True),
    Layout.MODELSLIM_STATIC: LayoutRow(_MODELSLIM_STATIC, _MODELSLIM + "static_to_canonical"),
    Layout.CT_INT: LayoutRow(_CT_WEIGHT, _CT + "int_to_canonical"),
    Layout.CT_STATIC: LayoutRow(
        (
            *_CT_WEIGHT,
            _scale("input_scale", dims=(SHARD,)),
            TensorSpec("input_zero_point", ("I8",), (SHARD,), "float32", optional=True),
        ),
        _CT + "static_to_canonical",
    ),
    Layout.CT_PACKED: _ct_packed(Axis.GROUP),
    Layout.CT_PACKED_DENSE: _ct_packed(Axis.GROUP, pack=DENSE),
    Layout.CT_PACKED_ACT_ORDER: _ct_packed(Axis.ALL_GROUPS),
    Layout.CT_PACKED_PLAIN_ZERO: _ct_packed(Axis.GROUP, plain_zero=True),
    Layout.CT_PACKED_PLAIN_ZERO_ACT_ORDER: _ct_packed(Axis.ALL_GROUPS, plain_zero=True),
    Layout.FP8: LayoutRow(_fp8("weight_scale"), _FP8 + "to_canonical"),
    Layout.FP8_INV: LayoutRow(_fp8("weight_scale_inv"), _FP8 + "to_canonical"),
    Layout.FP8_BLOCK_4D: LayoutRow(_fp8("weight_scale", ROWS, ONE, GROUP, ONE), _FP8 + "to_canonical"),
    Layout.MXFP8: _mxfp8("weight_scale"),
    Layout.MXFP8_INV: _mxfp8("weight_scale_inv"),
    Layout.MXFP4: _fp4("weight", _e8m0("weight_scale")),
    Layout.CT_MXFP4: _fp4("weight_packed", _e8m0("weight_scale")),
    Layout.NVFP4: _nvfp4("weight", "weight_scale_2", "input_scale"),
    Layout.CT_NVFP4: _nvfp4("weight_packed", "weight_global_scale", "input_global_scale"),
    Layout.ROUNDED: _rounded(packed=False),
    Layout.ROUNDED_PAIRS: _rounded(packed=True),
    Layout.AWQ_GEMM: LayoutRow(
        (
            TensorSpec("qweight", ("I32",), (IN, Dim(Axis.OUT, 8, places=(0, 4, 1, 5, 2, 6, 3, 7))), "int32"),
            _scale("scales", dims=(GROUP, OUT)),
            TensorSpec("qzeros", ("I32",), (GROUP, Dim(Axis.OUT, 8)), "uint8", True, (GROUP, OUT), _AWQ + "zeros"),
            BIAS,
        ),
        _AWQ + "to_canonical",
    ),
    Layout.GPTQ: _gptq(Axis.GROUP, v2=False),
    Layout.GPTQ_V2: _gptq(Axis.GROUP, v2=True),
    Layout.GPTQ_ACT_ORDER: _gptq(Axis.ALL_GROUPS, v2=False),
    Layout.GPTQ_V2_ACT_ORDER: _gptq(Axis.ALL_GROUPS, v2=True),
}


def register_layout(name: str, row: LayoutRow) -> None:
    """Register a layout. Registering the same layout again has no effect.

    Raises:
        ValueError: a different layout has this name.
    """
    if name in Layout._value2member_map_ or LAYOUTS.get(name, row) != row:
        raise ValueError(f"a layout named {name} is registered already")
    LAYOUTS[name] = row


def tensors_of(spec: LayerSpec, listed: frozenset[str] = frozenset()) -> tuple[TensorSpec, ...]:
    """Tensors of a layer with this spec: the required ones, and the optional ones named in ``listed``."""
    weight = spec.weight
    bits = weight.bits if weight is not None and 0 < weight.bits <= 32 else 32
    return tuple(
        _unpacked(tensor, bits)
        for tensor in LAYOUTS[spec.layout].tensors
        if not tensor.optional or tensor.name in listed
    )


def _unpacked(tensor: TensorSpec, bits: int) -> TensorSpec:
    """Replace PER_WORD and DENSE by the packing of integers of this many bits."""
    if all(dim.pack > 0 for dim in tensor.dims):
        return tensor
    common = gcd(32, bits)
    packing = {PER_WORD: (32 // bits, 1), DENSE: (32 // common, bits // common)}
    dims = []
    for dim in tensor.dims:
        pack, words = packing.get(dim.pack, (dim.pack, dim.words))
        dims.append(replace(dim, pack=pack, words=words))
    return replace(tensor, dims=tuple(dims))


def stored_weight(spec: LayerSpec) -> WeightSpec:
    """The weight of a quantized layer's spec.

    Raises:
        ValueError: the layer is float.
    """
    if spec.weight is None:
        raise ValueError(f"{spec.scheme} is float and has no quantized weight")
    return spec.weight


def group_size_of(spec: LayerSpec) -> int:
    """Inputs per stored scale of the layer's weight; 0 if a scale covers a whole channel."""
    weight = spec.weight
    if weight is None or weight.granularity not in (Granularity.GROUP, Granularity.BLOCK):
        return 0
    return weight.group_size


def rows_per_scale_of(spec: LayerSpec, outputs: int) -> int:
    """Output rows per stored scale of a checkpoint layer with ``outputs`` rows."""
    weight = spec.weight
    if weight is not None and weight.granularity is Granularity.TENSOR:
        return max(outputs, 1)
    return weight.block_rows if weight is not None and weight.granularity is Granularity.BLOCK else 1
