# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: quantization methods, emulated operators, the norm hook, and detection of formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_npu_quant import settings
from vllm_npu_quant.engine import patches

__all__ = ["register_all"]

_done = False


def register_all() -> None:
    """Register everything that a vLLM process needs. Idempotent.

    Internals that an unknown vLLM may lack are looked up before anything is installed, and the quantization methods, which
    claim checkpoints, come last: after an error no checkpoint is claimed and vLLM is unchanged.

    Raises:
        NpuQuantError: host-conflict, if internals of vLLM are not what the plugin relies on; bad-config, for a setting.
    """
    global _done
    if _done:
        return
    patches.check()
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_npu_quant.engine.config import config_classes
    from vllm_npu_quant.engine.loading import with_check
    from vllm_npu_quant.engine.reloading import with_finish, with_source_check, with_start

    classes = config_classes()
    if not settings.ascend_host():
        from vllm_npu_quant import emulation
        from vllm_npu_quant.engine.norm import register_norm

        settings.emulation_mode()
        emulation.register()
        register_norm()
    patches.wrap(patches.LOAD_MODEL, with_check)
    patches.wrap(patches.CREATE_MODEL_CONFIG, with_detection)
    patches.wrap(patches.START_RELOAD, with_start)
    patches.wrap(patches.FINISH_RELOAD, with_finish)
    patches.wrap(patches.RELOAD_WEIGHTS, with_source_check)
    for config in classes:
        register_quantization_config(config.declaration.method_name)(config)
    _done = True


def with_detection(create_model_config: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.create_model_config`` to find the quantization method of a checkpoint if the user named none.

    vLLM looks for a quantization config in config.json only; msModelSlim writes none there. What vLLM refuses, or would fail
    to load, is refused with the reason.
    """

    def detecting(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_npu_quant.engine.detection import detect_quantization

        if not settings.plugin_enabled():
            return create_model_config(self, *args, **kwargs)
        detected = detect_quantization(self)
        self.quantization = detected.method
        try:
            config = create_model_config(self, *args, **kwargs)
        except ValueError as error:
            detected.explain(error)
            raise
        detected.refuse(config)
        return config

    return detecting
