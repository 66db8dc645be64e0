"""Multi-head latent attention (DeepSeek): keys and values from one narrow latent a token, positions in a part of each head.

A head of q and k has `qk_nope_head_dim` elements without position and `qk_rope_head_dim` with; k's turned part is one for all
heads. q comes from x by one projection or, with `q_lora_rank`, by two with a norm between; k and v always by two:

    latent, turning = kv_a(x)        k_nope, v = kv_b(norm(latent))

Here every projection has its LoRA inside the product. The turned parts lie before the rest of each head, as the rotary op wants
them; q and k alike, so that their products are the same sums. Values are narrower than keys, and padded for the kernels.

Source: DeepSeek-AI, "DeepSeek-V2", 2024, 2.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparktune.models.attention import attend
from sparktune.models.documents import Documents
from sparktune.models.parts import Tables, linear, spread
from sparktune.ops.rope import rope


class LatentAttention:
    """x [B, S, K] through the latent; with a cache, transformers' own forward around the same projections' modules."""

    INTERLEAVED: bool | None = None  # whether pairs are neighbours; None: as `config.rope_interleave` says

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Tables | None = None, attention_mask: Tensor | None = None,
        past_key_values: Any = None, documents: Documents | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """hidden_states [B, S, K] -> ([B, S, K], None)."""
        if position_embeddings is None:
            raise ValueError("latent attention needs position_embeddings, as the model's rotary embedding makes them")
        if past_key_values is not None:
            found: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings=self.tables(position_embeddings, hidden_states.dtype),
                attention_mask=attention_mask, past_key_values=past_key_values, documents=documents, **kwargs,
            )  # fmt: skip
            return found
        plain, turning = self.qk_nope_head_dim, self.qk_rope_head_dim
        if self.q_lora_rank is None:
            q = linear(self.q_proj, hidden_states)
        else:
            q = linear(self.q_b_proj, self.q_a_layernorm(linear(self.q_a_proj, hidden_states)))
        q = q.unflatten(-1, (-1, self.qk_head_dim))
        latent, k_turning = linear(self.kv_a_proj_with_mqa, hidden_states).split((self.kv_lora_rank, turning), -1)
        kv = linear(self.kv_b_proj, self.kv_a_layernorm(latent)).unflatten(-1, (-1, plain + self.v_head_dim))
        k_plain, v = kv.split((plain, self.v_head_dim), -1)
        interleaved = self.config.rope_interleave if self.INTERLEAVED is None else self.INTERLEAVED
        q_turned, k_turned = rope(q[..., plain:], k_turning[:, :, None], *position_embeddings, interleaved=interleaved)
        q = torch.cat((q_turned, q[..., :plain]), -1)
        k = torch.cat((k_turned.expand(*k_plain.shape[:-1], -1), k_plain), -1)
        out = attend(q, k, v, documents, attention_mask, self.scaling)
        return linear(self.o_proj, out.flatten(2)), None

    @staticmethod
    def tables(tables: Tables, dtype: torch.dtype) -> Any:
        """The rotary tables as transformers' own attention of the family takes them."""
        return spread(tables, dtype)
