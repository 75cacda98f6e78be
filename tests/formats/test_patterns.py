# SPDX-License-Identifier: Apache-2.0
"""Patterns from configs: the same answers as Python's ``re``, in a number of steps that is bounded."""

from __future__ import annotations

import pickle
import re
import string
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_npu_quant.errors import NpuQuantError, Severity
from vllm_npu_quant.formats import patterns
from vllm_npu_quant.formats.patterns import PatternSet

MODES = {"match": re.match, "search": re.search, "fullmatch": re.fullmatch}

NAMES = (
    "",
    "lm_head",
    "model.lm_head",
    "lm_head.weight",
    "model.embed_tokens",
    "model.layers.0.mlp.gate",
    "model.layers.0.mlp.gate_proj",
    "model.layers.10.mlp.gate_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.2.self_attn.o_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.3.mlp.experts.17.down_proj",
    "model.layers.3.mlp.shared_experts.down_proj",
    "model.visual.blocks.0.attn.qkv",
    "model_layers_0_mlp_gate",
    "a\n",
    "a\nb",
    "\n",
    "aaaaaaaaaaaaaaaaaaaa!",
    "Model.Layers.7.MLP.Up_proj",
    "größe_ß.Ωmega",
)

#: Patterns of real configs and recipes, and constructs that a parser might get wrong.
REAL = (
    ".*self_attn.*",
    r".*model\.layers\.0\.mlp\.gate.*",
    ".*lm_head",
    r"model\.layers\.(0|1|2)\..*",
    ".*down.*",
    r"^(?!.*(?:experts|visual)).*_proj$",
    r"(?!.*visual)(?!lm_head)model.*",
    r"(?=.*mlp)(?!.*gate$).*",
    r".*(?<!gate)_proj",
    r".*(?<!self_attn)\.[qkvo]_proj",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
    r"model.layers.([0-9]|1[0-9]).mlp.*",
    r"(?i).*MLP.*",
    r".*\bgate\b.*",
    r".*\Bgate",
    r"(?m)^b$",
    r"a$",
    r"a\Z",
    r"\Alm_head",
    r"$^",
    r"^$",
    r"[^a-f]odel\.[\w.]+",
    r"[]a-]*",
    r"(?:a?){3}a{3}",
    r"(?s)a.b",
    r"a.b",
    r"(?x) l m _ head  # comment",
    r"(?:model\.)?lm_head",
    r"lm_head|embed",
    r"(?P<layer>model)\..*",
    r"(?i:MODEL)\.layers",
    r"a*?a*?\n",
    r"(?!)",
    r"(|a)+!",
    r"\S+\.\D*",
    r"gr\w+",
    r"(?a)gr\w+\.",
    r"(){1000}(){0,1000}a",
    r"(?:a{0,3}){2,}!",
)

#: Patterns on which a backtracking matcher needs exponential or high polynomial time.
BOMBS = (
    r"(a+)+$",
    r"(.*)*x",
    r"(a|aa)+$",
    r"(a|a)*$",
    r"((a*)*)*b",
    r"(\w+\.?)+:",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r".*.*.*.*.*.*.*.*.*.*=",
    r"(?:a?){40}a{40}b",
    r"(?=(a+)+$)(?!(a+)+b$).*c",
    r"(?:(?=(a+)+!).)*c",
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", REAL)
def test_agrees_with_re(pattern, mode):
    matcher = PatternSet([pattern], mode=mode)
    assert matcher.findings == ()
    for name in NAMES:
        assert matcher.any(name) == bool(MODES[mode](pattern, name)), name


@pytest.mark.parametrize("mode", MODES)
def test_all_patterns_at_once(mode):
    matcher = PatternSet(REAL, mode=mode)
    for name in NAMES:
        wanted = tuple(i for i, pattern in enumerate(REAL) if MODES[mode](pattern, name))
        assert matcher.matches(name) == wanted
        assert matcher.first(name) == (wanted[0] if wanted else None)


_ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        "[ab]",
        "[^a]",
        "[a-c]",
        r"\w",
        r"\d",
        r"\W",
        r"[\d.]",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "\n",
    ]
)


def _combined(inner):
    suffix = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?", "??"])
    return st.one_of(
        st.tuples(inner, suffix).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map(lambda text: f"(?:{text})"),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        st.sampled_from(["a", "b.", "[ab]c"]).map(lambda text: f"(?<={text})"),
        st.sampled_from(["a", "b.", "[ab]c"]).map(lambda text: f"(?<!{text})"),
    )


_PATTERNS = st.recursive(_ATOMS, _combined, max_leaves=8)
_FLAGS = st.sampled_from(["", "", "(?i)", "(?s)", "(?m)", "(?ims)"])
# Python 3.14 changed what \B means on the empty text, which is no name.
_TEXTS = st.lists(st.text(alphabet="abcA.1_\n", min_size=1, max_size=9), min_size=1, max_size=8)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(_FLAGS, _PATTERNS).map("".join), min_size=1, max_size=3), _TEXTS, st.sampled_from(list(MODES))
)
def test_agrees_with_re_on_random_patterns(texts, names, mode):
    matcher = PatternSet(texts, mode=mode)
    assert matcher.findings == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            assert matcher.matches(name) == tuple(i for i, text in enumerate(texts) if MODES[mode](text, name))


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("length", [30, 300, patterns.MAX_NAME])
def test_bombs_take_steps_linear_in_the_name(pattern, length):
    """Each character visits each state at most once, for the pattern and for each place of a lookaround."""
    matcher = PatternSet([pattern])
    assert matcher.findings == ()
    states = len(matcher._states.kinds) + sum(len(own.kinds) for own, _ in matcher._slow.values())
    inner = sum(
        len(value.states.kinds)
        for own, _ in matcher._slow.values()
        for value in own.values
        if isinstance(value, patterns._Assertion) and value.states is not None
    )
    name = "a" * (length - 1) + "!"
    assert not matcher.any(name)
    places = length + 1
    assert matcher.steps <= 3 * places * (states + 1) + places * places * (inner + 1)
    if not inner:
        assert matcher.steps < 1_000_000


def test_the_steps_of_a_bomb_do_not_grow_with_its_nesting():
    nested = PatternSet(["(" * 30 + "a" + "+)" * 30 + "$"])
    assert not nested.any("a" * 500 + "!")
    assert nested.steps < 200_000


def test_many_names_cost_no_steps_once_their_characters_were_seen():
    """58 patterns, as AutoRound writes one for each router, over the experts of a DeepSeek-R1."""
    matcher = PatternSet([rf".*model\.layers\.{layer}\.mlp\.gate.*" for layer in range(58)])
    for layer in range(3, 6):
        for expert in range(256):
            assert not matcher.any(f"model.layers.{layer}.mlp.experts.{expert}.down_proj")
            assert matcher.matches(f"model.layers.{layer}.mlp.gate") == (layer,)
    spent = matcher.steps
    for expert in range(256):
        assert not matcher.any(f"model.layers.4.mlp.experts.{expert}.down_proj.x")
    assert matcher.steps - spent < 20_000


def test_total_work_is_bounded(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_STEPS", 20_000)
    matcher = PatternSet([".*a.{18}b", ".*b.{18}a"])
    names = [format(number * 7919, "040b").replace("0", "a").replace("1", "b") for number in range(10_000)]
    with pytest.raises(NpuQuantError) as caught:
        list(map(matcher.any, names))
    (finding,) = caught.value.findings
    assert finding.code == "bad-config"
    assert "too much work" in finding.message
    assert "layer names" in finding.fix


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(patterns, "_MAX_REMEMBERED", 500)
    monkeypatch.setattr(patterns, "_MAX_CACHED", 10)
    texts = [".*a.{6}b", "[ab]*ba"]
    matcher = PatternSet(texts)
    for number in range(300):
        name = format(number, "012b").replace("0", "a").replace("1", "b")
        assert matcher.matches(name) == tuple(i for i, text in enumerate(texts) if re.match(text, name))
        assert sum(len(known.chars) for known in matcher._seen.values()) <= 500
        assert len(matcher._cache) <= 10


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "backreferences"),
        (r"(?P<x>a)(?P=x)", "backreferences"),
        (r"(a)?(?(1)b|c)", "conditions on groups"),
        (r"(?<=a+)b", "fixed width"),
        ("(", "not a regular expression"),
        ("[", "not a regular expression"),
        ("*", "not a regular expression"),
        ("a{2,1}", "not a regular expression"),
        ("a{99999999999999999999}", "not a regular expression"),
        ("(?z)a", "not a regular expression"),
        ("(((a{100}){100}){100}){100}", "too large"),
        ("a{20001}", "too large"),
        ("(" * 41 + ")" * 41, "nested too deeply"),
        ("(" * 4000, "nested too deeply"),
        ("a" * 4097, "longer than any real one"),
    ],
)
def test_refused_patterns(pattern, message):
    matcher = PatternSet(["model.*", pattern, ".*head"], file="config.json", where="targets")
    (finding,) = matcher.findings
    assert finding.code == "bad-config"
    assert finding.severity is Severity.ERROR
    assert finding.message.startswith("targets: ")
    assert message in finding.message
    assert finding.file == "config.json"
    assert finding.found.startswith(pattern[:100])
    assert len(finding.found) < 130
    assert "layer names" in finding.fix
    # The others go on working.
    assert matcher.matches("model.head") == (0, 2)


@pytest.mark.skipif(
    not hasattr(re._parser if hasattr(re, "_parser") else re, "ATOMIC_GROUP"), reason="Python 3.11 syntax"
)
@pytest.mark.parametrize(("pattern", "message"), [("(?>a+)b", "atomic groups"), ("a++b", "possessive repeats")])
def test_refused_patterns_of_new_pythons(pattern, message):
    (finding,) = PatternSet([pattern]).findings
    assert message in finding.message


def test_sizes_of_all_patterns_together_are_bounded():
    too_long = PatternSet(["x" * 4000] * 300)
    assert len(too_long.findings) == 1
    assert "too large together" in too_long.findings[0].message
    too_big = PatternSet(["a{19000}"] * 100)
    assert len(too_big.findings) == 1
    refused = PatternSet(["a{20001}"] * 100_000)
    assert len(refused.findings) < 60


def test_names_are_bounded():
    with pytest.raises(NpuQuantError) as caught:
        PatternSet([".*"], file="config.json").matches("x" * 1025)
    assert caught.value.codes == ("bad-config",)
    assert "1024" in str(caught.value)


def test_pickles_small_and_works_after():
    matcher = PatternSet([".*self_attn.*", "(a)\\1"], mode="search", file="config.json", where="ignore")
    for name in string.ascii_lowercase:
        matcher.any(name * 50)
    data = pickle.dumps(matcher)
    assert len(data) < 400
    again = pickle.loads(data)
    assert again.matches("x.self_attn.y") == (0,)
    assert again.findings == matcher.findings
    assert len(again) == 2


def test_unknown_mode():
    with pytest.raises(ValueError, match="expected 'match'"):
        PatternSet([], mode="find")


def test_empty_set_matches_nothing():
    assert PatternSet([]).matches("model") == ()
