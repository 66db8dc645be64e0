r"""The global norm of many gradients and what an optimiser step needs before it begins, in one launch.

    norm = sqrt(sum over all tensors of g^2)                       fp32
    scale = min(1, max_norm / (norm + 1e-6))                       as torch.nn.utils.clip_grad_norm_
    t = t + 1 for each tensor with a gradient                      not when the step is skipped
    corrections = (1 - b1^t, sqrt(1 - b2^t))                       for each tensor

With `skip_nonfinite` a norm that is infinite or NaN skips the step as torch.amp.GradScaler would: t stays, and the
update sees that it must not go on. Without it the scale is NaN or 0 and spreads as it does in clip_grad_norm_.

Nothing is fetched to the host. Every program leaves a partial sum; an integer counter tells the last one, which adds
them all in a fixed order, so the norm has the same bits every time. b^t is computed in fp64 by squaring: an fp32
exponential would leave few digits of 1 - 0.999^t.

Bytes: g read once. With neither clipping nor skipping no gradient is read and the norm is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.flat import BLOCK, ROWS, Flat, Hyper, places, pointers
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors

INFINITE = float("inf")


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What clip_grad_norm_ multiplies gradients by: 1 for an infinite max_norm, NaN for a NaN norm."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm < INFINITE else torch.ones_like(norm)


def reference(
    grads: Sequence[Tensor | None], steps: Tensor, decays: Tensor, max_norm: float = INFINITE,
    skip_nonfinite: bool = True, compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(norm, scale, new steps, corrections) in plain PyTorch; `decays` [tensors, 2] holds 1 - beta1 and 1 - beta2."""
    norm = torch.zeros((), dtype=compute, device=steps.device)
    norms = [g.to(compute).norm() for g in grads if g is not None]
    if norms and (max_norm < INFINITE or skip_nonfinite):
        norm = torch.stack(norms).norm()
    there = torch.tensor([g is not None for g in grads], dtype=torch.bool, device=steps.device)
    steps = steps + (there & (norm.isfinite() | (not skip_nonfinite))).to(steps.dtype)
    left = 1 - (1 - decays.double()) ** steps[:, None]
    corrections = torch.stack((left[:, 0], left[:, 1].sqrt()), 1).to(compute)
    return norm, clip_scale(norm, max_norm), steps, corrections


@triton.jit
def _power(base, exponent):
    """base ** exponent by squaring."""
    result = base * 0.0 + 1.0
    for _ in range(31):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def prepare_kernel(
    where_ptr, tiles_ptr, like_ptr, partial_ptr, counter_ptr, clip_ptr, steps_ptr, decays_ptr, corrections_ptr,
    first, last, slot, programs, tensors, max_norm, skip, NORM: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Partial sums of g^2 over tiles `first` to `last`; the last of all `programs` then concludes.

    clip_ptr, fp32: norm, scale, whether the step goes on, steps skipped so far.
    """
    program = tl.program_id(0)
    if NORM:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for tile in range(first + program, last, tl.num_programs(0)):
            tensor = tl.load(tiles_ptr + 2 * tile)
            at, mask = places(tiles_ptr, tile, tl.load(where_ptr + tensor * 4 + 2), WHOLE, ROWS, BLOCK)
            there = tl.load(where_ptr + tensor * 4 + 1) != 0
            g_ptrs = pointers(where_ptr, tensor, 1, like_ptr, at, WHOLE)
            g = tl.load(g_ptrs, mask=mask & there, other=0.0).to(tl.float32)
            squares += g * g
        tl.store(partial_ptr + slot + program, tl.sum(tl.sum(squares, 1), 0))
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1:
        cols = tl.arange(0, CHUNK)
        norm = 0.0
        scale = 1.0
        go = 1.0
        if NORM:
            sums = tl.zeros((CHUNK,), tl.float32)
            for start in range(0, programs, CHUNK):
                c = start + cols
                sums += tl.load(partial_ptr + c, mask=c < programs, other=0.0, cache_modifier=".cg")
            norm = tl.sqrt_rn(tl.sum(sums, 0))
            ratio = max_norm / (norm + 1e-6)
            ratio = tl.where(ratio > 1.0, 1.0, ratio)  # a NaN stays one
            scale = tl.where(max_norm < float("inf"), ratio, 1.0)
            go = tl.where(norm < float("inf"), 1.0, 1.0 - skip)
        tl.store(clip_ptr, norm)
        tl.store(clip_ptr + 1, scale)
        tl.store(clip_ptr + 2, go)
        tl.store(clip_ptr + 3, tl.load(clip_ptr + 3) + (1.0 - go))
        for start in range(0, tensors, CHUNK):
            c = start + cols
            mask = c < tensors
            there = tl.load(where_ptr + c * 4 + 1, mask=mask, other=0) != 0
            t = tl.load(steps_ptr + c, mask=mask, other=1)
            t += tl.where(there, tl.where(go > 0.0, 1, 0), 0)
            b1 = 1.0 - tl.load(decays_ptr + 2 * c, mask=mask, other=1.0).to(tl.float64)
            b2 = 1.0 - tl.load(decays_ptr + 2 * c + 1, mask=mask, other=1.0).to(tl.float64)
            first_correction = (1.0 - _power(b1, t)).to(tl.float32)
            second_correction = (1.0 - _power(b2, t)).to(tl.float32)
            tl.store(steps_ptr + c, t, mask=mask)
            tl.store(corrections_ptr + 2 * c, first_correction, mask=mask)
            tl.store(corrections_ptr + 2 * c + 1, tl.sqrt_rn(second_correction), mask=mask)
        tl.store(counter_ptr, 0)


@dataclass(frozen=True)
class Config:
    """How the pass is launched."""

    programs: int
    num_warps: int = 8
    CHUNK = 256

    @classmethod
    def choose(cls, tiles: int, p: DeviceProperties) -> Config:
        """As many programs as are resident at once, since each leaves a partial sum that must be read again."""
        resident = p.sm_count * max(1, p.threads_per_sm // (32 * cls.num_warps))
        return cls(max(1, min(tiles, resident)))


def prepare_(
    flat: Flat, grads: Sequence[Tensor | None], hyper: Sequence[Hyper], max_norm: float = INFINITE,
    skip_nonfinite: bool = True,
) -> None:  # fmt: skip
    """Fill `flat.clip`, and count `flat.steps` and `flat.corrections` on, in place; brings the tables up to date.

    Errors: ValueError for gradients that don't fit their parameters, or tensors on several devices.
    """
    way = dispatch.route("grad_norm", flat.clip, *(g for g in grads if g is not None))
    flat.refresh(grads, hyper)
    if way == "reference":
        norm, scale, steps, corrections = reference(grads, flat.steps, flat.decays, max_norm, skip_nonfinite)
        go = norm.isfinite() | (not skip_nonfinite)
        flat.clip.copy_(torch.stack((norm, scale, go.to(norm.dtype), flat.clip[3] + ~go)))
        flat.steps.copy_(steps)
        flat.corrections.copy_(corrections)
    elif flat.ranges:
        _launch(flat, max_norm, skip_nonfinite)
    dispatch.record("grad_norm", way)


def _launch(flat: Flat, max_norm: float, skip_nonfinite: bool) -> None:
    """One launch for each dtype of parameters, or just one that reads no gradient."""
    norm = max_norm < INFINITE or skip_nonfinite
    properties = DeviceProperties.of(flat.device)
    ranges = flat.ranges if norm else flat.ranges[:1]
    counts = [Config.choose(r.tiles, properties).programs if norm else 1 for r in ranges]
    partial = flat.partial(sum(counts))
    slot = 0
    for r, count in zip(ranges, counts, strict=True):
        dispatch.launch(
            prepare_kernel, count, flat.clip, flat.where, flat.tiles, r.like if norm else flat.clip, partial,
            flat.counter, flat.clip, flat.steps, flat.decays, flat.corrections, r.first, r.first + r.tiles, slot,
            sum(counts), len(flat.params), max_norm, float(skip_nonfinite),
            NORM=norm, WHOLE=norm and r.whole, ROWS=ROWS, BLOCK=BLOCK, CHUNK=Config.CHUNK, num_warps=Config.num_warps,
        )  # fmt: skip
        slot += count


def _inputs(p: Problem) -> dict[str, Input]:
    rows = p.dims["rows"]
    decays = torch.tensor([[0.1, 0.001], [0.3, 0.05], [0.05, 0.01]], dtype=torch.float32)
    return {
        "grad": Input((rows, p.dims["columns"]), p.dtype),
        "steps": Input((rows,), torch.int32, "constant", layouts=False, make=lambda g: torch.arange(rows) * 7 % 40),
        "decays": Input(
            (rows, 2), torch.float32, "constant", layouts=False, make=lambda g: decays[torch.arange(rows) % 3]
        ),
    }


def _arguments(p: Problem) -> tuple[float, bool]:
    return (p.scalars["max_norm"] if p.variant == "clip" else INFINITE), p.variant == "skip"


def _results(p: Problem, norm: Tensor, scale: Tensor, steps: Tensor, corrections: Tensor) -> Tensors:
    found = {"steps": steps.clone(), "corrections": corrections.clone()}
    if p.variant != "count":
        found = {"norm": norm.reshape(1).clone()} | found
    return found | ({"scale": scale.reshape(1).clone()} if p.variant == "clip" else {})


def _call(t: Tensors, p: Problem) -> Tensors:
    rows = t["grad"].shape[0]
    if not rows:
        dispatch.record("grad_norm", dispatch.route("grad_norm", t["grad"]))
        return _reference(t, p, None)
    grads = list(t["grad"])
    flat = Flat([torch.empty_like(g, memory_format=torch.contiguous_format) for g in grads], range(rows), [8] * rows)
    flat.steps.copy_(t["steps"])
    prepare_(flat, grads, [Hyper(0.0, 1 - a, 1 - b, 0.0, 0.0) for a, b in t["decays"].tolist()], *_arguments(p))
    return _results(p, flat.norm, flat.clip[1], flat.steps, flat.corrections)


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensors:
    found = reference(list(t["grad"]), t["steps"], t["decays"], *_arguments(p), compute or torch.float32)
    return _results(p, *found)


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensors, Tensors]:
    """The corrections, and the norm, right to a relative `slack`."""
    new = _reference(t, p, torch.float64)
    ends = [{k: (x * (1 + sign * slack)).float() for k, x in new.items() if x.is_floating_point()} for sign in (-1, 1)]
    return ends[0], ends[1]


def _doubled(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    """Twice the gradients, twice the norm, bit for bit."""
    return None if p.variant == "count" else (call(t, p) * 2, call({**t, "grad": t["grad"] * 2}, p))


def _turned(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    """Tensors in another order have the same norm, but for rounding."""
    return None if p.variant == "count" else (call(t, p), call({k: x.flip(0) for k, x in t.items()}, p))


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    return 0 if p.variant == "count" else p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize


def _launches(p: DeviceProperties) -> list[Launch]:
    args = dict(where_ptr="*i64", tiles_ptr="*i32", partial_ptr="*fp32", counter_ptr="*i32", clip_ptr="*fp32")
    args |= dict(steps_ptr="*i32", decays_ptr="*fp32", corrections_ptr="*fp32", first="i32", last="i32", slot="i32")
    args |= dict(programs="i32", tensors="i32", max_norm="fp32", skip="fp32")
    found = []
    for dtype, norm, whole, when in (
        (torch.float32, False, False, "no gradient read"),
        *((d, True, w, "whole blocks" if w else "any size") for d in FLOATS for w in (True, False)),
    ):
        flags = {"NORM": norm, "WHOLE": whole, "ROWS": ROWS, "BLOCK": BLOCK, "CHUNK": Config.CHUNK}
        every = args | {"like_ptr": f"*{TRITON_TYPES[dtype]}"} | dict.fromkeys(flags, "constexpr")
        found.append(Launch(when, "prepare_kernel", every, flags, Config.num_warps, 3, TRITON_TYPES[dtype]))
    return found


MUTANTS = Mutant.table(
    """last-tile: each program keeps its last tile only
- squares += g * g
+ squares = g * g
sum-of-magnitudes: magnitudes added in place of squares
- squares += g * g
+ squares += tl.abs(g)
unrooted: the square of the norm
- norm = tl.sqrt_rn(tl.sum(sums, 0))
+ norm = tl.sum(sums, 0)
partial-left-out: the first partial sum left out
- mask=c < programs, other=0.0
+ mask=(c > 0) & (c < programs), other=0.0
first-tile: all but each tensor's first tile left out
- mask=mask & there, other=0.0)
+ mask=mask & there & (at < 2048), other=0.0)
grown: small gradients scaled up to max_norm
- ratio = tl.where(ratio > 1.0, 1.0, ratio)
+ ratio = ratio
nan-hidden: a NaN norm scales by 1
- ratio = tl.where(ratio > 1.0, 1.0, ratio)
+ ratio = tl.minimum(ratio, 1.0)
inverted: the norm over max_norm
- ratio = max_norm / (norm + 1e-6)
+ ratio = (norm + 1e-6) / max_norm
step-stands: t never counts on
- t += tl.where(there, tl.where(go > 0.0, 1, 0), 0)
+ t += 0
skipped-counts: a skipped step counted
- tl.where(there, tl.where(go > 0.0, 1, 0), 0)
+ tl.where(there, 1, 0)
betas-swapped: corrections of each other's beta
- first_correction = (1.0 - _power(b1, t)).to(tl.float32)
+ first_correction = (1.0 - _power(b2, t)).to(tl.float32)
no-root: the second correction without its root
- tl.sqrt_rn(second_correction)
+ second_correction
exponent-short: powers by 2 bits of the exponent
- for _ in range(31):
+ for _ in range(2):
silent-fallback: the reference run in place of the kernel
- if way == "reference":
+ if True:
"""
)

OP = OpSpec(
    name="grad_norm",
    summary="Global gradient norm, clipping, step counts and bias corrections of many tensors, in one launch",
    variants=("clip", "skip", "count"),
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 3, "columns": 777},
        "wide": {"rows": 2, "columns": 5000},
        "whole blocks": {"rows": 2, "columns": 2560},
        "many": {"rows": 300, "columns": 3},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=_bytes,
    flops=lambda p, which: 2 * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    exact_slack=2.0**-20,
    laws=(Law("twice the gradients, twice the norm", _doubled), Law("any order of tensors", _turned, tolerance=1e-6)),
    scalars={"max_norm": 20.0},
    compiles=False,
    mutants=MUTANTS,
)
