"""Kernels' parts for `qk_norm_rope`: a tile of heads of one token of q or of k, normalised and turned, and back.

The maths is in `qk_norm_rope`, the pieces of a head in `head_tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparktune.ops.head_tiles import load, load_heads, store_heads
from sparktune.ops.numerics import cast
from sparktune.ops.rope import angles


@triton.jit
def load_tiles(
    ptr, first, stride, EXACT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tuple of TILES such tiles, one after the other."""
    tiles = ()
    for t in tl.static_range(TILES):
        at = first + t * TILE
        tile = load_heads(ptr, at, stride, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)
        tiles += (tile,)  # type: ignore[assignment]  # the loop is unrolled
    return tiles


@triton.jit
def gains(
    w_ptr, GEMMA: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """w (Llama) or 1 + w (Gemma), in as many rows as the `angles`: [ROWS, ...] each."""
    row = w_ptr + tl.zeros((ROWS, 1), tl.int32)
    a, b, e = load(row, tl.full((ROWS, 1), 1, tl.int1), False, HALF, REST, HALF_BLOCK, REST_BLOCK)
    a, b, e = a.to(tl.float32), b.to(tl.float32), e.to(tl.float32)
    if GEMMA:
        a, b, e = 1.0 + a, 1.0 + b, 1.0 + e
    return a, b, e


@triton.jit
def over_head(a, b, e, REST: tl.constexpr):
    """Sums over each head, [heads, 1]."""
    total = tl.sum(a + b, 1)
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
    x_ptr, y_ptr, group, x_head, y_head, w_ptr, cos_ptr, sin_ptr, position_ptr, token, length, eps,
    POSITIONS: tl.constexpr, GEMMA: tl.constexpr, SHARED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Normalise, turn and store a group of TILES tiles of heads of one token, all on their way before the first is worked on.

    SHARED: one row of tables and weights for all heads of a tile; else each has its own, see `angles`.
    """
    EXACT: tl.constexpr = HEADS % (TILE * TILES) == 0 and HALF == HALF_BLOCK
    ROWS: tl.constexpr = 1 if SHARED else TILE
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = group * (TILE * TILES)
    tiles = load_tiles(x_ptr, first, x_head, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE, TILES)
    c, s = angles(cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS, HALF, HALF_BLOCK, ROWS)
    wa, wb, we = gains(w_ptr, GEMMA, HALF, REST, HALF_BLOCK, REST_BLOCK, ROWS)
    for t in tl.static_range(TILES):
        a, b, e = tiles[t]
        a, b, e = a.to(tl.float32), b.to(tl.float32), e.to(tl.float32)
        r = tl.rsqrt(over_head(a * a, b * b, e * e, REST) / (2 * HALF + REST) + eps)
        a = rounded(like_llama(a * r, dtype, GEMMA) * wa, dtype)
        b = rounded(like_llama(b * r, dtype, GEMMA) * wb, dtype)
        e = like_llama(e * r, dtype, GEMMA) * we
        a, b = a * c - b * s, b * c + a * s
        at = first + t * TILE
        store_heads(y_ptr, at, y_head, a, b, e, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)


@triton.jit
def backward_heads(
    dy_ptr, x_ptr, dx_ptr, w_ptr, first, dy_head, x_head, dx_head, cos_ptr, sin_ptr, position_ptr, token, length,
    eps, dwa, dwb, dwe, POSITIONS: tl.constexpr, GEMMA: tl.constexpr, NEED_DW: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx of a tile of heads of one token; the sums for dw, a row for each head of a tile, with these heads' added.

    Both sums of a head are over what came from memory, so that the second need not wait for r.
    """
    EXACT: tl.constexpr = HEADS % TILE == 0 and HALF == HALF_BLOCK
    D: tl.constexpr = 2 * HALF + REST
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ROWS: tl.constexpr = 1 if NEED_DW else TILE  # of tables and weights: beside the sums, registers for more spill
    da, db, ge = load_heads(dy_ptr, first, dy_head, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)
    a, b, e = load_heads(x_ptr, first, x_head, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)
    da, db, ge = da.to(tl.float32), db.to(tl.float32), ge.to(tl.float32)
    a, b, e = a.to(tl.float32), b.to(tl.float32), e.to(tl.float32)
    c, s = angles(cos_ptr, sin_ptr, position_ptr, token, length, POSITIONS, HALF, HALF_BLOCK, ROWS)
    ga, gb = da * c + db * s, db * c - da * s  # turned back
    wa, wb, we = gains(w_ptr, GEMMA, HALF, REST, HALF_BLOCK, REST_BLOCK, ROWS)
    r = tl.rsqrt(over_head(a * a, b * b, e * e, REST) / D + eps)
    if NEED_DW:
        dwa += ga * like_llama(a * r, dtype, GEMMA)
        dwb += gb * like_llama(b * r, dtype, GEMMA)
        dwe += ge * like_llama(e * r, dtype, GEMMA)
    ga, gb, ge = ga * wa, gb * wb, ge * we
    along = over_head(ga * a, gb * b, ge * e, REST) / D * r * r
    a, b, e = (ga - a * along) * r, (gb - b * along) * r, (ge - e * along) * r
    store_heads(dx_ptr, first, dx_head, a, b, e, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK, HEADS, TILE)
    return dwa, dwb, dwe
