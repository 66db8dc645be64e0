r"""The second half of a layer's Function, strip by strip of its rows: norm, gate and up, activation, down.

    n2 = norm(x1) g2      [e | u] = n2 Wgu^T + LoRA      h = act(e) u      y = x1 + h Wd^T + LoRA

No more of gate and up lies there at once than what a strip makes and what is kept, and what is kept are whole strips, the last
ones first: the forward makes them last, and the backward, which goes from the last strip to the first, uses them up before it
makes any again. Of 16384 tokens of Llama-3.1-8B gate, up and h are 1.4 GiB, of a strip 0.09, and a memory budget can be spent in
sixteenths of a layer. Where there are several strips a buffer of weights serves all of them, and in the backward both the
products that make gate and up again and their gradients; factors' gradients are summed over strips in fp32. How many there are
depends on the rows alone, so that what is kept changes no bit of the result.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparktune.models.checkpointing import NORMS, strip_kinds
from sparktune.models.layer_call import DOWN, GATE_UP, Call, State, Strip, buffer, normed, project, unproject
from sparktune.ops import dispatch, lora_mlp
from sparktune.ops.lora_packed import FactorSums, with_room


def cut(rows: int, strips: int) -> list[slice]:
    """`rows` in as many slices, the first ones as long as one another and the last no longer."""
    each = -(-rows // strips)
    return [slice(min(i * each, rows), min((i + 1) * each, rows)) for i in range(strips)]


class _Weights:
    """Buffers of weights: each made once for several strips, or where there is but one for every use, and not held."""

    def __init__(self, call: Call, state: State, dtype: torch.dtype) -> None:
        self._of = call, state, dtype
        self._made: dict[int, Tensor] | None = {} if call.strips > 1 else None

    def __call__(self, i: int) -> Tensor:
        call, state, dtype = self._of
        if self._made is None:
            return buffer(call, state, i, dtype)
        if i not in self._made:
            self._made[i] = buffer(call, state, i, dtype)
        return self._made[i]

    def shared(self, i: int, needed: bool) -> Tensor | None:
        """What serves all strips; None where there is but one, which then makes no more of it than it needs."""
        return self(i) if needed and self._made is not None else None


def forward(call: Call, state: State, dtype: torch.dtype) -> Tensor:
    """y [M, K] of `state.x1`; puts to `state.strips` what `call.keep` names."""
    x1, p = state.x1, call.parts
    assert x1 is not None
    weights, y = _Weights(call, state, dtype), torch.empty_like(x1)
    state.strips = [Strip() for _ in range(call.strips)]
    for strip, rows, kind in zip(state.strips, cut(len(x1), call.strips), strip_kinds(call.strips), strict=True):
        _feed(call, strip, x1[rows], weights(GATE_UP))
        assert strip.eu is not None
        if NORMS not in call.keep:
            strip.n2 = strip.r2 = None
        h = lora_mlp.activated(strip.eu, p.activation, p.down.stack.room)
        if kind not in call.keep:
            strip.eu = None
        project(call, strip, DOWN, h, weights(DOWN), onto=x1[rows], tail_free=True, into=y[rows])
        del h
    dispatch.record("lora_mlp", dispatch.route("lora_mlp", x1))
    return y


def _feed(call: Call, strip: Strip, x1: Tensor, p: Tensor) -> None:
    """Make gate and up of x1's rows, and the norm."""
    parts, stack = call.parts, call.parts.gate_up.stack
    strip.n2, strip.r2 = normed(x1, parts.norm2, parts.eps2, parts.order, stack.room)
    strip.eu = project(
        call, strip, GATE_UP, strip.n2, p, tail_free=True, room=stack.room_out, apart=NORMS not in call.keep
    )


def backward(
    call: Call, state: State, dy: Tensor, row: Tensor | None, need_deu: bool, need_dn: bool, gate_up: FactorSums,
    down: FactorSums,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(the gradient of the norm's rows [M, K], their 1 / rms [M]), None where not needed; adds to the factors' sums.

    `need_deu`: whether anything at or in front of gate and up wants a gradient, `need_dn`: anything in front of them. `row`:
    dy's buffer, as `with_room` returns it. Uses up `state.strips`.
    """
    p, x1 = call.parts, state.x1
    assert x1 is not None
    weights = _Weights(call, state, dy.dtype)
    dn2 = torch.empty_like(x1) if need_dn else None
    rms: list[Tensor] = []
    for strip, rows in zip(state.strips[::-1], cut(len(x1), call.strips)[::-1], strict=True):
        if strip.eu is None:
            _feed(call, strip, x1[rows], weights(GATE_UP))
        d = dy[rows]
        dh, dtail = unproject(
            call, state, DOWN, d, need_deu, down, None if row is None else row[rows],
            weights.shared(DOWN, need_deu or down.of_inputs),
        )  # fmt: skip
        deu, h = strip.eu, dh  # written over what they come from
        assert deu is not None
        if need_deu:
            lora_mlp.activation_backward(dh, deu, deu, p.activation, remake=down.of_inputs)
        elif down.of_inputs:
            h = lora_mlp.activated(deu, p.activation, 0)
        if down.any:
            down.add(d, h, strip.tails[DOWN], dtail)
        strip.eu = None
        del dh, h, dtail
        if need_deu:
            _through_gate_up(call, state, strip, deu, x1[rows], gate_up, weights, None if dn2 is None else dn2[rows])
            rms += [] if strip.r2 is None else [strip.r2]
        del deu
    state.strips = ()
    return dn2, (rms[0] if len(rms) == 1 else torch.cat(rms[::-1])) if rms else None


def _through_gate_up(
    call: Call, state: State, strip: Strip, deu: Tensor, x1: Tensor, sums: FactorSums, weights: _Weights,
    dn2: Tensor | None,
) -> None:  # fmt: skip
    """The factors' share of a strip, and the norm's gradient into `dn2`; of the norm only 1 / rms is left then."""
    p, need_dn = call.parts, dn2 is not None
    shared = weights.shared(GATE_UP, need_dn or sums.of_inputs)
    _, dtail = unproject(call, state, GATE_UP, deu, need_dn, sums, with_room(deu, p.gate_up.stack.r), shared, dn2)
    if strip.n2 is None and (sums.of_inputs or strip.r2 is None):
        strip.n2, strip.r2 = normed(x1, p.norm2, p.eps2, p.order, 0)
    if sums.any:
        sums.add(deu, deu if strip.n2 is None else strip.n2, strip.tails[GATE_UP], dtail)
    strip.n2 = None
