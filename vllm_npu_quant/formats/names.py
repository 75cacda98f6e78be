# SPDX-License-Identifier: Apache-2.0
"""Faults of tensor names that no model has."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_npu_quant.checkpoint.text import shown_name
from vllm_npu_quant.errors import Finding

__all__ = ["repeated_prefix"]

#: Components that no model class nests in itself; others may occur twice in a row (vision_tower.vision_tower).
_NEVER_TWICE = frozenset({"language_model", "model", "text_model", "layers", "visual", "llm", "backbone"})


def repeated_prefix(tensors: Iterable[str]) -> Finding | None:
    """The finding for names whose prefix repeats a component, as exporters write that save a wrapped model's submodule.

    Linear in the names: names of one layer share their prefix, which is looked at once.
    """
    seen: set[str] = set()
    for name in tensors:
        prefix = name.partition(".layers.")[0]
        if prefix == name or prefix in seen:
            continue
        seen.add(prefix)
        parts = prefix.split(".")
        for place, part in enumerate(parts):
            times = next((n for n, other in enumerate(parts[place:]) if other != part), len(parts) - place)
            if times >= 3 or (times == 2 and part in _NEVER_TWICE):
                right = ".".join((*parts[:place], part, *parts[place + times :]))
                return Finding(
                    "bad-config",
                    f"the tensors' names begin with {shown_name(prefix)}, which repeats {shown_name(part)}: no model has "
                    "such names, and vLLM would find none of these layers",
                    layer=shown_name(name.rpartition(".")[0]),
                    expected=f"{shown_name(right)}.layers",
                    found=f"{shown_name(prefix)}.layers",
                    fix=f"rename the tensors from {shown_name(prefix)} to {shown_name(right)}, in the weight files, their "
                    "index and the config's rules, or export the checkpoint again with a newer release of its producer",
                )
    return None
