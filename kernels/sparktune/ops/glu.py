"""What the gated activations share: how their operands lie in memory, how a pass is launched, how each is judged.

Such an op takes gate and up [..., N] apart, or both merged in one tensor [..., 2N], and gives y [..., N]. Merged, the
gradient is one tensor [..., 2N] too, in the layout of what came in, so that nothing has to be put together before the
product that takes it.

Room: y may be a view with row stride N + room of a buffer whose further columns nobody has written. A following
product with a LoRA puts y A^T there and multiplies both by one matrix of N + room rows. A merged gradient may have such
room of its own. A multiple of 8 keeps rows of 16-bit elements aligned to wide loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.launching import cdiv
from sparktune.ops.numerics import cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Problem, Tensors

MOST_ROWS = 65535  # a launch: the second dimension of a grid has 16 bits


@triton.jit
def place(n, BLOCK: tl.constexpr):
    """Row, columns and mask of this program's block, row and columns in 64 bits, since both may pass 2**31.

    Both are read off the grid: dividing one number by the blocks of a row takes 25 instructions before the first load.
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(1).to(tl.int64), cols, cols < n


@triton.jit
def load(ptr, row, stride, cols, mask):
    """Part of a row, in fp32."""
    return tl.load(ptr + row * stride + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, row, stride, cols, mask, x):
    """fp32 into part of a row, rounded to its dtype."""
    tl.store(ptr + row * stride + cols, cast(x, ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """How one pass is launched."""

    block: int
    num_warps: int

    SIZES = ((256, 2), (1024, 4))  # 8 values a thread: 16 bytes a load in 16 bits

    @classmethod
    def choose(cls, elements: int, p: DeviceProperties) -> Config:
        """Big blocks once these fill every SM twice over; small ones spread little work wider."""
        big = cls.SIZES[1]
        return cls(*(big if elements >= 2 * p.sm_count * big[0] else cls.SIZES[0]))


def halves(t: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a merged tensor: gate, up."""
    n = t.shape[-1] // 2
    return t[..., :n], t[..., n:]


def roomy(shape: Sequence[int], room: int, like: Tensor) -> Tensor:
    """An uninitialised tensor of `shape`, in rows that have `room` further columns behind them."""
    if not room:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    buffer = torch.empty((*shape[:-1], shape[-1] + room), dtype=like.dtype, device=like.device)
    return buffer[..., : shape[-1]]


def launch(kernel: Any, tensors: Sequence[Tensor], *scalars: Any, **constants: Any) -> None:
    """Start `kernel(pointers, columns, row strides, *scalars)` over tensors of one shape; nothing on empty ones.

    Results among them must be contiguous or from `roomy`: a view of their rows always exists, so none is copied.
    """
    if not tensors[0].numel():
        return
    if all(t.is_contiguous() for t in tensors):
        m, n, flat = 1, tensors[0].numel(), [t.reshape(1, -1) for t in tensors]  # one long row
    else:
        flat = [dispatch.rows(t) for t in tensors]
        m, n = flat[0].shape
    c = Config.choose(m * n, DeviceProperties.of(tensors[0].device))
    for start in range(0, m, MOST_ROWS):
        some = [t[start : start + MOST_ROWS] for t in flat] if m > MOST_ROWS else flat
        dispatch.launch(
            kernel, (cdiv(n, c.block), len(some[0])), tensors[0], *some, n, *(t.stride(0) for t in flat), *scalars,
            BLOCK=c.block, num_warps=c.num_warps, **constants,
        )  # fmt: skip


def check(op: str, gate: Tensor, up: Tensor | None, room: int, grad_room: int) -> None:
    """Errors: ValueError for operands that don't fit, an unknown dtype, or room that can't be."""
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"{op}: gate and up merged need an even last dimension, got {list(gate.shape)}")
        if gate.dtype not in FLOATS:
            raise ValueError(f"{op}: gate and up must be fp32, bf16 or fp16, got {gate.dtype}")
    else:
        if gate.shape != up.shape:
            raise ValueError(f"{op}: gate and up must have one shape, got {list(gate.shape)} and {list(up.shape)}")
        if gate.dtype != up.dtype or gate.dtype not in FLOATS:
            raise ValueError(f"{op}: gate and up must both be fp32, bf16 or fp16, got {gate.dtype} and {up.dtype}")
        if grad_room:
            raise ValueError(f"{op}: only a merged gradient can have room, got grad_room={grad_room} and up apart")
    if room < 0 or grad_room < 0:
        raise ValueError(f"{op}: room must not be negative, got room={room}, grad_room={grad_room}")
    if (room or grad_room) and gate.dim() == 0:
        raise ValueError(f"{op}: a scalar has no columns that could have room")


def merged(p: Problem) -> bool:
    """Whether a problem's variant takes gate and up in one tensor."""
    return "merged" in p.variant


def inputs(p: Problem, spread: float = 1.0) -> dict[str, Input]:
    """gate and up, or gate_up."""
    n = p.dims["columns"]
    rows = (*([p.dims["batch"]] if "batch" in p.dims else []), p.dims["rows"])
    wanted = {"gate_up": (*rows, 2 * n)} if merged(p) else {"gate": (*rows, n), "up": (*rows, n)}
    return {k: Input(shape, p.dtype, grad=True, spread=spread) for k, shape in wanted.items()}


def pair(t: Tensors) -> tuple[Tensor, Tensor]:
    """gate and up of either kind of problem."""
    return halves(t["gate_up"]) if "gate_up" in t else (t["gate"], t["up"])


def arguments(t: Tensors) -> tuple[Tensor, Tensor | None]:
    """What an op takes: gate and up, or both merged and None."""
    return (t["gate_up"], None) if "gate_up" in t else (t["gate"], t["up"])


def rooms(p: Problem) -> dict[str, Any]:
    """The room that a problem asks for."""
    room = p.dims.get("room", 0)
    return {"room": room, "grad_room": room // 2 if merged(p) else 0}


def tail(t: Tensors, p: Problem) -> tuple[Tensors, Problem]:
    """The last four rows."""
    return {k: v[-4:] for k, v in t.items()}, replace(p, dims={**p.dims, "rows": 4})


def bytes_moved(p: Problem, which: Literal["forward", "backward"]) -> int:
    """Two read and one written, or three and two."""
    return (3 if which == "forward" else 5) * p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize


def products(act: Tensor, off: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lowest and highest round(round(act) up) when act [fp64], before it is rounded, is off by at most `off`."""
    off = torch.where(act.isfinite() & off.isfinite(), off, 0.0) + 1e-36
    ends = [end.float().to(dtype) * up for end in (act - off, act + off)]
    return torch.minimum(*ends), torch.maximum(*ends)


def _with(t: Tensors, gate: Tensor, up: Tensor) -> Tensors:
    return {"gate_up": torch.cat((gate, up), -1)} if "gate_up" in t else {"gate": gate, "up": up}


def _linear_in_up(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    gate, up = pair(t)
    twice, doubled = call(t, p) * 2, call(_with(t, gate, up * 2), p)
    normal = twice.abs() >= 4 * torch.finfo(p.dtype).tiny  # below, bits are lost to the exponent's end
    return torch.where(normal, twice, 0), torch.where(normal, doubled, 0)


def _odd_part(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    # With up = 1 the results of a gate and of minus the gate differ by the gate itself, rounded nowhere in fp32.
    gate, f = pair(t)[0].float(), replace(p, dtype=torch.float32)
    one = torch.ones_like(gate)
    return call(_with(t, gate, one), f) - call(_with(t, -gate, one), f), gate


LAWS = (
    Law("f(e, 2u) = 2 f(e, u)", _linear_in_up),
    Law("f(e, 1) - f(-e, 1) = e", _odd_part, tolerance=2e-6),
)
POINTERS = {
    "forward_kernel": ("gate", "up", "y"),
    "backward_kernel": ("dy", "gate", "up", "dgate", "dup"),
}


def launches(
    p: DeviceProperties, constants: Mapping[str, Mapping[str, Any]], scalars: Sequence[str] = (),
    pointers: Mapping[str, Sequence[str]] = POINTERS,
) -> list[Launch]:  # fmt: skip
    """All sizes and dtypes of the first variant, big blocks in bf16 of the others; `constants` maps variants to theirs."""
    cases = [(elements, dtype, False) for elements in (1, 2**24) for dtype in FLOATS] + [(2**24, torch.bfloat16, True)]
    found = []
    for index, (variant, own) in enumerate(constants.items()):
        for elements, dtype, far in cases if index == 0 else cases[4:5]:
            c = Config.choose(elements, p)
            for kernel, names in pointers.items():
                n = "i64" if far else "i32"
                flags = {**own, "BLOCK": c.block}
                args = {f"{x}_ptr": f"*{TRITON_TYPES[dtype]}" for x in names} | {"n": n}
                args |= {f"{x}_stride": n for x in names} | dict.fromkeys(scalars, "fp32")
                args |= dict.fromkeys(flags, "constexpr")
                size = "little work" if elements == 1 else "over 2**31 columns" if far else "much work"
                when = f"{kernel.removesuffix('_kernel')}, {size}"
                found.append(Launch(when, kernel, args, flags, c.num_warps, 3, TRITON_TYPES[dtype], variant))
    return found
