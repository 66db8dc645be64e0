r"""The order of a mixture of experts: which rows each expert has, found on the device in two launches.

From the router's choice, indices [T, top_k], follow with M = T top_k:

    offsets [E + 1]       expert e has the sorted rows offsets[e] .. offsets[e + 1]
    rows [M]              the token of each sorted row
    positions [T, top_k]  the sorted row of each choice; the inverse

The order is stable, a counting sort: an expert's rows come in the order of their tokens. An index outside of [0, E) is no
expert (expert parallelism marks foreign ones so): its rows come last, behind offsets[E], and have a place in `positions`
all the same.

First each block of choices counts its experts; then each adds up the counts of all blocks before it, and of all smaller
experts, and gives its own choices their places. The host learns nothing and never waits.

Source: Knuth, "The Art of Computer Programming" 3, 5.2, distribution counting.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.fused import Fused
from sparktune.ops.launching import cdiv, next_power_of_2
from sparktune.ops.spec import Launch

BLOCK = 512  # choices a program
ELEMENTS = 8192  # of a tile of choices by experts


class Routing(NamedTuple):
    """int32 tensors on the device: offsets [E + 1], rows [M], positions [T, top_k]."""

    offsets: Tensor
    rows: Tensor
    positions: Tensor


@triton.jit
def _buckets(indices_ptr, choice, choices, experts):
    """Each choice's expert; `experts` for none; -1 past the last choice."""
    i = tl.load(indices_ptr + choice, mask=choice < choices, other=0).to(tl.int64)
    bucket = tl.where((i >= 0) & (i < experts), i, experts).to(tl.int32)
    return tl.where(choice < choices, bucket, -1)


@triton.jit
def count_kernel(
    indices_ptr, counts_ptr, choices, experts, BLOCK: tl.constexpr, GROUPS: tl.constexpr, SOME: tl.constexpr
):
    """How often each expert occurs in one block of choices, into a row of counts [blocks, GROUPS]."""
    block = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    count = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, BLOCK, SOME):
        bucket = _buckets(indices_ptr, block * BLOCK + start + tl.arange(0, SOME), choices, experts)
        count += tl.sum((bucket[:, None] == groups[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + block * GROUPS + groups, count)


@triton.jit
def place_kernel(
    indices_ptr, counts_ptr, offsets_ptr, rows_ptr, positions_ptr, choices, experts, top_k, blocks,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Give one block's choices their places; the first block writes the offsets."""
    block = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    total = tl.zeros((GROUPS,), tl.int32)
    before = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, blocks, SOME):
        other = start + tl.arange(0, SOME)
        at = counts_ptr + other[:, None] * GROUPS + groups[None, :]
        count = tl.load(at, mask=other[:, None] < blocks, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where(other[:, None] < block, count, 0), 0)
    begins = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets_ptr + groups, begins, mask=groups <= experts)
    free = begins + before
    for start in range(0, BLOCK, SOME):
        choice = block * BLOCK + start + tl.arange(0, SOME)
        bucket = _buckets(indices_ptr, choice, choices, experts)
        hit = (bucket[:, None] == groups[None, :]).to(tl.int32)
        rank = tl.cumsum(hit, 0) - 1
        position = tl.sum(hit * (free[None, :] + rank), 1)
        free += tl.sum(hit, 0)
        tl.store(positions_ptr + choice, position, mask=choice < choices)
        tl.store(rows_ptr + position, choice // top_k, mask=choice < choices)


def reference(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: a stable sort."""
    flat = indices.reshape(-1).long()
    bucket = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.sort(bucket, stable=True).indices
    positions = torch.empty_like(order)
    positions[order] = torch.arange(order.numel(), device=order.device)
    steps = torch.arange(experts + 1, device=order.device)
    offsets = torch.searchsorted(bucket[order], steps)
    top_k = max(1, indices.shape[1])
    return offsets.int(), (order // top_k).int(), positions.view(indices.shape).int()


def _forward(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=indices.device)

    choices, groups = indices.numel(), next_power_of_2(experts + 1)
    offsets, rows, positions = new(experts + 1), new(choices), new(*indices.shape)
    if not choices:
        return offsets.zero_(), rows, positions
    indices = indices.contiguous()
    blocks, some = cdiv(choices, BLOCK), max(16, ELEMENTS // groups)
    some = min(some, BLOCK)
    counts = new(blocks, groups)
    options: dict[str, Any] = dict(BLOCK=BLOCK, GROUPS=groups, SOME=some, num_warps=8)
    dispatch.launch(count_kernel, blocks, indices, indices, counts, choices, experts, **options)
    dispatch.launch(
        place_kernel, blocks, indices, indices, counts, offsets, rows, positions, choices, experts, indices.shape[1],
        blocks, **options,
    )  # fmt: skip
    return offsets, rows, positions


_OP = Fused("moe_route", _forward, None, reference=reference, outputs=3)


def moe_route(indices: Tensor, experts: int) -> Routing:
    """The order that the router's choice, indices [T, top_k] (int32 or int64), makes of the tokens.

    A token may choose an expert twice. Errors: ValueError for another shape or dtype, or no experts.
    """
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"moe_route: indices must be int32 or int64 [T, top_k], got {indices.dtype} {list(indices.shape)}"
        )
    if experts < 1:
        raise ValueError(f"moe_route: there must be an expert at least, got {experts}")
    return Routing(*_OP(indices, experts))


def launches() -> list[Launch]:
    """8, 128 and 512 experts."""
    found = []
    for experts in (8, 128, 512):
        groups = next_power_of_2(experts + 1)
        flags = {"BLOCK": BLOCK, "GROUPS": groups, "SOME": min(BLOCK, max(16, ELEMENTS // groups))}
        for kernel, pointers, scalars in (
            ("count_kernel", "counts", "choices experts"),
            ("place_kernel", "counts offsets rows positions", "choices experts top_k blocks"),
        ):
            args = {"indices_ptr": "*i64"} | {f"{x}_ptr": "*i32" for x in pointers.split()}
            args |= dict.fromkeys(scalars.split(), "i32") | dict.fromkeys(flags, "constexpr")
            found.append(Launch(f"{kernel.removesuffix('_kernel')}, {experts} experts", kernel, args, flags, 8))
    return found
