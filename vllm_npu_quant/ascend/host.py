# SPDX-License-Identifier: Apache-2.0
"""What vllm-ascend says about the host: the chip, its settings that concern weights, and those that nothing here can serve.

Nothing in this module touches the device: vLLM forks or spawns its workers, and a process that has initialized the NPU
must not fork.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_npu_quant.errors import Finding

__all__ = ["ascend_config", "chip", "findings", "nz_wanted"]

#: vllm-ascend's names of chip families, and ours (those of the command line's --device).
_CHIPS = {"A2": "a2", "A3": "a3", "A5": "a5", "_310P": "310p"}


def chip() -> str | None:
    """The chip that the installed vllm-ascend was built for: "a2", "a3", "a5" or "310p"; None where nothing says.

    It is written into vllm-ascend when it is built, and vllm-ascend's workers refuse to start on another one. Asking
    torch_npu instead would initialize the device.
    """
    try:
        build = import_module("vllm_ascend._build_info")
    except ImportError:
        return None
    family = getattr(build, "__device_type__", None)
    if family is None:  # vllm-ascend before 0.11
        name = str(getattr(build, "__soc_version__", "")).upper()
        family = "_310P" if "310P" in name else "A2" if "910B" in name else None
    return _CHIPS.get(str(family))


def ascend_config() -> Any:
    """vllm-ascend's configuration (``--additional-config``); None where it has none, or not yet."""
    try:
        return import_module("vllm_ascend.ascend_config").get_ascend_config()
    except (ImportError, RuntimeError):
        return None


def nz_wanted() -> bool:
    """Whether weights may be kept in the NPU's own layout: vllm-ascend's weight_nz_mode, which sleep mode wants to be 0."""
    return bool(getattr(ascend_config(), "weight_nz_mode", 1))


def findings() -> list[Finding]:
    """What of vllm-ascend's configuration no layer of this project can be served with."""
    xlite = getattr(ascend_config(), "xlite_graph_config", None)
    if not getattr(xlite, "enabled", False):
        return []
    return [refused("xlite_graph_config", "a runtime that takes every quantized model for its own W8A8 one")]


def refused(setting: str, what: str) -> Finding:
    """The finding for a setting of ``--additional-config``."""
    return Finding(
        "unsupported-scheme",
        f"these layers cannot be served with vllm-ascend's {setting}: it means {what}",
        expected=f"an --additional-config without {setting}",
        found=setting,
        fix=f"leave {setting} out of --additional-config",
    )
