# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

# One process runs many engines: the import of vLLM costs more than a tiny engine. Set before vllm is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The reference for what runs here must not depend on what a developer has set.
for name in ("VLLM_NPU_QUANT", "VLLM_NPU_QUANT_TAKEOVER", "VLLM_NPU_QUANT_EMULATION", "VLLM_PLUGINS"):
    os.environ.pop(name, None)
