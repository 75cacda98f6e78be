# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of untrusted configs, matched by RE2 in time that is linear in the layer's name.

Checkpoint configs name layers by regular expressions: compressed-tensors ``targets`` and ``ignore`` ("re:.*lm_head"), GPTQ
``dynamic`` ("-:.*down.*"), AutoRound ``extra_config``. Python's ``re`` backtracks: some patterns need time exponential in
the name's length. RE2 does not, and it matches all patterns of a field in one pass.

An accepted pattern has the meaning that it has to ``re``. If the two syntaxes differ, it is rewritten (``\\Z``, ``{,3}``,
"[" in a class) or refused (backreferences, possessive repeats, ``(?x)``). Names are limited to printable ASCII, where both
agree about ``\\w``, ``\\s``, ``$`` and letter case.

RE2 has no lookarounds. Recipes use them at the start ("^(?!.*visual).*_proj"), where they are conditions on the whole name,
and sometimes further on (".*(?<!gate)_proj"). Such a pattern is cut at its lookarounds, and each part is matched on its own,
at every place of the name where the parts may meet. Groups around lookarounds are opened, so that their alternatives become
patterns of their own: "(?:(?!.*a).*x|y)z" is "(?!.*a).*xz" or "yz"; and "(?:(?!a).)*$", whose lookahead is tried at every
place of the rest, is "(?!.*a).*$". Other lookarounds in repeated groups, and at two places after the start, are refused.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import re2

from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["MAX_NAME", "MAX_PATTERN", "MatchingTime", "PatternSet"]

#: Limits. Real patterns have below 200 characters, real names below 200, and a checkpoint below a hundred patterns.
MAX_PATTERN = 4096
MAX_NAME = 1024
MAX_TOTAL = 1 << 18
MAX_LOOKAROUNDS = 256
MAX_FINDINGS = 50
#: Alternatives of one pattern with lookarounds.
MAX_ALTERNATIVES = 32
#: CPU seconds for the patterns of one config. 70,000 names, those of the largest known models, take 0.5 s where a pattern has
#: a lookaround and 0.2 s where none has; patterns that take longer are written to overflow RE2's cache of states.
MAX_SECONDS = 5.0

#: RE2's memory for one pattern, and for all of a field: enough for MAX_TOTAL characters of plain names.
_PATTERN_MEMORY = 1 << 20
_SET_MEMORY = 64 << 20

_EXPECTED = "the syntax of RE2 (github.com/google/re2/wiki/Syntax)"

#: Tokens that are rewritten, or that are needed to find lookarounds; any other character stands for itself.
_TOKEN = re.compile(
    r"""\\(?P<escape>.)
    | (?P<negation>\[\^?)(?P<items>\]?(?:\\.|[^\]\\])*)\]
    | \{(?P<low>[0-9]*)(?P<comma>,?)(?P<high>[0-9]*)\}
    | \(\?(?P<look><?[=!])
    | \(\?(?P<head>P<\w+>|[a-zA-Z-]*:)
    | \(\?(?P<flags>[a-zA-Z]+)\)
    | .""",
    re.DOTALL | re.VERBOSE,
)


class _Refused(Exception):
    """A pattern that is not matched: the reason, and what is allowed instead."""

    def __init__(self, message: str, expected: str = _EXPECTED) -> None:
        super().__init__(message)
        self.expected = expected


class MatchingTime:
    """CPU seconds that the patterns of one config have left: the work of RE2 cannot be counted otherwise."""

    def __init__(self, seconds: float | None = None) -> None:
        self.left = MAX_SECONDS if seconds is None else seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take off the time of the context."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.left -= time.thread_time() - began


class PatternSet:
    """Patterns of one config field, tried on layer names all at once.

    ``mode`` is how the format's own library applies a pattern: "match" at the start of the name (``re.match``), "search"
    anywhere (``re.search``), "fullmatch" the whole name.

    Attributes:
        patterns: the patterns as they are in the config, without prefixes such as "re:".
        findings: one for each pattern that is refused; it then matches nothing. After MAX_FINDINGS, nothing more is read.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        mode: str = "match",
        file: str = "",
        where: str = "pattern",
        time_left: MatchingTime | None = None,
    ) -> None:
        """
        Args:
            patterns: regular expressions in Python's syntax.
            mode: "match", "search" or "fullmatch".
            file: the file they come from, for messages.
            where: the config field they come from, for messages.
            time_left: that of the config, if it has several sets.
        """
        if mode not in ("match", "search", "fullmatch"):
            raise ValueError(f"mode is {mode!r}; expected 'match', 'search' or 'fullmatch'")
        self.patterns = tuple(patterns)
        self.mode = mode
        self.file = file
        self.where = where
        self._time = time_left or MatchingTime()
        self._compile()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("patterns", "mode", "file", "where")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["patterns"], mode=state["mode"], file=state["file"], where=state["where"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.patterns)

    def __repr__(self) -> str:
        return f"<PatternSet of {len(self.patterns)} {self.where}>"

    def matches(self, name: str) -> tuple[int, ...]:
        """The indexes of all patterns that match the name, ascending.

        Raises:
            NpuQuantError: bad-config if the name is not printable ASCII or longer than any real one, or the patterns need
                too much work.
        """
        if self._set is None:
            return ()
        if len(name) > MAX_NAME or not (name.isascii() and name.isprintable()):
            raise NpuQuantError([self._bad_name(name)])
        text = name.encode()
        if self._time.left < 0:
            raise NpuQuantError([self._too_slow()])
        with self._time.running():
            found = {self._indexes[number] for number in self._set.Match(text) or ()}
            cut = [index for index in found if index in self._cut]
            found.difference_update([index for index in cut if not any(one.matches(text) for one in self._cut[index])])
        return tuple(sorted(found))

    def first(self, name: str) -> int | None:
        """The index of the first pattern that matches the name, or None."""
        found = self.matches(name)
        return found[0] if found else None

    def any(self, name: str) -> bool:
        """Whether a pattern matches the name."""
        return bool(self.matches(name))

    def _compile(self) -> None:
        kinds = {"match": re2.Set.MatchSet, "search": re2.Set.SearchSet, "fullmatch": re2.Set.FullMatchSet}
        # Compile() makes sure that the memory is enough to match any name: a set never gives up while it matches.
        together = kinds[self.mode](_options(_SET_MEMORY))
        self._set: re2.Set | None = None
        self._indexes: list[int] = []
        #: The alternatives of patterns with lookarounds.
        self._cut: dict[int, list[_CutPattern]] = {}
        findings = []
        characters = lookarounds = 0
        for index, pattern in enumerate(self.patterns):
            characters += len(pattern)
            if characters > MAX_TOTAL:
                findings.append(self._refused(pattern, _too_large()))
                break
            if self._time.left < 0:
                findings.append(self._too_slow())
                break
            try:
                with self._time.running():
                    alternatives = _parse(pattern)
                    lookarounds += sum(len(parts.lookarounds) for parts in alternatives)
                    if lookarounds > MAX_LOOKAROUNDS:
                        expected = f"at most {MAX_LOOKAROUNDS}"
                        raise _Refused("the patterns of this field have too many lookarounds", expected)
                    if any(parts.lookarounds for parts in alternatives):
                        self._cut[index] = [_CutPattern(parts, self.mode) for parts in alternatives]
                    wholes = [parts.whole for parts in alternatives]
                    for whole in wholes:
                        _regex(whole)
            except _Refused as refused:
                self._cut.pop(index, None)
                findings.append(self._refused(pattern, refused))
                if len(findings) == MAX_FINDINGS:
                    break
                continue
            for whole in wholes:
                together.Add(whole.encode())
                self._indexes.append(index)
        if self._indexes:
            try:
                with self._time.running():
                    together.Compile()
                self._set = together
            except re2.error:
                findings.append(self._refused(self.patterns[self._indexes[0]], _too_large()))
        self.findings: tuple[Finding, ...] = tuple(findings)

    def _refused(self, pattern: str, error: _Refused) -> Finding:
        return Finding(
            "bad-config",
            f"{self.where}: {error}",
            file=self.file,
            expected=error.expected,
            found=pattern[:120] + ("..." if len(pattern) > 120 else ""),
            fix="write the layer names out, or use a simpler regular expression",
        )

    def _bad_name(self, name: str) -> Finding:
        return Finding(
            "bad-config",
            "a layer name is longer than any real one, or has characters that no real one has",
            layer=ascii(name[:60])[1:-1] + ("..." if len(name) > 60 else ""),
            file=self.file,
            expected=f"at most {MAX_NAME} printable ASCII characters",
            found=f"{len(name)} characters",
            fix="check where the weight files come from",
        )

    def _too_slow(self) -> Finding:
        return Finding(
            "bad-config",
            f"{self.where}: matching these patterns takes too much work",
            file=self.file,
            expected=f"all patterns of a config are compiled and matched in {MAX_SECONDS:.0f} s",
            found=f"{len(self.patterns)} patterns",
            fix="write the layer names out, or use simpler regular expressions",
        )


def _too_large() -> _Refused:
    return _Refused("the patterns of this field are too large together", f"at most {MAX_TOTAL} characters")


# From Python's syntax to RE2's.


@dataclass
class _Parts:
    """A pattern in RE2's syntax, cut at its lookarounds.

    Attributes:
        flags: the inline flags at its start, such as "(?i)".
        pieces: the text around the lookarounds, one piece more than those.
        lookarounds: kind ("=", "!", "<=", "<!") and text of each.
    """

    flags: str = ""
    pieces: list[str] = field(default_factory=lambda: [""])
    lookarounds: list[tuple[str, str]] = field(default_factory=list)

    @property
    def whole(self) -> str:
        """The pattern without its lookarounds, which matches every name that it matches with them, and maybe more."""
        return self.flags + "".join(f"(?:{piece})" for piece in self.pieces)


def _parse(pattern: str) -> list[_Parts]:
    """Check a pattern by Python's rules, and rewrite it. Several alternatives if it has lookarounds beside "|"."""
    if len(pattern) > MAX_PATTERN:
        raise _Refused("a pattern is longer than any real one", f"at most {MAX_PATTERN} characters")
    # Beyond ASCII, letter case differs, and re takes long to compile classes that have any.
    if not pattern.isascii() or re.search(r"\\[uUN]", pattern):
        raise _Refused("a pattern has characters that no layer name has", "ASCII characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _Refused(f"not a regular expression: {str(error)[:120]}", "a regular expression") from None
    flags, tokens = "", []
    position = 0
    for token in _TOKEN.finditer(pattern):
        if token["flags"]:
            if token.start() > position:
                raise _Refused("flags stand inside of a pattern", "flags at its start")
            position = token.end()
            flags += token.group()
        else:
            tokens.append(_rewritten(token))
    if not any(text.startswith(_LOOKS) for text in tokens):
        return [_Parts(flags, ["".join(tokens)])]
    return [_cut(flags, alternative) for alternative in _opened(tokens)]


#: The tokens that begin a lookaround, and those that begin a group whose brackets mean nothing else.
_LOOKS = ("(?=", "(?!", "(?<=", "(?<!")
_PLAIN_GROUP = re.compile(r"\((\?:|\?P<\w+>)?")


def _opened(tokens: list[str]) -> list[list[str]]:
    """The alternatives of a pattern with lookarounds, none of which stands in a group any more."""
    alternatives: list[list[str]] = [[]]
    finished: list[list[str]] = []
    at = 0
    while at < len(tokens):
        text = tokens[at]
        if text == "|":
            finished += alternatives
            alternatives = [[]]
        elif text[0] == "(":
            end = _end_of(tokens, at)
            inside = tokens[at + 1 : end]
            if not text.startswith(_LOOKS) and any(inner.startswith(_LOOKS) for inner in inside):
                opened, end = _open_group(text, inside, tokens, end)
            else:
                if any(inner.startswith(_LOOKS) for inner in inside):
                    raise _Refused("a lookaround stands in another one", "lookarounds outside of lookarounds")
                opened = [tokens[at : end + 1]]
            alternatives = [[*before, *after] for before in alternatives for after in opened]
            at = end
        else:
            for alternative in alternatives:
                alternative.append(text)
        if len(alternatives) + len(finished) > MAX_ALTERNATIVES:
            raise _Refused("a pattern with lookarounds has too many alternatives", f"at most {MAX_ALTERNATIVES}")
        at += 1
    return finished + alternatives


def _open_group(head: str, inside: list[str], tokens: list[str], end: int) -> tuple[list[list[str]], int]:
    """The alternatives of a group that holds lookarounds, and the index of its last token.

    In "(?:(?!a).)*$", the text "a" begins nowhere in the rest of the name: "(?!.*a).*$".

    Args:
        head: its first token.
        inside: the tokens between its brackets.
        tokens: those of the pattern.
        end: the index of its last bracket.
    """
    if end + 1 < len(tokens) and tokens[end + 1][0] in "*+?{":
        looked_for = inside[1:-2]
        if (
            [inside[0], *inside[-2:]] == ["(?!", ")", "."]
            and _end_of(inside, 0) == len(inside) - 2
            and not any(inner.startswith(_LOOKS) for inner in looked_for)
            and tokens[end + 1] in ("*", "+")
            and tokens[end + 2 :] in (["$"], [r"\z"])
            and not _matches_at_end("".join(looked_for))
        ):
            return [["(?!", ".", "*", "(?:", *looked_for, ")", ")", "."]], end
        raise _Refused("a lookaround stands in a repeated group", "lookarounds outside of repeated groups")
    if not _PLAIN_GROUP.fullmatch(head):
        raise _Refused("a lookaround stands in a group with flags", "flags at the start of a pattern")
    return [["(?:)", *alternative, "(?:)"] for alternative in _opened(inside)], end


def _matches_at_end(text: str) -> bool:
    """Whether a pattern without lookarounds matches at the end of some name."""
    regex = _regex(text)
    return any(regex.match(name, len(name)) for name in (b"", b"a", b"."))


def _end_of(tokens: list[str], start: int) -> int:
    """The index of the bracket that ends a group."""
    depth = 0
    for at in range(start, len(tokens)):
        depth += (tokens[at][0] == "(") - (tokens[at] == ")")
        if not depth:
            return at
    raise _Refused("a group does not end")


def _cut(flags: str, tokens: list[str]) -> _Parts:
    """A pattern whose lookarounds stand in no group, cut at them."""
    parts = _Parts(flags)
    at = 0
    while at < len(tokens):
        if tokens[at] == "(?:)":  # keeps the texts of an opened group and of its neighbours from forming one token
            parts.pieces[-1] += tokens[at] if parts.pieces[-1] else ""
        elif tokens[at].startswith(_LOOKS):
            end = _end_of(tokens, at)
            if end + 1 < len(tokens) and tokens[end + 1][0] in "*+?{":
                raise _Refused("a lookaround is repeated", "lookarounds without repeats")
            parts.lookarounds.append((tokens[at][2:], "".join(tokens[at + 1 : end])))
            parts.pieces.append("")
            at = end
        else:
            parts.pieces[-1] += tokens[at]
        at += 1
    return parts


def _rewritten(token: re.Match[str]) -> str:
    """A token in RE2's syntax."""
    text = token.group()
    if token["escape"]:
        if token["escape"] in "123456789":
            raise _Refused("backreferences are not supported")
        return r"\z" if text == r"\Z" else text
    if token["negation"]:
        # "[:" would begin one of RE2's named classes.
        items = re.sub(r"(\\.)|\[", lambda item: item[1] or r"\[", token["items"], flags=re.DOTALL)
        return f"{token['negation']}{items}]"
    if token["comma"] or token["low"]:
        # RE2 reads "{,3}" and "{03}" as plain characters. Its largest repeat is 1000.
        low, high = (number and str(min(int(number), 1001)) for number in (token["low"], token["high"]))
        return f"{{{low or 0}{token['comma']}{high}}}"
    return text


def _options(memory: int) -> re2.Options:
    options = re2.Options()
    options.max_mem = memory
    options.log_errors = False  # refusals become findings
    options.never_capture = True
    options.encoding = re2.Options.Encoding.LATIN1  # names are ASCII; one byte for "." keeps programs small
    return options


def _regex(pattern: str) -> Any:
    """The compiled form of a pattern in RE2's syntax, or of a part of one."""
    try:
        return re2.compile(pattern.encode(), _options(_PATTERN_MEMORY))
    except re2.error as error:
        reason = error.args[0].decode()[:120]
        if reason.startswith(("invalid repetition size", "pattern too large")):
            raise _Refused(
                "a pattern's repeats make it too large", "at most 1000 repeats, nested ones multiplied"
            ) from None
        raise _Refused(f"not supported: {reason}") from None


class _CutPattern:
    """A pattern with lookarounds: conditions on the start of the name, and on the place where two pieces meet.

    A third piece that takes characters would make the work cubic in the name; now it is quadratic, most often linear.
    """

    def __init__(self, parts: _Parts, mode: str) -> None:
        anywhere = f"{parts.flags}(?s:.*)"
        end = r"\z" if mode == "fullmatch" else ""
        start = anywhere if mode == "search" and not parts.lookarounds else parts.flags
        self._last = _regex(f"{start}(?:{parts.pieces[-1]}){end}")
        #: The piece before the place; None if the last piece begins at the start.
        self._before: Any = None
        #: Conditions at the start and at the place: whether they look behind, whether they must hold, what they look for.
        self._at_start: list[tuple[bool, bool, Any]] = []
        self._at_place: list[tuple[bool, bool, Any]] = []
        for number, (piece, (kind, text)) in enumerate(zip(parts.pieces, parts.lookarounds, strict=False)):
            anchored = piece.replace("(?:)", "") in ("^", r"\A") and self._before is None
            search = mode == "search" and number == 0 and not anchored
            if search or (piece and not anchored):
                if self._before is not None:
                    raise _Refused("lookarounds stand at two places after the start", "lookarounds at one place")
                self._before = _regex(f"{anywhere if search else parts.flags}(?:{piece})")
            behind = "<" in kind
            condition = _regex(f"{anywhere if behind else parts.flags}(?:{text})")
            conditions = self._at_start if self._before is None else self._at_place
            conditions.append((behind, "=" in kind, condition))

    def matches(self, name: bytes) -> bool:
        """Whether the pattern matches a name."""
        if not self._hold(self._at_start, name, 0):
            return False
        if self._before is None:
            return bool(self._last.match(name))
        place = 0
        while place <= len(name):
            last = self._last.search(name, place)
            if last is None:
                return False
            place = last.start()
            if self._hold(self._at_place, name, place) and self._before.fullmatch(name, 0, place):
                return True
            place += 1
        return False

    @staticmethod
    def _hold(conditions: list[tuple[bool, bool, Any]], name: bytes, place: int) -> bool:
        return all(
            bool(regex.fullmatch(name, 0, place) if behind else regex.match(name, place)) is wanted
            for behind, wanted, regex in conditions
        )
