"""What a decoder layer is made of, each with sparktune's ops in its forward: norm, rotary tables, attention, MLP.

These are mixins for `swap.swapped`; a family's file says which of its classes takes which. The class attributes are the
family's differences, by the names below. Whatever an op can't take (`projection.Unfit`) runs module by module and is
counted; generation with a cache runs transformers' own forward around the same norms and products.

Source of the maths: the family's own implementation in transformers, which every one is tested against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparktune.models.attention import attend, refuse_call
from sparktune.models.documents import Documents
from sparktune.models.projection import Projection, Unfit, common_dropout, note_fallback, unhooked
from sparktune.ops.add_rms_norm import add_rms_norm
from sparktune.ops.geglu import geglu
from sparktune.ops.lora_linear import lora_linear
from sparktune.ops.lora_mlp import lora_mlp
from sparktune.ops.lora_qkv import lora_qkv
from sparktune.ops.qk_norm_rope import qk_norm_rope
from sparktune.ops.rms_norm import rms_norm
from sparktune.ops.rope import rope
from sparktune.ops.swiglu import swiglu

Tables = tuple[
    Tensor, Tensor, Tensor | None
]  # cos and sin [L, R/2] fp32, and each token's row in them, or its own place


class Norm:
    """RMSNorm in the family's rounding order: x [..., N] -> [..., N]."""

    ORDER = "llama"  # or "gemma"
    EPS = "variance_epsilon"  # the attribute that holds epsilon

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(hidden_states, self.gain, self.eps_value, variant=self.ORDER)

    @property
    def gain(self: Any) -> Tensor:
        """The weight as the op of this order takes it."""
        weight: Tensor = self.weight
        return weight

    @property
    def eps_value(self: Any) -> float:
        """Epsilon, whatever the family calls it."""
        return float(getattr(self, self.EPS))


class Rotary:
    """The family's rotary embedding, kept as tables of half the width in fp32, as the ops take them.

    transformers rounds cos and sin to the activations' dtype; in fp32 the turn is nearer to the true one.
    """

    REPEATS = 2  # how often transformers' tables hold each angle

    def forward(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Tables:
        """x [B, S, ...] (for its device) and position_ids [B or 1, S] -> tables."""
        probe = torch.empty(0, dtype=torch.float32, device=x.device)
        cos, sin = super().forward(probe, position_ids, *args, **kwargs)  # type: ignore[misc]
        half = cos.shape[-1] // self.REPEATS
        return as_tables(cos[..., :half], sin[..., :half], position_ids)


def as_tables(cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tables:
    """cos and sin [B or 1, S, R/2] of position_ids [B or 1, S] as tables."""
    cos, sin = (t.flatten(0, 1).float().contiguous() for t in (cos, sin))
    if position_ids.shape[0] == 1:
        return cos, sin, None
    return cos, sin, torch.arange(cos.shape[0], device=cos.device).view(position_ids.shape)


def spread(tables: Tables, dtype: torch.dtype, repeats: int = 2) -> tuple[Tensor, Tensor]:
    """Tables as transformers' own attention wants them: cos and sin [B or 1, S, R] in `dtype`, R / 2 without repeats."""
    *both, at = tables
    cos, sin = (torch.cat((t,) * repeats, -1).to(dtype) for t in both)
    return (cos[None], sin[None]) if at is None else (cos[at], sin[at])


class Attention:
    """Projections as one product each way, head norms and RoPE in the pass that lays out q and k, attention by device."""

    QK_NORM = ""  # the rounding order of norms over each head of q and k, where the family has them
    MERGED = ""  # the name of a projection that makes q, k and v at once
    SOFTCAP = ""  # the attribute with the cap of the scores, where the family has one
    REPEATS = 2  # how often transformers' tables hold each angle
    WINDOW = ""  # where `sliding_window` is: the module itself, or its "config"

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Tables | None = None, attention_mask: Tensor | None = None,
        past_key_values: Any = None, documents: Documents | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """hidden_states [B, S, K] -> ([B, S, K], None)."""
        if past_key_values is not None:
            tables = position_embeddings and spread(position_embeddings, hidden_states.dtype, self.REPEATS)
            found: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings=tables, attention_mask=attention_mask, past_key_values=past_key_values,
                documents=documents, **kwargs,
            )  # fmt: skip
            return found
        refuse_call(self, getattr(self, "attention_dropout", 0.0) if self.training else 0.0)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.projected(hidden_states))
        q, k = self.placed(q, k, position_embeddings if getattr(self, "use_rope", True) else None)
        softcap = getattr(self, self.SOFTCAP) if self.SOFTCAP else None
        out = attend(
            q, k, v, documents, attention_mask, self.scaling, self.window, softcap, getattr(self, "sinks", None)
        ).flatten(2)
        return linear(self.o_proj, out), None

    @property
    def window(self: Any) -> int | None:
        """Keys that a query sees, its own included; None for all."""
        return getattr(getattr(self, self.WINDOW) if self.WINDOW else self, "sliding_window", None)

    def projected(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, S, heads x D] of x [B, S, K]."""
        if self.MERGED:
            merged = linear(getattr(self, self.MERGED), x)
            q, kv = self.config.num_attention_heads * self.head_dim, self.config.num_key_value_heads * self.head_dim
            return merged.split((q, kv, kv), -1)  # type: ignore[return-value]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        try:
            parts = [Projection.of(m) for m in layers]
            dropout = common_dropout(*parts)
        except Unfit as why:
            note_fallback("q, k and v", why)
            return tuple(m(x) for m in layers)  # type: ignore[return-value]
        return lora_qkv(
            x, tuple(p.weight for p in parts), tuple(p.adapter for p in parts), tuple(p.scale for p in parts),  # type: ignore[arg-type]
            biases=tuple(p.bias for p in parts), dropout=dropout,  # type: ignore[arg-type]
        )  # fmt: skip

    def placed(self: Any, q: Tensor, k: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
        """q and k [B, S, heads, D], normalised where the family does so, and turned by their positions."""
        if self.QK_NORM:
            try:
                q_norm, k_norm = fit_norm(self.q_norm), fit_norm(self.k_norm)
                if tables is None or q_norm.eps_value != k_norm.eps_value:
                    raise Unfit("they have no positions, or differ in epsilon")
            except Unfit as why:
                note_fallback("the norms of the heads", why)
                q, k = self.q_norm(q), self.k_norm(k)
            else:
                cos, sin, at = tables
                eps = q_norm.eps_value
                return qk_norm_rope(q, k, q_norm.weight, k_norm.weight, cos, sin, at, eps, self.QK_NORM)
        return (q, k) if tables is None else rope(q, k, *tables)


def linear(module: Any, x: Tensor) -> Tensor:
    """One linear layer with its LoRA inside the product: x [..., K] -> [..., N]."""
    try:
        p = Projection.of(module)
    except Unfit as why:
        note_fallback("a projection", why)
        out: Tensor = module(x)
        return out
    return lora_linear(x, p.weight, p.a, p.b, scale=p.scale, bias=p.bias, dropout=p.dropout)


class Mlp:
    """down(act(gate(x)) up(x)) with LoRA inside the products: x [..., K] -> [..., K]."""

    ACTIVATION = "silu"  # or gelu_tanh
    MERGED = ""  # the name of a projection that makes gate and up at once

    def forward(self: Any, x: Tensor) -> Tensor:
        """Project up twice, gate, project down."""
        if self.MERGED:
            gate, up = linear(getattr(self, self.MERGED), x).chunk(2, -1)
            return linear(self.down_proj, self.gated(gate, up))
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        try:
            parts = [Projection.of(m) for m in layers]
            dropout = common_dropout(*parts)
        except Unfit as why:
            note_fallback("an MLP", why)
            down: Tensor = self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
            return down
        return lora_mlp(
            x, tuple(p.weight for p in parts), tuple(p.adapter for p in parts), tuple(p.scale for p in parts),  # type: ignore[arg-type]
            activation=self.ACTIVATION, biases=tuple(p.bias for p in parts), dropout=dropout,  # type: ignore[arg-type]
        )  # fmt: skip

    def gated(self: Any, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) up in one pass."""
        return swiglu(gate, up) if self.ACTIVATION == "silu" else geglu(gate, up, "tanh")


ACTIVATIONS = {
    "silu": ("SiLUActivation", "SiLU"),
    "gelu_tanh": ("GELUTanh", "PytorchGELUTanh"),
}


def refuse_mlp(activation: str, name: str = "act_fn") -> Any:
    """A rule's condition: the module's activation is the one that the op computes."""

    def refuse(module: nn.Module) -> str:
        found = getattr(module, name)
        if type(found).__name__ in ACTIVATIONS[activation]:
            return ""
        return f"its activation is {type(found).__name__}, not {activation}"

    return refuse


def fit_norm(module: Any) -> Any:
    """The norm, if its weight can go into an op that does more than it. Errors: Unfit."""
    unhooked(module)
    if not isinstance(module, Norm):
        raise Unfit(f"it is a {type(module).__name__}")
    return module


def summed_norm(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm(s), s) for s = residual + x, in one pass where the norm lets it."""
    try:
        fit_norm(norm)
    except Unfit as why:
        note_fallback("a norm of a sum", why)
        total = residual + x
        return norm(total), total
    dtype = torch.promote_types(x.dtype, residual.dtype)  # autocast adds bf16 to fp32
    return add_rms_norm(x.to(dtype), residual.to(dtype), norm.gain, norm.eps_value, norm.ORDER)
