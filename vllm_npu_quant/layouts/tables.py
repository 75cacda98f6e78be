# SPDX-License-Identifier: Apache-2.0
"""The tensors that each checkpoint layout stores for one layer, as data.

One table serves three readers: the header check (do the files hold what the config promises?), the vLLM adapters (which
parameters to register, and how to shard them) and the conversions to canonical numbers. It imports no torch.

Shapes are written with the layer's sizes: N outputs, K inputs, G = ceil(K / group_size) groups, S fused shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vllm_npu_quant.spec import Granularity, LayerSpec, Layout

__all__ = ["LAYOUTS", "Axis", "Dim", "LayerSizes", "LayoutRow", "TensorSpec", "tensors_of"]


class Axis(str, Enum):
    """What one dimension of a stored tensor runs over."""

    OUT = "N"
    IN = "K"
    GROUP = "G"
    #: One number per fused shard: stored as [1] or as a scalar in each checkpoint layer.
    SHARD = "S"
    FIXED = ""


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer, or of one rank's part of it.

    Attributes:
        outputs: N. inputs: K. group_size: inputs per group, 0 for one scale per channel. shards: fused shards.
    """

    outputs: int
    inputs: int
    group_size: int = 0
    shards: int = 1

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.group_size) if self.group_size > 0 else 1


@dataclass(frozen=True)
class Dim:
    """One dimension of a stored tensor.

    Attributes:
        axis: what it runs over.
        pack: how many elements of that axis one stored element holds.
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
            Axis.FIXED: self.size,
        }[self.axis]
        return -(-whole // self.pack)

    def __str__(self) -> str:
        if self.axis is Axis.FIXED:
            return str(self.size)
        return self.axis.value if self.pack == 1 else f"{self.axis.value}/{self.pack}"


OUT, IN, GROUP, SHARD, ONE = (Dim(axis) for axis in (Axis.OUT, Axis.IN, Axis.GROUP, Axis.SHARD, Axis.FIXED))


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
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]
    load_dtype: str
    optional: bool = False

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
}


def tensors_of(spec: LayerSpec, listed: frozenset[str] = frozenset()) -> tuple[TensorSpec, ...]:
    """The tensors of a layer with this spec: the required ones, and the optional ones named in ``listed``."""
    return tuple(tensor for tensor in LAYOUTS[spec.layout].tensors if not tensor.optional or tensor.name in listed)


def group_size_of(spec: LayerSpec) -> int:
    """Inputs per scale of the layer's weight; 0 where a scale covers a whole output channel."""
    if spec.weight is None or spec.weight.granularity is not Granularity.GROUP:
        return 0
    return spec.weight.group_size
