# SPDX-License-Identifier: Apache-2.0
"""The tensors that each checkpoint layout stores for one layer, as data.

One table serves three readers: the header check (do the files hold what the config promises?), the vLLM adapters (which
parameters to register, and how to shard them) and the conversions to canonical numbers. It imports no torch.

Shapes are written with the layer's sizes: N outputs, K inputs, G = ceil(K / group_size) groups, S fused shards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from vllm_npu_quant.spec import Granularity, LayerSpec, Layout

__all__ = [
    "LAYOUTS",
    "Axis",
    "Dim",
    "LayerSizes",
    "LayoutRow",
    "TensorSpec",
    "group_size_of",
    "rows_per_scale_of",
    "tensors_of",
]


class Axis(str, Enum):
    """What one dimension of a stored tensor runs over."""

    OUT = "N"
    IN = "K"
    GROUP = "G"
    #: One number per fused shard: stored as [1] or as a scalar in each checkpoint layer.
    SHARD = "S"
    #: The rows of a scale: N for one per row, ceil(N / block rows) for blocks, 1 for the whole tensor.
    ROWS = "R"
    FIXED = ""


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer, or of one rank's part of it.

    Attributes:
        outputs: N. inputs: K. group_size: inputs per group, 0 for one scale per channel. shards: fused shards.
        rows_per_scale: output rows that share a scale.
    """

    outputs: int
    inputs: int
    group_size: int = 0
    shards: int = 1
    rows_per_scale: int = 1

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.group_size) if self.group_size > 0 else 1


@dataclass(frozen=True)
class Dim:
    """One dimension of a stored tensor.

    Attributes:
        axis: what it runs over.
        pack: how many elements of that axis one stored element holds; PER_WORD for as many as 32 bits take.
        size: the size of a FIXED dimension.
    """

    axis: Axis
    pack: int = 1
    size: int = 1

    def length(self, sizes: LayerSizes) -> int:
        """The dimension's length for a layer of these sizes."""
        whole = {
            Axis.OUT: sizes.outputs,
            Axis.IN: sizes.inputs,
            Axis.GROUP: sizes.groups,
            Axis.SHARD: sizes.shards,
            Axis.ROWS: -(-sizes.outputs // sizes.rows_per_scale),
            Axis.FIXED: self.size,
        }[self.axis]
        return -(-whole // self.pack)

    def __str__(self) -> str:
        if self.axis is Axis.FIXED:
            return str(self.size)
        return self.axis.value if self.pack == 1 else f"{self.axis.value}/{self.pack}"


OUT, IN, GROUP, SHARD, ONE = (Dim(axis) for axis in (Axis.OUT, Axis.IN, Axis.GROUP, Axis.SHARD, Axis.FIXED))
ROWS = Dim(Axis.ROWS)

#: ``Dim.pack`` of integers that are packed into int32: 32 // bits of them, which ``tensors_of`` fills in.
PER_WORD = 0


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layout.

    Attributes:
        name: the last component of its name in the checkpoint ("weight_scale").
        dtypes: the safetensors dtypes that are allowed.
        dims: its shape.
        load_dtype: the torch dtype name of the parameter that receives it. Scales load into float32, which holds every
            float dtype that producers write exactly.
        optional: the tensor is registered only for layers whose config lists it, or whose files hold it.
        loaded_dims: the shape of the parameter that receives it, where ``rearrange`` changes it.
        rearrange: "module:function", applied to the stored tensor of one checkpoint layer before vLLM cuts it for fused
            shards and ranks; it changes no number. ``function(stored, spec, outputs)`` returns ``loaded_dims``, where a
            dimension of outputs may be longer than the layer, as long as it is cut to ``outputs`` rows: N of vLLM's
            layer, which may hold several checkpoint layers.
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]
    load_dtype: str
    optional: bool = False
    loaded_dims: tuple[Dim, ...] = ()
    rearrange: str = ""

    def as_loaded(self) -> TensorSpec:
        """The tensor as its parameter holds it."""
        return replace(self, dims=self.loaded_dims, loaded_dims=()) if self.loaded_dims else self

    def shape(self, sizes: LayerSizes) -> tuple[int, ...]:
        return tuple(dim.length(sizes) for dim in self.dims)

    def shape_text(self) -> str:
        return "[" + ", ".join(str(dim) for dim in self.dims) + "]"

    def axis_of(self, axis: Axis) -> int | None:
        """The position of the dimension that runs over ``axis``, or None."""
        return next((i for i, dim in enumerate(self.dims) if dim.axis is axis), None)


@dataclass(frozen=True)
class LayoutRow:
    """A layout's tensors and the function that turns them into canonical numbers.

    Attributes:
        tensors: what the checkpoint stores, the weight first.
        to_canonical: "module:function", resolved where torch may be imported.
    """

    tensors: tuple[TensorSpec, ...]
    to_canonical: str


_FLOATS = ("F32", "BF16", "F16")

#: A Linear's own bias. It is a tensor of the layout because asymmetric smoothing gives a bias to layers whose model
#: class has none; ``engine`` hands it to vLLM's ``layer.bias``.
BIAS = TensorSpec("bias", _FLOATS, (OUT,), "float32", optional=True)


def _scale(name: str, *, optional: bool = False) -> TensorSpec:
    return TensorSpec(name, _FLOATS, (OUT, GROUP), "float32", optional)


_MODELSLIM_STATIC = (
    TensorSpec("weight", ("I8",), (OUT, IN), "int8"),
    TensorSpec("input_scale", _FLOATS, (SHARD,), "float32"),
    TensorSpec("input_offset", (*_FLOATS, "I8"), (SHARD,), "float32"),
    TensorSpec("quant_bias", ("I32",), (OUT,), "int32"),
    # int64 is the widened bit pattern of the float32, written for float16 models.
    TensorSpec("deq_scale", ("F32", "I64"), (OUT,), "float32"),
    _scale("weight_scale", optional=True),
    _scale("weight_offset", optional=True),
    BIAS,
)

_CT = "vllm_npu_quant.layouts.compressed_tensors:"
_FP8 = "vllm_npu_quant.layouts.fp8:"


def _scale_per_row(name: str, *dtypes: str, load_dtype: str = "float32", optional: bool = False) -> TensorSpec:
    """A scale or zero point per row, block or tensor, repeated at load until every row has its own: a parameter that is
    cut along rows like the weight, whatever the blocks."""
    return TensorSpec(
        name, dtypes or _FLOATS, (ROWS, GROUP), load_dtype, optional, (OUT, GROUP), _CT + "one_scale_per_row"
    )


_CT_WEIGHT = (
    TensorSpec("weight", ("I8",), (OUT, IN), "int8"),
    _scale_per_row("weight_scale"),
    _scale_per_row("weight_zero_point", "I8", load_dtype="int8", optional=True),
    TensorSpec("weight_g_idx", ("I32",), (IN,), "int32", optional=True),
    BIAS,
)
_CT_PACKED = (
    TensorSpec("weight_packed", ("I32",), (OUT, Dim(Axis.IN, PER_WORD)), "int32"),
    _scale_per_row("weight_scale"),
    # Unpacked at load, so that shards need not be multiples of a word.
    TensorSpec(
        "weight_zero_point",
        ("I32",),
        (Dim(Axis.OUT, PER_WORD), GROUP),
        "int8",
        True,
        (OUT, GROUP),
        _CT + "unpacked_zero_points",
    ),
    TensorSpec("weight_shape", ("I64",), (Dim(Axis.FIXED, size=2),), "int64", optional=True),
    TensorSpec("weight_g_idx", ("I32",), (IN,), "int32", optional=True),
    BIAS,
)


def _fp8(scale: str) -> tuple[TensorSpec, ...]:
    """FP8 weights are held as bytes, which chips without that dtype can hold. Static input scales are loaded and not used:
    the activations are quantized per token."""
    return (
        TensorSpec("weight", ("F8_E4M3",), (OUT, IN), "uint8", rearrange=_FP8 + "as_bytes"),
        _scale_per_row(scale, *_FLOATS, "F8_E8M0"),
        TensorSpec("input_scale", _FLOATS, (SHARD,), "float32", optional=True),
        TensorSpec("activation_scale", _FLOATS, (SHARD,), "float32", optional=True),
        _scale_per_row("weight_offset", optional=True),
        BIAS,
    )


LAYOUTS: dict[Layout, LayoutRow] = {
    Layout.FLOAT: LayoutRow((), ""),
    Layout.MODELSLIM_INT: LayoutRow(
        (
            TensorSpec("weight", ("I8",), (OUT, IN), "int8"),
            _scale("weight_scale"),
            _scale("weight_offset"),
            BIAS,
        ),
        "vllm_npu_quant.layouts.modelslim:int_to_canonical",
    ),
    Layout.MODELSLIM_STATIC: LayoutRow(_MODELSLIM_STATIC, "vllm_npu_quant.layouts.modelslim:static_to_canonical"),
    Layout.CT_INT: LayoutRow(_CT_WEIGHT, _CT + "int_to_canonical"),
    Layout.CT_STATIC: LayoutRow(
        (
            *_CT_WEIGHT,
            TensorSpec("input_scale", _FLOATS, (SHARD,), "float32"),
            TensorSpec("input_zero_point", ("I8",), (SHARD,), "float32", optional=True),
        ),
        _CT + "static_to_canonical",
    ),
    Layout.CT_PACKED: LayoutRow(_CT_PACKED, _CT + "packed_to_canonical"),
    Layout.FP8: LayoutRow(_fp8("weight_scale"), _FP8 + "to_canonical"),
    Layout.FP8_INV: LayoutRow(_fp8("weight_scale_inv"), _FP8 + "to_canonical"),
}


def tensors_of(spec: LayerSpec, listed: frozenset[str] = frozenset()) -> tuple[TensorSpec, ...]:
    """The tensors of a layer with this spec: the required ones, and the optional ones named in ``listed``."""
    weight = spec.on_disk
    per_word = 32 // weight.bits if weight is not None and 0 < weight.bits <= 32 else 1
    return tuple(
        _unpacked(tensor, per_word)
        for tensor in LAYOUTS[spec.layout].tensors
        if not tensor.optional or tensor.name in listed
    )


def _unpacked(tensor: TensorSpec, per_word: int) -> TensorSpec:
    if all(dim.pack != PER_WORD for dim in tensor.dims):
        return tensor
    return replace(
        tensor, dims=tuple(replace(dim, pack=per_word) if dim.pack == PER_WORD else dim for dim in tensor.dims)
    )


def group_size_of(spec: LayerSpec) -> int:
    """Inputs per stored scale of the layer's weight; 0 where a scale covers a whole output channel."""
    weight = spec.on_disk
    if weight is None or weight.granularity not in (Granularity.GROUP, Granularity.BLOCK):
        return 0
    return weight.group_size


def rows_per_scale_of(spec: LayerSpec, outputs: int) -> int:
    """Output rows per stored scale of a checkpoint layer with ``outputs`` rows."""
    weight = spec.on_disk
    if weight is not None and weight.granularity is Granularity.TENSOR:
        return max(outputs, 1)
    return weight.block_rows if weight is not None and weight.granularity is Granularity.BLOCK else 1
