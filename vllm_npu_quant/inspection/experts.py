# SPDX-License-Identifier: Apache-2.0
"""Checks of MoE layers against the model's config.json: the number of routed experts, and the router."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vllm_npu_quant.errors import Finding, FindingLimit, Severity
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.experts import expert_count, quantized_router, routers_of

__all__ = ["moe_findings"]

#: Fields of config.json, on any level, with a number of routed experts or one for every layer.
_COUNTS = frozenset(
    {
        *("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"),
        *("layers_num_experts", "mova_num_experts", "mtp_n_routed_experts"),
    }
)
#: Parts of config.json that are not the model's.
_FOREIGN = frozenset({"quantization_config", "compression_config"})

#: A layer of the model itself; those of a draft ("mtp.layers.0") are numbered by themselves.
_LAYER_NUMBER = re.compile(
    r"(?:^|\.)(?:model|language_model|transformer|backbone)\.(?:layers|h)\.(0|[1-9][0-9]{0,8})\."
)


def moe_findings(described: Described, config: Mapping[str, Any]) -> list[Finding]:
    """Findings for MoE layers whose number of experts is not config.json's, and for quantized routers.

    Args:
        described: the checkpoint's layers. config: config.json.
    """
    found = FindingLimit(8)
    counts = _Counts(config)
    for layer, experts in described.experts.items():
        allowed = counts.of(layer)
        if allowed and experts.count not in allowed:
            expected = " or ".join(map(str, sorted(allowed)))
            found.add(expert_count(layer, f"{expected} experts, as in config.json", experts.count, described.source))
    if not counts:
        found.extend(_differing(described))
    routers = routers_of(described)
    if routers:
        found.add(quantized_router(routers, described.source, Severity.WARNING))
    return found.close()


def _differing(described: Described) -> Iterator[Finding]:
    """Warnings for MoE layers that have another number of experts than most, where config.json has no number."""
    usual = Counter(experts.count for experts in described.experts.values()).most_common(1)
    for layer, experts in described.experts.items():
        if experts.count != usual[0][0]:
            expected = f"{usual[0][0]} experts, as in the other MoE layers"
            finding = expert_count(layer, expected, experts.count, described.source)
            yield replace(finding, severity=Severity.WARNING)


class _Counts:
    """The numbers of routed experts that a config.json names; false if there are none.

    A model may have several: for its text and its vision experts, for its draft, for each of its layers. So a layer may have
    any of them, unless a list has one number for every layer.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.common: set[int] = set()
        self.by_layer: list[list[int]] = []
        pending: list[Any] = [config]
        while pending:  # no recursion: the depth is the file's
            part = pending.pop()
            if isinstance(part, list):
                pending += (item for item in part if isinstance(item, (dict, list)))
                continue
            for key, value in part.items():
                if key in _COUNTS:
                    self._add(value, part.get("num_hidden_layers"))
                elif key not in _FOREIGN and isinstance(value, (dict, list)):
                    pending.append(value)

    def __bool__(self) -> bool:
        return bool(self.common or self.by_layer)

    def _add(self, value: Any, layers: Any) -> None:
        if type(value) is int and value > 0:
            self.common.add(value)
        elif isinstance(value, list) and value and all(type(item) is int for item in value):
            if len(value) == layers:
                self.by_layer.append(value)
            else:  # of text and vision, which may be stored as the experts of one layer
                self.common |= {*filter(None, value), sum(value)}

    def of(self, layer: str) -> set[int]:
        """The numbers that a MoE layer may have."""
        number = _LAYER_NUMBER.search(layer)
        own = int(number[1]) if number is not None else -1
        lists = [[counts[own]] if 0 <= own < len(counts) else counts for counts in self.by_layer]
        return self.common.union(*lists) - {0}
