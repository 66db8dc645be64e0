"""Kernels' parts for `qk_norm_rope`: a tile of heads of one token of q or of k, normalised and turned, and back.

A head is held in three pieces: both halves of what turns, [heads, HALF] each, and the REST that does not. The maths is in
`qk_norm_rope`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparktune.ops.numerics import cast
from sparktune.ops.rope import angles


@triton.jit
def load(row, present, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):
    """Both halves of what turns, and the rest, of all heads of a tile, in fp32; without a rest any tensor for it."""
    i = tl.arange(0, HALF_BLOCK)[None, :]
    a = tl.load(row + i, mask=present & (i < HALF), other=0.0).to(tl.float32)
    b = tl.load(row + HALF + i, mask=present & (i < HALF), other=0.0).to(tl.float32)
    e = a
    if REST:
        i = tl.arange(0, REST_BLOCK)[None, :]
        e = tl.load(row + 2 * HALF + i, mask=present & (i < REST), other=0.0).to(tl.float32)
    return a, b, e


@triton.jit
def store(
    row, a, b, e, present, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr
):
    """The three pieces, rounded to what the row holds."""
    dtype: tl.constexpr = row.dtype.element_ty
    i = tl.arange(0, HALF_BLOCK)[None, :]
    tl.store(row + i, cast(a, dtype), mask=present & (i < HALF))
    tl.store(row + HALF + i, cast(b, dtype), mask=present & (i < HALF))
    if REST:
        i = tl.arange(0, REST_BLOCK)[None, :]
        tl.store(row + 2 * HALF + i, cast(e, dtype), mask=present & (i < REST))


@triton.jit
def load_heads(
    ptr, first, heads, stride, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE heads of a token, from `first` on."""
    head = (first + tl.arange(0, TILE))[:, None]
    return load(ptr + head.to(tl.int64) * stride, head < heads, HALF, REST, HALF_BLOCK, REST_BLOCK)


@triton.jit
def store_heads(
    ptr, first, heads, stride, a, b, e, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where `load_heads` would load them."""
    head = (first + tl.arange(0, TILE))[:, None]
    store(ptr + head.to(tl.int64) * stride, a, b, e, head < heads, HALF, REST, HALF_BLOCK, REST_BLOCK)


@triton.jit
def gains(
    w_ptr, GEMMA: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """w (Llama) or 1 + w (Gemma), loaded by every head, as its `angles` are: [TILE, ...] each."""
    row = w_ptr + tl.zeros((TILE, 1), tl.int32)
    a, b, e = load(row, tl.full((TILE, 1), 1, tl.int1), HALF, REST, HALF_BLOCK, REST_BLOCK)
    if GEMMA:
        a, b, e = 1.0 + a, 1.0 + b, 1.0 + e
    return a, b, e


@triton.jit
def over_head(a, b, e, REST: tl.constexpr):
    """Sums over each head, [heads, 1]."""
    total = tl.sum(a, 1) + tl.sum(b, 1)
    if REST:
        total += tl.sum(e, 1)
    return total[:, None]


@triton.jit
def rounded(h, dtype: tl.constexpr):
    """`h` as it is after it was stored as `dtype`."""
    return cast(h, dtype).to(tl.float32)


@triton.jit
def like_llama(h, dtype: tl.constexpr, GEMMA: tl.constexpr):
    """Llama rounds the normalised head before the weight multiplies it; Gemma does not."""
    if not GEMMA:
        h = rounded(h, dtype)
    return h


@triton.jit
def forward_heads(
    a, b, e, y_ptr, first, heads, y_head, w_ptr, cos_ptr, sin_ptr, position_ptr, token, length, eps,
    dtype: tl.constexpr, POSITIONS: tl.constexpr, GEMMA: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Normalise, turn and store a tile of heads of one token, which were loaded as `dtype`."""
    c, s = angles(cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS, HALF, HALF_BLOCK, TILE)
    wa, wb, we = gains(w_ptr, GEMMA, HALF, REST, HALF_BLOCK, REST_BLOCK, TILE)
    r = tl.rsqrt(over_head(a * a, b * b, e * e, REST) / (2 * HALF + REST) + eps)
    a = rounded(like_llama(a * r, dtype, GEMMA) * wa, dtype)
    b = rounded(like_llama(b * r, dtype, GEMMA) * wb, dtype)
    e = like_llama(e * r, dtype, GEMMA) * we
    a, b = a * c - b * s, b * c + a * s
    store_heads(y_ptr, first, heads, y_head, a, b, e, HALF, REST, HALF_BLOCK, REST_BLOCK, TILE)


@triton.jit
def backward_heads(
    dy_ptr, x_ptr, dx_ptr, w_ptr, first, heads, dy_head, x_head, dx_head, cos_ptr, sin_ptr, position_ptr, token, length,
    eps, dwa, dwb, dwe, POSITIONS: tl.constexpr, GEMMA: tl.constexpr, NEED_DW: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx of a tile of heads of one token; the sums for dw, a row for each head of a tile, with these heads' added."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ROWS: tl.constexpr = 1 if NEED_DW else TILE  # of tables and weights: beside the sums, registers for more spill
    da, db, ge = load_heads(dy_ptr, first, heads, dy_head, HALF, REST, HALF_BLOCK, REST_BLOCK, TILE)
    a, b, e = load_heads(x_ptr, first, heads, x_head, HALF, REST, HALF_BLOCK, REST_BLOCK, TILE)
    c, s = angles(cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS, HALF, HALF_BLOCK, ROWS)
    ga, gb = da * c + db * s, db * c - da * s  # turned back
    wa, wb, we = gains(w_ptr, GEMMA, HALF, REST, HALF_BLOCK, REST_BLOCK, ROWS)
    r = tl.rsqrt(over_head(a * a, b * b, e * e, REST) / (2 * HALF + REST) + eps)
    a, b, e = a * r, b * r, e * r
    if NEED_DW:
        dwa += ga * like_llama(a, dtype, GEMMA)
        dwb += gb * like_llama(b, dtype, GEMMA)
        dwe += ge * like_llama(e, dtype, GEMMA)
    ga, gb, ge = ga * wa, gb * wb, ge * we
    along = over_head(ga * a, gb * b, ge * e, REST) / (2 * HALF + REST)
    a, b, e = (ga - a * along) * r, (gb - b * along) * r, (ge - e * along) * r
    store_heads(dx_ptr, first, heads, dx_head, a, b, e, HALF, REST, HALF_BLOCK, REST_BLOCK, TILE)
    return dwa, dwb, dwe
