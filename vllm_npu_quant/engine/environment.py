# SPDX-License-Identifier: Apache-2.0
"""The plugin's environment variables in vLLM's own table. Imports vllm.envs only."""

from __future__ import annotations

import functools
import os

from vllm import envs

from vllm_npu_quant import settings

__all__ = ["declare_settings"]


def declare_settings() -> None:
    """Add the plugin's environment variables to vLLM's table. Idempotent.

    vLLM warns of every VLLM_ variable that is not in its table, and with ``--fail-on-environ-validation`` refuses to start.
    The table is also part of the key of its compiled graphs, which some of these variables change. It is done even if the
    plugin is off, so a vLLM without the table is no error here; ``patches.check`` reports it.
    """
    known = getattr(envs, "environment_variables", None)
    if isinstance(known, dict):
        for name in settings.VARIABLES:
            known.setdefault(name, functools.partial(os.environ.get, name))
