r"""SwiGLU: the product inside a gated MLP, silu(gate) * up.

Forward, with s(e) = 1 / (1 + exp(-e)) and each step in fp32, rounded to the tensors' dtype where stated:

    h = round(e / (1 + exp(-e)))        silu, as PyTorch rounds it
    y = round(h up)

This is bit for bit what `torch.nn.functional.silu(gate) * up` gives: the same division, the same two roundings. Keeping
h in fp32 would be more accurate, but not what the model was trained with.

Backward, in fp32 throughout, rounded once at the end:

    dup   = dy silu(e)
    dgate = dy up s(e) (1 + e (1 - s(e)))

Nothing intermediate is rounded, so in fp16 the product dy up cannot overflow on its way to a finite gradient.

Shapes: gate and up [..., N] of one dtype, fp32, bf16 or fp16 -> y [..., N]; both may be halves of one merged [...,
2N] tensor, which are read in place. Saved: gate and up.

Bytes: forward reads two and writes one, backward reads three and writes two: 8 M N elements in all.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.fused import Fused
from sparktune.ops.numerics import cast, exp
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch, in the same rounding order; the oracle is this on float64 tensors."""
    return torch.nn.functional.silu(gate) * up


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    """This program's row and columns, in 64 bits: both may pass 2**31."""
    blocks = (n + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, cols


@triton.jit
def forward_kernel(gate_ptr, up_ptr, y_ptr, n, gate_stride, up_stride, BLOCK: tl.constexpr):
    """One block of one row a program."""
    row, cols = _place(n, BLOCK)
    mask = cols < n
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    h = cast(tl.math.div_rn(gate, 1.0 + exp(-gate)), y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * n + cols, cast(h * up, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, dy_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):
    """One block of one row a program: both gradients, contiguous."""
    row, cols = _place(n, BLOCK)
    mask = cols < n
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    s = tl.math.div_rn(1.0, 1.0 + exp(-gate))
    dup = dy * gate * s
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dup_ptr + row * n + cols, cast(dup, dup_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + row * n + cols, cast(dgate, dgate_ptr.dtype.element_ty), mask=mask)


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


def _matrices(*tensors: torch.Tensor) -> tuple[int, int, list[torch.Tensor]]:
    """(rows, columns, views): one long row where all are contiguous, else rows with unit stride along the last."""
    if all(t.is_contiguous() for t in tensors):
        return 1, tensors[0].numel(), [t.reshape(1, -1) for t in tensors]
    flat = [dispatch.rows(t) for t in tensors]
    return flat[0].shape[0], flat[0].shape[1], flat


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        m, n, (g, u) = _matrices(gate, up)
        c = Config.choose(m * n, DeviceProperties.of(gate.device))
        dispatch.launch(
            forward_kernel, m * triton.cdiv(n, c.block), gate, g, u, y, n, g.stride(0), u.stride(0),
            BLOCK=c.block, num_warps=c.num_warps,
        )  # fmt: skip
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        m, n, (d, g, u) = _matrices(dy, gate, up)
        c = Config.choose(m * n, DeviceProperties.of(gate.device))
        dispatch.launch(
            backward_kernel, m * triton.cdiv(n, c.block), gate, d, g, u, dgate, dup,
            n, d.stride(0), g.stride(0), u.stride(0), BLOCK=c.block, num_warps=c.num_warps,
        )  # fmt: skip
    return dgate, dup


_OP = Fused("swiglu", _forward, _backward, reference=reference, grads=("gate", "up"))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise: two [..., N] -> [..., N]. Differentiable once, in both.

    Strides are free; an output gradient with stride 0 too. Errors: ValueError for unlike shapes or dtypes, a dtype
    other than fp32, bf16, fp16, or tensors on different devices.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate and up must have one shape, got {list(gate.shape)} and {list(up.shape)}")
    if gate.dtype != up.dtype or gate.dtype not in FLOATS:
        raise ValueError(f"swiglu: gate and up must both be fp32, bf16 or fp16, got {gate.dtype} and {up.dtype}")
    y: Tensor = _OP(gate, up)
    return y


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest y when silu, before it is rounded, is right to a relative `slack`."""
    gate, up = t["gate"].detach(), t["up"].detach()
    if slack == 0:
        y = reference(gate, up)
        return y, y
    silu = torch.nn.functional.silu(gate.double())
    off = (
        torch.where(silu.isfinite(), silu.abs() * slack, 0.0) + 1e-36
    )  # fp32's exp overflows where silu is about that small
    ends = [end.float().to(p.dtype) * up for end in (silu - off, silu + off)]
    return torch.minimum(*ends), torch.maximum(*ends)


def _inputs(p: Problem) -> dict[str, Input]:
    batch = [p.dims["batch"]] if "batch" in p.dims else []
    shape = (*batch, p.dims["rows"], p.dims["columns"])
    return {"gate": Input(shape, p.dtype, grad=True), "up": Input(shape, p.dtype, grad=True)}


def _tail(t: Tensors, p: Problem) -> tuple[Tensors, Problem]:
    return {k: v[-4:] for k, v in t.items()}, replace(p, dims={**p.dims, "rows": 4})


def _call(t: Tensors, p: Problem) -> torch.Tensor:
    return swiglu(t["gate"], t["up"])


def _linear_in_up(call: Any, t: Tensors, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return call(t, p) * 2, call({**t, "up": t["up"] * 2}, p)


def _odd_part(call: Any, t: Tensors, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    # silu(e) - silu(-e) = e, so with up = 1 the two halves differ by the gate itself.
    one = torch.ones_like(t["up"])
    gate = t["gate"].float()
    f = replace(p, dtype=torch.float32)
    return call({"gate": gate, "up": one.float()}, f) - call({"gate": -gate, "up": one.float()}, f), gate


def _launches(p: DeviceProperties) -> list[Launch]:
    found = []
    for elements in (1, 2**24):
        c = Config.choose(elements, p)
        for dtype in FLOATS:
            ptr = f"*{TRITON_TYPES[dtype]}"
            for columns, n in (("", "i32"), (", over 2**31 columns", "i64")):
                tail = {"n": n, "gate_stride": n, "up_stride": n, "BLOCK": "constexpr"}
                forward = {"gate_ptr": ptr, "up_ptr": ptr, "y_ptr": ptr} | tail
                names = ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")
                backward = dict.fromkeys(names, ptr) | {"n": n, "dy_stride": n} | tail
                for kernel, args in (("forward_kernel", forward), ("backward_kernel", backward)):
                    when = f"{kernel.split('_')[0]}, {'little' if elements == 1 else 'much'} work{columns}"
                    found.append(Launch(when, kernel, args, {"BLOCK": c.block}, c.num_warps, 3, TRITON_TYPES[dtype]))
    return found


MUTANTS = Mutant.table(
    """relu: ReLU in place of SiLU
- cast(tl.math.div_rn(gate, 1.0 + exp(-gate)),
+ cast(tl.maximum(gate, 0.0),
sigmoid-sign: sigmoid of minus the gate
- div_rn(gate, 1.0 + exp(-gate))
+ div_rn(gate, 1.0 + exp(gate))
gelu: the sigmoid form of GELU
- div_rn(gate, 1.0 + exp(-gate))
+ div_rn(gate, 1.0 + exp(-1.702 * gate))
unrounded: silu not rounded before the product
- h = cast(tl.math.div_rn(gate, 1.0 + exp(-gate)), y_ptr.dtype.element_ty)
+ h = tl.math.div_rn(gate, 1.0 + exp(-gate))
swapped: the product with the gate instead of up
- cast(h * up,
+ cast(h * gate,
dup-no-sigmoid: gradient of up without the sigmoid
- dup = dy * gate * s
+ dup = dy * gate
dgate-no-slope: the sigmoid's own derivative left out
- s * (1.0 + gate * (1.0 - s))
+ s
dgate-slope-sign: the sigmoid's derivative with the wrong sign
- (1.0 + gate * (1.0 - s))
+ (1.0 - gate * (1.0 - s))
dgate-no-up: gradient of the gate without up
- dgate = dy * up * s
+ dgate = dy * s
gradients-swapped: both gradients in each other's place
- return dgate, dup
+ return dup, dgate
scaled-gradient: gradient of up 1% too large
- dup = dy * gate * s
+ dup = dy * gate * s * 1.01
up-stride: up read with the gate's stride
- up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
-     h =
+ up_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
+     h =
dy-stride: output gradient read as if it were contiguous
- dy_ptr + row * dy_stride
+ dy_ptr + row * n
unwritten: the last column never written
- cast(h * up, y_ptr.dtype.element_ty), mask=mask)
+ cast(h * up, y_ptr.dtype.element_ty), mask=cols < n - 1)
int32-offset: row offset in 32 bits
- program = tl.program_id(0).to(tl.int64)
+ program = tl.program_id(0)
dgate-over-gate: dgate written over the saved gate
- dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
+ dgate = gate.detach() if gate.is_contiguous() else torch.empty_like(gate)
dup-over-dy: dup written over the caller's output gradient
- dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
+ dup = dy if dy.is_contiguous() else torch.empty_like(up)
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(gate, up)
+ y: Tensor = reference(gate, up)
"""
)

OP = OpSpec(
    name="swiglu",
    summary="silu(gate) * up, bit for bit PyTorch's forward, with a fused backward",
    variants=("",),
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 5, "columns": 320},
        "prime": {"rows": 7, "columns": 211},
        "batched": {"batch": 2, "rows": 3, "columns": 64},
        "wide": {"rows": 2, "columns": 8209},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
        "no columns": {"rows": 3, "columns": 0},
        "far": {"rows": 3, "columns": 64},
        "huge": {"rows": 2**18 + 3, "columns": 8192},
        "speed": {"rows": 16384, "columns": 14336},
    },
    inputs=_inputs,
    call=_call,
    reference=lambda t, p, compute: reference(t["gate"], t["up"]),
    launches=_launches,
    bytes_moved=lambda p, w: (3 if w == "forward" else 5) * p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize,
    flops=lambda p, w: (5 if w == "forward" else 11) * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    tail=_tail,
    laws=(
        Law("swiglu(e, 2u) = 2 swiglu(e, u)", _linear_in_up),
        Law("silu(e) - silu(-e) = e", _odd_part, tolerance=2e-6),
    ),
    mutants=MUTANTS,
)
