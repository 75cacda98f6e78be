# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: quantization methods, emulated operators, the norm hook, and detection of descriptions."""

from __future__ import annotations

import functools
from typing import Any

from vllm_npu_quant import settings

__all__ = ["register_all"]

_done = False


def register_all() -> None:
    """Everything that a vLLM process needs. Idempotent."""
    global _done
    if _done:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_npu_quant.engine.config import CONFIGS
    from vllm_npu_quant.engine.loading import wrap_load_model

    if not settings.ascend_host():
        from vllm_npu_quant import emulation
        from vllm_npu_quant.engine.norm import register_norm

        emulation.register()
        register_norm()
    for config in CONFIGS:
        register_quantization_config(config.method_name)(config)
    _wrap_create_model_config()
    wrap_load_model()
    _done = True


def _wrap_create_model_config() -> None:
    """Let ``EngineArgs.create_model_config`` find a ModelSlim description where the user named no method.

    vLLM looks for a quantization config in config.json only, where msModelSlim writes nothing.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_npu_quant.engine.detection import detect_quantization

    original = EngineArgs.create_model_config
    if getattr(original, "_npu_quant", False):
        return

    @functools.wraps(original)
    def create_model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if settings.plugin_enabled():
            self.quantization = detect_quantization(self)
        return original(self, *args, **kwargs)

    create_model_config._npu_quant = True  # type: ignore[attr-defined]
    EngineArgs.create_model_config = create_model_config  # type: ignore[method-assign]
