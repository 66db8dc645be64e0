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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparktune.models import layer_mlp
from sparktune.models.attention_graph import Attended
from sparktune.models.checkpointing import INPUT, NORMS, strip_kinds
from sparktune.models.layer_call import (
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    Call,
    State,
    buffer,
    gradients,
    normed,
    project,
    sums_of,
    unproject,
)
from sparktune.ops import add_rms_norm, dispatch, glu, qk_norm_rope
from sparktune.ops.lora_packed import with_room
from sparktune.ops.rope import rotate


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
    """Fill what is missing in `state` up to the residual sum after attention.

    Used by the forward, where everything is missing, and by the backward, for what was not kept.
    """
    _attend(call, x, state)
    if state.x1 is None:
        assert state.attended is not None
        out = state.attended.output.reshape(x.shape[0], -1)
        state.x1 = project(call, state, OUT, out, buffer(call, state, OUT, x.dtype), onto=x)
        dispatch.record("lora_linear", dispatch.route("decoder_layer", x))


def _attend(call: Call, x: Tensor, state: State) -> None:
    """Fill in what is missing of q, k and v, and attention."""
    p, stays = call.parts, NORMS in call.keep
    if state.qkv is None:
        n1, state.r1 = normed(x, p.norm1, p.eps1, p.order, p.qkv.stack.room)
        state.qkv = project(call, state, QKV, n1, buffer(call, state, QKV, x.dtype), tail_free=True, apart=not stays)
        dispatch.record("lora_qkv", dispatch.route("decoder_layer", x))
        state.n1 = n1 if stays else None
        del n1
        place(call, state)
    elif p.q_norm is not None and state.q is None:
        place(call, state)
    if state.attended is None:
        q, k, v = views(call, state)
        state.attended = Attended(q, k, v, call.documents, p.scale, p.window, None, None)


class DecoderLayer(torch.autograd.Function):
    """x [M, K] -> y [M, K]; see the module for the maths, `LayerParts.trained` for what follows `call`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *trained: Tensor | None) -> Tensor:
        """One layer; keeps x and what `call.keep` names."""
        state, kept, wanted = State(), call.keep, any(ctx.needs_input_grad)
        advance(call, x, state)
        if NORMS not in kept:
            state.r1 = None
        stored: Any = None
        rest: Left = []
        first: Left = []
        if wanted:  # the MLP needs none of it
            _forget(call, state)
            if call.store is not None:
                rest, leaving = _leave(call, x, state, REST)
                stored = call.store.put(leaving)
        y = layer_mlp.forward(call, state, x.dtype)
        if not wanted:
            return y
        state.serials = tuple(g.held.serial for g in call.parts.groups)
        if "residual" not in kept:
            state.x1 = None
        if stored is not None:
            first, leaving = _leave(call, x, state, (*strip_kinds(call.strips), "residual"))
            stored.put_first(leaving)
        ctx.stored, ctx.left = stored, (first, rest)
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
        state, (first, later), ctx.state, ctx.left = ctx.state, ctx.left, None, None
        stored, needs = ctx.stored, ctx.needs_input_grad
        x = ctx.saved_tensors[0] if ctx.saved_tensors else None
        if stored is None:
            assert x is not None
            dx, found = backward(ctx.call, x, state, dy, needs[0], needs[2:])
            return dx, None, *found
        _return(first, stored.first())

        def rest() -> Tensor:
            found = _return(later, stored.rest())
            arrived = x if found is None else found
            assert arrived is not None
            return arrived

        dx, found = backward(ctx.call, rest, state, dy, needs[0], needs[2:])
        stored.rest()
        return dx, None, *found


REST = (INPUT, "qkv", "attention")  # what may leave before the MLP, and come back while the backward is at it
Left = list[tuple[Any, str]]  # whose, and which


def _forget(call: Call, state: State) -> None:
    """Let go of what the backward makes again up to the residual sum after attention."""
    kept, p = call.keep, call.parts
    if "attention" not in kept:
        state.attended = None
    if "qkv" not in kept:
        state.qkv = None
    if "qkv" not in kept or (p.q_norm is not None and NORMS not in kept):
        if state.attended is not None:
            state.attended.forget_inputs()
        state.q = state.k = None


def _leave(call: Call, x: Tensor, state: State, kinds: Sequence[str]) -> tuple[Left, list[Tensor]]:
    """Of some kinds of x and the state what goes to the store, which then holds it alone, and where it was."""
    offers: list[tuple[str, Any, str]] = [("residual", state, "x1")]
    offers += [(kind, strip, "eu") for kind, strip in zip(strip_kinds(call.strips), state.strips, strict=False)]
    offers += [(INPUT, None, "x"), *(("qkv", state, n) for n in ("qkv", "q", "k")), ("attention", state, "attended")]
    going = call.leaving & {*kinds}
    left = [(of, n) for kind, of, n in offers if kind in going and getattr(of, n, x) is not None]
    if (state, "qkv") in left and state.attended is not None:
        state.attended.forget_inputs()
    found: list[Tensor] = []
    for of, name in left:
        t: Any = x if of is None else getattr(of, name)
        found.append(t.forget_output() if name == "attended" else t)
        if name not in ("x", "attended"):
            setattr(of, name, None)
    return left, found


def _return(left: Left, back: list[Tensor]) -> Tensor | None:
    """x if it went to the store; the rest of what did goes where it was."""
    x = None
    for (of, name), t in zip(left, back, strict=True):
        if of is None:
            x = t
        elif name == "attended":
            of.attended.return_output(t)
        else:
            setattr(of, name, t)
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
    if state.x1 is None:
        x = x() if callable(x) else x
        advance(call, x, state)
    assert state.x1 is not None

    sums = [sums_of(g, flags) for g, flags in zip(p.groups, need, strict=True)]
    row = _row_of(dy, p.down.stack.r)
    dn2, r2 = layer_mlp.backward(call, state, dy, row, before[DOWN], before[GATE_UP], sums[GATE_UP], sums[DOWN])
    del row
    for i in (GATE_UP, DOWN):
        found[ends[i] : ends[i + 1]] = gradients(sums[i])
    if dn2 is None:
        return None, found
    assert r2 is not None

    # The second norm, and the sum with the residual's gradient.
    dx1, dnorm = add_rms_norm._backward(dn2, dy, state.x1, p.norm2, r2, p.order, [True, norms[1]], p.o.stack.room_out)
    dispatch.record("add_rms_norm", dispatch.route("add_rms_norm", dx1))
    if norms[1]:
        found[ends[4] + 1] = dnorm
    del dn2
    state.x1 = None

    # The output projection and attention.
    x = x() if callable(x) else x
    _attend(call, x, state)
    assert state.attended is not None
    out = state.attended.output.reshape(x.shape[0], -1)
    do, dtail = unproject(call, state, OUT, dx1, before[OUT], sums[OUT], with_room(dx1, p.o.stack.r))
    if sums[OUT].any:
        sums[OUT].add(dx1, out, state.tails[OUT], dtail)
        found[ends[OUT] : ends[OUT + 1]] = gradients(sums[OUT])
    del out, dtail
    if not before[OUT]:
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
    dn1, dtail = unproject(call, state, QKV, dqkv, before[QKV], sums[QKV], with_room(dqkv, p.qkv.stack.r))
    if state.n1 is None and (sums[QKV].of_inputs or state.r1 is None):
        state.n1, state.r1 = normed(x, p.norm1, p.eps1, p.order, 0)
    if sums[QKV].any:
        sums[QKV].add(dqkv, dqkv if state.n1 is None else state.n1, state.tails[QKV], dtail)
        found[ends[QKV] : ends[QKV + 1]] = gradients(sums[QKV])
    state.n1 = None
    del dqkv, dtail
    if not before[QKV]:
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
