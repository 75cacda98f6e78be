# SPDX-License-Identifier: Apache-2.0
"""Limits of the operators on layer sizes, checked before the methods' ``prepare`` would raise them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from vllm_npu_quant.errors import Finding, FindingLimit
from vllm_npu_quant.inspection.layers import Layer
from vllm_npu_quant.inspection.parallel import NUMBER, part_of
from vllm_npu_quant.serving.cost import MAX_INPUTS, group_of
from vllm_npu_quant.serving.shards import fit_group

__all__ = ["limit_findings"]


def limit_findings(
    layers: Sequence[Layer], source: str, *, tp: int, ep: int, reported: Collection[str] = ()
) -> list[Finding]:
    """Findings for layers whose part on a rank exceeds a limit of their method's operators.

    Args:
        layers: the layers as they are served.
        source: the config file, for messages.
        tp, ep: tensor- and expert-parallel sizes.
        reported: names of layers for which the format has reported a limit.
    """
    found = FindingLimit(8)
    # One finding for the layers of all depths with the same name and problem.
    alike: dict[tuple[str, Finding], list[Finding]] = {}
    for layer in layers:
        if layer.name not in reported:
            for finding in _layer_findings(layer, source, tp, ep):
                alike.setdefault((NUMBER.sub("*", layer.name), replace(finding, layer="")), []).append(finding)
    for findings in alike.values():
        more = f" ({len(findings):,} layers like it)" if len(findings) > 1 else ""
        found.add(replace(findings[0], message=findings[0].message + more))
    return found.close()


def _layer_findings(layer: Layer, source: str, tp: int, ep: int) -> Iterable[Finding]:
    if layer.row is None:
        return
    part, cost = part_of(layer, tp, ep), layer.row.cost
    if part.inputs != layer.inputs and part.inputs * tp != layer.inputs:
        return  # reported by parallel_findings: it cannot be sharded at all
    if part.inputs > MAX_INPUTS and layer.operators:
        yield Finding(
            "operator-limit",
            f"{layer.operators[-1]} takes at most {MAX_INPUTS} inputs",
            layer=layer.name,
            file=source,
            expected=f"K <= {MAX_INPUTS}",
            found=f"K = {part.inputs}",
            fix="use a larger tensor-parallel size, or export the layer as float",
        )
    whole, group = (group_of(spec.weight) for spec in (layer.spec, fit_group(layer.spec, layer.inputs, part.inputs)))
    if not whole or not part.inputs or part.inputs <= whole:
        return
    if group < cost.min_group:
        yield Finding(
            "operator-limit",
            "npu_weight_quant_batchmatmul takes groups of a multiple of 32 inputs, and filling these up with zeros would "
            "more than double the weight",
            layer=layer.name,
            file=source,
            expected=f"a group size of at least {cost.min_group}, or one scale per channel",
            found=f"groups of {group}" + (f" on {tp} ranks" if tp > 1 else ""),
            fix="use a tensor-parallel size that cuts the layer at whole groups, or re-export with a larger group size",
        )
    if cost.even_groups and group % 2:
        yield Finding(
            "operator-limit",
            "the int4 operators take groups of an even number of inputs",
            layer=layer.name,
            file=source,
            expected="an even group size",
            found=f"groups of {group}",
            fix="use a tensor-parallel size that cuts the layer at whole groups, or re-export with an even group size",
        )
