"""What the parts of a decoder layer's one Function share: the call, what is kept for its backward, and products with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparktune.models.attention_graph import Attended
from sparktune.models.checkpointing import NONE, WEIGHTS
from sparktune.models.documents import Documents
from sparktune.models.layer_parts import Group, LayerParts
from sparktune.models.parts import Tables
from sparktune.ops import dispatch, rms_norm
from sparktune.ops.lora_packed import FactorSums, forward_packed, input_gradient

QKV, OUT, GATE_UP, DOWN = range(4)  # a layer's groups


@dataclass
class Strip:
    """What some rows of a layer have of its MLP, each here or None. Rows are tokens, [m, width]."""

    eu: Tensor | None = None
    n2: Tensor | None = None  # rows of the norm, and their 1 / rms
    r2: Tensor | None = None
    tails: dict[int, Tensor] = field(default_factory=dict)  # x A^T of gate and up, down


@dataclass
class State:
    """Activations of one layer, each here or None. Rows are tokens, [M, width]."""

    qkv: Tensor | None = None  # after RoPE, in place; before it where there are head norms
    q: Tensor | None = None  # normalised and turned, where there are head norms; else views of qkv
    k: Tensor | None = None
    attended: Attended | None = None
    x1: Tensor | None = None
    n1: Tensor | None = None  # rows of the norm, and their 1 / rms
    r1: Tensor | None = None
    tails: dict[int, Tensor] = field(default_factory=dict)  # x A^T of qkv, o
    strips: Sequence[Strip] = ()  # of the MLP, from the first rows to the last
    serials: tuple[int, ...] = ()  # of the groups' held buffers, when this layer's forward had written them


@dataclass(frozen=True)
class Call:
    """What a layer is applied to, besides x and what is trained."""

    parts: LayerParts
    shape: tuple[int, int]  # batch, sequence
    tables: Tables | None  # None: nothing is turned by its position
    documents: Documents | None
    keep: frozenset[str]
    strips: int = 1  # into which the MLP's rows are cut
    store: Any = None  # a `HostStore`
    leaving: frozenset[str] = NONE  # what goes there until the backward, of what is kept and x


def buffer(call: Call, state: State, i: int, dtype: torch.dtype) -> Tensor:
    """The buffer P of group `i`, held where the budget keeps weights."""
    return call.parts.groups[i].buffer(dtype, WEIGHTS in call.keep, state.serials[i] if state.serials else None)


def project(call: Call, at: State | Strip, i: int, x: Tensor, p: Tensor, **how: Any) -> Tensor:
    """x W^T + LoRA [M, N] for the input x [M, K] of group `i`, whose buffer is `p`; x A^T is put to `at`, or found there.

    `how` goes to `forward_packed`.
    """
    group = call.parts.groups[i]
    y, at.tails[i] = forward_packed(x, p, group.stack.n, group.one, known=at.tails.get(i), **how)
    return y


def unproject(
    call: Call, state: State, i: int, dy: Tensor, need_dx: bool, sums: FactorSums, row: Tensor | None,
    p: Tensor | None = None, into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, s dy B) of group `i` for its output's gradient dy, each empty where neither dx nor `sums` need it."""
    g, need_da = call.parts.groups[i], sums.of_inputs
    if p is None and WEIGHTS in call.keep and (need_dx or need_da):
        p = buffer(call, state, i, dy.dtype)
    return input_gradient(g.stack, dy, g.a, g.b, g.bias, g.scales, None, 0.0, need_dx, need_da, row, p, into)


def sums_of(g: Group, need: Sequence[bool]) -> FactorSums:
    """Gradients of a group's factors; `need`: of A and B of each layer in turn, as `Group.factors` has them."""
    wanted = [flag for i in range(len(g.a)) for flag in (need[2 * i], need[2 * i + 1], False)]
    return FactorSums(g.stack, g.a, g.b, g.bias, g.scales, wanted)


def gradients(sums: FactorSums) -> list[Tensor | None]:
    """Of A and B of each layer in turn."""
    found = sums.rounded(apart=False)
    return [t for i in range(0, len(found), 3) for t in found[i : i + 2]]


def normed(x: Tensor, weight: Tensor, eps: float, order: str, room: int) -> tuple[Tensor, Tensor]:
    """(norm of x [M, K] in rows with room, 1 / rms [M])."""
    y, r = rms_norm._forward(x, weight, eps, order, room)
    dispatch.record("rms_norm", dispatch.route("rms_norm", x))
    return y, r
