# SPDX-License-Identifier: Apache-2.0
"""Findings, the error that carries them, and the table of their codes.

A finding has a code and message, the layer and file, the expected and found values, the nearest names, and a fix. Checks
collect findings and raise once, so that users see all problems of a checkpoint together.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["CODES", "Finding", "FindingLimit", "NpuQuantError", "Severity", "nearest_names", "raise_findings"]


class Severity(str, Enum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


#: Every code of a finding, with its paragraph in docs/errors.md.
CODES: dict[str, str] = {
    "bad-config": "A configuration file holds a value that the format does not allow, or two values that contradict each "
    "other. The finding names the field. Re-export the checkpoint with its producer, or correct the field by hand.",
    "unreadable-file": "A file is missing, does not have the type that its name says, exceeds the size limit for its kind, "
    "or is nested too deeply. None of its content was used. Copy or download the file again.",
    "contradictory-evidence": "Two files of the checkpoint name different quantization formats, and none is preferred. "
    "Remove the file that does not belong to the weights, or pass quantization= to name the format.",
    "unknown-scheme": "The checkpoint names a quantization scheme that this version does not know. It is not loaded as "
    "another scheme.",
    "unsupported-scheme": "The scheme is known, but no NPU method class implements it for this kind of layer, or the chip "
    "has no instructions for it. The finding says which.",
    "undescribed-layer": "vLLM asked for a layer that the quantization config does not describe. The finding lists every "
    "name that was tried and the nearest names that exist. Usually the model's name mapping and the checkpoint disagree.",
    "fused-shards-disagree": "vLLM runs several checkpoint layers as one fused layer (q/k/v, gate/up, the experts of a "
    "MoE), and the checkpoint quantizes them differently. Re-export them with one scheme.",
    "missing-tensor": "A tensor that the scheme needs, or that the description lists, is not in any weight file.",
    "unexpected-tensor": "A weight file holds a tensor that neither the config nor the scheme describes. It would be dropped "
    "or loaded into the wrong parameter.",
    "wrong-dtype": "A tensor's dtype is not one that the scheme allows. It is not converted.",
    "wrong-shape": "A tensor's shape does not follow from the layer's size and the scheme, for example a scale with too "
    "few rows or a group size that does not match.",
    "bad-header": "A safetensors header is damaged: truncated file, overlapping or missing byte ranges, an unknown dtype, "
    "or a header larger than the limit. Download the file again.",
    "index-mismatch": "The safetensors index and the files beside it disagree: a listed file is missing, or a tensor is not "
    "in the file that the index names.",
    "duplicate-tensor": "Two weight files hold a tensor of the same name. Which of them is loaded depends on the order of "
    "the files.",
    "cannot-shard": "The layer cannot be split for the requested tensor- or expert-parallel size. The finding names the "
    "dimension that cannot be split and the sizes that work.",
    "bad-value": "A tensor holds values that the scheme does not allow, such as a nonzero zero point in a symmetric scheme.",
    "unlikely-value": "A tensor holds values that can be computed with, and that no known producer writes, such as negative "
    "scales or integers that use a small part of their range. The finding names the layer and the numbers. Compare the "
    "checkpoint with its float model (``compare``), or re-export it.",
    "not-filled": "A part of a quantized layer's parameters received no data while the model was loaded. The finding names "
    "the parameter and the part.",
    "operator-limit": "A shape or dtype is outside the limits given in the NPU operator's documentation.",
    "requantized": "The chip has no instructions for the checkpoint's number format, so the weights are converted at load. "
    "The finding names both formats and the setting that changes the conversion.",
    "served-otherwise": "The layers are served, but not exactly as stored. The finding names the difference, such as "
    "calibrated scales that are not used, or weights that take more memory. Results remain close to those of the stored "
    "layers, and no action is required. The finding says how to export the layers so that they are served as stored.",
    "plugin-left-out": "vLLM will not load this plugin or vllm-ascend's, and prints no message about it. Usually "
    "VLLM_PLUGINS is set: vLLM then loads only the plugins whose entry points it names.",
    "host-conflict": "Installed packages are not compatible with each other, or a setting does not have its apparent effect. "
    "`vllm-npu-quant doctor` reports it.",
    "engine-failed": "vLLM's engine stopped with an error of its own while a command ran it, such as too little memory. The "
    "finding has the type and the text of that error; the checkpoint may be fine.",
    "kv-cache-not-quantized": "The checkpoint holds scales for a quantized KV cache. The weights are served; the KV cache "
    "has the model's dtype, and the scales are dropped.",
}


@dataclass(frozen=True)
class Finding:
    """A problem of, or a note on, a checkpoint or a request.

    Attributes:
        code: a key of CODES.
        message: the problem in one sentence.
        layer: the layer or tensor, if the finding is about one.
        file: the file, if the finding is about one.
        expected, found: the expected and the actual value.
        nearest: similar names, if a name was not found.
        fix: what the user can do.
        severity: errors prevent loading.
    """

    code: str
    message: str
    layer: str = ""
    file: str = ""
    expected: str = ""
    found: str = ""
    nearest: tuple[str, ...] = ()
    fix: str = ""
    severity: Severity = Severity.ERROR

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"{self.code!r} is not a code of vllm_npu_quant.errors.CODES")

    def render(self) -> str:
        """Format as text: one headline, then one line for every field that is set."""
        where = f"{self.layer}: " if self.layer else ""
        lines = [f"{self.severity.value}[{self.code}]: {where}{self.message}"]
        found = self.found
        if self.nearest:
            found = (found + "; " if found else "") + "nearest: " + ", ".join(self.nearest)
        rows = (("file", self.file), ("expected", self.expected), ("found", found), ("fix", self.fix))
        lines += [f"  {name:<9}{text}" for name, text in rows if text]
        return "\n".join(lines)


#: Findings printed by str(NpuQuantError); the rest are counted.
MAX_RENDERED = 20


class NpuQuantError(Exception):
    """The error for a checkpoint or a request that cannot be served.

    It is not a ValueError, because vLLM's pydantic configs catch those and merge their text into their own.

    Attributes:
        findings: all findings, errors first.
    """

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings: tuple[Finding, ...] = tuple(
            sorted(findings, key=lambda finding: list(Severity).index(finding.severity))
        )
        super().__init__(self.findings)

    def __str__(self) -> str:
        shown = [finding.render() for finding in self.findings[:MAX_RENDERED]]
        if len(self.findings) > MAX_RENDERED:
            shown.append(f"... and {len(self.findings) - MAX_RENDERED} more findings of this kind of checkpoint")
        return "\n" + "\n".join(shown)

    @property
    def codes(self) -> tuple[str, ...]:
        """The distinct codes of the findings, in order."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings))


class FindingLimit:
    """A collector that keeps at most ``limit`` findings of each code and counts the rest."""

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self.findings: list[Finding] = []
        self.counts: dict[str, int] = {}

    def wants(self, code: str) -> bool:
        """Whether a finding of this code would be kept; check it before computing costly details."""
        return self.counts.get(code, 0) < self.limit

    def extend(self, findings: Iterable[Finding]) -> None:
        """Add each finding."""
        for finding in findings:
            self.add(finding)

    def add(self, finding: Finding) -> None:
        """Keep a finding, or count it if its code has reached the limit."""
        count = self.counts[finding.code] = self.counts.get(finding.code, 0) + 1
        if count <= self.limit:
            self.findings.append(finding)

    def close(self) -> list[Finding]:
        """All kept findings, and one for each code with the number of those not kept."""
        for code, count in self.counts.items():
            if count > self.limit:
                message = f"{count - self.limit} more findings of this kind were left out"
                severity = next(finding.severity for finding in self.findings if finding.code == code)
                self.findings.append(Finding(code, message, severity=severity))
        self.counts = {}
        return self.findings


def raise_findings(findings: Iterable[Finding]) -> None:
    """Raise one NpuQuantError with all findings if any of them is an error."""
    collected = list(findings)
    if any(finding.severity is Severity.ERROR for finding in collected):
        raise NpuQuantError(collected)


#: Limit on the names that are compared character by character.
_MAX_COMPARED = 200


def nearest_names(name: str, names: Iterable[str], *, limit: int = 3) -> tuple[str, ...]:
    """The names most similar to ``name``, best first.

    Only names with the same last component or the same parent are compared, and of those at most _MAX_COMPARED with the
    longest common prefix. Linear in the number of names, so call it only for findings that are kept.
    """
    parent, _, last = name.rpartition(".")
    candidates = [
        other
        for other in names
        if other.endswith("." + last) or (other.startswith(parent + ".") if parent else "." not in other)
    ]
    if len(candidates) > _MAX_COMPARED:
        candidates = heapq.nlargest(_MAX_COMPARED, candidates, key=lambda other: _common_start(name, other))
    return tuple(difflib.get_close_matches(name, candidates, n=limit, cutoff=0.5))


def _common_start(first: str, second: str) -> int:
    """Length of the common prefix of two strings."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
