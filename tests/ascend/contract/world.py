# SPDX-License-Identifier: Apache-2.0
"""A worker process of vLLM with a released vllm-ascend, up to where it would touch the device.

The code of vLLM, vllm-ascend and torch_npu that runs here is theirs: plugin loading, platform, configs, patches, layers,
loaders, and MoE routing, dispatch, products and combine. What is not theirs:

- Tensors are on the CPU. Under torch_npu's real schemas the operators are this project's emulation, and the one operator
  of vllm-ascend's own compiled library that its all-gather dispatch calls is forwarded to torch_npu's.
- One rank: the process group is gloo's, and what asks for the device or its streams gets nothing.
- Packages of a chip vendor that are on no package index (fla_npu) are modules without contents.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = ROOT / "tests" / "fixtures"
#: The checkpoint whose config is vLLM's current one: with experts, so that every process group is there.
HOME = "msmodelslim-qwen3moe-w8a8-dynamic"


class _Absent(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"{self.__name__}.{name} needs a device")

        return absent


class _Absence:
    """Finds packages that a host without an NPU cannot have."""

    names = ("fla_npu",)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        found = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Stream:
    """Where nothing is asynchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self) -> None:
        return None

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


class World:
    """The process. One object per process.

    Attributes:
        asks_method: whether vllm-ascend's fused_experts asks a method for the products (0.30), or has its own (0.23).
    """

    def __init__(self) -> None:
        sys.meta_path.append(_Absence())
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        import torch
        import torch_npu
        from vllm.platforms import current_platform

        from vllm_npu_quant import emulation

        self.torch, self.torch_npu, self.platform = torch, torch_npu, current_platform
        names = [name for name in emulation.OPERATORS if torch._C._dispatch_has_kernel(f"npu::{name}")]
        emulation.install_kernels(names)
        self.initialized_by_plugins = torch.npu.is_initialized()
        self.config = self.engine_config(HOME, quantization="modelslim")
        self._without_device()
        self._enter(self.config)

    def _without_device(self) -> None:
        torch = self.torch
        torch.npu.current_device = lambda: 0
        torch.npu.current_stream = lambda *args: _Stream()
        torch.npu.Stream = _Stream
        torch.npu.empty_cache = torch.npu.synchronize = lambda *args: None
        torch.accelerator.empty_cache = lambda *args: None
        torch.Tensor.npu = lambda tensor, *args, **kwargs: tensor
        self._library = torch.library.Library("_C_ascend", "FRAGMENT")
        routing = str(torch.ops.npu.npu_moe_init_routing_v2.default._schema).partition("(")[2]
        self._library.define("npu_moe_init_routing_custom(" + routing)
        self._library.impl("npu_moe_init_routing_custom", torch.ops.npu.npu_moe_init_routing_v2, "CPU")

    def _enter(self, config: Any) -> None:
        import vllm_ascend.distributed.parallel_state as ascend_parallel
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm_ascend import utils
        from vllm_ascend.ascend_config import get_ascend_config
        from vllm_ascend.utils import adapt_patch, register_ascend_customop

        adapt_patch()
        self._current = set_current_vllm_config(config)
        self._current.__enter__()
        store = tempfile.mkdtemp()
        init_distributed_environment(1, 0, f"file://{store}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        ascend_parallel.init_ascend_model_parallel(config.parallel_config)
        register_ascend_customop(config)
        if hasattr(utils, "set_weight_prefetch_method"):  # 0.23: its model runner does
            utils.set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
        self.torch.set_default_dtype(self.torch.bfloat16)
        from vllm_npu_quant.ascend.moe import contract

        found = contract()
        self.asks_method = found is not None and found.asks_method

    def engine_config(self, checkpoint: str | Path, **options: Any) -> Any:
        """vLLM's config of a checkpoint, through vllm-ascend's platform."""
        from vllm.engine.arg_utils import EngineArgs

        folder = FIXTURES / checkpoint
        config = EngineArgs(str(folder), enforce_eager=True, max_model_len=64, **options).create_engine_config()
        config.device_config.device = self.torch.device("cpu")
        config.load_config.device = "cpu"
        return config

    @contextmanager
    def current(self, config: Any) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(config):
            yield

    def model(self, checkpoint: str | Path, **options: Any) -> tuple[Any, Any]:
        """(config, model), built and loaded by vLLM's loader with vllm-ascend's layers."""
        from vllm.model_executor.model_loader import get_model

        config = self.engine_config(checkpoint, **options)
        with self.current(config):
            return config, get_model(vllm_config=config)

    def experts(self, layer: Any) -> Any:
        """The module of a MoE block that has the experts' weights."""
        return getattr(layer.experts, "routed_experts", None) or layer.experts

    def forward_experts(self, experts: Any, x: Any, weights: Any, ids: Any, config: Any = None) -> Any:
        """vllm-ascend's whole MoE forward but the router's scores: prepare, dispatch, products, combine, finalize."""
        from vllm.forward_context import set_forward_context
        from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType
        from vllm_ascend.ops.fused_moe import moe_comm_method

        config = config or self.config
        logits = self.torch.zeros(x.shape[0], experts.moe_config.num_experts)
        with set_forward_context(None, config, num_tokens=x.shape[0]):
            _EXTRA_CTX.moe_comm_type = MoECommType.ALLGATHER
            _EXTRA_CTX.in_profile_run = False
            _EXTRA_CTX.num_tokens = x.shape[0]
            if self.asks_method:
                method = moe_comm_method.get_moe_comm_method(MoECommType.ALLGATHER, experts.moe_config)
                router = types.SimpleNamespace(_select_experts=lambda **_: (weights, ids))
                object.__setattr__(experts, "router", router)
            else:
                _EXTRA_CTX.flash_comm_v1_enabled = False
                method = moe_comm_method.get_moe_comm_method(MoECommType.ALLGATHER)
                experts.custom_routing_function = lambda **_: (weights, ids)
            _EXTRA_CTX.moe_comm_method = method
            return experts.forward_impl(hidden_states=x, router_logits=logits)

    def shared_experts(self, experts: Any, shared: Any, x: Any) -> Any:
        """vllm-ascend's forward of shared experts beside routed ones."""
        from vllm.forward_context import set_forward_context
        from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType

        with set_forward_context(None, self.config, num_tokens=x.shape[0]):
            _EXTRA_CTX.moe_comm_type = MoECommType.ALLGATHER
            if self.asks_method:
                from vllm_ascend.ops.fused_moe.shared_experts import AscendSharedExperts, SharedExpertMLPPath

                made = AscendSharedExperts(shared, experts.moe_config, experts.quant_type, experts.quant_method)
                assert made._select_mlp_path() is SharedExpertMLPPath.LINEAR_WRAPPER
                return made.part2(x, made.apply_activation(made.part1(x)))
            from vllm_ascend.ops.fused_moe.fused_moe import FusedMoEEvents

            experts._shared_experts = shared
            try:
                return experts._forward_shared_experts(x, FusedMoEEvents(before_routed_experts=None))
            finally:
                experts._shared_experts = None


_world: World | Exception | None = None


def world() -> World:
    """The process's only one."""
    global _world
    if _world is None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            _world = World()
        except Exception as error:  # once is enough
            _world = error
    if isinstance(_world, Exception):
        raise _world
    return _world
