"""SmolLM3 (transformers `model_type: smollm3`): Llama with layers that turn nothing by its position (`use_rope`)."""

from __future__ import annotations

from transformers.models.smollm3 import modeling_smollm3 as hf

from sparktune.models.common import pre_norm_family

RULES = pre_norm_family(
    causal=hf.SmolLM3ForCausalLM, backbone=hf.SmolLM3Model, layer=hf.SmolLM3DecoderLayer,
    attention=hf.SmolLM3Attention, mlp=hf.SmolLM3MLP, norm=hf.SmolLM3RMSNorm, rotary=hf.SmolLM3RotaryEmbedding,
)  # fmt: skip
