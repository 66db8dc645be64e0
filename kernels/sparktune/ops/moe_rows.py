r"""Rows of tokens and rows sorted by expert: from one order to the other, with weights or without.

A token t has `top_k` places in the sorted order, positions[t, j], each place belonging to one token. So there are two ways:

    spread:   z[positions[t, j]] = x[t]                    or w[t, j] x[t]
    collect:  y[t] = sum over j of z[positions[t, j]]      or of w[t, j] z[...]

Each is the other's derivative. A token's places are one small tile, so both read and write every row once; the sum goes over
j within a program, in fp32 and in one order, so nothing is added atomically and results are the same bits every time.

Source: Gale et al., "MegaBlocks", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.launching import next_power_of_2
from sparktune.ops.numerics import cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Launch


@triton.jit
def collect_kernel(
    z_ptr, positions_ptr, weights_ptr, y_ptr, width, top_k, z_stride,
    WEIGHTED: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: the sum of its rows."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    mine = place < top_k
    row = tl.load(positions_ptr + token * top_k + place, mask=mine, other=0).to(tl.int64)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = mine[:, None] & (col[None, :] < width)
        z = tl.load(z_ptr + row[:, None] * z_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            z *= tl.load(weights_ptr + token * top_k + place, mask=mine, other=0.0).to(tl.float32)[:, None]
        y = cast(tl.sum(z, 0), y_ptr.dtype.element_ty)
        tl.store(y_ptr + token * width + col, y, mask=col < width)


@triton.jit
def spread_kernel(
    x_ptr, positions_ptr, weights_ptr, z_ptr, old_ptr, dw_ptr, width, top_k, x_stride, old_stride,
    WEIGHTED: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: its row into its places. WEIGHTED: and dw [t, j], its product with what `old` has there."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    mine = place < top_k
    row = tl.load(positions_ptr + token * top_k + place, mask=mine, other=0).to(tl.int64)
    dw = tl.zeros((PLACES,), tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = mine[:, None] & (col[None, :] < width)
        x = tl.load(x_ptr + token * x_stride + col, mask=col < width, other=0.0)[None, :]
        if WEIGHTED:
            x = x.to(tl.float32)
            old = tl.load(old_ptr + row[:, None] * old_stride + col[None, :], mask=inside, other=0.0)
            dw += tl.sum(tl.where(inside, old.to(tl.float32) * x, 0.0), 1)
            w = tl.load(weights_ptr + token * top_k + place, mask=mine, other=0.0).to(tl.float32)
            z = cast(x * w[:, None], z_ptr.dtype.element_ty)
        else:
            z = tl.broadcast_to(x, (PLACES, BLOCK))
        tl.store(z_ptr + row[:, None] * width + col[None, :], z, mask=inside)
    if WEIGHTED:
        tl.store(dw_ptr + token * top_k + place, cast(dw, dw_ptr.dtype.element_ty), mask=mine)


@dataclass(frozen=True)
class Config:
    """How one pass is launched: one token a program."""

    places: int
    block: int
    num_warps: int

    ELEMENTS = 4096  # of a tile: 8 rows of 512 columns, 32 values a thread; 64 in fp16 spill

    @classmethod
    def choose(cls, top_k: int, width: int, p: DeviceProperties) -> Config:
        """Blocks that are short for narrow rows and for many places."""
        places = next_power_of_2(max(1, top_k))
        block = max(64, min(1024, cls.ELEMENTS // places, next_power_of_2(max(1, width))))
        return cls(places, block, 4)


def collect(z: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """z [M, N], positions [T, top_k] -> [T, N]: each token's rows added up, weighted by `weights` [T, top_k]."""
    tokens, top_k = positions.shape
    y = torch.empty((tokens, z.shape[1]), dtype=z.dtype, device=z.device)
    if not y.numel() or not top_k:
        return y.zero_()
    z = dispatch.rows(z)
    c = Config.choose(top_k, z.shape[1], DeviceProperties.of(z.device))
    dispatch.launch(
        collect_kernel, tokens, z, z, positions, z if weights is None else weights, y, z.shape[1], top_k, z.stride(0),
        WEIGHTED=weights is not None, PLACES=c.places, BLOCK=c.block, num_warps=c.num_warps,
    )  # fmt: skip
    return y


def spread(
    x: Tensor, positions: Tensor, weights: Tensor | None = None, old: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, N] into its places: ([M, N], and with `weights` and `old` [M, N] the weights' gradient)."""
    tokens, top_k = positions.shape
    z = torch.empty((tokens * top_k, x.shape[1]), dtype=x.dtype, device=x.device)
    dw = torch.empty(0, device=x.device) if weights is None else torch.empty_like(weights)
    if not z.numel():
        return z, dw.zero_()
    x = dispatch.rows(x)
    old = z if old is None else dispatch.rows(old)
    c = Config.choose(top_k, x.shape[1], DeviceProperties.of(x.device))
    dispatch.launch(
        spread_kernel, tokens, x, x, positions, x if weights is None else weights, z, old, z if weights is None else dw,
        x.shape[1], top_k, x.stride(0), old.stride(0),
        WEIGHTED=weights is not None, PLACES=c.places, BLOCK=c.block, num_warps=c.num_warps,
    )  # fmt: skip
    return z, dw


def launches(p: DeviceProperties, weighted: bool) -> list[Launch]:
    """Each dtype at one, four and eight experts a token, over wide rows."""
    found = []
    for dtype in FLOATS:
        for top_k in (1, 4, 8) if dtype == torch.bfloat16 else (8,):
            c = Config.choose(top_k, 4096, p)
            flags: dict[str, Any] = {"WEIGHTED": weighted, "PLACES": c.places, "BLOCK": c.block}
            for kernel, names in (("collect_kernel", "z y weights"), ("spread_kernel", "x z old weights dw")):
                args = {f"{x}_ptr": f"*{TRITON_TYPES[dtype]}" for x in names.split()} | {"positions_ptr": "*i32"}
                args |= dict.fromkeys(("width", "top_k", "z_stride" if "z y" in names else "x_stride"), "i32")
                args |= {} if "z y" in names else {"old_stride": "i32"}
                args |= dict.fromkeys(flags, "constexpr")
                when = f"{kernel.removesuffix('_kernel')}, {top_k} experts a token"
                found.append(Launch(when, kernel, args, flags, c.num_warps, 3, TRITON_TYPES[dtype]))
    return found
