"""Kernels' parts for ops whose rows stay in registers: a piece of a row, BLOCK columns, comes and goes.

A row of 2560 columns is five pieces of 512: a block of 4096 would leave three threads in eight without work. Pieces that
fill the row, WHOLE, need no mask. `RowConfig.choose` cuts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparktune.ops.numerics import cast


@triton.jit
def load_piece(row, columns, n, WHOLE: tl.constexpr):
    """The row's `columns` as they lie in memory; 0 from n on."""
    return tl.load(row + columns) if WHOLE else tl.load(row + columns, mask=columns < n, other=0.0)


@triton.jit
def store_piece(row, columns, n, x, WHOLE: tl.constexpr):
    """`x` rounded to what the row holds."""
    x = cast(x, row.dtype.element_ty)
    if WHOLE:
        tl.store(row + columns, x)
    else:
        tl.store(row + columns, x, mask=columns < n)
