# SPDX-License-Identifier: Apache-2.0
"""Common code of the format readers: limits, findings, names of KV-cache tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, StrictBool, StrictInt, ValidationError, model_validator

from vllm_npu_quant.checkpoint.text import shown, shown_name
from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity
from vllm_npu_quant.formats.described import LayerEntry, StoredTensor
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import LayerSpec

#: safetensors dtypes of weights that are not quantized.
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

#: The most entries of a list or dictionary in a config: real lists have a few per decoder layer.
MAX_RULES = 200_000
_MAX_SHOWN = 20

#: Last name components of layers that producers leave unquantized without listing them: heads and routers.
FLOAT_BY_CONVENTION = frozenset({"lm_head", "gate", "shared_expert_gate", "router"})

#: Steps of about 0.3 us that one config's rules may take. Lists of 100 names take 2,500,000 in the largest known models.
MAX_STEPS = 10_000_000

_Model = TypeVar("_Model", bound=BaseModel)


def _number(value: Any) -> Any:
    """An integer that a producer wrote as text ("128") or as a float (128.0); anything else is returned unchanged."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if len(text) < 20 and text.removeprefix("-").isdecimal() and text.isascii() else value


def _truth(value: Any) -> Any:
    """A boolean that a producer wrote as text ("true", "False") or as 0 or 1; anything else is returned unchanged."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    return bool(value) if type(value) is int and value in (0, 1) else value


#: Integers and booleans of a config, in the spellings that producers write.
Int = Annotated[StrictInt, BeforeValidator(_number)]
Bool = Annotated[StrictBool, BeforeValidator(_truth)]


class ConfigModel(BaseModel):
    """A part of a quantization config. A null stands for an optional field's default."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {key: one for key, one in value.items() if one is not None or key not in optional}


class Work:
    """The work that the rules of one config may take, counted in steps: the same on every host."""

    def __init__(self, source: str, steps: int | None = None) -> None:
        """
        Args:
            source: the config's file, for messages.
            steps: the limit; MAX_STEPS if None.
        """
        self.source = source
        self.left = MAX_STEPS if steps is None else steps

    def spend(self, steps: int) -> None:
        """Count some steps.

        Raises:
            NpuQuantError: bad-config if none are left.
        """
        self.left -= steps
        if self.left < 0:
            raise NpuQuantError(
                [
                    Finding(
                        "bad-config",
                        "matching the config's rules with the layers' names takes too much work",
                        file=self.source,
                        expected="rules and names as producers write them",
                        fix="check where the config and the weight files come from",
                    )
                ]
            )


class ComponentRules:
    """Rules that are successive whole components of layers' names: "mlp.gate" stands for "model.layers.0.mlp.gate".

    A layer's name is split once for each of its modules that was not seen before, so the experts of a model take few steps.
    """

    _MAX_COMPONENTS = 32
    _MAX_KNOWN = 1 << 16

    def __init__(self, names: Iterable[str], work: Work) -> None:
        self.names = frozenset(names)
        lengths = {name.count(".") + 1 for name in self.names}
        self._lengths = [length for length in sorted(lengths) if length <= self._MAX_COMPONENTS]
        self._known: dict[str, bool] = {}
        self._work = work

    def match(self, layer: str) -> bool:
        """Whether a rule equals successive components of a layer's name.

        Raises:
            NpuQuantError: bad-config if the rules take too much work.
        """
        if not self._lengths:
            return False
        new, module = [], layer
        while module and module not in self._known:
            self._work.spend(len(self._lengths) + len(module) // 64)
            new.append(module)
            module = module.rpartition(".")[0]
        found = self._known.get(module, False)
        for module in reversed(new):
            found = found or self._ends(module)
            if len(self._known) == self._MAX_KNOWN:
                self._known.clear()
            self._known[module] = found
        return found

    def _ends(self, module: str) -> bool:
        """Whether a rule equals the last components of a module's name."""
        parts = module.split(".")
        return any(".".join(parts[-length:]) in self.names for length in self._lengths if length <= len(parts))


#: Tensors beside a layer's weight that quantize the KV cache.
KV_CACHE_TENSORS = (
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "k_zero_point",
    "v_zero_point",
    "q_zero_point",
    "prob_output_scale",
)
#: The same beside layers that compute keys and values, if their outputs are quantized for the cache.
KV_OUTPUTS = ("output_scale", "output_zero_point")
_KV_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"})


#: Last components of the names of quantized weights, in any dtype.
_QUANTIZED_NAMES = frozenset({"qweight", "weight_packed"})


def is_quantized_weight(name: str, tensor: StoredTensor) -> bool:
    """Whether a stored tensor is a weight in a dtype, or under a name, that only quantized checkpoints have."""
    last = name.rpartition(".")[2]
    if last == "weight" or last.endswith(
        ("_proj", "_proj_blocks")
    ):  # the experts of a layer may be one tensor without ".weight"
        return tensor.dtype.startswith(("I", "U", "F8_", "F6_", "F4"))
    return last in _QUANTIZED_NAMES


def config_text(config: Mapping[str, Any], key: str) -> str:
    """A short text in a config, cut to 40 characters; empty if the key is absent or holds anything else."""
    value = config.get(key)
    return value[:40] if isinstance(value, str) else ""


def kv_cache_tensors(layer: str, named: Mapping[str, StoredTensor]) -> set[str]:
    """The names among a layer's tensors that quantize the KV cache."""
    kv = named.keys() & set(KV_CACHE_TENSORS)
    return kv | (named.keys() & set(KV_OUTPUTS)) if layer.rpartition(".")[2] in _KV_LAYERS else kv


def parse_config(model: type[_Model], config: Mapping[str, Any], source: str, found: FindingLimit) -> _Model | None:
    """Validate a quantization config. Returns None, after findings, if it is not valid."""
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        found.extend(config_findings(error, source))
        return None


def layer_entry(
    layer: str,
    spec: LayerSpec,
    named: Mapping[str, StoredTensor],
    found: FindingLimit,
    *,
    needs: Iterable[str] = (),
    ignored: Iterable[str] = (),
) -> LayerEntry:
    """The entry of a stored quantized layer. Reports tensors that its layout does not have.

    Args:
        layer: its name.
        spec: its quantization.
        named: its stored tensors, by the last component of their names.
        found: collects the findings.
        needs: optional tensors of the layout that the config requires.
        ignored: names of tensors that are dropped on purpose.
    """
    known = {tensor.name: tensor for tensor in LAYOUTS[spec.layout].tensors}
    dropped = frozenset(ignored)
    for name in (name for name in named if name not in known and name not in dropped):
        found.add(unexpected_tensor(layer, spec, name, named[name].file))
    return LayerEntry(spec, frozenset(needs) | {name for name in named if name in known and known[name].optional})


def unexpected_tensor(layer: str, spec: LayerSpec, name: str, file: str) -> Finding:
    """The finding for a tensor of a quantized layer that its layout does not have."""
    return Finding(
        "unexpected-tensor",
        f"{spec.scheme} has no tensor {name}, so its effect would be lost",
        layer=layer,
        file=file,
        expected=", ".join(tensor.name for tensor in LAYOUTS[spec.layout].tensors),
        found=name,
        fix="update vllm-npu-quant, or re-export the checkpoint without it",
    )


def silent_finding(layers: Sequence[str], source: str) -> Finding | None:
    """The finding for layers that are stored as float although no rule excludes them; None if there are none."""
    if not layers:
        return None
    many, them, run = f"{len(layers):,} layers are", "them", "they run"
    if len(layers) == 1:
        many, them, run = "a layer is", "it", "it runs"
    return Finding(
        "undescribed-layer",
        f"{many} stored as float although the config does not exclude {them}; {run} as float",
        file=source,
        found=", ".join(layers[:4]) + (", ..." if len(layers) > 4 else ""),
        severity=Severity.INFO,
    )


def kv_cache_finding(found: str, source: str) -> Finding:
    """The finding for a checkpoint with scales for a quantized KV cache."""
    return Finding(
        "kv-cache-not-quantized",
        "the weights are served; the KV cache stays in the model's dtype and its scales are dropped",
        file=source,
        found=found,
        severity=Severity.WARNING,
    )


def unknown_fields_finding(extra: Mapping[str, Any] | None, source: str) -> Finding | None:
    """The warning about unknown config fields; empty fields are ignored."""
    unknown = sorted(name for name, value in (extra or {}).items() if value not in (None, {}, [], "", False))
    if not unknown:
        return None
    return Finding(
        "bad-config",
        "the quantization config has fields that are not known here; they are ignored",
        file=source,
        found=", ".join(shown_name(name, 60) for name in unknown[:_MAX_SHOWN]),
        fix="check what they mean for the weights",
        severity=Severity.WARNING,
    )


def config_findings(error: ValidationError, source: str) -> list[Finding]:
    """A pydantic error as findings, one per field."""
    return [
        Finding(
            "bad-config",
            problem["msg"],
            file=source,
            expected=f"{shown_name('.'.join(str(part) for part in problem['loc']))} as the format documents it",
            found=shown(problem["input"]),
            fix="re-export the checkpoint with its producer, or correct the field by hand",
        )
        for problem in error.errors(include_url=False)[:_MAX_SHOWN]
    ]
