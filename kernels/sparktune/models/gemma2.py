"""Gemma 2 (transformers `model_type: gemma2`): norms of 1 + w on both sides, GeGLU, capped scores and logits, and a
window in every other layer. The embeddings' scale and the cap of the logits are where transformers has them."""

from __future__ import annotations

from transformers.models.gemma2 import modeling_gemma2 as hf

from sparktune.models.common import pre_norm_family
from sparktune.models.sandwich import SandwichLayer

RULES = pre_norm_family(
    causal=hf.Gemma2ForCausalLM, backbone=hf.Gemma2Model, layer=hf.Gemma2DecoderLayer, attention=hf.Gemma2Attention,
    mlp=hf.Gemma2MLP, norm=hf.Gemma2RMSNorm, rotary=hf.Gemma2RotaryEmbedding, layer_mixin=SandwichLayer, order="gemma", eps="eps",
    softcap="attn_logit_softcapping", activation="gelu_tanh",
)  # fmt: skip
