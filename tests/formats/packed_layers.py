# SPDX-License-Identifier: Apache-2.0
"""Headers of checkpoints that were never written: what the formats see of AWQ, GPTQ and AutoRound layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.errors import Finding, Severity
from vllm_npu_quant.formats import auto_round, awq, gptq
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.described import Described

__all__ = [
    "awq_layer",
    "check",
    "errors",
    "float_layer",
    "frames",
    "gptq_layer",
    "headers",
    "of_severity",
    "open_packed",
    "problems",
]


def headers(*layers: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Tensor name -> header, from name -> (dtype, shape)."""
    return {
        name: TensorInfo(name, dtype, shape, "model.safetensors", 0, 0)
        for layer in layers
        for name, (dtype, shape) in layer.items()
    }


def gptq_layer(
    layer: str, inputs: int = 256, outputs: int = 64, bits: int = 4, group: int = 128, *, g_idx: bool = True
) -> dict[str, tuple[str, tuple[int, ...]]]:
    groups = -(-inputs // group) if group > 0 else 1
    return {
        f"{layer}.qweight": ("I32", (-(-inputs * bits // 32), outputs)),
        f"{layer}.qzeros": ("I32", (groups, -(-outputs * bits // 32))),
        f"{layer}.scales": ("F16", (groups, outputs)),
        **({f"{layer}.g_idx": ("I32", (inputs,))} if g_idx else {}),
    }


def awq_layer(
    layer: str, inputs: int = 256, outputs: int = 64, group: int = 128, *, qzeros: bool = True
) -> dict[str, tuple[str, tuple[int, ...]]]:
    groups = -(-inputs // group) if group > 0 else 1
    return {
        f"{layer}.qweight": ("I32", (inputs, outputs // 8)),
        f"{layer}.scales": ("F16", (groups, outputs)),
        **({f"{layer}.qzeros": ("I32", (groups, outputs // 8))} if qzeros else {}),
    }


def float_layer(layer: str, *shape: int, dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{layer}.weight": (dtype, shape or (64, 256))}


def of_severity(findings: list[Finding], severity: Severity) -> list[Finding]:
    return [finding for finding in findings if finding.severity is severity]


def errors(findings: list[Finding]) -> list[Finding]:
    return of_severity(findings, Severity.ERROR)


def frames(function: Callable[[], object]) -> int:
    """How often a call enters or resumes a Python function: a measure of work that does not depend on the machine."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


class _Stored:
    findings: tuple[Finding, ...] = ()

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors


def check(found: Described, tensors: Mapping[str, TensorInfo]) -> list[Finding]:
    """All errors of a config, and of the headers against it."""
    return errors([*found.findings, *check_checkpoint(found, _Stored(tensors))])


def open_packed(folder: Any) -> tuple[Described, Checkpoint]:
    """The layers of a real folder, by its config.json."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    checkpoint = Checkpoint.open(folder)
    reader = {"awq": awq.read, "gptq": gptq.read, "auto-round": auto_round.read}[config["quant_method"]]
    return reader(config, checkpoint.tensors, "config.json", checkpoint), checkpoint


def problems(found: Described, checkpoint: Checkpoint) -> list[Finding]:
    return errors([*found.findings, *check_checkpoint(found, checkpoint)])
