# SPDX-License-Identifier: Apache-2.0
"""Writes a float Hugging Face model as a ModelSlim checkpoint, with the files and bytes that msModelSlim 26.1 writes.

    python examples/modelslim_writer.py MODEL_DIR OUT_DIR --scheme W8A8_DYNAMIC

The weights are rounded to nearest, one scale per output channel: msModelSlim's "minmax", symmetric, "per_channel".
Only schemes that need no calibration: W8A8_DYNAMIC (activations are quantized per token while the model runs) and W8A16
(activations stay float). Norms, embeddings, the head, MoE routers and MLA's kv_b_proj stay float. ``--smooth`` moves
outliers of the activations into the weights first, which W8A8 of a real model needs: see smoothing.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from artifacts import build_once
from quantize import quantize_per_channel
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors_stream import SafetensorsStream, TensorSpec
from smoothing import smooth

__all__ = ["KEEP_FLOAT", "SCHEMES", "write_modelslim"]

#: The types that may be asked for. Both have the same tensors; the type says what happens to the activations.
SCHEMES = ("W8A8_DYNAMIC", "W8A16")

#: Modules (shell patterns) that stay float, as in msModelSlim's own recipes.
KEEP_FLOAT = ("*lm_head", "*embed_tokens", "*mlp.gate", "*mlp.shared_expert_gate", "*kv_b_proj")

#: msModelSlim starts a new weight file at this size.
PART_BYTES = 4 << 30

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.gguf")


#: (name, tensor) -> tensor.
Edit = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Source:
    """One tensor of the float model."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    quantize: bool

    def outputs(self) -> list[TensorSpec]:
        if not self.quantize:
            return [TensorSpec(self.name, self.dtype, self.shape)]
        rows = (self.shape[0], 1)
        return [
            TensorSpec(self.name, torch.int8, self.shape),
            TensorSpec(f"{self.name}_scale", torch.float32, rows),
            TensorSpec(f"{self.name}_offset", torch.float32, rows),
        ]


def write_modelslim(
    source: Path,
    target: Path,
    scheme: str = "W8A8_DYNAMIC",
    *,
    keep_float: Sequence[str] = KEEP_FLOAT,
    part_bytes: int = PART_BYTES,
    like_producer: bool = False,
    edit: Edit | None = None,
) -> Path:
    """Quantize the model in ``source`` into ``target``, unless ``target`` exists; returns ``target``.

    Args:
        source: a Hugging Face folder with safetensors weights in float32, bfloat16 or float16.
        target: the folder to make. It appears when it is complete and not before.
        scheme: one of SCHEMES.
        keep_float: shell patterns of module names that are not quantized.
        part_bytes: size at which a new weight file is begun.
        like_producer: round as coarsely as msModelSlim does; the weight file is then byte for byte the one that it
            writes.
        edit: given every name and float tensor, returns the tensor to quantize or write in its place, of the same
            shape; for example ``smoothing.smooth(source)``.

    Raises:
        ValueError: for an unknown scheme, a source that is quantized already or weights that are not finite.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")

    def build(unfinished: Path) -> None:
        _write(source, unfinished, scheme, keep_float, part_bytes, like_producer, edit or _unchanged)

    return build_once(target, build)


def _write(
    source: Path, target: Path, scheme: str, keep_float: Sequence[str], part_bytes: int, like_producer: bool, edit: Edit
) -> None:
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" in config:
        raise ValueError(f"{source} is quantized already; the writer needs the float model")
    tensors = _read_headers(source, keep_float)
    if config.get("tie_word_embeddings") and not any(tensor.name == "lm_head.weight" for tensor in tensors):
        # msModelSlim unties: the head is written as well, a copy of the embedding.
        embedding = next(tensor for tensor in tensors if tensor.name.endswith("embed_tokens.weight"))
        tensors.append(_Source("lm_head.weight", embedding.file, embedding.dtype, embedding.shape, False))
        tied = {"lm_head.weight": embedding.name}
    else:
        tied = {}
    tensors.sort(key=lambda tensor: _producer_order(tensor.name))

    parts = _parts(tensors, part_bytes)
    weight_map: dict[str, str] = {}
    types: dict[str, str] = {}
    total = 0
    console = Console(stderr=True)
    todo = [(number, tensor) for number, part in enumerate(parts, 1) for tensor in part]
    progress = iter(track(todo, f"quantize to {scheme}", console=console, disable=not console.is_terminal))
    for number, part in enumerate(parts, 1):
        file = f"quant_model_weights-{number:05d}-of-{len(parts):05d}.safetensors"
        outputs = [spec for tensor in part for spec in tensor.outputs()]
        with SafetensorsStream(target / file, outputs) as stream:
            for tensor in part:
                next(progress)
                with safe_open(tensor.file, framework="pt") as handle:
                    weight = edit(tensor.name, handle.get_tensor(tied.get(tensor.name, tensor.name)))
                _quantize_into(stream, tensor, weight, tensor.dtype if like_producer else torch.float32)
        for tensor in part:
            for spec in tensor.outputs():
                weight_map[spec.name] = file
                types[spec.name] = scheme if tensor.quantize else "FLOAT"
                total += spec.nbytes
    next(progress, None)  # lets the bar reach its end

    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index, indent=2))
    description = {
        **types,
        "version": "1.0.0",
        "model_quant_type": scheme,
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    (target / "quant_model_description.json").write_text(json.dumps(description, indent=4))
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)


def _unchanged(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _quantize_into(stream: SafetensorsStream, tensor: _Source, weight: torch.Tensor, dtype: torch.dtype) -> None:
    if not tensor.quantize:
        stream.write(tensor.name, weight)
        return
    try:
        values, scale = quantize_per_channel(weight, dtype)
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}") from None
    stream.write(tensor.name, values)
    stream.write(f"{tensor.name}_scale", scale)
    stream.write(f"{tensor.name}_offset", torch.zeros_like(scale))


def _read_headers(source: Path, keep_float: Sequence[str]) -> list[_Source]:
    """Every tensor of the model, from the headers alone."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({source / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [source / "model.safetensors"]
    tensors = []
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                part = handle.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _FLOATS:
                    raise ValueError(f"{name} in {file} is {dtype}; the writer needs the float model")
                shape = tuple(part.get_shape())
                module, _, last = name.rpartition(".")
                linear = last == "weight" and len(shape) == 2
                quantize = linear and not any(fnmatchcase(module, pattern) for pattern in keep_float)
                tensors.append(_Source(name, file, _FLOATS[dtype], shape, quantize))
    return tensors


def _parts(tensors: Sequence[_Source], part_bytes: int) -> list[list[_Source]]:
    parts: list[list[_Source]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = sum(spec.nbytes for spec in tensor.outputs())
        if parts[-1] and size + nbytes > part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += nbytes
    return parts


# The order of the names means nothing to a reader. Following the producer's makes two files comparable with diff.
_MODULE_ORDER = (
    *("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    *("gate", "experts", "shared_experts", "gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "norm", "lm_head", "weight", "bias"),
)
_MODULE_RANK = {name: rank for rank, name in enumerate(_MODULE_ORDER)}


def _producer_order(name: str) -> tuple[object, ...]:
    """Layers by number and, inside one, in the order of the model's modules; then what belongs to no layer."""
    in_layer = re.search(r"\.layers\.\d+\.", name) is not None
    parts = name.removeprefix("model.").split(".")
    ranks = tuple(
        (0, int(part), "") if part.isdigit() else (1, _MODULE_RANK.get(part, len(_MODULE_RANK)), part) for part in parts
    )
    return (not in_layer, ranks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a float model as a ModelSlim checkpoint.")
    parser.add_argument("source", type=Path, help="Hugging Face folder with float safetensors weights")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0])
    parser.add_argument(
        "--keep-float", nargs="*", default=KEEP_FLOAT, metavar="PATTERN", help="modules that are not quantized"
    )
    parser.add_argument("--smooth", action="store_true", help="smooth the activations first, as smoothing.py says")
    options = parser.parse_args(arguments)
    if options.target.exists():
        parser.error(f"{options.target} exists")
    try:
        edit = smooth(options.source) if options.smooth else None
        write_modelslim(options.source, options.target, options.scheme, keep_float=options.keep_float, edit=edit)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
