# SPDX-License-Identifier: Apache-2.0
"""Lists of names in a config, such as ``modules_to_not_convert``, looked up in time that does not grow with the list.

A checkpoint has tens of thousands of layers, and an untrusted config hundreds of thousands of names: trying each name on
each layer would take hours.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["MAX_COMPONENTS", "MAX_PARTS", "LayerNames"]

#: Components of the longest name that is looked up. Real names have below 12.
MAX_COMPONENTS = 24
#: Names that are also tried as parts of a layer's name, character by character.
MAX_PARTS = 100


class LayerNames:
    """Names of layers, of modules that hold layers, or of the last components of layers.

    Attributes:
        untried: how many of the names ``within`` does not try as parts, because there are more than MAX_PARTS.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """
        Args:
            names: the entries of the config. Dots around a name do not count; empty names name nothing.
        """
        distinct = [name for name in dict.fromkeys(names) if name.strip(".")]
        self._by_length: dict[int, set[str]] = {}
        for name in distinct:
            whole = name.strip(".")
            length = whole.count(".") + 1
            if length <= MAX_COMPONENTS:
                self._by_length.setdefault(length, set()).add(whole)
        # Long lists are lists of full names, which have a layer's number among their components: general ones come first.
        distinct.sort(key=lambda name: any(map(str.isdecimal, name.split("."))))
        self._parts = tuple(distinct[:MAX_PARTS])
        self.untried = len(distinct) - len(self._parts)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def holds(self, layer: str) -> bool:
        """Whether a name is a run of whole components of the layer's name: "mlp.gate" of "model.mlp.gate", and not of
        "model.mlp.gate_proj".

        Takes at most MAX_COMPONENTS lookups for each component of the layer's name.
        """
        components = layer.split(".")
        return any(
            ".".join(components[start : start + length]) in names
            for length, names in self._by_length.items()
            for start in range(len(components) - length + 1)
        )

    def within(self, layer: str) -> bool:
        """Whether a name is anywhere in the layer's name: "mlp.gate" is in "model.mlp.gate_proj".

        Names of whole components are found in lists of any length; others are among the first MAX_PARTS, where names without
        numbers come first.
        """
        return any(part in layer for part in self._parts) or self.holds(layer)
