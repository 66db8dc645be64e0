"""Kernels that break the target's limits, for the tests of the ahead-of-time gate."""

import triton
import triton.language as tl


@triton.jit
def tile(a_ptr, b_ptr, c_ptr, n, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """A product of tiles, which pass through shared memory DEPTH columns at a time."""
    rows = tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, DEPTH):
        a = tl.load(a_ptr + rows[:, None] * n + start + depth[None, :])
        b = tl.load(b_ptr + (start + depth)[:, None] * BLOCK + rows[None, :])
        total += tl.dot(a, b)
    tl.store(c_ptr + rows[:, None] * BLOCK + rows[None, :], total)


@triton.jit
def crowded(a_ptr, c_ptr, n, BLOCK: tl.constexpr):
    """Holds a large block in registers while another pass goes over it: more than a thread has."""
    i = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(n):
        total += tl.cumsum(a * k, 0)
    tl.store(c_ptr + i, total + a)
