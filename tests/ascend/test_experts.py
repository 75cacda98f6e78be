# SPDX-License-Identifier: Apache-2.0
"""The products that vllm-ascend asks of our experts between its dispatch and its combine.

The whole way through the released vllm-ascend is in tests/ascend/contract; here only what needs nothing of it.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.methods.layers import random_input, relative_error
from tests.methods.moe_layers import SCHEMES, W8A8, MoeLayer, Scheme, routing
from vllm_npu_quant.ascend.moe import AscendExperts, _OwnProducts, _Products
from vllm_npu_quant.errors import NpuQuantError
from vllm_npu_quant.methods.moe import Input, Placement


@pytest.mark.parametrize("scheme", SCHEMES, ids=[scheme.name for scheme in SCHEMES])
@pytest.mark.parametrize(("hidden", "group_list_type"), [(96, 0), (33, 1)], ids=["sums", "counts"])
def test_products_of_dispatched_rows(scheme: Scheme, hidden: int, group_list_type: int) -> None:
    layer = MoeLayer.random(scheme, scheme, hidden, 48, 5)
    chain, tensors = layer.prepared(torch.bfloat16)
    x, (weights, ids) = random_input(9, hidden, torch.bfloat16), routing(9, 2, 5)
    order = ids.flatten().sort(stable=True).indices
    rows, scale = x[order // 2], None
    if scheme.method.takes is Input.INT8:  # type: ignore[attr-defined]
        rows, scale = torch.ops.npu.npu_dynamic_quant(rows)
    counts = torch.bincount(ids.flatten().long(), minlength=5)
    dispatched = SimpleNamespace(
        hidden_states=rows,
        dynamic_scale=scale,
        group_list=counts if group_list_type else counts.cumsum(0),
        group_list_type=group_list_type,
        topk_scales=None,
    )
    y, event = _OwnProducts(SimpleNamespace(), _Products(chain, tensors, x.dtype))._apply_mlp(dispatched)
    assert event is None
    back = torch.empty(18, hidden, dtype=torch.float64)
    back[order] = y.to(torch.float64)
    total = (back.view(9, 2, hidden) * weights.unsqueeze(-1)).sum(1)
    limit = 0.06 if scheme.method.takes is Input.INT4 else 0.012  # type: ignore[attr-defined]
    assert relative_error(total, layer.expected(x, weights, ids)) < limit


@pytest.mark.parametrize("group_list_type", [2, 3, -1])
@pytest.mark.parametrize("product", ["apply_gmm1_act_quant", "apply_gmm2"])
def test_group_lists_of_another_type_are_refused(group_list_type: int, product: str) -> None:
    """Type 2 lists (expert, count) pairs, which must not be read as counts."""
    chain, tensors = MoeLayer.random(W8A8, W8A8, 96, 48, 5).prepared(torch.bfloat16)
    rows, scale = torch.ops.npu.npu_dynamic_quant(random_input(4, 96, torch.bfloat16))
    given = SimpleNamespace(
        hidden_states=rows,
        dynamic_scale=scale,
        group_list=torch.tensor([[0, 3], [4, 1]]),
        group_list_type=group_list_type,
        topk_scales=None,
    )
    more = () if product == "apply_gmm1_act_quant" else (rows[:, :48], scale)
    with pytest.raises(NpuQuantError, match=f"group_list_type {group_list_type}") as caught:
        getattr(_Products(chain, tensors, torch.bfloat16), product)(given, *more)
    assert caught.value.codes == ("unsupported-scheme",)


def test_vllm_ascends_own_path_is_for_float_inputs_with_offsets_only() -> None:
    def takes_theirs(scheme: Scheme, hidden: int = 96) -> bool:
        chain, tensors = MoeLayer.random(scheme, scheme, hidden, 96, 3).prepared(torch.bfloat16)
        return AscendExperts(chain, Placement.of(3, None))._as_theirs(tensors)

    by_name = {scheme.name: scheme for scheme in SCHEMES}
    assert takes_theirs(by_name["w4a16-g32-asym"])
    assert not takes_theirs(by_name["w4a16-g32-asym"], hidden=33)  # filled up
    assert not takes_theirs(by_name["float"])
    assert not takes_theirs(W8A8)
