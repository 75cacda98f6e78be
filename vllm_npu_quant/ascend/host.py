# SPDX-License-Identifier: Apache-2.0
"""The host according to vllm-ascend: the chip, its settings for weights, and settings that cannot be served.

Nothing in this module touches the device: vLLM forks or spawns its workers, and a process that has initialized the NPU
must not fork.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_npu_quant.errors import Finding

__all__ = ["ascend_config", "attribute", "chip", "findings", "nz_wanted", "refused"]

#: vllm-ascend's names of chip families, and ours (those of the command line's --device).
_CHIPS = {"A2": "a2", "A3": "a3", "A5": "a5", "_310P": "310p"}


def attribute(module: str, name: str) -> Any:
    """An attribute of one of vllm-ascend's modules; None if this release lacks the module or the attribute."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def chip() -> str | None:
    """The chip that the installed vllm-ascend was built for: "a2", "a3", "a5" or "310p"; None if it does not say.

    It is written into vllm-ascend when it is built, and vllm-ascend's workers refuse to start on another one. Asking
    torch_npu instead would initialize the device.
    """
    family = attribute("vllm_ascend._build_info", "__device_type__")
    if family is None:  # vllm-ascend before 0.11
        name = str(attribute("vllm_ascend._build_info", "__soc_version__")).upper()
        family = "_310P" if "310P" in name else "A2" if "910B" in name else None
    return _CHIPS.get(str(family))


def ascend_config() -> Any:
    """vllm-ascend's configuration (``--additional-config``); None if it has none, or not yet."""
    get_ascend_config = attribute("vllm_ascend.ascend_config", "get_ascend_config")
    if get_ascend_config is None:
        return None
    try:
        return get_ascend_config()
    except RuntimeError:  # it is not initialized
        return None


def nz_wanted() -> bool:
    """Whether weights may be kept in the NPU's own layout: vllm-ascend's weight_nz_mode; 0 for sleep mode."""
    return bool(getattr(ascend_config(), "weight_nz_mode", 1))


def findings() -> list[Finding]:
    """vllm-ascend's settings that are incompatible with every layer of this project."""
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
