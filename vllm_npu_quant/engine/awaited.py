# SPDX-License-Identifier: Apache-2.0
"""Carrying out a model's answers (engine.ask): layers whose names it alone knows, and rows that it reorders.

A layer that the checkpoint's names do not tell gets no parameters while the model is built, and gets them before weights are
read. The tensors of such layers, and of layers whose rows are reordered, go past the model's ``load_weights``, which knows
float weights, to the loaders of their parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from vllm_npu_quant.checkpoint.text import shown, shown_name
from vllm_npu_quant.engine.ask import Answers, Delivery, ask, own_method
from vllm_npu_quant.engine.linear import CHECKPOINT_BIAS, NpuQuantLinearMethod, shard_numbers
from vllm_npu_quant.engine.moe import NpuQuantMoEMethod
from vllm_npu_quant.engine.stored import Rows
from vllm_npu_quant.errors import Finding, NpuQuantError, raise_findings
from vllm_npu_quant.formats.described import FUSED_FLOAT, Described
from vllm_npu_quant.formats.experts import split_expert
from vllm_npu_quant.spec import LayerKind

if TYPE_CHECKING:
    from vllm_npu_quant.engine.config import NpuQuantConfig

__all__ = ["AwaitedExperts", "AwaitedLinear", "Diverted", "settle"]

logger = init_logger("vllm.npu_quant.awaited")


class _Awaited:
    """The place of a method that is chosen when the model is built. ``error`` says why it was not known before."""

    def __init__(self, error: NpuQuantError) -> None:
        self.error = error
        self.layer: nn.Module | None = None
        self.arguments: dict[str, Any] = {}
        self.device = torch.device("cpu")

    def _keep(self, layer: nn.Module, **arguments: Any) -> None:
        self.layer, self.arguments, self.device = layer, arguments, torch.get_default_device()

    def create(self, layer: nn.Module, method: Any) -> None:
        """Give the layer the parameters of its method."""
        with self.device:
            method.create_weights(layer, **self.arguments)
        if hasattr(layer, "update_param_tp_status"):
            layer.update_param_tp_status()

    def settle(self, config: NpuQuantConfig, name: str, layer: Any, deliveries: list[Delivery]) -> None:
        """Give the layer the method of the checkpoint layers that fill it.

        Raises:
            NpuQuantError: undescribed-layer if none does; or as ``get_quant_method``.
        """
        raise NotImplementedError

    def named(self, name: str) -> NpuQuantError:
        """The error, with the name that the layer has in the model."""
        return NpuQuantError(replace(finding, layer=name) for finding in self.error.findings)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise the error, unless the layer is left out of the model, as the head of an embedding model is."""
        if layer is self.layer:
            raise self.error


@register_weight_loader_v2_supported_method
class AwaitedLinear(_Awaited, LinearMethodBase):
    """A Linear layer or lm_head."""

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
        self._keep(
            layer,
            input_size_per_partition=input_size_per_partition,
            output_partition_sizes=output_partition_sizes,
            input_size=input_size,
            output_size=output_size,
            params_dtype=params_dtype,
            **extra_weight_attrs,
        )
        # Model classes look at a weight's dtype, and tie lm_head's to the embedding's.
        shape = self.float_shapes(layer)["weight"]
        weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device="meta"), requires_grad=False)
        self.weight = weight
        layer.register_parameter("weight", weight)

    def settle(self, config: NpuQuantConfig, name: str, layer: Any, deliveries: list[Delivery]) -> None:
        if getattr(layer, "weight", None) is not self.weight:  # tied: the weight is the embedding's
            layer.quant_method = UnquantizedEmbeddingMethod()
            return
        fills = _fills(deliveries)
        if not fills:
            raise self.named(name)
        resolved = config.require_resolver(name).resolve_as(name, fills)
        kind = LayerKind.LM_HEAD if isinstance(layer, ParallelLMHead) else LayerKind.LINEAR
        method = config.linear_method(layer, resolved, kind) or UnquantizedEmbeddingMethod()
        del layer.weight
        self.create(layer, method)
        layer.quant_method = method

    def float_shapes(self, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        rows, columns = sum(self.arguments["output_partition_sizes"]), self.arguments["input_size_per_partition"]
        return {"weight": (rows, columns)}

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise self.error


class AwaitedExperts(_Awaited, FusedMoEMethodBase):
    """The routed experts of a MoE layer."""

    def __init__(self, layer: Any, error: NpuQuantError, tid2eid: Any) -> None:
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        _Awaited.__init__(self, error)
        self.tid2eid = tid2eid

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._keep(
            layer,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size_per_partition,
            params_dtype=params_dtype,
            **extra_weight_attrs,
        )

    def settle(self, config: NpuQuantConfig, name: str, layer: Any, deliveries: list[Delivery]) -> None:
        resolver = config.require_resolver(name)
        experts, described = _experts_of(deliveries), resolver.described
        entry = described.find_experts(experts)
        if entry is None and deliveries and not any(_scheme(described, each.layer) for each in deliveries):
            entry = FUSED_FLOAT
        if entry is None:
            raise self.named(name)
        method = config.experts_method(layer, resolver.resolve_experts_as(name, experts, entry), self.tid2eid)
        self.create(layer, method)
        layer._replace_quant_method(method)
        if hasattr(layer, "base_quant_method"):  # before vLLM 0.27
            layer.base_quant_method = method

    def float_shapes(self, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        names = ("num_experts", "hidden_size", "intermediate_size_per_partition")
        experts, hidden, inner = (self.arguments[name] for name in names)
        return {"w13_weight": (experts, 2 * inner, hidden), "w2_weight": (experts, hidden, inner)}

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Return None: vLLM's own kernels are not used."""
        return None


@dataclass
class Diverted:
    """Tensors that go past a model's ``load_weights``, to the loaders of their parameters.

    Attributes:
        targets: checkpoint layer -> the modules that it fills, and how. Its bias always goes past: the model classes know it
            by another name than ``CHECKPOINT_BIAS``, or not at all.
        whole: the layers all of whose tensors go past.
    """

    targets: dict[str, list[tuple[nn.Module, Delivery]]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)

    def install(self, model: nn.Module) -> None:
        """Take these tensors out of what ``model.load_weights`` is given, now and whenever the model is loaded again."""
        if not self.targets:
            return
        load = model.load_weights

        @functools.wraps(load)
        def load_others(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            return load(self._others(weights), *args, **kwargs)

        model.load_weights = load_others

    def _others(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            layer, _, last = name.rpartition(".")
            param_name = CHECKPOINT_BIAS if last == "bias" else last
            targets = self.targets.get(layer, []) if last == "bias" or layer in self.whole else []
            taken = [
                (param, how) for module, how in targets if (param := getattr(module, param_name, None)) is not None
            ]
            for param, how in taken:
                param.weight_loader(param, tensor, *how.args, **how.kwargs)
            if not taken:
                yield name, tensor


def settle(config: NpuQuantConfig, model: nn.Module) -> Diverted:
    """Ask a model that is built, give the layers that await it their methods, and find the tensors to divert.

    Raises:
        NpuQuantError: undescribed-layer for layers that no checkpoint layer fills; unsupported-scheme for quantized layers
            whose weights the model changes, or gives to a module that is not quantized; or as ``get_quant_method``.
    """
    answers = ask(model, config.float_shapes)
    _tell_refused(config, answers)
    findings: list[Finding] = []
    diverted = Diverted()
    for name, module in model.named_modules():
        deliveries = answers.deliveries.get(name, [])
        before = own_method(module)
        try:
            if isinstance(before, _Awaited):
                before.settle(config, name, module, deliveries)
            raise_findings(_unfit(config, name, module, deliveries))
            method = own_method(module)
            if isinstance(method, NpuQuantLinearMethod):
                _divert(config, module, method, deliveries, diverted, whole=method is not before)
        except NpuQuantError as error:
            findings += error.findings
    raise_findings(findings)
    return diverted


def _divert(
    config: NpuQuantConfig,
    layer: nn.Module,
    method: NpuQuantLinearMethod,
    deliveries: Iterable[Delivery],
    diverted: Diverted,
    *,
    whole: bool,
) -> None:
    """Note what fills a quantized Linear layer. ``whole``: its tensors go past ``load_weights``, reordered or not."""
    for delivery in deliveries:
        diverted.targets.setdefault(delivery.layer, []).append((layer, delivery))
        if delivery.rows is not None:
            rows = Rows(delivery.rows, config.float_shapes[delivery.layer][0])
            method.take_rows(_shard_of(delivery), rows)
        if whole or delivery.rows is not None:
            diverted.whole.add(delivery.layer)


def _unfit(config: NpuQuantConfig, name: str, module: nn.Module, deliveries: Iterable[Delivery]) -> list[Finding]:
    """Findings for quantized weights that the model changes, or gives to a module that takes none."""
    described = config.require_resolver(name).described
    method = own_method(module)
    findings = []
    for delivery in deliveries:
        scheme = _scheme(described, delivery.layer)
        if isinstance(method, NpuQuantLinearMethod):
            change = delivery.change
        elif isinstance(method, NpuQuantMoEMethod):
            change = delivery.change or ("its rows are reordered" if delivery.rows is not None else "")
        else:
            change = f"{name} takes float weights only" if scheme else ""
        if change:
            findings.append(
                Finding(
                    "unsupported-scheme",
                    "the model class does with this layer's weight what cannot be done with a quantized one",
                    layer=delivery.layer or name,
                    file=described.source,
                    expected="a weight that is loaded as it is, or whose rows are reordered",
                    found=", ".join(filter(None, (change, scheme))),
                    fix="export this layer as float",
                )
            )
    return list(dict.fromkeys(findings))


def _scheme(described: Described, layer: str) -> str:
    """The producer's name for the scheme of a checkpoint layer, or of the experts it belongs to; empty if it is float."""
    split = split_expert(layer)
    experts = described.find_experts(split[0]) if split else None
    if split and experts is not None:
        entry = dict(zip(experts.names, (experts.gate, experts.up, experts.down), strict=True)).get(split[2])
    else:
        entry = described.find(layer)
    return "" if entry is None or entry.spec.is_float else entry.spec.scheme


def _tell_refused(config: NpuQuantConfig, answers: Answers) -> None:
    """Warn of quantized layers whose weights the model's ``load_weights`` did not take: their names must do."""
    described = config.require_resolver("").described
    layers = [layer for layer in answers.refused if _scheme(described, layer)]
    if layers:
        message = "The model could not be asked about %s (of %d layers), which are loaded by their names alone: %s"
        logger.warning(message, shown_name(layers[0]), len(layers), shown(answers.refused[layers[0]], 300))


def _experts_of(deliveries: Iterable[Delivery]) -> str:
    """The checkpoint's name of the experts whose weights these are; empty if they are of several or of none."""
    names = {split[0] if (split := split_expert(each.layer)) else each.layer.rpartition(".")[0] for each in deliveries}
    return names.pop() if len(names) == 1 else ""


def _fills(deliveries: Iterable[Delivery]) -> dict[str, int]:
    """The checkpoint layers in row order, and how many of the layer's shards each fills."""
    shards = [(number, each.layer) for each in deliveries for number in shard_numbers(_shard_of(each))]
    fills: dict[str, int] = {}
    for _, layer in sorted(shards):
        fills[layer] = fills.get(layer, 0) + 1
    return fills or {each.layer: 1 for each in deliveries}


def _shard_of(delivery: Delivery) -> Any:
    """The shard that the model names to the loader of a Linear layer's parameter; None for all shards."""
    return delivery.args[0] if delivery.args else delivery.kwargs.get("loaded_shard_id")
