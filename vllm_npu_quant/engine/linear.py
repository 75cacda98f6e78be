# SPDX-License-Identifier: Apache-2.0
"""Quantized Linear layers and lm_head in vLLM.

The checkpoint's own tensors are registered as parameters, so that vLLM's loaders shard them. After loading they become
canonical numbers, and those the tensors of the NPU method class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
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
from vllm_npu_quant.engine.coverage import Box, Coverage, WriteWitness
from vllm_npu_quant.engine.stored import Origin, Receiver
from vllm_npu_quant.errors import Finding, NpuQuantError, raise_findings
from vllm_npu_quant.formats.resolve import ResolvedLayer
from vllm_npu_quant.layouts import load_object
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.tables import IN, Axis, LayerSizes, TensorSpec, tensors_of
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext
from vllm_npu_quant.serving.decide import Served
from vllm_npu_quant.serving.shards import rank_part
from vllm_npu_quant.spec import LayerKind

__all__ = ["CHECKPOINT_BIAS", "NpuQuantLinearMethod"]

#: Name under which a quantized layer's own bias is loaded. The checkpoint's name, "bias", belongs to vLLM, which creates
#: that parameter only for model classes that have a bias.
CHECKPOINT_BIAS = "checkpoint_bias"

#: vLLM's names of shards, as numbers.
_SHARD_NUMBERS: dict[Any, int] = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


@register_weight_loader_v2_supported_method
class NpuQuantLinearMethod(LinearMethodBase):
    """One quantized layer: where its tensors come from, and the NPU method class that computes with them."""

    def __init__(self, resolved: ResolvedLayer, served: Served, source: str) -> None:
        """
        Args:
            resolved: the checkpoint layers that fill this layer.
            served: what they become.
            source: the file that describes them.
        """
        self.resolved = resolved
        self.stored, self.spec, self.kind = served.stored, served.spec, served.kind
        self.source = source
        self.row = served.require_row(layer=resolved.prefix, file=source)
        self.method: NpuLinearMethod = load_object(self.row.method)()
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
            NpuQuantError: cannot-shard if a rank would get a part of a packed element or too little of a group;
                undescribed-layer if it is not known which checkpoint layers fill which shards.
        """
        prefix, listed = self.resolved.prefix, self.resolved.listed_tensors()
        ranks = input_size // input_size_per_partition
        cut = Axis.IN if ranks > 1 else None
        part = rank_part(
            self.stored, listed, cut, output_partition_sizes, input_size, ranks, layer=prefix, file=self.source
        )
        raise_findings(part.findings)
        self.owners = self.resolved.owners(len(output_partition_sizes), self.source)
        self.outputs = _stored_outputs(layer, output_partition_sizes, output_size)
        rank = getattr(layer, "tp_rank", 0) if ranks > 1 else 0
        self.context = PrepareContext(
            act_dtype=params_dtype,
            adds_constants=rank == 0,
            inputs_start=rank * input_size_per_partition,
            inputs_whole=input_size,
        )
        self.partitions = list(output_partition_sizes)
        tensors = {
            CHECKPOINT_BIAS if tensor.name == "bias" else tensor.name: tensor
            for tensor in tensors_of(self.stored, listed)
            if tensor.loaded
        }
        receiver = self.receiver = Receiver(part, tensors, prefix, self.source)
        load = extra_weight_attrs.pop("weight_loader")
        for name, tensor in tensors.items():
            loader = self._vocabulary_loader(layer, tensor, load) if self.kind is LayerKind.LM_HEAD else load
            param = _parameter(tensor.as_loaded(), part.sizes, self._loader(layer, receiver, name, loader))
            receiver.coverage[name] = Coverage(param.shape)
            if hasattr(layer, "tp_rank"):  # lm_head has none before vLLM 0.30
                # A layer may be cut over another group than the tensor-parallel one, which the parameter took its rank from.
                param.tp_rank, param.tp_size = layer.tp_rank, layer.tp_size
            layer.register_parameter(name, param)

    def _loader(self, layer: nn.Module, receiver: Receiver, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's loader, with the tensor checked before it and the writes observed."""
        tensor = receiver.tensors[name]
        # Fused shards have the same inputs: what belongs to the inputs is loaded for each, and must be equal.
        shared = tensor.dims == (IN,) and not tensor.optional

        def weight_loader(param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with receiver.naming(f"{tensor.name} could not be loaded"):
                origin = self._origin(layer, args[0] if args else kwargs.get("loaded_shard_id"))
                received = receiver.receive(tensor, loaded_weight, origin)
                coverage = receiver.coverage[name]
                before = param.data.clone() if shared and coverage.started else None
                with WriteWitness(param, coverage):
                    result = load(param, received, *args, **kwargs)
                if before is not None and not torch.equal(before, param.data):
                    raise NpuQuantError([self._inputs_disagree(tensor)])
                return result

        return weight_loader

    def _origin(self, layer: nn.Module, shard: Any) -> Origin:
        """The checkpoint layer that fills a shard of vLLM's layer; None stands for all shards.

        Raises:
            NpuQuantError: undescribed-layer for a shard that the layer does not have; fused-shards-disagree if checkpoint
                layers of different specs are loaded as one.
        """
        count = len(self.partitions)
        ids = range(count) if shard is None else shard if isinstance(shard, tuple) else (shard,)
        numbers: list[Any] = [_SHARD_NUMBERS.get(each, each) for each in ids]
        if any(number not in range(count) for number in numbers):
            raise NpuQuantError([_no_such_shard(shard, count)])
        owners = list(dict.fromkeys(self.owners[number] for number in numbers))
        specs = {self.resolved.entries[owner].spec for owner in owners}
        if len(specs) > 1:
            raise NpuQuantError([self._loaded_as_one([self.resolved.shards[owner] for owner in owners])])
        name = self.resolved.shards[owners[0]] if len(owners) == 1 else self.resolved.prefix
        outputs = sum(self.outputs[number] for number in numbers)
        return Origin(name, specs.pop(), _repeated(layer, outputs, count), "" if shard is None else str(shard))

    def _inputs_disagree(self, tensor: TensorSpec) -> Finding:
        return Finding(
            "fused-shards-disagree",
            f"vLLM runs these layers as one, on the same input, and they have different {tensor.name}",
            expected=f"one {tensor.name}",
            found=", ".join(self.resolved.shards),
            fix="re-export the checkpoint without activation order (desc_act)",
        )

    def _loaded_as_one(self, names: list[str]) -> Finding:
        return Finding(
            "fused-shards-disagree",
            "vLLM loads one tensor for several checkpoint layers, which have different schemes",
            expected="one scheme",
            found=", ".join(names),
            fix="re-export the checkpoint with one scheme for these layers",
        )

    def _vocabulary_loader(self, layer: nn.Module, tensor: TensorSpec, load: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's loader of a vocabulary's part, which pads along the first dimension, for outputs in any dimension."""
        kept = tensor.as_loaded()
        dim = kept.axis_of(Axis.OUT)
        if dim is None:
            return load
        pack = kept.dims[dim].pack

        def weight_loader(param: Any, loaded_weight: torch.Tensor) -> None:
            indices, whole = layer.shard_indices, layer.org_vocab_size
            start, stop = indices.org_vocab_start_index, indices.org_vocab_end_index
            if start % pack or stop % pack or whole % pack:
                raise NpuQuantError([_cut_words(tensor, pack, start, stop, whole)])
            part = loaded_weight.narrow(dim, start // pack, (stop - start) // pack)
            length = part.shape[dim]
            param.data.narrow(dim, 0, length).copy_(part)
            param.data.narrow(dim, length, param.shape[dim] - length).zero_()

        return weight_loader

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything arrived, and replace the checkpoint's tensors by the operators' ones.

        vLLM and vllm-ascend may call this again; a layer that is prepared already is left alone.

        Raises:
            NpuQuantError: not-filled, or what the scheme's values do not allow.
        """
        receiver = self.receiver
        if not receiver.coverage:
            return
        receiver.finish(layer, self.stored_names)
        with receiver.naming("its weights could not be prepared"):
            canonical = self.canonical(layer)
            prepared = self.method.prepare(canonical, self.context)
        bias = canonical.bias
        del canonical
        receiver.drop(layer)
        if platforms.nz_wanted():
            self.method.finish(prepared)
        for name, value in prepared.items():
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self._finish_bias(layer, bias)
        # vllm-ascend's operators of other parallel groups have kept the bias that the layer was made with.
        custom = getattr(layer, "custom_op", None)
        if custom is not None:
            custom.bias = getattr(layer, "bias", None)

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

    def canonical(self, layer: nn.Module) -> CanonicalLinear:
        """The canonical numbers of the loaded tensors.

        Raises:
            NpuQuantError: what the layout's conversion refuses; wrong-shape if nothing says how many of the inputs that the
                packed weight has room for are meant.
        """
        tensors = {tensor.name: getattr(layer, name).data for name, tensor in self.receiver.tensors.items()}
        if self.method.folds_bias and "bias" not in tensors and getattr(layer, "bias", None) is not None:
            # The files were not known when the layer was made, so that vLLM's own parameter holds the bias.
            tensors["bias"] = layer.bias.data.to(torch.float32)
        canonical = self.receiver.canonical(tensors)
        order, wanted = canonical.input_permutation, self.receiver.part.sizes.inputs
        inputs = canonical.weight.inputs if order is None else int((order >= 0).sum())
        if inputs != wanted:
            message = (
                "the packed weight has room for more inputs than the layer has, and nothing says how many are meant"
            )
            fix = "re-export the layer as float, or with a number of inputs that fills whole words"
            expected = f"{wanted} inputs on this rank"
            raise NpuQuantError([Finding("wrong-shape", message, expected=expected, found=str(inputs), fix=fix)])
        return canonical

    def stored_names(self, name: str, box: Box) -> list[str]:
        """The stored tensors that should have filled a box of a parameter.

        A shard of a fused layer may have no bias, which then stays 0.
        """
        tensor = self.receiver.tensors[name]
        return [
            f"{self.resolved.shards[owner]}.{tensor.name}"
            for owner in dict.fromkeys(self.owners[number] for number in self._shards_in(name, box))
            if tensor.name != "bias" or "bias" in self.resolved.entries[owner].tensors
        ]

    def _shards_in(self, name: str, box: Box) -> list[int]:
        """The shards of vLLM's layer that a box of a parameter touches."""
        kept, count = self.receiver.tensors[name].as_loaded(), len(self.partitions)
        shard, rows = kept.axis_of(Axis.SHARD), kept.axis_of(Axis.OUT)
        axis = shard if shard is not None else rows
        if axis is None:
            return list(range(count))
        sizes = [1] * count if shard is not None else self.partitions
        stops = [kept.dims[axis].length(LayerSizes(sum(sizes[: i + 1]), 0, shards=i + 1)) for i in range(count)]
        first, last = box[axis]
        return [
            i for i, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)) if start < last and first < stop
        ]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.method.gathers_inputs:
            x = tensor_model_parallel_all_gather(x.contiguous())
        return self.method.apply(layer, x, bias)


def _stored_outputs(layer: Any, partitions: list[int], outputs: int) -> list[int]:
    """The outputs of each shard of vLLM's layer over all ranks, as the checkpoint stores them.

    A vocabulary is padded in memory, not on disk; the heads of keys and values are repeated in memory.
    """
    if len(partitions) == 1:
        return [getattr(layer, "org_vocab_size", outputs)]
    if _loader_of(layer) is QKVParallelLinear.weight_loader_v2:
        size, kv_heads = layer.head_size, layer.total_num_kv_heads
        return [layer.total_num_heads * size, kv_heads * size, kv_heads * getattr(layer, "v_head_size", size)]
    return list(getattr(layer, "output_sizes", partitions))


def _repeated(layer: Any, outputs: int, shards: int) -> tuple[int, ...]:
    """How many outputs a checkpoint layer may have, where vLLM counts ``outputs`` over all ranks.

    A fused layer with a loader of its own may repeat a shard on ranks, each of which vLLM counts.
    """
    known = (MergedColumnParallelLinear.weight_loader_v2, QKVParallelLinear.weight_loader_v2)
    if shards == 1 or _loader_of(layer) in known:
        return (outputs,)
    ranks = getattr(layer, "tp_size", 1)
    return tuple(outputs // times for times in range(1, ranks + 1) if ranks % times == outputs % times == 0)


def _loader_of(layer: Any) -> Any:
    return getattr(type(layer), "weight_loader_v2", None)


def _no_such_shard(shard: Any, count: int) -> Finding:
    return Finding(
        "undescribed-layer",
        "vLLM loads a shard that its layer does not have",
        expected=f"a shard from 0 to {count - 1}",
        found=str(shard),
        fix="export this layer as float, or report the model's name",
    )


def _cut_words(tensor: TensorSpec, pack: int, start: int, stop: int, whole: int) -> Finding:
    return Finding(
        "cannot-shard",
        f"{tensor.name} packs {pack} words of the vocabulary together, and this rank's part ends between them",
        expected=f"a part whose ends are divisible by {pack}",
        found=f"{start} to {stop} of {whole}",
        fix="use another tensor-parallel size, or export lm_head as float",
    )


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
