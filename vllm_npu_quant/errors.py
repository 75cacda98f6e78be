# SPDX-License-Identifier: Apache-2.0
"""Findings, the error that carries them, and the table of their codes.

A finding has a code and message, the layer and file, the expected and found values, the nearest names, and a fix. Checks
collect findings and raise once, so that users see all problems of a checkpoint together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice

__all__ = [
    "CODES",
    "Finding",
    "FindingLimit",
    "NpuQuantError",
    "Severity",
    "nearest_names",
    "printable",
    "raise_findings",
]


class Severity(str, Enum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


#: Every code of a finding, with its paragraph in docs/errors.md.
CODES: dict[str, str] = {
    "bad-config": "A configuration file holds a value that the format does not allow, or two values that contradict each "
    "other. The finding names the field. Re-export the checkpoint with its producer, or correct the field by hand.",
    "unreadable-file": "A file is missing, does not have the type that its name says, exceeds the size limit for its kind, "
    "or is nested too deeply; a checkpoint has more files than any real one; or a hub's answer is incomplete or of another "
    "form. None of the content was used. Copy or download the file again.",
    "contradictory-evidence": "Two files of the checkpoint name different quantization formats. The one that fits all stored "
    "tensors is used, with a warning; if both or neither fit, none is preferred. Remove the file that does not belong to the "
    "weights, or pass quantization= to name the format.",
    "unknown-scheme": "The checkpoint names a quantization scheme that this version does not know. It is not loaded as "
    "another scheme.",
    "unsupported-scheme": "The scheme is known, but no NPU method class implements it for this kind of layer, or the chip "
    "has no instructions for it, or the checkpoint is of another runtime (ModelOpt, bitsandbytes, MLX, ...). The finding "
    "says which, and what can be served instead.",
    "undescribed-layer": "vLLM asked for a layer that the quantization config does not describe. The finding lists every "
    "name that was tried and the nearest names that exist. Usually the model's name mapping and the checkpoint disagree.",
    "fused-shards-disagree": "vLLM runs several checkpoint layers as one fused layer (q/k/v, gate/up, the experts of a "
    "MoE), and the checkpoint quantizes them differently. Re-export them with one scheme.",
    "missing-tensor": "A tensor that the scheme needs, or that the description lists, is not in any weight file.",
    "unexpected-tensor": "A weight file holds a tensor that neither the config nor the scheme describes. It would be dropped "
    "or loaded into the wrong parameter.",
    "wrong-dtype": "A tensor's dtype is not one that the scheme allows. It is not converted.",
    "wrong-shape": "A tensor's shape does not follow from the layer's size and the scheme, for example a scale with too "
    "few rows or a group size that does not match; or a MoE layer has another number of experts than config.json says.",
    "bad-header": "A safetensors header is damaged: truncated file, overlapping or missing byte ranges, an unknown dtype, "
    "or a header, or all headers together, larger than the limit. Download the file again.",
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
    "operator-limit": "A shape or dtype is outside the limits given in the NPU operator's documentation, or a tensor is so "
    "large that it is not read.",
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
    "reload-mismatch": "Weights that are loaded into a running engine are not stored as those that it serves, or do not come "
    "by one of vLLM's ways to load weights again. The engine keeps its weights.",
    "kv-cache-not-quantized": "The checkpoint holds scales for a quantized KV cache. The weights are served; the KV cache "
    "has the model's dtype, and the scales are dropped.",
}


#: Limits on one text of a finding, and on the names that a finding lists. Texts come from untrusted files.
MAX_TEXT = 2000
MAX_NEAREST = 10


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """Text on one line without control characters, for terminals and logs: each is replaced by its escape, as in "\\x1b".

    Text beyond ``limit`` characters is cut off.
    """
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@dataclass(frozen=True)
class Finding:
    """A problem of, or a note on, a checkpoint or a request. Texts of more than MAX_TEXT characters are cut off.

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
        for name in ("message", "layer", "file", "expected", "found", "fix"):
            text = getattr(self, name)
            if len(text) > MAX_TEXT:
                object.__setattr__(self, name, text[: MAX_TEXT - 3] + "...")
        object.__setattr__(self, "nearest", tuple(name[:MAX_TEXT] for name in self.nearest[:MAX_NEAREST]))

    def render(self) -> str:
        """Format as text: one headline, then one line for every field that is set. Control characters are escaped."""
        where = f"{self.layer}: " if self.layer else ""
        lines = [f"{self.severity.value}[{self.code}]: {printable(where + self.message, 2 * MAX_TEXT)}"]
        found = self.found
        if self.nearest:
            found = (found + "; " if found else "") + "nearest: " + ", ".join(self.nearest)
        rows = (("file", self.file), ("expected", self.expected), ("found", found), ("fix", self.fix))
        lines += [f"  {name:<9}{printable(text, 2 * MAX_TEXT)}" for name, text in rows if text]
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
    """A collector that keeps at most ``limit`` findings of each code and severity, and counts the rest."""

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self.findings: list[Finding] = []
        self.counts: dict[tuple[str, Severity], int] = {}

    def wants_names(self, code: str) -> bool:
        """Whether a finding of this code is among the first few, for which the nearest names are searched."""
        return sum(self.counts.get((code, severity), 0) for severity in Severity) < MAX_SEARCHES

    def is_full(self, code: str, severity: Severity = Severity.ERROR) -> bool:
        """Whether more findings of this code are only counted."""
        return self.counts.get((code, severity), 0) >= self.limit

    def skips(self, code: str, severity: Severity = Severity.ERROR) -> bool:
        """Whether a finding of this code is only counted, which this call does, so that it need not be made."""
        full = self.is_full(code, severity)
        self.counts[code, severity] = self.counts.get((code, severity), 0) + full
        return full

    def extend(self, findings: Iterable[Finding]) -> None:
        """Add each finding."""
        for finding in findings:
            self.add(finding)

    def add(self, finding: Finding) -> None:
        """Keep a finding, or count it if its code has reached the limit."""
        key = finding.code, finding.severity
        count = self.counts[key] = self.counts.get(key, 0) + 1
        if count <= self.limit:
            self.findings.append(finding)

    def close(self) -> list[Finding]:
        """All kept findings, and one for each code with the number of those not kept."""
        for (code, severity), count in self.counts.items():
            if count > self.limit:
                message = f"{count - self.limit} more findings of this kind were left out"
                self.findings.append(Finding(code, message, severity=severity))
        self.counts = {}
        return self.findings


def raise_findings(findings: Iterable[Finding]) -> None:
    """Raise one NpuQuantError with all findings if any of them is an error."""
    collected = list(findings)
    if any(finding.severity is Severity.ERROR for finding in collected):
        raise NpuQuantError(collected)


#: Limits of the search for near names: findings of a code that have one, names that are looked at, those with the same
#: parent and those with another that are compared, and characters of each. Real checkpoints have below 300,000 names of below
#: 100 characters.
MAX_SEARCHES = 5
MAX_LOOKED_AT = 300_000
MAX_COMPARED = 20_000
MAX_CHARACTERS = 200


def nearest_names(name: str, names: Iterable[str], *, limit: int = 3) -> tuple[str, ...]:
    """The names most similar to ``name``, best first.

    Of names with components, only those with the same last component or the same parent are compared. The similarity is
    the part of the name that the common beginning and the common end make up: linear in the name's length. Linear in the
    number of names, too, so a search belongs to the first few findings only (``FindingLimit.wants_names``).
    """
    name = name[:MAX_CHARACTERS]
    parent, dot, last = name.rpartition(".")
    found: list[tuple[float, str]] = []
    compared = {True: 0, False: 0}
    for other in islice(names, MAX_LOOKED_AT):
        sibling = other.startswith(parent + dot) if parent else "." not in other
        if compared[sibling] == MAX_COMPARED or not (sibling or other.endswith("." + last)):
            continue
        compared[sibling] += 1
        similarity = _similarity(name, other[:MAX_CHARACTERS])
        if similarity >= 0.5 and (len(found) < limit or similarity > found[-1][0]):
            found.append((similarity, other))
            found.sort(key=lambda pair: -pair[0])
            del found[limit:]
    return tuple(other for _, other in found)


def _similarity(first: str, second: str) -> float:
    """The share of two texts that their common beginning and end make up; 1 for equal texts."""
    length, shorter = max(len(first), len(second)), min(len(first), len(second))
    start = _common_start(first, second)
    end = min(_common_start(first[::-1], second[::-1]), shorter - start)
    return (start + end) / length if length else 1.0


def _common_start(first: str, second: str) -> int:
    """Length of the common beginning of two texts."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # the slices are compared in C
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
