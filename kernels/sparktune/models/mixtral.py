"""Mixtral (transformers `model_type: mixtral`): Mistral with an MLP of experts in every layer."""

from __future__ import annotations

from typing import Any

from transformers.models.mixtral import modeling_mixtral as hf

from sparktune.models.common import pre_norm_family
from sparktune.models.experts import expert_rule
from sparktune.models.layer import OpByOpLayer


def refuse_jitter(block: Any) -> str:
    """The router's input must have no noise."""
    return f"its router has jitter noise of {block.jitter_noise}" if block.jitter_noise else ""


RULES = (
    *pre_norm_family(
        causal=hf.MixtralForCausalLM, backbone=hf.MixtralModel, layer=hf.MixtralDecoderLayer,
        attention=hf.MixtralAttention, mlp=None, norm=hf.MixtralRMSNorm, rotary=hf.MixtralRotaryEmbedding,
        window="config", layer_mixin=OpByOpLayer,
    ),
    expert_rule(hf.MixtralSparseMoeBlock, hf.MixtralExperts, refuse=refuse_jitter),
)  # fmt: skip
