# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight must be float in memory, whatever the checkpoint stores.

Multi-head latent attention (DeepSeek-V2, V3, R1, Kimi-K2, ...) absorbs ``kv_b_proj`` into the attention: vLLM and
vllm-ascend take its weight apart into W_UK and W_UV after loading, for which it has to be a float matrix [N, K], and they
ask whether its method is vLLM's unquantized one. Most quantized checkpoints of these models quantize it all the same.
"""

from __future__ import annotations

from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method

from vllm_npu_quant.engine.linear import NpuQuantLinearMethod

__all__ = ["DequantizedLinearMethod"]


@register_weight_loader_v2_supported_method
class DequantizedLinearMethod(NpuQuantLinearMethod, UnquantizedLinearMethod):
    """Loads the checkpoint's tensors, and leaves ``layer.weight`` [N, K] in the model's dtype.

    It is an ``UnquantizedLinearMethod`` by what it leaves behind, which is what others ask for; everything that it does is
    inherited from ``NpuQuantLinearMethod``.
    """

    supports_pre_processed_weights = False
