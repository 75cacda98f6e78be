# SPDX-License-Identifier: Apache-2.0
"""The decision on how a stored layer is served on this host.

Formats describe stored layers. The command line and the engine both call ``decide``, so that ``inspect`` reports what runs.
All inputs of the decision besides the layer are fields of ``Host``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_npu_quant import settings
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity
from vllm_npu_quant.layouts.tables import LAYOUTS
from vllm_npu_quant.serving.dispatch import Row, describe, find_row, unsupported
from vllm_npu_quant.spec import ActivationSpec, Granularity, LayerKind, LayerSpec, Layout, NumberKind, WeightSpec

__all__ = [
    "Host",
    "Served",
    "decide",
    "expert_bias",
    "expert_findings",
    "float_experts",
    "float_name",
    "requantized_findings",
]

_INT8 = WeightSpec(8)
_PER_TOKEN = ActivationSpec(8, dynamic=True, granularity=Granularity.TOKEN)
_STATIC = ActivationSpec(8, dynamic=False, granularity=Granularity.TENSOR, symmetric=False)
_MODEL_DTYPE = WeightSpec(16, NumberKind.FLOAT)
#: Names of the stored floats that these chips do not compute with, by kind and bits.
_FLOAT_NAMES = {
    (NumberKind.FLOAT, 8): "FP8",
    (NumberKind.MX, 8): "MXFP8",
    (NumberKind.MX, 4): "MXFP4",
    (NumberKind.FLOAT, 4): "NVFP4",
}


@dataclass(frozen=True)
class Host:
    """Inputs of the decision besides the layer.

    Attributes:
        float_weights: the served form of weights that are stored as 8- or 4-bit floats, on chips without these numbers:
            "int8", "w8a16" for int8 weights with float activations, or "bf16" for the model's dtype.
        w4a8: how layers with 4-bit weights and 8-bit activations run: "int8" as stored, or "w4a16".
        latent_attention: whether the model's attention is multi-head latent attention (DeepSeek's MLA).
        kv_consumer: whether this process decodes for the prefill node of a disaggregated deployment.
        findings: invalid settings, which are replaced by their defaults.
    """

    float_weights: str = "int8"
    w4a8: str = "int8"
    latent_attention: bool = False
    kv_consumer: bool = False
    findings: tuple[Finding, ...] = ()

    @classmethod
    def read(cls, *, latent_attention: bool = False) -> Host:
        """Read the settings once. Invalid values are in ``findings``."""
        values, found = settings.Settings.read()
        return cls(values.float_weights, values.w4a8, latent_attention, findings=found)


@dataclass(frozen=True)
class Served:
    """A stored layer, and how it is served.

    Attributes:
        kind: the kind of vLLM layer. stored: the stored spec. spec: the served one; equal to ``stored`` for most layers.
        row: the dispatch row; None for a float layer, and if no method class serves ``spec``.
        needs_float: whether vLLM reads ``layer.weight`` itself, as a float matrix.
        difference: the difference between the two, in words; empty if there is none to report.
        instead: how a user can avoid the difference.
    """

    kind: LayerKind
    stored: LayerSpec
    spec: LayerSpec
    row: Row | None
    needs_float: bool = False
    difference: str = ""
    instead: str = ""

    def require_row(self, *, layer: str = "", file: str = "") -> Row:
        """The dispatch row.

        Raises:
            NpuQuantError: unsupported-scheme if no method class serves the layer.
        """
        if self.row is None:
            raise NpuQuantError([unsupported(self.kind, self.spec, layer=layer, file=file)])
        return self.row

    def describe(self) -> str:
        """One line for messages and tables."""
        return describe(self.spec, self.stored)


def decide(kind: LayerKind, stored: LayerSpec, host: Host, *, layer: str = "") -> Served:
    """Decide how a stored layer is served.

    Args:
        kind: the kind of vLLM layer that asks.
        stored: what the checkpoint holds.
        host: settings and deployment.
        layer: the layer's name; latent attention needs ``kv_b_proj`` as a float matrix.
    """
    needs_float = host.latent_attention and layer.endswith(".kv_b_proj")
    if stored.is_float:
        return Served(kind, stored, stored, None, needs_float)
    spec, difference, instead = _computed(kind, stored, host, needs_float)
    row = find_row(kind, spec)
    if row is not None and row.instead and not difference:
        difference, instead = row.remark, f"export these layers {row.instead}"
    return Served(kind, stored, spec, row, needs_float, difference, instead)


def float_experts(stored: LayerSpec) -> Served:
    """Decide for float experts whose other product is quantized: a grouped product in the model's dtype."""
    spec = replace(stored, weight=_MODEL_DTYPE)
    return Served(LayerKind.FUSED_MOE, stored, spec, find_row(LayerKind.FUSED_MOE, spec))


def float_name(stored: LayerSpec) -> str:
    """The name of the floats that a stored weight consists of ("MXFP4"); empty for integers, and for the model's dtype."""
    weight = stored.weight
    return "" if weight is None else _FLOAT_NAMES.get((weight.kind, weight.bits), "")


def _computed(kind: LayerKind, stored: LayerSpec, host: Host, needs_float: bool) -> tuple[LayerSpec, str, str]:
    """The served spec, its difference from the stored one, and how to avoid that.

    Small floats are not reported per layer: ``requantized_findings`` reports them once per checkpoint.
    """
    activation = stored.activation
    floats = float_name(stored)
    if needs_float and not (floats and host.float_weights == "bf16"):
        told = "latent attention takes its weight apart, so it is dequantized while it loads, to two bytes each"
        return _as_float(stored), told, "export this layer as float"
    if floats:
        return _as_float(stored) if host.float_weights == "bf16" else _as_int8(kind, stored, host), "", ""
    if host.kv_consumer and stored.layout is Layout.MODELSLIM_STATIC and activation is not None and activation.dynamic:
        # W8A8_MIX stores the tensors of both: prefill nodes quantize per token, decode nodes with the static scale.
        return replace(stored, activation=_STATIC), "", ""
    if host.w4a8 == "w4a16" and _is_w4a8(stored):
        told = f"{settings.W4A8}=w4a16: its activations are not quantized"
        spec = replace(stored, scheme=f"{stored.scheme} as W4A16", activation=None)
        return spec, told, f"unset {settings.W4A8}"
    return stored, "", ""


def _as_int8(kind: LayerKind, stored: LayerSpec, host: Host) -> LayerSpec:
    """The int8 form of a weight of small floats: one scale per output channel, which the int8 operators take.

    Weight-only Linear operators take groups, so that they get MXFP4 exactly: twice an E2M1 value is an integer, and every
    float dtype holds the power-of-two scales.
    """
    if stored.activation is not None and host.float_weights != "w8a16":
        return replace(stored, scheme=f"{stored.scheme} as W8A8_DYNAMIC", weight=_INT8, activation=_PER_TOKEN)
    weight = _INT8
    if stored.weight is not None and kind is not LayerKind.FUSED_MOE and float_name(stored) == "MXFP4":
        weight = replace(stored.weight, bits=8, kind=NumberKind.INT)
    return replace(stored, scheme=f"{stored.scheme} as W8A16", weight=weight, activation=None)


def _as_float(stored: LayerSpec) -> LayerSpec:
    return replace(stored, scheme=f"{stored.scheme} as float", weight=_MODEL_DTYPE, activation=None)


def _is_w4a8(stored: LayerSpec) -> bool:
    weight, activation = stored.weight, stored.activation
    if weight is None or activation is None or stored.transform is not None:
        return False
    return (weight.bits, activation.bits) == (4, 8) and not (weight.kind.is_float or activation.kind.is_float)


def requantized_findings(layers: Iterable[tuple[LayerSpec, int]], host: Host, source: str) -> list[Finding]:
    """Report how a checkpoint's layers of small floats are served, and which settings are not valid.

    Args:
        layers: stored specs, and how many checkpoint layers have each.
        host: settings and deployment.
        source: the file to name.
    """
    counts: dict[str, int] = {}
    names: dict[str, None] = {}
    static = exact = w4a8 = False
    for spec, count in layers:
        w4a8 |= _is_w4a8(spec)
        if name := float_name(spec):
            names[name] = None
            counts[spec.scheme] = counts.get(spec.scheme, 0) + count
            static |= spec.activation is not None and not spec.activation.dynamic
            exact |= _as_int8(LayerKind.LINEAR, spec, host).weight != _INT8
    concerned = {settings.FLOAT_WEIGHTS: bool(counts), settings.FP8: bool(counts), settings.W4A8: w4a8}
    found = [
        finding for finding in host.findings if any(hit and name in finding.message for name, hit in concerned.items())
    ]
    if not counts:
        return found
    message, fix = _requantized(host, " or ".join(names), exact=exact)
    if static and host.float_weights == "int8":
        message += "; static input scales are dropped, since a scale per token is finer"
    schemes = ", ".join(f"{scheme}: {count} layers" for scheme, count in sorted(counts.items()))
    found.append(Finding("requantized", message, file=source, found=schemes, fix=fix, severity=Severity.INFO))
    return found


def _requantized(host: Host, names: str, *, exact: bool) -> tuple[str, str]:
    """The message and the advice on layers of these floats; ``exact``: whether Linear layers keep the groups of some."""
    if host.float_weights == "bf16":
        message = f"{names} weights are dequantized at load to the model's dtype, two bytes per weight"
        return message, f"{settings.FLOAT_WEIGHTS}=int8 keeps one byte per weight"
    stay = host.float_weights == "w8a16"
    message = (
        f"Ascend A2, A3 and 310P have no {names}: weights are requantized at load to int8, one byte per weight, with a scale "
        "per output channel, and activations "
        + ("stay in the model's dtype" if stay else "that the checkpoint quantizes to int8 per token")
    )
    if exact:
        message += "; Linear layers whose activations are float keep MXFP4's groups, in which int8 is exact"
    return message, f"{settings.FLOAT_WEIGHTS}=bf16 dequantizes them to the model's dtype instead, two bytes per weight"


def expert_findings(stored: LayerSpec, layer: str, source: str) -> list[Finding]:
    """Findings for features that are served for Linear layers and not for experts: activation order.

    Args:
        stored: what the checkpoint holds.
        layer: the experts' name. source: the file to name.
    """
    if not LAYOUTS[stored.layout].act_order:
        return []
    return [
        Finding(
            "unsupported-scheme",
            "experts with activation order would need the input sorted anew for every expert",
            layer=layer,
            file=source,
            expected="desc_act false",
            found=stored.scheme,
            fix="re-export the checkpoint without activation order (desc_act=False, actorder weight or none)",
        )
    ]


def expert_bias(found: str = "a bias", *, layer: str = "", file: str = "", layers: int = 1) -> Finding:
    """The finding for quantized experts with a bias that is not zero.

    Args:
        found: the tensor with the bias.
        layer: the first MoE layer that has one. file: where it is described. layers: how many have one.
    """
    return Finding(
        "unsupported-scheme",
        "quantized experts are served without a bias" + (f" ({layers:,} MoE layers have one)" if layers > 1 else ""),
        layer=layer,
        file=file,
        expected="experts without a bias, or with zeros",
        found=found,
        fix="export the experts without a bias (no asymmetric smoothing of their inputs), or as float",
    )
