# SPDX-License-Identifier: Apache-2.0
"""The stored tensors against the config: layers that are alike are compared once, and none that differs is passed over."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_npu_quant.checkpoint import TensorInfo
from vllm_npu_quant.errors import Severity
from vllm_npu_quant.formats import check, modelslim
from vllm_npu_quant.formats.described import Described

EXPERTS = 64
PARTS = (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32)))


def experts(depth: int = 2) -> dict[str, TensorInfo]:
    tensors = {}
    for layer in range(depth):
        for number in range(EXPERTS):
            for part, (outputs, inputs) in PARTS:
                name = f"model.layers.{layer}.mlp.experts.{number}.{part}"
                for suffix, dtype, shape in (
                    ("weight", "I8", (outputs, inputs)),
                    ("weight_scale", "BF16", (outputs, 1)),
                    ("weight_offset", "BF16", (outputs, 1)),
                ):
                    key = f"{name}.{suffix}"
                    tensors[key] = TensorInfo(key, dtype, shape, "model.safetensors", 0, 0)
    return tensors


def described(tensors: dict[str, TensorInfo], names: dict[str, Any] | None = None) -> Described:
    entries = dict.fromkeys(names or tensors, "W8A8_DYNAMIC")
    return modelslim.read({**entries, "version": "1.0.0"}, tensors)


def findings_of(tensors: dict[str, TensorInfo], names: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    found = described(tensors, names)
    listed = check.check_checkpoint(found, SimpleNamespace(tensors=tensors, findings=()))
    return [(f.code, f.layer) for f in (*found.findings, *listed) if f.severity is Severity.ERROR]


def test_layers_that_are_alike_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """384 expert layers in two forms: 32 x 64 and 64 x 32."""
    compared, measured = [], []
    compare, measure = check.check_layer, modelslim._with_shapes

    def counted(layer: str, *arguments: Any, **options: Any) -> Any:
        compared.append(layer)
        return compare(layer, *arguments, **options)

    def counted_shapes(entry: Any, shapes: Any, versioned: bool) -> Any:
        measured.append(shapes["weight"])
        return measure(entry, shapes, versioned)

    monkeypatch.setattr(check, "check_layer", counted)
    monkeypatch.setattr(modelslim, "_with_shapes", counted_shapes)
    assert findings_of(experts()) == []
    assert [layer.removeprefix("model.layers.0.mlp.experts.0.") for layer in compared] == ["gate_proj", "down_proj"]
    assert measured == [(32, 64), (64, 32)]


def shorter(tensor: TensorInfo) -> TensorInfo:
    return tensor._replace(shape=(tensor.shape[0] - 1, *tensor.shape[1:]))


@pytest.mark.parametrize(
    ("suffix", "change", "code"),
    [
        ("weight_scale", lambda tensor: tensor._replace(dtype="I32"), "wrong-dtype"),
        ("weight_offset", shorter, "wrong-shape"),
        ("weight_scale", shorter, "wrong-shape"),
        ("weight", lambda tensor: tensor._replace(shape=(32,)), "wrong-shape"),
        ("weight_offset", None, "missing-tensor"),
        ("weight", None, "missing-tensor"),
    ],
)
@pytest.mark.parametrize("number", [0, 17, EXPERTS - 1])
def test_the_one_that_differs_is_found(suffix: str, change: Callable | None, code: str, number: int) -> None:
    tensors = experts()
    names = dict(tensors)
    layer = f"model.layers.1.mlp.experts.{number}.up_proj"
    old = tensors.pop(f"{layer}.{suffix}")
    if change is not None:
        tensors[old.name] = change(old)
    assert findings_of(tensors, names) == [(code, layer)]


def test_as_many_findings_as_there_are_layers_with_one_fault() -> None:
    """A faulty form is reported for every layer that has it."""
    tensors = experts(1)
    for name, tensor in tensors.items():
        if name.endswith("up_proj.weight_offset"):
            tensors[name] = shorter(tensor)
    codes = [code for code, _ in findings_of(tensors)]
    assert codes == ["wrong-shape"] * 21  # 20 in full, and the count of the others


def test_a_group_size_of_its_own_is_another_entry() -> None:
    tensors = experts(1)
    names = dict(tensors)
    layer = "model.layers.0.mlp.experts.5.down_proj"
    for suffix in ("weight_scale", "weight_offset"):
        tensors[f"{layer}.{suffix}"] = tensors[f"{layer}.{suffix}"]._replace(shape=(64, 2))
    assert findings_of(tensors, names)[0] == ("fused-shards-disagree", "model.layers.0.mlp.experts.*.down_proj")


def test_findings_of_many_layers_are_counted():
    """Layers with the same faults are compared with their layout as often as findings are kept, and counted after that."""
    entries = {f"model.layers.{number}.mlp.up_proj.weight": "W8A8_DYNAMIC" for number in range(5000)}
    found = modelslim.read({**entries, "version": "1.0.0"}, {})
    checked = []

    class Tensors(dict):
        def __contains__(self, name: object) -> bool:
            checked.append(name)
            return super().__contains__(name)

    findings = check.check_checkpoint(found, SimpleNamespace(tensors=Tensors(), findings=()))
    assert [finding.message for finding in findings if "left out" in finding.message] == [
        f"{5000 * 3 - 20} more findings of this kind were left out"
    ]
    assert len(checked) < 500
