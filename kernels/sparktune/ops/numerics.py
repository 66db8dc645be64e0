"""What kernels need to round and exponentiate alike on a GPU and in the interpreter.

Triton's interpreter has traps of its own: fp32 to bf16 cuts bits off where a GPU rounds to nearest even, arithmetic
on bf16 works on raw bits, and libdevice is missing. So kernels load, cast to fp32, compute, and write through `cast`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from sparktune.ops import dispatch

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even."""
    if INTERPRETED:  # nested, since Triton decides a constexpr `if` before it looks inside  # noqa: SIM102
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)  # a NaN stays one
            x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def exp(x):
    """exp of fp32 as PyTorch's kernels compute it: libdevice's, since the last bits of tl.exp differ."""
    if INTERPRETED:  # noqa: SIM108 - as an expression both sides would be compiled
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@triton.jit
def quotient(a, d, NARROW: tl.constexpr = False):
    """a / d of fp32 for 1 <= d <= Inf, rounded as IEEE 754 wants it (below |a| = 2**-100 to one step), without a branch.

    `div.rn` jumps to a slow path where its fast one fails, one element after the other. This is its fast path, which
    for such d fails only where d or a is infinite: there a times 1 / d is right, and what corrects it is no number. d
    / 16 keeps 1 / d normal, so that the device's reciprocal need not look for what is not. NARROW: for an a of 16 bits
    and what is rounded to as many one correction does; of the 65536 there are, `test_numerics` looks at each.

    Source: Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
    """
    if INTERPRETED:
        q = tl.math.div_rn(a, d)
    else:
        r = reciprocal(d * 0.0625) * 0.0625
        first = a * r
        if NARROW:
            q = tl.fma(tl.fma(-d, first, a), r, first)
        else:
            finer = tl.fma(tl.fma(-d, r, 1.0), r, r)
            q = tl.fma(tl.fma(-d, first, a), finer, first)
            q = tl.fma(tl.fma(-d, q, a), finer, q)
        q = tl.where((q == q) & (q != 0.0), q, first)  # or -0 / d would be 0
    return q


@triton.jit
def reciprocal(x):
    """1 / x of fp32 as CUDA code built with fast maths computes it, to the last bit or the one before it."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y
