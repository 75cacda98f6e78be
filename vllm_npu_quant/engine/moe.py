# SPDX-License-Identifier: Apache-2.0
"""Routed experts in vLLM.

The adapter registers the tensors of the checkpoint with a dimension of this rank's experts in front, loads them with loaders
of its own (vLLM's stock loader copies tensors that are too small, and drops names that it does not know), and after loading
turns them into what the two grouped methods want. w13 and w2 are independent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from vllm_npu_quant.engine import platforms
from vllm_npu_quant.engine.coverage import Coverage
from vllm_npu_quant.engine.linear import TORCH_DTYPES, fill_placeholder, load_is_checked, load_object, regrouped
from vllm_npu_quant.errors import Finding, NpuQuantError, raise_findings
from vllm_npu_quant.formats.base import LayerEntry
from vllm_npu_quant.formats.resolve import ResolvedExperts
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.modelslim import decode_int64_scale
from vllm_npu_quant.layouts.tables import LAYOUTS, Axis, Dim, LayerSizes, TensorSpec, group_size_of, tensors_of
from vllm_npu_quant.methods.moe import Experts, FusedExperts, GroupedMethod, Placement, expert_bias, operators_of
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.serving.decide import Served
from vllm_npu_quant.spec import LayerKind

__all__ = ["NpuQuantMoEMethod"]

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: The projections of w13 and w2 by vLLM's shard ids.
_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}

#: The layers that ``npu_quant::fused_experts`` computes, by their keys.
_layers: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


@torch.library.custom_op("npu_quant::fused_experts", mutates_args=())
def fused_experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, key: str) -> torch.Tensor:
    """All of a MoE layer as one operator: the emulation counts tokens in Python, which graphs cannot hold.

    Args:
        x: [T, hidden]. topk_weights: [T, k]. topk_ids: [T, k]. key: which layer.

    Returns:
        [T, hidden] in x's dtype, not reduced.
    """
    layer = _layers[key]
    return layer.quant_method.compute(layer, x, topk_weights, topk_ids)


@fused_experts.register_fake
def _(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, key: str) -> torch.Tensor:
    return torch.empty_like(x)


def _register(layer: nn.Module, prefix: str) -> str:
    """A key for the layer: its name, with a number where another living layer has that name (a draft model's)."""
    key, number = prefix, 1
    while _layers.get(key, layer) is not layer:
        key, number = f"{prefix}#{number}", number + 1
    _layers[key] = layer
    return key


class _Product:
    """w13 or w2: its spec, the parameters that receive the checkpoint's tensors, and its method."""

    def __init__(
        self,
        name: str,
        served: Served,
        entries: tuple[LayerEntry, ...],
        layers: tuple[str, ...],
        act_dtype: torch.dtype,
    ) -> None:
        """
        Args:
            served: what it becomes.
            entries: of its shards. layers: the checkpoint's names of its shards, with * for the expert.
        """
        self.name = name
        self.layers = layers
        self.act_dtype = act_dtype
        self.served = served
        self.spec = served.stored
        self.scheme = self.spec.scheme if self.spec.is_float else served.spec.scheme
        self.shards = _SHARDS[name]
        self.coverage: dict[str, Coverage] = {}
        self.group_repeats = 1
        if self.spec.is_float:
            dtype = str(act_dtype).removeprefix("torch.")
            weight = TensorSpec("weight", ("F32", "BF16", "F16", "F64"), (Dim(Axis.OUT), Dim(Axis.IN)), dtype)
            self.tensors: tuple[TensorSpec, ...] = (weight,)
        else:
            listed = frozenset().union(*(entry.tensors for entry in entries))
            self.tensors = tensors_of(self.spec, listed)

    def findings(self, prefix: str, source: str) -> list[Finding]:
        """What of this product cannot be served."""
        found = []
        if self.served.row is None:
            found.append(dispatch.unsupported(LayerKind.FUSED_MOE, self.served.spec, layer=prefix, file=source))
        if any(dim.axis is Axis.ALL_GROUPS for tensor in self.tensors for dim in tensor.dims):
            found.append(
                Finding(
                    "unsupported-scheme",
                    "experts with activation order would need the input sorted anew for every expert",
                    layer=prefix,
                    file=source,
                    expected="desc_act false",
                    found=self.scheme,
                    fix="re-export the checkpoint without activation order (desc_act=False, actorder weight or none)",
                )
            )
        if any(tensor.name == "bias" for tensor in self.tensors):
            found.append(replace(expert_bias(), layer=prefix, file=source))
        return found

    def size(self, outputs: int, inputs: int, ranks: int, rank: int) -> None:
        """Note the sizes of one shard. w13 is cut along its outputs, w2 along its inputs.

        Args:
            outputs, inputs: of the whole layer. ranks, rank: of tensor parallelism.
        """
        self.ranks, self.rank = ranks, rank
        self.cut = Axis.OUT if self.name == "w13" else Axis.IN
        part_outputs = outputs // ranks if self.cut is Axis.OUT else outputs
        part_inputs = inputs // ranks if self.cut is Axis.IN else inputs
        group = group_size_of(self.spec)
        if group and part_inputs != inputs and part_inputs % group:
            # Ranks cut groups: take a smaller group that they do not cut, and repeat its scale.
            smaller = gcd(part_inputs, group)
            self.group_repeats = group // smaller
            self.spec = replace(self.spec, weight=regrouped(self.spec.weight, smaller))
            group = smaller
        self.whole = LayerSizes(outputs, inputs, group)
        self.part = LayerSizes(part_outputs, part_inputs, group, all_inputs=inputs)

    @property
    def group_size(self) -> int:
        """Inputs per scale on this rank; 0 where one scale serves a whole output channel."""
        return self.part.group_size if self.part.groups > 1 else 0

    def shard_findings(self, prefix: str, source: str) -> list[Finding]:
        """Whether every rank gets whole packed elements."""
        found = []
        for tensor in self.tensors:
            for dim in tensor.as_loaded().dims:
                length = self.part.outputs if dim.axis is Axis.OUT else self.part.inputs
                if self.ranks > 1 and dim.axis is self.cut and length % dim.pack:
                    found.append(
                        Finding(
                            "cannot-shard",
                            f"{tensor.name} packs {dim.pack} numbers along {dim.axis.value}, and a rank would get a part",
                            layer=prefix,
                            file=source,
                            expected=f"sizes per rank divisible by {dim.pack}",
                            found=str(length),
                            fix="use a smaller tensor-parallel size, or --enable-expert-parallel",
                        )
                    )
        return found

    def register(self, layer: nn.Module, experts: int, loader: Callable[..., Any]) -> None:
        """Register the parameters [E, shards, ...] that receive the checkpoint's tensors."""
        for tensor in self.tensors:
            loaded = tensor.as_loaded()
            # What is not loaded still needs a name, for vLLM looks the parameter up before it asks its loader.
            shape = (experts, len(self.shards), *loaded.shape(self.part)) if tensor.loaded else (0,)
            param = nn.Parameter(torch.empty(shape, dtype=getattr(torch, tensor.load_dtype)), requires_grad=False)
            param.weight_loader = loader(self, tensor)  # type: ignore[attr-defined]
            if tensor.loaded:
                self.coverage[tensor.name] = Coverage((experts, len(self.shards)))
            layer.register_parameter(f"{self.name}_{tensor.name}", param)

    def load(self, tensor: TensorSpec, param: torch.Tensor, loaded: torch.Tensor, expert: int, shard_id: str) -> None:
        """Copy this rank's part of one expert's tensor.

        Raises:
            NpuQuantError: wrong-dtype, wrong-shape.
        """
        found = list(loaded.shape)
        dtype = _NAMES.get(loaded.dtype, str(loaded.dtype))
        if dtype not in tensor.dtypes:
            raise NpuQuantError(
                [
                    Finding(
                        "wrong-dtype",
                        f"{tensor.name} has a dtype that {self.scheme} does not allow",
                        expected=" or ".join(tensor.dtypes),
                        found=dtype,
                        fix="re-export the checkpoint",
                    )
                ]
            )
        if not tensor.loaded:
            return
        shard = self.shards.index(shard_id)
        wanted = tensor.as_loaded()
        if loaded.dtype == torch.int64 and tensor.load_dtype == "float32":
            loaded = decode_int64_scale(loaded)
        shape = wanted.shape(self.whole)
        try:
            if tensor.rearrange:
                loaded = load_object(tensor.rearrange)(loaded, self.spec, self.whole.outputs)
            # Producers leave out dimensions of length 1 at the end of a scale.
            loaded = loaded.reshape(*loaded.shape, *(1,) * (len(shape) - loaded.dim()))
            for axis, dim in enumerate(wanted.dims):
                if dim.axis is Axis.GROUP and self.group_repeats > 1:
                    loaded = loaded.repeat_interleave(self.group_repeats, dim=axis)[
                        (slice(None),) * axis + (slice(shape[axis]),)
                    ]
            if tensor.rearrange and (rows := wanted.axis_of(Axis.OUT)) is not None and wanted.dims[rows].pack == 1:
                loaded = loaded.narrow(rows, 0, shape[rows])
            fits = tuple(loaded.shape) == shape
        except (RuntimeError, IndexError, AssertionError):
            fits = False
        if not fits:
            raise NpuQuantError(
                [
                    Finding(
                        "wrong-shape",
                        f"{tensor.name} does not fit the layer",
                        expected=f"{tensor.shape_text()} = {list(tensor.shape(self.whole))}",
                        found=str(found),
                        fix="check that config.json and the weights are of the same model",
                    )
                ]
            )
        for axis, dim in enumerate(wanted.dims):
            if dim.axis is self.cut or (dim.axis is Axis.GROUP and self.cut is Axis.IN):
                length = param.shape[2 + axis]
                # All ranks have the same groups where one scale serves all inputs.
                start = self.rank * length if loaded.shape[axis] > length else 0
                loaded = loaded.narrow(axis, start, length)
        param.data[expert, shard].copy_(loaded)
        self.coverage[tensor.name].add(((expert, expert + 1), (shard, shard + 1)))

    def not_filled(self, prefix: str, source: str, number: Callable[[int], int]) -> list[Finding]:
        """What the files did not bring. ``number``: the checkpoint's number of one of this rank's experts."""
        findings = []
        for name, coverage in self.coverage.items():
            missing = [
                self.layers[shard].replace("*", str(number(expert))) + "." + name
                for (first, last), (first_shard, last_shard) in coverage.missing()
                for expert in range(first, last)
                for shard in range(first_shard, last_shard)
            ]
            if missing:
                findings.append(
                    Finding(
                        "not-filled",
                        f"experts received no data for {self.name}_{name}",
                        layer=prefix,
                        file=source,
                        expected=", ".join(missing[:4])
                        + (f", and {len(missing) - 4} more" if len(missing) > 4 else ""),
                        found=f"nothing for {len(missing)} of {coverage.shape[0] * coverage.shape[1]} tensors",
                        fix="check that the weight files are complete",
                    )
                )
        return findings

    def experts(self, layer: nn.Module) -> Experts:
        """The loaded tensors as canonical weights."""
        params = {name: getattr(layer, f"{self.name}_{name}").data for name in self.coverage}
        count, shards = next(iter(self.coverage.values())).shape

        def canonical(expert: int) -> list[CanonicalLinear]:
            return [
                self._canonical({name: value[expert, shard] for name, value in params.items()})
                for shard in range(shards)
            ]

        device = next(iter(params.values())).device
        return Experts(count, shards, self.part.outputs, self.part.inputs, device, canonical)

    def _canonical(self, tensors: dict[str, torch.Tensor]) -> CanonicalLinear:
        if not self.spec.is_float:
            return load_object(LAYOUTS[self.spec.layout].to_canonical)(tensors, self.spec)
        values = tensors["weight"]
        weight = CanonicalWeight.of(values, values.new_ones(1, 1, dtype=torch.float32))
        weight.float_rows = lambda start, stop: values[start:stop].to(torch.float32)
        return CanonicalLinear(weight)

    def drop(self, layer: nn.Module) -> None:
        """Delete the checkpoint's tensors."""
        for tensor in self.tensors:
            delattr(layer, f"{self.name}_{tensor.name}")
        self.coverage = {}


class NpuQuantMoEMethod(FusedMoEMethodBase):
    """The routed experts of one layer, of which w13, w2 or both are quantized."""

    def __init__(
        self,
        layer: nn.Module,
        resolved: ResolvedExperts,
        served: tuple[Served, Served],
        source: str,
        tid2eid: Any = None,
    ) -> None:
        """
        Args:
            served: what w13 and w2 become.
            tid2eid: vllm-ascend's table of experts by token id, for models that route by it.

        Raises:
            NpuQuantError: for what cannot be served, from the description alone.
        """
        super().__init__(layer.moe_config)
        self.resolved = resolved
        self.prefix = resolved.prefix
        self.source = source
        entry, dtype = resolved.entry, layer.moe_config.in_dtype
        gate, up, down = (f"{resolved.layer}.*.{name}" for name in entry.names)
        self.products = (
            _Product("w13", served[0], (entry.gate, entry.up), (gate, up), dtype),
            _Product("w2", served[1], (entry.down,), (down,), dtype),
        )
        raise_findings(self._findings(layer))
        self.rows = tuple(product.served.require_row() for product in self.products)
        self.methods: tuple[GroupedMethod, ...] = tuple(
            load_object(row.method)(product.name + "_") for row, product in zip(self.rows, self.products, strict=True)
        )
        # vllm-ascend looks here for its own scheme object. None keeps it from shortcuts that read its schemes' weights.
        self.quant_method = None
        self.tid2eid = tid2eid
        self.ascend: Any = None

    def _findings(self, layer: nn.Module) -> list[Finding]:
        found = [
            finding for finding in dict.fromkeys(f for p in self.products for f in p.findings(self.prefix, self.source))
        ]

        def refuse(code: str, message: str, expected: str, what: str, fix: str) -> None:
            found.append(Finding(code, message, self.prefix, self.source, expected=expected, found=what, fix=fix))

        found += [replace(finding, layer=self.prefix) for finding in platforms.host_findings(experts=True)]
        activation = getattr(layer.activation, "value", layer.activation)
        limits = {name: getattr(layer, name, None) for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")}
        if activation != "silu" or any(limits.values()):
            set_limits = ", ".join(f"{name} {value}" for name, value in limits.items() if value)
            refuse(
                "unsupported-scheme",
                "quantized experts are served with the activation silu(gate) * up",
                "silu without limits",
                f"{activation} {set_limits}".strip(),
                "export the experts of this model as float",
            )
        if getattr(self.moe, "has_bias", False):
            found.append(replace(expert_bias(), layer=self.prefix, file=self.source))
        experts = getattr(self.moe, "num_logical_experts", self.moe.num_experts)
        described = self.resolved.entry.count
        if described and described != experts:
            refuse(
                "wrong-shape",
                "the model and the quantization config have different numbers of experts",
                f"{experts} experts, as in config.json",
                f"{described} experts",
                "check that config.json and the weights are of the same model",
            )
        ranks = self.moe.moe_parallel_config.ep_size
        if self.moe.num_experts % ranks:
            sizes = [size for size in range(2, min(self.moe.num_experts, 64) + 1) if self.moe.num_experts % size == 0]
            refuse(
                "cannot-shard",
                "the experts cannot be divided evenly among the expert-parallel ranks",
                "an expert-parallel size of " + ", ".join(map(str, sizes)),
                f"{self.moe.num_experts} experts on {ranks} ranks",
                "choose another number of ranks, or run without --enable-expert-parallel",
            )
        return found

    @property
    def scheme(self) -> str:
        """The producer's name for the scheme; "w13 + w2" where the two differ."""
        return " + ".join(dict.fromkeys(product.scheme for product in self.products))

    @property
    def method_classes(self) -> str:
        return " + ".join(dict.fromkeys(row.method_name for row in self.rows))

    @property
    def operators(self) -> tuple[str, ...]:
        """The torch_npu operators of one forward, in order."""
        return operators_of(*self.methods)

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors of this rank's experts.

        Raises:
            NpuQuantError: cannot-shard where a packed element would be cut.
        """
        parallel = self.moe.moe_parallel_config
        ranks, rank = parallel.tp_size, parallel.tp_rank
        inner = intermediate_size_per_partition * ranks
        w13, w2 = self.products
        w13.size(inner, hidden_size, ranks, rank)
        w2.size(hidden_size, inner, ranks, rank)
        raise_findings(f for product in self.products for f in product.shard_findings(self.prefix, self.source))
        self.hidden_size = hidden_size
        self.inner_size = intermediate_size_per_partition
        for product in self.products:
            product.register(layer, num_experts, lambda *which: self._loader(layer, *which))
        self.key = _register(layer, self.prefix)

    def _loader(self, layer: nn.Module, product: _Product, tensor: TensorSpec) -> Callable[..., bool | None]:
        """What vLLM calls for each expert's tensor. Its arguments keep the names of vLLM's own loader."""

        def weight_loader(
            param: torch.Tensor,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local < 0:
                return False if return_success else None
            try:
                product.load(tensor, param, loaded_weight, local, shard_id)
            except NpuQuantError as error:
                name = product.layers[product.shards.index(shard_id)].replace("*", str(expert_id))
                raise self._located(error, f"{name}.{tensor.name}") from error
            return True if return_success else None

        weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]
        return weight_loader

    def _located(self, error: NpuQuantError, layer: str = "") -> NpuQuantError:
        """The error with a name in findings that have none."""
        return NpuQuantError(
            replace(finding, layer=finding.layer or layer or self.prefix, file=finding.file or self.source)
            for finding in error.findings
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything arrived, and replace the checkpoint's tensors by the operators' ones. Idempotent.

        Raises:
            NpuQuantError: not-filled, or what the schemes' values do not allow.
        """
        if not all(product.coverage for product in self.products):
            return
        expert_map = getattr(layer, "_expert_map", None)
        if expert_map is None:
            expert_map = getattr(layer, "expert_map", None)
        if load_is_checked():
            numbers = _numbers(expert_map)
            raise_findings(
                finding
                for product in self.products
                for finding in product.not_filled(self.prefix, self.source, numbers)
            )
        else:
            for product in self.products:
                for name in product.coverage:
                    fill_placeholder(name, getattr(layer, f"{product.name}_{name}").data, product.spec)
        placement = Placement.of(self.moe.num_experts, expert_map)
        w13, w2 = self.products
        self.chain = FusedExperts(
            self.methods[0], self.methods[1], self.hidden_size, self.inner_size, (w13.group_size, w2.group_size)
        )
        self.placement = placement
        self.ascend = platforms.ascend_experts(self.chain, placement, self.tid2eid)
        sizes = (self.chain.w13_sizes, self.chain.w2_sizes)
        for product, method, size in zip(self.products, self.methods, sizes, strict=True):
            try:
                prepared = method.prepare(product.experts(layer), size, product.act_dtype)
            except NpuQuantError as error:
                raise self._located(error) from error
            product.drop(layer)
            for name, value in method.finish(prepared).items():
                layer.register_parameter(method.prefix + name, nn.Parameter(value, requires_grad=False))

    @property
    def is_monolithic(self) -> bool:
        return False

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """vLLM before 0.27 would put a modular kernel in this method's place."""
        return None

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """vLLM's own kernels are not used."""
        return None

    def apply(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
        **ascend: Any,
    ) -> Any:
        """The routed experts' output on this rank, not reduced. Shared experts are vLLM's to add.

        vllm-ascend's layers may give ``ascend``, its own arguments, in the place of a routing; they get its result type.
        """
        if self.ascend is not None:
            return self.ascend.apply(layer, x, topk_weights, topk_ids, ascend)
        return torch.ops.npu_quant.fused_experts(x, topk_weights, topk_ids, self.key)

    def compute(
        self, layer: nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """``apply`` without the operator around it."""
        weights: torch.Tensor | None = topk_weights
        if layer.apply_router_weight_on_input:
            x, weights = x * topk_weights.to(x.dtype), None
        return self.chain.apply(layer, self.placement, x, weights, topk_ids)


def _numbers(expert_map: torch.Tensor | None) -> Callable[[int], int]:
    """From the number of an expert on this rank to its number in the checkpoint."""
    if expert_map is None:
        return lambda expert: expert
    mapped = expert_map.tolist()
    return lambda expert: mapped.index(expert)
