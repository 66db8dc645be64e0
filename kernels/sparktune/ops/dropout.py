"""Dropout by a hash: the mask is a function of a seed, the row and the column, so it takes no memory.

    keep(i, j) = hash(hash(i + seed) ^ j) >= p 2**32,   y = x / (1 - p) where kept, else 0

A recompute and the backward make the same mask again from the seed. The hash is two rounds of multiplication and shifts
on 32 bits, by the constants of Ettinger's lowbias32 (2018), whose bias is below what a mask could show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.launching import cdiv
from sparktune.ops.numerics import cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Launch


def mix(h: Tensor) -> Tensor:
    """A hash of 32 bits (two rounds of multiply and shift), on int64 tensors that hold them; as `_mix` in the kernel."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)


def dropped(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """x [..., K] with elements zeroed with probability `dropout` and the others scaled up, in plain PyTorch."""
    if seed is None or dropout == 0:
        return x
    k = x.shape[-1]
    rows = torch.arange(x.numel() // max(1, k), device=x.device)
    cols = torch.arange(k, device=x.device)
    h = mix(mix((rows + seed.long()) & 0xFFFFFFFF)[:, None] ^ cols)
    keep = (h >= int(dropout * 2**32)).view(x.shape)
    return torch.where(keep, x / (1 - dropout), 0.0).to(x.dtype)


def draw(x: Tensor, dropout: float, masks: int = 1) -> Tensor | None:
    """Seeds for dropout's masks, from torch's generator, so that manual seeds and checkpoints' recomputes repeat them."""
    return torch.randint(2**31, (masks,), device=x.device) if dropout else None


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def drop_kernel(
    x_ptr, onto_ptr, y_ptr, seed_ptr, k, x_row, onto_row, y_row, threshold, factor, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of one row a program: y = mask x factor, and with ADD onto what is there."""
    blocks = (k + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + col, mask=col < k, other=0.0).to(tl.float32)
    seed = tl.load(seed_ptr)
    h = _mix(_mix((row + seed).to(tl.uint32)) ^ col.to(tl.uint32))
    y = tl.where(h.to(tl.int64) >= threshold, tl.math.div_rn(x, factor), 0.0)
    if ADD:
        y = cast(y, y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(onto_ptr + row * onto_row + col, mask=col < k, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + col, cast(y, y_ptr.dtype.element_ty), mask=col < k)


def drop(x: Tensor, seed: Tensor, dropout: float, onto: Tensor | None = None) -> Tensor:
    """x [M, K] under the mask, and added onto `onto`: new memory."""
    m, k = x.shape
    y = torch.empty(m, k, dtype=x.dtype, device=x.device)
    if x.numel():
        other = x if onto is None else onto
        dispatch.launch(
            drop_kernel, m * cdiv(k, 1024), x, x, other, y, seed, k, x.stride(0), other.stride(0), k,
            int(dropout * 2**32), 1 - dropout, ADD=onto is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return y


def under(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """x [M, K] under the mask; x itself where there is none."""
    return drop(x, seed, dropout) if seed is not None and dropout else x


def drop_launches() -> list[Launch]:
    """Forward and backward in each dtype."""
    found = []
    for dtype in FLOATS:
        name = TRITON_TYPES[dtype]
        for add in (False, True):
            flags = {"ADD": add, "BLOCK": 1024}
            args = dict.fromkeys(("x_ptr", "onto_ptr", "y_ptr"), f"*{name}") | {"seed_ptr": "*i64"}
            args |= dict.fromkeys(("k", "x_row", "onto_row", "y_row"), "i32") | {"threshold": "i64", "factor": "fp32"}
            args |= dict.fromkeys(flags, "constexpr")
            found.append(Launch("dropout" + (", backward" if add else ""), "drop_kernel", args, flags, 4, 3, name))
    return found
