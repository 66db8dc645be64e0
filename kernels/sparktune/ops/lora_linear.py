r"""A linear layer with LoRA inside its matrix product.

    y  = x W^T + s x' A^T B^T + bias              x' = x, or x with dropout on the branch's input
    dx = dy W + s (dy B) A                        the second term under x's mask, where there is dropout
    dA = s (dy B)^T x',   dB = s dy^T (x' A^T),   dbias = sum of dy over rows

One buffer P [N + R, K + R] holds all that both passes multiply by: W in its corner, s B in the columns beside it, A in
the rows below:

    P = | W  sB |        y  = [x | x' A^T] P[:N]^T           K + R deep in place of K: one GEMM, nothing added after it
        | A   0 |        dx = [dy | s dy B] P[:, :K]

R is the sum of the ranks, and one more for a bias, whose column meets a column of ones; rounded up to a multiple of 16,
so that rows stay aligned to 32 bytes. On an H100 16 more columns cost a gate projection 0.018 ms of 0.68, and the same
LoRA as separate products 0.172 (4096 tokens).

The row [x | x' A^T] wants x in a buffer with room. Producers with `room=` give it (rms_norm, swiglu); then `tail_free`
lets this op write the R columns right of x. Elsewhere the cheaper of two ways, in bytes: where K < N x is copied into a
buffer of its own, 4 M K bytes; else the low-rank product is written first, and the GEMM adds onto it, 4 M N. For dx the
same choice between dy and dx.

Several layers of one x are one layer here, with their W stacked: each B stands in columns of its own, zero elsewhere
(`lora_qkv`, `lora_mlp`).

Rounding: W, x' A^T, s B, s dy B and results in x's dtype, sums in fp32 inside every product. PEFT rounds base and branch
apart and adds them. Gradients of A, B and bias are summed in fp32 and rounded once to their own dtype.

Shapes: x [..., K]; W [N, K] dense or in 4 bits; A [r, K], B [N, r], any rank, fp32, bf16 or fp16, cast to x's dtype.
The buffer is scratch: made again in the backward, since to keep it would cost 2 bytes a weight. Saved: x, x' A^T.

Dropout's mask is a hash of a seed, the row and the column, and so needs no memory and is the same in a recompute.

Source: Hu et al., "LoRA", 2021; Dettmers et al., "QLoRA", 2023; Kalajdzievski, "rsLoRA", 2023, for s = alpha / sqrt(r).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.dropout import draw, drop_kernel, drop_launches, dropped, under
from sparktune.ops.fused import Fused
from sparktune.ops.lora_packed import (
    Stack,
    adapter_kernel,
    adapter_launches,
    factor_gradients,
    flatten,
    forward_layers,
    input_gradient,
    matrix,
    unflatten,
)  # fmt: skip
from sparktune.ops.spec import FLOATS, Input, Law, Mutant, OpSpec, Problem, Tensors
from sparktune.ops.weights import Weight

KERNELS = (adapter_kernel, drop_kernel)  # what `launches` names


def reference(
    x: Tensor, weight: list[Tensor | None], layout: list[int], a: Tensor | None, b: Tensor | None, bias: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float, tail_free: bool,
) -> Tensor:  # fmt: skip
    """Plain PyTorch as PEFT computes it: base and branch apart, each rounded, then added."""
    w = unflatten(weight, layout)[0].reference(x.dtype)
    return branch(x, w, a, b, bias, seed, scale, dropout)


def branch(
    x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None, seed: Tensor | None, scale: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """One layer with its LoRA branch in plain PyTorch; `w` is dense, in x's dtype."""
    linear = torch.nn.functional.linear
    y = linear(x, w, None if bias is None else bias.to(x.dtype))
    if a is None or b is None:
        return y
    return y + linear(linear(dropped(x, seed, dropout), a.to(x.dtype)), b.to(x.dtype)) * scale


def _forward(
    x: Tensor, weight: list[Tensor | None], layout: list[int], a: Tensor | None, b: Tensor | None, bias: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float, tail_free: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, x' A^T)."""
    stack, flat = _stack(weight, layout, a, bias), matrix(x)
    y, tail = forward_layers(stack, flat, [a], [b], [bias], [scale], under(flat, seed, dropout), tail_free)
    return y.view(*x.shape[:-1], stack.n), tail


def _backward(
    dy: Tensor, x: Tensor, weight: list[Tensor | None], layout: list[int], a: Tensor | None, b: Tensor | None,
    bias: Tensor | None, seed: Tensor | None, tail: Tensor, scale: float, dropout: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, da, db, dbias)."""
    stack, dy = _stack(weight, layout, a, bias), matrix(dy)
    dx, dtail = input_gradient(stack, dy, [a], [b], [bias], [scale], seed, dropout, needs[0], needs[1])
    flat = matrix(x)
    flat = under(flat, seed, dropout) if needs[1] else flat
    da, db, dbias = factor_gradients(stack, dy, flat, tail, dtail, [a], [b], [bias], [scale], needs[1:])
    return dx.view(x.shape) if needs[0] else dx, da, db, dbias


def _stack(weight: list[Tensor | None], layout: list[int], a: Tensor | None, bias: Tensor | None) -> Stack:
    return Stack(tuple(unflatten(weight, layout)), (0 if a is None else a.shape[0],), bias is not None)


_OP = Fused(
    "lora_linear", _forward, _backward, reference=reference, grads=("x", "a", "b", "bias"),
    save=lambda args, results: (*args[:7], results[1], args[7], args[8]),
)  # fmt: skip


def check(op: str, x: Tensor, weight: Weight, a: Tensor | None, b: Tensor | None, bias: Tensor | None) -> None:
    """Raise a ValueError for shapes and dtypes that don't fit one layer."""
    n, k = weight.shape
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be fp32, bf16 or fp16, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{op}: x must be [..., {k}] for a weight of {[n, k]}, got {list(x.shape)}")
    if (a is None) != (b is None):
        raise ValueError(f"{op}: LoRA needs both A and B, or neither")
    if a is not None and b is not None and (a.shape != (b.shape[1], k) or b.shape[0] != n):
        raise ValueError(f"{op}: A must be [r, {k}] and B [{n}, r], got {list(a.shape)} and {list(b.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{op}: bias must be [{n}], got {list(bias.shape)}")
    for t in (a, b, bias):
        if t is not None and t.dtype not in FLOATS:
            raise ValueError(f"{op}: A, B and bias must be fp32, bf16 or fp16, got {t.dtype}")
    if weight.data.requires_grad:
        raise ValueError(f"{op}: the base weight is frozen here and gets no gradient; detach it")


def lora_linear(
    x: Tensor, weight: Weight, a: Tensor | None = None, b: Tensor | None = None, *, scale: float = 1.0,
    bias: Tensor | None = None, dropout: float = 0.0, tail_free: bool = False, dora_magnitude: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + scale dropout(x) A^T B^T + bias: x [..., K], W [N, K] -> [..., N] in x's dtype, or autocast's.

    A [r, K] and B [N, r], or neither; `scale` is alpha / r, or alpha / sqrt(r) for rsLoRA. Differentiable once, in x, A,
    B and bias; W is frozen. `dropout`: probability, of the branch's input. `tail_free`: x is a view into a buffer
    with room to its right, which may be written. Errors: ValueError for shapes or dtypes that don't fit, a dropout
    outside [0, 1), a weight that wants a gradient; NotImplementedError for DoRA.
    """
    if dora_magnitude is not None:
        raise NotImplementedError("lora_linear: DoRA is not supported: its norm needs W + s B A; use peft's own layer")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: dropout must be in [0, 1), got {dropout}")
    check("lora_linear", x, weight, a, b, bias)
    x = x.to(dispatch.autocast_dtype(x) or x.dtype)
    seed = draw(x, dropout) if a is not None else None
    tensors, layout = flatten([weight])
    y: Tensor = _OP(x, tensors, layout, a, b, bias, seed, scale, dropout, tail_free)
    return y


VARIANTS = ("nf4", "dense bias", "dropout", "room", "base")


def weight_inputs(name: str, n: int, k: int, dtype: torch.dtype, quantized: bool) -> dict[str, Input]:
    """A judged weight [n, k]: codes and scales, or a matrix, of entries around 1 / sqrt(k)."""
    spread = 1 / max(1, k) ** 0.5
    if not quantized:
        return {name: Input((n, k), dtype, "parameter", spread=spread)}
    half = (n * k + 1) // 2

    def codes(g: torch.Generator) -> Tensor:
        return torch.randint(0, 256, (half,), dtype=torch.uint8, generator=g)

    scales = Input((-(-n * k // 64),), torch.float32, "parameter", centre=2 * spread, spread=0.1 * spread)
    return {name: Input((half,), torch.uint8, "constant", make=codes), f"{name}_absmax": scales}


def judged_weight(t: Tensors, name: str, n: int, k: int) -> Weight:
    """The weight of `weight_inputs`."""
    if f"{name}_absmax" in t:
        return Weight(t[name], (n, k), t[f"{name}_absmax"].detach().float(), None, 64, "nf4")
    return Weight(t[name].detach(), (n, k))


def lora_inputs(n: int, k: int, rank: int, dtype: torch.dtype, suffix: str = "") -> dict[str, Input]:
    """A and B in fp32, as PEFT keeps them, of entries that make the branch as large as the base."""
    a = Input((rank, k), torch.float32, "parameter", grad=True, spread=1 / max(1, k) ** 0.5)
    b = Input((n, rank), torch.float32, "parameter", grad=True, spread=1 / max(1, rank) ** 0.5)
    return {f"a{suffix}": a, f"b{suffix}": b}


def _inputs(p: Problem) -> dict[str, Input]:
    m, n, k, r = (p.dims[d] for d in ("rows", "n", "k", "rank"))
    found = {"x": Input((m, k), p.dtype, grad=True)} | weight_inputs("w", n, k, p.dtype, p.variant in ("nf4", "base"))
    if p.variant != "base":
        found |= lora_inputs(n, k, r, p.dtype)
    if "bias" in p.variant:
        found["bias"] = Input((n,), torch.float32, "parameter", grad=True)
    return found


def _arguments(t: Tensors, p: Problem) -> tuple[Any, ...]:
    weight = judged_weight(t, "w", p.dims["n"], p.dims["k"])
    seed = torch.full((1,), 1234, device=t["x"].device) if p.variant == "dropout" else None
    dropout = 0.3 if p.variant == "dropout" else 0.0
    return weight, t.get("a"), t.get("b"), t.get("bias"), seed, 1.5, dropout


def _call(t: Tensors, p: Problem) -> Tensor:
    weight, a, b, bias, seed, scale, dropout = _arguments(t, p)
    if "dense" in p.variant:  # what lies beside x must stay as it is
        k = t["x"].shape[1]
        buffer = torch.nn.functional.pad(t["x"], (0, 40), value=3.0)
        y = lora_linear(buffer[:, :k], weight, a, b, scale=scale, bias=bias)
        return torch.where((buffer[:, k:] == 3.0).all(), y, float("nan"))
    if seed is None and p.variant != "room":
        return lora_linear(t["x"], weight, a, b, scale=scale, bias=bias)
    x, room = t["x"], p.variant == "room"
    x = x.to(dispatch.autocast_dtype(x) or x.dtype)
    if room:  # beside x lies what only `tail_free` may write
        x = torch.nn.functional.pad(x, (0, 16 + x.shape[1] % 2))[:, : x.shape[1]]
    tensors, layout = flatten([weight])
    found: Tensor = _OP(x, tensors, layout, a, b, bias, seed, scale, dropout, room)
    return found


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensor:
    weight, a, b, bias, seed, scale, dropout = _arguments(t, p)
    w = weight.reference(p.dtype).to(compute or p.dtype)  # rounded to the dtype of the problem for the oracle too
    return branch(t["x"], w, a, b, bias, seed, scale, dropout)


def _linear_in_x(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    return None if "bias" in p.variant else (call(t, p) * 2, call({**t, "x": t["x"] * 2}, p))


def _without_b(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    if "b" not in t:
        return None
    base = {k: v for k, v in t.items() if k not in ("a", "b")}
    return call({**t, "b": torch.zeros_like(t["b"])}, p), call(base, p)


def _flops(p: Problem, which: Literal["forward", "backward"]) -> int:
    m, n, k, r = (p.dims[d] for d in ("rows", "n", "k", "rank"))
    skinny = 2 * m * r * (n + k)
    return 2 * m * n * k + skinny * (1 if which == "forward" else 2)


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    m, n, k = (p.dims[d] for d in ("rows", "n", "k"))
    return (m * k + m * n + n * k) * p.dtype.itemsize + n * k // 2


MUTANTS = Mutant.table(
    """no-scale @lora_packed: s left out of the buffer
- other=0.0).to(tl.float32) * scale
+ other=0.0).to(tl.float32)
db-no-scale @lora_packed: s left out of B's gradient
- scale = self._scales[i]
+ scale = 1.0
scale-twice @lora_packed: s in A's gradient twice
- self._every = _plus(self._every, summed(dtail, branch_input))
+ self._every = _plus(self._every, summed(dtail, branch_input).mul_(self._scales[0]))
a-transposed-slot @lora_packed: A one row too far down
- + below + (lane[:, None] * width
+ + below + (((lane + 1) % r)[:, None] * width
no-branch-in-dx @lora_packed: dx of the base alone
- return torch.mm(tail, p[n:, :k], out=into).addmm_(dy, p[:n, :k]), tail
+ return torch.mm(tail, p[n:, :k], out=into).mul_(0).addmm_(dy, p[:n, :k]), tail
no-branch-in-dx-copied @lora_packed: dx of the base alone where dy is copied
- return torch.mm(row, p[:, :k], out=into), row[:, n:]
+ return row[:, :n] @ p[:n, :k], row[:, n:]
bias-everywhere @lora_packed: the column of ones left out
- row[:, k + one] = 1.0
+ row[:, k + one] = 0.0
bias-in-dx @lora_packed: the bias's row below the weight not cleared
- (lane >= slot) & (lane < last))[:, None]
+ (lane >= slot) & (lane < slot + rank))[:, None]
padding-dirty @lora_packed: columns beside B not cleared
- mask=here & (lane < r)[None, :])
+ mask=here & mine[None, :])
mask-of-another-row @dropout: dropout by column alone
- _mix((row + seed).to(tl.uint32))
+ _mix((row * 0 + seed).to(tl.uint32))
dropout-unscaled @dropout: kept elements not scaled up
- tl.math.div_rn(x, factor)
+ x
dropout-on-base @lora_packed: dropout applied to the base layer too
- return forward_packed(x, p, stack.n,
+ return forward_packed(branch_input, p, stack.n,
dx-unmasked @lora_packed: the branch's part of dx not masked
- return drop(tail @ p[n:, :k], seed, dropout, onto=dy @ p[:n, :k]), tail
+ return (tail @ p[n:, :k]).addmm_(dy, p[:n, :k]), tail
da-undropped: A's gradient from the input before dropout
- flat = under(flat, seed, dropout) if needs[1] else flat
+ flat = flat
room-without-leave @lora_packed: columns beside x written though nobody allowed it
- row = with_room(x, r) if tail_free else None
+ row = with_room(x, r)
ranks-reversed @lora_packed: B's gradient with its ranks in reverse
- summed(dy[:, rows], tail[:, slot])
+ summed(dy[:, rows], tail[:, slot].flip(1))
dbias-mean @lora_packed: bias gradient averaged over rows
- dy[:, rows].sum(0, dtype=torch.float32)
+ dy[:, rows].float().mean(0)
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(x, tensors, layout, a, b, bias, seed, scale, dropout, tail_free)
+ y: Tensor = reference(x, tensors, layout, a, b, bias, seed, scale, dropout, tail_free)
"""
)

OP = OpSpec(
    name="lora_linear",
    summary="A linear layer, dense or 4-bit, with LoRA, bias and dropout inside its matrix product",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 6, "n": 48, "k": 64, "rank": 5},
        "wide": {"rows": 3, "n": 130, "k": 36, "rank": 17},
        "prime": {"rows": 7, "n": 37, "k": 41, "rank": 1},
        "rank 300": {"rows": 4, "n": 32, "k": 48, "rank": 300},
        "no rows": {"rows": 0, "n": 32, "k": 64, "rank": 4},
        "speed": {"rows": 4096, "n": 4096, "k": 4096, "rank": 16},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=lambda p: adapter_launches() + drop_launches(),
    bytes_moved=_bytes,
    flops=_flops,
    bound="matrix",
    nonfinite_kinds=False,  # Inf in x A^T meets the zeros that pad the rank
    laws=(
        Law("y(2x) = 2 y(x)", _linear_in_x),
        Law("with B = 0 the branch is not there", _without_b, tolerance=2e-2),
    ),
    mutants=MUTANTS,
)
