# SPDX-License-Identifier: Apache-2.0
"""Comparing a quantized mixture of experts with its float twin, token by token.

The routers of the tiny models are random: where two experts are nearly tied, a change of the last bit sends a token to
another expert, whose output is as far away as that of another model. That says nothing about the layers. So the float twin's
choices are replayed in the quantized run, and the choices that it would have made itself are counted. Runs of several ranks
are in processes of their own; there the median over the positions is compared, which a few such tokens do not move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tests.e2e.yardstick import TOKENS, Run

__all__ = ["MOST_CHANGED", "Choices", "changed_share", "median_error", "routers"]

Choices = list[tuple[torch.Tensor, torch.Tensor]]

#: Share of the tokens that may choose other experts than in the twin.
MOST_CHANGED = 0.08


@contextmanager
def routers(replay: Choices | None = None) -> Iterator[Choices]:
    """Note what every router chooses, in the order of the calls; give out what was noted before instead."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    chosen: Choices = []
    original = BaseRouter.select_experts

    def select_experts(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        chosen.append((found[0].clone(), found[1].clone()))
        known = replay[len(chosen) - 1] if replay is not None and len(chosen) <= len(replay) else None
        # After the prompt, the greedy continuation may differ.
        if known is None or known[1].shape != found[1].shape or found[1].shape[0] < len(TOKENS):
            return found
        return known[0].clone(), known[1].clone(), *found[2:]

    BaseRouter.select_experts = select_experts  # type: ignore[method-assign]
    try:
        yield chosen
    finally:
        BaseRouter.select_experts = original  # type: ignore[method-assign]


def changed_share(chosen: Choices, reference: Choices) -> float:
    """The share of the prompt's tokens that chose other experts in at least one layer, given the same choices before."""
    prompts = [(a[1], b[1]) for a, b in zip(chosen, reference, strict=False) if a[1].shape[0] >= len(TOKENS)]
    assert prompts
    differs = [(a.sort(dim=1).values != b.sort(dim=1).values).any(dim=1) for a, b in prompts]
    return float(torch.stack(differs).any(dim=0).float().mean())


def median_error(result: Run, reference: Run) -> float:
    difference = np.linalg.norm(result.logprobs - reference.logprobs, axis=1)
    return float(np.median(difference / np.linalg.norm(reference.logprobs, axis=1)))
