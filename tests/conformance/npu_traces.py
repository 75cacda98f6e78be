# SPDX-License-Identifier: Apache-2.0
"""Traces on the device "npu" under the real torch_npu: for the process that has imported it (see real_process.py).

``prepare`` runs on tensors that say they are on an NPU and hold their numbers on the CPU, and its calls are repeated with
fake tensors; ``apply`` runs with fake tensors from end to end, so that each call passes torch_npu's own Meta kernel, and
nothing can read a number. It runs twice: with some tokens, and with a symbol for their number, on which nothing may depend.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.conformance.method_cases import TOKENS, Case, Prepared
from tests.conformance.pretend_npu import DEVICE, NpuTensor, PretendNpu, to_npu
from tests.conformance.recording import Call, Recorder, Tensor, dtype_name
from tests.conformance.traces import Trace, checked_output, input_shape

#: Operators that torch serves for all devices, by views and by calling others.
_FOR_ALL_DEVICES = ("CompositeExplicitAutograd",)


def fake(tensor: torch.Tensor | Tensor) -> torch.Tensor:
    """A fake tensor on the NPU, of the current FakeTensorMode."""
    shape = tuple(tensor.shape)
    stride = tensor.stride if isinstance(tensor, Tensor) else tensor.stride()
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=DEVICE)


def on_the_npu(case: Case) -> Trace:
    with torch.inference_mode(), PretendNpu(), Recorder() as load:
        prepared = case.prepare(to_npu)
    described = {name: Tensor.of(tensor, load.is_nz(tensor)) for name, tensor in prepared.tensors.items()}
    problems = [
        f"layer.{name} is on {tensor.device}"
        for name, tensor in prepared.tensors.items()
        if not isinstance(tensor, NpuTensor)
    ]
    problems += [problem for call in load.calls for problem in differs_from_meta(call)]
    problems += unused_memory(prepared)
    shapes = {name: (dtype, input_shape(shape, TOKENS)) for name, (dtype, shape) in prepared.inputs.items()}
    forward = Recorder()
    with torch.inference_mode(), FakeTensorMode(shape_env=_no_numbers()):
        layer = _fake_layer(described, forward)
        inputs = {name: torch.empty(shape, dtype=dtype, device=DEVICE) for name, (dtype, shape) in shapes.items()}
        with forward:
            result = prepared.apply(layer, **inputs)
    if result.device != DEVICE:
        problems.append(f"apply gives a tensor on {result.device}")
    output = Tensor.of(result)
    problems += load.problems + forward.problems + checked_output(prepared, output, TOKENS)
    problems += without_a_kernel(forward.others)
    problems += dependences(described, prepared)
    inputs_described = {name: Tensor.of(tensor) for name, tensor in inputs.items()}
    others = list(forward.others)
    return Trace(case, described, load.calls, inputs_described, forward.calls, output, others, problems)


def _no_numbers() -> ShapeEnv:
    return ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)


def _fake_layer(described: dict[str, Tensor], recorder: Recorder) -> SimpleNamespace:
    tensors = {name: fake(tensor) for name, tensor in described.items()}
    for name, tensor in tensors.items():
        if described[name].nz:
            recorder.mark_nz(tensor)
    return SimpleNamespace(**tensors)


def differs_from_meta(call: Call) -> list[str]:
    """Repeat a call that was made with numbers, with fake tensors."""
    packet, _, overload = call.operator.partition(".")
    operator = getattr(getattr(torch.ops.npu, packet), overload or "default")
    with FakeTensorMode():
        try:
            result = operator(**tree_map_only(torch.Tensor, fake, call.raw))
        except Exception as error:
            return [f"{call}: the Meta kernel: {error}"]
        found = [Tensor.of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    plain = [Tensor(tensor.dtype, tensor.shape, tensor.stride) for tensor in call.results]
    return [] if found == plain else [f"{call}: the Meta kernel gives {', '.join(map(str, found))}"]


def unused_memory(prepared: Prepared) -> list[str]:
    """Memory that prepared tensors keep and do not show: views of something larger."""
    hosts = {name: tensor.host for name, tensor in prepared.tensors.items() if isinstance(tensor, NpuTensor)}
    storages: dict[int, list[str]] = {}
    for name, host in hosts.items():
        storages.setdefault(host.untyped_storage().data_ptr(), []).append(name)
    found = []
    for names in storages.values():
        shown = sum(hosts[name].numel() * hosts[name].element_size() for name in names)
        held = hosts[names[0]].untyped_storage().nbytes()
        if held > shown:
            found.append(f"layer.{', layer.'.join(names)}: {held} bytes are kept for {shown}")
    return found


def without_a_kernel(names: list[str]) -> list[str]:
    """Operators that would run on the CPU, with copies to and fro: torch_npu falls back to it without an error."""
    found = []
    for name in names:
        keys = ("PrivateUse1", *_FOR_ALL_DEVICES)
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys):
            found.append(f"{name} has no kernel for the NPU")
    return found


class AsCompiled(TorchDispatchMode):
    """Padding as torch.compile takes it apart; torch's own kernel turns sizes into numbers, fake or not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.pad.default:  # in inference mode, what F.pad calls arrives whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func is not torch.ops.aten.constant_pad_nd.default:
            return func(*args, **(kwargs or {}))
        with self:
            return decomposition_table[func](*args, **(kwargs or {}))


def dependences(described: dict[str, Tensor], prepared: Prepared) -> list[str]:
    """What in ``apply`` depends on the number of tokens: a graph would be made anew for each number."""
    env = _no_numbers()
    source = ConstantSource("tokens")
    tokens = env.create_symintnode(
        env.create_symbol(TOKENS, source=source, dynamic_dim=DimDynamic.DYNAMIC), hint=TOKENS, source=source
    )
    with torch.inference_mode(), FakeTensorMode(shape_env=env):
        layer = _fake_layer(described, Recorder())
        inputs = {
            name: torch.empty(input_shape(shape, tokens), dtype=dtype, device=DEVICE)
            for name, (dtype, shape) in prepared.inputs.items()
        }
        with AsCompiled():
            result = prepared.apply(layer, **inputs)
    found = [f"apply depends on the number of tokens: {guard.expr}" for guard in env.guards]
    wanted = input_shape(prepared.expected[1], tokens)
    if result.dtype != prepared.expected[0] or [str(size) for size in result.shape] != [str(size) for size in wanted]:
        found.append(f"apply of {tokens} tokens gives {dtype_name(result.dtype)}{list(result.shape)}")
    return found
