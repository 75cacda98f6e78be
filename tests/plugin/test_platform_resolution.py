# SPDX-License-Identifier: Apache-2.0
"""Which platform vLLM resolves to, with real entry points of real distributions beside ours."""

from __future__ import annotations

import pytest

from tests.plugin.hosts import Host, ascend_host, plain_vllm, third_party

OURS = "vllm_npu_quant.platform.NpuEmulationPlatform"
CPU = "vllm.platforms.cpu.CpuPlatform"
NOBODY = "vllm.platforms.interface.UnspecifiedPlatform"
ASCEND = "vllm_ascend.platform.NPUPlatform"
GIZMO = "vllm_gizmo.platform.ThirdPlatform"

#: What is asked -> (other distributions on the host, environment, the platform or the error).
CASES: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "a CPU build": ((), {}, OURS),
    "auto": ((), {"VLLM_NPU_QUANT": "auto"}, OURS),
    "on": ((), {"VLLM_NPU_QUANT": "1"}, OURS),
    "off": ((), {"VLLM_NPU_QUANT": "0"}, CPU),
    "nonsense": ((), {"VLLM_NPU_QUANT": "maybe"}, CPU),
    "no plugins": ((), {"VLLM_PLUGINS": ""}, CPU),
    "our name in VLLM_PLUGINS": ((), {"VLLM_PLUGINS": "npu_quant"}, OURS),
    "another name in VLLM_PLUGINS": ((), {"VLLM_PLUGINS": "lora_filesystem_resolver"}, CPU),
    # Since vLLM 0.32, VLLM_TARGET_DEVICE=cpu leaves out every out-of-tree platform.
    "target device": ((), {"VLLM_TARGET_DEVICE": "cpu"}, CPU),
    "vllm-ascend": (("ascend",), {}, ASCEND),
    "vllm-ascend, and we are on": (("ascend",), {"VLLM_NPU_QUANT": "1"}, ASCEND),
    "vllm-ascend, and we are off": (("ascend",), {"VLLM_NPU_QUANT": "0"}, ASCEND),
    "vllm-ascend in VLLM_PLUGINS": (("ascend",), {"VLLM_PLUGINS": "ascend,npu_quant"}, ASCEND),
    # Theirs is filtered out by the user; we still do not take their host.
    "vllm-ascend not in VLLM_PLUGINS": (("ascend",), {"VLLM_PLUGINS": "npu_quant"}, CPU),
    # On a CPU build, a third party that answers is one too many; vLLM says so and names both.
    "a third party": (("gizmo",), {}, "error: Only one platform plugin can be activated: gizmo, npu_quant"),
    "a third party, and we are off": (("gizmo",), {"VLLM_NPU_QUANT": "0"}, GIZMO),
    "a third party in VLLM_PLUGINS": (("gizmo",), {"VLLM_PLUGINS": "gizmo"}, GIZMO),
    # Not because of us.
    "vllm-ascend and a third party": (
        ("ascend", "gizmo"),
        {},
        "error: Only one platform plugin can be activated: ascend, gizmo",
    ),
    "an accelerator's vLLM without its device": (("vllm 0.32.0",), {}, NOBODY),
    "the same, and we are on": (("vllm 0.32.0",), {"VLLM_NPU_QUANT": "1"}, NOBODY),
    "a CPU build under the name vllm": (("vllm 0.32.0+cpu",), {}, OURS),
    "a CUDA build": (("vllm 0.32.0+cu130",), {}, NOBODY),
}

_RESOLVE = """
import ast
from vllm import platforms

def resolve(case):
    hosts, env = case
    before = dict(os.environ)
    _hidden.clear()
    added = []
    for path, hidden in hosts:
        added.append(path)
        _hidden.update(hidden)
    sys.path[:0] = added
    os.environ.update(env)
    try:
        return platforms.resolve_current_platform_cls_qualname()
    except RuntimeError as error:
        text, _, names = str(error).partition(", but got: ")
        return f"error: {text}: {', '.join(sorted(ast.literal_eval(names)))}"
    finally:
        os.environ.clear()
        os.environ.update(before)
        del sys.path[:len(added)]

print(json.dumps({name: resolve(case) for name, case in json.load(open(sys.argv[1])).items()}))
"""


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All cases, in one process: platform resolution reads the environment and the metadata anew each time."""
    import json

    folder = tmp_path_factory.mktemp("hosts")
    hosts = {"ascend": ascend_host(folder / "ascend"), "gizmo": third_party(folder / "gizmo")}
    for version in ("0.32.0", "0.32.0+cpu", "0.32.0+cu130"):
        hosts[f"vllm {version}"] = plain_vllm(folder / version, version)
    cases = {
        name: ([(str(hosts[other].folder), hosts[other].hidden) for other in others], env)
        for name, (others, env, _) in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    return Host(folder / "empty").run(_RESOLVE, folder / "cases.json")


@pytest.mark.parametrize("case", CASES)
def test_platform(case: str, resolved: dict[str, str]) -> None:
    assert resolved[case] == CASES[case][2]
