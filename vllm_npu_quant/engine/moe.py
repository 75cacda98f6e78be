# SPDX-License-Identifier: Apache-2.0
"""Routed experts in vLLM.

The checkpoint's tensors are registered with a leading dimension of this rank's experts. Their loaders replace vLLM's, which
copies tensors that are too small and drops unknown names. After loading they are converted to the tensors of the two grouped
methods. w13 and w2 are independent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from vllm_npu_quant.engine import platforms
from vllm_npu_quant.engine.coverage import Box
from vllm_npu_quant.engine.stored import Origin, Receiver
from vllm_npu_quant.errors import Finding, NpuQuantError, raise_findings
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.formats.experts import expert_count
from vllm_npu_quant.formats.resolve import ResolvedExperts
from vllm_npu_quant.layouts import load_object
from vllm_npu_quant.layouts.canonical import CanonicalLinear, CanonicalWeight
from vllm_npu_quant.layouts.tables import IN, OUT, Axis, TensorSpec, tensors_of
from vllm_npu_quant.methods.moe import Experts, FusedExperts, GroupedMethod, Placement, operators_of
from vllm_npu_quant.serving import dispatch
from vllm_npu_quant.serving.decide import Served, expert_bias, expert_findings
from vllm_npu_quant.serving.shards import SMALLER_TP, rank_part
from vllm_npu_quant.spec import LayerKind

__all__ = ["NpuQuantMoEMethod"]

#: The projections of w13 and w2 by vLLM's shard ids.
_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}

#: The layers that ``npu_quant::fused_experts`` computes, by their keys.
_layers: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


@torch.library.custom_op("npu_quant::fused_experts", mutates_args=())
def fused_experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, key: str) -> torch.Tensor:
    """Compute a MoE layer as one operator: the emulation counts tokens in Python, which a graph cannot capture.

    Args:
        x: [T, hidden]. topk_weights: [T, k]. topk_ids: [T, k]. key: the layer's.

    Returns:
        [T, hidden] in x's dtype, not reduced.
    """
    layer = _layers[key]
    return layer.quant_method.compute(layer, x, topk_weights, topk_ids)


@fused_experts.register_fake
def _(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, key: str) -> torch.Tensor:
    return torch.empty_like(x)


def _register(layer: nn.Module, prefix: str) -> str:
    """A key for the layer: its name, with a number if another live layer has that name (a draft model's)."""
    key, number = prefix, 1
    while _layers.get(key, layer) is not layer:
        key, number = f"{prefix}#{number}", number + 1
    _layers[key] = layer
    return key


class _Product:
    """w13 or w2: its stored tensors, and the parameters that receive them."""

    def __init__(
        self,
        name: str,
        served: Served,
        entries: tuple[LayerEntry, ...],
        layers: tuple[str, ...],
        act_dtype: torch.dtype,
        stacked: bool = False,
    ) -> None:
        """
        Args:
            name: "w13" or "w2".
            served: how it is served.
            entries: of its shards. layers: the checkpoint's names of its shards, with * for the expert.
            act_dtype: the model's dtype.
            stacked: whether the tensors of all experts are stored as one.
        """
        self.stacked = stacked
        self.name, self.served, self.layers, self.act_dtype = name, served, layers, act_dtype
        self.stored = served.stored
        self.scheme = (self.stored if self.stored.is_float else served.spec).scheme
        self.shards = _SHARDS[name]
        self.listed = frozenset().union(*(entry.tensors for entry in entries))
        self.tensors = tuple(
            replace(tensor, loaded=False) if tensor.name == "bias" else tensor
            for tensor in tensors_of(self.stored, self.listed)
        )
        if self.stored.is_float:
            dtype = str(act_dtype).removeprefix("torch.")
            self.tensors = (TensorSpec("weight", ("F32", "BF16", "F16", "F64"), (OUT, IN), dtype),)

    def cut(self, outputs: int, inputs: int, ranks: int, rank: int, prefix: str, source: str) -> tuple[Finding, ...]:
        """Cut the product for the ranks of tensor parallelism: w13 along its outputs, w2 along its inputs.

        Args:
            outputs, inputs: of one shard on all ranks.
            ranks, rank: of tensor parallelism.
            prefix, source: vLLM's name of the layer, and the file that describes it.

        Returns:
            Findings if it cannot be cut.
        """
        self.rank, self.outputs = rank, (outputs,)
        axis = None if ranks == 1 else Axis.OUT if self.name == "w13" else Axis.IN
        fix = f"{SMALLER_TP}, or --enable-expert-parallel"
        part = rank_part(self.stored, self.listed, axis, [outputs], inputs, ranks, fix)
        self.receiver = Receiver(
            part, {f"{self.name}_{tensor.name}": tensor for tensor in self.tensors}, prefix, source
        )
        return part.findings

    @property
    def group_size(self) -> int:
        """Inputs per scale on this rank; 0 for one scale per output channel."""
        sizes = self.receiver.part.sizes
        return sizes.group_size if sizes.groups > 1 else 0

    def register(self, layer: nn.Module, experts: int, ranks: int, loader: Callable[..., Any]) -> None:
        """Register the parameters [E, shards, ...] that receive the checkpoint's tensors.

        Args:
            experts: this rank's. ranks: of expert parallelism.
        """
        sizes, count = self.receiver.part.sizes, (experts, len(self.shards))
        for name, tensor in self.receiver.tensors.items():
            # A tensor that is not loaded needs a parameter too: vLLM looks it up before it calls the loader.
            shape = (*count, *tensor.as_loaded().shape(sizes)) if tensor.loaded else count
            param = nn.Parameter(torch.empty(shape, dtype=getattr(torch, tensor.load_dtype)), requires_grad=False)
            param.weight_loader = loader(self, name)  # type: ignore[attr-defined]
            if self.stacked:  # RoutedExperts transposes scales of this kind with the weights
                param.quant_method = "block"  # type: ignore[attr-defined]
            # vLLM prepares a layer that is loaded again when so many elements have arrived, of all ranks' experts.
            param.weight_loader_numel = param.numel() * ranks  # type: ignore[attr-defined]
            self.receiver.register(layer, name, param, count if tensor.loaded else None)

    def load(self, name: str, param: torch.Tensor, stored: torch.Tensor, expert: int, local: int, shard: int) -> None:
        """Copy this rank's part of one expert's tensor into a parameter.

        Args:
            name: of the parameter. expert: the checkpoint's number of the expert. local: this rank's number of it.

        Raises:
            NpuQuantError: wrong-dtype, wrong-shape; unsupported-scheme for a bias that is not zero.
        """
        receiver, tensor = self.receiver, self.receiver.tensors[name]
        layer = self.layers[shard].replace("*", str(expert))
        with receiver.naming("it could not be loaded", f"{layer}.{tensor.name}"):
            received = receiver.receive(tensor, stored, Origin(layer, self.stored, self.outputs))
            if tensor.loaded:
                param.data[local, shard].copy_(receiver.cut(tensor, received, self.rank))
            else:
                param.data[local, shard].copy_(torch.zeros_like(param.data[local, shard]))
            if name in receiver.coverage:
                receiver.coverage[name].add(((local, local + 1), (shard, shard + 1)))
            elif tensor.name == "bias" and not param.is_meta and bool(received.any()):
                raise NpuQuantError([expert_bias(f"{layer}.bias", layer=receiver.layer)])

    def names_of(self, expert_map: torch.Tensor | None) -> Callable[[str, Box], list[str]]:
        """A function that gives the stored tensors that should have filled a box of a parameter.

        Args:
            expert_map: int [experts of the layer], the number of each on this rank; None if they are the same.
        """
        number: Callable[[int], int] = int if expert_map is None else expert_map.tolist().index

        def names(name: str, box: Box) -> list[str]:
            (first, last), shards = box
            return [
                f"{self.layers[shard].replace('*', str(number(expert)))}.{self.receiver.tensors[name].name}"
                for expert in range(first, last)
                for shard in range(*shards)
            ]

        return names

    def experts(self, layer: nn.Module) -> Experts:
        """The loaded tensors as canonical weights."""
        params = {
            tensor.name: getattr(layer, name).data for name, tensor in self.receiver.tensors.items() if tensor.loaded
        }
        values = next(iter(params.values()))
        count, shards = values.shape[:2]

        def canonical(expert: int) -> list[CanonicalLinear]:
            return [
                self._canonical({name: value[expert, shard] for name, value in params.items()})
                for shard in range(shards)
            ]

        sizes = self.receiver.part.sizes
        return Experts(count, shards, sizes.outputs, sizes.inputs, values.device, canonical)

    def _canonical(self, tensors: dict[str, torch.Tensor]) -> CanonicalLinear:
        if not self.stored.is_float:
            return self.receiver.canonical(tensors, self.served.spec)
        values = tensors["weight"]
        weight = CanonicalWeight.of(values, values.new_ones(1, 1, dtype=torch.float32))
        weight.float_rows = lambda start, stop: values[start:stop].to(torch.float32)
        return CanonicalLinear(weight)


def _expert_map(layer: nn.Module) -> torch.Tensor | None:
    """vLLM's map of experts: int [experts of the layer], the number of each on this rank, or -1; None if all are local."""
    expert_map = getattr(layer, "_expert_map", None)
    return expert_map if expert_map is not None else getattr(layer, "expert_map", None)


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
            served: how w13 and w2 are served.
            tid2eid: vllm-ascend's table of experts by token id, for models that route by it.

        Raises:
            NpuQuantError: if the described layer cannot be served.
        """
        super().__init__(layer.moe_config)
        self.resolved = resolved
        self.prefix = resolved.prefix
        self.source = source
        entry, dtype = resolved.entry, layer.moe_config.in_dtype
        gate, up, down = (f"{resolved.layer}.*.{name}" for name in entry.names)
        self.products = (
            _Product("w13", served[0], (entry.gate, entry.up), (gate, up), dtype, entry.stacked),
            _Product("w2", served[1], (entry.down,), (down,), dtype, entry.stacked),
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
        self.placed = False

    def _findings(self, layer: nn.Module) -> list[Finding]:
        found = platforms.host_findings(experts=True)

        def refuse(code: str, message: str, expected: str, what: str, fix: str) -> None:
            found.append(Finding(code, message, expected=expected, found=what, fix=fix))

        for product in self.products:
            if product.served.row is None:
                found.append(dispatch.unsupported(LayerKind.FUSED_MOE, product.served.spec))
            found += expert_findings(product.stored, self.prefix, self.source)
        if getattr(self.moe, "has_bias", False):
            found.append(expert_bias())
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
        experts = getattr(self.moe, "num_logical_experts", self.moe.num_experts)
        described = self.resolved.entry.count
        if described and described != experts:
            found.append(expert_count(self.prefix, f"{experts} experts, as in config.json", described, self.source))
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
        return self._located(dict.fromkeys(found))

    def _located(self, findings: Iterable[Finding]) -> list[Finding]:
        return [replace(finding, layer=self.prefix, file=finding.file or self.source) for finding in findings]

    @property
    def scheme(self) -> str:
        """The producer's name for the scheme; "w13 + w2" if the two differ."""
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
            NpuQuantError: cannot-shard if a rank would get a part of a packed element.
        """
        parallel = self.moe.moe_parallel_config
        ranks, rank = parallel.tp_size, parallel.tp_rank
        inner = intermediate_size_per_partition * ranks
        w13, w2 = self.products
        uncut = w13.cut(inner, hidden_size, ranks, rank, self.prefix, self.source)
        uncut += w2.cut(hidden_size, inner, ranks, rank, self.prefix, self.source)
        raise_findings(self._located(uncut))
        self.hidden_size = hidden_size
        self.inner_size = intermediate_size_per_partition
        for product in self.products:
            product.register(layer, num_experts, parallel.ep_size, lambda *which: self._loader(layer, *which))
        self.key = _register(layer, self.prefix)

    def float_shapes(self, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """The parameters that the experts would have as float ones, with their shapes on this rank."""
        experts, hidden, inner = layer.local_num_experts, self.hidden_size, self.inner_size
        return {"w13_weight": (experts, 2 * inner, hidden), "w2_weight": (experts, hidden, inner)}

    def _loader(self, layer: nn.Module, product: _Product, name: str) -> Callable[..., bool | None]:
        """The loader that vLLM calls for each expert's tensor, with the argument names of vLLM's own."""

        computed = product.receiver.computed_from(name)
        reference = weakref.ref(layer)  # vLLM keeps parameters' loaders as long as the layer lives

        def weight_loader(
            param: torch.Tensor,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            experts: Any = reference()
            shard = product.shards.index(shard_id)
            # Llama-4's class gives the stacked tensors of all experts of this rank, the first of which is expert_id.
            whole = product.stacked and loaded_weight.dim() == 3
            taken = False
            with product.receiver.naming("it could not be loaded"):
                product.receiver.begin(experts, name, param)
            for expert, stored in enumerate(loaded_weight if whole else (loaded_weight,), start=expert_id):
                local = experts._map_global_expert_id_to_local_expert_id(expert)
                if local >= 0:
                    product.load(name, param, stored, expert, local, shard)
                    for other in () if param.is_meta else computed:
                        product.load(other, getattr(experts, other), stored, expert, local, shard)
                    taken = True
                elif param.is_meta:  # vLLM counts what arrives, of other ranks' experts, too
                    param.data[0, shard].copy_(param.data[0, shard])
            return taken if return_success else None

        weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]
        return weight_loader

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything arrived, and replace the checkpoint's tensors by the operators' ones. Idempotent.

        Raises:
            NpuQuantError: not-filled; or values that a method class refuses.
        """
        if not any(receiver.coverage for receiver in self.receivers):
            return
        expert_map = _expert_map(layer)
        findings: list[Finding] = []
        for product in self.products:
            product.receiver.expect()
            findings += product.receiver.finish(layer, product.names_of(expert_map))
        raise_findings(findings)
        if not self.placed:
            self._place(layer, expert_map)
        sizes = (self.chain.w13_sizes, self.chain.w2_sizes)
        for product, method, size in zip(self.products, self.methods, sizes, strict=True):
            with product.receiver.naming("its experts could not be prepared"):
                prepared = method.prepare(product.experts(layer), size, product.act_dtype)
            product.receiver.drop(layer)
            tensors = {method.prefix + name: value for name, value in method.finish(prepared).items()}
            with product.receiver.naming("its experts could not be prepared"):
                product.receiver.install(layer, tensors)

    def _place(self, layer: nn.Module, expert_map: torch.Tensor | None) -> None:
        """Create the chain of operators for this rank's experts. They stay when the layer is loaded again."""
        self.placed = True
        self.placement = placement = Placement.of(self.moe.num_experts, expert_map)
        # Tensors that are neither parameters nor buffers do not survive vLLM's sleep mode.
        layer.register_buffer("npu_quant_to_local", placement.to_local, persistent=False)
        w13, w2 = self.products
        self.chain = FusedExperts(
            self.methods[0], self.methods[1], self.hidden_size, self.inner_size, (w13.group_size, w2.group_size)
        )
        self.ascend = platforms.ascend_experts(self.chain, placement, self.tid2eid)

    @property
    def receivers(self) -> tuple[Receiver, ...]:
        return tuple(product.receiver for product in self.products)

    def lacking(self, layer: nn.Module) -> list[Finding]:
        """Findings for tensors that have not arrived since the layer's reload began."""
        findings: list[Finding] = []
        for product in self.products:
            product.receiver.expect(counting=True)
            findings += product.receiver.not_filled(product.names_of(_expert_map(layer)))
        return findings

    def restore_weights_for_rl_loading(self, layer: nn.Module) -> None:
        """Make a prepared layer ready for ``load_weights``; ``process_weights_after_loading`` prepares it again.

        This is the older contract of RL trainers. The operators' tensors keep their addresses.
        """
        for receiver in self.receivers:
            receiver.restore(layer)

    @property
    def is_monolithic(self) -> bool:
        return False

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """Keep vLLM before 0.27 from replacing this method by a modular kernel."""
        return None

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Return None: vLLM's own kernels are not used."""
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
        """The routed experts' output on this rank, not reduced. vLLM adds shared experts.

        On Ascend, ``ascend`` holds vllm-ascend's arguments instead of a routing, and the result has its type.
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
