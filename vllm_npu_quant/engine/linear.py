# SPDX-License-Identifier: Apache-2.0
"""Quantized Linear layers and lm_head in vLLM.

The adapter registers the checkpoint's own tensors as parameters, so that vLLM's loaders shard them; after loading it turns
them into canonical numbers, and those into what the NPU method class wants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from math import gcd
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)

from vllm_npu_quant.engine import platforms
from vllm_npu_quant.engine.coverage import Coverage, WriteWitness
from vllm_npu_quant.errors import Finding, NpuQuantError, raise_findings
from vllm_npu_quant.formats.resolve import ResolvedLayer
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.g_idx import ranks_that_fit
from vllm_npu_quant.layouts.modelslim import decode_int64_scale
from vllm_npu_quant.layouts.tables import IN, LAYOUTS, Axis, LayerSizes, TensorSpec, group_size_of, tensors_of
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext
from vllm_npu_quant.serving.decide import Served
from vllm_npu_quant.spec import LayerKind, LayerSpec, TransformSpec, WeightSpec

__all__ = ["CHECKPOINT_BIAS", "NpuQuantLinearMethod"]

#: Name under which a quantized layer's own bias is loaded. The checkpoint's name, "bias", belongs to vLLM, which creates
#: that parameter only for model classes that have a bias.
CHECKPOINT_BIAS = "checkpoint_bias"

#: safetensors name -> torch dtype, for the dtypes that parameters and checkpoints use.
TORCH_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    # A dtype of newer torch versions.
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: Load formats that fill parameters without their weight loaders.
UNWITNESSED_LOADS = frozenset({"dummy", "sharded_state"})


def load_object(path: str) -> Any:
    """The object behind "module:qualname"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@register_weight_loader_v2_supported_method
class NpuQuantLinearMethod(LinearMethodBase):
    """One quantized layer: ``resolved`` says where its numbers come from, ``row`` which NPU method computes with them."""

    def __init__(self, resolved: ResolvedLayer, served: Served, source: str) -> None:
        self.resolved = resolved
        self.spec = served.stored
        self.kind = served.kind
        self.source = source
        self.row = served.require_row(layer=resolved.prefix, file=source)
        self.method: NpuLinearMethod = load_object(self.row.method)()
        self.tensors = tuple(tensor for tensor in tensors_of(self.spec, resolved.listed_tensors()) if tensor.loaded)
        self.coverage: dict[str, Coverage] = {}
        # vllm-ascend looks here for its own scheme object.
        self.quant_method = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors of this rank's part of the layer.

        Raises:
            NpuQuantError: cannot-shard where a packed dimension or a group would be cut.
        """
        weight_loader = extra_weight_attrs.pop("weight_loader")
        self._fit_groups(input_size, input_size_per_partition)
        sizes = LayerSizes(
            outputs=sum(output_partition_sizes),
            inputs=input_size_per_partition,
            group_size=group_size_of(self.spec),
            shards=len(output_partition_sizes),
            all_inputs=input_size,
            transform=self.spec.transform or TransformSpec(),
        )
        raise_findings(self._shard_findings(output_partition_sizes, input_size_per_partition, input_size))
        # The rows of the whole layer; a vocabulary is padded in memory, not on disk.
        self.outputs = getattr(layer, "org_vocab_size", output_size)
        rank = getattr(layer, "tp_rank", 0) if input_size_per_partition != input_size else 0
        self.context = PrepareContext(
            act_dtype=params_dtype,
            adds_constants=rank == 0,
            inputs_start=rank * input_size_per_partition,
            inputs_whole=input_size,
        )
        self.partitions = list(output_partition_sizes)
        if self.kind is LayerKind.LM_HEAD:
            weight_loader = _vocabulary_loader(layer, weight_loader)
        for tensor in self.tensors:
            name = CHECKPOINT_BIAS if tensor.name == "bias" else tensor.name
            param = _parameter(tensor.as_loaded(), sizes, self._loader(layer, tensor, name, weight_loader))
            self.coverage[name] = Coverage(param.shape)
            if hasattr(layer, "tp_rank"):  # lm_head has none before vLLM 0.30
                # A layer may be cut over another group than the tensor-parallel one, which the parameter took its rank from.
                param.tp_rank, param.tp_size = layer.tp_rank, layer.tp_size
            layer.register_parameter(name, param)

    def _fit_groups(self, inputs: int, part: int) -> None:
        """Where ranks cut a group of inputs, take a smaller group that they do not cut, and repeat its scale: exact."""
        group = group_size_of(self.spec)
        self.inputs, self.part = inputs, part
        if not group or part == inputs:
            return
        if any(tensor.axis_of(Axis.ALL_GROUPS) is not None for tensor in self.tensors):
            raise_findings(self._act_order_findings(group, inputs // part))
            return
        if part % group == 0:
            return
        smaller = gcd(part, group)
        self.spec = replace(self.spec, weight=regrouped(self.spec.weight, smaller))

    def _act_order_findings(self, group: int, ranks: int) -> list[Finding]:
        """Whether a rank's part of the inputs holds enough of each group; with activation order they are anywhere."""
        fitting = ranks_that_fit(group)
        if ranks <= fitting:
            return []
        return [
            Finding(
                "cannot-shard",
                "with activation order (desc_act), the inputs of each group are spread over all ranks, and a rank fills its "
                "part of a group up to 32",
                layer=self.resolved.prefix,
                file=self.source,
                expected=f"at most {fitting} ranks for groups of {group}, which at most doubles the weight",
                found=f"{ranks} ranks",
                fix=f"use --tensor-parallel-size {fitting} or less, or a checkpoint without desc_act",
            )
        ]

    def _shard_findings(self, outputs: list[int], part: int, inputs: int) -> list[Finding]:
        """Whether this rank's part holds whole packed elements."""
        findings = []
        for tensor in self.tensors:
            for dim in tensor.as_loaded().dims:
                lengths = outputs if dim.axis is Axis.OUT else [part] if dim.axis is Axis.IN and part != inputs else []
                if dim.pack > 1 and any(length % dim.pack for length in lengths):
                    findings.append(
                        Finding(
                            "cannot-shard",
                            f"{tensor.name} packs {dim.pack} numbers along {dim.axis.value}, and a rank would get a part",
                            layer=self.resolved.prefix,
                            file=self.source,
                            expected=f"sizes per rank divisible by {dim.pack}",
                            found=", ".join(map(str, lengths)),
                            fix="use a smaller tensor-parallel size",
                        )
                    )
        return findings

    def _loader(self, layer: nn.Module, tensor: TensorSpec, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's loader, with the dtype and the sizes checked before it and the writes observed."""

        def weight_loader(param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found = list(loaded_weight.shape)
            shard = args[0] if args else None
            try:
                # vLLM takes this rank's part from the front of whatever is there.
                assert not self._too_long(tensor, found, rows_of(layer, shard))
                loaded_weight = self._adapted(tensor, loaded_weight, shard)
                # Fused shards have the same inputs: what belongs to the inputs is loaded for each, and must be equal.
                shared = tensor.dims == (IN,) and not tensor.optional
                before = param.data.clone() if shared and self.coverage[name].started else None
                with WriteWitness(param, self.coverage[name]):
                    result = load(param, loaded_weight, *args, **kwargs)
                if before is not None and not torch.equal(before, param.data):
                    raise NpuQuantError([self._inputs_disagree(tensor)])
                return result
            except (AssertionError, RuntimeError, IndexError) as error:
                raise NpuQuantError(
                    [
                        Finding(
                            "wrong-shape",
                            f"{tensor.name} does not fit the layer",
                            layer=self.resolved.prefix,
                            file=self.source,
                            expected=f"{tensor.shape_text()} that fills {list(param.shape)} on this rank",
                            found=f"{found}" + (f" for shard {args[0]}" if args else ""),
                            fix="check that config.json and the weights are of the same model",
                        )
                    ]
                ) from error

        return weight_loader

    def _too_long(self, tensor: TensorSpec, stored: list[int], rows: int | None) -> bool:
        """Whether a stored tensor has more outputs or inputs than the whole layer, ``rows`` of its shard."""
        sizes = LayerSizes(outputs=rows or 0, inputs=self.inputs)
        return len(stored) == len(tensor.dims) and any(
            length > dim.length(sizes)
            for dim, length in zip(tensor.dims, stored, strict=True)
            if dim.axis is Axis.IN or (dim.axis is Axis.OUT and rows is not None)
        )

    def _inputs_disagree(self, tensor: TensorSpec) -> Finding:
        return Finding(
            "fused-shards-disagree",
            f"vLLM runs these layers as one, on the same input, and they have different {tensor.name}",
            layer=self.resolved.prefix,
            file=self.source,
            expected=f"one {tensor.name}",
            found=", ".join(self.resolved.shards),
            fix="re-export the checkpoint without activation order (desc_act)",
        )

    def _group_repeats(self, shard: Any) -> int:
        """How often a scale of this fused shard is repeated: its groups may be larger than the layer's."""
        group = group_size_of(self.spec)
        entries = self.resolved.entries
        number = {"q": 0, "k": 1, "v": 2}.get(shard, shard) if len(entries) > 1 else 0
        own = group_size_of(entries[number if isinstance(number, int) else 0].spec)
        return 1 if not group else (own or -(-self.inputs // group) * group) // group

    def _adapted(self, tensor: TensorSpec, loaded: torch.Tensor, shard: Any = None) -> torch.Tensor:
        """The loaded tensor in a dtype that the parameter holds exactly, and with this rank's groups."""
        found = _NAMES.get(loaded.dtype, str(loaded.dtype))
        if found not in tensor.dtypes:
            raise NpuQuantError(
                [
                    Finding(
                        "wrong-dtype",
                        f"{tensor.name} has a dtype that {self.spec.scheme} does not allow",
                        layer=self.resolved.prefix,
                        file=self.source,
                        expected=" or ".join(tensor.dtypes),
                        found=found,
                        fix="re-export the checkpoint",
                    )
                ]
            )
        adapted = loaded
        if loaded.dtype == torch.int64 and tensor.load_dtype == "float32":
            adapted = decode_int64_scale(loaded)
        if tensor.rearrange:
            try:
                adapted = load_object(tensor.rearrange)(adapted, self.spec, self.outputs)
            except NpuQuantError as error:
                raise self._located(error) from error
        groups = tensor.as_loaded().axis_of(Axis.GROUP)
        repeats = self._group_repeats(shard) if groups is not None else 1
        if groups is not None and repeats > 1:
            adapted = adapted.repeat_interleave(repeats, dim=groups)
            # The last group may be shorter than the others.
            length = -(-self.inputs // group_size_of(self.spec))
            adapted = adapted.narrow(groups, 0, min(length, adapted.shape[groups]))
        # A tensor may carry the id of its fused shard, which a conversion loses.
        if adapted is not loaded and hasattr(loaded, "shard_id"):
            adapted.shard_id = loaded.shard_id  # type: ignore[attr-defined]
        return adapted

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything arrived, and replace the checkpoint's tensors by the operators' ones.

        vLLM and vllm-ascend may call this again; a layer that is prepared already is left alone.

        Raises:
            NpuQuantError: not-filled, or what the scheme's values do not allow.
        """
        if not self.coverage:
            return
        if load_is_checked():
            raise_findings(self._not_filled())
        else:
            for name in self.coverage:
                fill_placeholder(name, getattr(layer, name).data, self.spec)
        canonical = self._canonical(layer)
        try:
            prepared = self.method.prepare(canonical, self.context)
        except NpuQuantError as error:
            raise self._located(error) from error
        bias = canonical.bias
        del canonical
        for name in self.coverage:
            delattr(layer, name)
        if platforms.nz_wanted():
            self.method.finish(prepared)
        for name, value in prepared.items():
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self._finish_bias(layer, bias)
        # vllm-ascend's operators of other parallel groups have kept the bias that the layer was made with.
        custom = getattr(layer, "custom_op", None)
        if custom is not None:
            custom.bias = getattr(layer, "bias", None)
        self.coverage = {}

    def _finish_bias(self, layer: nn.Module, stored: torch.Tensor | None) -> None:
        """Leave ``layer.bias`` as the method wants it: in the operator's dtype, or None where it is folded already."""
        bias = stored if stored is not None else getattr(layer, "bias", None)
        if bias is None:
            return
        if self.method.folds_bias:
            layer.bias = None
            return
        skipped = getattr(layer, "skip_bias_add", False)
        dtype = self.context.act_dtype if skipped else self.method.bias_dtype(self.context.act_dtype)
        layer.bias = nn.Parameter(bias.data.to(dtype), requires_grad=False)

    def _canonical(self, layer: nn.Module) -> CanonicalLinear:
        tensors = {tensor.name: getattr(layer, tensor.name).data for tensor in self.tensors if tensor.name != "bias"}
        if CHECKPOINT_BIAS in self.coverage:
            tensors["bias"] = getattr(layer, CHECKPOINT_BIAS).data
        elif self.method.folds_bias and getattr(layer, "bias", None) is not None:
            # The files were not known when the layer was made, so that vLLM's own parameter holds the bias.
            tensors["bias"] = layer.bias.data.to(torch.float32)
        try:
            canonical = load_object(LAYOUTS[self.spec.layout].to_canonical)(tensors, self.spec)
        except NpuQuantError as error:
            raise self._located(error) from error
        order = canonical.input_permutation
        inputs = canonical.weight.inputs if order is None else int((order >= 0).sum())
        if inputs != self.part:
            raise NpuQuantError([self._wrong_inputs(inputs)])
        return canonical

    def _wrong_inputs(self, inputs: int) -> Finding:
        return Finding(
            "wrong-shape",
            "the packed weight has room for more inputs than the layer has, and nothing says how many are meant",
            layer=self.resolved.prefix,
            file=self.source,
            expected=f"{self.part} inputs on this rank",
            found=f"{inputs}",
            fix="re-export the layer as float, or with a number of inputs that fills whole words",
        )

    def _located(self, error: NpuQuantError) -> NpuQuantError:
        """The error with this layer's name in findings that have none."""
        return NpuQuantError(
            replace(finding, layer=finding.layer or self.resolved.prefix, file=finding.file or self.source)
            for finding in error.findings
        )

    def _not_filled(self) -> list[Finding]:
        findings = []
        for name, coverage in self.coverage.items():
            tensor = "bias" if name == CHECKPOINT_BIAS else name
            for box in coverage.missing():
                shards = [
                    f"{self.resolved.shards[i]}.{tensor}"
                    for i in self._shards_in(coverage, box)
                    if tensor != "bias" or "bias" in self.resolved.entries[i].tensors
                ]
                if not shards:
                    continue  # the bias of a fused layer whose other shards have none: it stays 0
                findings.append(
                    Finding(
                        "not-filled",
                        "a parameter received no data for a part of it",
                        layer=self.resolved.prefix,
                        file=self.source,
                        expected=", ".join(shards),
                        found=f"nothing for {name}[{', '.join(f'{start}:{stop}' for start, stop in box)}]",
                        fix="check that the weight files are complete",
                    )
                )
        return findings

    def _shards_in(self, coverage: Coverage, box: Any) -> list[int]:
        """The fused shards whose rows a box touches."""
        if len(self.resolved.shards) == 1 or len(self.partitions) != len(self.resolved.shards):
            return list(range(len(self.resolved.shards)))
        rows = coverage.shape[0]
        total = sum(self.partitions)
        found, start = [], 0
        for i, size in enumerate(self.partitions):
            stop = start + size
            # Rows of the parameter that belong to shard i; packing and per-shard scalars scale them.
            first, last = start * rows // total, max(stop * rows // total, start * rows // total + 1)
            if rows == len(self.partitions):
                first, last = i, i + 1
            if first < box[0][1] and box[0][0] < last:
                found.append(i)
            start = stop
        return found

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.method.gathers_inputs:
            x = tensor_model_parallel_all_gather(x.contiguous())
        return self.method.apply(layer, x, bias)


def rows_of(layer: Any, shard: Any) -> int | None:
    """The outputs of a checkpoint layer that fills one shard of vLLM's layer, over all ranks; None where it is not known."""
    if shard is None:
        return getattr(layer, "org_vocab_size", None) or getattr(layer, "output_size", None)
    if isinstance(shard, int) and hasattr(layer, "output_sizes"):
        return layer.output_sizes[shard]
    if shard == "q" and hasattr(layer, "total_num_heads"):
        return layer.total_num_heads * layer.head_size
    if shard in ("k", "v") and hasattr(layer, "total_num_kv_heads"):
        size = getattr(layer, "v_head_size", layer.head_size) if shard == "v" else layer.head_size
        return layer.total_num_kv_heads * size
    return None


def _vocabulary_loader(layer: nn.Module, load: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's loader of a vocabulary's part, which pads along the first dimension, for outputs in any dimension."""

    def weight_loader(param: Any, loaded_weight: torch.Tensor) -> Any:
        dim = getattr(param, "output_dim", None)
        if not dim:
            return load(param, loaded_weight)
        pack = param.packed_factor if getattr(param, "packed_dim", None) == dim else 1
        start, stop = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        assert loaded_weight.shape[dim] * pack == layer.org_vocab_size
        assert start % pack == stop % pack == 0
        part = loaded_weight.narrow(dim, start // pack, (stop - start) // pack)
        length = part.shape[dim]
        param.data.narrow(dim, 0, length).copy_(part)
        param.data.narrow(dim, length, param.shape[dim] - length).zero_()
        return None

    return weight_loader


def regrouped(weight: WeightSpec | None, group_size: int) -> WeightSpec | None:
    return replace(weight, group_size=group_size) if weight is not None and weight.group_size else weight


def _parameter(tensor: TensorSpec, sizes: LayerSizes, weight_loader: Callable[..., Any]) -> BasevLLMParameter:
    """vLLM's parameter class that shards this tensor the way its dimensions say."""
    # A bias is 0 where a shard of a fused layer has none; everything else is overwritten in full.
    make = torch.zeros if tensor.name == "bias" else torch.empty
    data = make(tensor.shape(sizes), dtype=getattr(torch, tensor.load_dtype))
    out, inputs, groups = (tensor.axis_of(axis) for axis in (Axis.OUT, Axis.IN, Axis.GROUP))
    common: dict[str, Any] = {"data": data, "weight_loader": weight_loader}
    packed = next((i for i, dim in enumerate(tensor.dims) if dim.pack > 1), None)
    if tensor.axis_of(Axis.SHARD) is not None:
        return PerTensorScaleParameter(**common)
    along_inputs = inputs if inputs is not None else (groups if sizes.group_size else None)
    if packed is not None:
        common |= {"packed_dim": packed, "packed_factor": tensor.dims[packed].pack, "output_dim": out}
        if along_inputs is None:
            return PackedColumnParameter(**common)
        return PackedvLLMParameter(input_dim=along_inputs, **common)
    if out is None:
        return (
            RowvLLMParameter(input_dim=along_inputs, **common)
            if along_inputs is not None
            else BasevLLMParameter(**common)
        )
    if along_inputs is None:
        return ChannelQuantScaleParameter(output_dim=out, **common)
    kind = ModelWeightParameter if inputs is not None else GroupQuantScaleParameter
    return kind(input_dim=along_inputs, output_dim=out, **common)


def fill_placeholder(name: str, param: torch.Tensor, spec: LayerSpec) -> None:
    """Numbers that every scheme allows, where the load format brings none (dummy), or brings them prepared already.

    Args:
        name: the tensor's name in its layout. param: what receives it.
    """
    weight, group = spec.weight, group_size_of(spec)
    if name == "qzeros" and weight is not None:
        param.fill_(1 << (weight.bits - 1))  # the zero of symmetric integers without a sign
    elif name.endswith("g_idx") and group:
        param.copy_(torch.arange(param.shape[-1]) // group)
    elif name == "weight_shape":
        param.fill_(1 << 31)  # what the packed weight holds is no more
    else:
        param.fill_(1 if "scale" in name else 0)


def load_is_checked() -> bool:
    """Whether parameters are filled through their weight loaders, so that what is missing can be told."""
    config = get_current_vllm_config_or_none()
    load_format = getattr(config.load_config, "load_format", "auto") if config is not None else "auto"
    return str(load_format) not in UNWITNESSED_LOADS
