# SPDX-License-Identifier: Apache-2.0
"""Which norm biases and float parameters must have found their place in this part of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from tests.configs import config_of_format
from tests.formats.modelslim_layers import read_with_headers
from vllm_npu_quant.engine.config import NpuQuantConfig
from vllm_npu_quant.engine.loading import check_loaded
from vllm_npu_quant.engine.norm import NormBiasMethod
from vllm_npu_quant.errors import Finding, NpuQuantError
from vllm_npu_quant.formats.resolve import LayerResolver


class Norm(nn.Module):
    """A norm: with nn.LayerNorm's own bias, with ours (loaded or not), or without."""

    def __init__(self, bias: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        if bias == "own":
            self.bias = nn.Parameter(torch.zeros(4))
        elif bias:
            self.quant_method = NormBiasMethod()
            self.quant_method.create_weights(self)
            self.quant_method.loaded = bias == "loaded"


def model(layers: dict[int, nn.Module], **more: nn.Module) -> nn.Module:
    root = nn.Module()
    root.model = nn.Module()
    root.model.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
    for name, module in more.items():
        setattr(root.model, name, module)
    return root


def layer(**norms: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, norm in norms.items():
        setattr(module, name, norm)
    return module


def config(*norms: str) -> NpuQuantConfig:
    found = config_of_format("modelslim")()
    described = {f"{norm}.{tensor}": "FLOAT" for norm in norms for tensor in ("weight", "bias")}
    found.described = read_with_headers(described)
    assert found.described.norm_biases == set(norms)
    found.resolver = LayerResolver(found.described)
    return found


def findings(found: NpuQuantConfig, root: nn.Module, loaded: set[str] | None = None) -> list[Finding]:
    try:
        check_loaded(found, root, loaded)
    except NpuQuantError as error:
        return list(error.findings)
    return []


NORM = "model.layers.0.input_layernorm"


@pytest.mark.parametrize("kind", ["loaded", "own"])
def test_a_bias_that_has_a_place(kind: str) -> None:
    assert not findings(config(NORM), model({0: layer(input_layernorm=Norm(kind))}))


def test_a_norm_without_a_place() -> None:
    (finding,) = findings(config(NORM), model({0: layer(input_layernorm=Norm())}))
    assert (finding.code, finding.layer, finding.found) == ("unexpected-tensor", NORM, "a Norm")


def test_a_bias_that_did_not_arrive() -> None:
    (finding,) = findings(config(NORM), model({0: layer(input_layernorm=Norm("empty"))}))
    assert (finding.code, finding.layer, finding.expected) == ("not-filled", NORM, NORM + ".bias")


def test_a_norm_that_the_model_has_not() -> None:
    """Its parent is here, so that it belongs to this part of the model."""
    (finding,) = findings(config("model.layers.0.input_norm"), model({0: layer(input_layernorm=Norm("loaded"))}))
    assert (finding.code, finding.found) == ("unexpected-tensor", "no such module in the model")
    assert NORM in finding.nearest


def test_layers_of_other_ranks_and_of_the_draft_model_do_not_count() -> None:
    described = config(NORM, "model.layers.1.input_layernorm", "model.layers.61.input_layernorm", "model.norm")
    root = model({0: layer(input_layernorm=Norm("loaded")), 1: PPMissingLayer()}, norm=PPMissingLayer())
    assert not findings(described, root)


def test_a_multimodal_wrapper() -> None:
    root = nn.Module()
    root.language_model = model({0: layer(input_layernorm=Norm("loaded"))})
    assert not findings(config(NORM), root)
    root.language_model.model.layers["0"].input_layernorm = Norm()
    assert [finding.layer for finding in findings(config(NORM), root)] == [NORM]


def test_float_parameters_without_data() -> None:
    root = model({0: layer(input_layernorm=Norm("empty"), post_attention_layernorm=Norm())})
    everything = {name for name, _ in root.named_parameters() if not name.endswith("bias")}
    assert not findings(config(), root, everything)
    found = findings(config(), root, everything - {"model.layers.0.post_attention_layernorm.weight"})
    assert [(finding.code, finding.expected) for finding in found] == [
        ("not-filled", "model.layers.0.post_attention_layernorm.weight")
    ]
    # A model that does not say what it loaded is not judged.
    assert not findings(config(), root, None)


def test_a_tied_parameter_counts_under_any_of_its_names() -> None:
    root = model({}, first=Norm(), second=Norm())
    root.model.second.weight = root.model.first.weight
    assert not findings(config(), root, {"model.second.weight"})
    assert [finding.expected for finding in findings(config(), root, set())] == ["model.first.weight"]
