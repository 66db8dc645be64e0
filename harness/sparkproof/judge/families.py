"""Input families: what values the inputs have, and how they and the output's gradient lie in memory.

Every family is tried at the op's typical size, a few at the wide one; other sizes take the normal one. Their order
matters: a kernel that ignores strides is caught on a sliced tensor, whose neighbours are allocated, before a stride-0
one leads it out of bounds.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
from dataclasses import dataclass
from typing import Literal

import torch
from sparktune.ops.spec import Input, OpSpec, Problem, Tensors

Values = Literal["normal", "small", "large", "outlier", "equal", "nan", "inf"]
Layout = Literal["contiguous", "sliced", "transposed", "row", "scalar", "far"]
FAR_STRIDE = 2**30  # elements between rows: row 2 begins at 2**31, which 32 bits turn into -2**31
MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class Family:
    """Values of the activations, and the layouts of the inputs and of the output's gradient."""

    name: str
    values: Values = "normal"
    inputs: Layout = "contiguous"
    gradient: Layout = "contiguous"

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf was planted."""
        return self.values not in ("nan", "inf")


NORMAL = Family("normal")
FAMILIES = (
    NORMAL,
    Family("scaled 1e-3", "small"),
    Family("scaled 1e3", "large"),
    Family("outlier channel", "outlier"),
    Family("equal values", "equal"),
    Family("NaN planted", "nan"),
    Family("Inf planted", "inf"),
    Family("sliced inputs", inputs="sliced"),
    Family("transposed inputs", inputs="transposed"),
    Family("sliced gradient", gradient="sliced"),
    Family("transposed gradient", gradient="transposed"),
    Family("stride-0 gradient, one row", gradient="row"),
    Family("stride-0 gradient, one value", gradient="scalar"),
)
FEW = ("scaled 1e3", "NaN planted", "sliced inputs", "sliced gradient", "stride-0 gradient, one row")
FEW_FAMILIES = tuple(f for f in FAMILIES if f.name in FEW)
# Rows too wide for one block take another path through a kernel, where a missing eps would not show at scale 1.
WIDE_FAMILIES = (Family("scaled 1e-3", "small"), Family("NaN planted", "nan"))
FAR = Family("rows 2**30 apart", inputs="far", gradient="far")


def generator(*key: object) -> torch.Generator:
    """A generator seeded by `key` alone, the same on every machine and in every process."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "little")
    return torch.Generator().manual_seed(seed)


def make_inputs(spec: OpSpec, p: Problem, family: Family, device: torch.device) -> Tensors:
    """All tensors of a problem: leaves on `device`, those that take a gradient asking for it."""
    made: Tensors = {}
    for position, (name, i) in enumerate(spec.inputs(p).items()):
        g = generator(spec.name, p.variant, sorted(p.dims.items()), family.values, name)
        t = _values(i, family, g).to(i.dtype)
        t = lay_out(t, family.inputs if i.layouts and i.role != "parameter" else "contiguous", device, extra=position)
        made[name] = t.detach().requires_grad_(i.grad)
    return made


def make_gradient(spec: OpSpec, p: Problem, family: Family, like: torch.Tensor, name: str = "out") -> torch.Tensor:
    """The gradient of the output called `name`: normal, in the family's layout."""
    g = generator(spec.name, p.variant, sorted(p.dims.items()), "gradient", *([name] if name != "out" else []))
    t = torch.randn(like.shape, generator=g).to(like.dtype)
    return lay_out(t, family.gradient, like.device, extra=3)


def _values(i: Input, family: Family, g: torch.Generator) -> torch.Tensor:
    if i.make is not None:
        return i.make(g)
    t = torch.randn(i.shape, generator=g)
    if i.role == "parameter":
        return i.centre + i.spread * t
    t = (t.abs() + 0.05 if i.positive else t) * i.spread
    match family.values:
        case "small":
            t *= 1e-3
        case "large":
            t *= 1e3
        case "outlier":
            t[..., t.shape[-1] // 3] *= 300
        case "equal":
            t.fill_(0.7)
        case "nan":
            t.view(-1)[t.numel() // 5] = float("nan")
        case "inf":
            flat = t.view(-1)
            flat[t.numel() // 7] = float("inf")
            flat[t.numel() // 2] = float("inf") if i.positive else float("-inf")
    return t


def lay_out(t: torch.Tensor, layout: Layout, device: torch.device, extra: int = 0) -> torch.Tensor:
    """`t`'s values on `device` in another layout. Memory around a view holds NaN, so that reading it shows."""
    if layout == "contiguous" or t.numel() == 0 or t.dim() == 0 or (layout == "far" and t.dim() != 2):
        return t.to(device)
    if layout == "far":
        return _far(t)
    if layout == "sliced":
        width = t.shape[-1]
        outer = torch.empty((*t.shape[:-1], width + 5 + 2 * extra), dtype=t.dtype, device=device)
        outer.fill_(float("nan") if t.is_floating_point() else min(170, torch.iinfo(t.dtype).max))
        view = outer[..., 1 + extra : 1 + extra + width]
        view.copy_(t)
        return view
    if layout == "transposed":
        if t.dim() == 1:  # every second element of a vector
            around = float("nan") if t.is_floating_point() else min(170, torch.iinfo(t.dtype).max)
            wide = torch.full((2 * t.numel(),), around, dtype=t.dtype, device=device)
            wide[::2] = t.to(device)
            return wide[::2]
        return t.to(device).transpose(-1, -2).contiguous().transpose(-1, -2)
    first = t.to(device).reshape(-1, t.shape[-1])[0]
    return (first if layout == "row" else first[0]).expand(t.shape)


@functools.cache
def _far_storage(dtype: torch.dtype, slot: int) -> torch.Tensor:
    """2**32 elements and some of address space, of which only pages that are written take memory (Linux, CPU)."""
    size = (2 * 2**31 + 2**16) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


SLOTS = 8  # inputs and gradients of one case at most
_slots: list[int] = []


def _far(t: torch.Tensor) -> torch.Tensor:
    """Three rows 2**30 elements apart; what a wrapped offset points at is readable and zero."""
    assert t.dim() == 2 and t.shape[0] == 3, "a far case has three rows"
    _slots.append(len(_slots))
    storage = _far_storage(t.dtype, len(_slots) % SLOTS)
    view = storage.as_strided(t.shape, (FAR_STRIDE, 1), 2**31)
    view.copy_(t)
    return view
