# SPDX-License-Identifier: Apache-2.0
"""Tensors that say they are on an NPU and hold their numbers on the CPU.

``prepare`` reads numbers (are all zero points 0? does float16 hold the scales?), which fake tensors do not have. Under
``PretendNpu`` its operators run on the CPU, and a tensor on the wrong device is refused as the NPU would refuse it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("npu:0")

#: Operators that take tensors of two devices: they copy.
_COPIES = {"aten::copy_", "aten::_to_copy"}


class NpuTensor(torch.Tensor):
    """Reports the device npu:0; ``host`` has the numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> NpuTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NpuTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: NpuTensor works under PretendNpu only")


class WrongDevice(RuntimeError):
    """A tensor of the CPU and one of the NPU in one operator."""


class PretendNpu(TorchDispatchMode):
    """Runs what is asked of the NPU on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        ours = {id(leaf.host): leaf for leaf in leaves if isinstance(leaf, NpuTensor)}
        name = func._schema.name
        strangers = [leaf for leaf in leaves if not isinstance(leaf, NpuTensor) and leaf.dim() > 0]
        if ours and strangers and name not in _COPIES:
            shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in strangers)
            raise WrongDevice(f"{name}: expected all tensors on {DEVICE}, found on the CPU: {shapes}")
        wanted = kwargs.get("device")
        on_npu = bool(ours) if wanted is None else torch.device(wanted).type == DEVICE.type
        if name == "aten::copy_":
            on_npu = isinstance(args[0], NpuTensor)
        if wanted is not None and torch.device(wanted).type == DEVICE.type:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(NpuTensor, lambda leaf: leaf.host, (args, kwargs))
        result = func(*args, **kwargs)
        if not on_npu:
            return result
        # An operator in place returns the tensor that it was given.
        return tree_map_only(torch.Tensor, lambda host: ours[id(host)] if id(host) in ours else NpuTensor(host), result)


def to_npu(host: torch.Tensor) -> NpuTensor:
    return NpuTensor(host)
