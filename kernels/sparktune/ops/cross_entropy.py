r"""Cross entropy of logits that are there already; where they are not, `linear_cross_entropy` never makes them all.

For logits x [M, V] and labels t [M], with label smoothing, a logit scale, a soft-cap and row weights w:

    loss_i = log-sum-exp(z_i) - (1 - e) z_it - e mean(z_i)            z and the gradient: see softmax_rows
    mean: sum w_i loss_i / sum w_i     sum: sum w_i loss_i     none: w_i loss_i
    with num_items_in_batch: sum w_i loss_i / num_items, so that micro-batches add up to the loss of the whole batch

The sums go over rows whose label is not `ignore_index`. Where there is none, the mean is 0 and not PyTorch's 0 / 0, and
all gradients are 0: a batch that is all prompt must not make a model NaN. Ignored rows are not read and have loss 0 and
gradient 0, whatever they hold. A label outside the vocabulary gives NaN (softmax_rows says why).

All in fp32 from the logits on, as transformers' loss does; losses are fp32, dx is rounded once to x's dtype. Two
differences, both towards the exact result: the scale and the cap are not rounded to bf16, and p_t - 1 keeps its bits.

Bytes: forward reads x, backward reads it and writes dx: 3 M V elements. Saved: x, and two fp32 numbers a row. Forward
gives a row to each program; backward, which reduces nothing, a tile of one.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; the soft-cap is Gemma 2's; tanh near 0
is Moshier's in Cephes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.fused import Fused
from sparktune.ops.launching import cdiv
from sparktune.ops.numerics import cast
from sparktune.ops.softmax_rows import (
    REDUCE_ARGS,
    capped,
    check,
    gradient,
    items_on,
    label_gradient,
    log_sum_exp,
    reduce_kernel,
    reduced,
    reduced_reference,
    row_losses,
)  # fmt: skip
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors

KERNELS = (reduce_kernel,)  # what `launches` names besides those below


def reference(
    logits: Tensor, labels: Tensor, weights: Tensor | None, items: Tensor | None, ignore_index: int, reduction: str,
    smoothing: float, softcap: float, scale: float, compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Plain PyTorch; the oracle is this with float64 tensors and compute=float64."""
    flat, rows = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = row_losses(flat, rows, ignore_index, smoothing, softcap, scale, compute)
    weights = None if weights is None else weights.reshape(-1)
    return reduced_reference(losses, rows, weights, items, ignore_index, reduction)


@triton.jit
def forward_kernel(
    logits_ptr, labels_ptr, loss_ptr, state_ptr, m, n, stride, ignore_index, smoothing, scale, cap,
    CAPPED: tl.constexpr, SMOOTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row a program: its loss, and both parts of its log-sum-exp in state_ptr [2, m]."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(state_ptr + row, 0.0)
        tl.store(state_ptr + m + row, 0.0)
    else:
        base = row * stride // 8 * 8
        first = (row * stride - base).to(tl.int32)
        top, log_sum, total = log_sum_exp(logits_ptr + base, first, first + n, scale, cap, False, CAPPED, SMOOTH, LANES)
        known = (label >= 0) & (label < n)
        x_t = tl.load(logits_ptr + row * stride + label, mask=known, other=float("nan")).to(tl.float32)
        z_t = x_t * scale
        if CAPPED:
            z_t = capped(z_t, cap)
        loss = top - z_t
        if SMOOTH:
            loss = (1.0 - smoothing) * loss + smoothing * (top - total / n)
        tl.store(loss_ptr + row, loss + log_sum)
        tl.store(state_ptr + row, top)
        tl.store(state_ptr + m + row, tl.where(known, log_sum, float("nan")))


@triton.jit
def backward_kernel(
    dloss_ptr, by_ptr, weights_ptr, logits_ptr, labels_ptr, state_ptr, dx_ptr, m, n, stride, dloss_stride,
    ignore_index, smoothing, even, scale, cap,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, ALIKE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One tile of one row a program. ALIKE: rows of dx begin where those of x do, so that both have whole tiles."""
    row = tl.program_id(0).to(tl.int64)
    base = row * stride // 8 * 8
    first = (row * stride - base).to(tl.int32)
    c = tl.program_id(1) * (LANES * 8) + tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (c >= first) & (c < first + n)
    out = dx_ptr + row * n - first + c
    if ALIKE:
        out = dx_ptr + base + c
    label = tl.load(labels_ptr + row).to(tl.int64)
    whole = (tl.program_id(1) > 0) & ((tl.program_id(1) + 1) * (LANES * 8) <= first + n)
    if label == ignore_index:
        tl.store(out, tl.zeros((LANES, 8), dx_ptr.dtype.element_ty), mask=inside)
    else:
        factor = tl.math.div_rn(tl.load(dloss_ptr + row * dloss_stride), tl.load(by_ptr))
        if WEIGHTED:
            factor *= tl.load(weights_ptr + row)
        top = tl.load(state_ptr + row)
        log_sum = tl.load(state_ptr + m + row)
        known = (label >= 0) & (label < n)
        x_t = tl.load(logits_ptr + row * stride + label, mask=known, other=0.0).to(tl.float32)
        z_t = x_t * scale
        if CAPPED:
            z_t = capped(z_t, cap)
        label_dz = label_gradient(z_t, top, log_sum, even, smoothing)
        is_label = c == first + label.to(tl.int32)
        if whole:  # without a mask loads and stores are of 16 bytes
            x = tl.load(logits_ptr + base + c).to(tl.float32)
            dx = gradient(x, is_label, label_dz, top, log_sum, even, factor, scale, cap, CAPPED)
            tl.store(out, cast(dx, dx_ptr.dtype.element_ty))
        else:
            x = tl.load(logits_ptr + base + c, mask=inside, other=0.0).to(tl.float32)
            dx = gradient(x, is_label, label_dz, top, log_sum, even, factor, scale, cap, CAPPED)
            tl.store(out, cast(dx, dx_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Config:
    """How a pass is launched: a tile's lanes, 8 columns each, and warps."""

    lanes: int
    num_warps: int

    SMALL = 2048  # columns up to which a warp is enough
    SHORT = 65536  # columns up to which a row is short
    MANY = 24  # rows an SM: as many programs of a warp run there at once, on sm_12x too

    @classmethod
    def choose(cls, m: int, n: int, itemsize: int, p: DeviceProperties, backward: bool) -> Config:
        """Programs of one warp with four loads of 16 bytes a thread on their way, where there are enough of them.

        So it is in the backward, and in the forward of many short rows: on one H200, in shares of a copy's speed, the backward
        of 4096 rows of 32064, 128256 and 262208 had 88, 92 and 90% and with 8 warps and two loads 79, 81 and 80%, the
        forward of 4096 and 16384 rows of 32064 88 and 94%, for 84 and 87. Of long rows a program of 4 warps had 93 and 98% for 94
        and 95; of 1024 short ones 8 warps had 73% for 69 with 16, and of 1024 long ones 16 warps with two loads 89 for 85 with 8.
        """
        full = 128 if itemsize == 2 else 64  # lanes a warp: four loads a thread
        more = 2 if p.sm_10x else 1  # warps, with two loads a thread: four spill there
        if n <= cls.SMALL:
            return cls(full // 2, 1)
        if backward:
            return cls(full, more)
        if m >= cls.MANY * p.sm_count:
            return cls(full, 1) if n <= cls.SHORT else cls(4 * full, 4 * more)
        warps = 8 if n <= cls.SHORT else 16
        return cls(full // 2 * warps, warps)


def _forward(
    logits: Tensor, labels: Tensor, weights: Tensor | None, items: Tensor | None, ignore_index: int, reduction: str,
    smoothing: float, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, what it was divided by, state [2, M])."""
    n, m = logits.shape[-1], labels.numel()
    losses = torch.empty(m, dtype=torch.float32, device=logits.device)
    state = torch.empty((2, m), dtype=torch.float32, device=logits.device)
    rows = labels.reshape(-1).contiguous()
    if m:
        flat = dispatch.rows(logits)
        c = Config.choose(m, n, logits.dtype.itemsize, DeviceProperties.of(logits.device), backward=False)
        dispatch.launch(
            forward_kernel, m, logits, flat, rows, losses, state, m, n, flat.stride(0), ignore_index, smoothing, scale,
            softcap, CAPPED=softcap > 0, SMOOTH=smoothing > 0, LANES=c.lanes, num_warps=c.num_warps,
        )  # fmt: skip
    weights = None if weights is None else weights.reshape(-1).contiguous()
    loss, by = reduced(losses, rows, weights, items, ignore_index, reduction)
    return loss, by, state


def _backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, weights: Tensor | None, by: Tensor, state: Tensor,
    ignore_index: int, smoothing: float, softcap: float, scale: float, needs: list[bool],
) -> Tensor:  # fmt: skip
    n, m = logits.shape[-1], labels.numel()
    dx = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if m:
        flat = dispatch.rows(logits)
        c = Config.choose(m, n, logits.dtype.itemsize, DeviceProperties.of(logits.device), backward=True)
        dispatch.launch(
            backward_kernel, (m, cdiv(n + 7, 8 * c.lanes)), logits, dloss, by,
            by if weights is None else weights.reshape(-1).contiguous(), flat, labels.reshape(-1).contiguous(), state,
            dx, m, n, flat.stride(0), dloss.stride(0) if dloss.dim() else 0, ignore_index, smoothing, smoothing / n,
            scale, softcap, WEIGHTED=weights is not None, CAPPED=softcap > 0, ALIKE=flat.stride(0) == n, LANES=c.lanes,
            num_warps=c.num_warps,
        )  # fmt: skip
    return dx


_OP = Fused(
    "cross_entropy", _forward, _backward, reference=reference, grads=("logits",),
    save=lambda args, results: (args[0], args[1], args[2], results[1], results[2], args[4], *args[6:]),
)  # fmt: skip


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    row_weights: Tensor | None = None, num_items_in_batch: Tensor | float | None = None, label_smoothing: float = 0.0,
    softcap: float = 0.0, logit_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Loss of logits [..., V] and labels [...], int64 or int32: fp32, a scalar, or [rows] for "none".

    `row_weights` [...] are constants. `num_items_in_batch`, a number or a tensor of one, is what the sum over rows is
    divided by, whether `reduction` is "mean" or "sum"; on the logits' device it is not waited for. `softcap` 0 is none.
    Differentiable once, in the logits, whose strides are free. A label that is neither in the vocabulary nor
    `ignore_index` makes the loss NaN; without any row that counts it is 0. Errors: ValueError for shapes, dtypes and
    settings that don't fit.
    """
    if logits.dim() < 1 or logits.dtype not in FLOATS:
        raise ValueError(f"cross_entropy: logits must be [..., V] in fp32, bf16 or fp16, got {logits.dtype}")
    check(
        "cross_entropy", logits.shape[:-1], logits.shape[-1], labels, row_weights, num_items_in_batch, reduction,
        label_smoothing, softcap, logit_scale,
    )  # fmt: skip
    weights = None if row_weights is None else row_weights.float()
    items = items_on(logits.device, num_items_in_batch)
    loss: Tensor = _OP(
        logits,
        labels,
        weights,
        items,
        ignore_index,
        reduction,
        float(label_smoothing),
        float(softcap),
        float(logit_scale),
    )
    return loss


VARIANTS = ("mean", "none weights capped", "sum items smooth")


def judged_labels(rows: int, n: int, dtype: torch.dtype = torch.int64) -> Input:
    """Labels that hit both ends of the vocabulary. Every fourth row from the second on is ignored; a NaN is planted there."""

    def make(g: torch.Generator) -> Tensor:
        labels = torch.randint(0, n, (rows,), generator=g)
        labels[:1], labels[2:3] = n - 1, 0
        labels[1::4] = -100
        return labels.to(dtype)

    return Input((rows,), dtype, "constant", make=make)


def judged_head(p: Problem) -> dict[str, Any]:
    """Settings of the loss that a variant's name stands for."""
    words = p.variant.split()
    return {
        "reduction": next(w for w in words if w in ("mean", "sum", "none")),
        "smoothing": 0.2 if "smooth" in words else 0.0,
        "softcap": p.dims.get("cap", 3) * 1.0 if "capped" in words else 0.0,
        "scale": 0.5 if "capped" in words else 1.0,
    }


def judged_loss_inputs(p: Problem) -> dict[str, Input]:
    """Labels, and weights and num_items_in_batch where the variant has them."""
    rows, words = p.dims["rows"], p.variant.split()
    found = {"labels": judged_labels(rows, p.dims["columns"], torch.int32 if "capped" in words else torch.int64)}
    if "weights" in words:
        found["weights"] = Input((rows,), torch.float32, "parameter", centre=1.0, spread=0.3, positive=True)
    if "items" in words:
        found["items"] = Input((), torch.float32, "constant", make=lambda g: torch.tensor(9.0))
    return found


def _inputs(p: Problem) -> dict[str, Input]:
    # At the typical size logits are 1000 times larger in one family, and p must not vanish in the oracle's float64.
    shape = (p.dims["rows"], p.dims["columns"])
    logits = Input(shape, p.dtype, grad=True, spread=0.1 if "small" in p.dims else 3.0)
    return {"logits": logits} | judged_loss_inputs(p)


def _call(t: Tensors, p: Problem) -> Tensor:
    h = judged_head(p)
    return cross_entropy(
        t["logits"], t["labels"], reduction=h["reduction"], row_weights=t.get("weights"),
        num_items_in_batch=t.get("items"), label_smoothing=h["smoothing"], softcap=h["softcap"], logit_scale=h["scale"],
    )  # fmt: skip


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensor:
    h = judged_head(p)
    return reference(
        t["logits"], t["labels"], t.get("weights"), t.get("items"), -100, h["reduction"], h["smoothing"], h["softcap"],
        h["scale"], compute or torch.float32,
    )  # fmt: skip


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensor, Tensor]:
    """The loss, when the log-sum-exp and the logit at the label are right to `slack` relative to the largest logit."""
    logits = t["logits"].detach().double()
    loss = _reference({**t, "logits": logits}, p, torch.float64)
    largest = torch.where(logits.isfinite(), logits, 0.0).abs().max() if logits.numel() else 0.0
    off = slack * (1 + loss.abs() + largest)
    return (loss - off).float(), (loss + off).float()


def _vocabulary_reversed(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    labels = torch.where(t["labels"] >= 0, p.dims["columns"] - 1 - t["labels"], t["labels"])
    return call(t, p), call({**t, "logits": t["logits"].flip(-1), "labels": labels}, p)


def _rows_reversed(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    there = call(t, p)
    back = call({k: x.flip(0) if x.dim() else x for k, x in t.items()}, p)
    return there, back.flip(0) if back.dim() else back


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    return (1 if which == "forward" else 2) * p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize


def _launches(p: DeviceProperties) -> list[Launch]:
    found = []
    scalars = dict.fromkeys(("smoothing", "scale", "cap"), "fp32") | {"m": "i32", "n": "i32", "stride": "i32"}
    for dtype in FLOATS:
        ptr = f"*{TRITON_TYPES[dtype]}"
        tensors = {"logits_ptr": ptr, "labels_ptr": "*i64", "state_ptr": "*fp32"} | scalars | {"ignore_index": "i32"}
        for n, both, few in (
            (128256, False, False),
            (128256, True, False),
            (Config.SHORT, False, False),
            (Config.SMALL, True, False),
            (128256, True, True),
            (Config.SHORT, True, True),
        ):
            when = f"V = {n}" + ", few rows" * few
            c = Config.choose(1 if few else 2**20, n, dtype.itemsize, p, backward=False)
            flags = {"CAPPED": both, "SMOOTH": both, "LANES": c.lanes}
            args = tensors | {"loss_ptr": "*fp32"} | dict.fromkeys(flags, "constexpr")
            found.append(Launch(when, "forward_kernel", args, flags, c.num_warps, 3, ptr[1:], "capped" * both))
            if few or n == Config.SHORT:  # the backward's tiles are the same
                continue
            c = Config.choose(2**20, n, dtype.itemsize, p, backward=True)
            flags = {"WEIGHTED": both, "CAPPED": both, "ALIKE": not both, "LANES": c.lanes}
            args = tensors | dict.fromkeys(("dloss_ptr", "by_ptr", "weights_ptr"), "*fp32") | {"dx_ptr": ptr}
            args |= {"dloss_stride": "i32", "even": "fp32"} | dict.fromkeys(flags, "constexpr")
            found.append(Launch(when, "backward_kernel", args, flags, c.num_warps, 3, ptr[1:], "capped" * both))
    for reduction, weighted, items in (("mean", True, False), ("sum", False, True)):
        options: dict[str, Any] = {"REDUCTION": reduction, "WEIGHTED": weighted, "ITEMS": items, "BLOCK": 4096}
        args = REDUCE_ARGS | dict.fromkeys(options, "constexpr")
        found.append(Launch(reduction, "reduce_kernel", args, options, 8, 3, "fp32"))
    return found


MUTANTS = Mutant.table(
    """no-rescale @softmax_rows: a lane's sum not rescaled when its maximum grows
- sums = sums * tl.exp(top - shift) +
+ sums = sums +
padding-counts @softmax_rows: columns right of the row counted as logits of 0
- z = tl.where(inside, z, float("-inf"))
+ z = tl.where(inside, z, 0.0)
tile-skipped @softmax_rows: one whole tile left out
- for i in range(2, tiles):
+ for i in range(3, tiles):
first-tile-skipped @softmax_rows: the first of two tiles left out
- if tiles > 1:
+ if tiles > 2:
lanes-unequal @softmax_rows: lanes added up without their maxima
- tl.sum(sums * tl.exp(top - shift), 0)
+ tl.sum(sums, 0)
cap-slope @softmax_rows: the soft-cap left out of the gradient
- dz = dz * (1.0 - t * t)
+ dz = dz
cap-slope-of-logit @softmax_rows: the cap's slope from the logit before the cap
- t = z / cap
+ t = x * scale / cap
scale-in-gradient @softmax_rows: the logit scale left out of the gradient
- return dz * (factor * scale)
+ return dz * factor
tanh-far-only @softmax_rows: small logits capped by the formula for large ones
- tl.where(a < 0.625, near,
+ tl.where(a < 0.0, near,
rounded-before-one @softmax_rows: p rounded to bf16 before 1 is taken from it
- return tl.where(y > -0.5, series, tl.exp(y) - 1.0)
+ return (tl.exp(y) * 256.0 + 0.5).to(tl.int32).to(tl.float32) / 256.0 - 1.0
one-log-sum-exp: the two parts of the log-sum-exp saved as one sum
- tl.store(state_ptr + row, top)
-         tl.store(state_ptr + m + row, tl.where(known, log_sum, float("nan")))
+ tl.store(state_ptr + row, top + log_sum)
+         tl.store(state_ptr + m + row, 0.0)
smoothing-of-sum: smoothing by the sum of logits in place of their mean
- smoothing * (top - total / n)
+ smoothing * (top - total)
smoothing-in-gradient: smoothing left out of the gradient but for the label
- ignore_index, smoothing, smoothing / n,
+ ignore_index, smoothing, 0.0,
ignored-multiplied: gradient of ignored rows multiplied by 0 in place of written as 0
- tl.store(out, tl.zeros((LANES, 8), dx_ptr.dtype.element_ty), mask=inside)
+ tl.store(out, tl.load(logits_ptr + base + c, mask=inside, other=0.0).to(tl.float32) * 0.0, mask=inside)
ignored-in-mean @softmax_rows: ignored rows in what the mean is divided by
- w = tl.where(counts, 1.0, 0.0)
+ w = tl.where(rows < m, 1.0, 0.0)
items-left-out @softmax_rows: the sum divided by its own rows, not by num_items_in_batch
- by = tl.load(items_ptr).to(tl.float32)
+ by = found.to(tl.float32)
dloss-stride: the output gradient read as if it were contiguous
- row * dloss_stride
+ row
divided-twice: the gradient not divided by what the loss was
- tl.math.div_rn(tl.load(dloss_ptr + row * dloss_stride), tl.load(by_ptr))
+ tl.load(dloss_ptr + row * dloss_stride)
weights-in-gradient: row weights left out of the gradient
- factor *= tl.load(weights_ptr + row)
+ factor *= 1.0
label-column: the label looked for as if the row began at its tile's first column
- c == first + label.to(tl.int32)
+ c == label.to(tl.int32)
begins-aligned: rows taken to begin where their first tile does
- first = (row * stride - base).to(tl.int32)
-         top
+ first = 0
+         top
gradient-shifted: rows of the gradient begin where their tile does
- row * n - first + c
+ row * n - 2 * first + c
int32-offset: row offset in 32 bits
- base = row * stride // 8 * 8
-         first
+ base = row.to(tl.int32) * stride // 8 * 8
+         first
silent-fallback: the reference run in place of the kernel
- loss: Tensor = _OP(
+ loss: Tensor = reference(
"""
)

OP = OpSpec(
    name="cross_entropy",
    summary="Cross entropy with ignored rows, weights, smoothing, soft-cap and num_items_in_batch, for any vocabulary",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 5, "columns": 300, "small": 1, "cap": 300},
        "prime": {"rows": 3, "columns": 37},
        "whole blocks": {"rows": 2, "columns": 1024, "small": 1, "cap": 1},
        "wide": {"rows": 2, "columns": 1101, "small": 1},
        "far": {"rows": 3, "columns": 64},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
        "speed": {"rows": 4096, "columns": 128256},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=_bytes,
    flops=lambda p, w: 8 * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    exact_slack=2.0**-20,
    laws=(
        Law("reversing the vocabulary changes nothing", _vocabulary_reversed, tolerance=1e-6),
        Law("reversing the rows reverses their losses", _rows_reversed, tolerance=1e-6),
    ),
    mutants=MUTANTS,
)
