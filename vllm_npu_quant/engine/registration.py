# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: quantization methods, emulated operators, the norm hook, and detection of descriptions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from vllm.logger import init_logger

from vllm_npu_quant import settings
from vllm_npu_quant.engine import patches

__all__ = ["hub_files", "register_all"]

logger = init_logger("vllm.npu_quant")

_done = False


def register_all() -> None:
    """Register everything that a vLLM process needs. Idempotent.

    What may be missing in an unknown vLLM is looked up before anything is installed, and the quantization methods, which
    claim checkpoints, come last: on an error no checkpoint is claimed and vLLM's functions are as they were.

    Raises:
        NpuQuantError: host-conflict, if internals of vLLM are not what the plugin relies on; bad-config, for a setting.
    """
    global _done
    if _done:
        return
    patches.check()
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_npu_quant.engine.config import CONFIGS
    from vllm_npu_quant.engine.loading import with_check

    if not settings.ascend_host():
        from vllm_npu_quant import emulation
        from vllm_npu_quant.engine.norm import register_norm

        settings.emulation_mode()
        emulation.register()
        register_norm()
    patches.wrap(patches.LOAD_MODEL, with_check)
    patches.wrap(patches.CREATE_MODEL_CONFIG, with_detection)
    for config in CONFIGS:
        register_quantization_config(config.method_name)(config)
    _done = True


def with_detection(create_model_config: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_model_config`` that finds the quantization method of a checkpoint if the user named none.

    vLLM looks for a quantization config in config.json only, where msModelSlim writes nothing.
    """

    def detecting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if settings.plugin_enabled():
            self.quantization = _detect(self.model, self.revision, self.quantization)
        return create_model_config(self, *args, **kwargs)

    return detecting


def _detect(model: str, revision: str | None, asked: str | None) -> str | None:
    """The quantization method for a model: what was asked for, or "modelslim" where a description says so.

    Raises:
        NpuQuantError: contradictory-evidence where a description and config.json, or what was asked for, name two formats.
    """
    from vllm_npu_quant.errors import NpuQuantError
    from vllm_npu_quant.formats.detect import contradiction, embedded_description

    named = (asked or "").lower()
    if named == "ascend":
        return asked if settings.ascend_host() and not settings.takeover() else "modelslim"
    if named == "modelslim":
        return named
    name, config = _evidence(model, revision)
    if name is None:
        return _named_beside(model, revision, asked)
    if config is not None and embedded_description(config):
        return asked
    if config is not None:
        if asked is not None:
            return asked  # vLLM compares it with config.json
        method = str(config.get("quant_method") or "")[:80]
        raise NpuQuantError([contradiction(f"quantization_config of {method!r}", name)])
    if asked is not None:
        # vLLM would quantize the integers once more, or load them as floats.
        fix = "leave quantization= out, or remove the description if it does not belong to the weight files"
        raise NpuQuantError([contradiction(f"quantization={asked[:80]!r}", name, fix=fix)])
    why = ""
    if settings.ascend_host():
        theirs, why = _left_to_vllm_ascend(model, revision, name)
        if theirs:
            logger.info("%s (%s) is left to vllm-ascend: %s", model, name, why)
            return None
    logger.info("%s is a ModelSlim checkpoint (%s): quantization=modelslim%s", model, name, f"; {why}" if why else "")
    return "modelslim"


def _left_to_vllm_ascend(model: str, revision: str | None, name: str) -> tuple[bool, str]:
    """Whether a ModelSlim checkpoint stays with vllm-ascend, which has fused paths for what it serves; and why."""
    if settings.takeover():
        return False, f"{settings.TAKEOVER}=1"
    from vllm_npu_quant.ascend.ownership import serves_modelslim

    theirs, missing = serves_modelslim(_schemes(model, revision, name))
    return theirs, "it serves all of its schemes" if theirs else f"vllm-ascend does not serve {missing}"


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
    # What this version does not serve is not a reason to take the checkpoint from vllm-ascend.
    unknown = (finding.found for finding in found.findings if finding.code in ("unknown-scheme", "unsupported-scheme"))
    return schemes | {(scheme, "linear") for scheme in unknown}


def _evidence(model: str, revision: str | None) -> tuple[str | None, Mapping[str, Any] | None]:
    """The name of the model's description file, and config.json's quantization config, where it has them.

    config.json is read only beside a description: it is vLLM's to read otherwise.
    """
    from vllm_npu_quant.checkpoint import DESCRIPTION_MAX_BYTES, find_local, read_json
    from vllm_npu_quant.formats.detect import description_name, quantization_config

    hub = [] if os.path.isdir(model) else hub_files(model, revision)
    folder = None if hub else find_local(model, revision=revision)
    name = description_name(hub or (os.listdir(folder) if folder is not None else ()))
    if name is None:
        return None, None
    if folder is None:
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

        config = get_hf_file_to_dict("config.json", model, revision)
    else:
        file = folder / "config.json"
        # It may hold a whole description itself.
        config = read_json(file, max_bytes=DESCRIPTION_MAX_BYTES) if file.is_file() else None
    return name, quantization_config(config) if isinstance(config, Mapping) else None


def _named_beside(model: str, revision: str | None, asked: str | None) -> str | None:
    """What was asked for, or our method where config.json is silent and a file of AutoGPTQ or AutoAWQ is beside it.

    vLLM does not look for these files; with quantization="gptq" it would take its own method, without asking ours.
    """
    from vllm_npu_quant.checkpoint import find_local
    from vllm_npu_quant.engine.config import CONFIGS
    from vllm_npu_quant.formats.detect import detect
    from vllm_npu_quant.formats.open import served_name

    folder = find_local(model, revision=revision)
    if folder is None or not {"quantize_config.json", "quant_config.json"} & set(os.listdir(folder)):
        return asked
    detection = detect(folder)
    ours = next((config for config in CONFIGS if config.format_name == served_name(detection.format)), None)
    if not detection.asks or ours is None:
        return asked
    if asked is None or asked.lower() in {ours.method_name, *ours.claims, *ours.aliases}:
        logger.info(
            "%s is a checkpoint of %s (%s): quantization=%s", model, detection.format, detection.file, ours.method_name
        )
        return ours.method_name
    return asked


def hub_files(model: str, revision: str | None) -> list[str]:
    """The names of a hub model's files; none where the hub is not reached, which is vLLM's to report."""
    from vllm.transformers_utils.repo_utils import list_repo_files

    try:
        return list_repo_files(model, revision=revision)
    except Exception as error:
        logger.debug("No list of files for %s: %s", model, error)
        return []
