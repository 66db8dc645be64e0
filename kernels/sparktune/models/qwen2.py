"""Qwen2 and Qwen2.5, DeepSeek-R1-Distill-Qwen (transformers `model_type: qwen2`): Llama with biases on q, k and v."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2 as hf

from sparktune.models.common import pre_norm_family

RULES = pre_norm_family(
    causal=hf.Qwen2ForCausalLM, backbone=hf.Qwen2Model, layer=hf.Qwen2DecoderLayer, attention=hf.Qwen2Attention,
    mlp=hf.Qwen2MLP, norm=hf.Qwen2RMSNorm, rotary=hf.Qwen2RotaryEmbedding,
)  # fmt: skip
