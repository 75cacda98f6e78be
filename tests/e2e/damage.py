# SPDX-License-Identifier: Apache-2.0
"""Copies of test checkpoints in which something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.e2e.twins import read_tensors
from tests.fixtures_index import fixture

__all__ = ["DESCRIPTION", "WEIGHTS", "Copy", "Damage"]

DESCRIPTION = "quant_model_description.json"
WEIGHTS = "model.safetensors"

Damage = Callable[["Copy"], object]


class Copy:
    """A ModelSlim checkpoint in memory, to be damaged and written.

    Attributes:
        tensors, description, config: what is written.
        parts: names of the weight files that the tensors are spread over, in turn; one by default.
        index: whether an index is written.
        after: damages to the written folder.
    """

    def __init__(self, name: str) -> None:
        self.source = fixture(name)
        self.tensors = read_tensors(self.source)
        self.description = json.loads(next(self.source.glob("quant_model_description*.json")).read_text())
        self.config = json.loads((self.source / "config.json").read_text())
        self.parts = [WEIGHTS]
        self.index = False
        self.after: list[Callable[[Path], object]] = []

    def delete(self, *names: str) -> None:
        """Tensors that the files no longer hold."""
        for name in names:
            del self.tensors[name]

    def forget(self, *prefixes: str) -> None:
        """Tensors that the description no longer lists."""
        gone = [key for key in self.description if key.startswith(prefixes)]
        assert gone
        for key in gone:
            del self.description[key]

    def rename(self, old: str, new: str, *, described: bool = False) -> None:
        self.tensors[new] = self.tensors.pop(old)
        if described:
            self.description[new] = self.description.pop(old)

    def change(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.tensors[name] = change(self.tensors[name]).contiguous()

    def describe(self, prefix: str, kind: object) -> None:
        """Give every tensor of a layer another type."""
        for key in self.description:
            if key.startswith(prefix):
                self.description[key] = kind

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / name).symlink_to(self.source / name)
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / DESCRIPTION).write_text(json.dumps(self.description))
        names = sorted(self.tensors)
        weight_map = {name: self.parts[i % len(self.parts)] for i, name in enumerate(names)}
        for part in self.parts:
            held = {name: self.tensors[name] for name in names if weight_map[name] == part}
            save_file(held, folder / part, metadata={"format": "pt"})
        if self.index:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for damage in self.after:
            damage(folder)
        return folder
