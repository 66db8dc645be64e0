"""A decoder layer read into what its one Function computes with: weights, LoRA factors, norms, heads.

Only layers of the pre-norm kind (`parts.PreNormLayer` over `parts.Attention`, `parts.Mlp` and `parts.Norm`) can be read;
for others, or where a projection is `Unfit`, the layer runs op by op.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparktune.models import parts
from sparktune.models.attention import refuse_call
from sparktune.models.held import Held
from sparktune.models.projection import Projection, Unfit, unhooked
from sparktune.models.stamp import Stamp
from sparktune.ops.lora_packed import Stack, pack


@dataclass(frozen=True)
class Group:
    """Projections of one input: their stack in the buffer, factors, biases and scales."""

    stack: Stack
    a: tuple[Tensor | None, ...]
    b: tuple[Tensor | None, ...]
    bias: tuple[Tensor | None, ...]
    scales: tuple[float, ...]
    held: Held = field(default_factory=Held, compare=False)

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

    def buffer(self, dtype: torch.dtype, hold: bool, serial: int | None = None) -> Tensor:
        """The buffer P (`ops.lora_packed.pack`); with `hold` from the last time where it can be, see `Held.pack`."""
        if hold:
            return self.held.pack(self.stack, self.a, self.b, self.bias, self.scales, dtype, serial)
        return pack(self.stack, self.a, self.b, self.bias, self.scales, dtype)

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

    @functools.cached_property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """qkv, o, gate and up, down."""
        return self.qkv, self.o, self.gate_up, self.down

    @functools.cached_property
    def trained(self) -> tuple[Tensor | None, ...]:
        """What may take a gradient, in the order in which the Function returns them."""
        factors = tuple(t for g in self.groups for t in g.factors)
        return *factors, self.norm1, self.norm2, self.q_norm, self.k_norm

    def take_over(self, before: LayerParts) -> None:
        """Go on with the buffers of an earlier reading: `train()` and `eval()` change the layer, but not its weights."""
        for mine, old in zip(self.groups, before.groups, strict=True):
            object.__setattr__(mine, "held", old.held)

    def release(self) -> None:
        """Give back weights that were kept in 16 bits."""
        for group in self.groups:
            group.held.release()

    @functools.cached_property
    def q_width(self) -> int:
        """Elements of q a token."""
        return self.heads * self.head_dim

    @functools.cached_property
    def inner(self) -> int:
        """Elements of gate, and of up, a token."""
        return self.gate_up.stack.n // 2


# Beside the layers, not in them: a copy or a saved model takes no part of it along.
_read: weakref.WeakKeyDictionary[nn.Module, tuple[Stamp, LayerParts]] = weakref.WeakKeyDictionary()


def parts_of(layer: Any) -> LayerParts:
    """`LayerParts.of`, from the last time where the layer is what it was then. Errors: Unfit with the reason."""
    stamp = stamp_of(layer)
    known = None if stamp is None else _read.get(layer)
    if known is not None and known[0] == stamp:
        return known[1]
    _read.pop(layer, None)
    found = LayerParts.of(layer)
    if known is not None:
        found.take_over(known[1])
    if stamp is not None:
        _read[layer] = stamp, found
    return found


def stamp_of(layer: Any) -> Stamp | None:
    """All that `LayerParts.of` looks at, or None for a layer that it refuses by its kind."""
    children = vars(layer)["_modules"]
    a, m = children["self_attn"], children["mlp"]
    if not isinstance(a, parts.Attention) or not isinstance(m, parts.Mlp):
        return None
    stamp = Stamp()
    of_attention, of_mlp, config = vars(a), vars(m), vars(a)["config"]
    norms = [children["input_layernorm"], children["post_attention_layernorm"]]
    if a.QK_NORM:
        norms += [of_attention["_modules"]["q_norm"], of_attention["_modules"]["k_norm"]]
    for norm in norms:
        stamp.hooks(norm)
        stamp.objects.append(vars(norm)["_parameters"]["weight"])
        stamp.values.append(getattr(norm, norm.EPS, None) if isinstance(norm, parts.Norm) else None)
    for module in (a, m):
        stamp.hooks(module)
    stamp.objects += (of_attention["_parameters"].get("sinks"), config)
    get = of_attention.get
    stamp.values += (
        a.SOFTCAP and get(a.SOFTCAP), get("use_rope"), get("attention_dropout"), get("training"), get("is_causal"),
        get("head_dim"), get("scaling"), a.window, config.num_attention_heads, config.num_key_value_heads,
    )  # fmt: skip
    names = ((a.MERGED,) if a.MERGED else ("q_proj", "k_proj", "v_proj")) + ("o_proj",)
    for name in names:
        stamp.linear(of_attention["_modules"][name])
    for name in ((m.MERGED,) if m.MERGED else ("gate_proj", "up_proj")) + ("down_proj",):
        stamp.linear(of_mlp["_modules"][name])
    return stamp
