# SPDX-License-Identifier: Apache-2.0
"""Calls under the schemas of another torch_npu, which this torch cannot import.

The schemas are defined in a namespace of their own, and torch's dispatcher matches each recorded call against them.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map_only

from tests.conformance.recording import Call

NAMESPACE = "npu_older"


class Matched(Exception):
    """The dispatcher found the operator: the arguments fit its schema."""


def _matched(*args: object, **kwargs: object) -> None:
    raise Matched


def define(schemas: dict[str, str]) -> torch.library.Library:
    """Operators with these schemas; they do nothing."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in schemas.items():
        library.define(schema.removeprefix("npu::"))
        library.impl(name, _matched, "Meta")
    return library


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def refused(library: torch.library.Library, call: Call) -> list[str]:
    """What of a call the older schema does not take, or takes otherwise."""
    packet, _, overload = call.operator.partition(".")
    older, newer = (
        getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        for namespace in (NAMESPACE, "npu")
    )
    try:
        older(**tree_map_only(torch.Tensor, _as_meta, call.raw))
    except Matched:
        pass
    except Exception as error:
        return [f"{call.operator}: {error}"]
    defaults = {argument.name: argument.default_value for argument in newer._schema.arguments}
    return [
        f"{call.operator}: {argument.name} is not given, and is {argument.default_value!r} there"
        for argument in older._schema.arguments
        if argument.name not in call.raw and argument.default_value != defaults[argument.name]
    ]
