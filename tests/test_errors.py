# SPDX-License-Identifier: Apache-2.0
"""Findings as text: nothing raw to a terminal or a log, bounded size; near names for bounded work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_npu_quant.errors import Finding, FindingLimit, NpuQuantError, Severity, nearest_names

#: Escape sequences of terminals (colours, clipboard, links), C1 controls, a bidi override, and a forged line of a log.
HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x1b]8;;http://x\x1b\\link",
    "\x9b2J",
    "\u202eabc",
    "name\nINFO 01-01 00:00:00 all is well",
    "name\r\x08\x08gone",
    "line\u2028separator",
)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("field", ["message", "layer", "file", "expected", "found", "nearest", "fix"])
def test_nothing_raw(field: str, text: str) -> None:
    fields: dict = {"message": "a message", field: (text,) if field == "nearest" else text}
    finding = Finding("bad-config", **fields)
    for shown in (finding.render(), str(NpuQuantError([finding]))):
        assert all(line.isprintable() for line in shown.split("\n")), ascii(shown)
        assert "INFO" not in [word for line in shown.splitlines() for word in line.split()[:1]]
    # One headline, and one line for a field that is set.
    assert len(finding.render().split("\n")) == (1 if field in ("message", "layer") else 2)


def test_bounded_text() -> None:
    long = "x" * 10**6
    finding = Finding("bad-config", long, long, long, long, long, (long,) * 1000, long)
    assert len(finding.render()) < 20_000
    assert max(len(text) for text in (finding.message, finding.layer, finding.found, *finding.nearest)) <= 2000


def test_printable_text_is_kept() -> None:
    finding = Finding("bad-config", "größer als 层", layer="model.layers.0")
    assert finding.render() == "error[bad-config]: model.layers.0: größer als 层"


def test_warnings_do_not_hide_errors() -> None:
    """A code that has warnings and errors: the errors are kept however many warnings came before."""
    found = FindingLimit(5)
    for number in range(20):
        found.add(Finding("bad-config", f"warning {number}", severity=Severity.WARNING))
    found.add(Finding("bad-config", "the error"))
    closed = found.close()
    assert [finding.message for finding in closed if finding.severity is Severity.ERROR] == ["the error"]
    assert closed[-1] == Finding("bad-config", "15 more findings of this kind were left out", severity=Severity.WARNING)


def test_skipped_findings_are_counted() -> None:
    found = FindingLimit(2)
    made = 0
    for _ in range(10):
        if not found.skips("bad-config"):
            made += 1
            found.add(Finding("bad-config", "a problem"))
    assert made == 2
    assert [finding.message for finding in found.close()] == ["a problem"] * 2 + [
        "8 more findings of this kind were left out"
    ]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("model.layers.1.self_attn.q_proj.weigth", "model.layers.1.self_attn.q_proj.weight"),
        ("model.layers.1.self_attn.qproj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.layer.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("W8A8_DYNMIC", "W8A8_DYNAMIC"),
        ("W4A8DYNAMIC", "W4A8_DYNAMIC"),
    ],
)
def test_nearest(name: str, near: str) -> None:
    layers = [f"model.layers.{number}.self_attn.{part}_proj.weight" for number in range(40) for part in "qkvo"]
    names = [*layers, "model.norm.weight", "lm_head.weight", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A16", "FLOAT"]
    assert nearest_names(name, names)[0] == near


def test_nothing_near() -> None:
    assert nearest_names("model.layers.1.weight", ["a", "b.c", "lm_head.bias"]) == ()


def test_search_is_bounded() -> None:
    """However many names there are, a bounded number is looked at, and few findings have a search."""
    looked = 0

    def endless() -> Iterator[str]:
        nonlocal looked
        while True:
            looked += 1
            assert looked < 10**6, "all names are looked at"
            yield f"model.{looked}.weight"

    assert nearest_names("model.7.weight", endless())[0] == "model.7.weight"
    found = FindingLimit(20)
    searches = 0
    for number in range(100):
        searches += found.wants_names("bad-config")
        severity = Severity.WARNING if number % 2 else Severity.ERROR
        found.add(Finding("bad-config", "a problem", severity=severity))
    assert searches <= 5


class _Counted(str):
    """A name that counts how many of its characters are compared one by one."""

    compared = 0

    def __iter__(self) -> Iterator[str]:
        for char in str.__str__(self):
            _Counted.compared += 1
            yield char


def test_long_names_are_not_compared_character_by_character() -> None:
    names = [_Counted("w." + "ab" * 20_000 + str(number)) for number in range(50)]
    nearest_names("w." + "ba" * 20_000, names)
    assert _Counted.compared < 10**5
