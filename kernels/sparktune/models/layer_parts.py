"""A decoder layer read into what its one Function computes with: weights, LoRA factors, norms, heads.

Only layers of the pre-norm kind (`parts.PreNormLayer` over `parts.Attention`, `parts.Mlp` and `parts.Norm`) can be read;
for others, or where a projection is `Unfit`, the layer runs op by op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparktune.models import parts
from sparktune.models.attention import refuse_call
from sparktune.models.projection import Projection, Unfit, unhooked
from sparktune.ops.lora_packed import Stack


@dataclass(frozen=True)
class Group:
    """Projections of one input: their stack in the buffer, factors, biases and scales."""

    stack: Stack
    a: tuple[Tensor | None, ...]
    b: tuple[Tensor | None, ...]
    bias: tuple[Tensor | None, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, *modules: Any) -> Group:
        """Read linear layers. Errors: Unfit for dropout or a trained bias, besides what `Projection.of` refuses."""
        found = [Projection.of(m) for m in modules]
        if any(p.dropout for p in found):
            raise Unfit("its LoRA has dropout")
        if any(p.bias is not None and p.bias.requires_grad for p in found):
            raise Unfit("its bias is trained")
        return cls(
            Stack(
                tuple(p.weight for p in found), tuple(0 if p.a is None else p.a.shape[0] for p in found),
                any(p.bias is not None for p in found),
            ),
            tuple(p.a for p in found), tuple(p.b for p in found), tuple(p.bias for p in found),
            tuple(p.scale for p in found),
        )  # fmt: skip

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """A and B of each layer in turn."""
        return tuple(t for pair in zip(self.a, self.b, strict=True) for t in pair)

    @property
    def one(self) -> int | None:
        """The column of the buffer that biases stand in, as `forward_packed` takes it."""
        return self.stack.one if self.stack.biased else None


@dataclass(frozen=True)
class LayerParts:
    """All of a pre-norm layer. Widths in elements: q and kv of all heads, inner of the MLP."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norm1: Tensor
    norm2: Tensor
    eps1: float
    eps2: float
    order: str  # of the norms' rounding
    q_norm: Tensor | None
    k_norm: Tensor | None
    head_eps: float
    head_order: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    activation: str
    turns: bool  # q and k by their positions

    @classmethod
    def of(cls, layer: Any) -> LayerParts:
        """Read a layer. Errors: Unfit with the reason."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        if not isinstance(attention, parts.Attention) or not isinstance(mlp, parts.Mlp):
            raise Unfit(f"its attention is a {type(attention).__name__} and its MLP a {type(mlp).__name__}")
        a: Any = attention
        m: Any = mlp
        unhooked(a)
        unhooked(m)
        heads = [parts.fit_norm(n) for n in (a.q_norm, a.k_norm)] if a.QK_NORM else []
        for norm in norms:
            parts.fit_norm(norm)
        if getattr(a, "sinks", None) is not None or (a.SOFTCAP and getattr(a, a.SOFTCAP)):
            raise Unfit("its attention has sinks or a soft-cap")
        turns = bool(getattr(a, "use_rope", True))
        if heads and not turns:
            raise Unfit("its heads have norms and no positions")
        if len({n.eps_value for n in heads}) > 1:
            raise Unfit("the norms of its heads differ in epsilon")
        refuse_call(a, getattr(a, "attention_dropout", 0.0) if a.training else 0.0)
        qkv = (getattr(a, a.MERGED),) if a.MERGED else (a.q_proj, a.k_proj, a.v_proj)
        gate_up = (getattr(m, m.MERGED),) if m.MERGED else (m.gate_proj, m.up_proj)
        return cls(
            qkv=Group.of(*qkv), o=Group.of(a.o_proj), gate_up=Group.of(*gate_up), down=Group.of(m.down_proj),
            norm1=norms[0].weight, norm2=norms[1].weight, eps1=norms[0].eps_value, eps2=norms[1].eps_value,
            order=norms[0].ORDER, q_norm=heads[0].weight if heads else None,
            k_norm=heads[1].weight if heads else None, head_eps=heads[0].eps_value if heads else 0.0,
            head_order=a.QK_NORM,
            heads=a.config.num_attention_heads, kv_heads=a.config.num_key_value_heads, head_dim=a.head_dim,
            scale=float(a.scaling), window=a.window, activation=m.ACTIVATION, turns=turns,
        )  # fmt: skip

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """qkv, o, gate and up, down."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def trained(self) -> tuple[Tensor | None, ...]:
        """What may take a gradient, in the order in which the Function returns them."""
        factors = tuple(t for g in self.groups for t in g.factors)
        return *factors, self.norm1, self.norm2, self.q_norm, self.k_norm

    @property
    def q_width(self) -> int:
        """Elements of q a token."""
        return self.heads * self.head_dim

    @property
    def inner(self) -> int:
        """Elements of gate, and of up, a token."""
        return self.gate_up.stack.n // 2
