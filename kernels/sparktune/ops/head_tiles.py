"""Kernels' parts for ops on heads, `rope` and `qk_norm_rope`: which heads a program has, and how a tile of them comes and goes.

A head is held in three pieces: both halves of what turns, [heads, HALF] each, and the REST that does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparktune.ops.numerics import cast

BATCHES = 65535  # of one launch: where a grid's second axis ends


@triton.jit
def place(Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr):
    """This program's batch and token, its group of heads, and whether that is one of q: a token's groups of heads of q,
    then of k, on the grid's first axis, batches on its second. The counts are constants, so nothing is divided."""
    q_groups: tl.constexpr = (Q_HEADS + Q_GROUP - 1) // Q_GROUP
    groups: tl.constexpr = q_groups + (K_HEADS + K_GROUP - 1) // K_GROUP
    token, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    of_q = group < q_groups
    return tl.program_id(1).to(tl.int64), token.to(tl.int64), tl.where(of_q, group, group - q_groups), of_q


@triton.jit
def load_rest(row, present, instead, HALF: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr):
    """What does not turn, of all heads of a tile; without any, `instead`."""
    j = tl.arange(0, REST_BLOCK)[None, :]
    e = instead
    if REST:
        e = tl.load(row + 2 * HALF + j, mask=present & (j < REST), other=0.0)
    return e


@triton.jit
def store_rest(row, present, e, HALF: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr):
    """Where `load_rest` would load it."""
    j = tl.arange(0, REST_BLOCK)[None, :]
    if REST:
        tl.store(row + 2 * HALF + j, cast(e, row.dtype.element_ty), mask=present & (j < REST))


@triton.jit
def load(
    row, present, EXACT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Both halves of what turns, and the rest, of all heads of a tile; without a rest any tensor for it.

    EXACT: all heads are present and their pieces fill their blocks, so that no mask is needed.
    """
    i = tl.arange(0, HALF_BLOCK)[None, :]
    if EXACT:
        a, b = tl.load(row + i), tl.load(row + HALF + i)
    else:
        a = tl.load(row + i, mask=present & (i < HALF), other=0.0)
        b = tl.load(row + HALF + i, mask=present & (i < HALF), other=0.0)
    return a, b, load_rest(row, present, a, HALF, REST, REST_BLOCK)


@triton.jit
def store(
    row, a, b, e, present, EXACT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """The three pieces, rounded to what the row holds."""
    dtype: tl.constexpr = row.dtype.element_ty
    i = tl.arange(0, HALF_BLOCK)[None, :]
    if EXACT:
        tl.store(row + i, cast(a, dtype))
        tl.store(row + HALF + i, cast(b, dtype))
    else:
        tl.store(row + i, cast(a, dtype), mask=present & (i < HALF))
        tl.store(row + HALF + i, cast(b, dtype), mask=present & (i < HALF))
    store_rest(row, present, e, HALF, REST, REST_BLOCK)


@triton.jit
def load_heads(
    ptr, first, stride, EXACT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE heads of a token, from `first` on, as they lie in memory."""
    head = (first + tl.arange(0, TILE))[:, None]
    return load(ptr + head.to(tl.int64) * stride, head < HEADS, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK)


@triton.jit
def store_heads(
    ptr, first, stride, a, b, e, EXACT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where `load_heads` would load them."""
    head = (first + tl.arange(0, TILE))[:, None]
    store(ptr + head.to(tl.int64) * stride, a, b, e, head < HEADS, EXACT, HALF, REST, HALF_BLOCK, REST_BLOCK)
