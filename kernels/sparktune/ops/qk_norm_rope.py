r"""RMSNorm of every head of q and k, then the rotary embedding: what Qwen3 and Gemma 3 do before attention, in one pass.

Forward, for a head x of D elements, weight w [D], r = 1 / sqrt(mean(x^2) + eps), in fp32 until stated:

    llama (Qwen3):  n = round_x(w * round_x(x r))
    gemma:          n = round_x(x r (1 + w))
    y = turn(n) as `rope` does: a' = a c - b s, b' = b c + a s for the pair (x[i], x[i + R/2]), rounded once

so a result is bit for bit `rope` of `rms_norm`. Backward, with the inverse turn dn of dy, h = x r, the gain v = w or
1 + w, and g = dn v:

    dx = r (g - h mean(g h))
    dw = sum over tokens and heads of dn round_x(h) (llama)  or  dn h (gemma)

dn stays in fp32, where two ops would round it. r is computed again from x, which backward reads anyway.

Shapes: q [B, S, H, D] and k [B, S, Hkv, D] with free strides, weights [D] of any float dtype, tables cos and sin
[L, R/2] fp32 with R <= D, positions [B, S] int32 or int64, as `rope` takes them. Results contiguous, in q's dtype. dw is
summed in fp32 and rounded once.

Bytes: forward reads and writes q and k, backward reads q, k, and their gradients and writes two: 2 and 3 (H + Hkv) D
elements a token. The norms and the turn apart move 4 and 5. While the weights are frozen a program takes a tile or two of
one token's heads; when either is trained, programs take many tokens each and leave one row of partial sums, added in a
fixed order. Backward multiplies and adds in one rounding where it can (FMA); forward, whose roundings are promised, does not.

Source: Zhang and Sennrich 2019; Su et al. 2021; the rounding orders are those of Qwen3Attention and Gemma3Attention in
transformers, but for the turn, which is rounded once (see `rope`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.fused import Fused
from sparktune.ops.head_norms import backward_heads, forward_heads
from sparktune.ops.head_problems import head_bytes, head_inputs, heads_of, rows_of, table_inputs, tail
from sparktune.ops.head_tiles import BATCHES, place, store
from sparktune.ops.qk_norm_launches import Config, Way, launches
from sparktune.ops.rms_norm import VARIANTS
from sparktune.ops.rms_norm import reference as rms_norm_reference
from sparktune.ops.rope import check, rotated, token_strides, unit
from sparktune.ops.spec import FLOATS, Input, Law, Mutant, OpSpec, Problem, Tensors


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, eps: float = 1e-6, variant: str = "llama", compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, in the same rounding order; the oracle is this with float64 tensors and compute=float64."""
    at = torch.arange(q.shape[1], device=q.device) if positions is None else positions.long()
    c, s = (table[at].to(compute).unsqueeze(-2) for table in (cos, sin))
    n = (rms_norm_reference(x, w, eps, variant, compute=compute).to(x.dtype) for x, w in ((q, q_weight), (k, k_weight)))
    q, k = (rotated(x, c, s) for x in n)
    return q, k


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, position_ptr, length, q_batch, q_token, q_head,
    k_batch, k_token, k_head, q_out_batch, q_out_token, q_out_head, k_out_batch, k_out_token, k_out_head,
    position_batch, position_token, eps, POSITIONS: tl.constexpr, GEMMA: tl.constexpr, SHARED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
):  # fmt: skip
    """A group of heads of one token a program, of q or of k; names such as q_token are strides in elements."""
    batch, token, group, of_q = place(Q_HEADS, K_HEADS, Q_TILE * Q_TILES, K_TILE * K_TILES)
    at = position_ptr + batch * position_batch + token * position_token
    if of_q:
        forward_heads(
            q_ptr + batch * q_batch + token * q_token, q_out_ptr + batch * q_out_batch + token * q_out_token, group,
            q_head, q_out_head, wq_ptr, cos_ptr, sin_ptr, at, token, length, eps, POSITIONS, GEMMA, SHARED, HALF, REST,
            HALF_BLOCK, REST_BLOCK, Q_HEADS, Q_TILE, Q_TILES,
        )  # fmt: skip
    else:
        forward_heads(
            k_ptr + batch * k_batch + token * k_token, k_out_ptr + batch * k_out_batch + token * k_out_token, group,
            k_head, k_out_head, wk_ptr, cos_ptr, sin_ptr, at, token, length, eps, POSITIONS, GEMMA, SHARED, HALF, REST,
            HALF_BLOCK, REST_BLOCK, K_HEADS, K_TILE, K_TILES,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, q_out_ptr, k_out_ptr, wq_ptr, wk_ptr, dw_ptr, cos_ptr, sin_ptr, position_ptr,
    tokens, tokens_each, sequence, length, dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head,
    q_batch, q_token, q_head, k_batch, k_token, k_head, q_out_batch, q_out_token, q_out_head,
    k_out_batch, k_out_token, k_out_head, position_batch, position_token, eps, POSITIONS: tl.constexpr,
    GEMMA: tl.constexpr, NEED_DW: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k. A group of heads of one token a program, of q or of k; with NEED_DW all heads of
    `tokens_each` tokens, whose part of both dw goes to dw_ptr [programs, 2, D], fp32."""
    EXTRA: tl.constexpr = REST_BLOCK if REST else HALF_BLOCK
    qa = tl.zeros((Q_TILE, HALF_BLOCK), tl.float32)
    qb = tl.zeros((Q_TILE, HALF_BLOCK), tl.float32)
    qe = tl.zeros((Q_TILE, EXTRA), tl.float32)
    ka = tl.zeros((K_TILE, HALF_BLOCK), tl.float32)
    kb = tl.zeros((K_TILE, HALF_BLOCK), tl.float32)
    ke = tl.zeros((K_TILE, EXTRA), tl.float32)
    if NEED_DW:
        first = tl.program_id(0) * tokens_each
        for i in range(tl.minimum(tokens_each, tokens - first)):
            batch = ((first + i) // sequence).to(tl.int64)
            token = ((first + i) % sequence).to(tl.int64)
            at = position_ptr + batch * position_batch + token * position_token
            for head in range(0, Q_HEADS, Q_TILE):
                qa, qb, qe = backward_heads(
                    dq_ptr + batch * dq_batch + token * dq_token, q_ptr + batch * q_batch + token * q_token,
                    q_out_ptr + batch * q_out_batch + token * q_out_token, wq_ptr, head, dq_head, q_head,
                    q_out_head, cos_ptr, sin_ptr, at, token, length, eps, qa, qb, qe, POSITIONS, GEMMA, NEED_DW, HALF, REST,
                    HALF_BLOCK, REST_BLOCK, Q_HEADS, Q_TILE,
                )  # fmt: skip
            for head in range(0, K_HEADS, K_TILE):
                ka, kb, ke = backward_heads(
                    dk_ptr + batch * dk_batch + token * dk_token, k_ptr + batch * k_batch + token * k_token,
                    k_out_ptr + batch * k_out_batch + token * k_out_token, wk_ptr, head, dk_head, k_head,
                    k_out_head, cos_ptr, sin_ptr, at, token, length, eps, ka, kb, ke, POSITIONS, GEMMA, NEED_DW, HALF, REST,
                    HALF_BLOCK, REST_BLOCK, K_HEADS, K_TILE,
                )  # fmt: skip
        here = tl.full((1, 1), 1, tl.int1)
        row = dw_ptr + tl.program_id(0).to(tl.int64) * 2 * (2 * HALF + REST)
        qa, qb, qe = tl.sum(qa, 0)[None, :], tl.sum(qb, 0)[None, :], tl.sum(qe, 0)[None, :]
        store(row, qa, qb, qe, here, False, HALF, REST, HALF_BLOCK, REST_BLOCK)
        ka, kb, ke = tl.sum(ka, 0)[None, :], tl.sum(kb, 0)[None, :], tl.sum(ke, 0)[None, :]
        store(row + 2 * HALF + REST, ka, kb, ke, here, False, HALF, REST, HALF_BLOCK, REST_BLOCK)
    else:
        batch, token, group, of_q = place(Q_HEADS, K_HEADS, Q_TILE, K_TILE)
        at = position_ptr + batch * position_batch + token * position_token
        if of_q:
            backward_heads(
                dq_ptr + batch * dq_batch + token * dq_token, q_ptr + batch * q_batch + token * q_token,
                q_out_ptr + batch * q_out_batch + token * q_out_token, wq_ptr, group * Q_TILE, dq_head, q_head,
                q_out_head, cos_ptr, sin_ptr, at, token, length, eps, qa, qb, qe, POSITIONS, GEMMA, NEED_DW, HALF, REST,
                HALF_BLOCK, REST_BLOCK, Q_HEADS, Q_TILE,
            )  # fmt: skip
        else:
            backward_heads(
                dk_ptr + batch * dk_batch + token * dk_token, k_ptr + batch * k_batch + token * k_token,
                k_out_ptr + batch * k_out_batch + token * k_out_token, wk_ptr, group * K_TILE, dk_head, k_head,
                k_out_head, cos_ptr, sin_ptr, at, token, length, eps, ka, kb, ke, POSITIONS, GEMMA, NEED_DW, HALF, REST,
                HALF_BLOCK, REST_BLOCK, K_HEADS, K_TILE,
            )  # fmt: skip


def forward_into(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None, eps: float, variant: str,
) -> None:  # fmt: skip
    """Results into q_out and k_out, any views with unit last stride. Not differentiable and not counted."""
    b, s, h, d = q.shape
    if q.numel() + k.numel() == 0:
        return
    if b > BATCHES:
        for i in range(0, b, BATCHES):
            n = slice(i, i + BATCHES)
            at = None if positions is None else positions[n]
            forward_into(q[n], k[n], q_out[n], k_out[n], q_weight, k_weight, cos, sin, at, eps, variant)
        return
    q, k, cos, sin = unit(q), unit(k), cos.contiguous(), sin.contiguous()
    c = Config.choose(b * s, h, k.shape[2], d, 2 * cos.shape[1], DeviceProperties.of(q.device), "forward")
    dispatch.launch(
        forward_kernel, (s * c.groups, b), q, q, k, q_out, k_out, q_weight.contiguous(), k_weight.contiguous(), cos, sin,
        cos if positions is None else positions, cos.shape[0], *token_strides(q, k, q_out, k_out),
        *((0, 0) if positions is None else positions.stride()), eps, POSITIONS=positions is not None,
        GEMMA=variant == "gemma", **c.constants("forward"), num_warps=c.heads.num_warps,
    )  # fmt: skip


def backward_into(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float, variant: str, sums: bool,
) -> Tensor:  # fmt: skip
    """Gradients of q and k into q_out and k_out, such as slices of a merged one; both dw [2, D] in fp32 with `sums`."""
    b, s, h, d = q.shape
    if q.numel() + k.numel() == 0:
        return torch.zeros((2, d), dtype=torch.float32, device=q.device)
    if b > BATCHES and not sums:
        for i in range(0, b, BATCHES):
            n = slice(i, i + BATCHES)
            at = None if positions is None else positions[n]
            nothing = backward_into(
                dq[n], dk[n], q[n], k[n], q_out[n], k_out[n], q_weight, k_weight, cos, sin, at, eps, variant, sums
            )
        return nothing
    dq, dk, q, k, cos, sin = unit(dq), unit(dk), unit(q), unit(k), cos.contiguous(), sin.contiguous()
    way: Way = "sums" if sums else "backward"
    c = Config.choose(b * s, h, k.shape[2], d, 2 * cos.shape[1], DeviceProperties.of(q.device), way)
    partial = torch.empty((c.programs if sums else 1, 2, d), dtype=torch.float32, device=q.device)
    dispatch.launch(
        backward_kernel, c.programs if sums else (s * c.groups, b), q, dq, dk, q, k, q_out, k_out, q_weight.contiguous(),
        k_weight.contiguous(), partial, cos, sin, cos if positions is None else positions, b * s, c.tokens_each, s,
        cos.shape[0], *token_strides(dq, dk, q, k, q_out, k_out), *((0, 0) if positions is None else positions.stride()), eps,
        fp_fusion=True, POSITIONS=positions is not None, GEMMA=variant == "gemma", NEED_DW=sums, **c.constants(way),
        num_warps=c.heads.num_warps,
    )  # fmt: skip
    return partial.sum(0) if sums else partial[0]


def _new(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    eps: float, variant: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = _new(q), _new(k)
    forward_into(q, k, *out, q_weight, k_weight, cos, sin, positions, eps, variant)
    return out


def _backward(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None, eps: float, variant: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, sums = (_new(q), _new(k)), needs[2] or needs[3]
    dw = backward_into(dq, dk, q, k, *out, q_weight, k_weight, cos, sin, positions, eps, variant, sums)
    if not sums:  # nothing reads them
        return *out, torch.empty_like(q_weight), torch.empty_like(k_weight)
    # Copies, since neither may be a view of the other's memory.
    return *out, dw[0].to(q_weight.dtype, copy=True), dw[1].to(k_weight.dtype, copy=True)


_OP = Fused(
    "qk_norm_rope", _forward, _backward, reference=reference, outputs=2, grads=("q", "k", "q_weight", "k_weight")
)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, eps: float = 1e-6, variant: str = "llama",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k, each head normalised and turned by its position: [B, S, heads, D] each, contiguous.

    Differentiable once, in q, k and the weights [D]. Tables and positions as `rope` takes them. Errors: ValueError for
    what `rope` refuses, weights that don't fit, or an unknown variant.
    """
    at = check("qk_norm_rope", q, k, cos, sin, positions)
    d = q.shape[3]
    if q_weight.shape != (d,) or k_weight.shape != (d,):
        raise ValueError(f"qk_norm_rope: weights must be [{d}], got {list(q_weight.shape)} and {list(k_weight.shape)}")
    if q_weight.dtype not in FLOATS or k_weight.dtype not in FLOATS:
        raise ValueError(f"qk_norm_rope: weights must be fp32, bf16 or fp16, got {q_weight.dtype} and {k_weight.dtype}")
    if variant not in VARIANTS:
        raise ValueError(f"qk_norm_rope: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    q, k = _OP(q, k, q_weight, k_weight, cos, sin, at, eps, variant)
    return q, k


def _inputs(p: Problem) -> dict[str, Input]:
    """`frozen` 1: the weight of q; 2: both."""
    d, centre, frozen = p.dims["head_dim"], 0.0 if p.variant == "gemma" else 1.0, p.dims.get("frozen", 0)
    weights = {
        f"{n}_weight": Input((d,), p.dtype, "parameter", grad=frozen < at, centre=centre, spread=0.5)
        for n, at in (("q", 1), ("k", 2))
    }
    return head_inputs(p) | weights | table_inputs(p.dims)


def _call(t: Tensors, p: Problem) -> Tensors:
    q, k, at = heads_of(t, p)
    out = qk_norm_rope(
        q, k, t["q_weight"], t["k_weight"], t["cos"], t["sin"], at, p.scalars["eps"], p.variant
    )  # fmt: skip
    return rows_of(*out)


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensors:
    q, k, at = heads_of(t, p)
    return rows_of(
        *reference(
            q, k, t["q_weight"], t["k_weight"], t["cos"], t["sin"], at, p.scalars["eps"], p.variant,
            compute or torch.float32,
        )
    )  # fmt: skip


def _exact(t: Tensors, p: Problem, slack: float) -> tuple[Tensors, Tensors]:
    """Lowest and highest results when a normalised head, before it is rounded, is right to a relative `slack`."""
    q, k, at = heads_of({n: x.detach() for n, x in t.items()}, p)
    at = torch.arange(q.shape[1], device=q.device) if at is None else at.long()
    c, s = (t[n][at].double().unsqueeze(-2) for n in ("cos", "sin"))
    low, high = [], []
    for x, w in ((q, t["q_weight"].detach()), (k, t["k_weight"].detach())):
        h = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + p.scalars["eps"])
        ends = [h * (1 - slack), h * (1 + slack)]
        if p.variant == "gemma":
            ends = [(end * (1 + w.double())).float().to(p.dtype).double() for end in ends]
        else:
            ends = [(w * end.float().to(p.dtype)).double() for end in ends]
        middle, spread = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]).abs() / 2
        y, reach = rotated(middle, c, s), rotated(spread, c.abs(), -s.abs()).abs()
        # rotated() takes b s away in the first half and adds it in the second: turn both spreads the adding way.
        half = c.shape[-1]
        reach[..., half : 2 * half] = spread[..., half : 2 * half] * c.abs() + spread[..., :half] * s.abs()
        reach = reach + 2.0**-22 * (
            y.abs() + middle.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
        )  # the turn's own fp32 roundings
        low.append((y - reach).float().to(p.dtype))
        high.append((y + reach).float().to(p.dtype))
    return rows_of(*low), rows_of(*high)


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    forward = head_bytes(p, which)
    return forward if which == "forward" else forward // 2 * 3


def _permuted(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    there = {n: t[n].flip(0) for n in ("q", "k", "positions")}
    return call(t, p).flip(0), call({**t, **there}, p)


def _composed(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    from sparktune.ops.rms_norm import rms_norm
    from sparktune.ops.rope import rope

    q, k, at = heads_of(t, p)
    q, k = (rms_norm(x, t[f"{name}_weight"], p.scalars["eps"], p.variant) for name, x in (("q", q), ("k", k)))
    return call(t, p), rows_of(*rope(q, k, t["cos"], t["sin"], at))["q"]


MUTANTS = Mutant.table(
    """no-eps @head_norms: eps left out of the forward
- / (2 * HALF + REST) + eps)
+ / (2 * HALF + REST))
backward-eps @head_norms: eps left out of the backward
- r = tl.rsqrt(over_head(a * a, b * b, e * e, REST) / D + eps)
+ r = tl.rsqrt(over_head(a * a, b * b, e * e, REST) / D)
rest-not-counted @head_norms: the mean over what turns alone
- total += tl.sum(e, 1)
+ total += 0.0
llama-unrounded @head_norms: Llama's head not rounded before the weight
- if not GEMMA:
+ if False:
norm-unrounded @head_norms: the norm's result not rounded before the turn
- a = rounded(like_llama(a * r, dtype, GEMMA) * wa, dtype)
+ a = like_llama(a * r, dtype, GEMMA) * wa
gemma-plain-weight @head_norms: Gemma's weight without the one
- a, b, e = 1.0 + a, 1.0 + b, 1.0 + e
+ a, b, e = a, b, e
halves-share-weights @head_norms: the second half multiplied by the first half's weights
- like_llama(b * r, dtype, GEMMA) * wb
+ like_llama(b * r, dtype, GEMMA) * wa
keys-by-query-weight: keys multiplied by the queries' weight
- k_head, k_out_head, wk_ptr
+ k_head, k_out_head, wq_ptr
first-tile-again @head_norms: a program's first tile in place of its others
- tile = load_heads(ptr, at, stride,
+ tile = load_heads(ptr, first, stride,
frozen-keys-by-query-weight: the gradient of keys taken with the queries' weight
- wk_ptr, group * K_TILE, dk_head, k_head,
+ wq_ptr, group * K_TILE, dk_head, k_head,
group-of-queries @head_tiles: groups of keys begin where those of queries do
- tl.where(of_q, group, group - q_groups), of_q
+ group, of_q
batch-lost @head_tiles: every sequence is the first
- return tl.program_id(1).to(tl.int64),
+ return tl.program_id(1).to(tl.int64) * 0,
sign @head_norms: the turn taken the other way
- a, b = a * c - b * s, b * c + a * s
+ a, b = a * c + b * s, b * c - a * s
not-turned-back @head_norms: the gradient turned on instead of back
- ga, gb = da * c + db * s, db * c - da * s
+ ga, gb = da * c - db * s, db * c + da * s
no-projection @head_norms: dx without the derivative of r
- (ga - a * along) * r
+ ga * r
projection-of-half @head_norms: the projection taken over the first half
- along = over_head(ga * a, gb * b, ge * e, REST)
+ along = over_head(ga * a, 0.0 * b, ge * e, REST)
projection-unscaled @head_norms: the projection of what came from memory taken for that of the normalised head
- / D * r * r
+ / D * r
dw-last-token @head_norms: weight gradients of a program's last tokens alone
- dwa += ga *
+ dwa = ga *
dw-weighted @head_norms: the weight gradient taken after the weight
- dwb += gb *
+ dwb += gb * wb *
dw-exchanged: partial sums of q and k in each other's place
- return *out, dw[0].to(q_weight.dtype, copy=True), dw[1].to(
+ return *out, dw[1].to(q_weight.dtype, copy=True), dw[0].to(
keys-weight-alone: no sums where only the keys' weight is trained
- sums = (_new(q), _new(k)), needs[2] or needs[3]
+ sums = (_new(q), _new(k)), needs[2] and needs[3]
last-token-missing: a program leaves its last token out
- range(tl.minimum(tokens_each, tokens - first))
+ range(tl.minimum(tokens_each, tokens - first) - 1)
positions-ignored @head_norms: backward without the given positions
- length, POSITIONS, HALF, HALF_BLOCK, ROWS)
-     ga, gb
+ length, False, HALF, HALF_BLOCK, ROWS)
+     ga, gb
gradient-stride: the gradient read with q's token stride
- for head in range(0, Q_HEADS, Q_TILE):
-                 qa, qb, qe = backward_heads(
-                     dq_ptr + batch * dq_batch + token * dq_token,
+ for head in range(0, Q_HEADS, Q_TILE):
+                 qa, qb, qe = backward_heads(
+                     dq_ptr + batch * dq_batch + token * q_token,
frozen-gradient-stride: that, where the weights are frozen
- if of_q:
-             backward_heads(
-                 dq_ptr + batch * dq_batch + token * dq_token,
+ if of_q:
+             backward_heads(
+                 dq_ptr + batch * dq_batch + token * q_token,
int32-offset @head_tiles: offsets in 32 bits
- token.to(tl.int64), tl.where
+ token, tl.where
gradient-over-input: dq written over the saved q
- out, sums = (_new(q), _new(k))
+ out, sums = ((q.detach() if q.is_contiguous() else _new(q)), _new(k))
silent-fallback: the reference run in place of the kernel
- q, k = _OP(q, k, q_weight, k_weight, cos, sin, at, eps, variant)
+ q, k = reference(q, k, q_weight, k_weight, cos, sin, at, eps, variant)
"""
)

OP = OpSpec(
    name="qk_norm_rope",
    summary="RMSNorm of each head of q and k and the rotary embedding in one pass, forward and backward",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "rotary": 16},
        "partial": {
            "rows": 4, "batch": 2, "heads": 3, "kv_heads": 1, "head_dim": 20, "rotary": 12, "positions": 32, "gap": 4,
        },
        "frozen": {
            "rows": 2, "heads": 1, "kv_heads": 1, "head_dim": 96, "rotary": 96, "positions": 0, "frozen": 2, "gap": 8,
        },
        "many heads": {"rows": 2, "heads": 20, "kv_heads": 17, "head_dim": 128, "rotary": 128, "frozen": 1},
        "wide heads": {"rows": 2, "heads": 4, "kv_heads": 3, "head_dim": 256, "rotary": 256, "frozen": 2},
        "no rows": {"rows": 0, "heads": 2, "kv_heads": 1, "head_dim": 8, "rotary": 8},
        "far": {"rows": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "rotary": 16},
        "huge": {
            "rows": 2**18 + 4, "columns": 8192, "heads": 64, "kv_heads": 1, "head_dim": 128, "rotary": 128,
            "length": 4096,
        },
        "speed": {"rows": 65536, "heads": 32, "kv_heads": 8, "head_dim": 128, "rotary": 128, "length": 4096},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=launches,
    bytes_moved=_bytes,
    flops=lambda p, which: (
        (7 if which == "forward" else 14) * p.dims["rows"] * (p.dims["heads"] + p.dims["kv_heads"]) * p.dims["head_dim"]
    ),
    scalars={"eps": 1e-6},
    exact=_exact,
    exact_slack=2e-6,  # sums of squares are added in another order
    tail=tail,
    laws=(Law("rope of rms_norm", _composed, tolerance=0.05), Law("tokens commute", _permuted)),
    mutants=MUTANTS,
)  # fmt: skip
