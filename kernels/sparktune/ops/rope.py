r"""Rotary position embedding of queries and keys, in the pass that lays them out for attention.

A head of D elements at position p, with R <= D rotary elements; its pair (a, b) number i of R / 2 turns by the angle
that the tables hold, c = cos[p, i] and s = sin[p, i] (see `rope_tables`; an attention scaling is a factor of both):

    a' = a c - b s,   b' = b c + a s

Pairs are (x[i], x[i + R/2]), half-split, as in Llama, Gemma, Qwen and Phi; or (x[2i], x[2i + 1]), interleaved, as in
GPT-J, GLM and Cohere. Elements from R on are copied. Backward is the inverse rotation of the gradient, s replaced by
-s: the matrix of a pair is orthogonal times the scaling, so its transpose is what undoes the turn.

Rounding: fp32 tables and fp32 products and sums, rounded once to q's dtype. transformers rounds cos and sin to the
activations' dtype, both products and their sum: in bf16 about 1.7 times the error of one rounding. Nothing is promised
bit for bit against it; against plain PyTorch in fp32 everything is.

Shapes: q [B, S, H, D] and k [B, S, Hkv, D] with free strides, such as slices of a merged projection
[B, S, (H + 2 Hkv) D] or views [B, H, S, D] transposed. Results are contiguous; `.transpose(1, 2)` shows them with the
heads first, at no cost. cos and sin [L, R/2] fp32. positions [B, S] int32 or int64, of any strides, such as those of
packed rows, which begin anew with each document; without them row t of a sequence has position t. A position outside
the tables makes NaN: an error would take a synchronisation to find.

Bytes: q and k are read once and written once, in one launch for both; 2 (H + Hkv) D elements a token forward and as
many backward. Tables are shared by all heads and sequences, and come from cache. Saved: tables and positions.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.fused import Fused
from sparktune.ops.head_problems import head_bytes, head_inputs, heads_of, rows_of, table_inputs, tail
from sparktune.ops.head_tiles import BATCHES, load_heads, load_rest, place, store_heads, store_rest
from sparktune.ops.launching import cdiv, next_power_of_2
from sparktune.ops.numerics import cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors

INTEGERS = (torch.int32, torch.int64)


def reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, in the same rounding order; the oracle is this with float64 tensors and compute=float64."""
    at = torch.arange(q.shape[1], device=q.device) if positions is None else positions.long()
    c, s = (table[at].to(compute).unsqueeze(-2) for table in (cos, sin))  # [..., S, 1, R/2]
    return rotated(q, c, s, interleaved), rotated(k, c, s, interleaved)


def rotated(x: Tensor, c: Tensor, s: Tensor, interleaved: bool = False) -> Tensor:
    """x [B, S, heads, D] turned by c and s, which broadcast to [B, S, heads, R/2], in their dtype; rounded once."""
    rotary = 2 * c.shape[-1]
    turning, rest = x[..., :rotary].to(c.dtype), x[..., rotary:]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    pair = (a * c - b * s, b * c + a * s)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((y.to(x.dtype), rest), -1)


@triton.jit
def angles(
    cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """cos and sin [TILE, HALF_BLOCK] of one token, a row for each head; NaN where the tables don't reach.

    `position_ptr` points to the token's own. Every head loads the row itself, from cache: one row for all would come in
    another layout than the heads, and pass through shared memory into theirs.
    """
    position = token
    if POSITIONS:
        position = tl.load(position_ptr).to(tl.int64)
    i = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (position >= 0) & (position < length)
    missing = tl.where(inside, 0.0, float("nan"))
    row = tl.where(inside, position, 0) * HALF + tl.zeros((TILE, 1), tl.int64)
    c = tl.load(cos_ptr + row + i, mask=i < HALF, other=0.0) + missing
    s = tl.load(sin_ptr + row + i, mask=i < HALF, other=0.0) + missing
    return c, s


@triton.jit
def _turn(a, b, c, s):
    return a * c - b * s, b * c + a * s


@triton.jit
def _load_pairs(
    ptr, first, stride, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What `load_heads` gives, of heads whose pairs lie side by side."""
    head = (first + tl.arange(0, TILE))[:, None]
    row = ptr + head.to(tl.int64) * stride
    i = tl.arange(0, 2 * HALF_BLOCK)[None, :]
    x = tl.load(row + i, mask=(head < HEADS) & (i < 2 * HALF), other=0.0)
    a, b = tl.split(tl.reshape(x, (TILE, HALF_BLOCK, 2)))
    return a, b, load_rest(row, head < HEADS, a, HALF, REST, REST_BLOCK)


@triton.jit
def _store_pairs(
    ptr, first, stride, a, b, e, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where `_load_pairs` would load them."""
    head = (first + tl.arange(0, TILE))[:, None]
    row = ptr + head.to(tl.int64) * stride
    i = tl.arange(0, 2 * HALF_BLOCK)[None, :]
    x = cast(tl.reshape(tl.join(a, b), (TILE, 2 * HALF_BLOCK)), ptr.dtype.element_ty)
    tl.store(row + i, x, mask=(head < HEADS) & (i < 2 * HALF))
    store_rest(row, head < HEADS, e, HALF, REST, REST_BLOCK)


@triton.jit
def _heads(
    x_ptr, y_ptr, group, x_head, y_head, cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of heads of one token. They are on their way before the position is known."""
    EXACT: tl.constexpr = HEADS % TILE == 0 and HALF == HALF_BLOCK
    first = group * TILE
    if INTERLEAVED:
        a, b, e = _load_pairs(x_ptr, first, x_head, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)
    else:
        a, b, e = load_heads(x_ptr, first, x_head, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)
    c, s = angles(cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS, HALF, HALF_BLOCK, TILE)
    if INVERSE:
        s = -s
    a, b = _turn(a.to(tl.float32), b.to(tl.float32), c, s)
    e = e.to(tl.float32)  # and back when it is stored, which changes nothing
    if INTERLEAVED:
        _store_pairs(y_ptr, first, y_head, a, b, e, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)
    else:
        store_heads(y_ptr, first, y_head, a, b, e, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ptr, length, q_batch, q_token, q_head,
    k_batch, k_token, k_head, q_out_batch, q_out_token, q_out_head, k_out_batch, k_out_token, k_out_head,
    position_batch, position_token, POSITIONS: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """A tile of heads of one token a program, of q or of k; names such as q_token are strides in elements."""
    batch, token, group, of_q = place(Q_HEADS, K_HEADS, Q_TILE, K_TILE)
    position_ptr += batch * position_batch + token * position_token
    if of_q:
        _heads(
            q_ptr + batch * q_batch + token * q_token, q_out_ptr + batch * q_out_batch + token * q_out_token, group,
            q_head, q_out_head, cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS, INVERSE, INTERLEAVED,
            HALF, REST, HALF_BLOCK, REST_BLOCK, Q_HEADS, Q_TILE,
        )  # fmt: skip
    else:
        _heads(
            k_ptr + batch * k_batch + token * k_token, k_out_ptr + batch * k_out_batch + token * k_out_token, group,
            k_head, k_out_head, cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS, INVERSE, INTERLEAVED,
            HALF, REST, HALF_BLOCK, REST_BLOCK, K_HEADS, K_TILE,
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How heads are cut into tiles; the same on every device, since a tile is small."""

    half_block: int  # R / 2, padded to a power of two
    rest_block: int  # D - R, padded; 1 where there is none
    q_tile: int  # heads a tile
    k_tile: int
    num_warps: int

    # Most in one tile: 8 pairs a thread at 2 warps, so a load of 16 bytes of either half in bf16. On one H200 at 4096 and
    # 16384 tokens that has 94 to 96% of a copy's speed with 32+8 heads of 128 and 90 to 92% with 8+4 of 256; all heads of
    # a token in one program, in a loop over tiles of 4096 at 4 warps, had 86 to 88 and 82 to 85%.
    ELEMENTS, WARPS = 1024, 2

    @classmethod
    def choose(
        cls, q_heads: int, k_heads: int, head_dim: int, rotary: int, elements: int = ELEMENTS, warps: int = WARPS
    ) -> Config:  # fmt: skip
        """Tiles of all heads, up to `elements` elements."""
        half, rest = next_power_of_2(rotary // 2), next_power_of_2(max(1, head_dim - rotary))
        fit = max(1, elements // (2 * half + (rest if head_dim > rotary else 0)))
        most = 1 << (fit.bit_length() - 1)  # a power of two
        q, k = (min(most, next_power_of_2(max(1, h))) for h in (q_heads, k_heads))
        return cls(half, rest, q, k, warps)

    def groups(self, q_heads: int, k_heads: int) -> int:
        """Tiles of one token."""
        return cdiv(q_heads, self.q_tile) + cdiv(k_heads, self.k_tile)


def unit(t: Tensor) -> Tensor:
    """`t` itself where its last dimension has stride 1, else a contiguous copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def token_strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, token and head of each."""
    return [n for t in tensors for n in t.stride()[:3]]


def rotate(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, inverse: bool,
) -> None:  # fmt: skip
    """Turn q and k (or back, with `inverse`) into q_out and k_out, which may be any views with unit last stride.

    Not differentiable and not counted: for a backward that writes into slices of one merged gradient.
    """
    b, s, h, d = q.shape
    if q.numel() + k.numel() == 0:
        return
    if b > BATCHES:
        for i in range(0, b, BATCHES):
            n = slice(i, i + BATCHES)
            at = None if positions is None else positions[n]
            rotate(q[n], k[n], q_out[n], k_out[n], cos, sin, at, interleaved, inverse)
        return
    q, k, cos, sin = unit(q), unit(k), cos.contiguous(), sin.contiguous()
    rotary = 2 * cos.shape[1]
    c = Config.choose(h, k.shape[2], d, rotary)
    dispatch.launch(
        rotate_kernel, (s * c.groups(h, k.shape[2]), b), q, q, k, q_out, k_out, cos, sin,
        cos if positions is None else positions, cos.shape[0], *token_strides(q, k, q_out, k_out),
        *((0, 0) if positions is None else positions.stride()), POSITIONS=positions is not None, INVERSE=inverse,
        INTERLEAVED=interleaved, HALF=rotary // 2, REST=d - rotary, HALF_BLOCK=c.half_block, REST_BLOCK=c.rest_block,
        Q_HEADS=h, K_HEADS=k.shape[2], Q_TILE=c.q_tile, K_TILE=c.k_tile, num_warps=c.num_warps,
    )  # fmt: skip


def _new(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    out = _new(q), _new(k)
    rotate(q, k, *out, cos, sin, positions, interleaved, inverse=False)
    return out


def _backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    out = _new(dq), _new(dk)
    rotate(dq, dk, *out, cos, sin, positions, interleaved, inverse=True)
    return out


_OP = Fused(
    "rope", _forward, _backward, reference=reference, outputs=2, grads=("q", "k"), save=lambda args, _: args[2:]
)


def check(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor | None:
    """Raise a ValueError for arguments that don't fit; `positions` as [B, S]."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q and k must be [B, S, heads, D], got {list(q.shape)} and {list(k.shape)}")
    if q.dtype not in FLOATS or q.dtype != k.dtype:
        raise ValueError(f"{op}: q and k must both be fp32, bf16 or fp16, got {q.dtype} and {k.dtype}")
    if cos.dim() != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= q.shape[3]:
        raise ValueError(
            f"{op}: cos and sin must be [L, R/2] with R up to {q.shape[3]}, got {list(cos.shape)} and {list(sin.shape)}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"{op}: cos and sin must be fp32, got {cos.dtype} and {sin.dtype}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"{op}: cos and sin get no gradient; detach them")
    if positions is None:
        if q.shape[1] > cos.shape[0]:
            raise ValueError(f"{op}: {q.shape[1]} positions need tables as long, got {cos.shape[0]}")
        return None
    if positions.dtype not in INTEGERS:
        raise ValueError(f"{op}: positions must be int32 or int64, got {positions.dtype}")
    wanted = tuple(q.shape[:2])
    if positions.dim() > 2 or tuple(positions.shape) not in (wanted, (1, wanted[1]), wanted[1:]):
        raise ValueError(f"{op}: positions must be {list(wanted)} or [{wanted[1]}], got {list(positions.shape)}")
    return positions.expand(wanted)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k turned by their positions: [B, S, heads, D] each, contiguous. Differentiable once, in q and k.

    Tables cos and sin [L, R/2] fp32; positions [B, S], [1, S] or [S]. Errors: ValueError for shapes that don't fit, a
    dtype other than fp32, bf16, fp16 (tables fp32, positions int32 or int64), tables shorter than the sequence where no
    positions are given, or tensors on different devices.
    """
    at = check("rope", q, k, cos, sin, positions)
    q, k = _OP(q, k, cos, sin, at, interleaved)
    return q, k


def _inputs(p: Problem) -> dict[str, Input]:
    return head_inputs(p) | table_inputs(p.dims)


def _call(t: Tensors, p: Problem) -> Tensors:
    q, k, at = heads_of(t, p)
    return rows_of(*rope(q, k, t["cos"], t["sin"], at, p.variant == "interleaved"))


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensors:
    q, k, at = heads_of(t, p)
    return rows_of(*reference(q, k, t["cos"], t["sin"], at, p.variant == "interleaved", compute or torch.float32))


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensors, Tensors]:
    out = {k: v.detach() for k, v in _reference(t, p, None).items()}  # nothing transcendental, so no slack
    return out, out


def _moved(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    """Tables shifted by one row, and positions with them."""
    moved = {n: torch.cat((t[n][-1:], t[n])) for n in ("cos", "sin")}
    return call(t, p), call({**t, **moved, "positions": t["positions"] + 1}, p)


def _permuted(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    there = {n: t[n].flip(0) for n in ("q", "k")} | {"positions": t["positions"].flip(0)}
    return call(t, p).flip(0), call({**t, **there}, p)


def _launches(p: Any) -> list[Launch]:
    """Real heads in bf16, partial ones, and one of each dtype and layout of pairs."""
    heads = ((32, 8, 64, 64), (32, 8, 80, 32), (32, 32, 96, 96), (32, 8, 128, 128), (8, 4, 256, 256), (1, 1, 128, 128))
    cases = [(h, torch.bfloat16, "half", w) for h in heads for w in (False, True)]
    cases += [((32, 8, 128, 128), d, v, False) for d in FLOATS for v in VARIANTS if (d, v) != (torch.bfloat16, "half")]
    found = []
    for (h, kv, d, r), dtype, variant, inverse in cases:
        c = Config.choose(h, kv, d, r)
        ptr = f"*{TRITON_TYPES[dtype]}"
        args = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), ptr)
        args |= dict(cos_ptr="*fp32", sin_ptr="*fp32", position_ptr="*i64")
        sizes = ("length", "position_batch", "position_token")
        strides = [f"{t}_{s}" for t in ("q", "k", "q_out", "k_out") for s in ("batch", "token", "head")]
        args |= dict.fromkeys((*sizes, *strides), "i32")
        flags = dict(POSITIONS=True, INVERSE=inverse, INTERLEAVED=variant == "interleaved", HALF=r // 2, REST=d - r)
        flags |= dict(HALF_BLOCK=c.half_block, REST_BLOCK=c.rest_block, Q_TILE=c.q_tile, K_TILE=c.k_tile)
        flags |= dict(Q_HEADS=h, K_HEADS=kv)
        args |= dict.fromkeys(flags, "constexpr")
        when = f"{'backward' if inverse else 'forward'}, {h}+{kv} heads of {d}, {r} rotary"
        found.append(Launch(when, "rotate_kernel", args, flags, c.num_warps, 3, TRITON_TYPES[dtype], variant))
    return found


VARIANTS = ("half", "interleaved")

MUTANTS = Mutant.table(
    """sign: the turn taken the other way
- return a * c - b * s, b * c + a * s
+ return a * c + b * s, b * c - a * s
cos-for-sin: one half turned by the cosine alone
- return a * c - b * s, b * c + a * s
+ return a * c - b * s, b * c + a * c
not-inverse: backward turns on instead of back
- if INVERSE:
+ if False:
pairs: interleaved pairs taken for halves
- INTERLEAVED=interleaved, HALF=rotary
+ INTERLEAVED=False, HALF=rotary
positions-ignored: every document's positions run on
- if POSITIONS:
+ if False:
position-stride: positions read as if they were contiguous
- batch * position_batch + token * position_token
+ batch * (tl.num_programs(0) // tl.cdiv(Q_HEADS, Q_TILE)) + token
position-truncated: int64 positions read at the wrong row of the batch
- batch * position_batch + token
+ 0 * position_batch + token
table-width: rows of the table taken to be a whole head wide
- tl.where(inside, position, 0) * HALF
+ tl.where(inside, position, 0) * HALF_BLOCK
first-head @head_tiles: every head is the first
- return load(ptr + head.to(tl.int64) * stride, head
+ return load(ptr + head.to(tl.int64) * 0, head
head-stride: heads of the input taken to lie as in the output
- load_heads(x_ptr, first, x_head,
+ load_heads(x_ptr, first, y_head,
pairs-stride: heads of interleaved pairs taken to lie as in the output
- _load_pairs(x_ptr, first, x_head,
+ _load_pairs(x_ptr, first, y_head,
last-heads-lost: only the first tile of heads
- first = group * TILE
+ first = group * 0
rest-lost @head_tiles: elements past the rotary ones not copied
- tl.store(row + 2 * HALF + j, cast(e, row.dtype.element_ty), mask=present & (j < REST))
+ tl.store(row + 2 * HALF + j, cast(e, row.dtype.element_ty), mask=present & (j < 0))
rest-turned @head_tiles: partial rotary split at half the head
- b = tl.load(row + HALF + i, mask
+ b = tl.load(row + (2 * HALF + REST) // 2 + i, mask
keys-by-query-strides: keys read with the queries' token stride
- k_ptr + batch * k_batch + token * k_token
+ k_ptr + batch * k_batch + token * q_token
batch-lost: every sequence is the first
- q_ptr + batch * q_batch + token * q_token
+ q_ptr + token * q_token
int32-offset @head_tiles: offsets in 32 bits
- token.to(tl.int64), tl.where
+ token, tl.where
tables-rounded: cos rounded to the activations' dtype
- return a * c - b * s, b * c + a * s
+ return a * c.to(tl.float16).to(tl.float32) - b * s, b * c + a * s
in-place: the result written over q
- out = _new(q), _new(k)
+ out = (q.detach() if q.is_contiguous() else _new(q)), _new(k)
gradient-in-place: the gradient turned where it lies
- out = _new(dq), _new(dk)
+ out = (dq if dq.is_contiguous() else _new(dq)), _new(dk)
silent-fallback: the reference run in place of the kernel
- q, k = _OP(q, k, cos, sin, at, interleaved)
+ q, k = reference(q, k, cos, sin, at, interleaved)
"""
)

OP = OpSpec(
    name="rope",
    summary="rotary position embedding of q and k in one pass, forward and backward",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "rotary": 16},
        "partial": {"rows": 4, "batch": 2, "heads": 3, "kv_heads": 1, "head_dim": 20, "rotary": 12, "positions": 32, "gap": 4},
        "head 96": {"rows": 3, "heads": 1, "kv_heads": 1, "head_dim": 96, "rotary": 96, "positions": 0},
        "batched": {"rows": 4, "batch": 2, "heads": 2, "kv_heads": 2, "head_dim": 80, "rotary": 32, "positions": 0},
        "many heads": {"rows": 2, "heads": 40, "kv_heads": 33, "head_dim": 128, "rotary": 128},
        "no rows": {"rows": 0, "heads": 2, "kv_heads": 1, "head_dim": 8, "rotary": 8},
        "far": {"rows": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "rotary": 16},
        "huge": {
            "rows": 2**18 + 4, "columns": 8192, "heads": 64, "kv_heads": 1, "head_dim": 128, "rotary": 128,
            "length": 4096,
        },
        "speed": {"rows": 65536, "heads": 32, "kv_heads": 8, "head_dim": 128, "rotary": 128, "length": 4096},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=head_bytes,
    flops=lambda p, which: 3 * p.dims["rows"] * (p.dims["heads"] + p.dims["kv_heads"]) * p.dims["rotary"],
    exact=_exact,
    tail=tail,
    laws=(Law("positions are rows of the tables", _moved), Law("tokens commute", _permuted)),
    mutants=MUTANTS,
)  # fmt: skip
