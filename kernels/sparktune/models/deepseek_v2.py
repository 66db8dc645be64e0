"""DeepSeek V2 and V2-Lite (transformers `model_type: deepseek_v2`): latent attention, shared experts; pairs turn as neighbours.

transformers keeps the family's rotary tables as complex numbers; here they are cos and sin, and complex again for a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

from sparktune.models.common import pre_norm_family
from sparktune.models.experts import expert_rule
from sparktune.models.latent import LatentAttention
from sparktune.models.layer import OpByOpLayer
from sparktune.models.parts import Tables, as_tables, spread


class Rotary:
    """The family's rotary embedding, as tables in fp32."""

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Tables:
        """x [B, S, ...] (for its device) and position_ids [B or 1, S] -> tables."""
        turns: Tensor = super().forward(x, position_ids)  # type: ignore[misc]
        return as_tables(turns.real, turns.imag, position_ids)


class Attention(LatentAttention):
    """Latent attention whose pairs are neighbours."""

    INTERLEAVED = True

    @staticmethod
    def tables(tables: Tables, dtype: torch.dtype) -> Tensor:
        """Complex, in fp32 whatever the activations are."""
        return torch.complex(*spread(tables, torch.float32, 1))


RULES = (
    *pre_norm_family(
        causal=hf.DeepseekV2ForCausalLM, backbone=hf.DeepseekV2Model, layer=hf.DeepseekV2DecoderLayer,
        attention=hf.DeepseekV2Attention, mlp=hf.DeepseekV2MLP, norm=hf.DeepseekV2RMSNorm,
        rotary=hf.DeepseekV2RotaryEmbedding, layer_mixin=OpByOpLayer, attention_mixin=Attention, rotary_mixin=Rotary,
    ),
    expert_rule(hf.DeepseekV2Moe, hf.DeepseekV2Experts, SHARED="shared_experts"),
)  # fmt: skip
