r"""A row of logits over a vocabulary: its log-sum-exp, its loss and its gradient, for the two cross entropies.

For logits x of V columns, label t, smoothing e, a scale and a soft-cap (z = x scale, then z = cap tanh(z / cap)):

    top = max z,  log_sum = log(sum exp(z - top))            log-sum-exp = top + log_sum, kept apart
    loss = (1 - e)(top - z_t) + e (top - mean z) + log_sum
    p_j  = exp((z_j - top) - log_sum)
    dz_j = p_j - e / V,  at the label  (p_t - 1) + e - e / V
    dx_j = dz_j (1 - (z_j / cap)^2) scale

The two parts of the log-sum-exp stay apart, since their sum loses log_sum's last bits where logits are large: at 3000 an
fp32 number has none below 1.2e-4, which would be p's relative error. p_t - 1 is exp(y) - 1 for y = (z_t - top) -
log_sum <= 0, by its power series near zero: of a token with p_t = 0.99999 the difference alone would keep 7 of 24 bits,
and none if p_t were rounded to bf16 first.

The row is read in tiles [LANES, 8], each lane with a maximum and a sum of its own, so that a step needs no reduction
across the block, and one exponential more for 8 elements. It is read from its end to its beginning: the product that
wrote it left its end in L2, and what follows begins where this pass stopped. Tiles begin at the last multiple of 8
elements before the row, so that rows of odd length are read 16 bytes at a time too; only the first and the last tile
have a mask. NaN goes through the sums; a row with +Inf is NaN, as in PyTorch.

Ignored rows are not read: whatever stands there, loss and gradient are 0. A label outside the vocabulary, other than
`ignore_index`, makes its row's loss and gradient NaN: to raise an error would mean to wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.numerics import INTERPRETED
from sparktune.ops.spec import FLOATS

REDUCTIONS = ("mean", "sum", "none")


@triton.jit
def capped(z, cap):
    """cap tanh(z / cap): near 0 by Cephes' polynomial, where 1 - 2 / (exp(2x) + 1) has few of tanh's bits."""
    x = z / cap
    s = x * x
    p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
    near = x + x * s * (p - 3.33332819422e-1)
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return cap * tl.where(a < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _step(
    row_ptr, start, first, last, scale, cap, top, sums, total,
    MASKED: tl.constexpr, ROOM: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Fold one tile into each lane's maximum, sum of exponentials and sum."""
    lane = start + tl.arange(0, LANES)[:, None] * 8
    c = lane + tl.arange(0, 8)[None, :]
    if MASKED:
        inside = (c >= first) & (c < last)
        if ROOM:  # a mask for whole lanes
            z = tl.load(row_ptr + c, mask=tl.broadcast_to(lane < last, (LANES, 8)), other=0.0).to(tl.float32) * scale
        else:
            z = tl.load(row_ptr + c, mask=inside, other=0.0).to(tl.float32) * scale
    else:
        z = tl.load(row_ptr + c).to(tl.float32) * scale
    if CAPPED:
        z = capped(z, cap)
    if MASKED:
        if SMOOTH:
            total += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
    elif SMOOTH:
        total += tl.sum(z, 1)
    found = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(found == float("-inf"), 0.0, found)
    sums = sums * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
    return found, sums, total


@triton.jit
def log_sum_exp(
    row_ptr, first, last, scale, cap,
    ROOM: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(top, log_sum, sum of z) of the columns `first` to `last` right of row_ptr; `first` < 8.

    ROOM: `first` is 0, and what follows the row up to the next multiple of 8 may be read.
    """
    top = tl.full((LANES,), float("-inf"), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    tiles = tl.cdiv(last, LANES * 8)
    top, sums, total = _step(
        row_ptr, (tiles - 1) * (LANES * 8), first, last, scale, cap, top, sums, total, True, ROOM, CAPPED, SMOOTH, LANES
    )
    for i in range(2, tiles):
        top, sums, total = _step(
            row_ptr, (tiles - i) * (LANES * 8), first, last, scale, cap, top, sums, total,
            False, ROOM, CAPPED, SMOOTH, LANES,
        )  # fmt: skip
    if tiles > 1:
        top, sums, total = _step(
            row_ptr, 0, first, last, scale, cap, top, sums, total, not ROOM, ROOM, CAPPED, SMOOTH, LANES
        )
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    sum_of_all = tl.sum(sums * tl.exp(top - shift), 0)
    if INTERPRETED:  # noqa: SIM108 - as an expression both sides would be compiled
        log_sum = tl.log(sum_of_all)
    else:
        log_sum = libdevice.log(sum_of_all)  # the last bits of tl.log are wrong near 1
    return highest, log_sum, tl.sum(total, 0)


@triton.jit
def label_gradient(z_t, top, log_sum, even, smoothing):
    """dz at the label, with p_t - 1 by its power series near 0; `even` is smoothing / V."""
    y = (z_t - top) - log_sum
    series = 1.0 + y * (1.0 / 8) * (1.0 + y * (1.0 / 9))
    series = 1.0 + y * (1.0 / 6) * (1.0 + y * (1.0 / 7) * series)
    series = 1.0 + y * (1.0 / 4) * (1.0 + y * (1.0 / 5) * series)
    series = y * (1.0 + y * (1.0 / 2) * (1.0 + y * (1.0 / 3) * series))
    return tl.where(y > -0.5, series, tl.exp(y) - 1.0) + (smoothing - even)


@triton.jit
def gradient(x, is_label, label_dz, top, log_sum, even, factor, scale, cap, CAPPED: tl.constexpr):
    """factor dx of a tile x of logits."""
    z = x * scale
    if CAPPED:
        z = capped(z, cap)
    dz = tl.where(is_label, label_dz, tl.exp((z - top) - log_sum) - even)
    if CAPPED:
        t = z / cap
        dz = dz * (1.0 - t * t)
    return dz * (factor * scale)


@triton.jit
def reduce_kernel(
    losses_ptr, labels_ptr, weights_ptr, items_ptr, loss_ptr, by_ptr, m, ignore_index, expected,
    REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the loss of all rows, and what it was divided by, infinity in place of 0 where there is nothing.

    With `expected` >= 0 any other number of rows that count makes both NaN.
    """
    total = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, m, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + rows, mask=rows < m, other=0).to(tl.int64)
        counts = (label != ignore_index) & (rows < m)
        w = tl.where(counts, 1.0, 0.0)
        if WEIGHTED:
            w = tl.load(weights_ptr + rows, mask=counts, other=0.0).to(tl.float32)
        total += tl.where(counts, tl.load(losses_ptr + rows, mask=counts, other=0.0) * w, 0.0)
        weight += w
        count += counts.to(tl.int32)
    loss = tl.sum(total, 0)
    found = tl.sum(count, 0)
    by = (found * 0 + 1).to(tl.float32)
    if ITEMS:
        by = tl.load(items_ptr).to(tl.float32)
        nothing = (by == 0.0) & (found == 0)
    else:
        if REDUCTION == "mean":
            by = tl.sum(weight, 0)
        nothing = by == 0.0
    wrong = (expected >= 0) & (found != expected)
    by = tl.where(wrong, float("nan"), tl.where(nothing, float("inf"), by))
    tl.store(loss_ptr, tl.math.div_rn(loss, by))
    tl.store(by_ptr, by)


@dataclass(frozen=True)
class Reduce:
    """How rows' losses are added up: by one program, in a fixed order."""

    block: int
    num_warps: int

    @classmethod
    def choose(cls, m: int) -> Reduce:
        """16 elements a thread and as many threads as that takes."""
        return cls(4096, 8) if m > 1024 else cls(1024, 4)


def reduced(
    losses: Tensor, labels: Tensor, weights: Tensor | None, items: Tensor | None, ignore_index: int, reduction: str,
    expected: int = -1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, by [1]) of rows' losses [M], fp32; a row's part of the loss's gradient is its weight over `by`."""
    loss = torch.empty(losses.shape if reduction == "none" else (), dtype=torch.float32, device=losses.device)
    by = torch.empty(1, dtype=torch.float32, device=losses.device)
    c = Reduce.choose(losses.numel())
    if reduction == "none":
        loss.copy_(losses if weights is None else torch.where(labels != ignore_index, losses * weights, 0.0))
        by.fill_(1.0)
        if expected >= 0:
            wrong = (labels != ignore_index).sum() != expected
            loss.masked_fill_(wrong, float("nan"))
            by.masked_fill_(wrong, float("nan"))
        return loss, by
    dispatch.launch(
        reduce_kernel, 1, losses, losses, labels, losses if weights is None else weights,
        losses if items is None else items, loss, by, losses.numel(), ignore_index, expected,
        REDUCTION=reduction, WEIGHTED=weights is not None, ITEMS=items is not None, BLOCK=c.block,
        num_warps=c.num_warps,
    )  # fmt: skip
    return loss, by


REDUCE_ARGS = {
    "losses_ptr": "*fp32", "labels_ptr": "*i64", "weights_ptr": "*fp32", "items_ptr": "*fp32", "loss_ptr": "*fp32",
    "by_ptr": "*fp32", "m": "i32", "ignore_index": "i32", "expected": "i32",
}  # fmt: skip


def resident_rows(row_bytes: int, p: DeviceProperties) -> int:
    """Rows to work on at once on each SM so that what one pass read is still in L2 for the next: at least 1."""
    return max(1, int(0.7 * p.l2_bytes) // max(1, row_bytes * p.sm_count))


def row_losses(
    logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float, softcap: float, scale: float,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Each row's loss in plain PyTorch: [M, V] and [M] -> [M] in `compute`."""
    counts = labels != ignore_index
    known = (labels >= 0) & (labels < logits.shape[-1])
    z = torch.where(counts[:, None], logits, 0.0).to(compute)
    z = z * torch.where(counts & ~known, float("nan"), scale).to(compute)[:, None]
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    target = torch.where(known, labels, 0).long()
    losses = torch.nn.functional.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)
    return torch.where(counts, losses, 0.0)


def reduced_reference(
    losses: Tensor, labels: Tensor, weights: Tensor | None, items: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """The loss of all rows in plain PyTorch."""
    counts = labels != ignore_index
    if weights is not None:
        losses = torch.where(counts, losses * weights, 0.0)
    if reduction == "none":
        return losses
    by = losses.new_ones(()) if items is None else items.to(losses.dtype).reshape(())
    if reduction == "mean" and items is None:
        by = (counts if weights is None else torch.where(counts, weights, 0.0)).sum().to(losses.dtype)
    nothing = (by == 0) & ~counts.any() if items is not None else by == 0
    return losses.sum() / torch.where(nothing, 1.0, by) * (~nothing).to(losses.dtype)


def items_on(device: torch.device, num_items: Tensor | float | None) -> Tensor | None:
    """`num_items_in_batch` as an fp32 scalar on `device`. Only one that lies on another device is waited for."""
    if num_items is None:
        return None
    if isinstance(num_items, Tensor) and num_items.device == device:
        return num_items.detach().reshape(()).to(torch.float32)
    return torch.full((), float(num_items), dtype=torch.float32, device=device)


def check(
    op: str, rows: torch.Size, vocabulary: int, labels: Tensor, weights: Tensor | None, num_items: Tensor | float | None,
    reduction: str, smoothing: float, softcap: float, scale: float,
) -> None:  # fmt: skip
    """Raise a ValueError for arguments that don't fit."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != rows:
        raise ValueError(f"{op}: labels must be {list(rows)}, got {list(labels.shape)}")
    if vocabulary < 1:
        raise ValueError(f"{op}: the vocabulary is empty")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction == "none":
        raise ValueError(f"{op}: num_items_in_batch divides a sum over rows, and reduction='none' makes none")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"{op}: num_items_in_batch must be one number, got {list(num_items.shape)}")
    if weights is not None and (weights.shape != rows or weights.dtype not in FLOATS):
        got = f"{list(weights.shape)} {weights.dtype}"
        raise ValueError(f"{op}: row_weights must be {list(rows)} in fp32, bf16 or fp16, got {got}")
    if weights is not None and weights.requires_grad:
        raise ValueError(f"{op}: row_weights get no gradient; detach them")
    if not 0 <= smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {smoothing}")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be positive, or 0 for none, got {softcap}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: logit_scale must be positive, got {scale}")
