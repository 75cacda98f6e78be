# SPDX-License-Identifier: Apache-2.0
"""Receiving stored tensors, for Linear layers, lm_head and experts alike.

A receiver knows which tensors a layer of the model needs and which parts of them arrived. It checks every stored tensor
against its checkpoint layer, converts it to the form of the parameter, and converts the filled parameters to canonical
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from vllm_npu_quant.engine.coverage import Box, Coverage
from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.layouts import load_object
from vllm_npu_quant.layouts.bits import take_packed
from vllm_npu_quant.layouts.canonical import CanonicalLinear
from vllm_npu_quant.layouts.modelslim import decode_int64_scale
from vllm_npu_quant.layouts.tables import (
    ANY_LENGTH,
    LAYOUTS,
    Axis,
    LayerSizes,
    Role,
    TensorSpec,
    group_size_of,
    rows_per_scale_of,
)
from vllm_npu_quant.serving.shards import RankPart
from vllm_npu_quant.spec import Granularity, LayerSpec, TransformSpec

__all__ = ["TORCH_DTYPES", "UNWITNESSED_LOADS", "Origin", "Receiver", "Rows", "load_is_checked", "refusal"]

logger = init_logger("vllm.npu_quant.stored")

#: safetensors name -> torch dtype, for the dtypes that parameters and checkpoints use.
TORCH_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    # A dtype of newer torch versions.
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

#: Load formats that fill parameters without their weight loaders.
UNWITNESSED_LOADS = frozenset({"dummy", "sharded_state"})

#: The most tensors, or parts of a parameter, that one finding names.
_NAMED = 4


def load_is_checked() -> bool:
    """Whether parameters are filled through their weight loaders, so that missing data can be noticed."""
    config = get_current_vllm_config_or_none()
    load_format = getattr(config.load_config, "load_format", "auto") if config is not None else "auto"
    return str(load_format) not in UNWITNESSED_LOADS


def refusal(code: str, message: str, expected: str = "", found: str = "", fix: str = "") -> NpuQuantError:
    """An error with one finding, whose layer ``Receiver.naming`` fills in."""
    return NpuQuantError([Finding(code, message, expected=expected, found=found, fix=fix)])


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a checkpoint layer that fill a layer of the model, where the model class reorders or divides them.

    Attributes:
        order: their numbers in the checkpoint layer, int64 on the CPU.
        whole: the number of rows of the checkpoint layer.
    """

    order: torch.Tensor
    whole: int


@dataclass(frozen=True)
class Origin:
    """The checkpoint layer that a stored tensor comes from.

    Attributes:
        name: its name in the checkpoint.
        spec: its stored spec.
        outputs: the allowed numbers of outputs over all ranks, the largest first: one, unless vLLM's loader decides whether
            ranks cut or repeat a shard.
        shard: for messages, the shard of vLLM's layer that it fills; empty if it fills all of it.
        rows: the rows that fill it, if not all in their own order.
    """

    name: str
    spec: LayerSpec
    outputs: tuple[int, ...]
    shard: str = ""
    rows: Rows | None = None


@dataclass(frozen=True)
class _Naming:
    """A context that names a layer in the errors raised inside it; their types do not change."""

    layer: str
    file: str
    what: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, NpuQuantError):
            raise NpuQuantError(
                replace(finding, layer=finding.layer or self.layer, file=finding.file or self.file)
                for finding in error.findings
            ) from error
        if isinstance(error, Exception):
            note = f"{self.layer}: {self.what}"
            if (add_note := getattr(error, "add_note", None)) is not None:
                add_note(note)
            else:  # Python 3.10
                logger.error("%s", note)


@dataclass
class Receiver:
    """The stored tensors of one layer of the model on one rank.

    Created in ``create_weights``. A layer may be loaded again: then its parameters come back, on the meta device first,
    where vLLM counts the elements that arrive.

    Attributes:
        part: this rank's part of the layer.
        tensors: parameter name -> the stored tensor that fills it.
        layer: vLLM's name of the layer. file: where the checkpoint describes it.
        coverage: name of a registered parameter -> its written parts; empty before the first tensor of a load arrives, and
            after ``drop``.
    """

    part: RankPart
    tensors: Mapping[str, TensorSpec]
    layer: str
    file: str
    coverage: dict[str, Coverage] = field(default_factory=dict)
    _created: dict[str, torch.Tensor] = field(default_factory=dict)
    _extents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _in_use: dict[str, torch.Tensor] = field(default_factory=dict)
    _counting: bool = False
    _prepared: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None

    def register(self, layer: nn.Module, name: str, param: nn.Parameter, extent: Sequence[int] | None) -> None:
        """Register a parameter that receives a stored tensor.

        Args:
            name: a key of ``tensors``.
            extent: the shape whose parts are recorded; None for a tensor that is not loaded.
        """
        if self.tensors[name].of:  # it arrives with the tensor that it is computed from
            param.weight_loader_numel = 0  # type: ignore[attr-defined]
            extent = None
        layer.register_parameter(name, param)
        self._created[name] = _on(param, torch.device("meta"))
        if extent is not None:
            self._extents[name] = tuple(extent)
        self.expect()

    def begin(self, layer: Any, name: str, param: torch.Tensor) -> None:
        """Begin to load a stored tensor into a parameter.

        Raises:
            NpuQuantError: reload-mismatch if the layer is prepared and the parameter is no longer its own.
        """
        if getattr(layer, name, None) is not param:
            _refuse_loading(param, param)
        self.expect(param.is_meta)

    def expect(self, counting: bool = False) -> None:
        """Expect the layer's tensors, unless some of them have arrived.

        Args:
            counting: whether they are counted on the meta device. They all come a second time to be loaded.
        """
        if self._counting and not counting:
            self.coverage.clear()
        self._counting = counting
        for name, extent in self._extents.items():
            self.coverage.setdefault(name, Coverage(extent))

    def naming(self, what: str, layer: str = "") -> _Naming:
        """Name the layer in errors: in findings that have no layer, and in a note on every other exception.

        Args:
            what: the failed step, for the note. layer: a more exact name than the receiver's.
        """
        return _Naming(layer or self.layer, self.file, what)

    def receive(self, tensor: TensorSpec, stored: torch.Tensor, origin: Origin) -> torch.Tensor:
        """Check a stored tensor against its layer, and convert it to the form of the parameter.

        Args:
            tensor: its expected spec.
            stored: the tensor of one checkpoint layer, of all ranks.
            origin: that checkpoint layer.

        Returns:
            The tensor with the dimensions ``tensor.as_loaded()`` of the whole checkpoint layer, or of the rows of it that
            the model takes, its groups those of this rank, in a dtype that the parameter holds exactly; an empty one of that
            shape while tensors are counted.

        Raises:
            NpuQuantError: wrong-dtype; wrong-shape; unsupported-scheme for rows that cannot be taken out of words; or from
                ``rearrange``.
        """
        dtype = _NAMES.get(stored.dtype, str(stored.dtype))
        if dtype not in tensor.dtypes:
            message = f"{tensor.name} has a dtype that {self.part.spec.scheme} does not allow"
            fix = "re-export the checkpoint"
            if self._prepared is not None:
                fix = f"send weights that are quantized as the served ones are ({self.part.spec.scheme})"
            raise refusal("wrong-dtype", message, " or ".join(tensor.dtypes), dtype, fix)
        found = tuple(stored.shape)
        allowed = origin.outputs if origin.rows is None else (origin.rows.whole,)
        candidates = [_sizes(origin.spec, outputs, self.part.sizes.all_inputs) for outputs in allowed]
        sizes = next((sizes for sizes in candidates if _fits(found, tensor.shape(sizes))), None)
        if sizes is None:
            raise _wrong_shape(tensor, candidates, found, origin)
        kept = tensor.as_loaded()
        groups = kept.axis_of(Axis.GROUP)
        group, whole = self.part.sizes.group_size, sizes
        fitted = sizes if groups is None else replace(sizes, group_size=group)
        if self._counting:
            # Only the number of elements matters, and conversions would be counted as well.
            shape = kept.shape(fitted)
            return torch.empty([found[i] if a == ANY_LENGTH else a for i, a in enumerate(shape)], device="meta")
        adapted = stored.reshape(tensor.shape(sizes)) if len(found) < len(tensor.dims) else stored
        if adapted.dtype == torch.int64 and tensor.load_dtype == "float32":
            adapted = decode_int64_scale(adapted)
        if tensor.rearrange:
            adapted = load_object(tensor.rearrange)(adapted, origin.spec, sizes.outputs)
        if groups is not None and sizes.groups != fitted.groups:
            # The last group may be shorter: its last repetitions then have no inputs.
            repeats = -(-fitted.groups // sizes.groups) if not sizes.group_size else sizes.group_size // group
            if fitted.groups <= repeats * adapted.shape[groups] < fitted.groups + repeats:
                adapted = adapted.repeat_interleave(repeats, dim=groups).narrow(groups, 0, fitted.groups)
            sizes = fitted
        if (adapted is not stored or sizes is not whole) and not _fits(tuple(adapted.shape), kept.shape(sizes)):
            raise _wrong_shape(kept, [sizes], tuple(adapted.shape), origin)
        if origin.rows is not None:
            adapted = _take_rows(kept, adapted, origin.rows)
        # A tensor may carry the id of its fused shard, which a conversion loses.
        if adapted is not stored and hasattr(stored, "shard_id"):
            adapted.shard_id = stored.shard_id  # type: ignore[attr-defined]
        return adapted

    def computed_from(self, name: str) -> list[str]:
        """The parameters whose tensors are computed from the stored tensor of another one."""
        return [other for other, tensor in self.tensors.items() if tensor.of and tensor.of == self.tensors[name].name]

    def cut(self, tensor: TensorSpec, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """This rank's part of what ``receive`` returned."""
        for axis, length in enumerate(tensor.as_loaded().shape(self.part.sizes)):
            if whole.shape[axis] > length:
                whole = whole.narrow(axis, rank * length, length)
        return whole

    def finish(self, layer: nn.Module, names_of: Callable[[str, Box], list[str]]) -> list[Finding]:
        """Report parameters that are not filled; if the load format brings no tensors, fill in placeholders.

        Args:
            layer: the module with the parameters.
            names_of: the stored tensors that should have filled a box of a parameter.
        """
        if load_is_checked():
            return self.not_filled(names_of)
        for name, tensor in self.tensors.items():
            if tensor.loaded:
                self._fill_placeholder(tensor, getattr(layer, name).data)
        return []

    def not_filled(self, names_of: Callable[[str, Box], list[str]]) -> list[Finding]:
        """One finding for each parameter that lacks data. ``names_of`` as for ``finish``."""
        findings = []
        message, fix = "a parameter received no data for a part of it", "check that the weight files are complete"
        for name, coverage in self.coverage.items():
            lacking = {box: names for box in coverage.missing() if (names := names_of(name, box))}
            boxes = [f"{name}[{', '.join(f'{start}:{stop}' for start, stop in box)}]" for box in lacking]
            expected = _first(list(dict.fromkeys(name for names in lacking.values() for name in names)))
            if boxes:
                found = f"nothing for {_first(boxes)}"
                findings.append(
                    Finding("not-filled", message, self.layer, self.file, expected=expected, found=found, fix=fix)
                )
        return findings

    def _fill_placeholder(self, tensor: TensorSpec, param: torch.Tensor) -> None:
        """Fill a parameter with numbers that every scheme allows."""
        name, weight, group = tensor.name, self.part.spec.weight, group_size_of(self.part.spec)
        if name == "qzeros" and weight is not None:
            param.fill_(1 << (weight.bits - 1))  # the zero point of unsigned symmetric integers
        elif name.endswith("g_idx") and group:
            param.copy_(torch.arange(param.shape[-1]) // group)
        elif name == "weight_shape":
            param.fill_(1 << 31)  # more than any packed weight holds
        else:
            param.fill_(1 if tensor.role is Role.SCALE else 0)

    def canonical(self, tensors: Mapping[str, torch.Tensor], served: LayerSpec) -> CanonicalLinear:
        """The canonical numbers of loaded tensors.

        Args:
            tensors: named as in the layout.
            served: the served spec: exact integers in groups are taken if its weight has groups.

        Raises:
            NpuQuantError: values that the layout's conversion refuses.
        """
        linear: CanonicalLinear = load_object(LAYOUTS[self.part.spec.layout].to_canonical)(tensors, self.part.spec)
        exact, weight = linear.weight.exact, served.weight
        grouped = weight is not None and weight.granularity is Granularity.GROUP
        return replace(linear, weight=exact) if grouped and exact is not None else linear

    def drop(self, layer: nn.Module) -> None:
        """Delete the parameters that received the checkpoint's tensors."""
        for name in self.tensors:
            delattr(layer, name)
        self.coverage.clear()

    def install(self, layer: nn.Module, prepared: Mapping[str, torch.Tensor]) -> None:
        """Register the operators' tensors; after ``restore``, write them into those that were in use.

        Raises:
            NpuQuantError: reload-mismatch if a layer that is loaded again needs other tensors than before, such as a
                permutation of its inputs: graphs hold the addresses of the old ones.
        """
        kinds = {name: (tuple(value.shape), value.dtype) for name, value in prepared.items()}
        if self._prepared not in (None, kinds):
            old, new = (
                ", ".join(f"{name} {list(shape)}" for name, (shape, _) in each.items())
                for each in (self._prepared, kinds)
            )
            message = "the weights to load need other tensors than those that this engine has prepared"
            raise refusal("reload-mismatch", message, old, new, "start a new engine with these weights")
        self._prepared = kinds
        for name, value in prepared.items():
            param = self._in_use.pop(name, None)
            if param is None:
                param = nn.Parameter(value, requires_grad=False)
                param.weight_loader = _refuse_loading  # type: ignore[attr-defined]
            else:
                param.data.copy_(value)
            layer.register_parameter(name, param)

    def restore(self, layer: nn.Module) -> None:
        """Replace the operators' tensors by empty parameters for the checkpoint's, which ``install`` reverses."""
        if self._prepared is None or self.coverage:
            return
        for name in self._prepared:
            self._in_use[name] = getattr(layer, name)
            delattr(layer, name)
        device = next(iter(self._in_use.values())).device
        for name, created in self._created.items():
            layer.register_parameter(name, _on(created, device))
        self.expect()


def _on(param: torch.Tensor, device: torch.device) -> nn.Parameter:
    """An empty parameter of the same class, shape, dtype and attributes on a device."""
    empty: Any = torch.empty_like(param.data, device=device)
    empty.__class__ = type(param)
    empty.__dict__ = dict(param.__dict__)
    return empty  # type: ignore[no-any-return]


def _refuse_loading(param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """The weight loader of a prepared tensor.

    Raises:
        NpuQuantError: reload-mismatch, always: the checkpoint's tensors have other layouts.
    """
    raise refusal(
        "reload-mismatch",
        "a tensor of a checkpoint is loaded into a layer whose weights are prepared",
        "vLLM's reload_weights, or start_weight_update before and finish_weight_update after",
        "a call of load_weights alone",
        "use one of these, or call restore_weights_for_rl_loading of each layer's quant_method first",
    )


@lru_cache(maxsize=1024)
def _sizes(spec: LayerSpec, outputs: int, inputs: int) -> LayerSizes:
    """The sizes of a whole checkpoint layer."""
    rows = rows_per_scale_of(spec, outputs)
    return LayerSizes(outputs, inputs, group_size_of(spec), 1, rows, transform=spec.transform or TransformSpec())


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stored shape is the expected one. Producers omit trailing dimensions of length 1 of a scale."""
    missing = (1,) * (len(wanted) - len(stored))
    return len(stored) <= len(wanted) and all(
        a in (b, ANY_LENGTH) for a, b in zip(wanted, stored + missing, strict=True)
    )


def _take_rows(tensor: TensorSpec, whole: torch.Tensor, rows: Rows) -> torch.Tensor:
    """These rows of a loaded tensor, in this order. What has no rows stays as it is.

    Raises:
        NpuQuantError: unsupported-scheme if rows are packed, and it is not known how.
    """
    axis = tensor.axis_of(Axis.OUT)
    if axis is None:
        return whole
    dim, order = tensor.dims[axis], rows.order.to(whole.device)
    if dim.pack == 1:
        return whole.index_select(axis, order)
    if not dim.places or dim.words > 1 or len(order) % dim.pack:
        message = f"the model class reorders this layer's rows, of which {tensor.name} packs {dim.pack} into a word"
        raise refusal("unsupported-scheme", message, fix="export this layer as float")
    return take_packed(whole, axis, order, dim.places)


def _wrong_shape(tensor: TensorSpec, sizes: list[LayerSizes], found: tuple[int, ...], origin: Origin) -> NpuQuantError:
    shapes = dict.fromkeys(str(list(tensor.shape(each))) for each in sizes)
    return refusal(
        "wrong-shape",
        f"{tensor.name} does not fit the layer",
        f"{origin.name}.{tensor.name} {tensor.shape_text()} = {' or '.join(shapes)}",
        str(list(found)) + (f" for shard {origin.shard}" if origin.shard else ""),
        "check that config.json and the weights are of the same model",
    )


def _first(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
