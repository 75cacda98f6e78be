# SPDX-License-Identifier: Apache-2.0
"""The one error type of the package, and the table of its codes.

An error is made of findings. A finding says what is wrong (code and message), where (layer and file), what was expected
and found, which names come near, and what to do about it. Checks collect findings and raise once, so that a user sees
every problem of a checkpoint at once.
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


#: Every code that a finding may carry, with the paragraph that docs/errors.md prints for it.
CODES: dict[str, str] = {
    "bad-config": "A configuration file holds a value that the format does not allow, or two values that contradict each "
    "other. The finding names the field. Re-export the checkpoint with its producer, or correct the field by hand.",
    "unreadable-file": "A file is missing, is not what its name says, is larger than the limit for its kind, or is nested "
    "too deeply. Nothing of it was used. Copy or download the file again.",
    "contradictory-evidence": "Two files of the checkpoint name two different quantization formats. Nothing is guessed: "
    "remove the file that does not belong to the weights, or pass quantization= to name the format.",
    "unknown-scheme": "The checkpoint names a quantization scheme that this version does not know. Nothing is loaded as "
    "another scheme in its place.",
    "unsupported-scheme": "The scheme is known, but no NPU method class implements it for this kind of layer, or the chip "
    "has no instructions for it. The finding says which.",
    "undescribed-layer": "vLLM asked for a layer that the quantization config does not describe. The finding lists every "
    "name that was tried and the nearest names that exist. Usually the model's name mapping and the checkpoint disagree.",
    "fused-shards-disagree": "vLLM runs several checkpoint layers as one fused layer (q/k/v, gate/up, the experts of a "
    "MoE), and the checkpoint quantizes them differently. Re-export them with one scheme.",
    "missing-tensor": "A tensor that the scheme needs, or that the description lists, is in none of the weight files.",
    "unexpected-tensor": "A weight file holds a tensor that nothing describes. It would be dropped or loaded into the wrong "
    "place, so it is reported.",
    "wrong-dtype": "A tensor's dtype is not one that the scheme allows. It is not converted.",
    "wrong-shape": "A tensor's shape does not follow from the layer's size and the scheme, for example a scale with too "
    "few rows or a group size that does not match.",
    "bad-header": "A safetensors header is damaged: truncated file, overlapping or missing byte ranges, an unknown dtype, "
    "or a header larger than the limit. Download the file again.",
    "index-mismatch": "The safetensors index and the files beside it disagree: a listed file is missing, or a tensor is not "
    "in the file that the index names.",
    "duplicate-tensor": "Two weight files hold a tensor of the same name, so which one would be loaded depends on the order.",
    "cannot-shard": "The layer cannot be cut for the requested tensor- or expert-parallel size. The finding says which "
    "dimension stands in the way and which sizes work.",
    "bad-value": "A tensor holds values that the scheme does not allow, such as a nonzero zero point in a symmetric scheme.",
    "not-filled": "After loading, a part of a quantized layer's parameters had received no data. The finding names the "
    "parameter and the part.",
    "operator-limit": "A shape or dtype lies outside of what the NPU operator's documentation allows.",
    "requantized": "The chip has no instructions for the checkpoint's number format, so the weights are converted while they "
    "load. The finding says from what to what, and which setting changes it.",
    "served-otherwise": "The layers are served, and not quite as the checkpoint says: the finding tells what differs, such "
    "as calibrated scales that are not used, or weights that take more memory. The answers stay close to what the "
    "checkpoint means, and nothing has to be done. The finding says how to export the layers to have them served as stored.",
    "plugin-left-out": "vLLM will not load this plugin, or vllm-ascend's, and does not say so. Usually VLLM_PLUGINS is set: "
    "it lists all plugins that vLLM may load, by the names of their entry points, and whatever it does not list is left out.",
    "host-conflict": "What is installed on the host does not fit together, or a setting does not do what it seems to do. "
    "`vllm-npu-quant doctor` reports it.",
    "kv-cache-not-quantized": "The checkpoint carries scales for a quantized KV cache. The weights are served; the KV cache "
    "stays in the model's dtype and the scales are dropped.",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, about a checkpoint or a request."""

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
        """The finding as text: one headline, then one line for every field that is set."""
        where = f"{self.layer}: " if self.layer else ""
        lines = [f"{self.severity.value}[{self.code}]: {where}{self.message}"]
        found = self.found
        if self.nearest:
            found = (found + "; " if found else "") + "nearest: " + ", ".join(self.nearest)
        rows = (("file", self.file), ("expected", self.expected), ("found", found), ("fix", self.fix))
        lines += [f"  {name:<9}{text}" for name, text in rows if text]
        return "\n".join(lines)


#: Findings printed in full by str(NpuQuantError); the rest is counted.
MAX_RENDERED = 20


class NpuQuantError(Exception):
    """A checkpoint or a request that cannot be served exactly as it says.

    Not a ValueError: vLLM's pydantic configs catch those, and show their text among their own.

    Attributes:
        findings: every problem that was found, the errors first.
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
        """The codes of the findings, each once, in order."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings))


class FindingLimit:
    """Collects findings. Of one code, the first ``limit`` are kept in full; the others are counted."""

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self.findings: list[Finding] = []
        self.counts: dict[str, int] = {}

    def wants(self, code: str) -> bool:
        """Whether a finding of this code would be kept, so that what is costly about it is worth finding out."""
        return self.counts.get(code, 0) < self.limit

    def extend(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.add(finding)

    def add(self, finding: Finding) -> None:
        count = self.counts[finding.code] = self.counts.get(finding.code, 0) + 1
        if count <= self.limit:
            self.findings.append(finding)

    def close(self) -> list[Finding]:
        """All findings, with one more for each code of which some were left out."""
        for code, count in self.counts.items():
            if count > self.limit:
                message = f"{count - self.limit} more findings of this kind were left out"
                severity = next(finding.severity for finding in self.findings if finding.code == code)
                self.findings.append(Finding(code, message, severity=severity))
        self.counts = {}
        return self.findings


def raise_findings(findings: Iterable[Finding]) -> None:
    """Raise one NpuQuantError if any of the findings is an error."""
    collected = list(findings)
    if any(finding.severity is Severity.ERROR for finding in collected):
        raise NpuQuantError(collected)


#: Names that are compared letter by letter, at most.
_MAX_COMPARED = 200


def nearest_names(name: str, names: Iterable[str], *, limit: int = 3) -> tuple[str, ...]:
    """The names most like ``name``, best first.

    Only names of the same last component or the same parent (none, for a plain word) are compared, and of those the ones
    with the longest common beginning. Linear in the number of names all the same: ask for the findings that are shown,
    not for all.
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
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
