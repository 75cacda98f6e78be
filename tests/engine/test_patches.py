# SPDX-License-Identifier: Apache-2.0
"""The internals that the package relies on, in the installed releases."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

import vllm_npu_quant
from vllm_npu_quant.engine import patches, platforms
from vllm_npu_quant.engine.patches import INTERNALS, Internal, Kind
from vllm_npu_quant.errors import NpuQuantError

PACKAGE = Path(vllm_npu_quant.__file__).parent
#: Private names of packages that ascend/ reads with a default, so that nothing breaks without them.
READ_WITH_A_DEFAULT = {
    "_MXFP_C8_KV_CACHE_TYPE",
    "_MXFP_C8_LAYER_QUANT_TYPES",
    "_ascend_moe_lora_context",
    "_is_dynamic_group_mx",
}
#: Private names that this package gives to objects of others.
OURS = {patches.MARK}


def installed(internal: Internal) -> bool:
    """vllm-ascend's internals are looked at in its own environments: tests/ascend/contract."""
    return importlib.util.find_spec(re.split(r"[.:]", internal.target)[0]) is not None


def names(entries: tuple[Internal, ...] = INTERNALS) -> list[str]:
    return [entry.target for entry in entries]


def explain(internal: Internal, difference: str) -> str:
    return (
        f"{internal.target} ({internal.seen}) is not what vllm_npu_quant.{internal.by} {internal.kind.value}: {difference}. "
        f"It {internal.why}."
    )


HERE = tuple(filter(installed, INTERNALS))


@pytest.mark.parametrize("internal", HERE, ids=names(HERE))
def test_the_installed_release_has_it(internal: Internal) -> None:
    difference = patches.problem(internal)
    assert not difference, explain(internal, difference)


@pytest.mark.parametrize("internal", HERE, ids=names(HERE))
def test_the_class_has_the_attributes(internal: Internal) -> None:
    """Instances have them only when they are made; the class's source names them."""
    if not internal.attributes:
        return
    module, _, qualname = internal.target.partition(":")
    source = inspect.getsource(getattr(importlib.import_module(module), qualname.partition(".")[0]))
    for name in internal.attributes:
        assert re.search(rf"\b{name}\b", source), explain(internal, f"no attribute {name}")


def test_the_default_loader_leaves_its_check_to_us() -> None:
    assert platforms.default_load_check(DefaultModelLoader(LoadConfig()))
    chosen = LoadConfig(model_loader_extra_config={"enable_weights_track": True})
    assert not platforms.default_load_check(DefaultModelLoader(chosen))


def test_most_entries_are_looked_at_here() -> None:
    assert {entry.target for entry in INTERNALS} - {entry.target for entry in HERE} <= {
        entry.target for entry in INTERNALS if entry.target.startswith("vllm_ascend.")
    }
    assert len(set(names())) == len(INTERNALS)
    assert {entry.target for entry in INTERNALS if entry.kind is Kind.WRAPS} == {
        patches.CREATE_MODEL_CONFIG,
        patches.LOAD_MODEL,
        patches.RELOAD_WEIGHTS,
        patches.START_RELOAD,
        patches.FINISH_RELOAD,
    }


@pytest.mark.parametrize("internal", INTERNALS, ids=names())
def test_it_is_used_where_the_table_says(internal: Internal) -> None:
    module, _, function = internal.by.partition(":")
    place = PACKAGE.joinpath(*module.split("."))
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    text = "\n".join(path.read_text() for path in files)
    assert not function or f"def {function}(" in text
    if internal.kind is Kind.WRAPS:
        registration = (PACKAGE / "engine" / "registration.py").read_text()
        assert re.search(rf"patches\.wrap\(patches\.\w+, {function}\)", registration)
        return
    used = internal.attributes or (re.split(r"[.:]", internal.target)[-1],)
    assert all(re.search(rf"\b{name}\b", text) for name in used), f"{internal.by} does not use it any more"


def private_names(path: Path) -> Iterator[str]:
    """Private attributes of other objects than self that a module reads, calls or sets."""
    for node in ast.walk(ast.parse(path.read_text())):
        name = None
        if isinstance(node, ast.Attribute):
            inner = node.value
            own = isinstance(inner, ast.Name) and inner.id in ("self", "cls")
            name = None if own else node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "getattr",
            "hasattr",
            "setattr",
            "attribute",
        ):
            name = next((arg.value for arg in node.args if isinstance(arg, ast.Constant)), None)
        if isinstance(name, str) and re.match(r"_[a-z]", name, re.IGNORECASE):
            yield name


@pytest.mark.parametrize("part", ["engine", "ascend", "platform.py", "plugin.py", "settings.py"])
def test_no_private_name_is_missing_from_the_table(part: str) -> None:
    listed = {re.split(r"[.:]", entry.target)[-1] for entry in INTERNALS}
    listed |= {name for entry in INTERNALS for name in entry.attributes}
    place = PACKAGE / part
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        own = set(re.findall(r"(?:def|class) (_\w+)", path.read_text()))
        found = set(private_names(path)) - listed - own - READ_WITH_A_DEFAULT - OURS
        assert not found, f"{path.name} uses private names that engine/patches.py does not list: {sorted(found)}"


# -- what a canary says -----------------------------------------------------------------------------------------------


class Table:
    """A module's class with a method that patches may change."""

    rows: dict[str, int]

    def method(self, first: int, second: int) -> int:
        return first + second


HOLDER = f"{__name__}:Table"


def entry(target: str, kind: Kind = Kind.USES, **values: tuple[str, ...]) -> Internal:
    return Internal(target, kind, "engine.patches", "is needed", "this file", **values)


@pytest.mark.parametrize(
    ("internal", "difference"),
    [
        (entry(f"{HOLDER}.method", parameters=("self", "first")), ""),
        (entry("no_such_module:name"), "No module named 'no_such_module'"),
        (entry(f"{__name__}:NoSuchClass.method"), f"no NoSuchClass in {__name__}"),
        (entry(f"{HOLDER}.renamed"), "no renamed in Table"),
        (
            entry(f"{HOLDER}.method", parameters=("self", "second")),
            "the parameters self, first, second instead of self, second",
        ),
        (entry(f"{HOLDER}.method", Kind.EXTENDS), "a function instead of a dict"),
    ],
)
def test_a_difference_is_named(internal: Internal, difference: str) -> None:
    assert patches.problem(internal) == difference


def test_all_differences_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tuple(entry(f"vllm.envs:{name}") for name in ("NO_FIRST", "NO_SECOND"))
    monkeypatch.setattr(patches, "INTERNALS", (*INTERNALS, *gone))
    with pytest.raises(NpuQuantError) as caught:
        patches.check()
    assert caught.value.codes == ("host-conflict",)
    assert [finding.found for finding in caught.value.findings] == [
        "no NO_FIRST in vllm.envs",
        "no NO_SECOND in vllm.envs",
    ]
    assert all(target.target in str(caught.value) for target in gone)


def test_a_function_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "method", Table.method)
    for _ in range(2):
        patches.wrap(
            f"{HOLDER}.method", lambda method: lambda self, first, second: 10 * method(self, first, second=second)
        )
    assert Table().method(1, 2) == 30
    assert Table.method.__name__ == "method"
