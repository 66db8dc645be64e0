"""The Llama family (Llama 2 and 3, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama ...; transformers `model_type: llama`).

Norms in Llama's order, rotary halves, q, k and v apart, SwiGLU; nothing else of its own.
"""

from __future__ import annotations

from transformers.models.llama import modeling_llama as hf

from sparktune.models.common import pre_norm_family

RULES = pre_norm_family(
    causal=hf.LlamaForCausalLM, backbone=hf.LlamaModel, layer=hf.LlamaDecoderLayer, attention=hf.LlamaAttention,
    mlp=hf.LlamaMLP, norm=hf.LlamaRMSNorm, rotary=hf.LlamaRotaryEmbedding,
)  # fmt: skip
