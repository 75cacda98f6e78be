# SPDX-License-Identifier: Apache-2.0
"""Ownership of checkpoints on an Ascend host: this plugin or vllm-ascend.

vllm-ascend has fused paths that look for its own classes. A checkpoint goes to it if its registry has every scheme of
the checkpoint; otherwise the whole checkpoint is this plugin's. Read in vllm-ascend's source, not run on an NPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm_npu_quant.ascend import host

__all__ = ["serves_compressed_tensors", "unserved"]

#: vllm-ascend 0.23's registry for A2/A3, used if it cannot be queried: (scheme, "linear" or "moe").
KNOWN: frozenset[tuple[str, str]] = frozenset(
    {
        (scheme, "linear")
        for scheme in ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")
    }
    | {("W8A8_DYNAMIC", "moe"), ("W4A8_DYNAMIC", "moe")}
)


#: Registered in some releases, and not computed as stored: vllm-ascend 0.23 leaves the activations of
#: W4A8 Linear layers in the model's dtype, and drops their bias.
NOT_AS_SAID: frozenset[tuple[str, str]] = frozenset({("W4A8_DYNAMIC", "linear")})


def _registry() -> Callable[[str, str], Any]:
    """vllm-ascend's lookup: (scheme, layer type) -> its class or None."""
    lookup = host.attribute("vllm_ascend.quantization.methods.registry", "get_scheme_class")
    return lookup or (lambda scheme, layer: (scheme, layer) in KNOWN or None)


def unserved(schemes: Iterable[tuple[str, str]]) -> str:
    """The (scheme, "linear" or "moe") pairs that vllm-ascend has no class for, in words; empty if it has all."""
    lookup = _registry()
    missing = sorted(pair for pair in set(schemes) if pair in NOT_AS_SAID or not lookup(*pair))
    return ", ".join(f"{scheme} for {layer} layers" for scheme, layer in missing)


def serves_compressed_tensors(config: Mapping[str, Any]) -> bool:
    """Whether vllm-ascend's compressed-tensors class takes every group of a config.

    It takes symmetric int8 weights per channel with symmetric int8 activations, per tensor and static or per token and
    dynamic, on Linear layers.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or config.get("kv_cache_scheme") or config.get("transform_config"):
        return False
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        inputs = group.get("input_activations") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping):
            return False
        weight_ok = (weights.get("num_bits"), weights.get("type"), weights.get("strategy")) == (8, "int", "channel")
        shape = (inputs.get("strategy"), bool(inputs.get("dynamic")))
        input_ok = (inputs.get("num_bits"), inputs.get("type")) == (8, "int") and shape in (
            ("token", True),
            ("tensor", False),
        )
        if not (weight_ok and input_ok and weights.get("symmetric", True) and inputs.get("symmetric", True)):
            return False
    return True
