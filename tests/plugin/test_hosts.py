# SPDX-License-Identifier: Apache-2.0
"""What the plugin does to a vLLM process on different hosts. Each question is one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fixtures_index import fixture
from tests.plugin.hosts import Host, ascend_host, plain_vllm
from vllm_npu_quant.engine.patches import INTERNALS

ALL = {
    *("modelslim", "npu_awq", "npu_gptq", "npu_auto_round", "npu_compressed_tensors", "npu_fp8", "npu_modelopt"),
    *("npu_w8a8", "npu_w8a16", "npu_w4a16"),
}

_NAMES = f"""
OURS = {sorted(ALL)}
"""
_NAMES += """
def state():
    import torch
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.platforms import current_platform
    from vllm.engine.arg_utils import EngineArgs
    return {
        "platform": type(current_platform).__name__,
        "is_cpu": current_platform.is_cpu(),
        "emulated": getattr(current_platform, "npu_operators_emulated", False),
        "supported": list(current_platform.supported_quantization),
        "methods": [name for name in QUANTIZATION_METHODS if name in OURS],
        "operators": hasattr(torch.ops.npu, "npu_quant_matmul"),
        "norm": "RMSNorm" in op_registry_oot,
        "wrapped": hasattr(EngineArgs.create_model_config, "_npu_quant"),
    }

from vllm.plugins import load_general_plugins
load_general_plugins()
"""

_DETECT = """
import logging
logging.basicConfig(level=logging.INFO)  # vLLM configures its logging later, with the engine
answer = state()
from vllm.engine.arg_utils import EngineArgs
for name, folder in zip(("description", "awq", "float"), sys.argv[1:]):
    try:
        answer[name] = EngineArgs(folder).create_model_config().quantization
    except Exception as error:
        answer[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answer))
"""

_NONSENSE = """
answer = {"left out": state()}
os.environ["VLLM_NPU_QUANT"] = "maybe"
import vllm_npu_quant.plugin
vllm_npu_quant.plugin.register()
assert vllm_npu_quant.plugin.platform() is None
print(json.dumps({**answer, "nonsense": state()}))
"""

#: Takes away one internal of vLLM after another, before the plugin has registered anything, and puts it back.
_GONE = """
import logging
from importlib import import_module
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG as classes
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm_npu_quant import plugin

class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage() + " " + str(record.exc_info and record.exc_info[1]))

logging.getLogger("vllm.npu_quant").addHandler(Keep())
functions = lambda: (getattr(EngineArgs, "create_model_config", None), getattr(BaseModelLoader, "load_model", None))
answer = {}
for target in sys.argv[1:]:
    module, _, qualname = target.partition(":")
    *path, name = qualname.split(".")
    owner = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original, said = getattr(owner, name), []
    delattr(owner, name)
    before = functions()
    plugin.register()
    unwrapped = functions() == before
    claimed = [name for name in classes if name in OURS]
    setattr(owner, name, original)
    answer[target] = {**state(), "claimed": claimed, "unwrapped": unwrapped, "said": said}
plugin.register()
print(json.dumps({"gone": answer, "whole": state()}))
"""

_STATE = "print(json.dumps(state()))"

CHECKPOINTS = ("msmodelslim-qwen3-w8a8-dynamic", "awq-qwen3-autoawq-g128", "source-tiny-qwen3")


def detect(host: Host, **env: str) -> dict[str, Any]:
    return host.run(_NAMES + _DETECT, *(fixture(name) for name in CHECKPOINTS), **env)


def test_a_cpu_build(tmp_path: Path) -> None:
    found = detect(Host(tmp_path))
    assert found["platform"] == "NpuEmulationPlatform"
    assert found["is_cpu"]
    assert found["emulated"]
    # A list would refuse every name that is not in it.
    assert found["supported"] == []
    assert set(found["methods"]) == ALL
    assert found["operators"]
    assert found["norm"]
    assert [found[name] for name in ("description", "awq", "float")] == ["modelslim", "npu_awq", None]
    assert "is a ModelSlim checkpoint (quant_model_description.json): quantization=modelslim" in found["output"]


def test_switched_off_it_leaves_no_trace(tmp_path: Path) -> None:
    found = detect(Host(tmp_path), VLLM_NPU_QUANT="0")
    assert found["platform"] == "CpuPlatform"
    assert not found["methods"]
    assert not found["operators"]
    assert not found["norm"]
    assert not found["wrapped"]
    assert [found[name] for name in ("description", "awq", "float")] == [None, "awq", None]


def test_vllm_plugins_leaves_it_out_and_a_value_that_does_not_exist_is_logged(tmp_path: Path) -> None:
    found = Host(tmp_path).run(_NAMES + _NONSENSE, VLLM_PLUGINS="")
    for state in (found["left out"], found["nonsense"]):
        assert state["platform"] == "CpuPlatform"
        assert not state["methods"]
        assert not state["operators"]
        assert not state["wrapped"]
    assert "VLLM_NPU_QUANT must be auto, 1 or 0, not 'maybe'" in found["output"]
    assert "vllm-npu-quant could not be registered and stays off" in found["output"]


#: vLLM itself cannot log without its table of variables.
TARGETS = [entry.target for entry in INTERNALS if entry.required and not entry.target.startswith("vllm.envs:")]


def test_a_vllm_that_lacks_an_internal_gets_nothing_of_the_plugin(tmp_path: Path) -> None:
    """Claiming checkpoints without the check of what was loaded would serve incomplete ones."""
    assert "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model" in TARGETS
    found = Host(tmp_path).run(_NAMES + _GONE, *TARGETS, VLLM_PLUGINS="")
    for target in TARGETS:
        state = found["gone"][target]
        assert not state["methods"], target
        assert not state["claimed"], target
        assert not state["operators"], target
        assert not state["norm"], target
        assert not state["wrapped"], target
        assert state["unwrapped"], target
        (said,) = state["said"]
        assert "could not be registered and stays off" in said
        assert f"no {target.rpartition('.')[2].rpartition(':')[2]} in " in said
    # What was gone came back: nothing is left that keeps the plugin off.
    assert set(found["whole"]["methods"]) == ALL
    assert found["whole"]["wrapped"]


def test_the_general_plugin_alone_is_enough(tmp_path: Path) -> None:
    """With VLLM_TARGET_DEVICE=cpu, vLLM asks no out-of-tree platform."""
    found = detect(Host(tmp_path), VLLM_TARGET_DEVICE="cpu", VLLM_PLUGINS="npu_quant")
    assert found["platform"] == "CpuPlatform"
    assert set(found["methods"]) == ALL
    assert found["operators"]
    assert [found[name] for name in ("description", "awq", "float")] == ["modelslim", "npu_awq", None]


def test_an_ascend_host_keeps_its_platform_and_gets_the_formats(tmp_path: Path) -> None:
    found = ascend_host(tmp_path).run(_NAMES + _STATE)
    assert found["platform"] == "NPUPlatform"
    assert set(found["methods"]) == ALL
    # Methods that are not in the platform's list would be refused.
    assert set(found["supported"]) == {"ascend", "compressed-tensors"} | ALL
    # The operators are torch_npu's, and the norm is vllm-ascend's.
    assert not found["operators"]
    assert not found["norm"]


def test_a_host_with_neither_is_left_alone(tmp_path: Path) -> None:
    found = plain_vllm(tmp_path, "0.32.0").run(_NAMES + _STATE, VLLM_NPU_QUANT="1")
    assert found["platform"] == "UnspecifiedPlatform"
    assert not found["methods"]
    assert not found["operators"]
    assert not found["norm"]
    assert not found["wrapped"]
