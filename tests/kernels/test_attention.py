"""The attention dispatcher: what it chooses for which device, right numbers by every backend that runs here, its options."""

import math

import pytest
import torch
from sparktune.ops import attention as A
from sparktune.ops import attention_backends as backends
from sparktune.ops.attention import Call, attention, choices, choose

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
H100, B200, GB10, SIBLING, A100, ADA, T4 = (9, 0), (10, 0), (12, 1), (12, 0), (8, 0), (8, 9), (7, 5)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def call(
    capability, dtype=BF16, *, batch=2, queries=2048, heads=32, kv_heads=8, head_dim=128, device="cuda", **options
):
    options = {"keys": queries, **options}
    return Call(device, capability, dtype, batch, queries, options.pop("keys"), heads, kv_heads, head_dim, **options)


@pytest.mark.parametrize(
    ("given", "backend"),
    [
        (call(H100), "cudnn"),
        (call(B200), "cudnn"),
        (call(GB10), "flash"),
        (call(SIBLING), "flash"),
        (call(A100), "flash"),
        (call(ADA), "flash"),
        (call(T4, FP16), "efficient"),
        (call(T4), "math"),
        (call(H100, FP32), "efficient"),
        (call(GB10, FP32), "efficient"),
        (call(H100, torch.float64), "math"),
        (call((0, 0), device="cpu"), "math"),
        (call((0, 0), device="mps"), "math"),
        (call(H100, queries=0), "math"),
        # Short, not causal, or few queries of many keys: not cuDNN.
        (call(H100, queries=127), "flash"),
        (call(H100, queries=1), "flash"),
        (call(H100, causal=False), "flash"),
        (call(H100, queries=512, keys=2048), "varlen"),
        # Heads.
        (call(H100, head_dim=256), "flash"),
        (call(GB10, head_dim=256), "flash"),
        (call(GB10, head_dim=208), "efficient"),
        (call(H100, head_dim=208), "flash"),
        (call(H100, head_dim=72), "cudnn"),
        (call(H100, head_dim=288), "efficient"),
        (call(H100, head_dim=100), "math"),
        # Packed rows, windows, masks.
        (call(H100, batch=1, documents=16), "varlen"),
        (call(GB10, batch=1, documents=16), "varlen"),
        (call(T4, FP16, batch=1, documents=16), "efficient"),
        (call(H100, FP32, batch=1, documents=16), "efficient"),
        (call(H100, batch=1, documents=16, varlen=False), "efficient"),
        (call(H100, window=512), "varlen"),
        (call(GB10, window=512), "varlen"),
        (call(H100, window=2048), "cudnn"),
        (call(H100, window=512, varlen_window=False), "efficient"),
        (call(H100, batch=1, documents=4, varlen_window=False), "varlen"),
        (call(H100, mask=True), "efficient"),
        (call(GB10, mask=True), "efficient"),
        # Gemma 2 and gpt-oss.
        (call(H100, softcap=True, head_dim=256), "flex"),
        (call(GB10, sinks=True, head_dim=64, window=128), "flex"),
        (call(H100, sinks=True, mask=True), "math"),
        (call((0, 0), device="cpu", sinks=True), "math"),
    ],
)
def test_the_choice_by_device_and_shape(given, backend):
    choice = choose(given)
    assert choice.backend == backend
    assert choice.reason and choice.groups == 1


def visible(i, j, queries, keys, causal, window, ends, mask, b, h):
    """Whether query i may see key j, said as plainly as can be."""
    at = i + keys - queries
    if causal and j > at:
        return False
    if window is not None and j <= at - window:
        return False
    if ends is not None and sum(e <= at for e in ends) != sum(e <= j for e in ends):
        return False
    if mask is None:
        return True
    m = mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1)].expand(queries, keys)
    return bool(m[i, j]) if m.dtype == torch.bool else float(m[i, j]) > -math.inf


def oracle(q, k, v, *, causal=True, scale=None, window=None, softcap=None, sinks=None, ends=None, mask=None):
    """float64, one head and query at a time."""
    share = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q)
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                see = [
                    j
                    for j in range(k.shape[1])
                    if visible(i, j, q.shape[1], k.shape[1], causal, window, ends, mask, b, h)
                ]
                if not see:
                    rows.append(q[b, i, h] * 0)
                    continue
                score = (k[b, see, h // share] * q[b, i, h]).sum(-1) * scale
                score = score if softcap is None else softcap * torch.tanh(score / softcap)
                if mask is not None and mask.dtype != torch.bool:
                    m = mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1)]
                    score = score + m.expand(q.shape[1], k.shape[1])[i, see].double()
                full = score if sinks is None else torch.cat((score, sinks[h : h + 1]))
                rows.append(torch.softmax(full, 0)[: len(see)] @ v[b, see, h // share])
    return torch.stack(rows).view(out.shape)


def tensors(batch=2, queries=9, keys=None, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads), *[(batch, keys or queries, kv_heads)] * 2]
    return [torch.randn(*s, head_dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


MASK = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(3)) > 0.4
MASK[1, :, 4] = False  # a query that may see nothing
CASES = {
    "causal": {},
    "not causal": {"causal": False},
    "scale": {"scale": 0.7},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "sinks, window and softcap": {"sinks": True, "window": 2, "softcap": 5.0},
    "packed": {"ends": [2, 3, 9]},
    "packed, empty document": {"ends": [2, 2, 9]},
    "packed, tokens left over": {"ends": [2, 6]},
    "packed with a window": {"ends": [4, 9], "window": 2},
    "mask": {"mask": MASK},
    "mask alone": {"mask": MASK, "causal": False},
    "mask a head": {"mask": MASK.expand(2, 4, 9, 9) ^ (torch.arange(4) % 2 == 1)[:, None, None]},
    "bias": {"mask": torch.where(MASK, torch.linspace(-1, 1, 9), -math.inf)},
    "keys masked": {"mask": MASK[:, :, :1]},
    "last queries": {"keys": 13},
    "last queries with a window": {"keys": 13, "window": 5},
    "one query": {"queries": 1, "keys": 7},
    "one query with a window": {"queries": 1, "keys": 7, "window": 2},
    "more queries than keys": {"keys": 6},
}


@pytest.mark.parametrize("part", [backends.PART, 20])
@pytest.mark.parametrize("case", CASES)
def test_right_forward_and_backward_on_the_cpu(case, part, monkeypatch):
    monkeypatch.setattr(backends, "PART", part)  # 20: two queries at a time
    options = dict(CASES[case])
    packed = "ends" in options
    sizes = {n: options.pop(n) for n in ("keys", "queries") if n in options}
    ours = tensors(batch=1 if packed else 2, **sizes)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 2, 4, dtype=torch.float64).requires_grad_()
        ours.append(options["sinks"])
        theirs.append(options["sinks"].detach().clone().requires_grad_())
    ends = options.pop("ends", None)
    told = {"cu_seqlens": torch.tensor([0, *ends])} if packed else {}
    got = attention(*ours[:3], **options, **told)
    if len(theirs) > 3:
        options["sinks"] = theirs[3]
    want = oracle(*theirs[:3], **options, ends=[*ends, 9] if packed else None)
    gy = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(got, ours, gy), torch.autograd.grad(want, theirs, gy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


REAL = {
    "causal": {},
    "window": {"window": 100},
    "window of one key": {"window": 1},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": 100},
    "packed": {"ends": [100, 101, 300]},
    "packed, tokens left over": {"ends": [64, 250]},
    "mask": {"mask": True},
    "last queries": {"keys": 400},
    "one query": {"queries": 1, "keys": 300},
}


@pytest.mark.skipif(not GPU, reason="the fused backends are of CUDA")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("case", REAL)
def test_right_on_the_gpu(case, head_dim, dtype):
    options = dict(REAL[case])
    queries = options.pop("queries", 300)
    keys = options.pop("keys", queries)
    ends = options.pop("ends", None)
    batch = 1 if ends else 2
    g = torch.Generator().manual_seed(4)
    merged = torch.randn(batch, keys, 8, head_dim, generator=g).to(dtype).cuda()
    # Slices of a merged projection, as a model has them.
    ours = [t.requires_grad_() for t in (merged[:, keys - queries :, :4], merged[:, :, 4:6], merged[:, :, 6:])]
    extra = [torch.linspace(-1, 2, 4, device="cuda").requires_grad_()] if options.pop("sinks", False) else []
    if options.pop("mask", False):
        options["mask"] = torch.rand(batch, 1, queries, keys, generator=g).cuda() > 0.3
    wide = [t.detach().double().requires_grad_() for t in (*ours, *extra)]
    named = {"cu_seqlens": torch.tensor([0, *ends], device="cuda")} if ends else {}
    got = attention(*ours, **options, **named, **({"sinks": extra[0]} if extra else {}))
    want = attention(*wide[:3], **options, **named, **({"sinks": wide[3]} if extra else {}))
    gy = torch.randn(want.shape, generator=g, dtype=torch.float64).cuda()
    limit = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-3}[dtype]
    assert got.dtype == dtype
    assert float((got - want).norm() / want.norm()) < limit
    grads = torch.autograd.grad(got, [*ours, *extra], gy.to(dtype))
    for a, b in zip(grads, torch.autograd.grad(want, wide, gy), strict=True):
        # Of one key alone the weights are 1: the gradients of q and k are zero, and have no relative error.
        assert float((a - b).norm() / torch.maximum(b.norm(), gy.norm() / 10)) < 2 * limit


def test_choices_are_counted_with_their_reasons():
    A.reset()
    q, k, v = tensors()
    attention(q, k, v)
    attention(q, k, v, causal=False)
    assert choices() == {"math": {"count": 2, "reason": "the plain formula on cpu"}}
    A.reset()
    assert choices() == {}


def test_the_reference_is_pytorchs():
    q, k, v = tensors(queries=33, head_dim=32, dtype=FP32)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention(q, k, v), want.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_autocast_takes_its_dtype():
    q, k, v = tensors(dtype=FP32)
    with torch.autocast("cpu", dtype=BF16):
        out = attention(q, k, v)
    assert out.dtype == BF16
    out.float().sum().backward()
    assert q.grad.dtype == FP32


def test_no_queries_and_no_keys():
    q, k, v = tensors()
    assert attention(q[:, :0], k, v).shape == (2, 0, 4, 16)
    assert torch.equal(attention(q, k[:, :0], v[:, :0], causal=False), torch.zeros_like(q))
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 9, 4, 16)


def test_compiles_into_one_graph():
    q, k, v = tensors(dtype=FP32)
    cu = torch.tensor([0, 4, 9])
    for options in ({}, {"window": 3}, {"sinks": torch.zeros(4)}):
        compiled = torch.compile(lambda *t, o=options: attention(*t, **o), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, **options))
    packed = torch.compile(lambda *t: attention(*t, cu_seqlens=cu), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(packed(*(t[:1] for t in (q, k, v))), attention(q[:1], k[:1], v[:1], cu_seqlens=cu))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "1 key or more"),
        ({"window": 4, "causal": False}, "causal=False"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\]"),
        ({"mask": torch.ones(9, 9, dtype=torch.bool)}, r"broadcast to \[2, 4, 9, 9\]"),
        ({"mask": torch.ones(2, 1, 9, 9, requires_grad=True)}, "gets no gradient"),
        ({"mask": torch.ones(2, 1, 9, 9, device="meta")}, "one device"),
        ({"max_seqlen": 4}, "give cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"packed rows are \[1, T, H, D\]"),
    ],
)
def test_wrong_options_get_a_sentence(options, match):
    with pytest.raises(ValueError, match=match):
        attention(*tensors(), **options)


@pytest.mark.parametrize(
    ("ends", "longest", "match"),
    [
        ([0, 5, 3, 9], None, "must rise from 0"),
        ([0, 5, 12], None, "at most 9"),
        ([1, 9], None, "must rise from 0"),
        ([0, 7, 9], 5, "max_seqlen 5 is less than the longest document, 7"),
    ],
)
def test_wrong_documents_get_a_sentence(ends, longest, match):
    with pytest.raises(ValueError, match=match):
        attention(*tensors(batch=1), cu_seqlens=torch.tensor(ends), max_seqlen=longest)


def test_wrong_heads_get_a_sentence():
    q, k, v = tensors(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="no multiple of 3"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="one floating dtype"):
        attention(*tensors()[:2], tensors()[2].float())
