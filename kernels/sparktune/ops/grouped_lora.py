r"""Linear layers of a mixture of experts, with LoRA inside their matrix product.

For the rows of expert e, offsets[e] <= i < offsets[e + 1], with s = `scale`:

    t_i = round(s x_i A_e^T)                       y_i = x_i W_e^T + t_i B_e^T + bias_e
    u_i = round(s dy_i B_e)                        dx_i = dy_i W_e + u_i A_e
    dA_e = sum of u_i^T x_i    dB_e = sum of dy_i^T t_i    dW_e = sum of dy_i^T x_i    dbias_e = sum of dy_i

t and u are skinny products of their own (R columns), made first; t B^T and u A are one more step in the accumulator of the
big ones. The scale stands in t and u alone, and so is right in every gradient without being named again.

`rows` reads x through the routing: sorted row i is then row rows[i] of x [S, K], which has one row a token. x stays as
small as it was, and in L2 where it fits, in place of top_k copies written and read again. dx comes back to tokens through
`positions`, its inverse: the sum over a token's rows in order, in fp32, rounded twice (once as a sorted row).

Rounding: W, A, B, t, u and results in x's dtype, sums in fp32 in every product. PEFT rounds base and branch apart and adds
them. Gradients of A, B, W and bias are summed in fp32 and rounded once to their own dtype. No atomics: the same bits twice.

Shapes: x [M, K], sorted by expert, or [S, K] with rows [M] and positions [S, top_k] int32; W [E, N, K], of which a
transposed view does as well; offsets [E + 1] int32, rising from 0; A [E, R, K], B [E, N, R], bias [E, N]. y [M, N]. An expert
may have no rows, or all. Rows from offsets[E] on belong to nobody: zero in y and dx. 4-bit experts are dequantised before.
Saved: x, W, A, B, t.

Source: Hu et al., "LoRA", 2021; Gale et al., "MegaBlocks", 2022.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.fused import Fused
from sparktune.ops.grouped_gemm import grouped, grouped_kernel, launches, outer, outer_kernel
from sparktune.ops.moe_rows import collect
from sparktune.ops.spec import FLOATS, Input, Law, Mutant, OpSpec, Problem, Tensors

KERNELS = (grouped_kernel, outer_kernel)  # what `launches` names


def reference(
    x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None,
    rows: Tensor | None, positions: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Plain PyTorch: one expert after the other, base and branch apart as PEFT has them."""
    linear = torch.nn.functional.linear
    x = x if rows is None else x[rows.long()]
    ends, parts = offsets.tolist(), []
    for e in range(weight.shape[0]):
        part = x[ends[e] : ends[e + 1]]
        y = linear(part, weight[e].to(x.dtype), None if bias is None else bias[e].to(x.dtype))
        if a is not None and b is not None:
            y = y + linear(linear(part, a[e].to(x.dtype)), b[e].to(x.dtype)) * scale
        parts.append(y)
    nobody = torch.zeros((x.shape[0] - ends[-1], weight.shape[1]), dtype=parts[0].dtype, device=x.device)
    return torch.cat((*parts, nobody))


def _forward(
    x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None,
    rows: Tensor | None, positions: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, t)."""
    d, offsets, rows = x.dtype, offsets.contiguous(), None if rows is None else rows.contiguous()
    t = torch.empty(0, dtype=d, device=x.device)
    if a is None or b is None:
        return grouped(x, weight.to(d), offsets, rows, bias=_flat(bias)), t
    t = grouped(x, a.to(d), offsets, rows, scale)
    return grouped(x, weight.to(d), offsets, rows, t=t, b=b.to(d), bias=_flat(bias)), t


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None,
    rows: Tensor | None, positions: Tensor | None, t: Tensor, scale: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, da, db, dbias)."""
    d, experts, offsets = x.dtype, weight.shape[0], offsets.contiguous()
    rows = None if rows is None else rows.contiguous()
    dx, dw, da, db, dbias = (torch.empty(0, device=x.device) for _ in needs)
    u = lora_a = None
    if a is not None and b is not None and (needs[0] or needs[2]):
        u = grouped(dy, b.to(d).transpose(1, 2), offsets, scale=scale)
        lora_a = a.to(d).transpose(1, 2)
    if needs[0]:
        dx = grouped(dy, weight.to(d).transpose(1, 2), offsets, t=u, b=lora_a)
        dx = dx if positions is None else collect(dx, positions.contiguous())
    if needs[1]:
        dw = outer(dy, x, offsets, experts, weight.dtype, rows)
    if needs[2] and u is not None and a is not None:
        da = outer(u, x, offsets, experts, a.dtype, rows)
    if needs[3] and b is not None:
        db = outer(dy, t, offsets, experts, b.dtype)
    if needs[4] and bias is not None:
        ones = torch.ones((dy.shape[0], 1), dtype=d, device=x.device)
        dbias = outer(ones, dy, offsets, experts, bias.dtype).view(bias.shape)
    return dx, dw, da, db, dbias


_OP = Fused(
    "grouped_lora", _forward, _backward, reference=reference, grads=("x", "weight", "a", "b", "bias"),
    save=lambda args, results: (*args[:8], results[1], args[8]),
)  # fmt: skip


def grouped_lora(
    x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, scale: float = 1.0,
    bias: Tensor | None = None, rows: Tensor | None = None, positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each expert's layer for its own rows: x [M, K] sorted, W [E, N, K], offsets [E + 1] -> [M, N], in x's dtype or autocast's.

    A [E, R, K] and B [E, N, R], or neither. `rows` [M] and `positions` [S, top_k], or neither, as `moe_route` gives them: x
    is then [S, K], not sorted. Differentiable once, in x, W, A, B and bias, of which those that ask get a gradient.
    Errors: ValueError for shapes and dtypes that don't fit. What offsets and rows hold is not looked at.
    """
    _check(x, weight, offsets, a, b, bias, rows, positions)
    x = x.to(dispatch.autocast_dtype(x) or x.dtype)
    y: Tensor = _OP(x, weight, offsets, a, b, bias, rows, positions, float(scale))
    return y


def _check(
    x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None,
    rows: Tensor | None, positions: Tensor | None,
) -> None:  # fmt: skip
    if weight.dim() != 3 or not all(weight.shape):
        raise ValueError(f"grouped_lora: W must be [E, N, K], got {list(weight.shape)}")
    e, n, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"grouped_lora: x must be [M, {k}] for W {[e, n, k]}, got {list(x.shape)}")
    if offsets.shape != (e + 1,) or offsets.dtype != torch.int32:
        raise ValueError(f"grouped_lora: offsets must be [{e + 1}] int32, got {list(offsets.shape)} {offsets.dtype}")
    if (a is None) != (b is None):
        raise ValueError("grouped_lora: LoRA needs both A and B, or neither")
    if a is not None and b is not None:
        r = a.shape[1] if a.dim() == 3 else 0
        if r < 1 or a.shape != (e, r, k) or b.shape != (e, n, r):
            raise ValueError(
                f"grouped_lora: A must be [{e}, R, {k}] and B [{e}, {n}, R], got {list(a.shape)} and {list(b.shape)}"
            )
    if bias is not None and bias.shape != (e, n):
        raise ValueError(f"grouped_lora: bias must be [{e}, {n}], got {list(bias.shape)}")
    if (rows is None) != (positions is None):
        raise ValueError("grouped_lora: reading x through the routing needs both rows and positions, or neither")
    if rows is not None and positions is not None:
        fit = positions.dim() == 2 and positions.shape[0] == x.shape[0] and rows.shape == (positions.numel(),)
        if not fit or rows.dtype != torch.int32 or positions.dtype != torch.int32:
            raise ValueError(
                f"grouped_lora: for x {list(x.shape)} positions must be [{x.shape[0]}, top_k] and rows as many, int32, "
                f"got {list(positions.shape)} {positions.dtype} and {list(rows.shape)} {rows.dtype}"
            )
    for name, t in (("x", x), ("W", weight), ("A", a), ("B", b), ("bias", bias)):
        if t is not None and t.dtype not in FLOATS:
            raise ValueError(f"grouped_lora: {name} must be fp32, bf16 or fp16, got {t.dtype}")


VARIANTS = ("lora", "routed", "trained")  # "routed" is gpt-oss's: W stored [E, K, N], and biases


def _ends(p: Problem) -> list[int]:
    """The judged groups: uneven, the second empty where there are three, `spare` rows at the end nobody's.

    With `skew` every expert has one row, and the first all the rest.
    """
    m, experts = p.dims["tokens"] * p.dims["top_k"], p.dims["experts"]
    shares = [0 if e == 1 and experts > 2 else 3 + (5 * e) % 7 for e in range(experts)]
    of, ends = m - p.dims.get("spare", 0), [0]
    if "skew" in p.dims:
        return [0, *range(of - experts + 1, of + 1)]
    for share in shares:
        ends.append(ends[-1] + of * share // sum(shares))
    return [*ends[:-1], of]


def _inputs(p: Problem) -> dict[str, Input]:
    tokens, top_k, experts, n, k, r = (p.dims[d] for d in ("tokens", "top_k", "experts", "n", "k", "rank"))
    m, routed = tokens * top_k, p.variant == "routed"
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m))
    shape = (experts, k, n) if routed else (experts, n, k)
    found = {
        "x": Input((tokens if routed else m, k), p.dtype, grad=True),
        "w": Input(shape, p.dtype, "parameter", grad=p.variant == "trained", spread=1 / max(1, k) ** 0.5),
        "offsets": Input((experts + 1,), torch.int32, "constant", make=lambda g: torch.tensor(_ends(p)).int()),
    }
    if p.variant != "trained":  # in fp32, as PEFT keeps them
        found["a"] = Input((experts, r, k), torch.float32, "parameter", grad=True, spread=1 / max(1, k) ** 0.5)
        found["b"] = Input((experts, n, r), torch.float32, "parameter", grad=True, spread=1 / r**0.5)
    if p.variant != "lora":
        found["bias"] = Input((experts, n), torch.float32, "parameter", grad=True)
    if routed:
        found["rows"] = Input((m,), torch.int32, "constant", make=lambda g: torch.argsort(order).int() // top_k)
        found["positions"] = Input(
            (tokens, top_k), torch.int32, "constant", make=lambda g: order.int().view(tokens, top_k)
        )
    return found


def _arguments(t: Tensors, p: Problem) -> tuple[Any, ...]:
    w = t["w"].transpose(1, 2) if "rows" in t else t["w"]
    return t["x"], w, t["offsets"], t.get("a"), t.get("b"), t.get("bias"), t.get("rows"), t.get("positions"), 1.5


def _call(t: Tensors, p: Problem) -> Tensor:
    x, w, offsets, a, b, bias, rows, positions, scale = _arguments(t, p)
    return grouped_lora(x, w, offsets, a, b, scale=scale, bias=bias, rows=rows, positions=positions)


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensor:
    return reference(*_arguments(t, p))


def _linear_in_x(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    return None if "bias" in t else (call(t, p) * 2, call({**t, "x": t["x"] * 2}, p))


def _one_group(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    """Experts that are all alike are one: where groups end makes no difference."""
    if p.variant != "lora":
        return None
    same = {k: t[k][:1].expand_as(t[k]).contiguous() for k in ("w", "a", "b")}
    one = torch.full_like(t["offsets"], _ends(p)[-1])
    one[0] = 0
    return call({**t, **same}, p), call({**t, **same, "offsets": one}, p)


def _flops(p: Problem, which: Literal["forward", "backward"]) -> int:
    n, k, r = (p.dims[d] for d in ("n", "k", "rank"))
    m, skinny = _ends(p)[-1], 0 if p.variant == "trained" else r
    products = {"forward": n * k, "backward": n * k * (2 if p.variant == "trained" else 1)}[which]
    return 2 * m * (products + skinny * (n + k) * (1 if which == "forward" else 2))


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    tokens, top_k, experts, n, k = (p.dims[d] for d in ("tokens", "top_k", "experts", "n", "k"))
    return (tokens * top_k * (n + k) + experts * n * k) * p.dtype.itemsize


MUTANTS = Mutant.table(
    """next-expert @grouped_gemm: the weight of the expert after
- w_base = w_ptr + e.to(tl.int64) * (w
+ w_base = w_ptr + tl.minimum(e + 1, experts - 1).to(tl.int64) * (w
lora-of-first @grouped_gemm: the first expert's LoRA for all
- b_base = b_ptr + e.to(tl.int64) * b_group
+ b_base = b_ptr
group-bleeds @grouped_gemm: a tile writes over the next expert's first rows
- mask=(row[:, None] < end) & (col[None, :] < n))
+ mask=(row[:, None] < m) & (col[None, :] < n))
partial-tile-lost @grouped_gemm: a group's last partial tile unwritten
- tiles_after = tl.cumsum((tl.maximum(ends - begins, 0) + ROWS - 1) // ROWS, 0)
+ tiles_after = tl.cumsum(tl.maximum(ends - begins, 0) // ROWS, 0)
empty-takes-tile @grouped_gemm: an empty expert is given a tile
- tiles_after = tl.cumsum((tl.maximum(ends - begins, 0) + ROWS - 1) // ROWS, 0)
+ tiles_after = tl.cumsum((tl.maximum(ends - begins, 0) + ROWS) // ROWS, 0)
nobodys-unwritten @grouped_gemm: rows of no expert left as they were
- ends = tl.where(groups == experts, m, ends)
+ ends = tl.where(groups == experts, begins, ends)
second-stripe @grouped_gemm: row tiles of later stripes computed as those of the first
- row = begin + (stripe * STRIPE + local % high) * ROWS
+ row = begin + (local % high) * ROWS
tail-depth @grouped_gemm: columns past K not masked
- x = tl.load(x_at, mask=depth[None, :] < k - step * DEPTH, other=0.0)
-                 w = tl.load(w_at, mask=(depth[:, None] < k - step * DEPTH) & (col[None, :] < n), other=0.0)
+ x = tl.load(x_at, mask=depth[None, :] < k - step * DEPTH, other=1.0)
+                 w = tl.load(w_at, mask=(depth[:, None] < k - step * DEPTH) & (col[None, :] < n), other=1.0)
last-step-only @grouped_gemm: the accumulator begun again at each low-rank step
- acc = product(t, b, acc)
+ acc = product(t, b, acc * 0)
int32-offset @grouped_gemm: row offsets of x in 32 bits
- source = taken.to(tl.int64)
+ source = taken
x-stride @grouped_gemm: x read as if it were contiguous
- source[:, None] * (x_units * UNIT) + depth
+ source[:, None] * k + depth
bias-of-first @grouped_gemm: the first expert's bias for all
- at = bias_ptr + e.to(tl.int64) * n + col
+ at = bias_ptr + col
ungathered @grouped_gemm: x not read through the routing
- source = tl.load(rows_ptr + taken).to(tl.int64)
+ source = tl.minimum(taken, 0).to(tl.int64)
outer-next-group @grouped_gemm: a gradient takes one row of the next expert
- p = tl.load(p_at, mask=(row[None, :] < end) & (i[:, None] < high), other=0.0)
-         q = tl.load(q_at, mask=(row[:, None] < end) & (j[None, :] < wide), other=0.0)
+ p = tl.load(p_at, mask=(row[None, :] <= end) & (i[:, None] < high), other=0.0)
+         q = tl.load(q_at, mask=(row[:, None] <= end) & (j[None, :] < wide), other=0.0)
outer-last-step @grouped_gemm: a gradient of the last rows alone
- acc = product(p, q, acc)
+ acc = product(p, q, acc * 0)
scale-dropped: the branch without its scale
- t = grouped(x, a.to(d), offsets, rows, scale)
+ t = grouped(x, a.to(d), offsets, rows)
da-unscaled: dx and dA without the scale
- offsets, scale=scale)
+ offsets)
no-branch-in-dx: dx of the base alone
- offsets, t=u, b=lora_a)
+ offsets)
dx-of-one: dx of a token's first row alone
- collect(dx, positions.contiguous())
+ collect(dx, positions[:, :1].contiguous())
dw-16-bit: gradient of W rounded to x's dtype and halved
- dw = outer(dy, x, offsets, experts, weight.dtype, rows)
+ dw = outer(dy, x, offsets, experts, weight.dtype, rows) * 0.5
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(x, weight, offsets, a, b, bias, rows, positions, float(scale))
+ y: Tensor = reference(x, weight, offsets, a, b, bias, rows, positions, float(scale))
"""
)

OP = OpSpec(
    name="grouped_lora",
    summary="Linear layers of a mixture of experts, with LoRA inside their matrix product",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"tokens": 14, "top_k": 2, "experts": 3, "n": 48, "k": 64, "rank": 5, "spare": 3},
        "prime": {"tokens": 23, "top_k": 2, "experts": 2, "n": 37, "k": 41, "rank": 1},
        "skewed": {
            "tokens": 144,
            "top_k": 1,
            "experts": 9,
            "n": 16,
            "k": 24,
            "rank": 3,
            "skew": 1,
        },  # over 8 row tiles of 16
        "one expert": {"tokens": 20, "top_k": 2, "experts": 1, "n": 32, "k": 48, "rank": 80},
        "wide": {"tokens": 3, "top_k": 3, "experts": 2, "n": 130, "k": 100, "rank": 17},
        "no rows": {"tokens": 0, "top_k": 2, "experts": 3, "n": 32, "k": 64, "rank": 4},
        "far": {"tokens": 3, "top_k": 1, "experts": 2, "n": 32, "k": 64, "rank": 4},
        "speed": {"tokens": 4096, "top_k": 8, "experts": 128, "n": 1536, "k": 2048, "rank": 16},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=launches,
    bytes_moved=_bytes,
    flops=_flops,
    bound="matrix",
    nonfinite_kinds=False,  # Inf in x A^T meets the zeros that pad the rank
    laws=(
        Law("y(2x) = 2 y(x)", _linear_in_x),
        Law("experts that are alike are one", _one_group, tolerance=2e-2),
    ),
    mutants=MUTANTS,
)
