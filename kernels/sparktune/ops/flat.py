"""Many tensors for one launch: their optimiser state in flat buffers, and the tables by which a kernel finds them.

Parameters and gradients stay where they are: a table holds their addresses, so nothing changes for whoever owns them,
and gradients may be new tensors at every step (`zero_grad(set_to_none=True)`). Each tensor's state begins at a whole
block of 256 elements, so no block has elements of two tensors.

    where  int64 [tensors, 4]   address of the parameter, of its gradient (0: none), elements, begin of its state
    tiles  int32 [tiles, 2]     tensor, first block; sorted by dtype, group and kind of state, so a launch takes a range
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops.spec import FLOATS

BLOCK = 256  # elements that share a scale
ROWS = 8  # blocks a tile
ALIGNED = 16  # bytes of a wide load


@triton.jit
def places(tiles_ptr, tile, count, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets in the tensor [ROWS, BLOCK], mask). WHOLE: aligned tensors of whole blocks, so loads may be wide."""
    row = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64) + tl.arange(0, ROWS)[:, None]
    at = row * BLOCK + tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        mask = tl.broadcast_to(row * BLOCK < count, (ROWS, BLOCK))
        at = tl.multiple_of(at, [1, BLOCK])
    else:
        mask = at < count
    return at, mask


@triton.jit
def pointers(where_ptr, tensor, column: tl.constexpr, like_ptr, at, WHOLE: tl.constexpr):
    """Pointers of `like_ptr`'s type to the elements `at` of the tensor whose address is in a column of `where`.

    WHOLE tells the compiler that each row begins at a multiple of 16 bytes, which it cannot see in a table: without,
    loads are of one element each.
    """
    found = tl.load(where_ptr + tensor * 4 + column).to(tl.pointer_type(like_ptr.dtype.element_ty)) + at
    if WHOLE:
        found = tl.multiple_of(found, [1, 16])
    return found


class Hyper(NamedTuple):
    """A parameter group's numbers. An `lr` that is a tensor is one fp32 element on the parameters' device."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Run:
    """A range of tiles that one launch takes."""

    dtype: torch.dtype
    group: int
    bits: int
    whole: bool  # aligned tensors of whole blocks
    first: int
    tiles: int
    like: Tensor  # some parameter, for its dtype


class Flat:
    """State and tables of `params`, tensor i in parameter group `groups[i]`, with `bits[i]` (8 or 32) of state each."""

    def __init__(self, params: Sequence[Tensor], groups: Sequence[int], bits: Sequence[int]) -> None:
        """Zero state. Errors: ValueError for no tensors, an unknown dtype, gaps in memory or several devices."""
        if not params:
            raise ValueError("adamw8bit: no parameters")
        self.params, self.groups, self.bits = list(params), list(groups), list(bits)
        self.device = params[0].device
        for p in params:
            if p.dtype not in FLOATS or not p.is_contiguous() or p.device != self.device:
                raise ValueError(
                    "adamw8bit: parameters must be contiguous fp32, bf16 or fp16 tensors on one device, "
                    f"got {p.dtype} {list(p.shape)} with strides {list(p.stride())} on {p.device}"
                )
        self.dtypes = [p.dtype for p in params]
        self.counts = [p.numel() for p in params]
        size = {8: 0, 32: 0}
        self.starts = []
        for n, b in zip(self.counts, self.bits, strict=True):
            self.starts.append(size[b])
            size[b] += -(-n // BLOCK) * BLOCK

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.codes1, self.codes2 = (zeros(size[8], dtype=torch.uint8) for _ in range(2))
        self.absmax1, self.absmax2 = (zeros(size[8] // BLOCK) for _ in range(2))
        self.full1, self.full2 = (zeros(size[32]) for _ in range(2))
        count = len(self.params)
        self.steps = zeros(count, dtype=torch.int32)
        self.decays, self.corrections = zeros(count, 2), zeros(count, 2)
        self.where = zeros(count, 4, dtype=torch.int64)
        self.clip, self.zero, self.counter = zeros(4), zeros(1), zeros(1, dtype=torch.int32)
        self.tiles = zeros(0, 2, dtype=torch.int32)
        self.runs: list[Run] = []
        self.ranges: list[Run] = []
        self._partial = zeros(1)
        self._plan: list[Run] = []
        self._now: tuple[object, ...] = ()
        self._copies: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._captured: list[Tensor] = []

    def state(self, i: int) -> tuple[Tensor, ...]:
        """Views of tensor i's state: (codes of m, codes of v, absmax of m, absmax of v), or (m, v)."""
        start, n, shape = self.starts[i], self.counts[i], self.params[i].shape
        if self.bits[i] == 32:
            return tuple(b[start : start + n].view(shape) for b in (self.full1, self.full2))
        first, last = start // BLOCK, -(-(start + n) // BLOCK)
        codes = tuple(b[start : start + n].view(shape) for b in (self.codes1, self.codes2))
        return *codes, self.absmax1[first:last], self.absmax2[first:last]

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the tensors it was made for, as they were."""
        return len(params) == len(self.params) and all(
            p is q and p.dtype == d and p.device == self.device
            for p, q, d in zip(params, self.params, self.dtypes, strict=True)
        )

    @property
    def norm(self) -> Tensor:
        """The last step's global norm of the gradients, before clipping; on the device."""
        return self.clip[0]

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped for a norm that was not finite; on the device."""
        return self.clip[3]

    def buffers(self) -> tuple[Tensor, ...]:
        """What a launch reads and writes besides parameters and gradients."""
        return self.codes1, self.clip

    def partial(self, count: int) -> Tensor:
        """Room for partial sums. Kept, since a captured graph goes on writing there."""
        if self._partial.numel() < count:
            self._captured.append(self._partial)
            self._partial = torch.zeros(count, dtype=torch.float32, device=self.device)
        return self._partial

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """Errors: ValueError for gradients that don't fit their parameters."""
        for p, g in zip(self.params, grads, strict=True):
            if g is not None and (g.dtype != p.dtype or g.shape != p.shape or g.is_sparse):
                raise ValueError(
                    f"adamw8bit: a gradient must be its parameter's shape and dtype and dense, "
                    f"got {list(g.shape)} {g.dtype} for {list(p.shape)} {p.dtype}"
                )

    def refresh(self, grads: Sequence[Tensor | None], hyper: Sequence[Hyper]) -> None:
        """Bring the tables up to date. Uploads only what changed, and waits for nothing.

        A graph under capture gets uploads of its own, since its gradients lie elsewhere than an eager step's, and
        every later eager step uploads too.
        """
        self.check(grads)
        self._copies = []
        addresses = []
        for p, g in zip(self.params, grads, strict=True):
            if g is None:
                addresses.append((p.data_ptr(), 0))
                continue
            if not g.is_contiguous() or g.data_ptr() % ALIGNED:
                g = torch.empty_like(g, memory_format=torch.contiguous_format).copy_(g)
                self._copies.append(g)
            addresses.append((p.data_ptr(), g.data_ptr()))
        betas = tuple((h.beta1, h.beta2) for h in hyper)
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        now = (addresses, betas)
        if now == self._now and not capturing and not self._captured:
            return
        if not self._plan:
            self._make_plan()
        for p, dtype, n in zip(self.params, self.dtypes, self.counts, strict=True):
            if p.dtype != dtype or p.numel() != n or p.device != self.device or not p.is_contiguous():
                raise ValueError(f"adamw8bit: a parameter became {p.dtype} {list(p.shape)} on {p.device}; make it anew")
        table = [(p, g, n, s) for (p, g), n, s in zip(addresses, self.counts, self.starts, strict=True)]
        decays = [(1 - hyper[k].beta1, 1 - hyper[k].beta2) for k in self.groups]
        # Both as one array of bytes: fp32 pairs take the room of one int64.
        packed = torch.cat((
            torch.tensor(table, dtype=torch.int64).view(-1), torch.tensor(decays, dtype=torch.float32).view(torch.int64).view(-1)
        ))  # fmt: skip
        self._upload(packed, capturing)
        loose = {i for i, pair in enumerate(addresses) if pair[0] % ALIGNED}
        self.runs = [replace(r, whole=r.whole and not self._any(r, loose)) for r in self._plan]
        self.ranges = []
        for dtype, same in itertools.groupby(self.runs, key=lambda r: r.dtype):
            runs = list(same)
            whole, tiles = all(r.whole for r in runs), sum(r.tiles for r in runs)
            self.ranges.append(Run(dtype, 0, 0, whole, runs[0].first, tiles, runs[0].like))
        self._now = now

    def _any(self, run: Run, tensors: set[int]) -> bool:
        return any((self.dtypes[i], self.groups[i], self.bits[i]) == (run.dtype, run.group, run.bits) for i in tensors)

    def _make_plan(self) -> None:
        def key(i: int) -> tuple[str, int, int, bool]:
            return str(self.dtypes[i]), self.groups[i], self.bits[i], self.counts[i] % BLOCK == 0

        parts, first = [], 0
        order = sorted((i for i in range(len(self.params)) if self.counts[i]), key=key)
        for (_, group, bits, whole), members in itertools.groupby(order, key=key):
            some = list(members)
            for i in some:
                at = torch.arange(0, -(-self.counts[i] // BLOCK), ROWS, dtype=torch.int32)
                parts.append(torch.stack((torch.full_like(at, i), at), 1))
            tiles = sum(-(-self.counts[i] // (BLOCK * ROWS)) for i in some)
            like = self.params[some[0]]
            self._plan.append(Run(like.dtype, group, bits, whole, first, tiles, like))
            first += tiles
        self.tiles = torch.cat(parts or [torch.zeros(0, 2, dtype=torch.int32)]).to(self.device)

    def _upload(self, packed: Tensor, capturing: bool) -> None:
        """`packed` into `where` and `decays`, through pinned memory on a GPU, where it is read some time later."""
        if self.device.type == "cuda":
            if capturing:
                if not self._spare:
                    raise RuntimeError("adamw8bit: make one step outside a CUDA graph before each capture")
                source = self._spare.pop().copy_(packed)
                self._captured.append(source)  # the graph reads it at every replay
            else:
                source = packed.pin_memory()
                if not self._spare:
                    self._spare.append(torch.empty_like(packed).pin_memory())
        else:
            source = packed
        n = self.where.numel()
        self.where.view(-1).copy_(source[:n], non_blocking=True)
        self.decays.view(-1).copy_(source[n:].view(torch.float32), non_blocking=True)
