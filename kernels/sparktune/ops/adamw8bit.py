r"""AdamW with 8-bit moments, every tensor of a model in one launch, and the gradients' global norm in one before it.

One step t of a tensor, in fp32, with g scaled by c = min(1, max_norm / (norm + 1e-6)) as torch's clip_grad_norm_ does:

    m = b1 m + (1 - b1) g                   v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(max(v, floor)) / sqrt(1 - b2^t) + eps)

p is rounded to its dtype once, at the end. Between steps m and v are 8-bit codes in blocks of 256 consecutive elements:
a block keeps its largest magnitude `absmax` in fp32 and, for each element, the code whose value in the dynamic map is
nearest to x = m / absmax. The map (`dynamic_map`) has seven decades 10^-6 to 1; decade i is cut into 2^i equal cells
(2^(i+1) for v, which has no sign), each stood for by its middle, besides 0 and 1. Two equally near codes: the even
one. A negative m never becomes 0, but the smallest negative code. Tensors under 4096 elements keep m and v in fp32.
All that is bitsandbytes' AdamW8bit, whose states load here and ours there.

**v == 0 while m is not** (the floor). In a block with an outlier every v under 1.6e-7 of the largest gets code 0, while
m, whose square root is not taken, is still there; if the next gradient is small, the denominator is eps alone and the
step a thousand times lr. bitsandbytes lets that happen. Here such an element's old v is taken, in the denominator
only, for the largest one that rounds to 0: floor = b2 `absmax` q / 2, q being the smallest code's value. What is stored
is not changed, so states stay bitsandbytes' own, and |update| stays under lr / sqrt(1 - b2), Adam's own bound.
(The zero point's harm: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", 2023.)

The code is found without a search: count cells along x and the count is the lowest of seven straight lines, one a
decade, since their slopes fall. 0.3 cells less than that, rounded down, is the code or the one below it, and one
comparison with the exact threshold between these two decides. A binary search would read the table eight times.

Not finite: with `skip_nonfinite` a step whose norm is not finite changes nothing, not even t; else NaN spreads as it
does in clip_grad_norm_. A block whose absmax is 0, infinite or NaN has codes of 0.

Bytes for an element: p read and written, g read (twice with a norm), 4 for the codes. Everything but lr stays on the
device, t too, so a step is captured by a CUDA graph and synchronises nothing. Partial sums of the norm are added in a
fixed order. Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; Dettmers, Lewis, Shleifer,
Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", 2022.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.dynamic_map import dequantize, quantize, tables
from sparktune.ops.flat import BLOCK, ROWS, Flat, Hyper, places, pointers
from sparktune.ops.grad_norm import clip_scale, prepare_
from sparktune.ops.numerics import cast
from sparktune.ops.spec import FLOATS, TRITON_TYPES, Input, Launch, Law, Mutant, OpSpec, Problem, Tensors


def reference(
    param: Tensor, grad: Tensor, state: tuple[Tensor, ...], step: int, hyper: Hyper, scale: Tensor | float = 1.0,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """One step of one tensor, the `step`th, in plain PyTorch: (new param, new state), nothing in place.

    `state` is (codes of m, codes of v, absmax of m, absmax of v) or, in full precision, (m, v). `scale` is what clipping
    multiplies the gradient by.
    """
    eight = len(state) == 4
    p, g = param.to(compute).reshape(-1), grad.to(compute).reshape(-1) * scale
    floor: Tensor | float = 0.0
    if eight:
        m = dequantize(state[0].reshape(-1), state[2].to(compute), True)
        v = dequantize(state[1].reshape(-1), state[3].to(compute), False)
        spread = state[3].to(compute).repeat_interleave(BLOCK)[: v.numel()]
        lost = hyper.beta2 * tables(p.device)[3][0].to(compute) * spread
        floor = torch.where(state[1].reshape(-1) == 0, lost, torch.zeros_like(lost))
    else:
        m, v = (s.to(compute).reshape(-1) for s in state)
    m = m * hyper.beta1 + g * (1 - hyper.beta1)
    v = v * hyper.beta2 + g * g * (1 - hyper.beta2)
    root = torch.where(v < floor, floor, v).sqrt() if eight else v.sqrt()
    update = m / (root / (1 - hyper.beta2**step) ** 0.5 + hyper.eps)
    p = p * (1 - hyper.lr * hyper.weight_decay) - update * (hyper.lr / (1 - hyper.beta1**step))
    if eight:
        (c1, a1), (c2, a2) = quantize(m, True), quantize(v, False)
        return p.to(param.dtype).reshape(param.shape), (c1, c2, a1, a2)
    return p.to(param.dtype).reshape(param.shape), (m, v)


@triton.jit
def _goes_on(clip_ptr, where_ptr, tensor):
    """Whether the step was not skipped, and the tensor has a gradient."""
    return (tl.load(clip_ptr + 2) > 0.0) & (tl.load(where_ptr + tensor * 4 + 1) != 0)


@triton.jit
def _stepped(p, m, root, corrections_ptr, tensor, lr, eps, weight_decay):
    """The new parameter; `root` is the square root of v."""
    first = tl.load(corrections_ptr + 2 * tensor)
    second = tl.load(corrections_ptr + 2 * tensor + 1)
    return p * (1.0 - lr * weight_decay) - (lr / first) * (m / (root / second + eps))


@triton.jit
def _absmax(x):
    """Largest magnitude of each row: compared as integers, which order like fp32 magnitudes, so that a NaN comes through."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _cells(x, threshold_ptr, SIGNED: tl.constexpr):
    """The magnitude's code of x in [0, 1]: x counted in cells, then one comparison."""
    count = tl.full(x.shape, 256.0, tl.float32)
    for decade in tl.static_range(7):
        if SIGNED:
            line = x * (10.0 ** (6 - decade) * 2.0**decade / 0.9) + 8.0 / 9.0 * 2.0**decade
        else:
            line = x * (10.0 ** (6 - decade) * 2.0 ** (decade + 1) / 0.9) + (8.0 / 9.0 * 2.0 ** (decade + 1) - 1.0)
        count = tl.minimum(count, line)
    code = (count - 0.3).to(tl.int32)
    return code + (x > tl.load(threshold_ptr + code)).to(tl.int32)


@triton.jit
def _scaled(x, absmax):
    """x / absmax, and 0 where that is NaN or infinite."""
    y = x / absmax
    return tl.where(tl.abs(y) <= 2.0, y, 0.0)


@triton.jit
def update8_kernel(
    where_ptr, tiles_ptr, like_ptr, c1_ptr, c2_ptr, a1_ptr, a2_ptr, map1_ptr, map2_ptr, threshold1_ptr, threshold2_ptr,
    clip_ptr, corrections_ptr, lr_ptr, lr, beta1, beta2, gain1, gain2, eps, weight_decay, first,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS blocks of one tensor: parameters, codes, scales. gain is 1 - beta; lr is the sum of both lr's."""
    tile = first + tl.program_id(0)
    tensor = tl.load(tiles_ptr + 2 * tile)
    if _goes_on(clip_ptr, where_ptr, tensor):
        at, mask = places(tiles_ptr, tile, tl.load(where_ptr + tensor * 4 + 2), WHOLE, ROWS, BLOCK)
        row = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64) + tl.arange(0, ROWS)[:, None]
        held = row * BLOCK < tl.load(where_ptr + tensor * 4 + 2)
        start = tl.multiple_of(tl.load(where_ptr + tensor * 4 + 3), BLOCK)
        p_ptrs = pointers(where_ptr, tensor, 0, like_ptr, at, WHOLE)
        g_ptrs = pointers(where_ptr, tensor, 1, like_ptr, at, WHOLE)
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32) * tl.load(clip_ptr + 1)
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
        c1 = tl.load(c1_ptr + start + at, mask=mask, other=127).to(tl.int32)
        c2 = tl.load(c2_ptr + start + at, mask=mask, other=0).to(tl.int32)
        a1 = tl.load(a1_ptr + start // BLOCK + row, mask=held, other=0.0)
        a2 = tl.load(a2_ptr + start // BLOCK + row, mask=held, other=0.0)
        m = tl.load(map1_ptr + c1) * a1 * beta1 + g * gain1
        v = tl.load(map2_ptr + c2) * a2 * beta2 + g * g * gain2
        m = tl.where(mask, m, 0.0)  # past the end the gradient is 0, or NaN when clipping made it so
        v = tl.where(mask, v, 0.0)
        floor = tl.where(c2 == 0, beta2 * tl.load(threshold2_ptr) * a2, 0.0)
        root = tl.sqrt(tl.where(v < floor, floor, v))
        rate = lr + tl.load(lr_ptr)
        p = _stepped(p, m, root, corrections_ptr, tensor, rate, eps, weight_decay)
        tl.store(p_ptrs, cast(p, like_ptr.dtype.element_ty), mask=mask)
        a1 = _absmax(m)
        a2 = _absmax(v)
        x = _scaled(m, a1)
        size = _cells(tl.abs(x), threshold1_ptr, True)
        size = tl.where(x < 0.0, -tl.minimum(tl.maximum(size, 1), 127), size)
        tl.store(c1_ptr + start + at, (127 + size).to(tl.uint8), mask=mask)
        tl.store(c2_ptr + start + at, _cells(_scaled(v, a2), threshold2_ptr, False).to(tl.uint8), mask=mask)
        tl.store(a1_ptr + start // BLOCK + row, a1, mask=held)
        tl.store(a2_ptr + start // BLOCK + row, a2, mask=held)


@triton.jit
def update32_kernel(
    where_ptr, tiles_ptr, like_ptr, m_ptr, v_ptr, clip_ptr, corrections_ptr, lr_ptr, lr, beta1, beta2, gain1, gain2,
    eps, weight_decay, first, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for tensors whose moments are fp32."""
    tile = first + tl.program_id(0)
    tensor = tl.load(tiles_ptr + 2 * tile)
    if _goes_on(clip_ptr, where_ptr, tensor):
        at, mask = places(tiles_ptr, tile, tl.load(where_ptr + tensor * 4 + 2), WHOLE, ROWS, BLOCK)
        start = tl.multiple_of(tl.load(where_ptr + tensor * 4 + 3), BLOCK)
        p_ptrs = pointers(where_ptr, tensor, 0, like_ptr, at, WHOLE)
        g_ptrs = pointers(where_ptr, tensor, 1, like_ptr, at, WHOLE)
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32) * tl.load(clip_ptr + 1)
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + start + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + start + at, mask=mask, other=0.0)
        m = beta1 * m + gain1 * g
        v = beta2 * v + gain2 * (g * g)
        rate = lr + tl.load(lr_ptr)
        p = _stepped(p, m, tl.sqrt(v), corrections_ptr, tensor, rate, eps, weight_decay)
        tl.store(p_ptrs, cast(p, like_ptr.dtype.element_ty), mask=mask)
        tl.store(m_ptr + start + at, m, mask=mask)
        tl.store(v_ptr + start + at, v, mask=mask)


@dataclass(frozen=True)
class Config:
    """How an update is launched: a program for each tile of 2048 elements, 16 a thread.

    On an H100 80% of copy bandwidth with fp32 parameters, against 65% at 8 warps.
    """

    num_warps: int = 4

    @classmethod
    def choose(cls, p: DeviceProperties) -> Config:
        """The same on every device: nothing but registers is held, and those fit."""
        return cls()


@torch.no_grad()
def adamw8bit_(
    flat: Flat, grads: Sequence[Tensor | None], hyper: Sequence[Hyper], max_norm: float = float("inf"),
    skip_nonfinite: bool = True,
) -> None:  # fmt: skip
    """One step of every tensor of `flat` that has a gradient, in place, by its group's `hyper`.

    `flat.norm` then holds the gradients' global norm (0 when neither clipping nor skipping asks for it). Errors:
    ValueError for gradients that don't fit their parameters, or several devices.
    """
    prepare_(flat, grads, hyper, max_norm, skip_nonfinite)
    way = dispatch.route("adamw8bit", flat.clip, *flat.params, *(h.lr for h in hyper if isinstance(h.lr, Tensor)))
    if way == "reference":
        _plain(flat, grads, hyper)
    else:
        _launch(flat, hyper)
        torch.autograd.graph.increment_version(flat.params)  # so that autograd notices that they changed
    dispatch.record("adamw8bit", way)


def _launch(flat: Flat, hyper: Sequence[Hyper]) -> None:
    """One launch for each dtype, parameter group and kind of state."""
    c = Config.choose(DeviceProperties.of(flat.device))
    for r in flat.runs:
        h = hyper[r.group]
        lr, rate = (h.lr, 0.0) if isinstance(h.lr, Tensor) else (flat.zero, h.lr)
        eight = (flat.codes1, flat.codes2, flat.absmax1, flat.absmax2, *tables(flat.device))
        kernel, buffers = (update8_kernel, eight) if r.bits == 8 else (update32_kernel, (flat.full1, flat.full2))
        dispatch.launch(
            kernel, r.tiles, flat.clip, flat.where, flat.tiles, r.like, *buffers, flat.clip, flat.corrections, lr, rate,
            h.beta1, h.beta2, 1 - h.beta1, 1 - h.beta2, h.eps, h.weight_decay, r.first,
            WHOLE=r.whole, ROWS=ROWS, BLOCK=BLOCK, num_warps=c.num_warps,
        )  # fmt: skip


def _plain(flat: Flat, grads: Sequence[Tensor | None], hyper: Sequence[Hyper]) -> None:
    """The update in plain PyTorch, for a CPU without the interpreter."""
    if not bool(flat.clip[2] > 0):
        return
    for i, (p, g) in enumerate(zip(flat.params, grads, strict=True)):
        if g is not None:
            state = flat.state(i)
            new, moments = reference(p, g, state, int(flat.steps[i]), hyper[flat.groups[i]], flat.clip[1])
            p.copy_(new)
            for old, moment in zip(state, moments, strict=True):
                old.copy_(moment.reshape(old.shape))


def _inputs(p: Problem) -> dict[str, Input]:
    rows, n = p.dims["rows"], p.dims["columns"]
    blocks = -(-n // BLOCK)

    def codes(g: torch.Generator) -> Tensor:
        c = torch.randint(0, 255, (rows, n), dtype=torch.uint8, generator=g)
        return torch.where(torch.rand((rows, n), generator=g) < 0.1, 0, c).to(torch.uint8)

    found = {
        "param": Input((rows, n), p.dtype),
        "grad": Input((rows, n), p.dtype),
        "steps": Input((rows,), torch.int32, "constant", layouts=False, make=lambda g: torch.arange(rows) % 5),
    }
    if p.variant == "full":
        m = Input((rows, n), torch.float32, "parameter", spread=0.3)
        return found | {"m": m, "v": replace(m, centre=0.5, spread=0.05)}
    code = Input((rows, n), torch.uint8, "constant", layouts=False, make=codes)
    scale = Input((rows, blocks), torch.float32, "parameter", centre=0.5, spread=0.05)
    return found | {"codes1": code, "codes2": code, "absmax1": scale, "absmax2": scale}


def _moments(p: Problem) -> tuple[str, ...]:
    return ("m", "v") if p.variant == "full" else ("codes1", "codes2", "absmax1", "absmax2")


def _arguments(p: Problem) -> tuple[Hyper, float, bool]:
    s = p.scalars
    hyper = Hyper(s["lr"], s["beta1"], s["beta2"], s["eps"], s["weight_decay"])
    return hyper, float("inf") if p.variant == "plain" else s["max_norm"], p.variant == "full"


def _flat(t: Tensors, p: Problem) -> Flat:
    params = [row.clone(memory_format=torch.contiguous_format) for row in t["param"]]
    flat = Flat(params, [0] * len(params), [32 if p.variant == "full" else 8] * len(params))
    flat.steps.copy_(t["steps"])
    for i in range(len(params)):
        for view, name in zip(flat.state(i), _moments(p), strict=True):
            view.copy_(t[name][i])
    return flat


def _call(t: Tensors, p: Problem) -> Tensors:
    hyper, max_norm, skip = _arguments(p)
    names = _moments(p)
    if not t["param"].shape[0]:
        dispatch.record("adamw8bit", dispatch.route("adamw8bit", t["param"]))
        return {k: t[k].clone() for k in ("param", "steps", *names)}
    flat = _flat(t, p)
    adamw8bit_(flat, list(t["grad"]), [hyper], max_norm, skip)
    states = [flat.state(i) for i in range(len(flat.params))]
    out = {"param": torch.stack(flat.params), "steps": flat.steps.clone()}
    return out | {k: torch.stack([s[i] for s in states]) for i, k in enumerate(names)}


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensors:
    hyper, max_norm, skip = _arguments(p)
    names = _moments(p)
    norm = t["grad"].to(compute or torch.float32).norm()
    if not t["param"].shape[0] or (skip and not bool(norm.isfinite())):
        return {k: t[k].clone() for k in ("param", "steps", *names)}
    scale = clip_scale(norm, max_norm)
    rows = []
    for i, step in enumerate(t["steps"].tolist()):
        state = tuple(t[k][i] for k in names)
        rows.append(reference(t["param"][i], t["grad"][i], state, step + 1, hyper, scale, compute or torch.float32))
    out = {"param": torch.stack([r[0] for r in rows]), "steps": t["steps"] + 1}
    return out | {k: torch.stack([r[1][i].reshape(t[k][0].shape) for r in rows]) for i, k in enumerate(names)}


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensors, Tensors]:
    """Lowest and highest parameter, rounded once, when decay and update are each right to a relative `slack`."""
    wide = {k: x.double() if x.is_floating_point() else x for k, x in t.items()}
    new = _reference(wide, p, torch.float64)["param"]
    kept = wide["param"] * (1 - p.scalars["lr"] * p.scalars["weight_decay"])
    off = (slack * (kept.abs() + (new - kept).abs())).nan_to_num(posinf=0.0)
    low, high = ((new + sign * off).float().to(p.dtype) for sign in (-1, 1))
    return {"param": low}, {"param": high}


def _mirrored(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    """Parameter, gradient and m of the other sign give the other sign, bit for bit."""
    m = {"m": -t["m"]} if p.variant == "full" else {"codes1": 254 - t["codes1"]}
    return -call(t, p), call({**t, "param": -t["param"], "grad": -t["grad"]} | m, p)


def _clipped(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    """A gradient over max_norm, made four times as large, is cut down to the same."""
    return (call(t, p), call({**t, "grad": t["grad"] * 4}, p)) if p.variant != "plain" else None


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    state = 16 if p.variant == "full" else 4
    return p.dims["rows"] * p.dims["columns"] * ((3 if p.variant == "plain" else 4) * p.dtype.itemsize + state)


def _launches(p: DeviceProperties) -> list[Launch]:
    floats = ("clip_ptr", "corrections_ptr", "lr_ptr")
    maps = ("a1_ptr", "a2_ptr", "map1_ptr", "map2_ptr", "threshold1_ptr", "threshold2_ptr")
    moments = {
        8: dict.fromkeys(("c1_ptr", "c2_ptr"), "*u8") | dict.fromkeys(maps, "*fp32"),
        32: dict.fromkeys(("m_ptr", "v_ptr"), "*fp32"),
    }
    scalars = ("lr", "beta1", "beta2", "gain1", "gain2", "eps", "weight_decay")
    found = []
    for bits, dtype, whole in itertools.product((8, 32), FLOATS, (True, False)):
        flags = {"WHOLE": whole, "ROWS": ROWS, "BLOCK": BLOCK}
        args = {"where_ptr": "*i64", "tiles_ptr": "*i32", "like_ptr": f"*{TRITON_TYPES[dtype]}", "first": "i32"}
        args |= moments[bits] | dict.fromkeys(floats, "*fp32") | dict.fromkeys(scalars, "fp32")
        args |= dict.fromkeys(flags, "constexpr")
        when, warps = "whole blocks" if whole else "any size", Config.choose(p).num_warps
        found.append(Launch(when, f"update{bits}_kernel", args, flags, warps, 3, TRITON_TYPES[dtype]))
    return found


MUTANTS = Mutant.table(
    """no-correction: m's bias correction left out
- (lr / first) * (m
+ lr * (m
corrections-swapped: bias corrections of each other's moment
- first = tl.load(corrections_ptr + 2 * tensor)
+ first = tl.load(corrections_ptr + 2 * tensor + 1)
decay-coupled: weight decay with the gradient's step, through the denominator
- return p * (1.0 - lr * weight_decay) - (lr / first) * (m / (root / second + eps))
+ return p - (lr / first) * ((m + weight_decay * p) / (root / second + eps))
decay-without-lr: weight decay not multiplied by the learning rate
- p * (1.0 - lr * weight_decay) -
+ p * (1.0 - weight_decay) -
eps-in-root: eps under the root
- return p * (1.0 - lr * weight_decay) - (lr / first) * (m / (root / second + eps))
+ return p * (1.0 - lr * weight_decay) - (lr / first) * (m / tl.sqrt(root / second * (root / second) + eps))
eps-uncorrected: eps within v's bias correction
- (m / (root / second + eps))
+ (m / ((root + eps) / second))
betas-swapped: v kept by m's beta
- v = tl.load(map2_ptr + c2) * a2 * beta2 + g * g * gain2
+ v = tl.load(map2_ptr + c2) * a2 * beta1 + g * g * gain1
unclipped: 8-bit moments of gradients that were not clipped
- m = tl.load(map1_ptr + c1) * a1 * beta1 + g * gain1
+ m = tl.load(map1_ptr + c1) * a1 * beta1 + tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32) * gain1
clip-unsquared: clipping forgotten in one factor of v's square
- v = tl.load(map2_ptr + c2) * a2 * beta2 + g * g * gain2
+ v = tl.load(map2_ptr + c2) * a2 * beta2 + g * tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32) * gain2
no-floor: v of code 0 taken for 0
- root = tl.sqrt(tl.where(v < floor, floor, v))
+ root = tl.sqrt(v)
floor-everywhere: small codes of v held to the floor of code 0
- floor = tl.where(c2 == 0, beta2 *
+ floor = tl.where(c2 < 200, 1000.0 *
floor-stored: the floor kept as the new v
- floor = tl.where(c2 == 0, beta2 * tl.load(threshold2_ptr) * a2, 0.0)
+ floor = tl.where(c2 == 0, beta2 * tl.load(threshold2_ptr) * a2, 0.0)
+         v = tl.maximum(v, floor)
old-absmax: codes made with the absmax of before
- x = _scaled(m, a1)
+ x = _scaled(m, tl.load(a1_ptr + start // BLOCK + row, mask=held, other=1.0))
absmax-signed: absmax of m without its magnitude
- a1 = _absmax(m)
+ a1 = _absmax(tl.maximum(m, 0.0))
absmax-unstored: v's new absmax never stored
- tl.store(a2_ptr + start // BLOCK + row, a2, mask=held)
+ tl.store(a2_ptr + start // BLOCK + row, a2, mask=held & (a2 < 0.0))
code-below: codes rounded down, without the comparison
- return code + (x > tl.load(threshold_ptr + code)).to(tl.int32)
+ return code
code-above: codes one too high
- return code + (x > tl.load(threshold_ptr + code)).to(tl.int32)
+ return code + 1
sign-lost: m's codes without their sign
- size = tl.where(x < 0.0, -tl.minimum(tl.maximum(size, 1), 127), size)
+ size = tl.minimum(size, 127)
decade-short: the lowest decade left out
- for decade in tl.static_range(7):
+ for decade in tl.static_range(1, 7):
neighbour-scale: m's scale of the block before
- a1 = tl.load(a1_ptr + start // BLOCK + row, mask=held, other=0.0)
+ a1 = tl.load(a1_ptr + start // BLOCK + tl.maximum(row - 1, 0), mask=held, other=0.0)
padding-counted: what lies past the end counted into the last block's absmax
- m = tl.where(mask, m, 0.0)
+ m = tl.where(mask, m, 9.0)
full-betas: fp32 moments kept by each other's beta
- m = beta1 * m + gain1 * g
+ m = beta2 * m + gain2 * g
goes-on: a step that was skipped made all the same
- return (tl.load(clip_ptr + 2) > 0.0) & (tl.load(where_ptr + tensor * 4 + 1) != 0)
+ return tl.load(where_ptr + tensor * 4 + 1) != 0
"""
)

OP = OpSpec(
    name="adamw8bit",
    summary="AdamW with bitsandbytes' 8-bit moments, clipped by the global norm, all tensors in one launch",
    variants=("clip", "plain", "full"),
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 3, "columns": 777},
        "wide": {"rows": 2, "columns": 5000},
        "whole blocks": {"rows": 2, "columns": 2560},
        "one": {"rows": 1, "columns": 1},
        "no rows": {"rows": 0, "columns": 64},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=_launches,
    bytes_moved=_bytes,
    flops=lambda p, which: 60 * p.dims["rows"] * p.dims["columns"],
    exact=_exact,
    exact_slack=2.0**-20,
    laws=(Law("the other sign, the other sign", _mirrored), Law("clipped to the same", _clipped, tolerance=1e-5)),
    scalars={"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-2, "weight_decay": 0.1, "max_norm": 1.0},
    integer_slack={"codes1": 1e-3, "codes2": 1e-3},
    compiles=False,
    mutants=MUTANTS,
)
