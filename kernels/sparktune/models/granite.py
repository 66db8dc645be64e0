"""Granite 3 (transformers `model_type: granite`): Llama with multipliers of embeddings, scores, residual branches and logits.

The first two are where transformers has them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.granite import modeling_granite as hf

from sparktune.models.causal import CausalLM
from sparktune.models.common import pre_norm_family
from sparktune.models.parts import summed_norm


class GraniteHead(CausalLM):
    """Logits divided by `config.logits_scaling`."""

    @property
    def _scale(self: Any) -> float:
        return 1.0 / float(self.config.logits_scaling)


class GraniteLayer:
    """x1 = x + m attention(norm1(x)), y = x1 + m mlp(norm2(x1))."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, S, K] -> the same."""
        if args:
            raise TypeError("a decoder layer takes hidden_states by place and all else by name")
        m = self.residual_multiplier
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, total = summed_norm(attended * m, hidden_states, self.post_attention_layernorm)
        return total + self.mlp(normed) * m  # type: ignore[no-any-return]


RULES = pre_norm_family(
    causal=hf.GraniteForCausalLM, backbone=hf.GraniteModel, layer=hf.GraniteDecoderLayer,
    attention=hf.GraniteAttention, mlp=hf.GraniteMLP, norm=hf.GraniteRMSNorm, rotary=hf.GraniteRotaryEmbedding,
    head_mixin=GraniteHead, layer_mixin=GraniteLayer,
)  # fmt: skip
