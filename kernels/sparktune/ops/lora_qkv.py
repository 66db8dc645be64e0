r"""Query, key and value projections as one matrix product, LoRA and biases inside it.

    [q | k | v] = [x | x Aq^T | x Ak^T | x Av^T] P^T,      P as in `lora_linear`, with three layers stacked

Each B stands in its own columns of P and its own rows, zero elsewhere, so that q meets no other layer's ranks. x is read
once for three layers, and x A^T for all three is one skinny product. Backward has dq, dk and dv side by side:

    dx = [dq | dk | dv | s dq Bq | s dk Bk | s dv Bv] P[:, :K]
    dAi = s (dyi Bi)^T x,   dBi = s dyi^T (x Ai^T),   dbiasi = sum of dyi over rows

The result is one tensor [..., Nq + Nk + Nv], which `rope` and attention read in place as three views; their gradients
come back apart, and are laid side by side by one copy unless they are such views themselves.

Shapes, rounding, dropout (one mask for the three, as for one input) and what is saved: as in `lora_linear`. PEFT draws a
mask a layer; here the three layers of one input share it.

Source: as in `lora_linear`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.dropout import draw, drop_kernel, drop_launches, under
from sparktune.ops.fused import Fused
from sparktune.ops.lora_linear import branch, check, judged_weight, lora_inputs, weight_inputs
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
from sparktune.ops.spec import FLOATS, Input, Law, Mutant, OpSpec, Outputs, Problem, Tensors
from sparktune.ops.weights import Weight

KERNELS = (adapter_kernel, drop_kernel)  # what `launches` names
Adapter = tuple[Tensor, Tensor] | None


def reference(
    x: Tensor, weights: list[Tensor | None], layout: list[int], aq: Tensor | None, bq: Tensor | None, zq: Tensor | None,
    ak: Tensor | None, bk: Tensor | None, zk: Tensor | None, av: Tensor | None, bv: Tensor | None, zv: Tensor | None,
    seed: Tensor | None, scales: list[float], dropout: float, tail_free: bool,
) -> Tensor:  # fmt: skip
    """Plain PyTorch: three layers as PEFT computes them, side by side."""
    dense = [w.reference(x.dtype) for w in unflatten(weights, layout)]
    layers = ((aq, bq, zq), (ak, bk, zk), (av, bv, zv))
    parts = [branch(x, w, *layer, seed, s, dropout) for w, layer, s in zip(dense, layers, scales, strict=True)]
    return torch.cat(parts, -1)


def _stack(
    weights: list[Tensor | None], layout: list[int], a: tuple[Tensor | None, ...], bias: tuple[Tensor | None, ...]
) -> Stack:
    ranks = tuple(0 if t is None else t.shape[0] for t in a)
    return Stack(tuple(unflatten(weights, layout)), ranks, any(z is not None for z in bias))


def _forward(
    x: Tensor, weights: list[Tensor | None], layout: list[int], aq: Tensor | None, bq: Tensor | None, zq: Tensor | None,
    ak: Tensor | None, bk: Tensor | None, zk: Tensor | None, av: Tensor | None, bv: Tensor | None, zv: Tensor | None,
    seed: Tensor | None, scales: list[float], dropout: float, tail_free: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """([q | k | v], x A^T of all three)."""
    a, b, z = (aq, ak, av), (bq, bk, bv), (zq, zk, zv)
    stack, flat = _stack(weights, layout, a, z), matrix(x)
    y, tail = forward_layers(stack, flat, a, b, z, scales, under(flat, seed, dropout), tail_free)
    return y.view(*x.shape[:-1], stack.n), tail


def _backward(
    dy: Tensor, x: Tensor, weights: list[Tensor | None], layout: list[int],
    aq: Tensor | None, bq: Tensor | None, zq: Tensor | None, ak: Tensor | None, bk: Tensor | None, zk: Tensor | None,
    av: Tensor | None, bv: Tensor | None, zv: Tensor | None, seed: Tensor | None, tail: Tensor, scales: list[float],
    dropout: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, then da, db, dbias of q, of k and of v)."""
    a, b, z = (aq, ak, av), (bq, bk, bv), (zq, zk, zv)
    stack, dy = _stack(weights, layout, a, z), matrix(dy)
    dx, dtail = input_gradient(stack, dy, a, b, z, scales, seed, dropout, needs[0], any(needs[1::3]))
    flat = matrix(x)
    flat = under(flat, seed, dropout) if any(needs[1::3]) else flat
    found = factor_gradients(stack, dy, flat, tail, dtail, a, b, z, scales, needs[1:])
    return dx.view(x.shape) if needs[0] else dx, *found  # type: ignore[return-value]


GRADS = ("x", "aq", "bq", "zq", "ak", "bk", "zk", "av", "bv", "zv")
_OP = Fused(
    "lora_qkv", _forward, _backward, reference=reference, grads=GRADS,
    save=lambda args, results: (*args[:13], results[1], *args[13:15]),
)  # fmt: skip


def lora_qkv(
    x: Tensor, weights: tuple[Weight, Weight, Weight], adapters: tuple[Adapter, Adapter, Adapter],
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0), *,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None), dropout: float = 0.0,
    tail_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(q, k, v) of x [..., K]: views [..., N_i] of one tensor, in x's dtype, or autocast's.

    `adapters`: for each layer (A [r, K], B [N_i, r]) or None, ranks free; `scales`, `dropout`, `tail_free` as in
    `lora_linear`. Differentiable once, in x, every A, B and bias. Errors: ValueError for shapes or dtypes that don't
    fit, or a dropout outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_qkv: dropout must be in [0, 1), got {dropout}")
    pairs = [pair or (None, None) for pair in adapters]
    for w, (a, b), z in zip(weights, pairs, biases, strict=True):
        check("lora_qkv", x, w, a, b, z)
    x = x.to(dispatch.autocast_dtype(x) or x.dtype)
    seed = draw(x, dropout)
    tensors, layout = flatten(weights)
    each = [t for pair, z in zip(pairs, biases, strict=True) for t in (*pair, z)]
    y: Tensor = _OP(x, tensors, layout, *each, seed, list(scales), dropout, tail_free)
    q, k, v = y.split([w.shape[0] for w in weights], -1)
    return q, k, v


VARIANTS = ("nf4", "dense bias", "dropout", "k frozen")
SCALES = (0.5, 2.0, 1.0)


def _sizes(p: Problem) -> dict[str, int]:
    return {"q": p.dims["n"], "k": p.dims["kv"], "v": p.dims["kv"]}


def _inputs(p: Problem) -> dict[str, Input]:
    m, k, r = (p.dims[d] for d in ("rows", "k", "rank"))
    found = {"x": Input((m, k), p.dtype, grad=True)}
    for i, (name, n) in enumerate(_sizes(p).items()):
        found |= weight_inputs(f"w{name}", n, k, p.dtype, p.variant == "nf4")
        if not (name == "k" and p.variant == "k frozen"):
            found |= lora_inputs(n, k, r + i, p.dtype, name)
        if "bias" in p.variant and name != "k":
            found[f"z{name}"] = Input((n,), torch.float32, "parameter", grad=True)
    return found


def _arguments(t: Tensors, p: Problem) -> tuple[list[Weight], list[Any], Tensor | None, float]:
    weights = [judged_weight(t, f"w{name}", n, p.dims["k"]) for name, n in _sizes(p).items()]
    each = [t.get(f"{kind}{name}") for name in _sizes(p) for kind in "abz"]
    if p.variant != "dropout":
        return weights, each, None, 0.0
    return weights, each, torch.full((1,), 99, device=t["x"].device), 0.25


def _call(t: Tensors, p: Problem) -> Outputs:
    weights, each, seed, dropout = _arguments(t, p)
    if seed is None:
        pairs: Any = [(each[i], each[i + 1]) if each[i] is not None else None for i in (0, 3, 6)]
        three: Any = tuple(weights)
        q, k, v = lora_qkv(t["x"], three, tuple(pairs), SCALES, biases=(each[2], each[5], each[8]))
        return {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}
    tensors, layout = flatten(weights)
    x = t["x"].to(dispatch.autocast_dtype(t["x"]) or t["x"].dtype)
    y = _OP(x, tensors, layout, *each, seed, list(SCALES), dropout, False)
    return {n: part.contiguous() for n, part in zip("qkv", y.split(list(_sizes(p).values()), -1), strict=True)}


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Outputs:
    weights, each, seed, dropout = _arguments(t, p)
    found = {}
    for i, name in enumerate("qkv"):
        w = weights[i].reference(p.dtype).to(compute or p.dtype)
        a, b, z = each[3 * i : 3 * i + 3]
        found[name] = branch(t["x"], w, a, b, z, seed, SCALES[i], dropout)
    return found


def _flops(p: Problem, which: Literal["forward", "backward"]) -> int:
    m, k, r, n = (*(p.dims[d] for d in ("rows", "k", "rank")), sum(_sizes(p).values()))
    return 2 * m * n * k + 2 * m * r * (n + 3 * k) * (1 if which == "forward" else 2)


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    m, k, n = p.dims["rows"], p.dims["k"], sum(_sizes(p).values())
    return (m * k + m * n + n * k) * p.dtype.itemsize + n * k // 2


def _linear_in_x(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor] | None:
    return None if "bias" in p.variant else (call(t, p) * 2, call({**t, "x": t["x"] * 2}, p))


MUTANTS = Mutant.table(
    """slots-shared @lora_packed: all layers take the first layer's ranks
- first = sum(self.ranks[:i])
+ first = 0 * i
scales-first @lora_packed: q's scale for all three
- scale = self._scales[i]
+ scale = self._scales[0]
scale-order: scales in reverse
- a, b, z, scales, under(
+ a, b, z, scales[::-1], under(
v-for-k: k's and v's B exchanged in the backward
- a, b, z = (aq, ak, av), (bq, bk, bv), (zq, zk, zv)
-     stack, dy
+ a, b, z = (aq, ak, av), (bq, bv, bk), (zq, zk, zv)
+     stack, dy
first-rows @lora_packed: every B's gradient from q's rows
- summed(dy[:, rows], tail
+ summed(dy[:, : rows.stop - rows.start], tail
da-of-all @lora_packed: A's gradient from all ranks' neighbours
- self._every[self._stack.slot(i)].to(ai.dtype, copy=apart)
+ self._every.roll(1, 0)[self._stack.slot(i)].to(ai.dtype, copy=apart)
bias-rows @lora_packed: bias gradient from q's rows
- dy[:, rows].sum(0
+ dy[:, : rows.stop - rows.start].sum(0
bias-forgotten @lora_packed: biases left out
- stack.one if stack.biased else None
+ None
bleeding @lora_packed: q's rows meet the ranks of k and v
- mine = (lane >= slot) & (lane < slot + rank)
+ mine = (lane >= slot) & (lane < slot + rank + 1)
da-undropped: A's gradients from the input before dropout
- flat = under(flat, seed, dropout) if any(needs[1::3]) else flat
+ flat = flat
split-order: k and v exchanged in the result
- q, k, v = y.split([w.shape[0] for w in weights], -1)
+ q, v, k = y.split([w.shape[0] for w in weights], -1)
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(x, tensors,
+ y: Tensor = reference(x, tensors,
"""
)

OP = OpSpec(
    name="lora_qkv",
    summary="Query, key and value projections as one matrix product with LoRA and biases inside",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 6, "n": 64, "kv": 32, "k": 64, "rank": 4},
        "prime": {"rows": 5, "n": 37, "kv": 11, "k": 41, "rank": 3},
        "no rows": {"rows": 0, "n": 64, "kv": 32, "k": 64, "rank": 4},
        "speed": {"rows": 4096, "n": 4096, "kv": 1024, "k": 4096, "rank": 16},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=lambda p: adapter_launches() + drop_launches(),
    bytes_moved=_bytes,
    flops=_flops,
    bound="matrix",
    nonfinite_kinds=False,  # Inf in x A^T meets the zeros between the layers' ranks
    laws=(Law("q(2x) = 2 q(x)", _linear_in_x),),
    mutants=MUTANTS,
)
