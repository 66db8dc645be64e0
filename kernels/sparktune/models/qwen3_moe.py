"""Qwen3 with experts, 30B-A3B and 235B-A22B (transformers `model_type: qwen3_moe`): the MLP of most layers is a mixture."""

from __future__ import annotations

from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from sparktune.models.common import pre_norm_family
from sparktune.models.experts import expert_rule
from sparktune.models.layer import OpByOpLayer

RULES = (
    *pre_norm_family(
        causal=hf.Qwen3MoeForCausalLM, backbone=hf.Qwen3MoeModel, layer=hf.Qwen3MoeDecoderLayer,
        attention=hf.Qwen3MoeAttention, mlp=hf.Qwen3MoeMLP, norm=hf.Qwen3MoeRMSNorm, rotary=hf.Qwen3MoeRotaryEmbedding,
        qk_norm="llama",
        layer_mixin=OpByOpLayer,
    ),
    expert_rule(hf.Qwen3MoeSparseMoeBlock, hf.Qwen3MoeExperts),
)  # fmt: skip
