"""LoRA inside the matrix product where other libraries broke; numbers are those of shared/kernels.md."""

import pytest
import torch
from sparktune.ops.lora_linear import lora_linear
from sparktune.ops.lora_mlp import lora_mlp
from sparktune.ops.lora_qkv import lora_qkv
from sparktune.ops.weights import Weight
from torch.nn.functional import linear

pytestmark = pytest.mark.kernels(together=True)


def rand(device, *shape, dtype=torch.float32, seed=1, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def nf4(device, n, k, seed=2):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8, generator=g)
    absmax = torch.rand(-(-n * k // 64), generator=g) * 0.1 + 0.1
    return Weight(codes.to(device), (n, k), absmax.to(device), None, 64, "nf4")


def adapter(device, n, k, r=4, seed=3, dtype=torch.float32):
    a, b = rand(device, r, k, seed=seed, scale=k**-0.5), rand(device, n, r, seed=seed + 50, scale=r**-0.5)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def calls(device, n=48, k=32):
    """Name -> (call of x, its A and B)."""
    w, kv, down = nf4(device, n, k), nf4(device, 16, k, 5), nf4(device, k, n, 6)
    one, two, three = adapter(device, n, k), adapter(device, 16, k, 3, seed=9), adapter(device, k, n, 5, seed=13)
    other = adapter(device, n, k, 2, seed=21)
    return {
        "linear": (lambda x, **o: lora_linear(x, w, *one, scale=2.0, **o), one),
        "qkv": (lambda x, **o: torch.cat(lora_qkv(x, (w, kv, kv), (one, two, None), **o), -1), (*one, *two)),
        "mlp": (lambda x, **o: lora_mlp(x, (w, w, down), (one, other, three), **o), (*one, *other, *three)),
    }


OPS = ("linear", "qkv", "mlp")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("room", [0, 32])
def test_case_04_a_second_backward_is_as_the_first(device, op, room):
    call, leaves = calls(device)[op]
    buffer = rand(device, 6, 32 + room)
    x = buffer[:, :32].requires_grad_()
    before = x.detach().clone()
    y = call(x, tail_free=room > 0)
    dy = rand(device, *y.shape, seed=7)
    first = torch.autograd.grad(y, [x, *leaves], dy, retain_graph=True)
    buffer.data[:, 32:] = float("nan")  # the room is anyone's between the passes
    again = torch.autograd.grad(y, [x, *leaves], dy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(x, before) and all(bool(g.isfinite().all()) for g in again)


def test_case_04_two_layers_write_into_the_room_of_one_input(device):
    """Neither spoils what the other saved, nor makes autograd think so."""
    w, pairs = nf4(device, 48, 32), [adapter(device, 48, 32, r, seed=r) for r in (4, 7)]
    x, roomy = rand(device, 6, 32), rand(device, 6, 64)[:, :32]
    roomy.copy_(x)
    found = []
    for t in (x.requires_grad_(), roomy.requires_grad_()):
        y = sum(lora_linear(t, w, *pair, tail_free=t is roomy) for pair in pairs)
        found.append(torch.autograd.grad(y, [t, *pairs[0], *pairs[1]], torch.ones_like(y)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_case_09_gradients_of_a_and_b_are_summed_in_fp32(device):
    # In bf16 a sum of ones stops at 256: the next one is half its last bit.
    m, n, k = 3000, 16, 24
    w = Weight(torch.zeros(n, k, dtype=torch.bfloat16, device=device), (n, k))
    a, b = (torch.full(s, 0.25, device=device).requires_grad_() for s in ((2, k), (n, 2)))
    y = lora_linear(torch.ones(m, k, dtype=torch.bfloat16, device=device), w, a, b)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(a.grad, torch.full_like(a, m * n * 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(b.grad, torch.full_like(b, m * k * 0.25), rtol=1e-6, atol=0)


def test_case_09_gradients_of_fp32_factors_are_not_rounded_to_bf16(device):
    call, leaves = calls(device)["mlp"]
    x = rand(device, 40, 32, dtype=torch.bfloat16).requires_grad_()
    y = call(x)
    for g in torch.autograd.grad(y, leaves, rand(device, *y.shape, dtype=torch.bfloat16)):
        assert g.dtype == torch.float32
        assert float((g != g.bfloat16().float()).double().mean()) > 0.9


def test_case_13_lora_of_a_head_tied_to_the_embedding(device):
    vocabulary, k = 40, 32
    embedding = rand(device, vocabulary, k)  # frozen, and read by both ends
    kept = embedding.clone()
    head = Weight.of(embedding)
    a, b = adapter(device, vocabulary, k)
    ids = torch.tensor([[3, 1, 4, 1, 5]], device=device)
    hidden = embedding[ids].requires_grad_()
    logits = lora_linear(hidden, head, a, b, scale=0.5)
    torch.testing.assert_close(logits, linear(hidden, kept) + linear(linear(hidden, a), b) * 0.5, rtol=1e-4, atol=1e-4)
    logits.logsumexp(-1).sum().backward()
    assert all(float(t.grad.abs().sum()) > 0 for t in (a, b, hidden)), "the loss went around the LoRA"
    assert torch.equal(embedding, kept)


def test_case_13_a_trained_base_weight_is_refused_and_not_quietly_frozen(device):
    weight = rand(device, 8, 16).requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(rand(device, 2, 16), Weight(weight, (8, 16)))


def test_case_18_fp16_does_not_overflow_on_the_way_to_a_finite_gradient(device):
    # dh u = 200 * 1000 is over fp16's 65504; times the slope of silu at -10, 4e-4, it is not.
    k = 16
    eye = torch.eye(k, dtype=torch.float16, device=device)
    weights = (Weight(eye, (k, k)), Weight(eye * -100, (k, k)), Weight(eye, (k, k)))
    x = torch.full((3, k), -10.0, dtype=torch.float16, device=device).requires_grad_()
    lora_mlp(x, weights, (None, None, None)).backward(torch.full_like(x, 200.0))
    e = torch.full((1,), -10.0, dtype=torch.float64).requires_grad_()
    (torch.nn.functional.silu(e) * (e * -100) * 200).backward()
    torch.testing.assert_close(x.grad.double().cpu(), e.grad.expand(3, k), rtol=5e-3, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
@pytest.mark.parametrize("op", OPS)
def test_case_19_two_streams_give_what_one_gives(op):
    device = torch.device("cuda")
    call, leaves = calls(device, 1024, 512)[op]
    x = rand(device, 512, 512, dtype=torch.bfloat16)

    def both():
        y = call(x)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    want = both()
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(both())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for f in found for a, b in zip(f, want, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_case_23_no_rows(device, op):
    call, leaves = calls(device)[op]
    x = torch.empty(2, 0, 32, device=device).requires_grad_()
    y = call(x)
    assert y.shape[:-1] == (2, 0)
    found = torch.autograd.grad(y, [x, *leaves], torch.empty_like(y))
    assert found[0].shape == x.shape
    assert all(g.shape == t.shape and not g.any() for g, t in zip(found[1:], leaves, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_case_23_one_token_is_the_same_token_in_a_sequence(device, op):
    call, _ = calls(device)[op]
    x = rand(device, 1, 5, 32)
    torch.testing.assert_close(call(x[:, 2:3]), call(x)[:, 2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 41])
def test_case_23_a_width_that_quantisation_blocks_run_across(device, k):
    w = nf4(device, 5, k)
    x, (a, b) = rand(device, 3, k), adapter(device, 5, k, 1)
    want = linear(x, w.reference(torch.float32)) + linear(linear(x, a), b)
    torch.testing.assert_close(lora_linear(x, w, a, b), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_case_23_nan_in_padding_rows_stays_there(device, op):
    call, _ = calls(device)[op]
    x = rand(device, 6, 32)
    clean = call(x)
    x[4] = float("nan")
    x.requires_grad_()
    y = call(x)
    keep = [0, 1, 2, 3, 5]
    assert torch.equal(y[keep], clean[keep]) and bool(y[4].isnan().all())
    (dx,) = torch.autograd.grad(y, x, rand(device, *y.shape, seed=8))
    assert bool(dx[keep].isfinite().all())


@pytest.mark.parametrize("op", OPS)
def test_case_23_nan_in_memory_that_nobody_wrote(device, op):
    """Columns right of x, the padding of ranks and whole buffers hold whatever was there before."""
    from sparkproof.judge.correctness import poisoned

    call, leaves = calls(device)[op]
    x = rand(device, 6, 32)
    want = call(x)
    with poisoned():
        buffer = torch.full((6, 80), float("nan"), device=device)
        buffer[:, :32] = x
        view = buffer[:, :32].requires_grad_()
        y = call(view, tail_free=True)
        found = torch.autograd.grad(y, [view, *leaves], torch.ones_like(y))
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert all(bool(g.isfinite().all()) for g in found)


@pytest.mark.parametrize("op", OPS)
def test_case_23_what_lies_beside_x_is_written_with_leave_only(device, op):
    call, _ = calls(device)[op]
    buffer = rand(device, 6, 80)
    kept = buffer.clone()
    call(buffer[:, :32].requires_grad_()).sum().backward()
    assert torch.equal(buffer, kept)


@pytest.mark.parametrize("op", OPS)
def test_case_23_a_checkpoints_recompute_draws_the_mask_of_the_first_pass(device, op):
    call, leaves = calls(device)[op]
    x = rand(device, 6, 32).requires_grad_()

    def run(wrap):
        torch.manual_seed(11)
        y = wrap(lambda t: call(t, dropout=0.4), x)
        return y.detach(), *torch.autograd.grad(y, [x, *leaves], torch.ones_like(y))

    plain = run(lambda f, t: f(t))
    saved = run(lambda f, t: torch.utils.checkpoint.checkpoint(f, t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
