# SPDX-License-Identifier: Apache-2.0
"""Quantized layers whose weight must be float in memory.

Multi-head latent attention (DeepSeek-V2, V3, R1, Kimi-K2, ...) absorbs ``kv_b_proj`` into the attention: vLLM and
vllm-ascend split its weight into W_UK and W_UV after loading. They need a float matrix [N, K] and check that the layer's
method is an ``UnquantizedLinearMethod``. Most quantized checkpoints of these models store quantized integers.
"""

from __future__ import annotations

from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method

from vllm_npu_quant.engine.linear import NpuQuantLinearMethod

__all__ = ["DequantizedLinearMethod"]


@register_weight_loader_v2_supported_method
class DequantizedLinearMethod(NpuQuantLinearMethod, UnquantizedLinearMethod):
    """Load the checkpoint's tensors and leave ``layer.weight`` [N, K] in the model's dtype.

    Subclasses ``UnquantizedLinearMethod`` so that isinstance checks treat the loaded layer as unquantized; its behaviour is
    that of ``NpuQuantLinearMethod``.
    """

    supports_pre_processed_weights = False
