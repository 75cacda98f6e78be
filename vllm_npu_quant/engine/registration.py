# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: quantization methods, emulated operators, the norm hook, and detection of descriptions."""

from __future__ import annotations

import functools
import os
from typing import Any

from vllm.logger import init_logger

from vllm_npu_quant import settings

__all__ = ["register_all"]

logger = init_logger("vllm.npu_quant")

_done = False


def register_all() -> None:
    """Everything that a vLLM process needs. Idempotent."""
    global _done
    if _done:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_npu_quant.engine.config import CONFIGS

    if not settings.ascend_host():
        from vllm_npu_quant import emulation
        from vllm_npu_quant.engine.norm import register_norm

        emulation.register()
        register_norm()
    for config in CONFIGS:
        register_quantization_config(config.method_name)(config)
    _wrap_create_model_config()
    _done = True


def _wrap_create_model_config() -> None:
    """Let ``EngineArgs.create_model_config`` find a ModelSlim description where the user named no method.

    vLLM looks for a quantization config in config.json only, where msModelSlim writes nothing.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_model_config
    if getattr(original, "_npu_quant", False):
        return

    @functools.wraps(original)
    def create_model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if settings.plugin_enabled():
            self.quantization = _detect(self.model, self.revision, self.quantization)
        return original(self, *args, **kwargs)

    create_model_config._npu_quant = True  # type: ignore[attr-defined]
    EngineArgs.create_model_config = create_model_config  # type: ignore[method-assign]


def _detect(model: str, revision: str | None, asked: str | None) -> str | None:
    """The quantization method for a model: what was asked for, or "modelslim" where a description says so.

    On an Ascend host a checkpoint whose schemes vllm-ascend all serves stays with vllm-ascend, which detects it itself.
    """
    if asked is not None:
        if asked.lower() == "ascend" and (not settings.ascend_host() or settings.takeover()):
            return "modelslim"
        return asked
    name = _description_of(model, revision)
    if name is None:
        return None
    why = "VLLM_NPU_QUANT_TAKEOVER=1" if settings.takeover() else ""
    if settings.ascend_host() and not why:
        from vllm_npu_quant.ascend.ownership import serves_modelslim

        theirs, why = serves_modelslim(_schemes(model, revision, name))
        if theirs:
            logger.info("%s (%s) is left to vllm-ascend, which serves all of its schemes", model, name)
            return None
        why = f"vllm-ascend does not serve {why}"
    logger.info("%s is a ModelSlim checkpoint (%s): quantization=modelslim%s", model, name, f"; {why}" if why else "")
    return "modelslim"


def _schemes(model: str, revision: str | None, name: str) -> set[tuple[str, str]]:
    """(scheme, "linear" or "moe") of every quantized layer that a description lists."""
    from vllm_npu_quant.checkpoint import DESCRIPTION_MAX_BYTES, read_json
    from vllm_npu_quant.formats.modelslim import ModelSlimFormat

    path = os.path.join(model, name)
    if not os.path.isdir(model):
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(model, name, revision=revision)
    found = ModelSlimFormat.from_description(read_json(path, max_bytes=DESCRIPTION_MAX_BYTES), name)
    schemes = {(entry.spec.scheme, "linear") for entry in found.layers.values() if not entry.spec.is_float}
    for experts in found.experts.values():
        entries = (experts.gate, experts.up, experts.down)
        schemes |= {(entry.spec.scheme, "moe") for entry in entries if not entry.spec.is_float}
    # What this version does not know is not a reason to take the checkpoint from vllm-ascend.
    unknown = (finding.found for finding in found.findings if finding.code == "unknown-scheme")
    return schemes | {(scheme, "linear") for scheme in unknown}


def _description_of(model: str, revision: str | None) -> str | None:
    """The name of the model's description file, where it has one."""
    from vllm_npu_quant.checkpoint import read_json
    from vllm_npu_quant.formats.detect import description_name, quantization_config

    if os.path.isdir(model):
        name = description_name(os.listdir(model))
        config = os.path.join(model, "config.json")
        if name is None or not os.path.isfile(config):
            return name
        # config.json then decides through override_quantization_method; detect() says where the two contradict.
        if quantization_config(read_json(config, max_bytes=256 << 20)) is not None:
            from vllm_npu_quant.formats.detect import detect

            detect(model)
            return None
        return name
    return _hub_description(model, revision)


def _hub_description(model: str, revision: str | None) -> str | None:
    """The same for a hub id: from its list of files, or from the cache where the hub is not reached."""
    from vllm.transformers_utils.repo_utils import list_repo_files

    from vllm_npu_quant.formats.detect import description_name

    try:
        names = list_repo_files(model, revision=revision)
    except Exception as error:
        logger.debug("No list of files for %s: %s", model, error)
        return None
    return description_name(names)
