"""Qwen3, dense (transformers `model_type: qwen3`): Llama with a norm, in Llama's order, over each head of q and k."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3 as hf

from sparktune.models.common import pre_norm_family

RULES = pre_norm_family(
    causal=hf.Qwen3ForCausalLM, backbone=hf.Qwen3Model, layer=hf.Qwen3DecoderLayer, attention=hf.Qwen3Attention,
    mlp=hf.Qwen3MLP, norm=hf.Qwen3RMSNorm, rotary=hf.Qwen3RotaryEmbedding, qk_norm="llama",
)  # fmt: skip
