r"""Bring the experts' results back to their tokens: each token's rows, weighted by the router, added up.

    y[t] = sum over j of w[t, j] z[positions[t, j]]
    dz[positions[t, j]] = w[t, j] dy[t]              dw[t, j] = dy[t] . z[positions[t, j]]

Products and sums in fp32, in the order of j, rounded once to z's dtype; dw summed over the columns in fp32 and rounded once to
the weights' dtype. (transformers rounds every product, and adds in its own order of experts.)

Shapes: z [T top_k, N], sorted by expert; weights and positions [T, top_k]; y [T, N]. fp32, bf16 or fp16 each; y in z's dtype.
`positions` comes from `moe_route` or `moe_permute`: a permutation of the rows. Strides are free. Saved: z, weights, positions.

Bytes: forward reads M N elements, M = T top_k, and writes T N; backward reads M N + T N and writes M N.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops.fused import Fused
from sparktune.ops.moe_rows import collect, collect_kernel, launches, spread, spread_kernel
from sparktune.ops.spec import FLOATS, Input, Law, Mutant, OpSpec, Problem, Tensors

KERNELS = (collect_kernel, spread_kernel)  # what `launches` names


def reference(z: Tensor, weights: Tensor, positions: Tensor, compute: torch.dtype = torch.float32) -> Tensor:
    """Plain PyTorch, in the same rounding order; the oracle is this with float64 tensors and compute=float64."""
    rows = z[positions.long()].to(compute)
    return (rows * weights.to(compute)[..., None]).sum(1).to(z.dtype)


def _forward(z: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    return collect(z, positions.contiguous(), weights.contiguous())


def _backward(dy: Tensor, z: Tensor, weights: Tensor, positions: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """(dz, dweights): one pass makes both."""
    return spread(dy, positions.contiguous(), weights.contiguous(), z)


_OP = Fused("moe_combine", _forward, _backward, reference=reference, grads=("z", "weights"))


def moe_combine(z: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """z [T top_k, N] sorted by expert, weights [T, top_k], positions [T, top_k] int32 -> [T, N]. Differentiable once.

    Errors: ValueError for shapes that don't fit or other dtypes.
    """
    if positions.dim() != 2 or weights.shape != positions.shape or z.dim() != 2 or z.shape[0] != positions.numel():
        raise ValueError(
            "moe_combine: z must be [T top_k, N], weights and positions [T, top_k], got "
            f"{list(z.shape)}, {list(weights.shape)} and {list(positions.shape)}"
        )
    if z.dtype not in FLOATS or weights.dtype not in FLOATS or positions.dtype != torch.int32:
        raise ValueError(
            "moe_combine: z and weights must be fp32, bf16 or fp16 and positions int32, got "
            f"{z.dtype}, {weights.dtype} and {positions.dtype}"
        )
    y: Tensor = _OP(z, weights, positions)
    return y


VARIANTS = ("fp32 weights", "own dtype")


def _inputs(p: Problem) -> dict[str, Input]:
    tokens, top_k = p.dims["rows"], p.dims["top_k"]

    def permutation(g: torch.Generator) -> Tensor:
        return torch.randperm(tokens * top_k, generator=g).int().view(tokens, top_k)

    dtype = torch.float32 if p.variant == "fp32 weights" else p.dtype
    return {
        "z": Input((tokens * top_k, p.dims["columns"]), p.dtype, grad=True),
        "weights": Input((tokens, top_k), dtype, "parameter", grad=True, centre=0.4, spread=0.2),
        "positions": Input((tokens, top_k), torch.int32, "constant", make=permutation),
    }


def _call(t: Tensors, p: Problem) -> Tensor:
    return moe_combine(t["z"], t["weights"], t["positions"])


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensor:
    return reference(t["z"], t["weights"], t["positions"], compute or torch.float32)


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest y when the sum, before it is rounded, is right to `slack` of its absolute terms."""
    if slack == 0:
        y = _reference({k: v.detach() for k, v in t.items()}, p, None)
        return y, y
    terms = t["z"].detach().double()[t["positions"].long()] * t["weights"].detach().double()[..., None]
    y, off = terms.sum(1), terms.abs().sum(1) * slack
    off = torch.where(off.isfinite(), off, 0.0)
    return (y - off).float().to(p.dtype), (y + off).float().to(p.dtype)


def _linear(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    return call(t, p) * 2, call({**t, "z": t["z"] * 2}, p)


def _one_expert(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    """With all weight on the first choice a token gets that row back, as it is."""
    weights = torch.zeros_like(t["weights"])
    weights[:, 0] = 1
    return call({**t, "weights": weights}, p), t["z"][t["positions"][:, 0].long()]


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    tokens, top_k = p.dims["rows"], p.dims["top_k"]
    rows = tokens * (top_k + 1) if which == "forward" else tokens * (2 * top_k + 1)
    return rows * p.dims["columns"] * p.dtype.itemsize


MUTANTS = Mutant.table(
    """no-weights @moe_rows: rows added up without their weights
- z *= tl.load(weights_ptr + token * top_k + place, mask=mine, other=0.0).to(tl.float32)[:, None]
+ z *= 1.0
weights-twice @moe_rows: weights multiplied in twice
- y = cast(tl.sum(z, 0)
+ if WEIGHTED:
+             z *= tl.load(weights_ptr + token * top_k + place, mask=mine, other=0.0).to(tl.float32)[:, None]
+         y = cast(tl.sum(z, 0)
weights-of-first-token @moe_rows: the first token's weights for all
- z *= tl.load(weights_ptr + token * top_k + place
+ z *= tl.load(weights_ptr + place
rounded-products @moe_rows: products rounded before they are added
- y = cast(tl.sum(z, 0)
+ z = cast(z, y_ptr.dtype.element_ty).to(tl.float32)
+         y = cast(tl.sum(z, 0)
mean @moe_rows: the mean in place of the sum
- y = cast(tl.sum(z, 0)
+ y = cast(tl.sum(z, 0) / top_k
z-stride @moe_rows: sorted rows read as if they were contiguous
- z_ptr + row[:, None] * z_stride + col
+ z_ptr + row[:, None] * width + col
int32-offset @moe_rows: offsets of sorted rows in 32 bits
- row = tl.load(positions_ptr + token * top_k + place, mask=mine, other=0).to(tl.int64)
-     for start in range(0, width, BLOCK):
-         col = start + tl.arange(0, BLOCK)
-         inside = mine[:, None] & (col[None, :] < width)
-         z =
+ row = tl.load(positions_ptr + token * top_k + place, mask=mine, other=0)
+     for start in range(0, width, BLOCK):
+         col = start + tl.arange(0, BLOCK)
+         inside = mine[:, None] & (col[None, :] < width)
+         z =
dz-unweighted @moe_rows: gradient of the rows without the weights
- z = cast(x * w[:, None], z_ptr.dtype.element_ty)
+ z = cast(x + 0.0 * w[:, None], z_ptr.dtype.element_ty)
dw-last-block @moe_rows: gradient of the weights from the last columns alone
- dw += tl.sum(tl.where(inside
+ dw = tl.sum(tl.where(inside
dw-weighted @moe_rows: gradient of the weights multiplied by them
- place, cast(dw, dw_ptr
+ place, cast(dw * tl.load(weights_ptr + token * top_k + place, mask=mine, other=0.0), dw_ptr
dw-in-sorted-order @moe_rows: gradient of the weights written where the row lies
- tl.store(dw_ptr + token * top_k + place
+ tl.store(dw_ptr + row
old-stride @moe_rows: rows for dw read as if they were contiguous
- old_ptr + row[:, None] * old_stride
+ old_ptr + row[:, None] * width
dy-stride @moe_rows: output gradient read as if it were contiguous
- x_ptr + token * x_stride + col
+ x_ptr + token * width + col
wrong-place @moe_rows: gradients of two choices in one place
- mask=mine, other=0).to(tl.int64)
-     dw = tl.zeros
+ mask=mine, other=0).to(tl.int64) // 2
+     dw = tl.zeros
silent-fallback: the reference run in place of the kernel
- y: Tensor = _OP(z, weights, positions)
+ y: Tensor = reference(z, weights, positions)
"""
)

OP = OpSpec(
    name="moe_combine",
    summary="The experts' rows back to their tokens, weighted by the router",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 9, "columns": 48, "top_k": 3},
        "prime": {"rows": 7, "columns": 211, "top_k": 5},
        "wide": {"rows": 3, "columns": 2081, "top_k": 8},
        "one": {"rows": 1, "columns": 1, "top_k": 1},
        "no rows": {"rows": 0, "columns": 16, "top_k": 2},
        "no columns": {"rows": 3, "columns": 0, "top_k": 2},
        "far": {"rows": 3, "columns": 64, "top_k": 1},
        "speed": {"rows": 16384, "columns": 2048, "top_k": 8},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=lambda p: launches(p, True),
    bytes_moved=_bytes,
    flops=lambda p, which: (2 if which == "forward" else 3) * p.dims["rows"] * p.dims["columns"] * p.dims["top_k"],
    exact=_exact,
    exact_slack=2e-6,
    laws=(Law("combine(2z) = 2 combine(z)", _linear), Law("all weight on one row gives that row", _one_expert)),
    mutants=MUTANTS,
)
