# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk or on a hub: JSON files, safetensors headers and indexes, and single tensors as NumPy arrays.

This package does not depend on quantization formats and imports neither torch nor vllm.
"""

from __future__ import annotations

from vllm_npu_quant.checkpoint.folder import Checkpoint
from vllm_npu_quant.checkpoint.hub import RemoteCheckpoint, find_local, is_path, open_checkpoint
from vllm_npu_quant.checkpoint.json_files import (
    CONFIG_MAX_BYTES,
    DESCRIPTION_MAX_BYTES,
    INDEX_MAX_BYTES,
    parse_json,
    read_json,
)
from vllm_npu_quant.checkpoint.safetensors_header import (
    DTYPE_BITS,
    HEADER_MAX_BYTES,
    Header,
    TensorInfo,
    header_length,
    parse_header,
    read_header,
)

__all__ = [
    "CONFIG_MAX_BYTES",
    "DESCRIPTION_MAX_BYTES",
    "DTYPE_BITS",
    "HEADER_MAX_BYTES",
    "INDEX_MAX_BYTES",
    "Checkpoint",
    "Header",
    "RemoteCheckpoint",
    "TensorInfo",
    "find_local",
    "header_length",
    "is_path",
    "open_checkpoint",
    "parse_header",
    "parse_json",
    "read_header",
    "read_json",
]
