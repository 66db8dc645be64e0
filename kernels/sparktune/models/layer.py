"""Decoder layers in place of transformers' own: whole in one Function where they can be, else op by op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparktune.models import parts
from sparktune.models.checkpointing import NONE, WEIGHTS, LayerShape, all_of, strips_of
from sparktune.models.layer_call import Call
from sparktune.models.layer_function import DecoderLayer
from sparktune.models.layer_parts import LayerParts, parts_of
from sparktune.models.projection import Unfit, note_fallback
from sparktune.ops import dispatch


class OpByOpLayer:
    """A layer that normalises what goes into attention and MLP; the second norm takes the residual sum with it.

    y = x1 + mlp(norm2(x1)), x1 = x + attention(norm1(x)): each an op, whatever attention and MLP are made of.
    """

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [B, S, K] -> the same."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed, total = parts.summed_norm(attended, hidden_states, self.post_attention_layernorm)
        return total + self.fed(normed)  # type: ignore[no-any-return]

    def fed(self: Any, x: Tensor) -> Tensor:
        """What the MLP makes of x [B, S, K]."""
        found: Tensor = self.mlp(x)
        return found


class PreNormLayer(OpByOpLayer):
    """A layer that normalises what goes into attention and MLP: y = x1 + mlp(norm2(x1)), x1 = x + attention(norm1(x)).

    Where kernels run and nothing is cached or compiled, it is one autograd Function that decides itself what it keeps, so
    transformers' checkpointing around it is left out; `keep` is what the memory budget allows when that is switched on.
    """

    keep: frozenset[str] = NONE
    store: Any = None  # a `HostStore`, where what is `leaving` waits for the backward when checkpointing is on
    leaving: frozenset[str] = NONE

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Around `forward`: transformers' checkpointing, but not for a layer that runs whole."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        whole = self.whole(hidden, kwargs)
        if whole is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return nn.Module.__call__(self, *args, **kwargs, whole=whole)

    def forward(self: Any, hidden_states: Tensor, whole: LayerParts | None = None, **kwargs: Any) -> Tensor:
        """hidden_states [B, S, K] -> the same."""
        if whole is not None:
            batch, length, width = hidden_states.shape
            strips = strips_of(batch * length)
            checkpointed = self.training and self.gradient_checkpointing
            keep, store, leaving = (
                (self.keep, self.store, self.leaving) if checkpointed else (all_of(strips), None, NONE)
            )
            if self.gradient_checkpointing and WEIGHTS in self.keep:
                keep |= {WEIGHTS}  # in evaluation too: training goes on after it
            else:
                whole.release()
            tables = kwargs["position_embeddings"] if whole.turns else None
            call = Call(whole, (batch, length), tables, kwargs.get("documents"), keep, strips, store, leaving)
            y: Tensor = DecoderLayer.apply(hidden_states.reshape(-1, width), call, *whole.trained)
            return y.view(hidden_states.shape)
        return super().forward(hidden_states, **kwargs)

    def whole(self: Any, hidden: Any, kwargs: dict[str, Any]) -> LayerParts | None:
        """The layer's parts, if one Function can run it now; a reason that lies in the layer itself is counted."""
        if torch.compiler.is_compiling() or not isinstance(hidden, Tensor) or not dispatch.kernels_run_on(hidden):
            return None
        if kwargs.get("past_key_values") is not None or kwargs.get("attention_mask") is not None:
            return None
        tables = kwargs.get("position_embeddings")
        if kwargs.get("output_attentions") or not isinstance(tables, tuple) or len(tables) != 3:
            return None
        if dispatch.autocast_dtype(hidden) not in (None, hidden.dtype):
            return None
        try:
            return parts_of(self)
        except Unfit as why:
            note_fallback("a layer", why)
            return None

    def shape_of(self: Any, itemsize: int, strips: int) -> LayerShape:
        """Widths, for the memory budget."""
        a, c = self.self_attn, self.self_attn.config
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        normed = hasattr(a, "q_norm")  # not QK_NORM: attention with a forward of its own is not swapped, and has none
        return LayerShape(
            c.hidden_size, heads * a.head_dim, kv * a.head_dim, heads, c.intermediate_size, normed, itemsize, strips
        )
