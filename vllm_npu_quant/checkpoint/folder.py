# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: the weight files that vLLM would load, their tensors, and findings about them."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_npu_quant.checkpoint.files import listed
from vllm_npu_quant.checkpoint.json_files import json_limit, read_json
from vllm_npu_quant.checkpoint.safetensors_header import (
    ALL_MAX_TENSORS,
    Header,
    HeaderBudget,
    TensorInfo,
    read_header,
)
from vllm_npu_quant.checkpoint.text import near, shown, shown_name
from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity, nearest_names

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Checkpoint", "pickled_weights"]

#: The index that vLLM reads; it loads only the files that this index names.
VLLM_INDEX = "model.safetensors.index.json"

#: The index if the folder holds Mistral's consolidated*.safetensors, which vLLM prefers.
CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"

#: Limits on the files of a checkpoint that are opened. The largest known have 200 weight files and two indexes.
MAX_WEIGHT_FILES = 10_000
MAX_INDEXES = 8

#: Findings of one code that are kept.
MAX_FINDINGS = 100

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

#: Pickles without weights, which vLLM ignores.
_NO_WEIGHTS = frozenset(("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"))


class Checkpoint:
    """A local folder with safetensors weights. Opening it reads headers and indexes, never weights.

    Attributes:
        folder: the folder.
        names: names of all its files, sorted.
        files: names of the weight files that vLLM would load, sorted.
        ignored: names of the other weight files, and the reason why vLLM would not load them.
        indexes: names of the index files.
        leaving: names of links to targets outside the folder, with their targets; they are not opened.
        tensors: every tensor of ``files``, by name.
        sizes: bytes of each of ``files``.
        findings: findings about files and indexes, not about quantization.
    """

    #: Whether ``read`` can return values: False if only the headers of a hub's files are available.
    has_values: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: tuple[str, ...] = ()
        self.files: tuple[str, ...] = ()
        self.ignored: Mapping[str, str] = {}
        self.indexes: tuple[str, ...] = ()
        self.leaving: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        self.sizes: Mapping[str, int] = {}
        self.findings: tuple[Finding, ...] = ()

    @classmethod
    def open(cls, folder: str | Path, *, follow_links: bool = True, headers: bool = True) -> Checkpoint:
        """Open a local folder and list its tensors (for a hub id see ``open_checkpoint``).

        Args:
            folder: the folder.
            follow_links: whether to follow links out of the folder, as vLLM does. Links of a snapshot in huggingface_hub's
                cache to its blobs are always followed.
            headers: whether to read headers; if False, only files are listed, and ``read_headers`` can be called later.

        Raises:
            NpuQuantError: unreadable-file if the folder cannot be read. All other problems are in ``findings``.
        """
        folder = Path(folder)
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "the path is not valid"
            fix = "Check the path; for a model of a hub, download it first."
            if isinstance(error, NotADirectoryError):
                reason, fix = (
                    "a file",
                    f"Give the folder that holds the checkpoint: {shown_name(str(folder.parent), 1000)}",
                )
            finding = Finding(
                "unreadable-file",
                "the folder of the checkpoint cannot be read",
                file=shown_name(str(folder), 1000),
                expected="a folder with config.json and *.safetensors",
                found=reason,
                fix=fix,
            )
            raise NpuQuantError([finding]) from None
        checkpoint = cls(folder)
        checkpoint.names = tuple(names)
        if not follow_links:
            checkpoint.leaving = MappingProxyType(_leaving(folder, names))
        if headers:
            checkpoint.read_headers()
        return checkpoint

    def __repr__(self) -> str:
        errors = sum(finding.severity is Severity.ERROR for finding in self.findings)
        return f"<Checkpoint {self.folder}: {len(self.tensors)} tensors in {len(self.files)} files, {errors} errors>"

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def path(self, name: str) -> Path:
        """Local path of one of ``names``."""
        return self.folder / name

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of the folder's JSON files, with the size limit of its kind; errors as in ``read_json``."""
        if name in self.leaving:
            raise NpuQuantError([_leaves(name, self.leaving[name])])
        return read_json(self.path(name), max_bytes=json_limit(name), file=name)

    def read(self, name: str, *, float32: bool = False) -> np.ndarray:
        """Read the values of one tensor, which has at most ``values.MAX_READ`` bytes.

        Args:
            name: a key of ``tensors``.
            float32: whether to convert to float32. Otherwise the values are those stored, read-only, in the NumPy dtype of
                the same name: BF16 is returned as uint16, 8-bit floats as uint8, F4 and F6 as packed bytes (see
                ``values.read_tensor`` for the shape).

        Raises:
            KeyError: the tensor does not exist; the message has the nearest names.
            NpuQuantError: the file has changed since the checkpoint was opened, or it has an error in ``findings``, or the
                tensor is too large.
            ValueError: with ``float32``, for integer, complex and 6-bit float dtypes.
        """
        from vllm_npu_quant.checkpoint.values import read_tensor, to_float32  # imports NumPy, not needed for headers

        tensor = self._tensor(name)
        values = read_tensor(self.path(tensor.file), tensor, self.sizes[tensor.file])
        return to_float32(values, tensor) if float32 else values

    def blocks(self, name: str, elements: int) -> Iterator[np.ndarray]:
        """The values of one tensor of any size as they are stored, in vectors of at most ``elements`` numbers, in order.

        Raises:
            KeyError, NpuQuantError: as ``read``.
        """
        from vllm_npu_quant.checkpoint.values import read_blocks

        tensor = self._tensor(name)
        return read_blocks(self.path(tensor.file), tensor, self.sizes[tensor.file], elements)

    def _tensor(self, name: str) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None:
            near = nearest_names(name, self.tensors)
            raise KeyError(f"no tensor {name!r} in {self.folder}" + (f"; nearest: {', '.join(near)}" if near else ""))
        return tensor

    def read_headers(self, *, consolidated: bool = True) -> None:
        """Set ``files``, ``tensors``, ``findings`` and the other attributes from the files in ``names``.

        Args:
            consolidated: whether vLLM prefers Mistral's consolidated*.safetensors, as by default.
        """
        findings = FindingLimit(MAX_FINDINGS)
        names = list(self.names)
        weights = fnmatch.filter(names, "*.safetensors")
        if len(weights) > MAX_WEIGHT_FILES:
            self.findings = (_too_many("weight files", MAX_WEIGHT_FILES, len(weights)),)
            return
        mistral = fnmatch.filter(weights, "consolidated*.safetensors") if consolidated else []
        ignored: dict[str, str] = {}
        vllm_index = VLLM_INDEX
        candidates = weights
        if mistral:
            vllm_index, candidates = CONSOLIDATED_INDEX, mistral
            others = [name for name in weights if name not in mistral]
            ignored |= dict.fromkeys(others, "vLLM loads consolidated*.safetensors where they exist")
            if others:
                findings.add(_two_copies(mistral, others))
        self.indexes = tuple(fnmatch.filter(names, "*.safetensors.index.json"))
        indexes = self._read_indexes(findings)
        files = candidates
        if vllm_index in indexes:
            listed = set(indexes[vllm_index].values())
            files = [name for name in candidates if name in listed]
            left_out = [name for name in candidates if name not in listed]
            ignored |= dict.fromkeys(left_out, f"{vllm_index} does not name it")
        if weights:
            ignored |= dict.fromkeys(pickled_weights(names), "vLLM loads safetensors where they exist")
        else:
            findings.add(_no_weights(self.folder, names))

        adapters = fnmatch.filter(files, "adapter_*.safetensors")
        alone = len(files) == len(adapters)
        if adapters and not (alone and "config.json" not in names):  # an adapter's folder is refused as such
            findings.add(_adapter(adapters[0], alone=alone))
        if all(set(files).isdisjoint(index.values()) for index in indexes.values()):
            findings.extend(_missing_shards(files))
        budget = HeaderBudget()
        headers = {
            name: Header(name, {}, {}, (_leaves(name, self.leaving[name]),), 0)
            if name in self.leaving
            else self.header(name, budget)
            for name in files
        }
        for header in headers.values():
            findings.extend(header.findings)
        self.files = tuple(files)
        self.ignored = MappingProxyType(ignored)
        self.sizes = MappingProxyType({name: header.size for name, header in headers.items()})
        self.tensors = MappingProxyType(_merge(headers.values(), findings))
        for name, index in indexes.items():
            findings.extend(self._compare(name, index, headers, weights, indexes, vllm_index))
        self.findings = tuple(findings.close())

    def header(self, name: str, budget: HeaderBudget | None = None) -> Header:
        """The header of one of the folder's safetensors files, one that vLLM would not load included.

        Args:
            budget: what the headers of the checkpoint may take together; one header's own limits hold without it.
        """
        return read_header(self.path(name), budget=budget)

    def _read_indexes(self, findings: FindingLimit) -> dict[str, dict[str, str]]:
        """The weight_maps of the indexes that can be used, vLLM's first; no more of them than a checkpoint has."""
        found: dict[str, dict[str, str]] = {}
        entries = 0
        if len(self.indexes) > MAX_INDEXES:
            findings.add(_too_many("indexes of weight files", MAX_INDEXES, len(self.indexes)))
        known = (VLLM_INDEX, CONSOLIDATED_INDEX)
        for name in sorted(self.indexes, key=lambda name: name not in known)[:MAX_INDEXES]:
            index = self._read_index(name, findings)
            entries += len(index or ())
            if entries > ALL_MAX_TENSORS:
                findings.add(_too_many("tensors in its indexes", ALL_MAX_TENSORS, entries))
                break
            if index is not None:
                found[name] = index
        return found

    def _read_index(self, name: str, findings: FindingLimit) -> dict[str, str] | None:
        """The weight_map of an index, tensor name to file name; None, with findings, if it cannot be used."""
        try:
            index = self.read_json(name)
        except NpuQuantError as error:
            findings.extend(error.findings)
            return None
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            message = "the index has no weight_map"
            if "weight_map" in index:
                message = "weight_map is not an object"
            found = ", ".join(shown_name(key, 40) for key in list(index)[:8]) or "an empty object"
            findings.add(_mismatch(name, message, expected='"weight_map": {"tensor": "file", ...}', found=found))
            return None
        result: dict[str, str] = {}
        wrong: dict[str, list[str]] = defaultdict(list)
        plain: dict[str, bool] = {}
        for tensor, file in weight_map.items():
            if type(file) is str and (plain.get(file) or plain.setdefault(file, _is_plain(file))):
                result[tensor] = file
            else:
                wrong[shown(file)].append(tensor)
        for text, tensors in list(wrong.items())[:20]:
            findings.add(
                _mismatch(
                    name,
                    f"weight_map names something else than a file of the folder for {_count(tensors)}",
                    layer=tensors[0],
                    expected="the plain name of a .safetensors file beside the index",
                    found=text + (f" and {len(wrong) - 1:,} other values" if len(wrong) > 1 else ""),
                    fix="Do not load this checkpoint unless you trust where it comes from; else correct the index.",
                )
            )
        return result

    def _compare(
        self,
        name: str,
        index: dict[str, str],
        headers: Mapping[str, Header],
        weights: list[str],
        indexes: Mapping[str, dict[str, str]],
        vllm_index: str,
    ) -> Iterable[Finding]:
        """Findings about differences between an index and the files in its folder."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for tensor, file in index.items():
            by_file[file].append(tensor)
        present = set(weights)
        missing = [file for file in by_file if file not in present]
        if name != vllm_index and name == CONSOLIDATED_INDEX and len(missing) == len(by_file):
            return  # none of its files is downloaded, and vLLM does not use them
        complete = [other for other in indexes if other != name and set(indexes[other].values()) <= present]
        for file in missing[:20]:
            fix = "Finish the download, or copy the file from where the checkpoint was made."
            if len(missing) == len(by_file) and complete:
                fix = f"The weights here belong to {complete[0]}: delete {shown_name(name)}."
            yield _mismatch(
                name,
                f"a weight file is missing: {shown_name(file)}",
                expected=f"a file with {_count(by_file[file])}",
                found=f"{len(missing)} of {len(by_file)} files of the index are missing" if len(missing) > 1 else "",
                nearest=near(file, weights),
                fix=fix,
            )
        for file, tensors in by_file.items():
            header = headers.get(file)
            if header is None:
                if file in present:
                    message = f"vLLM will not load {file}, which this index names: {self.ignored.get(file, '')}"
                    fix = f"Keep one of the two: delete {name} or {vllm_index}."
                    yield _mismatch(name, message, expected=f"{_count(tensors)} in {file}", fix=fix)
                continue
            if header.findings:
                continue  # the damaged header has been reported
            absent = [tensor for tensor in tensors if tensor not in header.tensors]
            if absent:
                elsewhere = self.tensors.get(absent[0])
                yield _mismatch(
                    name,
                    f"{_count(absent)} of the index not in the file that it names",
                    layer=absent[0],
                    expected=f"in {file}",
                    found=f"in {elsewhere.file}" if elsewhere else "in no file",
                    nearest=() if elsewhere else nearest_names(absent[0], header.tensors),
                    fix="Download the index and this file again, from the same revision.",
                )
            unlisted = [tensor for tensor in header.tensors if tensor not in index]
            if unlisted:
                yield _mismatch(
                    name,
                    f"the index does not list {_count(unlisted)} of {file}; vLLM loads what is in the file",
                    layer=unlisted[0],
                    fix="Nothing, if the weights are right; else download the index and this file again.",
                    severity=Severity.WARNING,
                )
        extra = [file for file in headers if file not in by_file]
        if extra:
            message = f"the index does not name {', '.join(map(shown_name, extra[:5]))}; vLLM loads it all the same"
            fix = "Remove the file if it does not belong to the checkpoint."
            yield _mismatch(name, message, found=f"{len(extra)} such files", fix=fix, severity=Severity.WARNING)


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Those of some files that vLLM would load where there is no safetensors file."""
    return _matching(list(names), _PICKLES)


def _is_plain(name: str) -> bool:
    """Whether a name is the plain name of a safetensors file, without path components."""
    return (
        len(name) < 256
        and name.endswith(".safetensors")
        and name.isprintable()
        and not any(char in name for char in "/\\:")
    )


def _merge(headers: Iterable[Header], findings: FindingLimit) -> dict[str, TensorInfo]:
    """All tensors by name; tensors in two files are reported once per pair of files."""
    tensors: dict[str, TensorInfo] = {}
    twice: dict[tuple[str, str], list[str]] = defaultdict(list)
    for header in headers:
        if tensors.keys().isdisjoint(header.tensors):
            tensors.update(header.tensors)
        else:
            for name, tensor in header.tensors.items():
                first = tensors.setdefault(name, tensor)
                if first is not tensor:
                    twice[first.file, tensor.file].append(name)
    for (first_file, second_file), names in list(twice.items())[:100]:
        findings.add(
            Finding(
                "duplicate-tensor",
                f"two files hold {_count(names)}",
                layer=shown_name(names[0]),
                file=f"{shown_name(first_file)}, {shown_name(second_file)}",
                expected="every tensor in one file",
                fix="Remove the file that does not belong to the checkpoint.",
            )
        )
    return tensors


def _matching(names: list[str], patterns: Iterable[str]) -> list[str]:
    return [name for pattern in patterns for name in fnmatch.filter(names, pattern) if name not in _NO_WEIGHTS]


def _two_copies(consolidated: list[str], others: list[str]) -> Finding:
    return Finding(
        "duplicate-tensor",
        "the folder holds two sets of weights, and vLLM loads Mistral's consolidated*.safetensors",
        file=shown_name(consolidated[0]),
        found=f"also {', '.join(map(shown_name, others[:3]))}" + (", ..." if len(others) > 3 else ""),
        fix="Remove the set that you do not want to serve.",
        severity=Severity.WARNING,
    )


def _adapter(name: str, *, alone: bool) -> Finding:
    if alone:
        return Finding(
            "unreadable-file",
            "the weights are a LoRA adapter's, and no model's",
            file=shown_name(name),
            expected="the weights of a model",
            fix="Serve the model that the adapter was trained on, and pass this folder with --enable-lora --lora-modules.",
        )
    return Finding(
        "unexpected-tensor",
        "a LoRA adapter lies beside the weights, and vLLM loads it as if it were a part of them",
        file=shown_name(name),
        fix="Move it to a folder of its own, and pass that as a LoRA module.",
        severity=Severity.WARNING,
    )


def _leaving(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Links to targets outside the folder, with their targets."""
    root = os.path.realpath(folder)
    parent = os.path.dirname(root)
    if os.path.basename(parent) == "snapshots":  # huggingface_hub's cache has snapshots/<revision> and blobs
        root = os.path.dirname(parent)
    found = {}
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep):
            found[name] = os.readlink(path)
    return found


def _leaves(name: str, target: str) -> Finding:
    return Finding(
        "unreadable-file",
        "the file is a link that leads out of the folder, and was not opened",
        file=shown_name(name, 1000),
        expected="a file of the folder",
        found=f"a link to {shown_name(target)}",
        fix="Copy the file into the folder; if the link is your own, pass --follow-links.",
    )


_SHARD = re.compile(r"(.*-)([0-9]{5})-of-([0-9]{5})\.safetensors")


def _missing_shards(files: Iterable[str]) -> Iterable[Finding]:
    """Findings for missing files of a series "...-00001-of-00004.safetensors"; used only if no index names the files.

    The length of a series is untrusted: the work is linear in the files that there are.
    """
    series: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in files:
        match = _SHARD.fullmatch(name)
        if match:
            series[match[1], int(match[3])].add(int(match[2]))
    for (prefix, count), numbers in series.items():
        missing = count - sum(1 <= number <= count for number in numbers) if 0 not in numbers else 0
        if missing:
            absent = (number for number in range(1, count + 1) if number not in numbers)
            listed = ", ".join(f"{prefix}{number:05d}-of-{count:05d}.safetensors" for number in islice(absent, 5))
            yield Finding(
                "index-mismatch",
                f"{missing} of {count} weight files are missing, by the numbers in the names of the others",
                file=shown_name(listed, 1000),
                expected=f"{count} files",
                found=f"{count - missing} files, and no index",
                fix="Finish the download, or copy the files from where the checkpoint was made.",
            )


def _too_many(what: str, most: int, count: int) -> Finding:
    return Finding(
        "unreadable-file",
        f"the checkpoint has more {what} than any real one, and not all of them are read",
        expected=f"at most {most:,}",
        found=f"{count:,}",
        fix="Check that this is the right folder.",
    )


def _no_weights(folder: Path, names: list[str]) -> Finding:
    """Finding for a folder without safetensors files."""
    for patterns, message, fix in (
        (
            _PICKLES,
            "the weights are a PyTorch pickle, which is not read: loading one runs code that it holds",
            "Convert them: load with transformers, then save_pretrained(folder, safe_serialization=True).",
        ),
        (("*.gguf",), "the weights are GGUF, which is not read", "Use a safetensors export of the model."),
        (
            ("*.npz", "*.h5", "*.msgpack", "*.onnx"),
            "the weights are not safetensors",
            "Use a safetensors export of the model.",
        ),
    ):
        found = _matching(names, patterns)
        if found:
            return Finding(
                "unreadable-file",
                message,
                file=shown_name(found[0]),
                expected="*.safetensors",
                found=f"{len(found)} such files",
                fix=fix,
            )
    below = _weights_below(folder, names)
    return Finding(
        "unreadable-file",
        "the folder holds no weights" + (", a folder inside does" if below else ""),
        expected="*.safetensors",
        found=f"weights in {shown_name(below)}"
        if below
        else ", ".join(map(shown_name, names[:8])) or "an empty folder",
        fix=f"Give that folder: {shown_name(str(folder / below), 1000)}"
        if below
        else "Check the path, or finish the download.",
    )


def _weights_below(folder: Path, names: Iterable[str]) -> str:
    """A subfolder with safetensors files, or a snapshot of huggingface_hub's cache; "" if there is none."""
    folders = (name for name in names if os.path.isdir(folder / name) and not os.path.islink(folder / name))
    inside = list(islice(folders, 50))
    if "snapshots" in inside:
        inside += [f"snapshots/{name}" for name in sorted(listed(folder / "snapshots"))[:50]]
    return next((name for name in inside if fnmatch.filter(listed(folder / name), "*.safetensors")), "")


def _mismatch(
    index: str,
    message: str,
    *,
    layer: str = "",
    expected: str = "",
    found: str = "",
    nearest: tuple[str, ...] = (),
    fix: str = "Download the index and the weight files again.",
    severity: Severity = Severity.ERROR,
) -> Finding:
    layer = layer and shown_name(layer)
    return Finding("index-mismatch", message, layer, shown_name(index), expected, found, nearest, fix, severity)


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
