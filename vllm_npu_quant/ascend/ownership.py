# SPDX-License-Identifier: Apache-2.0
"""Ownership of checkpoints on an Ascend host: this plugin or vllm-ascend.

What vllm-ascend serves stays with it: it has fused paths that look for its own classes, and schemes that only it computes.
A checkpoint is left to it if the installed release has a class for every scheme of the checkpoint, by the second key under
which that class is registered, and if the chip computes it; otherwise the whole checkpoint is this plugin's. Nothing here
initializes the device. docs/ascend_contract.md has the table of owners, and tests/ascend/contract asks the released packages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from vllm_npu_quant.ascend import host

__all__ = ["accepts_bare_config", "serves_compressed_tensors", "serves_fp8", "serves_modelopt", "unserved"]

#: The second key of vllm-ascend's registries.
LINEAR, MOE, ATTENTION = "linear", "moe", "attention"

#: Ends a scheme whose weights have a scale per group of inputs, where the registered class may take none.
PER_GROUP = " per group"

#: vllm-ascend 0.23's classes on A2 and A3, used if its registry cannot be queried.
KNOWN: frozenset[tuple[str, str]] = frozenset(
    {
        (scheme, LINEAR)
        for scheme in ("W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC")
    }
    | {(scheme, MOE) for scheme in ("W8A8_DYNAMIC", "W4A8_DYNAMIC", f"W4A8_DYNAMIC{PER_GROUP}")}
    | {(scheme, ATTENTION) for scheme in ("FAKQuant", "INT8_DYNAMIC", "C8")}
)

#: Registered in some releases, and not computed as stored: vllm-ascend 0.23 leaves the activations of
#: W4A8 Linear layers in the model's dtype, and drops their bias.
NOT_AS_SAID: frozenset[tuple[str, str]] = frozenset({("W4A8_DYNAMIC", LINEAR)})

_METHODS = "vllm_ascend.quantization.methods"
#: Classes for quantized KV caches, which are in no registry.
_C8 = "AscendC8KVCacheAttentionMethod"
_MXFP8_CACHE = "AscendC8MXFPKVCacheAttentionMethod"
_MAX_NAMED = 8

#: Names of the FP8 schemes in the registry: since 0.30, and before.
_FP8 = ("fp8", "FP8")

#: Schemes of compressed-tensors for experts of 4-bit integers. On A2 and A3 this package serves such files as published,
#: and vllm-ascend's tutorial has users edit their targets first, to one of its own classes.
_INT4 = ("W4A16", "W4A8_DYNAMIC")
_EXPERT_CLASSES = frozenset({"MoE", "FusedMoE", "RoutedExperts"})


def unserved(schemes: Iterable[tuple[str, str]]) -> str:
    """The (scheme, kind of layer) pairs that vllm-ascend does not serve on this chip, in words; empty if it serves all.

    Args:
        schemes: vllm-ascend's names of schemes, each with LINEAR, MOE, ATTENTION or another second key of its registry.
    """
    missing = sorted(pair for pair in set(schemes) if not _serves(*pair))
    more = f", and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
    return ", ".join(f"{scheme} for {kind} layers" for scheme, kind in missing[:_MAX_NAMED]) + more


def _serves(scheme: str, kind: str) -> bool:
    """Whether the installed vllm-ascend has a class for a scheme, and its chip computes it."""
    if (scheme, kind) in NOT_AS_SAID or not _computes(scheme):
        return False
    lookup = _registry()
    if lookup is None:
        return (scheme, kind) in KNOWN
    plain = scheme.removesuffix(PER_GROUP)
    found = lookup(plain, kind)
    if found is None:
        return kind == ATTENTION and _serves_cache(scheme)
    return plain == scheme or _takes_groups(found)


def _computes(scheme: str) -> bool:
    """Whether the chip computes a scheme, by its name: FP8 and FP4, MX or not, on Ascend 950 (A5) only.

    An unknown chip is newer than this list.
    """
    return "FP" not in scheme.upper() or host.chip() in ("a5", None)


def _registry() -> Callable[[str, str], Any] | None:
    """vllm-ascend's lookup for this chip: (scheme, kind) -> its class or None. None for a release without a registry.

    310P has a registry of its own, and the general one has nothing for it.
    """
    package = "vllm_ascend._310p.quantization.methods" if host.chip() == "310p" else _METHODS
    lookup: Callable[[str, str], Any] | None = host.attribute(f"{package}.registry", "get_scheme_class")
    return lookup


def _serves_cache(scheme: str) -> bool:
    """Whether vllm-ascend has a class for a quantized KV cache; 310P's attention has none."""
    if host.chip() == "310p":
        return False
    if scheme == "C8":
        return any(host.attribute(f"{_METHODS}.{module}", _C8) for module in ("kv_cache.kv_c8", "kv_c8"))
    return scheme in _mxfp8_cache_types() and host.attribute(f"{_METHODS}.kv_cache.mxfp_c8", _MXFP8_CACHE) is not None


def _mxfp8_cache_types() -> Collection[str]:
    """The types by which the installed vllm-ascend recognizes an MXFP8 KV cache; none before 0.30."""
    module = "vllm_ascend.quantization.configs.modelslim_config"
    by_layer = host.attribute(module, "_MXFP_C8_LAYER_QUANT_TYPES") or ()
    return {*by_layer, host.attribute(module, "_MXFP_C8_KV_CACHE_TYPE")} - {None}


def _takes_groups(scheme_class: Any) -> bool:
    """Whether a class for int4 experts takes scales per group: 0.23's combines two scales, 0.30's refuses groups."""
    combine = getattr(scheme_class, "process_scale", None)
    return combine is not None and "per_group_scale" in inspect.signature(combine).parameters


def accepts_bare_config() -> bool:
    """Whether vllm-ascend reads the description beside a config.json that names the format and nothing else.

    Before 0.30 it takes that part of config.json for the description.
    """
    theirs = host.attribute("vllm_ascend.quantization", "AscendModelSlimConfig")
    return theirs is not None and not theirs.from_config({"quant_method": "ascend"}).quant_description


def serves_compressed_tensors(config: Mapping[str, Any], kinds: Sequence[Collection[str]]) -> bool:
    """Whether vllm-ascend's compressed-tensors class takes every group of a config as it is stored.

    Args:
        config: the quantization_config.
        kinds: for every group, the kinds of layers that its targets mean (LINEAR, MOE), as far as they name any.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or config.get("kv_cache_scheme") or config.get("transform_config"):
        return False
    if host.chip() == "310p":  # where vllm-ascend means to read ModelSlim's checkpoints only
        return False
    schemes = set()
    for group, members in zip(groups.values(), kinds, strict=True):
        scheme = _compressed_tensors_scheme(group, config.get("format")) if isinstance(group, Mapping) else ""
        targets = group.get("targets") if scheme else ()
        edited = bool(targets) and _EXPERT_CLASSES.issuperset(targets)
        if not scheme or (scheme in _INT4 and not edited and host.chip() != "a5"):
            return False
        schemes |= {(scheme, kind) for kind in ((MOE,) if edited else members)}
    return not unserved(schemes)


def _compressed_tensors_scheme(group: Mapping[str, Any], default_format: Any) -> str:
    """vllm-ascend's name of a group's scheme, by the rules of its ``_detect_quant_type``; empty if it has none.

    Stricter than those where its classes compute less than they accept: they take FP8 with one static scale for int8, and
    4-bit integers in groups for symmetric ones in groups of 32.
    """
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping | None):
        return ""
    parts = [part for part in (weights, inputs) if part is not None]
    if group.get("output_activations") or any(
        part.get("actorder") or not part.get("symmetric", True) for part in parts
    ):
        return ""
    packing = str(group.get("format") or default_format)
    packing = "" if packing in ("int-quantized", "float-quantized", "naive-quantized") else packing
    scheme = _COMPRESSED_TENSORS.get((packing, *map(_numbers, parts)), "")
    return scheme if "MX" not in scheme or _reads_mx_groups() else ""


def _numbers(part: Mapping[str, Any]) -> str:
    """Bits, type, strategy, group size and mode of weights or inputs, as text: the values are untrusted."""
    group = f" {part.get('group_size')}" if part.get("strategy") == "group" else ""
    mode = " dynamic" if part.get("dynamic") else ""
    return f"{part.get('num_bits')} {part.get('type')} {part.get('strategy')}{group}{mode}"


#: (format, weights, inputs) of compressed-tensors -> vllm-ascend's scheme; "" stands for the formats of plain elements.
_COMPRESSED_TENSORS = {
    ("", "8 int channel", "8 int tensor"): "W8A8",
    ("", "8 int channel", "8 int token dynamic"): "W8A8_DYNAMIC",
    ("", "4 int channel", "8 int token dynamic"): "W4A8_DYNAMIC",
    ("", "8 float channel", "8 float token dynamic"): "W8A8FP8_DYNAMIC",
    ("pack-quantized", "4 int group 32"): "W4A16",
    ("mxfp8-quantized", "8 float group 32", "8 float group 32 dynamic"): "W8A8_MXFP8",
    ("mxfp4-pack-quantized", "4 float group 32", "4 float group 32 dynamic"): "W4A4_MXFP4",
}


def _reads_mx_groups() -> bool:
    """Whether vllm-ascend's compressed-tensors class knows MX groups: since 0.30."""
    theirs = host.attribute("vllm_ascend.quantization", "AscendCompressedTensorsConfig")
    return hasattr(theirs, "_is_dynamic_group_mx")


def serves_fp8(config: Mapping[str, Any], model: Any) -> bool:
    """Whether vllm-ascend serves a checkpoint of ``quant_method`` "fp8" in its own precision.

    On A2 and A3 it would keep the weights in bfloat16, in twice the memory; here they are served as int8.

    Args:
        config: the quantization_config.
        model: the model's configuration as vLLM has it; None if it is not known.
    """
    if config.get("quant_method") != "fp8" or not config.get("weight_block_size"):
        return False
    if config.get("activation_scheme", "dynamic") != "dynamic":
        return False
    if str(getattr(model, "model_type", "")).startswith("deepseek_v4"):
        experts = ("ds_w4a8_moe", "w4a8_moe")
        fp4 = getattr(model, "expert_dtype", "fp4") == "fp4"
        return fp4 and _serves_fp8("ds_linear") and any(map(_serves_fp8, experts))
    return _serves_fp8(LINEAR) and _serves_fp8(MOE)


def serves_modelopt(config: Mapping[str, Any]) -> bool:
    """Whether vllm-ascend serves a checkpoint of ``quant_method`` "mxfp8" or "modelopt" in its own precision: MXFP8 only.

    Args:
        config: the quantization_config.
    """
    mxfp8 = config.get("quant_method") in ("mxfp8", "modelopt_mxfp8") or config.get("quant_algo") == "MXFP8"
    theirs = host.attribute("vllm_ascend.quantization.configs.modelopt_mxfp8_config", "AscendModelOptMxFp8Config")
    return mxfp8 and theirs is not None and all(_serves("W8A8_MXFP8", kind) for kind in (LINEAR, MOE))


def _serves_fp8(kind: str) -> bool:
    return any(_serves(name, kind) for name in _FP8)
