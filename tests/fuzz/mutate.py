# SPDX-License-Identifier: Apache-2.0
"""Changes of bytes and of JSON values by a seeded generator: the same seed gives the same input on every host."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

__all__ = ["changed_bytes", "changed_json", "text"]

#: Values that parsers and arithmetic stumble over.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 4, 8, 16, 127, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308),
    *("", "0", ".", "..", "a" * 600, "." * 600, "\x1b[31m", "\n", "\ud83d\ude00", "re:", "re:.*", "-:", "re:(?!a)"),
    *("weight", "lm_head", "Linear", "W8A8", "FLOAT", "float", "int", "group", "channel", "tensor", "I8", "F8_E4M3"),
    *([], {}, [[]], {"": {}}, [None], [0, 0], [128, 128], [2**40, 2**40], {"weights": None}, {"layers": ["a", "b"]}),
)
#: Pieces of names and of regular expressions.
_PIECES = (
    *(
        "model",
        "layers",
        "0",
        "17",
        "mlp",
        "experts",
        "gate_proj",
        "up_proj",
        "down_proj",
        "self_attn",
        "qkv",
        "weight",
    ),
    *("weight_scale", "qweight", "scales", "g_idx", "lm_head", "bias", ".", ".", ".", "..", "*", ".*", "+", "?", "{2}"),
    *(
        "{,3}",
        "(",
        ")",
        "(?:",
        "(?!",
        "(?<=",
        "(?i)",
        "(?P<a>",
        "|",
        "[",
        "]",
        "[^a",
        "\\",
        "\\d",
        "\\b",
        "\\1",
        "^",
        "$",
    ),
    *("a{1000}", "x" * 200, "\x00", "é", " "),
)
_BYTES = (
    b"",
    b"\0",
    b"\xff",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"0",
    b"1e999",
    b"NaN",
    b"\\ud800",
)


def text(random: Random) -> str:
    """A name, a pattern, or neither."""
    return "".join(random.choices(_PIECES, k=random.randint(0, 9)))


def value(random: Random) -> Any:
    """Any JSON value."""
    kind = random.random()
    if kind < 0.6:
        return copy.deepcopy(random.choice(_VALUES))
    if kind < 0.8:
        return text(random)
    if kind < 0.9:
        return [value(random) for _ in range(random.randint(0, 3))]
    return {text(random): value(random) for _ in range(random.randint(0, 3))}


def changed_json(original: Any, random: Random) -> Any:
    """A copy with one to four values, keys or parts changed, removed, doubled or exchanged."""
    result = copy.deepcopy(original)
    for _ in range(random.randint(1, 4)):
        places = list(_places(result))
        if not places:
            return value(random)
        holder, key = random.choice(places)
        how = random.randrange(5)
        if how == 0:
            holder[key] = value(random)
        elif how == 1:
            del holder[key]
        elif how == 2 and isinstance(holder, dict):
            holder[text(random)] = holder.pop(key)
        elif how == 3:
            other, other_key = random.choice(places)
            if not _holds(holder[key], other) and not _holds(
                other.get(other_key) if isinstance(other, dict) else 0, holder
            ):
                holder[key] = copy.deepcopy(other[other_key])
        elif isinstance(holder, dict):
            holder[text(random)] = value(random)
        else:
            holder.append(value(random))
    return result


def _places(node: Any) -> Any:
    """Every (container, key) of a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from _places(node[key])


def _holds(node: Any, inner: Any) -> bool:
    return node is inner or any(container is inner for container, _ in _places(node))


def changed_bytes(original: bytes, random: Random) -> bytes:
    """A copy with one to eight bytes or runs changed, removed, doubled, cut off or exchanged."""
    content = bytearray(original)
    for _ in range(random.randint(1, 8)):
        at = random.randrange(len(content) + 1)
        length = random.choice((1, 1, 2, 4, 8, 64))
        how = random.randrange(6)
        if how == 0:
            content[at : at + length] = random.randbytes(length)
        elif how == 1:
            del content[at : at + length]
        elif how == 2:
            content[at:at] = content[at : at + length] * random.choice((1, 2, 50))
        elif how == 3:
            content[at:at] = random.choice(_BYTES)
        elif how == 4 and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif random.random() < 0.1:
            del content[at:]
    return bytes(content)
