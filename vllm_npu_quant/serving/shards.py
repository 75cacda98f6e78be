# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a stored layer: its sizes, its groups, and findings if it cannot be cut.

The engine creates parameters of these sizes; ``check --tp`` reports the same findings without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.layouts.tables import LAYOUTS, Axis, LayerSizes, group_size_of, tensors_of
from vllm_npu_quant.spec import LayerSpec, TransformSpec

__all__ = ["RankPart", "act_order_ranks", "fit_group", "rank_part"]

SMALLER_TP = "use a smaller tensor-parallel size"


@dataclass(frozen=True)
class RankPart:
    """One rank's part of a stored layer.

    Attributes:
        spec: the stored spec, with the group size of the part.
        sizes: the part's sizes; ``all_inputs`` and the transform are those of the whole layer.
        findings: why the layer cannot be cut like this; the sizes hold only if there are none.
    """

    spec: LayerSpec
    sizes: LayerSizes
    findings: tuple[Finding, ...] = ()


def act_order_ranks(group_size: int) -> int:
    """The largest number of ranks that may cut the inputs of a layer with activation order.

    A rank fills its members of each group up to 32 inputs. With 16 members on average that at most doubles the weight.
    """
    return max(group_size // 16, 1)


def fit_group(spec: LayerSpec, inputs: int, part: int) -> LayerSpec:
    """The spec with groups that parts of ``part`` inputs do not cut, whose scales are repeated at load; exact.

    Groups stay as they are if they are not cut, and with activation order, as every rank then needs the scales of all
    groups.
    """
    group = group_size_of(spec)
    if spec.weight is None or not group or part == inputs or part % group == 0 or LAYOUTS[spec.layout].act_order:
        return spec
    return replace(spec, weight=replace(spec.weight, group_size=gcd(part, group)))


def rank_part(
    spec: LayerSpec,
    listed: frozenset[str],
    cut: Axis | None,
    outputs: Sequence[int],
    inputs: int,
    ranks: int,
    fix: str = SMALLER_TP,
) -> RankPart:
    """Cut a stored layer for ``ranks`` ranks.

    Args:
        spec: the stored spec.
        listed: the optional tensors that the layer has.
        cut: the dimension that ranks cut, OUT or IN; None if ``outputs`` and ``inputs`` are one rank's already.
        outputs: outputs of each fused shard, over all ranks if ``cut`` is OUT.
        inputs: inputs of the whole layer.
        ranks: the number of ranks.
        fix: for findings, which name no layer.
    """
    found: list[Finding] = []

    def refuse(message: str, expected: str, what: str, instead: str = fix) -> None:
        found.append(Finding("cannot-shard", message, expected=expected, found=what, fix=instead))

    for name, axis, lengths in (("outputs", Axis.OUT, outputs), ("inputs", Axis.IN, (inputs,))):
        for length in dict.fromkeys(lengths) if cut is axis else ():
            if length % ranks:
                refuse(f"its {name} cannot be divided among the ranks", f"a divisor of {length}", f"{ranks} ranks")
    parts = [length // ranks for length in outputs] if cut is Axis.OUT else list(outputs)
    part = inputs // ranks if cut is Axis.IN else inputs
    for tensor in tensors_of(spec, listed):
        for dim in tensor.as_loaded().dims if tensor.loaded else ():
            held = parts if dim.axis is Axis.OUT else [part] if dim.axis is Axis.IN and cut is Axis.IN else []
            if dim.pack > 1 and any(length % dim.pack for length in held):
                refuse(
                    f"{tensor.name} packs {dim.pack} numbers along {dim.axis.value}, and a rank would get a part",
                    f"sizes per rank divisible by {dim.pack}",
                    ", ".join(map(str, held)),
                )
    group, fitted = group_size_of(spec), fit_group(spec, inputs, part)
    if cut is Axis.IN and group and LAYOUTS[spec.layout].act_order:
        if ranks > (most := act_order_ranks(group)):
            refuse(
                "with activation order (desc_act), the inputs of each group are spread over all ranks, and a rank fills its "
                "part of a group up to 32",
                f"at most {most} ranks for groups of {group}, which at most doubles the weight",
                f"{ranks} ranks",
                f"use --tensor-parallel-size {most} or less, or a checkpoint without desc_act",
            )
    elif group > 1 and group_size_of(fitted) == 1:
        refuse(
            f"a rank's part of the inputs shares no divisor with the groups of {group}",
            "a size per rank that shares a divisor with the group size",
            f"{part} per rank",
        )
    transform = spec.transform or TransformSpec()
    sizes = LayerSizes(sum(parts), part, group_size_of(fitted), len(parts), all_inputs=inputs, transform=transform)
    return RankPart(fitted, sizes, tuple(found))
