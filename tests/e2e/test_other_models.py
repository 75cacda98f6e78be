# SPDX-License-Identifier: Apache-2.0
"""Models other than Qwen3 through the real engine: biases of the model's own, a tied head, odd bits and groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rewritten import awq, float_model, gptq, modelslim_int8, write
from tests.e2e.twins import read_tensors
from tests.e2e.yardstick import Run, relative_error, run

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Case:
    """A model, how its projections are quantized, the config that says so, and what is expected."""

    model: str
    fields: dict[str, Any]
    quantizer: Callable[..., Any]
    config: dict[str, Any]
    limit: float
    method: str


def packed(method: str, bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, "bits": bits, "group_size": group, **more}


CASES = {
    "qwen2 gptq of 3 bits in any order": Case(
        "qwen2",
        {},
        partial(gptq, bits=3, group=64, sym=False, act_order=5),
        packed("gptq", 3, 64, desc_act=True, sym=False, static_groups=False, true_sequential=True),
        0.02,
        "WeightOnlyLinear",
    ),
    "qwen2 awq": Case(
        "qwen2",
        {},
        partial(awq, group=64),
        packed("awq", 4, 64, zero_point=True, version="gemm"),
        0.02,
        "WeightOnlyLinear",
    ),
    "qwen2 modelslim groups": Case(
        "qwen2", {}, partial(modelslim_int8, group=64), {"version": "1.0.0"}, 0.06, "W8A8DynamicGroupedLinear"
    ),
    "tied llama gptq of 8 bits per channel": Case(
        "llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "mlp_bias": True, "attention_bias": True},
        partial(gptq, bits=8, group=-1, sym=False, v2=True),
        packed("gptq", 8, -1, desc_act=False, sym=False, checkpoint_format="gptq_v2"),
        0.02,
        "WeightOnlyLinear",
    ),
    "llama of 5 heads gptq of 2 bits": Case(
        "llama",
        {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 416},
        partial(gptq, bits=2, group=32, sym=True),
        packed("gptq", 2, 32, sym=True),
        0.02,
        "WeightOnlyLinear",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def make(name: str) -> tuple[Path, Run]:
        case, out = CASES[name], tmp_path_factory.mktemp("model")
        source = float_model(out / "source", case.model, **case.fields)
        config = dict(case.config)
        if "version" in config:
            layers = [layer.removesuffix(".weight") for layer in read_tensors(source) if layer.endswith("_proj.weight")]
            lasts = ("weight", "weight_scale", "weight_offset")
            config |= {f"{layer}.{last}": "W8A8_DYNAMIC" for layer in layers for last in lasts}
        folder, twin = write(out, {"_proj": case.quantizer}, config, source=source)
        return folder, run(twin, plugin=False)

    return make


#: The others run with --all-ranks.
DEFAULT = ("qwen2 gptq of 3 bits in any order", "qwen2 modelslim groups")


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.variant) for name in CASES]
)
def test_it_agrees_with_its_float_twin(name: str, written) -> None:
    folder, twin = written(name)
    result = run(folder)
    assert result.methods[CASES[name].method] == 8
    assert relative_error(result, twin) <= CASES[name].limit


@pytest.mark.tp2
@pytest.mark.parametrize("name", [name for name in CASES if "5 heads" not in name])
def test_two_ranks_agree_with_the_twin_too(name: str, written) -> None:
    folder, twin = written(name)
    assert relative_error(run(folder, tensor_parallel_size=2), twin) <= CASES[name].limit
