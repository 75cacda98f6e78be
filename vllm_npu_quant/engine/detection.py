# SPDX-License-Identifier: Apache-2.0
"""Which quantization method a model gets where config.json does not say, and how the engine opens its checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from vllm_npu_quant import settings
from vllm_npu_quant.checkpoint import Checkpoint, is_path, open_checkpoint
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.formats.detect import (
    contradiction,
    description_name,
    detect_files,
    embedded_description,
    quantization_config,
)

__all__ = ["detect_quantization", "open_model_checkpoint"]

logger = init_logger("vllm.npu_quant")


@dataclass(frozen=True)
class _HubAccess:
    """What the user gave vLLM for a hub: ``--hf-token`` and ``--download-dir``."""

    token: str | bool | None = None
    download_dir: str | None = None


#: By model, for this process: vLLM hands neither to ``maybe_update_config``.
_ACCESS: dict[str, _HubAccess] = {}


def detect_quantization(args: Any) -> str | None:
    """The quantization method for the model of an ``EngineArgs``: what it asks for, or ours where the checkpoint says so.

    Raises:
        NpuQuantError: contradictory-evidence where a ModelSlim description and config.json, or what was asked for, name
            two formats.
    """
    _ACCESS[args.model] = _HubAccess(args.hf_token, args.download_dir)
    return _detect(args.model, args.revision, args.quantization)


def open_model_checkpoint(model: str, revision: str | None, *, headers: bool = True) -> Checkpoint:
    """A model's checkpoint, with the token and the download folder that vLLM was started with.

    Draft models do not come through ``EngineArgs``: theirs are those of the engine that is being built.

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
    named = (asked or "").lower()
    if named == "ascend":
        return asked if settings.ascend_host() and not settings.takeover() else "modelslim"
    if named == "modelslim":
        return named
    checkpoint = _list(model, revision)
    if checkpoint is None:
        return asked
    name = description_name(checkpoint.names)
    if name is None:
        return _named_beside(checkpoint, model, asked)
    # config.json is read only beside a description: it is vLLM's to read otherwise.
    config = quantization_config(checkpoint.read_json("config.json")) if "config.json" in checkpoint.names else None
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
        theirs, why = _left_to_vllm_ascend(checkpoint, name)
        if theirs:
            logger.info("%s (%s) is left to vllm-ascend: %s", model, name, why)
            return None
    logger.info("%s is a ModelSlim checkpoint (%s): quantization=modelslim%s", model, name, f"; {why}" if why else "")
    return "modelslim"


def _list(model: str, revision: str | None) -> Checkpoint | None:
    """A model's files, without their headers; None where vLLM has to find out by itself whether it can load the model."""
    if not os.path.isdir(model) and is_path(model):
        return None  # one file, a bucket, a path that does not exist
    try:
        return open_model_checkpoint(model, revision, headers=False)
    except NpuQuantError as error:
        message = "%s cannot be looked at, so it is not known whether it is a ModelSlim checkpoint: %s"
        logger.warning(message, model, error)
        return None


def _left_to_vllm_ascend(checkpoint: Checkpoint, name: str) -> tuple[bool, str]:
    """Whether a ModelSlim checkpoint stays with vllm-ascend, which has fused paths for what it serves; and why."""
    if settings.takeover():
        return False, f"{settings.TAKEOVER}=1"
    from vllm_npu_quant.ascend.ownership import serves_modelslim

    theirs, missing = serves_modelslim(_schemes(checkpoint, name))
    return theirs, "it serves all of its schemes" if theirs else f"vllm-ascend does not serve {missing}"


def _schemes(checkpoint: Checkpoint, name: str) -> set[tuple[str, str]]:
    """(scheme, "linear" or "moe") of every quantized layer that a description lists."""
    from vllm_npu_quant.formats.modelslim import ModelSlimFormat

    found = ModelSlimFormat.from_description(checkpoint.read_json(name), name)
    schemes = {(entry.spec.scheme, "linear") for entry in found.layers.values() if not entry.spec.is_float}
    for experts in found.experts.values():
        entries = (experts.gate, experts.up, experts.down)
        schemes |= {(entry.spec.scheme, "moe") for entry in entries if not entry.spec.is_float}
    # What this version does not serve is not a reason to take the checkpoint from vllm-ascend.
    unknown = (finding.found for finding in found.findings if finding.code in ("unknown-scheme", "unsupported-scheme"))
    return schemes | {(scheme, "linear") for scheme in unknown}


def _named_beside(checkpoint: Checkpoint, model: str, asked: str | None) -> str | None:
    """What was asked for, or our method where config.json is silent and a file of AutoGPTQ or AutoAWQ is beside it.

    vLLM does not look for these files; with quantization="gptq" it would take its own method, without asking ours.
    """
    from vllm_npu_quant.engine.config import CONFIGS
    from vllm_npu_quant.formats.open import served_name

    if {"quantize_config.json", "quant_config.json"}.isdisjoint(checkpoint.names):
        return asked
    detection = detect_files(checkpoint.names, checkpoint.read_json)
    ours = next((config for config in CONFIGS if config.format_name == served_name(detection.format)), None)
    if not detection.asks or ours is None:
        return asked
    if asked is None or asked.lower() in {ours.method_name, *ours.claims, *ours.aliases}:
        logger.info(
            "%s is a checkpoint of %s (%s): quantization=%s", model, detection.format, detection.file, ours.method_name
        )
        return ours.method_name
    return asked
