r"""A gated MLP with LoRA inside its matrix products: gate and up as one, the activation, down.

    [e | u] = [x | x Ag^T | x Au^T] Pgu^T            P as in `lora_linear`, gate and up stacked
    h       = act(e) u                               act is silu (`swiglu`) or gelu's tanh form (`geglu`)
    y       = [h | h Ad^T] Pd^T

h is written into rows with room, so that h Ad^T lands beside it without a copy. Backward, from dy:

    dh        = [dy | s dy Bd] Pd[:, :I]
    [de | du] = dh through act, side by side, in rows with room
    dx        = [de | du | s de Bg | s du Bu] Pgu[:, :K]
    dAd = s (dy Bd)^T h,   dBd = s dy^T (h Ad^T),    and the same for gate and up with x

Saved are x, [e | u] and the two low-rank products. h is made again from [e | u], elementwise, where Ad is trained; y is
never needed. Nothing else of the forward is recomputed.

Shapes: x [..., K]; gate and up [I, K], down [N, I]; each with A [r, in] and B [out, r] or without, ranks free, and a
bias or none. Rounding: every product's result, act(e) and h in x's dtype. Dropout: a mask for x that gate and up share,
and one for h.

Source: as in `lora_linear`; Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops import dispatch, geglu, swiglu
from sparktune.ops.dropout import draw, drop, drop_kernel, drop_launches
from sparktune.ops.fused import Fused
from sparktune.ops.lora_linear import branch, check, judged_weight, lora_inputs, weight_inputs
from sparktune.ops.lora_packed import (
    Stack,
    adapter_kernel,
    adapter_launches,
    backward_packed,
    flatten,
    forward_packed,
    matrix,
    pack,
    summed,
    unflatten,
    with_room,
)  # fmt: skip
from sparktune.ops.spec import FLOATS, Input, Mutant, OpSpec, Problem, Tensors
from sparktune.ops.weights import Weight

KERNELS = (adapter_kernel, drop_kernel)  # what `launches` names
ACTIVATIONS = ("silu", "gelu_tanh")
Adapter = tuple[Tensor, Tensor] | None


def reference(
    x: Tensor, weights: list[Tensor | None], layout: list[int], ag: Tensor | None, bg: Tensor | None, zg: Tensor | None,
    au: Tensor | None, bu: Tensor | None, zu: Tensor | None, ad: Tensor | None, bd: Tensor | None, zd: Tensor | None,
    seed: Tensor | None, scales: list[float], activation: str, dropout: float, tail_free: bool,
) -> Tensor:  # fmt: skip
    """Plain PyTorch: three layers as PEFT computes them."""
    dense = [w.reference(x.dtype) for w in unflatten(weights, layout)]
    return plain(x, dense, (ag, bg, zg, au, bu, zu, ad, bd, zd), seed, scales, activation, dropout)


def plain(
    x: Tensor, dense: Sequence[Tensor], each: Sequence[Tensor | None], seed: Tensor | None, scales: Sequence[float],
    activation: str, dropout: float,
) -> Tensor:  # fmt: skip
    """The reference with dense weights."""
    e = branch(x, dense[0], *each[0:3], seed, scales[0], dropout)
    u = branch(x, dense[1], *each[3:6], seed, scales[1], dropout)
    h = swiglu.reference(e, u) if activation == "silu" else geglu.reference(e, u, "tanh")
    return branch(h, dense[2], *each[6:9], None if seed is None else seed + 1, scales[2], dropout)


def _act(eu: Tensor, activation: str, room: int) -> Tensor:
    """h [M, I], in rows with `room` behind them, of [e | u] [M, 2 I]."""
    if activation == "silu":
        return swiglu._forward(eu, None, room, 0)
    return geglu._forward(eu, None, "tanh", room, 0)


def _act_backward(dh: Tensor, eu: Tensor, activation: str, room: int) -> Tensor:
    """[de | du] [M, 2 I], in rows with `room` behind them."""
    if activation == "silu":
        return swiglu._backward(dh, eu, None, 0, room, [True, False])[0]
    return geglu._backward(dh, eu, None, "tanh", 0, room, [True, False])[0]


def _stacks(
    weights: list[Tensor | None], layout: list[int], a: tuple[Tensor | None, ...], bias: tuple[Tensor | None, ...]
) -> tuple[Stack, Stack]:
    """(gate over up, down)."""
    gate, up, down = unflatten(weights, layout)
    g, u, d = (0 if t is None else t.shape[0] for t in a)
    return Stack((gate, up), (g, u), any(z is not None for z in bias[:2])), Stack((down,), (d,), bias[2] is not None)


def _under(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor | None:
    return drop(h, seed, dropout) if seed is not None and dropout else None


def _forward(
    x: Tensor, weights: list[Tensor | None], layout: list[int], ag: Tensor | None, bg: Tensor | None, zg: Tensor | None,
    au: Tensor | None, bu: Tensor | None, zu: Tensor | None, ad: Tensor | None, bd: Tensor | None, zd: Tensor | None,
    seed: Tensor | None, scales: list[float], activation: str, dropout: float, tail_free: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, [e | u], x A^T of gate and up, h Ad^T)."""
    a, b, z = (ag, au, ad), (bg, bu, bd), (zg, zu, zd)
    wide, narrow = _stacks(weights, layout, a, z)
    flat = matrix(x)
    p = pack(wide, a[:2], b[:2], z[:2], scales[:2], x.dtype)
    one = wide.one if wide.biased else None
    eu, tail = forward_packed(flat, p, wide.n, one, _under(flat, seed, dropout), tail_free)
    h = _act(eu, activation, narrow.r)
    p = pack(narrow, a[2:], b[2:], z[2:], scales[2:], x.dtype)
    one = narrow.one if narrow.biased else None
    below = _under(h, None if seed is None else seed + 1, dropout)
    y, tail_down = forward_packed(h, p, narrow.n, one, below, tail_free=True)
    return y.view(*x.shape[:-1], narrow.n), eu, tail, tail_down


def _backward(
    dy: Tensor, x: Tensor, weights: list[Tensor | None], layout: list[int],
    ag: Tensor | None, bg: Tensor | None, zg: Tensor | None, au: Tensor | None, bu: Tensor | None, zu: Tensor | None,
    ad: Tensor | None, bd: Tensor | None, zd: Tensor | None, seed: Tensor | None, eu: Tensor, tail: Tensor,
    tail_down: Tensor, scales: list[float], activation: str, dropout: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, then da, db, dbias of gate, of up and of down)."""
    a, b, z = (ag, au, ad), (bg, bu, bd), (zg, zu, zd)
    wide, narrow = _stacks(weights, layout, a, z)
    dy, flat = matrix(dy), matrix(x)
    seed_down = None if seed is None else seed + 1
    p = pack(narrow, a[2:], b[2:], z[2:], scales[2:], x.dtype)
    dh, dtail_down = backward_packed(dy, p, narrow.n, any(needs[:7]), seed_down, dropout)
    found = [dy.new_empty(0) for _ in range(10)]
    if ad is not None and needs[7]:
        h = _act(eu, activation, 0)
        h = h if seed_down is None or not dropout else drop(h, seed_down, dropout)
        found[7] = summed(dtail_down[:, narrow.slot(0)], h, ad.dtype)
        del h
    if bd is not None and needs[8]:
        found[8] = summed(dy, tail_down[:, narrow.slot(0)], bd.dtype, scales[2])
    if zd is not None and needs[9]:
        found[9] = dy.sum(0, dtype=torch.float32).to(zd.dtype)
    if not any(needs[:7]):
        return tuple(found)  # type: ignore[return-value]
    deu = _act_backward(dh, eu, activation, wide.r)
    del dh
    p = pack(wide, a[:2], b[:2], z[:2], scales[:2], x.dtype)
    dx, dtail = backward_packed(deu, p, wide.n, needs[0], seed, dropout, with_room(deu, wide.r) if wide.r else None)
    if needs[0]:
        found[0] = dx.view(x.shape)
    flat = drop(flat, seed, dropout) if seed is not None and dropout else flat
    for i in range(2):
        rows, slot = wide.rows(i), wide.slot(i)
        ai, bi, zi = a[i], b[i], z[i]
        if ai is not None and needs[1 + 3 * i]:
            found[1 + 3 * i] = summed(dtail[:, slot], flat, ai.dtype)
        if bi is not None and needs[2 + 3 * i]:
            found[2 + 3 * i] = summed(deu[:, rows], tail[:, slot], bi.dtype, scales[i])
        if zi is not None and needs[3 + 3 * i]:
            found[3 + 3 * i] = deu[:, rows].sum(0, dtype=torch.float32).to(zi.dtype)
    return tuple(found)  # type: ignore[return-value]


GRADS = ("x", "ag", "bg", "zg", "au", "bu", "zu", "ad", "bd", "zd")
_OP = Fused(
    "lora_mlp", _forward, _backward, reference=reference, grads=GRADS,
    save=lambda args, results: (*args[:13], *results[1:], *args[13:16]),
)  # fmt: skip


def lora_mlp(
    x: Tensor, weights: tuple[Weight, Weight, Weight], adapters: tuple[Adapter, Adapter, Adapter],
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0), *, activation: str = "silu",
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None), dropout: float = 0.0,
    tail_free: bool = False,
) -> Tensor:  # fmt: skip
    """down(act(gate(x)) up(x)): x [..., K] -> [..., N] in x's dtype, or autocast's.

    `weights` and `adapters`: gate, up, down; an adapter is (A [r, in], B [out, r]) or None. `activation`: silu or
    gelu_tanh; `scales`, `dropout`, `tail_free` as in `lora_linear`. Differentiable once, in x, every A, B and bias.
    Errors: ValueError for shapes or dtypes that don't fit, an unknown activation, or a dropout outside [0, 1).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"lora_mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_mlp: dropout must be in [0, 1), got {dropout}")
    gate, up, down = weights
    if up.shape != gate.shape or down.shape[1] != gate.shape[0]:
        shapes = [list(w.shape) for w in weights]
        raise ValueError(f"lora_mlp: weights must be [I, K], [I, K] and [N, I], got {shapes}")
    pairs = [pair or (None, None) for pair in adapters]
    for w, (a, b), z, like in zip(weights, pairs, biases, (x, x, None), strict=True):
        check("lora_mlp", x.new_empty(0, w.shape[1]) if like is None else like, w, a, b, z)
    x = x.to(dispatch.autocast_dtype(x) or x.dtype)
    tensors, layout = flatten(weights)
    each = [t for pair, z in zip(pairs, biases, strict=True) for t in (*pair, z)]
    y: Tensor = _OP(x, tensors, layout, *each, draw(x, dropout), list(scales), activation, dropout, tail_free)
    return y


VARIANTS = ("nf4", "gelu dense bias", "dropout", "up alone")
SCALES = (0.5, 2.0, 1.5)


def _shapes(p: Problem) -> dict[str, tuple[int, int]]:
    k, wide = p.dims["k"], p.dims["inner"]
    return {"g": (wide, k), "u": (wide, k), "d": (k, wide)}


def _inputs(p: Problem) -> dict[str, Input]:
    found = {"x": Input((p.dims["rows"], p.dims["k"]), p.dtype, grad=True, spread=0.1)}  # a thousandfold stays in fp16
    for i, (name, (n, k)) in enumerate(_shapes(p).items()):
        found |= weight_inputs(f"w{name}", n, k, p.dtype, "dense" not in p.variant)
        if name == "u" or p.variant != "up alone":
            found |= lora_inputs(n, k, p.dims["rank"] + i, p.dtype, name)
        if "bias" in p.variant and name != "u":
            found[f"z{name}"] = Input((n,), torch.float32, "parameter", grad=True)
    return found


def _arguments(t: Tensors, p: Problem) -> tuple[list[Weight], list[Any], Tensor | None, str, float]:
    weights = [judged_weight(t, f"w{name}", *shape) for name, shape in _shapes(p).items()]
    each = [t.get(f"{kind}{name}") for name in _shapes(p) for kind in "abz"]
    activation = "gelu_tanh" if "gelu" in p.variant else "silu"
    if p.variant != "dropout":
        return weights, each, None, activation, 0.0
    return weights, each, torch.full((1,), 7, device=t["x"].device), activation, 0.25


def _call(t: Tensors, p: Problem) -> Tensor:
    weights, each, seed, activation, dropout = _arguments(t, p)
    if seed is None:
        pairs: Any = [(each[i], each[i + 1]) if each[i] is not None else None for i in (0, 3, 6)]
        three: Any = tuple(weights)
        biases = (each[2], each[5], each[8])
        return lora_mlp(t["x"], three, tuple(pairs), SCALES, activation=activation, biases=biases)
    tensors, layout = flatten(weights)
    x = t["x"].to(dispatch.autocast_dtype(t["x"]) or t["x"].dtype)
    y: Tensor = _OP(x, tensors, layout, *each, seed, list(SCALES), activation, dropout, False)
    return y


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensor:
    weights, each, seed, activation, dropout = _arguments(t, p)
    dense = [w.reference(p.dtype).to(compute or p.dtype) for w in weights]
    return plain(t["x"], dense, each, seed, SCALES, activation, dropout)


def _flops(p: Problem, which: Literal["forward", "backward"]) -> int:
    m, k, wide, r = (p.dims[d] for d in ("rows", "k", "inner", "rank"))
    return 6 * m * wide * k + 6 * m * r * (wide + k) * (1 if which == "forward" else 2)


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    m, k, wide = (p.dims[d] for d in ("rows", "k", "inner"))
    return (2 * m * k + 6 * m * wide + 3 * wide * k) * p.dtype.itemsize + 3 * wide * k // 2


MUTANTS = Mutant.table(
    """gelu-for-silu: the other activation
- if activation == "silu":
-         return swiglu._forward(eu, None, room, 0)
+ if activation != "silu":
+         return swiglu._forward(eu, None, room, 0)
gelu-for-silu-backward: the other activation's derivative
- if activation == "silu":
-         return swiglu._backward(dh, eu, None, 0, room, [True, False])[0]
+ if activation != "silu":
+         return swiglu._backward(dh, eu, None, 0, room, [True, False])[0]
up-for-gate: gate's and up's weights exchanged
- gate, up, down = unflatten(weights, layout)
+ up, gate, down = unflatten(weights, layout)
scale-of-gate: gate's scale for up's B
- tail[:, slot], bi.dtype, scales[i])
+ tail[:, slot], bi.dtype, scales[0])
scale-of-down: down's scale left out of its B's gradient
- tail_down[:, narrow.slot(0)], bd.dtype, scales[2])
+ tail_down[:, narrow.slot(0)], bd.dtype)
scales-of-wide: gate's and up's scales exchanged
- eu, tail = forward_packed(flat, p, wide.n,
+ eu, tail = forward_packed(flat, pack(wide, a[:2], b[:2], z[:2], scales[1::-1], x.dtype), wide.n,
rows-of-gate: up's B from gate's rows
- summed(deu[:, rows], tail
+ summed(deu[:, : rows.stop - rows.start], tail
da-of-neighbour: A's gradient from the neighbouring ranks
- summed(dtail[:, slot], flat, ai.dtype)
+ summed(dtail[:, slot].roll(1, 1), flat, ai.dtype)
h-undropped: down's A from h before dropout
- h = h if seed_down is None or not dropout else drop(h, seed_down, dropout)
+ h = h if True else drop(h, seed_down, dropout)
one-mask: h dropped by x's seed
- below = _under(h, None if seed is None else seed + 1, dropout)
+ below = _under(h, seed, dropout)
frozen-up: no gradient at all where down and x alone are asked for
- if not any(needs[:7]):
+ if not all(needs[:7]):
bias-forgotten: biases left out where up has none
- any(z is not None for z in bias[:2])
+ all(z is not None for z in bias[:2])
bias-rows: gate's bias gradient over both
- deu[:, rows].sum(0
+ deu[:, : rows.stop - rows.start].mul(2).sum(0
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(x, tensors, layout, *each, draw(
+ y: Tensor = reference(x, tensors, layout, *each, draw(
"""
)

OP = OpSpec(
    name="lora_mlp",
    summary="A gated MLP with LoRA inside its matrix products, which keeps neither h nor its result",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 6, "k": 48, "inner": 64, "rank": 4},
        "prime": {"rows": 5, "k": 41, "inner": 37, "rank": 3},
        "no rows": {"rows": 0, "k": 32, "inner": 64, "rank": 4},
        "speed": {"rows": 4096, "k": 4096, "inner": 14336, "rank": 16},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=lambda p: adapter_launches() + drop_launches(),
    bytes_moved=_bytes,
    flops=_flops,
    bound="matrix",
    nonfinite_kinds=False,  # Inf in x A^T meets the zeros between the layers' ranks
    mutants=MUTANTS,
)
