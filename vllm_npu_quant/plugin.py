# SPDX-License-Identifier: Apache-2.0
"""The two entry points that vLLM calls. Importing this module imports neither torch nor vllm."""

from __future__ import annotations

import logging

from vllm_npu_quant import settings
from vllm_npu_quant.errors import NpuQuantError

__all__ = ["platform", "register"]

logger = logging.getLogger("vllm.npu_quant")

_PLATFORM = "vllm_npu_quant.platform.NpuEmulationPlatform"


def platform() -> str | None:
    """The platform class for hosts without an NPU, or None if another platform owns the host.

    vLLM refuses to start if two out-of-tree platforms answer, and an out-of-tree platform takes precedence over the built-in
    ones. So this answers only if vLLM is a CPU build and vllm-ascend is not installed. It must not import vLLM, which is
    still resolving its platform.
    """
    try:
        wanted = settings.plugin_mode() != "0"
    except NpuQuantError:
        return None  # register() reports it
    return _PLATFORM if wanted and settings.cpu_build() and not settings.ascend_host() else None


def register() -> None:
    """Register the quantization methods with vLLM. Called in every vLLM process, any number of times.

    An exception here would stop vLLM for every model, so it is logged instead, and the plugin stays off. Registration is all
    or nothing: see ``registration.register_all``.
    """
    try:
        from vllm_npu_quant.engine.environment import declare_settings

        declare_settings()
        if not settings.plugin_enabled():
            return
        from vllm_npu_quant.engine.registration import register_all

        register_all()
    except Exception:
        logger.exception(
            "vllm-npu-quant could not be registered and stays off: vLLM serves what its own quantization methods can, and "
            "no other quantized checkpoint"
        )
