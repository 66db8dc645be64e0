"""How each backend of `attention` runs. All take q [B, S, H, D] and k, v [B, Skv, Hkv, D], and give [B, S, H, D].

`sdpa` and `varlen` hand strided views to PyTorch's fused kernels. `in_parts` is for what needs a mask: it takes some
queries at a time, with those keys alone that any of them may see, so that a mask never has more than 2**26 elements; each
part goes to the memory-efficient kernel or to the plain formula.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PART = 2**26  # elements of a mask that is made at a time
FLEX_BLOCK = 128  # queries of a block of FlexAttention's mask


@dataclass(frozen=True)
class Asked:
    """The options of a call that are numbers."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None


def run(
    backend: str, groups: int, q: Tensor, k: Tensor, v: Tensor, a: Asked, sinks: Tensor | None, cu: Tensor | None,
    longest: int | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """`backend` over all heads, or over `groups` of them one after another."""
    if groups == 1:
        return _one(backend, q, k, v, a, sinks, cu, longest, mask)
    each, share = -(-k.shape[2] // groups), q.shape[2] // k.shape[2]
    parts = []
    for first in range(0, k.shape[2], each):
        own, wide = slice(first, first + each), slice(first * share, (first + each) * share)
        m = mask[:, wide] if mask is not None and mask.shape[1] > 1 else mask
        s = None if sinks is None else sinks[wide]
        parts.append(_one(backend, q[:, :, wide], k[:, :, own], v[:, :, own], a, s, cu, longest, m))
    return torch.cat(parts, 2)


def _one(
    backend: str, q: Tensor, k: Tensor, v: Tensor, a: Asked, sinks: Tensor | None, cu: Tensor | None, longest: int | None,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if backend in ("cudnn", "flash"):
        return sdpa(backend, q, k, v, a)
    if backend == "varlen":
        return varlen(q, k, v, a, cu, longest)
    if backend == "flex":
        return flex(q, k, v, a, sinks, cu)
    if backend == "efficient" and mask is None and cu is None and a.window is None and q.shape[1] == k.shape[1]:
        return sdpa(backend, q, *_repeated(q, k, v), a)
    return in_parts(backend, q, k, v, a, sinks, cu, mask)


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, a: Asked, mask: Tensor | None = None) -> Tensor:
    """One of PyTorch's fused kernels, and no other: what it does not take is an error, not another kernel's work."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    qs, ks, vs = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel([kinds.get(backend, SDPBackend.EFFICIENT_ATTENTION)]):
        out = torch.nn.functional.scaled_dot_product_attention(
            qs, ks, vs, attn_mask=mask, is_causal=a.causal and mask is None, scale=a.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
    return out.transpose(1, 2)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    share = q.shape[2] // k.shape[2]
    return (k, v) if share == 1 else (k.repeat_interleave(share, 2), v.repeat_interleave(share, 2))


def documents(cu: Tensor, longest: int | None, q: Tensor) -> tuple[Tensor, int]:
    """Ends of documents as int32 on q's device, and the longest's length; the tokens after the last document added.

    These are documents too, of `longest` tokens at most, so that every token belongs to one: the kernels leave what does
    not uninitialised. On the host the ends are checked. Errors: ValueError for ends that decrease or don't fit.
    """
    tokens = q.shape[1]
    if cu.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = cu.diff()
        if int(cu[0]) != 0 or int(lengths.min()) < 0 or int(cu[-1]) > tokens:
            raise ValueError(f"attention: cu_seqlens must rise from 0 to at most {tokens}, got {cu.tolist()[:20]}")
        found = max(int(lengths.max()), 1)
        if longest is not None and longest < found:
            raise ValueError(f"attention: max_seqlen {longest} is less than the longest document, {found}")
        longest = longest or found
    longest = max(1, min(longest or tokens, tokens))
    cu = cu.to(q.device, torch.int32, non_blocking=True)
    pieces = torch.arange(1, -(-tokens // longest) + 1, dtype=torch.int64, device=q.device) * longest
    return torch.cat((cu, (cu[-1:] + pieces).clamp(max=tokens).int())), longest


def varlen_features() -> tuple[bool, bool]:
    """Whether this PyTorch has varlen_attn, and whether that takes a window."""
    parameters = _varlen_parameters()
    return bool(parameters), "window_size" in parameters


_read: dict[str, frozenset[str]] = {}  # not a cached function, whose cache torch.compile would ignore and say so


def _varlen_parameters() -> frozenset[str]:
    if "varlen" not in _read:
        try:
            from torch.nn.attention.varlen import varlen_attn

            _read["varlen"] = frozenset(inspect.signature(varlen_attn).parameters)
        except ImportError:
            _read["varlen"] = frozenset()
    return _read["varlen"]


def varlen(q: Tensor, k: Tensor, v: Tensor, a: Asked, cu: Tensor | None, longest: int | None) -> Tensor:
    """FlashAttention over documents; rows that are not packed are documents of one length."""
    parameters = _varlen_parameters()
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if cu is None:
        cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32, device=q.device) * n for n in (queries, keys))
        longest_q, longest_k = queries, keys
    else:
        cu_q = cu_k = cu
        longest_q = longest_k = longest or queries
    options: dict[str, Any] = {}
    if "window_size" in parameters:
        # FlashAttention counts the keys before a query, its own not among them.
        options["window_size"] = (-1 if a.window is None else a.window - 1, 0) if a.causal else (-1, -1)
    else:
        options["is_causal"] = a.causal
    if "scale" in parameters:
        options["scale"] = a.scale
    elif a.scale != q.shape[-1] ** -0.5:
        q = q * (a.scale * q.shape[-1] ** 0.5)
    if "enable_gqa" in parameters:
        options["enable_gqa"] = q.shape[2] != k.shape[2]
    from torch.nn.attention import varlen as library

    attend: Any = library.varlen_attn
    out: Tensor = attend(*(t.flatten(0, 1) for t in (q, k, v)), cu_q, cu_k, longest_q, longest_k, **options)
    return out.unflatten(0, (batch, queries))


def document_of(cu: Tensor, tokens: int) -> Tensor:
    """The document of each token, by number."""
    return torch.searchsorted(cu[1:], torch.arange(tokens, dtype=cu.dtype, device=cu.device), right=True)


def in_parts(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Asked,
    sinks: Tensor | None,
    cu: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """What needs a mask, some queries at a time."""
    out = []
    for rows, keys, allowed, bias in _parts(q, k, a, cu, mask):
        qs, ks, vs = q[:, rows], k[:, keys], v[:, keys]
        if not qs.numel():
            out.append(qs)
            continue
        empty = None if allowed is None else ~allowed.any(-1, keepdim=True)
        if backend == "efficient":
            assert sinks is None
            assert a.softcap is None
            use = allowed
            if allowed is not None and empty is not None:
                use = allowed | empty  # a row of nothing makes NaN in a kernel; its result is put to 0 below
                if bias is not None:
                    use = torch.where(use, torch.where(empty, 0.0, bias), float("-inf")).to(q.dtype)
            use = None if use is None else use.expand(-1, -1, -1, ks.shape[1])
            part = sdpa(backend, qs, *_repeated(qs, ks, vs), Asked(False, a.scale, None, None), use)
            if empty is not None:
                part = torch.where(empty.transpose(1, 2), 0.0, part)
        else:
            part = plain(qs, ks, vs, a, sinks, allowed, bias)
        out.append(part)
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _parts(
    q: Tensor, k: Tensor, a: Asked, cu: Tensor | None, mask: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None, Tensor | None]]:
    """(queries, keys that any of them may see, which [.., .., S, Skv] are allowed, what is added to their scores)."""
    queries, keys, device = q.shape[1], k.shape[1], q.device
    shift = keys - queries  # queries are the last of the keys
    each = max(1, PART // max(1, keys * (mask.shape[0] * mask.shape[1] if mask is not None else 1)))
    document = None if cu is None else document_of(cu, keys)
    for first in range(0, max(1, queries), each):
        last = min(first + each, queries)
        low = 0 if a.window is None else max(0, first + shift - a.window + 1)
        high = max(low, min(keys, last + shift)) if a.causal else keys
        i = torch.arange(first, last, device=device)[:, None] + shift
        j = torch.arange(low, high, device=device)[None, :]
        allowed, bias = None, None
        if a.causal:
            allowed = j <= i
            if a.window is not None:
                allowed = allowed & (j > i - a.window)
        if document is not None:
            same = document[first:last, None] == document[None, low:high]
            allowed = same if allowed is None else allowed & same
        allowed = None if allowed is None else allowed[None, None]
        if mask is not None:
            m = mask[:, :, first:last] if mask.shape[2] > 1 else mask
            m = m[..., low:high] if mask.shape[3] > 1 else m
            bias = None if m.dtype == torch.bool else m
            m = m if bias is None else m != float("-inf")
            allowed = m if allowed is None else allowed & m
        yield slice(first, last), slice(low, high), allowed, bias


def plain(
    q: Tensor, k: Tensor, v: Tensor, a: Asked, sinks: Tensor | None, allowed: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The formula, in fp32 or wider, rounded once at the end."""
    wide = torch.promote_types(q.dtype, torch.float32)
    share = q.shape[2] // k.shape[2]
    # [B, Hkv, share, S, D] and [B, Hkv, 1, Skv, D]
    qs = q.to(wide).unflatten(2, (k.shape[2], share)).permute(0, 2, 3, 1, 4)
    ks, vs = (t.to(wide).transpose(1, 2).unsqueeze(2) for t in (k, v))
    score = (qs * a.scale @ ks.transpose(-1, -2)).flatten(1, 2)  # [B, H, S, Skv]
    if a.softcap is not None:
        score = a.softcap * torch.tanh(score / a.softcap)
    if bias is not None:
        score = score + torch.where(bias == float("-inf"), 0.0, bias).to(wide)
    if allowed is not None:
        score = score.masked_fill(~allowed, float("-inf"))
    top = score.detach().amax(-1, keepdim=True) if score.shape[-1] else score.new_zeros((*score.shape[:-1], 1))
    if sinks is not None:
        sink = sinks.to(wide)[:, None, None]
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == float("-inf"), 0.0, top)
    p = torch.exp(score - top)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    p = p / torch.where(total == 0, 1.0, total)
    out = p.unflatten(1, (k.shape[2], share)) @ vs
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


@functools.cache
def _flex() -> tuple[Callable[..., Any], Callable[..., Any], bool]:
    """FlexAttention compiled, the same as it is, and whether it calls its log-sum-exp an auxiliary output."""
    from torch.nn.attention.flex_attention import flex_attention

    aux = "return_aux" in inspect.signature(flex_attention).parameters
    return torch.compile(flex_attention, dynamic=False), flex_attention, aux


@functools.lru_cache(maxsize=64)
def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _block_mask(a: Asked, queries: int, keys: int, device: torch.device, document: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    shift, window = keys - queries, a.window

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + shift if a.causal else j >= 0
        if window is not None:
            seen = seen & (j > i + shift - window)
        if document is not None:
            seen = seen & (document[i] == document[j])
        return seen

    return create_block_mask(visible, None, None, queries, keys, device=device)


_block_mask_of_lengths = functools.lru_cache(maxsize=32)(_block_mask)


def flex_options(queries: int, share: int) -> dict[str, str]:
    """FlexAttention's kernel options for `queries` tokens, `share` heads of q for each of k.

    Below 128 queries PyTorch (2.11 to 2.14 at least) takes its kernel for decoding, in blocks of the next power of two of
    queries times heads, and fails to compile (NoValidChoicesError) where such a block passes its mask's 128.
    """
    return {"BACKEND": "TRITON"} if queries < FLEX_BLOCK < queries * share else {}


def flex(q: Tensor, k: Tensor, v: Tensor, a: Asked, sinks: Tensor | None, cu: Tensor | None) -> Tensor:
    """FlexAttention: soft-capped scores, and sinks by the log-sum-exp, to which the sinks' gradient flows."""
    compiled, eager, aux = _flex()
    function = eager if torch.compiler.is_compiling() else compiled
    shape = (q.shape[1], k.shape[1], q.device)
    make, of = (_block_mask_of_lengths, None) if cu is None else (_block_mask, document_of(cu, k.shape[1]))
    block_mask = make(a, *shape, of)
    options: dict[str, Any] = {}
    if sinks is not None:
        from torch.nn.attention import flex_attention as module

        options = {"return_aux": module.AuxRequest(lse=True)} if aux else {"return_lse": True}
    found = function(
        *(t.transpose(1, 2) for t in (q, k, v)), score_mod=None if a.softcap is None else _capped(a.softcap),
        block_mask=block_mask, scale=a.scale, enable_gqa=q.shape[2] != k.shape[2],
        kernel_options=flex_options(q.shape[1], q.shape[2] // k.shape[2]), **options,
    )  # fmt: skip
    if sinks is None:
        return found.transpose(1, 2)  # type: ignore[no-any-return]
    out, lse = (found[0], found[1].lse) if aux else found
    wide = torch.promote_types(q.dtype, torch.float32)
    kept = torch.sigmoid(lse.to(wide) - sinks.to(wide)[:, None])  # the share of the sum that is not the sink's
    return (out.to(wide) * kept[..., None]).to(q.dtype).transpose(1, 2)
