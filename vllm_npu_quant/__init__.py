# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints on Huawei Ascend NPUs with vLLM, and the same arithmetic on a CPU.

Importing this package imports neither torch nor vllm.
"""

from vllm_npu_quant._version import __version__

__all__ = ["__version__"]
