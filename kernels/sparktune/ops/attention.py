"""Attention through the fastest backend that is right for the call; PyTorch's kernels, chosen and guarded here.

    out[i] = sum_j p_ij v_j,   p_i = softmax_j(score_ij),   score_ij = scale q_i k_j, soft-capped: cap tanh(score / cap)

over the keys j that query i may see: those of its own document up to its own position (`causal`), the last `window` of
them its own included, where `mask` allows. A sink is one more score a head in the softmax's sum, with no value.

Shapes: q [B, S, H, D], k and v [B, Skv, Hkv, D], H a multiple of Hkv, so slices of a merged projection serve as they are
-> out [B, S, H, D]. Packed rows are [1, T, H, D] with cu_seqlens [N + 1]: 0, the ends of the N documents. Where queries
are fewer than keys they are the last of them.

`choose` is a pure function of shapes, dtype, device and what was asked for: never of whether a gradient is wanted, nor of
global switches, so a checkpoint's recompute takes the backend of its first pass. `choices()` says what was chosen and
why. What the rules guard against, each with a test:

- cuDNN's backward gives NaN with a mask and S % 128 == 64 (pytorch/pytorch#196678), and with one query
  (NVIDIA/cudnn-frontend#1072): it gets causal calls of 128 queries or more, and never a mask.
- FlashAttention's backward counts in 32 bits over tokens x heads x head_dim of its accumulator, 128 tokens more a document
  (Dao-AILab/flash-attention#2260): past 2**31 the heads are taken in groups.
- varlen_attn leaves gradients uninitialised past the last document (pytorch/pytorch#176793): what follows it is a document.
- The memory-efficient backward fails where a mask passes 2**31 elements (pytorch/pytorch#147585): masks are made for some
  queries at a time.
- A window of FlashAttention counts the keys before a query, one less than everyone else's.

Measured on one H100 (2 x 2048 tokens, 32 heads of 128): cuDNN 0.165 ms forward and 0.529 backward, FlashAttention 0.389 and
0.975. On sm_12x FlashAttention is the fused kernel that PyTorch has for both passes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from sparktune.ops import attention_backends as backends
from sparktune.ops import dispatch

Backend = Literal["cudnn", "flash", "varlen", "efficient", "flex", "math"]
INT32 = 2**31
HALF = (torch.float16, torch.bfloat16)
CUDNN = ((9, 0), (10, 0))  # where PyTorch itself prefers it, and measured on the first
CUDNN_QUERIES = 128
# FlashAttention's backward has no configuration for heads of 193 to 224 in 99 KB of shared memory.
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Call:
    """All that a choice depends on."""

    device: str  # a torch device type
    capability: tuple[int, int]  # (0, 0) off CUDA
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None
    softcap: bool = False
    sinks: bool = False
    mask: bool = False
    documents: int = 0  # 0: rows are not packed
    varlen: bool = True  # this PyTorch has varlen_attn
    varlen_window: bool = True  # and it takes a window

    @property
    def accumulator(self) -> int:
        """Elements of a backward's fp32 accumulator for dq or dk, whichever is larger."""
        rows = -(-max(self.queries, self.keys) // 128) * 128 + 128
        step = 32 if self.head_dim <= 128 else 64
        return (self.batch * rows + 128 * self.documents) * self.heads * (-(-self.head_dim // step) * step)


@dataclass(frozen=True)
class Choice:
    """A backend, why it was chosen, and in how many groups of heads it runs."""

    backend: Backend
    reason: str
    groups: int = 1


def choose(call: Call) -> Choice:
    """The backend for a call. Errors: ValueError for one key head past 2**31 elements, which no kernel can index."""
    backend, reason = _choose(call)
    if backend == "math" or call.accumulator < INT32:
        return Choice(backend, reason)
    each = call.kv_heads * (INT32 - 1) // call.accumulator
    if not each:
        raise ValueError(f"attention: one key head of {call.batch} x {call.queries} tokens passes 2**31 elements")
    groups = -(-call.kv_heads // each)
    return Choice(backend, f"{reason}; {groups} groups of heads, each below 2**31 elements", groups)


def _choose(call: Call) -> tuple[Backend, str]:
    c = call
    if not c.batch * c.queries * c.keys * c.heads * c.head_dim:
        return "math", "empty"
    if c.device != "cuda":
        return "math", f"the plain formula on {c.device}"
    if c.softcap or c.sinks:
        what = "soft-capped scores" if c.softcap else "sinks"
        if c.mask or c.head_dim > 256 or c.head_dim < 16 or not _efficient_dtype(c):
            return "math", f"no fused kernel takes {what} with this mask, dtype or head size"
        return "flex", f"{what}, which only FlexAttention fuses"
    efficient = _efficient_dtype(c) and c.head_dim % (8 if c.dtype in HALF else 4) == 0
    plain: Backend = "efficient" if efficient else "math"
    if c.mask:
        return plain, "a mask, with which cuDNN's backward can give NaN and FlashAttention does nothing"
    if c.dtype not in HALF or c.capability < (8, 0):
        return plain, f"{str(c.dtype).removeprefix('torch.')} on sm_{c.capability[0]}{c.capability[1]}"
    gap = c.capability in SMALL_SHARED_MEMORY and 192 < c.head_dim <= 224
    if c.head_dim > 256 or c.head_dim % 8 or gap:
        return plain, f"heads of {c.head_dim}, which FlashAttention does not take here"
    windowed = c.window is not None and c.window < c.keys
    if c.documents or windowed or (c.causal and c.queries not in (c.keys, 1)):
        what = (
            "packed documents" if c.documents else "a window" if windowed else "queries that are the last of their keys"
        )
        if c.varlen and (c.varlen_window or not windowed):
            return "varlen", f"{what}, by lengths and without a mask"
        return plain, f"{what}, and this PyTorch has no varlen_attn that takes it"
    square = c.causal and c.queries == c.keys
    if c.capability in CUDNN and square and c.queries >= CUDNN_QUERIES and c.head_dim <= 128:
        return "cudnn", "causal without a mask on Hopper or its successor, where cuDNN is twice as fast"
    return "flash", "no mask, 16 bits"


def _efficient_dtype(c: Call) -> bool:
    return c.dtype == torch.float32 or (c.dtype in HALF and c.capability >= (8, 0)) or c.dtype == torch.float16


_lock = threading.Lock()
_counts: dict[str, dict[str, int]] = {}


def choices() -> dict[str, dict[str, int | str]]:
    """Backend -> {"count": times chosen since the last `reset()`, "reason": why, several joined}; a copy.

    Eager calls are counted at each call, and compiled code not at all: its choice was made when it was traced.
    """
    with _lock:
        return {b: {"count": sum(r.values()), "reason": "; ".join(r)} for b, r in _counts.items()}


def reset() -> None:
    """Forget all counts."""
    with _lock:
        _counts.clear()


def _record(choice: Choice) -> None:
    if torch.compiler.is_compiling():
        return
    with _lock:
        reasons = _counts.setdefault(choice.backend, {})
        reasons[choice.reason] = reasons.get(choice.reason, 0) + 1


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, S, H, D] and keys and values [B, Skv, Hkv, D] -> [B, S, H, D]. Differentiable in q, k, v and sinks.

    `scale` is 1 / sqrt(D) unless given. `window`: keys a query sees, its own included; causal only. `sinks` [H].
    `cu_seqlens` int32 or int64 [N + 1]; with it B is 1, and `max_seqlen` is the longest document's length or more, which
    is not checked on a device, since that would wait for it. `mask`, boolean (true: may see) or added to the scores, has a
    shape that broadcasts to [B, H, S, Skv]; it further limits what `causal` allows. A query that may see nothing gets 0.
    Under autocast q, k and v take its dtype. Errors: ValueError for shapes, dtypes or options that don't fit.
    """
    dtype = dispatch.autocast_dtype(q)
    if dtype is not None:
        q, k, v = (t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, v))
    _check(q, k, v, causal, window, softcap, sinks, cu_seqlens, max_seqlen, mask)
    a = backends.Asked(causal, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
    if window is not None and window >= k.shape[1]:
        a = replace(a, window=None)
    if q.shape[1] == 1 and not a.window:
        a = replace(a, causal=False)  # the last of the keys sees them all
    if cu_seqlens is not None:
        cu_seqlens, max_seqlen = backends.documents(cu_seqlens, max_seqlen, q)
    choice = choose(describe(q, k, a, sinks, cu_seqlens, mask))
    _record(choice)  # before it runs, since a checkpoint's recompute may be left as soon as it has what it needs
    with torch.autocast(q.device.type, enabled=False):
        return backends.run(choice.backend, choice.groups, q, k, v, a, sinks, cu_seqlens, max_seqlen, mask)


def describe(
    q: Tensor, k: Tensor, a: backends.Asked, sinks: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None
) -> Call:
    """What `choose` needs to know of a call."""
    cuda = q.device.type == "cuda"
    capability = torch.cuda.get_device_capability(q.device) if cuda else (0, 0)
    return Call(
        q.device.type, cast("tuple[int, int]", tuple(capability)), q.dtype, q.shape[0], q.shape[1], k.shape[1], q.shape[2],
        k.shape[2], q.shape[3], a.causal, a.window, a.softcap is not None, sinks is not None, mask is not None,
        0 if cu_seqlens is None else cu_seqlens.numel() - 1, *backends.varlen_features(),
    )  # fmt: skip


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, sinks: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int | None, mask: Tensor | None,
) -> None:  # fmt: skip
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "attention: wanted q [B, S, H, D], k and v [B, Skv, Hkv, D], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"attention: q, k and v must be of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    others = [t for t in (k, v, sinks, mask) if t is not None]
    if any(t.device != q.device for t in others):
        devices = ", ".join(sorted({str(t.device) for t in (q, *others)}))
        raise ValueError(f"attention: all tensors must be on one device, got {devices}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: a window is of 1 key or more and causal, got {window} with causal={causal}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be positive, got {softcap}; leave it out for none")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"attention: sinks must be [{q.shape[2]}], one a head, got {list(sinks.shape)}")
    if mask is not None:
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if mask.dim() != 4 or any(have not in (1, want) for have, want in zip(mask.shape, full, strict=True)):
            raise ValueError(f"attention: mask must broadcast to {list(full)}, got {list(mask.shape)}")
        if mask.requires_grad or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError("attention: mask must be boolean or floating, and gets no gradient; detach it")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("attention: max_seqlen is of packed rows; give cu_seqlens too")
        return
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention: packed rows are [1, T, H, D] with as many keys, got {list(q.shape)}, {list(k.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"attention: cu_seqlens must be int32 or int64 [N + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if max_seqlen is not None and max_seqlen < 1:
        raise ValueError(f"attention: max_seqlen must be 1 or more, got {max_seqlen}")
