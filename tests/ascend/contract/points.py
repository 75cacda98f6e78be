# SPDX-License-Identifier: Apache-2.0
"""The contract between vllm-ascend and a quantization plugin: each numbered point is a test, run in the real packages.

Run inside an environment of tests/ascend/environment.py (``make ascend-contract``), not by the suite of this project:
pytest finds nothing here by itself. docs/ascend_contract.md says for each point where both releases have it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import pickle
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ascend.contract.fixtures import model_of, modelslim
from tests.ascend.contract.world import FIXTURES, HOME, World

AWQ = "awq-qwen3-autoawq-g128"
STATIC = "msmodelslim-qwen3-w8a8"


def sources(package: str = "vllm_ascend") -> list[Path]:
    return sorted(Path(importlib.import_module(package).__file__).parent.rglob("*.py"))


def reads_of(name: str) -> dict[str, list[str]]:
    """attribute -> places, for every ``<something>.NAME.attribute`` in vllm-ascend that nothing guards."""
    found: dict[str, list[str]] = {}
    for path in sources():
        if "quantization" in path.parts:  # what its own config classes do with themselves
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            inner = node.value
            if (inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", None)) == name:
                found.setdefault(node.attr, []).append(f"{path.name}:{node.lineno}")
    return found


# -- plugins and platforms ------------------------------------------------------------------------------------------------


def test_platform_is_vllm_ascends_with_both_entry_points_installed(host: World) -> None:
    from importlib.metadata import entry_points

    names = {point.name for point in entry_points(group="vllm.platform_plugins")}
    assert {"ascend", "npu_quant"} <= names
    assert type(host.platform).__name__ == "NPUPlatform"
    from vllm_npu_quant.plugin import platform

    assert platform() is None


def test_the_pins_that_installing_is_tested_against_are_the_releases(host: World) -> None:
    from importlib.metadata import requires, version

    from packaging.requirements import Requirement

    from tests.ascend.pins import PINS

    exact = {}
    for text in requires("vllm-ascend") or ():
        requirement = Requirement(text)
        pins = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
        exact.update({requirement.name: pins[0]} if pins else {})
    assert exact == PINS[version("vllm-ascend")]


def test_methods_are_registered_under_our_names_and_admitted_by_the_platform(host: World) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    from vllm_npu_quant.engine.config import config_classes

    for config in config_classes():
        method = config.declaration.method_name
        assert get_quantization_config(method) is config
        assert host.platform.supported_quantization.count(method) == 1


def test_registering_again_changes_nothing(host: World) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import quantization

    from vllm_npu_quant import plugin

    def state() -> Any:
        return (
            list(quantization.QUANTIZATION_METHODS),
            list(host.platform.supported_quantization),
            EngineArgs.create_model_config,
        )

    before = state()
    plugin.register()
    importlib.import_module("vllm_npu_quant.engine.registration").register_all()
    assert state() == before


def test_registration_of_vllm_ascend_comes_after_ours_and_leaves_ours(host: World) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    host.platform.pre_register_and_update()
    assert get_quantization_config("npu_awq").__module__.startswith("vllm_npu_quant.")
    assert get_quantization_config("ascend").__module__.startswith("vllm_ascend.")
    assert get_quantization_config("compressed-tensors").__module__.startswith("vllm_ascend.")


@pytest.mark.parametrize(
    ("checkpoint", "asked", "expected"),
    [
        (AWQ, None, "npu_awq"),
        (AWQ, "awq", "npu_awq"),
        ("gptq-qwen3-gptqmodel-w4g128-asym", None, "npu_gptq"),
        ("gptq-qwen3-gptqmodel-w4g128-asym", "gptq", "npu_gptq"),
        ("autoround-qwen3-mixed", None, "npu_auto_round"),
        ("ct-qwen3-w4a16-g128-asym", None, "npu_compressed_tensors"),
        ("ct-qwen3-w4a16-g128-asym", "compressed-tensors", "npu_compressed_tensors"),
        ("ct-qwen3-fp8-block", None, "npu_compressed_tensors"),
        ("msmodelslim-qwen3-w4a8-dynamic", None, "modelslim"),
    ],
)
def test_who_serves_what_vllm_ascend_does_not(host: World, checkpoint: str, asked: str | None, expected: str) -> None:
    options = {} if asked is None else {"quantization": asked}
    config = host.engine_config(checkpoint, **options)
    assert config.model_config.quantization == expected
    assert config.quant_config.get_name() == expected


@pytest.mark.parametrize(
    ("checkpoint", "asked", "expected"),
    [
        ("msmodelslim-qwen3-w8a8-dynamic", None, "ascend"),
        ("msmodelslim-qwen3-w8a8-dynamic", "ascend", "ascend"),
        ("msmodelslim-qwen3-w8a8-dynamic", "modelslim", "modelslim"),
        ("ct-qwen3-w8a8-dynamic", None, "compressed-tensors"),
    ],
)
def test_auto_detection_leaves_what_vllm_ascend_serves(
    host: World, checkpoint: str, asked: str | None, expected: str
) -> None:
    config = host.engine_config(checkpoint, **({} if asked is None else {"quantization": asked}))
    assert config.model_config.quantization == expected
    ours = type(config.quant_config).__module__.startswith("vllm_npu_quant.")
    assert ours is (expected == "modelslim")


def test_schemes_that_we_leave_to_vllm_ascend_are_in_its_registry(host: World) -> None:
    from vllm_ascend.quantization.methods.registry import get_scheme_class

    from vllm_npu_quant.ascend import ownership

    assert ownership._registry() is get_scheme_class
    gone = {("W4A8_DYNAMIC per group", "moe")} if host.asks_method else set()
    assert {pair for pair in ownership.KNOWN if not ownership._serves(*pair)} == gone


def test_our_environment_variables_are_known_to_vllm(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    from vllm_npu_quant import settings

    monkeypatch.setenv(settings.W4A8, "w4a16")
    envs.validate_environ(hard_fail=True)
    assert envs.compile_factors()[settings.W4A8] == "w4a16"


def test_nothing_of_ours_has_touched_the_device(host: World) -> None:
    assert host.initialized_by_plugins is False
    from vllm_npu_quant.ascend.host import chip

    assert chip() == "a2"
    assert torch.npu.is_initialized() is False


# -- the config object: points 1 to 8 -------------------------------------------------------------------------------------


def test_01_quant_description_is_a_small_dict(host: World) -> None:
    config, model = model_of(host, AWQ)
    assert config.quant_config.quant_description == {}
    from vllm_ascend.ops.layernorm import AscendRMSNorm

    assert isinstance(model.model.norm, AscendRMSNorm)
    assert model.model.norm.bias is None


def test_01_norm_biases_go_to_vllm_ascends_norm(host: World) -> None:
    from safetensors.torch import load_file

    name = "msmodelslim-qwen3fp32-w8a8-normbias"
    config, model = modelslim(host, name)
    stored = load_file(next((FIXTURES / name).glob("*.safetensors")))
    biases = {key: value for key, value in stored.items() if key.endswith("norm.bias")}
    assert biases
    for key, value in biases.items():
        norm = model.get_submodule(key.removesuffix(".bias"))
        assert norm.bias_loaded
        assert torch.equal(norm.bias, value.to(norm.bias.dtype)), key
    assert set(config.quant_config.quant_description) == set(biases)


#: Attributes of their own config classes that vllm-ascend reads behind a check of their presence, or of another attribute
#: that says no for ours.
GUARDED = {
    "get_cache_scale": "behind callable(getattr(...))",
    "enabling_fa_quant": "behind enable_fa_quant",
    "get_kv_quant_dtype": "behind enable_fa_quant",
    "get_kv_quant_split_factor": "behind enable_fa_quant",
}


def test_02_attributes_that_vllm_ascend_reads_from_any_config_are_there(host: World) -> None:
    config, _ = model_of(host, AWQ)
    missing = {
        name: places
        for name, places in reads_of("quant_config").items()
        if not hasattr(config.quant_config, name) and name not in GUARDED
    }
    assert missing == {}
    assert config.quant_config.enable_fa_quant is False
    assert config.quant_config.enable_c8_quant is False
    assert config.quant_config.kvcache_quant_layers == [] == config.quant_config.c8_quant_layers


def test_03_cache_scales_are_vllms_business(host: World) -> None:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.models.utils import WeightsMapper

    config, _ = model_of(host, AWQ)
    assert isinstance(config.quant_config, QuantizationConfig)
    mapper = config.quant_config.get_cache_scale_mapper()
    assert mapper is None or isinstance(mapper, WeightsMapper)


def test_04_packed_modules_mapping_is_a_dict_of_its_own(host: World) -> None:
    first, _ = model_of(host, AWQ)
    second = host.engine_config(AWQ)
    assert isinstance(first.quant_config.packed_modules_mapping, dict)
    second.quant_config.packed_modules_mapping["x"] = ["y"]
    assert "x" not in first.quant_config.packed_modules_mapping


def test_05_no_name_of_ours_is_one_that_vllm_ascend_compares_with(host: World) -> None:
    from vllm_npu_quant.engine.config import config_classes

    compared = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and "get_name" in ast.dump(node.left):
                compared |= {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
    assert not compared & {config.declaration.method_name for config in config_classes()}


def test_06_get_quant_method_takes_tid2eid(host: World, moe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend's MoE layers pass it by keyword; 0.23 asks twice, 0.30 once."""
    config, model = moe
    experts = host.experts(model.model.layers[0].mlp)
    asked = []
    kind = type(config.quant_config)
    original = kind.get_quant_method

    def get_quant_method(self: Any, layer: Any, prefix: str, **more: Any) -> Any:
        asked.append(more)
        return original(self, layer, prefix, **more)

    monkeypatch.setattr(kind, "get_quant_method", get_quant_method)
    with host.current(config):
        method = (
            experts._get_quant_method(experts.layer_name, config.quant_config, experts.moe_config)
            if host.asks_method
            else config.quant_config.get_quant_method(experts, experts.layer_name, tid2eid=experts.tid2eid)
        )
    assert asked == [{"tid2eid": None}]
    assert type(method).__name__ == "NpuQuantMoEMethod"


def test_06_weights_of_experts_are_made_once_more_without_harm(host: World, moe: tuple[Any, Any]) -> None:
    """0.23 creates them for vLLM's layer and for its own; what was loaded is what the last of the two registered."""
    _, model = moe
    experts = host.experts(model.model.layers[0].mlp)
    names = {name for name, _ in experts.named_parameters() if name.startswith("w")}
    assert names == {"w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"}


def test_07_no_linear_layer_is_without_a_method(host: World, moe: tuple[Any, Any]) -> None:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    from vllm_npu_quant.engine.linear import NpuQuantLinearMethod

    seen = set()
    for name, module in moe[1].named_modules():
        if isinstance(module, LinearBase):
            assert isinstance(module.quant_method, NpuQuantLinearMethod | AscendUnquantizedLinearMethod), name
            seen.add(type(module.quant_method))
    assert seen == {NpuQuantLinearMethod, AscendUnquantizedLinearMethod}


def test_07_float_experts_get_vllm_ascends_method(host: World, moe: tuple[Any, Any]) -> None:
    from vllm_npu_quant.engine import platforms

    config, model = moe
    with host.current(config):
        method = platforms.unquantized_moe(host.experts(model.model.layers[0].mlp), "the table")
    assert type(method).__name__ == "AscendUnquantizedFusedMoEMethod"
    assert type(method).__module__.startswith("vllm_ascend.")
    assert method.tid2eid == "the table"


def test_07_float_embedding_and_head_are_left_to_vllm(host: World) -> None:
    _, model = model_of(host, AWQ)
    for module in (model.model.embed_tokens, model.lm_head):
        assert "Unquantized" in type(module.quant_method).__name__


def test_08_xlite_is_refused(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """xlite takes every model with a quant_config for its own W8A8."""
    from vllm_npu_quant.errors import NpuQuantError

    assert (
        "quant_config is not None"
        in Path(inspect.getfile(importlib.import_module("vllm_ascend.xlite"))).with_name("xlite.py").read_text()
    )
    from vllm_ascend.ascend_config import get_ascend_config

    config = host.engine_config(AWQ)
    monkeypatch.setattr(get_ascend_config().xlite_graph_config, "enabled", True)
    from vllm.model_executor.model_loader.utils import initialize_model

    with host.current(config), pytest.raises(NpuQuantError, match="xlite_graph_config"):
        initialize_model(vllm_config=config)


def test_config_is_small_and_is_unpickled_before_plugins_run(host: World) -> None:
    from tests.ascend.contract.processes import run_fresh

    config, _ = modelslim(host, HOME)
    data = pickle.dumps(config.quant_config)
    assert len(data) < 100_000
    code = (
        "import pickle, sys, json\n"
        "config = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "mapped = config.resolver is not None and config.described is not None\n"
        "import torch\n"
        "worker = [name for name in sys.modules if name.startswith('vllm_ascend.patch.worker')]\n"
        "print(json.dumps([type(config).__name__, mapped, worker, torch.npu.is_initialized()]))\n"
    )
    # vLLM's own modules bring the platform, and with it torch_npu; nothing brings what vllm-ascend patches in workers.
    assert run_fresh(code, data.hex()) == ["NpuModelslimConfig", True, [], False]


# -- linear methods: points 9 to 15 ---------------------------------------------------------------------------------------


def reference(method: Any, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return method.apply(layer, x, None if layer.skip_bias_add else layer.bias)


def test_09_apply_is_called_by_vllm_ascends_layers(host: World) -> None:
    """Column, row, merged and QKV layers of vllm-ascend with dequantized weights as the oracle."""
    _, model = model_of(host, AWQ)
    layer = model.model.layers[0].mlp.down_proj
    weight = awq_weight("model.layers.0.mlp.down_proj")
    x = torch.randn(5, weight.shape[0], dtype=torch.bfloat16)
    got = layer(x)[0]
    expected = x.float() @ weight
    assert (got.float() - expected).abs().max() < 0.02 * expected.abs().max()
    assert "Ascend" in type(layer).__name__


def awq_weight(name: str) -> torch.Tensor:
    """[K, N] float32, unpacked from the file by AutoAWQ's order of nibbles."""
    from safetensors.torch import load_file

    tensors = load_file(next((FIXTURES / AWQ).glob("*.safetensors")))
    order = [0, 4, 1, 5, 2, 6, 3, 7]

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        columns = torch.stack([(packed >> (4 * place)) & 15 for place in order], dim=-1)
        return columns.flatten(1)

    scales = tensors[f"{name}.scales"].float()
    group = tensors[f"{name}.qweight"].shape[0] // scales.shape[0]
    numbers = unpack(tensors[f"{name}.qweight"]) - unpack(tensors[f"{name}.qzeros"]).repeat_interleave(group, 0)
    return numbers.float() * scales.repeat_interleave(group, 0)


def _row_layer(
    host: World, monkeypatch: pytest.MonkeyPatch, rank: int, size: int, name: str = "o_proj", bias: bool = False
) -> Any:
    """A row-parallel layer that vllm-ascend cuts over a group of its own (o_proj: otp, down_proj: mlp_tp)."""
    from vllm_ascend.ops import linear, linear_op

    class Other(linear_op.CustomRowParallelOp):
        comm_group = types.SimpleNamespace(rank_in_group=rank, world_size=size)

        def apply_impl(self, input_: torch.Tensor) -> Any:
            assert self.quant_method is not None
            bias = None if self.tp_rank > 0 or self.skip_bias_add else self.bias
            return self.quant_method.apply(self.layer, input_, bias=bias), None

    monkeypatch.setattr(linear, "get_parallel_op", lambda disable, prefix, layer, direct: (Other(layer), rank, size))
    config = host.engine_config(STATIC, quantization="modelslim")
    prefix = f"model.layers.0.{'self_attn' if name == 'o_proj' else 'mlp'}.{name}"
    shape = json.loads((FIXTURES / STATIC / "config.json").read_text())
    heads = shape["num_attention_heads"] * shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    inputs = heads if name == "o_proj" else shape["intermediate_size"]
    with host.current(config):
        from vllm.model_executor.layers.linear import RowParallelLinear

        layer = RowParallelLinear(
            inputs,
            shape["hidden_size"],
            bias=bias,
            quant_config=config.quant_config,
            prefix=prefix,
            reduce_results=bias,
        )
    from safetensors.torch import load_file

    stored = load_file(next((FIXTURES / STATIC).glob("*.safetensors")))
    for key, value in stored.items():
        if key.startswith(prefix + "."):
            name_ = key.removeprefix(prefix + ".")
            param = getattr(layer, {"bias": "checkpoint_bias"}.get(name_, name_), None)
            if param is not None:
                param.weight_loader(param, value)
    with host.current(config):
        layer.quant_method.process_weights_after_loading(layer)
    return layer, {
        key.removeprefix(prefix + "."): value for key, value in stored.items() if key.startswith(prefix + ".")
    }


@pytest.mark.parametrize("name", ["o_proj", "down_proj"])
def test_09_row_layers_of_other_groups_are_cut_and_summed_by_those_groups(
    host: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole, stored = _row_layer(host, monkeypatch, 0, 1, name)
    x = torch.randn(4, whole.input_size, dtype=torch.bfloat16)
    parts = []
    for rank in (0, 1):
        layer, _ = _row_layer(host, monkeypatch, rank, 2, name)
        assert layer.quant_method.context.adds_constants is (rank == 0)
        half = stored["weight"].shape[1] // 2
        assert torch.equal(layer.weight.t(), stored["weight"][:, rank * half : (rank + 1) * half])
        parts.append(layer(x[:, rank * half : (rank + 1) * half])[0].float())
    expected = whole(x)[0].float()
    assert (sum(parts) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_09_operators_of_other_groups_use_the_bias_that_was_loaded(
    host: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep the bias that the layer had when it was made."""
    layer, _ = _row_layer(host, monkeypatch, 0, 1, bias=True)
    assert layer.bias is None  # it is in quant_bias now
    assert layer.custom_op.bias is None


def test_09_no_method_of_ours_is_taken_for_an_unquantized_one(host: World) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from vllm_npu_quant.engine.linear import NpuQuantLinearMethod

    for module in model_of(host, AWQ)[1].modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, NpuQuantLinearMethod):
            assert not isinstance(method, UnquantizedLinearMethod)


def test_10_every_method_has_an_attribute_quant_method(host: World, moe: tuple[Any, Any]) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    ours = 0
    for _, module in [*moe[1].named_modules(), *model_of(host, AWQ)[1].named_modules()]:
        method = getattr(module, "quant_method", None)
        if type(method).__module__.startswith("vllm_npu_quant.engine") and isinstance(module, LinearBase):
            assert method.quant_method is None
            ours += 1
    assert ours


def test_11_shortcuts_for_vllm_ascends_own_classes_are_not_taken(host: World) -> None:
    """Every isinstance that vllm-ascend asks of a layer's method, or of what is inside, says no for ours."""
    from vllm_ascend.quantization import method_adapters

    layer = model_of(host, AWQ)[1].model.layers[0].mlp.down_proj
    assert not isinstance(layer.quant_method, method_adapters.AscendLinearMethod)
    asked = set()
    for path in sources():
        if "quantization" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
            if called and "quant_method" in ast.dump(node.args[0]):
                asked |= {leaf.id for leaf in ast.walk(node.args[1]) if isinstance(leaf, ast.Name)}
    names = {kind.__name__ for kind in type(layer.quant_method).__mro__}
    assert not (asked - {"QuantizeMethodBase"}) & names, asked & names


def test_12_kv_b_proj_of_mla_is_float_in_memory(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend's own assertion and split, on a layer that the checkpoint quantizes."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm_ascend.attention.mla_v1 import AscendMLAImpl

    from vllm_npu_quant.engine import config as ours

    name = "model.layers.0.self_attn.kv_b_proj"
    config = host.engine_config(AWQ)
    quant = config.quant_config
    down = "model.layers.0.mlp.down_proj"
    resolve = quant.resolver.resolve
    quant.resolver.resolve = lambda prefix: replace(resolve(down), prefix=name) if prefix == name else resolve(prefix)
    monkeypatch.setattr(ours, "_uses_mla", lambda: True)
    weight = awq_weight(down)
    with host.current(config):
        layer = ColumnParallelLinear(weight.shape[0], weight.shape[1], bias=False, quant_config=quant, prefix=name)
        _load_awq(layer, down)
        layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.t(), weight.to(torch.bfloat16))
    heads = 2
    head = weight.shape[1] // heads
    attention = types.SimpleNamespace(
        kv_b_proj=layer,
        kv_lora_rank=weight.shape[0],
        num_heads=heads,
        qk_nope_head_dim=head // 2,
        v_head_dim=head - head // 2,
        enable_mlapo=False,
        fused_qkv_a_proj=None,
        layer_sharding_kwargs=None,
        q_proj=None,
    )
    # What comes after the weights is not this layer's.
    with contextlib.suppress(AttributeError):
        AscendMLAImpl.process_weights_after_loading(attention, torch.bfloat16)
    split = weight.to(torch.bfloat16).view(weight.shape[0], heads, head)
    assert torch.equal(attention.W_UV, split[..., head // 2 :].transpose(0, 1))
    assert torch.equal(attention.W_UK_T, split[..., : head // 2].permute(1, 2, 0))


def _load_awq(layer: Any, name: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(next((FIXTURES / AWQ).glob("*.safetensors")))
    for tensor in ("qweight", "qzeros", "scales"):
        param = getattr(layer, tensor)
        param.weight_loader(param, tensors[f"{name}.{tensor}"])


def test_13_weights_are_processed_once_whoever_asks_again(host: World, moe: tuple[Any, Any]) -> None:
    config, model = moe
    layers = [model.model.layers[0].self_attn.o_proj, host.experts(model.model.layers[0].mlp)]
    for layer in layers:
        before = {name: (param.data_ptr(), param.clone()) for name, param in layer.named_parameters()}
        with host.current(config):
            layer.quant_method.process_weights_after_loading(layer)
        after = {name: (param.data_ptr(), param) for name, param in layer.named_parameters()}
        assert before.keys() == after.keys()
        for name, (address, value) in before.items():
            assert after[name][0] == address
            assert torch.equal(after[name][1], value)


def test_13_each_layer_has_a_method_object_of_its_own(host: World) -> None:
    """vllm-ascend replaces process_weights_after_loading on the object."""
    methods = [
        module.quant_method
        for module in model_of(host, AWQ)[1].modules()
        if type(getattr(module, "quant_method", None)).__name__ == "NpuQuantLinearMethod"
    ]
    assert len(methods) == len({id(method) for method in methods}) > 4
    methods[0].process_weights_after_loading = lambda layer: None  # must be possible


def test_14_the_head_is_run_by_its_method(host: World) -> None:
    _, model = model_of(host, "gptq-qwen3-gptqmodel-w4g128-lmhead")
    head = model.lm_head
    assert type(head).__name__ == "AscendParallelLMHead"
    x = torch.randn(3, head.embedding_dim, dtype=torch.bfloat16)
    logits = head.quant_method.apply(head, x, bias=None)
    assert logits.shape == (3, head.num_embeddings_per_partition)
    assert torch.isfinite(logits).all()


def test_15_nz_mode_0_keeps_weights_as_they_are(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleep mode wants weight_nz_mode=0. Layouts are asked of the operator: on the CPU a cast leaves no other trace."""
    from vllm_ascend.ascend_config import get_ascend_config

    from vllm_npu_quant.methods import base

    casts = []
    monkeypatch.setattr(base, "to_nz", lambda weight: casts.append(weight.dtype) or weight)
    name = "msmodelslim-qwen3-w8a16"
    host.model(name, quantization="modelslim")
    assert casts
    config = host.engine_config(name, quantization="modelslim")
    casts.clear()
    monkeypatch.setattr(get_ascend_config(), "weight_nz_mode", 0)
    from vllm.model_executor.model_loader import get_model

    with host.current(config):
        get_model(vllm_config=config)
    assert not casts


def test_15_sleep_mode_itself(host: World) -> None:
    pytest.skip("sleep and wake-up move memory of the device: CaMemAllocator needs one")


# -- experts: points 16 to 19 ---------------------------------------------------------------------------------------------


def test_16_experts_method_is_one_that_vllm_ascend_can_drive(host: World, moe: tuple[Any, Any]) -> None:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

    experts = host.experts(moe[1].model.layers[0].mlp)
    method = experts.quant_method
    assert isinstance(method, FusedMoEMethodBase)
    assert method.is_monolithic is False
    assert method.maybe_make_prepare_finalize() is None
    assert method.get_fused_moe_quant_config(experts) is None
    assert method.supports_eplb is False
    assert type(method).__name__ not in ("GPTQMarlinMoEMethod", "CompressedTensorsWNA16MoEMethod")


def test_16_experts_tensors_are_loaded_by_our_loader_as_vllm_calls_it(host: World, moe: tuple[Any, Any]) -> None:
    """The numbers of the file are in the prepared weight: expert, shard, transposition."""
    from safetensors.torch import load_file

    stored = load_file(next((FIXTURES / HOME).glob("*.safetensors")))
    experts = host.experts(moe[1].model.layers[0].mlp)
    prefix = "model.layers.0.mlp.experts"
    inner = stored[f"{prefix}.0.gate_proj.weight"].shape[0]
    for expert in range(experts.w13_weight.shape[0]):
        gate, up = (stored[f"{prefix}.{expert}.{name}_proj.weight"] for name in ("gate", "up"))
        assert torch.equal(experts.w13_weight[expert].t()[:inner], gate)
        assert torch.equal(experts.w13_weight[expert].t()[inner : 2 * inner], up)
        assert torch.equal(experts.w2_weight[expert].t(), stored[f"{prefix}.{expert}.down_proj.weight"])


def test_17_no_quant_type_is_published(host: World, moe: tuple[Any, Any]) -> None:
    """prepare then does not quantize, and nothing reads weights by the names of vllm-ascend's schemes."""
    from vllm_ascend.quantization.quant_type import QuantType

    experts = host.experts(moe[1].model.layers[0].mlp)
    assert experts.quant_type == QuantType.NONE


def test_17_expert_load_balancing_is_refused(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend.ascend_config import get_ascend_config

    from vllm_npu_quant.ascend.moe import findings

    assert findings() == []
    monkeypatch.setattr(get_ascend_config(), "eplb_config", types.SimpleNamespace(dynamic_eplb=True))
    assert [finding.found for finding in findings()] == ["eplb_config"]


def test_18_quantized_shared_experts_are_run_by_their_own_methods(
    host: World, moe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bypass asks for weight_scale on both layers, which ours have, and for the routed quant_type, which says none."""
    experts = host.experts(moe[1].model.layers[0].mlp)
    layers = model_of(host, AWQ)[1].model.layers[0].mlp

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = layers.gate_up_proj, layers.down_proj

        def act_fn(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]

    shared = Shared()
    assert hasattr(shared.gate_up_proj, "weight_scale")
    x = torch.randn(3, layers.gate_up_proj.input_size, dtype=torch.bfloat16)
    got = host.shared_experts(experts, shared, x)
    assert torch.equal(got, shared(x))


def test_19_fused_mc2_is_refused(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ascend.ascend_config import get_ascend_config

    from vllm_npu_quant.ascend.moe import findings

    monkeypatch.setattr(get_ascend_config(), "enable_fused_mc2", 1)
    assert [finding.found for finding in findings()] == ["enable_fused_mc2"]


# -- graph passes: point 20 -----------------------------------------------------------------------------------------------


def test_20_norms_are_not_fused_with_a_quantization_to_int4(host: World) -> None:
    from vllm_ascend.compilation.passes.norm_quant_fusion_pass import _model_uses_w4a4_quant

    plain, _ = modelslim(host, HOME)
    assert _model_uses_w4a4_quant(plain) is False
    config, _ = modelslim(host, "msmodelslim-qwen3-w4a4-dynamic")
    assert _model_uses_w4a4_quant(config) is True


def test_20_what_may_be_fused_has_no_arguments_that_the_pattern_drops(host: World) -> None:
    """Behind a norm our int8 layers call npu_dynamic_quant with its input alone, which is what the pattern stands for."""
    import vllm_npu_quant.methods as methods

    folder = Path(methods.__file__).parent
    calls = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "npu_dynamic_quant":
                calls.append({keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
    assert calls
    for keywords in calls:
        assert keywords in ({}, {"dst_type": "torch.quint4x2"}), keywords
