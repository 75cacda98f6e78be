# SPDX-License-Identifier: Apache-2.0
"""Values that no producer writes: rules about scales, integers, zero points, static activations, folded biases and floats.

A rule looks at one layer's ``StoredNumbers`` or at the floats of the checkpoint, whatever the layout. What breaks one is
reported once, with the first layer, the worst number and the count of layers. Nearly all are warnings: the numbers can be
computed with, and are not those of a model that was quantized.

The limits are far from what was measured on 67 checkpoints of six producers and on a trained model of 135 M parameters;
each rule says what that was. Not to be seen without the float model: layers or scales of equal shape in each other's place,
AWQ's integers and zero points packed in another order together, a scale of the wrong sign where half of them are negative,
too large an input scale of o_proj or down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from vllm_npu_quant.checkpoint import Checkpoint, TensorInfo
from vllm_npu_quant.errors import Finding, Severity
from vllm_npu_quant.formats.described import LayerEntry
from vllm_npu_quant.formats.resolve import FUSED_FAMILIES
from vllm_npu_quant.inspection.stored_numbers import StoredNumbers
from vllm_npu_quant.spec import Granularity, NumberKind

__all__ = ["LAYER_RULES", "Problem", "ValueRules"]

#: Elements of a float tensor that are looked at.
SAMPLE = 1 << 18
#: Projections whose input is what the decoder block's norms give.
_AFTER_NORM = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})

#: Schemes of weights that were made sparse.
_SPARSE = frozenset({"W8A8S"})

_REEXPORT = "download the file again, or re-export the checkpoint"
_DTYPE = "re-export the checkpoint; the header's dtype has to be the one that the values were written in"


@dataclass(frozen=True)
class Problem:
    """The result of a rule that is broken in one layer.

    Attributes:
        message: what the tensor holds; the same for all layers. expected, found: of this layer.
        fix: what to do. size: how bad it is, to pick the worst layer.
        code, severity: of the finding.
    """

    message: str
    expected: str
    found: str
    fix: str = _REEXPORT
    size: float = 0.0
    code: str = "unlikely-value"
    severity: Severity = Severity.WARNING


# ------------------------------------------------------------------------------------------------------------------ scales


def negative_scales(numbers: StoredNumbers) -> Problem | None:
    """Signed scales are of producers that give each group's largest weight the lowest integer, and the scale its sign: 43 to
    57 % are negative there. Elsewhere none is."""
    scale = numbers.scale
    if scale is None:
        return None
    share = float(np.mean(scale < 0))
    weight = numbers.entry.spec.weight
    signed = weight is not None and weight.kind is NumberKind.INT and weight.symmetric and 0.25 <= share <= 0.75
    if share == 0 or signed:
        return None
    count = int(np.count_nonzero(scale < 0))
    return Problem(
        "negative scales: the sign of what they belong to is turned",
        "positive scales, or both signs about equally often",
        f"{count:,} of {scale.size:,} are negative",
        size=share,
    )


def outlying_scale(numbers: StoredNumbers) -> Problem | None:
    """Seen: the largest scale is 16 times the 90th percentile, and weights up to 11."""
    scale = _magnitudes(numbers.scale)
    if scale is None:
        return None
    usual, largest = float(np.quantile(scale, 0.9)), float(scale.max())
    if largest <= 1e4 * usual or largest * _reach(numbers) <= 64:
        return None
    return Problem(
        "a scale far from all others of the layer",
        "scales of one order of magnitude",
        f"{largest:.3g}, where nine of ten are at most {usual:.3g}",
        size=largest / usual,
    )


def scale_level(numbers: StoredNumbers) -> Problem | None:
    """Seen: the median group's largest weight is 0.1 to 1.7. A float16 that is read as bfloat16 is below 1e-12 there, and a
    bfloat16 that is read as float16 about 1."""
    scale = _magnitudes(numbers.scale)
    if scale is None:
        return None
    level = float(np.median(scale)) * _reach(numbers)
    if 1e-12 <= level <= 64:
        return None
    return Problem(
        "scales of a size that no model's weights have: the bytes may be those of another float format",
        "weights between 1e-12 and 64 for the median scale",
        f"{level:.3g}",
        _DTYPE,
        size=abs(np.log2(level)) if level else 0.0,
    )


def _magnitudes(scale: np.ndarray | None) -> np.ndarray | None:
    """The finite magnitudes other than 0; None if there are none."""
    if scale is None:
        return None
    magnitudes = np.abs(scale[np.isfinite(scale) & (scale != 0)]).astype(np.float64)
    return magnitudes if magnitudes.size else None


def _reach(numbers: StoredNumbers) -> float:
    """The largest magnitude that is multiplied by a scale."""
    weight = numbers.entry.spec.weight
    if weight is None or weight.kind is not NumberKind.INT:
        return 448.0
    return 2.0 ** (weight.bits - 1)


# ---------------------------------------------------------------------------------------------------------------- integers


def one_integer(numbers: StoredNumbers) -> Problem | None:
    integers = numbers.integers
    if integers is None or np.count_nonzero(integers.counts) > 1:
        return None
    value = int(integers.values[np.argmax(integers.counts)])
    return Problem(
        "one integer everywhere",
        "different integers",
        f"{value} in all {integers.counts.sum():,} places",
        "check that this weight is constant in the float model, too; otherwise " + _REEXPORT,
    )


def unused_range(numbers: StoredNumbers) -> Problem | None:
    """Seen: the largest integer of each output is at least 0.99 of what the bits hold, as scales are made from it. Weights
    made sparse use 0.1 of 8 bits, on purpose."""
    integers, weight = numbers.integers, numbers.entry.spec.weight
    if integers is None or weight is None or weight.bits < 3 or np.count_nonzero(integers.counts) <= 1:
        return None
    if numbers.entry.spec.scheme in _SPARSE:
        return None
    whole = weight.granularity is Granularity.TENSOR
    used = int(integers.largest.max() if whole else np.median(integers.largest))
    top = (1 << (weight.bits - 1)) - 1
    if used >= top / 2:
        return None
    return Problem(
        f"integers that use a part of their {weight.bits} bits only",
        f"magnitudes up to {top}",
        f"up to {used}" + ("" if whole else " in half of the outputs"),
        "check the number of bits, and re-export the checkpoint",
        size=top / max(used, 1),
    )


def wrapped_around(numbers: StoredNumbers) -> Problem | None:
    """Integers with their sign bit turned have their most frequent values, those around 0, at both ends. Seen: 29 to 79 % lie
    in the inner quarter of the range, and 17 % at most in the outer one."""
    integers = numbers.integers
    if integers is None or integers.bits < 4 or np.count_nonzero(integers.counts) < integers.counts.size // 4:
        return None
    half = integers.counts.size // 2
    outer, inner = integers.share(0.75 * half, half), integers.share(0, half / 4 - 1)
    if outer <= 0.5 or inner >= 0.1:
        return None
    return Problem(
        "integers that are large nearly everywhere, as if their sign bit were turned",
        "most integers around 0",
        f"{outer:.0%} in the outer quarter of the range, {inner:.0%} in the inner one",
        f"re-export the checkpoint: unsigned integers that count from {half} were stored as signed ones, or the reverse",
        size=outer,
    )


# ------------------------------------------------------------------------------------------------------------- zero points


def zeros_in_symmetric(numbers: StoredNumbers) -> Problem | None:
    """The engine refuses them, too."""
    if not numbers.symmetric or not numbers.packed_zeros or numbers.zero is None or not numbers.zero.any():
        return None
    low, high = float(numbers.zero.min()), float(numbers.zero.max())
    fix = "say in the quantization config that the weights are asymmetric, if they are, or re-export the checkpoint"
    if low == high and abs(low) == 1:
        fix = 'change "checkpoint_format" between "gptq" and "gptq_v2": the zero points are off by one everywhere'
    return Problem(
        "zero points, and the config says that the weights are symmetric",
        "the middle of the range everywhere",
        f"{low:+g} to {high:+g} from the middle",
        fix,
        code="bad-value",
        severity=Severity.ERROR,
    )


def zeros_at_the_edge(numbers: StoredNumbers) -> Problem | None:
    """Seen: no zero point at an end of the range; of 4 bits, all are within 7 of the middle."""
    zero, weight = numbers.zero, numbers.entry.spec.weight
    if zero is None or weight is None or weight.kind is not NumberKind.INT:
        return None
    half = 1 << (weight.bits - 1)
    share = float(np.mean((zero <= -half) | (zero >= half - 1)))
    if share <= 0.5:
        return None
    return Problem(
        "zero points at an end of the integers' range",
        "zero points inside the range, as weights have both signs",
        f"{share:.0%} of {zero.size:,} are {-half} or {half - 1} from the middle, or beyond",
        size=share,
    )


def weights_off_centre(numbers: StoredNumbers) -> Problem | None:
    """Seen: the mean of a layer's integers is at most 0.08 of their deviation from the zero points' mean."""
    integers = numbers.integers
    if integers is None or not integers.deviation:
        return None
    shift = _shift(numbers)
    if not abs(shift) > integers.deviation:
        return None
    return Problem(
        "integers that lie on one side of their zero points",
        "a mean near the zero points'",
        f"{shift:+.2f} steps away, and they deviate by {integers.deviation:.2f}",
        size=abs(shift) / integers.deviation,
    )


def _shift(numbers: StoredNumbers) -> float:
    """Mean of ``q - zero``, in steps."""
    if numbers.integers is None:
        return 0.0
    return numbers.integers.mean - (0.0 if numbers.zero is None else float(np.mean(numbers.zero)))


# ------------------------------------------------------------------------------------------------- static activations, bias


def static_scale(numbers: StoredNumbers) -> Problem | None:
    """The engine refuses it, too."""
    scale = _static(numbers, "input_scale")
    if scale is None or not numbers.computes_static or (np.isfinite(scale).all() and (scale > 0).all()):
        return None
    return Problem(
        "a static input scale that is not positive",
        "a positive number",
        f"{scale.reshape(-1)[0]:.4g}",
        code="bad-value",
        severity=Severity.ERROR,
    )


def static_offset(numbers: StoredNumbers) -> Problem | None:
    offset = _static(numbers, "input_offset")
    if offset is None or bool(((offset >= -128) & (offset <= 127) & (offset == np.rint(offset))).all()):
        return None
    return Problem(
        "a static input offset that no int8 holds",
        "an integer from -128 to 127",
        f"{offset.reshape(-1)[0]:.6g}",
        code="bad-value",
        severity=Severity.ERROR,
    )


def product_of_scales(numbers: StoredNumbers) -> Problem | None:
    """Seen: equal to 0.4 %, as one of them is stored in bfloat16."""
    scale, weight, product = (numbers.floats(name) for name in ("input_scale", "weight_scale", "deq_scale"))
    if scale is None or weight is None or product is None or weight.size != product.size or scale.size != 1:
        return None
    wanted = weight.reshape(-1).astype(np.float64) * float(scale.reshape(-1)[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        wrong = np.abs(product.reshape(-1) / wanted - 1) > 0.05
    wrong &= wanted != 0
    if not wrong.any():
        return None
    first = int(np.argmax(wrong))
    return Problem(
        "deq_scale is not input_scale times weight_scale",
        f"{wanted[first]:.4g}",
        f"{product.reshape(-1)[first]:.4g} in row {first}; {int(wrong.sum()):,} of {wrong.size:,} rows differ",
        size=float(wrong.mean()),
    )


def folded_bias(numbers: StoredNumbers) -> Problem | None:
    """``quant_bias = round(bias / deq_scale) - input_offset * sum_k q``. Seen: equal to half a unit.

    A bias that is folded in and not stored beside it has nothing to do with the second term: what is left without that
    term is not correlated with it.
    """
    stored, offset = numbers.stored("quant_bias"), _static(numbers, "input_offset")
    scale, integers = numbers.floats("deq_scale"), numbers.integers
    sums = None if integers is None else integers.sums
    if stored is None or offset is None or scale is None or sums is None or not stored.size == sums.size == scale.size:
        return None
    correction = -float(offset.reshape(-1)[0]) * sums
    bias = numbers.floats("bias")
    constant = np.zeros(sums.size)
    if bias is not None and bias.size == sums.size:
        with np.errstate(divide="ignore", invalid="ignore"):
            constant = np.nan_to_num(bias.astype(np.float64) / scale)
    rest = stored.astype(np.float64) - correction - constant
    wrong = np.abs(rest) > 2 + 1e-5 * np.abs(correction) + 0.01 * np.abs(constant)
    share = float(wrong.mean())
    if share == 0 or (bias is None and share > 0.5 and abs(_correlation(rest, correction)) < 0.5):
        return None
    first = int(np.argmax(wrong))
    return Problem(
        "quant_bias is not what the integers, input_offset and the stored bias give",
        f"{correction[first] + constant[first]:.0f}",
        f"{int(stored[first])} in row {first}; {int(wrong.sum()):,} of {wrong.size:,} rows differ",
        size=share,
    )


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = float(x @ x) * float(y @ y)
    return float(x @ y) / size**0.5 if size else 0.0


def _static(numbers: StoredNumbers, name: str) -> np.ndarray | None:
    values = numbers.floats(name)
    if values is None:
        stored = numbers.stored(name)
        values = None if stored is None else stored.astype(np.float32)
    return values


#: The rules about one layer.
LAYER_RULES: tuple[Callable[[StoredNumbers], Problem | None], ...] = (
    negative_scales,
    outlying_scale,
    scale_level,
    one_integer,
    unused_range,
    wrapped_around,
    zeros_in_symmetric,
    zeros_at_the_edge,
    weights_off_centre,
    static_scale,
    static_offset,
    product_of_scales,
    folded_bias,
)


# --------------------------------------------------------------------------------------------------- all layers together


@dataclass
class _Norm:
    """A summary of a norm's weight; ``positive`` and ``near_two`` are the shares of values above 0 and in [1.5, 2)."""

    info: TensorInfo
    largest: float
    median: float
    positive: float
    near_two: float


@dataclass
class ValueRules:
    """Applies the rules to one layer after the other, and then to all of them together.

    Attributes:
        source: the file that describes the quantization.
    """

    source: str
    _found: dict[str, list[tuple[str, str, Problem]]] = field(default_factory=dict)
    _shifts: dict[str, tuple[float, str]] = field(default_factory=dict)
    _norms: dict[str, _Norm] = field(default_factory=dict)
    _inputs: dict[str, tuple[float, float, int, str]] = field(default_factory=dict)

    def layer(self, checkpoint: Checkpoint, layer: str, entry: LayerEntry) -> None:
        """Look at a quantized layer."""
        numbers = StoredNumbers(checkpoint, layer, entry)
        for rule in LAYER_RULES:
            problem = rule(numbers)
            if problem is not None:
                self._add(layer, numbers.file, problem)
        weight = entry.spec.weight
        if weight is not None and weight.bits <= 4 and numbers.zero is not None and not numbers.symmetric:
            self._shifts[layer] = _shift(numbers), numbers.file
        scale = _static(numbers, "input_scale")
        if scale is not None and numbers.computes_static and numbers.integers is not None:
            offset = _static(numbers, "input_offset")
            self._inputs[layer] = (
                float(scale.reshape(-1)[0]),
                0.0 if offset is None else float(offset.reshape(-1)[0]),
                numbers.inputs,
                numbers.file,
            )

    def floats(self, checkpoint: Checkpoint, tensor: TensorInfo) -> None:
        """Look at a float tensor of no quantized layer."""
        parent, _, last = tensor.name.rpartition(".")
        norm = "norm" in parent.rpartition(".")[2] and len(tensor.shape) == 1
        if last not in ("weight", "bias") or not (norm or len(tensor.shape) == 2):
            return
        values = _sample(checkpoint, tensor)
        largest = float(np.abs(values).max(initial=0.0))
        if largest > 1e6:
            problem = Problem(
                f"{last} holds numbers larger than any model's", "at most 1e6", f"{largest:.3g}", size=largest
            )
            self._add(parent, tensor.file, problem)
        if norm and last == "weight" and values.size:
            near_two = float(np.mean((values >= 1.5) & (values < 2)))
            positive = float(np.mean(values > 0))
            self._norms[parent] = _Norm(tensor, largest, float(np.median(values)), positive, near_two)
        elif last == "weight" and (unlikely := _exponents(values, tensor.dtype)) is not None:
            self._add(parent, tensor.file, unlikely)

    def findings(self) -> Iterator[Finding]:
        """One finding for each thing that was found, with the number of layers."""
        self._off_by_one()
        self._norm_bytes()
        self._too_large_inputs()
        self._fused_inputs()
        for message, places in self._found.items():
            layer, file, worst = max(places, key=lambda place: place[2].size)
            more = f" ({len(places):,} layers)" if len(places) > 1 else ""
            yield Finding(
                worst.code,
                message + more,
                layer,
                file,
                worst.expected,
                worst.found,
                fix=worst.fix,
                severity=worst.severity,
            )

    def _add(self, layer: str, file: str, problem: Problem) -> None:
        self._found.setdefault(problem.message, []).append((layer, file, problem))

    def _off_by_one(self) -> None:
        """Seen: the median layer's weights have a mean of less than 0.01 steps of 4 bits. A single step is a third of their
        deviation, which a single layer may have, and not half of a model's."""
        if not self._shifts:
            return
        shift = float(np.median([shift for shift, _ in self._shifts.values()]))
        if not 0.7 <= abs(shift) <= 1.3:
            return
        layer = min(self._shifts, key=lambda name: abs(self._shifts[name][0] - shift))
        problem = Problem(
            "zero points that are off by one: the integers of most layers lie one step to the side",
            "a mean near the zero points'",
            f"{shift:+.2f} steps in the median of {len(self._shifts):,} layers",
            'change "checkpoint_format" between "gptq" and "gptq_v2", or re-export the checkpoint',
        )
        self._add(layer, self._shifts[layer][1], problem)

    def _norm_bytes(self) -> None:
        """Norms of 0.06 to 2 in bfloat16, read as float16, lie between 1.5 and 2; a 1 of float16, read as bfloat16, is 0.008.
        Seen of whole models: medians of 0.3 to 1.9, spread over more than a factor of two, or 1 everywhere."""
        for dtype, other in (("F16", "bfloat16"), ("BF16", "float16")):
            norms = {name: norm for name, norm in self._norms.items() if norm.info.dtype == dtype}
            if len(norms) < 4:
                continue
            if dtype == "F16":
                wrong = min(norm.near_two for norm in norms.values()) > 0.9
            else:
                wrong = max(norm.median for norm in norms.values()) < 2**-5
                wrong &= min(norm.positive for norm in norms.values()) > 0.99
            if wrong:
                name, norm = next(iter(norms.items()))
                problem = Problem(
                    f"the norms' weights have the numbers that {other} has when it is read as {dtype}",
                    f"weights around 1, in {dtype}",
                    f"a median of {norm.median:.4g} here, and the like in all {len(norms):,} norms",
                    _DTYPE,
                )
                self._add(name, norm.info.file, problem)

    def _too_large_inputs(self) -> None:
        """The output of a norm is at most sqrt(K) times its largest weight. Seen: static ranges of 0.08 to 0.32 of that."""
        largest: dict[tuple[str, int], float] = {}
        for name, norm in self._norms.items():
            place = _block_of(name), norm.info.numel
            largest[place] = max(norm.largest, largest.get(place, 0.0))
        for layer, (scale, _, inputs, file) in self._inputs.items():
            block = _block_of(layer)
            # Without it, the block's norms may come after the projections.
            if layer.rpartition(".")[2] not in _AFTER_NORM or f"{block}.input_layernorm" not in self._norms:
                continue
            if (block, inputs) not in largest:
                continue
            bound, reach = inputs**0.5 * (1 + largest[block, inputs]), 128 * scale
            if reach > 4 * bound:
                problem = Problem(
                    "a static input scale for inputs that the norm before the layer cannot give",
                    f"a scale below {bound / 128:.4g}",
                    f"{scale:.4g}",
                    size=reach / bound,
                )
                self._add(layer, file, problem)

    def _fused_inputs(self) -> None:
        """The engine refuses them, too."""
        for family, shards in FUSED_FAMILIES.items():
            first, *others = shards
            for layer, (scale, offset, _, file) in self._inputs.items():
                parent, dot, last = layer.rpartition(".")
                if last != first:
                    continue
                for other in others:
                    found = self._inputs.get(parent + dot + other)
                    if found is not None and found[:2] != (scale, offset):
                        problem = Problem(
                            "the shards of a fused layer have different static input scales or offsets",
                            f"one of each for {family}",
                            f"{scale:.6g} and {offset:g}; {found[0]:.6g} and {found[1]:g} in {other}",
                            "re-export the checkpoint; layers that read the same input are calibrated together",
                            code="fused-shards-disagree",
                            severity=Severity.ERROR,
                        )
                        self._add(layer, file, problem)


def _block_of(layer: str) -> str:
    """The decoder block of a layer ("model.layers.3"); "" if it is in none."""
    parent, dot, rest = layer.rpartition(".layers.")
    number = rest.partition(".")[0]
    return f"{parent}{dot}{number}" if dot and number.isdigit() else ""


def _sample(checkpoint: Checkpoint, tensor: TensorInfo) -> np.ndarray:
    """Up to ``SAMPLE`` finite values of a tensor, of rows that are evenly spread; of a very large one the first."""
    from vllm_npu_quant.checkpoint.values import MAX_READ, to_float32

    whole = tensor.nbytes <= MAX_READ
    stored = checkpoint.read(tensor.name) if whole else next(iter(checkpoint.blocks(tensor.name, SAMPLE)))
    step = max(stored.size // SAMPLE, 1)
    stored = stored[::step] if len(stored) >= step else stored.reshape(-1)[::step]
    shape = TensorInfo(tensor.name, tensor.dtype, stored.shape, tensor.file, 0, 0)
    values = to_float32(np.ascontiguousarray(stored), shape).reshape(-1)
    return values[np.isfinite(values)]


def _exponents(values: np.ndarray, dtype: str) -> Problem | None:
    """Seen: the binary logarithms of a matrix's magnitudes deviate by 1.5 to 1.9. Those of bfloat16 read as float16 deviate
    by 0.2, and 97 % or more lie between 0.5 and 2.5; those of float16 read as bfloat16 deviate by 13."""
    magnitudes = np.abs(values[values != 0])
    if not magnitudes.size:
        return Problem("weight holds 0 everywhere", "different numbers", "0") if values.size else None
    if values.size < 1024 or np.unique(magnitudes[:1024]).size <= 16:
        return None
    spread = float(np.log2(magnitudes).std())
    narrow = dtype == "F16" and spread < 0.5 and np.mean((magnitudes >= 0.5) & (magnitudes < 2.5)) > 0.9
    if not narrow and not (dtype == "BF16" and spread > 6):
        return None
    return Problem(
        f"weight holds magnitudes that are spread as no matrix's are, and as those of another 16-bit float read as {dtype}",
        "a deviation of 0.5 to 6 in binary orders of magnitude",
        f"{spread:.2f}",
        _DTYPE,
        size=spread,
    )
