# SPDX-License-Identifier: Apache-2.0
"""Common code of AWQ, GPTQ and AutoRound: layers that are stored as qweight, qzeros and scales.

Their configs have a default scheme, exceptions, and implicit exclusions: no embedding, head, router or vision tower is
quantized, whether the config says so or not. So the stored tensors decide whether a layer is quantized, and the config says
how. A layer that is stored quantized although an entry of the config excludes it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel

from vllm_npu_quant.errors import Finding, FindingLimit
from vllm_npu_quant.formats import common
from vllm_npu_quant.formats.described import FLOAT_ENTRY, Described, LayerEntry, StoredTensor
from vllm_npu_quant.formats.index import index_by_rules, is_embedding, stored_layers_of
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.serving.cost import MIN_GROUP
from vllm_npu_quant.spec import Granularity, LayerSpec, Layout, NumberKind, WeightSpec

__all__ = [
    "BITS",
    "FLOAT_BITS",
    "MAX_PROBLEMS",
    "Configured",
    "GroupSize",
    "ModuleNames",
    "index_packed",
    "integer_spec",
    "merge_spellings",
    "parse_config",
    "producer_of",
    "unsupported",
]

#: Bits per weight that the operators hold; schemes of 16 bits and more mean float.
BITS = (2, 3, 4, 8)
FLOAT_BITS = 16

#: The most unsupported parts of a config that are reported.
MAX_PROBLEMS = 20

#: Module names that are tried anywhere in a layer's name.
_MAX_PARTS = 100

#: Tensors that mark a layer as quantized, in case its qweight is missing.
_MARKS = frozenset({"qweight", "qzeros", "scales", "g_idx", "weight_packed"})


def _group_size(value: int) -> int:
    if value == 0 or not -1 <= value <= 1 << 20:
        raise ValueError("group_size is a number of inputs, or -1 for one scale per output")
    return value


#: Inputs that share a scale; -1 for all of them.
GroupSize = Annotated[common.Int, AfterValidator(_group_size)]

#: Config fields that record how a checkpoint was made, or how its producer's runtime loads it.
_RECORDS = frozenset(
    {
        # AutoGPTQ, optimum, GPTQModel
        *("damp_percent", "damp_auto_increment", "true_sequential", "model_name_or_path", "model_file_base_name"),
        *("meta", "tokenizer", "dataset", "model_seqlen", "batch_size", "pad_token_id", "max_input_length"),
        *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "cache_block_outputs"),
        *("module_name_preceding_first_block", "method", "mse", "offload_to_disk", "act_group_aware"),
        # AutoAWQ, transformers
        *("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
        # AutoRound
        *("autoround_version", "auto_round_version", "provider", "iters", "nsamples", "seqlen", "lr", "minmax_lr"),
        *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps"),
        *("low_gpu_mem_usage", "low_cpu_mem_usage", "amp", "scale_dtype", "train_bs", "not_use_best_mse"),
        *("dynamic_max_gap", "quant_block_list", "to_quant_block_names", "enable_alg_ext"),
    }
)

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Configured:
    """A layer according to the config.

    Attributes:
        spec: its quantization if its tensors are stored quantized.
        excluded: whether the config leaves the layer as float.
        explicit: whether an entry of the config excludes it; else a default does, which the stored tensors may overrule.
    """

    spec: LayerSpec
    excluded: bool = False
    explicit: bool = False


class ModuleNames:
    """A config's list of module names, or of parts of names, tried on layers in time that does not grow with the list.

    AutoAWQ and optimum compare by ``entry in layer``. Taken literally, "mlp.gate" is also in ``mlp.gate_proj``. So entries
    that are whole components of a layer's name are distinguished from those that begin or end inside a component. Of the
    latter, 100 are tried: real lists have a handful, and longer ones are lists of full names.
    """

    def __init__(self, names: Iterable[str], source: str = "") -> None:
        """
        Args:
            names: the list.
            source: the config's file, for messages.
        """
        self._work = common.Work(source)
        distinct = dict.fromkeys(filter(None, names))
        self._whole = common.ComponentRules(filter(None, (name.strip(".") for name in distinct)), self._work)
        # Full names have the number of a layer among their components: they come last.
        parts = sorted(distinct, key=lambda name: any(map(str.isdigit, name.split("."))))
        self.parts = tuple(parts[:_MAX_PARTS])

    def __bool__(self) -> bool:
        return bool(self.parts)

    def match_components(self, layer: str) -> bool:
        """Whether an entry equals successive whole components of a layer's name."""
        return self._whole.match(layer)

    def match_anywhere(self, layer: str) -> bool:
        """Whether one of ``parts`` is anywhere in a layer's name."""
        self._work.spend(len(self.parts) // 4 + 1)
        return any(part in layer for part in self.parts)


def integer_spec(scheme: str, layout: Layout, bits: int, group_size: int, symmetric: bool) -> LayerSpec:
    """The spec of weights of ``bits`` bits with one scale per ``group_size`` inputs, -1 for all inputs."""
    granularity = Granularity.GROUP if group_size > 0 else Granularity.CHANNEL
    weight = WeightSpec(bits, granularity=granularity, group_size=max(group_size, 0), symmetric=symmetric)
    return LayerSpec(f"{scheme} W{bits}A16", layout, weight)


def merge_spellings(
    config: Any, spellings: Mapping[str, Sequence[str]], *, lower: Sequence[str] = ()
) -> dict[str, Any]:
    """A config with one spelling per field, and without the producer's records.

    Args:
        config: the JSON object.
        spellings: field -> its other names.
        lower: fields whose text is compared in lower case.

    Raises:
        ValueError: two spellings of a field have different values; or the config is no object.
    """
    if not isinstance(config, Mapping):
        raise ValueError("a quantization config is a JSON object")
    merged = dict(config)
    for name, others in spellings.items():
        given = {key: merged[key] for key in (name, *others) if merged.get(key) is not None}
        values = [_lowered(value) for value in given.values()]
        if any(value != values[0] for value in values[1:]):
            raise ValueError(" and ".join(given) + " are names of one thing and have different values")
        for key in (name, *others):
            merged.pop(key, None)
        if given:
            merged[name] = next(iter(given.values()))
    for name in lower:
        if name in merged:
            merged[name] = _lowered(merged[name])
    return {key: value for key, value in merged.items() if key not in _RECORDS}


def _lowered(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def parse_config(model: type[_Model], config: Mapping[str, Any], source: str, found: FindingLimit) -> _Model | None:
    """Validate a quantization config, and report unknown fields. Returns None, after findings, if it is not valid."""
    parsed = common.parse_config(model, config, source, found)
    unknown = common.unknown_fields_finding(parsed.model_extra, source) if parsed is not None else None
    if unknown is not None:
        found.add(unknown)
    return parsed


def unsupported(what: str, expected: str, value: Any, source: str) -> Finding:
    """The finding for an unsupported config value.

    Args:
        what: the subject of "... is not served".
        expected: what is supported.
        value: the config's value.
        source: the config's file.
    """
    return Finding(
        "unsupported-scheme",
        f"{what} is not served",
        file=source,
        expected=expected,
        found=str(value)[:80],
        fix="re-export the checkpoint with " + expected,
    )


def producer_of(config: Mapping[str, Any]) -> str:
    """The tool that wrote a config, and its version; empty if the config does not say."""

    if version := common.config_text(config, "autoround_version"):
        return f"AutoRound {version}"
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(quantizer, list) and quantizer:
        quantizer = quantizer[0]
    name = quantizer[:60].replace(":", " ") if isinstance(quantizer, str) else ""
    return name or common.config_text(config, "provider")


def index_packed(
    described: Described,
    tensors: Mapping[str, StoredTensor],
    configured: Callable[[str], Configured],
    found: FindingLimit,
    *,
    adjust: Callable[[str, LayerSpec, Mapping[str, StoredTensor]], LayerSpec] | None = None,
) -> None:
    """Fill ``described`` with the stored layers, and report contradictions between config and tensors.

    Args:
        described: whose layers are filled.
        tensors: the stored tensors, by name.
        configured: returns a layer according to the config, from its name.
        found: collects the findings.
        adjust: the spec of a quantized layer from its name, the config's spec and its tensors, if they say more than the
            config.
    """
    not_excluded: list[str] = []
    kv_cache: set[str] = set()

    def entry_of(layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
        kv_cache.update(common.kv_cache_tensors(layer, named))
        weight = None
        if _MARKS.isdisjoint(named):
            weight = named.get("weight")
            if weight is None:
                return None
            if weight.dtype in common.FLOAT_DTYPES:
                if len(weight.shape) == 2 and not is_embedding(layer) and not configured(layer).excluded:
                    not_excluded.append(layer)
                return FLOAT_ENTRY
        layer_config = configured(layer)
        if weight is not None and LAYOUTS[layer_config.spec.layout].tensors[0].name != "weight":
            found.add(_foreign_dtype(layer, weight, described.format))
            return None
        if layer_config.explicit:
            found.add(_excluded_but_quantized(layer, named, described.source))
            return None
        spec = layer_config.spec if adjust is None else adjust(layer, layer_config.spec, named)
        return _quantized_entry(layer, spec, named, described.source, found)

    index_by_rules(described, stored_layers_of(tensors), entry_of, not_excluded, found)
    if kv_cache:
        described.dropped = (*common.KV_CACHE_TENSORS, *common.KV_OUTPUTS)
        found.add(common.kv_cache_finding(", ".join(sorted(kv_cache)), described.source))


def _quantized_entry(
    layer: str, spec: LayerSpec, named: Mapping[str, StoredTensor], source: str, found: FindingLimit
) -> LayerEntry:
    """The entry of a layer that is stored quantized."""
    weight = spec.weight
    scales = named.get("scales")
    several = scales is None or not scales.shape or scales.shape[0] > 1
    if weight is not None and weight.kind is NumberKind.INT and 0 < weight.group_size < MIN_GROUP and several:
        found.add(
            Finding(
                "operator-limit",
                "npu_weight_quant_batchmatmul takes groups of a multiple of 32 inputs, and filling these up with zeros "
                "would more than double the weight",
                layer=layer,
                file=source,
                expected=f"a group size of at least {MIN_GROUP}, or -1",
                found=f"groups of {weight.group_size}",
                fix="re-export the checkpoint with a larger group size",
            )
        )
    # Zero points that the config requires are not optional: the check of the layout reports their absence.
    asymmetric = weight is not None and not weight.symmetric
    needs = [tensor.name for tensor in LAYOUTS[spec.layout].tensors if tensor.optional and tensor.name == "qzeros"]
    kv_cache = common.kv_cache_tensors(layer, named)
    return common.layer_entry(layer, spec, named, found, needs=needs if asymmetric else (), ignored=kv_cache)


def _foreign_dtype(layer: str, weight: StoredTensor, format_name: str) -> Finding:
    return Finding(
        "wrong-dtype",
        f"the config is {format_name}'s, and this weight has a dtype that {format_name} does not store",
        layer=layer,
        file=weight.file,
        expected=f"{layer}.qweight I32, or a float weight",
        found=weight.dtype,
        fix="check that the config and the weights belong together",
    )


def _excluded_but_quantized(layer: str, named: Mapping[str, StoredTensor], source: str) -> Finding:
    marks = sorted(_MARKS & named.keys())
    stored = named[marks[0] if marks else "weight"]
    return Finding(
        "bad-config",
        "the config calls the layer float, and its weight is stored quantized",
        layer=layer,
        file=source,
        expected=f"{layer}.weight in a float dtype",
        found=f"{', '.join(marks) or stored.dtype} in {stored.file}",
        fix="remove the rule that excludes the layer from the quantization config, or re-export the weights",
    )
