# SPDX-License-Identifier: Apache-2.0
"""Quantized Linear layers and lm_head in vLLM.

The checkpoint's own tensors are registered as parameters, so that vLLM's loaders shard them. After loading they are
converted to canonical numbers, and these to the tensors of the NPU method class.
"""

from __future__ import annotations

import weakref
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
from vllm_npu_quant.engine.coverage import Box, WriteWitness
from vllm_npu_quant.engine.stored import Origin, Receiver, Rows, refusal
from vllm_npu_quant.errors import Finding, raise_findings
from vllm_npu_quant.formats.resolve import ResolvedLayer
from vllm_npu_quant.layouts import load_object
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.tables import IN, Axis, LayerSizes, TensorSpec, tensors_of
from vllm_npu_quant.methods.base import NpuLinearMethod, PrepareContext
from vllm_npu_quant.serving.decide import Served
from vllm_npu_quant.serving.shards import rank_part
from vllm_npu_quant.spec import LayerKind

__all__ = ["CHECKPOINT_BIAS", "NpuQuantLinearMethod", "shard_numbers"]

#: Name under which a quantized layer's own bias is loaded. The checkpoint's name, "bias", belongs to vLLM, which creates
#: that parameter only for model classes that have a bias.
CHECKPOINT_BIAS = "checkpoint_bias"

#: vLLM's names of shards, as numbers.
_SHARD_NUMBERS: dict[Any, int] = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


def shard_numbers(shard: Any) -> tuple[Any, ...]:
    """The numbers of the shards that a loader of vLLM is told to fill; empty if it is told none, and fills all.

    A name that is not known stays as it is.
    """
    ids = () if shard is None else shard if isinstance(shard, tuple) else (shard,)
    return tuple(_SHARD_NUMBERS.get(each, each) for each in ids)


@register_weight_loader_v2_supported_method
class NpuQuantLinearMethod(LinearMethodBase):
    """One quantized layer: the source of its tensors, and the NPU method class that computes with them."""

    def __init__(self, resolved: ResolvedLayer, served: Served, source: str) -> None:
        """
        Args:
            resolved: the checkpoint layers that fill this layer.
            served: how they are served.
            source: the file that describes them.
        """
        self.resolved = resolved
        self.stored, self.spec, self.kind = served.stored, served.spec, served.kind
        self.source = source
        self.row = served.require_row(layer=resolved.prefix, file=source)
        self.method: NpuLinearMethod = load_object(self.row.method)()
        #: Shard -> the checkpoint layer's rows that fill it, where the model class takes them in another order.
        self.rows: dict[Any, Rows] = {}
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
        ranks = input_size // input_size_per_partition
        cut, listed = Axis.IN if ranks > 1 else None, self.resolved.listed_tensors()
        part = rank_part(self.stored, listed, cut, output_partition_sizes, input_size, ranks)
        tensors = {
            CHECKPOINT_BIAS if tensor.name == "bias" else tensor.name: tensor
            for tensor in tensors_of(self.stored, listed)
            if tensor.loaded
        }
        receiver = self.receiver = Receiver(part, tensors, self.resolved.prefix, self.source)
        with receiver.naming("its parameters could not be created"):
            raise_findings(part.findings)
            self.owners = self.resolved.owners(len(output_partition_sizes))
        self.partitions = list(output_partition_sizes)
        self.outputs, self.repeats = _stored_outputs(layer, self.partitions, output_size)
        rank = getattr(layer, "tp_rank", 0) if ranks > 1 else 0
        self.context = PrepareContext(
            act_dtype=params_dtype,
            adds_constants=rank == 0,
            inputs_start=rank * input_size_per_partition,
            inputs_whole=input_size,
        )
        load = extra_weight_attrs.pop("weight_loader")
        loaders: dict[str, Callable[..., Any]] = {}
        for name, tensor in tensors.items():
            loader = self._vocabulary_loader(layer, tensor, load) if self.kind is LayerKind.LM_HEAD else load
            loaders[name] = self._loader(layer, receiver, name, loader, loaders)
            param = _parameter(tensor.as_loaded(), part.sizes, loaders[name])
            if hasattr(layer, "tp_rank"):  # lm_head has none before vLLM 0.30
                # A layer may be sharded over another group than the tensor-parallel one, whose rank the parameter has.
                param.tp_rank, param.tp_size = layer.tp_rank, layer.tp_size
            kept = tensor.as_loaded()
            if kept.axis_of(Axis.OUT) is None and kept.axis_of(Axis.SHARD) is None:  # it arrives once for each layer
                param.weight_loader_numel = param.numel() * len(set(self.owners))
            receiver.register(layer, name, param, param.shape)

    def _loader(
        self,
        layer: nn.Module,
        receiver: Receiver,
        name: str,
        load: Callable[..., Any],
        loaders: dict[str, Callable[..., Any]],
    ) -> Callable[..., Any]:
        """Wrap vLLM's loader: check the tensor before it, observe the writes, and load what is computed from the tensor.

        Args:
            loaders: the loaders of all parameters, by name.
        """
        tensor, shared = receiver.tensors[name], _is_shared(receiver.tensors[name])
        load, reference, computed = _unbound(layer, load), weakref.ref(layer), receiver.computed_from(name)

        def weight_loader(param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with receiver.naming(f"{tensor.name} could not be loaded"):
                receiver.begin(reference(), name, param)
                origin = self._origin(args[0] if args else kwargs.get("loaded_shard_id"))
                received = receiver.receive(tensor, loaded_weight, origin)
                if tensor.of:
                    return load(param, received, *args, **kwargs)
                coverage = receiver.coverage[name]
                before = param.data.clone() if shared and coverage.started and not param.is_meta else None
                with WriteWitness(param, coverage):
                    result = load(param, received, *args, **kwargs)
                if before is not None and not torch.equal(before, param.data):
                    raise refusal(
                        "fused-shards-disagree",
                        f"vLLM runs these layers as one, on the same input, and they have different {tensor.name}",
                        f"one {tensor.name}",
                        ", ".join(self.resolved.shards),
                        "re-export the checkpoint without activation order (desc_act)",
                    )
                for other in () if param.is_meta else computed:
                    loaders[other](getattr(reference(), other), loaded_weight, *args, **kwargs)
                return result

        return weight_loader

    def _origin(self, shard: Any) -> Origin:
        """The checkpoint layer that fills a shard of vLLM's layer; None stands for all shards.

        Raises:
            NpuQuantError: undescribed-layer for a shard that the layer does not have; fused-shards-disagree if checkpoint
                layers of different specs are loaded as one.
        """
        count = len(self.partitions)
        numbers = range(count) if shard is None else shard_numbers(shard)
        if any(number not in range(count) for number in numbers):
            message, fix = "vLLM loads a shard that its layer does not have", "export this layer as float"
            raise refusal("undescribed-layer", message, f"a shard from 0 to {count - 1}", str(shard), fix)
        owners = {self.owners[number]: self.resolved.shards[self.owners[number]] for number in numbers}
        specs = {self.resolved.entries[owner].spec for owner in owners}
        if len(specs) > 1:
            message = "vLLM loads one tensor for several checkpoint layers, which have different schemes"
            raise refusal("fused-shards-disagree", message, "one scheme", ", ".join(owners.values()), "re-export them")
        name = self.resolved.prefix if len(owners) > 1 else next(iter(owners.values()))
        whole, repeats = sum(self.outputs[number] for number in numbers), self.repeats
        outputs = tuple(whole // times for times in range(1, repeats + 1) if repeats % times == whole % times == 0)
        return Origin(name, specs.pop(), outputs, "" if shard is None else str(shard), self.rows.get(shard))

    def take_rows(self, shard: Any, rows: Rows) -> None:
        """Fill a shard (None for all) by these rows of its checkpoint layer, in this order, from now on.

        Raises:
            NpuQuantError: wrong-shape if the shard has another number of rows; or as ``_origin``.
        """
        with self.receiver.naming("its rows could not be reordered"):
            outputs = self._origin(shard).outputs
            if len(rows.order) not in outputs:
                message, found = "the model loads another number of rows than the layer has", str(len(rows.order))
                fix = "check that config.json and the weights are of the same model"
                raise refusal("wrong-shape", message, " or ".join(map(str, outputs)), found, fix)
        self.rows[shard] = rows

    def float_shapes(self, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """The parameters that the layer would have as a float one, with their shapes on this rank."""
        return {"weight": (sum(self.partitions), self.receiver.part.sizes.inputs)}

    def _vocabulary_loader(self, layer: nn.Module, tensor: TensorSpec, load: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's loader for one rank's part of a vocabulary, which pads the first dimension, for any output dimension."""
        kept = tensor.as_loaded()
        dim = kept.axis_of(Axis.OUT)
        if dim is None:
            return load
        pack = kept.dims[dim].pack

        def weight_loader(param: Any, loaded_weight: torch.Tensor) -> None:
            indices, whole = layer.shard_indices, layer.org_vocab_size
            start, stop = indices.org_vocab_start_index, indices.org_vocab_end_index
            if start % pack or stop % pack or whole % pack:
                raise refusal(
                    "cannot-shard",
                    f"{tensor.name} packs {pack} words of the vocabulary, and a rank would get a part of them",
                    f"parts that begin and end at a multiple of {pack}",
                    f"{start} to {stop} of {whole}",
                    "use another tensor-parallel size, or export lm_head as float",
                )
            part = loaded_weight.narrow(dim, start // pack, (stop - start) // pack)
            length = part.shape[dim]
            param.data.narrow(dim, 0, length).copy_(part)
            param.data.narrow(dim, length, param.shape[dim] - length).zero_()

        return weight_loader

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything arrived, and replace the checkpoint's tensors by the operators' ones.

        vLLM and vllm-ascend may call this again; a prepared layer is left unchanged.

        Raises:
            NpuQuantError: not-filled; or values that the method class refuses.
        """
        receiver = self.receiver
        if not receiver.coverage:
            return
        raise_findings(receiver.finish(layer, self.stored_names))
        with receiver.naming("its weights could not be prepared"):
            canonical = self.canonical(layer)
            prepared = self.method.prepare(canonical, self.context)
        bias = canonical.bias
        del canonical
        receiver.drop(layer)
        if platforms.nz_wanted():
            self.method.finish(prepared)
        with receiver.naming("its weights could not be prepared"):
            receiver.install(layer, prepared)
        self._finish_bias(layer, bias)
        # vllm-ascend's operators for other parallel groups still hold the bias that the layer was created with.
        custom = getattr(layer, "custom_op", None)
        if custom is not None:
            custom.bias = getattr(layer, "bias", None)

    def _finish_bias(self, layer: nn.Module, stored: torch.Tensor | None) -> None:
        """Set ``layer.bias`` for the method: in the operator's dtype, or None if it is folded into other tensors."""
        bias = stored if stored is not None else getattr(layer, "bias", None)
        if bias is None:
            return
        if self.method.folds_bias:
            layer.bias = None
            return
        skipped = getattr(layer, "skip_bias_add", False)
        dtype = self.context.act_dtype if skipped else self.method.bias_dtype(self.context.act_dtype)
        finished = nn.Parameter(bias.data.to(dtype), requires_grad=False)
        finished.weight_loader_numel = 0  # type: ignore[attr-defined]  # no tensor of the checkpoint is loaded into it
        layer.bias = finished

    @property
    def receivers(self) -> tuple[Receiver, ...]:
        return (self.receiver,)

    def lacking(self, layer: nn.Module) -> list[Finding]:
        """Findings for tensors that have not arrived since the layer's reload began."""
        self.receiver.expect(counting=True)
        return self.receiver.not_filled(self.stored_names)

    def restore_weights_for_rl_loading(self, layer: nn.Module) -> None:
        """Make a prepared layer ready for ``load_weights``; ``process_weights_after_loading`` prepares it again.

        This is the older contract of RL trainers. The operators' tensors keep their addresses.
        """
        self.receiver.restore(layer)

    def canonical(self, layer: nn.Module) -> CanonicalLinear:
        """The canonical numbers of the loaded tensors.

        Raises:
            NpuQuantError: values that the layout's conversion refuses; wrong-shape if the packed weight has room for more
                inputs than the layer, and no tensor gives their number.
        """
        tensors = {tensor.name: getattr(layer, name).data for name, tensor in self.receiver.tensors.items()}
        canonical = self.receiver.canonical(tensors, self.spec)
        order, wanted = canonical.input_permutation, self.receiver.part.sizes.inputs
        inputs = canonical.weight.inputs if order is None else int((order >= 0).sum())
        if inputs != wanted:
            message = (
                "the packed weight has room for more inputs than the layer has, and nothing says how many are meant"
            )
            fix = "re-export the layer as float, or with a number of inputs that fills whole words"
            raise refusal("wrong-shape", message, f"{wanted} inputs on this rank", str(inputs), fix)
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


def _is_shared(tensor: TensorSpec) -> bool:
    """Whether fused shards have this tensor in common: they have the same inputs, so a tensor along the inputs is loaded
    for each of them, and must be equal."""
    return tensor.dims == (IN,) and not tensor.optional


def _unbound(layer: nn.Module, load: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a layer without a reference to it: vLLM keeps parameters' loaders as long as the layer lives."""
    if getattr(load, "__self__", None) is not layer:
        return load
    function, reference = load.__func__, weakref.ref(layer)  # type: ignore[attr-defined]

    def loader(*args: Any, **kwargs: Any) -> Any:
        return function(reference(), *args, **kwargs)

    return loader


def _stored_outputs(layer: Any, partitions: list[int], outputs: int) -> tuple[list[int], int]:
    """The outputs of each shard of vLLM's layer over all ranks, and the most repetitions of the checkpoint's in them.

    A vocabulary is padded in memory, not on disk; the heads of keys and values are repeated in memory. Fused layers with a
    loader of their own may repeat any shard on ranks.
    """
    loader = getattr(type(layer), "weight_loader_v2", None)
    if len(partitions) == 1:
        return [getattr(layer, "org_vocab_size", outputs)], 1
    if loader is QKVParallelLinear.weight_loader_v2:
        size, kv_heads = layer.head_size, layer.total_num_kv_heads
        return [layer.total_num_heads * size, kv_heads * size, kv_heads * getattr(layer, "v_head_size", size)], 1
    repeats = 1 if loader is MergedColumnParallelLinear.weight_loader_v2 else getattr(layer, "tp_size", 1)
    return list(getattr(layer, "output_sizes", partitions)), repeats


def _parameter(tensor: TensorSpec, sizes: LayerSizes, weight_loader: Callable[..., Any]) -> BasevLLMParameter:
    """The parameter of the vLLM class that shards this tensor along its dimensions."""
    # The bias of a fused shard without one is 0; all other tensors are overwritten in full.
    make = torch.zeros if tensor.name == "bias" else torch.empty
    out, inputs, groups = (tensor.axis_of(axis) for axis in (Axis.OUT, Axis.IN, Axis.GROUP))
    along = inputs if inputs is not None else groups if sizes.group_size else None
    packed = next((i for i, dim in enumerate(tensor.dims) if dim.pack > 1), None)
    dims: dict[str, Any] = {name: dim for name, dim in (("output_dim", out), ("input_dim", along)) if dim is not None}
    kind: type[BasevLLMParameter]
    if tensor.axis_of(Axis.SHARD) is not None:
        kind, dims = PerTensorScaleParameter, {}
    elif packed is not None:
        kind = PackedColumnParameter if along is None else PackedvLLMParameter
        dims |= {"packed_dim": packed, "packed_factor": tensor.dims[packed].pack}
    elif out is None:
        kind = BasevLLMParameter if along is None else RowvLLMParameter
    elif along is None:
        kind = ChannelQuantScaleParameter
    else:
        kind = GroupQuantScaleParameter if inputs is None else ModelWeightParameter
    data = make(tensor.shape(sizes), dtype=getattr(torch, tensor.load_dtype))
    return kind(data=data, weight_loader=weight_loader, **dims)
