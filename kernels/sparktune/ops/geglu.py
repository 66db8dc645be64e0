r"""GEGLU: the product inside a gated MLP with GELU, gelu(gate) * up, as Gemma has it.

Forward, with F the share of the gate that GELU lets through, each step in fp32 and rounded where stated:

    F(e) = (1 + erf(e / sqrt(2))) / 2                    approximate="none"
    F(e) = 1 / (1 + exp(-2 z)),                          approximate="tanh", where (1 + tanh z) / 2 is just that
           z = sqrt(2 / pi) (e + 0.044715 e^3), from exp(-2 |z|)
    h = round(e F(e))         as PyTorch rounds gelu
    y = round(h up)

transformers' MLPs round at the same two places. No bits are promised beyond that: PyTorch's own tanh and erf differ
between its devices. Where the gate is far below zero, 1 + tanh z cancels and PyTorch's result has few right bits; the form
with exp does not cancel.

Backward, in fp32 throughout, rounded once at the end:

    dup   = dy e F(e)
    dgate = dy up (F(e) + e F'(e))
    F'(e) = exp(-e^2 / 2) / sqrt(2 pi)                   approximate="none"
    F'(e) = 2 z' F(e) (1 - F(e)),                        approximate="tanh"
            z' = sqrt(2 / pi) (1 + 3 * 0.044715 e^2)

Shapes: gate and up [..., N] of one dtype, fp32, bf16 or fp16, or both merged in one [..., 2N], gate first -> y [..., N].
Strides are free; y and a merged gradient may have room (see glu.py). Saved: what came in.

Bytes: forward reads two and writes one, backward reads three and writes two: 8 M N elements in all.

Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import glu
from sparktune.ops.fused import Fused
from sparktune.ops.glu import load, place, store
from sparktune.ops.numerics import cast, exp, reciprocal
from sparktune.ops.spec import FLOATS, Mutant, OpSpec, Problem, Tensors

Approximate = Literal["none", "tanh"]


def reference(
    gate: Tensor, up: Tensor | None = None, approximate: str = "tanh", room: int = 0, grad_room: int = 0
) -> Tensor:
    """Plain PyTorch, in the same rounding order; the oracle is this on float64 tensors. Room changes no values."""
    if up is None:
        gate, up = glu.halves(gate)
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


@triton.jit
def _through(e, TANH: tl.constexpr):
    """F(e) and F'(e)."""
    if TANH:
        square = e * e
        z = e * tl.fma(square, 0.7978845608028654 * 0.044715, 0.7978845608028654)
        t = exp(-2.0 * tl.abs(z))  # of minus the amount, so that it never overflows and nothing cancels
        larger = reciprocal(1.0 + t)
        share = tl.where(z < 0, t * larger, larger)
        slope = tl.fma(square, 6.0 * 0.7978845608028654 * 0.044715, 2.0 * 0.7978845608028654) * (t * larger * larger)
    else:
        share = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        slope = 0.3989422804014327 * exp(-0.5 * e * e)
    return share, slope


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, y_ptr, n, gate_stride, up_stride, y_stride, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one row a program."""
    row, cols, mask = place(n, BLOCK)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    share, _ = _through(gate, TANH)
    h = cast(gate * share, y_ptr.dtype.element_ty).to(tl.float32)
    store(y_ptr, row, y_stride, cols, mask, h * up)


@triton.jit
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row a program: both gradients."""
    row, cols, mask = place(n, BLOCK)
    dy = load(dy_ptr, row, dy_stride, cols, mask)
    gate = load(gate_ptr, row, gate_stride, cols, mask)
    up = load(up_ptr, row, up_stride, cols, mask)
    share, slope = _through(gate, TANH)
    store(dup_ptr, row, dup_stride, cols, mask, dy * (gate * share))
    store(dgate_ptr, row, dgate_stride, cols, mask, dy * up * (share + gate * slope))


def _forward(gate: Tensor, up: Tensor | None, approximate: str, room: int, grad_room: int) -> Tensor:
    e, u = glu.halves(gate) if up is None else (gate, up)
    y = glu.roomy(e.shape, room, e)
    glu.launch(forward_kernel, (e, u, y), TANH=approximate == "tanh")
    return y


def _backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, approximate: str, room: int, grad_room: int, needs: list[bool]
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
    glu.launch(backward_kernel, (dy, e, u, dgate, dup), TANH=approximate == "tanh")
    return found


_OP = Fused("geglu", _forward, _backward, reference=reference, grads=("gate", "up"))


def geglu(
    gate: Tensor, up: Tensor | None = None, approximate: Approximate = "tanh", *, room: int = 0, grad_room: int = 0
) -> Tensor:
    """gelu(gate) * up, elementwise: two [..., N] -> [..., N]; or one merged [..., 2N], with no `up`. Differentiable once.

    `approximate` is PyTorch's word: "tanh" is Gemma's gelu_pytorch_tanh, "none" the one with erf. y has row stride N +
    room, a merged gradient 2N + grad_room. Strides of what comes in are free, an output gradient with stride 0 too.
    Errors: ValueError for unlike shapes or dtypes, an odd merged width, an unknown `approximate`, negative room, a dtype
    other than fp32, bf16, fp16, or tensors on different devices.
    """
    if approximate not in get_args(Approximate):
        raise ValueError(f"geglu: approximate must be one of {', '.join(get_args(Approximate))}, got {approximate!r}")
    glu.check("geglu", gate, up, room, grad_room)
    y: Tensor = _OP(gate, up, approximate, room, grad_room)
    return y


def _approximate(p: Problem) -> Approximate:
    return "none" if "erf" in p.variant else "tanh"


def _call(t: Tensors, p: Problem) -> Tensor:
    return geglu(*glu.arguments(t), _approximate(p), **glu.rooms(p))


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest y when the share of the gate, before anything is rounded, is right to `slack`."""
    gate, up = (x.detach() for x in glu.pair(t))
    act = torch.nn.functional.gelu(gate.double(), approximate=_approximate(p))
    return glu.products(act, gate.double().abs() * slack, up, p.dtype)


MUTANTS = Mutant.table(
    """silu: SiLU in place of GELU
- share = tl.where(z < 0, t * larger, larger)
+ share = 1.0 / (1.0 + exp(-e))
sigmoid-gelu: the sigmoid form of GELU in place of the tanh form
- share = tl.where(z < 0, t * larger, larger)
+ share = 1.0 / (1.0 + exp(-1.702 * e))
negative-side: gates below zero let through as much as those above
- share = tl.where(z < 0, t * larger, larger)
+ share = larger
tanh-for-erf: the tanh form where erf is asked for
- if TANH:
+ if True:
erf-for-tanh: erf where the tanh form is asked for
- if TANH:
+ if False:
no-cube: the cubic term left out
- e * tl.fma(square, 0.7978845608028654 * 0.044715, 0.7978845608028654)
+ e * 0.7978845608028654
erf-scale: erf of the gate itself
- tl.erf(e * 0.7071067811865476)
+ tl.erf(e)
half: the factor one half left out
- share = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
+ share = 1.0 + tl.erf(e * 0.7071067811865476)
unrounded: gelu not rounded before the product
- h = cast(gate * share, y_ptr.dtype.element_ty).to(tl.float32)
+ h = gate * share
swapped: the product with the gate instead of up
- cols, mask, h * up)
+ cols, mask, h * gate)
slope-cube: the cubic term's slope left out of the backward
- tl.fma(square, 6.0 * 0.7978845608028654 * 0.044715, 2.0 * 0.7978845608028654)
+ 2.0 * 0.7978845608028654
slope-three: the cube's exponent forgotten in its slope
- tl.fma(square, 6.0 *
+ tl.fma(square, 2.0 *
density-scale: the normal density without its constant
- slope = 0.3989422804014327 * exp(-0.5 * e * e)
+ slope = exp(-0.5 * e * e)
density-variance: the normal density of another variance
- exp(-0.5 * e * e)
+ exp(-e * e)
dgate-no-slope: the share's own derivative left out
- dy * up * (share + gate * slope)
+ dy * up * share
dgate-no-up: gradient of the gate without up
- dy * up * (share + gate * slope)
+ dy * (share + gate * slope)
dup-no-gate: gradient of up without the gate
- dy * (gate * share))
+ dy * share)
merged-swapped: a merged gradient's halves in each other's place
- (e, u), (dgate, dup) = glu.halves(gate), glu.halves(both)
+ (e, u), (dup, dgate) = glu.halves(gate), glu.halves(both)
up-stride: up read with the gate's stride
- up = load(up_ptr, row, up_stride, cols, mask)
-     share, _
+ up = load(up_ptr, row, gate_stride, cols, mask)
+     share, _
dy-stride: output gradient read as if it were contiguous
- load(dy_ptr, row, dy_stride, cols, mask)
+ load(dy_ptr, row, n, cols, mask)
room-overlaps: rows of y laid out as if there were no room
- store(y_ptr, row, y_stride, cols, mask, h * up)
+ store(y_ptr, row, n, cols, mask, h * up)
unwritten: the last column never written
- store(y_ptr, row, y_stride, cols, mask, h * up)
+ store(y_ptr, row, y_stride, cols, cols < n - 1, h * up)
int32-offset: row offset in 32 bits
- BLOCK)
-     dy = load
+ BLOCK)
+     row = row.to(tl.int32)
+     dy = load
dup-over-dy: dup written over the caller's output gradient
- dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
+ dup = dy if dy.is_contiguous() else torch.empty_like(up)
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(gate, up, approximate, room, grad_room)
+ y: Tensor = reference(gate, up, approximate)
"""
)

OP = OpSpec(
    name="geglu",
    summary="gelu(gate) * up, tanh or erf, rounded where PyTorch rounds, with a fused backward",
    variants=("tanh", "erf", "tanh merged"),
    dtypes=FLOATS,
    sizes={
        # Scaled by 1000, most gates below zero would let nothing through, and prove nothing: 5% of the usual spread.
        "typical": {"rows": 5, "columns": 320, "percent": 5},
        "prime": {"rows": 7, "columns": 211},
        "batched": {"batch": 2, "rows": 3, "columns": 64},
        "room": {"rows": 3, "columns": 72, "room": 16},
        "wide": {"rows": 2, "columns": 2053},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
        "no columns": {"rows": 3, "columns": 0},
        "far": {"rows": 3, "columns": 64},
        "huge": {"rows": 2**18 + 3, "columns": 8192},
        "speed": {"rows": 16384, "columns": 14336},
    },
    inputs=lambda p: glu.inputs(p, p.dims.get("percent", 100) / 100),
    call=_call,
    reference=lambda t, p, compute: reference(*glu.arguments(t), _approximate(p)),
    launches=lambda p: glu.launches(p, {"tanh": {"TANH": True}, "erf": {"TANH": False}}),
    bytes_moved=glu.bytes_moved,
    flops=lambda p, w: (12 if w == "forward" else 20) * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    exact_slack=2.0**-20,  # PyTorch's tanh and erf are other functions than these
    tail=glu.tail,
    laws=glu.LAWS,
    mutants=MUTANTS,
)
