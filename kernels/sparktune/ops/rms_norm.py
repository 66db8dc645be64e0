r"""RMSNorm, in the rounding orders of Llama and of Gemma.

Forward, for a row x of N elements, weight w, r = 1 / sqrt(mean(x^2) + eps), all in fp32 until stated:

    llama:  y = w * round_x(x r)        the normalised row is rounded to x's dtype before the weight multiplies it
    gemma:  y = round_x(x r (1 + w))    the weight is stored less one, and only the product is rounded

Backward, with the normalised row h = x r, the gain v = w (llama) or 1 + w (gemma) and g = dy v:

    dx = r (g - h mean(g h))
    dw = sum over rows of dy round_x(h) (llama)  or  dy h (gemma)

With `room`, y is a view with row stride N + room of a buffer whose further columns nobody has written: a following
product with a LoRA puts y A^T there and multiplies both by one matrix of N + room rows.

The projection h mean(g h) is the derivative of r: scaling a row does not change y (but for eps), so dx has no part
along x.

Shapes: x [..., N] and weight [N], fp32, bf16 or fp16 each; y has x's shape and, as in PyTorch, the wider of both dtypes
(llama) or x's dtype (gemma). dx in x's dtype, dw summed in fp32 and rounded once to the weight's. Saved: x, weight,
and r in fp32.

Bytes: forward reads x and writes y; backward reads x and dy and writes dx; 5 M N elements in all, the weight being
small. Both passes are limited by memory, so each row of up to 8192 columns is read once and a longer one twice (the
second time from cache). The weight's gradient needs a sum over rows: every program keeps its own partial sum, written
once, and these few rows are then added in a fixed order, so the result is the same bits every time.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the rounding orders are those of
LlamaRMSNorm and Gemma3RMSNorm in transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.fused import Fused
from sparktune.ops.numerics import cast
from sparktune.ops.row_config import RowConfig
from sparktune.ops.row_pieces import load_piece, store_piece
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors

VARIANTS = ("llama", "gemma")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    room: int = 0,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch, in the same rounding order; `room` changes no values. Oracle: float64 throughout."""
    h = x.to(compute)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if variant == "gemma":
        return (h * (1.0 + weight.to(compute))).to(x.dtype)
    return weight * h.to(x.dtype)


@triton.jit
def _round_like(h, x_ptr, GEMMA: tl.constexpr):
    """Llama rounds the normalised row to x's dtype; Gemma does not."""
    if not GEMMA:
        h = cast(h, x_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _gain(w, GEMMA: tl.constexpr):
    w = w.to(tl.float32)
    if GEMMA:
        w = 1.0 + w
    return w


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, y_ptr, r_ptr, n, x_stride, y_stride, eps,
    GEMMA: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: y and r. Its PIECES stay in registers; 0: it is read in steps, twice."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    y_row = y_ptr + row * y_stride
    cols = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    if PIECES:
        xs = ()
        for i in tl.static_range(PIECES):
            piece = load_piece(x_row, i * BLOCK + cols, n, WHOLE)
            xs += (piece,)  # type: ignore[assignment]  # the loop is unrolled
            x = piece.to(tl.float32)
            squares += x * x
        r = tl.rsqrt(tl.sum(squares, 0) / n + eps)
        for i in tl.static_range(PIECES):
            c = i * BLOCK + cols
            h = _round_like(xs[i].to(tl.float32) * r, x_ptr, GEMMA)
            store_piece(y_row, c, n, h * _gain(load_piece(w_ptr, c, n, WHOLE), GEMMA), WHOLE)
    else:
        for start in range(0, n, BLOCK):
            x = load_piece(x_row, start + cols, n, False).to(tl.float32)
            squares += x * x
        r = tl.rsqrt(tl.sum(squares, 0) / n + eps)
        for start in range(0, n, BLOCK):
            c = start + cols
            h = _round_like(load_piece(x_row, c, n, False).to(tl.float32) * r, x_ptr, GEMMA)
            store_piece(y_row, c, n, h * _gain(load_piece(w_ptr, c, n, False), GEMMA), False)
    tl.store(r_ptr + row, r)


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, m, n, dy_stride, x_stride, rows_each,
    GEMMA: tl.constexpr, NEED_DW: tl.constexpr, PIECES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rows_each` rows a program: dx, and this program's part of dw in its own row of dw_ptr [programs, n], fp32.

    With NEED_DW a row is one piece, or is read in steps.
    """
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    dw = tl.zeros((BLOCK,), tl.float32)
    first = program * rows_each
    for i in range(tl.minimum(rows_each, m - first)):
        row = first + i  # 64 bits, as first is
        dy_row = dy_ptr + row * dy_stride
        x_row = x_ptr + row * x_stride
        dx_row = dx_ptr + row * n
        r = tl.load(r_ptr + row)
        products = tl.zeros((BLOCK,), tl.float32)
        if PIECES:
            held = ()
            for k in tl.static_range(PIECES):
                c = k * BLOCK + cols
                piece = (
                    load_piece(dy_row, c, n, WHOLE),
                    load_piece(x_row, c, n, WHOLE),
                    load_piece(w_ptr, c, n, WHOLE),
                )
                held += (piece,)  # type: ignore[assignment]
                dy, x, w = piece
                products += dy.to(tl.float32) * _gain(w, GEMMA) * (x.to(tl.float32) * r)
            along = tl.sum(products, 0) / n
            for k in tl.static_range(PIECES):
                dy, x, w = held[k]
                dy, h = dy.to(tl.float32), x.to(tl.float32) * r
                dx = (dy * _gain(w, GEMMA) - h * along) * r
                store_piece(dx_row, k * BLOCK + cols, n, dx, WHOLE)
                if NEED_DW:
                    dw += dy * _round_like(h, x_ptr, GEMMA)
        else:
            for start in range(0, n, BLOCK):
                c = start + cols
                dy = load_piece(dy_row, c, n, False).to(tl.float32)
                h = load_piece(x_row, c, n, False).to(tl.float32) * r
                products += dy * _gain(load_piece(w_ptr, c, n, False), GEMMA) * h
            along = tl.sum(products, 0) / n
            for start in range(0, n, BLOCK):
                c = start + cols
                dy = load_piece(dy_row, c, n, False).to(tl.float32)
                h = load_piece(x_row, c, n, False).to(tl.float32) * r
                dx = (dy * _gain(load_piece(w_ptr, c, n, False), GEMMA) - h * along) * r
                store_piece(dx_row, c, n, dx, False)
                if NEED_DW:
                    part = dw_ptr + program * n
                    before = load_piece(part, c, n, False)
                    store_piece(part, c, n, before + dy * _round_like(h, x_ptr, GEMMA), False)
    if NEED_DW and PIECES:
        store_piece(dw_ptr + program * n, cols, n, dw, WHOLE)


def _forward(x: Tensor, weight: Tensor, eps: float, variant: str, room: int) -> tuple[Tensor, Tensor]:
    """(y, r)."""
    gemma, n = variant == "gemma", x.shape[-1]
    dtype = x.dtype if gemma else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty((*x.shape[:-1], n + room), dtype=dtype, device=x.device)
    m = x.numel() // n if n else 0
    r = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        flat = dispatch.rows(x)
        c = RowConfig.choose(m, n, DeviceProperties.of(x.device), cut=True)
        dispatch.launch(
            forward_kernel, c.programs, x, flat, weight.contiguous(), y, r, n, flat.stride(0), n + room, eps,
            GEMMA=gemma, PIECES=c.pieces, WHOLE=c.whole, BLOCK=c.block, num_warps=c.num_warps,
        )  # fmt: skip
    return (y[..., :n] if room else y), r


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, variant: str, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    m, n = r.numel(), x.shape[-1]
    need_dw = needs[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if m == 0:
        return dx, torch.zeros_like(weight)
    flat, dy = dispatch.rows(x), dispatch.rows(dy)
    c = RowConfig.choose(m, n, DeviceProperties.of(x.device), sums=need_dw, cut=True)
    # Wide rows add to their partial sums in memory, so those begin at zero.
    make = torch.empty if c.single else torch.zeros
    partial = make((c.programs, n) if need_dw else (1,), dtype=torch.float32, device=x.device)
    dispatch.launch(
        backward_kernel, c.programs, x, dy, flat, weight.contiguous(), r, dx, partial, m, n, dy.stride(0),
        flat.stride(0), c.rows_each,
        GEMMA=variant == "gemma", NEED_DW=need_dw, PIECES=c.pieces, WHOLE=c.whole, BLOCK=c.block, num_warps=c.num_warps,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_dw else torch.empty_like(weight)


_OP = Fused(
    "rms_norm", _forward, _backward, reference=reference, grads=("x", "weight"),
    save=lambda args, results: (args[0], args[1], results[1], args[3]),
)  # fmt: skip


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, variant: str = "llama", room: int = 0
) -> torch.Tensor:
    """RMSNorm of the last dimension: x [..., N], weight [N] -> [..., N]. Differentiable once, in x and weight.

    y has row stride N + room. Strides of what comes in are free; an output gradient with stride 0 too. Errors:
    ValueError for shapes that don't fit, an unknown variant, a negative room, a dtype other than fp32, bf16, fp16, or
    tensors on different devices.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [{x.shape[-1] if x.dim() else 'N'}], got {list(weight.shape)}")
    if variant not in VARIANTS:
        raise ValueError(f"rms_norm: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if x.dtype not in FLOATS or weight.dtype not in FLOATS:
        raise ValueError(f"rms_norm: x and weight must be fp32, bf16 or fp16, got {x.dtype} and {weight.dtype}")
    if room < 0:
        raise ValueError(f"rms_norm: room must not be negative, got {room}")
    y: Tensor = _OP(x, weight, eps, variant, room)
    return y


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest y when the normalised row, before it is rounded, is right to a relative `slack`."""
    x, w = t["x"].detach(), t["weight"].detach()
    h = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + p.scalars["eps"])
    ends = [h * (1 - slack), h * (1 + slack)]
    if p.variant == "gemma":
        ends = [(end * (1 + w.double())).float().to(p.dtype) for end in ends]
    else:
        ends = [w * end.float().to(p.dtype) for end in ends]
    return torch.minimum(*ends), torch.maximum(*ends)


def _inputs(p: Problem) -> dict[str, Input]:
    """`frozen`: the weight is; where it is trained no row is cut."""
    batch = [p.dims["batch"]] if "batch" in p.dims else []
    n = p.dims["columns"]
    centre = 0.0 if p.variant == "gemma" else 1.0
    return {
        "x": Input((*batch, p.dims["rows"], n), p.dtype, grad=True),
        "weight": Input((n,), p.dtype, "parameter", grad=not p.dims.get("frozen"), centre=centre, spread=0.5),
    }


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    return (2 if which == "forward" else 3) * p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize


def _tail(t: Tensors, p: Problem) -> tuple[Tensors, Problem]:
    return {**t, "x": t["x"][-4:]}, replace(p, dims={**p.dims, "rows": 4})


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> torch.Tensor:
    return reference(t["x"], t["weight"], p.scalars["eps"], p.variant, compute=compute or torch.float32)


def _call(t: Tensors, p: Problem) -> torch.Tensor:
    return rms_norm(t["x"], t["weight"], p.scalars["eps"], p.variant, p.dims.get("room", 0))


def _doubled(call: Any, t: Tensors, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = replace(p, scalars={"eps": 4 * p.scalars["eps"]})
    return call(t, p), call({**t, "x": t["x"] * 2}, scaled)


def _permuted(call: Any, t: Tensors, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return call(t, p).flip(0), call({**t, "x": t["x"].flip(0)}, p)


def _launches(p: DeviceProperties) -> list[Launch]:
    """Every width in bf16 and Llama's order; the other dtypes and Gemma's at the widest row that stays in registers."""
    widths = RowConfig.every_width()
    cases = [(n, torch.bfloat16, "llama") for n in widths]
    cases += [(8191, torch.float32, "gemma"), (8191, torch.float16, "llama")]
    found = []
    for n, dtype, variant in cases:
        ptr = f"*{TRITON_TYPES[dtype]}"
        summed = () if n > 8192 or n in RowConfig.FILLED else (True,)  # those are as at 8192, and never cut
        for need_dw in (None, False, *summed):
            c = RowConfig.choose(2**20, n, p, sums=bool(need_dw), cut=True)
            flags = {"GEMMA": variant == "gemma", "PIECES": c.pieces, "WHOLE": c.whole, "BLOCK": c.block}
            if need_dw is None:
                name, where = "forward_kernel", "forward"
                args = dict(x_ptr=ptr, w_ptr=ptr, y_ptr=ptr, r_ptr="*fp32", n="i32")
                args |= dict(x_stride="i32", y_stride="i32", eps="fp32")
            else:
                name, where = "backward_kernel", "backward" + (", weight trained" if need_dw else "")
                args = dict(dy_ptr=ptr, x_ptr=ptr, w_ptr=ptr, r_ptr="*fp32", dx_ptr=ptr, dw_ptr="*fp32")
                args |= dict(m="i32", n="i32", dy_stride="i32", x_stride="i32", rows_each="i32")
                flags["NEED_DW"] = need_dw
            when = f"{where}, {widths[n]} columns"
            args |= dict.fromkeys(flags, "constexpr")
            found.append(Launch(when, name, args, flags, c.num_warps, 3, TRITON_TYPES[dtype], variant))
    return found


MUTANTS = Mutant.table(
    """no-eps: eps left out of the forward
- x = piece.to(tl.float32)
-             squares += x * x
-         r = tl.rsqrt(tl.sum(squares, 0) / n + eps)
+ x = piece.to(tl.float32)
+             squares += x * x
+         r = tl.rsqrt(tl.sum(squares, 0) / n)
mean-over-block: mean over the padded block instead of the row
- x = piece.to(tl.float32)
-             squares += x * x
-         r = tl.rsqrt(tl.sum(squares, 0) / n + eps)
+ x = piece.to(tl.float32)
+             squares += x * x
+         r = tl.rsqrt(tl.sum(squares, 0) / (PIECES * BLOCK) + eps)
wide-no-eps: eps left out where the row is read in steps
- x = load_piece(x_row, start + cols, n, False).to(tl.float32)
-             squares += x * x
-         r = tl.rsqrt(tl.sum(squares, 0) / n + eps)
+ x = load_piece(x_row, start + cols, n, False).to(tl.float32)
+             squares += x * x
+         r = tl.rsqrt(tl.sum(squares, 0) / n)
wide-overwrites: sum of squares keeps the last block only
- x = load_piece(x_row, start + cols, n, False).to(tl.float32)
-             squares += x * x
+ x = load_piece(x_row, start + cols, n, False).to(tl.float32)
+             squares = x * x
pieces-overwrite: sum of squares keeps the last piece only
- x = piece.to(tl.float32)
-             squares += x * x
+ x = piece.to(tl.float32)
+             squares = x * x
piece-again: the first piece of a row in place of its others
- xs[i].to(tl.float32) * r
+ xs[0].to(tl.float32) * r
pieces-share-weights: every piece multiplied by the first one's weights
- c = i * BLOCK + cols
-             h = _round_like(xs[i].to(tl.float32) * r, x_ptr, GEMMA)
-             store_piece(y_row, c, n, h * _gain(load_piece(w_ptr, c,
+ c = i * BLOCK + cols
+             h = _round_like(xs[i].to(tl.float32) * r, x_ptr, GEMMA)
+             store_piece(y_row, c, n, h * _gain(load_piece(w_ptr, cols,
projection-of-last-piece: the projection taken over the last piece
- products += dy.to(tl.float32) * _gain(w, GEMMA)
+ products = dy.to(tl.float32) * _gain(w, GEMMA)
llama-unrounded: Llama's row not rounded before the weight
- if not GEMMA:
+ if False:
gemma-plain-weight: Gemma's weight without the one
- w = 1.0 + w
+ w = w
weight-index: every column multiplied by the first weight
- h * _gain(load_piece(w_ptr, c, n, WHOLE), GEMMA), WHOLE)
+ h * _gain(load_piece(w_ptr, c * 0, n, WHOLE), GEMMA), WHOLE)
no-projection: dx without the derivative of r
- dx = (dy * _gain(w, GEMMA) - h * along) * r
+ dx = dy * _gain(w, GEMMA) * r
projection-sign: projection added in place of taken away
- dx = (dy * _gain(w, GEMMA) - h * along) * r
+ dx = (dy * _gain(w, GEMMA) + h * along) * r
wide-no-projection: wide rows without the derivative of r
- dx = (dy * _gain(load_piece(w_ptr, c, n, False), GEMMA) - h * along) * r
+ dx = dy * _gain(load_piece(w_ptr, c, n, False), GEMMA) * r
dx-unscaled: dx not multiplied by r
- dx = (dy * _gain(w, GEMMA) - h * along) * r
+ dx = dy * _gain(w, GEMMA) - h * along
dw-last-row: weight gradient of a program's last row only
- dw += dy *
+ dw = dy *
dw-no-activation: weight gradient without the normalised row
- dw += dy * _round_like(h, x_ptr, GEMMA)
+ dw += dy
wide-dw-lost: partial sums of wide rows overwritten
- before + dy *
+ dy *
last-row-missing: a program leaves its last row out
- range(tl.minimum(rows_each, m - first))
+ range(tl.minimum(rows_each, m - first) - 1)
dy-stride: output gradient read as if it were contiguous
- dy_ptr + row * dy_stride
+ dy_ptr + row * n
int32-offset: row offset in 32 bits
- row = tl.program_id(0).to(tl.int64)
+ row = tl.program_id(0)
dx-over-dy: dx written over the caller's output gradient
- dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
+ dx = dy if dy.is_contiguous() else torch.empty_like(x)
dx-over-x: dx written over the saved input
- dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
+ dx = x.detach() if x.is_contiguous() else torch.empty_like(x)
room-overlaps: rows of y laid out as if there were no room
- flat.stride(0), n + room, eps,
+ flat.stride(0), n, eps,
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(x, weight, eps, variant, room)
+ y: Tensor = reference(x, weight, eps, variant)
"""
)

OP = OpSpec(
    name="rms_norm",
    summary="RMSNorm with Llama's or Gemma's rounding order, forward and backward",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 5, "columns": 192},
        "prime": {"rows": 7, "columns": 211, "room": 16},
        "batched": {"batch": 2, "rows": 3, "columns": 64, "room": 8},
        "wide": {"rows": 3, "columns": 8209},
        "pieces": {"rows": 3, "columns": 2560, "room": 8, "frozen": 1},
        "whole": {"rows": 2, "columns": 1024, "frozen": 1},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
        "no columns": {"rows": 3, "columns": 0},
        "far": {"rows": 3, "columns": 64},
        "huge": {"rows": 2**18 + 3, "columns": 8192},
        "speed": {"rows": 131072, "columns": 4096},  # at 32768 rows the backward takes less time than its launches
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=_bytes,
    flops=lambda p, which: (4 if which == "forward" else 11) * p.dims["rows"] * p.dims["columns"],
    scalars={"eps": 1e-6},
    exact=_exact,
    exact_slack=2e-6,  # sums of squares are added in another order
    tail=_tail,
    laws=(Law("rms_norm(2x, 4 eps) = rms_norm(x, eps)", _doubled, tolerance=1e-6), Law("rows commute", _permuted)),
    mutants=MUTANTS,
)
