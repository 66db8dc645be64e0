"""A mixture of experts where other libraries broke; numbers are those of shared/kernels.md."""

import pytest
import torch
from sparktune.ops.grouped_lora import grouped_lora, reference
from sparktune.ops.moe_combine import moe_combine
from sparktune.ops.moe_mlp import ExpertLinear, moe_mlp, peft_factors
from sparktune.ops.moe_permute import moe_permute
from sparktune.ops.moe_routing import moe_route

pytestmark = pytest.mark.kernels(together=True)


def rand(device, *shape, seed=1, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def layers(device, experts, k=24, n=20, r=3, seed=3):
    """gate_up and down of an MLP [k -> 2n -> k] with LoRA on both."""
    made = []
    for width, depth in ((2 * n, k), (k, n)):
        seed += 3
        w = rand(device, experts, width, depth, seed=seed, scale=depth**-0.5)
        a = rand(device, experts, r, depth, seed=seed + 1, scale=depth**-0.5).requires_grad_()
        b = rand(device, experts, width, r, seed=seed + 2, scale=r**-0.5).requires_grad_()
        made.append(ExpertLinear(w, a, b, 2.0))
    return made


def by_token(x, indices, weights, gate_up, down):
    """Token after token, expert after expert, with W + s B A made whole."""

    def whole(layer, e):
        return layer.weight[e] + layer.scale * layer.b[e] @ layer.a[e]

    rows = []
    for t in range(x.shape[0]):
        y = x[t] * 0
        for j in range(indices.shape[1]):
            e = int(indices[t, j])
            gate, up = (whole(gate_up, e) @ x[t]).chunk(2)
            y = y + weights[t, j] * (whole(down, e) @ (torch.nn.functional.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def same_as_by_token(device, indices, experts, k=24, n=20):
    indices = indices.to(device)
    gate_up, down = layers(device, experts, k, n)
    x = rand(device, indices.shape[0], k).requires_grad_()
    weights = rand(device, *indices.shape, seed=2).abs().requires_grad_()
    leaves = [x, weights, gate_up.a, gate_up.b, down.a, down.b]
    mine, plain = moe_mlp(x, indices, weights, gate_up, down), by_token(x, indices, weights, gate_up, down)
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    dy = rand(device, *mine.shape, seed=8)
    found = torch.autograd.grad(mine, leaves, dy)
    wanted = torch.autograd.grad(plain, leaves, dy, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(b.abs().max())))
    return dict(zip(("x", "weights", "gate_up.a", "gate_up.b", "down.a", "down.b"), found, strict=True))


def test_case_21_experts_with_no_tokens(device):
    found = same_as_by_token(device, torch.tensor([[1, 3], [3, 1], [3, 5]]), 7)
    for name in ("gate_up.a", "gate_up.b", "down.a", "down.b"):
        assert not found[name][[0, 2, 4, 6]].any() and bool(found[name][[1, 3, 5]].any())


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_case_21_all_tokens_to_one_expert(device, expert):
    same_as_by_token(device, torch.full((19, 1), expert), 4)


def test_case_21_one_expert_with_more_than_a_stripe_of_tiles(device):
    indices = torch.full((150, 1), 1)
    indices[::50] = 0
    same_as_by_token(device, indices, 12, 8, 8)


def test_case_21_a_token_that_chooses_an_expert_twice(device):
    same_as_by_token(device, torch.tensor([[2, 2], [0, 2], [2, 2]]), 3)


def test_case_21_lora_rows_in_another_order(device):
    """PEFT keeps an expert's rows of A together, and a rank's columns of B."""
    experts, r, k, n = 4, 3, 24, 20
    lora_a, lora_b = rand(device, experts * r, k), rand(device, n, r * experts, seed=2)
    a, b = peft_factors(lora_a, lora_b, experts)
    delta = torch.einsum("ore,eri->eoi", lora_b.view(n, r, experts), lora_a.view(experts, r, k))
    torch.testing.assert_close(b @ a, delta)
    offsets = torch.tensor([0, 3, 3, 7, 11], dtype=torch.int32, device=device)
    x, zero = rand(device, 11, k, seed=4), torch.zeros(experts, n, k, device=device)
    torch.testing.assert_close(
        grouped_lora(x, zero, offsets, a, b), grouped_lora(x, delta, offsets), rtol=1e-4, atol=1e-4
    )


def test_case_21_experts_that_are_elsewhere_add_nothing(device):
    experts, k = 3, 24
    gate_up, down = layers(device, experts, k)
    x = rand(device, 5, k).requires_grad_()
    indices = torch.tensor([[0, 3], [-1, 2], [7, 9], [1, 2], [3, 0]], device=device)
    weights = rand(device, 5, 2, seed=2).abs()
    here = (indices >= 0) & (indices < experts)
    mine = moe_mlp(x, indices, weights, gate_up, down)
    plain = by_token(x, indices.clamp(0, experts - 1), weights * here, gate_up, down)
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    assert not mine[2].any()
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (mine, plain)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("top_k, experts", [(1, 5), (5, 5), (1, 1)])
def test_case_21_one_expert_a_token_or_all(device, top_k, experts):
    order = torch.rand(6, experts, generator=torch.Generator().manual_seed(1)).argsort(1)
    same_as_by_token(device, order[:, :top_k], experts)


def test_case_21_the_order_within_an_expert_is_that_of_tokens(device):
    indices = torch.randint(0, 3, (700, 2), generator=torch.Generator().manual_seed(1)).to(device)  # over two blocks
    offsets, rows, positions = moe_route(indices, 3)
    assert offsets.tolist() == [0, *torch.bincount(indices.reshape(-1).cpu(), minlength=3).cumsum(0).tolist()]
    for e in range(3):
        mine = rows[offsets[e] : offsets[e + 1]]
        assert bool((mine.diff() >= 0).all())
    assert torch.equal(rows[positions.reshape(-1).long()].long().cpu(), torch.arange(1400) // 2)


def test_case_21_groups_do_not_see_each_other(device):
    """NaN in one expert's rows and weights reaches no other's results or gradients, in whole tiles and at their ends."""
    experts, k, n = 3, 24, 20
    x, w = rand(device, 40, k), rand(device, experts, n, k, seed=2)
    a, b = rand(device, experts, 2, k, seed=3), rand(device, experts, n, 2, seed=4)
    offsets = torch.tensor([0, 17, 21, 40], dtype=torch.int32, device=device)
    leaves = [t.requires_grad_() for t in (x, w, a, b)]
    clean = torch.autograd.grad(grouped_lora(x, w, offsets, a, b).sum(), leaves)
    with torch.no_grad():
        x[17:21], w[1], a[1], b[1] = (float("nan"),) * 4
    found = torch.autograd.grad(grouped_lora(x, w, offsets, a, b).sum(), leaves)
    keep = [torch.tensor([*range(17), *range(21, 40)]), *[torch.tensor([0, 2])] * 3]
    for one, other, rows in zip(clean, found, keep, strict=True):
        assert torch.equal(one[rows.to(device)], other[rows.to(device)])


def test_case_01_and_23_no_tokens(device):
    gate_up, down = layers(device, 4)
    x = torch.empty(0, 24, device=device).requires_grad_()
    indices = torch.empty(0, 2, dtype=torch.int64, device=device)
    y = moe_mlp(x, indices, torch.empty(0, 2, device=device), gate_up, down)
    assert y.shape == (0, 24)
    y.sum().backward()
    assert not gate_up.a.grad.any() and not down.b.grad.any()


def test_case_23_one_token(device):
    same_as_by_token(device, torch.tensor([[3, 1]]), 4)


@pytest.mark.parametrize("k, n", [(1, 1), (7, 33), (129, 65)])
def test_case_23_widths_that_fit_no_tile(device, k, n):
    same_as_by_token(device, torch.tensor([[1, 0], [1, 2], [0, 1], [1, 0]]), 3, k, n)


def test_case_02_and_19_strides_of_all_that_comes_in(device):
    """Sliced, transposed and stride-0 operands and gradients."""
    experts, k, n = 3, 24, 20
    offsets = torch.tensor([0, 5, 5, 9], dtype=torch.int32, device=device)
    x = rand(device, 9, 2 * k)[:, k:].requires_grad_()
    w = rand(device, k, experts, n, seed=2).permute(1, 2, 0)  # strides along no matrix
    a, b = rand(device, k, 2, experts, seed=3).permute(2, 1, 0), rand(device, 2, n, experts, seed=4).permute(2, 1, 0)
    bias = rand(device, n, experts, seed=5).t()
    leaves = [x, *(t.requires_grad_() for t in (a, b, bias))]
    mine = grouped_lora(x, w, offsets, a, b, bias=bias)
    plain = reference(x, w, offsets, a, b, bias, None, None, 1.0)
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    dy = torch.ones(1, 1, device=device).expand(9, n)
    for one, other in zip(*(torch.autograd.grad(y, leaves, dy) for y in (mine, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_case_04_a_second_backward_is_as_the_first(device):
    gate_up, down = layers(device, 4)
    x, indices = rand(device, 6, 24).requires_grad_(), torch.tensor([[0, 1], [2, 3], [1, 0]] * 2, device=device)
    weights = rand(device, 6, 2, seed=2).requires_grad_()
    y = moe_mlp(x, indices, weights, gate_up, down)
    leaves = [x, weights, gate_up.a, gate_up.b, down.a, down.b]
    first, again = (torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_case_09_gradients_are_summed_in_fp32(device):
    # In bf16 a sum of ones stops at 256: the next one is half its last bit.
    m, k, n = 3000, 8, 8
    x = torch.ones(m, k, dtype=torch.bfloat16, device=device)
    w = torch.zeros(2, n, k, dtype=torch.bfloat16, device=device)
    a, b = (torch.full(s, 0.25, device=device).requires_grad_() for s in ((2, 2, k), (2, n, 2)))
    y = grouped_lora(x, w, torch.tensor([0, 0, m], dtype=torch.int32, device=device), a, b)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(a.grad[1], torch.full_like(a[1], m * n * 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(b.grad[1], torch.full_like(b[1], m * k * 0.25), rtol=1e-6, atol=0)
    assert not a.grad[0].any() and not b.grad[0].any()


def test_case_06_a_weight_of_zero_keeps_nan_as_plain_pytorch_does(device):
    z, positions = rand(device, 4, 8), torch.tensor([[0, 1], [3, 2]], dtype=torch.int32, device=device)
    z[1] = float("nan")
    y = moe_combine(z, torch.tensor([[1.0, 0.0], [0.5, 0.5]], device=device), positions)
    assert bool(y[0].isnan().all()) and bool(y[1].isfinite().all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes 13 GiB of GPU memory")
def test_case_01_sorted_rows_past_2_31_elements():
    device = torch.device("cuda")
    tokens, top_k, width = 2**17 + 3, 8, 2**11 + 8
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    indices = torch.randint(0, 16, (tokens, top_k), device=device)
    z, routing = moe_permute(x, indices, 16)
    assert z.numel() > 2**31
    assert torch.equal(z[-4:], x[routing.rows[-4:].long()])
    y = moe_combine(z, torch.full((tokens, top_k), 1 / top_k, device=device), routing.positions)
    assert torch.equal(y, x)
    w = torch.randn(16, 64, width, device=device, dtype=torch.bfloat16)
    last = grouped_lora(z, w, routing.offsets)[-4:]
    torch.testing.assert_close(last, z[-4:] @ w[15].t(), rtol=2e-2, atol=1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_case_21_nothing_waits_for_the_host():
    """Captured once, it serves every routing of that many tokens."""
    device = torch.device("cuda")
    gate_up, down = layers(device, 8, 64, 64)
    x, indices = rand(device, 96, 64), torch.zeros(96, 2, dtype=torch.int64, device=device)
    weights = rand(device, 96, 2, seed=2)

    def run():
        with torch.no_grad():
            return moe_mlp(x, indices, weights, gate_up, down)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for seed in (1, 2):
        indices.copy_(torch.randint(0, 8, (96, 2), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, run())
