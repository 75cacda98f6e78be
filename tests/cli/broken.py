# SPDX-License-Identifier: Apache-2.0
"""Broken checkpoints, made from real ones: a folder is copied, one thing is changed, and what must be found is known."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fixtures_index import fixture

__all__ = ["CASES", "Case", "Folder"]


class Folder:
    """A checkpoint folder that may be changed: its JSON files, and the tensors of its one weight file."""

    def __init__(self, source: str, target: Path) -> None:
        self.path = target
        shutil.copytree(fixture(source), target)
        (self.weights,) = target.glob("*.safetensors")
        content = self.weights.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        data = content[8 + length :]
        self.tensors: dict[str, tuple[str, list[int], bytes]] = {
            name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def write_json(self, name: str, value: Any) -> None:
        (self.path / name).write_text(json.dumps(value))

    def quantization(self, **changes: Any) -> None:
        """Change fields of config.json's quantization_config; None removes one."""
        config = self.json("config.json")
        for key, value in changes.items():
            config["quantization_config"][key] = value
            if value is None:
                del config["quantization_config"][key]
        self.write_json("config.json", config)

    def describe(self, **changes: str | None) -> None:
        """Change entries of the ModelSlim description; None removes one. Dots are written as __."""
        (name,) = (path.name for path in self.path.glob("quant_model_description*.json"))
        description = self.json(name)
        for key, value in changes.items():
            key = key.replace("__", ".")
            description[key] = value
            if value is None:
                del description[key]
        self.write_json(name, description)

    def save(self, name: str | None = None, tensors: dict[str, tuple[str, list[int], bytes]] | None = None) -> None:
        """Write the tensors as a safetensors file."""
        header, data = {}, b""
        for tensor, (dtype, shape, content) in (self.tensors if tensors is None else tensors).items():
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        text = json.dumps(header).encode()
        path = self.path / name if name else self.weights
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    def header(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the header of the weight file and leave the data alone."""
        content = self.weights.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        self.weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    def drop(self, name: str) -> None:
        del self.tensors[name]
        self.save()

    def rename(self, old: str, new: str) -> None:
        self.tensors = {new if name == old else name: value for name, value in self.tensors.items()}
        self.save()

    def retype(self, name: str, dtype: str, shape: list[int] | None = None) -> None:
        """Give a tensor another dtype of any width; its bytes are zeros then."""
        bits = {"I8": 8, "U8": 8, "F8_E4M3": 8, "BF16": 16, "F16": 16, "F32": 32, "I32": 32, "I64": 64, "F64": 64}[
            dtype
        ]
        _, own, _ = self.tensors[name]
        shape = own if shape is None else shape
        count = 1
        for size in shape:
            count *= size
        self.tensors[name] = (dtype, shape, bytes(count * bits // 8))
        self.save()

    def poke(self, name: str, content: bytes, at: int = 0) -> None:
        """Write bytes into a tensor."""
        dtype, shape, data = self.tensors[name]
        self.tensors[name] = (dtype, shape, data[:at] + content + data[at + len(content) :])
        self.save()

    def text(self, name: str, content: str | bytes) -> None:
        (self.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@dataclass(frozen=True)
class Case:
    """One broken checkpoint.

    Attributes:
        name: what is wrong. source: the fixture. change: breaks it. code: the finding that must come.
        layer: a part of the layer that it must name.
        options: of the check.
        severity: of that finding.
    """

    name: str
    source: str
    change: Callable[[Folder], object]
    code: str
    layer: str = ""
    options: dict[str, Any] | None = None
    severity: str = "error"


MS, MS_STATIC, MS_MOE = "msmodelslim-qwen3-w8a8-dynamic", "msmodelslim-qwen3-w8a8", "msmodelslim-qwen3moe-w8a8-dynamic"
CT, CT_PACKED, CT_FP8 = "ct-qwen3-w8a8-dynamic", "ct-qwen3-w4a16-g128-asym", "ct-qwen3-fp8-block"
AWQ, GPTQ, ACT, ROUND = (
    "awq-qwen3-autoawq-g128",
    "gptq-qwen3-w4g128-asym",
    "gptq-qwen3-gptqmodel-w4g32-sym-descact",
    "autoround-qwen3-mixed",
)
Q = "model.layers.0.self_attn.q_proj"
D = "model.layers.1.mlp.down_proj"
NAN_BF16, NAN_F32 = b"\xc0\x7f", b"\x00\x00\xc0\x7f"


def _group(folder: Folder, part: str, **changes: Any) -> None:
    config = folder.json("config.json")
    config["quantization_config"]["config_groups"]["group_0"][part].update(changes)
    folder.write_json("config.json", config)


def _offsets(folder: Folder, first: int = 0, second: int = 0) -> None:
    """Move the byte range of the second tensor of the header."""

    def change(header: dict[str, Any]) -> None:
        name = [key for key in header if key != "__metadata__"][1]
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + first, end + second]

    folder.header(change)


def _two_files(folder: Folder) -> None:
    name = next(iter(folder.tensors))
    folder.save("model-extra.safetensors", {name: folder.tensors[name]})


def _index(folder: Folder, entries: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    folder.write_json(name, {"metadata": {}, "weight_map": entries})


def _whole_index(folder: Folder, **changes: str) -> None:
    weight_map = dict.fromkeys(folder.tensors, folder.weights.name)
    _index(folder, weight_map | changes)


def _shards(folder: Folder, kept: int) -> None:
    """Two files by their names, of which ``kept`` are there, and no index."""
    names = list(folder.tensors)
    folder.weights.unlink()
    for number in range(kept):
        part = {name: folder.tensors[name] for name in names[number::2]}
        folder.save(f"model-{number + 1:05d}-of-00002.safetensors", part)


def _moved(folder: Folder, name: str, target: str) -> None:
    """A file goes elsewhere, and a link leads to it."""
    place = (folder.path / target).resolve()
    place.parent.mkdir(exist_ok=True)
    (folder.path / name).rename(place)
    (folder.path / name).symlink_to(place)


def _weights_inside(folder: Folder) -> None:
    (folder.path / "original").mkdir()
    folder.weights.rename(folder.path / "original" / folder.weights.name)


CASES: tuple[Case, ...] = (
    # ModelSlim: the description against the files
    Case("scale dropped", MS, lambda f: f.drop(Q + ".weight_scale"), "missing-tensor", Q),
    Case("offset dropped", MS, lambda f: f.drop(Q + ".weight_offset"), "missing-tensor", Q),
    Case("weight dropped", MS, lambda f: f.drop(Q + ".weight"), "missing-tensor", Q),
    Case("norm dropped", MS, lambda f: f.drop("model.norm.weight"), "missing-tensor", "model.norm"),
    Case("weight renamed", MS, lambda f: f.rename(D + ".weight", D + ".wieght"), "missing-tensor", D),
    Case("weight is float", MS, lambda f: f.retype(Q + ".weight", "BF16"), "wrong-dtype", Q),
    Case("scale is integer", MS, lambda f: f.retype(Q + ".weight_scale", "I32"), "wrong-dtype", Q),
    Case("scale too short", MS, lambda f: f.retype(Q + ".weight_scale", "F32", [8, 1]), "wrong-shape", Q),
    Case("weight has three dimensions", MS, lambda f: f.retype(Q + ".weight", "I8", [1, 256, 256]), "wrong-shape", Q),
    Case("float weight is stored as int8", MS, lambda f: f.retype("lm_head.weight", "I8"), "wrong-dtype", "lm_head"),
    Case(
        "one tensor of another type",
        MS,
        lambda f: f.describe(**{Q.replace(".", "__") + "__weight": "W8A16"}),
        "bad-config",
    ),
    Case(
        "all of a layer unknown",
        MS,
        lambda f: f.describe(
            **{f"{Q}.{name}".replace(".", "__"): "W7A7" for name in ("weight", "weight_scale", "weight_offset")}
        ),
        "unknown-scheme",
        Q,
    ),
    Case(
        "microscaling type",
        MS,
        lambda f: f.describe(
            **dict.fromkeys(
                (f"{Q}.{name}".replace(".", "__") for name in ("weight", "weight_scale", "weight_offset")),
                "W4A4_MXFP4_FLATQUANT",
            )
        ),
        "unsupported-scheme",
        Q,
    ),
    Case(
        "shards of qkv differ",
        MS,
        lambda f: f.describe(
            **{f"{Q}.{name}".replace(".", "__"): "W8A16" for name in ("weight", "weight_scale", "weight_offset")}
        ),
        "fused-shards-disagree",
        "qkv_proj",
    ),
    Case(
        "scale not described",
        MS,
        lambda f: f.describe(**{(Q + ".weight_scale").replace(".", "__"): None}),
        "missing-tensor",
    ),
    Case(
        "extra tensor described",
        MS,
        lambda f: f.describe(**{(Q + ".zzz").replace(".", "__"): "W8A8_DYNAMIC"}),
        "unexpected-tensor",
    ),
    Case(
        "tensor not described",
        MS,
        lambda f: (f.tensors.update({"model.extra.weight": ("F32", [2], bytes(8))}), f.save()),
        "unexpected-tensor",
        "model.extra",
        severity="warning",
    ),
    Case("type is a number", MS, lambda f: f.describe(**{(Q + ".weight").replace(".", "__"): 8}), "bad-config"),
    Case("group size is text", MS, lambda f: f.describe(group_size="many"), "bad-config"),
    Case(
        "quantized attention",
        MS,
        lambda f: f.describe(fa_quant_type="FAQuant"),
        "kv-cache-not-quantized",
        severity="warning",
    ),
    Case("static bias dropped", MS_STATIC, lambda f: f.drop(Q + ".quant_bias"), "missing-tensor", Q),
    Case(
        "static scale has two values", MS_STATIC, lambda f: f.retype(Q + ".input_scale", "F32", [2]), "wrong-shape", Q
    ),
    Case("static bias is float", MS_STATIC, lambda f: f.retype(Q + ".quant_bias", "F32"), "wrong-dtype", Q),
    Case("two descriptions", MS, lambda f: f.text("quant_model_description_w8a8.json", "{}"), "contradictory-evidence"),
    Case(
        "description and quantization_config",
        MS,
        lambda f: f.write_json(
            "config.json", {**f.json("config.json"), "quantization_config": {"quant_method": "awq"}}
        ),
        "contradictory-evidence",
        severity="warning",
    ),
    Case("description is a list", MS, lambda f: f.text("quant_model_description.json", "[]"), "unreadable-file"),
    Case("description ends early", MS, lambda f: f.text("quant_model_description.json", '{"a": '), "unreadable-file"),
    Case(
        "expert is missing",
        MS_MOE,
        lambda f: f.describe(
            **{
                f"model.layers.0.mlp.experts.3.up_proj.{name}".replace(".", "__"): None
                for name in ("weight", "weight_scale", "weight_offset")
            }
        ),
        "undescribed-layer",
        "model.layers.0.mlp.experts",
    ),
    Case(
        "expert differs",
        MS_MOE,
        lambda f: f.describe(
            **{
                f"model.layers.0.mlp.experts.3.up_proj.{name}".replace(".", "__"): "W8A16"
                for name in ("weight", "weight_scale", "weight_offset")
            }
        ),
        "fused-shards-disagree",
        "experts",
    ),
    Case(
        "expert's weight is missing",
        MS_MOE,
        lambda f: f.drop("model.layers.1.mlp.experts.7.down_proj.weight"),
        "missing-tensor",
        "experts.7",
    ),
    # compressed-tensors
    Case("no config groups", CT, lambda f: f.quantization(config_groups={}), "bad-config"),
    Case("config groups are a list", CT, lambda f: f.quantization(config_groups=[]), "bad-config"),
    Case("bits out of range", CT, lambda f: _group(f, "weights", num_bits=77), "bad-config"),
    Case("unknown strategy", CT, lambda f: _group(f, "weights", strategy="row"), "bad-config"),
    Case("unknown number type", CT, lambda f: _group(f, "weights", type="complex"), "bad-config"),
    Case("weight scale missing", CT, lambda f: f.drop(D + ".weight_scale"), "missing-tensor", D),
    Case("weight scale of a group", CT, lambda f: f.retype(D + ".weight_scale", "BF16", [256, 4]), "wrong-shape", D),
    Case("weight is uint8", CT, lambda f: f.retype(D + ".weight", "U8"), "wrong-dtype", D),
    Case("packed weight missing", CT_PACKED, lambda f: f.drop(D + ".weight_packed"), "missing-tensor", D),
    Case("zero points missing", CT_PACKED, lambda f: f.drop(D + ".weight_zero_point"), "missing-tensor", D),
    Case(
        "zero points not packed",
        CT_PACKED,
        lambda f: f.retype(D + ".weight_zero_point", "I32", [256, 4]),
        "wrong-shape",
        D,
    ),
    Case("group size 0", CT_PACKED, lambda f: _group(f, "weights", group_size=0), "bad-config"),
    Case(
        "FP8 scale has wrong blocks", CT_FP8, lambda f: f.retype(D + ".weight_scale", "BF16", [7, 3]), "wrong-shape", D
    ),
    Case("FP8 weight is int8", CT_FP8, lambda f: f.retype(D + ".weight", "I8"), "wrong-dtype", D),
    # AWQ, GPTQ, AutoRound
    Case("AWQ with 3 bits", AWQ, lambda f: f.quantization(bits=3), "unsupported-scheme"),
    Case("AWQ gemv", AWQ, lambda f: f.quantization(version="gemv"), "unsupported-scheme"),
    Case("AWQ without bits", AWQ, lambda f: f.quantization(bits=None), "bad-config"),
    Case("AWQ bits as text", AWQ, lambda f: f.quantization(bits="four"), "bad-config"),
    Case("AWQ group size of -7", AWQ, lambda f: f.quantization(group_size=-7), "bad-config"),
    Case("AWQ scales missing", AWQ, lambda f: f.drop(D + ".scales"), "missing-tensor", D),
    Case("AWQ zeros missing", AWQ, lambda f: f.drop(D + ".qzeros"), "missing-tensor", D),
    Case("AWQ weight of wrong dtype", AWQ, lambda f: f.retype(D + ".qweight", "I64"), "wrong-dtype", D),
    Case("AWQ wrong group size", AWQ, lambda f: f.quantization(group_size=64), "wrong-shape", ""),
    Case("AWQ group size 8", AWQ, lambda f: f.quantization(group_size=8), "operator-limit", ""),
    Case("GPTQ with 5 bits", GPTQ, lambda f: f.quantization(bits=5), "unsupported-scheme"),
    Case("GPTQ marlin", GPTQ, lambda f: f.quantization(checkpoint_format="marlin"), "unsupported-scheme"),
    Case("GPTQ weight missing", GPTQ, lambda f: f.drop(Q + ".qweight"), "missing-tensor", Q),
    Case("GPTQ unknown tensor", GPTQ, lambda f: f.rename(Q + ".g_idx", Q + ".h_idx"), "unexpected-tensor", Q),
    Case("GPTQ scales of a whole layer", GPTQ, lambda f: f.retype(Q + ".scales", "F16", [1, 256]), "wrong-shape", Q),
    Case(
        "GPTQ config and file beside it differ",
        GPTQ,
        lambda f: f.write_json("quantize_config.json", {"bits": 8, "group_size": 128, "sym": False, "desc_act": False}),
        "contradictory-evidence",
        "",
    ),
    Case("GPTQ act-order without g_idx", ACT, lambda f: f.drop(Q + ".g_idx"), "missing-tensor", Q),
    Case("AutoRound with 5 bits", ROUND, lambda f: f.quantization(bits=5), "unsupported-scheme"),
    Case("AutoRound data type", ROUND, lambda f: f.quantization(data_type="mx_fp"), "unsupported-scheme"),
    Case("AutoRound scales missing", ROUND, lambda f: f.drop(Q + ".scales"), "missing-tensor", Q),
    # Which format
    Case("unknown format", AWQ, lambda f: f.quantization(quant_method="nonsense"), "unknown-scheme"),
    Case("another runtime's format", AWQ, lambda f: f.quantization(quant_method="hqq"), "unsupported-scheme"),
    Case("format is a number", AWQ, lambda f: f.quantization(quant_method=7), "unknown-scheme"),
    Case("config.json is not JSON", AWQ, lambda f: f.text("config.json", "bits: 4"), "unreadable-file"),
    Case("config.json is binary", AWQ, lambda f: f.text("config.json", b"\xff\xfe\x00"), "unreadable-file"),
    Case("config.json is nested too deeply", AWQ, lambda f: f.text("config.json", "[" * 100_000), "unreadable-file"),
    Case("config.json has a key twice", AWQ, lambda f: f.text("config.json", '{"a": 1, "a": 2}'), "bad-config"),
    Case(
        "config.json is a folder",
        AWQ,
        lambda f: ((f.path / "config.json").unlink(), (f.path / "config.json").mkdir()),
        "unreadable-file",
    ),
    Case(
        "FP8 weights that no config mentions",
        CT_FP8,
        lambda f: f.write_json(
            "config.json", {k: v for k, v in f.json("config.json").items() if k != "quantization_config"}
        ),
        "bad-config",
    ),
    # Files
    Case("file cut off", CT, lambda f: f.weights.write_bytes(f.weights.read_bytes()[:-1000]), "bad-header"),
    Case("file longer", CT, lambda f: f.weights.write_bytes(f.weights.read_bytes() + b"x"), "bad-header"),
    Case("file empty", CT, lambda f: f.weights.write_bytes(b""), "bad-header"),
    Case(
        "header claims 10^9 bytes",
        CT,
        lambda f: f.weights.write_bytes(struct.pack("<Q", 10**9) + f.weights.read_bytes()[8:]),
        "bad-header",
    ),
    Case(
        "header is nested 10^5 deep",
        CT,
        lambda f: f.weights.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000),
        "bad-header",
    ),
    Case(
        "file is a web page",
        CT,
        lambda f: f.weights.write_bytes(b"<!DOCTYPE html><html></html>" + bytes(99)),
        "bad-header",
    ),
    Case(
        "file is an LFS pointer",
        CT,
        lambda f: f.weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "bad-header",
    ),
    Case("ranges overlap", CT, lambda f: _offsets(f, first=-2, second=-2), "bad-header"),
    Case("range has a hole", CT, lambda f: _offsets(f, first=2, second=2), "bad-header"),
    Case("range does not fit the shape", CT, lambda f: _offsets(f, second=-2), "bad-header"),
    Case("no weights", CT, lambda f: f.weights.unlink(), "unreadable-file"),
    Case("pickled weights", CT, lambda f: f.weights.rename(f.path / "pytorch_model.bin"), "unreadable-file"),
    Case("weights in a folder inside", CT, _weights_inside, "unreadable-file"),
    Case("a part is missing, without an index", CT, lambda f: _shards(f, 1), "index-mismatch"),
    Case("weights outside", CT, lambda f: _moved(f, f.weights.name, "../elsewhere/w"), "unreadable-file"),
    Case("config outside", CT, lambda f: _moved(f, "config.json", "../elsewhere/c"), "unreadable-file"),
    Case("description outside", MS, lambda f: _moved(f, "quant_model_description.json", "../x"), "unreadable-file"),
    Case(
        "index outside",
        CT,
        lambda f: (_whole_index(f), _moved(f, "model.safetensors.index.json", "../i")),
        "unreadable-file",
    ),
    Case(
        "integers that nothing declares",
        CT,
        lambda f: f.write_json("config.json", {**f.json("config.json"), "quantization_config": None}),
        "bad-config",
    ),
    Case(
        "packed integers that nothing declares",
        AWQ,
        lambda f: f.write_json("config.json", {**f.json("config.json"), "quantization_config": {}}),
        "bad-config",
    ),
    Case(
        "quantization_config is a list",
        CT,
        lambda f: f.write_json("config.json", {**f.json("config.json"), "quantization_config": []}),
        "bad-config",
    ),
    Case("config with a byte order mark", CT, lambda f: f.text("config.json", b"\xef\xbb\xbf{}"), "unreadable-file"),
    Case("config in UTF-16", CT, lambda f: f.text("config.json", "{}".encode("utf-16")), "unreadable-file"),
    Case("tensor in two files", CT, _two_files, "duplicate-tensor"),
    Case(
        "weights are a broken link",
        CT,
        lambda f: (f.weights.unlink(), f.weights.symlink_to("nowhere")),
        "unreadable-file",
    ),
    Case("index leaves the folder", CT, lambda f: _index(f, {"x": "../secret.safetensors"}), "index-mismatch"),
    Case("index with an absolute path", CT, lambda f: _index(f, {"x": "/etc/passwd"}), "index-mismatch"),
    Case(
        "index names a missing file",
        CT,
        lambda f: _whole_index(f, x="model-00002-of-00002.safetensors"),
        "index-mismatch",
    ),
    Case(
        "index names a missing tensor",
        CT,
        lambda f: _whole_index(f, **{"model.x.weight": f.weights.name}),
        "index-mismatch",
    ),
    Case("index without weight_map", CT, lambda f: f.write_json("model.safetensors.index.json", {}), "index-mismatch"),
    # Parallel sizes and chips
    Case("tp 3", CT, lambda f: None, "cannot-shard", options={"tp": 3}),
    Case("tp 64 cuts packed integers", AWQ, lambda f: None, "cannot-shard", options={"tp": 64}),
    Case("ep 3", MS_MOE, lambda f: None, "cannot-shard", options={"ep": 3}),
    Case("ep without experts", CT, lambda f: None, "cannot-shard", options={"ep": 2}, severity="warning"),
    Case("W8A8 dynamic on 310P", CT, lambda f: None, "unsupported-scheme", options={"device": "310p"}),
    Case(
        "bfloat16 on 310P", MS_STATIC, lambda f: None, "operator-limit", options={"device": "310p"}, severity="warning"
    ),
    # Values
    Case("scale is NaN", CT, lambda f: f.poke(D + ".weight_scale", NAN_BF16), "bad-value", D, {"values": True}),
    Case(
        "scale is infinite",
        MS,
        lambda f: f.poke(D + ".weight_scale", b"\x00\x00\x80\x7f"),
        "bad-value",
        D,
        {"values": True},
    ),
    Case(
        "scale is 0", CT, lambda f: f.poke(D + ".weight_scale", bytes(2)), "bad-value", D, {"values": True}, "warning"
    ),
    Case(
        "scale is denormal",
        AWQ,
        lambda f: f.poke(D + ".scales", b"\x01\x00"),
        "bad-value",
        D,
        {"values": True},
        "warning",
    ),
    Case(
        "offset is not 0",
        MS,
        lambda f: f.poke(D + ".weight_offset", b"\x00\x00\x80\x3f"),
        "bad-value",
        D,
        {"values": True},
    ),
    Case(
        "norm is NaN", CT, lambda f: f.poke("model.norm.weight", NAN_BF16), "bad-value", "model.norm", {"values": True}
    ),
    Case("FP8 weight is NaN", CT_FP8, lambda f: f.poke(D + ".weight", b"\x7f"), "bad-value", D, {"values": True}),
    Case(
        "int4 out of range",
        "msmodelslim-qwen3-w4a4-dynamic",
        lambda f: f.poke(D + ".weight", b"\x08"),
        "bad-value",
        D,
        {"values": True},
    ),
)
