r"""Put the rows of tokens into the order of their experts, each as often as it has experts.

    z[positions[t, j]] = x[t]                 dx[t] = sum over j of dz[positions[t, j]]

`positions` is a permutation of the T top_k choices that sorts them by expert and keeps the order of tokens within one
(moe_routing.py, where it is found on the device). The sum goes over j in order, in fp32, and is rounded once.

Shapes: x [T, N], fp32, bf16 or fp16; indices [T, top_k] int32 or int64 -> z [T top_k, N] and the routing. An index outside of
[0, E) belongs to no expert; its rows come last. Strides of x and of the gradient are free. Saved: positions.

Bytes: forward reads T N elements and writes top_k times that; backward the other way. `grouped_lora` can read its rows
through the routing itself, and then this op is not needed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops.fused import Fused
from sparktune.ops.moe_routing import Routing, count_kernel, moe_route, place_kernel
from sparktune.ops.moe_routing import launches as routing_launches
from sparktune.ops.moe_routing import reference as routing_reference
from sparktune.ops.moe_rows import collect, collect_kernel, launches, spread, spread_kernel
from sparktune.ops.spec import FLOATS, Input, Law, Mutant, OpSpec, Problem, Tensors

KERNELS = (collect_kernel, spread_kernel, count_kernel, place_kernel)  # what `launches` names


def reference(x: Tensor, positions: Tensor) -> Tensor:
    """Plain PyTorch: every row as often as it has places, in their order."""
    return x.repeat_interleave(positions.shape[1], 0)[torch.argsort(positions.reshape(-1))]


def _forward(x: Tensor, positions: Tensor) -> Tensor:
    return spread(x, positions)[0]


def _backward(dz: Tensor, positions: Tensor, needs: list[bool]) -> Tensor:
    return collect(dz, positions)


_OP = Fused(
    "moe_permute", _forward, _backward, reference=reference, grads=("x",), save=lambda args, results: (args[1],)
)


def moe_permute(x: Tensor, indices: Tensor, experts: int) -> tuple[Tensor, Routing]:
    """Rows of x [T, N] sorted by the experts that the router chose, indices [T, top_k]: ([T top_k, N], routing).

    Differentiable once, in x. Errors: ValueError for shapes that don't fit or dtypes other than fp32, bf16, fp16 and
    int32, int64.
    """
    if x.dim() != 2 or indices.dim() != 2 or x.shape[0] != indices.shape[0]:
        raise ValueError(
            f"moe_permute: x must be [T, N] and indices [T, top_k], got {list(x.shape)} and {list(indices.shape)}"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"moe_permute: x must be fp32, bf16 or fp16, got {x.dtype}")
    routing = moe_route(indices, experts)
    z: Tensor = _OP(x, routing.positions)
    return z, routing


VARIANTS = ("skewed", "foreign")


def choices(p: Problem, g: torch.Generator) -> Tensor:
    """A judged router's choice: mostly of expert 2 and never of 0; or of all alike, and of some that are not here."""
    shape, experts = (p.dims["rows"], p.dims["top_k"]), p.dims["experts"]
    if p.variant == "foreign":
        return torch.randint(-1, experts + 2, shape, generator=g)
    found = torch.randint(min(1, experts - 1), experts, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.7, min(2, experts - 1), found).int()


def _inputs(p: Problem) -> dict[str, Input]:
    dtype = torch.int32 if p.variant == "skewed" else torch.int64
    return {
        "x": Input((p.dims["rows"], p.dims["columns"]), p.dtype, grad=True),
        "indices": Input((p.dims["rows"], p.dims["top_k"]), dtype, "constant", make=lambda g: choices(p, g)),
    }


def _named(z: Tensor, routing: Routing) -> Tensors:
    return {"z": z, **routing._asdict()}


def _call(t: Tensors, p: Problem) -> Tensors:
    return _named(*moe_permute(t["x"], t["indices"], p.dims["experts"]))


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensors:
    routing = Routing(*routing_reference(t["indices"], p.dims["experts"]))
    return _named(reference(t["x"], routing.positions), routing)


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensors, Tensors]:
    z = _reference(t, p, None)["z"].detach()
    return {"z": z}, {"z": z}


def _experts_of_columns(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    """A column that holds each row's number comes out as `rows` says."""
    numbers = torch.arange(p.dims["rows"], device=t["x"].device).to(p.dtype)
    x = numbers[:, None].expand_as(t["x"])
    rows = routing_reference(t["indices"], p.dims["experts"])[1]
    return call({**t, "x": x}, p)[:, 0], rows


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    return (1 + p.dims["top_k"]) * p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize


MUTANTS = Mutant.table(
    """int32-offset @moe_rows: the token's row offset in 32 bits
- old_ptr, dw_ptr, width, top_k, x_stride, old_stride,
-     WEIGHTED: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
- ):  # fmt: skip
-     \"\"\"One token a program: its row into its places. WEIGHTED: and dw [t, j], its product with what `old` has there.\"\"\"
-     token = tl.program_id(0).to(tl.int64)
+ old_ptr, dw_ptr, width, top_k, x_stride, old_stride,
+     WEIGHTED: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
+ ):  # fmt: skip
+     token = tl.program_id(0)
last-choice-left-out @moe_rows: a token's last row missing from its gradient
- mine = place < top_k
-     row = tl.load(positions_ptr + token * top_k + place, mask=mine, other=0).to(tl.int64)
-     for
+ mine = place < tl.maximum(top_k - 1, 1)
+     row = tl.load(positions_ptr + token * top_k + place, mask=mine, other=0).to(tl.int64)
+     for
first-block-only @moe_rows: later blocks of columns hold the first one again
- token * x_stride + col, mask
+ token * x_stride + col % BLOCK, mask
unstable @moe_routing: tokens of one expert in reverse within a tile
- rank = tl.cumsum(hit, 0) - 1
+ rank = tl.sum(hit, 0)[None, :] - tl.cumsum(hit, 0)
next-expert @moe_routing: offsets of the next expert
- tl.store(offsets_ptr + groups, begins, mask=groups <= experts)
+ tl.store(offsets_ptr + groups, begins + total, mask=groups <= experts)
tiles-forget @moe_routing: places of a block's earlier choices given out again
- free += tl.sum(hit, 0)
+ free += 0
blocks-forget @moe_routing: places of earlier blocks given out again
- free = begins + before
+ free = begins
foreign-clamped @moe_routing: indices past the last expert counted as its own
- i < experts), i, experts)
+ i < experts), i, experts - 1)
negative-wraps @moe_routing: negative indices not caught
- (i >= 0) & (i < experts)
+ (i < experts)
row-of-choice @moe_routing: rows numbered by choice and not by token
- choice // top_k, mask
+ choice, mask
dz-stride @moe_rows: output gradient read as if it were contiguous
- z_ptr + row[:, None] * z_stride + col
+ z_ptr + row[:, None] * width + col
gradient-of-sorted: gradient read in token order
- return collect(dz, positions)
+ return collect(dz, torch.arange(positions.numel(), device=dz.device).int().view(positions.shape))
gradient-once: gradient of the first choice alone
- return collect(dz, positions)
+ return collect(dz, positions[:, :1].contiguous())
silent-fallback: the reference run in place of the kernel
- z: Tensor = _OP(x, routing.positions)
+ z: Tensor = reference(x, routing.positions)
"""
)

OP = OpSpec(
    name="moe_permute",
    summary="Rows of tokens into the order of their experts, and their gradients back",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 13, "columns": 48, "top_k": 2, "experts": 5},
        "prime": {"rows": 53, "columns": 7, "top_k": 11, "experts": 40},  # choices over two blocks
        "wide": {"rows": 3, "columns": 2081, "top_k": 8, "experts": 8},
        "one": {"rows": 1, "columns": 1, "top_k": 1, "experts": 1},
        "no rows": {"rows": 0, "columns": 16, "top_k": 2, "experts": 4},
        "no columns": {"rows": 3, "columns": 0, "top_k": 2, "experts": 4},
        "far": {"rows": 3, "columns": 64, "top_k": 1, "experts": 4},
        "speed": {"rows": 16384, "columns": 2048, "top_k": 8, "experts": 128},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=lambda p: launches(p, False) + routing_launches(),
    bytes_moved=_bytes,
    flops=lambda p, which: p.dims["rows"] * p.dims["columns"] * p.dims["top_k"],
    exact=_exact,
    laws=(Law("a row's number goes where `rows` says", _experts_of_columns),),
    mutants=MUTANTS,
)
