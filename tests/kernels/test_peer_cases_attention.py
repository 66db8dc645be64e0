"""What broke other libraries' attention: masks on cuDNN, documents that leak, windows off by one, 32-bit counts, recompute.

Where there is no GPU the kernels of PyTorch are stood in for by functions with their documented behaviour, the traps
included: `varlen_like_flash` leaves what no document covers uninitialised, and counts a window as FlashAttention does.
"""

import itertools
from dataclasses import fields

import pytest
import torch
from sparktune.ops import attention as A
from sparktune.ops import attention_backends as backends
from sparktune.ops.attention import Call, attention, choices, choose
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.kernels(together=True)
GPU = torch.cuda.is_available()
BF16 = torch.bfloat16


def tensors(tokens=24, heads=4, kv_heads=2, head_dim=16, batch=1, dtype=None, device="cpu"):
    g = torch.Generator().manual_seed(7)
    dtype = dtype or (BF16 if GPU else torch.float64)
    shape = ((batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shape]


class _Poison(torch.autograd.Function):
    """Gradients are NaN where `covered` is false: memory that a kernel never wrote."""

    @staticmethod
    def forward(ctx, x, covered):
        ctx.save_for_backward(covered)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (covered,) = ctx.saved_tensors
        return torch.where(covered[:, None, None], grad, float("nan")), None


def varlen_like_flash(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size=(-1, -1), enable_gqa=False):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.dim() == 3
    assert enable_gqa or q.shape[1] == k.shape[1]
    covered = torch.zeros(q.shape[0], dtype=torch.bool)
    left, right = window_size
    for first, last in itertools.pairwise(cu_q.tolist()):
        covered[first : min(last, first + max_q)] = True
    q, k, v = (
        _Poison.apply(t, covered if len(t) == len(covered) else torch.ones(len(t), dtype=torch.bool)) for t in (q, k, v)
    )
    out = torch.full_like(q, float("nan"))
    pairs = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (first, last), (begin, end) in pairs:
        last, end = min(last, first + max_q), min(end, begin + max_k)
        if last == first:
            continue
        i = torch.arange(last - first)[:, None] + (end - begin) - (last - first)
        j = torch.arange(end - begin)[None, :]
        see = torch.ones(len(i), j.shape[1], dtype=torch.bool)
        see = see & (j >= i - left) if left >= 0 else see
        see = see & (j <= i + right) if right >= 0 else see
        share = q.shape[1] // k.shape[1]
        ks, vs = (t[begin:end].repeat_interleave(share, 1) for t in (k, v))
        score = torch.einsum("ihd,jhd->hij", q[first:last], ks) * scale
        p = torch.softmax(score.masked_fill(~see, float("-inf")), -1)
        out = torch.cat((out[:first], torch.einsum("hij,jhd->ihd", p, vs), out[last:]))
    return out


def flex_like_pytorch(q, k, v, score_mod, block_mask, scale, enable_gqa, kernel_options, return_aux=None):
    """What flex_attention documents, since it has no backward on a CPU; and where it has no kernel on a GPU."""
    from types import SimpleNamespace

    share = q.shape[1] // k.shape[1]
    assert enable_gqa == (share > 1)
    decodes = q.shape[2] < 128 and kernel_options.get("BACKEND", "AUTO") == "AUTO"
    rows = 1 << (q.shape[2] * share - 1).bit_length()
    assert not decodes or 128 % max(rows, 16) == 0, "NoValidChoicesError"
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    score = q @ k.repeat_interleave(share, 1).transpose(-1, -2) * scale
    score = score if score_mod is None else score_mod(score, zero, zero, i, j)
    score = score.masked_fill(~block_mask.mask_mod(zero, zero, i, j), float("-inf"))
    out = torch.softmax(score, -1) @ v.repeat_interleave(share, 1)
    return out if return_aux is None else (out, SimpleNamespace(lse=score.logsumexp(-1)))


@pytest.fixture(params=["math", "efficient", "varlen", "flex"])
def backend(request, monkeypatch):
    """One backend for every call, stood in for where there is no GPU."""
    name = request.param
    monkeypatch.setattr(A, "choose", lambda call: A.Choice(name, "this test"))
    if not GPU:
        import torch.nn.attention.varlen as library

        monkeypatch.setattr(library, "varlen_attn", varlen_like_flash)
        monkeypatch.setattr(backends, "_flex", lambda: (flex_like_pytorch, flex_like_pytorch, True))
        monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kinds: torch.autocast("cpu", enabled=False))
    return name


def close(a, b):
    limit = 2e-2 if a.dtype == BF16 else 1e-9
    a, b = a.detach(), b.detach()
    assert float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-3)) < limit


@pytest.mark.parametrize("queries", [64, 192, 320, 704, 832, 2112])
def test_case_14_cudnn_never_gets_a_mask(queries):
    for capability, documents, head_dim in itertools.product(((9, 0), (10, 0), (12, 1)), (0, 3), (64, 128)):
        given = Call("cuda", capability, BF16, 1, queries, queries, 8, 8, head_dim, mask=True, documents=documents)
        assert choose(given).backend == "efficient"
    # One query, whose gradients it makes NaN too.
    assert choose(Call("cuda", (9, 0), BF16, 1, 1, 1, 8, 8, 64)).backend != "cudnn"


@pytest.mark.skipif(not GPU, reason="what is tried is the device's own kernel")
@pytest.mark.parametrize("tokens", [64, 128, 192, 320, 704, 832])
@pytest.mark.parametrize("masked", [True, False])
def test_case_14_gradients_are_finite_where_every_score_is_low(tokens, masked):
    q, k, v = tensors(tokens, 1, 1, 64, device="cuda")
    with torch.no_grad():  # every score about -120, so that exp of minus the log-sum-exp overflows
        q.mul_(0.1)[..., 0] = 1.0
        k.mul_(0.1)[..., 0] = -120 * 8.0
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="cuda").tril() if masked else None
    out = attention(q, k, v, mask=mask)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(bool(t.isfinite().all()) for t in (out, *grads))


def test_case_15_documents_do_not_see_each_other(backend, device):
    q, k, v = tensors(device=device)
    ends = torch.tensor([0, 5, 6, 17, 24], device=device)
    out = attention(q, k, v, cu_seqlens=ends, max_seqlen=11)
    alone = [attention(*(t[:, a:b] for t in (q, k, v))) for a, b in itertools.pairwise(ends.tolist())]
    close(out, torch.cat(alone, 1))
    grads = torch.autograd.grad(out[:, 6:17].sum(), (q, k, v), retain_graph=True)
    for g in grads:  # exactly none to the other documents
        assert not g[:, :6].any() and not g[:, 17:].any()
    with torch.no_grad():
        changed = [torch.cat((t[:, :6] * -3, t[:, 6:]), 1) for t in (q, k, v)]
        assert torch.equal(attention(*changed, cu_seqlens=ends, max_seqlen=11)[:, 6:], out[:, 6:])


@pytest.mark.parametrize("longest", [None, 9, 24])
def test_case_15_tokens_after_the_last_document_have_gradients(backend, device, longest):
    q, k, v = tensors(device=device)
    ends = torch.tensor([0, 5, 13], device=device, dtype=torch.int32)
    out = attention(q, k, v, cu_seqlens=ends, max_seqlen=longest)
    grads = torch.autograd.grad(out[:, :13].sum(), (q, k, v))
    assert bool(out.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)
    assert not any(bool(g[:, 13:].any()) for g in grads)


@pytest.mark.parametrize("window", [1, 2, 7, 23, 24, 25])
def test_case_16_a_window_is_transformers(backend, device, window):
    from transformers.masking_utils import causal_mask_function, sliding_window_overlay

    q, k, v = tensors(device=device)
    near = sliding_window_overlay(window)
    mask = torch.tensor([[causal_mask_function(0, 0, i, j) and near(0, 0, i, j) for j in range(24)] for i in range(24)])
    out = attention(q, k, v, window=window)
    plain = backends.Asked(False, 0.25, None, None)
    want = backends.plain(*(t.double() for t in (q, k, v)), plain, None, mask.to(device)[None, None], None)
    close(out, want)
    gy = torch.ones_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), gy), torch.autograd.grad(want, (q, k, v), gy.double()), strict=True
    ):
        close(a, b)


def test_case_16_a_window_within_documents(backend, device):
    q, k, v = tensors(device=device)
    ends = torch.tensor([0, 10, 24], device=device)
    out = attention(q, k, v, window=4, cu_seqlens=ends)
    close(out, torch.cat([attention(*(t[:, a:b] for t in (q, k, v)), window=4) for a, b in ((0, 10), (10, 24))], 1))


def test_sinks_and_soft_caps_by_the_log_sum_exp(device, monkeypatch):
    if not GPU:
        monkeypatch.setattr(backends, "_flex", lambda: (flex_like_pytorch, flex_like_pytorch, True))
    q, k, v = tensors(device=device)
    sinks = torch.linspace(-1, 2, 4, dtype=q.dtype if GPU else torch.float64, device=device).requires_grad_()
    options = backends.Asked(True, 0.25, 5, 3.0)
    out = [backends.run(b, 1, q, k, v, options, sinks, None, None, None) for b in ("flex", "math")]
    close(*out)
    for a, b in zip(*(torch.autograd.grad(o.sum(), (q, k, v, sinks)) for o in out), strict=True):
        close(a, b)


@pytest.mark.parametrize("tokens", [1, 17, 64, 66, 127, 128, 130])
def test_a_few_soft_capped_tokens_compile_too(tokens, device, monkeypatch):
    """A prompt of 66 tokens through Gemma 2, two heads of q for each of k: FlexAttention's kernel for decoding has no block."""
    if not GPU:
        monkeypatch.setattr(backends, "_flex", lambda: (flex_like_pytorch, flex_like_pytorch, True))
    with torch.no_grad():
        q, k, v = (t.detach() for t in tensors(device=device, tokens=tokens))
        options = backends.Asked(True, 0.25, None, 3.0)
        close(*(backends.run(b, 1, q, k, v, options, None, None, None, None) for b in ("flex", "math")))


@pytest.mark.parametrize("reentrant", [True, False])
def test_case_23_a_recompute_takes_the_backend_of_the_first_pass(device, reentrant, monkeypatch):
    asked = []
    monkeypatch.setattr(A, "choose", lambda call: (asked.append(call), choose(call))[1])
    q, k, v = tensors(256, head_dim=64, device=device)
    A.reset()
    out = checkpoint(
        attention, q, k, v, use_reentrant=reentrant
    )  # the first pass of the one kind runs without gradients
    out.sum().backward()
    assert len(asked) == 2 and asked[0] == asked[1]
    assert [c["count"] for c in choices().values()] == [2]
    assert not [f.name for f in fields(Call) if "grad" in f.name]


def test_case_23_one_token_and_none(backend, device):
    for tokens in (0, 1):
        q, k, v = tensors(tokens, device=device)
        out = (
            attention(q, k, v)
            if tokens
            else backends.run("math", 1, q, k, v, backends.Asked(True, 1.0, None, None), *[None] * 4)
        )
        assert out.shape == q.shape
        out.sum().backward()
        close(out, v.repeat_interleave(2, 2)) if tokens else None


@pytest.mark.parametrize(
    "given",
    [
        Call("cuda", (9, 0), BF16, 1, 2**19, 2**19, 32, 8, 128, documents=5),
        Call("cuda", (12, 1), BF16, 1, 4096, 4096, 32, 8, 128, documents=4097),  # few tokens, very many documents
        Call("cuda", (12, 1), BF16, 8300, 1, 1, 16, 16, 128),  # the case of the report
        Call("cuda", (9, 0), BF16, 256, 4096, 4096, 64, 8, 128),
        Call("cuda", (9, 0), BF16, 1, 2**19, 2**19, 32, 8, 128, window=1024),
    ],
)
def test_case_01_accumulators_stay_below_2_to_the_31(given):
    choice = choose(given)
    each = -(-given.kv_heads // choice.groups)
    assert choice.groups > 1 and "2**31" in choice.reason
    assert given.accumulator * each // given.kv_heads < 2**31


def test_case_01_no_group_is_small_enough():
    with pytest.raises(ValueError, match="one key head"):
        choose(Call("cuda", (9, 0), BF16, 1, 2**25, 2**25, 1, 1, 128))


def test_case_01_heads_in_groups_give_the_same(backend, device):
    q, k, v = tensors(heads=6, kv_heads=3, device=device)
    mask = torch.rand(1, 6, 24, 24, generator=torch.Generator().manual_seed(1)).to(device) > 0.2
    takes = backend in ("math", "efficient")
    given = (q, k, v, backends.Asked(True, 0.25, None, None), None, None, None, mask if takes else None)
    for groups in (2, 3):
        close(backends.run(backend, groups, *given), backends.run(backend, 1, *given))
