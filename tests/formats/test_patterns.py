# SPDX-License-Identifier: Apache-2.0
"""Patterns from configs: the same answers as Python's ``re``, in time that is linear in the name."""

from __future__ import annotations

import pickle
import random
import re
import string
import subprocess
import sys
import time
import warnings

import pytest
from hypothesis import event, given, settings
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
    "aaaaaaaaaaaaaaaaaaaa!",
    "Model.Layers.7.MLP.Up_proj",
    "b",
    "a.b",
    "a{,3}[:x]",
    "a{2}",
)

#: Patterns of real configs and recipes, and constructs that RE2 writes in another way.
REAL = (
    ".*self_attn.*",
    r".*model\.layers\.0\.mlp\.gate.*",
    ".*lm_head",
    r"model\.layers\.(0|1|2)\..*",
    ".*down.*",
    r"^(?!.*(?:experts|visual)).*_proj$",
    r"^(?!.*layers\.1\d*\.)",
    r"(?!.*visual)(?!lm_head)model.*",
    r"(?!(?:lm_head|model\.embed_tokens)$)(?:.*(?:head|embed).*)",
    r"(?=.*mlp)(?!.*gate$).*",
    r".*(?<!gate)_proj",
    r".*(?<!self_attn)\.[qkvo]_proj",
    r"^(?!.*visual).*(?<!gate)_proj$",
    r".*layers\.(?!0\.|1\.).*",
    r".*(?<=layers)\.*",
    r"(?i)(?!.*MLP)model",
    r"^(?:(?!visual).)*$",
    r"^((?!visual|lm_head).)*$",
    r"model\.(?:(?!experts).)+\Z",
    r"(?:^(?!.*experts).*(?:gate|up)_proj)",
    r"(?P<layer>(?!.*gate).*mlp.*)$",
    r"^(?:(?!.*visual).*_proj|lm_head)$",
    r"(?!.*visual).*_proj$|lm_head",
    r"lm_head|.*(?<!gate)_proj|model\.(?=embed).*",
    r".*mlp\.(?:(?!gate)\w+|shared_experts\..*(?<!down)_proj)$",
    r"model(?=\.l)(?!.*gate)",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
    r"model.layers.([0-9]|1[0-9]).mlp.*",
    r"(?i).*MLP.*",
    r".*\bgate\b.*",
    r".*\Bgate",
    r"(?m)^b$",
    r"a$",
    r"b\Z",
    r"(?=b\Z)",
    r"\Alm_head",
    r"$^",
    r"^$",
    r"[^a-f]odel\.[\w.]+",
    r"[]a-]*",
    r"[[:alpha:]]+",
    r"[^a[:alpha:]]+",
    r"(?:a?){3}a{3}",
    "a{,3}",
    "a{03}",
    "[a]{,}!",
    r"a\{,3}",
    "a[{],3}",
    "a{(?=2)2}",
    r"(?s)a.b",
    r"a.b",
    r"(?i)(?s)A.B",
    r"(?:model\.)?lm_head",
    r"lm_head|embed",
    r"(?P<layer>model)\..*",
    r"(?i:MODEL)\.layers",
    r"a*?a*?!",
    r"(?!)",
    r"(|a)+!",
    r"\S+\.\D*",
    r"\x6d\x6fdel",
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
    "(" * 30 + "a" + "+)" * 30 + "$",
    r"(?=(a+)+$)(?!(a+)+b$).*c",
    r"(?!(a|aa)+$)(a|a)*(?<!a)$",
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
        "[[:a]",
        "[]^-]",
        "{",
        ",2}",
        "-",
        "K",
    ]
)


def _combined(inner):
    suffix = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "{,2}", "{02}", "{,}", "*?", "+?", "??"])
    return st.one_of(
        st.tuples(inner, suffix).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map(lambda text: f"(?:{text})"),
        inner.map(lambda text: f"({text})"),
    )


_REGULAR = st.recursive(_ATOMS, _combined, max_leaves=8)
_FLAGS = st.sampled_from(["", "", "(?i)", "(?s)", "(?m)", "(?ims)"])
_CONDITIONS = st.one_of(
    st.tuples(st.sampled_from(["(?=", "(?!"]), _REGULAR),
    st.tuples(st.sampled_from(["(?<=", "(?<!"]), st.sampled_from(["a", "b.", "[ab]c", "^a"])),
).map(lambda pair: f"{pair[0]}{pair[1]})")
_PLACE = st.lists(_CONDITIONS, max_size=2).map("".join)
#: Conditions in groups, beside "|", and in the repeated group that means "from here to the end".
_GROUPS = st.one_of(
    st.tuples(_PLACE, _REGULAR, _REGULAR).map(lambda texts: f"(?:{texts[0]}{texts[1]}|{texts[2]})"),
    st.tuples(_REGULAR, _PLACE, _REGULAR, _REGULAR).map(lambda texts: f"{texts[0]}({texts[1]}{texts[2]}){texts[3]}"),
    st.tuples(_PLACE, _REGULAR, _REGULAR, _PLACE).map(lambda texts: f"{texts[0]}{texts[1]}|{texts[2]}{texts[3]}"),
    st.tuples(_REGULAR, _REGULAR, st.sampled_from(["*$", r"+\Z"])).map(
        lambda texts: f"{texts[0]}(?:(?!{texts[1]}).){texts[2]}"
    ),
)
#: Conditions at the start and at one place after it.
_PATTERNS = st.tuples(_FLAGS, st.sampled_from(["", "^"]), _PLACE, _REGULAR, _PLACE, _REGULAR).map("".join)
# Python 3.14 changed what \B means on the empty text, which is no name.
_TEXTS = st.lists(st.text(alphabet="abcAkK.1_-[:]{,2} ", min_size=1, max_size=9), min_size=1, max_size=8)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(*(st.tuples(_FLAGS, texts).map("".join) for texts in (_GROUPS, _REGULAR)), _PATTERNS),
        min_size=1,
        max_size=3,
    ),
    _TEXTS,
    st.sampled_from(list(MODES)),
)
def test_agrees_with_re_on_random_patterns(texts, names, mode):
    matcher = PatternSet(texts, mode=mode)
    refused = {text for text in texts if PatternSet([text], mode=mode).findings}
    for finding in matcher.findings:
        event(finding.message[:50])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            wanted = (i for i, text in enumerate(texts) if text not in refused and MODES[mode](text, name))
            assert matcher.matches(name) == tuple(wanted)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", BOMBS)
def test_bombs_are_matched_in_no_time(pattern):
    """Backtracking would take longer than the timeout on 40 characters; the linear time here is some milliseconds."""
    matcher = PatternSet([pattern])
    assert matcher.findings == ()
    name = "a" * (patterns.MAX_NAME - 1) + "!"
    began = time.thread_time()
    assert not matcher.any(name)
    assert time.thread_time() - began < 1


def test_all_patterns_take_one_pass():
    """58 patterns, as AutoRound writes one for each router, over the experts of a DeepSeek-R1."""
    matcher = PatternSet([rf".*model\.layers\.{layer}\.mlp\.gate.*" for layer in range(58)])
    began = time.thread_time()
    for layer in range(58):
        for expert in range(256):
            assert not matcher.any(f"model.layers.{layer}.mlp.experts.{expert}.down_proj")
        assert matcher.matches(f"model.layers.{layer}.mlp.gate") == (layer,)
    assert time.thread_time() - began < 2


#: Each needs as many states as there are sequences of a and b: more than RE2 has memory for.
HUNGRY = (".*a.{60}b", ".*b.{60}a", ".*[ab].{70}a", ".*(?<!a.)b.{50}a")


def test_answers_are_right_where_the_states_do_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(patterns, "_SET_MEMORY", 1 << 17)
    monkeypatch.setattr(patterns, "_PATTERN_MEMORY", 1 << 15)
    matcher = PatternSet(HUNGRY)
    assert matcher.findings == ()
    numbers = random.Random(1)
    for _ in range(200):
        name = "".join(numbers.choices("ab", k=100))
        assert matcher.matches(name) == tuple(i for i, text in enumerate(HUNGRY) if re.match(text, name))


def test_time_is_that_of_all_sets_of_a_config():
    """Patterns whose states do not fit into memory take seconds for these names; the second set finds nothing left."""
    time_left = patterns.MatchingTime(0.05)
    numbers = random.Random(1)
    first = PatternSet([f".*.*.*{number}.*.*[^x]{{0,30}}.*y" for number in range(300)], time_left=time_left)
    names = ["".join(numbers.choices("0123456789", k=patterns.MAX_NAME)) for _ in range(1000)]
    with pytest.raises(NpuQuantError, match="too much work"):
        list(map(first.any, names))
    (finding,) = PatternSet(["a", "b"], time_left=time_left).findings
    assert "too much work" in finding.message


def test_total_work_is_bounded(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.02)
    matcher = PatternSet([f".*a.{{{width}}}b" for width in range(700, 800)])
    numbers = random.Random(1)
    names = ["".join(numbers.choices("ab", k=patterns.MAX_NAME)) for _ in range(200)]
    with pytest.raises(NpuQuantError) as caught:
        list(map(matcher.any, names))
    (finding,) = caught.value.findings
    assert finding.code == "bad-config"
    assert "too much work" in finding.message
    assert "layer names" in finding.fix


def test_nothing_is_written_to_stderr():
    """RE2 logs patterns that it refuses and states that do not fit, unless it is told not to."""
    code = (
        "from vllm_npu_quant.formats import patterns\n"
        "patterns._SET_MEMORY = patterns._PATTERN_MEMORY = 1 << 17\n"
        "found = patterns.PatternSet(['a++', '(a)\\\\1', 'a{1000}' * 99, '.*a.{60}b', '(?!.*a.{60}b).*'])\n"
        "print(len(found.findings), found.matches('ab' * 500))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3 (3,)\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "backreferences"),
        (r"(?P<x>a)(?P=x)", "invalid perl operator: (?P"),
        (r"(a)?(?(1)b|c)", "invalid perl operator: (?("),
        (r"(?x)a", "invalid perl operator: (?x"),
        (r"(?#a)b", "invalid perl operator: (?#"),
        (r"[\b]", "invalid escape sequence"),
        (r"(?<=a+)b", "not a regular expression: look-behind"),
        ("(?:(?!a).)*b", "in a repeated group"),
        ("(?:(?!a).)*", "in a repeated group"),
        (r"(?:(?!\b).)*$", "in a repeated group"),
        ("(?:(?!a*).)*$", "in a repeated group"),
        ("(?:(?=a).)*$", "in a repeated group"),
        ("(?:(?!a(?!b)).)*$", "in a repeated group"),
        ("(?:(?!a).b)*$", "in a repeated group"),
        ("(?:(?!a)|b){2}", "in a repeated group"),
        ("(?:(?!a)b)?c", "in a repeated group"),
        ("(?i:(?!a)b)", "in a group with flags"),
        ("(?:(?!a)b|c)" * 6, "too many alternatives"),
        ("(?=a(?!b))a", "in another one"),
        ("(?=a)*b", "repeated"),
        ("(?=a){2}b", "repeated"),
        ("a(?=b).(?=c)", "two places"),
        ("(", "not a regular expression"),
        ("[", "not a regular expression"),
        ("*", "not a regular expression"),
        ("a{2,1}", "not a regular expression"),
        ("a{99999999999999999999}", "not a regular expression"),
        ("(?z)a", "not a regular expression"),
        (r"\pL", "not a regular expression"),
        (r"\Qa\E", "not a regular expression"),
        ("(((a{100}){100}){100}){100}", "too large"),
        ("a{1001}", "too large"),
        ("(a{1000}b)" * 200, "too large"),
        ("(" * 2000 + ")" * 2000, "recursion"),
        ("a" * 4097, "longer than any real one"),
        ("ſ", "characters that no layer name has"),
        (r"\u017f", "characters that no layer name has"),
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


@pytest.mark.parametrize("pattern", ["(?>a+)b", "a++b", "a{2}+b"])
def test_refused_patterns_of_new_pythons(pattern):
    """Syntax of Python 3.11, which older ones refuse, too."""
    (finding,) = PatternSet([pattern]).findings
    assert re.search("not supported|not a regular expression", finding.message)


def test_flags_inside_of_a_pattern_are_refused():
    """Python 3.10 applies them to the whole pattern, RE2 to the rest of it, and newer Pythons to nothing."""
    (finding,) = PatternSet(["a(?i)b"]).findings
    assert re.search("flags stand inside|not a regular expression", finding.message)


def test_sizes_of_all_patterns_together_are_bounded():
    too_long = PatternSet(["x" * 4000] * 300)
    assert len(too_long.findings) == 1
    assert "too large together" in too_long.findings[0].message
    too_big = PatternSet(["(?:[a-z]{30}x){30}"] * 10_000)
    assert len(too_big.findings) == 1
    assert "too large together" in too_big.findings[0].message
    assert too_big.matches("model") == ()
    assert len(PatternSet(["a{20001}"] * 100_000).findings) == patterns.MAX_FINDINGS
    many = PatternSet(["(?!a)(?!b)"] * 130)
    assert len(many.findings) == 2
    assert "too many lookarounds" in many.findings[0].message


@pytest.mark.parametrize("name", ["x" * 1025, "a\n", "größe", "\ud800"])
def test_names_are_bounded(name):
    with pytest.raises(NpuQuantError) as caught:
        PatternSet([".*"], file="config.json").matches(name)
    assert caught.value.codes == ("bad-config",)
    assert "1024 printable ASCII characters" in str(caught.value)


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
