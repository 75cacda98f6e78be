# SPDX-License-Identifier: Apache-2.0
"""Detection of the quantization method if config.json names none, and access to the engine's checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from vllm_npu_quant import settings
from vllm_npu_quant.checkpoint import Checkpoint, is_path, open_checkpoint
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.declaration import Format, find_format, formats
from vllm_npu_quant.formats.detect import contradiction, detect_files, file_beside, quantization_config

__all__ = ["detect_quantization", "names_vllm_ascend", "open_model_checkpoint"]

logger = init_logger("vllm.npu_quant")

#: The method of vllm-ascend that reads ModelSlim's checkpoints.
VLLM_ASCEND = "ascend"


@dataclass(frozen=True)
class _HubAccess:
    """The user's settings for a hub: ``--hf-token`` and ``--download-dir``."""

    token: str | bool | None = None
    download_dir: str | None = None


#: By model, for this process: vLLM passes neither to ``maybe_update_config``.
_ACCESS: dict[str, _HubAccess] = {}


def detect_quantization(args: Any) -> str | None:
    """The quantization method for an ``EngineArgs``: the requested one, or ours if the checkpoint calls for it.

    Raises:
        NpuQuantError: contradictory-evidence if a ModelSlim description contradicts config.json or the requested method.
    """
    _ACCESS[args.model] = _HubAccess(args.hf_token, args.download_dir)
    return _detect(args.model, args.revision, args.quantization)


def open_model_checkpoint(model: str, revision: str | None, *, headers: bool = True) -> Checkpoint:
    """A model's checkpoint, with the token and the download folder that vLLM was started with.

    Draft models have no ``EngineArgs``: they use the settings of the engine that is being built.

    Raises:
        NpuQuantError: unreadable-file, as in ``checkpoint.open_checkpoint``.
    """
    access = _ACCESS.get(model)
    if access is None:
        access = _HubAccess()
        config = get_current_vllm_config_or_none()
        if config is not None and config.model_config is not None:
            access = _HubAccess(config.model_config.hf_token, config.load_config.download_dir)
    return open_checkpoint(
        model, revision=revision, token=access.token, download_dir=access.download_dir, headers=headers
    )


def _detect(model: str, revision: str | None, asked: str | None) -> str | None:
    named = next((one for one in formats() if one.decisive and asked is not None and one.answers_to(asked)), None)
    if named is not None:
        return asked if names_vllm_ascend(asked) else named.method_name
    checkpoint = _list(model, revision)
    if checkpoint is None:
        return asked
    beside = file_beside(checkpoint.names)
    if beside is None:
        return asked
    if not beside[0].decisive:
        return _named_beside(checkpoint, model, asked)
    declaration, name = beside
    # config.json is read only beside a description; otherwise vLLM reads it.
    config = quantization_config(checkpoint.read_json("config.json")) if "config.json" in checkpoint.names else None
    if config is not None and declaration.serves(config):
        bare = config.get("quant_method") == VLLM_ASCEND and not declaration.is_complete(config)
        left = asked is None and bare and _is_left_with_bare_config(declaration, checkpoint, name)
        return VLLM_ASCEND if left else asked
    if config is not None:
        if asked is not None:
            return asked  # vLLM compares it with config.json
        method = str(config.get("quant_method") or "")[:80]
        raise NpuQuantError([contradiction(f"quantization_config of {method!r}", beside)])
    if asked is not None:
        # vLLM would quantize the integers once more, or load them as floats.
        fix = "leave quantization= out, or remove the description if it does not belong to the weight files"
        raise NpuQuantError([contradiction(f"quantization={asked[:80]!r}", beside, fix=fix)])
    why = ""
    if settings.ascend_host() and declaration.unserved_by_vllm_ascend is not None:
        why = f"{settings.TAKEOVER}=1"
        if not settings.takeover():
            missing = declaration.unserved_by_vllm_ascend(checkpoint.read_json(name), name)
            if not missing:
                logger.info("%s (%s) is left to vllm-ascend: it serves all of its schemes", model, name)
                return None
            why = f"vllm-ascend does not serve {missing}"
    method = declaration.method_name
    title = declaration.title or declaration.name
    logger.info("%s is a %s checkpoint (%s): quantization=%s%s", model, title, name, method, f"; {why}" if why else "")
    return method


def names_vllm_ascend(quantization: str | None) -> bool:
    """Whether a user means vllm-ascend by ``quantization=``: it is its name for ModelSlim's checkpoints."""
    named = quantization is not None and quantization.lower() == VLLM_ASCEND
    return named and settings.ascend_host() and not settings.takeover()


def _is_left_with_bare_config(declaration: Format, checkpoint: Checkpoint, name: str) -> bool:
    """Whether vllm-ascend reads the description beside a config.json that only names the format, and serves all of it."""
    if declaration.unserved_by_vllm_ascend is None or not names_vllm_ascend(VLLM_ASCEND):
        return False
    from vllm_npu_quant.ascend.ownership import accepts_bare_config

    return accepts_bare_config() and not declaration.unserved_by_vllm_ascend(checkpoint.read_json(name), name)


def _list(model: str, revision: str | None) -> Checkpoint | None:
    """A model's files, without their headers; None if only vLLM can tell whether the model can be loaded."""
    if not os.path.isdir(model) and is_path(model):
        return None  # one file, a bucket, a path that does not exist
    try:
        return open_model_checkpoint(model, revision, headers=False)
    except NpuQuantError as error:
        message = "%s cannot be looked at, so it is not known whether it is a ModelSlim checkpoint: %s"
        logger.warning(message, model, error)
        return None


def _named_beside(checkpoint: Checkpoint, model: str, asked: str | None) -> str | None:
    """The requested method, or ours if config.json is silent and a file beside it describes the quantization.

    vLLM does not look for these files; with quantization="gptq" it would use its own method.
    """
    detection = detect_files(checkpoint.names, checkpoint.read_json)
    declaration = find_format(detection.format)
    if not detection.asks or declaration is None or (asked is not None and not declaration.answers_to(asked)):
        return asked
    method = declaration.method_name
    logger.info("%s is a checkpoint of %s (%s): quantization=%s", model, detection.format, detection.file, method)
    return method
