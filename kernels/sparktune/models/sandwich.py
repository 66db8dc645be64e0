"""Gemma's decoder layer: norms before and after attention and MLP, each before the residual sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparktune.models.parts import summed_norm


class SandwichLayer:
    """y = x1 + norm4(mlp(norm3(x1))), x1 = x + norm2(attention(norm1(x))); the third norm takes the sum before it along."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, S, K] -> the same."""
        if args:
            raise TypeError("a decoder layer takes hidden_states by place and all else by name")
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        attended = self.post_attention_layernorm(attended)
        normed, total = summed_norm(attended, hidden_states, self.pre_feedforward_layernorm)
        return total + self.post_feedforward_layernorm(self.mlp(normed))  # type: ignore[no-any-return]
