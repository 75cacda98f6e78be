# SPDX-License-Identifier: Apache-2.0
"""Who may import what: the walls of the house, in the sources and in fresh processes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.fixtures_index import fixture

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_npu_quant"

#: Parts (top-level modules or folders, or single modules of them) that import neither torch nor vllm, anywhere.
NO_TORCH = (
    "__init__",
    "_version",
    "plugin",
    "settings",
    "spec",
    "dispatch",
    "errors",
    "formats",
    "checkpoint",
    "layouts.tables",
    "inspection",
    "cli",
)
#: Parts that may import torch, and not vllm.
TORCH_ONLY = ("layouts", "methods", "emulation")
#: The doors to vLLM.
DOORS = ("engine", "platform", "ascend")


def modules() -> dict[str, Path]:
    """Every module of the package, by its name below the package: "formats.check", "__init__"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def part_of(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


@cache
def imports(path: Path) -> tuple[tuple[str, int, bool], ...]:
    """(module that is imported, line, whether it is imported when the file is) for every import of a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only: set[int] = set()
    inner: set[int] = set()
    found: list[tuple[str, int, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only.update(id(child) for statement in node.body for child in ast.walk(statement))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner.update(id(child) for child in ast.walk(node) if child is not node)
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports are not used in this package"
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, id(node) not in inner) for name in names]
    return tuple(found)


def imports_of(module: str, *wanted: str) -> list[str]:
    """Where a module of the package imports one of the wanted packages."""
    path = modules()[module]
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}" for name, line, _ in imports(path) if name.split(".")[0] in wanted
    ]


def test_every_module_is_seen() -> None:
    assert {"__init__", "plugin", "formats", "formats.check", "engine.config", "layouts.tables"} <= modules().keys()


def test_only_ascend_names_vllm_ascend_and_torch_npu() -> None:
    found = [
        hit
        for module in modules()
        if not part_of(module, ("ascend",))
        for hit in imports_of(module, "vllm_ascend", "torch_npu")
    ]
    assert not found


def test_vllm_has_two_doors() -> None:
    found = [hit for module in modules() if not part_of(module, DOORS) for hit in imports_of(module, "vllm")]
    assert not found


@pytest.mark.parametrize("part", NO_TORCH)
def test_no_torch_in_the_sources(part: str) -> None:
    found = [hit for module in modules() if part_of(module, (part,)) for hit in imports_of(module, "torch", "vllm")]
    assert not found


def test_the_entry_points_import_lazily() -> None:
    """plugin.py is imported in every vLLM process, on every host."""
    eager = {name for name, _, at_import in imports(modules()["plugin"]) if at_import and name.startswith("vllm_npu")}
    assert {".".join(name.split(".")[1:2]) for name in eager} == {"", "settings", "errors"}
    lazy = {name for name, _, at_import in imports(modules()["plugin"]) if not at_import}
    assert {name.split(".")[1] for name in lazy if name.startswith("vllm_npu_quant.")} == {"engine"}


def module_graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, in its functions too; not what is for type checkers only."""
    found = modules()
    graph: dict[str, set[str]] = {}
    for module, path in found.items():
        names = {(name.removeprefix("vllm_npu_quant."), line) for name, line, _ in imports(path)}
        # "from package import module" means the module, not what else the package brings.
        packages = {(name.rpartition(".")[0], line) for name, line in names if name in found}
        graph[module] = {name for name, _ in names - packages if name in found and name != module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The groups of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    return sorted(
        {
            tuple(sorted({start} | {other for other in seen if start in reached[other]}))
            for start, seen in reached.items()
            if start in seen
        }
    )


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"g"}, "g": {"e", "a"}}
    assert circles(graph) == [("b", "c"), ("e", "f", "g")]
    assert module_graph()["plugin"] == {"settings", "errors", "engine.environment", "engine.registration"}
    assert "formats.check" in module_graph()["engine.config"]


def test_no_module_imports_itself_through_others() -> None:
    assert circles(module_graph()) == []


def run_python(code: str, *arguments: str, env: dict[str, str] | None = None, **options: object) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        **options,  # type: ignore[arg-type]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


_IMPORT_ALL = """
import importlib, json, sys
loaded = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    for heavy in ("torch", "vllm", "torch_npu", "vllm_ascend", "transformers", "compressed_tensors"):
        if heavy in sys.modules:
            loaded.setdefault(heavy, name)
print(json.dumps(loaded))
"""


def full_names(parts: tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    names = [module for module in modules() if part_of(module, parts) and not part_of(module, but)]
    return [f"vllm_npu_quant.{name}" if name != "__init__" else "vllm_npu_quant" for name in names]


def test_importing_the_package_loads_neither_torch_nor_vllm() -> None:
    names = full_names(NO_TORCH)
    assert len(names) > 15
    # Heavy module -> the first module of ours that brought it.
    assert json.loads(run_python(_IMPORT_ALL, *names)) == {}


def test_layouts_methods_and_operators_load_torch_and_not_vllm() -> None:
    names = full_names(TORCH_ONLY)
    assert len(names) > 10
    assert json.loads(run_python(_IMPORT_ALL, *names)).keys() == {"torch"}


# A config object travels to spawned processes, which unpickle it before they run plugins.

_PICKLE = """
import json, pickle, sys
from tests.configs import config_of_format
from vllm_npu_quant.checkpoint import TensorInfo
from vllm_npu_quant.formats.modelslim import read
from vllm_npu_quant.formats.resolve import LayerResolver

folder, out, synthetic = sys.argv[1:]
config = config_of_format("modelslim")()
config.maybe_update_config(folder)
open(out, "wb").write(pickle.dumps(config))

big = config_of_format("modelslim")()
types = json.load(open(synthetic))
stored = {"weight": ("I8", (256, 256)), "weight_scale": ("F32", (256, 1)), "weight_offset": ("F32", (256, 1))}
tensors = {}
for name, kind in types.items():
    dtype, shape = ("BF16", (256,)) if kind == "FLOAT" else stored[name.rpartition(".")[2]]
    tensors[name] = TensorInfo(name, dtype, shape, "a", 0, 0)
big.described = read(types, tensors)
assert not big.described.findings, big.described.findings[0].render()
big.resolver = LayerResolver(big.described)
print(json.dumps([len(pickle.dumps(big)), len(list(big.described.layer_names()))]))
"""

# transformers imports torch_npu where there is one; nobody else may.
_WHO_IMPORTS = """
import sys
frame = sys._getframe(1)
while "importlib" in frame.f_code.co_filename:
    frame = frame.f_back
sys.importers_of_fakes = [*getattr(sys, "importers_of_fakes", ()), frame.f_code.co_filename]
"""

_UNPICKLE = """
import json, pickle, sys
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
import vllm.plugins
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
resolved = config.resolver.resolve("model.layers.0.self_attn.qkv_proj")
print(json.dumps({
    "importers": [file for file in getattr(sys, "importers_of_fakes", ()) if "transformers" not in file],
    "plugins": vllm.plugins.plugins_loaded,
    "registered": "modelslim" in QUANTIZATION_METHODS,
    "name": config.get_name(),
    "scheme": resolved.spec.scheme,
    "shards": resolved.shards,
}))
"""


def deepseek_r1_description() -> dict[str, str]:
    """A description of DeepSeek-R1's size: 61 layers, 256 routed experts in 58 of them."""
    types: dict[str, str] = {
        "model.embed_tokens.weight": "FLOAT",
        "model.norm.weight": "FLOAT",
        "lm_head.weight": "FLOAT",
    }

    def linear(name: str, kind: str) -> None:
        types.update({f"{name}.{tensor}": kind for tensor in ("weight", "weight_scale", "weight_offset")})

    for number in range(61):
        layer = f"model.layers.{number}"
        for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
            linear(f"{layer}.self_attn.{part}", "W8A8_DYNAMIC")
        types[f"{layer}.self_attn.kv_b_proj.weight"] = "FLOAT"
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_a_layernorm",
            "self_attn.kv_a_layernorm",
        ):
            types[f"{layer}.{norm}.weight"] = "FLOAT"
        places = [f"{layer}.mlp"]
        if number >= 3:
            types[f"{layer}.mlp.gate.weight"] = types[f"{layer}.mlp.gate.e_score_correction_bias"] = "FLOAT"
            places = [f"{layer}.mlp.shared_experts", *(f"{layer}.mlp.experts.{expert}" for expert in range(256))]
        for place in places:
            for part in ("gate_proj", "up_proj", "down_proj"):
                linear(f"{place}.{part}", "W8A8_DYNAMIC")
    return types


@cache
def _pickled(folder: Path) -> tuple[int, int]:
    synthetic = folder / "description.json"
    synthetic.write_text(json.dumps(deepseek_r1_description()))
    name = fixture("msmodelslim-qwen3-w8a8-dynamic")
    size, layers = json.loads(run_python(_PICKLE, str(name), str(folder / "config.pickle"), str(synthetic)))
    return size, layers


@pytest.fixture(scope="module")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickles")
    _pickled(folder)
    return folder


def test_a_config_unpickles_in_a_process_without_plugins(pickles: Path, tmp_path: Path) -> None:
    for name in ("torch_npu", "vllm_ascend"):
        (tmp_path / f"{name}.py").write_text(_WHO_IMPORTS)
    found = json.loads(run_python(_UNPICKLE, str(pickles / "config.pickle"), env={"PYTHONPATH": str(tmp_path)}))
    assert found == {
        "importers": [],
        "plugins": False,
        "registered": False,
        "name": "modelslim",
        "scheme": "W8A8_DYNAMIC",
        "shards": [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"],
    }


def test_the_pickle_of_a_deepseek_r1_is_small(pickles: Path) -> None:
    assert len(deepseek_r1_description()) > 134_000
    size, layers = _pickled(pickles)
    assert layers > 61 * 8
    assert size < 1_000_000
