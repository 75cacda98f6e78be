# SPDX-License-Identifier: Apache-2.0
"""What the released vllm-ascend pins, copied from its metadata."""

from __future__ import annotations

_BOTH = {
    "torch": "2.10.0",
    "torch-npu": "2.10.0.post4",
    "torchvision": "0.25.0",
    "torchaudio": "2.10.0",
    "triton-ascend": "3.2.2",
    "memfabric_hybrid": "1.2.0",
    "memcache_hybrid": "1.2.0",
    "arctic-inference": "0.1.1",
}
PINS: dict[str, dict[str, str]] = {
    "0.23.0.post1": {**_BOTH, "transformers": "5.5.4"},
    "0.30.0rc2": {**_BOTH, "transformers": "5.14.1", "fastokens": "0.2.0"},
}

#: What these bring in the versions that are the lowest they allow, or older: numpy of the 1 series, as CANN hosts have it.
BROUGHT = {
    "numpy": "1.26.4",
    "pydantic": "2.12.0",
    "safetensors": "0.6.2",
    "huggingface_hub": "1.0.0",
    "typer": "0.15.1",
    "rich": "13.7.1",
    "fastapi": "0.123.10",
    "vllm": "0.23.0",
}
