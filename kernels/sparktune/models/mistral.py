"""Mistral 7B and Ministral (transformers `model_type: mistral`): Llama with a window that the configuration holds."""

from __future__ import annotations

from transformers.models.mistral import modeling_mistral as hf

from sparktune.models.common import pre_norm_family

RULES = pre_norm_family(
    causal=hf.MistralForCausalLM, backbone=hf.MistralModel, layer=hf.MistralDecoderLayer, attention=hf.MistralAttention,
    mlp=hf.MistralMLP, norm=hf.MistralRMSNorm, rotary=hf.MistralRotaryEmbedding, window="config",
)  # fmt: skip
