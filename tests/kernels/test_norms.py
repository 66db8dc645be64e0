"""The norms' and RoPE's contract besides numbers: libraries they stand for, frozen weights, room, views, counts, errors."""

import pytest
import torch
from sparktune.ops import add_rms_norm as add_module
from sparktune.ops import dispatch, row_config
from sparktune.ops import layer_norm as layer_module
from sparktune.ops.add_rms_norm import add_rms_norm
from sparktune.ops.device import INTERPRETER, SPARK, DeviceProperties
from sparktune.ops.layer_norm import layer_norm
from sparktune.ops.qk_norm_rope import backward_into, qk_norm_rope
from sparktune.ops.qk_norm_rope import reference as qk_norm_rope_reference
from sparktune.ops.rms_norm import rms_norm
from sparktune.ops.rope import reference as rope_reference
from sparktune.ops.rope import rope, rotate
from sparktune.ops.rope_tables import RopeParameters, rope_tables

pytestmark = pytest.mark.kernels(together=True)


def normal(device, *shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def heads(device, dtype=torch.float32, b=2, s=5, h=4, kv=2, d=32):
    """A merged projection, its q and k as views, tables."""
    qkv = normal(device, b, s, (h + 2 * kv) * d, dtype=dtype)
    q, k = qkv[..., : h * d].unflatten(-1, (h, d)), qkv[..., h * d : (h + kv) * d].unflatten(-1, (kv, d))
    return qkv, q, k, *rope_tables(RopeParameters(d), 64, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_pytorchs(device, dtype):
    x, w, b = (normal(device, *shape, seed=i, dtype=dtype) for i, shape in enumerate(((6, 100), (100,), (100,))))
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(layer_norm(x, w, b), torch.nn.functional.layer_norm(x, (100,), w, b), **tolerance)
    torch.testing.assert_close(layer_norm(x, w), torch.nn.functional.layer_norm(x, (100,), w), **tolerance)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_qk_norm_rope_is_the_attention_of_its_model(device, family):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    _, q, k, cos, sin = heads(device)
    norms = [(Gemma3RMSNorm if family == "gemma3" else Qwen3RMSNorm)(32).to(device) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight.data = normal(device, 32, seed=7 + i)
    full = [torch.cat((t[:5],) * 2, -1)[None] for t in (cos, sin)]
    with torch.no_grad():
        n = [norm(t).transpose(1, 2) for norm, t in zip(norms, (q, k), strict=True)]
    want = [t.transpose(1, 2) for t in apply_rotary_pos_emb(*n, *full)]
    variant = "gemma" if family == "gemma3" else "llama"
    out = qk_norm_rope(q, k, *(m.weight.detach() for m in norms), cos, sin, eps=1e-6, variant=variant)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_launch_a_pass_serves_q_and_k_and_views_of_a_merged_projection(device):
    qkv, q, k, cos, sin = heads(device)
    dispatch.reset()
    out = rope(q, k, cos, sin)
    assert dispatch.launches() == {"sparktune.ops.rope.rotate_kernel": 1}, "views must not be copied first"
    assert all(t.is_contiguous() for t in out)
    first = rope(q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin)[0]  # heads first in memory
    assert torch.equal(first, out[0])
    dispatch.reset()
    w = torch.ones(32, device=device)
    qkv.requires_grad_()
    q, k = qkv[..., :128].unflatten(-1, (4, 32)), qkv[..., 128:192].unflatten(-1, (2, 32))
    torch.cat(qk_norm_rope(q, k, w, w, cos, sin), 2).sum().backward()
    kernels = ("forward_kernel", "backward_kernel")
    assert dispatch.launches() == {f"sparktune.ops.qk_norm_rope.{k}": 1 for k in kernels}
    assert qkv.grad[..., 192:].count_nonzero() == 0 and qkv.grad[..., :192].count_nonzero() > 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("h", "kv", "rotary"), [(20, 9, 128), (20, 9, 48), (9, 1, 128)])
def test_heads_can_be_turned_where_they_lie(device, h, kv, rotary, interleaved):
    qkv, q, k, *_ = heads(device, h=h, kv=kv, d=128)
    cos, sin = (t[:, : rotary // 2] for t in rope_tables(RopeParameters(128), 64, device))
    want, rest = rope(q, k, cos, sin, interleaved=interleaved), qkv[..., (h + kv) * 128 :].clone()
    rotate(q, k, q, k, cos, sin, None, interleaved, inverse=False)
    assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and torch.equal(qkv[..., (h + kv) * 128 :], rest)


def test_gradients_can_be_written_into_slices_of_a_merged_one(device):
    _, q, k, cos, sin = heads(device)
    w = [1 + normal(device, 32, seed=s) / 2 for s in (3, 4)]
    q, k = (t.clone().requires_grad_() for t in (q, k))
    w = [t.requires_grad_() for t in w]
    merged = torch.full((2, 5, 8 * 32), 7.0, device=device)
    dq, dk = merged[..., :128].unflatten(-1, (4, 32)), merged[..., 128:192].unflatten(-1, (2, 32))
    at = torch.tensor([[0, 1, 2, 0, 1], [9, 8, 7, 6, 5]], device=device)
    gy = [normal(device, *t.shape, seed=5) for t in (q, k)]

    want = torch.autograd.grad(rope(q, k, cos, sin, at), (q, k), gy)
    rotate(*gy, dq, dk, cos, sin, at, interleaved=False, inverse=True)
    assert torch.equal(dq, want[0]) and torch.equal(dk, want[1]) and bool((merged[..., 192:] == 7).all())

    want = torch.autograd.grad(qk_norm_rope(q, k, *w, cos, sin, at), (q, k, *w), gy)
    inputs = [t.detach() for t in (q, k)]
    weights = [t.detach() for t in w]
    dw = backward_into(*gy, *inputs, dq, dk, *weights, cos, sin, at, 1e-6, "llama", True)
    assert all(map(torch.equal, (dq, dk, *dw), want)) and bool((merged[..., 192:] == 7).all())


@pytest.mark.parametrize(
    ("h", "kv", "d", "given"), [(32, 4, 128, False), (8, 4, 256, True), (7, 1, 20, True), (3, 2, 20, False)]
)
def test_more_sequences_than_a_launch_takes_come_in_several(device, monkeypatch, h, kv, d, given):
    """And q and k in tiles of different heights, several of them a program, the last not full."""
    from sparktune.ops import qk_norm_rope as module

    q, k = (normal(device, 3, 1, n, d, seed=n, dtype=torch.bfloat16).requires_grad_() for n in (h, kv))
    w, (cos, sin) = torch.rand(d, device=device), (t[:8] for t in rope_tables(RopeParameters(d), 8, device))
    at = torch.tensor([[0], [7], [3]], device=device) if given else None

    def both():
        out = qk_norm_rope(q, k, w, w, cos, sin, at)
        return *out, *torch.autograd.grad(out, (q, k), out)

    whole = both()
    for a, b in zip(whole, qk_norm_rope_reference(q, k, w, w, cos, sin, at), strict=False):
        torch.testing.assert_close(a, b, rtol=8e-3, atol=8e-3)
    monkeypatch.setattr(module, "BATCHES", 2)
    dispatch.reset()
    assert all(map(torch.equal, both(), whole))
    assert set(dispatch.launches().values()) == {2}


@pytest.mark.parametrize("interleaved", [False, True])
def test_more_sequences_than_a_launch_of_rope_takes_come_in_several(device, monkeypatch, interleaved):
    from sparktune.ops import rope as module

    q, k = (normal(device, 3, 2, n, 20, seed=n).requires_grad_() for n in (3, 2))
    cos, sin = (t[:8] for t in rope_tables(RopeParameters(16), 8, device))
    at = torch.tensor([[0, 1], [7, 6], [3, 3]], device=device)

    def both():
        out = rope(q, k, cos, sin, at, interleaved)
        return *out, *torch.autograd.grad(out, (q, k), out)

    whole = both()
    assert all(map(torch.equal, whole, rope_reference(q, k, cos, sin, at, interleaved)))
    monkeypatch.setattr(module, "BATCHES", 2)
    dispatch.reset()
    assert all(map(torch.equal, both(), whole))
    assert set(dispatch.launches().values()) == {4}  # two each way


def test_frozen_weights_get_no_gradient_and_no_sums(device, monkeypatch):
    x, residual = (normal(device, 4, 64, seed=s).requires_grad_() for s in (0, 1))
    w, b = torch.ones(64, device=device), torch.zeros(64, device=device)
    seen = []
    monkeypatch.setattr(
        dispatch, "launch", lambda kernel, programs, *a, launch=dispatch.launch, **k: (
            seen.append((programs, k.get("NEED_DW", k.get("SUMS")))), launch(kernel, programs, *a, **k)
        )[1],
    )  # fmt: skip
    (sum(add_rms_norm(x, residual, w)) + layer_norm(x, w, b)).sum().backward()
    assert w.grad is None and b.grad is None and x.grad is not None
    assert sorted(seen, key=str) == [(4, False), (4, False), (4, None), (4, None)]


def test_an_fp32_weight_over_bf16_activations(device):
    x, residual = (normal(device, 4, 32, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (0, 1))
    w = torch.rand(32, device=device).requires_grad_()
    y, s = add_rms_norm(x, residual, w)
    want = add_module.reference(x, residual, w)
    assert (y.dtype, s.dtype) == (torch.float32, torch.bfloat16) == tuple(t.dtype for t in want)
    (y.sum() + s.float().sum()).backward()
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    assert layer_norm(x, w).dtype == torch.bfloat16
    _, q, k, cos, sin = heads(device, torch.bfloat16)
    for ours, plain in zip(
        qk_norm_rope(q, k, w, w, cos, sin), qk_norm_rope_reference(q, k, w, w, cos, sin), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, plain, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_room_is_left_behind_every_row_and_can_be_written(device, compiled):
    x, residual, w = (normal(device, *s, seed=i) for i, s in enumerate(((2, 3, 48), (2, 3, 48), (48,))))

    def call(x, residual, w):
        return rms_norm(x, w, room=16), add_rms_norm(x, residual, w, room=8)[0]

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    leaf = x.clone().requires_grad_()
    for y, want, room in zip(
        run(leaf, residual, w), (rms_norm(x, w), add_rms_norm(x, residual, w)[0]), (16, 8), strict=True
    ):
        assert torch.equal(y, want) and y.stride() == (3 * (48 + room), 48 + room, 1)
        # All room belongs to the buffer, the last row's too. `data`: y itself stays as autograd knows it.
        y.data.as_strided((2, 3, 48 + room), y.stride())[..., 48:] = 3
        assert torch.equal(y, want)
        (grad,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        assert grad.shape == x.shape and bool(grad.isfinite().all())
    torch._dynamo.reset()


def test_a_gradient_of_a_sum_may_have_room_too(device):
    x, residual, dy, ds = (normal(device, 5, 48, seed=i) for i in range(4))
    w = normal(device, 48, seed=4)
    _, s, r = add_module._forward(x, residual, w, 1e-6, "llama", 0)
    plain, dw = add_module._backward(dy, ds, s, w, r, "llama", [True, True])
    roomy, dw_too = add_module._backward(dy, ds, s, w, r, "llama", [True, True], 16)
    assert torch.equal(plain, roomy) and torch.equal(dw, dw_too)
    assert (plain.stride(0), roomy.stride(0)) == (48, 64)


@pytest.mark.parametrize("props", [SPARK, INTERPRETER, DeviceProperties(132, 232448, 2048, 50 * 2**20, 90)])
@pytest.mark.parametrize("n", [1, 63, 1024, 1025, 2560, 3072, 5120, 8192, 8193, 262144])
def test_every_width_of_layer_norm_gets_a_configuration_that_the_gate_compiled(n, props):
    gate = set()
    for launch in layer_module.OP.launches(SPARK):
        sums = launch.constexprs.get("SUMS", False)
        gate.add((bool(sums), launch.constexprs["BLOCK"], launch.constexprs["SINGLE"], launch.num_warps))
    for m in (1, 7, 4096):
        for sums in (False, True):
            c = row_config.RowConfig.choose(m, n, props, sums)
            assert (sums, c.block, c.single, c.num_warps) in gate
            assert not c.single or c.block >= n
            assert (c.programs - 1) * c.rows_each < m <= c.programs * c.rows_each, (
                "every program has rows, every row one"
            )


Q, T = torch.ones(1, 3, 2, 8), torch.ones(4, 4)
W = torch.ones(8)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(4), room=-1), "room must not be negative, got -1"),
        (lambda: add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3)), r"weight must be \[4\], got \[3\]"),
        (lambda: add_rms_norm(torch.ones(2, 4), torch.ones(1, 4), torch.ones(4)), "one shape and dtype"),
        (lambda: add_rms_norm(torch.ones(2, 4), torch.ones(2, 4).half(), torch.ones(4)), "one shape and dtype"),
        (lambda: add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), 1e-6, "t5"), "llama, gemma"),
        (lambda: add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), room=-8), "not be negative"),
        (lambda: layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(3)), r"must be \[4\], got \[\[4\], \[3\]\]"),
        (lambda: layer_norm(torch.ones(2, 4).double(), torch.ones(4)), "fp32, bf16 or fp16"),
        (lambda: layer_norm(torch.ones(2, 4), torch.ones(4, device="meta")), "on one device"),
        (lambda: rope(Q, torch.ones(1, 3, 2, 6), T, T), r"must be \[B, S, heads, D\]"),
        (lambda: rope(Q, Q.half(), T, T), "both be"),
        (lambda: rope(Q, Q, torch.ones(4, 5), torch.ones(4, 5)), r"R up to 8"),
        (lambda: rope(Q, Q, T.half(), T.half()), "cos and sin must be fp32"),
        (lambda: rope(Q, Q, T.clone().requires_grad_(), T), "no gradient"),
        (lambda: rope(Q, Q, T[:2], T[:2]), "3 positions need tables as long, got 2"),
        (lambda: rope(Q, Q, T, T, torch.zeros(1, 3)), "int32 or int64"),
        (lambda: rope(Q, Q, T, T, torch.zeros(1, 2, dtype=torch.int64)), r"must be \[1, 3\] or \[3\]"),
        (lambda: qk_norm_rope(Q, Q, W, torch.ones(4), T, T), r"weights must be \[8\]"),
        (lambda: qk_norm_rope(Q, Q, W, W.double(), T, T), "weights must be fp32"),
        (lambda: qk_norm_rope(Q, Q, W, W, T, T, variant="t5"), "llama, gemma"),
    ],
)
def test_wrong_arguments_get_a_sentence(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_positions_may_have_any_of_three_shapes(device):
    _, q, k, cos, sin = heads(device)
    at = torch.tensor([4, 0, 1, 2, 3], device=device)
    want = rope(q, k, cos, sin, at[None].expand(2, 5).contiguous())
    for form in (at, at[None], at[None].expand(2, 5), at.int()):
        assert all(map(torch.equal, rope(q, k, cos, sin, form), want))
