r"""Matrix products of rows that are sorted by expert, each group with a matrix of its own.

    grouped:   y_i = scale x_i W_e^T (+ t_i B_e^T) (+ bias_e)      for offsets[e] <= i < offsets[e + 1]
    outer:     out_e = sum over i of e of p_i^T q_i

The map from a program to its expert and rows is made on the device from `offsets`, so the host never waits for the routing:
every program counts each expert's row tiles (a cumulative sum over a few hundred numbers), and takes tile after tile until
none is left. A group may be empty, or hold all rows. Rows past the last group belong to no expert: `grouped` writes zeros
there, and `outer` leaves them out.

The low-rank term is one more step of the same accumulator, so LoRA inside the product needs no weights in a padded copy.

Order of tiles: those of one expert follow each other, in stripes of STRIPE row tiles that walk along the columns, so what
runs at one time shares its rows and its weights in L2. W_e then comes from memory once.

UNIT: every width and row stride is a multiple of UNIT elements, 16 bytes where that can be said. Kernels get these numbers
divided by it, so that the compiler sees loads of 16 bytes whatever it knows of integers.

Source: Gale et al., "MegaBlocks", 2022, for products over a sorted order without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.launching import cdiv, next_power_of_2
from sparktune.ops.numerics import INTERPRETED, cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Launch

STRIPE = tl.constexpr(8)


@triton.jit
def product(a, b, acc):
    """acc + a b, in fp32 throughout for fp32 operands. The interpreter's dot takes raw bits for bf16."""
    if INTERPRETED:
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def grouped_kernel(
    x_ptr, w_ptr, y_ptr, offsets_ptr, rows_ptr, t_ptr, b_ptr, bias_ptr, m, n_units, k_units, experts, rank,
    x_units, w_group_units, w_units, t_stride, b_group, b_out, b_rank, scale,
    GROUPS: tl.constexpr, UNIT: tl.constexpr, ACROSS: tl.constexpr, GATHER: tl.constexpr, LORA: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Tiles [ROWS, COLS] of y [m, n]. ACROSS: W is stored [k, n], so along its columns; else [n, k].

    GATHER: row i of the sorted order is row rows[i] of x. EVEN: k is a multiple of DEPTH.
    """
    n, k = n_units * UNIT, k_units * UNIT
    groups = tl.arange(0, GROUPS)
    begins = tl.load(offsets_ptr + groups, mask=groups <= experts, other=0)
    ends = tl.load(offsets_ptr + groups + 1, mask=groups < experts, other=0)
    ends = tl.where(groups == experts, m, ends)  # the rows that no expert has
    tiles_after = tl.cumsum((tl.maximum(ends - begins, 0) + ROWS - 1) // ROWS, 0)
    across = (n + COLS - 1) // COLS
    for tile in range(tl.program_id(0), tl.max(tiles_after, 0) * across, tl.num_programs(0)):
        before = tiles_after <= tile // across
        e = tl.sum(before.to(tl.int32), 0)
        first = tl.max(tl.where(before, tiles_after, 0), 0)
        begin = tl.load(offsets_ptr + e)
        end = tl.load(offsets_ptr + e + 1, mask=e < experts, other=m)
        # Stripes of row tiles along the columns.
        local = tile - first * across
        stripe = local // (STRIPE * across)
        high = tl.minimum((end - begin + ROWS - 1) // ROWS - stripe * STRIPE, STRIPE)
        local = local % (STRIPE * across)
        row = begin + (stripe * STRIPE + local % high) * ROWS + tl.arange(0, ROWS)
        col = (local // high) * COLS + tl.arange(0, COLS)
        taken = tl.minimum(row, end - 1)  # what is computed twice is not stored
        if GATHER:  # noqa: SIM108 - as an expression both sides would be compiled
            source = tl.load(rows_ptr + taken).to(tl.int64)
        else:
            source = taken.to(tl.int64)
        depth = tl.arange(0, DEPTH)
        x_at = x_ptr + source[:, None] * (x_units * UNIT) + depth[None, :]
        w_base = w_ptr + e.to(tl.int64) * (w_group_units * UNIT)
        if ACROSS:
            w_at = w_base + depth.to(tl.int64)[:, None] * (w_units * UNIT) + col[None, :]
            w_step = tl.full((), DEPTH, tl.int64) * (w_units * UNIT)
        else:
            w_at = w_base + depth[:, None] + col.to(tl.int64)[None, :] * (w_units * UNIT)
            w_step = tl.full((), DEPTH, tl.int64)
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for step in range(tl.where(e < experts, (k + DEPTH - 1) // DEPTH, 0)):
            if EVEN:
                x = tl.load(x_at)
                w = tl.load(w_at, mask=col[None, :] < n, other=0.0)
            else:
                x = tl.load(x_at, mask=depth[None, :] < k - step * DEPTH, other=0.0)
                w = tl.load(w_at, mask=(depth[:, None] < k - step * DEPTH) & (col[None, :] < n), other=0.0)
            acc = product(x, w, acc)
            x_at += DEPTH
            w_at += w_step
        acc *= scale
        if LORA:
            b_base = b_ptr + e.to(tl.int64) * b_group + col.to(tl.int64)[None, :] * b_out
            t_base = t_ptr + taken.to(tl.int64)[:, None] * t_stride
            for start in tl.range(0, tl.where(e < experts, rank, 0), RANKS, num_stages=1):
                lane = start + tl.arange(0, RANKS)
                t = tl.load(t_base + lane[None, :], mask=lane[None, :] < rank, other=0.0)
                b = tl.load(
                    b_base + lane[:, None] * b_rank, mask=(lane[:, None] < rank) & (col[None, :] < n), other=0.0
                )
                acc = product(t, b, acc)
        if BIAS:
            at = bias_ptr + e.to(tl.int64) * n + col
            acc += tl.load(at, mask=(col < n) & (e < experts), other=0.0).to(tl.float32)[None, :]
        y_at = y_ptr + row.to(tl.int64)[:, None] * n + col[None, :]
        tl.store(y_at, cast(acc, y_ptr.dtype.element_ty), mask=(row[:, None] < end) & (col[None, :] < n))


@triton.jit
def outer_kernel(
    p_ptr, q_ptr, out_ptr, offsets_ptr, rows_ptr, high_units, wide_units, p_units, q_units,
    UNIT: tl.constexpr, GATHER: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile [HIGH, WIDE] of one expert's p^T q [high, wide] a program. GATHER: q's rows come in sorted order."""
    high, wide = high_units * UNIT, wide_units * UNIT
    down, across = (high + HIGH - 1) // HIGH, (wide + WIDE - 1) // WIDE
    tile = tl.program_id(0)
    e = tile // (down * across)
    i = (tile // across) % down * HIGH + tl.arange(0, HIGH)
    j = tile % across * WIDE + tl.arange(0, WIDE)
    begin, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    acc = tl.zeros((HIGH, WIDE), tl.float32)
    for step in range((end - begin + ROWS - 1) // ROWS):
        row = begin + step * ROWS + tl.arange(0, ROWS)
        if GATHER:  # noqa: SIM108 - as an expression both sides would be compiled
            source = tl.load(rows_ptr + row, mask=row < end, other=0).to(tl.int64)
        else:
            source = row.to(tl.int64)
        p_at = p_ptr + row.to(tl.int64)[None, :] * (p_units * UNIT) + i[:, None]
        q_at = q_ptr + source[:, None] * (q_units * UNIT) + j[None, :]
        p = tl.load(p_at, mask=(row[None, :] < end) & (i[:, None] < high), other=0.0)
        q = tl.load(q_at, mask=(row[:, None] < end) & (j[None, :] < wide), other=0.0)
        acc = product(p, q, acc)
    out_at = out_ptr + (e.to(tl.int64) * high + i[:, None]) * wide + j[None, :]
    tl.store(out_at, cast(acc, out_ptr.dtype.element_ty), mask=(i[:, None] < high) & (j[None, :] < wide))


@dataclass(frozen=True)
class Config:
    """How a grouped product is launched: its tile, and how many programs share the tiles."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    programs: int

    STAGES = 4
    LARGE = 200 * 1024  # shared memory from which a tile may be 256 columns wide
    PROGRAMS = (
        3  # at least, so that tiles of several programs meet where one multiprocessor is all there is, as interpreted
    )

    @classmethod
    def choose(cls, m: int, experts: int, n: int, dtype: torch.dtype, step: int, p: DeviceProperties) -> Config:
        """Rows by what an expert has on average, columns by what shared memory holds, as many stages as fit.

        fp32 without tensor cores keeps small tiles, whose operands stay in registers; so do odd widths (`step` 1), which
        are loaded element by element. Products with a low rank for
        their width are bound by the bytes of their other operand, and take few columns and a deep step.
        """
        each = m / max(1, experts)
        if dtype == torch.float32 or step == 1:
            rows, cols, depth, warps = (16 if each <= 16 else 64), 64, 32, 4
            if step == 1 and p.sm_10x:
                warps = 8  # operands loaded one by one spill 40 bytes with 4
        elif n <= 64:
            rows, cols, depth, warps = (16 if each <= 16 else 64), max(16, next_power_of_2(n)), 128, 4
        elif each <= 64:
            rows, cols, depth, warps = (16 if each <= 16 else 64), 128, 64, 4
        else:
            # On sm_10x accumulators come back from tensor memory for the low rank, and 256 columns spill 520 bytes.
            wide = p.shared_memory_per_block >= cls.LARGE and not p.sm_10x
            rows, cols, depth, warps = 128, 256 if wide else 128, 64, 8
        stage = (rows + cols) * depth * dtype.itemsize
        stages = max(2, min(cls.STAGES, p.shared_memory_per_block // stage))
        resident = max(1, min(p.shared_memory_per_block // (stages * stage), p.threads_per_sm // (32 * warps)))
        tiles = (m // rows + min(m, experts + 1)) * cdiv(n, cols)  # at most: each group ends in a partial one
        return cls(rows, cols, depth, warps, stages, max(1, min(tiles, max(cls.PROGRAMS, resident * p.sm_count))))


@dataclass(frozen=True)
class OuterConfig:
    """The tile of an outer product, and how many rows a step adds up."""

    high: int
    wide: int
    rows: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, high: int, wide: int, dtype: torch.dtype, p: DeviceProperties) -> OuterConfig:
        """A low rank is one block on its side; the other side is cut into 128 columns, or 64 in fp32."""
        most = 64 if dtype == torch.float32 else 128
        sides = [max(16, min(most, next_power_of_2(max(1, s)))) for s in (high, wide)]
        if min(sides) > 64 and p.shared_memory_per_block < Config.LARGE:
            sides[0] = 64
        rows = 32 if dtype == torch.float32 else 64
        stages = max(2, min(Config.STAGES, p.shared_memory_per_block // (sum(sides) * rows * dtype.itemsize)))
        return cls(sides[0], sides[1], rows, 8 if sides[0] * sides[1] > 64 * 128 else 4, stages)


def unit(dtype: torch.dtype, *numbers: int) -> int:
    """How many elements are 16 bytes, if all the numbers are multiples of it; else 1."""
    whole = 16 // dtype.itemsize
    return whole if all(i % whole == 0 for i in numbers) else 1


def ranks(b: Tensor | None) -> int:
    """How many ranks the low-rank term takes at a step."""
    return 16 if b is None else max(16, min(64, next_power_of_2(b.shape[2])))


def laid(w: Tensor) -> tuple[Tensor, bool]:
    """(w [E, N, K] with unit stride along K or N, whether it is along N); a copy where it has neither."""
    if w.stride(2) == 1:
        return w, False
    return (w, True) if w.stride(1) == 1 else (w.contiguous(), False)


def grouped(
    x: Tensor, w: Tensor, offsets: Tensor, rows: Tensor | None = None, scale: float = 1.0, t: Tensor | None = None,
    b: Tensor | None = None, bias: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """scale x W_e^T + t B_e^T + bias_e: x [S, K], W [E, N, K], t [M, R], B [E, N, R], bias [E, N] -> [M, N].

    All in x's dtype but the bias, which is contiguous. M is the length of `rows`, or S. W and B may be transposed views.
    """
    experts, n, k = w.shape
    m = x.shape[0] if rows is None else rows.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x = dispatch.rows(x)
    w, along_n = laid(w)
    w_stride = w.stride(2) if along_n else w.stride(1)
    step = unit(x.dtype, n, k, x.stride(0), w.stride(0), w_stride)
    c = config or Config.choose(m, experts, n, x.dtype, step, DeviceProperties.of(x.device))
    factor = b if b is not None else w
    dispatch.launch(
        grouped_kernel, c.programs, x, x, w, y, offsets, offsets if rows is None else rows, x if t is None else t,
        factor, x if bias is None else bias, m, n // step, k // step, experts, 0 if b is None else b.shape[2],
        x.stride(0) // step, w.stride(0) // step, w_stride // step, 0 if t is None else t.stride(0), *factor.stride(), scale,
        fp_fusion=True, GROUPS=next_power_of_2(experts + 1), UNIT=step, ACROSS=along_n,
        GATHER=rows is not None, LORA=b is not None, BIAS=bias is not None, EVEN=k % c.depth == 0, ROWS=c.rows,
        COLS=c.cols, DEPTH=c.depth, RANKS=ranks(b), num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return y


def outer(
    p: Tensor, q: Tensor, offsets: Tensor, experts: int, dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    """Each expert's p^T q: p [M, H] and q [M, W] (or [S, W], taken by `rows`) -> [E, H, W] in `dtype`."""
    high, wide = p.shape[1], q.shape[1]
    out = torch.empty((experts, high, wide), dtype=dtype, device=p.device)
    if not out.numel():
        return out
    if not p.numel() or not q.numel():
        return out.zero_()
    p, q = dispatch.rows(p), dispatch.rows(q)
    c = OuterConfig.choose(high, wide, p.dtype, DeviceProperties.of(p.device))
    step = unit(p.dtype, high, wide, p.stride(0), q.stride(0))
    programs = experts * cdiv(high, c.high) * cdiv(wide, c.wide)
    dispatch.launch(
        outer_kernel, programs, p, p, q, out, offsets, offsets if rows is None else rows, high // step, wide // step,
        p.stride(0) // step, q.stride(0) // step,
        fp_fusion=True, UNIT=step, GATHER=rows is not None, HIGH=c.high, WIDE=c.wide, ROWS=c.rows,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


SCALARS = "m n_units k_units experts rank x_units w_group_units w_units t_stride b_group b_out b_rank"


def launches(p: DeviceProperties) -> list[Launch]:
    """Every tile of the table for rows of 2048 or 2881, and what a call's flags can add to it."""
    found = []
    cases = (  # rows, columns, depth, along columns, gathered, LoRA, bias
        ("a low rank", 2**15, 16, 2048, False, True, False, False),
        ("few rows an expert", 2**10, 2048, 2048, False, False, True, False),
        ("some rows an expert", 2**13, 2048, 2048, True, False, True, False),
        ("many rows an expert", 2**16, 2048, 2048, False, True, True, True),
        ("many rows an expert, dx", 2**16, 2048, 2048, True, False, True, False),
        ("many rows an expert, odd widths", 2**16, 2881, 2881, False, False, False, False),
    )
    for dtype in FLOATS:
        name, ptr = TRITON_TYPES[dtype], f"*{TRITON_TYPES[dtype]}"
        for when, m, n, k, across, gather, lora, bias in cases if dtype == torch.bfloat16 else cases[3:5]:
            step = unit(dtype, n, k)
            c = Config.choose(m, 128, n, dtype, step, p)
            flags: dict[str, Any] = {"GROUPS": 256, "UNIT": step, "ACROSS": across, "GATHER": gather}
            flags |= {"LORA": lora, "BIAS": bias, "EVEN": k % c.depth == 0, "ROWS": c.rows, "COLS": c.cols}
            flags |= {"DEPTH": c.depth, "RANKS": 16}
            args = {f"{x}_ptr": ptr for x in ("x", "w", "y", "t", "b", "bias")}
            args |= {"offsets_ptr": "*i32", "rows_ptr": "*i32", "scale": "fp32"}
            args |= dict.fromkeys(SCALARS.split(), "i32") | dict.fromkeys(flags, "constexpr")
            found.append(
                Launch(when, "grouped_kernel", args, flags, c.num_warps, c.num_stages, name, fp_fusion=True)
            )  # fmt: skip
        for when, high, wide, gather in (
            ("gradient of A", 16, 2048, True), ("gradient of B", 2048, 16, False), ("gradient of W", 2048, 2048, True),
        )[: 3 if dtype == torch.bfloat16 else 1]:  # fmt: skip
            o = OuterConfig.choose(high, wide, dtype, p)
            flags = {"UNIT": unit(dtype), "GATHER": gather, "HIGH": o.high, "WIDE": o.wide, "ROWS": o.rows}
            args = {"p_ptr": ptr, "q_ptr": ptr, "out_ptr": "*fp32", "offsets_ptr": "*i32", "rows_ptr": "*i32"}
            args |= dict.fromkeys(("high_units", "wide_units", "p_units", "q_units"), "i32")
            args |= dict.fromkeys(flags, "constexpr")
            found.append(
                Launch(when, "outer_kernel", args, flags, o.num_warps, o.num_stages, name, fp_fusion=True)
            )  # fmt: skip
    return found
