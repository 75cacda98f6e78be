# SPDX-License-Identifier: Apache-2.0
"""Declarations of formats, which their own modules hold, and the registry of them.

Detection, vLLM's config classes, registration, the support matrix and ``inspect`` read the declarations; nothing else names
a format. A package outside of this one adds formats, layouts and dispatch rows by an entry point of the group
``vllm_npu_quant.extensions``, which names a function without arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.formats.described import Described, StoredTensor
from vllm_npu_quant.layouts.tables import LayoutRow, register_layout

if TYPE_CHECKING:
    from vllm_npu_quant.checkpoint import Checkpoint

__all__ = ["EXTENSIONS", "Format", "Sample", "find_format", "formats", "register_format", "require_format"]

#: The entry-point group of packages that extend this one.
EXTENSIONS = "vllm_npu_quant.extensions"

#: Modules of the built-in formats, in the order in which vLLM asks their config classes.
_BUILT_IN = ("modelslim", "compressed_tensors", "fp8", "modelopt", "awq", "gptq", "auto_round", "online")


@dataclass(frozen=True)
class Sample:
    """One scheme of a format, for the support matrix.

    Attributes:
        label: the format's own name for the scheme.
        config: a config that names it.
        tensors: the stored tensors of ``samples.LAYER`` and ``samples.EXPERTS``.
    """

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def _no_producer(config: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class Format:
    """A quantization format.

    Attributes:
        name: the field's name for it ("awq").
        read: ``read(config, tensors, source, checkpoint)`` describes a checkpoint's layers and raises nothing. ``config`` is
            the JSON object that describes the quantization, ``tensors`` the stored tensors by name, ``source`` the name of
            the config's file, ``checkpoint`` the opened checkpoint for formats that need values or other files, or None.
        method_name: the name registered with vLLM ("npu_awq").
        quant_methods: spellings of ``quant_method`` in config.json, in lower case with "-" for "_".
        aliases: further names that ``quantization=`` accepts for it.
        file_beside: from the names of a folder's files to the one that describes the quantization if config.json does not.
        title: the name in messages; ``name`` if empty.
        needs_file: the file that users should look for if none describes the quantization.
        read_by_vllm: whether vLLM looks for that file itself.
        rounds: whether it is no format of checkpoints, but rounds the weights of float ones while they load, if a user asks.
        decisive: whether that file contradicts a config.json that names another format.
        is_complete: whether a ``quantization_config`` is complete, so that a decisive file beside it is not needed.
        has_fields: whether a ``quantization_config`` without a ``quant_method`` has fields that only this format has.
        left_to_vllm_ascend: whether vllm-ascend serves all schemes of a ``quantization_config`` itself. The second argument
            is the model's configuration as vLLM has it, or None.
        unserved_by_vllm_ascend: of a decisive file's object and name, what vllm-ascend does not serve, in words; empty if it
            serves all of it. None if vllm-ascend does not read such files.
        float_reason: why layers are float, for ``inspect``; ``{source}`` stands for the file.
        producer: the tool that wrote a config, and its version; empty if the config does not say.
        samples: the schemes that the format can name.
        layouts: layouts that only this format has, by name.
    """

    name: str
    read: Callable[[Mapping[str, Any], Mapping[str, StoredTensor], str, Checkpoint | None], Described]
    method_name: str
    quant_methods: frozenset[str]
    aliases: frozenset[str] = frozenset()
    file_beside: Callable[[Iterable[str]], str | None] = field(default=lambda names: None)
    title: str = ""
    needs_file: str = ""
    read_by_vllm: bool = False
    rounds: bool = False
    decisive: bool = False
    is_complete: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: True)
    has_fields: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: False)
    left_to_vllm_ascend: Callable[[Mapping[str, Any], Any], bool] = field(default=lambda config, model: False)
    unserved_by_vllm_ascend: Callable[[Mapping[str, Any], str], str] | None = None
    float_reason: str = "{source} excludes it, or it is excluded by convention"
    producer: Callable[[Mapping[str, Any]], str] = _no_producer
    samples: Callable[[], Iterable[Sample]] = tuple
    layouts: Mapping[str, LayoutRow] = field(default_factory=dict)

    def serves(self, quantization_config: Mapping[str, Any]) -> bool:
        """Whether config.json's quantization_config is of this format: by its quant_method, or by its fields without one."""
        method = plain_method(quantization_config.get("quant_method"))
        return method in self.quant_methods if method else self.has_fields(quantization_config)

    def answers_to(self, quantization: str) -> bool:
        """Whether a user may mean this format by ``quantization=``."""
        return (
            quantization.lower() in {self.method_name, *self.aliases}
            or plain_method(quantization) in self.quant_methods
        )


def plain_method(method: Any) -> str:
    """A ``quant_method`` of an untrusted config, as text in the spelling of declarations."""
    return str(method or "")[:200].lower().replace("_", "-")


_formats: dict[str, Format] = {}
_loaded: set[str] = set()


def register_format(declaration: Format) -> None:
    """Add a format. The same declaration may be added again.

    Raises:
        ValueError: another format has its name, or its name registered with vLLM.
    """
    for other in _formats.values():
        same = {other.name, other.method_name} & {declaration.name, declaration.method_name}
        if same and other != declaration:
            raise ValueError(f"a format named {', '.join(sorted(same))} is registered already")
    for name, row in declaration.layouts.items():
        register_layout(name, row)
    _formats[declaration.name] = declaration


def formats() -> tuple[Format, ...]:
    """Every format: the built-in ones, then those of extensions."""
    for module in _BUILT_IN:
        if module not in _loaded:
            found = import_module(f"vllm_npu_quant.formats.{module}")
            for declaration in getattr(found, "FORMATS", None) or (found.FORMAT,):
                register_format(declaration)
            _loaded.add(module)
    if EXTENSIONS not in _loaded:
        _loaded.add(EXTENSIONS)  # before they are loaded: an extension may ask for the formats itself
        complete = False
        try:
            for entry_point in metadata.entry_points(group=EXTENSIONS):
                entry_point.load()()
            complete = True
        finally:
            if not complete:  # the error passes, and the next caller meets it too
                _loaded.discard(EXTENSIONS)
    return tuple(_formats.values())


def find_format(name: str) -> Format | None:
    """The format of this name, or of this ``quant_method``."""
    plain = plain_method(name)
    return next((one for one in formats() if plain == one.name or plain in one.quant_methods), None)


def require_format(name: str, source: str) -> Format:
    """``find_format`` that raises.

    Raises:
        NpuQuantError: unknown-scheme if there is no such format.
    """
    declaration = find_format(name)
    if declaration is None:
        raise NpuQuantError(
            [
                Finding(
                    "unknown-scheme",
                    "no format of this name is registered here",
                    file=source,
                    expected="one of " + ", ".join(one.name for one in formats()),
                    found=name[:60],
                    fix="install the extension that adds it",
                )
            ]
        )
    return declaration
