# SPDX-License-Identifier: Apache-2.0
"""Readers of untrusted input, with inputs to start from: the configs, descriptions and headers of real checkpoints.

A target changes one of them and reads the result. It returns without a word, or raises for an input that breaks the promise
of the readers: findings and NpuQuantError, and no other exception.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from tests.fixtures_index import fixture
from tests.fuzz.mutate import changed_bytes, changed_json, text
from vllm_npu_quant.checkpoint import TensorInfo, parse_header, parse_json
from vllm_npu_quant.errors import Finding
from vllm_npu_quant.formats.check import check_checkpoint
from vllm_npu_quant.formats.declaration import formats
from vllm_npu_quant.formats.described import Described
from vllm_npu_quant.formats.detect import detect_files
from vllm_npu_quant.formats.patterns import PatternSet

__all__ = ["TARGETS"]

#: Real checkpoints of each format.
CORPUS = {
    "auto-round": ("autoround-qwen3-mixed", "autoround-qwen3-fp8block", "autoround-qwen3-w2g64"),
    "awq": ("awq-qwen3-autoawq-g128",),
    "compressed-tensors": ("ct-qwen3-fp8-block", "ct-qwen3-w4a16-g128-asym", "ct-qwen3-w8a8-dynamic"),
    "gptq": ("gptq-qwen3-gptqmodel-dynamic-mixed", "gptq-qwen3-gptqmodel-w4g32-sym-descact", "gptq-qwen3-w4g128-asym"),
    "modelslim": (
        "msmodelslim-qwen3moe-w8a8-dynamic",
        "msmodelslim-qwen3-w8a8-quarot",
        "msmodelslim-qwen3-w4a8-dynamic",
    ),
}
#: FP8's own config, over the tensors of a checkpoint that has them.
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "re:.*embed.*"],
}
PATTERNS = (
    "^(?!.*visual).*_proj$",
    ".*(?<!gate)_proj",
    r"model\.layers\.(0|1)\..*",
    "(?i).*MLP",
    "^(?:(?!a).)*$",
    "lm_head",
)
NAMES = ("lm_head", "model.layers.0.mlp.gate_proj", "model.visual.blocks.0.attn.qkv", "")


class _Headers:
    """A checkpoint of which only headers are known."""

    names = ("config.json", "quantize_config.json")
    has_values = False
    findings: tuple[Finding, ...] = ()

    def __init__(self, tensors: Mapping[str, TensorInfo], configs: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.configs = configs

    def read_json(self, name: str) -> Any:
        return self.configs.get(name, {})


@functools.cache
def _folder(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The config.json, the description and the header's JSON of a real checkpoint."""
    folder = fixture(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    beside = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("quant_model_description*.json"))
    ]
    (weights,) = folder.glob("*.safetensors")
    return config, (beside or [{}])[0], json.loads(_header(weights)[8:])


def _header(weights: Path) -> bytes:
    with weights.open("rb") as stream:
        prefix = stream.read(8)
        return prefix + stream.read(struct.unpack("<Q", prefix)[0])


def _tensors(header: Mapping[str, Any]) -> Mapping[str, TensorInfo]:
    content = json.dumps(header).encode()
    return parse_header(struct.pack("<Q", len(content)) + content, file="f", file_size=1 << 40).tensors


def _rendered(findings: tuple[Finding, ...] | list[Finding]) -> None:
    for finding in findings:
        shown = finding.render()
        if len(shown) > 20_000 or not all(line.isprintable() for line in shown.split("\n")):
            raise ValueError(f"a finding that is too long or not printable: {shown[:1000]!r}")


def read_header(random: Random) -> None:
    """Bytes of a header, or JSON in the form of one."""
    names = [name for group in CORPUS.values() for name in group]
    _, _, header = _folder(random.choice(names))
    kept = dict(random.sample(sorted(header.items()), min(6, len(header))))
    content = json.dumps(changed_json(kept, random) if random.random() < 0.5 else kept).encode("utf-8", "surrogatepass")
    content = struct.pack("<Q", len(content)) + content
    if random.random() < 0.5:
        content = changed_bytes(content, random)
    with suppress(ValueError):  # parse_header's, for content that ends before the header
        _rendered(
            parse_header(content, file="model.safetensors", file_size=random.choice((len(content), 1 << 40))).findings
        )


def read_json(random: Random) -> None:
    """Bytes of a JSON file."""
    config, description, _ = _folder(random.choice(CORPUS["modelslim"] + CORPUS["gptq"]))
    content = json.dumps(changed_json(random.choice((config, dict(list(description.items())[:20]))), random))
    parse_json(changed_bytes(content.encode("utf-8", "surrogatepass"), random), file="config.json")


def match_patterns(random: Random) -> None:
    """Patterns, and names that they are tried on."""
    patterns = [text(random) for _ in range(random.randint(0, 3))]
    start = random.choice(PATTERNS)
    patterns.append(changed_bytes(start.encode(), random).decode("latin-1") if random.random() < 0.5 else start)
    matcher = PatternSet(patterns, mode=random.choice(("match", "search", "fullmatch")))
    _rendered(matcher.findings)
    for name in (*NAMES, text(random)):
        matcher.matches(name)


def read_format(name: str, random: Random) -> None:
    """A format's config over a real checkpoint's headers, either of them changed."""
    source = random.choice(CORPUS.get(name, ("autoround-qwen3-fp8block",)))
    config, description, header = _folder(source)
    own = FP8 if name == "fp8" else description or config.get("quantization_config", {})
    tensors = _tensors(changed_json(header, random) if random.random() < 0.3 else header)
    if random.random() < 0.9:
        own = changed_json(own, random)
    declaration = next(one for one in formats() if one.name == name)
    if not isinstance(own, dict):
        return
    stored = _Headers(tensors, {"quantize_config.json": changed_json(own, random)})
    described = declaration.read(own, tensors, "config.json", stored if random.random() < 0.5 else None)  # type: ignore[arg-type]
    if not isinstance(described, Described):
        raise ValueError(f"{type(described).__name__} instead of a Described")
    declaration.producer(own)
    _rendered([*described.findings, *check_checkpoint(described, stored)])


def detect_format(random: Random) -> None:
    """The files of a checkpoint, by names and config.json."""
    config, description, _ = _folder(random.choice([name for group in CORPUS.values() for name in group]))
    files = {
        "config.json": changed_json(config, random),
        "quant_model_description.json": changed_json(description, random),
    }
    names = [name for name in files if random.random() < 0.7] + [text(random)]
    objects = {name: content if isinstance(content, dict) else {} for name, content in files.items()}
    detect_files(names, lambda name: objects.get(name, {}))


#: Each raises nothing but NpuQuantError, which ``run`` expects.
TARGETS: dict[str, Callable[[Random], None]] = {
    "header": read_header,
    "json": read_json,
    "patterns": match_patterns,
    "detect": detect_format,
    **{name: functools.partial(read_format, name) for name in (*CORPUS, "fp8")},
}
