# SPDX-License-Identifier: Apache-2.0
"""The internals of vLLM, vllm-ascend, torch and Python that this package replaces, adds to or reads, in one table.

They are not documented interfaces, so any release may change them. ``check`` refuses to register the plugin if one of vLLM's
is gone, before anything is installed; tests/engine/test_patches.py checks every entry. vLLM is imported only to resolve a
target.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any

from vllm_npu_quant.errors import Finding, raise_findings

__all__ = [
    "CREATE_MODEL_CONFIG",
    "FINISH_RELOAD",
    "INTERNALS",
    "LOAD_MODEL",
    "RELOAD_WEIGHTS",
    "START_RELOAD",
    "Internal",
    "Kind",
    "check",
    "problem",
    "wrap",
]

#: Attribute that marks our wrappers.
MARK = "_npu_quant"

CREATE_MODEL_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_model_config"
LOAD_MODEL = "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model"
#: Reloading weights: GPUModelRunner's entrance, and the start and finish of every reload.
RELOAD_WEIGHTS = "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights"
_LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"
START_RELOAD = f"{_LAYERWISE}:initialize_layerwise_reload"
FINISH_RELOAD = f"{_LAYERWISE}:finalize_layerwise_processing"
_LOADER = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader"
_EXPERTS = "vllm.model_executor.layers.fused_moe:RoutedExperts"

#: The releases of vLLM whose source has an entry as it is described here.
_VLLM = "vLLM 0.23, 0.30 to 0.33"
_TORCH = "torch 2.13"


class Kind(str, Enum):
    """Kinds of use of an internal."""

    #: Replaced by a function that calls it (``wrap``).
    WRAPS = "wraps"
    #: A table to which entries are added.
    EXTENDS = "extends"
    #: Called or read.
    USES = "uses"


@dataclass(frozen=True)
class Internal:
    """One internal.

    Attributes:
        target: "module:qualname".
        kind: how it is used.
        by: the module or package below vllm_npu_quant that does it, and the function for wrappers and additions.
        why: its purpose.
        seen: the releases that have it.
        parameters: the leading parameters that are relied on, with ``self``.
        attributes: instance attributes of the target, or of the class that holds it, that are read or set.
    """

    target: str
    kind: Kind
    by: str
    why: str
    seen: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether the plugin stays off without it: true of vLLM's internals. The others are looked up when they are used."""
        return self.target.startswith("vllm.")


INTERNALS = (
    Internal(
        CREATE_MODEL_CONFIG,
        Kind.WRAPS,
        "engine.registration:with_detection",
        "finds ModelSlim descriptions and AutoGPTQ or AutoAWQ configs, which vLLM does not look for beside config.json",
        _VLLM,
        ("self",),
        ("model", "revision", "quantization"),
    ),
    Internal(
        LOAD_MODEL,
        Kind.WRAPS,
        "engine.loading:with_check",
        "checks what a loader filled before the layers are prepared; builds the emulation's kernels before loading",
        _VLLM,
        ("self", "vllm_config"),
    ),
    Internal(
        RELOAD_WEIGHTS,
        Kind.WRAPS,
        "engine.reloading:with_source_check",
        "compares a checkpoint that is loaded into a running engine with the served one",
        _VLLM,
        ("self", "weights_iterator", "weights_path"),
        ("vllm_config",),
    ),
    Internal(
        START_RELOAD,
        Kind.WRAPS,
        "engine.reloading:with_start",
        "saves the tensors in use, which a reload that fails puts back",
        _VLLM,
        ("model",),
    ),
    Internal(
        FINISH_RELOAD,
        Kind.WRAPS,
        "engine.reloading:with_finish",
        "checks that every quantized layer got its tensors",
        _VLLM,
        ("model", "model_config"),
    ),
    Internal(
        f"{_LAYERWISE}:record_metadata_for_reloading",
        Kind.USES,
        "engine.loading",
        "notes the parameters of a model that can be loaded again, after layers have got others",
        _VLLM,
        ("model",),
    ),
    Internal(
        f"{_LAYERWISE}:get_layerwise_info",
        Kind.USES,
        "engine.reloading",
        "tells which layers of a reload have got tensors, and ends the reload of a layer",
        _VLLM,
        ("layer",),
    ),
    Internal(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights",
        Kind.USES,
        "engine.routers",
        "is where load_model has built a model and read no weight; replaced on a loader object while it loads",
        _VLLM,
        ("self", "model"),
    ),
    Internal(
        "vllm.envs:environment_variables",
        Kind.EXTENDS,
        "engine.environment:declare_settings",
        "makes the plugin's variables known to vLLM, and part of the key of its compiled graphs",
        _VLLM,
    ),
    Internal(
        "vllm.model_executor.custom_op:op_registry_oot",
        Kind.USES,
        "engine.norm",
        "tells whether another package replaced RMSNorm, before CustomOp.register_oot asserts that none did",
        _VLLM,
    ),
    Internal(
        f"{_LOADER}.track_weights_loading",
        Kind.USES,
        "engine.platforms",
        "is vLLM's own check of loaded weights, which the plugin's check replaces on a loader object",
        _VLLM,
        ("self", "model", "loaded_weights"),
    ),
    Internal(
        _LOADER,
        Kind.USES,
        "engine.platforms",
        "tells whether the user switched vLLM's check on or off",
        _VLLM,
        attributes=("enable_weights_track",),
    ),
    Internal(
        "vllm.model_executor.models.utils:WeightsMapper._map_name",
        Kind.USES,
        "engine.config",
        "maps one tensor name of the checkpoint to the model's",
        f"{_VLLM}; an alias of the public map_name since 0.31",
        ("self", "key"),
    ),
    Internal(
        f"{_EXPERTS}._map_global_expert_id_to_local_expert_id",
        Kind.USES,
        "engine.moe",
        "tells which experts of the checkpoint this rank has",
        f"{_VLLM}; RoutedExperts is FusedMoE before 0.27",
        ("self", "expert_id"),
    ),
    Internal(
        _EXPERTS,
        Kind.USES,
        "engine.moe",
        "holds the slot of each expert on this rank, -1 for the others",
        f"{_VLLM}; RoutedExperts is FusedMoE before 0.27",
        attributes=("_expert_map",),
    ),
    Internal(
        f"{_EXPERTS}._replace_quant_method",
        Kind.USES,
        "engine.awaited",
        "gives experts their method when the model is built",
        f"{_VLLM}; RoutedExperts is FusedMoE before 0.27, which keeps the first one as base_quant_method",
        ("self",),
    ),
    Internal(
        "vllm.model_executor.layers.linear:LinearBase.update_param_tp_status",
        Kind.USES,
        "engine.awaited",
        "gives parameters that are made when the model is built the layer's rank",
        _VLLM,
        ("self",),
    ),
    Internal(
        "torch.utils._python_dispatch:TorchDispatchMode",
        Kind.USES,
        "engine.coverage",
        "sees every write to a parameter while a loader runs",
        _TORCH,
    ),
    Internal(
        "torch.nn:Module",
        Kind.USES,
        "engine.reloading",
        "tells which buffers of a module are no part of its state",
        _TORCH,
        attributes=("_non_persistent_buffers_set",),
    ),
    Internal(
        "torch._ops:OpOverload",
        Kind.USES,
        "engine.coverage",
        "names the operator that writes",
        _TORCH,
        attributes=("_schema",),
    ),
    Internal(
        "torch.library:Library._destroy",
        Kind.USES,
        "emulation",
        "takes back the Python kernel that calls.cpp replaces; torch has no public way",
        _TORCH,
        ("self",),
    ),
    Internal(
        "torch._C:_dispatch_has_kernel",
        Kind.USES,
        "emulation",
        "tells whether another package defined an operator before",
        _TORCH,
    ),
    Internal(
        "torch._C:_dispatch_has_kernel_for_dispatch_key",
        Kind.USES,
        "emulation",
        "tells whether an operator has a Meta kernel of its own",
        _TORCH,
    ),
    Internal("torch:_int_mm", Kind.USES, "emulation", "multiplies int8 matrices in int32", _TORCH),
    Internal("torch.cpu:_is_vnni_supported", Kind.USES, "emulation", "tells whether torch._int_mm is fast", _TORCH),
    Internal("torch:UntypedStorage._cdata", Kind.USES, "emulation", "identifies a weight's storage", _TORCH),
    Internal(
        "vllm_ascend.ops.fused_moe.moe_comm_method:MoECommMethod._apply_mlp",
        Kind.USES,
        "ascend.moe",
        "gives the products between dispatch and combine, if fused_experts asks no quantization method for them",
        "vllm-ascend 0.23, 0.30",
    ),
    Internal(
        "vllm_ascend.ascend_forward_context:_EXTRA_CTX",
        Kind.USES,
        "ascend.moe",
        "holds the communication method of a forward",
        "vllm-ascend 0.23, 0.30",
    ),
    Internal(
        "vllm_ascend._build_info:__device_type__",
        Kind.USES,
        "ascend.host",
        "names the chip without touching it",
        "vllm-ascend 0.23, 0.30",
    ),
)


def _resolve(target: str) -> tuple[Any, str]:
    """The object at a target and ""; or None and the missing part."""
    module, _, qualname = target.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError as error:
        return None, str(error)
    for name in filter(None, qualname.split(".")):
        holder, found = found, getattr(found, name, None)
        if found is None:
            return None, f"no {name} in {getattr(holder, '__name__', holder)}"
    return found, ""


def problem(internal: Internal) -> str:
    """The difference between the installed release and an entry; "" if there is none."""
    found, missing = _resolve(internal.target)
    if found is None:
        return missing
    if internal.kind is Kind.EXTENDS and not isinstance(found, dict):
        return f"a {type(found).__name__} instead of a dict"
    if internal.parameters:
        parameters = tuple(inspect.signature(found).parameters)
        if parameters[: len(internal.parameters)] != internal.parameters:
            return f"the parameters {', '.join(parameters)} instead of {', '.join(internal.parameters)}"
    return ""


def check() -> None:
    """Check the required internals, so that nothing is installed if one of them is gone.

    Raises:
        NpuQuantError: host-conflict, one finding for each.
    """
    raise_findings(
        Finding(
            "host-conflict",
            f"this vLLM has changed an internal that the plugin {internal.kind.value}, so the plugin stays off",
            expected=f"{internal.target} ({internal.seen}): {internal.why}",
            found=difference,
            fix="use a version of vLLM that the README lists, or a newer vllm-npu-quant",
        )
        for internal in INTERNALS
        if internal.required and (difference := problem(internal))
    )


def wrap(target: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function at a target by ``wrapper(function)``, once; repeated calls change nothing.

    vLLM's modules that have imported the function by its name get the wrapped one, too.
    """
    module, _, qualname = target.partition(":")
    place, _, name = qualname.rpartition(".")
    owner, _ = _resolve(f"{module}:{place}")
    original = getattr(owner, name)
    if getattr(original, MARK, False):
        return
    wrapped = functools.wraps(original)(wrapper(original))
    setattr(wrapped, MARK, True)
    setattr(owner, name, wrapped)
    importers = [module for module_name, module in sys.modules.items() if module_name.startswith("vllm.")]
    for importer in importers:
        if vars(importer).get(name) is original:
            setattr(importer, name, wrapped)
