# SPDX-License-Identifier: Apache-2.0
"""Tables of the Ascend chips: supported operators and published performance numbers, with sources.

Operators: "产品支持情况" (supported products) and the argument tables of torch_npu's documentation,
github.com/Ascend/op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-<operator>.md, in the versions of 2026. Nothing here was
measured on a chip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_npu_quant.errors import Finding, FindingLimit, Severity
from vllm_npu_quant.inspection.layers import Layer
from vllm_npu_quant.serving.dispatch import Row, rows
from vllm_npu_quant.spec import LayerKind

__all__ = ["CHIPS", "Chip", "Number", "Support", "chip_findings", "chip_of", "support"]


@dataclass(frozen=True)
class Number:
    """A published number.

    Attributes:
        value: in bytes, bytes per second or operations per second.
        source: the publication.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """An Ascend product line with its published numbers; None for numbers without a citable source.

    Attributes:
        key: name on the command line.
        name: name of the products.
        dtypes: model dtypes of its quantized operators.
        memory: memory in bytes of one device in vLLM's sense.
        bandwidth: bytes per second of that memory.
        fp16: operations per second in float16 or bfloat16.
        int8: operations per second in int8.
        remark: a note on these numbers, for users.
    """

    key: str
    name: str
    dtypes: tuple[str, ...]
    memory: Number | None = None
    bandwidth: Number | None = None
    fp16: Number | None = None
    int8: Number | None = None
    remark: str = ""


_BOTH = ("bfloat16", "float16")
_GIB, _TIB, _T = 2**30, 2**40, 1e12


def _profile(name: str, memory: float, bandwidth: float, fp16: float, int8: float) -> dict[str, Number]:
    """Numbers from a device profile of Huawei's performance simulator."""
    source = f"github.com/Ascend/msmodeling, tensor_cast/device.py, {name}"
    return {
        "memory": Number(memory, source),
        "bandwidth": Number(bandwidth, source),
        "fp16": Number(fp16, source),
        "int8": Number(int8, source),
    }


_DUO = "infogioco.it, 2025-10 (Atlas 300I Duo: 96 GB, 408 GB/s, 280 TOPS INT8), halved for one of its two chips"

#: bfloat16's peak is a few percent below float16's.
CHIPS: dict[str, Chip] = {
    "a2": Chip(
        "a2",
        "Atlas A2 (Ascend 910B)",
        _BOTH,
        **_profile("ATLAS_800_A2_313T_64G", 64 * _GIB, 1.6 * _TIB, 313 * _T, 626 * _T),
        remark="the 313 TFLOPS variant; there are others with 280 and 376, and with 32 GiB",
    ),
    "a3": Chip(
        "a3",
        "Atlas A3 (Ascend 910C)",
        _BOTH,
        **_profile("ATLAS_800_A3_752T_128G_DIE", 64 * _GIB, 1.6 * _TIB, 376 * _T, 752 * _T),
        remark="one die, which vLLM sees as one device; a card has two",
    ),
    "a5": Chip(
        "a5",
        "Ascend 950 (Atlas 350)",
        _BOTH,
        **_profile("ATLAS_350_425T_112G", 112 * _GIB, 1.4 * _TIB, 378 * _T, 756 * _T),
        remark="the Atlas 350 card; Ascend 950PR and 950DT differ in memory",
    ),
    "310p": Chip(
        "310p",
        "Atlas inference series (Ascend 310P)",
        ("float16",),
        memory=Number(48e9, _DUO),
        bandwidth=Number(204e9, _DUO),
        int8=Number(140 * _T, _DUO),
        remark="one chip of an Atlas 300I Duo card; its float16 peak was not found in a document",
    ),
}


def chip_of(device: str) -> Chip:
    """The chip with this key.

    Raises:
        ValueError: for an unknown key; the message lists the known ones.
    """
    chip = CHIPS.get(device.strip().lower())
    if chip is None:
        raise ValueError(f"there is no device {device[:40]!r}; the devices are {', '.join(CHIPS)}")
    return chip


#: Operator -> chip -> whether the operator's documentation lists the product; chips it does not mention are omitted.
OPERATORS: dict[str, dict[str, bool]] = {
    "npu_dynamic_quant": {"a2": True, "a3": True, "a5": True, "310p": False},
    "npu_dynamic_quant_asymmetric": {"a2": True, "a3": True, "310p": False},
    "npu_quantize": {"a2": True, "a3": True, "a5": True, "310p": True},
    "npu_quant_matmul": {"a2": True, "a3": True, "a5": True, "310p": True},
    "npu_weight_quant_batchmatmul": {"a2": True, "a3": True, "310p": True},
    "npu_grouped_matmul": {"a2": True, "a3": True, "a5": True, "310p": True},
    # The documentation lists the 950 only; vllm-ascend calls it on A2 and A3 (W4A4_FLATQUANT_DYNAMIC).
    "npu_kronecker_quant": {"a2": True, "a3": True, "a5": True, "310p": False},
    "npu_swiglu": {"a2": True, "a3": True, "a5": True},
}


@dataclass(frozen=True)
class Support:
    """Whether a chip supports the operators of a dispatch row.

    Attributes:
        served: None if the operators' documentation does not say.
        why: the reason if it is not True.
    """

    served: bool | None
    why: str = ""


def support(chip: Chip, row: Row) -> Support:
    """Whether a chip supports a dispatch row, by the operators' documentation."""
    unknown = []
    for operator in row.operators:
        listed = OPERATORS.get(operator, {}).get(chip.key)
        if listed is False:
            return Support(False, f"{operator} is not listed for it")
        if listed is None:
            unknown.append(operator)
    if chip.key == "310p":
        if "npu_grouped_matmul" in row.operators:
            return Support(False, "npu_grouped_matmul takes no quantized weights on it")
        if "npu_weight_quant_batchmatmul" in row.operators and min(row.weight_bits) < 8:
            return Support(False, "npu_weight_quant_batchmatmul takes int8 weights only on it")
        if "npu_quant_matmul" in row.operators and row.act_dynamic:
            return Support(False, "npu_quant_matmul takes no pertoken_scale on it")
    if unknown:
        return Support(None, f"the page of {unknown[0]} does not list it")
    return Support(True)


def chip_findings(device: str, layers: Sequence[Layer], dtype: str, source: str) -> list[Finding]:
    """Findings for the parts of a checkpoint that a chip does not support.

    Raises:
        ValueError: for an unknown device.
    """
    chip = chip_of(device)
    found = FindingLimit(8)
    quantized = [layer for layer in layers if layer.row is not None]
    if quantized and dtype == "bfloat16" and dtype not in chip.dtypes:
        found.add(
            Finding(
                "operator-limit",
                f"the quantized operators of {chip.name} take float16 only, and config.json says bfloat16",
                file="config.json",
                expected=" or ".join(chip.dtypes),
                found=dtype,
                fix="pass --dtype float16",
                severity=Severity.WARNING,
            )
        )
    for finding in _by_row(chip, quantized, source):
        found.add(finding)
    return found.close()


def _by_row(chip: Chip, layers: Iterable[Layer], source: str) -> Iterable[Finding]:
    """One finding per dispatch row that the chip does not support, or supports with a remark."""
    by_row: dict[Row, list[Layer]] = {}
    for layer in layers:
        if layer.row is not None:
            by_row.setdefault(layer.row, []).append(layer)
    for row, members in by_row.items():
        answer = support(chip, row)
        if answer.served and row.remark and not row.instead:
            yield Finding(
                "operator-limit",
                f"{chip.name}: {row.remark}",
                layer=members[0].name,
                file=source,
                found=f"{row.name} ({', '.join(row.operators)})",
                fix="compare a few answers with those of the float model before relying on it",
                severity=Severity.INFO,
            )
        if answer.served:
            continue
        kind = LayerKind(members[0].kind)
        others = [
            other.name
            for other in dict.fromkeys(rows())
            if kind in other.kinds and support(chip, other).served and other.operators
        ]
        count = sum(layer.count for layer in members)
        yield Finding(
            "unsupported-scheme" if answer.served is False else "operator-limit",
            f"{chip.name}: {answer.why}, and {count:,} layers with {row.name} need it",
            layer=members[0].name,
            file=source,
            expected="one of " + ", ".join(dict.fromkeys(others)) if others else "float layers",
            found=f"{row.name} ({', '.join(row.operators)})",
            fix="use another chip, or export these layers with another scheme"
            if answer.served is False
            else "run one layer on the chip before relying on it",
            severity=Severity.ERROR if answer.served is False else Severity.WARNING,
        )
