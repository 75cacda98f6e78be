# SPDX-License-Identifier: Apache-2.0
"""What AWQ, GPTQ and AutoRound share: layers that are stored as qweight, qzeros and scales.

Their configs have one scheme, exceptions from it, and much that goes without saying: no embedding, head, router or vision
tower is quantized, whether the config says so or not. So a stored qweight makes a layer quantized, a stored float weight
makes it float, and the config says how. Where it says firmly that a quantized layer is float, that is an error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, StrictInt, ValidationError

from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.base import FLOAT_ENTRY, LayerEntry
from vllm_npu_quant.formats.check import FindingLimit, StoredTensor
from vllm_npu_quant.formats.fp8 import config_findings, silent_finding, unknown_fields_finding
from vllm_npu_quant.formats.rules import FLOAT_DTYPES, RuleFormat, index_layers, is_embedding, stored_layers_of
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.spec import FLOAT, Granularity, LayerSpec, Layout, WeightSpec

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "MAX_RULES",
    "PRODUCER_FIELDS",
    "GroupSize",
    "PackedFormat",
    "Reader",
    "Ruling",
    "float_ruling",
    "integer_spec",
    "is_float_by_convention",
    "merge_spellings",
    "parse_config",
    "refused_value",
]

#: Groups smaller than this cannot be filled up to the operator's 32 within twice the memory.
MIN_GROUP = 16
#: Entries of lists and dictionaries in a config at most.
MAX_RULES = 200_000

#: Tensors that mark a layer as quantized, should its qweight be missing.
_MARKS = frozenset({"qweight", "qzeros", "scales", "g_idx"})


def _group_size(value: int) -> int:
    if value == 0 or not -1 <= value <= 1 << 20:
        raise ValueError("group_size is a number of inputs, or -1 for one scale per output")
    return value


#: Inputs that share a scale; -1 for all of them.
GroupSize = Annotated[StrictInt, AfterValidator(_group_size)]

#: Config fields that say how a checkpoint was made, or how its producer's runtime loads it, and nothing about its numbers.
PRODUCER_FIELDS = frozenset(
    {
        # AutoGPTQ, optimum, GPTQModel
        *(
            "damp_percent",
            "damp_auto_increment",
            "true_sequential",
            "model_name_or_path",
            "model_file_base_name",
            "meta",
        ),
        *("tokenizer", "dataset", "model_seqlen", "batch_size", "pad_token_id", "max_input_length", "use_cuda_fp16"),
        *(
            "use_exllama",
            "disable_exllama",
            "exllama_config",
            "cache_block_outputs",
            "module_name_preceding_first_block",
        ),
        *("method", "mse", "offload_to_disk", "act_group_aware"),
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

#: The values of a stored tensor.
Reader = Callable[[str], "np.ndarray"]


@dataclass(frozen=True)
class Ruling:
    """What a config says about a layer.

    Attributes:
        spec: its quantization, or FLOAT.
        firm: whether a rule names the layer; else it is what goes without saying, and the stored tensors decide.
        fallback: for a float layer, how it would be quantized if its tensors say that it is.
    """

    spec: LayerSpec
    firm: bool = False
    fallback: LayerSpec | None = None


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
    return {key: value for key, value in merged.items() if key not in PRODUCER_FIELDS}


def _lowered(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def refused_value(what: str, expected: str, found: Any, source: str, *, layer: str = "") -> Finding:
    """The finding for a config value that is known, or may be, and is not served."""
    return Finding(
        "unsupported-scheme",
        f"{what} is not served",
        layer=layer,
        file=source,
        expected=expected,
        found=str(found)[:80],
        fix="re-export the checkpoint with " + expected,
    )


def parse_config(model: type[_Model], config: Mapping[str, Any], source: str, found: FindingLimit) -> _Model | None:
    """Validate a quantization config; None, after findings, where it is not valid."""
    try:
        parsed = model.model_validate(dict(config))
    except ValidationError as error:
        for finding in config_findings(error, source):
            found.add(finding)
        return None
    unknown = unknown_fields_finding(parsed.model_extra, source)
    if unknown is not None:
        found.add(unknown)
    return parsed


@dataclass
class PackedFormat(RuleFormat):
    """A format whose layers are stored as qweight, qzeros and scales.

    Attributes:
        file_tensors: names of optional tensors that its producers store in every layer, for checkpoints whose files are not
            known yet.
    """

    file_tensors: frozenset[str] = field(default_factory=frozenset)

    @abstractmethod
    def ruling(self, layer: str) -> Ruling:
        """What the config says about a layer."""

    def rule(self, layer: str) -> LayerEntry | None:
        if is_embedding(layer):
            return None
        spec = self.ruling(layer).spec
        return FLOAT_ENTRY if spec.is_float else LayerEntry(spec, self.file_tensors)

    def refine(self, layer: str, spec: LayerSpec, named: Mapping[str, StoredTensor]) -> LayerSpec:
        """The spec of a stored layer, where its tensors say more than the config."""
        return spec

    def index_stored(self, tensors: Mapping[str, StoredTensor], found: FindingLimit) -> None:
        """Look up every stored layer, and report where config and tensors disagree."""
        silent: list[str] = []

        def decide(layer: str, named: Mapping[str, StoredTensor]) -> LayerEntry | None:
            if _MARKS.isdisjoint(named):
                return self.unpacked(layer, named, silent, found)
            ruling = self.ruling(layer)
            spec = ruling.spec
            if spec.is_float:
                if ruling.firm or ruling.fallback is None:
                    found.add(self._stored_quantized(layer, named))
                    return None
                spec = ruling.fallback
            spec = self.refine(layer, spec, named)
            return self._entry(layer, spec, named, found)

        self.index = index_layers(stored_layers_of(tensors), decide, self.source)
        for finding in self.index.findings:
            found.add(finding)
        line = silent_finding(silent, self.source)
        if line is not None:
            found.add(line)

    def unpacked(
        self, layer: str, named: Mapping[str, StoredTensor], silent: list[str], found: FindingLimit
    ) -> LayerEntry | None:
        """The entry of a layer without packed tensors."""
        weight = named.get("weight")
        if weight is None:
            return None
        if weight.dtype not in FLOAT_DTYPES:
            found.add(
                Finding(
                    "wrong-dtype",
                    f"the config is {self.name}'s, and this weight has a dtype that {self.name} does not store",
                    layer=layer,
                    file=weight.file,
                    expected=f"{layer}.qweight I32, or a float weight",
                    found=weight.dtype,
                    fix="check that the config and the weights belong together",
                )
            )
            return None
        if len(weight.shape) == 2 and not is_embedding(layer) and not self.ruling(layer).spec.is_float:
            silent.append(layer)
        return FLOAT_ENTRY

    def _entry(
        self, layer: str, spec: LayerSpec, named: Mapping[str, StoredTensor], found: FindingLimit
    ) -> LayerEntry | None:
        """The entry of a layer whose packed tensors are stored."""
        assert spec.weight is not None
        known = {tensor.name: tensor for tensor in LAYOUTS[spec.layout].tensors}
        for name, tensor in named.items():
            if name not in known:
                found.add(
                    Finding(
                        "unexpected-tensor",
                        f"{spec.scheme} has no tensor {name}, so its effect would be lost",
                        layer=layer,
                        file=tensor.file,
                        expected=", ".join(known),
                        found=name,
                        fix="update vllm-npu-quant, or re-export the checkpoint without it",
                    )
                )
        group = spec.weight.group_size
        scales = named.get("scales")
        several = scales is None or not scales.shape or scales.shape[0] > 1
        if 0 < group < MIN_GROUP and several:
            found.add(
                Finding(
                    "operator-limit",
                    "npu_weight_quant_batchmatmul takes groups of a multiple of 32 inputs, and filling these up with zeros "
                    "would more than double the weight",
                    layer=layer,
                    file=self.source,
                    expected=f"a group size of at least {MIN_GROUP}, or -1",
                    found=f"groups of {group}",
                    fix="re-export the checkpoint with a larger group size",
                )
            )
        optional = {name for name, tensor in known.items() if tensor.optional and name in named}
        if not spec.weight.symmetric and "qzeros" in known and known["qzeros"].optional:
            optional.add("qzeros")  # not optional then: the check of the layout reports its absence
        return LayerEntry(spec, frozenset(optional))

    def _stored_quantized(self, layer: str, named: Mapping[str, StoredTensor]) -> Finding:
        stored = next(tensor for name, tensor in named.items() if name in _MARKS)
        return Finding(
            "bad-config",
            "the config calls the layer float, and its weight is stored quantized",
            layer=layer,
            file=self.source,
            expected=f"{layer}.weight in a float dtype",
            found=f"{', '.join(sorted(_MARKS & set(named)))} in {stored.file}",
            fix="remove the rule that excludes the layer from the quantization config, or re-export the weights",
        )


def is_float_by_convention(layer: str) -> bool:
    """Whether producers leave a layer alone without saying so, as far as its name tells."""
    return layer.rpartition(".")[2] in ("lm_head", "gate", "shared_expert_gate", "router")


def float_ruling(fallback: LayerSpec, *, firm: bool = False) -> Ruling:
    """A layer that the config calls float."""
    return Ruling(FLOAT, firm, fallback)
