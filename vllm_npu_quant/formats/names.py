# SPDX-License-Identifier: Apache-2.0
"""Faults of tensor names that no model has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_npu_quant.checkpoint.text import shown_name
from vllm_npu_quant.errors import Finding

__all__ = ["repeated_prefix"]

#: Components that no model class nests directly in itself. Others may be (vision_tower.vision_tower), though not three times.
_NEVER_TWICE = frozenset({"language_model", "model", "llm"})

#: The most components of a prefix that are compared, and the components that are repeated together.
_MAX_COMPONENTS = 16
_RUNS = (1, 2)


def repeated_prefix(tensors: Iterable[str]) -> Finding | None:
    """The finding for decoder layers whose prefix repeats itself, as exporters write that save a part of a wrapped model.

    Linear in the names: each prefix is looked at once.
    """
    seen: set[str] = set()
    for name in tensors:
        prefix, layers, _ = name.partition(".layers.")
        if not layers or prefix in seen or ".lora_" in name:  # PEFT's adapters begin with base_model.model.model
            continue
        seen.add(prefix)
        right = _once(prefix.split(".")[:_MAX_COMPONENTS])
        if right is not None:
            wrong = shown_name(prefix)
            return Finding(
                "bad-config",
                f"the names of the layers begin with {wrong}, which repeats itself: no model has such names, and vLLM would "
                "not find the layers",
                layer=shown_name(name.rpartition(".")[0]),
                expected=f"{shown_name(right)}.layers",
                found=f"{wrong}.layers",
                fix=f"rename the tensors from {wrong} to {shown_name(right)} in the weight files, their index and the rules "
                "of the config, or export the checkpoint again with a newer release of its producer",
            )
    return None


def _once(parts: Sequence[str]) -> str | None:
    """A prefix with its repetition removed; None if it has none."""
    for length in _RUNS:
        for start in range(len(parts) - length):
            run = tuple(parts[start : start + length])
            stop = start + length
            while tuple(parts[stop : stop + length]) == run:
                stop += length
            times = (stop - start) // length
            if times >= 3 or (times == 2 and (length > 1 or run[0] in _NEVER_TWICE)):
                return ".".join((*parts[: start + length], *parts[stop:]))
    return None
