"""The chunks of a linear cross entropy: rows gathered, multiplied, turned from logits into gradients in place, multiplied.

One chunk of C rows is one buffer of logits [C, V], rows padded to 64 columns so that each begins at a cache line:

    gather    h = rows of hidden whose labels count, the others as zeros at the very end      Triton, on the device
    logits    z = h W^T, with LoRA or bias                                                    cuBLAS
    rows      losses; z becomes dz                                                            Triton, in place
    products  dh = dz W;  dW += dz^T h in fp32                                                cuBLAS

In the third step a program works through whole rows: from the end to the beginning for the log-sum-exp, then back for
the gradient, which finds in L2 what was just read, as long as all rows at work fit there. So few programs run, and each
works through several rows: a row of 128256 in bf16 is 256 KB, and one for each SM fills 0.7 of an H100's L2 and half of
a GB10's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.launching import cdiv, next_power_of_2
from sparktune.ops.numerics import cast
from sparktune.ops.softmax_rows import capped, gradient, label_gradient, log_sum_exp
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Launch

COPY_ROWS, COPY_BLOCK = 4, 512  # of hidden that a program of 4 warps copies: 2 loads of 16 bytes a thread in bf16


@triton.jit
def plan_kernel(labels_ptr, order_ptr, m, ignore_index, BLOCK: tl.constexpr):
    """One program: all rows in `order`, first those that count, as they come, then the ignored ones from behind."""
    before = 0
    for start in range(0, m, BLOCK):
        row = start + tl.arange(0, BLOCK)
        counts = (tl.load(labels_ptr + row, mask=row < m, other=0).to(tl.int64) != ignore_index) & (row < m)
        found = before + tl.cumsum(counts.to(tl.int32), 0)  # rows that count, up to and with this one
        tl.store(order_ptr + tl.where(counts, found - 1, m - 1 - (row - found)), row, mask=row < m)
        before += tl.sum(counts.to(tl.int32), 0)


@triton.jit
def gather_kernel(
    hidden_ptr, labels_ptr, order_ptr, out_ptr, offset, rows, k, stride, ignore_index,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile a program: rows order[offset:] of hidden; zeros for ignored ones, whatever they hold."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order_ptr + offset + place, mask=place < rows, other=0).to(tl.int64)
    counts = (tl.load(labels_ptr + row).to(tl.int64) != ignore_index)[:, None]
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    there = (place < rows)[:, None] & (c < k)
    x = tl.load(hidden_ptr + row[:, None] * stride + c, mask=there & counts, other=0.0)
    tl.store(out_ptr + place[:, None] * k + c, x, mask=there)


@triton.jit
def rows_kernel(
    logits_ptr, labels_ptr, order_ptr, factor_ptr, losses_ptr, offset, rows, n, lanes, ignore_index, smoothing, even,
    scale, cap, ORDERED: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Losses of a chunk's rows, each at its place in the batch, and the gradient in place of its logits.

    Rows have n columns and room for 8 `lanes`: lanes are read and written whole, what lies right of the row too.
    """
    lane = tl.arange(0, LANES)[:, None] * 8
    within = lane + tl.arange(0, 8)[None, :]
    tiles = tl.cdiv(n, LANES * 8)
    end = (tiles - 1) * (LANES * 8)
    first = tl.program_id(0).to(tl.int64)
    for turn in range(tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        place = first + turn * tl.num_programs(0)  # 64 bits, as `first` is
        row = offset + place
        if ORDERED:
            row = tl.load(order_ptr + row).to(tl.int64)
        row_ptr = logits_ptr + place * lanes * 8
        label = tl.load(labels_ptr + row).to(tl.int64)
        if label == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            if GRADIENT:
                zeros = tl.zeros((LANES, 8), logits_ptr.dtype.element_ty)
                for i in range(0, tiles):
                    there = tl.broadcast_to(i * (LANES * 8) + lane < n, (LANES, 8))
                    tl.store(row_ptr + i * (LANES * 8) + within, zeros, mask=there)
        else:
            # Read before the reductions, at whose barrier all threads meet; after it others write the gradient here.
            known = (label >= 0) & (label < n)
            z_t = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32) * scale
            if CAPPED:
                z_t = capped(z_t, cap)
            top, log_sum, total = log_sum_exp(row_ptr, 0, n, scale, cap, True, CAPPED, SMOOTH, LANES)
            loss = top - z_t
            if SMOOTH:
                loss = (1.0 - smoothing) * loss + smoothing * (top - total / n)
            tl.store(losses_ptr + row, loss + log_sum)
            if GRADIENT:
                factor = 1.0
                if WEIGHTED:
                    factor = tl.load(factor_ptr + row)
                log_sum = tl.where(known, log_sum, float("nan"))
                label_dz = label_gradient(z_t, top, log_sum, even, smoothing)
                target = label.to(tl.int32)  # as columns are: 64 bits a column would not fit the registers
                for i in range(0, tiles - 1):
                    c = i * (LANES * 8) + within
                    x = tl.load(row_ptr + c).to(tl.float32)
                    dx = gradient(x, c == target, label_dz, top, log_sum, even, factor, scale, cap, CAPPED)
                    tl.store(row_ptr + c, cast(dx, logits_ptr.dtype.element_ty))
                c = end + within
                there = tl.broadcast_to(end + lane < n, (LANES, 8))
                x = tl.load(row_ptr + c, mask=there, other=0.0).to(tl.float32)
                dx = gradient(x, c == target, label_dz, top, log_sum, even, factor, scale, cap, CAPPED)
                tl.store(row_ptr + c, cast(dx, logits_ptr.dtype.element_ty), mask=there)


@triton.jit
def scatter_kernel(
    dh_ptr, labels_ptr, order_ptr, dloss_ptr, by_ptr, out_ptr, rows, m, k, dloss_stride, ignore_index,
    ORDERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile a program: dh dloss / by where it belongs in the batch; exact zeros for ignored rows."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = place
    if ORDERED:
        row = tl.load(order_ptr + place, mask=place < m, other=0).to(tl.int64)
    counts = tl.load(labels_ptr + row, mask=place < m, other=0).to(tl.int64) != ignore_index
    dloss = tl.load(dloss_ptr + row * dloss_stride, mask=place < m, other=0.0)
    factor = tl.math.div_rn(dloss, tl.zeros_like(dloss) + tl.load(by_ptr))
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    # A row that counts but was not computed, since the caller named too few: NaN, as the loss is.
    computed = (place < rows)[:, None] & (c < k)
    x = tl.load(dh_ptr + place[:, None] * k + c, mask=computed, other=float("nan")).to(tl.float32)
    out = tl.where(counts[:, None], x * factor[:, None], 0.0)
    tl.store(out_ptr + row[:, None] * k + c, cast(out, out_ptr.dtype.element_ty), mask=(place < m)[:, None] & (c < k))


@dataclass(frozen=True)
class Config:
    """How chunks are cut, and their rows launched."""

    chunk: int  # rows of one buffer of logits
    lanes: int
    num_warps: int
    programs: int

    TILES = 16  # waves of 128 x 256 tiles of the logits' product: the last, partly empty one is then under 1 / 16
    PLAN_BLOCK = 1024
    SMALL = 2048  # columns up to which a warp is enough

    @classmethod
    def choose(cls, rows: int, v: int, itemsize: int, trained: bool, chunk: int, p: DeviceProperties) -> Config:
        """Chunks of 1024 rows, up to 4096 where the vocabulary is small.

        With 1024 rows the weight's bytes take a quarter of the product's time on an H100 and a third on a GB10 (263 and
        366 FLOP for a byte), so they hide behind it; a buffer is 263 MB at V = 128256. A trained weight's gradient is
        read and written in fp32 once a chunk, 8 bytes for every 2 of the weight: chunks are then twice as large.
        """
        if not chunk:
            wanted = next_power_of_2(cls.TILES * p.sm_count * 128 * 256 // v)
            chunk = min(4096, max(1024, wanted) * (2 if trained else 1))
        chunk = max(1, min(chunk, rows))
        # Rows at work stay in L2: 4 programs of 8 warps for an SM where so many rows fit, else one of 32, of 64
        # registers a thread. One load of 16 bytes a thread, since two spill; but where an SM takes 2048 threads ptxas would
        # halve the registers for a second block of 32 warps, and spills with one load instead, except on sm_10x. There
        # fp32's loop spills 16 bytes at 8 warps, for which ptxas makes room four times, and fits 16.
        each = 4 if 4 * p.sm_count * v * itemsize <= 0.7 * p.l2_bytes else 1
        warps = 1 if v <= cls.SMALL else 8 if each == 4 else 32
        if warps == 8 and itemsize == 4 and p.sm_10x:
            warps = 16
        loads = 2 if warps == 32 and itemsize == 2 and p.threads_per_sm >= 2048 and not p.sm_10x else 1
        return cls(chunk, 32 * warps * loads, warps, min(chunk, each * p.sm_count))


@dataclass(frozen=True)
class Softmax:
    """What the loss does with logits and labels, besides the labels themselves."""

    ignore_index: int
    smoothing: float
    softcap: float
    scale: float


@dataclass
class Sums:
    """Gradients that add up over chunks, in fp32; empty where not wanted."""

    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, parameters: Sequence[Tensor | None], wanted: Sequence[bool], like: Tensor) -> Sums:
        """Zeros for each of weight, bias, A and B that wants a gradient."""
        return cls(*(
            torch.zeros(t.shape if t is not None and w else (0,), dtype=torch.float32, device=like.device)
            for t, w in zip(parameters, wanted, strict=True)
        ))  # fmt: skip


@functools.cache
def _adds_onto_fp32(device: torch.device) -> bool:
    """Whether this PyTorch adds a product of bf16 matrices onto an fp32 one inside the product; older ones refuse."""
    x, onto = torch.zeros(16, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(onto, x, x, out_dtype=torch.float32, out=onto)
    except RuntimeError:
        return False
    return True


def add_product(onto: Tensor, x: Tensor, y: Tensor) -> None:
    """onto += x y, in fp32 throughout: sums over chunks in bf16 would stop growing at 256 times their summands."""
    if x.dtype == torch.float32:
        onto.addmm_(x, y)
    elif not x.is_cuda:
        onto.addmm_(x.float(), y.float())
    elif _adds_onto_fp32(x.device):
        torch.addmm(onto, x, y, out_dtype=torch.float32, out=onto)
    else:
        onto.add_(torch.mm(x, y, out_dtype=torch.float32))


def _tiles(rows: int, k: int) -> tuple[int, int]:
    return cdiv(rows, COPY_ROWS), cdiv(k, COPY_BLOCK)


def plan(labels: Tensor, ignore_index: int) -> Tensor:
    """All row numbers, int32: first those of rows that count."""
    order = torch.empty(labels.numel(), dtype=torch.int32, device=labels.device)
    dispatch.launch(
        plan_kernel, 1, labels, labels, order, labels.numel(), ignore_index, BLOCK=Config.PLAN_BLOCK, num_warps=4
    )
    return order


def run(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, factor: Tensor | None, a: Tensor | None,
    b: Tensor | None, lora_scale: float, order: Tensor | None, rows: int, chunk: int, losses: Tensor, dh: Tensor,
    sums: Sums, s: Softmax,
) -> None:  # fmt: skip
    """Fill `losses` [M], `dh` [rows, K] in the rows' order and `sums`; what is empty is not wanted. All on the device."""
    if isinstance(hidden, FakeTensor) or rows == 0:
        return
    (v, k), dtype, p = weight.shape, hidden.dtype, DeviceProperties.of(hidden.device)
    c = Config.choose(rows, v, dtype.itemsize, sums.weight.numel() > 0, chunk, p)
    hidden, weight = dispatch.rows(hidden), weight.to(dtype)
    bias, a, b = (None if t is None else t.to(dtype) for t in (bias, a, b))
    buffer = torch.empty((c.chunk, cdiv(v, 64) * 64), dtype=dtype, device=hidden.device)
    gathered = torch.empty((c.chunk, k), dtype=dtype, device=hidden.device) if order is not None else hidden
    wanted = any(t.numel() for t in (dh, sums.weight, sums.bias, sums.a, sums.b))
    for start in range(0, rows, c.chunk):
        size = min(c.chunk, rows - start)
        z, h = buffer[:size, :v], gathered[:size] if order is not None else hidden[start : start + size]
        if order is not None:
            dispatch.launch(
                gather_kernel, _tiles(size, k), hidden, hidden, labels, order, h, start, size, k, hidden.stride(0),
                s.ignore_index, ROWS=COPY_ROWS, BLOCK=COPY_BLOCK, num_warps=4,
            )  # fmt: skip
        tail = _logits(z, h, weight, bias, a, b, lora_scale)
        dispatch.launch(
            rows_kernel, min(size, c.programs), z, z, labels, labels if order is None else order,
            losses if factor is None else factor, losses, start, size, v, z.stride(0) // 8, s.ignore_index, s.smoothing,
            s.smoothing / v, s.scale, s.softcap, ORDERED=order is not None, WEIGHTED=factor is not None, GRADIENT=wanted,
            CAPPED=s.softcap > 0, SMOOTH=s.smoothing > 0, LANES=c.lanes, num_warps=c.num_warps,
        )  # fmt: skip
        if wanted:
            _products(z, h, tail, weight, a, b, lora_scale, dh[start : start + size], sums)


def _logits(
    z: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor | None:
    """z = h W^T + scale h A^T B^T + bias; returns scale h A^T. The low rank comes first, and the GEMM adds onto it."""
    tail = None
    if a is not None and b is not None:
        tail = torch.mm(h, a.t()).mul_(scale)
        torch.mm(tail, b.t(), out=z)
        z.addmm_(h, weight.t())
    elif bias is not None:
        torch.addmm(bias, h, weight.t(), out=z)
        return None
    else:
        torch.mm(h, weight.t(), out=z)
    if bias is not None:
        z.add_(bias)
    return tail


def _products(
    dz: Tensor, h: Tensor, tail: Tensor | None, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float,
    dh: Tensor, sums: Sums,
) -> None:  # fmt: skip
    """What one chunk gives: dh = dz W + scale dz B A, and its part of every sum."""
    if dh.numel():
        torch.mm(dz, weight, out=dh)
    if a is not None and b is not None and tail is not None:
        low = torch.mm(dz, b).mul_(scale)
        if dh.numel():
            dh.addmm_(low, a)
        if sums.a.numel():
            add_product(sums.a, low.t(), h)
        if sums.b.numel():
            add_product(sums.b, dz.t(), tail)
    if sums.weight.numel():
        add_product(sums.weight, dz.t(), h)
    if sums.bias.numel():
        sums.bias.add_(dz.sum(0, dtype=torch.float32))


def scatter(
    dh: Tensor, labels: Tensor, order: Tensor | None, dloss: Tensor, by: Tensor, ignore_index: int, k: int
) -> Tensor:
    """The gradient of hidden [M, K]: dh [rows, K] times dloss / by, each row at its place."""
    m = labels.numel()
    out = torch.empty((m, k), dtype=dh.dtype, device=dh.device)
    if out.numel():
        dispatch.launch(
            scatter_kernel, _tiles(m, k), dh, dh, labels, labels if order is None else order, dloss, by, out,
            dh.shape[0], m, k, dloss.stride(0) if dloss.dim() else 0, ignore_index,
            ORDERED=order is not None, ROWS=COPY_ROWS, BLOCK=COPY_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def launches(p: DeviceProperties) -> list[Launch]:
    """Every kernel for each dtype; every number of warps."""
    found = []
    whole = dict.fromkeys(("offset", "rows", "n", "lanes", "k", "m", "stride", "dloss_stride", "ignore_index"), "i32")
    real = dict.fromkeys(("smoothing", "even", "scale", "cap"), "fp32")
    floats = dict.fromkeys(("factor_ptr", "losses_ptr", "dloss_ptr", "by_ptr"), "*fp32")
    others = {"labels_ptr": "*i64", "order_ptr": "*i32"} | whole | real | floats

    def add(when: str, kernel: str, names: str, flags: Mapping[str, object], warps: int, dtype: str) -> None:
        every = others | dict.fromkeys(("logits_ptr", "hidden_ptr", "out_ptr", "dh_ptr"), f"*{dtype}")
        args = {n: every[n] for n in names.split()} | dict.fromkeys(flags, "constexpr")
        found.append(Launch(when, kernel, args, flags, warps, 3, dtype))

    rows = "logits_ptr labels_ptr order_ptr factor_ptr losses_ptr offset rows n lanes ignore_index smoothing even scale cap"
    for torch_dtype in FLOATS:
        dtype, copy = TRITON_TYPES[torch_dtype], {"ROWS": COPY_ROWS, "BLOCK": COPY_BLOCK}
        for v, extras in ((Config.SMALL, True), (16384, False), (128256, False), (128256, True)):
            c = Config.choose(2**20, v, torch_dtype.itemsize, False, 0, p)
            flags: dict[str, int] = dict.fromkeys(("ORDERED", "WEIGHTED", "CAPPED", "SMOOTH"), extras)
            flags |= {"GRADIENT": True, "LANES": c.lanes}
            add(f"V = {v}" + ", all settings" * extras, "rows_kernel", rows, flags, c.num_warps, dtype)
        names = "hidden_ptr labels_ptr order_ptr out_ptr offset rows k stride ignore_index"
        add("gather", "gather_kernel", names, copy, 4, dtype)
        names = "dh_ptr labels_ptr order_ptr dloss_ptr by_ptr out_ptr rows m k dloss_stride ignore_index"
        add("scatter", "scatter_kernel", names, copy | {"ORDERED": True}, 4, dtype)
    add("plan", "plan_kernel", "labels_ptr order_ptr m ignore_index", {"BLOCK": Config.PLAN_BLOCK}, 4, "fp32")
    return found
