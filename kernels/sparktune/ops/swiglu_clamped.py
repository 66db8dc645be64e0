r"""Clamped SwiGLU, the product inside gpt-oss's experts: both inputs are limited, and up is shifted by one.

Forward, with limit L (7 in gpt-oss) and alpha (1.702), each step in fp32 and rounded to the tensors' dtype where stated:

    e = min(gate, L)                       u = round(max(-L, min(up, L)) + 1)
    s = round(sigmoid(round(alpha e)))     h = round(e s)
    y = round(u h)

These are the roundings of transformers' GptOssExperts, so the forward is bit for bit what it gives.

Backward, in fp32 throughout and with nothing rounded in between, s = sigmoid(alpha e):

    dgate = dy (clamp(up) + 1) s (1 + alpha e (1 - s))   where gate <= L, else 0
    dup   = dy e s                                       where |up| <= L, else 0

At the limit itself the gradient passes, and where the input is NaN it is 0, both as in PyTorch's clamp.

Shapes: gate_up [..., 2N], fp32, bf16 or fp16 -> y [..., N]. `interleaved`: columns alternate, gate, up, gate, up, as in
gpt-oss's checkpoints; else all gates come first. The gradient lies as the input does. Strides are free; y and the gradient may
have room (see glu.py). Saved: gate_up.

Bytes: forward reads 2N and writes N elements a row, backward reads 3N and writes 2N.

Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import glu
from sparktune.ops.device import DeviceProperties
from sparktune.ops.fused import Fused
from sparktune.ops.glu import load, place, store
from sparktune.ops.numerics import cast, exp, quotient
from sparktune.ops.spec import FLOATS, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors

ALPHA, LIMIT = 1.702, 7.0


def _apart(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else glu.halves(gate_up)


def reference(
    gate_up: Tensor, limit: float = LIMIT, alpha: float = ALPHA, interleaved: bool = True, room: int = 0,
    grad_room: int = 0,
) -> Tensor:  # fmt: skip
    """Plain PyTorch, in the same rounding order; the oracle is this on float64 tensors. Room changes no values."""
    gate, up = _apart(gate_up, interleaved)
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@triton.jit
def _product(gate, up, limit, alpha, dtype: tl.constexpr):
    """y in fp32, before its last rounding. Comparisons let a NaN through, where minimum and maximum might not."""
    e = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    u = cast(u + 1.0, dtype).to(tl.float32)
    t = cast(e * alpha, dtype).to(tl.float32)
    s = cast(quotient(1.0, 1.0 + exp(-t), dtype != tl.float32), dtype).to(tl.float32)
    h = cast(e * s, dtype).to(tl.float32)
    return u * h


@triton.jit
def _gradients(dy, gate, up, limit, alpha):
    """(dgate, dup) in fp32."""
    e = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    s = quotient(1.0, 1.0 + exp(-e * alpha))
    dgate = dy * (u + 1.0) * s * (1.0 + alpha * e * (1.0 - s))
    dup = dy * (e * s)
    return tl.where(gate <= limit, dgate, 0.0), tl.where((up <= limit) & (up >= -limit), dup, 0.0)


@triton.jit
def forward_kernel(gate_ptr, up_ptr, y_ptr, n, gate_stride, up_stride, y_stride, limit, alpha, BLOCK: tl.constexpr):
    """One block of one row a program, gate and up side by side."""
    row, cols, mask = place(n, BLOCK)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    store(y_ptr, row, y_stride, cols, mask, _product(gate, up, limit, alpha, y_ptr.dtype.element_ty))


@triton.jit
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    limit, alpha, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row a program, gate and up side by side."""
    row, cols, mask = place(n, BLOCK)
    dy = load(dy_ptr, row, dy_stride, cols, mask)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    dgate, dup = _gradients(dy, gate, up, limit, alpha)
    store(dgate_ptr, row, dgate_stride, cols, mask, dgate)
    store(dup_ptr, row, dup_stride, cols, mask, dup)


@triton.jit
def forward_pairs_kernel(y_ptr, gate_up_ptr, n, y_stride, gate_up_stride, limit, alpha, BLOCK: tl.constexpr):
    """One block of one row a program, gate and up interleaved: read as the wide row that they are, then dealt out."""
    row, cols, mask = place(n, BLOCK)
    _, both, within = place(2 * tl.cast(n, tl.int64), 2 * BLOCK)
    gate, up = tl.split(tl.reshape(load(gate_up_ptr, row, gate_up_stride, both, within), (BLOCK, 2)))
    store(y_ptr, row, y_stride, cols, mask, _product(gate, up, limit, alpha, y_ptr.dtype.element_ty))


@triton.jit
def backward_pairs_kernel(
    dy_ptr, gate_up_ptr, grad_ptr, n, dy_stride, gate_up_stride, grad_stride, limit, alpha, BLOCK: tl.constexpr
):
    """One block of one row a program, gate and up interleaved, and their gradients too."""
    row, cols, mask = place(n, BLOCK)
    _, both, within = place(2 * tl.cast(n, tl.int64), 2 * BLOCK)
    dy = load(dy_ptr, row, dy_stride, cols, mask)
    gate, up = tl.split(tl.reshape(load(gate_up_ptr, row, gate_up_stride, both, within), (BLOCK, 2)))
    dgate, dup = _gradients(dy, gate, up, limit, alpha)
    store(grad_ptr, row, grad_stride, both, within, tl.reshape(tl.join(dgate, dup), (2 * BLOCK,)))


def _forward(gate_up: Tensor, limit: float, alpha: float, interleaved: bool, room: int, grad_room: int) -> Tensor:
    y = glu.roomy((*gate_up.shape[:-1], gate_up.shape[-1] // 2), room, gate_up)
    if interleaved:
        glu.launch(forward_pairs_kernel, (y, gate_up), limit, alpha)
    else:
        glu.launch(forward_kernel, (*glu.halves(gate_up), y), limit, alpha)
    return y


def _backward(
    dy: Tensor, gate_up: Tensor, limit: float, alpha: float, interleaved: bool, room: int, grad_room: int,
    needs: list[bool],
) -> Tensor:  # fmt: skip
    grad = glu.roomy(gate_up.shape, grad_room, gate_up)
    if interleaved:
        glu.launch(backward_pairs_kernel, (dy, gate_up, grad), limit, alpha)
    else:
        glu.launch(backward_kernel, (dy, *glu.halves(gate_up), *glu.halves(grad)), limit, alpha)
    return grad


_OP = Fused("swiglu_clamped", _forward, _backward, reference=reference, grads=("gate_up",))


def swiglu_clamped(
    gate_up: Tensor, *, limit: float = LIMIT, alpha: float = ALPHA, interleaved: bool = True, room: int = 0,
    grad_room: int = 0,
) -> Tensor:  # fmt: skip
    """gpt-oss's activation: [..., 2N], gate and up merged, -> [..., N]. Differentiable once.

    `interleaved` says that gate and up alternate, as in the checkpoint; else all gates come first. y has row stride N +
    room, the gradient 2N + grad_room. Strides of what comes in are free, an output gradient with stride 0 too. Errors:
    ValueError for an odd width, a limit that is not positive, negative room, or a dtype other than fp32, bf16, fp16.
    """
    glu.check("swiglu_clamped", gate_up, None, room, grad_room)
    if not limit > 0:
        raise ValueError(f"swiglu_clamped: limit must be positive, got {limit}")
    y: Tensor = _OP(gate_up, float(limit), float(alpha), interleaved, room, grad_room)
    return y


def _inputs(p: Problem) -> dict[str, Input]:
    rows = (*([p.dims["batch"]] if "batch" in p.dims else []), p.dims["rows"])
    return {"gate_up": Input((*rows, 2 * p.dims["columns"]), p.dtype, grad=True)}


def _arguments(p: Problem) -> dict[str, Any]:
    return {"limit": float(p.dims.get("limit", LIMIT)), "interleaved": p.variant == "interleaved"}


def _call(t: Tensors, p: Problem) -> Tensor:
    room = p.dims.get("room", 0)
    return swiglu_clamped(t["gate_up"], **_arguments(p), room=room, grad_room=room // 2)


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest y when the sigmoid, before it is rounded, is right to a relative `slack`."""
    if slack == 0:
        y = reference(t["gate_up"].detach(), **_arguments(p))
        return y, y
    limit = _arguments(p)["limit"]
    gate, up = _apart(t["gate_up"].detach(), p.variant == "interleaved")
    e, u = gate.clamp(max=limit), up.clamp(min=-limit, max=limit) + 1
    s = torch.sigmoid((e * ALPHA).double())
    off = torch.where(e.isfinite(), s * slack + 1e-36, 0.0)  # fp32's exp overflows where s is about that small
    ends = [u * (e * end.float().to(p.dtype)) for end in (s - off, s + off)]
    return torch.minimum(*ends), torch.maximum(*ends)


def _saturated(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    # What lies past the limits counts as the limit.
    limit, p = LIMIT, replace(p, dims={**p.dims, "limit": int(LIMIT)})
    gate, up = _apart(t["gate_up"], p.variant == "interleaved")
    gate, up = gate + limit, torch.where(up > 0, up + limit, up - limit)
    at = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)

    def merged(g: Tensor, u: Tensor) -> Tensors:
        return {"gate_up": torch.stack((g, u), -1).flatten(-2) if p.variant == "interleaved" else torch.cat((g, u), -1)}

    return call(merged(gate, up), p), call(merged(*at), p)


def _launches(p: DeviceProperties) -> list[Launch]:
    scalars = ("limit", "alpha")
    pairs = {"forward_pairs_kernel": ("y", "gate_up"), "backward_pairs_kernel": ("dy", "gate_up", "grad")}
    apart = glu.launches(p, {"": {}, "side by side": {}}, scalars)[-2:]
    return glu.launches(p, {"interleaved": {}}, scalars, pairs) + apart


MUTANTS = Mutant.table(
    """no-gate-limit: the gate not limited in the forward
- e = tl.where(gate > limit, limit, gate)
-     u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
-     u = cast
+ e = gate
+     u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
+     u = cast
gate-limited-below: the gate limited from below as well
- e = tl.where(gate > limit, limit, gate)
-     u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
-     u = cast
+ e = tl.where(gate > limit, limit, tl.where(gate < -limit, -limit, gate))
+     u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
+     u = cast
nan-limited: a NaN in the gate taken for the limit
- e = tl.where(gate > limit, limit, gate)
-     u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
-     u = cast
+ e = tl.where(gate <= limit, gate, limit)
+     u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
+     u = cast
up-limited-above: up limited from above alone
- u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
-     u = cast
+ u = tl.where(up > limit, limit, up)
+     u = cast
no-shift: up not shifted by one
- u = cast(u + 1.0, dtype).to(tl.float32)
+ u = u
shift-unrounded: the shifted up not rounded
- u = cast(u + 1.0, dtype).to(tl.float32)
+ u = u + 1.0
silu: alpha left out of the sigmoid
- t = cast(e * alpha, dtype).to(tl.float32)
+ t = e
sigmoid-unrounded: the sigmoid not rounded before its product
- s = cast(quotient(1.0, 1.0 + exp(-t), dtype != tl.float32), dtype).to(tl.float32)
+ s = quotient(1.0, 1.0 + exp(-t))
argument-unrounded: alpha times the gate not rounded
- t = cast(e * alpha, dtype).to(tl.float32)
+ t = e * alpha
product-unrounded: gate times sigmoid not rounded
- h = cast(e * s, dtype).to(tl.float32)
+ h = e * s
limit-ignored-by-gate-gradient: a gradient past the gate's limit
- tl.where(gate <= limit, dgate, 0.0)
+ dgate
limit-ignored-by-up-gradient: a gradient past up's lower limit
- (up <= limit) & (up >= -limit)
+ up <= limit
no-shift-gradient: up not shifted in the gate's gradient
- dgate = dy * (u + 1.0) * s
+ dgate = dy * u * s
slope-alpha: alpha left out of the sigmoid's slope
- (1.0 + alpha * e * (1.0 - s))
+ (1.0 + e * (1.0 - s))
gradient-of-unlimited: up's gradient from the gate before its limit
- dup = dy * (e * s)
+ dup = dy * (gate * s)
deal-swapped: interleaved pairs taken up first
- gate, up = tl.split(tl.reshape(load(gate_up_ptr, row, gate_up_stride, both, within), (BLOCK, 2)))
-     store(y_ptr
+ up, gate = tl.split(tl.reshape(load(gate_up_ptr, row, gate_up_stride, both, within), (BLOCK, 2)))
+     store(y_ptr
gradients-swapped: interleaved gradients in each other's place
- tl.join(dgate, dup)
+ tl.join(dup, dgate)
gradients-halved: interleaved gradients written as halves
- tl.reshape(tl.join(dgate, dup), (2 * BLOCK,))
+ tl.reshape(tl.trans(tl.join(dgate, dup)), (2 * BLOCK,))
layout-ignored: halves taken for interleaved pairs
- if interleaved:
-         glu.launch(forward
+ if True:
+         glu.launch(forward
dy-stride: output gradient read as if it were contiguous
- _, both, within = place(2 * tl.cast(n, tl.int64), 2 * BLOCK)
-     dy = load(dy_ptr, row, dy_stride, cols, mask)
+ _, both, within = place(2 * tl.cast(n, tl.int64), 2 * BLOCK)
+     dy = load(dy_ptr, row, n, cols, mask)
room-overlaps: rows of the gradient laid out as if there were no room
- store(grad_ptr, row, grad_stride, both
+ store(grad_ptr, row, 2 * n, both
int32-offset: row offset in 32 bits
- _, both, within = place(2 * tl.cast(n, tl.int64), 2 * BLOCK)
-     gate, up
+ _, both, within = place(2 * tl.cast(n, tl.int64), 2 * BLOCK)
+     row = row.to(tl.int32)
+     gate, up
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(gate_up, float(limit), float(alpha), interleaved, room, grad_room)
+ y: Tensor = reference(gate_up, limit, alpha, interleaved)
"""
)

OP = OpSpec(
    name="swiglu_clamped",
    summary="gpt-oss's (clamp(up) + 1) * gate * sigmoid(1.702 gate), bit for bit PyTorch's forward, with a fused backward",
    variants=("interleaved", "side by side"),
    dtypes=FLOATS,
    sizes={
        # Its values scaled by 1000 are mostly within such a limit; a gradient that is mostly 0 would prove nothing.
        "typical": {"rows": 5, "columns": 320, "limit": 2048},
        "limited": {"rows": 7, "columns": 211, "limit": 1},
        "batched": {"batch": 2, "rows": 3, "columns": 64},
        "room": {"rows": 3, "columns": 72, "room": 16},
        "wide": {"rows": 2, "columns": 2053, "limit": 2},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
        "no columns": {"rows": 3, "columns": 0},
        "far": {"rows": 3, "columns": 64},
        "huge": {"rows": 2**18 + 3, "columns": 8192},
        "speed": {"rows": 16384, "columns": 14336},
    },
    inputs=_inputs,
    call=_call,
    reference=lambda t, p, compute: reference(t["gate_up"], **_arguments(p)),
    launches=_launches,
    bytes_moved=glu.bytes_moved,
    flops=lambda p, w: (10 if w == "forward" else 20) * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    tail=glu.tail,
    laws=(Law("past the limits is at the limits", _saturated),),
    mutants=MUTANTS,
)
