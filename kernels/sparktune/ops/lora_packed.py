"""The buffer behind LoRA inside a matrix product, and the products with it: what `lora_linear`, `lora_qkv` and `lora_mlp`
are made of, and what a whole layer's own Function may call.

`lora_linear` has the maths. A `Stack` says where the layers of one input lie in the buffer P [n + r, k + r]; `pack` fills
it; `forward_packed` and `backward_packed` multiply by it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.dropout import drop
from sparktune.ops.launching import cdiv, next_power_of_2
from sparktune.ops.numerics import cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Launch
from sparktune.ops.weights import Weight


def flatten(weights: Sequence[Weight]) -> tuple[list[Tensor | None], list[int]]:
    """Weights as what a custom op takes: five tensors each, and [N, K, blocksize, scales an absmax2, format]."""
    tensors: list[Tensor | None] = []
    layout: list[int] = []
    for w in weights:
        *parts, blocksize, per_scale, quant_type = w.flat()
        tensors += parts  # type: ignore[arg-type]
        layout += [*w.shape, blocksize, per_scale, FORMATS.index(quant_type)]
    return tensors, layout


def unflatten(tensors: list[Tensor | None], layout: list[int]) -> list[Weight]:
    """The inverse of `flatten`."""
    found = []
    for i in range(0, len(layout), 5):
        n, k, blocksize, per_scale, kind = layout[i : i + 5]
        flat: Any = (*tensors[i : i + 5], blocksize, per_scale, FORMATS[kind])
        found.append(Weight.from_flat(flat, (n, k)))
    return found


FORMATS = ("", "nf4", "fp4")


@dataclass(frozen=True)
class Stack:
    """Layers of one input, stacked: where each one's rows and ranks lie in the buffer P [n + r, k + r]."""

    weights: tuple[Weight, ...]
    ranks: tuple[int, ...]
    biased: bool

    ALIGN = 16  # elements: 32 bytes in 16 bits

    @functools.cached_property
    def n(self) -> int:
        """Rows of all weights."""
        return sum(w.shape[0] for w in self.weights)

    @functools.cached_property
    def k(self) -> int:
        """Width of the input."""
        return self.weights[0].shape[1]

    @functools.cached_property
    def r(self) -> int:
        """Columns beside W: ranks and the bias, padded; 0 without either."""
        wanted = sum(self.ranks) + self.biased
        return -(-wanted // self.ALIGN) * self.ALIGN

    def rows(self, i: int) -> slice:
        """Rows of layer i."""
        first = self._starts[i]
        return slice(first, first + self.weights[i].shape[0])

    @functools.cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((w.shape[0] for w in self.weights), initial=0))

    def slot(self, i: int) -> slice:
        """Layer i's ranks, counted from the first column beside W, or the first row below it."""
        first = sum(self.ranks[:i])
        return slice(first, first + self.ranks[i])

    @functools.cached_property
    def around(self) -> list[tuple[Config, slice, int, int, int]]:
        """How each layer's `adapter_kernel` starts: its configuration and slot, the end of the rows below that are its to
        write, and its programs beside the weight and below."""
        c, found = Config.choose(self.r), []
        for i, w in enumerate(self.weights):
            slot, last = self.slot(i), i + 1 == len(self.weights)
            found.append((c, slot, self.r if last else slot.stop, cdiv(w.shape[0], c.tile), cdiv(self.k, c.tile)))
        return found

    @functools.cached_property
    def room(self) -> int:
        """Columns to leave right of an input's rows, so that its low-rank product lands beside it."""
        return behind(self.k, self.r)

    @functools.cached_property
    def room_out(self) -> int:
        """The same, right of an output gradient's rows."""
        return behind(self.n, self.r)

    @functools.cached_property
    def one(self) -> int:
        """The column that the biases share."""
        return sum(self.ranks)


def behind(width: int, r: int) -> int:
    """Columns after `width` that hold `r` and end the row at a multiple of 128 bytes in 16 bits; none for r = 0.

    Rows that end anywhere make dequantisation into the buffer 58 to 81% as fast as a copy, where whole ones reach 96 (H100).
    """
    return -(-(width + r) // 64) * 64 - width if r else 0


@triton.jit
def adapter_kernel(
    p_ptr, a_ptr, b_ptr, bias_ptr, scale, rows, k, width, beside, below, slot, rank, last, one, r,
    a_row, a_col, b_row, b_col, b_programs,
    LORA: tl.constexpr, BIAS: tl.constexpr, R_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One layer's share of what lies around the weights in P: sB and bias beside its rows, then A below them.

    The first `b_programs` programs write r columns of its rows, the first at offset `beside` in P, zero outside its slot.
    The others write rows slot to last of those that begin at offset `below`; past the rank they are zero. Where a tile
    begins is computed in 64 bits; within it offsets have 32, or registers would spill.
    """
    program = tl.program_id(0)
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    tile = tl.arange(0, TILE)
    lane = tl.arange(0, R_BLOCK)
    mine = (lane >= slot) & (lane < slot + rank)
    if program < b_programs:
        start = program * TILE
        here = (start + tile < rows)[:, None]
        value = tl.zeros((TILE, R_BLOCK), tl.float32)
        if LORA:
            at = b_ptr + start.to(tl.int64) * b_row + (tile[:, None] * b_row + (lane - slot)[None, :] * b_col)
            value = tl.load(at, mask=here & mine[None, :], other=0.0).to(tl.float32) * scale
        if BIAS:
            bias = tl.load(bias_ptr + start + tile[:, None], mask=here, other=0.0).to(tl.float32)
            value = tl.where(lane[None, :] == one, bias, value)
        to = p_ptr + beside + start.to(tl.int64) * width + (tile[:, None] * width + lane[None, :])
        tl.store(to, cast(value, dtype), mask=here & (lane < r)[None, :])
    else:
        # Other names than above: Triton 3.6 wants a variable to have one shape in both branches.
        col = ((program - b_programs) * TILE + tile)[None, :]
        under = tl.zeros((R_BLOCK, TILE), tl.float32)
        if LORA:
            a_at = a_ptr + ((lane - slot)[:, None] * a_row + col * a_col)
            under = tl.load(a_at, mask=mine[:, None] & (col < k), other=0.0).to(tl.float32)
        p_at = p_ptr + below + (lane[:, None] * width + col)
        tl.store(p_at, cast(under, dtype), mask=((lane >= slot) & (lane < last))[:, None] & (col < k))


@dataclass(frozen=True)
class Config:
    """How the adapters' kernel is launched."""

    r_block: int
    tile: int

    @classmethod
    def choose(cls, r: int) -> Config:
        """About 2048 elements a program: there are few of these programs, and a GEMM waits for them."""
        block = max(16, next_power_of_2(r))
        return cls(block, max(4, 1024 // block))


def pack(
    stack: Stack, a: Sequence[Tensor | None], b: Sequence[Tensor | None], bias: Sequence[Tensor | None],
    scales: Sequence[float], dtype: torch.dtype, weights: bool = True, into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The buffer P [n + r, k + r] of `stack` in `dtype`: weights in their rows, sB and biases beside, A below.

    Without `weights` their place holds whatever was there, for a backward that multiplies by what lies around them only.
    `into`: an earlier such buffer, written anew.
    """
    n, k, r = stack.n, stack.k, stack.r
    p = into
    if p is None:
        p = torch.empty(n + r, k + stack.room, dtype=dtype, device=stack.weights[0].device)[:, : k + r]
    width = p.stride(0)
    for i, w in enumerate(stack.weights):
        rows = stack.rows(i)
        if weights:
            w.into(p[rows, :k])
        if r == 0:
            continue
        c, slot, last, beside, below = stack.around[i]
        ai, bi, zi = a[i], b[i], bias[i]
        dispatch.launch(
            adapter_kernel, beside + below, p, p, p if ai is None else ai, p if bi is None else bi, p if zi is None else zi,
            scales[i], w.shape[0], k, width, rows.start * width + k, n * width, slot.start, stack.ranks[i],
            last, stack.one, r, *(ai.stride() if ai is not None else (0, 0)),
            *(bi.stride() if bi is not None else (0, 0)), beside,
            LORA=ai is not None, BIAS=zi is not None, R_BLOCK=c.r_block, TILE=c.tile, num_warps=4,
        )  # fmt: skip
    return p


def with_room(x: Tensor, r: int) -> Tensor | None:
    """x [M, K] and the `r` columns right of it as one view [M, K + r]: where x lies in such a buffer, and r is not 0."""
    m, k = x.shape
    if m == 0 or r == 0 or x.stride(1) != 1 or x.stride(0) < k + r:
        return None
    end = x.storage_offset() + (m - 1) * x.stride(0) + k + r
    if end * x.element_size() > x.untyped_storage().nbytes():
        return None
    # Without x's version counter: x itself stays as it is, and another layer may have saved it.
    return x.data.as_strided((m, k + r), x.stride())


def forward_packed(
    x: Tensor, p: Tensor, n: int, one: int | None, branch_input: Tensor | None = None, tail_free: bool = False,
    onto: Tensor | None = None, room: int = 0, known: Tensor | None = None, apart: bool = True, into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, n], x' A^T [M, r]) for x [M, K] and the buffer P; `one`: the column of P that biases stand in.

    `onto` [M, n] is added within the product, before its one rounding, and stays as it is. `room`: columns to leave right
    of y's rows; `into`: where y goes, instead of memory of its own. `known`: x' A^T as an earlier call returned it, which is
    then not computed again. Unless `apart` x' A^T may be a view of x's own row, which it then keeps alive.
    """
    k = x.shape[1]
    r = p.shape[1] - k
    if room:
        into = torch.empty(x.shape[0], n + room, dtype=x.dtype, device=x.device)[:, :n]
    if r == 0:
        return _onto(onto, x, p[:n].t(), into), x.new_empty(x.shape[0], 0)
    x_branch = x if branch_input is None else branch_input
    row = with_room(x, r) if tail_free else None
    if row is None and k < n:
        row = torch.empty(x.shape[0], k + behind(k, r), dtype=x.dtype, device=x.device)[:, : k + r]
        row[:, :k].copy_(x)
    if row is None:
        tail = x_branch @ p[n:, :k].t() if known is None else known
        if one is not None and known is None:
            tail[:, one] = 1.0
        return _onto(onto, tail, p[:n, k:].t(), into).addmm_(x, p[:n, :k].t()), tail
    if known is not None:
        row[:, k:].copy_(known)
        return _onto(onto, row, p[:n].t(), into), known
    torch.mm(x_branch, p[n:, :k].t(), out=row[:, k:])
    if one is not None:
        row[:, k + one] = 1.0
    return _onto(onto, row, p[:n].t(), into), row[:, k:].clone() if apart else row[:, k:]


def _onto(base: Tensor | None, left: Tensor, right: Tensor, into: Tensor | None) -> Tensor:
    return torch.mm(left, right, out=into) if base is None else torch.addmm(base, left, right, out=into)


def backward_packed(
    dy: Tensor, p: Tensor, n: int, need_dx: bool, seed: Tensor | None = None, dropout: float = 0.0,
    row: Tensor | None = None, into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], s dy B [M, r]) for dy [M, n]; `row`: dy's own buffer [M, n + r], whose last columns may be written;
    `into`: where dx goes, instead of memory of its own, when there is no dropout.

    The second may be a view that keeps all of the row alive: it is for `factor_gradients`, not to be kept.
    """
    k = p.shape[1] - (p.shape[0] - n)
    r = p.shape[0] - n
    empty = dy.new_empty(0)
    if r == 0:
        return (torch.mm(dy, p, out=into) if need_dx else empty), dy.new_empty(dy.shape[0], 0)
    if not need_dx:
        return empty, dy @ p[:n, k:]
    if seed is not None and dropout:
        tail = dy @ p[:n, k:]
        return drop(tail @ p[n:, :k], seed, dropout, onto=dy @ p[:n, :k]), tail
    if row is None and n < k:
        row = torch.empty(dy.shape[0], n + behind(n, r), dtype=dy.dtype, device=dy.device)[:, : n + r]
        row[:, :n].copy_(dy)
    if row is None:
        tail = dy @ p[:n, k:]
        return torch.mm(tail, p[n:, :k], out=into).addmm_(dy, p[:n, :k]), tail
    torch.mm(dy, p[:n, k:], out=row[:, n:])
    return torch.mm(row, p[:, :k], out=into), row[:, n:]


def summed(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over all rows [M, *], in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.t().float() @ right.float()


def forward_layers(
    stack: Stack, x: Tensor, a: Sequence[Tensor | None], b: Sequence[Tensor | None], bias: Sequence[Tensor | None],
    scales: Sequence[float], branch_input: Tensor, tail_free: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, n], x' A^T [M, r]) of layers that share the input x [M, K] and, for their branches, x'."""
    p = pack(stack, a, b, bias, scales, x.dtype)
    return forward_packed(x, p, stack.n, stack.one if stack.biased else None, branch_input, tail_free)


def input_gradient(
    stack: Stack, dy: Tensor, a: Sequence[Tensor | None], b: Sequence[Tensor | None], bias: Sequence[Tensor | None],
    scales: Sequence[float], seed: Tensor | None, dropout: float, need_dx: bool, need_da: bool, row: Tensor | None = None,
    p: Tensor | None = None, into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], s dy B [M, r]), each empty where nothing needs it; `row` and `into` as in `backward_packed`, `p` a buffer made
    before."""
    if not (need_dx or need_da):
        return dy.new_empty(0), dy.new_empty(0)
    if p is None:
        p = pack(stack, a, b, bias, scales, dy.dtype, weights=need_dx)
    return backward_packed(dy, p, stack.n, need_dx, seed, dropout, row, into)


def factor_gradients(
    stack: Stack, dy: Tensor, branch_input: Tensor, tail: Tensor, dtail: Tensor, a: Sequence[Tensor | None],
    b: Sequence[Tensor | None], bias: Sequence[Tensor | None], scales: Sequence[float], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """[da, db, dbias of each layer], empty where `needs` says no, from x' A^T and s dy B, each in memory of its own."""
    sums = FactorSums(stack, a, b, bias, scales, needs)
    sums.add(dy, branch_input, tail, dtail)
    return [dy.new_empty(0) if g is None else g for g in sums.rounded(apart=True)]


class FactorSums:
    """Gradients of a stack's factors over all rows, of which some are added at a time; in fp32 until they are `rounded`.

    x' is read once for every A. `needs`: of each layer whether a, b and the bias want one.
    """

    def __init__(
        self, stack: Stack, a: Sequence[Tensor | None], b: Sequence[Tensor | None], bias: Sequence[Tensor | None],
        scales: Sequence[float], needs: Sequence[bool],
    ) -> None:  # fmt: skip
        self._stack, self._factors, self._scales, self._needs = stack, (a, b, bias), scales, needs
        self._every: Tensor | None = None  # of the A of all layers
        self._found: list[Tensor | None] = [None] * len(needs)

    @property
    def any(self) -> bool:
        """Whether anything is wanted."""
        return any(self._needs)

    @property
    def of_inputs(self) -> bool:
        """Whether the input's rows are needed."""
        return any(self._needs[::3])

    def add(self, dy: Tensor, branch_input: Tensor, tail: Tensor, dtail: Tensor) -> None:
        """Some rows: dy [m, n], x' [m, K], x' A^T and s dy B [m, r]."""
        if self.of_inputs:
            self._every = _plus(self._every, summed(dtail, branch_input))
        for i, (bi, zi) in enumerate(zip(*self._factors[1:], strict=True)):
            rows, slot = self._stack.rows(i), self._stack.slot(i)
            if bi is not None and self._needs[3 * i + 1]:
                self._found[3 * i + 1] = _plus(self._found[3 * i + 1], summed(dy[:, rows], tail[:, slot]))
            if zi is not None and self._needs[3 * i + 2]:
                self._found[3 * i + 2] = _plus(self._found[3 * i + 2], dy[:, rows].sum(0, dtype=torch.float32))

    def rounded(self, apart: bool) -> list[Tensor | None]:
        """[da, db, dbias of each layer] in the factors' dtypes.

        `apart`: every one in memory of its own, as what a custom op returns must be; else the da may be rows of one matrix.
        """
        for i, (ai, bi, zi) in enumerate(zip(*self._factors, strict=True)):
            if ai is not None and self._every is not None and self._needs[3 * i]:
                self._found[3 * i] = self._every[self._stack.slot(i)].to(ai.dtype, copy=apart)
            if bi is not None and (db := self._found[3 * i + 1]) is not None:
                scale = self._scales[i]
                self._found[3 * i + 1] = (db.mul_(scale) if scale != 1.0 else db).to(bi.dtype)
            if zi is not None and (dz := self._found[3 * i + 2]) is not None:
                self._found[3 * i + 2] = dz.to(zi.dtype)
        return self._found


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], a view where strides allow."""
    return dispatch.rows(x) if x.numel() else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def adapter_launches() -> list[Launch]:
    """The kernel around the weights, for ranks up to 16, 64 and 512 columns, LoRA in fp32 or the buffer's dtype."""
    found = []
    for dtype in FLOATS:
        name = TRITON_TYPES[dtype]
        for r, lora, bias in ((16, name, False), (16, "fp32", True), (64, "fp32", False), (512, "fp32", True)):
            if (r > 16 and dtype != torch.bfloat16) or (name == "fp32" and not bias):
                continue
            c = Config.choose(r)
            flags = {"LORA": True, "BIAS": bias, "R_BLOCK": c.r_block, "TILE": c.tile}
            args = dict(p_ptr=f"*{name}", a_ptr=f"*{lora}", b_ptr=f"*{lora}", bias_ptr=f"*{lora}", scale="fp32")
            integers = ["rows", "k", "width", "beside", "below", "slot", "rank", "last", "one", "r"]
            integers += ["a_row", "a_col", "b_row", "b_col", "b_programs"]
            args |= dict.fromkeys(integers, "i32") | dict.fromkeys(flags, "constexpr")
            when = f"up to {r} columns, LoRA in {lora}{', biased' if bias else ''}"
            found.append(Launch(when, "adapter_kernel", args, flags, 4, 3, name))
    return found
