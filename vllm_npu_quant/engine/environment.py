# SPDX-License-Identifier: Apache-2.0
"""Our environment variables in vLLM's eyes. Imports vllm.envs only."""

from __future__ import annotations

import functools
import os

from vllm import envs

from vllm_npu_quant import settings

__all__ = ["declare_settings"]


def declare_settings() -> None:
    """Tell vLLM about our environment variables. Idempotent.

    It warns of every VLLM_ variable that is not in its table, and with ``--fail-on-environ-validation`` refuses to start.
    The table also makes the key of its cache of compiled graphs, which some of ours change.
    """
    known = getattr(envs, "environment_variables", None)
    if isinstance(known, dict):
        for name in settings.VARIABLES:
            known.setdefault(name, functools.partial(os.environ.get, name))
