# SPDX-License-Identifier: Apache-2.0
"""The dispatch table: (layer kind, LayerSpec) -> NPU method class, operators and cost, as data.

Rows name classes as "module:qualname" and operators as text, so that the table can be read without torch. The
first row that matches is taken; a spec that no row matches is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.serving import cost
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerKind, LayerSpec, NumberKind, WeightSpec

__all__ = ["ROWS", "Row", "describe", "find_row", "register_row", "rows", "unsupported"]

_LINEAR = frozenset({LayerKind.LINEAR, LayerKind.LM_HEAD})
_MOE = frozenset({LayerKind.FUSED_MOE})
_CHANNEL = frozenset({Granularity.CHANNEL, Granularity.TENSOR})
_CHANNEL_GROUP = _CHANNEL | {Granularity.GROUP}


@dataclass(frozen=True)
class Row:
    """One row of the dispatch table.

    Attributes:
        name: the scheme in the field's short form.
        kinds: layer kinds it serves.
        weight_bits, weight_kind, weight_granularity, weight_symmetric: what the weight must be; None stands for any.
        act: bits of the activation; None if it is not quantized.
        act_dynamic: whether activation scales are computed at run time.
        act_symmetric: whether a dynamic activation has no offset; a static one may have either.
        transform: whether the layer's input is multiplied by matrices first; None stands for any.
        method: "module:qualname" of the method class.
        operators: the torch_npu operators that it calls per forward, in order.
        cost: bytes and limits of what the method class prepares.
        remark: a caveat, for the support matrix and the log.
        instead: if the remark says that layers are not computed as stored, how to export them so that they are; else empty.
    """

    name: str
    kinds: frozenset[LayerKind]
    weight_bits: frozenset[int]
    weight_granularity: frozenset[Granularity]
    act: int | None
    act_dynamic: bool | None
    method: str
    operators: tuple[str, ...]
    cost: cost.LinearCost | cost.ExpertsCost
    weight_kind: NumberKind = NumberKind.INT
    weight_symmetric: bool | None = None
    act_symmetric: bool = True
    transform: bool | None = False
    remark: str = ""
    instead: str = ""

    def matches(self, kind: LayerKind, spec: LayerSpec) -> bool:
        return (
            kind in self.kinds
            and spec.weight is not None
            and self._weight(spec.weight)
            and self._act(spec.activation)
            and self.transform in (None, spec.transform is not None)
        )

    def _weight(self, weight: WeightSpec) -> bool:
        return (
            weight.bits in self.weight_bits
            and weight.kind is self.weight_kind
            and weight.granularity in self.weight_granularity
            and self.weight_symmetric in (None, weight.symmetric)
        )

    def _act(self, activation: ActivationSpec | None) -> bool:
        if activation is None or self.act is None:
            return activation is None and self.act is None
        return (
            activation.bits == self.act
            and activation.dynamic == self.act_dynamic
            and activation.kind is NumberKind.INT
            and (activation.symmetric == self.act_symmetric or not activation.dynamic)
        )

    @property
    def method_name(self) -> str:
        return self.method.rpartition(":")[2]


ROWS: tuple[Row, ...] = (
    Row(
        "W8A8 dynamic",
        _LINEAR,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL,
        weight_symmetric=True,
        act=8,
        act_dynamic=True,
        transform=None,
        method="vllm_npu_quant.methods.w8a8:W8A8DynamicLinear",
        operators=("npu_dynamic_quant", "npu_quant_matmul"),
        cost=cost.W8A8_DYNAMIC,
    ),
    Row(
        "W8A8 dynamic asymmetric",
        _LINEAR,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL,
        weight_symmetric=True,
        act=8,
        act_dynamic=True,
        act_symmetric=False,
        transform=None,
        method="vllm_npu_quant.methods.w8a8:W8A8DynamicAsymmetricLinear",
        operators=("npu_dynamic_quant_asymmetric", "npu_quant_matmul"),
        cost=cost.W8A8_ASYMMETRIC,
    ),
    Row(
        "W8A8 dynamic, groups or zero points",
        _LINEAR,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL_GROUP,
        act=8,
        act_dynamic=True,
        transform=None,
        method="vllm_npu_quant.methods.w8a8:W8A8DynamicGroupedLinear",
        operators=("npu_dynamic_quant", "npu_quant_matmul"),
        cost=cost.W8A8_GROUPED,
    ),
    Row(
        "W8A8 static",
        _LINEAR,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL,
        weight_symmetric=True,
        act=8,
        act_dynamic=False,
        transform=None,
        method="vllm_npu_quant.methods.w8a8:W8A8StaticLinear",
        operators=("npu_quantize", "npu_quant_matmul"),
        cost=cost.W8A8_STATIC,
    ),
    Row(
        "W8A16",
        _LINEAR,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL_GROUP,
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.weight_only:WeightOnlyLinear",
        operators=("npu_weight_quant_batchmatmul",),
        cost=cost.WEIGHT_ONLY,
    ),
    # 2- and 3-bit weights are widened to int4.
    Row(
        "W4A16",
        _LINEAR,
        weight_bits=frozenset({2, 3, 4}),
        weight_granularity=_CHANNEL_GROUP,
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.weight_only:WeightOnlyLinear",
        operators=("npu_weight_quant_batchmatmul",),
        cost=cost.WEIGHT_ONLY,
    ),
    Row(
        "W4A8",
        _LINEAR,
        weight_bits=frozenset({4}),
        weight_granularity=_CHANNEL_GROUP,
        weight_symmetric=True,
        act=8,
        act_dynamic=True,
        transform=None,
        method="vllm_npu_quant.methods.w4a8:W4A8DynamicLinear",
        operators=("npu_dynamic_quant", "npu_grouped_matmul"),
        cost=cost.W4A8,
    ),
    Row(
        "W4A4",
        _LINEAR,
        weight_bits=frozenset({4}),
        weight_granularity=_CHANNEL,
        weight_symmetric=True,
        act=4,
        act_dynamic=True,
        method="vllm_npu_quant.methods.w4a4:W4A4DynamicLinear",
        operators=("npu_dynamic_quant", "npu_quant_matmul"),
        cost=cost.W4A4,
    ),
    Row(
        "W4A4 transformed",
        _LINEAR,
        weight_bits=frozenset({4}),
        weight_granularity=_CHANNEL,
        weight_symmetric=True,
        act=4,
        act_dynamic=True,
        transform=True,
        method="vllm_npu_quant.methods.w4a4:W4A4DynamicLinear",
        operators=("npu_kronecker_quant", "npu_quant_matmul"),
        cost=cost.W4A4,
    ),
    Row(
        "W4A4 group",
        _LINEAR,
        weight_bits=frozenset({4}),
        weight_granularity=frozenset({Granularity.GROUP}),
        weight_symmetric=True,
        act=4,
        act_dynamic=True,
        transform=None,
        method="vllm_npu_quant.methods.w4a4:W4A4DynamicLinear",
        operators=("npu_dynamic_quant", "npu_grouped_matmul"),
        cost=cost.W4A4,
    ),
    # Stored weights are dequantized at load to the model's dtype.
    Row(
        "dequantized",
        _LINEAR,
        weight_bits=frozenset({16}),
        weight_kind=NumberKind.FLOAT,
        weight_granularity=_CHANNEL,
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.dequantized:DequantizedLinear",
        operators=(),
        cost=cost.DEQUANTIZED,
    ),
    Row(
        "W8A8 dynamic",
        _MOE,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL,
        weight_symmetric=True,
        act=8,
        act_dynamic=True,
        method="vllm_npu_quant.methods.moe_w8a8:W8A8DynamicExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.W8A8_EXPERTS,
    ),
    # npu_moe_init_routing_v2 quantizes with one static scale for all experts, and every expert has its own. The integers of
    # the weights stay; tokens get a scale each, which is finer than the calibrated one.
    Row(
        "W8A8 static, activations per token",
        _MOE,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL,
        weight_symmetric=True,
        act=8,
        act_dynamic=False,
        method="vllm_npu_quant.methods.moe_w8a8:W8A8DynamicExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.W8A8_EXPERTS,
        remark="experts' activations are quantized per token, and their static scales are not used",
        instead="with dynamic activation scales (W8A8 dynamic)",
    ),
    Row(
        "W8A16",
        _MOE,
        weight_bits=frozenset({8}),
        weight_granularity=_CHANNEL,
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.moe_weight_only:WeightOnlyExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.WEIGHT_ONLY_EXPERTS,
    ),
    # npu_grouped_matmul takes scales per group for int4 only, so weights are dequantized at load.
    Row(
        "W8A16 group, dequantized",
        _MOE,
        weight_bits=frozenset({8}),
        weight_granularity=frozenset({Granularity.GROUP}),
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.moe_weight_only:FloatExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.FLOAT_EXPERTS,
        remark="experts' weights are dequantized while they load, to two bytes each",
        instead="with one scale per channel (W8A16), or with 4 bits per group (W4A16)",
    ),
    Row(
        "W4A16 group, asymmetric",
        _MOE,
        weight_bits=frozenset({2, 3, 4}),
        weight_granularity=frozenset({Granularity.GROUP}),
        weight_symmetric=False,
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.moe_weight_only:WeightOnlyExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.WEIGHT_ONLY_EXPERTS,
        remark="experts' offsets per group: undocumented for npu_grouped_matmul, used by peers (vllm-ascend, SGLang)",
    ),
    Row(
        "W4A16",
        _MOE,
        weight_bits=frozenset({2, 3, 4}),
        weight_granularity=_CHANNEL_GROUP,
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.moe_weight_only:WeightOnlyExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.WEIGHT_ONLY_EXPERTS,
    ),
    Row(
        "W4A8",
        _MOE,
        weight_bits=frozenset({4}),
        weight_granularity=_CHANNEL_GROUP,
        weight_symmetric=True,
        act=8,
        act_dynamic=True,
        method="vllm_npu_quant.methods.moe_int4:W4A8DynamicExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.W4A8_EXPERTS,
    ),
    Row(
        "W4A4",
        _MOE,
        weight_bits=frozenset({4}),
        weight_granularity=_CHANNEL_GROUP,
        weight_symmetric=True,
        act=4,
        act_dynamic=True,
        method="vllm_npu_quant.methods.moe_int4:W4A4DynamicExperts",
        operators=("npu_dynamic_quant", "npu_grouped_matmul"),
        cost=cost.W4A4_EXPERTS,
    ),
    # Float experts beside quantized ones, and experts that are dequantized at load.
    Row(
        "float",
        _MOE,
        weight_bits=frozenset({16}),
        weight_kind=NumberKind.FLOAT,
        weight_granularity=_CHANNEL,
        act=None,
        act_dynamic=None,
        method="vllm_npu_quant.methods.moe_weight_only:FloatExperts",
        operators=("npu_grouped_matmul",),
        cost=cost.FLOAT_EXPERTS,
    ),
)


_added: list[Row] = []


def register_row(row: Row) -> None:
    """Add a row, for an extension. Built-in rows match first, so that no extension changes what they serve."""
    if row not in _added:
        _added.append(row)


def rows() -> tuple[Row, ...]:
    """Every row, in the order in which they are tried."""
    return (*ROWS, *_added)


def find_row(kind: LayerKind, spec: LayerSpec) -> Row | None:
    """The row that serves a layer, or None."""
    return next((row for row in rows() if row.matches(kind, spec)), None)


def unsupported(kind: LayerKind, spec: LayerSpec, *, layer: str = "", file: str = "") -> Finding:
    """The finding for a spec that no row serves."""
    served = _names(row for row in rows() if kind in row.kinds)
    return Finding(
        "unsupported-scheme",
        f"no NPU method class serves {spec.scheme} for {kind.value} layers",
        layer=layer,
        file=file,
        expected=f"one of {served}" if served else f"a float layer: no scheme is served for {kind.value} layers yet",
        found=describe(spec),
        fix="export these layers with a scheme that is served, or as float",
    )


def describe(spec: LayerSpec, stored: LayerSpec | None = None) -> str:
    """Describe a spec in one line, for messages and tables.

    Args:
        spec: the served spec.
        stored: the spec of the checkpoint, mentioned if its weight has another kind of numbers (FP8 served as int8).
    """
    if spec.weight is None:
        return f"{spec.scheme}: float"
    text = f"{spec.scheme}: {_describe_weight(spec.weight)}"
    if stored is not None and stored.weight is not None and stored.weight.kind is not spec.weight.kind:
        text += f" (stored as {_describe_weight(stored.weight)})"
    text += ", input transform" if spec.transform is not None else ""
    act = spec.activation
    if act is None:
        return text + ", activation not quantized"
    mode = "dynamic" if act.dynamic else "static"
    text += f", {act.bits}-bit {act.kind.value} {mode} activation per {act.granularity.value}"
    return text + ("" if act.symmetric else ", asymmetric")


def _describe_weight(weight: WeightSpec) -> str:
    group = f" of {weight.group_size}" if weight.granularity is Granularity.GROUP else ""
    if weight.granularity is Granularity.BLOCK:
        group = f" of {weight.block_rows} x {weight.group_size}"
    text = f"{weight.bits}-bit {weight.kind.value} weight per {weight.granularity.value}{group}"
    return text + ("" if weight.symmetric else ", asymmetric")


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(row.name for row in rows))
