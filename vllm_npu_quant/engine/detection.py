# SPDX-License-Identifier: Apache-2.0
"""Detection of the quantization method if config.json names none, true reasons where vLLM serves a checkpoint with no method
of ours, and access to the engine's checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from vllm_npu_quant import settings
from vllm_npu_quant.checkpoint import Checkpoint, is_path, open_checkpoint
from vllm_npu_quant.checkpoint.json_files import check_depth
from vllm_npu_quant.engine import platforms
from vllm_npu_quant.errors import NpuQuantError, raise_findings
from vllm_npu_quant.formats.declaration import Format, find_format, formats
from vllm_npu_quant.formats.detect import Detection, contradiction, detect_files, file_beside, quantization_part
from vllm_npu_quant.formats.foreign import find_foreign, unserved
from vllm_npu_quant.formats.leftovers import is_consolidated, refuse_leftovers
from vllm_npu_quant.formats.open import describe_checkpoint, detect_checkpoint

__all__ = ["Detected", "detect_quantization", "names_vllm_ascend", "open_model_checkpoint"]

logger = init_logger("vllm.npu_quant")

#: The method of vllm-ascend that reads ModelSlim's checkpoints.
VLLM_ASCEND = "ascend"
#: vLLM's ``--load-format`` values with which it prefers Mistral's consolidated files, if there are any.
_MISTRAL_FORMATS = ("auto", "mistral")


@dataclass(frozen=True)
class _HubAccess:
    """The user's settings for a checkpoint: ``--hf-token``, ``--download-dir`` and ``--load-format``."""

    token: str | bool | None = None
    download_dir: str | None = None
    load_format: str = "auto"


#: By model, for this process: vLLM passes none to ``maybe_update_config``.
_ACCESS: dict[str, _HubAccess] = {}


@dataclass(frozen=True)
class Detected:
    """A model as it was detected before vLLM reads its config.

    Attributes:
        method: the quantization method to pass to vLLM: the requested one, or ours if the checkpoint calls for it.
        checkpoint: the model's files, whose headers may not be read; None if only vLLM can open the model.
        detection: for a checkpoint that no format of ours serves, and that may be quantized; else None.
    """

    method: str | None
    checkpoint: Checkpoint | None = None
    detection: Detection | None = None

    def explain(self, error: ValueError) -> None:
        """Replace vLLM's refusal of a checkpoint's quantization by the one that says what it is and what to do.

        Raises:
            NpuQuantError: if the error is about the quantization, and the checkpoint is of a known kind.
        """
        detection = self.detection
        if detection is not None and find_foreign(detection.config) is not None and "quantization" in str(error):
            raise NpuQuantError([unserved(detection.config, detection.file)]) from error

    def refuse(self, model_config: Any) -> None:
        """Refuse, before weights are read, a checkpoint that vLLM would fail to load.

        Such a checkpoint is one that vLLM takes for a float one, or FP8 for which vLLM itself has no operators here. Methods
        of vLLM that work and those of other plugins are left alone.

        Raises:
            NpuQuantError: with the reason.
        """
        detection, checkpoint, method = self.detection, self.checkpoint, model_config.quantization
        if detection is None or checkpoint is None:
            return
        foreign = find_foreign(detection.config)
        if method is None:
            _read_headers(checkpoint, model_config.model)
            raise_findings(describe_checkpoint(checkpoint, detection).findings)
        elif foreign is not None:
            ours = any(one.method_name == method for one in formats())  # by what vLLM made of params.json
            if ours or (foreign.needs_fp8 and platforms.lacks_fp8_of(method)):
                raise NpuQuantError([unserved(detection.config, detection.file)])


def detect_quantization(args: Any) -> Detected:
    """Detect the quantization method for an ``EngineArgs``.

    Raises:
        NpuQuantError: contradictory-evidence if a ModelSlim description contradicts config.json or the requested method;
            unreadable-file for a folder that holds an adapter, and if config.json is nested more deeply than vLLM can read.
    """
    _ACCESS[args.model] = _HubAccess(args.hf_token, args.download_dir, str(args.load_format))
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
            load = config.load_config
            access = _HubAccess(config.model_config.hf_token, load.download_dir, str(load.load_format))
    checkpoint = open_checkpoint(
        model, revision=revision, token=access.token, download_dir=access.download_dir, headers=headers
    )
    if access.load_format not in _MISTRAL_FORMATS and any(map(is_consolidated, checkpoint.files)):
        checkpoint.read_headers(consolidated=False)
    return checkpoint


def _read_headers(checkpoint: Checkpoint, model: str) -> None:
    """Read the headers of the files that vLLM loads with the user's ``--load-format``."""
    access = _ACCESS.get(model, _HubAccess())
    checkpoint.read_headers(consolidated=access.load_format in _MISTRAL_FORMATS)


def _detect(model: str, revision: str | None, asked: str | None) -> Detected:
    named = next((one for one in formats() if one.decisive and asked is not None and one.answers_to(asked)), None)
    if named is not None:
        return Detected(asked if names_vllm_ascend(asked) else named.method_name)
    checkpoint = _list(model, revision)
    if checkpoint is None:
        return Detected(asked)
    if checkpoint.has_values and "config.json" in checkpoint.names:
        check_depth(checkpoint.path("config.json"), file="config.json")  # vLLM's parser has no limit
    beside = file_beside(checkpoint.names)
    try:
        detection = detect_files(checkpoint.names, checkpoint.read_json)
    except NpuQuantError:
        if beside is None and "config.json" in checkpoint.names:
            return Detected(asked)  # vLLM reads config.json itself, and says what is wrong with it
        raise
    if detection.rival is not None and asked is None:
        _read_headers(checkpoint, model)
        detection = detect_checkpoint(checkpoint)
    declaration = find_format(detection.format)
    if declaration is not None and any(map(is_consolidated, checkpoint.names)):
        _read_headers(checkpoint, model)  # vLLM may read params.json instead of config.json, and fail
        refuse_leftovers(checkpoint, detection.file)
    if declaration is None:
        suspicious = bool(detection.format or detection.config) and asked is None
        return Detected(asked, checkpoint, detection if suspicious else None)
    if asked is None and _is_left_with_bare_config(declaration, checkpoint, detection):
        return Detected(VLLM_ASCEND)
    if _vllm_finds(declaration, detection) or (asked is not None and detection.rival is not None):
        return Detected(asked)  # vLLM compares it with config.json
    if declaration.decisive:
        return Detected(_described_beside(declaration, checkpoint, detection, model, asked))
    if asked is not None and not declaration.answers_to(asked):
        return Detected(asked)
    method = declaration.method_name
    logger.info("%s is a checkpoint of %s (%s): quantization=%s", model, detection.format, detection.file, method)
    return Detected(method)


def _vllm_finds(declaration: Format, detection: Detection) -> bool:
    """Whether vLLM finds the format in config.json by itself."""
    part = quantization_part(detection.model)
    return part is not None and part[1] and declaration.serves(part[0])


def _described_beside(
    declaration: Format, checkpoint: Checkpoint, detection: Detection, model: str, asked: str | None
) -> str | None:
    """The method for a checkpoint with a decisive file beside config.json; None if it is left to vllm-ascend.

    Raises:
        NpuQuantError: contradictory-evidence if the user asked for another method.
    """
    name = detection.file
    if asked is not None:
        # vLLM would quantize the integers once more, or load them as floats.
        fix = "leave quantization= out, or remove the description if it does not belong to the weight files"
        raise NpuQuantError([contradiction(f"quantization={asked[:80]!r}", (declaration, name), fix=fix)])
    why = ""
    # vllm-ascend would take the format that config.json names.
    if settings.ascend_host() and declaration.unserved_by_vllm_ascend is not None and detection.rival is None:
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


def _is_left_with_bare_config(declaration: Format, checkpoint: Checkpoint, detection: Detection) -> bool:
    """Whether vllm-ascend reads the description beside a config.json that only names the format, and serves all of it."""
    part = quantization_part(detection.model)
    if part is None or part[0].get("quant_method") != VLLM_ASCEND or detection.file == "config.json":
        return False
    if declaration.unserved_by_vllm_ascend is None or not names_vllm_ascend(VLLM_ASCEND):
        return False
    from vllm_npu_quant.ascend.ownership import accepts_bare_config

    description = checkpoint.read_json(detection.file)
    return accepts_bare_config() and not declaration.unserved_by_vllm_ascend(description, detection.file)


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
