"""DeepSeek V3, R1 and V3.1 (transformers `model_type: deepseek_v3`): latent attention, shared experts, a router in groups.

The router, with its groups and its bias for balance, is transformers' own: it computes in fp32 and is small. Checkpoints in FP8
have modules of their own that don't train; load a 16-bit one.
"""

from __future__ import annotations

from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

from sparktune.models.common import pre_norm_family
from sparktune.models.experts import expert_rule
from sparktune.models.latent import LatentAttention
from sparktune.models.layer import OpByOpLayer

RULES = (
    *pre_norm_family(
        causal=hf.DeepseekV3ForCausalLM, backbone=hf.DeepseekV3Model, layer=hf.DeepseekV3DecoderLayer,
        attention=hf.DeepseekV3Attention, mlp=hf.DeepseekV3MLP, norm=hf.DeepseekV3RMSNorm,
        rotary=hf.DeepseekV3RotaryEmbedding, layer_mixin=OpByOpLayer, attention_mixin=LatentAttention,
    ),
    expert_rule(hf.DeepseekV3MoE, hf.DeepseekV3Experts, SHARED="shared_experts"),
)  # fmt: skip
