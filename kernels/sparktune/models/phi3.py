"""Phi-3, Phi-3.5 and Phi-4 (transformers `model_type: phi3`): Llama with q, k and v merged and gate and up merged.

LongRoPE's short and long factors, and a rotary part of each head (Phi-4-mini), come with transformers' own tables.
"""

from __future__ import annotations

from transformers.models.phi3 import modeling_phi3 as hf

from sparktune.models.common import pre_norm_family

RULES = pre_norm_family(
    causal=hf.Phi3ForCausalLM, backbone=hf.Phi3Model, layer=hf.Phi3DecoderLayer, attention=hf.Phi3Attention,
    mlp=hf.Phi3MLP, norm=hf.Phi3RMSNorm, rotary=hf.Phi3RotaryEmbedding, window="config", merged_qkv="qkv_proj",
    merged_mlp="gate_up_proj", activation_name="activation_fn",
)  # fmt: skip
