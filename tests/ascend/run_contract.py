# SPDX-License-Identifier: Apache-2.0
"""Runs the contract's points against every release of vllm-ascend, and counts them (``make ascend-contract``).

    python tests/ascend/run_contract.py [RELEASE ...] [-- PYTEST ARGUMENTS]

Every release runs in an environment and a process of its own. Exits with 1 if a point fails, or if no point ran.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import tomllib

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment as environments

POINTS = ("points.py", "points_moe.py", "points_owners.py")


def install_metadata(folder: Path) -> None:
    """The distribution of this working tree as importlib.metadata sees an installed one: its entry points."""
    project = tomllib.loads((environments.ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "vllm_npu_quant-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))


def run(name: str, arguments: list[str]) -> tuple[int, int, int]:
    """(passed, skipped, failed) of one release."""
    environment = environments.make(environments.RELEASES[name])
    with tempfile.TemporaryDirectory() as scratch:
        install_metadata(Path(scratch))
        report = Path(scratch) / "report.xml"
        files = [str(environments.HERE / "contract" / points) for points in POINTS]
        command = [str(environment.python), "-m", "pytest", "-q", "-rs", "--no-header", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-p", "tests.ascend.contract.fixtures"]
        subprocess.run(
            [*command, f"--junitxml={report}", *files, *arguments],
            cwd=environments.ROOT,
            env=environment.variables(environments.ROOT, scratch),
            check=False,
        )
        if not report.is_file():
            return 0, 0, 1
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - failed - skipped, skipped, failed


def main() -> int:
    names, arguments = sys.argv[1:], []
    if "--" in names:
        cut = names.index("--")
        names, arguments = names[:cut], names[cut + 1 :]
    counts = {name: run(name, arguments) for name in names or environments.RELEASES}
    for name, (passed, skipped, failed) in counts.items():
        print(
            f"vllm-ascend {name}: {passed} contract points hold, {skipped} are skipped with a reason, {failed} are broken"
        )
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"vllm-ascend contract points: {total[0]} passed, {total[2]} failed, {total[1]} skipped")
    return 1 if total[2] or not total[0] else 0


if __name__ == "__main__":
    sys.exit(main())
