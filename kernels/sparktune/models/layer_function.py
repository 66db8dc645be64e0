r"""A whole pre-norm decoder layer as one autograd Function that chooses what it keeps.

    n1  = norm(x) g1                        [q | k | v] = n1 Wqkv^T + LoRA           q, k turned (and normalised)
    o   = attention(q, k, v)                x1 = x + o Wo^T + LoRA
    n2  = norm(x1) g2                       [e | u] = n2 Wgu^T + LoRA
    h   = act(e) u                          y  = x1 + h Wd^T + LoRA

LoRA is inside each product (`ops.lora_packed`), the residual sums are the products' own addends, and the norms write rows with
room for x A^T. Backward remakes what was not kept, in the order of the forward and no further than gate and up: h comes from
the activation's backward pass, and the down projection's result is needed by nobody. The sum of a norm's gradient and the
residual's is one pass (`ops.add_rms_norm`'s backward).

Residual sums are rounded once, from the product's fp32 accumulator, where transformers rounds the product first; everything
else rounds as the ops do.

Sources: Hu et al., "LoRA", 2021; Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparktune.models.attention_graph import Attended
from sparktune.models.checkpointing import INPUT, NONE, NORMS, WEIGHTS
from sparktune.models.documents import Documents
from sparktune.models.layer_parts import Group, LayerParts
from sparktune.models.parts import Tables
from sparktune.ops import add_rms_norm, dispatch, glu, lora_mlp, qk_norm_rope, rms_norm
from sparktune.ops.lora_packed import factor_gradients, forward_packed, input_gradient, with_room
from sparktune.ops.rope import rotate


@dataclass
class State:
    """Activations of one layer, each here or None. Rows are tokens, [M, width]."""

    qkv: Tensor | None = None  # after RoPE, in place; before it where there are head norms
    q: Tensor | None = None  # normalised and turned, where there are head norms; else views of qkv
    k: Tensor | None = None
    attended: Attended | None = None
    x1: Tensor | None = None
    eu: Tensor | None = None
    n1: Tensor | None = None  # rows of the norms, and their 1 / rms
    r1: Tensor | None = None
    n2: Tensor | None = None
    r2: Tensor | None = None
    tails: tuple[Tensor | None, ...] = (None, None, None, None)  # x A^T of qkv, o, gate and up, down
    serials: tuple[int, ...] = ()  # of the groups' held buffers, when this layer's forward had written them


@dataclass(frozen=True)
class Call:
    """What a layer is applied to, besides x and what is trained."""

    parts: LayerParts
    shape: tuple[int, int]  # batch, sequence
    tables: Tables | None  # None: nothing is turned by its position
    documents: Documents | None
    keep: frozenset[str]
    store: Any = None  # a `HostStore`
    leaving: frozenset[str] = NONE  # what goes there until the backward, of what is kept and x


def project(
    call: Call, i: int, x: Tensor, onto: Tensor | None = None, tail_free: bool = False, room: int = 0,
    known: Tensor | None = None, serial: int | None = None, apart: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(onto + x W^T + LoRA [M, N] in rows with room, x A^T [M, R], or `known`) for the input x [M, K] of group `i`."""
    group = call.parts.groups[i]
    p = group.buffer(x.dtype, WEIGHTS in call.keep, serial)
    return forward_packed(
        x, p, group.stack.n, group.one, tail_free=tail_free, onto=onto, room=room, known=known, apart=apart
    )


def normed(x: Tensor, weight: Tensor, eps: float, order: str, room: int) -> tuple[Tensor, Tensor]:
    """(norm of x [M, K] in rows with room, 1 / rms [M])."""
    y, r = rms_norm._forward(x, weight, eps, order, room)
    dispatch.record("rms_norm", dispatch.route("rms_norm", x))
    return y, r


def heads_of(call: Call, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, S, heads, D] as views of [M, q + 2 kv]."""
    p = call.parts
    kv = p.kv_heads * p.head_dim
    return tuple(  # type: ignore[return-value]
        t.unflatten(0, call.shape).unflatten(-1, (-1, p.head_dim)) for t in qkv.split((p.q_width, kv, kv), 1)
    )


def place(call: Call, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention takes them, of `state.qkv`; q and k are turned in its place, or written apart after norms."""
    p = call.parts
    assert state.qkv is not None
    q, k, v = heads_of(call, state.qkv)
    if call.tables is None:
        return q, k, v
    cos, sin, at = call.tables
    if p.q_norm is None or p.k_norm is None:
        rotate(q, k, q, k, cos, sin, at, False, False)
        dispatch.record("rope", dispatch.route("rope", q))
        return q, k, v
    state.q, state.k = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    qk_norm_rope.forward_into(q, k, state.q, state.k, p.q_norm, p.k_norm, cos, sin, at, p.head_eps, p.head_order)
    dispatch.record("qk_norm_rope", dispatch.route("qk_norm_rope", q))
    return state.q, state.k, v


def views(call: Call, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a state whose qkv is there and turned."""
    assert state.qkv is not None
    q, k, v = heads_of(call, state.qkv)
    return (q if state.q is None else state.q), (k if state.k is None else state.k), v


def advance(call: Call, x: Tensor, state: State) -> None:
    """Fill what is missing in `state` up to gate and up, and n2 only where that needs it.

    Used by the forward, where everything is missing, and by the backward, for what was not kept.
    """
    _attend(call, x, state)
    if state.x1 is None:
        assert state.attended is not None
        out, known = state.attended.output.reshape(x.shape[0], -1), state.tails[1]
        state.x1, tail = project(call, 1, out, onto=x, known=known, serial=_serial(state, 1))
        _keep_tail(state, 1, tail)
        dispatch.record("lora_linear", dispatch.route("decoder_layer", x))
    _feed(call, state)


def _serial(state: State, i: int) -> int | None:
    return state.serials[i] if state.serials else None


def _keep_tail(state: State, i: int, tail: Tensor) -> None:
    state.tails = (*state.tails[:i], tail, *state.tails[i + 1 :])


def _attend(call: Call, x: Tensor, state: State) -> None:
    """Fill in what is missing of q, k and v, and attention."""
    p, stays = call.parts, NORMS in call.keep
    if state.qkv is None:
        n1, state.r1 = normed(x, p.norm1, p.eps1, p.order, p.qkv.stack.room)
        state.qkv, tail = project(
            call, 0, n1, tail_free=True, known=state.tails[0], serial=_serial(state, 0), apart=not stays
        )  # fmt: skip
        _keep_tail(state, 0, tail)
        dispatch.record("lora_qkv", dispatch.route("decoder_layer", x))
        state.n1 = n1 if stays else None
        del n1
        place(call, state)
    elif p.q_norm is not None and state.q is None:
        place(call, state)
    if state.attended is None:
        q, k, v = views(call, state)
        state.attended = Attended(q, k, v, call.documents, p.scale, p.window, None, None)


def _feed(call: Call, state: State) -> None:
    """Make gate and up of x1, where they are missing."""
    if state.eu is not None:
        return
    assert state.x1 is not None
    p = call.parts
    state.n2, state.r2 = normed(state.x1, p.norm2, p.eps2, p.order, p.gate_up.stack.room)
    state.eu, tail = project(
        call, 2, state.n2, tail_free=True, room=p.gate_up.stack.room_out, known=state.tails[2],
        serial=_serial(state, 2), apart=NORMS not in call.keep,
    )  # fmt: skip
    _keep_tail(state, 2, tail)


class DecoderLayer(torch.autograd.Function):
    """x [M, K] -> y [M, K]; see the module for the maths, `LayerParts.trained` for what follows `call`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *trained: Tensor | None) -> Tensor:
        """One layer; keeps x and what `call.keep` names."""
        p, state, kept = call.parts, State(), call.keep
        advance(call, x, state)
        assert state.x1 is not None and state.eu is not None and state.attended is not None
        if NORMS not in kept:
            state.r1 = state.n2 = state.r2 = None
        h = lora_mlp.activated(state.eu, p.activation, p.down.stack.room)
        if "gate_up" not in kept:
            state.eu = None
        y, tail = project(call, 3, h, onto=state.x1, tail_free=True)
        dispatch.record("lora_mlp", dispatch.route("lora_mlp", x))
        if not any(ctx.needs_input_grad):
            return y
        state.tails = (*state.tails[:3], tail)
        state.serials = tuple(g.held.serial for g in p.groups)
        if "residual" not in kept:
            state.x1 = None
        if "attention" not in kept:
            state.attended = None
        if "qkv" not in kept:
            if state.attended is not None:
                state.attended.forget_inputs()
            state.qkv = state.q = state.k = None
        ctx.left, leaving = _leave(call, x, state)
        ctx.stored = None if call.store is None else call.store.put(leaving, sum(n in FIRST for n in ctx.left))
        if INPUT not in call.leaving:
            ctx.save_for_backward(x)
        ctx.call, ctx.state = call, state
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x and of what is trained."""
        dispatch.no_double_backward("decoder_layer")
        if ctx.state is None:
            raise RuntimeError("a decoder layer's backward ran twice, and what it kept is gone: call the model again.")
        state, ctx.state = ctx.state, None
        stored, needs = ctx.stored, ctx.needs_input_grad
        x = ctx.saved_tensors[0] if ctx.saved_tensors else None
        if stored is None:
            assert x is not None
            dx, found = backward(ctx.call, x, state, dy, needs[0], needs[2:])
            return dx, None, *found
        first = stored.first()
        _return(state, ctx.left[: len(first)], first)

        def rest() -> Tensor:
            found = _return(state, ctx.left[len(first) :], stored.rest())
            arrived = x if found is None else found
            assert arrived is not None
            return arrived

        dx, found = backward(ctx.call, rest, state, dy, needs[0], needs[2:])
        stored.rest()
        return dx, None, *found


LEAVE = {"residual": ("x1",), "gate_up": ("eu",), INPUT: ("x",), "qkv": ("qkv", "q", "k"), "attention": ("attended",)}
FIRST = ("x1", "eu")  # what a backward begins with; the rest may arrive while it is at gate and up


def _leave(call: Call, x: Tensor, state: State) -> tuple[list[str], list[Tensor]]:
    """Of x and the state what goes to the store, which then holds it alone, and its names."""
    names = [n for kind, of in LEAVE.items() if kind in call.leaving for n in of if getattr(state, n, x) is not None]
    if "qkv" in names and state.attended is not None:
        state.attended.forget_inputs()
    found: list[Tensor] = []
    for name in names:
        t: Any = x if name == "x" else getattr(state, name)
        found.append(t.forget_output() if name == "attended" else t)
        if name not in ("x", "attended"):
            setattr(state, name, None)
    return names, found


def _return(state: State, names: list[str], back: list[Tensor]) -> Tensor | None:
    """x if it went to the store; the rest of what did goes where it was."""
    found = dict(zip(names, back, strict=True))
    x = found.pop("x", None)
    if "attended" in found:
        assert state.attended is not None
        state.attended.return_output(found.pop("attended"))
    for name, t in found.items():
        setattr(state, name, t)
    return x


def backward(
    call: Call, x: Tensor | Callable[[], Tensor], state: State, dy: Tensor, need_dx: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """(dx, the gradients of `LayerParts.trained`); consumes the state. x may be what waits for it, and for what of the state
    is not needed before the layer's second half is done."""
    p = call.parts
    dy = dispatch.rows(dy)
    found: list[Tensor | None] = [None] * len(needs)
    ends = list(itertools.accumulate((2 * len(g.a) for g in p.groups), initial=0))
    need = [needs[a:b] for a, b in itertools.pairwise(ends)]  # of each group's factors
    before = [need_dx or any(needs[: ends[i]]) for i in range(4)]  # whether anything in front of group i wants one
    norms = needs[ends[4] :]
    for i, norm in ((0, norms[0]), (2, norms[1])):  # the first norm is before qkv, the second before gate and up
        before[i] = before[i] or norm
    before[1] = before[1] or norms[0] or norms[2] or norms[3]
    before[2] = before[2] or before[1]
    before[3] = before[3] or before[2] or norms[1]
    if callable(x) and state.x1 is None:
        x = x()
    if callable(x):
        _feed(call, state)
    else:
        advance(call, x, state)
    assert state.x1 is not None and state.eu is not None

    # Down, and the activation: h over dh, which nobody else reads.
    want = any(need[3][::2])
    dh, dtail = _input(call, 3, state, dy, before[3], want, _row_of(dy, p.down.stack.r))
    if before[3]:
        deu, h = state.eu, dh  # written over what they come from
        lora_mlp.activation_backward(dh, state.eu, deu, p.activation, remake=want)
    else:
        h = lora_mlp.activated(state.eu, p.activation, 0) if want else dy
    _factors(p.down, dy, h, state.tails[3], dtail, need[3], found, ends[3])
    state.eu = None
    if not before[3]:
        return None, found
    del dh, h

    # Gate and up, the second norm, and the sum with the residual's gradient.
    want = any(need[2][::2])
    row = with_room(deu, p.gate_up.stack.r)
    dn2, dtail = _input(call, 2, state, deu, before[2], want, row)
    if state.n2 is None and (want or state.r2 is None):
        state.n2, state.r2 = normed(state.x1, p.norm2, p.eps2, p.order, 0)
    n2 = deu if state.n2 is None else state.n2
    _factors(p.gate_up, deu, n2, state.tails[2], dtail, need[2], found, ends[2])
    state.n2 = None
    del deu, row, n2
    if not before[2]:
        return None, found
    assert state.r2 is not None
    dx1, dnorm = add_rms_norm._backward(
        dn2, dy, state.x1, p.norm2, state.r2, p.order, [True, norms[1]], p.o.stack.room_out
    )
    dispatch.record("add_rms_norm", dispatch.route("add_rms_norm", dx1))
    if norms[1]:
        found[ends[4] + 1] = dnorm
    del dn2
    state.x1 = None

    # The output projection and attention.
    if callable(x):
        x = x()
        _attend(call, x, state)
    assert state.attended is not None
    out = state.attended.output.reshape(x.shape[0], -1)
    row = with_room(dx1, p.o.stack.r)
    do, dtail = _input(call, 1, state, dx1, before[1], any(need[1][::2]), row)
    _factors(p.o, dx1, out, state.tails[1], dtail, need[1], found, ends[1])
    del out, row
    if not before[1]:
        return None, found
    q, k, v = views(call, state)
    dq, dk, dv = state.attended.gradients(do.view(*call.shape, p.heads, p.head_dim), q, k, v)
    state.attended = None
    del do
    dqkv = glu.roomy((x.shape[0], p.qkv.stack.n), p.qkv.stack.room_out, x)
    dnorms = _unplaced(call, state, dqkv, dq, dk, dv, norms[2] or norms[3])
    del dq, dk, dv, q, k, v
    state.qkv = state.q = state.k = None
    for i in (2, 3):
        if norms[i] and dnorms is not None:
            found[ends[4] + i] = dnorms[i - 2].to((p.q_norm, p.k_norm)[i - 2].dtype)  # type: ignore[union-attr]

    # q, k and v, and the first norm.
    want = any(need[0][::2])
    row = with_room(dqkv, p.qkv.stack.r)
    dn1, dtail = _input(call, 0, state, dqkv, before[0], want, row)
    if state.n1 is None and (want or state.r1 is None):
        state.n1, state.r1 = normed(x, p.norm1, p.eps1, p.order, 0)
    n1 = dqkv if state.n1 is None else state.n1
    _factors(p.qkv, dqkv, n1, state.tails[0], dtail, need[0], found, ends[0])
    state.n1 = None
    del dqkv, row, n1
    if not before[0]:
        return None, found
    assert state.r1 is not None
    dx, dnorm = add_rms_norm._backward(
        dn1, dx1, x, p.norm1, state.r1, p.order, [need_dx, norms[0]], p.down.stack.room_out if need_dx else 0
    )
    if norms[0]:
        found[ends[4]] = dnorm
    if not need_dx:
        return None, found
    _WITH_ROOM[dx.device] = dx
    engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.queue_callback(_WITH_ROOM.clear)  # where no layer is left to take it
    return dx, found


_WITH_ROOM: dict[torch.device, Tensor] = {}  # the last layer's gradient; the next one's backward takes it out


def _row_of(dy: Tensor, r: int) -> Tensor | None:
    """dy [M, K] with `r` columns to write right of it, where a layer's backward made it just now with room for them.

    Rows of anybody else's may lie as far apart and have something between them.
    """
    last = _WITH_ROOM.pop(dy.device, None)
    ours = last is not None and last.data_ptr() == dy.data_ptr() and last.stride() == dy.stride()
    return with_room(dy, r) if ours else None


def _input(
    call: Call, i: int, state: State, dy: Tensor, need_dx: bool, need_da: bool, row: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g = call.parts.groups[i]
    held = WEIGHTS in call.keep and (need_dx or need_da)
    p = g.buffer(dy.dtype, True, state.serials[i]) if held else None
    return input_gradient(g.stack, dy, g.a, g.b, g.bias, g.scales, None, 0.0, need_dx, need_da, row, p)


def _factors(
    g: Group, dy: Tensor, x: Tensor, tail: Tensor | None, dtail: Tensor, need: tuple[bool, ...],
    found: list[Tensor | None], first: int,
) -> None:  # fmt: skip
    """Gradients of a group's A and B into `found`."""
    if not any(need):
        return
    assert tail is not None
    wanted = [flag for i in range(len(g.a)) for flag in (need[2 * i], need[2 * i + 1], False)]
    grads = factor_gradients(g.stack, dy, x, tail, dtail, g.a, g.b, g.bias, g.scales, wanted, apart=False)
    for i in range(len(g.a)):
        for j in (0, 1):
            if need[2 * i + j]:
                found[first + 2 * i + j] = grads[3 * i + j]


def _unplaced(
    call: Call, state: State, dqkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, sums: bool
) -> Tensor | None:  # fmt: skip
    """Gradients of q, k and v through RoPE and head norms into dqkv [M, q + 2 kv]; the norms' own [2, D] with `sums`."""
    p = call.parts
    to_q, to_k, to_v = heads_of(call, dqkv)
    to_v.copy_(dv)
    if call.tables is None:
        to_q.copy_(dq)
        to_k.copy_(dk)
        return None
    cos, sin, at = call.tables
    if p.q_norm is None or p.k_norm is None:
        rotate(dq, dk, to_q, to_k, cos, sin, at, False, True)
        return None
    assert state.qkv is not None
    q, k, _ = heads_of(call, state.qkv)
    return qk_norm_rope.backward_into(
        dq, dk, q, k, to_q, to_k, p.q_norm, p.k_norm, cos, sin, at, p.head_eps, p.head_order, sums
    )
