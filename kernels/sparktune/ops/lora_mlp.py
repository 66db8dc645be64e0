r"""A gated MLP with LoRA inside its matrix products: gate and up as one, the activation, down.

    [e | u] = [x | x Ag^T | x Au^T] Pgu^T            P as in `lora_linear`, gate and up stacked
    h       = act(e) u                               act is silu (`swiglu`) or gelu's tanh form (`geglu`)
    y       = [h | h Ad^T] Pd^T

h is written into rows with room, so that h Ad^T lands beside it without a copy. Backward, from dy:

    dh        = [dy | s dy Bd] Pd[:, :I]
    [de | du] = dh through act, side by side, in rows with room
    dx        = [de | du | s de Bg | s du Bu] Pgu[:, :K]
    dAd = s (dy Bd)^T h,   dBd = s dy^T (h Ad^T),    and the same for gate and up with x

Saved are x, [e | u] and the two low-rank products. Where Ad is trained h is made again, in the pass that makes de and du,
and written over dh, which nobody else reads: 2 bytes an element in 16 bits, where a pass of its own would move 6. y is
never needed, and nothing else of the forward is recomputed.

Shapes: x [..., K]; gate and up [I, K], down [N, I]; each with A [r, in] and B [out, r] or without, ranks free, and a
bias or none. Rounding: every product's result, act(e) and h in x's dtype. Dropout: a mask for x that gate and up share,
and one for h.

Source: as in `lora_linear`; Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch, geglu, glu, swiglu
from sparktune.ops.device import DeviceProperties
from sparktune.ops.dropout import draw, under
from sparktune.ops.fused import Fused
from sparktune.ops.geglu import _through
from sparktune.ops.glu import load, place, store
from sparktune.ops.lora_linear import branch, check, judged_weight, lora_inputs, weight_inputs
from sparktune.ops.lora_packed import (
    Stack,
    factor_gradients,
    flatten,
    forward_layers,
    input_gradient,
    matrix,
    unflatten,
    with_room,
)  # fmt: skip
from sparktune.ops.numerics import cast, exp, quotient, reciprocal
from sparktune.ops.spec import FLOATS, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors
from sparktune.ops.weights import Weight

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
    (ag, bg, zg, au, bu, zu, ad, bd, zd), (seed_x, seed_h) = each, _seeds(seed)
    e = branch(x, dense[0], ag, bg, zg, seed_x, scales[0], dropout)
    u = branch(x, dense[1], au, bu, zu, seed_x, scales[1], dropout)
    h = swiglu.reference(e, u) if activation == "silu" else geglu.reference(e, u, "tanh")
    return branch(h, dense[2], ad, bd, zd, seed_h, scales[2], dropout)


@triton.jit
def _act(e, dtype: tl.constexpr, TANH: tl.constexpr):
    """act(e) and act'(e), as `swiglu` and `geglu` have them."""
    if TANH:
        share, slope = _through(e, True)
        act = e * share
        slope = share + e * slope
    else:
        d = 1.0 + exp(-e)
        s = reciprocal(d)
        act = quotient(e, d, dtype != tl.float32)
        slope = s * (1.0 + e * (1.0 - s))
    return act, slope


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, h_ptr, n, gate_stride, up_stride, h_stride, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one row a program: h."""
    row, cols, mask = place(n, BLOCK)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    act, _ = _act(gate, gate_ptr.dtype.element_ty, TANH)
    store(h_ptr, row, h_stride, cols, mask, cast(act, h_ptr.dtype.element_ty).to(tl.float32) * up)


@triton.jit
def backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, dh_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    TANH: tl.constexpr, REMAKE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row a program: both gradients; with REMAKE then h over dh, of which nobody else reads this block."""
    row, cols, mask = place(n, BLOCK)
    dh = load(dh_ptr, row, dh_stride, cols, mask)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    act, slope = _act(gate, gate_ptr.dtype.element_ty, TANH)
    store(dup_ptr, row, dup_stride, cols, mask, dh * act)
    store(dgate_ptr, row, dgate_stride, cols, mask, dh * up * slope)
    if REMAKE:
        h = cast(act, dh_ptr.dtype.element_ty).to(tl.float32) * up
        store(dh_ptr, row, dh_stride, cols, mask, h)


def activated(eu: Tensor, activation: str, room: int) -> Tensor:
    """h [M, I], in rows with `room` behind them, of [e | u] [M, 2 I]."""
    gate, up = glu.halves(eu)
    h = glu.roomy(gate.shape, room, gate)
    glu.launch(forward_kernel, (gate, up, h), TANH=activation == "gelu_tanh")
    return h


def activation_backward(dh: Tensor, eu: Tensor, deu: Tensor, activation: str, remake: bool) -> None:
    """The gradient of [e | u] into `deu` [M, 2 I]; with `remake` h over dh [M, I], which nobody else may read."""
    glu.launch(backward_kernel, (dh, *glu.halves(eu), *glu.halves(deu)), TANH=activation == "gelu_tanh", REMAKE=remake)


def _stacks(
    weights: list[Tensor | None], layout: list[int], a: tuple[Tensor | None, ...], bias: tuple[Tensor | None, ...]
) -> tuple[Stack, Stack]:
    """(gate over up, down)."""
    gate, up, down = unflatten(weights, layout)
    g, u, d = (0 if t is None else t.shape[0] for t in a)
    return Stack((gate, up), (g, u), any(z is not None for z in bias[:2])), Stack((down,), (d,), bias[2] is not None)


def _seeds(seed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Seeds of the mask over x and of the one over h."""
    return (None, None) if seed is None else (seed[:1], seed[1:])


def _forward(
    x: Tensor, weights: list[Tensor | None], layout: list[int], ag: Tensor | None, bg: Tensor | None, zg: Tensor | None,
    au: Tensor | None, bu: Tensor | None, zu: Tensor | None, ad: Tensor | None, bd: Tensor | None, zd: Tensor | None,
    seed: Tensor | None, scales: list[float], activation: str, dropout: float, tail_free: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, [e | u], x A^T of gate and up, h Ad^T)."""
    a, b, z = (ag, au, ad), (bg, bu, bd), (zg, zu, zd)
    wide, narrow = _stacks(weights, layout, a, z)
    seed_x, seed_h = _seeds(seed)
    # Each call makes its buffer and lets go of it, so that only one of 235 and 117 MB (Llama-3.1-8B) is there at a time.
    flat = matrix(x)
    eu, tail = forward_layers(wide, flat, a[:2], b[:2], z[:2], scales[:2], under(flat, seed_x, dropout), tail_free)
    h = activated(eu, activation, narrow.room)
    y, tail_down = forward_layers(narrow, h, a[2:], b[2:], z[2:], scales[2:], under(h, seed_h, dropout), True)
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
    seed_x, seed_h = _seeds(seed)
    dy, before = matrix(dy), any(needs[:7])  # whether anything before h wants a gradient
    dh, dtail = input_gradient(narrow, dy, a[2:], b[2:], z[2:], scales[2:], seed_h, dropout, before, needs[7])
    if before:
        deu, h = glu.roomy(eu.shape, wide.room_out, eu), dh
        activation_backward(dh, eu, deu, activation, needs[7])
    else:
        h = activated(eu, activation, 0) if needs[7] else dy
    h = under(h, seed_h, dropout) if needs[7] else h
    last = factor_gradients(narrow, dy, h, tail_down, dtail, a[2:], b[2:], z[2:], scales[2:], needs[7:])
    if not before:
        return *(dy.new_empty(0) for _ in range(7)), *last  # type: ignore[return-value]
    del dh, h
    row = with_room(deu, wide.r)
    dx, dtail = input_gradient(
        wide, deu, a[:2], b[:2], z[:2], scales[:2], seed_x, dropout, needs[0], needs[1] or needs[4], row
    )  # fmt: skip
    flat = matrix(x)
    flat = under(flat, seed_x, dropout) if needs[1] or needs[4] else flat
    first = factor_gradients(wide, deu, flat, tail, dtail, a[:2], b[:2], z[:2], scales[:2], needs[1:7])
    return dx.view(x.shape) if needs[0] else dx, *first, *last  # type: ignore[return-value]


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
    y: Tensor = _OP(x, tensors, layout, *each, draw(x, dropout, 2), list(scales), activation, dropout, tail_free)
    return y


VARIANTS = ("nf4", "gelu dense bias", "dropout", "up alone")
SCALES = (0.5, 2.0, 1.5)


def _shapes(p: Problem) -> dict[str, tuple[int, int]]:
    k, wide = p.dims["k"], p.dims["inner"]
    return {"g": (wide, k), "u": (wide, k), "d": (k, wide)}


def _inputs(p: Problem) -> dict[str, Input]:
    found = {"x": Input((p.dims["rows"], p.dims["k"]), p.dtype, grad=True, spread=0.1)}  # a thousandfold stays in fp16
    for i, (name, (n, k)) in enumerate(_shapes(p).items()):
        found |= weight_inputs(f"w{name}", n, k, p.dtype, p.variant == "nf4")
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
    return weights, each, torch.tensor([7, 1000], device=t["x"].device), activation, 0.25


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


def _launches(p: DeviceProperties) -> list[Launch]:
    """Both passes of both activations, the backward with h made again. The other kernels are `lora_linear`'s."""
    acts = {"silu": {"TANH": False}, "gelu_tanh": {"TANH": True}}
    found = glu.launches(p, acts, pointers={"forward_kernel": ("gate", "up", "h")})
    acts = {k: {**v, "REMAKE": True} for k, v in acts.items()}
    return found + glu.launches(p, acts, pointers={"backward_kernel": ("dh", "gate", "up", "dgate", "dup")})


def _without_b(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    base = {k: v for k, v in t.items() if k[0] not in "ab"}
    return call({k: torch.zeros_like(v) if k[0] == "b" else v for k, v in t.items()}, p), call(base, p)


MUTANTS = Mutant.table(
    """relu: ReLU in place of SiLU
- act = quotient(e, d, dtype != tl.float32)
+ act = tl.maximum(e, 0.0)
silu-slope: SiLU's slope without that of its sigmoid
- slope = s * (1.0 + e * (1.0 - s))
+ slope = s
gelu-slope: GELU's slope without that of its share
- slope = share + e * slope
+ slope = share
gelu-for-silu: the other activation
- glu.launch(forward_kernel, (gate, up, h), TANH=activation == "gelu_tanh")
+ glu.launch(forward_kernel, (gate, up, h), TANH=activation != "gelu_tanh")
gelu-for-silu-backward: the other activation's derivative
- (dh, *glu.halves(eu), *glu.halves(deu)), TANH=activation == "gelu_tanh"
+ (dh, *glu.halves(eu), *glu.halves(deu)), TANH=activation != "gelu_tanh"
gradients-swapped: gradients of gate and up in each other's place
- *glu.halves(deu))
+ *glu.halves(deu)[::-1])
h-not-remade: down's A from dh in place of h
- if REMAKE:
+ if False:
h-too-early: dh read after h is written over it
- dh = load(dh_ptr, row, dh_stride, cols, mask)
-     gate = load(gate_ptr, row, gate_stride, cols, mask)
-     up = load(up_ptr, row, up_stride, cols, mask)
-     act, slope = _act(gate, gate_ptr.dtype.element_ty, TANH)
+ gate = load(gate_ptr, row, gate_stride, cols, mask)
+     up = load(up_ptr, row, up_stride, cols, mask)
+     act, slope = _act(gate, gate_ptr.dtype.element_ty, TANH)
+     store(dh_ptr, row, dh_stride, cols, mask, act * up)
+     dh = load(dh_ptr, row, dh_stride, cols, mask)
deu-over-eu: gradients written over the saved gate and up
- deu, h = glu.roomy(eu.shape, wide.room_out, eu), dh
+ deu, h = eu, dh
up-for-gate: gate's and up's weights exchanged
- gate, up, down = unflatten(weights, layout)
+ up, gate, down = unflatten(weights, layout)
scales-of-wide: gate's and up's scales exchanged
- z[:2], scales[:2], under(
+ z[:2], scales[1::-1], under(
scale-of-down: down's scale taken for gate's
- z[2:], scales[2:], seed_h, dropout, before, needs[7])
+ z[2:], scales[:1], seed_h, dropout, before, needs[7])
rows-of-gate @lora_packed: up's B from gate's rows
- summed(dy[:, rows], tail
+ summed(dy[:, : rows.stop - rows.start], tail
da-of-neighbour @lora_packed: A's gradient from the neighbouring ranks
- self._every[self._stack.slot(i)].to(ai.dtype, copy=apart)
+ self._every.roll(1, 0)[self._stack.slot(i)].to(ai.dtype, copy=apart)
h-undropped: down's A from h before dropout
- h = under(h, seed_h, dropout) if needs[7] else h
+ h = h
one-mask: h dropped by x's seed
- else (seed[:1], seed[1:])
+ else (seed[:1], seed[:1])
frozen-up: no gradient at all where down and x alone are asked for
- any(needs[:7])  # whether
+ all(needs[:7])  # whether
bias-forgotten: biases left out where up has none
- any(z is not None for z in bias[:2])
+ all(z is not None for z in bias[:2])
bias-rows @lora_packed: gate's bias gradient over both
- dy[:, rows].sum(0
+ dy[:, : rows.stop - rows.start].mul(2).sum(0
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
    launches=_launches,
    bytes_moved=_bytes,
    flops=_flops,
    bound="matrix",
    nonfinite_kinds=False,  # Inf in x A^T meets the zeros between the layers' ranks
    laws=(Law("with every B = 0 the branches are not there", _without_b, tolerance=2e-2),),
    mutants=MUTANTS,
)
