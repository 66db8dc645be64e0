r"""SwiGLU: the product inside a gated MLP, silu(gate) * up.

Forward, with s(e) = 1 / (1 + exp(-e)) and each step in fp32, rounded to the tensors' dtype where stated:

    h = round(e / (1 + exp(-e)))        silu, as PyTorch rounds it
    y = round(h up)

This is bit for bit what `torch.nn.functional.silu(gate) * up` gives: the same division, the same two roundings. Keeping
h in fp32 would be more accurate, but not what the model was trained with.

Backward, in fp32 throughout, rounded once at the end:

    dup   = dy silu(e)
    dgate = dy up s(e) (1 + e (1 - s(e)))

Nothing intermediate is rounded, so in fp16 the product dy up cannot overflow on its way to a finite gradient.

Shapes: gate and up [..., N] of one dtype, fp32, bf16 or fp16, or both merged in one [..., 2N], gate first -> y [..., N].
Strides are free; y and a merged gradient may have room (see glu.py). Saved: what came in.

Bytes: forward reads two and writes one, backward reads three and writes two: 8 M N elements in all.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import glu
from sparktune.ops.fused import Fused
from sparktune.ops.glu import load, place, store
from sparktune.ops.numerics import cast, exp, quotient
from sparktune.ops.spec import FLOATS, Mutant, OpSpec, Problem, Tensors


def reference(gate: Tensor, up: Tensor | None = None, room: int = 0, grad_room: int = 0) -> Tensor:
    """Plain PyTorch, in the same rounding order; the oracle is this on float64 tensors. Room changes no values."""
    if up is None:
        gate, up = glu.halves(gate)
    return torch.nn.functional.silu(gate) * up


@triton.jit
def forward_kernel(gate_ptr, up_ptr, y_ptr, n, gate_stride, up_stride, y_stride, BLOCK: tl.constexpr):
    """One block of one row a program."""
    row, cols, mask = place(n, BLOCK)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    h = cast(quotient(gate, 1.0 + exp(-gate), dtype != tl.float32), dtype).to(tl.float32)
    store(y_ptr, row, y_stride, cols, mask, h * up)


@triton.jit
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row a program: both gradients."""
    row, cols, mask = place(n, BLOCK)
    dy = load(dy_ptr, row, dy_stride, cols, mask)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    s = quotient(1.0, 1.0 + exp(-gate))
    dup = dy * gate * s
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    store(dup_ptr, row, dup_stride, cols, mask, dup)
    store(dgate_ptr, row, dgate_stride, cols, mask, dgate)


def _forward(gate: Tensor, up: Tensor | None, room: int, grad_room: int) -> Tensor:
    e, u = glu.halves(gate) if up is None else (gate, up)
    y = glu.roomy(e.shape, room, e)
    glu.launch(forward_kernel, (e, u, y))
    return y


def _backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, room: int, grad_room: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """(dgate, dup), or the merged gradient and nothing."""
    if up is None:
        both = glu.roomy(gate.shape, grad_room, gate)
        (e, u), (dgate, dup) = glu.halves(gate), glu.halves(both)
        found = both, torch.empty(0, dtype=gate.dtype, device=gate.device)
    else:
        e, u = gate, up
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        found = dgate, dup
    glu.launch(backward_kernel, (dy, e, u, dgate, dup))
    return found


_OP = Fused("swiglu", _forward, _backward, reference=reference, grads=("gate", "up"))


def swiglu(gate: Tensor, up: Tensor | None = None, *, room: int = 0, grad_room: int = 0) -> Tensor:
    """silu(gate) * up, elementwise: two [..., N] -> [..., N]; or one merged [..., 2N], with no `up`. Differentiable once.

    y has row stride N + room, a merged gradient 2N + grad_room. Strides of what comes in are free, an output gradient
    with stride 0 too. Errors: ValueError for unlike shapes or dtypes, an odd merged width, negative room, a dtype other
    than fp32, bf16, fp16, or tensors on different devices.
    """
    glu.check("swiglu", gate, up, room, grad_room)
    y: Tensor = _OP(gate, up, room, grad_room)
    return y


def _call(t: Tensors, p: Problem) -> Tensor:
    return swiglu(*glu.arguments(t), **glu.rooms(p))


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest y when silu, before it is rounded, is right to a relative `slack`."""
    gate, up = (x.detach() for x in glu.pair(t))
    if slack == 0:
        y = reference(gate, up)
        return y, y
    act = torch.nn.functional.silu(gate.double())
    return glu.products(act, act.abs() * slack, up, p.dtype)


MUTANTS = Mutant.table(
    """relu: ReLU in place of SiLU
- cast(quotient(gate, 1.0 + exp(-gate), dtype != tl.float32),
+ cast(tl.maximum(gate, 0.0),
sigmoid-sign: sigmoid of minus the gate
- quotient(gate, 1.0 + exp(-gate),
+ quotient(gate, 1.0 + exp(gate),
gelu: the sigmoid form of GELU
- quotient(gate, 1.0 + exp(-gate),
+ quotient(gate, 1.0 + exp(-1.702 * gate),
unrounded: silu not rounded before the product
- h = cast(quotient(gate, 1.0 + exp(-gate), dtype != tl.float32), dtype)
+ h = quotient(gate, 1.0 + exp(-gate))
swapped: the product with the gate instead of up
- cols, mask, h * up)
+ cols, mask, h * gate)
dup-no-sigmoid: gradient of up without the sigmoid
- dup = dy * gate * s
+ dup = dy * gate
dgate-no-slope: the sigmoid's own derivative left out
- s * (1.0 + gate * (1.0 - s))
+ s
dgate-slope-sign: the sigmoid's derivative with the wrong sign
- (1.0 + gate * (1.0 - s))
+ (1.0 - gate * (1.0 - s))
dgate-no-up: gradient of the gate without up
- dgate = dy * up * s
+ dgate = dy * s
gradients-swapped: both gradients in each other's place
- found = dgate, dup
+ found = dup, dgate
merged-swapped: a merged gradient's halves in each other's place
- (e, u), (dgate, dup) = glu.halves(gate), glu.halves(both)
+ (e, u), (dup, dgate) = glu.halves(gate), glu.halves(both)
merged-stride: a merged gradient's gate half written as if the halves were apart
- store(dgate_ptr, row, dgate_stride, cols, mask, dgate)
+ store(dgate_ptr, row, n, cols, mask, dgate)
room-overlaps: rows of y laid out as if there were no room
- store(y_ptr, row, y_stride, cols, mask, h * up)
+ store(y_ptr, row, n, cols, mask, h * up)
scaled-gradient: gradient of up 1% too large
- dup = dy * gate * s
+ dup = dy * gate * s * 1.01
up-stride: up read with the gate's stride
- load(up_ptr, row, up_stride, cols, mask)
-     dtype
+ load(up_ptr, row, gate_stride, cols, mask)
+     dtype
dy-stride: output gradient read as if it were contiguous
- load(dy_ptr, row, dy_stride, cols, mask)
+ load(dy_ptr, row, n, cols, mask)
unwritten: the last column never written
- store(y_ptr, row, y_stride, cols, mask, h * up)
+ store(y_ptr, row, y_stride, cols, cols < n - 1, h * up)
int32-offset: row offset in 32 bits
- BLOCK)
-     dy = load
+ BLOCK)
+     row = row.to(tl.int32)
+     dy = load
dgate-over-gate: dgate written over the saved gate
- dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
+ dgate = gate.detach() if gate.is_contiguous() else torch.empty_like(gate)
dup-over-dy: dup written over the caller's output gradient
- dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
+ dup = dy if dy.is_contiguous() else torch.empty_like(up)
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(gate, up, room, grad_room)
+ y: Tensor = reference(gate, up)
"""
)

OP = OpSpec(
    name="swiglu",
    summary="silu(gate) * up, bit for bit PyTorch's forward, with a fused backward",
    variants=("", "merged"),
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 5, "columns": 320},
        "prime": {"rows": 7, "columns": 211},
        "batched": {"batch": 2, "rows": 3, "columns": 64},
        "room": {"rows": 3, "columns": 72, "room": 16},
        "wide": {"rows": 2, "columns": 8209},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
        "no columns": {"rows": 3, "columns": 0},
        "far": {"rows": 3, "columns": 64},
        "huge": {"rows": 2**18 + 3, "columns": 8192},
        "speed": {"rows": 16384, "columns": 14336},
    },
    inputs=glu.inputs,
    call=_call,
    reference=lambda t, p, compute: reference(*glu.arguments(t)),
    launches=lambda p: glu.launches(p, {"": {}}),
    bytes_moved=glu.bytes_moved,
    flops=lambda p, w: (5 if w == "forward" else 11) * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    tail=glu.tail,
    laws=glu.LAWS,
    mutants=MUTANTS,
)
