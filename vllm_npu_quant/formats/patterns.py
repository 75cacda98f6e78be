# SPDX-License-Identifier: Apache-2.0
"""Regular expressions from strangers' configs, matched in time that is linear in the name, whatever the pattern.

Checkpoint configs name layers by regular expressions: compressed-tensors ``targets`` and ``ignore`` ("re:.*lm_head"), GPTQ
``dynamic`` ("-:.*down.*"), AutoRound ``extra_config``. Python's ``re`` backtracks: on some patterns it needs time that is
exponential in the name's length. So ``re`` only parses them here (a single pass); what matches is an automaton of our own,
which answers the same yes or no. It follows all alternatives at once, so that one character of a name costs at most one
visit of every state, and it remembers the sets of states that it has seen, so that a character usually costs one lookup,
for all patterns of a config together.

Everything regular is supported: classes, groups, alternatives, every repeat, anchors, inline flags; also lookahead,
lookbehind and ``\\b``, which recipes use. What is not regular (backreferences, conditions, atomic groups, possessive
repeats) is refused. Lengths, states and total work are bounded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_npu_quant.errors import Finding, NpuQuantError

try:  # Python 3.11 moved the parser
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
except ImportError:
    import sre_constants as sre  # type: ignore[no-redef]
    import sre_parse  # type: ignore[no-redef]

__all__ = ["MAX_NAME", "MAX_PATTERN", "PatternSet"]

#: Limits. Real patterns have below 200 characters, real names below 200, and a checkpoint below a hundred patterns.
MAX_PATTERN = 4096
MAX_NAME = 1024
MAX_TOTAL = 1 << 18
MAX_NESTING = 40
MAX_STATES = 20_000
MAX_TOTAL_STATES = 400_000
#: Visits of states over the life of a set; sets of states that were seen before cost none.
MAX_STEPS = 100_000_000

#: Remembered states and steps, and remembered names; beyond it, everything is forgotten.
_MAX_REMEMBERED = 2_000_000
_MAX_CACHED = 65_536

#: What one character must be; None stands for a step that takes no character.
Test = Callable[[str], bool]

_CHAR, _JOIN, _BEGIN, _END, _ASSERT, _ACCEPT = range(6)


class _Refused(Exception):
    """A pattern that is not matched: the reason, and what is allowed instead."""

    def __init__(self, message: str, expected: str = "", cost: int = 0) -> None:
        super().__init__(message)
        self.expected = expected
        self.cost = cost  # states that were built before it was refused


@dataclass(frozen=True)
class _Assertion:
    """A condition on the place in the name that takes no character.

    Attributes:
        kind: "ahead", "behind", "boundary", "line-begin" or "line-end".
        negated: whether it must not hold.
        states, start: the automaton of a lookaround.
        width: characters that a lookbehind takes.
        ascii: whether \\b knows ASCII words only.
    """

    kind: str
    negated: bool = False
    states: _States | None = None
    start: int = 0
    width: int = 0
    ascii: bool = False


@dataclass
class _States:
    """An automaton: state i has a kind, what it tests or accepts, and the states after it."""

    kinds: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    nexts: list[list[int]] = field(default_factory=list)

    def add(self, kind: int, value: Any = None) -> int:
        self.kinds.append(kind)
        self.values.append(value)
        self.nexts.append([])
        return len(self.kinds) - 1


class PatternSet:
    """Patterns of one config field, tried on layer names all at once.

    ``mode`` is how the format's own library applies a pattern: "match" at the start of the name (``re.match``), "search"
    anywhere (``re.search``), "fullmatch" the whole name.

    Attributes:
        patterns: the patterns as they are in the config, without prefixes such as "re:".
        findings: one for each pattern that is refused; it then matches nothing.
        steps: visits of states so far, a measure of work that does not depend on the machine.
    """

    def __init__(self, patterns: Sequence[str], *, mode: str = "match", file: str = "", where: str = "pattern") -> None:
        """
        Args:
            patterns: regular expressions in Python's syntax.
            mode: "match", "search" or "fullmatch".
            file: the file they come from, for messages.
            where: the config field they come from, for messages.
        """
        if mode not in ("match", "search", "fullmatch"):
            raise ValueError(f"mode is {mode!r}; expected 'match', 'search' or 'fullmatch'")
        self.patterns = tuple(patterns)
        self.mode = mode
        self.file = file
        self.where = where
        self.steps = 0
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
            NpuQuantError: bad-config where the name is longer than any real one, or the patterns need too much work.
        """
        found = self._cache.get(name)
        if found is None:
            if len(name) > MAX_NAME:
                raise NpuQuantError([self._too_long(name)])
            found = self._match(name)
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[name] = found
        return found

    def first(self, name: str) -> int | None:
        """The index of the first pattern that matches the name, or None."""
        found = self.matches(name)
        return found[0] if found else None

    def any(self, name: str) -> bool:
        """Whether a pattern matches the name."""
        return bool(self.matches(name))

    # Compilation.

    def _compile(self) -> None:
        self._cache: dict[str, tuple[int, ...]] = {}
        self._seen: dict[tuple[bool, frozenset[int]], _Reached] = {}
        self._first: _Reached | None = None
        self._remembered = 0
        self._states = _States()
        self._starts: list[int] = []
        #: Patterns whose anchors or lookarounds depend on what follows, by index: they are matched one by one.
        self._slow: dict[int, tuple[_States, int]] = {}
        #: Conditions at the start of a pattern, each an automaton of its own: (index, whether it must match).
        self._conditions: dict[int, list[tuple[int, bool]]] = {}
        findings = []
        characters = states = 0
        for index, pattern in enumerate(self.patterns):
            characters += len(pattern)
            try:
                states += self._add(index, pattern)
                error = None
            except _Refused as refused:
                error = refused
                states += refused.cost
            if characters > MAX_TOTAL or states > MAX_TOTAL_STATES:
                error = _Refused("the patterns of this field are too large together", f"at most {MAX_TOTAL} characters")
            if error is not None:
                findings.append(self._refused(pattern, error))
            if characters > MAX_TOTAL or states > MAX_TOTAL_STATES:
                break
        self.findings: tuple[Finding, ...] = tuple(findings)

    def _add(self, index: int, pattern: str) -> int:
        """Build the states of one pattern; how many there are."""
        tree, flags = _parse(pattern)
        conditions, rest = _leading_lookaheads(tree, flags, self.mode)
        parts = [_Compiler(flags).compile(condition, "match") for condition, _ in conditions]
        parts.append(_Compiler(flags).compile(rest, self.mode))
        if any(_ASSERT in states.kinds for states, _ in parts):
            self._slow[index] = _Compiler(flags).compile(tree, self.mode)
        else:
            wanted = [not negated for _, negated in conditions] + [True]
            self._conditions[index] = [
                (self._merge(states, start), positive) for (states, start), positive in zip(parts, wanted, strict=True)
            ]
        return sum(len(states.kinds) for states, _ in parts)

    def _merge(self, other: _States, start: int) -> int:
        """Append an automaton to the common one; the number under which it accepts."""
        accept = len(self._starts)
        base = len(self._states.kinds)
        self._states.kinds += other.kinds
        self._states.values += [
            accept if kind == _ACCEPT else value for kind, value in zip(other.kinds, other.values, strict=True)
        ]
        self._states.nexts += [[state + base for state in states] for states in other.nexts]
        self._starts.append(start + base)
        return accept

    def _refused(self, pattern: str, error: _Refused) -> Finding:
        return Finding(
            "bad-config",
            f"{self.where}: {error}",
            file=self.file,
            expected=error.expected or "a regular expression",
            found=pattern[:120] + ("..." if len(pattern) > 120 else ""),
            fix="write the layer names out, or use a simpler regular expression",
        )

    def _too_long(self, name: str) -> Finding:
        return Finding(
            "bad-config",
            "a layer name is longer than any real one",
            layer=name[:60] + "...",
            file=self.file,
            expected=f"at most {MAX_NAME} characters",
            found=f"{len(name)} characters",
            fix="check where the weight files come from",
        )

    # Matching.

    def _match(self, name: str) -> tuple[int, ...]:
        found = []
        if self._starts:
            # A newline changes what "$" means; no real name has one.
            accepted = self._run(name) if "\n" not in name else None
            if accepted is None:
                accepted = frozenset(
                    self._states.values[state] for state in self._simulate(self._states, self._starts, name)
                )
            found = [
                index
                for index, parts in self._conditions.items()
                if all((part in accepted) is wanted for part, wanted in parts)
            ]
        found += [index for index, (states, start) in self._slow.items() if self._simulate(states, [start], name)]
        return tuple(sorted(found))

    def _run(self, name: str) -> frozenset[int]:
        """The parts that accept the name, by the sets of states that its characters lead to."""
        here = self._first or self._set(self._starts, begin=True)
        self._first = here
        accepted = here.accepts
        for char in name:
            following = here.after.get(char)
            if following is None:
                following = self._advance(here, char)
            here = following
            if here.accepts:
                accepted |= here.accepts
        return accepted | here.accepts_at_end

    def _advance(self, here: _Reached, char: str) -> _Reached:
        states = self._states
        self._spend(len(here.chars))
        tested: dict[Any, bool] = {}
        reached: list[int] = []
        for state in here.chars:
            test = states.values[state]
            holds = tested.get(test)
            if holds is None:
                holds = tested[test] = test(char)
            if holds:
                reached += states.nexts[state]
        following = self._set(reached, begin=False)
        self._remember(1)
        here.after[char] = following
        return following

    def _set(self, starts: Sequence[int], *, begin: bool) -> _Reached:
        """The remembered set of the states that can be reached from ``starts`` without a character."""
        states = self._states
        closed = _close(states, starts, begin=begin, end=False)
        self._spend(len(closed))
        key = (begin, frozenset(closed))
        known = self._seen.get(key)
        if known is None:
            self._remember(len(closed))
            ends = [state for state in closed if states.kinds[state] == _END]
            at_end = _close(states, [after for state in ends for after in states.nexts[state]], begin=begin, end=True)
            known = self._seen[key] = _Reached(
                chars=tuple(state for state in closed if states.kinds[state] == _CHAR),
                accepts=_accepts(states, closed),
                accepts_at_end=_accepts(states, at_end),
            )
        return known

    def _remember(self, amount: int) -> None:
        """Make room for what is remembered next."""
        self._remembered += amount
        if self._remembered > _MAX_REMEMBERED:
            for known in self._seen.values():
                known.after.clear()
            self._seen.clear()
            self._remembered = amount

    def _simulate(self, states: _States, starts: Sequence[int], name: str) -> list[int]:
        """The accepting states reached anywhere in the name; every assertion is evaluated where it stands."""
        return _Simulation(self, name).run(states, starts)

    def _spend(self, steps: int) -> None:
        self.steps += steps + 1
        if self.steps > MAX_STEPS:
            raise NpuQuantError(
                [
                    Finding(
                        "bad-config",
                        f"{self.where}: matching these patterns takes too much work",
                        file=self.file,
                        expected="patterns that are matched in a few steps per name",
                        found=f"{len(self.patterns)} patterns, {self.steps} steps",
                        fix="write the layer names out, or use simpler regular expressions",
                    )
                ]
            )


@dataclass
class _Reached:
    """A set of states that the automaton can be in at once.

    Attributes:
        chars: the states that take a character.
        accepts: what is accepted here. accepts_at_end: what is accepted here if the name ends here.
        after: the set that follows each character that was seen here.
    """

    chars: tuple[int, ...]
    accepts: frozenset[int]
    accepts_at_end: frozenset[int]
    after: dict[str, _Reached] = field(default_factory=dict)


class _Simulation:
    """One name, one automaton, all assertions: at most one visit of each state per character and assertion."""

    def __init__(self, owner: PatternSet, name: str) -> None:
        self.owner = owner
        self.name = name
        self.known: dict[tuple[int, int], bool] = {}

    def run(self, states: _States, starts: Sequence[int], begin: int = 0, stop: int | None = None) -> list[int]:
        """The accepting states reached from ``begin``; with ``stop``, exactly there."""
        name, found = self.name, []
        last = len(name) if stop is None else stop
        current: Sequence[int] = starts
        for position in range(begin, last + 1):
            closed = self._close(states, current, position)
            self.owner._spend(len(closed))
            if stop is None or position == last:
                found += [state for state in closed if states.kinds[state] == _ACCEPT]
            if position == last:
                break
            char = name[position]
            current = [
                after
                for state in closed
                if states.kinds[state] == _CHAR and states.values[state](char)
                for after in states.nexts[state]
            ]
            if not current:
                break
        return found

    def _close(self, states: _States, starts: Sequence[int], position: int) -> list[int]:
        closed: dict[int, None] = {}
        waiting = list(starts)
        while waiting:
            state = waiting.pop()
            if state in closed:
                continue
            closed[state] = None
            kind = states.kinds[state]
            if (
                kind == _JOIN
                or (kind == _BEGIN and position == 0)
                or (kind == _END and self._at_end(position, before_newline=states.values[state]))
                or (kind == _ASSERT and self._holds(states.values[state], position))
            ):
                waiting += states.nexts[state]
        return list(closed)

    def _at_end(self, position: int, before_newline: bool) -> bool:
        rest = self.name[position : position + 2]
        return not rest or (before_newline and rest == "\n")

    def _holds(self, assertion: _Assertion, position: int) -> bool:
        key = (id(assertion), position)
        known = self.known.get(key)
        if known is None:
            known = self.known[key] = self._test(assertion, position) is not assertion.negated
        return known

    def _test(self, assertion: _Assertion, position: int) -> bool:
        name = self.name
        if assertion.kind == "line-begin":
            return position == 0 or name[position - 1] == "\n"
        if assertion.kind == "line-end":
            return position == len(name) or name[position] == "\n"
        if assertion.kind == "boundary":
            word = _is_ascii_word if assertion.ascii else _is_word
            before = position > 0 and word(name[position - 1])
            return before is not (position < len(name) and word(name[position]))
        assert assertion.states is not None
        if assertion.kind == "ahead":
            return bool(self.run(assertion.states, [assertion.start], position))
        begin = position - assertion.width
        return begin >= 0 and bool(self.run(assertion.states, [assertion.start], begin, position))


def _close(states: _States, starts: Sequence[int], *, begin: bool, end: bool) -> list[int]:
    """The states reached without a character, at the begin of a name, at its end, or in between."""
    closed: dict[int, None] = {}
    waiting = list(starts)
    while waiting:
        state = waiting.pop()
        if state in closed:
            continue
        closed[state] = None
        kind = states.kinds[state]
        if kind == _JOIN or (kind == _BEGIN and begin) or (kind == _END and end):
            waiting += states.nexts[state]
    return list(closed)


def _accepts(states: _States, closed: Sequence[int]) -> frozenset[int]:
    return frozenset(states.values[state] for state in closed if states.kinds[state] == _ACCEPT)


# From the parser's tree to states.


def _parse(pattern: str) -> tuple[Any, int]:
    """The parser's tree and the flags of a pattern."""
    if len(pattern) > MAX_PATTERN:
        raise _Refused("a pattern is longer than any real one", f"at most {MAX_PATTERN} characters")
    if _nesting(pattern) > MAX_NESTING:
        raise _Refused("a pattern is nested too deeply", f"at most {MAX_NESTING} levels of parentheses")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = sre_parse.parse(pattern)
    except (re.error, OverflowError, ValueError, RecursionError) as error:
        raise _Refused(f"not a regular expression: {str(error)[:120]}") from None
    return tree, int(tree.state.flags)


def _nesting(pattern: str) -> int:
    """An upper bound of the depth of parentheses; escaped ones count, too."""
    depth = deepest = 0
    for char in pattern:
        if char == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif char == ")":
            depth = max(0, depth - 1)
    return deepest


def _leading_lookaheads(tree: Any, flags: int, mode: str) -> tuple[list[tuple[Any, bool]], Any]:
    """Split off lookaheads at the start of a pattern: there they are conditions on the whole name.

    Returns:
        The conditions, each with whether it is negated, and the rest of the pattern.
    """
    items = list(tree)
    conditions = []
    rest = 0
    anchored = mode != "search"
    while rest < len(items):
        op, value = items[rest]
        if op is sre.AT and value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING) and not flags & re.MULTILINE:
            anchored = True
        elif op in (sre.ASSERT, sre.ASSERT_NOT) and value[0] > 0 and anchored:
            conditions.append((value[1], op is sre.ASSERT_NOT))
        else:
            break
        rest += 1
    if not conditions:
        return [], tree
    kept = [item for item in items[:rest] if item[0] is sre.AT] + items[rest:]
    return conditions, kept


_REFUSED_OPS = {
    "GROUPREF": "backreferences",
    "GROUPREF_IGNORE": "backreferences",
    "GROUPREF_EXISTS": "conditions on groups",
    "ATOMIC_GROUP": "atomic groups",
    "POSSESSIVE_REPEAT": "possessive repeats",
}


class _Compiler:
    """Builds the states of one pattern."""

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.states = _States()

    def compile(self, tree: Any, mode: str) -> tuple[_States, int]:
        """The states of a pattern that is applied as ``mode`` says, and the first of them."""
        start = first = self.states.add(_JOIN)
        if mode == "search":
            skip = self._state(_CHAR, _any_char)
            self.states.nexts[start].append(skip)
            first = self._state(_JOIN)
            self.states.nexts[start].append(first)
            self.states.nexts[skip].append(start)
        last = self._sequence(tree, first, self.flags)
        if mode == "fullmatch":
            last = self._after(last, self._state(_END, False))
        self._after(last, self._state(_ACCEPT))
        return self.states, start

    def _state(self, kind: int, value: Any = None) -> int:
        if len(self.states.kinds) >= MAX_STATES:
            raise _Refused("a pattern's repeats make it too large", f"at most {MAX_STATES} states", MAX_STATES)
        return self.states.add(kind, value)

    def _after(self, state: int, following: int) -> int:
        self.states.nexts[state].append(following)
        return following

    def _sequence(self, items: Any, state: int, flags: int) -> int:
        """Append items to ``state``; the state behind them."""
        for op, value in list(items):
            state = self._item(op, value, state, flags)
        return state

    def _item(self, op: Any, value: Any, state: int, flags: int) -> int:
        test = _char_test(op, value, flags)
        if test is not None:
            return self._after(state, self._state(_CHAR, test))
        if op is sre.SUBPATTERN:
            _, added, removed, items = value
            return self._sequence(items, state, (flags | int(added)) & ~int(removed))
        if op is sre.BRANCH:
            join = self._state(_JOIN)
            for items in value[1]:
                self._after(self._sequence(items, self._after(state, self._state(_JOIN)), flags), join)
            return join
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(value, state, flags)
        if op is sre.AT:
            return self._anchor(value, state, flags)
        if op in (sre.ASSERT, sre.ASSERT_NOT):
            return self._lookaround(value, op is sre.ASSERT_NOT, state, flags)
        name = str(op)
        if name == "FAILURE":
            self._after(state, self._state(_CHAR, _no_char))
            return self._state(_JOIN)  # nothing leads here
        raise _Refused(f"{_REFUSED_OPS.get(name, name.lower())} are not supported", "a pattern without them")

    def _repeat(self, value: Any, state: int, flags: int) -> int:
        least, most, items = value[0], value[1], list(value[2])
        for _ in range(least):
            before, state = state, self._sequence(items, state, flags)
            if state == before:
                return state  # nothing is repeated
        if most is sre.MAXREPEAT:
            loop = self._after(state, self._state(_JOIN))
            self._after(self._sequence(items, loop, flags), loop)
            return self._after(loop, self._state(_JOIN))
        end = self._state(_JOIN)
        for _ in range(most - least):
            self._after(state, end)
            before, state = state, self._sequence(items, state, flags)
            if state == before:
                break
        return self._after(state, end)

    def _anchor(self, value: Any, state: int, flags: int) -> int:
        multiline = bool(flags & re.MULTILINE)
        if value is sre.AT_BEGINNING_STRING or (value is sre.AT_BEGINNING and not multiline):
            return self._after(state, self._state(_BEGIN))
        if value is sre.AT_BEGINNING:
            return self._after(state, self._state(_ASSERT, _Assertion("line-begin")))
        if value is sre.AT_END and multiline:
            return self._after(state, self._state(_ASSERT, _Assertion("line-end")))
        if value in (sre.AT_END, sre.AT_END_STRING):
            # "$" also stands before a newline that ends the name.
            return self._after(state, self._state(_END, value is sre.AT_END))
        if value in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
            negated = value is sre.AT_NON_BOUNDARY
            found = _Assertion("boundary", negated=negated, ascii=bool(flags & re.ASCII))
            return self._after(state, self._state(_ASSERT, found))
        raise _Refused(f"{str(value).lower()} is not supported", "anchors ^ $ \\b \\A \\Z")

    def _lookaround(self, value: Any, negated: bool, state: int, flags: int) -> int:
        direction, items = value
        low, high = items.getwidth()
        # The automaton of a lookaround counts among the states of its pattern.
        states, start = _Compiler(flags).compile(items, "match")
        for _ in states.kinds:
            self._state(_JOIN)
        if direction < 0 and low != high:
            raise _Refused("a lookbehind needs a fixed width", "a pattern without it")
        kind = "ahead" if direction > 0 else "behind"
        found = _Assertion(kind, negated, states, start, int(low))
        return self._after(state, self._state(_ASSERT, found))


# Characters.


def _any_char(char: str) -> bool:
    return True


def _no_char(char: str) -> bool:
    return False


def _not_newline(char: str) -> bool:
    return char != "\n"


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _is_ascii_word(char: str) -> bool:
    return char.isascii() and _is_word(char)


def _is_ascii_space(char: str) -> bool:
    return char in " \t\n\r\f\v"


def _is_ascii_digit(char: str) -> bool:
    return "0" <= char <= "9"


_CATEGORIES: dict[Any, tuple[Test, Test, bool]] = {
    sre.CATEGORY_DIGIT: (str.isdecimal, _is_ascii_digit, False),
    sre.CATEGORY_NOT_DIGIT: (str.isdecimal, _is_ascii_digit, True),
    sre.CATEGORY_SPACE: (str.isspace, _is_ascii_space, False),
    sre.CATEGORY_NOT_SPACE: (str.isspace, _is_ascii_space, True),
    sre.CATEGORY_WORD: (_is_word, _is_ascii_word, False),
    sre.CATEGORY_NOT_WORD: (_is_word, _is_ascii_word, True),
}


class _CharSet:
    """Characters of a class: equal sets are equal, so that one character is tested once for all patterns."""

    __slots__ = ("_hash", "key")

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key
        self._hash = hash(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CharSet) and self.key == other.key

    def __call__(self, char: str) -> bool:
        negated, ignore_case, ascii_only, items = self.key
        chars = {char, char.lower(), char.upper()} if ignore_case else (char,)
        return any(_in_items(items, each, ascii_only) for each in chars) is not negated


def _in_items(items: tuple[tuple[str, Any, Any], ...], char: str, ascii_only: bool) -> bool:
    code = ord(char) if len(char) == 1 else -1
    for kind, low, high in items:
        if kind == "range":
            if low <= code <= high:
                return True
        else:
            everywhere, ascii_test, negated = _CATEGORIES[low]
            if len(char) == 1 and (ascii_test if ascii_only else everywhere)(char) is not negated:
                return True
    return False


def _char_test(op: Any, value: Any, flags: int) -> Test | None:
    """The test of one character, or None where the item is not one."""
    if op is sre.ANY:
        return _any_char if flags & re.DOTALL else _not_newline
    ignore_case, ascii_only = bool(flags & re.IGNORECASE), bool(flags & re.ASCII)
    negated = False
    if op in (sre.LITERAL, sre.NOT_LITERAL):
        negated = op is sre.NOT_LITERAL
        items = [("range", value, value)]
    elif op is sre.CATEGORY:
        items = [("category", value, None)]
    elif op is sre.IN:
        items = []
        for item_op, item in value:
            if item_op is sre.NEGATE:
                negated = True
            elif item_op is sre.LITERAL:
                items.append(("range", item, item))
            elif item_op is sre.RANGE:
                items.append(("range", item[0], item[1]))
            elif item_op is sre.CATEGORY:
                items.append(("category", item, None))
            else:
                raise _Refused(
                    f"{str(item_op).lower()} is not supported in a class", "characters, ranges and \\d \\s \\w"
                )
    else:
        return None
    return _CharSet((negated, ignore_case, ascii_only, tuple(items)))
