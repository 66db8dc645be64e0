"""A tiled product [128, K] x [K, 128] in one block, whose pipeline depth decides how much shared memory it asks for.

A buffer holds a 128x64 and a 64x128 tile of 16 bits, 32 KiB: three of them are 98304 bytes, which fits into the 101376
of compute capability 12.x, and four are the 131072 of the failure that is known from there (triton#8182).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, BLOCK_K = 128, 64
BUFFER_BYTES = 2 * 2 * BLOCK * BLOCK_K


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program; a and b row-major."""
    rows = tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a = tl.load(a_ptr + rows[:, None] * K + (k + inner)[None, :])
        b = tl.load(b_ptr + (k + inner)[:, None] * BLOCK + rows[None, :])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * BLOCK + rows[None, :], total)


def launch(a: Tensor, b: Tensor, stages: int) -> Tensor:
    """a [128, K] times b [K, 128], both 16 bits, in fp32. Raises what Triton raises where the block does not fit."""
    c = torch.empty(BLOCK, BLOCK, dtype=torch.float32, device=a.device)
    product[(1,)](a, b, c, a.shape[1], BLOCK=BLOCK, BLOCK_K=BLOCK_K, STAGES=stages, num_warps=8, num_stages=stages)
    return c


def shared_bytes(a: Tensor, b: Tensor, stages: int) -> int:
    """Bytes of shared memory that it would ask for, compiled and not launched."""
    c = torch.empty(BLOCK, BLOCK, dtype=torch.float32, device=a.device)
    made: Any = product.warmup(
        a, b, c, a.shape[1], BLOCK=BLOCK, BLOCK_K=BLOCK_K, STAGES=stages, num_warps=8, num_stages=stages, grid=(1,)
    )
    return int(made.metadata.shared)
