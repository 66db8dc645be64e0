"""What the judged problems of `rope` and `qk_norm_rope` have in common: q and k, tables and positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops.spec import Input, Problem, Tensors


def table_inputs(dims: Any) -> dict[str, Input]:
    """cos, sin and positions of a judged problem: a table of `length` rows, in documents of random order."""
    half, length = dims["rotary"] // 2, dims.get("length", 64)
    dtype = {32: torch.int32, 64: torch.int64}.get(dims.get("positions", 64))

    def table(function: Any) -> Any:
        def make(g: torch.Generator) -> Tensor:
            return function(torch.rand(length, half, generator=g) * 6.3) * 1.19  # an attention scaling, as yarn has

        return make

    def positions(g: torch.Generator) -> Tensor:
        return torch.randint(0, length, (dims["rows"],), generator=g).to(dtype)

    # Each is made by a generator of its own, so they are of different angles; a kernel must not care.
    found = {
        "cos": Input((length, half), torch.float32, "constant", make=table(torch.cos), layouts=False),
        "sin": Input((length, half), torch.float32, "constant", make=table(torch.sin), layouts=False),
    }
    return found if dtype is None else found | {"positions": Input((dims["rows"],), dtype, "constant", make=positions)}


def head_inputs(p: Problem) -> dict[str, Input]:
    """q and k as matrices with a token in each row, so that rows can be sliced, transposed and far apart.

    `gap`: columns between heads that belong to none.
    """
    d = p.dims["head_dim"] + p.dims.get("gap", 0)
    return {
        k: Input((p.dims["rows"], p.dims[n] * d), p.dtype, grad=True) for k, n in (("q", "heads"), ("k", "kv_heads"))
    }


def heads_of(t: Tensors, p: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """q and k as [B, S, heads, D] views, and positions as [B, S]."""
    batch, d = p.dims.get("batch", 1), p.dims["head_dim"]
    shape = batch, p.dims["rows"] // batch
    q, k = (
        t[n].unflatten(1, (p.dims[h], -1)).unflatten(0, shape)[..., :d] for n, h in (("q", "heads"), ("k", "kv_heads"))
    )
    return q, k, t["positions"].unflatten(0, shape) if "positions" in t else None


def rows_of(q: Tensor, k: Tensor) -> Tensors:
    """[B, S, heads, D] as matrices again."""
    return {"q": q.flatten(0, 1).flatten(1), "k": k.flatten(0, 1).flatten(1)}


def tail(t: Tensors, p: Problem) -> tuple[Tensors, Problem]:
    """The last four tokens."""
    part = {"q": t["q"][-4:], "k": t["k"][-4:], "positions": t["positions"][-4:]}
    return {**t, **part}, replace(p, dims={**p.dims, "rows": 4})


def head_bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    """q and k read and written."""
    return 2 * p.dims["rows"] * (p.dims["heads"] + p.dims["kv_heads"]) * p.dims["head_dim"] * p.dtype.itemsize
